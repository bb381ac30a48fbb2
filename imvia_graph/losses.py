"""The losses of IMVIA: mutual information (L1), alignment (L2), completion (L3), and their sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from imvia_graph import _gpu
from imvia_graph._factored import FactoredCompletion, Terms
from imvia_graph._gpu import powers
from imvia_graph._gradients import with_gradients
from imvia_graph.distributed import Shards
from imvia_graph.errors import IMVIAError, SettingsError

#: exp of this is the largest inverse temperature, as in CLIP.
_LARGEST_LOG_SCALE = math.log(100.0)

#: Rows shorter than this are divided by it, not by their length, as `functional.normalize` does.
_SHORTEST = 1e-12


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
    optimizer of their own. `forward` bounds with the estimators as they are and gives them no
    gradient: trained to make L1 small, they would no longer estimate, and it would bound nothing.

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
        self.modalities = list(modalities)
        self.pairs = list(permutations(modalities, 2))
        #: One a pair, in the order of ``pairs``: all of the first modality, all of the second, …
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
        return self._both(embeddings, present, frozen=True)[0]

    def estimation_loss(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Negative log-likelihood of the estimators on detached embeddings; arguments as above."""
        detached = {name: embedding.detach() for name, embedding in embeddings.items()}
        return self.both(detached, present)[1]

    def both(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """L1 and the estimation loss from one pass through the estimators; arguments as above.

        Here the second is not detached from what the estimators see: who trains asks for the
        gradients of the model from the first and for the estimators' from the second.
        """
        return self._both(embeddings, present, frozen=False)

    def _both(
        self,
        embeddings: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None,
        frozen: bool,
    ) -> tuple[Tensor, Tensor]:
        if not self.pairs:
            return _zero(embeddings), _zero(embeddings)
        embeddings = _without_absent(embeddings, present)
        mean, log_variance = self._moments(embeddings, frozen)
        # All pairs at once: (P, B, d).
        y = torch.stack([embeddings[n] for _, n in self.pairs])
        rows = _present_in_both(embeddings, present, self.pairs)
        share = rows.to(y.dtype) / rows.sum(1, keepdim=True).clamp(min=1)
        shuffled = y.gather(1, _shuffle(rows)[..., None].expand_as(y))
        precision = (-log_variance).exp()
        # log q(y|x) - log q(y'|x): the squares of the means and the log-variances cancel.
        gain = -0.5 * ((y - shuffled) * (y + shuffled - 2 * mean) * precision).sum(-1)
        surprise = 0.5 * ((y.detach() - mean) ** 2 * precision + log_variance).sum(-1)
        return (gain * share).sum(), (surprise * share).sum()

    def _moments(self, embeddings: Mapping[str, Tensor], frozen: bool) -> tuple[Tensor, Tensor]:
        """(P, B, d) means and log-variances, those of one modality's estimators in two products.

        What calling each estimator gives, in a fraction of the kernels that a GPU has to start;
        under autocast the second bias is added in the embeddings' dtype.
        """

        def of(parameter: Tensor) -> Tensor:
            return parameter.detach() if frozen else parameter

        means, log_variances = [], []
        estimators: list[Any] = list(self.estimators)
        others = len(self.modalities) - 1
        for first, name in enumerate(self.modalities):
            x, mine = embeddings[name], estimators[first * others : (first + 1) * others]
            networks = [part.mean for part in mine] + [part.log_variance for part in mine]
            weight = torch.cat([of(network[0].weight) for network in networks])
            bias = torch.cat([of(network[0].bias) for network in networks])
            hidden = functional.linear(x, weight, bias).relu()
            hidden = hidden.unflatten(1, (len(networks), -1)).transpose(0, 1)
            out = hidden @ torch.stack([of(network[2].weight).T for network in networks])
            bias = torch.stack([of(network[2].bias) for network in networks])
            mean, log_variance = (out.to(x.dtype) + bias[:, None]).split(others)
            means.append(mean)
            log_variances.append(log_variance.tanh())
        return torch.cat(means), torch.cat(log_variances)


def _shuffle(rows: Tensor) -> Tensor:
    """(P, B) int64: a random permutation of the rows that are True; others go anywhere.

    Without asking how many they are, which a GPU would have to be waited for.
    """
    drawn = torch.rand(rows.shape, device=rows.device)
    order = torch.argsort(torch.where(rows, drawn, 2.0), dim=1)
    return order.gather(1, (rows.cumsum(1) - 1).clamp(min=0))


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
        """
        # Both forms are symmetric: (m, n) and (n, m) of the sum are one term, twice.
        pairs = list(combinations(embeddings, 2))
        if not pairs:
            return _zero(embeddings)
        rows = None if present is None else _present_in_both(embeddings, present, pairs)
        embeddings = _without_absent(embeddings, present)
        parts = list(embeddings.values())
        if self.form == "contrastive":
            contrast: Tensor = _Contrast.apply(self.temperature, entity, rows, *parts)
            return contrast
        return _added_up(parts, self.temperature, entity, rows, printed_alignment)


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


# -- L3: completion -------------------------------------------------------------------------------


class Positives(NamedTuple):
    """Which of a batch's (B, N) scores belong to true triples.

    Attributes
    ----------
    row, col : Tensor
        (P,) int64: score (row, col) is a positive; pairs are distinct, every row has at least one.
    weight : Tensor or None
        (B,) weights of the rows in the mean over them; None for equal ones. With the number of a
        row's positives the softmax loss is that of rows of one positive each, at the cost of one.
    counts : Tensor or None
        (P,) float32, where rows ascend and the last pair is repeated so that P is a given number: 0
        for a repetition, else 1. Only `factored_completion` takes it. None where all are distinct.
    """

    row: Tensor
    col: Tensor
    weight: Tensor | None = None
    counts: Tensor | None = None


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

    Raises
    ------
    SettingsError
        Rows that are weighted: it is a mean over terms, not over rows.
    """
    _check_weights("binary", positives)
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
    r"""Softmax cross-entropy over the candidates, with equal shares for a query's positives.

    .. math::
        \frac{1}{B} \sum_i \left[ \log \sum_t \exp S_{it}
        - \frac{1 - \epsilon}{|T_i|} \sum_{t \in T_i} S_{it} - \frac{\epsilon}{N} \sum_t S_{it}
        \right]

    Parameters are those of `binary_completion`; the mean over the queries i is weighted where
    ``positives`` say so. Not in the paper; it learns far faster.
    """
    scores = at_least_float32(scores)
    counts = torch.bincount(positives.row, minlength=len(scores)).to(scores.dtype)
    share = (1 - label_smoothing) / counts[positives.row]
    positive = share * scores[positives.row, positives.col]
    loss = scores.logsumexp(dim=1).index_add(0, positives.row, -positive)
    if label_smoothing:
        loss = loss - label_smoothing * scores.mean(dim=1)
    return _weighted_mean(loss, positives.weight)


COMPLETIONS = {"softmax": softmax_completion, "binary": binary_completion}


def completion(
    scores: Mapping[str, Tensor],
    positives: Positives,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
) -> Tensor:
    """L3: the sum over the heads of `softmax_completion` or (Eq. 7) `binary_completion`.

    Parameters
    ----------
    scores : mapping of str to Tensor
        (B, N) a head.
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
        An unknown loss, or rows that are weighted where the loss is a mean over terms.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Positives, completion
    >>> scores = {"structure": torch.zeros(2, 4), "text": torch.zeros(2, 4)}
    >>> positives = Positives(row=torch.tensor([0, 1]), col=torch.tensor([3, 0]))
    >>> completion(scores, positives) / 2  # log 4 a head
    tensor(1.3863)
    """
    _check_loss(loss)
    function = COMPLETIONS[loss]
    parts = [function(part, positives, label_smoothing) for part in scores.values()]
    return torch.stack(parts).sum()


def factored_completion(
    queries: Sequence[Tensor],
    candidates: Sequence[Tensor],
    positives: Positives,
    weights: Tensor | None = None,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    detached: bool = False,
    parts: int = 1,
    shards: Shards | None = None,
    among: tuple[int, int] | None = None,
) -> Tensor:
    r"""L3 of heads whose scores are inner products, and of their decision.

    The value and the gradients of `completion` of the scores :math:`S_m = Q_m C_m^\top` and
    :math:`\sum_m w_m S_m`, at a fraction of its time and memory: the gradients are made along with
    the loss, and the scores turn into theirs in place.

    Parameters
    ----------
    queries, candidates : sequence of Tensor
        (B, d) and (N, d) of each of the M heads.
    positives : Positives
    weights : Tensor, optional
        (B, M): those of the decision. Default: there is no decision.
    loss : {"softmax", "binary"}, optional
    label_smoothing : float, optional
    detached : bool, optional
        Whether the heads learn nothing from the decision.
    parts : int, optional
        Of the queries whose scores would be held at a time, only one in so many are.
    shards : Shards, optional
        With several processes: ``candidates`` are those of this process, ``positives.col`` is
        counted over all of them; the loss is that of all, its gradients are this process's terms of
        sums over the processes. Default: this process has all.
    among : tuple of int, optional
        Numbers of positives and of queries of a larger batch that these queries are a part of: the
        binary loss is their part of the means over its terms. Default: these are all.

    Returns
    -------
    Tensor
        A scalar. Where autocast is on, products are in its dtype.

    Raises
    ------
    SettingsError
        An unknown loss, or rows that are weighted where the loss is a mean over terms.
    IMVIAError
        Shapes that do not fit; on a CPU also positives outside the scores. On a GPU, which would
        have to be waited for, these are not looked at. Also where gradients of gradients are
        asked for, which `completion` has.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Positives, factored_completion
    >>> queries, candidates = [torch.zeros(2, 8)], [torch.rand(4, 8)]
    >>> positives = Positives(row=torch.tensor([0, 1]), col=torch.tensor([3, 0]))
    >>> factored_completion(queries, candidates, positives)  # log 4
    tensor(1.3863)
    """
    _check_loss(loss)
    _check_weights(loss, positives)
    if shards is not None and shards.alone:
        shards = None
    _check_factored(queries, candidates, positives, weights, shards)
    tensors = [*queries, *candidates]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    row, col, _, counts = positives
    num_positives: int | Tensor = len(row)
    if counts is None:
        order = torch.argsort(row, stable=True)
        row, col = row[order], col[order]
    else:
        num_positives = counts.sum()
    num_queries, num_candidates = len(queries[0]), len(candidates[0])
    in_all = num_queries
    if among is not None:
        num_positives, in_all = among
    exact = torch.promote_types(dtype, torch.float32)
    # Not by bincount, which a GPU has to be waited for.
    ones = torch.ones_like(row, dtype=exact) if counts is None else counts.to(exact)
    of_each = torch.zeros(num_queries, dtype=exact, device=row.device).index_add_(0, row, ones)
    share = of_each.reciprocal()[row]
    if shards is not None:
        num_candidates = shards.num_entities
        mine = shards.owned(col)
        row, col, share = row[mine], col[mine] - shards.start, share[mine]
        counts = None if counts is None else counts[mine]
    terms = Terms(
        loss=loss,
        label_smoothing=label_smoothing,
        detached=detached,
        dtype=dtype,
        num_queries=num_queries,
        num_candidates=num_candidates,
        num_positives=num_positives,
        num_in_all=in_all,
        parts=parts,
        shards=shards,
    )
    # The mean over the rows, each times its weight over the mean weight.
    of_rows = positives.weight
    if of_rows is not None:
        of_rows = of_rows.to(terms.exact) / of_rows.to(terms.exact).mean()
    total: Tensor = FactoredCompletion.apply(
        row, col, share, counts, of_rows, weights, terms, *tensors
    )
    return total


def _check_factored(
    queries: Sequence[Tensor],
    candidates: Sequence[Tensor],
    positives: Positives,
    weights: Tensor | None,
    shards: Shards | None,
) -> None:
    """Refuse what does not fit: compiled loops would read, and write, what is not theirs."""

    def refuse(expected: str, received: str) -> IMVIAError:
        return IMVIAError(f"factored_completion: expected {expected}; received {received}.")

    shapes = [[tuple(part.shape) for part in parts] for parts in (queries, candidates)]
    if not len(queries) == len(candidates) > 0:
        number = f"{len(queries)} and {len(candidates)} of them"
        raise refuse("as many queries as candidates, a pair a head", number)
    fits = all(len(shape) == 2 for shape in (*shapes[0], *shapes[1])) and all(
        query == (shapes[0][0][0], candidate[1]) and candidate[0] == shapes[1][0][0]
        for query, candidate in zip(*shapes, strict=True)
    )
    if not fits:
        raise refuse(
            "queries (B, d) and candidates (N, d), d the same in a pair",
            f"{shapes[0][:4]} and {shapes[1][:4]}",
        )
    num_queries, num_candidates = len(queries[0]), len(candidates[0])
    if weights is not None and weights.shape != (num_queries, len(queries)):
        raise refuse(f"weights {(num_queries, len(queries))}", str(tuple(weights.shape)))
    row, col, of_rows, counts = positives
    if of_rows is not None and of_rows.shape != (num_queries,):
        raise refuse(f"a weight for each of {num_queries} rows", str(tuple(of_rows.shape)))
    lengths = {tuple(part.shape) for part in (row, col, counts) if part is not None}
    if row.dim() != 1 or len(lengths) > 1:
        raise refuse("positives of one length (P,)", f"{tuple(row.shape)}, {tuple(col.shape)}")
    if _gpu.is_waited_for(row.device) or not len(row):
        return
    num_all = num_candidates if shards is None else shards.num_entities
    for what, part, size in (("rows", row, num_queries), ("columns", col, num_all)):
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= size:
            raise refuse(f"{what} of positives from 0 to {size - 1}", str(low if low < 0 else high))


class Sampled(NamedTuple):
    """Candidates that the queries of a batch share, and how likely each was to be among them.

    Attributes
    ----------
    entity : Tensor
        (C,) int64, distinct, ascending.
    log_q : Tensor
        (C,) float32: logarithm of the probability of being among the candidates.
    row, col : Tensor
        (K,) int64: query ``row`` has candidate ``col`` for a known answer that is not the one asked
        for; the pair is left out of its loss.
    """

    entity: Tensor
    log_q: Tensor
    row: Tensor
    col: Tensor

    def of_process(self, shards: Shards) -> tuple[Sampled, int]:
        """Those that are a process's own, and the place of the first of them."""
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
    r"""L3 over candidates that were drawn: an estimate of `completion` over all entities.

    A candidate j that is among the drawn with probability :math:`q_j` stands for :math:`1 / q_j`
    entities (Horvitz and Thompson 1952), a query's own answer, which always is, for itself. The sum
    over all entities in the softmax becomes

    .. math::
        \sum_t \exp S_{it} \approx \exp S_{i y_i} + \sum_{j \neq y_i} \exp(S_{ij} - \log q_j)

    which is the logQ correction of sampled softmax (`Yi et al. 2019
    <https://doi.org/10.1145/3298689.3346996>`__). Means over all entities, those of label smoothing
    and of the binary loss, are means with the same weights. Known answers of a query other than the
    asked one are left out.

    Parameters
    ----------
    scores : mapping of str to Tensor
        (B, C) a head.
    positives : Positives
        One a query; ``col`` counts candidates.
    sampled : Sampled
    loss : {"softmax", "binary"}, optional
    label_smoothing : float, optional
    shards : Shards, optional
        With several processes: scores, positives and candidates are this process's; the loss is
        that of all.

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
    _check_loss(loss)
    _check_weights(loss, positives)
    row, col = positives.row, positives.col
    first = next(iter(scores.values()))
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
    """What candidates of a query stand for."""

    correction: Tensor  # (B, C): added to scores; minus infinity where one is left out
    weight: Tensor  # (B, C): its exponential, a number of entities
    of_all: Tensor  # (B,): the sum of the weights over all processes


def _sampled_softmax(
    scores: Tensor, positives: Positives, drawn: _Drawn, smoothing: float, shards: Shards
) -> Tensor:
    own = scores[positives.row, positives.col]
    rows = shards.logsumexp(scores + drawn.correction)
    mine = torch.zeros_like(rows).index_add(0, positives.row, (smoothing - 1) * own)
    if smoothing:
        mine = mine - smoothing * (scores * drawn.weight).sum(1) / drawn.of_all
    return _weighted_mean(rows + shards.total(mine), positives.weight)


def _sampled_binary(
    scores: Tensor, positives: Positives, drawn: _Drawn, smoothing: float, shards: Shards
) -> Tensor:
    # As `binary_completion`, whose N entities are those that the candidates stand for.
    of_all = drawn.of_all
    smooth = smoothing / float(of_all.sum() / len(of_all))
    own = scores[positives.row, positives.col]
    positive = functional.softplus(-own) + (smoothing - smooth) * own
    everything = ((functional.softplus(scores) - smooth * scores) * drawn.weight).sum()
    as_negatives = (functional.softplus(own) - smooth * own).sum()
    num_negative = (of_all.sum() - len(scores)).clamp(min=1)
    return shards.total(positive.sum() / len(scores) + (everything - as_negatives) / num_negative)


def _weighted_mean(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over (B,) rows with (B,) weights, or equal ones."""
    if weight is None:
        return rows.sum() / max(len(rows), 1)
    weight = weight.to(rows.dtype)
    return (rows * weight).sum() / weight.sum()


def _check_weights(loss: str, positives: Positives) -> None:
    if loss != "softmax" and positives.weight is not None:
        raise SettingsError(
            f"completion: the loss {loss!r} has no weights of queries; 'softmax' has. Leave"
            " positives.weight out."
        )


def _check_loss(loss: str) -> None:
    if loss not in COMPLETIONS:
        raise SettingsError(
            f"completion: unknown loss {loss!r}; expected one of {', '.join(COMPLETIONS)}."
        )


# -- regularisation -------------------------------------------------------------------------------


def dura(
    head: Tensor | Sequence[Tensor],
    query: Tensor | Sequence[Tensor],
    answer: Tensor | Sequence[Tensor],
    weight: Tensor | None = None,
    num_answers: int | None = None,
    shards: Shards | None = None,
    times: Tensor | None = None,
) -> Tensor:
    r"""DURA: the squares of what is multiplied in the scores of true triples.

    .. math:: \frac{1}{B} \sum_i \left( \|h_i\|^2 + \|q_i\|^2 + \|t_i\|^2 \right), \qquad
        q = \mathcal W \times_1 h \times_2 r

    `Zhang, Cai and Wang 2020 <https://arxiv.org/abs/2011.05816>`__, whose other half, the tail
    under the transposed relation, is here the query of the inverse relation. Not in the IMVIA
    paper; a Tucker model learns more with it than with dropout.

    Parameters
    ----------
    head, query : Tensor or sequence of Tensor
        (B, d): entities of the queries, and their query vectors; or those of several heads, which
        are added up.
    answer : Tensor or sequence of Tensor
        (P, d): the true answers; the mean is over those.
    weight : Tensor, optional
        (B,) weights of the queries in their mean. Default: equal ones.
    num_answers : int, optional
        P, where ``answer`` is a process's own.
    shards : Shards, optional
        With several processes: ``head``, ``query`` and ``answer`` are this process's, ``weight``
        that of all queries; the value is that of all.
    times : Tensor, optional
        (P,) how often each row of ``answer`` counts in the mean, of one process. Default: once.

    Returns
    -------
    Tensor
        A scalar, in float32 at least.

    Raises
    ------
    IMVIAError
        Different numbers of heads in the three.
    SettingsError
        Several processes and no ``weight``.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import dura
    >>> dura(torch.ones(2, 3), torch.zeros(2, 3), torch.full((4, 3), 2.0))
    tensor(15.)
    """
    heads, queries, answers = (
        [given] if isinstance(given, Tensor) else list(given) for given in (head, query, answer)
    )
    numbers = [len(heads), len(queries), len(answers)]
    if len(set(numbers)) != 1 or not heads:
        raise IMVIAError(
            "dura: expected head, query and answer of as many heads; received"
            f" {numbers[0]}, {numbers[1]} and {numbers[2]}."
        )
    shares = _shares("dura", heads[0], answers[0], weight, num_answers, shards, times)
    total: Tensor = _Squares.apply(*shares, *heads, *queries, *answers)
    return total if shards is None else shards.total(total)


def n3(
    head: Tensor,
    relation: Tensor,
    answer: Tensor,
    weight: Tensor | None = None,
    num_answers: int | None = None,
    shards: Shards | None = None,
    times: Tensor | None = None,
) -> Tensor:
    r"""N3: the cubes of the moduli of what ComplEx multiplies in the scores of true triples.

    .. math:: \frac{1}{B} \sum_i \left( \|h_i\|_3^3 + \|r_i\|_3^3 + \|t_i\|_3^3 \right)

    `Lacroix, Usunier and Obozinski 2018 <https://arxiv.org/abs/1806.07297>`__. Not in the IMVIA
    paper.

    Parameters
    ----------
    head, relation : Tensor
        (B, d): entities and relations of the queries. Numbers are as those of
        `complex_product <imvia_graph.nn.tucker_decoder.complex_product>`: real parts, then
        imaginary ones, and of an odd d a last one that is real.
    answer, weight, num_answers, shards, times
        As for `dura`.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import n3
    >>> one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> n3(one, two, torch.tensor([[3.0, 4.0]]))  # 1 + 8 + 125
    tensor(134.)
    """
    shares = _shares("n3", head, answer, weight, num_answers, shards, times)
    total: Tensor = _Cubes.apply(*shares, head, relation, answer)
    return total if shards is None else shards.total(total)


def _shares(
    name: str,
    head: Tensor,
    answer: Tensor,
    weight: Tensor | None,
    num_answers: int | None,
    shards: Shards | None,
    times: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(B,) and (P,) shares of the queries and of the answers in the means of `dura` and `n3`."""
    alone = shards is None or shards.alone
    dtype = torch.promote_types(head.dtype, torch.float32)
    if weight is None:
        if not alone:
            raise SettingsError(
                f"{name}: with several processes, expected the weights of all queries."
            )
        weight = head.new_ones(len(head))
    weight = weight.to(dtype)
    share = weight / weight.sum()
    if shards is not None and not alone:
        share = share[shards.part(len(weight))]
    if times is not None:
        return share, times.to(dtype) / times.sum()
    number = len(answer) if num_answers is None else num_answers
    return share, weight.new_full((len(answer),), 1 / max(number, 1))


class _Squares(torch.autograd.Function):
    """Squares of rows, weighted and added up, in two passes over them.

    The rows are M (B, d), M (B, d), whose weights are (B,), and M (P, d) with weights (P,).
    Weights have no gradient.
    """

    @staticmethod
    def plain(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """In torch's operations, and with their gradients."""
        total = torch.zeros_like(weights[0].sum())
        for part, weight in zip(parts, weights, strict=True):
            total = total + (at_least_float32(part).square().sum(1) * weight).sum()
        return total

    @staticmethod
    def forward(ctx: Any, share: Tensor, of_answers: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(share, of_answers, *parts)
        weights = _weights(share, of_answers, parts)
        if powers.usable(parts, weights):
            return powers.total(2, parts, weights)
        count = len(parts) // 3
        with torch.autocast(share.device.type, enabled=False):
            sizes = []
            for part in parts:
                exact = at_least_float32(part)
                sizes.append(torch.linalg.vecdot(exact, exact).to(share.dtype))
            of_queries = torch.stack(sizes[: 2 * count]).sum(0) @ share
            return of_queries + torch.stack(sizes[2 * count :]).sum(0) @ of_answers

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, of_answers, *parts = ctx.saved_tensors
        weights = _weights(share, of_answers, parts)
        if torch.is_grad_enabled():
            given = grad, parts, ctx.needs_input_grad[2:]
            return None, None, *with_gradients(lambda *x: _Squares.plain(weights, x), *given)
        if powers.usable(parts, weights):
            return None, None, *powers.gradients(2, grad, parts, weights)
        count = len(parts) // 3
        slopes = [(2 * grad * weight)[:, None] for weight in (share, of_answers)]
        return (
            None,
            None,
            *(
                (part * slopes[place >= 2 * count]).to(part.dtype)
                for place, part in enumerate(parts)
            ),
        )


class _Cubes(torch.autograd.Function):
    """Cubes of the moduli of the numbers of rows, weighted and added up.

    The rows are (B, d) and (B, d), whose weights are (B,), and (P, d) with weights (P,). Weights
    have no gradient. That of :math:`|z|^3` is :math:`3 |z| z`, also where the modulus, a root, has
    none.
    """

    @staticmethod
    def plain(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """In torch's operations, and with their gradients."""
        total = torch.zeros_like(weights[0].sum())
        for part, weight in zip(parts, weights, strict=True):
            squares = _squared_moduli(at_least_float32(part))
            # The root of zero has no gradient; that of its cube is zero.
            moduli = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
            total = total + ((squares * moduli).sum(1) * weight).sum()
        return total

    @staticmethod
    def forward(ctx: Any, share: Tensor, of_answers: Tensor, *parts: Tensor) -> Tensor:
        weights = _weights(share, of_answers, parts)
        if powers.usable(parts, weights):
            ctx.save_for_backward(share, of_answers, *parts)
            return powers.total(3, parts, weights)
        total = share.new_zeros(())
        every = []
        with torch.autocast(share.device.type, enabled=False):
            for part, weight in zip(parts, weights, strict=True):
                squares, moduli = _moduli(at_least_float32(part))
                total = total + torch.linalg.vecdot(squares, moduli).to(share.dtype) @ weight
                every.append(moduli)
        ctx.save_for_backward(share, of_answers, *parts, *every)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        share, of_answers, *rest = ctx.saved_tensors
        parts, every = rest[:3], rest[3:]
        weights = _weights(share, of_answers, parts)
        if torch.is_grad_enabled():
            given = grad, parts, ctx.needs_input_grad[2:]
            return None, None, *with_gradients(lambda *x: _Cubes.plain(weights, x), *given)
        if not every:
            return None, None, *powers.gradients(3, grad, parts, weights)
        gradients = []
        for part, weight, moduli in zip(parts, weights, every, strict=True):
            slope = moduli * (3 * grad * weight)[:, None]
            half = part.shape[1] // 2
            slopes = slope[:, :half], slope[:, :half], slope[:, half:]
            out = torch.empty_like(part)
            for place, numbers, scale in zip(_split(out), _split(part), slopes, strict=True):
                torch.mul(numbers, scale, out=place)
            gradients.append(out)
        return None, None, *gradients


def _moduli(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d - d // 2) squares of the moduli of (n, d) numbers, and the moduli."""
    squares = _squared_moduli(numbers)
    return squares, squares.sqrt()


def _squared_moduli(numbers: Tensor) -> Tensor:
    real, imaginary, rest = _split(numbers)
    squares = torch.addcmul(real.square(), imaginary, imaginary)
    return torch.cat([squares, rest.square()], dim=1) if rest.shape[1] else squares


def _split(numbers: Tensor) -> tuple[Tensor, ...]:
    """Real parts of (n, d) numbers, imaginary ones, and of an odd d the last, which is real."""
    half = numbers.shape[1] // 2
    return numbers.split([half, half, numbers.shape[1] % 2], dim=1)


def _weights(share: Tensor, of_answers: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """The weights of each part: two thirds are of queries, the rest of answers."""
    count = len(parts) // 3
    return [share] * (2 * count) + [of_answers] * count


# -- relation prediction ---------------------------------------------------------------------------


def relation_prediction(
    scores: Tensor, relation: Tensor, number: int | None = None, counts: Tensor | None = None
) -> Tensor:
    r"""Softmax cross-entropy of the relations that join the entities of true triples.

    .. math:: \frac{1}{P} \sum_i - \log \frac{\exp S(h_i, r_i, t_i)}{\sum_r \exp S(h_i, r, t_i)}

    `Chen, Minervini, Riedel and Stenetorp 2021 <https://arxiv.org/abs/2110.02834>`__ train it
    beside completion, whose candidates are entities. Not in the IMVIA paper.

    Parameters
    ----------
    scores : Tensor
        (P, R): of all relations, for the two entities of each triple; see
        `IMVIA.relation_scores <imvia_graph.IMVIA.relation_scores>`.
    relation : Tensor
        (P,) int64.
    number : int, optional
        The number of triples that the mean is over, where these are a process's own. Default: P.
    counts : Tensor, optional
        (P,) how often each triple counts in the mean, of one process. Default: once.

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


# -- Eq. 8 ----------------------------------------------------------------------------------------


def total_loss(
    information: Tensor,
    alignment: Tensor,
    completion: Tensor,
    lambda_information: float = 1.0,
    lambda_alignment: float = 1.0,
    lambda_completion: float = 1.0,
) -> Tensor:
    r"""Eq. 8: :math:`\lambda_0 L_1 + \lambda_1 L_2 + \lambda_2 L_3`.

    Parameters
    ----------
    information, alignment, completion : Tensor
        L1, L2 and L3, scalars.
    lambda_information, lambda_alignment, lambda_completion : float, optional
        Their weights. Default: ``1``, as in the paper; those of `Settings` differ.
    """
    return (
        lambda_information * information
        + lambda_alignment * alignment
        + lambda_completion * completion
    )


# -- shared ---------------------------------------------------------------------------------------


def at_least_float32(scores: Tensor) -> Tensor:
    """Scores in float32, or in float64 where they are."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _zero(embeddings: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(embeddings.values()), torch.zeros(()))
    return first.new_zeros(())


def _without_absent(
    embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    """Embeddings with zeros in the rows that take no part, whatever stands there."""
    return {
        name: embedding.masked_fill(~present[name][:, None], 0.0)
        if present is not None and name in present
        else embedding
        for name, embedding in embeddings.items()
    }


def _present_in_both(
    embeddings: Mapping[str, Tensor],
    present: Mapping[str, Tensor] | None,
    pairs: Sequence[tuple[str, str]],
) -> Tensor:
    """(P, B) bool: for each pair of modalities the rows that have both."""
    first = next(iter(embeddings.values()))
    everywhere = torch.ones(len(first), dtype=torch.bool, device=first.device)
    masks = {name: (present or {}).get(name, everywhere) for name in embeddings}
    return torch.stack([masks[m] for m, _ in pairs]) & torch.stack([masks[n] for _, n in pairs])
