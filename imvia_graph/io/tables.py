"""Files of label triples: TSV, CSV, columns separated by spaces, Parquet.

All triples are in one file, or in a folder with a file ``train`` and optionally ``valid`` and
``test``. TSV, CSV and text may be compressed (``.gz``, ``.zst``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from imvia_graph import _files
from imvia_graph._labels import decode_triples
from imvia_graph._tables import (
    SPACES,
    Columns,
    may_be_header,
    read_parquet_triples,
    read_triples,
    write_table,
)
from imvia_graph.errors import DataError
from imvia_graph.io.source import Source, from_frames
from imvia_graph.kg import SPLITS, MultiViewKG, Split

#: Form of a file by its suffix.
FORMS = {
    ".tsv": "tsv",
    ".tab": "tsv",
    ".csv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".nt": "ntriples",
    ".ntriples": "ntriples",
    ".ttl": "turtle",
    ".turtle": "turtle",
    ".npz": "npz",
    ".npy": "npz",
}
COMPRESSED = (".gz", ".zst")
#: Names of the split files in a folder.
NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "val", "dev", "validation"),
    "test": ("test",),
}


def form_of(path: Path) -> str | None:
    """Return the form by the suffix of a file name, ignoring ``.gz`` and ``.zst``."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return FORMS.get(name.suffix.lower())


def split_of_file(path: Path) -> Split | None:
    """Return the split of a file in a folder by its name; None if it names no split."""
    name = path.name.split(".")[0].lower()
    if form_of(path) is None:
        return None
    return next((split for split, names in NAMES.items() if name in names), None)


def split_files(folder: Path) -> dict[Split, Path]:
    """Return the split files of a folder; raise a DataError if a split has more than one."""
    found: dict[Split, Path] = {}
    for split in SPLITS:
        here = [
            path
            for path in sorted(folder.iterdir())
            if path.is_file() and split_of_file(path) == split
        ]
        if len(here) > 1:
            raise DataError(
                f"{folder}: expected one file of {split} triples, found"
                f" {', '.join(path.name for path in here)}. Remove the others, or pass a dict of"
                f" paths: {{'train': ..., 'valid': ..., 'test': ...}}."
            )
        if here:
            found[split] = _files.inside(folder, here[0].name)
    return found


def read_frame(
    path: Path,
    form: str,
    *,
    columns: Columns | None = None,
    header: bool | None = None,
    separator: str | None = None,
) -> tuple[pl.DataFrame, str]:
    """Read the label triples of a file; return them and a description of the form."""
    if form == "parquet":
        return read_parquet_triples(path, columns), "Parquet"
    if separator is None:
        separator = {"tsv": "\t", "csv": ","}.get(form) or _guess_separator(path)
    frame = read_triples(
        path, separator=separator, quoted=form == "csv", header=header, columns=columns
    )
    what = {"\t": "TSV", ",": "CSV", SPACES: "text with spaces between the columns"}
    return frame, what.get(separator, f"text separated by {separator!r}")


def read_files(
    files: Mapping[Split, Path],
    forms: Mapping[Split, str],
    *,
    whole: bool,
    name: str,
    entities: Sequence[str] | None = None,
    relations: Sequence[str] | None = None,
    **options: Any,
) -> Source:
    """Read files of label triples, one per split."""
    frames, whats = {}, []
    for split, path in files.items():
        frames[split], what = read_frame(path, forms[split], **options)
        whats.append(what)
        if not frames[split].height and split == "train":
            raise DataError(
                f"{path} is empty: expected one triple (head, relation, tail) per line."
            )
    what = " and ".join(dict.fromkeys(whats))
    if whole:
        description = f"one file of label triples, {what}"
    else:
        description = f"files of label triples by split ({', '.join(files)}), {what}"
    return from_frames(
        description, frames, whole=whole, entities=entities, relations=relations, name=name
    )


def _guess_separator(path: Path) -> str:
    """Return a tab if the first line that is not blank has one, else `SPACES`."""
    for _, line in _files.read_lines(path):
        if line.strip():
            return "\t" if "\t" in line.strip() else SPACES
    return SPACES


def write_tables(
    kg: MultiViewKG,
    target: Path,
    form: str,
    *,
    compression: str | None = None,
) -> list[Path]:
    """Write one file per split into a folder, or all triples into one file."""
    for labels in (kg.entities, kg.relations):
        if form == "tsv":
            _files.check_tsv_labels(target, labels)
        elif form == "text":
            check_spaced_labels(target, labels)
    written = []
    for path, splits in target_files(kg, target, form, compression):
        frame = pl.concat(
            [decode_triples(kg.triples(split), kg.entities, kg.relations) for split in splits]
        )
        if form == "parquet":
            _files.write_atomically(path, frame.write_parquet, follow=path == target)
        else:
            write_table(
                path,
                frame,
                separator={"tsv": "\t", "csv": ","}.get(form, SPACES),
                quoted=form == "csv",
                # Without a header, a first row of the labels h, r, t would be read as one.
                header=form == "csv" or may_be_header(frame.row(0)),
                follow=path == target,
            )
        written.append(path)
    return written


def target_files(
    kg: MultiViewKG, target: Path, form: str, compression: str | None = None
) -> list[tuple[Path, list[Split]]]:
    """Return the files to write and the splits that each file holds."""
    present: list[Split] = [split for split in SPLITS if split == "train" or len(kg.triples(split))]
    if form_of(target) == form:
        return [(target, present)]
    ending = next(ending for ending, known in FORMS.items() if known == form)
    ending += {None: "", "gzip": ".gz", "zstd": ".zst"}[compression]
    return [(target / f"{split}{ending}", [split]) for split in present]


def check_spaced_labels(path: Path, labels: Sequence[str]) -> None:
    """Raise a DataError for labels that a file with columns separated by spaces cannot hold."""
    column = pl.Series(labels, dtype=pl.String)
    bad = column.filter(column.str.contains(r"[ \t\r\n]|^\.$"))
    if len(bad):
        raise DataError(
            f"{path}: {len(bad)} labels contain a space or a line end, or are a full stop, first"
            f" {bad[0]!r}; in this layout spaces separate the columns. Write TSV, CSV or Parquet"
            " instead, or rename the labels."
        )
