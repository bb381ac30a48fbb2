"""What a graph is made of: the names of its splits, and the views of one modality."""

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
#: The splits, and triples that are in none.
PARTS = (*SPLITS, "known")


class Views(NamedTuple):
    """The views of one modality, as they go into a `MultiViewKG`.

    Features that are mapped from a file stay there, if they are sorted by entity: what is sorted
    here is sorted in memory.

    Attributes
    ----------
    feat : Tensor
        (V, d_m) floating point: a row a view.
    entity : Tensor
        (V,) int64: the entity that each view shows; any order, zero or many views an entity.
    source : sequence of str, optional
        Where each view comes from: a path, an address or the text itself.
    root : path, optional
        The folder that relative paths among the sources start from.
    """

    feat: Tensor
    entity: Tensor
    source: Sequence[str] | pl.Series | None = None
    root: str | os.PathLike[str] | None = None


class Held(NamedTuple):
    """The views of one modality, as a graph holds them: checked, and sorted by entity."""

    feat: Tensor
    #: (num_entities + 1,) int64.
    ptr: Tensor
    #: None where none is known.
    source: pl.Series | None
    root: Path | None
    #: What the features are mapped from, if they are.
    file: _linked.Mapped | None = None

    @property
    def entity(self) -> Tensor:
        """(V,) int64: the entity of each view."""
        return torch.repeat_interleave(torch.arange(len(self.ptr) - 1), self.ptr.diff())
