"""Counting what outranks an answer, tile by tile: in bounded memory, split over processes.

Scores are made in tiles of a fixed number of queries and candidates. Which queries and which
candidates share a tile, and where in it they stand, depends on the model and the queries alone, not
on how many processes there are: each makes those tiles that hold entities of its own, with
something in the places of the others, which do not count. Products of one shape, and of the same
numbers in the same places, have the same bits; so all that is counted is the same, too.

The true score comes from a tile of the same shape, whose candidates are the queries' answers. That
it is the score which the answer has in its own place, to the last bit, is what ties with equal
entities rest on; nothing else does.

The decision is a weighted sum of the heads' scores, which are products. Where no head is asked for
by itself, it is one product: of the heads' vectors side by side, the query's times their weights.
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

#: Of vectors and scores, whatever the model's is: in float64 the product of MKL gives equal columns
#: other last bits in other places.
_DTYPE = torch.float32
#: Queries and candidates of a tile at most: scores of four heads that a CPU's last cache holds, and
#: what keeps a GPU busy.
_SIDE, _SIDE_ON_GPU = 768, 4096
#: Tiles whose candidates are made at a time.
_MADE = 4
#: Queries of a tile are filled up to a multiple: products of a row or two are computed otherwise.
_ROWS = 16
#: Bytes of candidate tables that are kept; larger ones are made, used and forgotten bit by bit.
_KEPT = 2**28
#: Bytes of query vectors that such tables are used for at a time.
_QUERIES = 2**28
#: Bytes of relation matrices, of one head, that are made at a time.
_MATRICES = 2**24


class Batch(NamedTuple):
    """Queries whose vectors were made together, and what has been counted for them.

    Attributes
    ----------
    vectors : list of Tensor
        (heads, B', d) of heads of one width after the other; rows from B on are zeros. One head,
        with a weight of 1, where the decision is made as one product.
    weights : Tensor
        (B, heads) of the decision.
    truth : Tensor
        (B, heads + 1): the answers' scores.
    left_out : Tensor
        (P,) int64: positions of candidates that do not compete, in ascending lists, which queries
        may share.
    cursor, end : Tensor
        (B,) int64: those of query i that are still ahead are ``left_out[cursor[i]:end[i]]``.
    pairs : tuple or None
        Where the kernel does not count: see `_by_tile`.
    counts : Tensor
        (B, heads + 1, 2) int64: better and tied candidates.
    """

    vectors: list[Tensor]
    weights: Tensor
    truth: Tensor
    left_out: Tensor
    cursor: Tensor
    end: Tensor
    pairs: tuple[Tensor, Tensor, list[int]] | None
    counts: Tensor


class Counter:
    """Counts, for the queries that it is given, what outranks their answers.

    Parameters
    ----------
    model : IMVIA
        In evaluation mode.
    shards : Shards
        Whose entities this process counts.
    known : AnswerIndex
        Answers that do not compete.
    wanted : sequence of str
        Heads, and ``decision``, to count by. By the decision alone its scores are made without
        those of the heads, and may differ from their sum in the last bits.
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
        #: Whether the heads' scores are not made, only their sum.
        self.in_one = list(wanted) == [DECISION] and len(self.widths) > 1
        if self.in_one:
            self.widths = {"all": sum(model.widths.values())}
        names = [*self.widths, DECISION]
        self.wanted = torch.tensor([name in wanted for name in names])
        self.columns = [names.index(name) for name in wanted]
        # Positions are places in the list of candidates; those of this process are a range of them.
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
        #: Candidates that are made at a time.
        self.made = -(-tiles // chunks) * self.width
        a_row = sum(self.widths.values()) * _DTYPE.itemsize
        self.keeps = self.size * a_row <= _KEPT
        self._kept: list[Tensor] | None = None
        #: Queries, at least, to be given at a time, so that tables are not made too often.
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
        """(Q, wanted, 2) int64: how many candidates are better, and how many tied.

        Parameters
        ----------
        entity, relation, answer : Tensor
            (Q,) int64; known answers of a query and the answer itself do not compete.
        batch_size : int
            Queries whose vectors are made at a time, at most: fewer where they have many relations.
        on_part : callable, optional
            Called with the share that is done.
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
        """Into what (Q,) sorted queries are split: matrices of their relations take memory, too."""
        is_new = torch.ones_like(relation)
        is_new[1:] = relation[1:] != relation[:-1]
        a_matrix = self.model.settings.dim**2 * self.model.entity.weight.itemsize
        many = (is_new.cumsum(0) - 1) // max(1, _MATRICES // a_matrix)
        _, counts = torch.unique_consecutive(many, return_counts=True)
        return [min(batch_size, n - i) for n in counts.tolist() for i in range(0, n, batch_size)]

    def batch(self, entity: Tensor, relation: Tensor, answer: Tensor) -> Batch:
        """What is to be known of (B,) queries before their candidates are looked at."""
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
        return Batch(vectors, weights, truth, left_out, cursor, end, pairs, counts)

    def _left_out(
        self, entity: Tensor, relation: Tensor, answer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is left out for (B,) queries: their known answers and their own, as positions here.

        It is listed once for queries that ask the same, of which a relation may have many, with
        many known answers each. Returns ``left_out``, and where in it each query's list begins
        and ends; see `Batch`.
        """
        entities = self.model.num_entities
        asked, of = torch.unique(relation * entities + entity, return_inverse=True)
        row, col = self.known.pairs(asked % entities, asked // entities)
        key = torch.unique(row * entities + col)
        # An answer that is not known makes a list of its own.
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
        """Positions at which chunks of candidates begin that have some of this process's."""
        if self.first == self.last:
            return range(0)
        return range(self.first // self.made * self.made, self.last, self.made)

    def _tables(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield where a chunk begins, and its candidates' vectors, as `_make` makes them."""
        if self._kept is not None:
            for i, start in enumerate(self._chunks()):
                yield start, _rows(self._kept, slice(i * self.made, (i + 1) * self.made))
        else:
            for start in self._chunks():
                yield start, self._make(start)

    def _make(self, start: int) -> list[Tensor]:
        """Vectors (heads, made, d) of each width, of the candidates from a position on."""
        place = torch.arange(start, start + self.made, device=self.device).clamp_(max=self.size - 1)
        entity = place if self.chosen is None else self.chosen[place]
        # Those of other processes, too: what is made of theirs does not count, but how the rest is
        # made could depend on it.
        return self._vectors(entity)

    def _vectors(self, entity: Tensor) -> list[Tensor]:
        """Vectors (heads, made, d) of each width, of as many entities."""
        parts = self.model.candidates(self.relation, entity)
        if self.in_one:
            parts = {"all": torch.cat(list(parts.values()), dim=1)}
        return _stacked(parts, self.made)

    def _keep(self) -> list[Tensor]:
        """All vectors of this process, (heads, n, d) of each width, chunk after chunk."""
        if self._kept is None:
            chunks = self._chunks()
            self._kept = self._empty(len(chunks) * self.made)
            for i, start in enumerate(chunks):
                kept = _rows(self._kept, slice(i * self.made, (i + 1) * self.made))
                for part, made in zip(kept, self._make(start), strict=True):
                    part.copy_(made)
        return self._kept

    def _empty(self, rows: int) -> list[Tensor]:
        """(heads, rows, d) of each width, filled with whatever."""
        return [
            torch.empty(heads, rows, width, dtype=_DTYPE, device=self.device)
            for width, heads in _by_width(self.widths)
        ]

    def _answers(self, answer: Tensor) -> list[Tensor]:
        """Vectors (heads, B, d) of each width, of (B,) answers, on every process."""
        out = self._empty(len(answer))
        mine = self.shards.owned(answer)
        if self.keeps and self.chosen is None:
            if self.first < self.last:
                place = answer.clamp(self.first, self.last - 1) - self._chunks().start
                for part, kept in zip(out, self._keep(), strict=True):
                    torch.index_select(kept, 1, place, out=part)
        elif len(self.shards):
            for first in range(0, len(answer), self.made):
                # As many as are made elsewhere, so that they are made in the same way.
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
        """Yield rows of queries that make a tile, and the same filled up with zeros."""
        for start in range(0, rows, self.width):
            stop = min(start + self.width, rows)
            yield slice(start, stop), slice(start, _up(stop, _ROWS))

    def _truth(self, vectors: list[Tensor], weights: Tensor, answer: Tensor) -> Tensor:
        """(B, heads + 1) scores of the answers."""
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

    def _count_chunk(self, batch: Batch, start: int, tables: list[Tensor]) -> None:
        """Count the candidates of a chunk that begins at a position."""
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
        """Pairs of a query and a position in the order of tiles, then of slices; where each begins.

        The first pair of the tile i and the slice j has the number ``begin[i * slices + j]``.
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
        self, batch: Batch, rows: slice, scores: Tensor, begin: int, low: int, high: int
    ) -> None:
        """What the kernel `outranked` does."""
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
    """(heads, rows, width) scores of a tile."""
    heads = sum(len(part) for part in queries)
    out = queries[0].new_empty(heads, queries[0].shape[1], candidates[0].shape[1])
    first = 0
    for query, candidate in zip(queries, candidates, strict=True):
        torch.bmm(query, candidate.transpose(1, 2), out=out[first : first + len(query)])
        first += len(query)
    return out


def _with_decision(scores: Tensor, weights: Tensor) -> list[Tensor]:
    """(rows, width) scores by each head and, last, by the decision."""
    return [*scores, weighted_sum(scores, weights)]


def _filled(rows: Tensor, count: int) -> Tensor:
    """(heads, n, d) rows with as many zeros behind them as make the count."""
    return nn.functional.pad(rows, (0, 0, 0, count - rows.shape[1]))


def _rows(parts: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """Some of the rows of (heads, n, d), of each width."""
    return [part[:, rows] for part in parts]


def _by_width(widths: Mapping[str, int]) -> list[tuple[int, int]]:
    """Widths, and how many heads in succession have each."""
    return [(width, len(list(same))) for width, same in itertools.groupby(widths.values())]


def _stacked(rows: Mapping[str, Tensor], count: int) -> list[Tensor]:
    """(heads, count, d) of (n, d) rows a head, of each width, with zeros behind them."""
    same = itertools.groupby(rows.values(), lambda part: part.shape[1])
    return [_filled(torch.stack(list(parts)).to(_DTYPE), count) for _, parts in same]


def _up(number: int, multiple: int) -> int:
    """The next multiple from a number on; at least one."""
    return max(1, -(-number // multiple)) * multiple


__all__ = ["Batch", "Counter"]
