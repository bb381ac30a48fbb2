"""Numbering 64-bit hashes by first appearance, many millions of them.

One hash table of them all would miss the caches. So the hashes are sorted out by their highest bits
into parts, each part is numbered on its own, and the parts' numbers are put together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

#: Slots of a part's table to begin with.
_SLOTS = 1024


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # There is nowhere to keep what is compiled; then each process compiles anew.
        return numba.njit(nogil=True)(function)


@_compiled
def count(hashes: Any, start: int, stop: int, shift: Any, counts: Any) -> None:
    """How many of the hashes start to stop belong to each part."""
    for i in range(start, stop):
        counts[hashes[i] >> shift] += 1


@_compiled
def sort_out(hashes: Any, start: int, stop: int, shift: Any, place: Any, parts: Any) -> None:
    """Append the hashes start to stop to their parts, which go on at `place`."""
    for i in range(start, stop):
        part = hashes[i] >> shift
        parts[place[part]] = hashes[i]
        place[part] += 1


@_compiled
def number(parts: Any, ptr: Any, start: int, stop: int, distinct: Any) -> None:
    """Replace the hashes of each of the parts start to stop by numbers from 0, as they appear."""
    zero, one = np.uint64(0), np.uint64(1)
    for part in range(start, stop):
        # Rows of a hash and its number. The table grows with the distinct hashes, so that a label
        # that fills most cells does not make it large.
        table = np.zeros((_SLOTS, 2), np.uint64)
        mask = np.uint64(_SLOTS - 1)
        found = 0
        for i in range(ptr[part], ptr[part + 1]):
            # 0 marks a free slot. Were 0 and 1 both hashes, their labels would be told apart later.
            key = max(parts[i], one)
            slot = key & mask
            while table[slot, 0] != key and table[slot, 0] != zero:
                slot = (slot + one) & mask
            if table[slot, 0] == zero:
                table[slot, 0], table[slot, 1] = key, found
                found += 1
            parts[i] = table[slot, 1]
            if 4 * found > len(table):
                old, table = table, np.zeros((2 * len(table), 2), np.uint64)
                mask = np.uint64(len(table) - 1)
                for row in old:
                    if row[0] != zero:
                        slot = row[0] & mask
                        while table[slot, 0] != zero:
                            slot = (slot + one) & mask
                        table[slot] = row
        distinct[part] = found


@_compiled
def put_together(hashes: Any, shift: Any, place: Any, parts: Any, base: Any, first: Any) -> None:
    """Replace the hashes by numbers from 0, as they appear; tell where each number stands first.

    `place` is where each part begins, `base` how many distinct hashes the parts before it have.
    """
    numbers = np.full(len(first), -1)
    found = 0
    for i in range(len(hashes)):
        part = hashes[i] >> shift
        k = base[part] + np.int64(parts[place[part]])
        place[part] += 1
        if numbers[k] < 0:
            numbers[k], first[found] = found, i
            found += 1
        hashes[i] = numbers[k]
