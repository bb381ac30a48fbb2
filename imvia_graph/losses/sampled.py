"""L3 over sampled candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from imvia_graph.distributed import Shards
from imvia_graph.errors import IMVIAError
from imvia_graph.losses._shared import at_least_float32
from imvia_graph.losses.scored import (
    Positives,
    check_heads,
    check_loss,
    check_weights,
    weighted_mean,
)


class Sampled(NamedTuple):
    """Candidates shared by the queries of a batch, with the probability of each to be sampled.

    Attributes
    ----------
    entity : Tensor
        (C,) int64 candidates, distinct and ascending.
    log_q : Tensor
        (C,) float32 logarithm of the probability that the entity is among the candidates.
    row, col : Tensor
        (K,) int64: candidate ``col`` is a known answer of query ``row``, but not its answer in the
        batch; the pair is left out of the loss.
    """

    entity: Tensor
    log_q: Tensor
    row: Tensor
    col: Tensor

    def of_process(self, shards: Shards) -> tuple[Sampled, int]:
        """Return the candidates of one process, and the position of the first among all."""
        bounds = torch.searchsorted(
            self.entity, self.entity.new_tensor([shards.start, shards.stop])
        )
        first, last = bounds.tolist()
        mine = (self.col >= first) & (self.col < last)
        found = Sampled(
            self.entity[first:last],
            self.log_q[first:last],
            self.row[mine],
            self.col[mine] - first,
        )
        return found, first


def sampled_completion(
    scores: Mapping[str, Tensor],
    positives: Positives,
    sampled: Sampled,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    shards: Shards | None = None,
) -> Tensor:
    r"""Compute L3 over sampled candidates: an estimate of `completion` over all entities.

    A candidate j that is sampled with probability :math:`q_j` stands for :math:`1 / q_j` entities
    (Horvitz and Thompson 1952); the answer of a query, which is always included, stands for itself.
    The sum over all entities in the softmax becomes

    .. math::
        \sum_t \exp S_{it} \approx \exp S_{i y_i} + \sum_{j \neq y_i} \exp(S_{ij} - \log q_j)

    which is the logQ correction of sampled softmax (`Yi et al. 2019
    <https://doi.org/10.1145/3298689.3346996>`__). The means over all entities, in label smoothing
    and in the binary loss, use the same weights. Other known answers of a query are left out.

    Parameters
    ----------
    scores : mapping of str to Tensor
        (B, C) scores for each head.
    positives : Positives
        One per query; ``col`` indexes the candidates.
    sampled : Sampled
    loss : {"softmax", "binary"}, optional
        Default: ``"softmax"``.
    label_smoothing : float, optional
        Default: ``0``.
    shards : Shards, optional
        With several processes: scores, positives and candidates are those of this process; the loss
        is that of all. Default: a single process.

    Returns
    -------
    Tensor
        A scalar.

    Raises
    ------
    SettingsError
        If the loss is unknown, or if rows are weighted and the loss is a mean over terms.
    IMVIAError
        If there is no head, or the shape of scores does not match the candidates.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Positives, Sampled, sampled_completion
    >>> none = torch.empty(0, dtype=torch.int64)
    >>> half = torch.tensor([0.5, 0.5, 0.5]).log()  # each of six entities with probability 1/2
    >>> sampled = Sampled(torch.tensor([1, 4, 5]), half, none, none)
    >>> positives = Positives(row=torch.tensor([0]), col=torch.tensor([2]))
    >>> sampled_completion({"structure": torch.zeros(1, 3)}, positives, sampled)  # log 5
    tensor(1.6094)
    """
    check_loss(loss)
    check_weights(loss, positives)
    check_heads(scores)
    row, col = positives.row, positives.col
    first = next(iter(scores.values()))
    for head, part in scores.items():
        if part.shape != (len(first), len(sampled.entity)):
            raise IMVIAError(
                f"sampled_completion: expected scores {(len(first), len(sampled.entity))}, one"
                f" column per candidate; received {tuple(part.shape)} for the head {head!r}."
            )
    shards = Shards(first.shape[1]) if shards is None else shards
    correction = (-sampled.log_q).expand(len(first), -1).clone()
    correction[row, col] = 0.0
    correction[sampled.row, sampled.col] = -torch.inf
    weight = correction.exp()
    drawn = _Drawn(correction, weight, shards.sum_(weight.sum(1)))
    function = _sampled_softmax if loss == "softmax" else _sampled_binary
    total = torch.zeros((), device=first.device)
    for part in scores.values():
        part = at_least_float32(part)
        total = total + function(part, positives, drawn, label_smoothing, shards)
    return total


class _Drawn(NamedTuple):
    """Numbers of entities that the candidates of each query stand for."""

    correction: Tensor  # (B, C): added to scores; minus infinity for candidates left out
    weight: Tensor  # (B, C): exp(correction), the number of entities
    of_all: Tensor  # (B,): the sum of the weights over all processes


def _sampled_softmax(
    scores: Tensor, positives: Positives, drawn: _Drawn, smoothing: float, shards: Shards
) -> Tensor:
    own = scores[positives.row, positives.col]
    rows = shards.logsumexp(scores + drawn.correction)
    mine = torch.zeros_like(rows).index_add(0, positives.row, (smoothing - 1) * own)
    if smoothing:
        mine = mine - smoothing * (scores * drawn.weight).sum(1) / drawn.of_all
    return weighted_mean(rows + shards.total(mine), positives.weight)


def _sampled_binary(
    scores: Tensor, positives: Positives, drawn: _Drawn, smoothing: float, shards: Shards
) -> Tensor:
    # As `binary_completion`, where N is the number of entities that the candidates stand for.
    of_all = drawn.of_all
    smooth = smoothing / float(of_all.sum() / len(of_all))
    own = scores[positives.row, positives.col]
    positive = functional.softplus(-own) + (smoothing - smooth) * own
    everything = ((functional.softplus(scores) - smooth * scores) * drawn.weight).sum()
    as_negatives = (functional.softplus(own) - smooth * own).sum()
    num_negative = (of_all.sum() - len(scores)).clamp(min=1)
    return shards.total(positive.sum() / len(scores) + (everything - as_negatives) / num_negative)
