"""Numbering many millions of 64-bit hashes by first appearance.

One hash table of all of them would miss the caches. So the hashes are partitioned by their highest
bits, in their order; each part is numbered separately, and the numbers are written back. Cells are
(rows, columns), uint64, in row-major order; they hold the hashes, and in the end the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from imvia_graph._kernels._compile import compiled

#: Initial number of slots in the hash table of a part.
_SLOTS = 1024
#: The bit that marks the first appearance of a number.
_NEW = np.uint64(2**63)
_ZERO, _ONE = np.uint64(0), np.uint64(1)


_compiled = compiled()


@_compiled
def count(start: int, stop: int, cells: Any, shift: Any, counts: Any) -> None:
    """Count the hashes of the rows start to stop in each part."""
    for row in range(start, stop):
        for column in range(cells.shape[1]):
            counts[cells[row, column] >> shift] += 1


@_compiled
def sort_out(start: int, stop: int, cells: Any, shift: Any, place: Any, parts: Any) -> None:
    """Append the hashes of the rows start to stop to their parts, from position `place` on."""
    for row in range(start, stop):
        for column in range(cells.shape[1]):
            part = cells[row, column] >> shift
            parts[place[part]] = cells[row, column]
            place[part] += 1


@_compiled
def number(start: int, stop: int, parts: Any, ptr: Any, distinct: Any) -> None:
    """Replace the hashes of each part from start to stop by numbers from 0, by first appearance.

    `_NEW` is added to a number at its first appearance.
    """
    for part in range(start, stop):
        # Each row is a hash and its number. The table grows with the number of distinct hashes, so
        # that a label that fills most cells does not enlarge it.
        table = np.zeros((_SLOTS, 2), np.uint64)
        mask = np.uint64(_SLOTS - 1)
        found = 0
        for i in range(ptr[part], ptr[part + 1]):
            # 0 marks a free slot. If 0 and 1 both occur, their labels are distinguished later.
            key = max(parts[i], _ONE)
            slot = key & mask
            while table[slot, 0] != key and table[slot, 0] != _ZERO:
                slot = (slot + _ONE) & mask
            if table[slot, 0] == key:
                parts[i] = table[slot, 1]
                continue
            table[slot, 0], table[slot, 1] = key, found
            parts[i] = _NEW + np.uint64(found)
            found += 1
            if 4 * found > len(table):
                old, table = table, np.zeros((2 * len(table), 2), np.uint64)
                mask = np.uint64(len(table) - 1)
                for entry in old:
                    if entry[0] != _ZERO:
                        slot = entry[0] & mask
                        while table[slot, 0] != _ZERO:
                            slot = (slot + _ONE) & mask
                        table[slot] = entry
        distinct[part] = found


@_compiled
def find_first(cells: Any, shift: Any, place: Any, parts: Any, first: Any) -> None:
    """Number first appearances in the order of the cells, and store their positions."""
    found = 0
    width = cells.shape[1]
    for row in range(len(cells)):
        for column in range(width):
            part = cells[row, column] >> shift
            if parts[place[part]] >= _NEW:
                parts[place[part]] = _NEW + np.uint64(found)
                first[found] = row * width + column
                found += 1
            place[part] += 1


@_compiled
def renumber(start: int, stop: int, parts: Any, ptr: Any, distinct: Any) -> None:
    """Replace every number in the parts start to stop by the number that `find_first` gave it."""
    for part in range(start, stop):
        numbers = np.empty(distinct[part], np.uint64)
        found = 0
        for i in range(ptr[part], ptr[part + 1]):
            if parts[i] >= _NEW:
                parts[i] -= _NEW
                numbers[found] = parts[i]
                found += 1
            else:
                parts[i] = numbers[parts[i]]


@_compiled
def put_back(start: int, stop: int, cells: Any, shift: Any, place: Any, parts: Any) -> None:
    """Replace the hashes of the rows start to stop by their numbers."""
    for row in range(start, stop):
        for column in range(cells.shape[1]):
            part = cells[row, column] >> shift
            cells[row, column] = parts[place[part]]
            place[part] += 1
