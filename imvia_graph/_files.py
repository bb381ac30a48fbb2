"""Reading and writing of lines, tables, tensors and JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imvia_graph._display import bounded, first_line, shorten
from imvia_graph.errors import DataError, IMVIAError, StorageError

TRIPLE_COLUMNS = ("head", "relation", "tail")
#: Magic bytes of compressed files.
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
#: Limit of decompressed sizes: this multiple of the file size, or this number of bytes if larger.
#: Tables shrink to a tenth, padded features to a fiftieth, decompression bombs to a thousandth.
RATIO, SMALL = 200, 2**26
#: The highest compression ratio of gzip and zip.
_DEFLATE = 1032
#: Byte order mark, with which Windows programs begin UTF-8 text; it is not part of the text.
BOM = "\ufeff"


def scan_lines(path: Path) -> pl.LazyFrame:
    """Scan a plain, gzip or zstd file as a column ``line``, without a byte order mark."""
    check_compressed(path)
    lines = pl.scan_lines(path, glob=False)
    first = lines.head(1).collect()
    if not first.height or not first["line"][0].startswith(BOM):
        return lines
    return pl.concat(
        [first.lazy().select(pl.col("line").str.strip_prefix(BOM)), lines.slice(1)],
    )


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers, from 1, and lines without line ends.

    Raises a DataError if the file is not UTF-8 text.
    """
    with open_input(path) as file:
        for number, raw in enumerate(_pieces(path, file), 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: expected UTF-8 text, found the byte"
                    f" 0x{raw[error.start]:02x} at column {error.start + 1}. Convert the file to"
                    " UTF-8 (for example with iconv)."
                ) from None
            if "\0" in line:
                raise DataError(
                    f"{path}, line {number}: expected text, found a NUL byte. Convert the file to"
                    " UTF-8 text."
                )
            yield number, line.rstrip("\r\n")


def _pieces(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a plain, gzip or zstd file; raise a DataError for damaged compression."""
    mark = file.read(4)
    file.seek(0)
    try:
        if mark.startswith(GZIP):
            yield from gzip.GzipFile(fileobj=file)
        elif mark == ZSTD:
            # The first lines are read separately, for callers that read no more.
            first = pl.read_lines(path, glob=False, n_rows=100)["line"]
            yield from (line.encode() for line in first)
            lines = pl.read_lines(path, glob=False)["line"] if len(first) == 100 else first
            for start in range(100, len(lines), 100_000):
                yield from (line.encode() for line in lines.slice(start, 100_000))
        else:
            yield from file
    except (EOFError, OSError, zlib.error, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{path}: the compressed data cannot be read to its end ({error}). The file may be"
            " truncated: download or create it again."
        ) from error


@contextmanager
def open_input(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes; raise a DataError if that fails."""
    check_compressed(path)
    try:
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}.") from error
    with file:
        yield file


def check_compressed(path: Path) -> None:
    """Raise a DataError if a gzip or zstd file holds far more data than its size suggests."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return
        with path.open("rb") as file:
            mark = file.read(4)
    except (OSError, ValueError):
        return  # the reader of the file reports the error
    if mark.startswith(GZIP) and found.st_size * _DEFLATE > SMALL:
        _count(path, "gzip", found.st_size, found.st_mtime_ns)
    elif mark == ZSTD:
        _count(path, "zstd", found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _count(path: Path, kind: str, size: int, changed: int) -> None:
    """Decompress a file up to its limit, once for each version; raise a DataError beyond it."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    limit = max(SMALL, RATIO * size)
    held = 0
    try:
        with gzip.open(path) if kind == "gzip" else zstd.open(path) as file:
            while piece := file.read(2**20):
                held += len(piece)
                if held > limit:
                    break
    except (EOFError, OSError, zlib.error, zstd.ZstdError, MemoryError):
        return  # the reader of the file reports the error
    if held > limit:
        raise DataError(_bomb(path, size, f"more than {limit:,}"))


def check_archive(path: Path) -> None:
    """Raise a DataError if a zip archive, such as an npz or pth file, claims far too much data."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            held = sum(member.file_size for member in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, EOFError):
        return  # not an archive, or the reader of the file reports the error
    if held > max(SMALL, RATIO * size):
        raise DataError(_bomb(path, size, f"{held:,}"))


def _bomb(path: Path, size: int, held: str) -> str:
    return (
        f"{path}: a file of {size:,} bytes that decompresses to {held} is refused as a"
        " decompression bomb. If you trust the file, decompress it yourself."
    )


@contextmanager
def open_text(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain, gzip or zstd file at the first byte of its text, after a byte order mark."""
    with open_input(path) as file:
        mark = file.read(4)
        file.seek(0)
        if mark.startswith(GZIP):
            with gzip.GzipFile(fileobj=file) as opened:
                _skip_mark(opened)
                yield cast("IO[bytes]", opened)
        elif mark == ZSTD:
            text = io.BytesIO(b"\n".join(_pieces(path, file)))
            _skip_mark(text)
            yield text
        else:
            _skip_mark(file)
            yield file


def _skip_mark(file: IO[bytes] | gzip.GzipFile) -> None:
    if file.read(3) != BOM.encode():
        file.seek(0)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder; raise a DataError if it leads out of the folder."""
    path = folder / name
    if path.is_symlink() or ".." in Path(name).parts or path.parent.is_symlink():
        target, root = path.resolve(), folder.resolve()
        if not target.is_relative_to(root):
            raise DataError(
                f"{path} leaves the folder: it leads to {target}. Copy the file into {folder}, or"
                " load it from its own folder."
            )
    return path


def read_label_table(path: Path, column: str) -> tuple[pl.Series, pl.Series | None]:
    """Read ``entities.tsv`` or ``relations.tsv``: labels in id order, and display names if any.

    The header names the columns: ``entity`` (or ``relation``) and, optionally, ``name``. Other
    columns are ignored.
    """
    return _label_table_fast(path, column) or _label_table_by_line(path, column)


def _label_table_fast(path: Path, column: str) -> tuple[pl.Series, pl.Series | None] | None:
    """Read the table, vectorised; None if it must be read line by line."""
    check_compressed(path)
    try:
        frame = pl.read_csv(
            path,
            separator="\t",
            quote_char=None,
            infer_schema=False,
            glob=False,
            missing_columns="raise",
        )
    except (pl.exceptions.PolarsError, OSError):
        return None
    # The last cell is null in a line that is too short, and if it is empty.
    last = frame.columns[-1]
    if column not in frame.columns or frame[column].null_count() or frame[last].null_count():
        return None
    if has_nul(frame):
        return None
    names = frame["name"].fill_null("") if "name" in frame.columns else None
    return frame[column], names


def has_nul(frame: pl.DataFrame) -> bool:
    """Return whether any cell of text columns holds a NUL byte, as in files that are not text."""
    found = frame.select(pl.any_horizontal(pl.all().str.contains("\0", literal=True).any()))
    return bool(found.item())


def _label_table_by_line(path: Path, column: str) -> tuple[pl.Series, pl.Series | None]:
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
    name_column = pl.Series("name", names, dtype=pl.String) if "name" in header else None
    return pl.Series(column, labels, dtype=pl.String), name_column


def read_view_table(path: Path) -> tuple[pl.Series, pl.Series | None]:
    """Read ``views/<modality>.csv`` (RFC 4180, header ``entity,source``).

    Returns the labels of the entities, and the sources: "" for an unknown one, None if all are.
    """
    check_compressed(path)
    try:
        frame = pl.read_csv(path, infer_schema=False, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            f"{path}: expected a CSV table in UTF-8 with the header entity,source:"
            f" {first_line(error)}."
        ) from error
    if "entity" not in frame.columns:
        raise DataError(
            f"{path}, line 1: expected a header with the column 'entity' (and 'source'), found"
            f" {frame.columns}."
        )
    source = known_texts(frame["source"]) if "source" in frame.columns else None
    return frame["entity"].fill_null(""), source


def known_texts(texts: pl.Series) -> pl.Series | None:
    """Replace null texts by ""; return None if all texts are empty."""
    if texts.null_count() == len(texts):
        return None
    texts = texts.fill_null("")
    return texts if (texts != "").any() else None


def read_features(path: Path, key: str = "feat") -> Tensor:
    """Return the tensor ``feat`` of a safetensors file, memory-mapped."""
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


def portions(feat: Tensor) -> Iterator[Tensor]:
    """Yield features (V, d) in blocks of rows, as mapped features may be larger than memory."""
    yield from feat.split(max(1, 2**21 // max(1, feat[:1].nbytes)))


def check_target(path: Path, *, follow: bool = True) -> None:
    """Raise a DataError if a path exists and is not a file, such as a folder or a device.

    Links are followed; without ``follow``, a link counts as a file.
    """
    try:
        kind = path.stat(follow_symlinks=follow).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(kind):
        raise DataError(f"{path} is a folder; expected the name of a file to write.")
    if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
        raise DataError(
            f"{path} is a device, a pipe or a socket, which a file would replace. Expected the name"
            " of a file to write."
        )


def write_atomically(
    path: Path,
    write: Callable[[Path], None],
    previous: Path | None = None,
    *,
    follow: bool = False,
) -> None:
    """Write to a temporary file beside ``path``, flush it to disk, then rename it to ``path``.

    A reader sees either the old file or the new one. With ``previous``, the old file is kept under
    that name. A link is replaced, so that links in a folder from elsewhere cannot redirect writes;
    with ``follow``, for files that a user names, the target of the link is replaced.

    Raises
    ------
    DataError
        ``path`` is a folder, a device or the like.
    StorageError
        The disk is full; ``path`` and ``previous`` are unchanged.
    """
    check_target(path, follow=follow)
    if follow and path.is_symlink():
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        with storing(path), _naming(path):
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=_aside(path))
            os.close(handle)
            temporary = Path(name)
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # mkstemp creates private files; give this one the usual permissions.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            if previous is not None and path.exists():
                _keep(path, previous)
            temporary.replace(path)
            _flush_folder(path.parent)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make errors of the system name ``path`` instead of the temporary file beside it."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if not isinstance(named, str) or not Path(named).name.startswith(_aside(path)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _aside(path: Path) -> str:
    """Return the prefix of the names of temporary files for ``path``.

    A long name is cut, because a file name has at most 255 bytes.
    """
    return f".{path.name[:50]}."


def remove_unfinished(path: Path) -> None:
    """Remove temporary files of killed writers of ``path``; no writer may be running."""
    for left in path.parent.glob(f"{_aside(path)}*"):
        left.unlink(missing_ok=True)


def _keep(path: Path, previous: Path) -> None:
    """Link a file under a second name, so that at any moment one of the two exists."""
    link = path.with_name(f"{_aside(path)}link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        path.replace(previous)
    else:
        link.replace(previous)


def link_atomically(source: Path, path: Path) -> bool:
    """Hard-link a file under a second name; return False if that is impossible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path.with_name(f"{_aside(path)}link")
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:  # another file system, one without hard links, or a file of another user
        return False
    link.replace(path)
    _flush_folder(path.parent)
    return True


def _flush_folder(folder: Path) -> None:
    """Flush the renames in a folder to disk, if the system supports that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


#: Error numbers of a full disk, an exhausted quota or a file at its size limit.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Return whether an error means a full disk; Rust libraries name the number in the message."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = getattr(error, "errno", None) or (int(found[1]) if found else None)
    return number in _FULL


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn errors of a full disk into a StorageError that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError) or not is_full(error):
            raise
        raise StorageError(
            f"{path} cannot be written: the disk is full, or a quota or the file size limit is"
            f" reached ({error}). An existing file of this name is unchanged. Free some space and"
            " try again."
        ) from error


def write_text(path: Path, text: str, *, follow: bool = False) -> None:
    r"""Write UTF-8 text atomically, with ``\\n`` line ends on every system."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", newline="\n")

    write_atomically(path, write, follow=follow)


def write_json(path: Path, value: Any, *, follow: bool = False) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", follow=follow)


def read_json(path: Path) -> Any:
    """Read a JSON file; raise a DataError if it is not JSON."""
    with open_input(path) as file:
        try:
            return json.loads(file.read().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: expected JSON in UTF-8; it cannot be read ({error})."
            ) from error


def checked_version(
    path: Path, version: Any, newest: int, error: type[IMVIAError] = DataError
) -> int:
    """Return a format version; raise an error if it is invalid or newer than the library reads."""
    if type(version) is not int or version < 1:
        raise error(f"{path}: expected a format version, 1 or more, found {bounded(version)}.")
    if version > newest:
        raise error(
            f"{path}: format version {version} is newer than this library reads ({newest}). Update"
            " imvia-graph."
        )
    return version


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    previous: Path | None = None,
) -> None:
    """Write a safetensors file atomically; see `write_atomically`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    info = None if metadata is None else dict(metadata)
    write_atomically(path, lambda temporary: save_file(plain, temporary, info), previous)


#: Names of dtypes in safetensors, which lays tensors out by descending size of their elements.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensor_parts(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    parts: Callable[[str], Iterator[Tensor]],
    metadata: Mapping[str, str],
    checksum: str,
    previous: Path | None = None,
) -> None:
    """Write a safetensors file from parts of its tensors, which need not fit into memory.

    The file is the same as `write_tensors` writes for the whole tensors with their `digest` as the
    metadata ``checksum``.

    Parameters
    ----------
    path : Path
    shapes : mapping of str to (dtype, shape)
        The tensors by name.
    parts : callable
        Called once with the name of each tensor; yields its parts along the first dimension.
    metadata : mapping of str to str
    checksum : str
        Metadata key of the digest.
    previous : Path, optional
        See `write_atomically`.
    """
    order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    placeholder = "0" * hashlib.sha256().digest_size * 2
    header: dict[str, Any] = {"__metadata__": {**metadata, checksum: placeholder}}
    place = 0
    for name in order:
        dtype, shape = shapes[name]
        size = dtype.itemsize * math.prod(shape)
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                written = 0
                for part in parts(name):
                    plain = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    written += file.write(plain.numpy().data)
                dtype, shape = shapes[name]
                if written != dtype.itemsize * math.prod(shape):
                    raise ValueError(
                        f"{path}: the parts of {name} have {written} bytes; expected"
                        f" {dtype.itemsize * math.prod(shape)} for the shape {tuple(shape)}."
                    )
        # The digest is computed from the file just written, memory-mapped.
        with safe_open(temporary, framework="pt") as whole:
            found = digest({name: whole.get_tensor(name) for name in order}, metadata)
        at = text.index(placeholder.encode(), text.index(f'"{checksum}"'.encode()))
        with temporary.open("rb+") as file:
            file.seek(8 + at)
            file.write(found.encode())

    write_atomically(path, write, previous)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of tensors and metadata, independent of their order."""
    found = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(json.dumps([name, str(plain.dtype), list(plain.shape)]).encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_label_table(path: Path, column: str, labels: pl.Series, names: pl.Series | None) -> None:
    """Write ``entities.tsv`` or ``relations.tsv``."""
    check_tsv_labels(path, labels)
    frame = labels.alias(column).to_frame()
    if names is not None:
        check_tsv_labels(path, names)
        frame = frame.with_columns(names.alias("name"))
    write_atomically(
        path,
        lambda temporary: frame.write_csv(temporary, separator="\t", quote_style="never"),
    )


def check_tsv_labels(path: Path, labels: Sequence[str] | pl.Series) -> None:
    """Raise a DataError for labels that a TSV file cannot hold, such as one with a tab."""
    column = pl.Series(labels, dtype=pl.String)
    bad = column.filter(column.str.contains("[\t\n\r\0]"))
    if len(bad):
        raise DataError(
            f"{path}: {len(bad)} labels contain a tab or a line end (or a NUL), first {bad[0]!r};"
            " a TSV file cannot hold them. Rename them before saving."
        )
    marked = column.filter(column.str.starts_with(BOM))
    if len(marked):
        raise DataError(
            f"{path}: {len(marked)} labels begin with a byte order mark, first {marked[0]!r}, which"
            " is lost at the start of a file. Rename them before saving."
        )


def write_view_table(path: Path, entities: pl.Series, sources: pl.Series | None) -> None:
    """Write ``views/<modality>.csv``; ``sources`` is None if no source is known."""
    known = pl.lit(None, dtype=pl.String) if sources is None else sources
    frame = entities.alias("entity").to_frame().with_columns(known.alias("source"))
    write_atomically(path, lambda temporary: frame.write_csv(temporary, quote_style="necessary"))
