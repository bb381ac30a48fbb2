"""Second-order gradients of functions whose backward pass is written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imvia_graph.errors import IMVIAError


def first_order(what: str, instead: str) -> Callable[[Any], Any]:
    """Make a backward pass raise if it is differentiated: the result would be wrong or zero.

    ``once_differentiable`` raises only if an incoming gradient requires a gradient itself. That of
    a sum does not, and second-order gradients would be zero without an error.

    Parameters
    ----------
    what : str
        What the gradients belong to, for the message.
    instead : str
        What to do instead, a sentence.
    """

    def decorate(backward: Any) -> Any:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Any) -> Any:
            _refuse(what, instead)
            return backward(ctx, *grads)

        return once

    return decorate


def refuse_second_order(tensors: Sequence[Tensor], what: str, instead: str) -> None:
    """Raise as in `first_order`, for results of functions whose backward pass is not ours."""
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: _refuse(what, instead))


def _refuse(what: str, instead: str) -> None:
    # With create_graph, gradients are enabled in the backward pass.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise IMVIAError(
            f"{what}: only first-order gradients are supported here, and create_graph=True asks for"
            f" second-order gradients. {instead}"
        )


def with_gradients(
    function: Any,
    grads: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients of a function that can be differentiated again; None where not needed.

    Parameters
    ----------
    function : callable
        The forward pass in torch operations.
    grads : Tensor or sequence of Tensor
        Gradients of its outputs.
    inputs : sequence of Tensor
        Its inputs.
    needed : sequence of bool
        Whether the gradient of each input is needed.
    """
    # As views: if one input was computed from another, no gradient must pass between the two here.
    views = [part.view_as(part) for part in inputs]
    wanted = [part for part, needs in zip(views, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(function(*views), wanted, grads, create_graph=True))
    return [next(found) if needs else None for needs in needed]
