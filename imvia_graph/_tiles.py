"""Counting the candidates that outrank an answer, tile by tile, in bounded memory.

Scores are computed in tiles of a fixed number of queries and candidates. Which queries and
candidates share a tile, and their places in it, depend on the model and the queries alone, not on
the number of processes. Each process computes the tiles that hold entities of its own; the places
of other entities are filled with values that are not counted. Products of one shape, with the same
numbers in the same places, have the same bits, and so the counts are the same for any number of
processes.

The true score comes from a tile of the same shape, whose candidates are the answers of the queries.
Ties with equal entities rely on this score having the same bits as the score of the answer in its
own tile; nothing else does.

The decision is a weighted sum of the scores of the heads. Where the score of no single head is
wanted, one product computes it: that of the concatenated vectors of all heads, the query vectors
multiplied by the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imvia_graph import _kernels
from imvia_graph.answers import AnswerIndex, expand, pointer
from imvia_graph.distributed import Shards
from imvia_graph.model import DECISION, IMVIA
from imvia_graph.nn.decision_fusion import weighted_sum

#: Dtype of vectors and scores, also of a model in float64: there, the product of MKL gives equal
#: columns different last bits in different places.
_DTYPE = torch.float32
#: Maximum number of queries, and of candidates, of a tile: the last-level cache of a CPU holds the
#: scores of four heads; on a GPU, enough to keep it busy.
_SIDE, _SIDE_ON_GPU = 768, 4096
#: Number of tiles whose candidate vectors are computed at a time.
_MADE = 4
#: The queries of a tile are padded to a multiple of this: BLAS computes products of one or two rows
#: by other routines.
_ROWS = 16
#: Maximum size in bytes of candidate tables that are kept; larger ones are computed in chunks for
#: each group of queries.
_KEPT = 2**28
#: Bytes of query vectors in such a group.
_QUERIES = 2**28
#: Bytes of relation matrices of one head that are computed at a time.
_MATRICES = 2**24


class CountedBatch(NamedTuple):
    """Queries whose vectors were computed together, and their counts so far.

    Attributes
    ----------
    vectors : list of Tensor
        (heads, B', d) for each run of heads of one width; rows from B on are zeros. One head with
        a weight of 1 where one product computes the decision.
    weights : Tensor
        (B, heads) weights of the decision.
    truth : Tensor
        (B, heads + 1) scores of the answers.
    left_out : Tensor
        (P,) int64: positions of filtered candidates, in ascending lists, which queries may share.
    cursor, end : Tensor
        (B,) int64: ``left_out[cursor[i]:end[i]]`` are the filtered candidates of query i in tiles
        that have not been counted yet.
    pairs : tuple or None
        Result of `_by_tile`, or None where the compiled kernel counts.
    counts : Tensor
        (B, heads + 1, 2) int64: numbers of better and of tied candidates.
    """

    vectors: list[Tensor]
    weights: Tensor
    truth: Tensor
    left_out: Tensor
    cursor: Tensor
    end: Tensor
    pairs: tuple[Tensor, Tensor, list[int]] | None
    counts: Tensor


class RankCounter:
    """Counts the candidates that outrank the answers of queries.

    Parameters
    ----------
    model : IMVIA
        In evaluation mode.
    shards : Shards
        The split of the entities over processes.
    known : AnswerIndex
        Answers that are filtered.
    wanted : sequence of str
        Heads, and ``decision``, by whose scores to count. The decision alone is computed without
        the scores of the heads, and may differ from their weighted sum in the last bits.
    chosen : Tensor, optional
        (C,) int64, ascending and distinct: the candidates. Default: all entities.
    relation : Tensor, optional
        A scalar: the relation of all queries, for ``candidates="relation"``.
    """

    def __init__(
        self,
        model: IMVIA,
        shards: Shards,
        known: AnswerIndex,
        wanted: Sequence[str],
        chosen: Tensor | None = None,
        relation: Tensor | None = None,
    ) -> None:
        self.model, self.shards, self.known, self.relation = model, shards, known, relation
        self.chosen = chosen
        self.device = model.device
        self.widths = dict(model.widths)
        #: Whether only the decision is computed, by one product.
        self.in_one = list(wanted) == [DECISION] and len(self.widths) > 1
        if self.in_one:
            self.widths = {"all": sum(model.widths.values())}
        names = [*self.widths, DECISION]
        self.wanted = torch.tensor([name in wanted for name in names])
        self.columns = [names.index(name) for name in wanted]
        # Positions are indices into the candidates; those of this process are one range.
        self.size = shards.num_entities if chosen is None else len(chosen)
        self.first, self.last = shards.start, shards.stop
        if chosen is not None:
            own = chosen.new_tensor([shards.start, shards.stop])
            self.first, self.last = torch.searchsorted(chosen, own).tolist()
        side = _SIDE if self.device.type == "cpu" else _SIDE_ON_GPU
        tiles = max(1, -(-self.size // side))
        self.width = _up(-(-self.size // tiles), 16)
        tiles = max(1, -(-self.size // self.width))
        chunks = -(-tiles // _MADE)
        #: Number of candidates whose vectors are computed at a time, a chunk.
        self.made = -(-tiles // chunks) * self.width
        a_row = sum(self.widths.values()) * _DTYPE.itemsize
        self.keeps = self.size * a_row <= _KEPT
        self._kept: list[Tensor] | None = None
        #: Minimum number of queries of a call of `count`, for which tables are computed anew.
        self.queries = 1 if self.keeps else max(1, _QUERIES // a_row)
        self.kernels = _kernels.load("scores") if self.device.type == "cpu" else None

    def count(
        self,
        entity: Tensor,
        relation: Tensor,
        answer: Tensor,
        batch_size: int,
        on_part: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Return (Q, wanted, 2) int64 numbers of better and of tied candidates.

        Parameters
        ----------
        entity, relation, answer : Tensor
            (Q,) int64, sorted by relation. Known answers of a query and the answer are filtered.
        batch_size : int
            Maximum number of queries whose vectors are computed at a time; fewer where they have
            many relations.
        on_part : callable, optional
            Called with the share of the work that is done.
        """
        if not len(entity):
            return torch.zeros(0, len(self.columns), 2, dtype=torch.int64, device=self.device)
        sizes = self._sizes(relation, batch_size)
        parts = [part.split(sizes) for part in (entity, relation, answer)]
        batches = [self.batch(*one) for one in zip(*parts, strict=True)]
        steps = len(batches) * len(self._chunks())
        done = 0
        for start, tables in self._tables():
            for batch in batches:
                self._count_chunk(batch, start, tables)
                done += 1
                if on_part:
                    on_part(done / steps)
        counts = torch.cat([batch.counts[:, self.columns] for batch in batches])
        return self.shards.sum_(counts)

    def _sizes(self, relation: Tensor, batch_size: int) -> list[int]:
        """Split (Q,) sorted queries into batches that bound the memory for relation matrices."""
        is_new = torch.ones_like(relation)
        is_new[1:] = relation[1:] != relation[:-1]
        a_matrix = self.model.settings.dim**2 * self.model.entity.weight.itemsize
        many = (is_new.cumsum(0) - 1) // max(1, _MATRICES // a_matrix)
        _, counts = torch.unique_consecutive(many, return_counts=True)
        return [min(batch_size, n - i) for n in counts.tolist() for i in range(0, n, batch_size)]

    def batch(self, entity: Tensor, relation: Tensor, answer: Tensor) -> CountedBatch:
        """Return the batch of (B,) queries, whose counts are zeros."""
        rows = len(entity)
        query = self.model.queries_alike(entity, relation)
        weights = self.model.decision_weights(relation)
        if self.in_one:
            shares = zip(query.values(), weights.split(1, dim=1), strict=True)
            query = {"all": torch.cat([part * share for part, share in shares], dim=1)}
            weights = weights.new_ones(rows, 1)
        vectors = _stacked(query, _up(rows, _ROWS))
        weights = weights.to(vectors[0].dtype).contiguous()
        truth = self._truth(vectors, weights, answer)
        left_out, cursor, end = self._left_out(entity, relation, answer)
        pairs = None
        if self.kernels is None:
            row, place = expand(cursor, end - cursor)
            pairs = self._by_tile(row, left_out[place], rows)
        counts = torch.zeros(rows, len(self.wanted), 2, dtype=torch.int64, device=self.device)
        return CountedBatch(vectors, weights, truth, left_out, cursor, end, pairs, counts)

    def _left_out(
        self, entity: Tensor, relation: Tensor, answer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """List the positions of the known answers of (B,) queries and of their own answers.

        Queries of the same entity and relation share a list, since a relation may have many of
        them, each with many known answers. Returns ``left_out`` and where in it the list of each
        query begins and ends; see `CountedBatch`.
        """
        entities = self.model.num_entities
        asked, of = torch.unique(relation * entities + entity, return_inverse=True)
        row, col = self.known.pairs(asked % entities, asked // entities)
        key = torch.unique(row * entities + col)
        # A query whose answer is not known has a list of its own.
        own = of * entities + answer
        place = torch.searchsorted(key, own)
        is_known = torch.cat([key, key.new_full((1,), -1)])[place] == own
        alone = (~is_known).nonzero().flatten()
        of[alone] = len(asked) + torch.arange(len(alone), device=self.device)
        row, col = self.known.pairs(entity[alone], relation[alone])
        more = [(len(asked) + row) * entities + col, of[alone] * entities + answer[alone]]
        key = torch.cat([key, torch.unique(torch.cat(more))])
        row, col = key // entities, key % entities
        if self.chosen is not None:
            place = torch.searchsorted(self.chosen, col).clamp_(max=max(self.size - 1, 0))
            there = self.chosen[place] == col if self.size else torch.zeros_like(col).bool()
            row, col = row[there], place[there]
        mine = (col >= self.first) & (col < self.last)
        ptr = pointer(torch.bincount(row[mine], minlength=len(asked) + len(alone)))
        return col[mine], ptr[of], ptr[of + 1]

    # -- candidates -------------------------------------------------------------------------------

    def _chunks(self) -> range:
        """Return the first positions of the chunks that hold candidates of this process."""
        if self.first == self.last:
            return range(0)
        return range(self.first // self.made * self.made, self.last, self.made)

    def _tables(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the first position of each chunk and the vectors of its candidates; see `_make`."""
        if self._kept is not None:
            for i, start in enumerate(self._chunks()):
                yield start, _rows(self._kept, slice(i * self.made, (i + 1) * self.made))
        else:
            for start in self._chunks():
                yield start, self._make(start)

    def _make(self, start: int) -> list[Tensor]:
        """Return vectors (heads, made, d) of each width, of the candidates from a position on."""
        place = torch.arange(start, start + self.made, device=self.device).clamp_(max=self.size - 1)
        entity = place if self.chosen is None else self.chosen[place]
        # Including entities of other processes: their vectors are not used, but the number of rows
        # could change the bits of the others.
        return self._vectors(entity)

    def _vectors(self, entity: Tensor) -> list[Tensor]:
        """Return vectors (heads, made, d) of each width, of as many entities."""
        parts = self.model.candidates(self.relation, entity)
        if self.in_one:
            parts = {"all": torch.cat(list(parts.values()), dim=1)}
        return _stacked(parts, self.made)

    def _keep(self) -> list[Tensor]:
        """Return all vectors of this process, (heads, n, d) of each width, chunk after chunk."""
        if self._kept is None:
            chunks = self._chunks()
            self._kept = self._empty(len(chunks) * self.made)
            for i, start in enumerate(chunks):
                kept = _rows(self._kept, slice(i * self.made, (i + 1) * self.made))
                for part, made in zip(kept, self._make(start), strict=True):
                    part.copy_(made)
        return self._kept

    def _empty(self, rows: int) -> list[Tensor]:
        """Return uninitialised (heads, rows, d) tensors of each width."""
        return [
            torch.empty(heads, rows, width, dtype=_DTYPE, device=self.device)
            for width, heads in _by_width(self.widths)
        ]

    def _answers(self, answer: Tensor) -> list[Tensor]:
        """Return vectors (heads, B, d) of each width, of (B,) answers, on every process."""
        out = self._empty(len(answer))
        mine = self.shards.owned(answer)
        if self.keeps and self.chosen is None:
            if self.first < self.last:
                place = answer.clamp(self.first, self.last - 1) - self._chunks().start
                for part, kept in zip(out, self._keep(), strict=True):
                    torch.index_select(kept, 1, place, out=part)
        elif len(self.shards):
            for first in range(0, len(answer), self.made):
                # As many as in `_make`, for the same bits.
                part = answer[first : first + self.made]
                filled = torch.cat([part, part[:1].expand(self.made - len(part))])
                for whole, made in zip(out, self._vectors(filled), strict=True):
                    whole[:, first : first + len(part)] = made[:, : len(part)]
        if not self.shards.alone:
            for part in out:
                self.shards.sum_(part.masked_fill_(~mine[None, :, None], 0))
        return out

    # -- scores -----------------------------------------------------------------------------------

    def _slices(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """Yield the rows of each tile of queries, and the rows with its padding."""
        for start in range(0, rows, self.width):
            stop = min(start + self.width, rows)
            yield slice(start, stop), slice(start, _up(stop, _ROWS))

    def _truth(self, vectors: list[Tensor], weights: Tensor, answer: Tensor) -> Tensor:
        """Return (B, heads + 1) scores of the answers."""
        answers = self._answers(answer)
        found = weights.new_empty(len(answer), len(self.wanted))
        for rows, filled in self._slices(len(answer)):
            mine = [_filled(part, self.width) for part in _rows(answers, rows)]
            scores = _scores(_rows(vectors, filled), mine)
            if self.kernels is not None:
                given = (scores, weights[rows], found[rows])
                cuts = _kernels.even_cuts(rows.stop - rows.start)
                _kernels.share_out(self.kernels.diagonals, cuts, given)
            else:
                every = _with_decision(scores[:, : rows.stop - rows.start], weights[rows])
                for m, part in enumerate(every):
                    found[rows, m] = part.diagonal()
        return found

    def _count_chunk(self, batch: CountedBatch, start: int, tables: list[Tensor]) -> None:
        """Count the candidates of the chunk that begins at a position."""
        for begin in range(start, start + self.made, self.width):
            low, high = max(self.first - begin, 0), min(self.last - begin, self.width)
            if low >= high:
                continue
            mine = _rows(tables, slice(begin - start, begin - start + self.width))
            place = torch.tensor([begin, low, high])
            for rows, filled in self._slices(len(batch.truth)):
                scores = _scores(_rows(batch.vectors, filled), mine)
                if self.kernels is None:
                    self._count_plainly(batch, rows, scores, begin, low, high)
                    continue
                given = (
                    scores,
                    batch.weights[rows],
                    batch.truth[rows],
                    self.wanted,
                    place,
                    batch.left_out,
                    batch.cursor[rows],
                    batch.end[rows],
                    batch.counts[rows],
                )
                cuts = _kernels.even_cuts(rows.stop - rows.start)
                _kernels.share_out(self.kernels.outranked, cuts, given)

    # -- without the kernel -----------------------------------------------------------------------

    def _by_tile(self, row: Tensor, col: Tensor, rows: int) -> tuple[Tensor, Tensor, list[int]]:
        """Sort pairs of a query and a position by tile, then by slice of queries.

        Returns the sorted queries and positions, and the index ``begin[i * slices + j]`` of the
        first pair of tile i and slice j.
        """
        slices = -(-rows // self.width)
        first = self._chunks().start // self.width
        place = (col // self.width - first) * slices + row // self.width
        order = torch.argsort(place, stable=True)
        tiles = len(self._chunks()) * self.made // self.width
        every = torch.arange(tiles * slices + 1, device=place.device)
        begin: list[int] = torch.searchsorted(place[order], every).tolist()
        return row[order], col[order], begin

    def _count_plainly(
        self, batch: CountedBatch, rows: slice, scores: Tensor, begin: int, low: int, high: int
    ) -> None:
        """Count like the kernel `outranked`."""
        assert batch.pairs is not None
        row, col, starts = batch.pairs
        tile = begin // self.width - self._chunks().start // self.width
        which = tile * -(-len(batch.truth) // self.width) + rows.start // self.width
        pairs = slice(*starts[which : which + 2])
        row, col = row[pairs] - rows.start, col[pairs] - begin
        counts = batch.counts[rows]
        every = _with_decision(scores[:, : rows.stop - rows.start], batch.weights[rows])
        for m, part in enumerate(every):
            if not self.wanted[m]:
                continue
            truth = batch.truth[rows, m]
            better = (~(part[:, low:high] <= truth[:, None])).sum(1)
            tied = (part[:, low:high] == truth[:, None]).sum(1)
            value, of_row = part[row, col], truth[row]
            better.index_add_(0, row, -(~(value <= of_row)).long())
            tied.index_add_(0, row, -(value == of_row).long())
            counts[:, m, 0] += better
            counts[:, m, 1] += tied


def _scores(queries: Sequence[Tensor], candidates: Sequence[Tensor]) -> Tensor:
    """Return the (heads, rows, width) scores of a tile."""
    heads = sum(len(part) for part in queries)
    out = queries[0].new_empty(heads, queries[0].shape[1], candidates[0].shape[1])
    first = 0
    for query, candidate in zip(queries, candidates, strict=True):
        torch.bmm(query, candidate.transpose(1, 2), out=out[first : first + len(query)])
        first += len(query)
    return out


def _with_decision(scores: Tensor, weights: Tensor) -> list[Tensor]:
    """Return (rows, width) scores of each head and, last, of the decision."""
    return [*scores, weighted_sum(scores, weights)]


def _filled(rows: Tensor, count: int) -> Tensor:
    """Pad (heads, n, d) with rows of zeros to a number of rows."""
    return nn.functional.pad(rows, (0, 0, 0, count - rows.shape[1]))


def _rows(parts: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Return a slice of the rows of (heads, n, d), of each width."""
    return [part[:, rows] for part in parts]


def _by_width(widths: Mapping[str, int]) -> list[tuple[int, int]]:
    """Return runs of heads of one width: the width and the number of heads."""
    return [(width, len(list(same))) for width, same in itertools.groupby(widths.values())]


def _stacked(rows: Mapping[str, Tensor], count: int) -> list[Tensor]:
    """Stack (n, d) rows of heads of one width into (heads, count, d), padded with zeros."""
    same = itertools.groupby(rows.values(), lambda part: part.shape[1])
    return [_filled(torch.stack(list(parts)).to(_DTYPE), count) for _, parts in same]


def _up(number: int, multiple: int) -> int:
    """Round a number up to a multiple, at least one times it."""
    return max(1, -(-number // multiple)) * multiple


__all__ = ["CountedBatch", "RankCounter"]
