"""The aggregation in one pass over the views on a GPU, as two Triton kernels.

The forward pass reads each view once, and so does the backward pass, or twice for gradients of the
views. Besides the result, one number per query is kept; the backward pass computes the cosines
again, from views that it has to read anyway.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor

from imvia_graph import _gpu
from imvia_graph._gradients import first_order
from imvia_graph.answers import pointer
from imvia_graph.errors import IMVIAError
from imvia_graph.ops.reference import SECOND_ORDER

#: The widest row that 8 warps hold in registers.
_WIDEST = 4096

#: triton.language, once `_load` has been called: a kernel finds it among its module's globals.
tl: Any = None


def _load() -> bool:
    """Return whether there are kernels; the first call creates them."""
    return _gpu.load(globals(), _KERNELS)


def is_installed(device: torch.device) -> bool:
    """Return whether Triton is installed and supports the device."""
    return _gpu.runs_on(device) and _load()


def usable(feat: Tensor, gate: Tensor) -> bool:
    """Return whether there is a kernel for these tensors' device, dtypes and width, and Triton.

    Gradients of features are added atomically, which deterministic algorithms rule out.
    """
    return (
        feat.dtype in _gpu.DTYPES
        and gate.dtype in _gpu.DTYPES
        and 1 <= feat.shape[1] <= _WIDEST
        and feat.device == gate.device
        and not (feat.requires_grad and torch.are_deterministic_algorithms_enabled())
        and is_installed(feat.device)
    )


def aggregate(
    feat: Tensor,
    ptr: Tensor,
    entity: Tensor,
    gate: Tensor,
    get_weight: bool = True,
    absent: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (B, d) sums, (T,) weights and their pointer; see `gated_view_aggregate`.

    Without ``get_weight`` the last two are None, and the host need not wait to learn T. An entity
    without views gets ``absent`` (d,), or zeros without it; an entity out of range gets NaN.
    """
    if not usable(feat, gate):
        raise IMVIAError(
            "The backend 'triton' needs Triton and, on one GPU that Triton supports, features and"
            f" gates in float32, bfloat16 or float16 with at most {_WIDEST} columns, and features"
            " without gradients under torch.use_deterministic_algorithms; received"
            f" {feat.dtype} on {feat.device} and {gate.dtype} on {gate.device} with"
            f" {feat.shape[1]} columns and requires_grad={feat.requires_grad}."
        )
    weight_ptr = pointer(ptr[entity + 1] - ptr[entity]) if get_weight else None
    apply = _Aggregate.apply
    if torch.compiler.is_compiling():
        # The kernel is compiled already. A decorator would import torch's compiler in every case.
        apply = torch.compiler.disable(apply)
    out, weight = apply(feat, ptr, entity, gate, weight_ptr, absent)
    return out, weight, weight_ptr


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        feat: Tensor,
        ptr: Tensor,
        entity: Tensor,
        gate: Tensor,
        weight_ptr: Tensor | None,
        absent: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        feat, ptr, entity, gate = (part.contiguous() for part in (feat, ptr, entity, gate))
        out = torch.empty_like(gate, dtype=torch.float32)
        log_total = out.new_empty(len(out))
        if weight_ptr is None:
            weight = None
            _launch(_forward, feat, ptr, entity, gate, weight_ptr, absent, out, log_total, None)
        else:
            cosine = out.new_empty(int(weight_ptr[-1]))
            _launch(_forward, feat, ptr, entity, gate, weight_ptr, absent, out, log_total, cosine)
            shift = log_total.repeat_interleave(weight_ptr.diff(), output_size=len(cosine))
            weight = (cosine - shift).exp()
        ctx.save_for_backward(feat, ptr, entity, gate, weight_ptr, log_total)
        return out, weight

    @staticmethod
    @first_order("The aggregation of views", SECOND_ORDER)
    def backward(
        ctx: Any, grad_out: Tensor, grad_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        feat, ptr, entity, gate, weight_ptr, log_total = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_weight = None if grad_weight is None else grad_weight.contiguous()
        grad_gate = torch.empty_like(gate)
        # Queries of one entity add to the same rows: atomically, in float32, in an order that
        # varies from run to run.
        grad_feat = torch.zeros_like(feat, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        gradients = grad_out, grad_weight, grad_gate, grad_feat
        _launch(_backward, feat, ptr, entity, gate, weight_ptr, log_total, *gradients)
        grad_absent = None
        if ctx.needs_input_grad[5]:
            with torch.autocast(grad_out.device.type, enabled=False):
                grad_absent = log_total.isneginf().to(grad_out.dtype) @ grad_out
        of_feat = None if grad_feat is None else grad_feat.to(feat.dtype)
        return of_feat, None, None, grad_gate, None, grad_absent


def _launch(kernel: Any, feat: Tensor, ptr: Tensor, entity: Tensor, *others: Any) -> None:
    """Launch a kernel with one program per query.

    The kernels are limited by memory bandwidth if enough loads are in flight and little is computed
    per byte. Each warp therefore handles 512 columns, 16 per lane: loads are 16 bytes wide, and
    rows up to that width are summed without shared memory or barriers. A tile of rows is loaded at
    a time, and programs are small enough for about ten per multiprocessor: while some wait, others
    compute, and a program with many views does not delay the others.
    """
    d = feat.shape[1]
    block_d = 1 << (d - 1).bit_length()
    if len(entity):
        with torch.cuda.device_of(feat):
            kernel[(len(entity),)](
                feat,
                ptr,
                len(ptr) - 1,
                entity,
                *others,
                d=d,
                BLOCK_D=block_d,
                BLOCK_N=8 if block_d <= 256 else 4,
                num_warps=max(block_d // 512, 1),
                enable_fp_fusion=True,
            )


# -- kernels --------------------------------------------------------------------------------------


@no_type_check
def _forward(
    feat,
    ptr,
    num_entities,
    entity,
    gate,
    cosine_ptr,
    absent,
    out,
    log_total,
    cosine,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a query's sum, the logarithm of its softmax denominator and, if wanted, the cosines."""
    query = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    start, stop = _span(ptr, tl.load(entity + query), num_entities)
    g = tl.load(gate + query * d + column, mask=column < d, other=0).to(tl.float32)
    g *= _inverse_scale(g, 0)
    top = -float("inf")
    total = 0.0
    mean = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        row, there, place, mask = _tile(first, stop, column, d, BLOCK_N)
        view = tl.load(feat + place, mask=mask, other=0).to(tl.float32)
        cos, _, _, _, _, _ = _compare(view, g)
        if cosine is not None:
            tl.store(cosine + tl.load(cosine_ptr + query) + row - start, cos, mask=there)
        # Running softmax. The sum is kept as a weighted mean, so it does not outgrow the views.
        cos = tl.where(there, cos, -float("inf"))
        new_top = tl.maximum(top, tl.max(cos))
        share = tl.exp(cos - new_top)
        kept = total * tl.exp(top - new_top)
        top = new_top
        total = kept + tl.sum(share)
        share *= 1 / total
        mean = mean * (kept / total) + tl.sum(share[:, None] * view, axis=0)
    if absent is not None:
        rest = tl.load(absent + column, mask=column < d, other=0).to(tl.float32)
        mean = tl.where(stop == start, rest, mean)
    mean = tl.where(stop < start, float("nan"), mean)
    tl.store(out + query * d + column, mean, mask=column < d)
    tl.store(log_total + query, top + tl.log(total))


@no_type_check
def _backward(
    feat,
    ptr,
    num_entities,
    entity,
    gate,
    weight_ptr,
    log_total,
    grad_out,
    grad_weight,
    grad_gate,
    grad_feat,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the gradient of a query's gate and, if wanted, add to the gradients of its views.

    With weights w_k, their gradients s_k = grad_out . f_k + grad_weight_k and the mean s of s_k
    under w, the gradient of a cosine is w_k (s_k - s). For cos = a / sqrt(b c) with a = sum g f^2,
    b = sum g^2 f^2 and c = sum f^2, the derivative is f^2 (1 / sqrt(b c) - cos g / b) by g and
    f (2 g / sqrt(b c) - cos g^2 / b - cos / c) by f.
    """
    query = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    start, stop = _span(ptr, tl.load(entity + query), num_entities)
    g = tl.load(gate + query * d + column, mask=column < d, other=0).to(tl.float32)
    g_inverse = _inverse_scale(g, 0)
    g *= g_inverse
    grad = tl.load(grad_out + query * d + column, mask=column < d, other=0)
    shift = tl.load(log_total + query)
    # Views are read once: s is known after the last, so the factor of s is summed separately.
    s = 0.0
    grad_g = tl.zeros([BLOCK_D], tl.float32)
    times_s = tl.zeros([BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_N):
        row, there, place, mask = _tile(first, stop, column, d, BLOCK_N)
        view = tl.load(feat + place, mask=mask, other=0).to(tl.float32)
        cos, b_root, c_root, _, _, square = _compare(view, g)
        share = tl.where(there, tl.exp(cos - shift), 0.0)
        slope = tl.sum(view * grad[None, :], axis=1)
        if grad_weight is not None:
            at = tl.load(weight_ptr + query) + row - start
            slope += tl.load(grad_weight + at, mask=there, other=0)
        slope *= share
        s += tl.sum(slope)
        part = (b_root * c_root)[:, None] - (cos * b_root * b_root)[:, None] * g[None, :]
        part *= square
        grad_g += tl.sum(slope[:, None] * part, axis=0)
        times_s += tl.sum(share[:, None] * part, axis=0)
    grad_g = (grad_g - s * times_s) * g_inverse
    tl.store(grad_gate + query * d + column, grad_g, mask=column < d)
    if grad_feat is not None:
        for first in range(start, stop, BLOCK_N):
            row, there, place, mask = _tile(first, stop, column, d, BLOCK_N)
            view = tl.load(feat + place, mask=mask, other=0).to(tl.float32)
            cos, b_root, c_root, inverse, unit, _ = _compare(view, g)
            share = tl.where(there, tl.exp(cos - shift), 0.0)
            slope = tl.sum(view * grad[None, :], axis=1) - s
            if grad_weight is not None:
                at = tl.load(weight_ptr + query) + row - start
                slope += tl.load(grad_weight + at, mask=there, other=0)
            slope *= share
            part = 2 * (slope * b_root * c_root)[:, None] * g[None, :]
            part -= (slope * cos * b_root * b_root)[:, None] * (g * g)[None, :]
            part -= (slope * cos * c_root * c_root)[:, None]
            part *= unit * inverse[:, None]
            part += share[:, None] * grad[None, :]
            tl.atomic_add(grad_feat + place, part, mask=mask, sem="relaxed")


@no_type_check
def _span(ptr, entity, num_entities):
    """Return the first row of an entity's views and the row after the last; 0, -1 if invalid."""
    known = (entity >= 0) & (entity < num_entities)
    start = tl.load(ptr + entity, mask=known, other=0)
    return start, tl.load(ptr + entity + 1, mask=known, other=-1)


@no_type_check
def _tile(first, stop, column, d: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return rows from ``first``, whether each is before ``stop``, element offsets, and a mask."""
    row = first + tl.arange(0, BLOCK_N).to(tl.int64)
    there = row < stop
    return row, there, row[:, None] * d + column[None, :], there[:, None] & (column < d)[None, :]


@no_type_check
def _compare(view, gate):
    """Return the cosines of gate * view and view (Eq. 2) at unit scale, and their factors.

    These are 1 / |gate * view|, 1 / |view|, the scale that brings a view to unit scale, the scaled
    view, and its square.
    """
    inverse = _inverse_scale(view, 1)
    unit = view * inverse[:, None]
    square = unit * unit
    a = tl.sum(gate[None, :] * square, axis=1)
    b_root = _inverse_root(tl.sum((gate * gate)[None, :] * square, axis=1))
    c_root = _inverse_root(tl.sum(square, axis=1))
    return a * b_root * c_root, b_root, c_root, inverse, unit, square


@no_type_check
def _inverse_scale(x, AXIS: tl.constexpr):
    """Return 1 / max |x|, a scale at which no square over- or underflows; finite for zeros."""
    return 1 / tl.maximum(tl.max(tl.abs(x), axis=AXIS), 1.1754944e-38)  # smallest normal float32


@no_type_check
def _inverse_root(x):
    """Return 1 / sqrt(x), or 0 for x near 0, where the cosine is 0 and has no gradient."""
    return tl.where(x < 1.1754944e-38, 0.0, tl.rsqrt(x))


_KERNELS = (_forward, _backward, _span, _tile, _compare, _inverse_scale, _inverse_root)
