"""What a reader hands to `load_kg`: ids, labels, splits, and what the source was taken for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import torch
from torch import Tensor

from imvia_graph._labels import encode_triples, index_triples
from imvia_graph.errors import DataError
from imvia_graph.kg import SPLITS, MultiViewKG, Split, Views

logger = logging.getLogger(__name__)


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
        for kind, labels in (("entities", found_entities), ("relations", found_relations)):
            _warn_of_spaces(took, kind, labels)
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


def _warn_of_spaces(took: str, kind: str, labels: pl.Series) -> None:
    """Labels are taken letter by letter, which is hardly meant where spaces alone differ."""
    spaced = labels.filter(labels.str.starts_with(" ") | labels.str.ends_with(" "))
    if len(spaced):
        bare = labels.str.strip_chars()
        alike = len(labels) - bare.n_unique()
        if alike:
            logger.warning(
                "Read as %s: %d %s differ from another one by spaces around the label alone, first"
                " %r. They are different ones here; if they are not meant to be, strip the labels.",
                took,
                alike,
                kind,
                spaced[0],
            )


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
        entities = _as_text(both[:, [0, 2]], "entities")
    if relations is None:
        relations = _as_text(both[:, 1], "relations")
    return list(entities), list(relations)


#: Ids up to which nothing is asked of how many of them are used, and the share that is, above.
_FEW, _USED = 10**6, 0.1


def _as_text(ids: Tensor, kind: str) -> list[str]:
    """Every id up to the highest as text; where hardly any is used, they are no ids."""
    count = int(ids.max()) + 1
    if count > _FEW and count > ids.unique().numel() / _USED:
        raise DataError(
            f"Ids of {kind} go up to {count - 1:,}, and {ids.unique().numel():,} of them are used:"
            f" each id up to the highest would be one of the {kind}. Ids are rows, from 0 on; give"
            f" numbers that are labels as text (array.astype(str)), or the labels with {kind}=."
        )
    return pl.int_range(count, eager=True).cast(pl.String).to_list()
