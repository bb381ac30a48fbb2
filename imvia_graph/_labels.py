"""Conversion of labels to ids, vectorised: tens of millions of triples in seconds.

Labels are hashed to 64 bits, and the hashes are numbered in the order of first appearance. Then the
label of each row is compared with the label of its number. The result is exact: a hash collision is
detected, and a slower method without hashes is used instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import torch
from torch import Tensor

from imvia_graph import _kernels
from imvia_graph.errors import DataError

#: Rows compared at a time, to limit memory.
_SLICE = 2_000_000
#: Fewest cells for which numbering in parts is worth the import of numba, and cells sampled to
#: estimate whether most labels are distinct. Pandas takes 0.2 s for 4 million cells of 400,000
#: labels, but 5 s for ten times as many of both, because its single hash table exceeds the caches;
#: with few labels it stays fast.
_LARGE, _SAMPLE = 2**22, 2**16
#: Cells per part, and log2 of the most parts: the working set of a part, and the end positions of
#: all parts, fit into a core's second-level cache.
_PART, _MAX_BITS = 2**13, 12

Codes = npt.NDArray[np.int64]


def index_triples(
    frames: Sequence[pl.DataFrame],
) -> tuple[pl.Series, pl.Series, list[Tensor]]:
    """Return the vocabularies and the ids of label triples.

    Parameters
    ----------
    frames : sequence of DataFrame
        Columns ``head``, ``relation``, ``tail`` of strings without nulls.

    Returns
    -------
    entities, relations : Series
        Labels in the order of first appearance: frame by frame, row by row, head before tail.
    triples : list of Tensor
        (n, 3) int64 for each frame.

    Examples
    --------
    >>> import polars as pl
    >>> from imvia_graph._labels import index_triples
    >>> frame = pl.DataFrame({"head": ["b", "a"], "relation": ["r", "r"], "tail": ["a", "c"]})
    >>> entities, relations, triples = index_triples([frame])
    >>> entities.to_list(), relations.to_list(), triples[0].tolist()
    (['b', 'a', 'c'], ['r'], [[0, 0, 1], [1, 0, 2]])
    """
    whole = pl.concat(list(frames))
    triples = np.empty((whole.height, 3), dtype=np.int64)
    relations = _number([whole["relation"]], triples[:, 1:2])
    entities = _number([whole["head"], whole["tail"]], triples[:, ::2])
    parts = torch.from_numpy(triples).split([frame.height for frame in frames])
    return entities, relations, list(parts)


def are_distinct(labels: pl.Series) -> bool:
    """Return whether all labels are distinct."""
    hashes = np.sort(labels.hash().to_numpy())
    # Two labels may have the same hash; only then are the labels themselves counted.
    return not (hashes[1:] == hashes[:-1]).any() or labels.n_unique() == len(labels)


class Vocabulary:
    """Distinct labels in id order, hashed once for several look-ups."""

    def __init__(self, labels: Sequence[str] | pl.Series) -> None:
        self.labels = pl.Series("label", labels, dtype=pl.String)
        self.index = pd.Index(self.labels.hash().to_numpy())


def encode_labels(
    labels: Sequence[str] | pl.Series,
    vocabulary: Sequence[str] | pl.Series | Vocabulary,
    where: str,
) -> Tensor:
    """Convert labels to ids, (n,) int64; raise a `DataError` that counts unknown labels."""
    series = pl.Series("label", labels, dtype=pl.String)
    known = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
    ids = _look_up(series, known)
    missing = ids < 0
    if missing.any():
        unknown = series.filter(pl.Series(missing))
        raise DataError(
            f"{where}: {len(unknown)} rows name {unknown.n_unique()} labels that are not in the"
            f" vocabulary, first {unknown[0]!r} in row {int(missing.argmax()) + 1} (counted from"
            " 1). Add these labels to the vocabulary, or remove these rows."
        )
    return torch.from_numpy(ids)


def encode_runs(
    labels: pl.Series, vocabulary: Sequence[str] | pl.Series | Vocabulary, where: str
) -> Tensor:
    """Convert labels that come mostly in runs to ids, as `encode_labels`; look up each run once."""
    starts = labels.ne_missing(labels.shift()).to_numpy(writable=True)
    starts[:1] = True
    first = np.flatnonzero(starts)
    try:
        ids = encode_labels(labels.gather(pl.Series(first)), vocabulary, where)
    except DataError:
        return encode_labels(labels, vocabulary, where)  # raises an error that counts all rows
    return ids.repeat_interleave(torch.from_numpy(np.diff(first, append=len(labels))))


def encode_triples(
    frame: pl.DataFrame,
    entities: Sequence[str] | pl.Series | Vocabulary,
    relations: Sequence[str] | pl.Series | Vocabulary,
    where: str = "triples",
) -> Tensor:
    """Convert a frame of label triples to (n, 3) int64 ids."""
    ends = entities if isinstance(entities, Vocabulary) else Vocabulary(entities)
    kinds = relations if isinstance(relations, Vocabulary) else Vocabulary(relations)
    triples = torch.empty(frame.height, 3, dtype=torch.int64)
    for place, (column, labels) in enumerate((("head", ends), ("relation", kinds), ("tail", ends))):
        triples[:, place] = encode_labels(frame[column], labels, f"{where}, column {column}")
    return triples


def decode_triples(
    triples: Tensor, entities: Sequence[str] | pl.Series, relations: Sequence[str] | pl.Series
) -> pl.DataFrame:
    """Convert (n, 3) ids to a frame of labels with the columns head, relation, tail."""
    ends = pl.Series("label", entities, dtype=pl.String)
    kinds = pl.Series("label", relations, dtype=pl.String)
    head, relation, tail = (pl.Series(column) for column in triples.T.contiguous().numpy())
    return pl.DataFrame(
        {"head": ends.gather(head), "relation": kinds.gather(relation), "tail": ends.gather(tail)}
    )


def _number(columns: Sequence[pl.Series], out: Codes) -> pl.Series:
    """Number the labels of columns by first appearance, row by row.

    Writes the number of each cell to ``out`` (rows, columns) and returns the labels in the order of
    their numbers.
    """
    length, width = out.shape
    if not length:
        return pl.Series("label", [], dtype=pl.String)
    hashes = out.view(np.uint64)
    for place, column in enumerate(columns):
        start = 0
        for chunk in column.get_chunks():
            hashes[start : start + len(chunk), place] = chunk.hash().to_numpy()
            start += len(chunk)
    first = _factorize(hashes)
    below = pl.concat([column.alias("label") for column in columns])
    labels = below.gather(pl.Series(first % width * length + first // width))
    del below, first
    for place, column in enumerate(columns):
        if not _same(column, labels, out[:, place]):
            return _number_exactly(columns, out)
    return labels


def _factorize(hashes: npt.NDArray[np.uint64]) -> Codes:
    """Replace hashes (rows, columns) by numbers; return the first cell of each number."""
    if hashes.size >= _LARGE:
        sample = hashes[:: hashes.size // _SAMPLE].reshape(-1)
        if 2 * len(pd.unique(sample)) > len(sample) and (kernels := _kernels.load("labels")):
            return _factorize_in_parts(hashes, kernels)
    codes = pd.factorize(hashes.reshape(-1))[0].astype(np.int64, copy=False)
    hashes[:] = codes.reshape(hashes.shape)
    return _first_cells(codes)


def _factorize_in_parts(hashes: npt.NDArray[np.uint64], kernels: Any) -> Codes:
    """Do what `_factorize` does with the kernels of `imvia_graph._kernels.labels`."""
    bits = min(_MAX_BITS, (hashes.size // _PART).bit_length())
    shift = np.uint64(64 - bits)
    cuts = _cuts(len(hashes), torch.get_num_threads())
    counts = np.zeros((len(cuts), 2**bits), dtype=np.int64)
    _in_threads(kernels.count, [(*cut, hashes, shift, counts[t]) for t, cut in enumerate(cuts)])
    ptr = np.concatenate([[0], counts.sum(axis=0).cumsum()])
    # Start of each thread's cells in each part, after those of the threads before it.
    place = ptr[:-1] + counts.cumsum(axis=0) - counts
    parts = np.empty(hashes.size, dtype=np.uint64)

    def pass_over_rows(kernel: Callable[..., None]) -> None:
        of = place.copy()
        _in_threads(kernel, [(*cut, hashes, shift, of[t], parts) for t, cut in enumerate(cuts)])

    def pass_over_parts(kernel: Callable[..., None]) -> None:
        # More tasks than threads, because a frequent label can make one part large.
        _in_threads(kernel, [(*cut, parts, ptr, distinct) for cut in _cuts(2**bits, 64)])

    distinct = np.empty(2**bits, dtype=np.int64)
    pass_over_rows(kernels.sort_out)
    pass_over_parts(kernels.number)
    first = np.empty(distinct.sum(), dtype=np.int64)
    kernels.find_first(hashes, shift, ptr[:-1].copy(), parts, first)
    pass_over_parts(kernels.renumber)
    pass_over_rows(kernels.put_back)
    return first


def _cuts(length: int, count: int) -> list[tuple[int, int]]:
    """Return the starts and stops of ``count`` ranges of about equal size from 0 to length."""
    bounds = [length * number // count for number in range(count + 1)]
    return list(pairwise(bounds))


def _in_threads(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return the results of a task for each tuple of arguments, computed by threads."""
    if len(arguments) < 2 or torch.get_num_threads() < 2:
        return [task(*values) for values in arguments]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda values: task(*values), arguments))


def _first_cells(codes: Codes) -> npt.NDArray[np.int64]:
    """Return the first position of each number 0, 1, …, numbered by first appearance."""
    parts, highest = [], -1
    for start in range(0, len(codes), _SLICE):
        peak = np.maximum.accumulate(codes[start : start + _SLICE])
        new = np.diff(peak, prepend=highest) > 0
        if peak[0] <= highest:
            # The running maximum continues from the previous slices.
            peak = np.maximum(peak, highest)
            new = np.diff(peak, prepend=highest) > 0
        parts.append(np.flatnonzero(new) + start)
        highest = int(peak[-1])
    return np.concatenate(parts)


def _number_exactly(columns: Sequence[pl.Series], out: Codes) -> pl.Series:
    """Do what `_number` does without hashes, which may collide."""
    width = len(columns)
    order = np.arange(width * len(columns[0])).reshape(width, -1).T.reshape(-1)
    cells = pl.concat([column.alias("label") for column in columns]).gather(pl.Series(order))
    labels = cells.unique(maintain_order=True)
    out[:] = _look_up_exactly(cells, labels).reshape(out.shape)
    return labels


def _look_up(series: pl.Series, known: Vocabulary) -> Codes:
    """Return the position of each label among distinct known labels; -1 for unknown labels."""
    if not known.index.is_unique:
        return _look_up_exactly(series, known.labels)
    codes: Codes = known.index.get_indexer(series.hash().to_numpy()).astype(np.int64, copy=False)
    if not _same(series, known.labels, codes):
        return _look_up_exactly(series, known.labels)
    return codes


def _look_up_exactly(series: pl.Series, known: pl.Series) -> Codes:
    table = pl.DataFrame({"label": known}).with_row_index("id").unique("label", keep="first")
    ids = (
        series.alias("label").to_frame().join(table, on="label", how="left", maintain_order="left")
    )
    codes: Codes = ids["id"].cast(pl.Int64).fill_null(-1).to_numpy().copy()
    return codes


def _same(column: pl.Series, labels: pl.Series, codes: Codes) -> bool:
    """Return whether each row of the column is the label of its number; -1 is ignored."""

    def same(start: int) -> bool:
        part, rows = codes[start : start + _SLICE], column.slice(start, _SLICE)
        if (part < 0).any():
            rows, part = rows.filter(pl.Series(part >= 0)), part[part >= 0]
        return (labels.gather(pl.Series(np.ascontiguousarray(part))) == rows).all()

    return all(_in_threads(same, [(start,) for start in range(0, len(column), _SLICE)]))
