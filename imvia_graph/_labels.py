"""Labels to ids, vectorised: vocabularies of tens of millions of triples in seconds.

Strings are hashed to 64 bits, the hashes are numbered in the order of first appearance, and every
row's label is then compared with the label that its number stands for. So the result is exact: two
labels of one hash would be noticed, and the slower exact way taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import torch
from torch import Tensor

from imvia_graph.errors import DataError

#: Rows that are compared at a time, so that comparing needs little memory.
_SLICE = 2_000_000

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
    relation, relations = _number([whole["relation"]])
    triples[:, 1] = relation
    del relation
    ends, entities = _number([whole["head"], whole["tail"]])
    triples[:, ::2] = ends.reshape(-1, 2)
    del ends
    parts = torch.from_numpy(triples).split([frame.height for frame in frames])
    return entities, relations, list(parts)


def encode_labels(
    labels: Sequence[str] | pl.Series, vocabulary: Sequence[str] | pl.Series, where: str
) -> Tensor:
    """Labels to ids: (n,) int64. Unknown labels are a `DataError` that says how many and which."""
    series = pl.Series("label", labels, dtype=pl.String)
    known = pl.Series("label", vocabulary, dtype=pl.String)
    ids = _look_up(series, known)
    missing = ids < 0
    if missing.any():
        unknown = series.filter(pl.Series(missing))
        raise DataError(
            f"{where}: {len(unknown)} rows name {unknown.n_unique()} labels that are not in the"
            f" vocabulary, first {unknown[0]!r} in row {int(missing.argmax()) + 1}. Add them or"
            " leave these rows out."
        )
    return torch.from_numpy(ids)


def encode_triples(
    frame: pl.DataFrame,
    entities: Sequence[str] | pl.Series,
    relations: Sequence[str] | pl.Series,
    where: str = "triples",
) -> Tensor:
    """A frame of label triples to (n, 3) int64 ids."""
    ends = pl.Series("label", entities, dtype=pl.String)
    kinds = pl.Series("label", relations, dtype=pl.String)
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


def _number(columns: Sequence[pl.Series]) -> tuple[Codes, pl.Series]:
    """Number the labels of columns of one length, read row by row, by first appearance.

    Returns the number of every cell, row by row, and the labels in the order of their numbers.
    """
    width, length = len(columns), len(columns[0])
    if not length:
        return np.empty(0, dtype=np.int64), pl.Series("label", [], dtype=pl.String)
    hashes = np.empty((length, width), dtype=np.uint64)
    for place, column in enumerate(columns):
        start = 0
        for chunk in column.get_chunks():
            hashes[start : start + len(chunk), place] = chunk.hash().to_numpy()
            start += len(chunk)
    codes = pd.factorize(hashes.reshape(-1))[0].astype(np.int64, copy=False)
    del hashes
    cells = _first_cells(codes)
    # Row and column of the cells at which each label stands first.
    labels = pl.Series("label", [None], dtype=pl.String).new_from_index(0, len(cells))
    for place, column in enumerate(columns):
        here = np.flatnonzero(cells % width == place)
        found = column.gather(pl.Series(cells[here] // width))
        labels = labels.scatter(pl.Series(here), found) if width > 1 else found.alias("label")
    for place, column in enumerate(columns):
        if not _same(column, labels, codes[place::width]):
            return _number_exactly(columns)
    return codes, labels


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


def _number_exactly(columns: Sequence[pl.Series]) -> tuple[Codes, pl.Series]:
    """What `_number` gives, without hashes that could be the same for two labels."""
    width = len(columns)
    order = np.arange(width * len(columns[0])).reshape(width, -1).T.reshape(-1)
    cells = pl.concat([column.alias("label") for column in columns]).gather(pl.Series(order))
    labels = cells.unique(maintain_order=True)
    return _look_up_exactly(cells, labels), labels


def _look_up(series: pl.Series, known: pl.Series) -> Codes:
    """The place of each label among distinct known ones; -1 where it is not known."""
    index = pd.Index(known.hash().to_numpy())
    if not index.is_unique:
        return _look_up_exactly(series, known)
    codes: Codes = index.get_indexer(series.hash().to_numpy()).astype(np.int64, copy=False)
    if not _same(series, known, codes):
        return _look_up_exactly(series, known)
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
    for start in range(0, len(column), _SLICE):
        part = codes[start : start + _SLICE]
        rows = column.slice(start, _SLICE)
        if (part < 0).any():
            rows, part = rows.filter(pl.Series(part >= 0)), part[part >= 0]
        if not (labels.gather(pl.Series(np.ascontiguousarray(part))) == rows).all():
            return False
    return True
