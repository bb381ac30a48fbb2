"""Table lookups whose gradients a GPU sums in a fixed order, as a Triton kernel."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn import functional

from imvia_graph import _gpu

#: triton.language, once `_usable` has been called.
tl: Any = None

#: Maximum number of ids: each is compared with all others.
_MOST = 4096
#: Ids compared, and rows and columns summed, at a time by a program of one warp, which needs no
#: barriers.
_LOOKED, _ROWS, _COLUMNS = 512, 16, 256


def _usable(row: Tensor, table: Tensor) -> bool:
    return (
        row.dim() == 1
        and 0 < len(row) <= _MOST
        and row.dtype == torch.int64
        and table.dtype in _gpu.DTYPES
        and not torch.compiler.is_compiling()
        and _gpu.runs_on(table.device)
        and _gpu.load(globals(), _KERNELS)
    )


def lookup(row: Tensor, table: Tensor) -> Tensor:
    """Compute ``torch.nn.functional.embedding``, whose gradient on a GPU is one small kernel."""
    if not (torch.is_grad_enabled() and table.requires_grad and _usable(row, table)):
        return functional.embedding(row, table)
    out: Tensor = _Lookup.apply(row, table)
    return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        ctx.shape = table.shape
        return functional.embedding(row, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (row,) = ctx.saved_tensors
        return None, _AddUp.apply(row, grad, ctx.shape)


class _AddUp(torch.autograd.Function):
    """Sums of gradients at the rows of the table; can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(row)
        total = grad.new_zeros(shape)
        grad, row = grad.contiguous(), row.contiguous()
        width = grad.shape[1]
        if width:
            with torch.cuda.device_of(grad):
                _add_up[(len(row), -(-width // _COLUMNS))](
                    grad,
                    row,
                    total,
                    len(row),
                    width,
                    LOOKED=_LOOKED,
                    ROWS=_ROWS,
                    COLUMNS=_COLUMNS,
                    num_warps=1,
                    **_gpu.OPTIONS,
                )
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (row,) = ctx.saved_tensors
        return None, lookup(row, grad), None


@no_type_check
def _add_up(
    grad,
    row,
    total,
    number,
    width,
    LOOKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a block of columns of the sum of all gradients of one row of the table.

    Of the programs whose ids are equal, the first computes the sum.
    """
    mine = tl.program_id(0).to(tl.int64)
    wanted = tl.load(row + mine)
    earlier = 0
    same = 0
    for first in range(0, number, LOOKED):
        place = first + tl.arange(0, LOOKED)
        other = tl.load(row + place, mask=place < number, other=-1)
        found = (other == wanted).to(tl.int32)
        same += tl.sum(found)
        earlier += tl.sum(tl.where(place < mine, found, 0))
    if earlier == 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        sums = tl.load(grad + mine * width + column, mask=inside, other=0).to(tl.float32)
        if same > 1:
            for begin in range(mine + 1, number, ROWS):
                place = begin + tl.arange(0, ROWS)
                other = tl.load(row + place, mask=place < number, other=-1)
                here = other == wanted
                if tl.sum(here.to(tl.int32)) > 0:
                    values = tl.load(
                        grad + place.to(tl.int64)[:, None] * width + column[None, :],
                        mask=here[:, None] & inside[None, :],
                        other=0,
                    )
                    sums += tl.sum(values.to(tl.float32), axis=0)
        tl.store(total + wanted * width + column, sums.to(total.dtype.element_ty), mask=inside)


_KERNELS = (_add_up,)
