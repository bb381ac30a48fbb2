"""Products of matrices in half precision whose results a GPU writes in float32.

The sums inside such a product are in float32 anyway. Writing them as they are is faster than
rounding them and converting the result afterwards, and loses no digits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from imvia_graph._gradients import first_order

#: Attributes in which a module keeps its hooks.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Whether torch has such products, which it has for GPUs only, and from which compute capability on
#: they are used: neither ROCm nor GPUs before Ampere have been tested.
_WIDENS = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None
_NEW = (8, 0)
_first_order = first_order("A product under autocast on a GPU", "Turn autocast off for it.")


def wide_mm(left: Tensor, right: Tensor) -> Tensor:
    """Return the float32 product of (n, k) and (k, m) matrices of one dtype."""
    if _WIDENS and left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        capability = torch.cuda.get_device_capability(left.device)
        if capability >= _NEW:
            return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def half_precision(like: Tensor) -> torch.dtype | None:
    """Return the dtype of autocast if it is on and the tensor is float32 on a GPU, else None."""
    if like.dtype != torch.float32 or not like.is_cuda or torch.compiler.is_compiling():
        return None
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return (B, k) times (k, m), on a GPU under autocast in fewer passes over memory.

    There, gradients of gradients raise an error.
    """
    dtype = half_precision(right)
    if dtype is None:
        return left @ right
    out: Tensor = Product.apply(left, right, dtype)
    return out


def linear(layer: nn.Module, feat: Tensor) -> Tensor:
    """Return ``layer(feat)``, of (B, k) on a GPU under autocast in fewer passes over memory.

    There, gradients of gradients raise an error.
    """
    if type(layer) is nn.Linear and feat.dim() == 2:
        dtype = half_precision(layer.weight)
        if dtype is not None and not any(getattr(layer, hooks) for hooks in _HOOKS):
            out: Tensor = Linear.apply(feat, layer.weight, layer.bias, dtype)
            return out
    found: Tensor = layer(feat)
    return found


class Product(torch.autograd.Function):
    """The product (B, m) of (B, k) and (k, m), computed in a given dtype."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = left.dtype, right.dtype
        left, right = left.to(dtype), right.to(dtype)
        ctx.save_for_backward(left, right)
        with torch.autocast(left.device.type, enabled=False):
            return left @ right

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        of_left = of_right = None
        if ctx.needs_input_grad[0]:
            of_left = wide_mm(grad, right.T).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_right = wide_mm(left.T, grad).to(ctx.dtypes[1])
        return of_left, of_right, None


class Linear(torch.autograd.Function):
    """(B, m) from (B, k) features, (m, k) weights and (m,) or no biases, in a given dtype."""

    @staticmethod
    def forward(
        ctx: Any, feat: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        half, narrow = feat.to(dtype), weight.to(dtype)
        ctx.save_for_backward(half, narrow)
        ctx.dtypes = feat.dtype, weight.dtype, None if bias is None else bias.dtype
        with torch.autocast(feat.device.type, enabled=False):
            return functional.linear(half, narrow, None if bias is None else bias.to(dtype))

    @staticmethod
    @_first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feat, weight = ctx.saved_tensors
        of_feat, of_weight, of_bias = ctx.dtypes
        grad_feat = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            wide = of_feat == torch.float32
            grad_feat = wide_mm(grad, weight) if wide else (grad @ weight).to(of_feat)
        if ctx.needs_input_grad[1]:
            grad_weight = wide_mm(grad.T, feat).to(of_weight)
        if of_bias is not None and ctx.needs_input_grad[2]:
            # As a product, which takes half the time of a sum over rows.
            ones = grad.new_ones(8, len(grad))
            grad_bias = wide_mm(ones, grad)[0].to(of_bias)
        return grad_feat, grad_weight, grad_bias, None
