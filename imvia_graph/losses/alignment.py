"""L2 (Eq. 5): the alignment of modalities, contrastive or as printed in the paper."""

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

#: Logarithm of the largest inverse temperature, as in CLIP.
_MAX_LOG_SCALE = math.log(100.0)

#: Rows shorter than this are divided by it instead of their length, as in `functional.normalize`.
_MIN_LENGTH = 1e-12


class Alignment(nn.Module):
    r"""Alignment of modalities with a learnable temperature (L2, Eq. 5).

    Parameters
    ----------
    form : {"contrastive", "printed"}, optional
        `contrastive_alignment` or `printed_alignment`. Default: ``"contrastive"``.
    temperature : float, optional
        Initial temperature, above 0. Its logarithm is learned; a temperature below 0.01 is replaced
        by 0.01. Default: ``0.1``.

    Raises
    ------
    SettingsError
        If the form is unknown or the temperature is not above 0.

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
        """Reset the temperature to its initial value."""
        nn.init.constant_(self.log_scale, -math.log(self.initial_temperature))

    @property
    def temperature(self) -> Tensor:
        """The current temperature, a scalar."""
        # The gradient passes through the bound, so that a temperature at the bound can leave it.
        excess = (self.log_scale - _MAX_LOG_SCALE).clamp(min=0).detach()
        return (excess - self.log_scale).exp()

    def forward(
        self,
        embeddings: Mapping[str, Tensor],
        entity: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        r"""Return L2 of a batch: :math:`\frac{1}{M} \sum_{m \neq n}` of the form for (m, n).

        Parameters
        ----------
        embeddings : mapping of str to Tensor
            (B, d) for each modality; row i belongs to the same entity in all of them.
        entity : Tensor, optional
            (B,) int64 entity of each row; rows of one entity are not negatives of each other.
            Default: all entities differ.
        present : mapping of str to Tensor, optional
            (B,) bool for each modality: whether the entity has a view of it. A pair of modalities
            is aligned over the rows that have both. Default: all rows.

        Returns
        -------
        Tensor
            A scalar; 0 if there is nothing to align.

        Raises
        ------
        IMVIAError
            If the embeddings differ in shape.
        """
        # Both forms are symmetric: (m, n) and (n, m) give the same term.
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
        return _sum_over_pairs(parts, self.temperature, entity, rows, printed_alignment)

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        return f"form={self.form!r}, temperature={self.initial_temperature}"


def contrastive_alignment(
    x: Tensor,
    y: Tensor,
    temperature: Tensor | float,
    entity: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    r"""Compute the contrastive alignment of two modalities, in both directions, as in CLIP.

    .. math::
        \frac{1}{B} \sum_i \left[
        - \log \frac{\exp(x_i \cdot y_i / \tau)}{\sum_j \exp(x_i \cdot y_j / \tau)}
        - \log \frac{\exp(y_i \cdot x_i / \tau)}{\sum_j \exp(y_i \cdot x_j / \tau)} \right]

    where the rows are normalised to unit length. This reading of Eq. 5 takes the matching entity as
    the target of each cross-entropy. `printed_alignment` is the literal equation, which is also
    minimal if all rows match under some other permutation of the batch.

    Parameters
    ----------
    x, y : Tensor
        (B, d) embeddings of the two modalities.
    temperature : Tensor or float
        :math:`\tau`.
    entity : Tensor, optional
        (B,) int64 entity of each row; other rows j of the entity of row i are left out of the sums.
        Default: all entities differ.
    present : Tensor, optional
        (B,) bool: the rows that take part. Default: all.

    Returns
    -------
    Tensor
        A scalar.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import contrastive_alignment
    >>> x = torch.eye(4)
    >>> contrastive_alignment(x, x, 0.01).item() < 1e-6  # each row is nearest to its match
    True
    >>> contrastive_alignment(x, x.flip(0), 0.01)  # each row is nearest to another: 2 / 0.01
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
    r"""Compute Eq. 5 as printed: cross-entropy of the two directions' distributions, both ways.

    .. math::
        P_{ij} = \frac{\exp(x_i \cdot y_j / \tau)}{\sum_k \exp(x_i \cdot y_k / \tau)}, \quad
        Q_{ij} = \frac{\exp(y_i \cdot x_j / \tau)}{\sum_k \exp(y_i \cdot x_k / \tau)}, \quad
        \frac{1}{B} \sum_i [C(P_i, Q_i) + C(Q_i, P_i)], \quad C(p, q) = -\sum_j p_j \log q_j

    The parameters are those of `contrastive_alignment`; rows are not normalised.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import printed_alignment
    >>> x = torch.eye(4)
    >>> printed_alignment(x, x.flip(0), 0.01).item() < 1e-6  # minimal under a permutation, too
    True
    """
    similarity = _comparable((x @ y.T).to(x.dtype) / temperature, entity, present)
    log_p = similarity.log_softmax(dim=1)
    log_q = similarity.T.log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    # Other rows of the same entity have probability 0 and logarithm -inf; 0 log 0 is 0.
    log_p, log_q = (part.masked_fill(part == -torch.inf, 0.0) for part in (log_p, log_q))
    return -(p * log_q + q * log_p).sum() / _num_present(similarity, present)


ALIGNMENTS = {"contrastive": contrastive_alignment, "printed": printed_alignment}


def _sum_over_pairs(
    parts: Sequence[Tensor],
    temperature: Tensor,
    entity: Tensor | None,
    rows: Tensor | None,
    form: Any = contrastive_alignment,
) -> Tensor:
    """Return L2 of M modalities (B, d), pair by pair."""
    total = torch.zeros_like(parts[0].sum())
    for place, (x, y) in enumerate(combinations(parts, 2)):
        pair: Tensor = form(x, y, temperature, entity, None if rows is None else rows[place])
        total = total + 2 * pair
    return total / len(parts)


class _Contrast(torch.autograd.Function):
    """Contrastive L2 of M modalities (B, d), for all P pairs at once.

    Each modality is normalised once and each step is one kernel for all pairs, since on a GPU
    launching kernels takes most of the time. One (P, B, B) tensor is saved for the gradient, in the
    dtype of the products.
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
            length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_(min=_MIN_LENGTH)
            unit = vectors / length
            firsts, seconds = zip(*combinations(unit.to(dtype), 2), strict=True)
            sides = torch.stack([*firsts, *seconds]).unflatten(0, (2, -1))  # (2, P, B, d)
            products = (sides[0] @ sides[1].mT).to(unit.dtype)
            similarity = _comparable(products.div_(temperature), entity, rows)
            # Transposed by a copy: a softmax along columns took 259 microseconds on an H200, not 3.
            log_p, log_q = (
                part.log_softmax(dim=2) for part in (similarity, similarity.mT.contiguous())
            )
            matches = [part.diagonal(dim1=1, dim2=2) for part in (log_p, log_q)]
            share = unit.new_full((), 2 / len(parts)) / _num_present(similarity, rows)
            loss = -((matches[0] + matches[1]).sum(1) * share).sum()
            # The gradient by the similarities, P + Q - 2 I, is exactly 0 for a row that is compared
            # only with itself.
            slope = log_p.exp_().add_(log_q.exp_().mT)
            slope.diagonal(dim1=1, dim2=2).sub_(2)
        computed = share, length, unit, sides, slope.to(dtype)
        ctx.save_for_backward(*computed, entity, rows, temperature, *parts)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, length, unit, sides, slope, entity, rows, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
            of_temperature, *of_parts = with_gradients(
                lambda temperature, *parts: _sum_over_pairs(parts, temperature, entity, rows),
                *(grad, inputs, needed),
            )
            return of_temperature, None, None, *of_parts
        temperature = inputs[0]
        weight = (grad * share / temperature).reshape(-1, 1, 1)
        # Written in the dtype of ``sides``, without a float32 tensor in between.
        weighted = torch.mul(sides, weight, out=torch.empty_like(sides))
        sides_of_pairs = (slope @ weighted[1], slope.mT @ weighted[0])
        of_units: list[list[Tensor]] = [[] for _ in unit]
        for (m, n), of_m, of_n in zip(combinations(of_units, 2), *sides_of_pairs, strict=True):
            m.append(of_m)
            n.append(of_n)
        grads = torch.stack([part for of_unit in of_units for part in of_unit])
        grads = grads.unflatten(0, (len(unit), -1)).sum(1, dtype=unit.dtype)
        # The loss does not depend on the length of a row, unless the row is divided by _MIN_LENGTH.
        along = (unit * grads).sum(-1, keepdim=True)
        grads.addcmul_(unit, along * (length > _MIN_LENGTH), value=-1).div_(length)
        # The sum has the product of each similarity and its gradient twice, once for each side.
        return along.sum() / (-2 * temperature), None, None, *grads


def _comparable(similarity: Tensor, entity: Tensor | None, present: Tensor | None) -> Tensor:
    """Set (B, B) or (P, B, B) similarities to -inf for rows that must not be compared.

    A row that takes no part is compared only with itself, which gives no loss in either form.
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
    """Return the number of rows that a pair is aligned over, at least 1; (P,) for (P, B, B)."""
    if present is None:
        return max(similarity.shape[-1], 1)
    return present.sum(-1).clamp(min=1)
