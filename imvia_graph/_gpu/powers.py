"""Sums of squares or cubes of rows and their gradients, one pass each, as Triton kernels.

Parts of one shape, dtype and weight tensor share a launch. Rows of weight 0 are not read, since
most candidates of a batch are no answers. A NaN in such a row does not reach the sum; it reaches
the scores, which read all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor

from imvia_graph import _gpu

#: triton.language, once `usable` has been called.
tl: Any = None

#: Elements in the tile of a program, and columns at most.
_AT_A_TIME, _OF_A_ROW = 4096, 1024


def usable(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Return whether there are kernels for parts and weights of these dtypes on their device."""
    device = parts[0].device
    return (
        all(part.dtype in _gpu.DTYPES and part.device == device for part in parts)
        and all(weight.dtype == torch.float32 and weight.device == device for weight in weights)
        # PyTorch raises the error where lengths do not match.
        and all(len(part) == len(weight) for part, weight in zip(parts, weights, strict=True))
        and not torch.compiler.is_compiling()
        and _gpu.runs_on(device)
        and _gpu.load(globals(), _KERNELS)
    )


def total(power: int, parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    r"""Return the weighted sum over all rows of squares, or of cubes of moduli.

    .. math::
        \sum_p \sum_i w_{pi} \sum_j |x_{pij}|^2 \quad \text{or} \quad
        \sum_p \sum_i w_{pi} \sum_j |z_{pij}|^3

    Parameters
    ----------
    power : {2, 3}
        With 3, rows hold complex numbers: real parts, then imaginary parts, and last, for an odd
        width, a real number.
    parts : sequence of Tensor
        (n, d) each.
    weights : sequence of Tensor
        (n,) float32 for each part. Parts with the same weight tensor share a launch.

    Returns
    -------
    Tensor
        A float32 scalar.
    """
    alike = list(_alike(parts, weights))
    tiles = [-(-len(parts[places[0]]) // _sides(power, parts[places[0]])[0]) for places in alike]
    each = [count * len(places) for count, places in zip(tiles, alike, strict=True)]
    sums = weights[0].new_empty(sum(each))
    for places, out in zip(alike, sums.split(each), strict=True):
        _launch(_sum_up, power, places, parts, weights, out)
    return sums.sum()


def gradients(
    power: int, grad: Tensor, parts: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of the parts, given the gradient of `total`, a scalar."""
    out = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
    for places in _alike(parts, weights):
        written = _gpu.padded([out[place] for place in places])
        _launch(_slopes, power, places, parts, weights, grad, *written)
    return out


def _alike(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the indices of parts that share a launch."""
    groups: dict[Any, list[int]] = {}
    for place, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        groups.setdefault((part.shape, part.dtype, id(weight)), []).append(place)
    for places in groups.values():
        for first in range(0, len(places), _gpu.ARGUMENTS):
            yield places[first : first + _gpu.ARGUMENTS]


def _sides(power: int, part: Tensor) -> tuple[int, int]:
    """Return the numbers of rows and columns of a program's tile."""
    numbers = part.shape[1] if power == 2 else (part.shape[1] + 1) // 2
    columns = min(1 << max(numbers - 1, 0).bit_length(), _OF_A_ROW)
    return _AT_A_TIME // columns, columns


def _launch(
    kernel: Any,
    power: int,
    places: list[int],
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    *others: Tensor,
) -> None:
    first = parts[places[0]]
    size, d = first.shape
    rows, columns = _sides(power, first)
    if size:
        with torch.cuda.device_of(first):
            kernel[(-(-size // rows), len(places))](
                *_gpu.padded([parts[place].contiguous() for place in places]),
                weights[places[0]].contiguous(),
                *others,
                size,
                d=d,
                POWER=power,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=8,
                **_gpu.OPTIONS,
            )


# -- kernels --------------------------------------------------------------------------------------


@no_type_check
def _sum_up(
    x0,
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    weights,
    sums,
    size,
    d: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the sum over a block of rows of a part."""
    part = tl.program_id(1)
    x = _one_of(part, x0, x1, x2, x3, x4, x5, x6, x7)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weights + row, mask=row < size, other=0)
    counts = weight != 0
    half: tl.constexpr = d // 2
    numbers: tl.constexpr = d if POWER == 2 else d - half
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, numbers, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        mask = counts[:, None] & (col < numbers)[None, :]
        # For an odd d, the last column is a real number, after the imaginary parts.
        real = tl.where(col < half, col, d - 1) if POWER == 3 and d % 2 else col
        place = x + row[:, None] * d + real[None, :]
        value = tl.load(place, mask=mask, other=0).to(tl.float32)
        power = value * value
        if POWER == 3:
            place = x + row[:, None] * d + (half + col)[None, :]
            mask = counts[:, None] & (col < half)[None, :]
            value = tl.load(place, mask=mask, other=0).to(tl.float32)
            power += value * value
            power *= tl.sqrt(power)
        total += tl.sum(power, axis=1)
    tl.store(sums + part * tl.num_programs(0) + tl.program_id(0), tl.sum(weight * total))


@no_type_check
def _slopes(
    x0,
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    weights,
    grad,
    y0,
    y1,
    y2,
    y3,
    y4,
    y5,
    y6,
    y7,
    size,
    d: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradient of a block of rows of a part: zeros where the weight is 0."""
    part = tl.program_id(1)
    x = _one_of(part, x0, x1, x2, x3, x4, x5, x6, x7)
    y = _one_of(part, y0, y1, y2, y3, y4, y5, y6, y7)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < size
    weight = tl.load(weights + row, mask=there, other=0)
    counts = weight != 0
    slope = tl.where(counts, POWER * tl.load(grad) * weight, 0.0)
    half: tl.constexpr = d // 2
    numbers: tl.constexpr = d if POWER == 2 else d - half
    for first in range(0, numbers, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        inside = (col < numbers)[None, :]
        real = tl.where(col < half, col, d - 1) if POWER == 3 and d % 2 else col
        place = row[:, None] * d + real[None, :]
        value = tl.load(x + place, mask=counts[:, None] & inside, other=0).to(tl.float32)
        scale = slope[:, None]
        if POWER == 3:
            paired = (col < half)[None, :]
            other_place = row[:, None] * d + (half + col)[None, :]
            other = tl.load(x + other_place, mask=counts[:, None] & paired, other=0)
            other = other.to(tl.float32)
            scale = scale * tl.sqrt(value * value + other * other)
            result = (scale * other).to(y.dtype.element_ty)
            tl.store(y + other_place, result, mask=there[:, None] & paired)
        result = (scale * value).to(y.dtype.element_ty)
        tl.store(y + place, result, mask=there[:, None] & inside)


@no_type_check
def _one_of(part, x0, x1, x2, x3, x4, x5, x6, x7):
    """Return the pointer of a part."""
    x = tl.where(part == 1, x1, x0)
    x = tl.where(part == 2, x2, x)
    x = tl.where(part == 3, x3, x)
    x = tl.where(part == 4, x4, x)
    x = tl.where(part == 5, x5, x)
    x = tl.where(part == 6, x6, x)
    return tl.where(part == 7, x7, x)


_KERNELS = (_sum_up, _slopes, _one_of)
