"""The queries of an epoch, batch by batch: what is asked, what is true, what competes."""

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
    """A batch of queries: (entity, relation, answer), and which scores are positives.

    Where all entities are candidates, ``candidate`` and ``sampled`` are None. In the regime
    *sampled* ``sampled`` has those that the queries share, or ``candidate`` is (B, 1 + negatives)
    int64, each query's own with the answer in column 0. ``most_relations`` is how many relations
    are distinct at most, where that is known.
    """

    entity: Tensor
    relation: Tensor
    positives: Positives
    candidate: Tensor | None = None
    sampled: Sampled | None = None
    most_relations: int | None = None

    def of(self, rows: Tensor) -> Batch:
        """The batch of some of the queries."""
        place = torch.full_like(self.entity, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        row, col, weight, _ = self.positives
        row = place[row]
        weight = None if weight is None else weight[rows]
        positives = Positives(row[row >= 0], col[row >= 0], weight)
        candidate = None if self.candidate is None else self.candidate[rows]
        sampled = self.sampled
        if sampled is not None:
            left_out = place[sampled.row]
            kept = left_out >= 0
            sampled = sampled._replace(row=left_out[kept], col=sampled.col[kept])
        return Batch(self.entity[rows], self.relation[rows], positives, candidate, sampled)


class Batches:
    """The queries of an epoch, in batches, shuffled by a generator of its own.

    The queries are shared out evenly, so that no batch is small. With ``candidates="relation"`` a
    batch holds queries of few relations (`pack`).

    Notes
    -----
    In the regime 1vsall each triple is two queries, each with one answer. Queries that differ in
    nothing but the answer have the same scores, and their softmax losses one sum over the
    candidates: up to `_ANSWERS_AT_A_TIME` of them are one row of a batch, with their number as its
    weight. A batch holds as many rows as come of ``batch_size`` queries on average.
    """

    def __init__(self, kg: MultiViewKG, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.num_entities = kg.num_entities
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.order_state = self.drawn = self.generator.get_state()
        self.answers = kg.answers(["train"])
        self.at_a_time = {"kvsall": max(len(self.answers.answer), 1), "sampled": 1}.get(
            settings.regime, _ANSWERS_AT_A_TIME if settings.loss == "softmax" else 1
        )
        #: Rows of batches: (query of the index, first of its answers, how many). None where each
        #: answer is a row.
        rows = None if self.at_a_time == 1 else _rows_of(self.answers, self.at_a_time).to(device)
        self.answers = self.answers.to(device)
        self.rows = rows
        self.num_rows = len(self.answers.answer) if rows is None else len(rows)
        #: What `batch_size` counts.
        kvsall = settings.regime == "kvsall"
        self.size = len(self.answers.key) if kvsall else len(self.answers.answer)
        #: How many positives and distinct relations a batch of `filled` has at most.
        self.most_positives = self.most_relations = 0
        self._told: tuple[Tensor, Tensor] | None = None
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
        """The batches of an epoch, but for the first so many: of one that was begun before.

        ``order_state`` is the generator's state that the epoch's order was drawn in, ``drawn`` the
        one that the last batch was.
        """
        for part in self._begin(done)[done:]:
            self.drawn = self.generator.get_state()
            yield self._batch(self._rows(part.to(self.answers.key.device)))

    def _begin(self, done: int) -> list[Tensor]:
        """The places of an epoch's batches, drawn anew, or again where some are done."""
        if not done:
            self.order_state = self.generator.get_state()
            return self._parts()
        now = self.generator.get_state()
        self.generator.set_state(self.order_state)
        parts = self._parts()
        self.generator.set_state(now)
        return parts

    def rows_of_epoch(self, done: int = 0) -> Iterator[Tensor]:
        """What `epoch` makes batches of, for `filled` to make them of: (B, 3) int64 on the device.

        Before the first one `most_positives` and `most_relations` are set so that they hold for all
        batches of the epoch; they never fall.
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
        if self._told is None:
            place = torch.arange(self.num_rows, device=self.answers.key.device)
            self._told = self._rows(place)[:, 2].cpu(), self._relations().cpu()
            # The same whichever epoch is the first that this process sees.
            drawn = torch.Generator().manual_seed(0)
            for _ in range(_MEASURED):
                order = torch.randperm(self.num_rows, generator=drawn)
                self._measure(order.tensor_split(len(parts)))
        count, relation = self._told
        positives = max(int(count[part].sum()) for part in parts)
        relations = max(len(relation[part].unique()) for part in parts)
        # With room for the epochs to come.
        if positives > self.most_positives:
            self.most_positives = -(-positives * 5 // 4 // 128) * 128
        if relations > self.most_relations:
            self.most_relations = -(-relations * 9 // 8 // 16) * 16

    def filled(self, rows: Tensor, streams: Streams | None = None) -> Batch:
        """The batch of (B, 3) rows, in shapes that depend on B alone: see `Positives.counts`.

        For the regimes in which all entities are candidates. The host does not wait for the device.
        With ``streams``, what is true is made in that of the positives, which has to be met before.
        """
        query, start, count = rows.unbind(1)
        streams = Streams() if streams is None else streams
        with streams.beside("positives", streams.begun, join=False):
            positives = self._filled(start, count)
        key = self.answers.key[query]
        entity, relation = key % self.num_entities, key // self.num_entities
        return Batch(entity, relation, positives, most_relations=self.most_relations)

    def _filled(self, start: Tensor, count: Tensor) -> Positives:
        """The positives of `filled`."""
        ptr = pointer(count)
        place = torch.arange(self.most_positives, device=count.device)
        at = torch.minimum(place, ptr[-1] - 1)
        row = torch.searchsorted(ptr, at, right=True) - 1
        col = self.answers.answer[start[row] + at - ptr[row]]
        return Positives(row, col, self._weight(count), (place == at).float())

    def _weight(self, count: Tensor) -> Tensor | None:
        """(B,) weights of rows with so many answers each."""
        weighted = self.settings.regime == "1vsall" and self.settings.loss == "softmax"
        return count.float() if weighted else None

    def _rows(self, place: Tensor) -> Tensor:
        """(n, 3) int64 of (n,) rows: query, first of its answers, how many."""
        if self.rows is not None:
            return self.rows[place]
        query = torch.searchsorted(self.answers.ptr, place, right=True) - 1
        return torch.stack([query, place, torch.ones_like(place)], dim=1)

    def _relations(self) -> Tensor:
        """The relation of each row."""
        query = self._rows(torch.arange(self.num_rows, device=self.answers.key.device))[:, 0]
        return self.answers.key[query] // self.num_entities

    def _parts(self) -> list[Tensor]:
        """Places of the queries of each batch, in an order that is drawn."""
        order = torch.randperm(self.num_rows, generator=self.generator)
        if self.ranges is not None:
            relation = self._relations().cpu()
            order = order[torch.argsort(relation[order], stable=True)]
            parts = [torch.cat([order[start:stop] for start, stop in part]) for part in self.ranges]
            return [parts[i] for i in torch.randperm(len(parts), generator=self.generator)]
        return list(order.tensor_split(len(self)))

    def _batch(self, rows: Tensor) -> Batch:
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
            return self._with_shared(query, entity, relation, answer)
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
        self, query: Tensor, entity: Tensor, relation: Tensor, answer: Tensor
    ) -> Batch:
        """Queries whose answers, and what is drawn, are candidates of them all."""
        assert self.sampler is not None
        candidate, log_q = self.sampler.draw(relation, answer, self.generator)
        asked = torch.searchsorted(candidate, answer)
        row, col = self._answers_among(query, candidate)
        other = col != asked[row]
        sampled = Sampled(candidate, log_q, row[other], col[other])
        row = torch.arange(len(query), device=query.device)
        return Batch(entity, relation, Positives(row, asked), sampled=sampled)

    def _answers_among(self, query: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (row, col): which of (C,) candidates, ascending, answer which of (B,) queries."""
        start = self.answers.ptr[query]
        count = self.answers.ptr[query + 1] - start
        # Where there are more answers than candidates, the candidates are looked for among them.
        many = count > len(candidate)
        row, position = expand(start, torch.where(many, 0, count))
        answer = self.answers.answer[position]
        col = torch.searchsorted(candidate, answer).clamp(max=len(candidate) - 1)
        there = candidate[col] == answer
        rows, cols = [row[there]], [col[there]]
        places = many.nonzero().flatten()
        for one in query[places].unique().tolist():
            first, last = self.answers.ptr[one : one + 2].tolist()
            known = self.answers.answer[first:last]
            found = torch.searchsorted(known, candidate).clamp(max=last - first - 1)
            cols_of = (known[found] == candidate).nonzero().flatten()
            rows_of = places[query[places] == one]
            rows.append(rows_of.repeat_interleave(len(cols_of)))
            cols.append(cols_of.repeat(len(rows_of)))
        return torch.cat(rows), torch.cat(cols)


class Sampler:
    r"""Candidates that the queries of a batch share: their answers, and entities that are drawn.

    Entity j is among them with probability

    .. math:: q_j = 1 - (1 - p_j)^n \prod_{i=0}^{c_j - 1} \left(1 - \frac{B}{A - i}\right)

    where it is :math:`c_j` of the A training answers, of which the batch has B, each once an epoch,
    and n entities are drawn with probabilities :math:`p_j`: equal, or as the degree plus one. With
    ``candidates="relation"`` a batch has so many of the answers under each of its relations, and
    the product is over these, too: where no entities are drawn, the candidates stand for those that
    answer the batch's relations.

    Parameters
    ----------
    kg : MultiViewKG
    answers : AnswerIndex
        Those of the training triples.
    settings : Settings
        ``candidates``, ``negatives`` and ``negative_sampling``.
    """

    def __init__(self, kg: MultiViewKG, answers: AnswerIndex, settings: Settings) -> None:
        kind, size = settings.negative_sampling, kg.num_entities
        device = answers.key.device
        self.num_drawn = 0 if kind == "in-batch" else settings.negatives
        #: With candidates of each relation: (relation, entity) of each number in `times`, as keys.
        self.keys: Tensor | None = None
        #: How many of the answers each entity is; of all, or of each relation's, their number and
        #: the most that one entity is.
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
        self._not_answers: dict[tuple[int, int], Tensor] = {}
        self.sums: Tensor | None = None
        self.num_entities = size
        drawn = torch.full((1,), 1 / size, dtype=torch.float64)
        if kind == "degree":
            degree = torch.bincount(kg.train[:, [0, 2]].flatten(), minlength=size).double() + 1
            drawn = degree / degree.sum()
            self.sums = degree.cumsum(0) / degree.sum()
        #: Logarithm of not being what is drawn.
        self.not_drawn = torch.log1p(-drawn).to(device)

    def draw(
        self, relation: Tensor, answer: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(C,) distinct candidates, ascending, with the logarithm of each one's probability."""
        if self.sums is None:
            drawn = torch.randint(self.num_entities, (self.num_drawn,), generator=generator)
        else:
            place = torch.rand(self.num_drawn, dtype=torch.float64, generator=generator)
            drawn = torch.searchsorted(self.sums, place).clamp(max=self.num_entities - 1)
        candidate = torch.cat([answer, drawn.to(answer.device)]).unique()
        if self.keys is None:
            not_there = self._not_answer(0, len(answer))[self.times[candidate]]
        else:
            not_there = torch.zeros(len(candidate), dtype=torch.float64, device=answer.device)
            asked = (part.tolist() for part in relation.unique(return_counts=True))
            for one, number in zip(*asked, strict=True):
                key = one * self.num_entities + candidate
                place = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
                times = torch.where(self.keys[place] == key, self.times[place], 0)
                not_there += self._not_answer(one, number)[times]
        if self.num_drawn:
            not_drawn = self.not_drawn if self.sums is None else self.not_drawn[candidate]
            not_there = not_there + self.num_drawn * not_drawn
        return candidate, (-torch.expm1(not_there)).log().float()

    def _not_answer(self, group: int, number: int) -> Tensor:
        """Logarithm of not being among so many of a group's answers, by how many an entity is."""
        if (group, number) not in self._not_answers:
            left = self.num_answers[group] - torch.arange(self.most[group], dtype=torch.float64)
            # That each of its own is not there, given that those before it are not.
            each = torch.log1p(-(number / left).clamp(max=1))
            of_any = torch.cat([each.new_zeros(1), each.cumsum(0)])
            self._not_answers[group, number] = of_any.to(self.times.device)
        return self._not_answers[group, number]


def _rows_of(answers: AnswerIndex, at_a_time: int) -> Tensor:
    """(rows, 3) int64: query, first of its answers, their number, ``at_a_time`` at most."""
    counts = answers.ptr.diff()
    parts = -(-counts // at_a_time)
    query, part = expand(torch.zeros_like(parts), parts)
    start = answers.ptr[query] + at_a_time * part
    return torch.stack([query, start, (answers.ptr[query + 1] - start).clamp(max=at_a_time)], dim=1)


def pack(counts: Sequence[int], limit: int) -> list[list[tuple[int, int]]]:
    """Batches of queries sorted by relation, with few relations each and cut between relations.

    Parameters
    ----------
    counts : sequence of int
        How many queries each relation has.
    limit : int
        Queries in a batch at most; none has less than half of that where there are as many.

    Returns
    -------
    list of list of (int, int)
        Of each batch the ranges (start, stop) of queries in it.
    """
    pieces = []
    start = 0
    for count in counts:
        parts = math.ceil(count / limit)
        cuts = [start + count * i // parts for i in range(parts + 1)]
        pieces += list(itertools.pairwise(cuts))
        start += count
    # The largest first, each into the batch that it fills best.
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
    # At most one is not half full: what fits no other makes a new one. It shares with the fullest.
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
    """Ranges of the first ``size`` positions, and of the others."""
    first, second = [], []
    for start, stop in ranges:
        middle = min(stop, start + size)
        size -= middle - start
        first += [(start, middle)] if middle > start else []
        second += [(middle, stop)] if stop > middle else []
    return first, second


#: How many queries of the regime 1vsall that differ in nothing but the answer are one row. All of
#: them would crowd a batch where most entities answer.
_ANSWERS_AT_A_TIME = 32

#: Epochs that are drawn to learn how large the batches of `Batches.filled` may be.
_MEASURED = 4

#: How often sampled negatives that are true answers are drawn anew. What is true still after that
#: belongs to a query that most entities answer.
_REDRAWS = 4
