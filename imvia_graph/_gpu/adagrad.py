"""Adagrad's update of a table in one pass, as a Triton kernel."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from torch import Tensor

from imvia_graph import _gpu

#: triton.language, once `usable` has been asked.
tl: Any = None

_AT_A_TIME = 2048


def usable(parameter: Tensor) -> bool:
    """Whether there is a kernel for a parameter."""
    return (
        parameter.dtype == torch.float32
        and parameter.is_contiguous()
        and _gpu.runs_on(parameter.device)
        and _gpu.load(globals(), _KERNELS)
    )


def update(
    parameter: Tensor,
    grad: Tensor,
    total: Tensor,
    rate: Tensor,
    bad: Tensor,
    eps: float,
    weight_decay: float,
) -> None:
    r"""Add to the sum of squares, and update the parameter, in place.

    .. math::
        g \leftarrow g + \lambda p, \quad s \leftarrow s + g^2, \quad
        p \leftarrow p - \gamma \frac{g}{\sqrt{s} + \epsilon}

    Parameters
    ----------
    parameter, grad, total : Tensor
        p, g and s, float32, of one shape.
    rate, bad : Tensor
        Scalars on the device: the learning rate, and whether, above 0, nothing is to change.
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
            )


@no_type_check
def _adagrad(parameter, grad, total, rate, bad, size, eps, weight_decay, COLUMNS: tl.constexpr):
    """Update some elements."""
    place = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = place < tl.where(tl.load(bad) > 0, 0, size)
    p = tl.load(parameter + place, mask=mask, other=0)
    g = tl.load(grad + place, mask=mask, other=0) + weight_decay * p
    s = tl.load(total + place, mask=mask, other=0) + g * g
    tl.store(total + place, s, mask=mask)
    tl.store(parameter + place, p - tl.load(rate) * g / (tl.sqrt(s) + eps), mask=mask)


_KERNELS = (_adagrad,)
