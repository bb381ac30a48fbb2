"""Gated view aggregation (Eq. 2 and 3) as segment operations over a CSR of views.

`gated_view_aggregate` has one signature, whatever runs beneath it.
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
        (T,): the weights of the first query's views, then the second's, …; T is the sum of view
        counts over the batch.
    ptr : Tensor
        (B + 1,) int64: those of query i are ``weight[ptr[i]:ptr[i + 1]]``; they sum to 1 where the
        entity has a view.
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
    backend : {"auto", "reference", "torch_scatter", "numba", "triton"}
        ``reference`` is plain torch; ``torch_scatter`` needs that package; ``numba`` on a CPU and
        ``triton`` on a GPU read the views once and write nothing of their size; ``auto`` is the
        fastest that knows the tensors' device and dtypes. Gradients of gradients (``create_graph``)
        are those of ``reference`` alone.
    get_weight : bool
        Whether to return the views' weights too.

    Returns
    -------
    Tensor
        (B, d) in the wider of float32 and the inputs' dtypes; zeros where an entity has no view.
    ViewWeights
        Only with ``get_weight``.

    Raises
    ------
    IMVIAError
        Shapes that do not fit, ids that are no integers, or a backend that is unknown or not
        installed; on a CPU also entities and a pointer that lead outside the views. On a GPU,
        which would have to be waited for, these are not looked at.

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
    """The fastest backend for these tensors."""
    if torch.compiler.is_compiling():
        return "reference"  # plain torch is compiled with what stands around it
    if feat.is_cuda and fused_triton.usable(feat, gate):
        return "triton"
    if fused_cpu.usable(feat, gate):
        return "numba"
    # On a GPU segment sums need no atomic additions, and so are the same from run to run.
    return "torch_scatter" if scatter.usable(feat.device) else "reference"


def refuse_backend(backend: Backend, device: torch.device) -> None:
    """Refuse a backend that a device has not, before anything is made.

    Raises
    ------
    SettingsError
    """
    there = {
        "torch_scatter": lambda: scatter.usable(device),
        "numba": lambda: device.type == "cpu" and fused_cpu.is_installed(),
        "triton": lambda: fused_triton.is_installed(device),
    }
    if backend in there and not there[backend]():
        raise SettingsError(
            f"Setting backend: {backend!r} is not to be had on {device}. 'torch_scatter' needs that"
            " package, 'numba' that package and a CPU, 'triton' that package and a GPU; 'auto' is"
            " the fastest that there is."
        )


def check(feat: Tensor, ptr: Tensor, entity: Tensor, gate: Tensor) -> None:
    """Refuse shapes that do not fit, and where that is known without waiting what is not there."""
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
