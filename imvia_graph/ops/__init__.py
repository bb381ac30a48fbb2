"""Gated view aggregation (Eq. 2 and 3) as segment operations over a CSR of views.

`gated_view_aggregate` has one signature for all backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from imvia_graph.errors import IMVIAError, SettingsError
from imvia_graph.ops import fused_cpu, fused_triton, picking, reference, scatter

Backend = Literal["auto", "reference", "torch_scatter", "numba", "triton"]
Aggregate: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch_scatter", "numba", "triton")

__all__ = ["BACKENDS", "Backend", "ViewWeights", "gated_view_aggregate"]


class ViewWeights(NamedTuple):
    """The weight of each view for each query.

    Attributes
    ----------
    weight : Tensor
        (T,) weights of the first query's views, then of the second's, …; T is the sum of the view
        counts over the batch.
    ptr : Tensor
        (B + 1,) int64 CSR pointer: the weights of query i are ``weight[ptr[i]:ptr[i + 1]]``, which
        sum to 1 if its entity has views.
    """

    weight: Tensor
    ptr: Tensor


@overload
def gated_view_aggregate(
    feat: Tensor,
    ptr: Tensor,
    entity: Tensor,
    gate: Tensor,
    *,
    backend: Backend = ...,
    get_weight: Literal[False] = ...,
) -> Tensor: ...


@overload
def gated_view_aggregate(
    feat: Tensor,
    ptr: Tensor,
    entity: Tensor,
    gate: Tensor,
    *,
    backend: Backend = ...,
    get_weight: Literal[True],
) -> tuple[Tensor, ViewWeights]: ...


@overload
def gated_view_aggregate(
    feat: Tensor,
    ptr: Tensor,
    entity: Tensor,
    gate: Tensor,
    *,
    backend: Backend = ...,
    get_weight: bool,
) -> Tensor | tuple[Tensor, ViewWeights]: ...


def gated_view_aggregate(
    feat: Tensor,
    ptr: Tensor,
    entity: Tensor,
    gate: Tensor,
    *,
    backend: Backend = "auto",
    get_weight: bool = False,
) -> Tensor | tuple[Tensor, ViewWeights]:
    r"""Aggregate the views of each query's entity under the query's gate.

    For query :math:`b` with entity :math:`i`, gate :math:`g` and views :math:`f_1 \dots f_{N_i}`:

    .. math::
        \alpha_k = \frac{\exp(\cos(g \odot f_k, f_k))}{\sum_j \exp(\cos(g \odot f_j, f_j))},
        \qquad \hat e_b = \sum_k \alpha_k f_k

    (IMVIA, Eq. 2 and 3). The cosine of a zero vector with anything is 0.

    Parameters
    ----------
    feat : Tensor
        (V, d) floating point: the views of all entities, sorted by entity.
    ptr : Tensor
        (N + 1,) int64 CSR pointer: the views of entity i are ``feat[ptr[i]:ptr[i + 1]]``.
    entity : Tensor
        (B,) int64: the entity of each query.
    gate : Tensor
        (B, d) floating point: the gate of each query.
    backend : {"auto", "reference", "torch_scatter", "numba", "triton"}, optional
        ``reference`` is plain torch; ``torch_scatter`` needs the package torch-scatter; ``numba``
        on a CPU and ``triton`` on a GPU read the views once and write no temporary of their size;
        ``auto`` is the fastest that supports the device and dtypes of the tensors. Only
        ``reference`` supports second-order gradients (``create_graph``). Default: ``"auto"``.
    get_weight : bool, optional
        Whether to return the weights of the views as well. Default: ``False``.

    Returns
    -------
    Tensor
        (B, d) in the promoted dtype of float32 and the inputs; zeros for entities without views.
    ViewWeights, optional
        The weights of the views. Only with ``get_weight``.

    Raises
    ------
    IMVIAError
        If shapes do not match, ids are not integers, or the backend is unknown or not installed.
        On a CPU also if ``entity`` or ``ptr`` is out of range; on a GPU this is not checked, since
        the check would wait for the device.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.ops import gated_view_aggregate
    >>> feat = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    >>> ptr = torch.tensor([0, 2, 2, 3])  # two views, none, one
    >>> gate = torch.ones(3, 2)
    >>> gated_view_aggregate(feat, ptr, torch.tensor([0, 1, 2]), gate)
    tensor([[0.5000, 1.0000],
            [0.0000, 0.0000],
            [3.0000, 4.0000]])
    """
    check(feat, ptr, entity, gate)
    chosen = choose(feat, gate) if backend == "auto" else backend
    if chosen == "triton":
        out, weight, weight_ptr = fused_triton.aggregate(feat, ptr, entity, gate, get_weight)
    elif chosen in _AGGREGATES:
        out, weight, weight_ptr = _AGGREGATES[chosen](feat, ptr, entity, gate)
    else:
        raise IMVIAError(
            f"gated_view_aggregate: unknown backend {backend!r}; expected one of"
            f" {', '.join(BACKENDS)}."
        )
    if weight is None or weight_ptr is None or not get_weight:
        return out
    return out, ViewWeights(weight, weight_ptr)


_AGGREGATES: dict[str, Aggregate] = {
    "reference": reference.aggregate,
    "torch_scatter": scatter.aggregate,
    "numba": fused_cpu.aggregate,
}


def choose(feat: Tensor, gate: Tensor) -> Backend:
    """Return the fastest backend for these tensors."""
    if torch.compiler.is_compiling():
        return "reference"  # plain torch is compiled together with the surrounding code
    if feat.is_cuda and fused_triton.usable(feat, gate):
        return "triton"
    if fused_cpu.usable(feat, gate):
        return "numba"
    # On a GPU, segment sums need no atomic additions and are therefore reproducible.
    return "torch_scatter" if scatter.usable(feat.device) else "reference"


def refuse_backend(backend: Backend, device: torch.device) -> None:
    """Raise if a backend is not available on a device, before anything is built.

    Raises
    ------
    SettingsError
    """
    available = {
        "torch_scatter": lambda: scatter.usable(device),
        "numba": lambda: device.type == "cpu" and fused_cpu.is_installed(),
        "triton": lambda: fused_triton.is_installed(device),
    }
    if backend in available and not available[backend]():
        raise SettingsError(
            f"Setting backend: {backend!r} is not available on {device}. 'torch_scatter' needs the"
            " package torch-scatter, 'numba' needs numba and a CPU, 'triton' needs Triton and a"
            " GPU; 'auto' takes the fastest that is available."
        )


def check(feat: Tensor, ptr: Tensor, entity: Tensor, gate: Tensor) -> None:
    """Raise if shapes do not match or, unless checking waits for a GPU, ids are out of range."""
    if (
        feat.dim() != 2
        or ptr.dim() != 1
        or entity.dim() != 1
        or gate.shape != (len(entity), feat.shape[1])
    ):
        raise IMVIAError(
            "gated_view_aggregate: expected feat (V, d), ptr (N + 1,), entity (B,), gate (B, d);"
            f" received {tuple(feat.shape)}, {tuple(ptr.shape)}, {tuple(entity.shape)},"
            f" {tuple(gate.shape)}."
        )
    picking.check_range(feat, ptr, entity)
