"""Features in files: mapped when they are read, cloned or linked when they go into a folder.

The features of a graph may take more room than memory has, and be the same for a hundred runs. A
graph that is saved takes them out of the file that they are mapped from in one of three ways, the
first that can be had:

1. A clone (on btrfs or XFS): a file of its own that shares blocks with the other one
   until either is written to.
2. A hard link, where the caller allows it and the features are `LARGE`. What replaces the other
   file, as everything in this library does, leaves the link alone; what writes *into* it, as
   ``cp new.safetensors old.safetensors`` does, changes both. So the size, the time and a checksum
   of what was linked are kept, and who reads it later learns that it has changed.
3. A copy, portion by portion.

A file is cloned or linked only after its bytes have been compared with the features in memory: of
features that were changed since they were mapped, what they are now is what is written.
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

#: Bytes of features from which a link is worth that others may write into them; less is copied in
#: a moment.
LARGE = 2**28
#: Linux's request to clone a file.
_FICLONE = 0x40049409


class Mapped(NamedTuple):
    """A file that features are mapped from, as it was then."""

    path: Path
    #: Device, inode, size, and time of change in nanoseconds.
    identity: tuple[int, int, int, int]


def map_features(path: Path) -> tuple[Tensor, Mapped | None]:
    """The features of a safetensors file, mapped, and what they are mapped from."""
    with contextlib.suppress(OSError):
        path = path.resolve()
        mapped = Mapped(path, _identity(path.stat()))
        return _files.read_features(path), mapped
    return _files.read_features(path), None  # which says why it cannot be read


def is_at(path: Path, source: Mapped | None) -> bool:
    """Whether what features are mapped from is a path."""
    try:
        return source is not None and path.samefile(source.path)
    except OSError:
        return False


def is_written_into(source: Mapped) -> bool:
    """Whether something wrote into a file since it was mapped; one that was replaced stays."""
    try:
        found = _identity(source.path.stat())
    except OSError:
        return False
    return found[:2] == source.identity[:2] and found != source.identity


def put(path: Path, feat: Tensor, source: Mapped | None, may_link: bool) -> dict[str, Any] | None:
    """Have features at a path: a clone, a link or a copy, as told above.

    Returns
    -------
    dict or None
        What is to be kept for `check` where it is a link.
    """
    if source is not None and feat.nbytes >= LARGE and _holds(source, feat):
        there = path.exists() and path.samefile(source.path)
        shared = there and path.stat().st_nlink > 1
        if (there and not shared) or (not there and _cloned(source.path, path)):
            return None
        if may_link and (there or _files.link_atomically(source.path, path)):
            _, _, size, changed = source.identity
            told = {"of": str(source.path), "size": size, "changed": changed}
            return {**told, "sha256": _files.digest({"feat": feat}, {})}
    _files.write_tensors(path, {"feat": feat})
    return None


def check(path: Path, feat: Tensor, record: dict[str, Any]) -> None:
    """A DataError where features that were linked have been written into since."""
    found = path.stat()
    if (found.st_size, found.st_mtime_ns) == (record["size"], record["changed"]):
        return
    if _files.digest({"feat": feat}, {}) != record["sha256"]:
        raise DataError(
            f"{path} has changed since it was linked to {record['of']}: something wrote into that"
            " file instead of replacing it. Put the former content back, or start anew with the"
            " new one."
        )


def is_record(value: Any) -> bool:
    """Whether a value is what `put` returns for a link."""
    kinds = {"of": str, "size": int, "changed": int, "sha256": str}
    return isinstance(value, dict) and all(
        type(value.get(name)) is kind for name, kind in kinds.items()
    )


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _holds(source: Mapped, feat: Tensor) -> bool:
    """Whether a file is the one that was mapped, and holds these features and nothing else."""
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
        # Read, not mapped once more: pages that are mapped twice count twice as resident.
        with source.path.open("rb") as plain:
            plain.seek(found.st_size - feat.nbytes)
            parts = (part.view(torch.uint8).numpy() for part in _files.portions(feat))
            return all(plain.read(part.nbytes) == part.tobytes() for part in parts)
    except (OSError, SafetensorError, DataError):
        return False


def _cloned(source: Path, path: Path) -> bool:
    """Whether a clone of a file has been put at a path; False where the system has none."""
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
