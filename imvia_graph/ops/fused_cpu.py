"""The aggregation in one pass over the views, compiled for the CPU by numba.

Each pass, forward and backward, reads a view from memory once and then works on it in the core's
cache. Besides the result, five numbers per view and query are kept. Cosines lie in [-1, 1], so
their softmax needs no maximum.
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
from imvia_graph.ops.reference import SECOND_ORDER

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_installed() -> bool:
    """Return whether numba is there to compile the loops."""
    return _kernels.load("views") is not None


def usable(feat: Tensor, gate: Tensor) -> bool:
    """Return whether there is a kernel for these tensors, and numba to compile it."""
    return (
        feat.device.type == gate.device.type == "cpu"
        and feat.dtype in DTYPES
        and gate.dtype in DTYPES
        and feat.shape[1] > 0
        and is_installed()
    )


def aggregate(
    feat: Tensor, ptr: Tensor, entity: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, d) sums, (T,) weights and their pointer; see `gated_view_aggregate`."""
    if not usable(feat, gate):
        raise IMVIAError(
            "The backend 'numba' needs the package numba, and tensors on the CPU in one of"
            f" {', '.join(map(str, DTYPES))}; received {feat.dtype} on {feat.device} and"
            f" {gate.dtype} on {gate.device}."
        )
    weight_ptr = pointer(ptr[entity + 1] - ptr[entity])
    dtype = torch.promote_types(torch.promote_types(feat.dtype, gate.dtype), torch.float32)
    # The loops widen half precision view by view. To float64 the queried views are widened here.
    if feat.dtype != dtype and (feat.element_size() != 2 or dtype == torch.float64):
        feat, ptr, entity = pick_views(feat, ptr, entity)
        feat = feat.to(dtype)
    if gate.dtype != torch.bfloat16 or dtype == torch.float64:
        gate = gate.to(dtype)
    out, weight = _Aggregate.apply(
        feat.contiguous(), ptr.contiguous(), entity.contiguous(), gate, weight_ptr
    )
    return out, weight, weight_ptr


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feat: Tensor, ptr: Tensor, entity: Tensor, gate: Tensor, weight_ptr: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate = gate.contiguous()
        out = torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, torch.float32))
        weight = out.new_empty(int(weight_ptr[-1]))
        kept = out.new_empty(len(weight), 4)
        tensors = (feat, ptr, entity, gate, weight_ptr, out, weight, kept)
        _kernels.share_out(_kernels.load("views").forward, _cuts(weight_ptr), tensors)
        ctx.save_for_backward(*tensors)
        return out, weight

    @staticmethod
    @first_order("The aggregation of views", SECOND_ORDER)
    def backward(ctx: Any, grad_out: Tensor, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        feat, _, entity, gate, weight_ptr, out = tensors[:6]
        grad_gate = torch.empty_like(gate)
        if ctx.needs_input_grad[0]:
            # Queries of one entity add to the gradients of the same views: keep them on one thread.
            order = torch.argsort(entity, stable=True)
            grad_feat = torch.zeros_like(feat, dtype=out.dtype)
            cuts = _cuts(pointer(weight_ptr.diff()[order]), entity[order])
        else:
            order = torch.arange(len(entity))
            grad_feat = out.new_empty(0, out.shape[1])
            cuts = _cuts(weight_ptr)
        grads = (grad_out.contiguous(), grad_weight.contiguous(), order, grad_gate, grad_feat)
        _kernels.share_out(_kernels.load("views").backward, cuts, (*tensors, *grads))
        grad = grad_feat.to(feat.dtype) if ctx.needs_input_grad[0] else None
        return grad, None, None, grad_gate, None


# -- threads --------------------------------------------------------------------------------------


def _cuts(weight_ptr: Tensor, entity: Tensor | None = None) -> list[int]:
    """Return the cuts between the threads' ranges of queries, with equal numbers of views.

    With a sorted ``entity``, no cut separates queries of one entity.
    """
    queries = len(weight_ptr) - 1
    # A thread pays off from a few hundred views on.
    parts = max(1, min(torch.get_num_threads(), queries, int(weight_ptr[-1]) // 256))
    wanted = torch.arange(1, parts) * (weight_ptr[-1] // parts)
    inner = torch.searchsorted(weight_ptr, wanted).clamp_(max=queries)
    if entity is not None and len(inner):
        inner = torch.searchsorted(entity, entity[inner.clamp(max=queries - 1)])
    return [0, *inner.tolist(), queries]
