"""Gradients of gradients, of functions whose backward pass is written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imvia_graph.errors import IMVIAError


def first_order(what: str, instead: str) -> Callable[[Any], Any]:
    """Refuse to be differentiated twice, where gradients would come out that are wrong or zero.

    Unlike ``once_differentiable``, whose refusal waits until a gradient depends on one that comes
    in: those of a sum do not, and count as constants.

    Parameters
    ----------
    what : str
        Whose gradients they are.
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
    """The same for results of a function whose backward pass is not ours."""
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: _refuse(what, instead))


def _refuse(what: str, instead: str) -> None:
    # In a backward pass gradients are tracked where create_graph asks for it.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise IMVIAError(
            f"{what}: gradients are of first order here, and create_graph=True asks for gradients"
            f" of theirs. {instead}"
        )


def with_gradients(
    function: Any,
    grads: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of a function that have gradients themselves; None where not needed.

    Parameters
    ----------
    function : callable
        The forward pass in operations of torch.
    grads : Tensor or sequence of Tensor
        Gradients of what it gives.
    inputs : sequence of Tensor
        What it takes.
    needed : sequence of bool
        Of which of them.
    """
    # By other names: one input may be made of another, and what passes between them is not ours.
    apart = [part.view_as(part) for part in inputs]
    wanted = [part for part, needs in zip(apart, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(function(*apart), wanted, grads, create_graph=True))
    return [next(found) if needs else None for needs in needed]
