"""Reading raw views: pictures and texts with their entities, for `imvia_graph.encode`.

Entities are named by label, or by a display name that only one entity has; a column of integers
holds ids.
"""

from __future__ import annotations

import logging
import os
import re
import tokenize
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote

import numpy as np
import polars as pl
import torch
from torch import Tensor

from imvia_graph import _files
from imvia_graph._display import first_line, nearest, shorten
from imvia_graph._parquet import check_parquet
from imvia_graph._tables import (
    SEPARATED,
    quotes_are_plain,
    read_rows,
    refuse_separator_mark,
    typed,
    warn_of_quotes,
)
from imvia_graph.errors import DataError, IMVIAError
from imvia_graph.kg import MultiViewKG

logger = logging.getLogger(__name__)

#: The entities that views belong to: those of a graph, or entity labels in id order.
Entities = MultiViewKG | Sequence[str]
#: A column of a table: its name, or its position from 0.
Column = str | int

#: Names of the column of a table that holds the view; without such a column, the second one does.
PATH_COLUMNS = ("path", "image", "picture", "file", "source")
TEXT_COLUMNS = ("text", "caption", "description", "source")
#: How many ignored files a warning names.
NAMED = 3
#: Files that file managers leave in folders.
LITTER = {"thumbs.db", "desktop.ini"}


class RawViews(NamedTuple):
    """Pictures or texts with their entities, sorted by entity, then in the order of the source.

    Attributes
    ----------
    modality : {"image", "text"}
        Whether the views are pictures or texts.
    entity : Tensor
        (V,) int64: the id of each view's entity.
    source : list of str
        The text itself, or the path of the picture relative to ``root``, with slashes.
    root : Path or None
        The folder that the paths of pictures are relative to.
    repeated : int
        Number of views left out because the entity already has the same view. For pictures, that is
        the same path; the same bytes under another path are detected when they are encoded.
    within : Path or None
        The folder that links among the pictures must not lead out of. None means ``root``.
    broken : list of (str, str)
        Name of each file or folder that is left out because of its name or link, and why.
    """

    modality: str
    entity: Tensor
    source: list[str]
    root: Path | None = None
    repeated: int = 0
    within: Path | None = None
    broken: Sequence[tuple[str, str]] = ()


# -- raw views ------------------------------------------------------------------------------------


def read_images(
    source: str | os.PathLike[str],
    of: Entities,
    *,
    root: str | os.PathLike[str] | None = None,
    columns: tuple[Column, Column] | None = None,
    separator: str | None = None,
    skip_unknown: bool = False,
) -> RawViews:
    """Read the paths of pictures and their entities from a folder of folders, or from a table.

    Parameters
    ----------
    source : path
        A folder ``images/<entity>/*``, or a table (TSV, CSV, Parquet; TSV and CSV also gzipped) of
        entity and path. A folder of pictures has the label or display name of its entity,
        percent-encoded if that is no valid folder name (``%2F`` for a slash). Every file in it is a
        picture, in the order of the names; hidden files and deeper folders are ignored, and files
        with names that are not UTF-8 count as broken.
    of : MultiViewKG or sequence of str
        The graph, or the labels of its entities in id order.
    root : path, optional
        For a table, the folder that its paths are relative to and must not leave, directly or by
        links. Default: the folder of the table. For a folder of folders, the folder that links in
        it must not lead out of, by default ``source``. Pictures and folders behind links that do
        count as broken.
    columns : pair of str or int, optional
        The table's columns of entity and path, by name or by position from 0. Default: ``entity``
        and the first of ``path``, ``image``, ``picture``, ``file``, ``source``; without a header
        (no cell of the first line is ``entity``), the first two columns.
    separator : str, optional
        The character between the columns of a TSV or CSV table, such as ``;``. Default: a tab in
        TSV, a comma in CSV.
    skip_unknown : bool
        Whether to leave out, with a warning, views of entities that are not in the graph. Default:
        such views are an error.

    Returns
    -------
    RawViews
        The pictures are not opened: `imvia_graph.encode.encode_views` reports those that cannot be
        read.

    Raises
    ------
    DataError
        The folder or table does not exist or is empty, an entity is unknown, or a path leaves
        ``root``.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> images = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("Paris/1.png", "AC%2FDC/2.png", "AC%2FDC/1.png"):
    ...     (images / name).parent.mkdir(exist_ok=True)
    ...     _ = (images / name).write_bytes(b"")
    >>> raw = ig.io.read_images(images, ["AC/DC", "Paris"])
    >>> raw.entity.tolist(), raw.source
    ([0, 0, 1], ['AC%2FDC/1.png', 'AC%2FDC/2.png', 'Paris/1.png'])
    """
    source = Path(source).expanduser()
    if source.is_dir():
        if separator is not None:
            raise DataError(
                f"separator: {source} is a folder of pictures, not a table. Omit separator."
            )
        within = None if root is None else Path(root).expanduser()
        return _image_folders(source, of, skip_unknown, within)
    frame, where = _read_table(source, columns, separator, PATH_COLUMNS, "path")
    top = source.parent if root is None else Path(root).expanduser()
    _refuse_blank(frame["value"], where, "path")
    keep, entity = resolve(frame["entity"], of, where, skip_unknown)
    rows = keep.nonzero().flatten().tolist()
    paths = frame["value"].to_list()
    listed = [_inside(top, paths[row], where, row) for row in rows]
    return _raw("image", entity, listed, top)


def read_texts(
    source: str | os.PathLike[str],
    of: Entities,
    *,
    columns: tuple[Column, Column] | None = None,
    separator: str | None = None,
    skip_unknown: bool = False,
) -> RawViews:
    r"""Read texts and their entities from a table, with any number of rows per entity.

    Parameters
    ----------
    source : path
        TSV (one text per line, no quoting), CSV (RFC 4180), both also gzipped, or Parquet, where a
        row may hold a list of texts. Rows without a text are left out; white space around a text is
        stripped.
    of, separator, skip_unknown
        As for `read_images`.
    columns : pair of str or int, optional
        The columns of entity and text. Default: ``entity`` and the first of ``text``, ``caption``,
        ``description``, ``source``; without a header, the first two columns.

    Raises
    ------
    DataError
        The table does not exist or holds no text, an entity is unknown, or a text is not UTF-8.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> table = pathlib.Path(tempfile.mkdtemp()) / "texts.tsv"
    >>> _ = table.write_text("Paris\tcity\nLyon\tcity\nParis\tcapital\nParis\tcity\n")
    >>> raw = ig.io.read_texts(table, ["Lyon", "Paris"])
    >>> raw.entity.tolist(), raw.source, raw.repeated
    ([0, 1, 1], ['city', 'city', 'capital'], 1)
    """
    source = Path(source).expanduser()
    if source.is_dir():
        raise DataError(
            f"{source} is a folder; expected a table (TSV, CSV, Parquet) of entity and text."
        )
    frame, where = _read_table(source, columns, separator, TEXT_COLUMNS, "text")
    keep, entity = resolve(frame["entity"], of, where, skip_unknown)
    texts = frame["value"].fill_null("").str.strip_chars().to_list()
    known = keep.nonzero().flatten().tolist()
    rows = [row for row in known if texts[row]]
    if not rows:
        raise DataError(f"{where}: no row has a text; expected an entity and a text in each row.")
    if len(rows) < len(known):
        logger.warning(
            "%s: %d of %d rows have no text and are left out.",
            where,
            len(known) - len(rows),
            len(known),
        )
    place = torch.full((len(keep),), -1, dtype=torch.int64)
    place[keep] = entity
    return _raw("text", place[rows], [texts[row] for row in rows], None)


def _raw(modality: str, entity: Tensor, source: list[str], root: Path | None) -> RawViews:
    """Sort views by entity, stably, and drop repeated views of an entity."""
    frame = pl.DataFrame({"entity": entity.numpy(), "source": pl.Series(source, dtype=pl.String)})
    once = frame.unique(maintain_order=True).sort("entity", maintain_order=True)
    ids = torch.from_numpy(once["entity"].to_numpy().copy())
    return RawViews(
        modality, ids, once["source"].to_list(), root, repeated=frame.height - once.height
    )


def _image_folders(top: Path, of: Entities, skip_unknown: bool, within: Path | None) -> RawViews:
    bounds = (within or top).resolve()
    folders: list[str] = []
    aside: list[str] = []
    broken: list[tuple[str, str]] = []
    for entry in _visible(top):
        if not _is_folder(entry):
            aside.append(entry.name)
        elif not _is_text(entry.name):
            broken.append((_bytes_of(entry.name), _NOT_TEXT))
        elif entry.is_symlink() and not Path(entry).resolve().is_relative_to(bounds):
            # The folder is not listed, so that no names from outside of ``bounds`` leak.
            broken.append((f"{entry.name}/", f"it is a link that leads out of {bounds}"))
        else:
            folders.append(entry.name)
    if not folders and not broken:
        files_only = f" but {len(aside)} files" if aside else ""
        raise DataError(
            f"{top} holds no folders{files_only}; expected one folder per entity, with the entity's"
            " label as its name and its pictures inside: images/<entity>/*."
        )
    if not folders:
        name, reason = min(broken)
        raise DataError(f"{top}: none of its folders can be used. The first is {name}: {reason}.")
    folders.sort()
    # The name itself takes precedence over its decoded forms. macOS decomposes accented letters.
    spellings = (str, _composed, unquote, lambda name: _composed(unquote(name)))
    forms = [pl.Series([spell(name) for name in folders], dtype=pl.String) for spell in spellings]
    keep, owner = resolve_any(forms, of, Rows(f"{top}, folder names"), skip_unknown)
    entity: list[int] = []
    source: list[str] = []
    for folder, known, place in zip(folders, keep.tolist(), owner.tolist(), strict=True):
        if not known:
            continue
        files = []
        for entry in _visible(top / folder):
            if _is_folder(entry):
                aside.append(f"{folder}/{entry.name}/")
            elif _is_text(entry.name):
                files.append(entry.name)
            else:
                broken.append((f"{folder}/{_bytes_of(entry.name)}", _NOT_TEXT))
        source += [f"{folder}/{name}" for name in sorted(files)]
        entity += [place] * len(files)
    if not source:
        found = (
            f"; the first that was left out, {min(broken)[0]}: {min(broken)[1]}" if broken else ""
        )
        raise DataError(
            f"{top}: the folders of the entities hold no files; expected pictures{found}."
        )
    if aside:
        logger.warning(
            "%s: %d files beside the entities' folders or folders inside them are ignored, first"
            " %s. Pictures must be directly in the folder of their entity: images/<entity>/*.",
            top,
            len(aside),
            ", ".join(map(repr, sorted(aside)[:NAMED])),
        )
    raw = _raw("image", torch.tensor(entity, dtype=torch.int64), source, top)
    return raw._replace(broken=sorted(broken), within=within)


#: Why a file is left out whose name is not valid UTF-8.
_NOT_TEXT = "its name is not UTF-8"


def _is_text(name: str) -> bool:
    """Return whether a file name is valid UTF-8: Python decodes other bytes to lone surrogates."""
    return not re.search("[\ud800-\udfff]", name)


def _bytes_of(name: str) -> str:
    """Return the bytes of a file name that is not UTF-8, for messages."""
    return repr(os.fsencode(name))


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder, without hidden ones and `LITTER`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name.lower() not in LITTER:
                yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; circular links are not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _inside(root: Path, path: str, where: Rows, row: int) -> str:
    """Return the path relative to root, normalised; raise a DataError if it leaves root."""
    absolute = os.path.abspath(root)
    full = os.path.normpath(os.path.join(absolute, path))
    if "\0" in path or not (full + os.sep).startswith(os.path.join(absolute, "")):
        raise DataError(
            f"{where}, {where.at(row)}: the path {shorten(path)!r} leaves the folder {absolute}."
            " Name a folder that contains all paths (root=…, on the command line --images-root)."
        )
    return Path(full[len(os.path.join(absolute, "")) :]).as_posix()


# -- tables ---------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Format of a text table."""

    separator: str
    quoted: bool
    option: str  # the command-line option that sets the separator

    @property
    def by(self) -> str:
        """Name of the separator, for messages."""
        return SEPARATED.get(self.separator, repr(self.separator))


@dataclass(frozen=True)
class Rows:
    """Names of a table and its rows in messages: line numbers for text files, else row numbers.

    Attributes
    ----------
    name : str
        Name of the table, or the path of its file.
    numbers : Series, optional
        Position of each row in the table, from 0, if rows were exploded.
    layout : _Layout, optional
        Format of a text file; None for other tables.
    header : bool
        Whether the first row of a text file is a header.
    """

    name: str
    numbers: pl.Series | None = None
    layout: _Layout | None = None
    header: bool = False

    def __str__(self) -> str:
        return self.name

    def at(self, row: int) -> str:
        """Return the line or row number of a row, for messages."""
        if self.numbers is not None:
            row = int(self.numbers[row])
        if self.layout is not None:
            rows = read_rows(Path(self.name), self.layout.separator, self.layout.quoted)
            found = next(islice(rows, row + self.header, None), None)
            if found is not None:
                return f"line {found[0]}"
        return f"row {row + 1} (counted from 1)"


def _read_table(
    path: Path,
    columns: tuple[Column, Column] | None,
    separator: str | None,
    names: Sequence[str],
    what: Literal["path", "text"],
) -> tuple[pl.DataFrame, Rows]:
    """Read a frame of ``entity`` (text or integer) and ``value`` (text), with names of its rows."""
    if not path.is_file():
        folders = ", or a folder of folders of pictures" if what == "path" else ""
        raise DataError(
            f"{path}: there is no such file; expected a table of entity and {what}{folders}."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: expected a table of entity and {what}.")
    kind = _kind(path)
    where = Rows(str(path))
    if kind == ".parquet":
        if separator is not None:
            raise DataError(f"separator: {path} is Parquet, which has no separator. Omit it.")
        with unreadable(path, "a Parquet file"):
            check_parquet(path)
            frame = pl.read_parquet(path, glob=False)
    elif kind in (".tsv", ".txt", ".tab", ".csv"):
        if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
            raise DataError(f"separator: expected one character, received {separator!r}.")
        layout = _Layout(
            separator or ("," if kind == ".csv" else "\t"),
            kind == ".csv",
            "--image-separator" if what == "path" else "--text-separator",
        )
        frame, header = _read_text_table(path, layout, columns)
        where = Rows(str(path), layout=layout, header=header)
    else:
        raise DataError(
            f"{path}: expected a table of entity and {what}: .tsv, .csv (also .gz) or .parquet."
        )
    entity, value = _pick(frame, columns, names, str(path))
    frame = frame.select(pl.col(entity).alias("entity"), pl.col(value).alias("value"))
    if isinstance(frame.schema["value"], pl.List):
        frame = frame.with_row_index("number").explode("value")
        where = Rows(str(path), numbers=frame["number"])
    if frame.schema["value"] not in (pl.String, pl.Null):
        frame_type = frame.schema["value"]
        raise DataError(f"{where}, column {value!r}: expected text, found {frame_type}.")
    frame = frame.with_columns(pl.col("value").cast(pl.String))
    if not frame.height:
        raise DataError(f"{where} holds no rows: expected an entity and a {what} in each row.")
    if where.layout is not None and not where.layout.quoted:
        option = where.layout.option
        tab = typed(where.layout.separator)
        warn_of_quotes(
            path,
            frame.select("entity", "value"),
            f"rename the file to .csv and pass separator={where.layout.separator!r}"
            f" ({option} {tab})",
        )
    if not frame.schema["entity"].is_integer():
        frame = frame.with_columns(pl.col("entity").cast(pl.String, strict=False))
        _refuse_blank(frame["entity"], where, "entity")
    return frame, where


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst") and len(suffixes) > 1:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _read_text_table(
    path: Path, layout: _Layout, columns: tuple[Column, Column] | None
) -> tuple[pl.DataFrame, bool]:
    """Read all columns as text, named by the header if there is one; return whether there is."""
    _files.check_compressed(path)
    for number, cells in islice(read_rows(path, layout.separator, layout.quoted), 1):
        line = layout.separator.join(cells)
        refuse_separator_mark(f"{path}, line {number}", line, layout.option)
    frame = _read_fast(path, layout)
    if frame is None:
        frame = _read_by_line(path, layout)
    if _files.has_nul(frame):
        raise DataError(f"{path}: expected text, found a NUL byte.")
    first_row = ["" if cell is None else str(cell) for cell in frame.row(0)]
    if first_row[0].startswith(_files.BOM):
        first_row[0] = first_row[0].removeprefix(_files.BOM)
        first = pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(first_row[0]))
        frame = frame.with_columns(first.otherwise(pl.col("column_1")).alias("column_1"))
    if len(first_row) == 1:
        _name_another_separator(f"{path}, line 1", first_row[0], layout)
    named = columns is not None and any(isinstance(column, str) for column in columns)
    header = named or "entity" in first_row
    if header:
        if len(set(first_row)) < len(first_row):
            raise DataError(
                f"{path}, line 1: expected distinct column names, found {first_row}. Rename the"
                " repeated ones."
            )
        frame = frame.slice(1).rename(dict(zip(frame.columns, first_row, strict=True)))
    return frame, header


def _read_fast(path: Path, layout: _Layout) -> pl.DataFrame | None:
    """Read each line that is not blank as a row, vectorised; None if that may not be exact."""
    try:
        if layout.quoted and not quotes_are_plain(path, layout.separator):
            return None
        frame = pl.read_csv(
            path,
            has_header=False,
            separator=layout.separator,
            quote_char='"' if layout.quoted else None,
            infer_schema=False,
            glob=False,
        )
    except (pl.exceptions.PolarsError, OSError):
        return None
    # A null in the last column is an empty cell, a row that is too short, or a blank line.
    if frame[frame.columns[-1]].null_count():
        _check_widths(path, layout)
        if frame.select(pl.all_horizontal(pl.all().is_null()).any()).item():
            return None
    return frame


def _read_by_line(path: Path, layout: _Layout) -> pl.DataFrame:
    """Read the table line by line; a DataError names the first malformed line."""
    rows = [cells for _, cells in _rows(path, layout)]
    if not rows:
        raise DataError(f"{path} is empty: expected a table.")
    names = [f"column_{i}" for i in range(1, len(rows[0]) + 1)]
    return pl.DataFrame(rows, dict.fromkeys(names, pl.String), orient="row")


def _check_widths(path: Path, layout: _Layout) -> None:
    """Raise a DataError that names the first line that is not text or has another width."""
    for _ in _rows(path, layout):
        pass


def _rows(path: Path, layout: _Layout) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and cells; raise a DataError if lines differ in the number of cells."""
    columns = None
    for number, cells in read_rows(path, layout.separator, layout.quoted):
        if columns is None and len(cells) == 1:
            _name_another_separator(f"{path}, line {number}", cells[0], layout)
        columns = columns or len(cells)
        if len(cells) != columns:
            raise DataError(
                f"{path}, line {number}: expected {columns} columns separated by {layout.by}, found"
                f" {len(cells)}: {shorten(layout.separator.join(cells))!r}. Correct or remove"
                " the line."
            )
        yield number, cells


def _name_another_separator(where: str, line: str, layout: _Layout) -> None:
    """Raise a DataError if a first line of one cell seems to use another separator."""
    for mark in ("\t", ";", "|", ","):
        if mark in line and mark != layout.separator:
            raise DataError(
                f"{where}: expected two columns or more separated by {layout.by}, found"
                f" {SEPARATED[mark]}: {shorten(line)!r}. Pass separator={mark!r}"
                f" ({layout.option} {typed(mark)})."
            )


def _pick(
    frame: pl.DataFrame,
    columns: tuple[Column, Column] | None,
    names: Sequence[str],
    where: str,
) -> tuple[str, str]:
    if columns is None:
        if frame.width < 2:
            raise DataError(f"{where}: expected two columns or more, found {frame.width}.")
        entity = "entity" if "entity" in frame.columns else frame.columns[0]
        others = [name for name in frame.columns if name != entity]
        return entity, next((name for name in names if name in others), others[0])
    picked = []
    for column in columns:
        if isinstance(column, int):
            if not 0 <= column < frame.width:
                raise DataError(
                    f"{where}: there is no column {column}; expected 0 to {frame.width - 1}."
                )
            picked.append(frame.columns[column])
        elif column not in frame.columns:
            raise DataError(
                f"{where}: there is no column {column!r}; the columns are"
                f" {', '.join(map(repr, frame.columns))}."
            )
        else:
            picked.append(column)
    return picked[0], picked[1]


def _refuse_blank(column: pl.Series, where: Rows, what: str) -> None:
    blank = column.is_null() | (column == "")
    if blank.any():
        row = int(blank.arg_max() or 0)
        raise DataError(
            f"{where}, {where.at(row)}: the {what} is missing ({blank.sum()} such rows). Correct or"
            " remove the row."
        )


#: Exceptions that readers raise for a file of another format, or with a wrong size in it.
READERS = (
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    OSError,
    EOFError,
    ArithmeticError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    tokenize.TokenError,  # raised by NumPy's parser of headers written by Python 2
    zipfile.BadZipFile,
    zlib.error,
)


@contextmanager
def unreadable(path: Path, expected: str) -> Iterator[None]:
    """Turn the exceptions of a reader into a DataError that names the file."""
    try:
        yield
    except READERS as error:
        if isinstance(error, IMVIAError):
            raise
        raise DataError(
            f"{path}: expected {expected}; it cannot be read ({shorten(first_line(error), 200)})."
        ) from error


# -- entities -------------------------------------------------------------------------------------


def _labels(of: Entities) -> tuple[Sequence[str], Sequence[str], str]:
    """Return labels, display names, and the name of the whole in messages."""
    if isinstance(of, MultiViewKG):
        return of.entities, of.entity_names, of.title
    return of, of, "the list of entities"


def resolve(
    values: pl.Series, of: Entities, where: str | Rows, skip_unknown: bool
) -> tuple[Tensor, Tensor]:
    """Return which rows name an entity, (n,) bool, and the ids of these rows, (kept,) int64."""
    labels, _, whole = _labels(of)
    where = Rows(where) if isinstance(where, str) else where
    if values.dtype.is_integer():
        inside = values.is_between(0, len(labels) - 1)  # before the cast: ids may be of any size
        keep = torch.from_numpy(inside.to_numpy().copy())
        if not keep.all():
            row = int((~keep).nonzero()[0])
            _unknown(
                f"{where}: {int((~keep).sum())} rows name entity ids out of range, first"
                f" {values[row]} in {where.at(row)}; expected 0 to {len(labels) - 1}.",
                skip_unknown,
            )
            if not keep.any():
                raise DataError(
                    f"{where}: none of the {len(keep)} rows names an entity of {whole}."
                )
        ids = torch.from_numpy(values.filter(inside).cast(pl.Int64).to_numpy().copy())
        warn_of_numeric_labels(ids, labels, str(where))
        return keep, ids
    keep, ids = resolve_any([values], of, where, skip_unknown)
    return keep, ids[keep]


def warn_of_numeric_labels(ids: Tensor, labels: Sequence[str], where: str) -> None:
    """Warn if ids could also be meant as labels, because labels are numbers in another order.

    Files of triples with numeric labels are numbered in the order of first appearance.
    """
    distinct = ids.unique()
    as_label = pl.Series(distinct.numpy()).cast(pl.String)
    own = pl.Series("label", labels, dtype=pl.String).gather(pl.Series(distinct.numpy()))
    if not own.head(1000).str.contains(r"^\d+$").all():
        return
    moved = own != as_label
    if moved.any() and as_label.is_in(own.implode()).all():
        first = int(moved.arg_max() or 0)
        logger.warning(
            "%s: the labels of entities are numbers that are not in id order, and %d is read as an"
            " id, that of the entity with the label %r. That is right if ids are meant (rows in the"
            " order of kg.entities). If labels are meant, pass them as text, or load the graph with"
            " its labels in order (load_kg(..., entities=[...]), or a KG folder's entities.tsv).",
            where,
            int(distinct[first]),
            own[first],
        )


def resolve_any(
    forms: Sequence[pl.Series], of: Entities, where: Rows, skip_unknown: bool
) -> tuple[Tensor, Tensor]:
    """Resolve rows with several spellings, of which the first known one counts.

    Returns which rows name an entity, (n,) bool, and their ids, (n,) int64, -1 for unknown rows.
    """
    labels, names, whole = _labels(of)
    label = pl.Series("label", labels, dtype=pl.String)
    number = pl.Series("id", np.arange(len(label)), dtype=pl.Int64)
    by_label = pl.DataFrame([label, number])
    by_name = pl.DataFrame([pl.Series("label", names, dtype=pl.String), number])
    # Labels take precedence; a display name counts if one entity has it and no label equals it.
    once = by_name.filter(pl.col("label").is_unique()).join(by_label, on="label", how="anti")
    table = pl.concat([by_label, once])
    found = pl.Series("id", [None] * len(forms[0]), dtype=pl.Int64)
    for form in forms:
        query = pl.DataFrame({"label": form.cast(pl.String)})
        ids = query.join(table, on="label", how="left", maintain_order="left")["id"]
        found = pl.select(pl.coalesce(found, ids).alias("id"))["id"]
    missing = found.is_null()
    if missing.any():
        row = int(missing.arg_max() or 0)
        values = [form[row] for form in forms]
        shared = by_name.filter(pl.col("label").is_in(values))["label"]
        if len(shared):
            reason = f" {len(shared)} entities have this display name; use the label."
        else:
            near = nearest(values[-1], list(labels), limit=3)
            reason = f" The nearest known: {', '.join(map(repr, near))}." if near else ""
            if row == 0 and missing.sum() == 1 and where.layout is not None and not where.header:
                option = where.layout.option.replace("separator", "columns")
                reason = (
                    " If that is a header, call the column 'entity', or name both columns"
                    f" (columns=, on the command line {option})."
                )
        _unknown(
            f"{where}: {missing.sum()} of {len(found)} rows name"
            f" {forms[0].filter(missing).n_unique()} entities that are not in {whole}, first"
            f" {values[0]!r} in {where.at(row)}.{reason}",
            skip_unknown,
        )
    numbers = torch.from_numpy(found.fill_null(-1).to_numpy().copy())
    keep = numbers >= 0
    if not keep.any():
        raise DataError(f"{where}: none of the {len(found)} rows names an entity of {whole}.")
    return keep, numbers


def _unknown(message: str, skip_unknown: bool) -> None:
    if not skip_unknown:
        raise DataError(
            f"{message} Correct these rows, or leave them out (skip_unknown=True, on the command"
            " line --skip-unknown)."
        )
    logger.warning("%s They are left out.", message)
