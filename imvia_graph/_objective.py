"""The training objective: the losses of a batch and their weighted sum (Eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from imvia_graph._gpu.lookup import lookup
from imvia_graph._guards import Parts
from imvia_graph._streams import Streams
from imvia_graph.batches import Batch
from imvia_graph.losses import (
    Positives,
    Sampled,
    at_least_float32,
    completion,
    dura,
    factored_completion,
    n3,
    relation_prediction,
    sampled_completion,
    total_loss,
)
from imvia_graph.model import COMPLEX, DECISION, IMVIA, Embedding
from imvia_graph.nn.multi_view_encoder import views_present
from imvia_graph.settings import Settings


class _Scored(NamedTuple):
    """L3 of queries, their candidate tables, and the rows of this process's answers in them."""

    loss: Tensor
    tables: Mapping[str, Tensor]
    answers: Tensor


class Objective:
    """The losses of a model on a batch of queries.

    Parameters
    ----------
    model : IMVIA
    settings : Settings
        With values for all settings that may be left open.
    parts : Parts
        The number of parts in which a batch is scored when memory is short.
    """

    def __init__(self, model: IMVIA, settings: Settings, parts: Parts) -> None:
        self.model, self.settings, self.parts = model, settings, parts
        self.shards = model.shards

    def losses(self, batch: Batch, streams: Streams) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the total loss and its terms (Eq. 4, 5, 7, 8), and that of L1's estimators."""
        model, settings = self.model, self.settings
        batch_done = streams.mark()
        # Each process embeds and decodes its part of the queries.
        embedded = model.embed(batch.entity, batch.relation, streams)
        embedding_done = streams.mark()
        with streams.beside("relations", batch_done):
            groups = model.grouped(batch.relation, batch.most_relations)
        queries = model.decode(embedded, groups, streams=streams)
        streams.meet("positives")
        (l3, regularization, cubes), tables = self._completion(
            batch, embedded.heads, queries, streams
        )
        with streams.beside("modalities", embedding_done):
            l1, l2, estimation = self._between_modalities(batch, embedded)
        streams.keep([*embedded.heads.values(), *embedded.present.values(), l1, l2])
        streams.keep(part for part in groups if isinstance(part, Tensor))
        total = total_loss(
            l1,
            l2,
            l3,
            settings.lambda_information,
            settings.lambda_alignment,
            settings.lambda_completion,
        )
        parts = {"information": l1, "alignment": l2, "completion": l3}
        if settings.lambda_regularization:
            total = total + settings.lambda_regularization * regularization
            parts["regularization"] = regularization
        if settings.complex_head and settings.lambda_n3:
            total = total + settings.lambda_n3 * cubes
            parts["n3"] = cubes
        if settings.lambda_relation:
            parts["relation"] = self._relation(batch, tables)
            total = total + settings.lambda_relation * parts["relation"]
        return {"loss": total, **parts}, estimation

    def _between_modalities(
        self, batch: Batch, embedded: Embedding
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return L1 and L2 of a batch, and the loss of L1's estimators."""
        model, settings, shards = self.model, self.settings, self.shards
        l1 = l2 = torch.zeros((), device=model.device)
        estimation = None
        # Autocast still computes their products in half precision, but sums need float32.
        sources = {name: at_least_float32(embedded.heads[name]) for name in model.sources}
        aligned = model.alignment is not None and settings.lambda_alignment
        informed = model.information is not None and settings.lambda_information
        present = embedded.present
        if (aligned or informed) and not shards.alone:
            # L1 and L2 compare the rows of a batch with each other, so every process needs all.
            rows = len(batch.entity)
            sources = {name: shards.gather(value, rows) for name, value in sources.items()}
            present = views_present(model.views, batch.entity)
        if model.alignment is not None and aligned:
            l2 = shards.repeated(model.alignment(sources, batch.entity, present))
        if model.information is not None and informed:
            l1, estimation = model.information.both(sources, present)
            l1 = shards.repeated(l1)
        return l1, l2, estimation

    def _relation(self, batch: Batch, tables: Mapping[str, Tensor] | None) -> Tensor:
        """Return the loss of relation prediction, summed over the heads.

        Both entities are embedded relation-free: gates with the relation would reveal it.
        ``tables`` has the embeddings of all entities, or is None.
        """
        model, shards = self.model, self.shards
        row, answer, _, counts = batch.positives
        entity, relation, number = batch.entity[row], batch.relation[row], len(row)
        if batch.candidate is not None:
            answer = batch.candidate[row, answer]
        elif batch.sampled is not None:
            answer = batch.sampled.entity[answer]
        if tables is not None:
            pairs = torch.cat([entity, answer])
            rows = {head: embedding(pairs, table) for head, table in tables.items()}
            heads = {head: part[:number] for head, part in rows.items()}
            tails = {head: part[number:] for head, part in rows.items()}
        else:
            heads, tails = model.embed(entity).heads, model.embed(answer).heads
            relation = relation[shards.part(number)]
        total = torch.zeros((), device=model.device)
        for scores in model.relation_scores(heads, tails).values():
            total = total + relation_prediction(scores, relation, number, counts)
        return shards.total(total)

    def _completion(
        self,
        batch: Batch,
        heads: Mapping[str, Tensor],
        queries: Mapping[str, Tensor],
        streams: Streams,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Mapping[str, Tensor] | None]:
        """Return L3, DURA and N3 of a batch, and the candidate tables if they have all entities.

        ``heads`` and ``queries`` are the embeddings and query vectors of this process's part of the
        batch. With ``candidates="relation"``, each relation has candidate tables of its own, and no
        tables are returned.
        """
        shards, rows = self.shards, len(batch.entity)
        gathered = {head: shards.gather(query, rows) for head, query in queries.items()}
        over_all = batch.candidate is None and batch.sampled is None
        if self.settings.candidates == "shared":
            loss, tables, answers = self._scored(batch, gathered, streams)
            true = self._true(tables, None if batch.positives.counts is not None else answers)
            squares, cubes = self._regularization(batch, heads, queries, true, answers)
            return (loss, squares, cubes), tables if shards.alone and over_all else None
        # All relations of the batch have the same candidates, unless each query has its own; what
        # their tables have in common is then computed once.
        halves: dict[Any, Tensor] | None = {} if batch.candidate is None else None
        # Over sampled candidates the binary loss is approximated: its negatives are weighted
        # relation by relation, not over the whole batch.
        is_share = over_all and self.settings.loss == "binary"
        weight = batch.positives.weight
        if weight is None:
            weight = torch.ones(rows, device=self.model.device)
        loss = torch.zeros((), device=self.model.device)
        parts = []
        for one in batch.relation.unique():
            of_one = (batch.relation == one).nonzero().flatten()
            of_relation = {head: query[of_one] for head, query in gathered.items()}
            term, tables, answers = self._scored(
                batch.of(of_one), of_relation, streams, one, halves, batch
            )
            loss = loss + (term if is_share else weight[of_one].sum() / weight.sum() * term)
            parts.append(self._true(tables, answers))
        true = {head: torch.cat([part[head] for part in parts]) for head in parts[0]}
        squares, cubes = self._regularization(batch, heads, queries, true, None)
        return (loss, squares, cubes), None

    def _scored(
        self,
        batch: Batch,
        queries: Mapping[str, Tensor],
        streams: Streams,
        relation: Tensor | None = None,
        halves: dict[Any, Tensor] | None = None,
        whole: Batch | None = None,
    ) -> _Scored:
        """Return L3 of queries, whose vectors are those of all processes.

        Candidates are embedded under ``relation``; see `IMVIA.candidates`, also for ``halves``. The
        queries may be a part of the batch ``whole``.
        """
        if batch.candidate is not None:
            return self._over_own(batch, batch.candidate, queries, relation)
        if batch.sampled is not None:
            return self._over_sampled(batch, batch.sampled, queries, relation, halves)
        return self._over_all(batch, queries, streams, relation, halves, whole)

    def _over_own(
        self,
        batch: Batch,
        candidate: Tensor,
        queries: Mapping[str, Tensor],
        relation: Tensor | None,
    ) -> _Scored:
        """Return L3 of queries that have (B, 1 + negatives) candidates of their own."""
        settings, shards, positives = self.settings, self.shards, batch.positives
        # Each distinct entity is embedded once. With several processes, each embeds a part of
        # them and gathers all.
        distinct, place = candidate.unique(return_inverse=True)
        embedded = self.model.embed(distinct, relation).heads
        tables = {head: shards.gather(table, len(distinct)) for head, table in embedded.items()}
        scores = self._scores(
            queries,
            batch.relation,
            lambda rows: {head: table[place[rows]] for head, table in tables.items()},
        )
        loss = completion(scores, positives, settings.loss, settings.label_smoothing)
        answers = place[positives.row, positives.col]
        return _Scored(shards.repeated(loss), tables, answers[shards.part(len(answers))])

    def _over_sampled(
        self,
        batch: Batch,
        sampled: Sampled,
        queries: Mapping[str, Tensor],
        relation: Tensor | None,
        halves: dict[Any, Tensor] | None,
    ) -> _Scored:
        """Return L3 of queries that share sampled candidates."""
        settings, shards, positives = self.settings, self.shards, batch.positives
        sampled, first = sampled.of_process(shards)
        tables = self.model.candidates(relation, sampled.entity, halves)
        scores = self._scores(queries, batch.relation, lambda rows: tables)
        own = (positives.col >= first) & (positives.col < first + len(sampled.entity))
        answers = positives.col[own] - first
        loss = sampled_completion(
            scores,
            Positives(positives.row[own], answers, positives.weight),
            sampled,
            settings.loss,
            settings.label_smoothing,
            shards,
        )
        return _Scored(loss, tables, answers)

    def _over_all(
        self,
        batch: Batch,
        queries: Mapping[str, Tensor],
        streams: Streams,
        relation: Tensor | None,
        halves: dict[Any, Tensor] | None,
        whole: Batch | None,
    ) -> _Scored:
        """Return L3 over all entities.

        The binary loss is the part of these queries in the means over the batch ``whole``.
        """
        model, settings, shards = self.model, self.settings, self.shards
        # In parallel with the embedding and decoding of the queries.
        with streams.beside("candidates", streams.begun):
            tables = model.candidates(relation, halves=halves, streams=streams)
        streams.keep(tables.values())
        # The means of Eq. 7 are over positives and over negatives, not over rows.
        among = None
        if whole is not None and settings.loss == "binary":
            among = len(whole.positives.row), len(whole.entity)
        loss = factored_completion(
            [queries[head] for head in model.heads],
            [tables[head] for head in model.heads],
            batch.positives,
            model.decision_weights(batch.relation) if model.learns_decision else None,
            settings.loss,
            settings.label_smoothing,
            settings.decision == "detached",
            self.parts.count,
            shards,
            among,
        )
        answers = batch.positives.col
        if not shards.alone:
            answers = answers[shards.owned(answers)] - shards.start
        return _Scored(loss, tables, answers)

    @property
    def _has_cubes(self) -> bool:
        """Whether N3 is a term of the loss."""
        return self.model.complex_relation is not None and bool(self.settings.lambda_n3)

    def _true(self, tables: Mapping[str, Tensor], answers: Tensor | None) -> dict[str, Tensor]:
        """Return the answers' rows of regularised tables; all rows if ``answers`` is None."""
        heads = [*self.model.tucker_heads] if self.settings.lambda_regularization else []
        heads += [COMPLEX] * self._has_cubes
        return {head: tables[head] if answers is None else tables[head][answers] for head in heads}

    def _regularization(
        self,
        batch: Batch,
        heads: Mapping[str, Tensor],
        queries: Mapping[str, Tensor],
        true: Mapping[str, Tensor],
        answers: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return DURA and N3 of a batch.

        ``true`` has the candidate rows of this process's answers. If the batch's positives have
        ``counts``, it has the rows of all candidates, and ``answers`` the ids of the answers.
        """
        model, shards, positives = self.model, self.shards, batch.positives
        squares = cubes = torch.zeros((), device=model.device)
        if not true:
            return squares, cubes
        weight = positives.weight
        if weight is None and not shards.alone:
            weight = torch.ones(len(batch.entity), device=squares.device)
        times = None
        if positives.counts is not None and answers is not None:
            # How often each candidate is an answer: the shape does not depend on the answers.
            times = torch.zeros(model.num_entities, device=squares.device)
            times.index_add_(0, answers, positives.counts)
        common = weight, len(positives.col), shards, times
        if self.settings.lambda_regularization:
            of_heads = [heads[head] for head in model.tucker_heads]
            of_queries = [queries[head] for head in model.tucker_heads]
            squares = dura(
                of_heads, of_queries, [true[head] for head in model.tucker_heads], *common
            )
        if self._has_cubes and model.complex_relation is not None:
            relation = batch.relation[shards.part(len(batch.relation))]
            numbers = lookup(relation, model.complex_relation.weight)
            cubes = n3(heads[COMPLEX], numbers, true[COMPLEX], *common)
        return squares, cubes

    def _scores(
        self,
        queries: Mapping[str, Tensor],
        relation: Tensor,
        candidates: Callable[[slice], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the scores that have a loss, by head, computed in parts when memory is short.

        ``candidates`` returns the candidate tables of the queries in some rows.
        """

        def of(rows: slice) -> dict[str, Tensor]:
            part = {head: query[rows] for head, query in queries.items()}
            scores = self.model.scores(part, candidates(rows), relation[rows])
            if not self.model.learns_decision:
                del scores[DECISION]
            return scores

        size = self.parts.rows(len(relation))
        if size >= len(relation):
            return of(slice(None))
        # Only one part's candidates are held at a time; the backward pass gathers them again.
        starts = range(0, len(relation), size)
        found = [checkpoint(of, slice(i, i + size), use_reentrant=False) for i in starts]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}
