"""The queries of an epoch in batches, with their positives and candidates."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imvia_graph._streams import Streams
from imvia_graph.answers import AnswerIndex, expand, pointer
from imvia_graph.kg import MultiViewKG
from imvia_graph.losses import Positives, Sampled
from imvia_graph.settings import Settings


@dataclass
class Batch:
    """A batch of B queries (entity, relation) with their positives and candidates.

    If all entities are candidates, ``candidate`` and ``sampled`` are None. In the regime *sampled*,
    either ``sampled`` has the candidates that all queries share, or ``candidate``, (B, 1 +
    negatives) int64, has those of each query, with the answer in column 0. ``most_relations`` is an
    upper bound of the number of distinct relations, if it is known.
    """

    entity: Tensor
    relation: Tensor
    positives: Positives
    candidate: Tensor | None = None
    sampled: Sampled | None = None
    most_relations: int | None = None

    def of(self, rows: Tensor) -> Batch:
        """Return the batch of some of the queries."""
        new_row = torch.full_like(self.entity, -1)
        new_row[rows] = torch.arange(len(rows), device=rows.device)
        row, col, weight, _ = self.positives
        row = new_row[row]
        weight = None if weight is None else weight[rows]
        positives = Positives(row[row >= 0], col[row >= 0], weight)
        candidate = None if self.candidate is None else self.candidate[rows]
        sampled = self.sampled
        if sampled is not None:
            row = new_row[sampled.row]
            kept = row >= 0
            sampled = sampled._replace(row=row[kept], col=sampled.col[kept])
        return Batch(self.entity[rows], self.relation[rows], positives, candidate, sampled)


class Batches:
    """The queries of an epoch in batches, shuffled with a generator of their own.

    Batches are of nearly equal size, so that none is small. With ``candidates="relation"``, a batch
    has queries of few relations (`pack`).

    Notes
    -----
    In the regime 1vsall, each triple gives two queries with one answer each. Queries that differ
    only in the answer have the same scores, and their softmax losses share the sum over the
    candidates, so up to `_ANSWERS_AT_A_TIME` of them form one row of a batch, whose weight is their
    number. A batch has the number of rows that ``batch_size`` queries take on average.
    """

    def __init__(self, kg: MultiViewKG, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.num_entities = kg.num_entities
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.order_state = self.drawn = self.generator.get_state()
        answers = kg.answers(["train"])
        at_a_time = {"kvsall": max(len(answers.answer), 1), "sampled": 1}.get(
            settings.regime, _ANSWERS_AT_A_TIME if settings.loss == "softmax" else 1
        )
        #: Rows of batches: (query of the index, position of its first answer, number of answers).
        #: None if each answer is a row.
        self.rows = None if at_a_time == 1 else _rows_of(answers, at_a_time).to(device)
        self.num_rows = len(answers.answer) if self.rows is None else len(self.rows)
        #: Number of the queries that `batch_size` counts.
        self.size = len(answers.key if settings.regime == "kvsall" else answers.answer)
        self.answers = answers.to(device)
        #: Largest numbers of positives and of distinct relations in a batch of `filled`.
        self.most_positives = self.most_relations = 0
        #: The number of answers and the relation of each row, on the CPU.
        self._measured: tuple[Tensor, Tensor] | None = None
        self.ranges = None
        if settings.candidates == "relation" and self.size:
            counts = self._relations().unique(return_counts=True)[1].tolist()
            limit = max(1, settings.batch_size * self.num_rows // self.size)
            self.ranges = pack(counts, limit)
        self.sampler = None
        if settings.regime == "sampled" and settings.negative_sampling != "query":
            self.sampler = Sampler(kg, self.answers, settings)
        elif settings.regime == "sampled":
            self.true_keys = self.answers.pair_keys()

    def __len__(self) -> int:
        if self.ranges is not None:
            return len(self.ranges)
        return math.ceil(self.size / self.settings.batch_size)

    @property
    def most_rows(self) -> int:
        """Rows of the largest batch."""
        return math.ceil(self.num_rows / max(len(self), 1))

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()

    def epoch(self, done: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch; skip the first ``done`` of an epoch that is resumed.

        ``order_state`` holds the generator's state from before the order of the epoch was drawn,
        ``drawn`` the one from before the last batch was drawn.
        """
        for part in self._begin(done)[done:]:
            self.drawn = self.generator.get_state()
            yield self._batch(self._rows(part.to(self.answers.key.device)))

    def _begin(self, done: int) -> list[Tensor]:
        """Draw the rows of an epoch's batches or, if some are done, draw the same ones again."""
        if not done:
            self.order_state = self.generator.get_state()
            return self._parts()
        now = self.generator.get_state()
        self.generator.set_state(self.order_state)
        parts = self._parts()
        self.generator.set_state(now)
        return parts

    def rows_of_epoch(self, done: int = 0) -> Iterator[Tensor]:
        """Yield the (B, 3) int64 rows of each batch of an epoch, on the device, for `filled`.

        Before the first batch, `most_positives` and `most_relations` are raised where the epoch's
        batches need it; they never fall.
        """
        parts = self._begin(done)
        if not parts:
            return
        self._measure(parts)
        rows = self._rows(torch.cat(parts).to(self.answers.key.device))
        for part in rows.split([len(part) for part in parts])[done:]:
            self.drawn = self.generator.get_state()
            yield part

    def _measure(self, parts: Sequence[Tensor]) -> None:
        """Raise `most_positives` and `most_relations` to what batches of these rows need."""
        if self._measured is None:
            place = torch.arange(self.num_rows, device=self.answers.key.device)
            self._measured = self._rows(place)[:, 2].cpu(), self._relations().cpu()
            # A fixed seed: a resumed run measures the same orders, whichever epoch it begins with.
            drawn = torch.Generator().manual_seed(0)
            for _ in range(_MEASURED_EPOCHS):
                order = torch.randperm(self.num_rows, generator=drawn)
                self._measure(order.tensor_split(len(parts)))
        count, relation = self._measured
        positives = max(int(count[part].sum()) for part in parts)
        relations = max(len(relation[part].unique()) for part in parts)
        # With a margin for later epochs.
        if positives > self.most_positives:
            self.most_positives = -(-positives * 5 // 4 // 128) * 128
        if relations > self.most_relations:
            self.most_relations = -(-relations * 9 // 8 // 16) * 16

    def filled(self, rows: Tensor, streams: Streams | None = None) -> Batch:
        """Return the batch of (B, 3) rows in shapes that depend on B only; see `Positives.counts`.

        It is for the regimes in which all entities are candidates, and does not make the host wait
        for the device. With ``streams``, the positives are computed in the stream ``positives``,
        which the caller must `Streams.meet` before using them.
        """
        query, start, count = rows.unbind(1)
        streams = Streams() if streams is None else streams
        with streams.beside("positives", streams.begun, join=False):
            positives = self._filled(start, count)
        key = self.answers.key[query]
        entity, relation = key % self.num_entities, key // self.num_entities
        return Batch(entity, relation, positives, most_relations=self.most_relations)

    def _filled(self, start: Tensor, count: Tensor) -> Positives:
        """Return the positives of `filled`, padded to `most_positives`."""
        ptr = pointer(count)
        place = torch.arange(self.most_positives, device=count.device)
        at = torch.minimum(place, ptr[-1] - 1)
        row = torch.searchsorted(ptr, at, right=True) - 1
        col = self.answers.answer[start[row] + at - ptr[row]]
        return Positives(row, col, self._weight(count), (place == at).float())

    def _weight(self, count: Tensor) -> Tensor | None:
        """Return the (B,) weights of rows with ``count`` answers each; None for equal weights."""
        weighted = self.settings.regime == "1vsall" and self.settings.loss == "softmax"
        return count.float() if weighted else None

    def _rows(self, place: Tensor) -> Tensor:
        """Return (n, 3) int64 for (n,) rows: query, position of the first answer, their number."""
        if self.rows is not None:
            return self.rows[place]
        query = torch.searchsorted(self.answers.ptr, place, right=True) - 1
        return torch.stack([query, place, torch.ones_like(place)], dim=1)

    def _relations(self) -> Tensor:
        """Return the relation of each row."""
        query = self._rows(torch.arange(self.num_rows, device=self.answers.key.device))[:, 0]
        return self.answers.key[query] // self.num_entities

    def _parts(self) -> list[Tensor]:
        """Draw an order of the rows, and return the rows of each batch."""
        order = torch.randperm(self.num_rows, generator=self.generator)
        if self.ranges is not None:
            relation = self._relations().cpu()
            order = order[torch.argsort(relation[order], stable=True)]
            parts = [torch.cat([order[start:stop] for start, stop in part]) for part in self.ranges]
            return [parts[i] for i in torch.randperm(len(parts), generator=self.generator)]
        return list(order.tensor_split(len(self)))

    def _batch(self, rows: Tensor) -> Batch:
        """Return the batch of (B, 3) rows, with negatives if they are sampled."""
        query, start, count = rows.unbind(1)
        key = self.answers.key[query]
        entity, relation = key % self.num_entities, key // self.num_entities
        row, position = expand(start, count)
        answer = self.answers.answer[position]
        if self.settings.regime == "kvsall":
            return Batch(entity, relation, Positives(row, answer))
        if self.settings.regime == "1vsall":
            return Batch(entity, relation, Positives(row, answer, self._weight(count)))
        if self.sampler is not None:
            return self._with_shared(self.sampler, query, entity, relation, answer)
        negative = self._entities(len(rows), self.settings.negatives)
        for _ in range(_REDRAWS):
            true = self.answers.contains(entity, relation, negative, self.true_keys)
            negative = torch.where(true, self._entities(*negative.shape), negative)
        candidate = torch.cat([answer[:, None], negative], dim=1)
        return Batch(entity, relation, Positives(row, torch.zeros_like(row)), candidate)

    def _entities(self, *shape: int) -> Tensor:
        drawn = torch.randint(self.num_entities, shape, generator=self.generator)
        return drawn.to(self.answers.key.device)

    def _with_shared(
        self, sampler: Sampler, query: Tensor, entity: Tensor, relation: Tensor, answer: Tensor
    ) -> Batch:
        """Return the batch of queries that share as candidates their answers and drawn entities."""
        candidate, log_q = sampler.draw(relation, answer, self.generator)
        positive = torch.searchsorted(candidate, answer)
        row, col = self._answers_among(query, candidate)
        other = col != positive[row]
        sampled = Sampled(candidate, log_q, row[other], col[other])
        row = torch.arange(len(query), device=query.device)
        return Batch(entity, relation, Positives(row, positive), sampled=sampled)

    def _answers_among(self, query: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row, col) of all pairs of (B,) queries and (C,) ascending candidates that answer.

        The pairs of a query with fewer answers than candidates are found by searching the answers
        in the candidates; those of the other queries the other way around.
        """
        start = self.answers.ptr[query]
        count = self.answers.ptr[query + 1] - start
        many = count > len(candidate)
        row, position = expand(start, torch.where(many, 0, count))
        answer = self.answers.answer[position]
        col = torch.searchsorted(candidate, answer).clamp(max=len(candidate) - 1)
        found = candidate[col] == answer
        rows, cols = [row[found]], [col[found]]
        places = many.nonzero().flatten()
        for one in query[places].unique().tolist():
            first, last = self.answers.ptr[one : one + 2].tolist()
            known = self.answers.answer[first:last]
            place = torch.searchsorted(known, candidate).clamp(max=last - first - 1)
            cols_of = (known[place] == candidate).nonzero().flatten()
            rows_of = places[query[places] == one]
            rows.append(rows_of.repeat_interleave(len(cols_of)))
            cols.append(cols_of.repeat(len(rows_of)))
        return torch.cat(rows), torch.cat(cols)


class Sampler:
    r"""Draws the candidates that the queries of a batch share: their answers, and random entities.

    Entity j is among the candidates with probability

    .. math:: q_j = 1 - (1 - p_j)^n \prod_{i=0}^{c_j - 1} \left(1 - \frac{B}{A - i}\right)

    where :math:`c_j` of the A training answers are j, the batch has B of the A answers, each of
    which occurs once an epoch, and n entities are drawn with probabilities :math:`p_j`, equal or
    proportional to the degree plus one. With ``candidates="relation"``, A, B and :math:`c_j` are
    counted for each relation of the batch, and the product is over its relations, too. If no
    entities are drawn, the candidates then estimate the sum over the entities that answer the
    batch's relations, not over all.

    Parameters
    ----------
    kg : MultiViewKG
    answers : AnswerIndex
        The answers in the training triples.
    settings : Settings
        ``candidates``, ``negatives`` and ``negative_sampling`` are used.
    """

    def __init__(self, kg: MultiViewKG, answers: AnswerIndex, settings: Settings) -> None:
        kind, size = settings.negative_sampling, kg.num_entities
        device = answers.key.device
        self.num_drawn = 0 if kind == "in-batch" else settings.negatives
        #: With candidates="relation": relation * num_entities + entity of each entry of `times`.
        self.keys: Tensor | None = None
        #: c_j of each entity. `num_answers` is A and `most` the largest c_j: for all answers or,
        #: with candidates="relation", for those of each relation.
        self.times = torch.bincount(answers.answer, minlength=size)
        self.num_answers = [len(answers.answer)]
        self.most = [int(self.times.max())]
        if settings.candidates == "relation":
            relation = (answers.key // size).repeat_interleave(answers.ptr.diff())
            keys = relation * size + answers.answer
            self.keys, self.times = keys.unique(return_counts=True)
            self.num_answers = torch.bincount(relation).tolist()
            most = self.times.new_zeros(len(self.num_answers))
            self.most = most.scatter_reduce(0, self.keys // size, self.times, "amax").tolist()
        self._log_absent: dict[tuple[int, int], Tensor] = {}
        #: Cumulative distribution of the entities drawn by degree; None if drawn uniformly.
        self.sums: Tensor | None = None
        self.num_entities = size
        drawn = torch.full((1,), 1 / size, dtype=torch.float64)
        if kind == "degree":
            degree = torch.bincount(kg.train[:, [0, 2]].flatten(), minlength=size).double() + 1
            drawn = degree / degree.sum()
            self.sums = degree.cumsum(0) / degree.sum()
        #: log(1 - p_j), of one value if all are equal.
        self.not_drawn = torch.log1p(-drawn).to(device)

    def draw(
        self, relation: Tensor, answer: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw (C,) distinct candidates, ascending; return them and log q_j of each."""
        if self.sums is None:
            drawn = torch.randint(self.num_entities, (self.num_drawn,), generator=generator)
        else:
            place = torch.rand(self.num_drawn, dtype=torch.float64, generator=generator)
            drawn = torch.searchsorted(self.sums, place).clamp(max=self.num_entities - 1)
        candidate = torch.cat([answer, drawn.to(answer.device)]).unique()
        if self.keys is None:
            log_absent = self._log_absent_by_times(0, len(answer))[self.times[candidate]]
        else:
            log_absent = torch.zeros(len(candidate), dtype=torch.float64, device=answer.device)
            counted = (part.tolist() for part in relation.unique(return_counts=True))
            for one, number in zip(*counted, strict=True):
                key = one * self.num_entities + candidate
                place = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
                times = torch.where(self.keys[place] == key, self.times[place], 0)
                log_absent += self._log_absent_by_times(one, number)[times]
        if self.num_drawn:
            not_drawn = self.not_drawn if self.sums is None else self.not_drawn[candidate]
            log_absent = log_absent + self.num_drawn * not_drawn
        return candidate, (-torch.expm1(log_absent)).log().float()

    def _log_absent_by_times(self, group: int, number: int) -> Tensor:
        """Return, for each c_j, the log-probability that j is none of ``number`` answers drawn.

        The answers are drawn from those of a relation, or from all (group 0).
        """
        if (group, number) not in self._log_absent:
            left = self.num_answers[group] - torch.arange(self.most[group], dtype=torch.float64)
            # The factors of the product: each answer is not drawn, given that none before it is.
            factors = torch.log1p(-(number / left).clamp(max=1))
            sums = torch.cat([factors.new_zeros(1), factors.cumsum(0)])
            self._log_absent[group, number] = sums.to(self.times.device)
        return self._log_absent[group, number]


def _rows_of(answers: AnswerIndex, at_a_time: int) -> Tensor:
    """Return (rows, 3) int64: query, position of the first answer, and their number.

    A query with more than ``at_a_time`` answers has several rows.
    """
    counts = answers.ptr.diff()
    parts = -(-counts // at_a_time)
    query, part = expand(torch.zeros_like(parts), parts)
    start = answers.ptr[query] + at_a_time * part
    return torch.stack([query, start, (answers.ptr[query + 1] - start).clamp(max=at_a_time)], dim=1)


def pack(counts: Sequence[int], limit: int) -> list[list[tuple[int, int]]]:
    """Pack queries, sorted by relation, into batches of few relations each.

    A relation is cut only if it has more than ``limit`` queries, or to even out the last batch.

    Parameters
    ----------
    counts : sequence of int
        Number of queries of each relation.
    limit : int
        Most queries in a batch. No batch has less than half as many, unless there are fewer in all.

    Returns
    -------
    list of list of (int, int)
        The ranges (start, stop) of queries in each batch.
    """
    pieces = []
    start = 0
    for count in counts:
        parts = math.ceil(count / limit)
        cuts = [start + count * i // parts for i in range(parts + 1)]
        pieces += list(itertools.pairwise(cuts))
        start += count
    # Best fit, the largest first: each into the batch with the least sufficient room.
    batches: list[list[tuple[int, int]]] = []
    free: list[tuple[int, int]] = []  # (room, batch), ascending
    for piece in sorted(pieces, key=lambda piece: piece[0] - piece[1]):
        size = piece[1] - piece[0]
        place = bisect.bisect_left(free, (size, -1))
        if place < len(free):
            room, batch = free.pop(place)
            batches[batch].append(piece)
        else:
            room, batch = limit, len(batches)
            batches.append([piece])
        bisect.insort(free, (room - size, batch))
    # At most one batch is not half full, as a new one is opened only if no other has room. It is
    # evened out with the fullest.
    room, small = free[-1]
    if 2 * room > limit and len(batches) > 1:
        other = free[0][1]
        both = batches[other] + batches[small]
        half = (sum(stop - start for start, stop in both) + 1) // 2
        batches[other], batches[small] = _cut(both, half)
    return batches


def _cut(
    ranges: Sequence[tuple[int, int]], size: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Split ranges into those of the first ``size`` positions and those of the others."""
    first, second = [], []
    for start, stop in ranges:
        middle = min(stop, start + size)
        size -= middle - start
        first += [(start, middle)] if middle > start else []
        second += [(middle, stop)] if stop > middle else []
    return first, second


#: Most queries of the regime 1vsall, different only in the answer, that form one row. Without a
#: limit, a query that most entities answer would dominate its batch.
_ANSWERS_AT_A_TIME = 32

#: Epochs that are drawn to measure how large the batches of `Batches.filled` are.
_MEASURED_EPOCHS = 4

#: Number of times that sampled negatives which are true answers are drawn again. Negatives that are
#: still true then belong to queries that most entities answer.
_REDRAWS = 4
