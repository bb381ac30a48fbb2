"""The aggregation in one pass over the views, compiled for the CPU by numba.

A view is read once forward and once backward, while it is in the core's cache; beside the result,
five numbers a view and query are kept. Cosines lie in [-1, 1], so that their softmax needs no
maximum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imvia_graph import _kernels
from imvia_graph._gradients import first_order
from imvia_graph.answers import pointer
from imvia_graph.errors import IMVIAError
from imvia_graph.ops.picking import pick_views
from imvia_graph.ops.reference import TWICE

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_installed() -> bool:
    """Whether there is numba to compile the loops."""
    return _kernels.load("views") is not None


def usable(feat: Tensor, gate: Tensor) -> bool:
    """Whether there is a kernel for these tensors, and numba to compile it."""
    return (
        feat.device.type == gate.device.type == "cpu"
        and feat.dtype in DTYPES
        and gate.dtype in DTYPES
        and feat.shape[1] > 0
        and is_installed()
    )


def aggregate(
    feat: Tensor,
    ptr: Tensor,
    entity: Tensor,
    gate: Tensor,
    added: Tensor | None = None,
    row: Tensor | None = None,
    absent: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `imvia_graph.ops.gated_view_aggregate`: (B, d) sums, (T,) weights, their pointer.

    With ``added`` (R, d), or (d,) for all, the gate is the sigmoid of ``gate`` plus the ``row`` of
    it, (B,) int64, or each query's own. An entity without views gets ``absent`` (d,), or zeros.
    """
    if not usable(feat, gate):
        raise IMVIAError(
            "The backend 'numba' needs the package numba, and tensors on the CPU in one of"
            f" {', '.join(map(str, DTYPES))}; received {feat.dtype} on {feat.device} and"
            f" {gate.dtype} on {gate.device}."
        )
    weight_ptr = pointer(ptr[entity + 1] - ptr[entity])
    dtype = torch.promote_types(torch.promote_types(feat.dtype, gate.dtype), torch.float32)
    # Half precision is widened view by view; beside float64 it is widened here, where asked for.
    if feat.dtype != dtype and (feat.element_size() != 2 or dtype == torch.float64):
        feat, ptr, entity = pick_views(feat, ptr, entity)
        feat = feat.to(dtype)
    if added is None:
        added, row = gate.new_zeros(1, gate.shape[1]), entity[:0]
    else:
        added, row = _rows(added, row, entity)
    out, weight = _Aggregate.apply(
        feat.contiguous(),
        ptr.contiguous(),
        entity.contiguous(),
        *(_of_gates(given, dtype) for given in (gate, added)),
        row,
        gate.new_zeros(gate.shape[1]) if absent is None else absent,
        weight_ptr,
    )
    return out, weight, weight_ptr


def _rows(added: Tensor, row: Tensor | None, entity: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the gates as (R, d), and the row of each query."""
    if added.dim() == 1 or len(added) == 1:
        return added.reshape(1, -1), torch.zeros_like(entity)
    if row is None:
        return added, torch.arange(len(entity))
    if len(row) and (int(row.min()) < 0 or int(row.max()) >= len(added)):
        raise IMVIAError(
            f"Expected rows from 0 to {len(added) - 1} of what is added to the gates, one a query;"
            f" received {int(row.min())} to {int(row.max())}."
        )
    return added, row.contiguous()


def _of_gates(given: Tensor, dtype: torch.dtype) -> Tensor:
    """In a type that the loops read beside views of this one."""
    return given if given.dtype == torch.bfloat16 and dtype == torch.float32 else given.to(dtype)


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        feat: Tensor,
        ptr: Tensor,
        entity: Tensor,
        gate: Tensor,
        added: Tensor,
        row: Tensor,
        absent: Tensor,
        weight_ptr: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gate, added = gate.contiguous(), added.contiguous()
        out = torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, torch.float32))
        weight = out.new_empty(int(weight_ptr[-1]))
        kept = out.new_empty(len(weight), 4)
        order = _order(entity)
        kept_for_backward = (feat, ptr, entity, gate, added, row, order, weight_ptr, weight, kept)
        given = (*kept_for_backward, absent.to(out.dtype).contiguous(), out)
        ctx.cuts = _cuts(weight_ptr, order)
        _kernels.share_out(_kernels.load("views").forward, ctx.cuts, given)
        ctx.save_for_backward(*kept_for_backward)
        return out, weight

    @staticmethod
    @first_order("The aggregation of views", TWICE)
    def backward(ctx: Any, grad_out: Tensor, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        feat, _, entity, gate, added, row, order, weight_ptr, weight, _ = tensors
        of_feat = ctx.needs_input_grad[0]
        grad_gate = torch.empty_like(gate)
        grad_feat = weight.new_zeros(feat.shape if of_feat else (0, gate.shape[1]))
        # Queries of one entity add to the same views: they stay on one thread.
        cuts = _cuts(weight_ptr, order, entity) if of_feat else ctx.cuts
        given = (grad_out.contiguous(), grad_weight.contiguous(), grad_gate, grad_feat)
        _kernels.share_out(_kernels.load("views").backward, cuts, (*tensors, *given))
        grad_added = None
        if ctx.needs_input_grad[4]:
            grad_added = torch.zeros_like(added).index_add_(0, row, grad_gate.to(added.dtype))
        grad_absent = None
        if ctx.needs_input_grad[6]:
            grad_absent = grad_out[weight_ptr.diff() == 0].sum(0)
        grad = grad_feat.to(feat.dtype) if of_feat else None
        return grad, None, None, grad_gate, grad_added, None, grad_absent, None


# -- threads --------------------------------------------------------------------------------------


def _order(entity: Tensor) -> Tensor:
    """The queries as their entities' views lie in memory, which is then read nearly in a row."""
    if (entity[1:] >= entity[:-1]).all():
        return torch.arange(len(entity))
    return torch.argsort(entity, stable=True)


def _cuts(weight_ptr: Tensor, order: Tensor, entity: Tensor | None = None) -> list[int]:
    """Where the queries, in order, are cut into a part a thread, with as many views each.

    With ``entity`` no cut parts queries of one entity.
    """
    queries = len(order)
    # A thread is worth its while from some hundred views on.
    parts = max(1, min(torch.get_num_threads(), queries, int(weight_ptr[-1]) // 256))
    if parts == 1:
        return [0, queries]
    before = pointer(weight_ptr.diff()[order])
    wanted = torch.arange(1, parts) * (before[-1] // parts)
    inner = torch.searchsorted(before, wanted).clamp_(max=queries)
    if entity is not None:
        ordered = entity[order]
        inner = torch.searchsorted(ordered, ordered[inner.clamp(max=queries - 1)])
    return [0, *inner.tolist(), queries]
