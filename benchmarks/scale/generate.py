"""Write a synthetic KG folder of any size with learnable structure.

    python benchmarks/scale/generate.py FOLDER --entities 100000

Each entity has a type and, within the type, a latent cluster. Each relation links a head type to a
tail type and maps head clusters to tail clusters; most tails of a triple come from the cluster that
its head's cluster is mapped to. Degrees follow a power law. A view is the centre of its entity's
cluster plus noise, or noise alone. Both structure and views thus reveal an entity's cluster, and
the answers of a query are mostly the popular entities of one cluster.

Features are drawn and written in blocks, so that memory never holds all of them.
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
#: Maximum number of views per entity and modality.
MOST_VIEWS = 12
#: Share of tails drawn from any cluster of the tail type, and of views that are noise alone.
STRAY, BLANK = 0.15, 0.25
#: Standard deviation of the noise of a view; the cluster centres have 1.
NOISE = 1.0
#: Triples, and rows of features, per block.
TRIPLES, ROWS = 2**21, 2**16
#: Names of the dtypes in safetensors.
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class Size(NamedTuple):
    """Sizes of the graph."""

    entities: int
    relations: int = 100
    types: int = 10
    triples_each: float = 4.0
    #: Number of validation triples and of test triples, each at most 5 % of all triples.
    held_out: int = 2000
    modalities: Sequence[str] = ("image",)
    views_each: float = 4.0
    width: int = 256
    dtype: str = "float16"


class _Plan(NamedTuple):
    """Clusters and popularities of the entities, and types and cluster maps of the relations."""

    #: (N,) ids sorted by cluster; (N,) cluster of each id; (N,) cumulative sum of popularity.
    entity: Ints
    cluster: Ints
    popularity: npt.NDArray[np.float64]
    #: (clusters + 1,) pointer into `entity`; the clusters of a type are consecutive.
    start: Ints
    clusters_each: int
    #: (R,) head and tail types of the relations; (R, clusters_each) tail cluster by head cluster.
    head_type: Ints
    tail_type: Ints
    maps: Ints


def generate(folder: Path, size: Size, seed: int = 0) -> dict[str, Any]:
    """Write a KG folder.

    Parameters
    ----------
    folder : path
        Created if it does not exist.
    size : Size
    seed : int
        The same seed and size give the same files.

    Returns
    -------
    dict
        Numbers of ``entities``, ``relations``, training ``triples`` and ``views``, ``bytes`` of
        features, and ``seconds``.
    """
    started = time.perf_counter()
    random = np.random.default_rng(seed)
    (folder / "views").mkdir(parents=True, exist_ok=True)
    plan = _planned(size, random)
    labels = pl.select(pl.format("e{}", pl.int_range(size.entities))).to_series()
    relations = pl.select(pl.format("r{}", pl.int_range(size.relations))).to_series()
    # The library ignores the columns "type" and "cluster"; they are for inspection.
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
    # About 25 entities per cluster in a small graph, and at most 64 clusters per type.
    each = int(np.clip(size.entities // (25 * size.types), 2, 64))
    cluster = random.integers(size.types * each, size=size.entities)
    entity = np.argsort(cluster, kind="stable")
    start = np.searchsorted(cluster[entity], np.arange(size.types * each + 1))
    # Popularities from this Pareto distribution lead to degrees with the power law above.
    popularity = (1 - random.random(size.entities)) ** (-1 / (EXPONENT - 1))
    # Every type is the head type of a relation if there are enough relations.
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
    """Return (n, 3) distinct triples in random order.

    Each entity is the head of one triple; the heads of all further triples are drawn.
    """
    wanted = round(size.entities * size.triples_each)
    key = np.empty(0, dtype=np.int64)
    drawn = 0
    # Popular pairs are drawn repeatedly; draw again, up to seven times, to replace duplicates.
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
    """Draw triples number start to stop, each encoded as one integer; there may be duplicates."""
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
    """Draw a relation of each head's type; the k-th relation of a type has weight 1 / k."""
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
    """Draw an entity from each range of clusters, with probability proportional to popularity."""
    sums = np.concatenate([[0.0], plan.popularity])
    low, high = plan.start[begin], plan.start[end]
    # For an empty cluster, draw from all entities.
    empty = low == high
    low, high = np.where(empty, 0, low), np.where(empty, len(plan.entity), high)
    where = sums[low] + random.random(len(low)) * (sums[high] - sums[low])
    # With sorted values, the search moves through memory in one direction.
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
    """Write the splits; held out are only triples whose head and tail have a degree above 4."""
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
    """Draw the (N,) numbers of views from a beta-binomial distribution.

    Few entities have many views and some have none.
    """
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
    """Write one view for each row of ``cluster``, and return the bytes of the features."""
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
@click.option("--entities", default=10_000, help="Number of entities, thousands to millions.")
@click.option("--relations", default=100, help="Number of relations.")
@click.option("--types", default=10, help="Number of entity types.")
@click.option("--triples", default=4.0, help="Approximate number of triples per entity.")
@click.option("--held-out", default=2000, help="Number of validation triples, and of test triples.")
@click.option("--modality", multiple=True, default=["image"], help="Modality; repeatable.")
@click.option("--views", default=4.0, help="Mean views per entity and modality, of 0 to 12.")
@click.option("--width", default=256, help="Width of the features.")
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="float16", help="Of the features."
)
@click.option("--seed", default=0, help="Random seed.")
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
    """Write a KG folder to FOLDER and print its sizes as JSON."""
    size = Size(entities, relations, types, triples, held_out, modality, views, width, dtype)
    click.echo(json.dumps(generate(folder, size, seed)))


if __name__ == "__main__":
    main()
