"""Known answers of queries in CSR form, for filtered ranks, KvsAll targets and predictions.

A query is a pair (entity, relation); its answers are the tails of the triples with that head and
relation. Queries for heads use inverse relations: (tail, relation + num_relations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AnswerIndex(NamedTuple):
    """The answers of all queries that have any.

    Attributes
    ----------
    key : Tensor
        (Q,) int64, ascending: ``relation * num_entities + entity`` of each query.
    ptr : Tensor
        (Q + 1,) int64: the answers of query i are ``answer[ptr[i]:ptr[i + 1]]``.
    answer : Tensor
        (A,) int64 entity ids, ascending and distinct within a query.
    num_entities : int
        Number of entities, the base of ``key``.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.answers import AnswerIndex
    >>> triples = torch.tensor([[0, 0, 1], [0, 0, 2]])
    >>> index = AnswerIndex.from_triples([triples], num_entities=3, num_relations=1)
    >>> row, col = index.pairs(entity=torch.tensor([2, 0]), relation=torch.tensor([1, 0]))
    >>> row.tolist(), col.tolist()  # (2, inverse) is answered by 0; (0, relation) by 1 and 2
    ([0, 1, 1], [0, 1, 2])
    """

    key: Tensor
    ptr: Tensor
    answer: Tensor
    num_entities: int

    @classmethod
    def from_triples(
        cls, triples: Sequence[Tensor], num_entities: int, num_relations: int
    ) -> AnswerIndex:
        """Index (n, 3) int64 triple tensors, in both directions."""
        if 2 * num_relations * num_entities**2 >= 2**63:
            both = torch.cat([with_inverses(part, num_relations) for part in triples])
            return cls.from_queries(both, num_entities)
        # No tensors of three columns, to save memory: there may be hundreds of millions of rows.
        packed = triples[0].new_empty(2 * sum(len(part) for part in triples))
        at = 0
        for part in triples:
            head, relation, tail = part.unbind(dim=1)
            for query, under, answer in (
                (head, relation, tail),
                (tail, relation + num_relations, head),
            ):
                out = packed[at : at + len(part)]
                torch.mul(under, num_entities, out=out)
                out.add_(query).mul_(num_entities).add_(answer)
                at += len(part)
        return cls._from_packed(packed, num_entities)

    @classmethod
    def from_queries(cls, queries: Tensor, num_entities: int) -> AnswerIndex:
        """Index (n, 3) int64 rows of (entity, relation, answer), without their inverses."""
        key = queries[:, 1] * num_entities + queries[:, 0]
        if len(key) and (int(key.max()) + 1) * num_entities < 2**63:
            return cls._from_packed(key * num_entities + queries[:, 2], num_entities)
        # Two stable sorts order by (key, answer) without a product that could overflow int64.
        order = torch.argsort(queries[:, 2], stable=True)
        order = order[torch.argsort(key[order], stable=True)]
        key, answer = key[order], queries[order, 2]
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = (key[1:] != key[:-1]) | (answer[1:] != answer[:-1])
        key, answer = key[first], answer[first]
        unique, counts = torch.unique_consecutive(key, return_counts=True)
        return cls(unique, pointer(counts), answer, num_entities)

    @classmethod
    def _from_packed(cls, packed: Tensor, num_entities: int) -> AnswerIndex:
        """Index (n,) values of ``key * num_entities + answer``, which are overwritten."""
        if packed.device.type == "cpu":
            packed.numpy().sort()  # in place, and vectorised
        else:
            packed = packed.sort().values
        first = torch.ones_like(packed, dtype=torch.bool)
        torch.ne(packed[1:], packed[:-1], out=first[1:])
        if not first.all():
            packed = packed[first]
        answer = packed % num_entities
        key = packed.div_(num_entities, rounding_mode="floor")
        unique, counts = torch.unique_consecutive(key, return_counts=True)
        return cls(unique, pointer(counts), answer, num_entities)

    def to(self, device: torch.device | str) -> AnswerIndex:
        """Return the index on another device."""
        return AnswerIndex(
            self.key.to(device), self.ptr.to(device), self.answer.to(device), self.num_entities
        )

    def pairs(self, entity: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the known answers of a batch of queries.

        Parameters
        ----------
        entity, relation : Tensor
            (B,) int64; relations from ``num_relations`` on are inverses.

        Returns
        -------
        tuple of Tensor
            ``row`` and ``col``, (P,) int64: entity ``col[i]`` answers query ``row[i]``. Rows
            ascend; queries without known answers do not occur.
        """
        if not len(self.key):
            empty = entity.new_empty(0)
            return empty, empty
        place, there = self._places(entity, relation)
        start = self.ptr[place]
        count = (self.ptr[place + 1] - start) * there
        row, position = expand(start, count)
        return row, self.answer[position]

    def contains(
        self, entity: Tensor, relation: Tensor, candidate: Tensor, pair_keys: Tensor | None = None
    ) -> Tensor:
        """Return (B, K) bool: whether (B, K) candidates are known answers of (B,) queries.

        For repeated calls, pass the result of `pair_keys`.
        """
        if not len(self.key):
            return torch.zeros_like(candidate, dtype=torch.bool)
        keys = self.pair_keys() if pair_keys is None else pair_keys
        place, there = self._places(entity, relation)
        wanted = place[:, None] * self.num_entities + candidate
        found = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return (keys[found] == wanted) & there[:, None]

    def pair_keys(self) -> Tensor:
        """Return (A,) int64, ascending: a key for each pair of a query and an answer."""
        query = torch.arange(len(self.key), device=self.key.device)
        return torch.repeat_interleave(query, self.ptr.diff()) * self.num_entities + self.answer

    def _places(self, entity: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions of queries in `key`, and whether `key` has them."""
        key = relation * self.num_entities + entity
        place = torch.searchsorted(self.key, key).clamp_(max=len(self.key) - 1)
        return place, self.key[place] == key

    def queries(self) -> Tensor:
        """Return all queries of the index: (Q, 2) int64 rows of (entity, relation)."""
        return torch.stack([self.key % self.num_entities, self.key // self.num_entities], dim=1)


def with_inverses(triples: Tensor, num_relations: int) -> Tensor:
    """Return (entity, relation, answer) rows of both directions: triples, then their inverses."""
    head, relation, tail = triples.unbind(dim=1)
    inverse = torch.stack([tail, relation + num_relations, head], dim=1)
    return torch.cat([triples, inverse])


def by_relation(relation: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each distinct relation of (Q,) queries, a scalar, and the positions of its queries.

    >>> import torch
    >>> from imvia_graph.answers import by_relation
    >>> [(int(one), rows.tolist()) for one, rows in by_relation(torch.tensor([7, 2, 7]))]
    [(2, [1]), (7, [0, 2])]
    """
    order = torch.argsort(relation, stable=True)
    distinct, counts = torch.unique_consecutive(relation[order], return_counts=True)
    yield from zip(distinct, order.split(counts.tolist()), strict=True)


def pointer(counts: Tensor) -> Tensor:
    """Return the CSR pointer (n + 1,) of (n,) counts."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def expand(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return all positions ``start[i], …, start[i] + count[i] - 1``, after the i of each."""
    row = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    offset = torch.arange(len(row), device=count.device) - pointer(count)[row]
    return row, start[row] + offset
