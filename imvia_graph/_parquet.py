"""Check of the sizes that a Parquet file claims, before a library allocates memory for them.

The reader aborts the process if a page claims more values than fit into memory, so the footer and
the page headers are parsed here first, for sizes only. Format:
https://parquet.apache.org/docs/file-format/ and Thrift's compact protocol.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imvia_graph import _files
from imvia_graph.errors import DataError

#: The most rows of a small file, and the most rows per byte of a larger one.
ROWS, ROWS_A_BYTE = 1_000_000, 100
#: Maximum nesting of structs and lists; the format has about ten levels.
_DEEPEST = 40

_Struct = dict[int, Any]


class _DamagedError(Exception):
    pass


def check_parquet(path: Path) -> None:
    """Raise a `DataError` if a Parquet file claims far more data than its size suggests."""
    size = path.stat().st_size
    if size < 12:
        raise _unreadable(path, f"it has {size} bytes")
    most = max(ROWS, ROWS_A_BYTE * size)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            for what, count in _announced(content):
                if count < 0:
                    raise _DamagedError(f"a count is {count}")
                if what == "rows" and count > most:
                    raise _bomb(path, size, f"{count:,} rows")
                if what == "bytes" and count > max(_files.SMALL, _files.RATIO * size):
                    raise _bomb(path, size, f"{count:,} bytes in one page")
        except (_DamagedError, struct.error, IndexError, OverflowError) as error:
            raise _unreadable(path, str(error)) from error


def _bomb(path: Path, size: int, claim: str) -> DataError:
    return DataError(
        f"{path}: a file of {size:,} bytes that claims {claim} is refused as a decompression bomb."
        " If you trust the file, write it again in another form."
    )


def _unreadable(path: Path, detail: str) -> DataError:
    return DataError(
        f"{path}: expected a Parquet file; it cannot be read ({detail}). It may be truncated:"
        " download or create it again."
    )


def _announced(content: mmap.mmap) -> Iterator[tuple[str, int]]:
    """Yield the counts of rows or values, and of bytes of pages, that a file claims to have."""
    if content[:4] != b"PAR1" or content[-4:] != b"PAR1":
        raise _DamagedError("it does not begin and end with PAR1")
    length = int.from_bytes(content[-8:-4], "little")
    start = len(content) - 8 - length
    if start < 4:
        raise _DamagedError("its footer is longer than the file")
    footer = _Thrift(content, start, len(content) - 8).struct()
    yield "rows", _number(footer, 3)
    total = 0
    for group in _structs(footer, 4):
        total += _number(group, 3)
        yield "rows", _number(group, 3)
        yield "rows", total
        for chunk in _structs(group, 1):
            if chunk.get(1):
                raise _DamagedError("its columns are in other files")
            column = chunk.get(3)
            if not isinstance(column, dict):
                raise _DamagedError("a column has no metadata")
            yield from _pages(content, column, start)


def _pages(content: mmap.mmap, column: _Struct, end: int) -> Iterator[tuple[str, int]]:
    expected, seen = _number(column, 5), 0
    yield "rows", expected
    if not expected:  # the column has no pages
        return
    starts = [_number(column, key) for key in (9, 11) if key in column]
    # Some files write the offset 0 for a missing page; offsets of pages are at least 4.
    at = min([place for place in starts if place > 0], default=0)
    stop = at + _number(column, 7)
    if not 4 <= at <= stop <= end:
        raise _DamagedError("a column is not where its footer says")
    while at < stop and seen < expected:
        thrift = _Thrift(content, at, stop)
        header = thrift.struct()
        yield "bytes", _number(header, 2)
        for key in (5, 7, 8):  # data, dictionary, data of version 2
            if isinstance(page := header.get(key), dict):
                yield "rows", _number(page, 1)
                seen += _number(page, 1) if key != 7 else 0
        yield "rows", seen
        length = _number(header, 3)
        if length < 0:
            raise _DamagedError("a page ends before it begins")
        at = thrift.at + length


def _number(found: _Struct, key: int) -> int:
    value = found.get(key)
    if type(value) is not int:
        raise _DamagedError("a size is missing")
    return value


def _structs(found: _Struct, key: int) -> list[_Struct]:
    value = found.get(key, [])
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise _DamagedError("its footer has another structure")
    return value


class _Thrift:
    """Reader of structs of the compact protocol: field number -> value, texts as their length."""

    def __init__(self, content: mmap.mmap, at: int, end: int) -> None:
        self.content, self.at, self.end = content, at, end

    def byte(self) -> int:
        if self.at >= self.end:
            raise _DamagedError("data is missing")
        self.at += 1
        return self.content[self.at - 1]

    def skip(self, count: int) -> None:
        if count > self.end - self.at:
            raise _DamagedError("data is missing")
        self.at += count

    def unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise _DamagedError("a variable-length integer does not end")

    def signed(self) -> int:
        value = self.unsigned()
        return (value >> 1) ^ -(value & 1)

    def struct(self, depth: int = 0) -> _Struct:
        if depth > _DEEPEST:
            raise _DamagedError("its structs are nested too deeply")
        found: _Struct = {}
        key = 0
        while head := self.byte():
            key = key + (head >> 4) if head >> 4 else self.signed()
            kind = head & 15
            # Booleans are encoded in the field type.
            found[key] = kind == 1 if kind in (1, 2) else self.value(kind, depth)
        return found

    def value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):
            return self.byte()
        if kind in (4, 5, 6):
            return self.signed()
        if kind in (7, 13):
            return self.skip(8 if kind == 7 else 16)
        if kind == 8:
            length = self.unsigned()
            self.skip(length)
            return length
        if kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 != 15 else self.unsigned()
            self.expect(count, depth)
            return [self.value(head & 15, depth + 1) for _ in range(count)]
        if kind == 11:
            count = self.unsigned()
            self.expect(count, depth)
            kinds = self.byte() if count else 0
            for _ in range(count):
                self.value(kinds >> 4, depth + 1)
                self.value(kinds & 15, depth + 1)
            return None
        if kind == 12:
            return self.struct(depth + 1)
        raise _DamagedError(f"there is no type {kind}")

    def expect(self, count: int, depth: int) -> None:
        if count > self.end - self.at or depth > _DEEPEST:
            raise _DamagedError("a list is longer than the file")


__all__ = ["check_parquet"]
