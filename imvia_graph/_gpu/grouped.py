"""Products of groups of rows with one matrix per group, as Triton kernels.

The offsets of the groups stay on the device: the host does not wait for them, and one launch
computes all groups.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor

from imvia_graph import _gpu
from imvia_graph._gradients import first_order

#: triton.language, once `loads` has been called.
tl: Any = None

#: Sides of a tile: rows, and columns of factors and results.
_ROWS, _COLUMNS = 16, 64


def loads() -> bool:
    """Return whether Triton is installed; create the kernels at the first call."""
    return _gpu.load(globals(), _KERNELS)


def usable(rows: Tensor, matrix: Tensor) -> bool:
    """Return whether there is a kernel for these dtypes on this device."""
    return (
        matrix.dtype in _gpu.DTYPES
        # The interpreter uses NumPy, which has no bfloat16.
        and (matrix.is_cuda or matrix.dtype != torch.bfloat16)
        and rows.device == matrix.device
        and _gpu.runs_on(rows.device)
        and loads()
    )


def product(rows: Tensor, matrix: Tensor, offsets: Tensor) -> Tensor:
    r"""Multiply the rows i of each group u with its matrix: ``out[i] = rows[i] @ matrix[u]``.

    Parameters
    ----------
    rows : Tensor
        (B, k), sorted by group; converted to the dtype of the matrices.
    matrix : Tensor
        (U, k, n).
    offsets : Tensor
        (U + 1,) int64: the rows of group u are those from ``offsets[u]`` to ``offsets[u + 1]``. The
        last is B; a group may be empty.

    Returns
    -------
    Tensor
        (B, n) in the dtype of the matrices.
    """
    out: Tensor = _Product.apply(rows.to(matrix.dtype), matrix, offsets)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, offsets: Tensor) -> Tensor:
        rows, matrix = rows.contiguous(), matrix.contiguous()
        ctx.save_for_backward(rows, matrix, offsets)
        return _times(rows, matrix, offsets, transposed=False)

    @staticmethod
    @first_order("TuckerDecoder on a GPU", "Use float64, which has no kernels of its own.")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        of_rows = of_matrix = None
        if ctx.needs_input_grad[0]:
            of_rows = _times(grad, matrix, offsets, transposed=True)
        if ctx.needs_input_grad[1]:
            of_matrix = torch.empty_like(matrix)
            groups, k, n = matrix.shape
            tiles = -(-k // _COLUMNS), -(-n // _COLUMNS)
            _launch(_outer, (groups, *tiles), rows, grad, offsets, of_matrix, k, n)
        return of_rows, of_matrix, None


def _times(rows: Tensor, matrix: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    groups, k, n = matrix.shape
    strides = (n, 1)
    if transposed:
        k, n, strides = n, k, (1, n)
    out = rows.new_empty(len(rows), n)
    _launch(_multiply, (groups, -(-n // _COLUMNS)), rows, matrix, offsets, out, k, n, *strides)
    return out


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *others: Any) -> None:
    if min(grid) == 0:
        return
    with torch.cuda.device_of(first):
        kernel[grid](first, *others, ROWS=_ROWS, COLUMNS=_COLUMNS, **_gpu.OPTIONS)


# -- kernels --------------------------------------------------------------------------------------


@no_type_check
def _multiply(
    rows,
    matrix,
    offsets,
    out,
    k: tl.constexpr,
    n: tl.constexpr,
    along_k: tl.constexpr,
    along_n: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a block of columns of the products of a group."""
    group = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        there = (row < stop)[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, k, COLUMNS):
            inner = begin + tl.arange(0, COLUMNS)
            inside = inner < k
            left = tl.load(
                rows + row[:, None] * k + inner[None, :], mask=there & inside[None, :], other=0
            )
            right = tl.load(
                matrix + group * k * n + inner[:, None] * along_k + column[None, :] * along_n,
                mask=inside[:, None] & (column < n)[None, :],
                other=0,
            )
            # float32 is not rounded to TF32; the option has no effect on half precision.
            total = tl.dot(left, right, total, input_precision="ieee")
        tl.store(
            out + row[:, None] * n + column[None, :],
            total.to(out.dtype.element_ty),
            mask=there & (column < n)[None, :],
        )


@no_type_check
def _outer(
    rows,
    grad,
    offsets,
    out,
    k: tl.constexpr,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile of ``rows.T @ grad`` of a group, the gradient of its matrix."""
    group = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    left = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    right = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, COLUMNS], tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        there = (row < stop)[:, None]
        x = tl.load(
            rows + row[:, None] * k + left[None, :], mask=there & (left < k)[None, :], other=0
        )
        g = tl.load(
            grad + row[:, None] * n + right[None, :], mask=there & (right < n)[None, :], other=0
        )
        total = tl.dot(tl.trans(x), g, total, input_precision="ieee")
    tl.store(
        out + group * k * n + left[:, None] * n + right[None, :],
        total.to(out.dtype.element_ty),
        mask=(left < k)[:, None] & (right < n)[None, :],
    )


_KERNELS = (_multiply, _outer)
