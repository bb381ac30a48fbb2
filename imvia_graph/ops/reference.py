"""The aggregation in plain torch, which every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from imvia_graph.answers import expand, pointer

#: Advice in the errors of the backends that support first-order gradients only.
SECOND_ORDER = "The backend 'reference' supports both: GatedViewConv(..., backend='reference')."


def aggregate(
    feat: Tensor, ptr: Tensor, entity: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, d) sums, (T,) weights and their pointer; see `gated_view_aggregate`."""
    view, query, query_ptr = gather_views(feat, ptr, entity)
    view = view.to(torch.promote_types(view.dtype, gate.dtype))
    similarity = gated_cosine(view, at_unit_scale(gate)[query])
    # Softmax over each query's views; the maximum is a constant shift and needs no gradient.
    top = similarity.new_full((len(entity),), -torch.inf)
    top = top.scatter_reduce(0, query, similarity.detach(), reduce="amax")
    weight = (similarity - top[query]).exp()
    total = weight.new_zeros(len(entity)).index_add(0, query, weight)
    weight = weight / total[query]
    out = view.new_zeros(len(entity), feat.shape[1]).index_add(0, query, weight[:, None] * view)
    return out, weight, query_ptr


def gather_views(feat: Tensor, ptr: Tensor, entity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each query's views: (T, d) rows in float32 or wider, (T,) queries, (B + 1,) ptr."""
    start = ptr[entity]
    count = ptr[entity + 1] - start
    query, position = expand(start, count)
    view = feat[position]
    return view.to(torch.promote_types(view.dtype, torch.float32)), query, pointer(count)


def at_unit_scale(vectors: Tensor) -> Tensor:
    """Divide rows by their largest absolute value, in at least float32.

    The cosine does not depend on the scale of a view or a gate; at scale 1 none of their squares
    over- or underflows.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    scale = vectors.detach().abs().amax(-1, keepdim=True)
    return vectors / torch.where(scale == 0, 1.0, scale)


def gated_cosine(view: Tensor, gate: Tensor) -> Tensor:
    """Return cos(gate * view, view) per row, for gates at unit scale; 0 for zero rows (Eq. 2)."""
    square = at_unit_scale(view) ** 2
    dot = (gate * square).sum(-1)
    gated_norm = (gate * gate * square).sum(-1)
    norm = square.sum(-1)
    product = gated_norm * norm
    # The square root has no gradient at 0: replace a product of 0 by 1.
    zero = product == 0
    return torch.where(zero, 0.0, dot / torch.where(zero, 1.0, product).sqrt())
