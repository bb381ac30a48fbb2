"""Triples in memory: numpy and torch arrays, npz files, PyKEEN's factories."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from imvia_graph import _files
from imvia_graph.errors import DataError, IMVIAError
from imvia_graph.io.source import Source, from_frames, numbered
from imvia_graph.io.tables import NAMES
from imvia_graph.io.views import unreadable
from imvia_graph.kg import SPLITS, MultiViewKG, Split

#: Name of the npz file in a folder.
NPZ_NAME = "triples.npz"
#: The most bytes that an array of labels may take.
MOST_BYTES = 2**30


def split_of(name: str) -> Split | None:
    """Return the split that a key of a dict stands for: ``val`` stands for ``valid``."""
    return next((split for split, names in NAMES.items() if name in names), None)


def from_arrays(
    parts: Mapping[Split, Any],
    *,
    whole: bool,
    entities: Sequence[str] | None = None,
    relations: Sequence[str] | None = None,
    description: str = "arrays",
    **options: Any,
) -> Source:
    """Read (n, 3) arrays of ids, or of labels, by split."""
    arrays = {split: _checked_array(split, value) for split, value in parts.items()}
    kinds = {array.dtype.kind in "iu" for array in arrays.values() if array.size}
    if kinds == {True, False}:
        raise DataError(
            f"{description}: some splits hold ids, others labels; expected ids in all splits, or"
            " labels in all."
        )
    if kinds == {False}:
        frames = {
            split: pl.DataFrame(
                {
                    column: pl.Series(array[:, place].tolist(), dtype=pl.String)
                    for place, column in enumerate(("head", "relation", "tail"))
                }
            )
            for split, array in arrays.items()
        }
        for split, frame in frames.items():
            if frame.select(pl.any_horizontal((pl.all() == "").any())).item():
                raise DataError(f"{split}: expected non-empty labels, found an empty one.")
        return from_frames(
            f"{description} of labels",
            frames,
            whole=whole,
            entities=entities,
            relations=relations,
            **options,
        )
    triples = {
        split: torch.from_numpy(array.astype(np.int64).reshape(-1, 3))
        for split, array in arrays.items()
    }
    entities, relations = numbered(triples, entities, relations)
    return Source(f"{description} of ids", entities, relations, triples, whole, options=options)


def _checked_array(split: Split, value: Any) -> npt.NDArray[Any]:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.size == 0:
        return np.empty((0, 3), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 3:
        raise DataError(
            f"{split}: expected triples of shape (n, 3), received {tuple(array.shape)}."
        )
    if array.dtype.kind not in "iuUOT" or (
        array.dtype.kind == "O" and not all(isinstance(item, str) for item in array.flat)
    ):
        raise DataError(
            f"{split}: expected ids (integers) or labels (text), received {array.dtype}."
        )
    return array


def read_npz(path: Path, **options: Any) -> Source:
    """Read an ``.npz`` file of (n, 3) arrays by split, or an ``.npy`` file of one array."""
    entities, relations = options.pop("entities", None), options.pop("relations", None)
    _files.check_archive(path)
    with unreadable(path, "an npz or npy file of integers or text"):
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            content = {"train": found}
        else:
            with found as file:
                content = {name: file[name] for name in file.files}
    if path.suffix == ".npz" and "train" not in content:
        raise DataError(
            f"{path}: expected an array named train (and optionally valid, test, entities,"
            f" relations), found {', '.join(content) or 'none'}."
        )
    if "entities" in content and entities is None:
        entities = content["entities"].tolist()
    if "relations" in content and relations is None:
        relations = content["relations"].tolist()
    parts = {split: content[name] for name in content if (split := split_of(name))}
    return from_arrays(
        parts,
        whole=set(parts) == {"train"},
        entities=entities,
        relations=relations,
        description=f"an {path.suffix[1:]} file",
        **options,
    )


def to_arrays(kg: MultiViewKG) -> dict[str, npt.NDArray[np.int64]]:
    """Return the triples of each split as (n, 3) int64 arrays.

    Ids are positions in ``kg.entities`` and ``kg.relations``.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG.from_labels([("France", "borders", "Spain")])
    >>> ig.io.to_arrays(kg)["train"].tolist()
    [[0, 0, 1]]
    """
    return {split: kg.triples(split).numpy() for split in SPLITS}


def text_array(path: Path, texts: Sequence[str], instead: str) -> npt.NDArray[np.str_]:
    """Return texts as a NumPy array; raise a DataError if it takes more than `MOST_BYTES`.

    NumPy stores every text of an array at the width of the longest one.
    """
    longest = max(map(len, texts), default=0)
    if 4 * longest * len(texts) > MOST_BYTES:
        raise DataError(
            f"{path}: as a NumPy array, {len(texts):,} labels of up to {longest:,} letters take"
            f" {4 * longest * len(texts) / 2**30:.1f} GiB, because NumPy stores each label at the"
            f" width of the longest. Write {instead} instead, or shorten the longest labels."
        )
    return np.array(texts, dtype=np.str_)


def write_npz(kg: MultiViewKG, target: Path, *, follow: bool = False) -> list[Path]:
    """Write triples and labels into one npz file, without pickles."""
    arrays: dict[str, Any] = {
        **to_arrays(kg),
        "entities": text_array(target, kg.entities, "the format kg or parquet"),
        "relations": text_array(target, kg.relations, "the format kg or parquet"),
    }
    for name in ("entities", "relations"):
        # NumPy drops NUL characters at the end of a text.
        if arrays[name].tolist() != getattr(kg, name):
            raise DataError(
                f"{target}: a label of {name} ends with a NUL character, which NumPy drops. Rename"
                " it, or write another format."
            )

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    _files.write_atomically(target, write, follow=follow)
    return [target]


# -- PyKEEN ---------------------------------------------------------------------------------------


def is_pykeen(value: Any) -> bool:
    """Return whether a value is a PyKEEN factory, or an object with the same fields."""
    return isinstance(getattr(value, "mapped_triples", None), Tensor)


def from_pykeen(
    parts: Mapping[Split, Any],
    *,
    whole: bool,
    entities: Sequence[str] | None = None,
    relations: Sequence[str] | None = None,
    **options: Any,
) -> Source:
    """Read PyKEEN's ``TriplesFactory`` or ``CoreTriplesFactory`` by split."""
    train = parts["train"]
    if getattr(train, "create_inverse_triples", False):
        options.setdefault("notes", []).append(
            "The PyKEEN factory adds inverse triples, which are left out."
        )
    for kind in ("entity", "relation"):
        train_ids = getattr(train, f"{kind}_to_id", None)
        for split, factory in parts.items():
            ids = getattr(factory, f"{kind}_to_id", None)
            if train_ids is not None and ids is not None and train_ids != ids:
                raise DataError(
                    f"{split}: the factory has other {kind} ids than the factory of train. Create"
                    f" it with {kind}_to_id=training.{kind}_to_id."
                )
    triples = {split: factory.mapped_triples.to(torch.int64) for split, factory in parts.items()}
    if entities is None:
        entities = _labels_of(train, "entity", int(train.num_entities))
    if relations is None:
        count = int(getattr(train, "real_num_relations", train.num_relations))
        relations = _labels_of(train, "relation", count)
    return Source(
        f"PyKEEN's {type(train).__name__}", entities, relations, triples, whole, options=options
    )


def _labels_of(factory: Any, kind: str, count: int) -> list[str]:
    table = getattr(factory, f"{kind}_to_id", None)
    if table is None:
        return [str(i) for i in range(count)]
    labels = [str(i) for i in range(count)]
    for label, place in table.items():
        if place < count:
            labels[place] = str(label)
    return labels


def to_pykeen(kg: MultiViewKG) -> dict[str, Any]:
    """Return a PyKEEN ``TriplesFactory`` for each split with triples; ids are those of the graph.

    Raises
    ------
    IMVIAError
        PyKEEN is not installed.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG.from_labels([("France", "borders", "Spain")])
    >>> ig.io.to_pykeen(kg)["train"].num_triples  # doctest: +SKIP
    1
    """
    try:
        from pykeen.triples import TriplesFactory
    except ImportError as error:
        raise IMVIAError(
            'PyKEEN is not installed: pip install "imvia-graph[bench]" (or pip install pykeen).'
        ) from error
    entity_to_id = {label: i for i, label in enumerate(kg.entities)}
    relation_to_id = {label: i for i, label in enumerate(kg.relations)}
    return {
        split: TriplesFactory(
            mapped_triples=kg.triples(split),
            entity_to_id=entity_to_id,
            relation_to_id=relation_to_id,
        )
        for split in SPLITS
        if split == "train" or len(kg.triples(split))
    }


def is_pykeen_dataset(value: Any) -> bool:
    """Return whether a value is a PyKEEN data set: training, validation and testing factories."""
    return "pykeen" in sys.modules and is_pykeen(getattr(value, "training", None))
