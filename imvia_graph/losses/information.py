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

    The integral of Eq. 4 is bounded by the sampled form of
    `CLUB <https://arxiv.org/abs/2006.12013>`__ ([21] in the paper): with a Gaussian estimator
    :math:`q_{mn}(y|x)` and a random permutation :math:`\pi` of the batch,

    .. math::
        L_1 = \sum_{m \neq n} \frac{1}{B} \sum_i
        \left[ \log q_{mn}(y_i | x_i) - \log q_{mn}(y_{\pi(i)} | x_i) \right],
        \qquad x = \hat e_m, \; y = \hat e_n

    The estimators are trained by maximum likelihood (`estimation_loss`) on detached embeddings,
    with a separate optimizer. `forward` gives the estimators no gradient: if they were trained to
    minimise L1, they would no longer estimate the conditional density, and L1 would be no bound.

    Parameters
    ----------
    modalities : sequence of str
        Names of the modalities.
    feats : int
        Width of the embeddings.
    hidden_feats : int, optional
        Hidden width of the estimators. Default: ``128``.

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
        #: One per pair, in the order of ``pairs``: those from the first modality to each other one,
        #: those from the second, …
        self.estimators = nn.ModuleList(GaussianEstimator(feats, hidden_feats) for _ in self.pairs)

    def forward(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return L1 of a batch.

        Parameters
        ----------
        embeddings : mapping of str to Tensor
            (B, feats) for each modality; row i belongs to the same entity in all of them.
        present : mapping of str to Tensor, optional
            (B,) bool for each modality: whether the entity has a view of it. The bound of a pair of
            modalities is taken over the rows that have both. Default: all rows.

        Returns
        -------
        Tensor
            A scalar; 0 if there is nothing to bound.

        Raises
        ------
        IMVIAError
            If the embeddings of a modality are missing or have another shape.
        """
        return self._both(embeddings, present, frozen=True)[0]

    def estimation_loss(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the estimators' negative log-likelihood on detached embeddings.

        The arguments are those of `forward`.
        """
        detached = {name: embedding.detach() for name, embedding in embeddings.items()}
        return self.both(detached, present)[1]

    def both(
        self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return L1 and the estimation loss from one pass through the estimators.

        The arguments are those of `forward`. Neither result is detached: in training, take the
        gradients of the model from L1 only, and those of the estimators from the estimation loss.
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
        """Return the arguments that ``print`` shows."""
        return f"modalities={self.modalities}, feats={self.feats}"

    def _moments(self, embeddings: Mapping[str, Tensor], frozen: bool) -> tuple[Tensor, Tensor]:
        """Return (P, B, d) means and log-variances, with two products per modality.

        The result is that of calling each estimator, with far fewer kernel launches on a GPU. Under
        autocast, the second bias is added in the dtype of the embeddings.
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
    """Return (P, B) int64 random permutations of the rows that are True; other entries are any.

    The number of such rows is not read, since this would wait for a GPU.
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
        """Return (B, feats) means and log-variances for (B, feats) inputs."""
        return self.mean(x), self.log_variance(x)


def _perceptron(feats: int, hidden_feats: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(feats, hidden_feats), nn.ReLU(), nn.Linear(hidden_feats, feats))
