"""Prediction of the missing end of a triple, and explanation of a triple's scores.

`Predictor` keeps the candidate tables and answers one query or many without delay; `predict` and
`explain` are for a single query.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from imvia_graph.answers import by_relation, pointer
from imvia_graph.errors import DataError, IMVIAError
from imvia_graph.evaluation import evaluating, filtered_ranks
from imvia_graph.kg import PARTS, MultiViewKG
from imvia_graph.model import COMPLEX, DECISION, IMVIA, Embedding
from imvia_graph.ops import ViewWeights

Side = Literal["tail", "head"]

#: Number of relations whose candidate tables are kept with ``candidates="relation"``.
TABLES_HELD = 4
#: Default of the largest size in bytes of candidate tables that are kept. Larger tables are
#: computed again for every batch of queries, in portions of `PORTION` candidates.
HELD, PORTION = 2**30, 2**14
#: Largest size in bytes of the scores of a batch of queries and of the tensors made from them.
SCORES = 2**28


class Query(NamedTuple):
    """A triple of labels or display names, of which the missing end is None.

    >>> from imvia_graph.inference import Query
    >>> Query(head="France", relation="borders", tail=None)
    Query(head='France', relation='borders', tail=None)
    """

    head: str | None
    relation: str
    tail: str | None


class Prediction(NamedTuple):
    """An answer to a query.

    Attributes
    ----------
    entity : str
        Its label.
    name : str
        Its display name.
    score : float
        The score of the decision over the heads. Higher is better; scores of different queries are
        not comparable.
    heads : dict of str to float
        The score of each of the model's heads.
    known : bool
        Whether the triple is in the graph (train, valid or test).
    """

    entity: str
    name: str
    score: float
    heads: dict[str, float]
    known: bool

    @property
    def modalities(self) -> dict[str, float]:
        """Former name of `heads`; deprecated."""
        _warn_of_modalities("Prediction")
        return self.heads


class Answers(NamedTuple):
    """Answers to many queries as columns: query by query, best first.

    Attributes
    ----------
    query, entity, rank : Tensor
        (A,) int64: the index of the query, the entity that answers it, and its rank from 1.
    score : Tensor
        (A,) scores of the decision.
    heads : dict of str to Tensor
        (A,) scores of each of the model's heads.
    known : Tensor
        (A,) bool: whether the triple is in the graph.
    """

    query: Tensor
    entity: Tensor
    rank: Tensor
    score: Tensor
    heads: dict[str, Tensor]
    known: Tensor

    @property
    def modalities(self) -> dict[str, Tensor]:
        """Former name of `heads`; deprecated."""
        _warn_of_modalities("Answers")
        return self.heads


def _warn_of_modalities(name: str) -> None:
    warnings.warn(
        f"{name}.modalities is deprecated; use heads, which has all heads of the model.",
        DeprecationWarning,
        stacklevel=3,
    )


# -- predicting -----------------------------------------------------------------------------------


class Predictor:
    """Answers queries with candidate tables that are computed once and kept.

    The tables are computed at the first query. The model must not be trained afterwards. With
    ``candidates="relation"``, the tables of the last few relations are kept. Tables larger than
    ``held`` are computed again, in portions, for each batch of queries, which takes seconds.

    Parameters
    ----------
    model : IMVIA
        A trained model.
    kg : MultiViewKG
        The graph that it was trained on.
    held : int, optional
        Largest size in bytes of the tables kept on the model's device; their size is
        `table_bytes`. Default: 2^30.

    Raises
    ------
    DataError
        The model was made for another graph.
    IMVIAError
        The model was trained in several processes, and this one has a part of the entities.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> predictor = ig.Predictor(ig.IMVIA.from_kg(kg, ig.Settings(dim=16)), kg)
    >>> [answer.known for answer in predictor.predict(head="France", relation="borders", k=2)]
    [False, False]
    """

    def __init__(self, model: IMVIA, kg: MultiViewKG, held: int | None = None) -> None:
        model.check_graph(kg)
        model.check_whole("queries are answered")
        self.model, self.kg = model, kg
        self.held = HELD if held is None else held
        self._known = kg.answers().to(model.device)
        head, relation, tail = kg.train.unbind(1)
        self._loops = torch.zeros(2 * kg.num_relations, dtype=torch.bool)
        for loop in relation[head == tail].unique().tolist():
            self._loops[[loop, loop + kg.num_relations]] = True
        self._loops = self._loops.to(model.device)
        self._tables: OrderedDict[int | None, dict[str, Tensor]] = OrderedDict()

    def predict(
        self,
        *,
        relation: str,
        head: str | None = None,
        tail: str | None = None,
        k: int = 10,
        include_known: bool = False,
        include_self: bool | None = None,
    ) -> list[Prediction]:
        """Return the best answers to (head, relation, ?) or (?, relation, tail); see `predict`."""
        if (head is None) == (tail is None):
            raise DataError("predict: pass either head or tail, the end that is known.")
        entity, relation_id = query_ids(self.kg, Query(head, relation, tail))
        found = self.answers(
            torch.tensor([entity]),
            torch.tensor([relation_id]),
            k=k,
            include_known=include_known,
            include_self=include_self,
        )
        return self._predictions(found)

    def answers(
        self,
        entity: Tensor,
        relation: Tensor,
        *,
        k: int = 10,
        include_known: bool = False,
        include_self: bool | None = None,
        batch_size: int = 1024,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> Answers:
        """Return the best answers to many queries.

        Parameters
        ----------
        entity, relation : Tensor
            (Q,) int64 ids; relation ids from ``num_relations`` on are inverses and ask for heads.
        k, include_known, include_self
            See `predict`.
        batch_size : int
            Most queries scored at a time; fewer if their scores would take more than 256 MiB.
        on_batch : callable, optional
            Called with the number of queries answered and the number of all queries.

        Returns
        -------
        Answers
            In the order of the queries, best first, ties by id; on the CPU.

        Raises
        ------
        DataError
            ``k`` is below 1, ids are out of range, or the numbers of entities and relations differ.
        """
        if k < 1:
            raise DataError(f"predict: expected k of at least 1, received {k}.")
        k = min(k, self.kg.num_entities)  # k may exceed int64
        self._check_queries(entity, relation)
        if not len(entity):
            none, scores = torch.empty(0, dtype=torch.int64), torch.empty(0)
            by_head = {head: scores.clone() for head in self.model.heads}
            return Answers(none, none.clone(), none.clone(), scores, by_head, none.bool())
        device = self.model.device
        entity, relation = entity.to(device), relation.to(device)
        found: list[list[Tensor]] = []
        done = 0
        with evaluating(self.model):
            for positions in self._batches(relation, batch_size):
                asked, under = entity[positions], relation[positions]
                left_out = torch.ones_like(asked, dtype=torch.bool)
                if include_self is None:
                    left_out = ~self._loops[under]
                elif include_self:
                    left_out = torch.zeros_like(left_out)
                row, *columns = self._best(asked, under, k, include_known, left_out)
                found.append([column.cpu() for column in (positions[row], *columns)])
                done += len(positions)
                if on_batch is not None:
                    on_batch(done, len(entity))
        columns = [torch.cat(parts) for parts in zip(*found, strict=True)]
        # Batches may group queries by relation: restore the order of the queries.
        order = torch.argsort(columns[0], stable=True)
        query, answer, rank, score, known, *every = (column[order] for column in columns)
        heads = dict(zip(self.model.heads, every, strict=True))
        return Answers(query, answer, rank, score, heads, known)

    def _check_queries(self, entity: Tensor, relation: Tensor) -> None:
        """Refuse ids that are out of range; the message names the first such row."""
        if entity.dim() != 1 or entity.shape != relation.shape:
            raise DataError(
                "Queries: expected as many relations as entities, in two tensors of one dimension;"
                f" received shapes {list(entity.shape)} and {list(relation.shape)}."
            )
        for what, ids, number in (
            ("entity", entity, self.kg.num_entities),
            ("relation", relation, 2 * self.kg.num_relations),
        ):
            bad = ((ids < 0) | (ids >= number)).nonzero().flatten()
            if len(bad):
                row = int(bad[0])
                raise DataError(
                    f"Queries, row {row + 1} (counted from 1): the {what} id {int(ids[row])} is out"
                    f" of range; expected 0 to {number - 1}."
                )

    @torch.no_grad()
    def _best(
        self, entity: Tensor, relation: Tensor, k: int, include_known: bool, not_self: Tensor
    ) -> list[Tensor]:
        """Return the k best answers to (B,) queries as columns, candidates scored in portions.

        The columns are the query's row, the answer, its rank and score, whether it is known, and
        its score by each head. Where ``not_self``, (B,) bool, is set, the query's entity is
        excluded from the answers, unless the graph has that triple.
        """
        queries = self.model.queries(entity, relation)
        # Sorted by row, and by entity within a row.
        known_row, known_col = self.known_pairs(entity, relation)
        found: list[list[Tensor]] = []
        for first, scores in self._portions(queries, relation):
            decision = scores[DECISION]
            if decision.isnan().any():
                raise IMVIAError("predict: the model's scores are not numbers; train it again.")
            known = torch.zeros_like(decision, dtype=torch.bool)
            here = (known_col >= first) & (known_col < first + decision.shape[1])
            known[known_row[here], known_col[here] - first] = True
            excluded = torch.zeros_like(known) if include_known else known.clone()
            # Exclude the query's own entity where `not_self` says so.
            own = entity - first
            row = (not_self & (own >= 0) & (own < decision.shape[1])).nonzero().flatten()
            excluded[row, own[row]] |= ~known[row, own[row]]
            row, answer, rank = best(decision, excluded, k)
            columns = [row, answer + first, rank, decision[row, answer], known[row, answer]]
            found.append([*columns, *(scores[head][row, answer] for head in self.model.heads)])
        if len(found) == 1:
            return found[0]
        columns = [torch.cat(parts) for parts in zip(*found, strict=True)]
        # The sorts are stable: equal scores of a row stay in the order of the ids.
        order = torch.argsort(columns[3], descending=True, stable=True)
        order = order[torch.argsort(columns[0][order], stable=True)]
        columns = [column[order] for column in columns]
        columns[2] = places(columns[0], len(entity))
        return [column[columns[2] <= k] for column in columns]

    def _batches(self, relation: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Yield positions of queries to score together, of one relation if tables depend on it."""
        groups = [torch.arange(len(relation), device=relation.device)]
        if self.model.settings.candidates != "shared":
            groups = [rows for _, rows in by_relation(relation)]
        scored = self.model.num_entities if self.holds else PORTION
        # (B, N) matrices: a score matrix per head, that of the decision, and three more.
        room = SCORES // (4 * scored * (len(self.model.heads) + 4))
        for group in groups:
            yield from group.split(max(min(batch_size, room), 1))

    @torch.no_grad()
    def scores(
        self, entity: Tensor, relation: Tensor, batch_size: int = 1024
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield (positions, scores by head and ``decision``) of queries against all entities.

        Each item has at most ``batch_size`` positions, as in `answers`.
        """
        with evaluating(self.model) as model:
            for positions in self._batches(relation, batch_size):
                under = relation[positions]
                yield positions, self._scores(model.queries(entity[positions], under), under)

    def _scores(self, queries: Mapping[str, Tensor], relation: Tensor) -> dict[str, Tensor]:
        """Return (B, N) scores by head and ``decision``."""
        parts = [scores for _, scores in self._portions(queries, relation)]
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    def _portions(
        self, queries: Mapping[str, Tensor], relation: Tensor
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (first id, scores by head and ``decision``) for each portion of the candidates."""
        model = self.model
        if self.holds:
            yield 0, model.scores(queries, self.tables(relation), relation)
            return
        under = None if model.settings.candidates == "shared" else relation[0]
        for first in range(0, model.num_entities, PORTION):
            # The last portion is padded: in products of one shape, equal rows give equal scores.
            ids = torch.arange(first, first + PORTION, device=model.device)
            tables = model.candidates(under, ids.clamp_(max=model.num_entities - 1))
            scores = model.scores(queries, tables, relation)
            rows = model.num_entities - first
            yield first, {name: part[:, :rows] for name, part in scores.items()}

    @property
    def table_bytes(self) -> int:
        """Size in bytes of the candidate tables; with ``candidates="relation"``, of all kept."""
        model = self.model
        number = 1 if model.settings.candidates == "shared" else TABLES_HELD
        return number * model.num_entities * sum(model.widths.values()) * 4

    @property
    def holds(self) -> bool:
        """Whether candidate tables are kept."""
        return self.table_bytes <= self.held

    @torch.no_grad()
    def tables(self, relation: Tensor) -> dict[str, Tensor]:
        """Return the (N, width) candidate tables of queries under (B,) relations.

        With ``candidates="relation"``, all B relations must be the same.
        """
        shared = self.model.settings.candidates == "shared"
        key = None if shared else int(relation[0])
        if key not in self._tables:
            with evaluating(self.model) as model:
                tables = model.candidates(None if shared else relation[0])
            # Column-major: the product of a single query reads the table twice as fast.
            self._tables[key] = {head: table.T.contiguous().T for head, table in tables.items()}
            while len(self._tables) > TABLES_HELD:
                self._tables.popitem(last=False)
        return self._tables[key]

    def prepare(self) -> None:
        """Compute the tables that are kept, so that the first query does not wait for them."""
        if self.holds:
            self.tables(torch.zeros(1, dtype=torch.int64, device=self.model.device))

    def known_pairs(self, entity: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the known answers of (B,) queries as rows and columns of a (B, N) matrix."""
        return self._known.pairs(entity, relation)

    def _predictions(self, found: Answers) -> list[Prediction]:
        heads = {head: scores.tolist() for head, scores in found.heads.items()}
        columns = (found.entity.tolist(), found.score.tolist(), found.known.tolist())
        return [
            Prediction(
                self.kg.entities[entity],
                self.kg.entity_names[entity],
                score,
                {head: scores[place] for head, scores in heads.items()},
                known,
            )
            for place, (entity, score, known) in enumerate(zip(*columns, strict=True))
        ]

    # -- entities that the model has not seen ---------------------------------------------------

    @torch.no_grad()
    def predict_new(
        self,
        views: Mapping[str, Tensor],
        *,
        relation: str,
        ask: Side = "tail",
        k: int = 10,
    ) -> list[Prediction]:
        """Return the best answers for an entity that the model was not trained on, by its views.

        Only the heads of the modalities that the entity has views of take part; the structural, the
        joint and the complex head have learned nothing about it. The mean over all entities
        replaces its structural vector, which the gates use, and its residuals.

        Parameters
        ----------
        views : mapping of str to Tensor
            (views, d_m) features by modality, from the encoder that made the graph's features.
        relation : str
            Label or display name.
        ask : {"tail", "head"}
            The missing end; the new entity is the other one.
        k : int
            Number of answers.

        Returns
        -------
        list of Prediction
            Best first; ``heads`` has the heads that took part, ``score`` is their decision with the
            weights of the relation, rescaled to sum to 1.

        Raises
        ------
        DataError
            There are no views, the model does not have a modality, or features have another width.

        Examples
        --------
        >>> import imvia_graph as ig
        >>> kg = ig.load_kg("countries")
        >>> predictor = ig.Predictor(ig.IMVIA.from_kg(kg, ig.Settings(dim=16)), kg)
        >>> feat, ptr = kg.views("text")
        >>> texts = feat[ptr[kg.id_of("France")] : ptr[kg.id_of("France") + 1]]
        >>> answers = predictor.predict_new({"text": texts}, relation="borders", k=2)
        >>> [list(answer.heads) for answer in answers]
        [['text'], ['text']]
        """
        if ask not in get_args(Side):
            raise DataError(f"ask: expected tail or head, received {ask!r}.")
        if k < 1:
            raise DataError(f"predict: expected k of at least 1, received {k}.")
        kg = self.kg
        under = kg.id_of(relation, "relation") + (0 if ask == "tail" else kg.num_relations)
        relation_id = torch.tensor([under], device=self.model.device)
        given = self._checked(views)
        with evaluating(self.model) as model:
            queries = model.decode(self._embed_new(given, relation_id), relation_id)
            scores = self._scores(queries, relation_id)
            weights = decision_weights(model, under)
        heads = [head for head in model.heads if head in given]
        total = sum(weights[head] for head in heads)
        parts = [weights[head] / total * scores[head] for head in heads]
        decision = sum(parts[1:], parts[0])
        if decision.isnan().any():
            raise IMVIAError(
                "predict_new: the model's scores of these views are not numbers. Are the features"
                " from the encoder that made the graph's features?"
            )
        row, answer, rank = best(decision, torch.zeros_like(decision, dtype=torch.bool), k)
        by_head = {head: scores[head][row, answer].cpu() for head in heads}
        known = torch.zeros(len(row), dtype=torch.bool)
        score = decision[row, answer].cpu()
        return self._predictions(
            Answers(row.cpu(), answer.cpu(), rank.cpu(), score, by_head, known)
        )

    def _checked(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the features by modality, checked, scaled, and on the model's device."""
        known = {modality: feat for modality, (feat, _) in self.model.views.items()}
        given = {}
        for modality, feat in views.items():
            if modality not in known:
                raise DataError(
                    f"views: the model has no modality {modality!r}; it has"
                    f" {', '.join(map(repr, known)) or 'none'}."
                )
            width = known[modality].shape[1]
            if feat.dim() != 2 or feat.shape[1] != width or not feat.is_floating_point():
                raise DataError(
                    f"views[{modality!r}]: expected floating-point features of shape (views,"
                    f" {width}), received {feat.dtype} of shape {tuple(feat.shape)}."
                )
            own = self.model.scaled(modality, feat).to(self.model.device)
            if not own.isfinite().all():
                raise DataError(f"views[{modality!r}]: expected finite features.")
            if len(own):
                given[modality] = own
        if not given:
            raise DataError("views: expected at least one view of one modality of the model.")
        return given

    def _embed_new(self, given: Mapping[str, Tensor], relation: Tensor) -> Embedding:
        """Embed an entity by its features; see `predict_new`."""
        model = self.model
        structure = model.entity.weight.mean(0, keepdim=True)
        csr = {}
        for modality, (feat, ptr) in model.views.items():
            own = given.get(modality, feat[:0])
            csr[modality] = (own, pointer(ptr.new_tensor([len(own)])))
        rel_feat = model.gate_relation(relation)
        heads = model.encoder.encode(csr, torch.zeros_like(relation), structure, rel_feat)
        for modality, table in zip(model.modalities, model.residual, strict=False):
            heads[modality] = heads[modality] + table.get_parameter("weight").mean(0)
        if model.complex_entity is not None:
            heads[COMPLEX] = model.complex_entity.weight.mean(0, keepdim=True)
        return Embedding(
            {head: heads.get(head, structure) for head in model.heads},
            {m: torch.tensor([m in given], device=model.device) for m in model.modalities},
        )


@torch.no_grad()
def predict(
    model: IMVIA,
    kg: MultiViewKG,
    *,
    relation: str,
    head: str | None = None,
    tail: str | None = None,
    k: int = 10,
    include_known: bool = False,
    include_self: bool | None = None,
) -> list[Prediction]:
    """Return the best answers to (head, relation, ?) or (?, relation, tail).

    Parameters
    ----------
    model : IMVIA
        A trained model.
    kg : MultiViewKG
        The graph that it was trained on.
    relation : str
        Label or display name.
    head, tail : str, optional
        The known end, by label or display name: exactly one of the two.
    k : int
        Number of answers. Default: 10.
    include_known : bool
        Whether answers that make a triple of the graph are returned. Default: False.
    include_self : bool, optional
        Whether the query's own entity may be an answer. Default: only if some training triple of
        the relation has the same head and tail.

    Returns
    -------
    list of Prediction
        Best first, ties by id.

    Raises
    ------
    UnknownLabelError
        The graph does not know a name; the message has the nearest known ones.
    DataError
        Both or neither of head and tail were passed, or k is below 1.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> model = ig.IMVIA.from_kg(kg, ig.Settings(dim=16))  # not trained yet
    >>> answers = ig.inference.predict(model, kg, head="France", relation="borders", k=2)
    >>> len(answers), list(answers[0].heads)
    (2, ['structure', 'image', 'text', 'joint', 'complex'])
    """
    return Predictor(model, kg).predict(
        relation=relation,
        head=head,
        tail=tail,
        k=k,
        include_known=include_known,
        include_self=include_self,
    )


def query_ids(kg: MultiViewKG, query: Query) -> tuple[int, int]:
    """Return the (entity, relation) ids of a query; inverse relations ask for heads."""
    head, relation, tail = query
    relation_id = kg.id_of(relation, "relation")
    if head is not None and tail is None:
        return kg.id_of(head), relation_id
    if tail is not None and head is None:
        return kg.id_of(tail), relation_id + kg.num_relations
    raise DataError(f"expected a head or a tail, the end that is known; received {tuple(query)!r}.")


def best(scores: Tensor, excluded: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, columns and ranks (from 1) of the k best scores of each row of (B, N).

    Ties are ordered by column; scores that are ``excluded`` or -inf are left out.

    >>> import torch
    >>> from imvia_graph.inference import best
    >>> none = torch.zeros(1, 4, dtype=torch.bool)
    >>> [column.tolist() for column in best(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), none, k=2)]
    [[0, 0], [1, 3], [1, 2]]
    """
    lowest = -torch.inf
    scores = scores.masked_fill(excluded, lowest)
    k = min(k, scores.shape[1])
    worst = scores.topk(k, dim=1).values[:, -1:]
    # Includes all ties with the k-th score, so that ids decide which of them stay.
    row, column = ((scores >= worst) & (scores > lowest)).nonzero(as_tuple=True)
    order = torch.argsort(scores[row, column], descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    row, column = row[order], column[order]
    rank = places(row, len(scores))
    kept = rank <= k
    return row[kept], column[kept], rank[kept]


def places(row: Tensor, num_rows: int) -> Tensor:
    """Return the position, from 1, of each of (n,) ascending row numbers within its row."""
    count = torch.bincount(row, minlength=num_rows)
    return torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row] + 1


# -- explaining -----------------------------------------------------------------------------------


class ViewWeight(NamedTuple):
    """The weight of a view in its modality's embedding of an entity (Eq. 2).

    Attributes
    ----------
    view : int
        Its row among the modality's views; see `MultiViewKG.views`.
    source : str
        The text itself, or the picture's path; empty if the graph does not know it.
    weight : float
        Its weight under the relation; the weights of an entity's views of a modality sum to 1.
    plain_weight : float
        Its weight by the gate without a relation.
    """

    view: int
    source: str
    weight: float
    plain_weight: float


class End(NamedTuple):
    """An end of a triple: label, display name, and its views by modality, in the graph's order."""

    entity: str
    name: str
    views: dict[str, list[ViewWeight]]


class Judgement(NamedTuple):
    """The rank and score of a triple by a head of the model, or by the decision.

    Attributes
    ----------
    rank : float
        The filtered rank, the mean rank for ties, as in `evaluate`.
    score : float
        The score, as in `predict`.
    weight : float
        The head's weight in the decision under the relation; the weights of the heads sum to 1.
        1 for ``decision``.
    """

    rank: float
    score: float
    weight: float


class Explanation(NamedTuple):
    """The view weights, ranks and scores behind a triple.

    Attributes
    ----------
    head, tail : End
        The head's views are weighted under the relation, the tail's under its inverse, as in the
        queries for the other end.
    relation, relation_name : str
        Label and display name.
    known : str or None
        The part of the graph that holds the triple: train, valid, test or known; None if none does.
    judgements : dict
        For ``"tail"`` (the query for the tail) and ``"head"``: a `Judgement` for each head of the
        model and, last, ``decision``.
    """

    head: End
    relation: str
    relation_name: str
    tail: End
    known: str | None
    judgements: dict[Side, dict[str, Judgement]]

    def as_dict(self) -> dict[str, Any]:
        """Convert to nested dicts and lists, for JSON."""

        def end(of: End) -> dict[str, Any]:
            views = {m: [view._asdict() for view in rows] for m, rows in of.views.items()}
            return {"entity": of.entity, "name": of.name, "views": views}

        return {
            "head": end(self.head),
            "relation": {"label": self.relation, "name": self.relation_name},
            "tail": end(self.tail),
            "known": self.known,
            "judgements": {
                side: {name: judgement._asdict() for name, judgement in by_head.items()}
                for side, by_head in self.judgements.items()
            },
        }


def explain(
    model: IMVIA | Predictor, kg: MultiViewKG, *, head: str, relation: str, tail: str
) -> Explanation:
    """Explain (head, relation, tail): ranks and scores by each head, and the weight of each view.

    Parameters
    ----------
    model : IMVIA or Predictor
        A predictor reuses its candidate tables.
    kg : MultiViewKG
        The graph that the model was trained on.
    head, relation, tail : str
        Labels or display names. The triple need not be true.

    Returns
    -------
    Explanation

    Raises
    ------
    UnknownLabelError
        The graph does not know a name; the message has the nearest known ones.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> model = ig.IMVIA.from_kg(kg, ig.Settings(dim=16))
    >>> found = ig.explain(model, kg, head="France", relation="borders", tail="Spain")
    >>> found.known, list(found.judgements["tail"])
    ('train', ['structure', 'image', 'text', 'joint', 'complex', 'decision'])
    >>> [view.source for view in found.head.views["image"]]
    ['flags/FR.png', 'outlines/FR.png']
    >>> round(sum(view.weight for view in found.head.views["image"]), 6)
    1.0
    """
    predictor = model if isinstance(model, Predictor) else Predictor(model, kg)
    head_id, tail_id = kg.id_of(head), kg.id_of(tail)
    relation_id = kg.id_of(relation, "relation")
    inverse = relation_id + kg.num_relations
    return Explanation(
        end_of(predictor, head_id, relation_id),
        kg.relations[relation_id],
        kg.relation_names[relation_id],
        end_of(predictor, tail_id, inverse),
        part_of(kg, head_id, relation_id, tail_id),
        {
            "tail": _judgements(predictor, head_id, relation_id, tail_id),
            "head": _judgements(predictor, tail_id, inverse, head_id),
        },
    )


def end_of(predictor: Predictor, entity: int, relation: int) -> End:
    """Return an entity with its views, weighted under a relation or inverse relation."""
    model, kg = predictor.model, predictor.kg
    conditioned = view_weights(model, entity, relation)
    plain = view_weights(model, entity)
    views = {}
    for modality in model.modalities:
        first = int(model.views[modality][1][entity])
        pairs = zip(conditioned[modality].tolist(), plain[modality].tolist(), strict=True)
        views[modality] = [
            ViewWeight(first + i, kg.view_source(modality, first + i), weight, plain_weight)
            for i, (weight, plain_weight) in enumerate(pairs)
        ]
    return End(kg.entities[entity], kg.entity_names[entity], views)


@torch.no_grad()
def view_weights(model: IMVIA, entity: int, relation: int | None = None) -> dict[str, Tensor]:
    """Return the (k,) weights of an entity's k views by modality, as in `GatedViewConv`.

    Parameters
    ----------
    model : IMVIA
        The model whose gates weight the views.
    entity : int
        Id of the entity.
    relation : int, optional
        Id of the relation; inverses from ``num_relations`` on. Default: none, as for relation-free
        candidates.
    """
    device = model.device
    entities = torch.tensor([entity], device=device)
    rel_feat = None
    if relation is not None:
        rel_feat = model.gate_relation(torch.tensor([relation], device=device))
    weights = {}
    for modality, (feat, ptr) in model.views.items():
        # Reads the entity's own views only.
        own = feat[ptr[entity] : ptr[entity + 1]]
        _, found = model.encoder.conv(modality).aggregate(
            own,
            pointer(ptr.new_tensor([len(own)])),
            torch.zeros_like(entities),
            model.entity(entities),
            rel_feat,
            get_weight=True,
        )
        assert isinstance(found, ViewWeights)
        weights[modality] = found.weight.float().cpu()
    return weights


@torch.no_grad()
def decision_weights(model: IMVIA, relation: int) -> dict[str, float]:
    """Return the weight of each head in the decision under a relation; the weights sum to 1."""
    weights = model.decision_weights(torch.tensor([relation], device=model.device))[0].tolist()
    return dict(zip(model.heads, weights, strict=True))


def part_of(kg: MultiViewKG, head: int, relation: int, tail: int) -> str | None:
    """Return the first of train, valid, test and known that holds a triple, or None."""
    triple = torch.tensor([head, relation, tail])
    for part in PARTS:
        if (getattr(kg, part) == triple).all(1).any():
            return part
    return None


def _judgements(
    predictor: Predictor, entity: int, relation: int, answer: int
) -> dict[str, Judgement]:
    """Return the judgements of an answer to the query (entity, relation), by head."""
    device = predictor.model.device
    entities, relations, answers = (
        torch.tensor([value], device=device) for value in (entity, relation, answer)
    )
    [(_, scores)] = predictor.scores(entities, relations)
    row, col = predictor.known_pairs(entities, relations)
    weights = {**decision_weights(predictor.model, relation), DECISION: 1.0}
    return {
        name: Judgement(
            filtered_ranks(value, answers, row, col).item(), value[0, answer].item(), weights[name]
        )
        for name, value in scores.items()
    }


__all__ = [
    "Answers",
    "End",
    "Explanation",
    "Judgement",
    "Prediction",
    "Predictor",
    "Query",
    "ViewWeight",
    "decision_weights",
    "explain",
    "predict",
    "view_weights",
]
