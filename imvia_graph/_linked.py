"""Features in files: mapped when read, and cloned or linked when a graph is saved.

The features of a graph may be larger than memory, and the same in a hundred runs. Saving a graph
writes them from the file that they are mapped from in one of three ways, the first that is
possible:

1. A clone (on btrfs or XFS): a separate file that shares blocks with the original until either is
   written to.
2. A hard link, if the caller allows it and the features are `LARGE`. Replacing the original, which
   is how this library writes files, leaves the link unchanged; writing *into* the original, as
   ``cp new.safetensors old.safetensors`` does, changes both. The size, time and checksum of the
   linked file are therefore recorded, so that reading it later detects the change.
3. A copy, portion by portion.

A file is cloned or linked only after its bytes have been compared with the features in memory. If
these were changed since they were mapped, the changed features are written.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imvia_graph import _files
from imvia_graph.errors import DataError

#: Size in bytes from which features are linked although others may write into the file; smaller
#: features are copied quickly.
LARGE = 2**28
#: Linux's request to clone a file.
_FICLONE = 0x40049409


class Mapped(NamedTuple):
    """A file that features are mapped from, in its state at that time."""

    path: Path
    #: Device, inode, size, and time of change in nanoseconds.
    identity: tuple[int, int, int, int]


def map_features(path: Path) -> tuple[Tensor, Mapped | None]:
    """Return the mapped features of a safetensors file, and the file they are mapped from."""
    with contextlib.suppress(OSError):
        path = path.resolve()
        mapped = Mapped(path, _identity(path.stat()))
        return _files.read_features(path), mapped
    return _files.read_features(path), None  # raises an error that says why it cannot be read


def is_at(path: Path, source: Mapped | None) -> bool:
    """Return whether features are mapped from the file at ``path``."""
    try:
        return source is not None and path.samefile(source.path)
    except OSError:
        return False


def is_written_into(source: Mapped) -> bool:
    """Return whether a file was written into, not replaced, since it was mapped."""
    try:
        found = _identity(source.path.stat())
    except OSError:
        return False
    return found[:2] == source.identity[:2] and found != source.identity


def put(path: Path, feat: Tensor, source: Mapped | None, may_link: bool) -> dict[str, Any] | None:
    """Write features to a path, as a clone, a link or a copy.

    Returns
    -------
    dict or None
        For a link, the record to keep for `check`.
    """
    if source is not None and feat.nbytes >= LARGE and _holds(source, feat):
        there = path.exists() and path.samefile(source.path)
        shared = there and path.stat().st_nlink > 1
        if (there and not shared) or (not there and _cloned(source.path, path)):
            return None
        if may_link and (there or _files.link_atomically(source.path, path)):
            _, _, size, changed = source.identity
            record = {"of": str(source.path), "size": size, "changed": changed}
            return {**record, "sha256": _files.digest({"feat": feat}, {})}
    _files.write_tensors(path, {"feat": feat})
    return None


def check(path: Path, feat: Tensor, record: dict[str, Any]) -> None:
    """Raise a DataError if linked features have been written into since."""
    found = path.stat()
    if (found.st_size, found.st_mtime_ns) == (record["size"], record["changed"]):
        return
    if _files.digest({"feat": feat}, {}) != record["sha256"]:
        raise DataError(
            f"{path} has changed since it was linked to {record['of']}: something wrote into that"
            " file instead of replacing it. Restore its former content, or start again with the"
            " new content."
        )


def is_record(value: Any) -> bool:
    """Return whether a value has the form of the record that `put` returns for a link."""
    kinds = {"of": str, "size": int, "changed": int, "sha256": str}
    return isinstance(value, dict) and all(
        type(value.get(name)) is kind for name, kind in kinds.items()
    )


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _holds(source: Mapped, feat: Tensor) -> bool:
    """Return whether a file is unchanged since it was mapped, and holds these features only."""
    try:
        found = source.path.stat()
        if not stat.S_ISREG(found.st_mode) or _identity(found) != source.identity:
            return False
        with safe_open(source.path, framework="pt") as file:
            if list(file.keys()) != ["feat"]:
                return False
        stored = _files.read_features(source.path)
        if (stored.dtype, stored.shape) != (feat.dtype, feat.shape) or not feat.is_contiguous():
            return False
        # Read instead of mapped again: pages mapped twice count twice as resident memory.
        with source.path.open("rb") as plain:
            plain.seek(found.st_size - feat.nbytes)
            parts = (part.view(torch.uint8).numpy() for part in _files.portions(feat))
            return all(plain.read(part.nbytes) == part.tobytes() for part in parts)
    except (OSError, SafetensorError, DataError):
        return False


def _cloned(source: Path, path: Path) -> bool:
    """Clone a file to a path; return False if the system cannot."""
    try:
        import fcntl
    except ImportError:
        return False

    def clone(temporary: Path) -> None:
        with source.open("rb") as old, temporary.open("wb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())

    try:
        _files.write_atomically(path, clone)
    except OSError:
        return False
    return True


__all__ = [
    "LARGE",
    "Mapped",
    "check",
    "is_at",
    "is_record",
    "is_written_into",
    "map_features",
    "put",
]
