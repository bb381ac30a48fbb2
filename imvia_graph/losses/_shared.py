"""Helpers shared by the losses: checks, masks of rows, and the precision of sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from imvia_graph.errors import IMVIAError


def at_least_float32(scores: Tensor) -> Tensor:
    """Convert scores to float32; float64 scores stay in float64."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def zero(embeddings: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(embeddings.values()), torch.zeros(()))
    return first.new_zeros(())


def without_absent(
    embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    """Return the embeddings with zeros in the rows of entities that lack the modality."""
    return {
        name: embedding.masked_fill(~present[name][:, None], 0.0)
        if present is not None and name in present
        else embedding
        for name, embedding in embeddings.items()
    }


def present_in_both(
    embeddings: Mapping[str, Tensor],
    present: Mapping[str, Tensor] | None,
    pairs: Sequence[tuple[str, str]],
) -> Tensor:
    """Return a (P, B) bool mask of the rows that have both modalities of each pair."""
    first = next(iter(embeddings.values()))
    everywhere = torch.ones(len(first), dtype=torch.bool, device=first.device)
    masks = {name: (present or {}).get(name, everywhere) for name in embeddings}
    return torch.stack([masks[m] for m, _ in pairs]) & torch.stack([masks[n] for _, n in pairs])


def check_embeddings(
    caller: str, embeddings: Mapping[str, Tensor], wanted: Sequence[str], feats: int | None = None
) -> None:
    """Raise unless each modality has embeddings (B, feats); ``None`` allows any width.

    Raises
    ------
    IMVIAError
    """
    missing = [name for name in wanted if name not in embeddings]
    if missing:
        raise IMVIAError(
            f"{caller}: expected embeddings of {list(wanted)}; received {list(embeddings)}."
        )
    shapes = {name: tuple(embeddings[name].shape) for name in wanted}
    first = shapes[wanted[0]]
    width = first[-1] if feats is None and first else feats
    if len(first) != 2 or any(shape != (first[0], width) for shape in shapes.values()):
        raise IMVIAError(
            f"{caller}: expected (B, {'d' if feats is None else feats}) of each modality, with the"
            f" same B in all; received {shapes}."
        )
