"""Numbering 64-bit hashes by first appearance, many millions of them.

One hash table of them all would miss the caches. So the hashes are sorted out by their highest bits
into parts, in order, each part is numbered on its own, and the numbers are put back. Cells are
(rows, columns), uint64, counted row by row; they hold the hashes, and in the end the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from imvia_graph._kernels._compile import compiled

#: Slots of a part's table to begin with.
_SLOTS = 1024
#: The bit that marks a number where it appears.
_NEW = np.uint64(2**63)
_ZERO, _ONE = np.uint64(0), np.uint64(1)


_compiled = compiled()


@_compiled
def count(start: int, stop: int, cells: Any, shift: Any, counts: Any) -> None:
    """How many hashes of the rows start to stop belong to each part."""
    for row in range(start, stop):
        for column in range(cells.shape[1]):
            counts[cells[row, column] >> shift] += 1


@_compiled
def sort_out(start: int, stop: int, cells: Any, shift: Any, place: Any, parts: Any) -> None:
    """Append the hashes of the rows start to stop to their parts, which go on at `place`."""
    for row in range(start, stop):
        for column in range(cells.shape[1]):
            part = cells[row, column] >> shift
            parts[place[part]] = cells[row, column]
            place[part] += 1


@_compiled
def number(start: int, stop: int, parts: Any, ptr: Any, distinct: Any) -> None:
    """Replace the hashes of each of the parts start to stop by numbers from 0, as they appear.

    Where a number appears, `_NEW` is added to it.
    """
    for part in range(start, stop):
        # Rows of a hash and its number. The table grows with the distinct hashes, so that a label
        # that fills most cells does not make it large.
        table = np.zeros((_SLOTS, 2), np.uint64)
        mask = np.uint64(_SLOTS - 1)
        found = 0
        for i in range(ptr[part], ptr[part + 1]):
            # 0 marks a free slot. Were 0 and 1 both hashes, their labels would be told apart later.
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
    """Count the new numbers of all parts in the order of the cells; tell where each stands."""
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
    """Give every number of the parts start to stop what `find_first` gave it where it was new."""
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
    """Replace the hashes of the rows start to stop by the numbers in their places."""
    for row in range(start, stop):
        for column in range(cells.shape[1]):
            part = cells[row, column] >> shift
            cells[row, column] = parts[place[part]]
            place[part] += 1
