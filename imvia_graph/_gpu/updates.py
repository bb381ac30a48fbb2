"""Updates of Adam and Adagrad in one pass over a parameter, as Triton kernels."""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
from torch import Tensor

from imvia_graph import _gpu

#: triton.language, once `usable` has been called.
tl: Any = None

#: Elements of a program.
_AT_A_TIME = 2048


def usable(parameter: Tensor) -> bool:
    """Return whether there is a kernel for a parameter."""
    return (
        parameter.dtype == torch.float32
        and parameter.is_contiguous()
        and _gpu.runs_on(parameter.device)
        and _gpu.load(globals(), _KERNELS)
    )


def adam(
    parameter: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    rate: Tensor,
    bad: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    r"""Update the moments and the parameter, in place.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        p \leftarrow p - \gamma \frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}

    Parameters
    ----------
    parameter, grad, mean, square : Tensor
        p, g, m and v, float32, of one shape.
    step, rate, bad : Tensor
        Scalars on the device: k, already counted up, the learning rate, and ``bad``: where it is
        above 0, nothing is changed.
    betas : pair of float
    eps, weight_decay : float
    decoupled : bool
        Whether the decay shrinks p (AdamW) instead of being added to g.
    """
    size = parameter.numel()
    if size:
        first, second = betas
        with torch.cuda.device_of(parameter):
            _adam[(-(-size // _AT_A_TIME),)](
                parameter,
                grad.contiguous(),
                mean,
                square,
                step,
                rate,
                bad,
                size,
                1 - first,
                1 - second,
                math.log(first) if first else -math.inf,
                math.log(second) if second else -math.inf,
                eps,
                weight_decay,
                DECOUPLED=decoupled,
                COLUMNS=_AT_A_TIME,
                num_warps=8,
                **_gpu.OPTIONS,
            )


def adagrad(
    parameter: Tensor,
    grad: Tensor,
    total: Tensor,
    rate: Tensor,
    bad: Tensor,
    eps: float,
    weight_decay: float,
) -> None:
    r"""Update the sum of squares and the parameter, in place.

    .. math::
        g \leftarrow g + \lambda p, \quad s \leftarrow s + g^2, \quad
        p \leftarrow p - \gamma \frac{g}{\sqrt{s} + \epsilon}

    Parameters
    ----------
    parameter, grad, total : Tensor
        p, g and s, float32, of one shape.
    rate, bad : Tensor
        Scalars on the device: the learning rate, and ``bad``: where it is above 0, nothing is
        changed.
    eps, weight_decay : float
    """
    size = parameter.numel()
    if size:
        with torch.cuda.device_of(parameter):
            _adagrad[(-(-size // _AT_A_TIME),)](
                parameter,
                grad.contiguous(),
                total,
                rate,
                bad,
                size,
                eps,
                weight_decay,
                COLUMNS=_AT_A_TIME,
                num_warps=8,
                **_gpu.OPTIONS,
            )


# -- kernels --------------------------------------------------------------------------------------


@no_type_check
def _adam(
    parameter,
    grad,
    mean,
    square,
    step,
    rate,
    bad,
    size,
    of_first,
    of_second,
    log_first,
    log_second,
    eps,
    weight_decay,
    DECOUPLED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Update a block of elements."""
    place = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = place < tl.where(tl.load(bad) > 0, 0, size)
    p = tl.load(parameter + place, mask=mask, other=0)
    g = tl.load(grad + place, mask=mask, other=0)
    m = tl.load(mean + place, mask=mask, other=0)
    v = tl.load(square + place, mask=mask, other=0)
    lr = tl.load(rate)
    # The difference of 1 and a number close to 1, hence in float64.
    steps = tl.load(step).to(tl.float64)
    first = (1 - tl.exp(steps * log_first)).to(tl.float32)
    second = (1 - tl.exp(steps * log_second)).to(tl.float32)
    if DECOUPLED:
        p *= 1 - lr * weight_decay
    else:
        g += weight_decay * p
    m += of_first * (g - m)
    v += of_second * (g * g - v)
    p -= lr / first * m / (tl.sqrt(v) / tl.sqrt(second) + eps)
    tl.store(mean + place, m, mask=mask)
    tl.store(square + place, v, mask=mask)
    tl.store(parameter + place, p, mask=mask)


@no_type_check
def _adagrad(parameter, grad, total, rate, bad, size, eps, weight_decay, COLUMNS: tl.constexpr):
    """Update a block of elements."""
    place = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = place < tl.where(tl.load(bad) > 0, 0, size)
    p = tl.load(parameter + place, mask=mask, other=0)
    g = tl.load(grad + place, mask=mask, other=0) + weight_decay * p
    s = tl.load(total + place, mask=mask, other=0) + g * g
    tl.store(total + place, s, mask=mask)
    tl.store(parameter + place, p - tl.load(rate) * g / (tl.sqrt(s) + eps), mask=mask)


_KERNELS = (_adam, _adagrad)
