"""Losses of scores and their gradients in two passes over the scores, as Triton kernels.

`imvia_graph._factored` describes what is computed. The first pass sums the scores of each query,
the second replaces the scores by their gradients as if all triples were false. The few gradients of
true triples are computed between the passes and written last.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor

from imvia_graph import _gpu

#: triton.language, once `usable` has been called.
tl: Any = None

#: Scores in the tile of a program, and positives of a query at a time.
_AT_A_TIME, _POSITIVES = 4096, 64
#: Products of matrices are fast where sides are multiples of this.
_WHOLE = 16


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether there are kernels for scores of this dtype on this device."""
    # Where Triton knows that rows start at multiples of 16, a thread loads several scores at once;
    # the layout of tiles that comes with such loads makes the kernels two to six times slower.
    return (
        dtype in _gpu.DTYPES
        and _gpu.runs_on(device)
        and _gpu.load(globals(), _KERNELS, unspecialized=("wide", "tall"))
    )


def room(size: int) -> int:
    """Return a number of rows or columns rounded up, so that products are fast."""
    return -(-size // _WHOLE) * _WHOLE


def whole(rows: int) -> int:
    """Return a number of rows rounded down, so that products are fast without padding."""
    return rows // _WHOLE * _WHOLE


def gradients(
    scores: Tensor,
    size: int,
    row: Tensor,
    col: Tensor,
    share: Tensor,
    counts: Tensor | None,
    of_rows: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    softmax: bool,
    label_smoothing: float,
    detached: bool,
    numbers: Tensor | None,
) -> Tensor:
    """Replace scores by their gradients and return the loss, both times `Terms.scale`.

    Parameters
    ----------
    scores : Tensor
        (M, `room` of B, `room` of N), contiguous, of M heads, B queries and N candidates. The
        padding is not read or written.
    size : int
        N.
    row, col : Tensor
        (P,) int64: the positives, sorted by row.
    share : Tensor
        (P,): the share of each positive in its row.
    counts : Tensor or None
        (P,) float: 0 for repetitions that only pad the positives, else 1.
    of_rows : Tensor
        (B,) weights of the queries in the softmax loss.
    weights, grad_weights : Tensor
        (B, M) weights of the decision and, written here, their gradients; (0, M) without decision.
        Contiguous.
    softmax : bool
        Whether it is the softmax loss, not the binary one.
    label_smoothing : float
    detached : bool
        Whether the decision has no gradient with respect to the scores.
    numbers : Tensor or None
        (2,) float32: weights of the terms of positives and of negatives in the binary loss.
    """
    heads, tall, wide = scores.shape
    rows = len(of_rows)
    decided = len(weights) > 0
    smooth = label_smoothing / size
    sums = scores.new_empty(heads + decided, rows, dtype=torch.float32)
    plain = torch.empty_like(sums)
    shape = {
        "heads": heads,
        "DECIDED": decided,
        "SOFTMAX": softmax,
        "HEADS": 1 << (heads - 1).bit_length(),
        "COLUMNS": max(16, _AT_A_TIME >> (heads - 1).bit_length()),
    }
    _launch(_sum_up, rows, scores, weights, sums, plain, size, wide, tall, **shape)
    row, col, share = row.contiguous(), col.contiguous(), share.contiguous()
    counts = None if counts is None else counts.contiguous()
    ptr = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
    slope = sums.new_empty(heads, len(row))
    loss = sums.new_empty(rows)
    # The second pass adds slopes of positives to the gradients of the weights as if they were
    # negatives; this is subtracted from them.
    correction = torch.empty_like(grad_weights)
    given: list[Any] = [weights, sums, plain, of_rows, numbers, ptr, col, share, counts]
    given += [slope, correction, loss, label_smoothing, smooth, len(row), wide, tall]
    few: dict[str, Any] = {**shape, "COLUMNS": _POSITIVES}
    _launch(_positives, rows, scores, *given, DETACHED=detached, **few)
    given = [weights, sums, of_rows, correction, grad_weights, numbers, size, wide, tall, smooth]
    _launch(_into_gradients, rows, scores, *given, DETACHED=detached, **shape)
    few = {"heads": heads, "HEADS": shape["HEADS"], "COLUMNS": _POSITIVES}
    _launch(_put, rows, scores, slope, ptr, col, len(row), wide, tall, **few)
    return loss.sum()


def _launch(kernel: Any, rows: int, scores: Tensor, *others: Any, **options: Any) -> None:
    if rows:
        with torch.cuda.device_of(scores):
            kernel[(rows,)](scores, *others, rows, **options, num_warps=8, **_gpu.OPTIONS)


# -- kernels --------------------------------------------------------------------------------------


@no_type_check
def _sum_up(
    scores,
    weights,
    sums,
    plain,
    size,
    wide,
    tall,
    rows,
    heads: tl.constexpr,
    DECIDED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a query's sums of scores, and of softplus or, as a logarithm, of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    mine = head < heads
    base = (head.to(tl.int64) * tall + row) * wide
    weight = tl.zeros([HEADS], tl.float32)
    if DECIDED:
        weight = tl.load(weights + row * heads + head, mask=mine, other=0)
    top = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    together = tl.zeros([HEADS], tl.float32)
    top_d = -float("inf")
    total_d = 0.0
    together_d = 0.0
    for first in range(0, size, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        there = col < size
        mask = mine[:, None] & there[None, :]
        value = tl.load(scores + base[:, None] + col[None, :], mask=mask, other=0).to(tl.float32)
        together += tl.sum(value, axis=1)
        decision = tl.sum(weight[:, None] * value, axis=0)
        if SOFTMAX:
            value = tl.where(there[None, :], value, -float("inf"))
            new = tl.maximum(top, tl.max(value, axis=1))
            share = tl.sum(tl.exp(value - new[:, None]), axis=1)
            total = total * tl.exp(top - new) + share
            top = new
        else:
            total += tl.sum(tl.where(mask, _softplus(value), 0.0), axis=1)
        if DECIDED:
            together_d += tl.sum(decision)
            if SOFTMAX:
                decision = tl.where(there, decision, -float("inf"))
                new_d = tl.maximum(top_d, tl.max(decision))
                share_d = tl.sum(tl.exp(decision - new_d))
                total_d = total_d * tl.exp(top_d - new_d) + share_d
                top_d = new_d
            else:
                total_d += tl.sum(tl.where(there, _softplus(decision), 0.0))
    if SOFTMAX:
        total = top + tl.log(total)
        total_d = top_d + tl.log(total_d)
    place = head.to(tl.int64) * rows + row
    tl.store(sums + place, total, mask=mine)
    tl.store(plain + place, together, mask=mine)
    if DECIDED:
        tl.store(sums + heads * rows + row, total_d)
        tl.store(plain + heads * rows + row, together_d)


@no_type_check
def _into_gradients(
    scores,
    weights,
    sums,
    of_rows,
    correction,
    grad_weights,
    numbers,
    size,
    wide,
    tall,
    smooth,
    rows,
    DETACHED: tl.constexpr,
    heads: tl.constexpr,
    DECIDED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Replace a query's scores by their gradients, as if all its triples were false."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    mine = head < heads
    base = (head.to(tl.int64) * tall + row) * wide
    of_row = tl.load(of_rows + row).to(tl.float32)
    if not SOFTMAX:
        of_negative = tl.load(numbers + 1)
    log_sum = tl.load(sums + head.to(tl.int64) * rows + row, mask=mine, other=0)
    weight = tl.zeros([HEADS], tl.float32)
    log_sum_d = 0.0
    if DECIDED:
        weight = tl.load(weights + row * heads + head, mask=mine, other=0)
        log_sum_d = tl.load(sums + heads * rows + row)
    along = tl.zeros([HEADS], tl.float32)
    for first in range(0, size, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        there = col < size
        mask = mine[:, None] & there[None, :]
        place = scores + base[:, None] + col[None, :]
        value = tl.load(place, mask=mask, other=0).to(tl.float32)
        if SOFTMAX:
            slope = (tl.exp(value - log_sum[:, None]) - smooth) * of_row
        else:
            slope = (_sigmoid(value) - smooth) * of_negative
        if DECIDED:
            decision = tl.sum(weight[:, None] * value, axis=0)
            if SOFTMAX:
                slope_d = (tl.exp(decision - log_sum_d) - smooth) * of_row
            else:
                slope_d = (_sigmoid(decision) - smooth) * of_negative
            slope_d = tl.where(there, slope_d, 0.0)
            along += tl.sum(slope_d[None, :] * value, axis=1)
            if not DETACHED:
                slope += weight[:, None] * slope_d[None, :]
        tl.store(place, slope.to(scores.dtype.element_ty), mask=mask)
    if DECIDED:
        along -= tl.load(correction + row * heads + head, mask=mine, other=0)
        tl.store(grad_weights + row * heads + head, along, mask=mine)


@no_type_check
def _positives(
    scores,
    weights,
    sums,
    plain,
    of_rows,
    numbers,
    ptr,
    col,
    share,
    counts,
    slopes,
    correction,
    loss,
    smoothing,
    smooth,
    number,
    wide,
    tall,
    rows,
    DETACHED: tl.constexpr,
    heads: tl.constexpr,
    DECIDED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a query's loss and the gradients of the scores of its positives."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    mine = head < heads
    base = (head.to(tl.int64) * tall + row) * wide
    of_row = tl.load(of_rows + row).to(tl.float32)
    log_sum = tl.load(sums + head.to(tl.int64) * rows + row, mask=mine, other=0)
    together = tl.load(plain + head.to(tl.int64) * rows + row, mask=mine, other=0)
    weight = tl.zeros([HEADS], tl.float32)
    log_sum_d = 0.0
    lost = tl.sum(log_sum - smooth * together)
    if DECIDED:
        weight = tl.load(weights + row * heads + head, mask=mine, other=0)
        log_sum_d = tl.load(sums + heads * rows + row)
        lost += log_sum_d - smooth * tl.load(plain + heads * rows + row)
    if SOFTMAX:
        lost *= of_row
    else:
        of_positive = tl.load(numbers)
        of_negative = tl.load(numbers + 1)
        lost *= of_negative
    extra = smoothing - smooth
    put_right = tl.zeros([HEADS], tl.float32)
    start, stop = tl.load(ptr + row), tl.load(ptr + row + 1)
    for first in range(start, stop, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        there = place < stop
        mask = mine[:, None] & there[None, :]
        at = tl.load(col + place, mask=there, other=0)
        true = tl.load(scores + base[:, None] + at[None, :], mask=mask, other=0).to(tl.float32)
        once = tl.where(there, 1.0, 0.0)
        if counts is not None:
            once = tl.load(counts + place, mask=there, other=0)
        decision = tl.sum(weight[:, None] * true, axis=0)
        if SOFTMAX:
            given = tl.load(share + place, mask=there, other=0) * (1 - smoothing) * of_row
            slope = (tl.exp(true - log_sum[:, None]) - smooth) * of_row - given[None, :]
            slope_d = (tl.exp(decision - log_sum_d) - smooth) * of_row - given
            less = given * once
            lost -= tl.sum(tl.sum(true * less[None, :], axis=1))
            if DECIDED:
                lost -= tl.sum(decision * less)
        else:
            slope = of_positive * (_sigmoid(true) - 1 + extra)
            slope_d = of_positive * (_sigmoid(decision) - 1 + extra)
            less = (of_negative * (_sigmoid(decision) - smooth) - slope_d) * once
            part = of_positive * (_softplus(-true) + extra * true)
            part -= of_negative * (_softplus(true) - smooth * true)
            lost += tl.sum(tl.sum(tl.where(mask, part * once[None, :], 0.0), axis=1))
            if DECIDED:
                part_d = of_positive * (_softplus(-decision) + extra * decision)
                part_d -= of_negative * (_softplus(decision) - smooth * decision)
                lost += tl.sum(tl.where(there, part_d * once, 0.0))
        if DECIDED:
            put_right += tl.sum(true * less[None, :], axis=1)
            if not DETACHED:
                slope += weight[:, None] * slope_d[None, :]
        to = slopes + head.to(tl.int64)[:, None] * number + place[None, :]
        tl.store(to, slope, mask=mask)
    tl.store(loss + row, lost)
    if DECIDED:
        tl.store(correction + row * heads + head, put_right, mask=mine)


@no_type_check
def _put(
    scores,
    slopes,
    ptr,
    col,
    number,
    wide,
    tall,
    rows,
    heads: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Replace the scores of a query's positives by their gradients."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    mine = head < heads
    base = (head.to(tl.int64) * tall + row) * wide
    start, stop = tl.load(ptr + row), tl.load(ptr + row + 1)
    for first in range(start, stop, COLUMNS):
        place = first + tl.arange(0, COLUMNS)
        there = place < stop
        mask = mine[:, None] & there[None, :]
        at = tl.load(col + place, mask=there, other=0)
        given = slopes + head.to(tl.int64)[:, None] * number + place[None, :]
        slope = tl.load(given, mask=mask, other=0)
        tl.store(scores + base[:, None] + at[None, :], slope.to(scores.dtype.element_ty), mask=mask)


@no_type_check
def _softplus(x):
    """Return log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@no_type_check
def _sigmoid(x):
    """Return 1 / (1 + exp(-x)), without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1 + small)


_KERNELS = (_sum_up, _into_gradients, _positives, _put, _softplus, _sigmoid)
