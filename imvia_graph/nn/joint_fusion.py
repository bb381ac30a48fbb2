"""JointFusion: attention over an entity's modality embeddings."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imvia_graph._gpu import fusion
from imvia_graph._gradients import with_gradients
from imvia_graph.errors import IMVIAError


class JointFusion(nn.Module):
    r"""Joint representation of IMVIA, by attention over the modalities (section II-C).

    .. math::
        \hat e_\mathrm{joint} = \frac{\sum_m \exp(w_m^\top P_m(\hat e_m)) P_m(\hat e_m)}
        {\sum_m \exp(w_m^\top P_m(\hat e_m))}

    with one learned attention vector :math:`w_m` per modality. The projections :math:`P_m` are
    those of `MultiViewEncoder`: the inputs of this layer are already projected, and the structural
    embedding, which has the width of the model, needs no projection.

    Parameters
    ----------
    in_feats : int
        Width of the projected embeddings.
    num_modalities : int
        Number of modalities, M, the structural embedding included.

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
        """Reset the attention, so that the result is the mean of the modalities."""
        nn.init.zeros_(self.attention)

    def forward(
        self,
        feat: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        get_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Fuse the modality embeddings of each row.

        Parameters
        ----------
        feat : Tensor, sequence or mapping of Tensor
            One tensor (B, M, in_feats), or M tensors (B, in_feats); a mapping in its own order.
        get_attention : bool, optional
            Whether to return the attention weights as well. Default: ``False``.

        Returns
        -------
        Tensor
            (B, in_feats) joint embeddings.
        Tensor, optional
            (B, M) attention weights. Only with ``get_attention``.

        Raises
        ------
        IMVIAError
            If the number of modalities or the shape of an embedding does not match.
        """
        if isinstance(feat, Mapping):  # as returned by MultiViewEncoder
            feat = list(feat.values())
        if isinstance(feat, Tensor):
            feat = feat.unbind(1) if feat.dim() > 1 else [feat]
        parts = feat
        shapes = [tuple(part.shape) for part in parts]
        # Compared one by one, not as a set: under torch.jit.trace sizes are tensors.
        fits = len(shapes) == self.num_modalities > 0 and len(shapes[0]) == 2
        if not fits or any(shape != (shapes[0][0], self.in_feats) for shape in shapes):
            raise IMVIAError(
                f"JointFusion: expected {self.num_modalities} modalities of (B, {self.in_feats}),"
                f" or one tensor (B, {self.num_modalities}, {self.in_feats}); received"
                f" {len(shapes)} of shapes {shapes[:4]}."
            )
        if fusion.usable(parts):
            joint, attention = fusion.fuse(self.attention, get_attention, parts)
        else:
            dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
            joint, attention = _Fuse.apply(self.attention, *(part.to(dtype) for part in parts))
        if attention is None or not get_attention:
            return joint
        return joint, attention

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        return f"in_feats={self.in_feats}, num_modalities={self.num_modalities}"


class _Fuse(torch.autograd.Function):
    """Attention over M tensors (B, d) of one dtype, without a temporary (B, M, d)."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(vectors.device.type, enabled=False):
            rows = vectors.to(parts[0].dtype)
            logits = [part @ row for part, row in zip(parts, rows, strict=True)]
            attention = torch.stack(logits, dim=1).softmax(dim=1)
            joint = parts[0] * attention[:, :1]
            for m, part in enumerate(parts[1:], start=1):
                joint.addcmul_(part, attention[:, m, None])
        ctx.save_for_backward(vectors, attention, *parts)
        return joint, attention

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_attention: Tensor) -> tuple[Tensor | None, ...]:
        vectors, attention, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():
            args = (grad, grad_attention), (vectors, *parts), ctx.needs_input_grad
            return tuple(with_gradients(fusion.plain, *args))
        along = torch.stack([torch.linalg.vecdot(grad, part) for part in parts], dim=1)
        along = along + grad_attention
        slope = attention * (along - (attention * along).sum(dim=1, keepdim=True))
        grads = [
            torch.addcmul(torch.outer(slope[:, m], row), grad, attention[:, m, None])
            for m, row in enumerate(vectors.to(slope.dtype))
        ]
        grad_vectors = torch.stack([slope[:, m] @ part for m, part in enumerate(parts)])
        return grad_vectors.to(vectors.dtype), *grads
