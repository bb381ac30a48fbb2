"""Filtered ranking of heads and tails, with ties at their mean rank.

The rank of an answer is 1 + (number of better candidates) + (number of other tied candidates) / 2,
without the other known answers of the query: the "realistic" rank, which is the mean of the
optimistic and the pessimistic rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from imvia_graph._guards import MEMORY_ERRORS, Parts, is_out_of_memory
from imvia_graph._labels import decode_triples
from imvia_graph._tiles import RankCounter
from imvia_graph.answers import AnswerIndex, by_relation, with_inverses
from imvia_graph.distributed import Shards
from imvia_graph.errors import DataError, OutOfMemoryError, UnknownLabelError
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
        (n,) float64 ranks of the true tail and of the true head, for each ranked head of the model
        and for ``decision``.
    candidates : str
        A text that describes the candidates; empty if it is not known.
    """

    triples: Tensor
    tail: dict[str, Tensor]
    head: dict[str, Tensor]
    candidates: str = ""

    def metrics(self, relations: Sequence[str] | None = None) -> dict[str, Any]:
        """Return metrics as fractions: for both sides, each side, each model head, each relation.

        Parameters
        ----------
        relations : sequence of str, optional
            Labels of the relations. If given, the result has the key ``relations``: metrics of both
            sides and the number of triples, for each relation with triples in the split.

        Returns
        -------
        dict
            ``{"both": {"mrr", "mr", "hits@1", …}, "head": …, "tail": …, "heads": {head: …},
            "relations": {label: …}}``. ``both`` covers the ranks of heads and tails together,
            ``head`` those of the heads of the triples, and ``heads`` those by each head of the
            model. With the key ``candidates`` if there is a text that describes them.
        """
        tail, head = self.tail[DECISION], self.head[DECISION]
        result: dict[str, Any] = {
            "both": rank_metrics(torch.cat([head, tail])),
            "head": rank_metrics(head),
            "tail": rank_metrics(tail),
            "heads": {
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
        if self.candidates:
            result["candidates"] = self.candidates
        return result

    def frame(self, kg: MultiViewKG) -> pl.DataFrame:
        """Return the rank of each query as a table, for statistical tests and other programs.

        Parameters
        ----------
        kg : MultiViewKG
            The graph, for the labels.

        Returns
        -------
        polars.DataFrame
            Two rows for each triple, in the order of ``triples``: the query for its tail, then that
            for its head. Columns: ``head``, ``relation``, ``tail`` (labels), ``asked`` (``tail`` or
            ``head``), ``rank`` (by the decision), and ``rank_NAME`` for each ranked head NAME of
            the model.

        Examples
        --------
        >>> import imvia_graph as ig
        >>> kg = ig.load_kg("countries")
        >>> model = ig.IMVIA.from_kg(kg, ig.Settings(dim=8, modalities=[]))
        >>> frame = ig.rank(model, kg.test, kg.answers(), heads=["structure"]).frame(kg)
        >>> frame.columns, len(frame) == 2 * len(kg.test)
        (['head', 'relation', 'tail', 'asked', 'rank', 'rank_structure'], True)
        """
        rows = decode_triples(self.triples.cpu().repeat_interleave(2, 0), *kg.label_columns)
        ranks = {
            "rank" if name == DECISION else f"rank_{name}": torch.stack(
                [self.tail[name], self.head[name]], dim=1
            )
            for name in (DECISION, *(name for name in self.tail if name != DECISION))
        }
        return rows.with_columns(
            pl.Series("asked", ["tail", "head"] * len(self.triples), dtype=pl.String),
            *(pl.Series(name, value.flatten().cpu().numpy()) for name, value in ranks.items()),
        )


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """Return MRR, mean rank and Hits@1, 3, 10, 100 of (n,) ranks, with hits as fractions.

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
    """Return the filtered realistic ranks of a batch of queries.

    Parameters
    ----------
    scores : Tensor
        (B, N) scores of all candidates.
    answer : Tensor
        (B,) int64: the candidate to rank for each query.
    row, col : Tensor
        (P,) int64, distinct pairs: candidate ``col`` is a known answer of query ``row`` and is
        filtered out; the answer itself may be among these pairs.

    Returns
    -------
    Tensor
        (B,) float64 ranks from 1 on. A candidate whose score is NaN counts as better than any
        answer, and an answer whose score is NaN ranks behind all candidates.

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
    # The answer is tied with itself, or counts as better than itself if its score is NaN.
    nan = true[:, 0].isnan().long()
    better = (~(scores <= true)).sum(1) - nan
    tied = (scores == true).sum(1) - 1 + nan
    # Known answers are few: subtract them from the counts instead of masking the scores.
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
    batch_size: int = 4096,
    heads: Sequence[str] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    candidates: Tensor | None = None,
    shards: Shards | None = None,
) -> Ranking:
    """Rank the tails and heads of triples against all entities, or against chosen candidates.

    Memory does not grow with the number of entities beyond 256 MiB of candidate vectors and 256 MiB
    of query vectors. With several processes, all of which must call this with the same arguments,
    each process counts the candidates that outrank the answers among its own entities. Every
    process returns the ranks among all entities, which are the same for any number of processes.

    Parameters
    ----------
    model : IMVIA
        Ranked in evaluation mode, with scores in float32.
    triples : Tensor
        (n, 3) integer ids of triples.
    known : AnswerIndex
        Answers to filter out; by convention, all known answers (`MultiViewKG.answers`).
    batch_size : int, optional
        Largest number of queries whose vectors are computed at a time. Default: ``4096``.
    heads : sequence of str, optional
        Heads of the model to rank in addition to ``decision``. Default: all. Without any head, the
        decision is computed as one product, which is faster; rounding may then order nearly equal
        scores differently.
    on_batch : callable, optional
        Called with the number of queries done and the total.
    candidates : Tensor, optional
        (C,) int64 entities that compete with the answer, for example from `draw_candidates`.
        Default: all entities.
    shards : Shards, optional
        The entities of this process. Default: those of the model.

    Returns
    -------
    Ranking

    Raises
    ------
    DataError
        If triples are no (n, 3) integer ids of the model, or candidates no entities of it.
    UnknownLabelError
        If the model lacks a head.
    OutOfMemoryError
        If a single query does not fit into memory or, with several processes, ``batch_size``
        queries do not.
    """
    for name in heads or ():
        if name not in model.heads:
            raise UnknownLabelError(
                f"rank: the model has no head {name!r}; it has {', '.join(model.heads)}."
            )
    shards = model.shards if shards is None else shards
    device = model.device
    known = known.to(device)
    chosen = None if candidates is None else _checked(candidates, model.num_entities).to(device)
    triples = _checked_triples(triples, model.num_entities, model.num_relations)
    queries = with_inverses(triples, model.num_relations).to(device)
    wanted = [*(model.heads if heads is None else heads), DECISION]
    ranks = torch.empty(len(queries), len(wanted), dtype=torch.float64, device=device)
    parts = Parts("ranking a batch of queries")
    progress = _Progress(on_batch, len(queries))
    with evaluating(model):
        for relation, group in _by_relation(model, queries[:, 1]):
            counter = RankCounter(model, shards, known, wanted, chosen, relation)
            while len(group):
                size = parts.rows(batch_size)
                block = group[: max(1, counter.queries // parts.count // size) * size]
                # With several processes, all must call on_batch equally often.
                on_part = partial(progress.report, len(block)) if shards.alone else None
                entity, under, answer = queries[block].unbind(1)
                try:
                    counts = counter.count(entity, under, answer, size, on_part)
                except MEMORY_ERRORS as error:
                    if not shards.alone and is_out_of_memory(error):
                        raise OutOfMemoryError(
                            f"Out of memory while ranking, in process {shards.rank} of"
                            f" {shards.size}. Use a smaller ranking_batch_size, or more processes."
                        ) from error
                    parts.halve(error, batch_size)
                    continue
                better, tied = counts.double().unbind(2)
                ranks[block] = 1 + better + tied / 2
                group = group[len(block) :]
                progress.finish(len(block))
    # The queries are all tails, then all heads.
    tail, head = ranks.cpu().tensor_split([len(triples)])
    return Ranking(
        triples,
        dict(zip(wanted, tail.unbind(1), strict=True)),
        dict(zip(wanted, head.unbind(1), strict=True)),
    )


@torch.no_grad()
def rank_scorer(
    score: Callable[[Tensor, Tensor], Tensor],
    kg: MultiViewKG,
    split: Split = "test",
    batch_size: int = 1024,
    *,
    triples: Tensor | Sequence[Sequence[str]] | None = None,
    candidates: int | Sequence[int | str] | Tensor | None = None,
    seed: int = 0,
) -> Ranking:
    """Rank the tails and heads of a split by any function that scores all entities.

    The protocol is that of `rank`, so that metrics of other models are comparable.

    Parameters
    ----------
    score : callable
        Called with (B,) int64 entities and (B,) int64 relations on the CPU; returns (B, N) scores
        of all entities, on any device. A relation r from ``num_relations`` on is the inverse of
        relation r - ``num_relations``: the query then asks for the heads of triples with that tail.
    kg : MultiViewKG
        All its known triples filter the ranks.
    split : {"train", "valid", "test"}, optional
        Default: ``"test"``.
    batch_size : int, optional
        Number of queries per call. Default: ``1024``.
    triples, candidates, seed
        As in `evaluate`.

    Returns
    -------
    Ranking
        Ranks under the name ``decision``; `Ranking.metrics` computes metrics from them.

    Raises
    ------
    DataError
        If the split has no triples, ``batch_size`` is below 1, the scores have another shape, or
        triples or candidates are not those of the graph.
    UnknownLabelError
        If there is no such split, or a label is unknown.

    Examples
    --------
    DistMult, which has no inverse relations:

    >>> import torch
    >>> import imvia_graph as ig
    >>> from imvia_graph.evaluation import rank_scorer
    >>> kg = ig.load_kg("countries")
    >>> entities, relations = torch.rand(kg.num_entities, 8), torch.rand(kg.num_relations, 8)
    >>> def score(entity, relation):
    ...     return (entities[entity] * relations[relation % kg.num_relations]) @ entities.T
    >>> sorted(rank_scorer(score, kg, "valid").metrics()["both"])
    ['hits@1', 'hits@10', 'hits@100', 'hits@3', 'mr', 'mrr']
    """
    if batch_size < 1:
        raise DataError(f"batch_size: expected at least 1, received {batch_size}.")
    ids, known = ranked_triples(kg, split, triples)
    chosen, among = ranked_candidates(kg, candidates, seed)
    if chosen is not None:
        chosen = _checked(chosen, kg.num_entities)
        place = torch.full((kg.num_entities,), -1)
        place[chosen] = torch.arange(len(chosen))
    ranks = []
    for queries in with_inverses(ids, kg.num_relations).split(batch_size):
        entity, relation, answer = queries.unbind(1)
        scores = score(entity, relation)
        if scores.shape != (len(queries), kg.num_entities):
            raise DataError(
                f"score: expected ({len(queries)}, {kg.num_entities}) scores of all entities,"
                f" received {tuple(scores.shape)}."
            )
        row, col = known.pairs(entity, relation)
        if chosen is not None:
            # The answer is the first column; if it is among the candidates, it is filtered there.
            here = chosen.to(scores.device)
            true = scores.gather(1, answer.to(scores.device)[:, None])
            scores = torch.cat([true, scores[:, here]], dim=1)
            row, col = torch.cat([row, torch.arange(len(answer))]), torch.cat([col, answer])
            row, col = torch.stack([row, place[col] + 1])[:, place[col] >= 0].unique(dim=1)
            answer = torch.zeros_like(answer)
        places = (part.to(scores.device) for part in (answer, row, col))
        ranks.append(filtered_ranks(scores, *places).cpu())
    tail, head = torch.cat(ranks).tensor_split([len(ids)])
    return Ranking(ids, {DECISION: tail}, {DECISION: head}, among)


def ranked_triples(
    kg: MultiViewKG, split: Split, triples: Tensor | Sequence[Sequence[str]] | None = None
) -> tuple[Tensor, AnswerIndex]:
    """Return the triples of a split, or chosen ones, and the answers that filter their ranks."""
    if triples is None:
        ids = kg.triples(split)
        if not len(ids):
            raise DataError(
                f"{kg.title}: the split {split!r} has no triples; there is nothing to rank."
            )
        return ids, kg.answers()
    if not len(triples):
        raise DataError("triples: there are none; there is nothing to rank.")
    if isinstance(triples, Sequence) and any(
        isinstance(row, str) or (isinstance(row, Sequence) and any(isinstance(x, str) for x in row))
        for row in triples
    ):
        triples = kg.ids_of(triples)
    ids = _checked_triples(triples, kg.num_entities, kg.num_relations).cpu()
    parts = [kg.train, kg.valid, kg.test, kg.known, ids]
    return ids, AnswerIndex.from_triples(parts, kg.num_entities, kg.num_relations)


def ranked_candidates(
    kg: MultiViewKG, candidates: int | Sequence[int | str] | Tensor | None, seed: int
) -> tuple[Tensor | None, str]:
    """Return the ids of the candidates, or None for all, and a text that describes them."""
    if isinstance(candidates, str):
        raise DataError(f"candidates: expected a number, ids or labels; received {candidates!r}.")
    if isinstance(candidates, Sequence) and any(isinstance(one, str) for one in candidates):
        candidates = [kg.id_of(one) if isinstance(one, str) else one for one in candidates]
    chosen, how = None if candidates is None else torch.as_tensor(candidates), "given"
    if chosen is not None and not chosen.dim() and not chosen.is_floating_point():
        chosen, how = draw_candidates(kg.num_entities, int(chosen), seed), f"drawn with seed {seed}"
    if chosen is None:
        return None, f"all {kg.num_entities:,} entities"
    return chosen, f"{len(chosen.unique()):,} entities {how}"


class _Progress:
    """Progress of a ranking, passed to ``on_batch`` whenever more queries are done."""

    def __init__(self, on_batch: Callable[[int, int], None] | None, total: int) -> None:
        self.on_batch, self.total = on_batch, total
        self.done = self.reported = 0

    def report(self, queries: int, share: float) -> None:
        """Report that a share of the current block of queries is done."""
        done = self.done + int(queries * share)
        if done > self.reported and self.on_batch:
            self.reported = done
            self.on_batch(done, self.total)

    def finish(self, queries: int) -> None:
        """Report that the current block of queries is done."""
        self.report(queries, 1)
        self.done += queries


def _checked_triples(triples: Any, num_entities: int, num_relations: int) -> Tensor:
    """Return triples of ids as (n, 3) int64."""
    try:
        found = torch.as_tensor(triples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"triples: expected (n, 3) integer ids ({error}).") from None
    kind = found.dtype
    if found.shape[1:] != (3,) or kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise DataError(
            f"triples: expected (n, 3) integer ids, received {kind} of shape {tuple(found.shape)}."
        )
    found = found.long()
    limits = found.new_tensor([num_entities, num_relations, num_entities])
    bad = ((found < 0) | (found >= limits)).any(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(
            f"triples, row {row}: expected (head, relation, tail) of {num_entities} entities and"
            f" {num_relations} relations, received the ids {tuple(found[row].tolist())}."
        )
    return found


def _checked(candidates: Tensor, num_entities: int) -> Tensor:
    """Return the distinct candidates in the order of their ids."""
    are_ids = candidates.dim() == 1 and candidates.dtype == torch.int64
    if not are_ids or not len(candidates):
        raise DataError(
            "candidates: expected (C,) int64 ids of at least one entity, received"
            f" {candidates.dtype} of shape {tuple(candidates.shape)}."
        )
    low, high = int(candidates.min()), int(candidates.max())
    if low < 0 or high >= num_entities:
        raise DataError(
            f"candidates: expected ids from 0 to {num_entities - 1}, received"
            f" {low if low < 0 else high}."
        )
    return candidates.unique()


def draw_candidates(num_entities: int, count: int, seed: int = 0) -> Tensor | None:
    """Sample entities uniformly as ranking candidates, where all entities are too many.

    Parameters
    ----------
    num_entities, count : int
        Number of entities, and number of entities to sample.
    seed : int, optional
        Seed of the sample. Default: ``0``.

    Returns
    -------
    Tensor or None
        (count,) int64 entities, ascending; None, which stands for all entities, if there are not
        more than ``count``.

    Raises
    ------
    DataError
        If ``count`` is below 1.

    Examples
    --------
    >>> from imvia_graph.evaluation import draw_candidates
    >>> len(draw_candidates(14_951, 1000)), draw_candidates(100, 1000)
    (1000, None)
    """
    if count < 1:
        raise DataError(f"candidates: expected at least 1, received {count}.")
    if count >= num_entities:
        return None
    return torch.tensor(sorted(random.Random(seed).sample(range(num_entities), count)))


def _by_relation(model: IMVIA, relation: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yield (relation, positions of its queries), or (None, all positions) with shared tables.

    Positions are sorted by relation in either case, so that results that depend only on a relation
    are computed once, or nearly so.
    """
    if model.settings.candidates != "shared":
        yield from by_relation(relation)
    elif len(relation):
        yield None, torch.argsort(relation, stable=True)


@contextmanager
def evaluating(model: IMVIA) -> Iterator[IMVIA]:
    """Put the model into evaluation mode, and restore each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def evaluate(
    model: IMVIA,
    kg: MultiViewKG,
    split: Split = "test",
    batch_size: int = 4096,
    on_batch: Callable[[int, int], None] | None = None,
    candidates: int | Sequence[int | str] | Tensor | None = None,
    seed: int = 0,
    triples: Tensor | Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Compute the filtered ranking metrics of a split; see `Ranking.metrics`.

    Parameters
    ----------
    model : IMVIA
    kg : MultiViewKG
    split : {"train", "valid", "test"}, optional
        Default: ``"test"``.
    batch_size, on_batch
        As in `rank`.
    candidates : int, sequence of int or str, or Tensor, optional
        The entities that compete with the answer: their number, sampled once by `draw_candidates`
        with ``seed``, or (C,) int64 ids, or labels. Ranks among few candidates are better than
        among all, and comparable only among the same candidates. Default: all entities.
    seed : int, optional
        Seed of the sample. Default: ``0``.
    triples : Tensor or sequence of (head, relation, tail), optional
        Ranked in place of those of the split: (n, 3) ids or rows of labels. They filter ranks like
        the known triples of the graph. Default: those of the split.

    Returns
    -------
    dict
        The metrics of `Ranking.metrics`, and the key ``candidates``, a text that describes the
        candidates.

    Raises
    ------
    DataError
        If there are no triples to rank, triples or candidates are not those of the graph, or the
        graph is not that of the model.
    UnknownLabelError
        If a label or the split is unknown.
    OutOfMemoryError
        If a single query does not fit into memory.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> model = ig.IMVIA.from_kg(kg, ig.Settings(dim=8))
    >>> metrics = ig.evaluate(model, kg, "valid")
    >>> sorted(metrics)
    ['both', 'candidates', 'head', 'heads', 'relations', 'tail']
    >>> metrics["candidates"]
    'all 1,475 entities'
    >>> ig.evaluate(model, kg, "valid", candidates=100)["candidates"]
    '100 entities drawn with seed 0'
    >>> ig.evaluate(model, kg, triples=[("France", "borders", "Spain")])["both"]["mr"] >= 1
    True
    """
    return rank_split(model, kg, split, batch_size, on_batch, candidates, seed, triples).metrics(
        kg.relations
    )


def rank_split(
    model: IMVIA,
    kg: MultiViewKG,
    split: Split = "test",
    batch_size: int = 4096,
    on_batch: Callable[[int, int], None] | None = None,
    candidates: int | Sequence[int | str] | Tensor | None = None,
    seed: int = 0,
    triples: Tensor | Sequence[Sequence[str]] | None = None,
) -> Ranking:
    """Return the ranks from which `evaluate`, with the same arguments, computes its metrics."""
    model.check_graph(kg)
    ids, known = ranked_triples(kg, split, triples)
    chosen, among = ranked_candidates(kg, candidates, seed)
    ranking = rank(model, ids, known, batch_size, on_batch=on_batch, candidates=chosen)
    return ranking._replace(candidates=among)


__all__ = [
    "HITS",
    "Ranking",
    "draw_candidates",
    "evaluate",
    "evaluating",
    "filtered_ranks",
    "rank",
    "rank_metrics",
    "rank_scorer",
    "rank_split",
]
