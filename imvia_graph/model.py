"""The model IMVIA, with separate methods for query vectors, candidates and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from imvia_graph import _files
from imvia_graph._gpu.lookup import lookup
from imvia_graph._streams import Streams
from imvia_graph.distributed import Shards
from imvia_graph.errors import DataError, IMVIAError, SettingsError
from imvia_graph.kg import MultiViewKG
from imvia_graph.losses import Alignment, MutualInformation
from imvia_graph.nn import DecisionFusion, JointFusion, MultiViewEncoder, TuckerDecoder
from imvia_graph.nn.decision_fusion import weighted_sum
from imvia_graph.nn.entity_table import EntityTable
from imvia_graph.nn.multi_view_encoder import views_present
from imvia_graph.nn.tucker_decoder import (
    RelationGroups,
    complex_product,
    conjugate,
    group_by_relation,
)
from imvia_graph.ops import picking
from imvia_graph.settings import Settings, checked_settings

#: Names of the heads that are not modalities.
STRUCTURE, JOINT, COMPLEX = "structure", "joint", "complex"
#: Name of the fused score among the scores of the heads.
DECISION = "decision"


class Embedding(NamedTuple):
    """Embeddings of entities, by head.

    Attributes
    ----------
    heads : dict of str to Tensor
        (B, dim) for ``structure``, each modality and ``joint``; (B, 2 complex_rank) for
        ``complex``.
    present : dict of str to Tensor
        (B,) bool for each modality: whether the entity has a view of it.
    """

    heads: dict[str, Tensor]
    present: dict[str, Tensor]


class IMVIA(nn.Module):
    r"""Intra-modality multi-view fusion and inter-modality alignment, for completion.

    For a query (h, r, ?), each head m (structure, every modality, joint) embeds h under r (Eq. 1
    to 3 for a modality), decodes it with r into a query vector (Eq. 6), and scores candidates by
    inner products. The head ``complex`` is a ComplEx model with its own tables, which multiplies h
    and r as complex numbers. The relation-aware decision is a weighted sum of the heads' scores.
    Queries (?, r, t) become (t, r + R, ?), with a separate embedding for each inverse relation.

    A step of training, ranking or prediction calls `queries`, `candidates` and `scores` in turn.

    Parameters
    ----------
    num_entities, num_relations : int
        Numbers of entities and relations, inverse relations not counted.
    views : mapping of str to (feat, ptr)
        Views of each modality, as returned by `MultiViewKG.views`. They are not part of the state
        dict: a checkpoint holds learned parameters only. Features keep their dtype and, if mapped
        from a file, stay in the file; only float64 features and those that `moderate` scales are
        copied. They move with the model to another device unless they are too large for it (setting
        ``views_on``); then only the views that a batch needs are copied there.
    settings : Settings, optional
        The settings of the group *model*, and ``alignment``, ``temperature`` and
        ``information_dim``. Default: the default settings.
    shards : Shards, optional
        With several processes (`imvia_graph.distributed`): the entities of this process.
        Default: all entities.

    Attributes
    ----------
    modalities : list of str
    sources : list of str
        Inputs of alignment, disentanglement and joint fusion: ``structure`` and the modalities.
    heads : list of str
        Heads that score: the sources, ``joint`` if there are several sources and, with the setting
        ``complex_head``, ``complex``.
    widths : dict of str to int
        Width of each head's embeddings and query vectors.
    tucker_heads : list of str
        Heads with a Tucker decoder: all but ``complex``.

    Raises
    ------
    SettingsError
        If the settings leave no head, or do not go together.

    Notes
    -----
    With several processes, each process holds the table rows of its own entities, and all processes
    make the same calls. `embed` and `decode` then return this process's part of the queries
    (`Shards.part`), `queries` returns all of them, and `candidates` the entities of this process.

    Examples
    --------
    >>> import torch, imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> model = ig.IMVIA.from_kg(kg, ig.Settings(dim=16)).eval()
    >>> head = torch.tensor([kg.id_of("France")])
    >>> relation = torch.tensor([kg.id_of("borders", "relation")])
    >>> queries = model.queries(head, relation)
    >>> scores = model.scores(queries, model.candidates(), relation)
    >>> list(scores)
    ['structure', 'image', 'text', 'joint', 'complex', 'decision']
    >>> scores["decision"].shape == (1, kg.num_entities)
    True

    **Triples** are scored by a call:

    >>> tail = torch.tensor([kg.id_of("Spain")])
    >>> torch.allclose(model(head, relation, tail), scores["decision"][0, tail], atol=1e-6)
    True
    """

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        views: Mapping[str, tuple[Tensor, Tensor]],
        settings: Settings | None = None,
        shards: Shards | None = None,
    ) -> None:
        super().__init__()
        self.shards = Shards(num_entities) if shards is None else shards
        s = Settings() if settings is None else checked_settings(settings)
        if s.complex_head is None:
            s = s.replace(complex_head=num_entities < MANY and COMPLEX not in views)
        self.settings = s
        self.num_entities, self.num_relations = num_entities, num_relations
        self._labels: tuple[pl.Series, pl.Series] | None = None
        relation_dim = s.relation_dim
        self.modalities = list(views)
        self.view_scale = {
            modality: moderate(feat, typical=s.scale_views) for modality, (feat, _) in views.items()
        }
        for i, (modality, (feat, ptr)) in enumerate(views.items()):
            feat = self.scaled(modality, feat)
            self.register_buffer(f"view_feat_{i}", feat, persistent=False)
            self.register_buffer(f"view_ptr_{i}", ptr, persistent=False)

        self.entity = EntityTable(self.shards, s.dim)
        self.residual = nn.ModuleList(
            EntityTable(self.shards, s.dim) for _ in self.modalities if s.residual
        )
        widths = {modality: feat.shape[1] for modality, (feat, _) in views.items()}
        # With a gate of ones, the cosine is 1 for every view.
        activation = torch.ones_like if s.gate == "none" else torch.sigmoid
        self.encoder = MultiViewEncoder(
            widths, s.dim, relation_dim, s.dim, s.backend, activation=activation
        )
        self.sources = [STRUCTURE, *self.modalities] if s.structure else list(self.modalities)
        sources = self.sources
        if not sources:
            raise SettingsError(
                "Setting structure: false leaves no head to score with, since there are no views"
                " (setting modalities). Keep the structure, or add a modality."
            )
        # With a single source, the joint head would repeat it.
        self.joint = JointFusion(s.dim, len(sources)) if s.joint and len(sources) > 1 else None
        self.tucker_heads = [*sources, JOINT] if self.joint is not None else list(sources)
        self.heads = [*self.tucker_heads, COMPLEX] if s.complex_head else self.tucker_heads
        if s.complex_head and COMPLEX in views:
            raise SettingsError(
                f"Setting complex_head: the head is called {COMPLEX!r}, like one of the graph's"
                " modalities. Rename the modality, or set complex_head: false."
            )
        self.relation = nn.ModuleList(
            nn.Embedding(2 * num_relations, relation_dim) for _ in self.tucker_heads
        )
        self.relation_residual = nn.ModuleList(
            nn.Embedding(2 * num_relations, s.dim) for _ in self.tucker_heads if s.relation_residual
        )
        self.decoder = nn.ModuleList(
            TuckerDecoder(
                s.dim,
                relation_dim,
                s.input_dropout,
                s.relation_dropout,
                s.hidden_dropout,
                s.batch_norm,
            )
            for _ in self.tucker_heads
        )
        self.widths = dict.fromkeys(self.tucker_heads, s.dim)
        self.complex_entity: EntityTable | None = None
        self.complex_relation: nn.Embedding | None = None
        if s.complex_head:
            width = self.widths[COMPLEX] = 2 * s.complex_rank
            # Small initial values, as usual for ComplEx: they are soon forgotten.
            self.complex_entity = EntityTable(self.shards, width, std=1e-3)
            self.complex_relation = nn.Embedding(2 * num_relations, width)
        self.decision = (
            DecisionFusion(relation_dim, len(self.tucker_heads))
            if len(self.tucker_heads) > 1
            else None
        )
        several = len(sources) > 1
        self.alignment = Alignment(s.alignment, s.temperature) if several else None
        self.information = MutualInformation(sources, s.dim, s.information_dim) if several else None
        if s.lambda_relation:
            self._check_blocks()
        self.reset_parameters()

    def _check_blocks(self) -> None:
        if not self.relation_residual:
            raise SettingsError(
                "Setting lambda_relation: relations are predicted by their own blocks, which exist"
                " only with relation_residual: true. Set that, or lambda_relation: 0."
            )

    @classmethod
    def from_kg(
        cls, kg: MultiViewKG, settings: Settings | None = None, shards: Shards | None = None
    ) -> IMVIA:
        """Create a model for a graph, with the modalities in the settings (default: all)."""
        settings = Settings() if settings is None else checked_settings(settings)
        views = _wanted_views(kg, settings)
        model = cls(kg.num_entities, kg.num_relations, views, settings, shards)
        model._labels = kg.label_columns
        return model

    def check_graph(self, kg: MultiViewKG) -> None:
        """Raise if the ids of a graph are not those of the model.

        Parameters
        ----------
        kg : MultiViewKG
            Must have as many entities and relations as the model and, if the model was created by
            `from_kg`, the same labels in the same order.

        Raises
        ------
        DataError
            If it does not; the message names the first difference.
        """
        kinds = ("entities", "relations")
        ours, theirs = (self.num_entities, self.num_relations), (kg.num_entities, kg.num_relations)
        for kind, mine, other in zip(kinds, ours, theirs, strict=True):
            if mine != other:
                raise DataError(
                    f"The model is for a graph with {mine:,} {kind}; {kg.title} has {other:,}. Use"
                    " the graph that it was trained on: `imvia_graph.load` returns both."
                )
        for kind, labels, column in zip(kinds, self._labels or (), kg.label_columns, strict=False):
            if labels is not column and not labels.equals(column):
                place = int((labels != column).arg_max() or 0)
                raise DataError(
                    f"The model is for a graph whose {kind} are in another order: number {place} is"
                    f" {labels[place]!r} there and {column[place]!r} in {kg.title}. Use the graph"
                    " that it was trained on (`imvia_graph.load` returns both), or fix the order of"
                    " ids with a KG folder or with entities= and relations= of load_kg."
                )

    def reset_parameters(self) -> None:
        """Reinitialise the tables and the layers."""
        # Submodules before the modules that contain them, which may initialise them differently.
        for module in reversed(list(self.modules())[1:]):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        # The result of a seed depends on this order.
        for table in (self.entity, *self.relation, *self.residual):
            if isinstance(table, EntityTable):
                table.reset_parameters()
            else:
                assert isinstance(table, nn.Embedding)
                nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)
        if self.complex_entity is not None and self.complex_relation is not None:
            self.complex_entity.reset_parameters()
            nn.init.normal_(self.complex_relation.weight, std=self.complex_entity.std)
        # Small compared to the core's matrices, so that shared structure is learned first.
        for table in self.relation_residual:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.05)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.entity.weight.device

    @property
    def entity_tables(self) -> list[EntityTable]:
        """The entity tables, of which each process holds the rows of its own entities."""
        tables = (self.entity, *self.residual, self.complex_entity)
        return [table for table in tables if isinstance(table, EntityTable)]

    @property
    def relation_tables(self) -> list[nn.Embedding]:
        """The relation tables, including those of the relations' own blocks."""
        tables = (*self.relation, *self.relation_residual, self.complex_relation)
        return [table for table in tables if isinstance(table, nn.Embedding)]

    @property
    def complex_tables(self) -> list[EntityTable | nn.Embedding]:
        """The tables of the head ``complex``; empty without it."""
        tables = (self.complex_entity, self.complex_relation)
        return [table for table in tables if table is not None]

    @property
    def views(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The views of each modality, (feat, ptr)."""
        return {
            modality: (self.get_buffer(f"view_feat_{i}"), self.get_buffer(f"view_ptr_{i}"))
            for i, modality in enumerate(self.modalities)
        }

    def scaled(self, modality: str, feat: Tensor) -> Tensor:
        """Return (V, d_m) features as the model uses them: float64 as float32, see `moderate`."""
        scale = self.view_scale[modality]
        if scale is None:
            return feat.float() if feat.dtype == torch.float64 else feat
        scaled = torch.empty_like(feat, dtype=torch.float32)
        for part, out in zip(_files.portions(feat), _files.portions(scaled), strict=True):
            out.copy_(part.double() * scale.to(feat.device))
        return scaled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IMVIA:
        """Move or convert the model; features move if they fit, and are never converted."""
        names = [f"view_feat_{i}" for i in range(len(self.modalities))]
        features = [self._buffers.pop(name) for name in names]
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.device)).device
        sizes = [feat.nbytes for feat in features if feat is not None and feat.device != device]
        moves = _belong_on(device, sum(sizes), self.settings.views_on)
        for name, feat in zip(names, features, strict=True):
            assert feat is not None
            self.register_buffer(name, feat.to(device) if moves else feat, persistent=False)
        return self

    def forward(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        """Return the decision's scores of triples.

        Scores rank the answers to one query; scores of different queries are not comparable.

        Parameters
        ----------
        head, relation, tail : Tensor
            (B,) int64 ids. ``(tail, relation + num_relations, head)`` scores the head as the
            answer.

        Returns
        -------
        Tensor
            (B,) scores, which are differentiable.

        Raises
        ------
        IMVIAError
            If there are several processes, each with a part of the entities, or if the ids are not
            1-D tensors of one length. On a CPU also if an id is out of range.
        """
        self.check_whole("triples are scored")
        self.check_ids(head=head, relation=relation, tail=tail)
        if not len(head) == len(relation) == len(tail):
            raise IMVIAError(
                "IMVIA: expected as many heads as relations and tails; received"
                f" {len(head)}, {len(relation)} and {len(tail)}."
            )
        own = self.embed(tail, None if self.settings.candidates == "shared" else relation).heads
        tables = {name: part[:, None] for name, part in own.items()}
        return self.scores(self.queries(head, relation), tables, relation)[DECISION][:, 0]

    def check_whole(self, what: str) -> None:
        """Raise if the entities are split between several processes.

        Raises
        ------
        IMVIAError
        """
        if not self.shards.alone:
            raise IMVIAError(
                f"IMVIA: {what} in one process, but this model has only one of {self.shards.size}"
                " parts of the entities; `imvia_graph.load` of the run folder returns a model with"
                " all."
            )

    def check_ids(self, **ids_by_name: Tensor) -> None:
        """Raise unless all arguments are (B,) ids and, on a CPU, in range.

        The argument ``relation`` holds relations, inverse ones included; all others hold entities.

        Raises
        ------
        IMVIAError
        """
        for name, ids in ids_by_name.items():
            number = 2 * self.num_relations if name == "relation" else self.num_entities
            picking.check_ids("IMVIA", name, ids, number)

    @property
    def gate_sees_relations(self) -> bool:
        """Whether the weights of views depend on the relation of the query."""
        return self.settings.gate == "relation"

    def gate_relation(self, relation: Tensor) -> Tensor | None:
        """Return the (B, relation_dim) relation features of the gates, or None without them."""
        return self.relation[0](relation) if self.gate_sees_relations else None

    def embed(
        self,
        entity: Tensor | None = None,
        relation: Tensor | None = None,
        streams: Streams | None = None,
    ) -> Embedding:
        """Embed entities under relations.

        Parameters
        ----------
        entity : Tensor, optional
            (B,) int64 ids. Default: all entities of this process.
        relation : Tensor, optional
            (B,) int64 ids, or a scalar for one relation shared by all. Default: no relation.
        streams : Streams, optional
            CUDA streams on which the modalities run concurrently.

        Returns
        -------
        Embedding
        """
        if entity is None:
            own = torch.arange(self.shards.start, self.shards.stop, device=self.device)
            heads = self._heads(own, lambda table: table.weight, relation, streams=streams)
            return Embedding(heads, views_present(self.views, own))
        part = self.shards.part(len(entity))
        if relation is not None and relation.dim():
            relation = relation[part]
        mine = entity[part]
        heads = self._heads(
            mine, lambda table: self.shards.rows_of(table, entity), relation, streams=streams
        )
        return Embedding(heads, views_present(self.views, mine))

    def _heads(
        self,
        entity: Tensor,
        rows: Callable[[EntityTable], Tensor],
        relation: Tensor | None,
        halves: dict[Any, Tensor] | None = None,
        streams: Streams | None = None,
    ) -> dict[str, Tensor]:
        """Embed (n,) entities, whose rows of a table ``rows`` returns, by head."""
        structure = rows(self.entity)
        if not self.gate_sees_relations:
            relation = None
        rel_feat = None
        if relation is not None:
            table = self.relation[0]
            assert isinstance(table, nn.Embedding)
            rel_feat = table.weight
            if relation.dim() == 0:
                rel_feat, relation = rel_feat[relation], None
        heads = {STRUCTURE: structure} if self.settings.structure else {}
        args = structure, rel_feat, relation, halves, streams
        heads.update(self.encoder.encode(self.views, entity, *args))
        for modality, table in zip(self.modalities, self.residual, strict=False):
            assert isinstance(table, EntityTable)
            heads[modality] = heads[modality] + rows(table)
        if self.joint is not None:
            heads[JOINT] = self.joint(list(heads.values()))
        if self.complex_entity is not None:
            heads[COMPLEX] = rows(self.complex_entity)
        return heads

    def grouped(self, relation: Tensor, most_relations: int | None = None) -> RelationGroups:
        """Group (B,) relations once for several calls of `decode`.

        ``most_relations`` is an upper bound of the number of distinct relations, if one is known.
        """
        most = 2 * self.num_relations if most_relations is None else most_relations
        return group_by_relation(relation, self.shards, most)

    def decode(
        self,
        embedding: Embedding,
        relation: Tensor | RelationGroups,
        streams: Streams | None = None,
    ) -> dict[str, Tensor]:
        """Compute the query vectors of embedded entities and (B,) relations, by head.

        They are (B, dim), and (B, 2 complex_rank) for the head ``complex``; see `widths`. The
        relations may be `grouped` already. With ``streams``, the heads run concurrently.
        """
        groups = self.grouped(relation) if isinstance(relation, Tensor) else relation
        return self._decode(embedding.heads, groups, Streams() if streams is None else streams)

    def _decode(
        self, heads: Mapping[str, Tensor], groups: RelationGroups, streams: Streams
    ) -> dict[str, Tensor]:
        residual = self.relation_residual or [None] * len(self.tucker_heads)
        parts = zip(self.tucker_heads, self.decoder, self.relation, residual, strict=True)
        queries = {}
        begun = streams.mark()
        for number, (head, decoder, table, blocks) in enumerate(parts):
            with streams.beside(f"head {number}", begun):
                queries[head] = decoder(
                    heads[head],
                    table.weight,
                    groups,
                    None if blocks is None else blocks.weight,
                )
        streams.keep(queries.values())
        if self.complex_relation is not None:
            numbers = lookup(groups.of_each(), self.complex_relation.weight)
            queries[COMPLEX] = complex_product(heads[COMPLEX], numbers)
        return queries

    def queries(self, entity: Tensor, relation: Tensor) -> dict[str, Tensor]:
        """Compute the query vectors (B, width) of (B,) entities and relations, by head.

        See `widths`.
        """
        found = self.decode(self.embed(entity, relation), relation)
        return {head: self.shards.gather(query, len(entity)) for head, query in found.items()}

    def queries_alike(self, entity: Tensor, relation: Tensor) -> dict[str, Tensor]:
        """Compute the result of `queries` in every process, for evaluation.

        A product of a part of the rows may differ in its last bits from the product of all rows;
        these query vectors are the same for any number of processes.
        """
        heads = self._heads(entity, lambda table: self.shards.all_rows_of(table, entity), relation)
        groups = group_by_relation(relation, most=2 * self.num_relations)
        return self._decode(heads, groups, Streams())

    def candidates(
        self,
        relation: Tensor | None = None,
        entity: Tensor | None = None,
        halves: dict[Any, Tensor] | None = None,
        streams: Streams | None = None,
    ) -> dict[str, Tensor]:
        """Compute the candidate tables (N, width), by head; see `widths`.

        Parameters
        ----------
        relation : Tensor, optional
            Scalar id of the relation that all queries share, for ``candidates="relation"``, the
            exact form of Eq. 1. ``None`` for tables without a relation.
        entity : Tensor, optional
            (N,) int64 candidates. With several processes, the rows of entities of other processes
            are meaningless. Default: all entities of this process.
        halves : dict, optional
            A cache, initially empty, for tables of the same entities under different relations. It
            is valid until the parameters change; see `GatedViewConv.aggregate`.
        streams : Streams, optional
            CUDA streams on which the modalities run concurrently.

        Returns
        -------
        dict of str to Tensor
        """
        if entity is None:
            own = torch.arange(self.shards.start, self.shards.stop, device=self.device)
            return self._heads(own, lambda table: table.weight, relation, halves, streams)
        own = (entity - self.shards.start).clamp(0, len(self.shards) - 1)
        return self._heads(entity, lambda table: table(own), relation, halves)

    def scores(
        self, queries: Mapping[str, Tensor], candidates: Mapping[str, Tensor], relation: Tensor
    ) -> dict[str, Tensor]:
        """Compute the scores (B, N) of each head and, last, ``decision``.

        Parameters
        ----------
        queries : mapping of str to Tensor
            (B, width) query vectors for each head; see `widths`.
        candidates : mapping of str to Tensor
            (N, width) candidates for each head, or (B, N, width) with separate candidates for each
            query.
        relation : Tensor
            (B,) int64 relation of each query.

        Returns
        -------
        dict of str to Tensor
        """
        scores = {head: inner(queries[head], candidates[head]) for head in self.heads}
        scores[DECISION] = self.decide(list(scores.values()), relation)
        return scores

    def relation_scores(
        self, heads: Mapping[str, Tensor], tails: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        r"""Score all relations for pairs of entities, (P, 2R), by each head but ``complex``.

        The scores use only the relations' own blocks, :math:`\operatorname{Re} \langle e_h, c_r,
        \overline{e_t} \rangle`, and not the core, which would have to be multiplied with each pair.

        Parameters
        ----------
        heads, tails : mapping of str to Tensor
            (P, dim) embeddings for each head of the model.

        Returns
        -------
        dict of str to Tensor

        Raises
        ------
        SettingsError
            If the setting ``relation_residual`` is off, since there are no blocks then.
        """
        self._check_blocks()
        found: dict[str, Tensor] = {}
        for head, blocks in zip(self.tucker_heads, self.relation_residual, strict=True):
            assert isinstance(blocks, nn.Embedding)
            pairs = complex_product(tails[head], conjugate(heads[head]))
            found[head] = pairs @ blocks.weight.T
        return found

    def decide(self, scores: Sequence[Tensor], relation: Tensor) -> Tensor:
        """Return the decision: the relation-aware weighted sum of the heads' scores."""
        if self.settings.decision == "detached":
            scores = [score.detach() for score in scores]
        return weighted_sum(scores, self.decision_weights(relation))

    def decision_weights(self, relation: Tensor) -> Tensor:
        """Return the (B, heads) weights of the decision for (B,) relations; rows sum to 1.

        The head ``complex`` has the fixed weight ``complex_weight`` of the settings; the other
        heads share the rest.
        """
        several = len(self.tucker_heads)
        if self.decision is None or self.settings.decision == "mean":
            weights = self.entity.weight.new_full((len(relation), several), 1 / several)
        else:
            table = self.relation[0]
            assert isinstance(table, nn.Embedding)
            rel_feat = lookup(relation, table.weight)
            if self.settings.decision == "detached":
                rel_feat = rel_feat.detach()
            weights = self.decision.weights(rel_feat)
        if self.settings.complex_head:
            fixed = self.settings.complex_weight
            weights = nn.functional.pad(weights * (1 - fixed), (0, 1), value=fixed)
        return weights

    @property
    def learns_decision(self) -> bool:
        """Whether the decision has learned weights: not with one Tucker head or a mean."""
        return self.decision is not None and self.settings.decision != "mean"


def state_shapes(kg: MultiViewKG, settings: Settings) -> dict[str, list[int]]:
    """Return the shapes of the state of `IMVIA.from_kg` without creating it or reading views."""
    views = {name: (feat[:0], ptr) for name, (feat, ptr) in _wanted_views(kg, settings).items()}
    with torch.device("meta"), _NothingDrawn():
        model = IMVIA(kg.num_entities, kg.num_relations, views, settings)
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def _wanted_views(kg: MultiViewKG, settings: Settings) -> dict[str, tuple[Tensor, Tensor]]:
    wanted = kg.modalities if settings.modalities is None else settings.modalities
    return {modality: kg.views(modality) for modality in wanted}


class _NothingDrawn(TorchFunctionMode):
    """Skip drawing normal numbers.

    On the device ``meta``, torch would import its compiler for this, which takes seconds.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        values = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else values["tensor"]
        return func(*args, **values)


#: From this many entities on, the defaults are: no head ``complex``, and less regularisation.
MANY = 50_000

#: A column of features with a magnitude above LARGEST is scaled, and so are all columns if none has
#: a magnitude of SMALLEST or more.
LARGEST, SMALLEST = 2.0**10, 2.0**-10
#: The views of a modality are scaled if their median length is above LONG or below 1 / LONG.
LONG = 2.0**5


def moderate(feat: Tensor, typical: bool = True) -> Tensor | None:
    """Return powers of two that scale features to a range for squaring and learning.

    If the median length of the views is above `LONG` or below 1 / `LONG`, all features are
    multiplied by one factor for a median length of about 1, so that learning does not depend on the
    unit of the features. Then a column with magnitudes above `LARGEST` is scaled to at most
    `LARGEST`, and if all columns are below `SMALLEST`, all are multiplied by one factor. If that
    moves the median length out of its range, all are multiplied by one factor again, and a few much
    longer views may exceed `LARGEST`. Most features need no scaling and hence no copy.

    Parameters
    ----------
    feat : Tensor
        (V, d) finite features.
    typical : bool, optional
        Whether to scale by the median length as well. Default: ``True``.

    Returns
    -------
    Tensor or None
        (d,) float64 factors of the columns, or None if the features need no scaling.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.model import moderate
    >>> moderate(torch.tensor([[1.0, 2.0**20]]), typical=False).tolist()
    [1.0, 0.00048828125]
    >>> moderate(torch.tensor([[300.0, 400.0]])).tolist()  # of length 500
    [0.001953125, 0.001953125]
    >>> moderate(torch.tensor([[0.6, 0.8]])) is None
    True
    """
    if not feat.numel():
        return None
    # An enclosing autocast does not support float16 on a CPU.
    with torch.autocast(feat.device.type, enabled=False):
        sizes, lengths = [], []
        for part in _files.portions(feat):  # one pass: features may be mapped and large
            sizes.append(part.abs().amax(0))
            lengths.append(part.float().norm(dim=1))
        size = torch.stack(sizes).amax(0).double().cpu()
        factor = _unit_of(lengths) if typical else 1.0
        columns = _within_reach(size * factor)
        if columns is None:
            return None if factor == 1 else torch.full_like(size, factor)
        scale = columns * factor
        scaled = (part * scale.to(feat.device) for part in _files.portions(feat))
        return scale * (_unit_of([part.norm(dim=1) for part in scaled]) if typical else 1.0)


def _within_reach(size: Tensor) -> Tensor | None:
    """Return factors that bring (d,) column magnitudes into the range that float32 can square."""
    largest = float(size.max())
    if SMALLEST <= largest <= LARGEST or not largest:
        return None
    # 2 to the exponent is larger than the size, at most twice as large.
    exponent = torch.frexp(size if largest > LARGEST else size.max())[1].double()
    if largest > LARGEST:
        exponent = (exponent - 10).clamp(min=0)
    return torch.ones_like(size) * (2.0**-exponent)


def _unit_of(lengths: Sequence[Tensor]) -> float:
    """Return the factor that brings the median length of views to about 1; mostly 1."""
    length = float(torch.cat(list(lengths)).median())
    if not length or not math.isfinite(length) or 1 / LONG <= length <= LONG:
        return 1.0
    return float(2.0 ** -round(math.log2(length)))


#: Share of a device's free memory that features may use; the rest is for training.
_SHARE = 0.5


def _belong_on(device: torch.device, size: int, views_on: str) -> bool:
    """Return whether features of ``size`` bytes should be on the device of the model."""
    if views_on != "auto" or device.type != "cuda":
        return views_on != "host" or device.type in ("cpu", "meta")
    return size <= _SHARE * torch.cuda.mem_get_info(device)[0]


def inner(query: Tensor, candidate: Tensor) -> Tensor:
    """Return the (B, N) inner products of (B, d) with (N, d) or (B, N, d)."""
    if candidate.dim() == 2:
        return query @ candidate.T
    return torch.einsum("bd,bnd->bn", query, candidate)
