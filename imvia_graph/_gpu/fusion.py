"""Attention over the modalities of a row, in one pass over their vectors, as Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor

from imvia_graph import _gpu
from imvia_graph._gradients import with_gradients

#: triton.language, once `usable` has been called.
tl: Any = None

#: Maximum width of a row.
_WIDEST = 1024
#: Elements of a modality in a program's tile, and tiles of a program in the backward pass, over
#: which it sums the gradients of the attention vectors.
_AT_A_TIME, _TIMES = 2048, 2


def usable(parts: Sequence[Tensor]) -> bool:
    """Return whether there are kernels for M tensors (B, d) on their device."""
    first = parts[0]
    return (
        len(parts) <= _gpu.ARGUMENTS
        and not torch.compiler.is_compiling()
        and 1 <= first.shape[1] <= _WIDEST
        and all(part.dtype in _gpu.DTYPES and part.device == first.device for part in parts)
        and _gpu.runs_on(first.device)
        and _gpu.load(globals(), _KERNELS)
    )


def plain(vectors: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `fuse` with PyTorch operations, from (M, d) vectors and M tensors (B, d)."""
    stacked = torch.stack(parts, dim=1)
    with torch.autocast(stacked.device.type, enabled=False):
        attention = (stacked * vectors.to(stacked.dtype)).sum(-1).softmax(dim=1)
        return (stacked * attention[..., None]).sum(1), attention


def fuse(vectors: Tensor, wanted: bool, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Fuse M modalities by attention.

    Parameters
    ----------
    vectors : Tensor
        (M, d) attention vectors.
    wanted : bool
        Whether to return the weights.
    parts : sequence of Tensor
        M times (B, d).

    Returns
    -------
    Tensor
        (B, d) in the widest dtype of the parts.
    Tensor or None
        (B, M) weights in float32.
    """
    joint, weights = _Fuse.apply(vectors, wanted, *(part.contiguous() for part in parts))
    return joint, weights


class _Fuse(torch.autograd.Function):
    """`fuse` of contiguous tensors."""

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, wanted: bool, *parts: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        rows, width = parts[0].shape
        out = parts[0].new_empty(rows, width, dtype=dtype)
        logits = out.new_empty(rows, len(parts), dtype=torch.float32)
        total = out.new_empty(rows, dtype=torch.float32)
        _launch(_fuse, 1, parts, _exact(vectors), logits, total, rows, out)
        ctx.save_for_backward(vectors, logits, total, *parts)
        return out, (logits - total[:, None]).exp() if wanted else None

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, grad_attention: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        vectors, logits, total, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]

            def joint(vectors: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
                found, attention = plain(vectors, *parts)
                return (found,) if grad_attention is None else (found, attention.float())

            grads_in = (grad,) if grad_attention is None else (grad, grad_attention)
            of_vectors, *of_parts = with_gradients(joint, grads_in, (vectors, *parts), needed)
            return of_vectors, None, *of_parts
        rows, width = parts[0].shape
        grad = grad.contiguous()
        given = None if grad_attention is None else grad_attention.contiguous()
        grads = [torch.empty_like(part) for part in parts]
        shared = total.new_empty(-(-rows // _rows(width, _TIMES)), len(parts), width)
        rest = grad, given, shared, rows, *_gpu.padded(grads)
        _launch(_back, _TIMES, parts, _exact(vectors), logits, total, *rest)
        ones = shared.new_ones(len(shared))
        # As a product: ``shared.sum(0)`` over so many rows takes 20 microseconds.
        with torch.autocast(grad.device.type, enabled=False):
            of_vectors = (ones @ shared.flatten(1)).view_as(vectors).to(vectors.dtype)
            return of_vectors, None, *grads


def _exact(vectors: Tensor) -> Tensor:
    """Return attention vectors in float32 and contiguous, as the kernels read them."""
    return vectors.detach().float().contiguous()


def _rows(width: int, times: int) -> int:
    """Return the number of rows of a program that processes so many tiles."""
    return times * max(1, _AT_A_TIME // _columns(width))


def _columns(width: int) -> int:
    """Return the width of a tile."""
    return max(16, 1 << (width - 1).bit_length())


def _launch(kernel: Any, times: int, parts: Sequence[Tensor], *others: Any) -> None:
    rows, width = parts[0].shape
    if not rows:
        return
    with torch.cuda.device_of(parts[0]):
        kernel[(-(-rows // _rows(width, times)),)](
            *_gpu.padded(parts),
            *others,
            d=width,
            count=len(parts),
            COUNT=1 << (len(parts) - 1).bit_length(),
            ROWS=_rows(width, 1),
            COLUMNS=_columns(width),
            TIMES=times,
            num_warps=4,
            **_gpu.OPTIONS,
        )


# -- kernels --------------------------------------------------------------------------------------


@no_type_check
def _of(m: tl.constexpr, p0, p1, p2, p3, p4, p5, p6, p7):
    """Return the pointer of modality m."""
    if m == 0:
        found = p0
    elif m == 1:
        found = p1
    elif m == 2:
        found = p2
    elif m == 3:
        found = p3
    elif m == 4:
        found = p4
    elif m == 5:
        found = p5
    elif m == 6:
        found = p6
    else:
        found = p7
    return found


@no_type_check
def _fuse(
    p0,
    p1,
    p2,
    p3,
    p4,
    p5,
    p6,
    p7,
    vectors,
    logits,
    total,
    rows,
    out,
    d: tl.constexpr,
    count: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TIMES: tl.constexpr,
):
    """Write weighted sums of rows, their logits, and logarithms of the softmax denominators."""
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    place = row[:, None] * d + column[None, :]
    mask = there[:, None] & (column < d)[None, :]
    top = tl.full([ROWS], -3.4e38, tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    for m in tl.static_range(count):
        part = _of(m, p0, p1, p2, p3, p4, p5, p6, p7)
        x = tl.load(part + place, mask=mask, other=0).to(tl.float32)
        v = tl.load(vectors + m * d + column, mask=column < d, other=0)
        logit = tl.sum(x * v[None, :], axis=1)
        tl.store(logits + row * count + m, logit, mask=there)
        # A running mean instead of a sum, which could overflow.
        new_top = tl.maximum(top, logit)
        kept = summed * tl.exp(top - new_top)
        share = tl.exp(logit - new_top)
        top = new_top
        summed = kept + share
        # Where all logits so far are minus infinity, the sum is 0 and no modality has a share.
        inverse = tl.where(summed == 0, 0.0, 1 / summed)
        mean = mean * (kept * inverse)[:, None] + x * (share * inverse)[:, None]
    tl.store(out + place, mean.to(out.dtype.element_ty), mask=mask)
    tl.store(total + row, top + tl.log(summed), mask=there)


@no_type_check
def _back(
    p0,
    p1,
    p2,
    p3,
    p4,
    p5,
    p6,
    p7,
    vectors,
    logits,
    total,
    grad,
    grad_attention,
    shared,
    rows,
    g0,
    g1,
    g2,
    g3,
    g4,
    g5,
    g6,
    g7,
    d: tl.constexpr,
    count: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TIMES: tl.constexpr,
):
    """Write the gradients of rows, and their sums for the attention vectors.

    With weights w_m, their gradients a_m = grad . x_m + grad_attention_m and the mean a of these
    under w, the gradient of a logit is s_m = w_m (a_m - a), that of x_m is w_m grad + s_m v_m, and
    that of v_m is the sum of s_m x_m over the rows.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    modality = tl.arange(0, COUNT)
    sums = tl.zeros([COUNT, COLUMNS], tl.float32)
    for time in range(TIMES):
        row = (program * TIMES + time) * ROWS + tl.arange(0, ROWS)
        there = row < rows
        place = row[:, None] * d + column[None, :]
        mask = there[:, None] & (column < d)[None, :]
        g = tl.load(grad + place, mask=mask, other=0).to(tl.float32)
        along = tl.zeros([ROWS, COUNT], tl.float32)
        for m in tl.static_range(count):
            part = _of(m, p0, p1, p2, p3, p4, p5, p6, p7)
            x = tl.load(part + place, mask=mask, other=0).to(tl.float32)
            along += tl.where(modality[None, :] == m, tl.sum(x * g, axis=1)[:, None], 0.0)
        few = row[:, None] * count + modality[None, :]
        known = there[:, None] & (modality < count)[None, :]
        if grad_attention is not None:
            along += tl.load(grad_attention + few, mask=known, other=0)
        log_total = tl.load(total + row, mask=there, other=0)
        logit = tl.load(logits + few, mask=known, other=-float("inf"))
        weight = tl.exp(logit - log_total[:, None])
        slope = weight * (along - tl.sum(weight * along, axis=1)[:, None])
        for m in tl.static_range(count):
            part = _of(m, p0, p1, p2, p3, p4, p5, p6, p7)
            of_part = _of(m, g0, g1, g2, g3, g4, g5, g6, g7)
            x = tl.load(part + place, mask=mask, other=0).to(tl.float32)
            v = tl.load(vectors + m * d + column, mask=column < d, other=0)
            chosen = modality[None, :] == m
            share = tl.sum(tl.where(chosen, weight, 0.0), axis=1)
            mine = tl.sum(tl.where(chosen, slope, 0.0), axis=1)
            value = share[:, None] * g + mine[:, None] * v[None, :]
            tl.store(of_part + place, value.to(of_part.dtype.element_ty), mask=mask)
            along_rows = tl.sum(mine[:, None] * x, axis=0)
            sums += tl.where(modality[:, None] == m, along_rows[None, :], 0.0)
    tl.store(
        shared + (program * count + modality[:, None]) * d + column[None, :],
        sums,
        mask=(modality < count)[:, None] & (column < d)[None, :],
    )


_KERNELS = (_of, _fuse, _back)
