"""Names of the splits, and the views of one modality."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor

from imvia_graph import _linked

Split = str  # "train", "valid" or "test"
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
#: The splits, and the known triples that are in no split.
PARTS = (*SPLITS, "known")


class Views(NamedTuple):
    """The views of one modality, as passed to `MultiViewKG`.

    Features that are mapped from a file stay there if they are sorted by entity; otherwise a sorted
    copy is made in memory.

    Attributes
    ----------
    feat : Tensor
        (V, d_m) floating point, one row per view.
    entity : Tensor
        (V,) int64 entity of each view, in any order; an entity may have any number of views.
    source : sequence of str, optional
        Source of each view: a path, a URL or the text itself.
    root : path, optional
        Folder that relative paths in ``source`` start from.
    """

    feat: Tensor
    entity: Tensor
    source: Sequence[str] | pl.Series | None = None
    root: str | os.PathLike[str] | None = None


class Held(NamedTuple):
    """The views of one modality, as stored in a graph: checked and sorted by entity."""

    feat: Tensor
    #: (num_entities + 1,) int64.
    ptr: Tensor
    #: None if no source is known.
    source: pl.Series | None
    root: Path | None
    #: The file that the features are mapped from, if any.
    file: _linked.Mapped | None = None

    @property
    def entity(self) -> Tensor:
        """(V,) int64: the entity of each view."""
        return torch.repeat_interleave(torch.arange(len(self.ptr) - 1), self.ptr.diff())
