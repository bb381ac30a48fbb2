"""The losses of IMVIA: mutual information (L1), alignment (L2), completion (L3), and their sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from imvia_graph.errors import SettingsError

#: exp of this is the largest inverse temperature, as in CLIP.
_LARGEST_LOG_SCALE = math.log(100.0)


# -- L1: mutual information -----------------------------------------------------------------------


class MutualInformation(nn.Module):
    r"""Sampled upper bound of the mutual information between modalities (L1, Eq. 4).

    The integral of Eq. 4 is bounded by `CLUB <https://arxiv.org/abs/2006.12013>`__ (the paper's
    [21]), in its sampled form: with a Gaussian estimator :math:`q_{mn}(y|x)` and a random
    permutation :math:`\pi` of the batch,

    .. math::
        L_1 = \sum_{m \neq n} \frac{1}{B} \sum_i
        \left[ \log q_{mn}(y_i | x_i) - \log q_{mn}(y_{\pi(i)} | x_i) \right],
        \qquad x = \hat e_m, \; y = \hat e_n

    The estimators learn by maximum likelihood (`estimation_loss`) on detached embeddings, with an
    optimizer of their own; `forward` then bounds with the estimators as they are.

    Parameters
    ----------
    modalities : sequence of str
        Names of the modalities.
    feats : int
        Width of their embeddings.
    hidden_feats : int, optional
        Hidden width of an estimator. Default: ``128``.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import MutualInformation
    >>> information = MutualInformation(["image", "text"], feats=8)
    >>> embeddings = {"image": torch.rand(5, 8), "text": torch.rand(5, 8)}
    >>> information.estimation_loss(embeddings).backward()  # trains the estimators
    >>> information(embeddings).shape  # L1, for the model
    torch.Size([])
    """

    def __init__(self, modalities: Sequence[str], feats: int, hidden_feats: int = 128) -> None:
        super().__init__()
        self.pairs = list(permutations(modalities, 2))
        self.estimators = nn.ModuleList(GaussianEstimator(feats, hidden_feats) for _ in self.pairs)

    def forward(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """L1 of a batch.

        Parameters
        ----------
        embeddings : mapping of str to Tensor
            (B, feats) a modality; row i is about the same entity in each.
        present : mapping of str to Tensor, optional
            (B,) bool a modality: whether the entity has a view of it. A pair of modalities is
            bounded over the rows that have both. Default: all rows.

        Returns
        -------
        Tensor
            A scalar; 0 where there is nothing to bound.
        """
        total = _zero(embeddings)
        for estimator, (x, y) in self._present_pairs(embeddings, present):
            shuffled = y[torch.randperm(len(y), device=y.device)]
            mean, log_variance = estimator(x)
            gain = log_likelihood(y, mean, log_variance)
            total = total + (gain - log_likelihood(shuffled, mean, log_variance)).mean()
        return total

    def estimation_loss(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Negative log-likelihood of the estimators on detached embeddings; arguments as above."""
        total = _zero(embeddings)
        for estimator, (x, y) in self._present_pairs(embeddings, present):
            total = total - log_likelihood(y.detach(), *estimator(x.detach())).mean()
        return total

    def _present_pairs(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None
    ) -> list[tuple[GaussianEstimator, tuple[Tensor, Tensor]]]:
        found = []
        for estimator, (m, n) in zip(self.estimators, self.pairs, strict=True):
            x, y = _present_rows(embeddings, present, m, n)
            if len(x):
                assert isinstance(estimator, GaussianEstimator)
                found.append((estimator, (x, y)))
        return found


class GaussianEstimator(nn.Module):
    """The estimator q(y|x): a diagonal Gaussian whose mean and log-variance are small networks."""

    def __init__(self, feats: int, hidden_feats: int) -> None:
        super().__init__()
        self.mean = _perceptron(feats, hidden_feats)
        # Tanh bounds the log-variance to (-1, 1), as CLUB's authors do for stability.
        self.log_variance = nn.Sequential(*_perceptron(feats, hidden_feats), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, feats) means and log-variances given (B, feats)."""
        return self.mean(x), self.log_variance(x)


def log_likelihood(y: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) log-density of a diagonal Gaussian, up to the constant that cancels in the bound."""
    return -0.5 * ((y - mean) ** 2 / log_variance.exp() + log_variance).sum(-1)


def _perceptron(feats: int, hidden_feats: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(feats, hidden_feats), nn.ReLU(), nn.Linear(hidden_feats, feats))


# -- L2: alignment --------------------------------------------------------------------------------


class Alignment(nn.Module):
    r"""Alignment of modalities with a learnable temperature (L2, Eq. 5).

    Parameters
    ----------
    form : {"contrastive", "printed"}, optional
        `contrastive_alignment` or `printed_alignment`. Default: ``"contrastive"``.
    temperature : float, optional
        The temperature to start from; it is learned as its logarithm. Default: ``0.1``.

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
        """
        function = ALIGNMENTS[self.form]
        total = _zero(embeddings)
        for m, n in combinations(embeddings, 2):
            rows = _present_mask(present, m, n)
            x, y = embeddings[m], embeddings[n]
            same = entity
            if rows is not None:
                x, y = x[rows], y[rows]
                same = None if entity is None else entity[rows]
            if len(x):
                # Both forms are symmetric: (m, n) and (n, m) of the sum are one term, twice.
                total = total + 2 * function(x, y, self.temperature, same)
        return total / max(len(embeddings), 1)


def contrastive_alignment(
    x: Tensor, y: Tensor, temperature: Tensor | float, entity: Tensor | None = None
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
    """
    similarity = functional.normalize(x, dim=-1) @ functional.normalize(y, dim=-1).T / temperature
    similarity = _without_twins(similarity, entity)
    target = torch.arange(len(x), device=x.device)
    forward = functional.cross_entropy(similarity, target)
    backward = functional.cross_entropy(similarity.T, target)
    return forward + backward


def printed_alignment(
    x: Tensor, y: Tensor, temperature: Tensor | float, entity: Tensor | None = None
) -> Tensor:
    r"""Eq. 5 as printed: cross-entropy between the two directions' distributions, both ways.

    .. math::
        P_{ij} = \frac{\exp(x_i \cdot y_j / \tau)}{\sum_k \exp(x_i \cdot y_k / \tau)}, \quad
        Q_{ij} = \frac{\exp(y_i \cdot x_j / \tau)}{\sum_k \exp(y_i \cdot x_k / \tau)}, \quad
        \frac{1}{B} \sum_i [C(P_i, Q_i) + C(Q_i, P_i)], \quad C(p, q) = -\sum_j p_j \log q_j

    Parameters are those of `contrastive_alignment`; rows keep their length.
    """
    similarity = _without_twins(x @ y.T / temperature, entity)
    log_p = similarity.log_softmax(dim=1)
    log_q = similarity.T.log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    # A twin has probability 0 and logarithm -inf; 0 log 0 is 0.
    log_p, log_q = (part.masked_fill(part == -torch.inf, 0.0) for part in (log_p, log_q))
    return -(p * log_q + q * log_p).sum(dim=1).mean()


ALIGNMENTS = {"contrastive": contrastive_alignment, "printed": printed_alignment}


def _without_twins(similarity: Tensor, entity: Tensor | None) -> Tensor:
    if entity is None:
        return similarity
    twins = entity[:, None] == entity
    twins.fill_diagonal_(False)
    return similarity.masked_fill(twins, -torch.inf)


# -- L3: completion -------------------------------------------------------------------------------


class Positives(NamedTuple):
    """Which of a batch's (B, N) scores belong to true triples.

    Attributes
    ----------
    row, col : Tensor
        (P,) int64: score (row, col) is a positive; pairs are distinct, every row has at least one.
    """

    row: Tensor
    col: Tensor


def binary_completion(scores: Tensor, positives: Positives, label_smoothing: float = 0.0) -> Tensor:
    r"""Binary cross-entropy with positives and negatives in equal shares (L3 of a head, Eq. 7).

    .. math::
        -\frac{1}{|T_+|} \sum_{T_+} \log \sigma(S) - \frac{1}{|T_-|} \sum_{T_-} \log \sigma(-S)

    Parameters
    ----------
    scores : Tensor
        (B, N) of B queries and N candidates; whatever is not positive is negative.
    positives : Positives
    label_smoothing : float, optional
        :math:`\epsilon`: targets become :math:`(1 - \epsilon) y + \epsilon / N`. Default: ``0``.

    Returns
    -------
    Tensor
        A scalar.
    """
    scores = _at_least_float32(scores)
    smooth = label_smoothing / scores.shape[1]
    positive = scores[positives.row, positives.col]
    # -y log s(S) - (1 - y) log s(-S) = softplus(S) - y S = softplus(-S) + (1 - y) S
    everything = functional.softplus(scores).sum() - smooth * scores.sum()
    as_negatives = (functional.softplus(positive) - smooth * positive).sum()
    num_negative = scores.numel() - len(positive)
    positive_loss = functional.softplus(-positive) + (label_smoothing - smooth) * positive
    return positive_loss.mean() + (everything - as_negatives) / max(num_negative, 1)


def softmax_completion(
    scores: Tensor, positives: Positives, label_smoothing: float = 0.0
) -> Tensor:
    r"""Softmax cross-entropy over the candidates, with equal shares for a query's positives.

    .. math::
        \frac{1}{B} \sum_i \left[ \log \sum_t \exp S_{it}
        - \frac{1 - \epsilon}{|T_i|} \sum_{t \in T_i} S_{it} - \frac{\epsilon}{N} \sum_t S_{it}
        \right]

    Parameters are those of `binary_completion`. Not in the paper; it learns far faster.
    """
    scores = _at_least_float32(scores)
    counts = torch.bincount(positives.row, minlength=len(scores))
    positive = scores[positives.row, positives.col] / counts[positives.row]
    loss = scores.logsumexp(dim=1).sum() - (1 - label_smoothing) * positive.sum()
    if label_smoothing:
        loss = loss - label_smoothing * scores.mean(dim=1).sum()
    return loss / len(scores)


COMPLETIONS = {"softmax": softmax_completion, "binary": binary_completion}


def completion(
    scores: Mapping[str, Tensor],
    positives: Positives,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
) -> Tensor:
    """L3: the sum over the heads of `softmax_completion` or (Eq. 7) `binary_completion`.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Positives, completion
    >>> scores = {"structure": torch.zeros(2, 4), "text": torch.zeros(2, 4)}
    >>> positives = Positives(row=torch.tensor([0, 1]), col=torch.tensor([3, 0]))
    >>> completion(scores, positives) / 2  # log 4 a head
    tensor(1.3863)
    """
    if loss not in COMPLETIONS:
        raise SettingsError(
            f"completion: unknown loss {loss!r}; expected one of {', '.join(COMPLETIONS)}."
        )
    function = COMPLETIONS[loss]
    parts = [function(part, positives, label_smoothing) for part in scores.values()]
    return torch.stack(parts).sum()


# -- Eq. 8 ----------------------------------------------------------------------------------------


def total_loss(
    information: Tensor,
    alignment: Tensor,
    completion: Tensor,
    lambda_information: float = 1.0,
    lambda_alignment: float = 1.0,
    lambda_completion: float = 1.0,
) -> Tensor:
    r"""Eq. 8: :math:`\lambda_0 L_1 + \lambda_1 L_2 + \lambda_2 L_3`."""
    return (
        lambda_information * information
        + lambda_alignment * alignment
        + lambda_completion * completion
    )


# -- shared ---------------------------------------------------------------------------------------


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _zero(embeddings: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(embeddings.values()), torch.zeros(()))
    return first.new_zeros(())


def _present_mask(present: Mapping[str, Tensor] | None, m: str, n: str) -> Tensor | None:
    """(B,) bool of the rows that have both modalities; None for all."""
    if present is None:
        return None
    masks = [present[name] for name in (m, n) if name in present]
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]


def _present_rows(
    embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None, m: str, n: str
) -> tuple[Tensor, Tensor]:
    rows = _present_mask(present, m, n)
    x, y = embeddings[m], embeddings[n]
    return (x, y) if rows is None else (x[rows], y[rows])
