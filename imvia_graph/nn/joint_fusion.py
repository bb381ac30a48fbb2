"""JointFusion: attention over an entity's modality embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class JointFusion(nn.Module):
    r"""The joint representation of IMVIA (section II-C).

    .. math::
        \hat e_\mathrm{joint} = \frac{\sum_m \exp(w_m^\top P_m(\hat e_m)) P_m(\hat e_m)}
        {\sum_m \exp(w_m^\top P_m(\hat e_m))}

    with a learned attention vector :math:`w_m` a modality. The projections :math:`P_m` are those of
    `MultiViewEncoder`; what comes in is projected already, and the structural embedding, which has
    the width of the model to begin with, is taken as it is.

    Parameters
    ----------
    in_feats : int
        Width of the projected embeddings.
    num_modalities : int
        Their number, M.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.nn import JointFusion
    >>> fusion = JointFusion(in_feats=8, num_modalities=3)
    >>> joint, attention = fusion(torch.rand(5, 3, 8), get_attention=True)
    >>> joint.shape, attention.shape
    (torch.Size([5, 8]), torch.Size([5, 3]))
    """

    def __init__(self, in_feats: int, num_modalities: int) -> None:
        super().__init__()
        self.in_feats = in_feats
        self.num_modalities = num_modalities
        self.attention = nn.Parameter(torch.empty(num_modalities, in_feats))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the plain mean of the modalities."""
        nn.init.zeros_(self.attention)

    def forward(self, feat: Tensor, get_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Fuse (B, M, in_feats) into (B, in_feats); with ``get_attention`` also (B, M) weights."""
        attention = (feat * self.attention).sum(-1).softmax(dim=-1)
        joint = (attention[..., None] * feat).sum(1)
        return (joint, attention) if get_attention else joint

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"in_feats={self.in_feats}, num_modalities={self.num_modalities}"
