"""What a reader hands to `load_kg`: ids, labels, splits, and what the source was taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from torch import Tensor

from imvia_graph._labels import encode_triples, index_triples
from imvia_graph.errors import DataError
from imvia_graph.kg import SPLITS, MultiViewKG, Split, Views


@dataclass
class Source:
    """A graph as it was read, before it is split and built.

    Attributes
    ----------
    took : str
        What the source was taken for, for people: "a TSV file without a header".
    entities, relations : sequence of str
        Labels in id order.
    parts : dict of str to Tensor
        (n, 3) int64 triples by split. A source without splits has just ``train``.
    whole : bool
        Whether the source has no splits of its own, so that it may be split.
    options : dict
        Further arguments of `MultiViewKG`: name, display names, notes.
    """

    took: str
    entities: Sequence[str] | pl.Series
    relations: Sequence[str] | pl.Series
    parts: dict[Split, Tensor]
    whole: bool = False
    views: Mapping[str, Views] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, **options: Any) -> MultiViewKG:
        """The graph."""
        return MultiViewKG(
            self.entities,
            self.relations,
            self.parts["train"],
            self.parts.get("valid"),
            self.parts.get("test"),
            views=self.views,
            **{**self.options, **options},
        )


def from_frames(
    took: str,
    frames: Mapping[Split, pl.DataFrame],
    *,
    whole: bool = False,
    entities: Sequence[str] | None = None,
    relations: Sequence[str] | None = None,
    **options: Any,
) -> Source:
    """A source of label triples by split; ids by first appearance unless labels are given."""
    splits = [split for split in SPLITS if split in frames]
    parts = [frames[split] for split in splits]
    if entities is None or relations is None:
        found_entities, found_relations, triples = index_triples(parts)
        if entities is None and relations is None:
            given = dict(zip(splits, triples, strict=True))
            return Source(took, found_entities, found_relations, given, whole, options=options)
        entities = found_entities.to_list() if entities is None else entities
        relations = found_relations.to_list() if relations is None else relations
    encoded = {
        split: encode_triples(frame, entities, relations, f"{took}: {split}")
        for split, frame in zip(splits, parts, strict=True)
    }
    return Source(took, list(entities), list(relations), encoded, whole, options=options)


def numbered(
    parts: Mapping[Split, Tensor],
    entities: Sequence[str] | None,
    relations: Sequence[str] | None,
) -> tuple[list[str], list[str]]:
    """Labels of ids: those given, or the ids themselves as text, up to the highest that is used."""
    both = torch.cat([part.reshape(-1, 3) for part in parts.values()])
    if not len(both):
        raise DataError("There are no triples: expected at least one row (head, relation, tail).")
    if int(both.min()) < 0:
        raise DataError(f"Ids are 0 and up; received {int(both.min())}.")
    if entities is None:
        entities = _as_text(int(both[:, [0, 2]].max()) + 1)
    if relations is None:
        relations = _as_text(int(both[:, 1].max()) + 1)
    return list(entities), list(relations)


def _as_text(count: int) -> list[str]:
    return pl.int_range(count, eager=True).cast(pl.String).to_list()
