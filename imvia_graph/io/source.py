"""`Source`: what a reader returns to `load_kg` (ids, labels, splits, the detected form)."""

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
    """A graph as read, before it is split and built.

    Attributes
    ----------
    description : str
        The detected form of the source, for messages: "a TSV file without a header".
    entities, relations : sequence of str
        Labels in id order.
    parts : dict of str to Tensor
        (n, 3) int64 triples by split. A source without splits has only ``train``.
    whole : bool
        Whether the source has no splits, so that `load_kg` may split it.
    views : mapping of str to Views
        Views by modality.
    options : dict
        Further arguments of `MultiViewKG`: name, display names, notes.
    """

    description: str
    entities: Sequence[str] | pl.Series
    relations: Sequence[str] | pl.Series
    parts: dict[Split, Tensor]
    whole: bool = False
    views: Mapping[str, Views] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, **options: Any) -> MultiViewKG:
        """Build the graph."""
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
    description: str,
    frames: Mapping[Split, pl.DataFrame],
    *,
    whole: bool = False,
    entities: Sequence[str] | None = None,
    relations: Sequence[str] | None = None,
    **options: Any,
) -> Source:
    """Make a source of label triples by split.

    Ids are numbered in the order of first appearance, or by ``entities`` and ``relations``.
    """
    splits = [split for split in SPLITS if split in frames]
    parts = [frames[split] for split in splits]
    if entities is None or relations is None:
        found_entities, found_relations, triples = index_triples(parts)
        for kind, labels in (("entities", found_entities), ("relations", found_relations)):
            _warn_of_spaces(description, kind, labels)
        if entities is None and relations is None:
            indexed = dict(zip(splits, triples, strict=True))
            return Source(
                description, found_entities, found_relations, indexed, whole, options=options
            )
        entities = found_entities.to_list() if entities is None else entities
        relations = found_relations.to_list() if relations is None else relations
    encoded = {
        split: encode_triples(frame, entities, relations, f"{description}: {split}")
        for split, frame in zip(splits, parts, strict=True)
    }
    return Source(description, list(entities), list(relations), encoded, whole, options=options)


def _warn_of_spaces(description: str, kind: str, labels: pl.Series) -> None:
    """Warn of labels that differ from another label only by spaces around them."""
    spaced = labels.filter(labels.str.starts_with(" ") | labels.str.ends_with(" "))
    if len(spaced):
        bare = labels.str.strip_chars()
        alike = len(labels) - bare.n_unique()
        if alike:
            logger.warning(
                "Read as %s: %d %s differ from others only by spaces around the label, first %r."
                " They count as different %s; strip the labels if that is not intended.",
                description,
                alike,
                kind,
                spaced[0],
                kind,
            )


def numbered(
    parts: Mapping[Split, Tensor],
    entities: Sequence[str] | None,
    relations: Sequence[str] | None,
) -> tuple[list[str], list[str]]:
    """Return the labels of ids: those passed, else every id up to the highest one as text."""
    both = torch.cat([part.reshape(-1, 3) for part in parts.values()])
    if not len(both):
        raise DataError("There are no triples: expected at least one row (head, relation, tail).")
    if int(both.min()) < 0:
        raise DataError(f"Expected ids of 0 or more; received {int(both.min())}.")
    if entities is None:
        entities = _as_text(both[:, [0, 2]], "entities")
    if relations is None:
        relations = _as_text(both[:, 1], "relations")
    return list(entities), list(relations)


#: If there are more ids than this, at least this share of them must occur in triples.
_MAX_SPARSE_IDS, _MIN_USED_SHARE = 10**6, 0.1


def _as_text(ids: Tensor, kind: str) -> list[str]:
    """Return every id up to the highest as text; raise a DataError if hardly any is used."""
    count = int(ids.max()) + 1
    if count > _MAX_SPARSE_IDS and count > ids.unique().numel() / _MIN_USED_SHARE:
        raise DataError(
            f"Ids of {kind} go up to {count - 1:,}, but only {ids.unique().numel():,} of them are"
            f" used; every id from 0 to the highest would be one of the {kind}. If the numbers are"
            f" labels, pass them as text (array.astype(str)); or pass the labels of the ids with"
            f" {kind}=."
        )
    return pl.int_range(count, eager=True).cast(pl.String).to_list()
