"""Labels to ids, vectorised: vocabularies of tens of millions of triples in seconds.

Strings are hashed to 64 bits, the hashes are numbered in the order of first appearance, and every
row's label is then compared with the label that its number stands for. So the result is exact: two
labels of one hash would be noticed, and the slower exact way taken.
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

#: Rows that are compared at a time, so that comparing needs little memory.
_SLICE = 2_000_000
#: Cells from which numbering in parts outweighs the import of numba, and cells that are looked at
#: to see whether labels are many. Pandas takes 0.2 s for 4 million cells of 400,000 labels, but 5 s
#: for ten times as many of both, as its one hash table misses the caches; not if labels are few.
_LARGE, _SAMPLE = 2**22, 2**16
#: Cells that a part is to have, and parts at most: what is at work in a part, and the ends of all
#: parts, fit a core's second-level cache.
_PART, _MAX_BITS = 2**13, 12

Codes = npt.NDArray[np.int64]


def index_triples(
    frames: Sequence[pl.DataFrame],
) -> tuple[pl.Series, pl.Series, list[Tensor]]:
    """Vocabularies and ids of label triples at once.

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
    """Whether no label stands twice."""
    hashes = np.sort(labels.hash().to_numpy())
    # Equal hashes may be of different labels; only then it takes a table of all.
    return not (hashes[1:] == hashes[:-1]).any() or labels.n_unique() == len(labels)


class Vocabulary:
    """Distinct labels in id order, hashed once for all that is looked up among them."""

    def __init__(self, labels: Sequence[str] | pl.Series) -> None:
        self.labels = pl.Series("label", labels, dtype=pl.String)
        self.index = pd.Index(self.labels.hash().to_numpy())


def encode_labels(
    labels: Sequence[str] | pl.Series,
    vocabulary: Sequence[str] | pl.Series | Vocabulary,
    where: str,
) -> Tensor:
    """Labels to ids: (n,) int64. Unknown labels are a `DataError` that says how many and which."""
    series = pl.Series("label", labels, dtype=pl.String)
    known = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
    ids = _look_up(series, known)
    missing = ids < 0
    if missing.any():
        unknown = series.filter(pl.Series(missing))
        raise DataError(
            f"{where}: {len(unknown)} rows name {unknown.n_unique()} labels that are not in the"
            f" vocabulary, first {unknown[0]!r} in row {int(missing.argmax()) + 1} (counted from"
            " 1). Add them or leave these rows out."
        )
    return torch.from_numpy(ids)


def encode_runs(
    labels: pl.Series, vocabulary: Sequence[str] | pl.Series | Vocabulary, where: str
) -> Tensor:
    """What `encode_labels` does, of labels that mostly stand in runs: each is looked up once."""
    starts = labels.ne_missing(labels.shift()).to_numpy(writable=True)
    starts[:1] = True
    first = np.flatnonzero(starts)
    try:
        ids = encode_labels(labels.gather(pl.Series(first)), vocabulary, where)
    except DataError:
        return encode_labels(labels, vocabulary, where)  # an error that counts all rows
    return ids.repeat_interleave(torch.from_numpy(np.diff(first, append=len(labels))))


def encode_triples(
    frame: pl.DataFrame,
    entities: Sequence[str] | pl.Series | Vocabulary,
    relations: Sequence[str] | pl.Series | Vocabulary,
    where: str = "triples",
) -> Tensor:
    """A frame of label triples to (n, 3) int64 ids."""
    ends = entities if isinstance(entities, Vocabulary) else Vocabulary(entities)
    kinds = relations if isinstance(relations, Vocabulary) else Vocabulary(relations)
    triples = torch.empty(frame.height, 3, dtype=torch.int64)
    for place, (column, labels) in enumerate((("head", ends), ("relation", kinds), ("tail", ends))):
        triples[:, place] = encode_labels(frame[column], labels, f"{where}, column {column}")
    return triples


def decode_triples(
    triples: Tensor, entities: Sequence[str] | pl.Series, relations: Sequence[str] | pl.Series
) -> pl.DataFrame:
    """(n, 3) ids to a frame of labels with the columns head, relation, tail."""
    ends = pl.Series("label", entities, dtype=pl.String)
    kinds = pl.Series("label", relations, dtype=pl.String)
    head, relation, tail = (pl.Series(column) for column in triples.T.contiguous().numpy())
    return pl.DataFrame(
        {"head": ends.gather(head), "relation": kinds.gather(relation), "tail": ends.gather(tail)}
    )


def _number(columns: Sequence[pl.Series], out: Codes) -> pl.Series:
    """Number the labels of columns of one length, read row by row, by first appearance.

    Puts the number of every cell into ``out`` (rows, columns), and returns the labels in the order
    of their numbers.
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
    """Replace hashes (rows, columns) by numbers; returns the cell in which each stands first."""
    if hashes.size >= _LARGE:
        sample = hashes[:: hashes.size // _SAMPLE].reshape(-1)
        if 2 * len(pd.unique(sample)) > len(sample) and (kernels := _kernels.load("labels")):
            return _factorize_in_parts(hashes, kernels)
    codes = pd.factorize(hashes.reshape(-1))[0].astype(np.int64, copy=False)
    hashes[:] = codes.reshape(hashes.shape)
    return _first_cells(codes)


def _factorize_in_parts(hashes: npt.NDArray[np.uint64], kernels: Any) -> Codes:
    """What `_factorize` does, by the kernels of `imvia_graph._kernels.labels`."""
    bits = min(_MAX_BITS, (hashes.size // _PART).bit_length())
    shift = np.uint64(64 - bits)
    cuts = _cuts(len(hashes), torch.get_num_threads())
    counts = np.zeros((len(cuts), 2**bits), dtype=np.int64)
    _in_threads(kernels.count, [(*cut, hashes, shift, counts[t]) for t, cut in enumerate(cuts)])
    ptr = np.concatenate([[0], counts.sum(axis=0).cumsum()])
    # Where the rows of each thread begin in each part: behind those of the threads before it.
    place = ptr[:-1] + counts.cumsum(axis=0) - counts
    parts = np.empty(hashes.size, dtype=np.uint64)

    def pass_over_rows(kernel: Callable[..., None]) -> None:
        of = place.copy()
        _in_threads(kernel, [(*cut, hashes, shift, of[t], parts) for t, cut in enumerate(cuts)])

    def pass_over_parts(kernel: Callable[..., None]) -> None:
        # In more turns than threads, as one label may fill a part.
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
    """Start and stop of about equal ranges of 0 to length."""
    bounds = [length * number // count for number in range(count + 1)]
    return list(pairwise(bounds))


def _in_threads(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The task's results for each of the arguments."""
    if len(arguments) < 2 or torch.get_num_threads() < 2:
        return [task(*given) for given in arguments]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(lambda given: task(*given), arguments))


def _first_cells(codes: Codes) -> npt.NDArray[np.int64]:
    """Where each of the numbers 0, 1, … stands first, if they are by first appearance."""
    parts, highest = [], -1
    for start in range(0, len(codes), _SLICE):
        peak = np.maximum.accumulate(codes[start : start + _SLICE])
        new = np.diff(peak, prepend=highest) > 0
        if peak[0] <= highest:
            # The running maximum goes on from the slices before.
            peak = np.maximum(peak, highest)
            new = np.diff(peak, prepend=highest) > 0
        parts.append(np.flatnonzero(new) + start)
        highest = int(peak[-1])
    return np.concatenate(parts)


def _number_exactly(columns: Sequence[pl.Series], out: Codes) -> pl.Series:
    """What `_number` does, without hashes that could be the same for two labels."""
    width = len(columns)
    order = np.arange(width * len(columns[0])).reshape(width, -1).T.reshape(-1)
    cells = pl.concat([column.alias("label") for column in columns]).gather(pl.Series(order))
    labels = cells.unique(maintain_order=True)
    out[:] = _look_up_exactly(cells, labels).reshape(out.shape)
    return labels


def _look_up(series: pl.Series, known: Vocabulary) -> Codes:
    """The place of each label among distinct known ones; -1 where it is not known."""
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
    """Whether each row of the column is the label of its number; rows numbered -1 are let be."""

    def same(start: int) -> bool:
        part, rows = codes[start : start + _SLICE], column.slice(start, _SLICE)
        if (part < 0).any():
            rows, part = rows.filter(pl.Series(part >= 0)), part[part >= 0]
        return (labels.gather(pl.Series(np.ascontiguousarray(part))) == rows).all()

    return all(_in_threads(same, [(start,) for start in range(0, len(column), _SLICE)]))
