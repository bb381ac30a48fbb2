"""DecisionFusion: relation-aware weights over the heads' scores."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imvia_graph.errors import IMVIAError
from imvia_graph.nn._checks import check_width


class DecisionFusion(nn.Module):
    r"""Relation-aware gated decision of IMVIA (section II-C).

    .. math::
        S(h, r, t) = \sum_m w_m(r) S_m(h, r, t), \qquad w(r) = \mathrm{softmax}(W e_r + b)

    Parameters
    ----------
    rel_feats : int
        Width of the relation features.
    num_heads : int
        Number of heads, M.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.nn import DecisionFusion
    >>> decision = DecisionFusion(rel_feats=4, num_heads=2)
    >>> scores = [torch.ones(3, 7), torch.zeros(3, 7)]
    >>> decision(torch.rand(3, 4), scores).shape  # queries x candidates
    torch.Size([3, 7])
    >>> decision.weights(torch.rand(3, 4)).sum(-1)
    tensor([1., 1., 1.], grad_fn=<SumBackward1>)
    """

    def __init__(self, rel_feats: int, num_heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(rel_feats, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the parameters so that all heads have equal weights."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def weights(self, rel_feat: Tensor) -> Tensor:
        """Return the (B, M) head weights for (B, rel_feats) relations; rows sum to 1."""
        logits: Tensor = self.linear(rel_feat)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)

    def forward(self, rel_feat: Tensor, scores: Sequence[Tensor]) -> Tensor:
        """Fuse the scores of M heads.

        Parameters
        ----------
        rel_feat : Tensor
            (B, rel_feats).
        scores : sequence of Tensor
            M score matrices (B, N), or (B,) for one candidate per query; or one tensor (M, B, N).

        Returns
        -------
        Tensor
            Fused scores, in the shape and dtype of one head's scores. Integer scores give the
            dtype of the weights.

        Raises
        ------
        IMVIAError
            If the number of heads or queries or the width of the relation features does not match,
            or the heads' scores differ in shape.
        """
        shapes = [tuple(score.shape) for score in scores]
        heads = self.linear.out_features
        check_width("DecisionFusion", "rel_feat", rel_feat, "B", self.linear.in_features)
        if len(shapes) != heads or any(
            shape != shapes[0] or shape[:1] != rel_feat.shape[:1] for shape in shapes
        ):
            raise IMVIAError(
                f"DecisionFusion: expected scores of {heads} heads, of one shape, with a row for"
                f" each of {len(rel_feat)} queries; received {len(shapes)} of shapes {shapes[:4]}."
            )
        return weighted_sum(scores, self.weights(rel_feat))

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        return f"rel_feats={self.linear.in_features}, num_heads={self.linear.out_features}"


def weighted_sum(scores: Sequence[Tensor] | Tensor, weights: Tensor) -> Tensor:
    """Return the sum (B, …) of M score tensors (B, …), weighted by (B, M), in the scores' dtype.

    Integer scores are summed in the weights' dtype, since the weights would be truncated to zero.
    """
    parts = (
        score * _as(score, weights[:, m]).reshape(-1, *[1] * (score.dim() - 1))
        for m, score in enumerate(scores)
    )
    return functools.reduce(torch.add, parts)


def _as(score: Tensor, weight: Tensor) -> Tensor:
    return weight.to(score.dtype) if score.is_floating_point() else weight
