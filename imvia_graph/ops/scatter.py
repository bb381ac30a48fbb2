"""The aggregation on torch-scatter's segment operations, where that package is installed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from imvia_graph._gradients import refuse_second_order
from imvia_graph.errors import IMVIAError
from imvia_graph.ops.reference import SECOND_ORDER, at_unit_scale, gated_cosine, gather_views


@cache
def _torch_scatter() -> Any:
    """Return the module, or the error that its import raised."""
    try:
        import torch_scatter
    except (ImportError, OSError) as error:
        # OSError: built against another torch.
        return error
    return torch_scatter


def usable(device: torch.device) -> bool:
    """Return whether torch-scatter is installed, loads, and supports a device."""
    if isinstance(_torch_scatter(), Exception):
        return False
    # A build for CUDA returns its CUDA version, a build for the CPU only -1.
    return device.type == "cpu" or (
        device.type == "cuda" and torch.ops.torch_scatter.cuda_version() > 0
    )


def aggregate(
    feat: Tensor, ptr: Tensor, entity: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, d) sums, (T,) weights and their pointer; see `gated_view_aggregate`."""
    module = _torch_scatter()
    if isinstance(module, Exception):
        raise IMVIAError(
            "The backend 'torch_scatter' needs the package torch-scatter, which does not load"
            f" ({module}). Install it with: pip install --no-build-isolation torch-scatter"
        )
    view, query, query_ptr = gather_views(feat, ptr, entity)
    view = view.to(torch.promote_types(view.dtype, gate.dtype))
    similarity = gated_cosine(view, at_unit_scale(gate)[query])
    top = module.segment_max_csr(similarity.detach(), query_ptr)[0]
    weight = (similarity - top[query]).exp()
    weight = weight / module.segment_sum_csr(weight, query_ptr)[query]
    out = module.segment_sum_csr(weight[:, None] * view, query_ptr)
    # torch-scatter's own second-order gradients are wrong.
    refuse_second_order([out, weight], "The aggregation of views", SECOND_ORDER)
    return out, weight, query_ptr
