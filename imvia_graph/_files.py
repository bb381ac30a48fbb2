"""Reading and writing of the small file formats: label triples, tables, tensors, JSON.

Fast paths are vectorised (polars). Where one fails, the file is read once more, line by line, only
to say which line is wrong and why.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imvia_graph.errors import DataError

TRIPLE_COLUMNS = ("head", "relation", "tail")


def read_label_triples(path: Path) -> pl.DataFrame:
    """Read a file of ``head<TAB>relation<TAB>tail`` labels: UTF-8, no header, no quoting.

    Blank lines are skipped. Labels are taken as they stand, spaces included.

    Raises
    ------
    DataError
        A line with fewer or more than three columns, an empty label, text that is not UTF-8.
    """
    schema = dict.fromkeys(TRIPLE_COLUMNS, pl.String)
    if path.stat().st_size == 0:
        return pl.DataFrame(schema=schema)
    try:
        frame = pl.read_csv(path, has_header=False, separator="\t", quote_char=None, schema=schema)
    except pl.exceptions.PolarsError:
        frame = _label_triples_by_line(path)
    else:
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
        if sum(frame.null_count().row(0)) or _has_nul(frame):
            frame = _label_triples_by_line(path)
    return frame


def _has_nul(frame: pl.DataFrame) -> bool:
    """Whether any label holds a NUL byte, the mark of a file that is not text."""
    return bool(
        frame.select(pl.any_horizontal(pl.all().str.contains("\0", literal=True).any())).item()
    )


def _label_triples_by_line(path: Path) -> pl.DataFrame:
    """Slow and exact: names the first malformed line, or reads what only upset the fast reader."""
    rows = []
    for number, line in read_lines(path):
        if not line:
            continue
        columns = line.split("\t")
        if len(columns) != 3 or not all(columns):
            found = f"{len(columns)} column{'s' if len(columns) != 1 else ''}"
            if len(columns) == 3:
                found = "an empty one"
            raise DataError(
                f"{path}, line {number}: expected three columns separated by tabs (head, relation,"
                f" tail), found {found}: {shorten(line)!r}. Mend or remove the line."
            )
        rows.append(columns)
    if not rows:
        return pl.DataFrame(schema=dict.fromkeys(TRIPLE_COLUMNS, pl.String))
    return pl.DataFrame(rows, schema=list(TRIPLE_COLUMNS), orient="row")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, without their ends; DataError where it is not UTF-8 text."""
    with open_input(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: expected UTF-8 text, found the byte"
                    f" 0x{raw[error.start]:02x} at column {error.start + 1}. Convert the file to"
                    " UTF-8 (for example with iconv)."
                ) from None
            if "\0" in line:
                raise DataError(f"{path}, line {number}: expected text, found a NUL byte.")
            yield number, line.rstrip("\r\n")


@contextmanager
def open_input(path: Path) -> Iterator[Any]:
    """Open a file for reading bytes; a DataError says so where that cannot be."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        yield file


def read_label_table(path: Path, column: str) -> tuple[list[str], list[str] | None]:
    """Read ``entities.tsv`` or ``relations.tsv``: labels in id order, and display names if given.

    The header names the columns: ``entity`` (or ``relation``) and, optionally, ``name``. Further
    columns are allowed and left alone.
    """
    labels: list[str] = []
    names: list[str] = []
    header: list[str] | None = None
    for number, line in read_lines(path):
        if header is None:
            header = line.split("\t")
            if column not in header:
                raise DataError(
                    f"{path}, line 1: expected a header with the column {column!r}, found"
                    f" {shorten(line)!r}."
                )
            continue
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != len(header):
            raise DataError(
                f"{path}, line {number}: expected {len(header)} columns as in the header, found"
                f" {len(fields)}: {shorten(line)!r}."
            )
        row = dict(zip(header, fields, strict=True))
        labels.append(row[column])
        names.append(row.get("name", ""))
    if header is None:
        raise DataError(f"{path} is empty: expected a header line with the column {column!r}.")
    return labels, names if "name" in header else None


def read_view_table(path: Path) -> tuple[list[str], list[str]]:
    """Read ``views/<modality>.csv`` (RFC 4180, header ``entity,source``)."""
    try:
        frame = pl.read_csv(path, infer_schema=False).fill_null("")
    except (pl.exceptions.PolarsError, OSError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: expected a CSV table in UTF-8 with the header entity,source: {detail}."
        ) from error
    if "entity" not in frame.columns:
        raise DataError(
            f"{path}, line 1: expected a header with the column 'entity' (and 'source'), found"
            f" {frame.columns}."
        )
    source = frame["source"].to_list() if "source" in frame.columns else [""] * frame.height
    return frame["entity"].to_list(), source


def read_features(path: Path, key: str = "feat") -> Tensor:
    """Read the tensor ``feat`` of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if key not in keys:
                raise DataError(f"{path}: expected a tensor named {key!r}, found {keys}.")
            tensor: Tensor = file.get_tensor(key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: expected a safetensors file; it cannot be read ({error})."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside ``path``, flush to disk, then rename: a reader sees the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; what we write is as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    r"""Write UTF-8 text atomically, with ``\\n`` line ends on every system."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", newline="\n")

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; DataError where it is none."""
    with open_input(path) as file:
        try:
            return json.loads(file.read().decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: expected JSON in UTF-8: {error}.") from error


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def write_label_table(
    path: Path, column: str, labels: Sequence[str], names: Sequence[str] | None
) -> None:
    """Write ``entities.tsv`` or ``relations.tsv``."""
    check_tsv_labels(path, labels)
    lines = [column] if names is None else [f"{column}\tname"]
    if names is None:
        lines += labels
    else:
        check_tsv_labels(path, names)
        lines += [f"{label}\t{name}" for label, name in zip(labels, names, strict=True)]
    write_text(path, "\n".join(lines) + "\n")


def check_tsv_labels(path: Path, labels: Sequence[str]) -> None:
    """A label with a tab or a line end cannot stand in a TSV file: say so, do not break it."""
    column = pl.Series(labels, dtype=pl.String)
    bad = column.filter(column.str.contains(r"[\t\n\r]"))
    if len(bad):
        raise DataError(
            f"{path}: {len(bad)} labels hold a tab or a line end, first {bad[0]!r}; a TSV file"
            " cannot carry them. Rename them before saving."
        )


def write_view_table(path: Path, entities: Sequence[str], sources: Sequence[str]) -> None:
    """Write ``views/<modality>.csv``."""
    frame = pl.DataFrame(
        {"entity": entities, "source": sources},
        schema={"entity": pl.String, "source": pl.String},
    )
    write_atomically(path, lambda temporary: frame.write_csv(temporary, quote_style="necessary"))


def write_label_triples(path: Path, frame: pl.DataFrame) -> None:
    """Write label triples as TSV without a header."""
    write_atomically(
        path,
        lambda temporary: frame.write_csv(
            temporary, include_header=False, separator="\t", quote_style="never"
        ),
    )


def shorten(text: str, length: int = 80) -> str:
    """Text cut to a length that fits a message."""
    return text if len(text) <= length else text[: length - 1] + "…"
