"""Relation prediction: which relation joins two entities."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from imvia_graph.losses._shared import at_least_float32


def relation_prediction(
    scores: Tensor, relation: Tensor, number: int | None = None, counts: Tensor | None = None
) -> Tensor:
    r"""Compute the softmax cross-entropy of the relation between the entities of true triples.

    .. math:: \frac{1}{P} \sum_i - \log \frac{\exp S(h_i, r_i, t_i)}{\sum_r \exp S(h_i, r, t_i)}

    `Chen, Minervini, Riedel and Stenetorp 2021 <https://arxiv.org/abs/2110.02834>`__ use it as an
    auxiliary loss of completion. It is not in the IMVIA paper.

    Parameters
    ----------
    scores : Tensor
        (P, R) scores of all relations for the two entities of each triple; see
        `IMVIA.relation_scores <imvia_graph.IMVIA.relation_scores>`.
    relation : Tensor
        (P,) int64 relation of each triple.
    number : int, optional
        Number of triples in the mean over all processes, if these triples belong to one process.
        Default: P.
    counts : Tensor, optional
        (P,) multiplicity of each triple in the mean; for a single process. Default: 1 for each.

    Returns
    -------
    Tensor
        A scalar, in float32 at least.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import relation_prediction
    >>> relation_prediction(torch.zeros(2, 4), torch.tensor([3, 0]))  # log 4
    tensor(1.3863)
    """
    losses = functional.cross_entropy(at_least_float32(scores), relation, reduction="none")
    if counts is not None:
        return losses @ counts.to(losses.dtype) / counts.sum()
    return losses.sum() / max(len(losses) if number is None else number, 1)
