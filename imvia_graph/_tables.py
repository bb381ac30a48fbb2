"""Tables of labels: TSV, CSV, columns separated by spaces, Parquet; plain, gzip or zstd.

The fast paths are vectorised (polars). If one fails, the file is read again line by line, to name
the malformed line, or to read a valid file that the fast path does not support.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import polars as pl

from imvia_graph import _files
from imvia_graph._display import first_line, shorten
from imvia_graph._files import TRIPLE_COLUMNS
from imvia_graph._parquet import check_parquet
from imvia_graph.errors import DataError

logger = logging.getLogger(__name__)

#: Separator that stands for any run of spaces and tabs.
SPACES = " "
#: Column names by which a header is recognised, in the order head, relation, tail.
HEADERS = (
    ("head", "relation", "tail"),
    ("h", "r", "t"),
    ("head_id", "relation_id", "tail_id"),
    ("subject", "predicate", "object"),
    ("subject", "relation", "object"),
    ("subj", "pred", "obj"),
    ("s", "p", "o"),
    ("source", "relation", "target"),
    ("source", "type", "target"),
    ("source", "label", "target"),
    ("src", "rel", "dst"),
    ("from", "relation", "to"),
)
#: Names of each column, for headers that mix them; compared without spaces, ``_``, ``-``, ``:``.
_NAMES = (
    {"head", "headid", "headentity", "subject", "subjectid", "subj", "source", "sourceid", "src"}
    | {"from", "fromid", "start", "startid", "entity1", "node1"},
    {"relation", "relationid", "relationship", "rel", "relid", "reltype", "predicate"}
    | {"predicateid", "pred", "property", "type", "label", "edge"},
    {"tail", "tailid", "tailentity", "object", "objectid", "obj", "target", "targetid", "dst"}
    | {"to", "toid", "end", "endid", "entity2", "node2"},
)
#: Number of triples from which on a first line is suspicious if its labels occur nowhere else.
_MIN_TRIPLES = 10
#: head, relation, tail, and the full stop at the end of a line in some files.
_SPACED_TRIPLE = r"^[ \t]*([^ \t\r]+)[ \t]+([^ \t\r]+)[ \t]+([^ \t\r]+)(?:[ \t]+\.)?[ \t\r]*$"
#: Rows that are collected before they are converted to a frame.
_ROWS = 2**18
#: Names of separators in messages.
SEPARATED = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars", SPACES: "spaces"}

Columns = Sequence[int] | Sequence[str]


def read_triples(
    path: Path,
    *,
    separator: str = "\t",
    quoted: bool = False,
    header: bool | None = False,
    columns: Columns | None = None,
) -> pl.DataFrame:
    """Read a text table of label triples: UTF-8, one triple per line.

    Blank lines are skipped. Labels are not stripped of spaces.

    Parameters
    ----------
    path : Path
        Plain, gzip or zstd.
    separator : str
        One character. A space stands for any run of spaces and tabs, and lines may end with a full
        stop; with ``quoted`` and a label in quotes, it stands for one space.
    quoted : bool
        Whether labels may be in double quotes, as in CSV (RFC 4180).
    header : bool, optional
        Whether the first line is a header; None detects it (`columns_by_name`).
    columns : sequence of int or of str, optional
        Positions (from 0) or names of the head, relation and tail columns.

    Returns
    -------
    DataFrame
        The string columns head, relation, tail, without nulls or empty labels.

    Raises
    ------
    DataError
        A line with too few or too many columns, an empty label, text that is not UTF-8, a truncated
        compressed file, or a missing column.
    """
    first = next(read_rows(path, separator, quoted), None)
    if first is None:
        return pl.DataFrame(schema=dict.fromkeys(TRIPLE_COLUMNS, pl.String))
    number, cells = first
    refuse_separator_mark(f"{path}, line {number}", separator.join(cells), "--separator")
    named = header if header is not None else bool(columns_by_name(cells))
    if header is None and columns is not None and isinstance(columns[0], str):
        named = True
    places = _places(f"{path}, line {number}", cells, named, columns, separator)
    if header is None and columns is None and not named:
        _check_order(f"{path}, line {number}", cells, places, is_header=False)
    skipped = _last_line(number, cells) if named else 0
    try:
        frame = _fast(path, separator, quoted, skipped, len(cells), places)
    except (pl.exceptions.PolarsError, OSError):
        frame = None
    if frame is None:
        frame = _slow(path, separator, quoted, skipped, len(cells), places)
    if header is None and not named and _stands_alone(frame):
        logger.warning(
            "%s, line %d: read as a triple, %s, although none of its labels occurs in another line."
            " If it is a header, pass header=True (--header).",
            path,
            number,
            _shown([cells[place] for place in places], separator),
        )
    if not quoted:
        advice = "pass format='csv' and the separator (--from csv --separator tab)"
        warn_of_quotes(path, frame, advice)
    return frame


def warn_of_quotes(path: Path, frame: pl.DataFrame, advice: str) -> None:
    """Warn of cells in double quotes, which may be meant as CSV quotes but are kept as text."""
    text = pl.col(pl.String)
    begin = frame.select(pl.any_horizontal(text.str.starts_with('"').any()))
    if not begin.width or not begin.item():  # faster than counting
        return
    count = sum(frame.select(text.str.contains('^"(?:[^"]|"")*"$').sum()).row(0))
    if count:
        logger.warning(
            "%s: labels or texts in double quotes: %d. The quotes are kept as part of them; if they"
            " are CSV quotes, %s.",
            path,
            count,
            advice,
        )


def columns_by_name(cells: Sequence[str]) -> tuple[int, int, int] | None:
    """Return the positions of head, relation and tail if the cells are a header, else None.

    A header has the names of one of `HEADERS`, or one name each of a head, relation and tail.

    >>> from imvia_graph._tables import columns_by_name
    >>> columns_by_name(["id", ":START_ID", ":TYPE", ":END_ID"])
    (1, 2, 3)
    """
    lower = [cell.strip().lower() for cell in cells]
    for head, relation, tail in HEADERS:
        if all(lower.count(name) == 1 for name in (head, relation, tail)):
            return lower.index(head), lower.index(relation), lower.index(tail)
    heads, found, tails = _named(cells)
    if len(heads) == len(found) == len(tails) == 1:
        return heads[0], found[0], tails[0]
    return None


def may_be_header(cells: Sequence[str]) -> bool:
    """Return whether a first line of these cells is a header, or refused as a likely one."""
    heads, _, tails = _named(cells)
    return columns_by_name(cells) is not None or len(heads) == len(tails) == 1


def _named(cells: Sequence[str]) -> list[list[int]]:
    """Return the positions of the cells that name a head, a relation and a tail."""
    bare = [re.sub(r"[\s_:-]", "", cell.lower()) for cell in cells]
    return [[place for place, cell in enumerate(bare) if cell in names] for names in _NAMES]


def _check_order(
    where: str, cells: Sequence[str], places: tuple[int, int, int], is_header: bool
) -> None:
    """Raise a DataError if cells name a head and a tail column but no relation column.

    Such a header is accepted if its head and tail are where ``places`` has them. A first line that
    is not known to be a header is refused, because it may be a header or a triple.
    """
    heads, _, tails = _named(cells)
    if len(heads) != 1 or len(tails) != 1:
        return
    if not is_header or (places[0], places[2]) != (heads[0], tails[0]):
        raise DataError(
            f"{where}: {cells[heads[0]]!r} and {cells[tails[0]]!r} seem to name the head and tail"
            f" columns, but no cell is known to name the relation: {', '.join(map(repr, cells))}."
            " Name the columns with columns=(head, relation, tail) (--columns), by position from 0"
            " or by name; or, if this line of a file is a triple, pass header=False (--no-header)."
        )


def _stands_alone(frame: pl.DataFrame) -> bool:
    """Return whether no label of the first triple recurs, if there are enough triples."""
    if frame.height < _MIN_TRIPLES:
        return False
    head, relation, tail = frame.row(0)
    rest = frame.lazy().slice(1)
    ends = (pl.col("head").is_in([head, tail]) | pl.col("tail").is_in([head, tail])).any()
    # The relation of a triple usually recurs early, so that 1,000 triples suffice.
    for triples in (rest.head(1000), rest):
        if triples.select(((pl.col("relation") == relation).any()) | ends).collect().item():
            return False
    return True


def _places(
    where: str, cells: Sequence[str], named: bool, columns: Columns | None, separator: str | None
) -> tuple[int, int, int]:
    """Return the positions of the head, relation and tail columns."""
    if columns is None:
        found = columns_by_name(cells) if named else None
        if found:
            return found
        if len(cells) == 3:
            return 0, 1, 2
        if len(cells) == 1 and separator is not None:
            other = _another_separator(cells, separator)
            if other is not None:
                raise DataError(
                    f"{where}: expected three columns separated by"
                    f" {SEPARATED.get(separator, repr(separator))}, found {SEPARATED[other]}:"
                    f" {_shown(cells, separator)}. Pass separator={other!r} (--separator"
                    f" {typed(other)})."
                )
        by = f" separated by {SEPARATED.get(separator, repr(separator))}" if separator else ""
        raise DataError(
            f"{where}: expected three columns{by} (head, relation, tail), found"
            f" {_count(len(cells))}: {_shown(cells, separator)}. Correct the file, or name the"
            " columns with columns=(head, relation, tail) (--columns), by position from 0 or by"
            " name in the header."
        )
    if len(columns) != 3:
        raise DataError(
            f"columns: expected three columns (head, relation, tail), received {columns!r}."
        )
    places = []
    for column in columns:
        if isinstance(column, str):
            if not named:
                raise DataError(
                    f"columns: {column!r} is a name, but {where.partition(',')[0]} has no header."
                    " Pass positions from 0."
                )
            if list(cells).count(column) != 1:
                raise DataError(
                    f"{where}: expected one column {column!r} in the header, found the columns"
                    f" {', '.join(map(repr, cells))}."
                )
            places.append(list(cells).index(column))
        elif 0 <= column < len(cells):
            places.append(int(column))
        else:
            raise DataError(
                f"{where}: there is no column {column}; expected 0 to {len(cells) - 1}."
            )
    if len(set(places)) < 3:
        raise DataError(
            f"columns: expected three different columns (head, relation, tail), received"
            f" {columns!r} ({where})."
        )
    return places[0], places[1], places[2]


def _another_separator(cells: Sequence[str], separator: str) -> str | None:
    """Return the separator that seems to separate three columns of a line, if it is another one."""
    line = separator.join(cells)
    marks = (mark for mark in ("\t", ";", ",", "|") if mark != separator)
    return next((mark for mark in marks if line.count(mark) >= 2), None)


def typed(separator: str) -> str:
    """Return a separator as it is typed on the command line."""
    return {"\t": "tab", " ": "space"}.get(separator, repr(separator))


def refuse_separator_mark(where: str, line: str, option: str) -> None:
    """Raise a DataError if a first line is ``sep=;``, which names the separator to Excel."""
    mark = re.fullmatch(r'"?sep=(.)"?', line.strip(" \r"))
    if mark:
        raise DataError(
            f"{where}: {line!r} names the separator for Excel and is not a row. Remove the line,"
            f" and pass separator={mark[1]!r} ({option} {typed(mark[1])})."
        )


def _fast(
    path: Path,
    separator: str,
    quoted: bool,
    skipped: int,
    width: int,
    places: tuple[int, int, int],
) -> pl.DataFrame | None:
    """Read the triples, vectorised; None if the file must be read line by line."""
    if separator == SPACES:
        lines = _files.scan_lines(path).slice(skipped)
        groups = pl.col("line").str.extract_groups(_SPACED_TRIPLE)
        names = dict(zip(("1", "2", "3"), TRIPLE_COLUMNS, strict=True))
        frame = (
            lines.filter(pl.col("line").str.contains(r"[^ \t\r]"))
            .select(groups.alias("triple"))
            .unnest("triple")
            .rename(names)
            .collect()
        )
        frame = frame.select([TRIPLE_COLUMNS[place] for place in places])
        frame.columns = list(TRIPLE_COLUMNS)
    elif quoted and not quotes_are_plain(path, separator, skipped):
        return None
    else:
        schema = dict.fromkeys((f"{i}" for i in range(width)), pl.String)
        chosen = [
            pl.col(str(place)).alias(name)
            for place, name in zip(places, TRIPLE_COLUMNS, strict=True)
        ]
        # The last cell is null in a line that is too short, and in one with an empty last cell.
        short = pl.col(str(width - 1)).is_null().alias("short")
        blank = pl.all_horizontal(pl.all().is_null()).alias("blank")
        frame = (
            pl.scan_csv(
                path,
                has_header=False,
                separator=separator,
                quote_char='"' if quoted else None,
                schema=schema,
                skip_lines=skipped,
                glob=False,
            )
            .select(*chosen, short, blank)
            .collect()
        )
        if frame["short"].any():
            if not _has_width(path, separator, quoted, skipped, width):
                return None
            frame = frame.filter(~pl.col("blank"))
        frame = frame.drop("short", "blank")
    if sum(frame.null_count().row(0)) or _files.has_nul(frame):
        return None
    if separator == SPACES and (frame["tail"] == ".").any():
        return None
    if separator == SPACES and quoted:
        begin = pl.all().str.starts_with('"').any()
        if frame.select(pl.any_horizontal(begin)).item():
            return None
    if quoted and frame.select(pl.any_horizontal((pl.all() == "").any())).item():
        return None
    return frame


def _has_width(path: Path, separator: str, quoted: bool, skipped: int, width: int) -> bool:
    """Return whether every line that is not blank has ``width`` cells, not all empty; vectorised.

    False if a quote is used in any other way than around a cell within one line.
    """
    line = pl.col("line")
    empty = line.str.contains(f"^{re.escape(separator)}[{re.escape(separator)}\r]*$")
    good = line.str.contains("^\r*$") | (_is_whole(separator, quoted, f"{{{width - 1}}}") & ~empty)
    return bool(_files.scan_lines(path).slice(skipped).select(good.all()).collect().item())


def quotes_are_plain(path: Path, separator: str, skipped: int = 0) -> bool:
    """Return whether all quotes are valid CSV and no quoted cell holds a line break; vectorised.

    Otherwise, the fast reader may read lines as part of a label, or misread a quote.
    """
    lines = _files.scan_lines(path).slice(skipped)
    lines = lines.filter(pl.col("line").str.contains('"', literal=True))
    return bool(lines.select(_is_whole(separator, True, "*").all()).collect().item())


def _is_whole(separator: str, quoted: bool, times: str) -> pl.Expr:
    """Return an expression: a line is a cell and more cells ``times`` (a regex quantifier)."""
    between = re.escape(separator)
    cell = f"[^{between}]*"
    if quoted:
        cell = f'(?:[^{between}"]*|"(?:[^"]|"")*")'
    return pl.col("line").str.contains(f"^{cell}(?:{between}{cell}){times}\\r*$")


def _slow(
    path: Path,
    separator: str,
    quoted: bool,
    skipped: int,
    width: int,
    places: tuple[int, int, int],
) -> pl.DataFrame:
    """Read the triples line by line; a DataError names the first malformed line."""
    frames = []
    rows: list[list[str]] = []
    several: list[tuple[int, int]] = []  # records of several lines: first line, number of lines
    for number, cells in read_rows(path, separator, quoted):
        if number <= skipped:
            continue
        if len(cells) != width:
            expected = f"{_count(width)} separated by {SEPARATED.get(separator, repr(separator))}"
            if width == 3:
                expected += " (head, relation, tail)"
            other = _another_separator(cells, separator)
            advice = "Correct or remove the line"
            if other is not None and (len(cells) == 1 or separator == SPACES):
                advice += (
                    f"; or, if {SEPARATED[other]} separate the columns, pass separator={other!r}"
                    f" (--separator {typed(other)})"
                )
            raise DataError(
                f"{path}, line {number}: expected {expected}, found {_count(len(cells))}:"
                f" {_shown(cells, separator)}. {advice}."
            )
        row = [cells[place] for place in places]
        if not all(row):
            raise DataError(
                f"{path}, line {number}: expected three columns (head, relation, tail), found an"
                f" empty one: {_shown(cells, separator)}. Correct or remove the line."
            )
        if quoted and "\n" in "".join(cells):
            several.append((number, _last_line(number, cells) - number + 1))
        rows.append(row)
        if len(rows) == _ROWS:
            frames.append(_frame(rows))
            rows.clear()
    if several:
        first = several[0]
        longest = max(several, key=lambda record: record[1])
        logger.warning(
            "%s, line %d: a quoted cell contains line breaks, so that %d lines are one row;"
            " such rows: %d, the longest of %d lines from line %d on. If that is not intended, a"
            " closing quote is missing there.",
            path,
            *first,
            len(several),
            longest[1],
            longest[0],
        )
    frames.append(_frame(rows))
    return pl.concat(frames)


def _frame(rows: Sequence[Sequence[str]]) -> pl.DataFrame:
    """Convert rows of three labels to a frame."""
    columns = zip(*rows, strict=True) if rows else [()] * 3
    return pl.DataFrame(
        {
            name: pl.Series(list(column), dtype=pl.String)
            for name, column in zip(TRIPLE_COLUMNS, columns, strict=True)
        }
    )


def _last_line(number: int, cells: Sequence[str]) -> int:
    """Return the last line of a record that begins at a line; CSV cells may hold line breaks."""
    return number + sum(cell.count("\n") for cell in cells)


def _count(number: int) -> str:
    if number == 3:
        return "three columns"
    return f"{number} column{'s' if number != 1 else ''}"


def _shown(cells: Sequence[str], separator: str | None) -> str:
    return repr(shorten((separator or ", ").join(cells)))


def read_rows(path: Path, separator: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is not blank.

    If quoted cells hold line breaks, the number is that of the first line of the record.
    """
    lines = _files.read_lines(path)
    if quoted:
        yield from _read_quoted(path, separator, lines)
    elif separator == SPACES:
        for number, line in lines:
            cells = re.split(r"[ \t]+", line.strip(" \t"))
            if len(cells) in (3, 4) and cells[-1] == ".":
                cells.pop()
            if cells != [""]:
                yield number, cells
    else:
        for number, line in lines:
            if line:
                yield number, line.split(separator)


def _read_quoted(
    path: Path, separator: str, lines: Iterator[tuple[int, str]]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of each CSV record."""
    begin, text = 1, ""

    def feed() -> Iterator[str]:
        nonlocal text
        for number, line in lines:
            if number == begin:
                text = line
            yield line + "\n"

    csv.field_size_limit(2**31 - 1)  # other forms do not limit the length of cells either
    reader = csv.reader(feed(), delimiter=separator, strict=True)
    try:
        for cells in reader:
            if cells:
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        end = reader.line_num
        where = f"{path}, line {begin}: expected a CSV record, found"
        advice = (
            f" {shorten(text)!r}. Correct the line: a cell that contains a quote must be quoted,"
            ' and the quote in it doubled ("5"" pipe").'
        )
        if "unexpected end" in str(error):
            what = f"an opening quote that is never closed, up to line {end}, the last one:"
        elif "expected after" in str(error):
            closed = f" in line {end}" if end > begin else ""
            what = f"text after the quote that closes a label{closed}:"
        else:
            raise DataError(f"{where} {shorten(text)!r} ({error}). Correct the line.") from None
        raise DataError(f"{where} {what}{advice}") from None


def read_parquet_triples(path: Path, columns: Columns | None = None) -> pl.DataFrame:
    """Read a Parquet file of label triples; an integer 17 becomes the label ``17``.

    Parameters
    ----------
    path : Path
        The file.
    columns : sequence of int or of str, optional
        Positions or names of the head, relation and tail columns. Default: the columns with known
        names (`columns_by_name`), or the only three columns.

    Raises
    ------
    DataError
        The file is not Parquet, a column is missing or holds no labels, or a label is empty.
    """
    try:
        check_parquet(path)
        return frame_of_triples(pl.scan_parquet(path, glob=False), str(path), columns)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        detail = shorten(first_line(error), 200)
        raise DataError(
            f"{path}: expected a Parquet file; it cannot be read ({detail}). It may be truncated:"
            " download or create it again."
        ) from error


def frame_of_triples(table: pl.LazyFrame, where: str, columns: Columns | None) -> pl.DataFrame:
    """Return the head, relation and tail columns of a frame, checked; integers become labels."""
    schema = table.collect_schema()
    places = _places(where, schema.names(), True, columns, None)
    if columns is None and columns_by_name(schema.names()) is None:
        _check_order(where, schema.names(), places, is_header=True)
    for place in places:
        dtype = schema.dtypes()[place]
        if dtype.is_float():
            _refuse_missing_integers(table, schema.names()[place], where)
        if not (dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
            raise DataError(
                f"{where}: expected labels (text or integers) in the column"
                f" {schema.names()[place]!r}, found {dtype}. Name the columns to read with"
                " columns=."
            )
    frame = table.select(
        pl.col(schema.names()[place]).cast(pl.String).alias(name)
        for place, name in zip(places, TRIPLE_COLUMNS, strict=True)
    ).collect()
    bad = frame.select(pl.any_horizontal(pl.all().is_null() | (pl.all() == ""))).to_series()
    if bad.any():
        row = int(bad.arg_true()[0])
        raise DataError(
            f"{where}, row {row + 1} (counted from 1): expected three labels (head, relation,"
            f" tail), found {frame.row(row)!r}. Correct or remove the row."
        )
    return frame


def _refuse_missing_integers(table: pl.LazyFrame, name: str, where: str) -> None:
    """Raise a DataError if a float column holds integers of which some are missing."""
    column = table.select(pl.col(name).fill_nan(None)).collect().to_series()
    missing, there = column.is_null(), column.drop_nulls()
    if missing.any() and (there == there.floor()).all():
        raise DataError(
            f"{where}, row {int(missing.arg_true()[0]) + 1} (counted from 1): the label in the"
            f" column {name!r} is missing ({missing.sum()} such rows), so that its integers are"
            " stored as floats. Correct or remove the row, and convert the column to integers."
        )


def read_numbered_labels(path: Path, *, announced: bool | None = None) -> list[str]:
    """Read labels in id order from lines of a label and its id, as in ``entity2id.txt``.

    Parameters
    ----------
    path : Path
        The file. The id is the last column; labels may contain spaces.
    announced : bool, optional
        Whether the first line is the number of lines that follow; None detects a single number.

    Raises
    ------
    DataError
        A line is not a label and an id, an id is repeated or missing, or the count is wrong.
    """
    return _numbered_fast(path, announced) or _numbered_by_line(path, announced)


def _numbered_fast(path: Path, announced: bool | None) -> list[str] | None:
    try:
        lines = _files.scan_lines(path).collect()["line"]
        lines = lines.filter(lines.str.contains(r"\S"))
        count = None
        if announced is not False and len(lines) and re.fullmatch(r"[0-9]{1,18}\s*", lines[0]):
            count, lines = int(lines[0]), lines.slice(1)
        groups = lines.str.extract_groups(r"^\s*(.*\S)\s+([0-9]{1,18})\s*$").struct
        labels, ids = groups.field("1"), groups.field("2").cast(pl.Int64)
    except (pl.exceptions.PolarsError, OSError):
        return None
    length = len(lines)
    if not length or (announced and count is None) or (count is not None and count != length):
        return None
    if labels.null_count() or _files.has_nul(labels.to_frame()) or ids.max() != length - 1:
        return None
    if ids.n_unique() != length:
        return None
    return labels.gather(ids.arg_sort()).to_list()


def _numbered_by_line(path: Path, announced: bool | None) -> list[str]:
    count: int | None = None
    by_id: dict[int, str] = {}
    first = True
    for number, line in _files.read_lines(path):
        if not line.strip():
            continue
        if first:
            first = False
            if announced or (announced is None and is_number(line.strip())):
                count = announced_count(path, number, line)
                continue
        fields = line.rsplit(None, 1)
        if len(fields) != 2 or not is_number(fields[1]):
            raise DataError(
                f"{path}, line {number}: expected a label and its id, found {shorten(line)!r}."
            )
        label, value = fields[0].strip(), int(fields[1])
        if value in by_id:
            raise DataError(
                f"{path}, line {number}: the id {value} already belongs to {by_id[value]!r}; ids"
                " must be distinct."
            )
        by_id[value] = label
    if announced or count is not None:
        check_count(path, count, len(by_id))
    if not by_id and not announced:
        raise DataError(f"{path} is empty: expected a label and its id on each line.")
    missing = next((i for i in range(len(by_id)) if i not in by_id), None)
    if missing is not None:
        raise DataError(f"{path}: expected the ids 0 to {len(by_id) - 1}; {missing} is missing.")
    return [by_id[i] for i in range(len(by_id))]


def announced_count(path: Path, number: int, line: str) -> int:
    """Parse the first line of a file as the number of lines that follow."""
    if not is_number(line.strip()):
        raise DataError(
            f"{path}, line {number}: expected the number of lines that follow, found"
            f" {shorten(line)!r}."
        )
    return int(line)


def is_number(text: str) -> bool:
    """Return whether a text is a count or an id: digits of a number that fits into 64 bits."""
    return text.isdecimal() and len(text) <= 18


def check_count(path: Path, count: int | None, found: int) -> None:
    """Raise a DataError if the announced number of lines is not the number that follows."""
    if count is None:
        raise DataError(f"{path} is empty: expected the number of lines, then the lines.")
    if count != found:
        raise DataError(
            f"{path}, line 1: the file announces {count} lines, but {found} follow. It may be"
            " truncated: download it again, or correct the count."
        )


def check_no_outer_spaces(path: Path, labels: Sequence[str]) -> None:
    """Raise a DataError for labels with a space at an end, which a file of labels and ids loses."""
    column = pl.Series(labels, dtype=pl.String)
    bad = column.filter(column.str.strip_chars() != column)
    if len(bad):
        raise DataError(
            f"{path}: {len(bad)} labels begin or end with a space, first {bad[0]!r}, which this"
            " layout would lose. Rename them, or write another form."
        )


def write_table(
    path: Path,
    frame: pl.DataFrame,
    *,
    separator: str = "\t",
    quoted: bool = False,
    header: bool = False,
    follow: bool = False,
) -> None:
    """Write a table atomically, compressed if its name ends in ``.gz`` or ``.zst``."""
    compression: Literal["uncompressed", "gzip", "zstd"] = "uncompressed"
    if path.suffix in (".gz", ".zst"):
        compression = "gzip" if path.suffix == ".gz" else "zstd"

    def write(temporary: Path) -> None:
        frame.write_csv(
            temporary,
            include_header=header,
            separator=separator,
            quote_style="necessary" if quoted else "never",
            compression=compression,
            check_extension=False,
        )

    _files.write_atomically(path, write, follow=follow)


def write_lines(path: Path, lines: pl.Series, *, follow: bool = False) -> None:
    """Write one text per line, atomically, compressed as by `write_table`."""
    write_table(path, lines.to_frame(), follow=follow)
