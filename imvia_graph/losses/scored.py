"""L3 (Eq. 7): completion losses of the scores of all candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from imvia_graph import _gpu
from imvia_graph.errors import IMVIAError, SettingsError
from imvia_graph.losses._shared import at_least_float32


class Positives(NamedTuple):
    """Positions of the true triples in a (B, N) score matrix.

    Attributes
    ----------
    row, col : Tensor
        (P,) int64: the score at (row, col) is a positive. Pairs are distinct, and every row has at
        least one.
    weight : Tensor or None
        (B,) weights of the rows in the mean over rows; None for equal weights. Weighting each row
        by its number of positives gives the softmax loss of one row per positive, at the cost of a
        single row.
    counts : Tensor or None
        (P,) float32, for padding to a fixed P: rows ascend and the last pair is repeated, with 0
        for each repetition and 1 for all other pairs. Only `factored_completion` accepts it. None
        if all pairs are distinct.
    """

    row: Tensor
    col: Tensor
    weight: Tensor | None = None
    counts: Tensor | None = None


def binary_completion(scores: Tensor, positives: Positives, label_smoothing: float = 0.0) -> Tensor:
    r"""Compute binary cross-entropy; positives and negatives weigh equally (L3 of a head, Eq. 7).

    .. math::
        -\frac{1}{|T_+|} \sum_{T_+} \log \sigma(S) - \frac{1}{|T_-|} \sum_{T_-} \log \sigma(-S)

    Parameters
    ----------
    scores : Tensor
        (B, N) scores of N candidates for B queries; all that are not positive are negative.
    positives : Positives
    label_smoothing : float, optional
        :math:`\epsilon`: targets become :math:`(1 - \epsilon) y + \epsilon / N`. Default: ``0``.

    Returns
    -------
    Tensor
        A scalar.

    Raises
    ------
    SettingsError
        If rows are weighted: the loss is a mean over terms, not over rows.
    IMVIAError
        If shapes do not match. On a CPU also if positives are out of range.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Positives, binary_completion
    >>> positives = Positives(row=torch.tensor([0, 1]), col=torch.tensor([3, 0]))
    >>> binary_completion(torch.zeros(2, 4), positives)  # log 2 each for positives and negatives
    tensor(1.3863)
    """
    check_weights("binary", positives)
    _check_positives(scores, positives)
    scores = at_least_float32(scores)
    smooth = label_smoothing / scores.shape[1]
    positive = scores[positives.row, positives.col]
    # -y log s(S) - (1 - y) log s(-S) = softplus(S) - y S = softplus(-S) + (1 - y) S
    everything = functional.softplus(scores).sum() - smooth * scores.sum()
    as_negatives = (functional.softplus(positive) - smooth * positive).sum()
    num_negative = scores.numel() - len(positive)
    positive_loss = functional.softplus(-positive) + (label_smoothing - smooth) * positive
    return positive_loss.sum() / max(len(positive), 1) + (everything - as_negatives) / max(
        num_negative, 1
    )


def softmax_completion(
    scores: Tensor, positives: Positives, label_smoothing: float = 0.0
) -> Tensor:
    r"""Compute softmax cross-entropy over the candidates; a query's positives weigh equally.

    .. math::
        \frac{1}{B} \sum_i \left[ \log \sum_t \exp S_{it}
        - \frac{1 - \epsilon}{|T_i|} \sum_{t \in T_i} S_{it} - \frac{\epsilon}{N} \sum_t S_{it}
        \right]

    The parameters are those of `binary_completion`; ``positives.weight`` weights the mean over the
    queries i. This loss is not in the paper; it learns far faster.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Positives, softmax_completion
    >>> positives = Positives(row=torch.tensor([0, 1]), col=torch.tensor([3, 0]))
    >>> softmax_completion(torch.zeros(2, 4), positives)  # log 4
    tensor(1.3863)
    """
    _check_positives(scores, positives)
    scores = at_least_float32(scores)
    counts = torch.bincount(positives.row, minlength=len(scores)).to(scores.dtype)
    share = (1 - label_smoothing) / counts[positives.row]
    positive = share * scores[positives.row, positives.col]
    loss = scores.logsumexp(dim=1).index_add(0, positives.row, -positive)
    if label_smoothing:
        loss = loss - label_smoothing * scores.mean(dim=1)
    return weighted_mean(loss, positives.weight)


COMPLETIONS = {"softmax": softmax_completion, "binary": binary_completion}


def completion(
    scores: Mapping[str, Tensor],
    positives: Positives,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute L3: the sum over the heads of `softmax_completion` or `binary_completion` (Eq. 7).

    Parameters
    ----------
    scores : mapping of str to Tensor
        (B, N) scores for each head.
    positives : Positives
    loss : {"softmax", "binary"}, optional
        Default: ``"softmax"``.
    label_smoothing : float, optional
        Default: ``0``.

    Returns
    -------
    Tensor
        A scalar.

    Raises
    ------
    SettingsError
        If the loss is unknown, or if rows are weighted and the loss is a mean over terms.
    IMVIAError
        If there is no head or shapes do not match. On a CPU also if positives are out of range.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Positives, completion
    >>> scores = {"structure": torch.zeros(2, 4), "text": torch.zeros(2, 4)}
    >>> positives = Positives(row=torch.tensor([0, 1]), col=torch.tensor([3, 0]))
    >>> completion(scores, positives) / 2  # log 4 per head
    tensor(1.3863)
    """
    check_loss(loss)
    check_heads(scores)
    function = COMPLETIONS[loss]
    parts = [function(part, positives, label_smoothing) for part in scores.values()]
    return torch.stack(parts).sum()


def weighted_mean(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean over (B,) rows with (B,) weights, or with equal weights."""
    if weight is None:
        return rows.sum() / max(len(rows), 1)
    weight = weight.to(rows.dtype)
    return (rows * weight).sum() / weight.sum()


def check_weights(loss: str, positives: Positives) -> None:
    """Raise if rows are weighted and the loss is a mean over terms."""
    if loss != "softmax" and positives.weight is not None:
        raise SettingsError(
            f"completion: the loss {loss!r} does not support weights of queries; 'softmax' does."
            " Leave positives.weight out."
        )


def check_loss(loss: str) -> None:
    """Raise if the loss is unknown."""
    if loss not in COMPLETIONS:
        raise SettingsError(
            f"completion: unknown loss {loss!r}; expected one of {', '.join(COMPLETIONS)}."
        )


def check_heads(scores: Mapping[str, Tensor]) -> None:
    """Raise if there are no scores."""
    if not scores:
        raise IMVIAError("completion: expected the scores of at least one head; received none.")


def _check_positives(scores: Tensor, positives: Positives) -> None:
    """Raise if positives are outside the (B, N) scores; -1 would index the last candidate."""
    row, col = positives.row, positives.col
    if scores.dim() != 2 or row.dim() != 1 or row.shape != col.shape:
        raise IMVIAError(
            "completion: expected scores (B, N) and positives of one length, row (P,) and col (P,);"
            f" received {tuple(scores.shape)}, {tuple(row.shape)} and {tuple(col.shape)}."
        )
    for what, found, size in outside(positives, *scores.shape):
        raise IMVIAError(
            f"completion: expected {what} of positives from 0 to {size - 1}; received {found}."
        )


def outside(
    positives: Positives, num_rows: int, num_columns: int
) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, id, limit) of ids out of range; none on a GPU, where checking would wait."""
    kinds = (("rows", positives.row, num_rows), ("columns", positives.col, num_columns))
    for what, ids, number in kinds:
        found = _gpu.id_out_of_range(ids, number)
        if found is not None:
            yield what, found, number
