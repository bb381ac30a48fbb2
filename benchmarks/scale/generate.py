"""Write a KG folder of any size, with regularities to learn: python benchmarks/scale/generate.py

Entities have a type and, within it, a cluster that nothing in the graph names. A relation joins
one type to another and maps the clusters of the one to clusters of the other: most of its tails
are of the cluster that the head's is mapped to. Degrees follow a power law. The views of an entity
are its cluster's centre with noise, some of them noise alone. So structure tells an entity's
cluster, and so do its views, and an answer is one of a cluster, the popular ones first.

Features are made and written in portions, and never held.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import polars as pl
import torch

Ints = npt.NDArray[np.int64]

#: Exponent of the power law of degrees: the share of entities of degree k is about k^-2.5.
EXPONENT = 2.5
#: Most views of an entity in a modality.
MOST_VIEWS = 12
#: Share of tails of any cluster, and of views that show nothing.
STRAY, BLANK = 0.15, 0.25
#: Standard deviation of the noise on a view, where its cluster's centre has 1.
NOISE = 1.0
#: Triples, and rows of features, that are made at a time.
TRIPLES, ROWS = 2**21, 2**16
#: What safetensors calls the dtypes.
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class Size(NamedTuple):
    """What a graph has."""

    entities: int
    relations: int = 100
    types: int = 10
    triples_each: float = 4.0
    #: Validation and test triples, of each so many, but no more than a twentieth of all.
    held_out: int = 2000
    modalities: Sequence[str] = ("image",)
    views_each: float = 4.0
    width: int = 256
    dtype: str = "float16"


class _Plan(NamedTuple):
    """What is true of the entities and relations, in the order of clusters."""

    #: (N,) ids, cluster by cluster; (N,) cluster of each id; (N,) running sum of popularity.
    entity: Ints
    cluster: Ints
    popularity: npt.NDArray[np.float64]
    #: (clusters + 1,) where each begins in `entity`; clusters of a type stand together.
    start: Ints
    clusters_each: int
    #: (R,) types of a relation's ends; (R, clusters_each) clusters that heads' are mapped to.
    head_type: Ints
    tail_type: Ints
    maps: Ints


def generate(folder: Path, size: Size, seed: int = 0) -> dict[str, Any]:
    """Write a KG folder.

    Parameters
    ----------
    folder : path
        Made where it is not there.
    size : Size
    seed : int
        The same seed and size give the same files.

    Returns
    -------
    dict
        Numbers of ``entities``, ``triples``, ``views``, ``bytes`` of features, and ``seconds``.
    """
    started = time.perf_counter()
    random = np.random.default_rng(seed)
    (folder / "views").mkdir(parents=True, exist_ok=True)
    plan = _planned(size, random)
    labels = pl.select(pl.format("e{}", pl.int_range(size.entities))).to_series()
    relations = pl.select(pl.format("r{}", pl.int_range(size.relations))).to_series()
    # Columns that the library leaves alone; the types and clusters are there to be looked at.
    pl.DataFrame(
        {
            "entity": labels,
            "type": plan.cluster // plan.clusters_each,
            "cluster": plan.cluster % plan.clusters_each,
        }
    ).write_csv(folder / "entities.tsv", separator="\t")
    pl.DataFrame({"relation": relations}).write_csv(folder / "relations.tsv", separator="\t")
    counts = _write_triples(folder, _triples(size, plan, random), size, labels, relations, random)
    views = num_bytes = 0
    for number, modality in enumerate(size.modalities):
        generator = torch.Generator().manual_seed(seed * len(size.modalities) + number)
        count = _view_counts(size, random)
        owner = np.repeat(np.arange(size.entities), count)
        _write_table(folder / "views" / f"{modality}.csv", labels, owner)
        path = folder / "views" / f"{modality}.safetensors"
        num_bytes += _write_features(path, size, plan.cluster[owner], generator)
        views += len(owner)
    about = {
        "format": "imvia-graph/kg",
        "version": 1,
        "name": f"made-{size.entities}",
        "notes": [f"Made by benchmarks/scale/generate.py with seed {seed}: {size._asdict()}."],
        "modalities": list(size.modalities),
    }
    (folder / "kg.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    return {
        "entities": size.entities,
        "relations": size.relations,
        "triples": counts["train"],
        "views": views,
        "bytes": num_bytes,
        "seconds": time.perf_counter() - started,
    }


def _planned(size: Size, random: np.random.Generator) -> _Plan:
    # Some 25 entities a cluster in a small graph, and no more than 64 clusters a type.
    each = int(np.clip(size.entities // (25 * size.types), 2, 64))
    cluster = random.integers(size.types * each, size=size.entities)
    entity = np.argsort(cluster, kind="stable")
    start = np.searchsorted(cluster[entity], np.arange(size.types * each + 1))
    # Of a Pareto distribution of this kind of popularity come degrees of the power law above.
    popularity = (1 - random.random(size.entities)) ** (-1 / (EXPONENT - 1))
    # Every type is some relation's head, as far as there are relations.
    head_type = np.arange(size.relations) % size.types
    return _Plan(
        entity,
        cluster,
        np.cumsum(popularity),
        start,
        each,
        head_type,
        random.integers(size.types, size=size.relations),
        np.stack([random.permutation(each) for _ in range(size.relations)]),
    )


# -- triples --------------------------------------------------------------------------------------


def _triples(size: Size, plan: _Plan, random: np.random.Generator) -> Ints:
    """(n, 3) distinct triples, in no order; each entity is a head, then heads are drawn."""
    wanted = round(size.entities * size.triples_each)
    key = np.empty(0, dtype=np.int64)
    drawn = 0
    # Popular pairs come again and again: what they leave is drawn anew, a few times.
    for _ in range(8):
        missing = wanted - len(key)
        if missing <= wanted // 200:
            break
        key = np.union1d(key, _keys(size, plan, random, drawn, drawn + missing))
        drawn += missing
    random.shuffle(key)
    key, tail = np.divmod(key, size.entities)
    return np.stack([*np.divmod(key, size.relations), tail], axis=1)


def _keys(size: Size, plan: _Plan, random: np.random.Generator, start: int, stop: int) -> Ints:
    """Triples number start to stop, as one number each; some may be the same."""
    keys = []
    for at in range(start, stop, TRIPLES):
        number = np.arange(at, min(at + TRIPLES, stop))
        first = number[number < size.entities]
        drawn = _drawn(plan, np.zeros(len(number) - len(first), dtype=np.int64),
                       np.full(len(number) - len(first), len(plan.start) - 1), random)  # fmt: skip
        head = np.concatenate([first, drawn])
        relation = _relations(size, plan, head, random)
        of = plan.maps[relation, plan.cluster[head] % plan.clusters_each]
        low = plan.tail_type[relation] * plan.clusters_each
        stray = random.random(len(head)) < STRAY
        begin = np.where(stray, low, low + of)
        end = np.where(stray, low + plan.clusters_each, low + of + 1)
        tail = _drawn(plan, begin, end, random)
        keys.append((head * size.relations + relation) * size.entities + tail)
    return np.concatenate(keys)


def _relations(size: Size, plan: _Plan, head: Ints, random: np.random.Generator) -> Ints:
    """A relation for each head, of those that its type has; the first ones are the common ones."""
    kind = plan.cluster[head] // plan.clusters_each
    relation = np.empty(len(head), dtype=np.int64)
    for number in range(size.types):
        mine = kind == number
        known = np.flatnonzero(plan.head_type == number)
        known = known if len(known) else np.arange(size.relations)
        share = 1 / (1 + np.arange(len(known)))
        relation[mine] = random.choice(known, size=int(mine.sum()), p=share / share.sum())
    return relation


def _drawn(plan: _Plan, begin: Ints, end: Ints, random: np.random.Generator) -> Ints:
    """An entity of each range of clusters, by popularity."""
    sums = np.concatenate([[0.0], plan.popularity])
    low, high = plan.start[begin], plan.start[end]
    # An empty cluster has none: any entity then.
    empty = low == high
    low, high = np.where(empty, 0, low), np.where(empty, len(plan.entity), high)
    where = sums[low] + random.random(len(low)) * (sums[high] - sums[low])
    # Sorted, the search goes through memory in one direction.
    order = np.argsort(where)
    place = np.empty(len(low), dtype=np.int64)
    place[order] = np.searchsorted(plan.popularity, where[order], side="right")
    return plan.entity[np.clip(place, low, high - 1)]


def _write_triples(
    folder: Path,
    triples: Ints,
    size: Size,
    labels: pl.Series,
    relations: pl.Series,
    random: np.random.Generator,
) -> dict[str, int]:
    """Write the splits; ends of what is held out have other triples in train."""
    degree = np.bincount(triples[:, ::2].reshape(-1), minlength=size.entities)
    wanted = min(size.held_out, len(triples) // 20)
    fit = np.flatnonzero((degree[triples[:, ::2]] > 4).all(axis=1))
    chosen = random.permutation(fit)[: 2 * wanted]
    left = np.ones(len(triples), dtype=bool)
    left[chosen] = False
    parts = {
        "valid": triples[chosen[:wanted]],
        "test": triples[chosen[wanted:]],
        "train": triples[left],
    }
    for split, part in parts.items():
        with (folder / f"{split}.tsv").open("wb") as file:
            for rows in _portions(part, TRIPLES):
                head, relation, tail = (pl.Series(column.copy()) for column in rows.T)
                frame = pl.DataFrame(
                    [labels.gather(head), relations.gather(relation).alias("relation"),
                     labels.gather(tail).alias("tail")]
                )  # fmt: skip
                frame.write_csv(file, separator="\t", include_header=False, quote_style="never")
    return {split: len(part) for split, part in parts.items()}


# -- views ----------------------------------------------------------------------------------------


def _view_counts(size: Size, random: np.random.Generator) -> Ints:
    """(N,) numbers of views: a binomial whose chance is of a beta distribution, so that a few
    entities have many and a few have none."""
    chance = random.beta(1, MOST_VIEWS / size.views_each - 1, size=size.entities)
    return random.binomial(MOST_VIEWS, chance)


def _write_table(path: Path, labels: pl.Series, owner: Ints) -> None:
    with path.open("wb") as file:
        file.write(b"entity,source\n")
        for rows in _portions(owner, TRIPLES):
            frame = labels.gather(pl.Series(rows)).to_frame()
            frame = frame.with_columns(source=pl.lit(None, dtype=pl.String))
            frame.write_csv(file, include_header=False)


def _write_features(path: Path, size: Size, cluster: Ints, generator: torch.Generator) -> int:
    """Write one view a row, of the clusters given; returns the bytes of the features."""
    num_clusters = int(cluster.max(initial=0)) + 1
    centres = torch.randn(num_clusters, size.width, generator=generator)
    dtype = getattr(torch, size.dtype)
    num_bytes = len(cluster) * size.width * dtype.itemsize
    about = {"dtype": DTYPES[size.dtype], "shape": [len(cluster), size.width]}
    header = json.dumps({"feat": {**about, "data_offsets": [0, num_bytes]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for rows in _portions(cluster, ROWS):
            feat = torch.randn(len(rows), size.width, generator=generator).mul_(NOISE)
            shows = torch.rand(len(rows), generator=generator) >= BLANK
            feat.add_(centres[torch.from_numpy(rows)] * shows[:, None])
            file.write(feat.to(dtype).view(torch.uint8).numpy().data)
    return num_bytes


def _portions(rows: Ints, length: int) -> Iterator[Ints]:
    for at in range(0, len(rows), length):
        yield rows[at : at + length]


# -- the command ----------------------------------------------------------------------------------


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--entities", default=10_000, help="Entities, some thousands to millions.")
@click.option("--relations", default=100, help="Relations.")
@click.option("--types", default=10, help="Types of entities.")
@click.option("--triples", default=4.0, help="Triples an entity, about.")
@click.option("--held-out", default=2000, help="Validation triples, and as many test triples.")
@click.option("--modality", multiple=True, default=["image"], help="A modality; may be repeated.")
@click.option("--views", default=4.0, help="Views an entity and modality, on average of 0 to 12.")
@click.option("--width", default=256, help="Width of a view.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float16", help="Of the views.")
@click.option("--seed", default=0, help="Seed of everything.")
def main(
    folder: Path,
    entities: int,
    relations: int,
    types: int,
    triples: float,
    held_out: int,
    modality: Sequence[str],
    views: float,
    width: int,
    dtype: str,
    seed: int,
) -> None:
    """Write a KG folder of a size, and tell what is in it."""
    size = Size(entities, relations, types, triples, held_out, modality, views, width, dtype)
    click.echo(json.dumps(generate(folder, size, seed)))


if __name__ == "__main__":
    main()
