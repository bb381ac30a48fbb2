"""The OpenKE layout, in which DB15K, MKG-W and MKG-Y are published.

A folder with ``entity2id.txt`` and ``relation2id.txt`` (first line: the count; then a label and its
id per line) and ``train2id.txt``, ``valid2id.txt``, ``test2id.txt`` (first line: the count; then
*head, tail, relation* ids per line). The optional ``entity_names.tsv`` and ``relation_names.tsv``,
with a header and the columns ``id`` and ``name``, hold display names.

Source of the layout: https://github.com/thunlp/OpenKE, "Input Files Format".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from imvia_graph import _files
from imvia_graph._display import shorten
from imvia_graph._files import inside, open_input, read_lines
from imvia_graph._tables import (
    announced_count,
    check_count,
    check_no_outer_spaces,
    is_number,
    read_numbered_labels,
    write_table,
)
from imvia_graph.errors import DataError
from imvia_graph.kg import SPLITS, MultiViewKG


def read_openke(folder: str | Path) -> MultiViewKG:
    r"""Read a folder in the OpenKE layout.

    Raises
    ------
    DataError
        A missing or malformed file, a wrong count line, or ids out of range.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "entity2id.txt").write_text("2\nFrance 0\nParis 1\n")
    >>> _ = (folder / "relation2id.txt").write_text("1\ncapital 0\n")
    >>> _ = (folder / "train2id.txt").write_text("1\n0 1 0\n")  # head, tail, relation
    >>> ig.io.read_openke(folder).train.tolist()  # head, relation, tail
    [[0, 0, 1]]
    """
    folder = Path(folder)
    entities = read_numbered_labels(inside(folder, "entity2id.txt"), announced=True)
    relations = read_numbered_labels(inside(folder, "relation2id.txt"), announced=True)
    parts: dict[str, Tensor | None] = dict.fromkeys(SPLITS)
    for split in SPLITS:
        path = inside(folder, f"{split}2id.txt")
        if path.is_file() or split == "train":
            parts[split] = _read_triples(path, len(entities), len(relations))
    assert parts["train"] is not None
    return MultiViewKG(
        entities,
        relations,
        parts["train"],
        parts["valid"],
        parts["test"],
        name=folder.resolve().name,
        entity_names=_read_names(inside(folder, "entity_names.tsv"), len(entities)),
        relation_names=_read_names(inside(folder, "relation_names.tsv"), len(relations)),
    )


def _read_triples(path: Path, num_entities: int, num_relations: int) -> Tensor:
    """Read head, tail, relation rows as (n, 3) int64 triples of head, relation, tail."""
    with open_input(path) as file:
        raw = file.read()
    # Fast path: every line is three plain numbers. Other files are read line by line, which either
    # succeeds or names the line at fault.
    if raw and not raw.translate(None, b"0123456789 \t\r\n"):
        values = np.fromstring(raw.decode(), dtype=np.int64, sep=" ")
        columns = _columns_by_line(raw)
        if columns[:1] == [1] and values[0] == len(columns) - 1 and set(columns[1:]) <= {3}:
            rows = torch.from_numpy(values[1:].reshape(-1, 3))
            if _in_range(rows, num_entities, num_relations):
                return rows[:, [0, 2, 1]].contiguous()
    return _read_triples_by_line(path, num_entities, num_relations)


def _columns_by_line(raw: bytes) -> list[int]:
    """Return the number of columns of each line."""
    text = np.frombuffer(raw, dtype=np.uint8)
    space = text <= ord(" ")
    starts = np.flatnonzero(~space & np.concatenate([[True], space[:-1]]))
    ends = np.flatnonzero(text == ord("\n"))
    num_lines = len(ends) + (not raw.endswith(b"\n"))
    counts: list[int] = np.bincount(np.searchsorted(ends, starts), minlength=num_lines).tolist()
    return counts


def _in_range(rows: Tensor, num_entities: int, num_relations: int) -> bool:
    limit = torch.tensor([num_entities, num_entities, num_relations])
    return bool((rows < limit).all())


def _read_triples_by_line(path: Path, num_entities: int, num_relations: int) -> Tensor:
    count: int | None = None
    rows: list[tuple[int, int, int]] = []
    for number, line in read_lines(path):
        fields = line.split()
        if not fields:
            continue
        if count is None:
            count = announced_count(path, number, line)
            continue
        if len(fields) != 3 or not all(map(is_number, fields)):
            raise DataError(
                f"{path}, line {number}: expected three ids (head, tail, relation), found"
                f" {shorten(line)!r}."
            )
        head, tail, relation = (int(field) for field in fields)
        for what, value, limit in (
            ("head", head, num_entities),
            ("tail", tail, num_entities),
            ("relation", relation, num_relations),
        ):
            if value >= limit:
                raise DataError(
                    f"{path}, line {number}: the {what} id {value} is out of range; expected 0 to"
                    f" {limit - 1}. The order of columns is head, tail, relation."
                )
        rows.append((head, relation, tail))
    check_count(path, count, len(rows))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def _read_names(path: Path, count: int) -> list[str] | None:
    """Read display names in id order from a table with a header; None if there is no file."""
    if not path.is_file():
        return None
    names = [""] * count
    header: list[str] | None = None
    for number, line in read_lines(path):
        fields = line.split("\t")
        if header is None:
            header = fields
            if "id" not in header or "name" not in header:
                raise DataError(
                    f"{path}, line 1: expected a header with the columns id and name, found"
                    f" {shorten(line)!r}."
                )
            continue
        row = dict(zip(header, fields, strict=False))
        place = row.get("id", "")
        if len(fields) != len(header) or not is_number(place) or int(place) >= count:
            raise DataError(
                f"{path}, line {number}: expected an id below {count} and a name, found"
                f" {shorten(line)!r}."
            )
        names[int(place)] = row["name"]
    return names


def write_openke(kg: MultiViewKG, folder: str | Path) -> Path:
    r"""Write a graph, without its views, in the OpenKE layout, with its display names.

    Raises
    ------
    DataError
        A label that the layout cannot hold: one that contains a tab or a line end, or begins or
        ends with a space. Nothing is written.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> kg = ig.MultiViewKG.from_labels([("Paris", "capital of", "France")])
    >>> folder = ig.io.write_openke(kg, pathlib.Path(tempfile.mkdtemp()) / "openke")
    >>> (folder / "train2id.txt").read_text()  # head, tail, relation
    '1\n0 1 0\n'
    >>> ig.io.read_openke(folder).relations
    ['capital of']
    """
    folder = Path(folder)
    write_openke_files(kg, folder)
    return folder


def write_openke_files(kg: MultiViewKG, folder: Path) -> list[Path]:
    """Write what `write_openke` writes; return the files written."""
    written = []
    kinds = (
        ("entity", kg.entities, kg.entity_names),
        ("relation", kg.relations, kg.relation_names),
    )
    for kind, labels, names in kinds:
        _files.check_tsv_labels(folder / f"{kind}2id.txt", labels)
        _files.check_tsv_labels(folder / f"{kind}_names.tsv", names)
        check_no_outer_spaces(folder / f"{kind}2id.txt", labels)
    for kind, labels, names in kinds:
        numbered = pl.DataFrame({"label": labels, "id": range(len(labels))})
        _write_announced(folder / f"{kind}2id.txt", numbered, "\t")
        written.append(folder / f"{kind}2id.txt")
        if names != labels:
            table = pl.DataFrame({"id": range(len(names)), "name": names})
            write_table(folder / f"{kind}_names.tsv", table, header=True)
            written.append(folder / f"{kind}_names.tsv")
    for split in SPLITS:
        triples = kg.triples(split)
        if len(triples) or split == "train":
            frame = pl.from_numpy(triples[:, [0, 2, 1]].numpy())
            _write_announced(folder / f"{split}2id.txt", frame, " ")
            written.append(folder / f"{split}2id.txt")
    return written


def _write_announced(path: Path, frame: pl.DataFrame, separator: str) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(f"{frame.height}\n".encode())
            frame.write_csv(file, include_header=False, separator=separator, quote_style="never")

    _files.write_atomically(path, write)
