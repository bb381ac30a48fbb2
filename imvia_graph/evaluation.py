"""Filtered ranking of both sides, ties at their mean rank.

The rank of an answer is 1 + (number of better candidates) + (number of tied others) / 2, known
answers of the query left out: the "realistic" rank, the mean of the optimistic and the pessimistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imvia_graph import _kernels
from imvia_graph._guards import MEMORY_ERRORS, Parts
from imvia_graph.answers import AnswerIndex, pointer, with_inverses
from imvia_graph.errors import DataError
from imvia_graph.kg import MultiViewKG, Split
from imvia_graph.model import DECISION, IMVIA

HITS = (1, 3, 10, 100)


class Ranking(NamedTuple):
    """Ranks of the triples of a split.

    Attributes
    ----------
    triples : Tensor
        (n, 3) int64.
    tail, head : dict of str to Tensor
        (n,) float64 ranks of the true tail and of the true head, for each head of the model and
        for ``decision``.
    """

    triples: Tensor
    tail: dict[str, Tensor]
    head: dict[str, Tensor]

    def metrics(self, relations: Sequence[str] | None = None) -> dict[str, Any]:
        """Metrics, as fractions: of both sides, each side, each head of the model, each relation.

        Parameters
        ----------
        relations : sequence of str, optional
            Labels of the relations; with them, ``relations`` is part of the result: metrics of
            both sides and the number of triples, of each relation that has triples in the split.

        Returns
        -------
        dict
            ``{"both": {"mrr", "mr", "hits@1", …}, "head": …, "tail": …, "modalities": {head: …},
            "relations": {label: …}}``. ``both`` is over the ranks of both sides together.
        """
        tail, head = self.tail[DECISION], self.head[DECISION]
        result: dict[str, Any] = {
            "both": rank_metrics(torch.cat([head, tail])),
            "head": rank_metrics(head),
            "tail": rank_metrics(tail),
            "modalities": {
                name: rank_metrics(torch.cat([self.head[name], self.tail[name]]))
                for name in self.tail
                if name != DECISION
            },
        }
        if relations is not None:
            of_triple = self.triples[:, 1]
            result["relations"] = {
                relations[i]: {
                    **rank_metrics(torch.cat([head[of_triple == i], tail[of_triple == i]])),
                    "triples": int((of_triple == i).sum()),
                }
                for i in of_triple.unique().tolist()
            }
        return result


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """MRR, mean rank and Hits@1, 3, 10, 100 of (n,) ranks; fractions.

    >>> import torch
    >>> from imvia_graph.evaluation import rank_metrics
    >>> rank_metrics(torch.tensor([1.0, 4.0]))["mrr"]
    0.625
    """
    ranks = ranks.double()
    metrics = {"mrr": ranks.reciprocal().mean().item(), "mr": ranks.mean().item()}
    metrics.update({f"hits@{k}": (ranks <= k).double().mean().item() for k in HITS})
    return metrics


def filtered_ranks(scores: Tensor, answer: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Realistic ranks of a batch of queries.

    Parameters
    ----------
    scores : Tensor
        (B, N) scores of all candidates.
    answer : Tensor
        (B,) int64: the candidate whose rank is asked for.
    row, col : Tensor
        (P,) int64, distinct pairs: candidate ``col`` is a known answer of query ``row`` and does
        not compete; the asked one may be among them.

    Returns
    -------
    Tensor
        (B,) float64 ranks from 1 on. NaN is no defence: a candidate whose score is NaN counts as
        better than any answer, and an answer whose score is NaN ranks behind all candidates.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.evaluation import filtered_ranks
    >>> scores = torch.tensor([[0.9, 0.5, 0.5, 0.8]])
    >>> none = torch.empty(0, dtype=torch.int64)
    >>> filtered_ranks(scores, torch.tensor([1]), none, none)  # two better, one tied
    tensor([3.5000], dtype=torch.float64)
    >>> filtered_ranks(scores, torch.tensor([1]), torch.tensor([0]), torch.tensor([0]))
    tensor([2.5000], dtype=torch.float64)
    """
    true = scores.gather(1, answer[:, None])
    # The answer itself is tied with itself, or, where it is NaN, better than itself.
    nan = true[:, 0].isnan().long()
    better = (~(scores <= true)).sum(1) - nan
    tied = (scores == true).sum(1) - 1 + nan
    # Known answers are few: take them out of the counts instead of out of the scores.
    other = col != answer[row]
    row, col = row[other], col[other]
    known = scores[row, col]
    better = better.index_add(0, row, -(~(known <= true[row, 0])).long())
    tied = tied.index_add(0, row, -(known == true[row, 0]).long())
    return 1 + better.double() + tied.double() / 2


@torch.no_grad()
def rank(
    model: IMVIA,
    triples: Tensor,
    known: AnswerIndex,
    batch_size: int = 1024,
    heads: Sequence[str] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Rank the tails and heads of triples against all entities.

    Parameters
    ----------
    model : IMVIA
        Put into evaluation mode while it ranks; scores are made in float32.
    triples : Tensor
        (n, 3) int64.
    known : AnswerIndex
        Answers that do not compete: all that is known (`MultiViewKG.answers`), as is customary.
    batch_size : int
        Queries at a time.
    heads : sequence of str, optional
        Which of the model's heads to rank beside ``decision``. Default: all.
    on_batch : callable, optional
        Called with the numbers of queries done and in all.
    """
    device = model.device
    known = known.to(device)
    queries = with_inverses(triples, model.num_relations).to(device)
    wanted = [*(model.heads if heads is None else heads), DECISION]
    ranks = {name: torch.empty(len(queries), dtype=torch.float64, device=device) for name in wanted}
    training = model.training
    model.eval()
    parts = Parts("ranking a batch of queries")
    done = 0
    try:
        for group, tables in _groups(model, queries[:, 1], batch_size):
            while len(group):
                positions = group[: parts.rows(batch_size)]
                entity, relation, answer = queries[positions].unbind(1)
                try:
                    found = _ranks(model, entity, relation, answer, tables, known, wanted)
                except MEMORY_ERRORS as error:
                    parts.halve(error, batch_size)
                    continue
                for name in wanted:
                    ranks[name][positions] = found[name]
                group = group[len(positions) :]
                done += len(positions)
                if on_batch:
                    on_batch(done, len(queries))
    finally:
        model.train(training)
    # Queries come as all tails, then all heads.
    sides = {name: value.cpu().split(len(triples)) for name, value in ranks.items()}
    if not len(triples):
        sides = {name: (torch.empty(0), torch.empty(0)) for name in ranks}
    return Ranking(
        triples,
        {name: side[0] for name, side in sides.items()},
        {name: side[1] for name, side in sides.items()},
    )


def score_all(
    model: IMVIA, entity: Tensor, relation: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield (positions, scores by head) of queries against all entities, batch by batch.

    Queries are taken relation by relation, so that what depends on a relation alone is made once,
    or nearly so.
    """
    for positions, tables in _groups(model, relation, batch_size):
        mine = relation[positions]
        yield positions, model.scores(model.queries(entity[positions], mine), tables, mine)


def _groups(
    model: IMVIA, relation: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield (positions, candidate tables) of queries in the order of their relations."""
    order = torch.argsort(relation, stable=True)
    if model.settings.candidates == "shared":
        if len(order):
            tables = model.candidates()
            yield from ((positions, tables) for positions in order.split(batch_size))
        return
    distinct, counts = torch.unique_consecutive(relation[order], return_counts=True)
    for one, group in zip(distinct, order.split(counts.tolist()), strict=True):
        tables = model.candidates(one)
        yield from ((positions, tables) for positions in group.split(batch_size))


#: Bytes of scores that are held at a time while the CPU ranks: what its cache holds.
_CACHE = 2**24


def _ranks(
    model: IMVIA,
    entity: Tensor,
    relation: Tensor,
    answer: Tensor,
    tables: Mapping[str, Tensor],
    known: AnswerIndex,
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """Ranks of (B,) answers by the heads that are wanted."""
    queries = model.queries(entity, relation)
    row, col = known.pairs(entity, relation)
    first = queries[model.heads[0]]
    kernels = _kernels.load("scores")
    if first.device.type != "cpu" or first.dtype != torch.float32 or kernels is None:
        by_name = model.scores(queries, tables, relation)
        return {name: filtered_ranks(by_name[name], answer, row, col) for name in wanted}
    # Scores are made for as many queries as the cache holds and counted there, all heads at once.
    ptr = pointer(torch.bincount(row, minlength=len(answer)))
    weights = model.decision_weights(relation).to(first.dtype).contiguous()
    found = torch.empty(len(answer), len(model.heads) + 1, dtype=torch.float64)
    rows = max(1, _CACHE // (len(model.heads) * model.num_entities * first.element_size()))
    for part in torch.arange(len(answer)).split(rows):
        mine = slice(int(part[0]), int(part[-1]) + 1)
        scores = first.new_empty(len(model.heads), len(part), model.num_entities)
        for m, head in enumerate(model.heads):
            torch.mm(queries[head][mine], tables[head].T, out=scores[m])
        bounds = ptr[mine.start : mine.stop + 1]
        given = (scores, weights[mine], answer[mine].contiguous(), bounds, col, found[mine])
        _kernels.share_out(kernels.ranks, _kernels.even_cuts(len(part)), given)
    columns = {name: m for m, name in enumerate([*model.heads, DECISION])}
    return {name: found[:, columns[name]] for name in wanted}


def evaluate(
    model: IMVIA,
    kg: MultiViewKG,
    split: Split = "test",
    batch_size: int = 1024,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Filtered metrics of a split, as `Ranking.metrics` gives them.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> metrics = ig.evaluate(ig.IMVIA.from_kg(kg, ig.Settings(dim=8)), kg, "valid")
    >>> sorted(metrics)
    ['both', 'head', 'modalities', 'relations', 'tail']
    """
    triples = kg.triples(split)
    if not len(triples):
        raise DataError(f"{kg}: the split {split!r} has no triples; there is nothing to rank.")
    ranking = rank(model, triples, kg.answers(), batch_size, on_batch=on_batch)
    return ranking.metrics(kg.relations)


__all__ = [
    "HITS",
    "Ranking",
    "evaluate",
    "filtered_ranks",
    "rank",
    "rank_metrics",
    "score_all",
]
