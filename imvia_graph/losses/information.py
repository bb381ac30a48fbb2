"""L1 (Eq. 4): the mutual information between modalities, bounded from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from imvia_graph.errors import IMVIAError
from imvia_graph.losses._shared import check_embeddings, present_in_both, without_absent, zero


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
        if isinstance(modalities, str) or len(set(self.modalities)) < len(self.modalities):
            raise IMVIAError(
                "MutualInformation: expected a list of distinct modalities; received"
                f" {modalities!r}."
            )
        self.feats = feats
        self.pairs = list(permutations(self.modalities, 2))
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

        Raises
        ------
        IMVIAError
            A modality without embeddings, or embeddings of other shapes.
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
            return zero(embeddings), zero(embeddings)
        check_embeddings("MutualInformation", embeddings, self.modalities, self.feats)
        embeddings = without_absent(embeddings, present)
        mean, log_variance = self._moments(embeddings, frozen)
        # All pairs at once: (P, B, d).
        y = torch.stack([embeddings[n] for _, n in self.pairs])
        rows = present_in_both(embeddings, present, self.pairs)
        share = rows.to(y.dtype) / rows.sum(1, keepdim=True).clamp(min=1)
        shuffled = y.gather(1, _shuffle(rows)[..., None].expand_as(y))
        precision = (-log_variance).exp()
        # log q(y|x) - log q(y'|x): the squares of the means and the log-variances cancel.
        gain = -0.5 * ((y - shuffled) * (y + shuffled - 2 * mean) * precision).sum(-1)
        surprise = 0.5 * ((y.detach() - mean) ** 2 * precision + log_variance).sum(-1)
        return (gain * share).sum(), (surprise * share).sum()

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"modalities={self.modalities}, feats={self.feats}"

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
