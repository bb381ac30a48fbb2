"""The layouts in which the authors of MoMoK and of MyGO publish their benchmarks.

MoMoK (https://github.com/zjukg/MoMoK, ``datasets/``): ``entity2id.txt`` and ``relation2id.txt``
hold a label and its id per line, without a count; ``train.txt``, ``valid.txt`` and ``test.txt``
hold a triple of labels per line, separated by spaces and ended by `` .``.

MyGO (https://github.com/zjukg/MyGO, ``data/``): ``entities.txt`` and ``relations.txt`` hold a label
per line in id order (in the release, these labels are the ids themselves); ``train.txt``,
``valid.txt`` and ``test.txt`` hold head, relation and tail per line, separated by tabs. These cells
are labels; if all are numbers and some are not among the labels, they are ids, that is, line
numbers from 0. In the release, MKG-W has ``entity2id.txt`` instead of ``entities.txt``, and MKG-Y
has no ``relations.txt``; both are read, and the relations of MKG-Y are labelled with their ids.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from imvia_graph import _files
from imvia_graph._files import inside
from imvia_graph._labels import decode_triples, encode_labels, encode_triples
from imvia_graph._tables import (
    SPACES,
    check_no_outer_spaces,
    read_numbered_labels,
    read_triples,
    write_lines,
    write_table,
)
from imvia_graph.errors import DataError
from imvia_graph.io.source import Source
from imvia_graph.io.tables import check_spaced_labels
from imvia_graph.kg import SPLITS, MultiViewKG, Split


def is_momok(folder: Path) -> bool:
    """Return whether a folder has the files of the MoMoK layout."""
    names = ("train.txt", "entity2id.txt", "relation2id.txt")
    return all((folder / name).is_file() for name in names)


def is_mygo(folder: Path) -> bool:
    """Return whether a folder has the files of the MyGO layout."""
    listed = any((folder / name).is_file() for name in ("entities.txt", "entity2id.txt"))
    return listed and (folder / "train.txt").is_file() and not is_momok(folder)


def read_momok(folder: Path) -> Source:
    """Read a folder in the layout of the MoMoK release."""
    entities = read_numbered_labels(inside(folder, "entity2id.txt"))
    relations = read_numbered_labels(inside(folder, "relation2id.txt"))
    parts: dict[Split, Tensor] = {}
    for split in SPLITS:
        path = inside(folder, f"{split}.txt")
        if path.is_file() or split == "train":
            frame = read_triples(path, separator=_separator(path))
            parts[split] = encode_triples(frame, entities, relations, str(path))
    return Source(
        "a folder in the layout of the MoMoK release (entity2id.txt, train.txt)",
        entities,
        relations,
        parts,
        options={"name": folder.resolve().name},
    )


def write_momok(kg: MultiViewKG, folder: Path) -> list[Path]:
    """Write the layout of the MoMoK release."""
    for labels in (kg.entities, kg.relations):
        check_spaced_labels(folder / "train.txt", labels)
    written = []
    for name, labels in (("entity2id.txt", kg.entities), ("relation2id.txt", kg.relations)):
        table = pl.DataFrame({"label": labels, "id": range(len(labels))})
        write_table(folder / name, table, separator=" ")
        written.append(folder / name)
    for split in _present(kg):
        frame = decode_triples(kg.triples(split), kg.entities, kg.relations)
        path = folder / f"{split}.txt"
        write_table(path, frame.with_columns(end=pl.lit(".")), separator=" ")
        written.append(path)
    return written


def read_mygo(folder: Path) -> Source:
    """Read a folder in the id layout of the MyGO release."""
    frames = {}
    for split in SPLITS:
        path = inside(folder, f"{split}.txt")
        if path.is_file() or split == "train":
            frames[split] = read_triples(path, separator=_separator(path))
    both = pl.concat(frames.values())
    ends = pl.concat([both["head"], both["tail"]]).unique()
    kinds = both["relation"].unique()
    if inside(folder, "entities.txt").is_file():
        entities = _read_list(folder / "entities.txt")
    else:
        entities = read_numbered_labels(inside(folder, "entity2id.txt"))
    if inside(folder, "relations.txt").is_file():
        relations = _read_list(folder / "relations.txt")
    elif _are_numbers(kinds):
        relations = [str(i) for i in range(int(kinds.cast(pl.Int64).max()) + 1)]  # type: ignore[arg-type]
    else:
        relations = kinds.sort().to_list()
    places = {
        "head": _as_ids(ends, entities),
        "relation": _as_ids(kinds, relations),
        "tail": _as_ids(ends, entities),
    }
    parts: dict[Split, Tensor] = {}
    for split, frame in frames.items():
        path = folder / f"{split}.txt"
        parts[split] = torch.empty(frame.height, 3, dtype=torch.int64)
        for place, (column, as_ids) in enumerate(places.items()):
            labels = relations if column == "relation" else entities
            if as_ids:
                ids = torch.from_numpy(frame[column].cast(pl.Int64).to_numpy().copy())
                _check_range(path, column, ids, len(labels))
            else:
                ids = encode_labels(frame[column], labels, f"{path}, column {column}")
            parts[split][:, place] = ids
    what = "ids" if places["head"] else "labels"
    return Source(
        f"a folder in the layout of the MyGO release (entities.txt, train.txt of {what})",
        entities,
        relations,
        parts,
        options={"name": folder.resolve().name},
    )


def _are_numbers(cells: pl.Series) -> bool:
    return bool(cells.str.contains(r"^[0-9]{1,18}$").all())


def _as_ids(cells: pl.Series, labels: list[str]) -> bool:
    """Return whether the cells are ids: all numbers, and not all of them labels."""
    return _are_numbers(cells) and not bool(cells.is_in(labels).all())


def write_mygo(kg: MultiViewKG, folder: Path) -> list[Path]:
    """Write the id layout of the MyGO release: one label per line, triples as line numbers.

    If any label is a number, triples are written as labels, as in the release, because line numbers
    and labels could be confused.
    """
    written = []
    by_label = any(pl.Series(labels).str.contains(r"^[0-9]+$").any() for labels in _labels(kg))
    for name, labels in (("entities.txt", kg.entities), ("relations.txt", kg.relations)):
        _files.check_tsv_labels(folder / name, labels)
        check_no_outer_spaces(folder / name, labels)
    for name, labels in (("entities.txt", kg.entities), ("relations.txt", kg.relations)):
        write_lines(folder / name, pl.Series(labels))
        written.append(folder / name)
    for split in _present(kg):
        if by_label:
            frame = decode_triples(kg.triples(split), kg.entities, kg.relations)
        else:
            frame = pl.from_numpy(kg.triples(split).numpy())
        write_table(folder / f"{split}.txt", frame)
        written.append(folder / f"{split}.txt")
    return written


def _labels(kg: MultiViewKG) -> tuple[list[str], list[str]]:
    return kg.entities, kg.relations


def _present(kg: MultiViewKG) -> list[Split]:
    return [split for split in SPLITS if split == "train" or len(kg.triples(split))]


def _separator(path: Path) -> str:
    """Return a tab if the first line that is not blank has two tabs, else `SPACES`."""
    for _, line in _files.read_lines(path):
        if line.strip():
            return "\t" if line.strip().count("\t") == 2 else SPACES
    return SPACES


def _read_list(path: Path) -> list[str]:
    """Read one label per line."""
    labels = [line.strip() for _, line in _files.read_lines(path)]
    while labels and not labels[-1]:
        labels.pop()
    if "" in labels:
        raise DataError(
            f"{path}, line {labels.index('') + 1}: expected a label, found a blank line. Line"
            " numbers are the ids of the labels, so no label may be missing."
        )
    if not labels:
        raise DataError(f"{path} is empty: expected one label per line.")
    return labels


def _check_range(path: Path, what: str, ids: Tensor, limit: int) -> None:
    bad = (ids >= limit).nonzero()
    if len(bad):
        row = int(bad[0])
        raise DataError(
            f"{path}, triple {row + 1}: the {what} id {int(ids[row])} is out of range; expected 0"
            f" to {limit - 1}. The order of columns is head, relation, tail."
        )
