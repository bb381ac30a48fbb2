"""L2 (Eq. 5): the alignment of modalities, contrastive or as printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from imvia_graph._gradients import with_gradients
from imvia_graph.errors import SettingsError
from imvia_graph.losses._shared import check_embeddings, present_in_both, without_absent, zero

#: exp of this is the largest inverse temperature, as in CLIP.
_LARGEST_LOG_SCALE = math.log(100.0)

#: Rows shorter than this are divided by it, not by their length, as `functional.normalize` does.
_SHORTEST = 1e-12


class Alignment(nn.Module):
    r"""Alignment of modalities with a learnable temperature (L2, Eq. 5).

    Parameters
    ----------
    form : {"contrastive", "printed"}, optional
        `contrastive_alignment` or `printed_alignment`. Default: ``"contrastive"``.
    temperature : float, optional
        The temperature to start from, above 0; it is learned as its logarithm, and counts as 0.01
        where it is below that. Default: ``0.1``.

    Raises
    ------
    SettingsError
        An unknown form, or a temperature that is not above 0.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Alignment
    >>> embeddings = {"image": torch.eye(4), "text": torch.eye(4), "structure": torch.eye(4)}
    >>> Alignment(temperature=0.01)(embeddings).item() < 1e-6  # aligned already
    True
    """

    def __init__(self, form: str = "contrastive", temperature: float = 0.1) -> None:
        super().__init__()
        if form not in ALIGNMENTS:
            raise SettingsError(
                f"Alignment: unknown form {form!r}; expected one of {', '.join(ALIGNMENTS)}."
            )
        if not temperature > 0:
            raise SettingsError(
                f"Alignment: expected a temperature above 0; received {temperature}."
            )
        self.form = form
        self.initial_temperature = temperature
        self.log_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the initial temperature."""
        nn.init.constant_(self.log_scale, -math.log(self.initial_temperature))

    @property
    def temperature(self) -> Tensor:
        """The temperature now."""
        # The gradient passes the bound, so that a temperature that has reached it can come back.
        excess = (self.log_scale - _LARGEST_LOG_SCALE).clamp(min=0).detach()
        return (excess - self.log_scale).exp()

    def forward(
        self,
        embeddings: Mapping[str, Tensor],
        entity: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        r"""L2 of a batch: :math:`\frac{1}{M} \sum_{m \neq n}` of the form for (m, n).

        Parameters
        ----------
        embeddings : mapping of str to Tensor
            (B, d) a modality; row i is about the same entity in each.
        entity : Tensor, optional
            (B,) int64: rows of one entity are no negatives of each other. Default: all differ.
        present : mapping of str to Tensor, optional
            (B,) bool a modality: whether the entity has a view of it; a pair of modalities is
            aligned over the rows that have both. Default: all rows.

        Returns
        -------
        Tensor
            A scalar; 0 where there is nothing to align.

        Raises
        ------
        IMVIAError
            Embeddings of different shapes.
        """
        # Both forms are symmetric: (m, n) and (n, m) of the sum are one term, twice.
        pairs = list(combinations(embeddings, 2))
        if not pairs:
            return zero(embeddings)
        check_embeddings("Alignment", embeddings, list(embeddings))
        rows = None if present is None else present_in_both(embeddings, present, pairs)
        embeddings = without_absent(embeddings, present)
        parts = list(embeddings.values())
        if self.form == "contrastive":
            contrast: Tensor = _Contrast.apply(self.temperature, entity, rows, *parts)
            return contrast
        return _added_up(parts, self.temperature, entity, rows, printed_alignment)

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"form={self.form!r}, temperature={self.initial_temperature}"


def contrastive_alignment(
    x: Tensor,
    y: Tensor,
    temperature: Tensor | float,
    entity: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    r"""Contrastive alignment of two modalities, in both directions, as in CLIP.

    .. math::
        \frac{1}{B} \sum_i \left[
        - \log \frac{\exp(x_i \cdot y_i / \tau)}{\sum_j \exp(x_i \cdot y_j / \tau)}
        - \log \frac{\exp(y_i \cdot x_i / \tau)}{\sum_j \exp(y_i \cdot x_j / \tau)} \right]

    with rows of unit length. The reading of Eq. 5 in which the target of each cross-entropy is the
    matching entity; `printed_alignment` is the equation to the letter, which any agreed
    permutation of the batch minimises.

    Parameters
    ----------
    x, y : Tensor
        (B, d).
    temperature : Tensor or float
    entity : Tensor, optional
        (B,) int64: rows j other than i of the same entity are left out of the sums.
    present : Tensor, optional
        (B,) bool: the rows that take part. Default: all.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import contrastive_alignment
    >>> x = torch.eye(4)
    >>> contrastive_alignment(x, x, 0.01).item() < 1e-6  # each row is nearest to its own
    True
    >>> contrastive_alignment(x, x.flip(0), 0.01)  # as far off as can be: 2 / 0.01
    tensor(200.)
    """
    similarity = functional.normalize(x, dim=-1) @ functional.normalize(y, dim=-1).T
    similarity = _comparable(similarity.to(x.dtype) / temperature, entity, present)
    forward, backward = similarity.logsumexp(dim=1), similarity.logsumexp(dim=0)
    total = (forward + backward - 2 * similarity.diagonal()).sum()
    return total / _num_present(similarity, present)


def printed_alignment(
    x: Tensor,
    y: Tensor,
    temperature: Tensor | float,
    entity: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    r"""Eq. 5 as printed: cross-entropy between the two directions' distributions, both ways.

    .. math::
        P_{ij} = \frac{\exp(x_i \cdot y_j / \tau)}{\sum_k \exp(x_i \cdot y_k / \tau)}, \quad
        Q_{ij} = \frac{\exp(y_i \cdot x_j / \tau)}{\sum_k \exp(y_i \cdot x_k / \tau)}, \quad
        \frac{1}{B} \sum_i [C(P_i, Q_i) + C(Q_i, P_i)], \quad C(p, q) = -\sum_j p_j \log q_j

    Parameters are those of `contrastive_alignment`; rows keep their length.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import printed_alignment
    >>> x = torch.eye(4)
    >>> printed_alignment(x, x.flip(0), 0.01).item() < 1e-6  # any agreed permutation will do
    True
    """
    similarity = _comparable((x @ y.T).to(x.dtype) / temperature, entity, present)
    log_p = similarity.log_softmax(dim=1)
    log_q = similarity.T.log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    # A twin has probability 0 and logarithm -inf; 0 log 0 is 0.
    log_p, log_q = (part.masked_fill(part == -torch.inf, 0.0) for part in (log_p, log_q))
    return -(p * log_q + q * log_p).sum() / _num_present(similarity, present)


ALIGNMENTS = {"contrastive": contrastive_alignment, "printed": printed_alignment}


def _added_up(
    parts: Sequence[Tensor],
    temperature: Tensor,
    entity: Tensor | None,
    rows: Tensor | None,
    form: Any = contrastive_alignment,
) -> Tensor:
    """L2 of M modalities (B, d), pair by pair."""
    total = torch.zeros_like(parts[0].sum())
    for place, (x, y) in enumerate(combinations(parts, 2)):
        pair: Tensor = form(x, y, temperature, entity, None if rows is None else rows[place])
        total = total + 2 * pair
    return total / len(parts)


class _Contrast(torch.autograd.Function):
    """L2 of M modalities (B, d) in the contrastive form, of all P pairs at once.

    Each modality is normalised once and each step is one kernel for all pairs: on a GPU the time
    is that of starting kernels. What is kept for the gradient is one (P, B, B) tensor, in the dtype
    of the products.
    """

    @staticmethod
    def forward(
        ctx: Any, temperature: Tensor, entity: Tensor | None, rows: Tensor | None, *parts: Tensor
    ) -> Tensor:
        vectors = torch.stack(parts)
        dtype, device = vectors.dtype, vectors.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            size = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_(min=_SHORTEST)
            unit = vectors / size
            firsts, seconds = zip(*combinations(unit.to(dtype), 2), strict=True)
            sides = torch.stack([*firsts, *seconds]).unflatten(0, (2, -1))  # (2, P, B, d)
            products = (sides[0] @ sides[1].mT).to(unit.dtype)
            similarity = _comparable(products.div_(temperature), entity, rows)
            # The other way round as a copy: along columns an H200 took 259 microseconds, for 3.
            log_p, log_q = (
                part.log_softmax(dim=2) for part in (similarity, similarity.mT.contiguous())
            )
            matches = [part.diagonal(dim1=1, dim2=2) for part in (log_p, log_q)]
            share = unit.new_full((), 2 / len(parts)) / _num_present(similarity, rows)
            loss = -((matches[0] + matches[1]).sum(1) * share).sum()
            # The slope of the loss by the similarities, P + Q - 2 I, is exactly 0 for a row that is
            # compared with itself alone.
            slope = log_p.exp_().add_(log_q.exp_().mT)
            slope.diagonal(dim1=1, dim2=2).sub_(2)
        made = share, size, unit, sides, slope.to(dtype)
        ctx.save_for_backward(*made, entity, rows, temperature, *parts)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, size, unit, sides, slope, entity, rows, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
            of_temperature, *of_parts = with_gradients(
                lambda temperature, *parts: _added_up(parts, temperature, entity, rows),
                *(grad, inputs, needed),
            )
            return of_temperature, None, None, *of_parts
        temperature = inputs[0]
        weight = (grad * share / temperature).reshape(-1, 1, 1)
        # Written where half precision is wanted, without a tensor of float32 in between.
        weighted = torch.mul(sides, weight, out=torch.empty_like(sides))
        sides_of_pairs = (slope @ weighted[1], slope.mT @ weighted[0])
        of_units: list[list[Tensor]] = [[] for _ in unit]
        for (m, n), of_m, of_n in zip(combinations(of_units, 2), *sides_of_pairs, strict=True):
            m.append(of_m)
            n.append(of_n)
        grads = torch.stack([part for of_unit in of_units for part in of_unit])
        grads = grads.unflatten(0, (len(unit), -1)).sum(1, dtype=unit.dtype)
        # The loss does not change along a row, except where the row is divided by a constant.
        along = (unit * grads).sum(-1, keepdim=True)
        grads.addcmul_(unit, along * (size > _SHORTEST), value=-1).div_(size)
        # Both sides of a similarity have its product with its slope in their sum.
        return along.sum() / (-2 * temperature), None, None, *grads


def _comparable(similarity: Tensor, entity: Tensor | None, present: Tensor | None) -> Tensor:
    """(B, B) or (P, B, B) similarities, -inf of rows not to be compared.

    A row that takes no part is left with itself alone, which is no loss in either form.
    """
    if present is not None:
        absent = ~present
        apart = absent[..., :, None] | absent[..., None, :]
        if entity is not None:
            apart |= entity[:, None] == entity
    elif entity is not None:
        apart = entity[:, None] == entity
    else:
        return similarity
    apart.diagonal(dim1=-2, dim2=-1).fill_(False)
    return similarity.masked_fill(apart, -torch.inf)


def _num_present(similarity: Tensor, present: Tensor | None) -> Tensor | int:
    """How many rows a pair is aligned over, 1 where there is none; (P,) of (P, B, B)."""
    if present is None:
        return max(similarity.shape[-1], 1)
    return present.sum(-1).clamp(min=1)
