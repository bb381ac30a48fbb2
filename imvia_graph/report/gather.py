"""The data of a report, independent of its layout."""

from __future__ import annotations

import base64
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imvia_graph import _files
from imvia_graph._display import shorten
from imvia_graph._version import __version__
from imvia_graph.checkpoint import history_of
from imvia_graph.errors import DataError
from imvia_graph.evaluation import Ranking, rank, rank_metrics
from imvia_graph.inference import Predictor, Side, decision_weights, explain, view_weights
from imvia_graph.kg import SPLITS, MultiViewKG
from imvia_graph.model import DECISION
from imvia_graph.pictures import Pictures
from imvia_graph.run import Run

#: Maximum number of best or worst answers, and in the gallery of entities and of relations and
#: views per entity.
ANSWERS, ENTITIES, RELATIONS, VIEWS = 8, 6, 4, 6
#: Number of entities, about, from which the gallery is chosen.
SAMPLED = 200
#: Lower bounds of the groups of ranks by degree of the correct answer in train.
DEGREES = (0, 1, 3, 6, 11, 31, 101)


class RelationRow(NamedTuple):
    """A relation, its number of triples in the split, and metrics of both sides and of each."""

    label: str
    name: str
    triples: int
    both: dict[str, float]
    head: dict[str, float]
    tail: dict[str, float]


class Answer(NamedTuple):
    """A ranked query: its triple, correct answer, ranks, and the first answer not in the graph."""

    head: str
    relation: str
    tail: str
    asked: Side
    right: str
    rank: float
    ranks: dict[str, float]
    first: str


class GalleryView(NamedTuple):
    """A view: its picture as a data URL or None, its source, and a weight per column."""

    picture: str | None
    source: str
    weights: list[float]


class GalleryEntity(NamedTuple):
    """An entity's views by modality; columns are relations, but the first is without one.

    ``more`` is the number of views of each modality that are not shown.
    """

    name: str
    columns: list[str]
    views: dict[str, list[GalleryView]]
    more: dict[str, int]


@dataclass
class Numbers:
    """The data of one run in a report."""

    name: str
    run: Run
    split: str
    metrics: dict[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list)
    relations: list[RelationRow] = field(default_factory=list)
    degrees: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)
    weights: list[tuple[str, dict[Side, dict[str, float]]]] = field(default_factory=list)
    best: list[Answer] = field(default_factory=list)
    worst: list[Answer] = field(default_factory=list)
    gallery: list[GalleryEntity] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def gather(
    run: Run,
    name: str,
    pictures: Pictures,
    on_batch: Callable[[int, int], None] | None = None,
) -> Numbers:
    """Rank a run's test triples, or validation triples if there are none, and gather its data.

    ``on_batch`` is passed to `rank`.
    """
    kg = run.kg
    split = next((split for split in ("test", "valid") if len(kg.triples(split))), None)
    if split is None:
        raise DataError(f"{name}: {kg.title} has neither test nor validation triples to rank.")
    predictor = Predictor(run.model, kg)
    triples, size = kg.triples(split), run.settings.ranking_batch_size
    ranking = rank(run.model, triples, kg.answers(), size, on_batch=on_batch)
    best, worst = _answers(predictor, ranking)
    return Numbers(
        name,
        run,
        split,
        ranking.metrics(kg.relations),
        epochs=_epochs(run.folder),
        relations=_relations(kg, ranking),
        degrees=_degrees(kg, ranking),
        weights=_weights(run),
        best=best,
        worst=worst,
        gallery=_gallery(run, pictures),
        versions=_versions(run.folder),
    )


def _epochs(folder: Path | None) -> list[dict[str, Any]]:
    """Return the valid records of epochs in a run folder."""
    found = [] if folder is None else history_of(folder)
    return [record for record in found if _is_record(record)]


def _is_record(record: Any) -> bool:
    """Return whether a record holds only finite numbers, those of validation in ``valid``."""
    valid = record.get("valid", {})
    numbers = [value for key, value in record.items() if key != "valid"]
    return isinstance(valid, dict) and all(
        isinstance(value, int | float) and abs(value) < 1e300
        for value in (*numbers, *valid.values())
    )


def _relations(kg: MultiViewKG, ranking: Ranking) -> list[RelationRow]:
    of_triple = ranking.triples[:, 1]
    head, tail = ranking.head[DECISION], ranking.tail[DECISION]
    rows = []
    for relation in of_triple.unique().tolist():
        mine = of_triple == relation
        rows.append(
            RelationRow(
                kg.relations[relation],
                kg.relation_names[relation],
                int(mine.sum()),
                rank_metrics(torch.cat([head[mine], tail[mine]])),
                rank_metrics(head[mine]),
                rank_metrics(tail[mine]),
            )
        )
    return sorted(rows, key=lambda row: -row.triples)


def _degrees(kg: MultiViewKG, ranking: Ranking) -> list[tuple[str, int, dict[str, float]]]:
    """Return metrics by the degree of the correct answer in train."""
    degree = torch.bincount(kg.train[:, [0, 2]].flatten(), minlength=kg.num_entities)
    right = torch.cat([ranking.triples[:, 0], ranking.triples[:, 2]])
    ranks = torch.cat([ranking.head[DECISION], ranking.tail[DECISION]])
    found = []
    for low, high in zip(DEGREES, [*DEGREES[1:], None], strict=True):
        mine = degree[right] >= low
        if high is not None:
            mine &= degree[right] < high
        if mine.any():
            several = f"{low} to {high - 1}" if high else f"{low} or more"
            label = str(low) if high == low + 1 else several
            found.append((label, int(mine.sum()), rank_metrics(ranks[mine])))
    return found


def _weights(run: Run) -> list[tuple[str, dict[Side, dict[str, float]]]]:
    """Return the decision's weights per relation, the most frequent relation in train first."""
    kg = run.kg
    count = torch.bincount(kg.train[:, 1], minlength=kg.num_relations)
    return [
        (
            kg.relation_names[relation],
            {
                "tail": decision_weights(run.model, relation),
                "head": decision_weights(run.model, relation + kg.num_relations),
            },
        )
        for relation in torch.argsort(count, descending=True, stable=True).tolist()
    ]


# -- answers --------------------------------------------------------------------------------------


def _answers(predictor: Predictor, ranking: Ranking) -> tuple[list[Answer], list[Answer]]:
    """Return queries with the best and with the worst ranks, of varied relations."""
    sides: tuple[Side, ...] = ("tail", "head")
    # Tail and head of each triple in turn, so that ties choose from both sides.
    ranks = torch.stack([ranking.tail[DECISION], ranking.head[DECISION]], dim=1).flatten()
    relation = ranking.triples[:, 1].repeat_interleave(2)
    found = []
    for descending in (False, True):
        order = torch.argsort(ranks, descending=descending, stable=True)
        chosen = _varied(order, relation)
        found.append([_answer(predictor, ranking.triples[i // 2], sides[i % 2]) for i in chosen])
    return found[0], found[1]


def _varied(order: Tensor, relation: Tensor) -> list[int]:
    """Return the first `ANSWERS` in order with one per relation, filled up with the others."""
    chosen: dict[int, int] = {}
    listed = order.tolist()
    for i in listed:
        chosen.setdefault(int(relation[i]), i)
        if len(chosen) == ANSWERS:
            break
    first = list(chosen.values())
    taken = set(first)
    rest = (i for i in listed if i not in taken)
    while len(first) < min(ANSWERS, len(listed)):
        first.append(next(rest))
    return first


def _answer(predictor: Predictor, triple: Tensor, side: Side) -> Answer:
    kg = predictor.kg
    h, r, t = triple.tolist()
    found = explain(
        predictor, kg, head=kg.entities[h], relation=kg.relations[r], tail=kg.entities[t]
    )
    judgements = found.judgements[side]
    given = {"head": kg.entities[h]} if side == "tail" else {"tail": kg.entities[t]}
    first = predictor.predict(relation=kg.relations[r], k=1, **given)
    return Answer(
        found.head.name,
        found.relation_name,
        found.tail.name,
        side,
        found.tail.name if side == "tail" else found.head.name,
        judgements[DECISION].rank,
        {name: judgement.rank for name, judgement in judgements.items() if name != DECISION},
        first[0].name if first else "",
    )


# -- the gallery ----------------------------------------------------------------------------------


def _gallery(run: Run, pictures: Pictures) -> list[GalleryEntity]:
    """Return the entities whose view weights depend most on the relation."""
    kg, model = run.kg, run.model
    if not model.modalities:
        return []
    counts = torch.stack([ptr.diff().cpu() for _, ptr in model.views.values()])
    several = (counts > 1).any(0).nonzero().flatten()
    # Spread over the ids, since entities of a kind often have neighbouring ids.
    step = max(1, len(several) // SAMPLED)
    relations = {entity: _relations_of(kg, entity) for entity in several[::step].tolist()}
    spread = {entity: _spread(run, entity, under) for entity, under in relations.items() if under}
    chosen = sorted(spread, key=lambda entity: -spread[entity])[:ENTITIES]
    return [_gallery_entity(run, entity, relations[entity], pictures) for entity in sorted(chosen)]


def _relations_of(kg: MultiViewKG, entity: int) -> list[int]:
    """Return an entity's relations in train, inverses included, the most frequent first."""
    head, relation, tail = kg.train.unbind(1)
    under = torch.cat([relation[head == entity], relation[tail == entity] + kg.num_relations])
    found, count = under.unique(return_counts=True)
    order = torch.argsort(count, descending=True, stable=True)
    listed: list[int] = found[order][:RELATIONS].tolist()
    return listed


def _spread(run: Run, entity: int, under: Sequence[int]) -> float:
    """Return the largest difference between weights of a view under different relations."""
    tables = [view_weights(run.model, entity, relation) for relation in under]
    widest = 0.0
    for modality in run.model.modalities:
        weights = torch.stack([table[modality] for table in tables])
        if weights.shape[1] > 1:
            widest = max(widest, float((weights.amax(0) - weights.amin(0)).max()))
    return widest


def _gallery_entity(
    run: Run, entity: int, under: Sequence[int], pictures: Pictures
) -> GalleryEntity:
    kg, model = run.kg, run.model
    columns = ["without a relation"]
    for relation in under:
        name = kg.relation_names[relation % kg.num_relations]
        columns.append(name if relation < kg.num_relations else f"{name} (inverse)")
    tables = [view_weights(model, entity), *(view_weights(model, entity, r) for r in under)]
    views: dict[str, list[GalleryView]] = {}
    more: dict[str, int] = {}
    for modality, (_, ptr) in model.views.items():
        first, end = int(ptr[entity]), int(ptr[entity + 1])
        weights = torch.stack([table[modality] for table in tables])  # (columns, views)
        # Of too many views, show those with the largest weight in any column.
        rows = torch.argsort(weights.amax(0), descending=True, stable=True)[:VIEWS].sort().values
        views[modality] = [
            GalleryView(
                _data(pictures.small(modality, first + row)),
                kg.view_source(modality, first + row) or f"number {row + 1}",
                weights[:, row].tolist(),
            )
            for row in rows.tolist()
        ]
        more[modality] = end - first - len(rows)
    return GalleryEntity(kg.entity_names[entity], columns, views, more)


def _data(picture: bytes | None) -> str | None:
    if picture is None:
        return None
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"


# -- environment ----------------------------------------------------------------------------------


def _versions(folder: Path | None) -> dict[str, str]:
    """Return the versions of the packages that trained a run, from ``run.json``."""
    path = None if folder is None else _files.inside(folder, "run.json")
    if path is None or not path.is_file():
        return {}
    about = _files.read_json(path)
    versions = about.get("versions") if isinstance(about, dict) else None
    if not isinstance(versions, dict):
        return {}
    return {str(name): shorten(str(value)) for name, value in versions.items()}


def environment() -> dict[str, str]:
    """Return the versions, system and device that the report is made with."""
    return {
        "imvia-graph": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def sizes(kg: MultiViewKG) -> list[tuple[str, str]]:
    """Return labels and sizes of a graph's parts."""
    found = [("entities", f"{kg.num_entities:,}"), ("relations", f"{kg.num_relations:,}")]
    found += [(f"{split} triples", f"{len(kg.triples(split)):,}") for split in SPLITS]
    for modality in kg.modalities:
        feat, ptr = kg.views(modality)
        owners = int((ptr.diff() > 0).sum())
        found.append(
            (
                f"{modality} views",
                f"{len(feat):,} of {owners:,} entities, {feat.shape[1]:,} numbers each",
            )
        )
    return found
