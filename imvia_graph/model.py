"""IMVIA, top to bottom: queries, candidates and scores are separate questions."""

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

#: Heads beside those of the modalities.
STRUCTURE, JOINT, COMPLEX = "structure", "joint", "complex"
#: What the fused score is called where scores are listed by head.
DECISION = "decision"


class Embedding(NamedTuple):
    """Embeddings of entities, head by head.

    Attributes
    ----------
    heads : dict of str to Tensor
        (B, dim) for ``structure``, each modality and ``joint``; for ``complex`` of its own width.
    present : dict of str to Tensor
        (B,) bool for each modality: whether the entity has a view of it.
    """

    heads: dict[str, Tensor]
    present: dict[str, Tensor]


class IMVIA(nn.Module):
    r"""Intra-modality multi-view fusion and inter-modality alignment, for completion.

    For a query (h, r, ?) each head m - structure, every modality, joint - embeds h under r (Eq. 1
    to 3 for a modality), decodes it with r into a query vector (Eq. 6), and scores candidates by
    inner products; the head ``complex``, of ComplEx, has tables of its own and multiplies h and r
    as complex numbers. The relation-aware decision adds the heads up. Queries (?, r, t) are
    (t, r + R) with an embedding of their own for each inverse relation.

    A step of training, of ranking or of prediction asks three things in turn: `queries`,
    `candidates`, `scores`.

    Parameters
    ----------
    num_entities, num_relations : int
        Sizes of the vocabularies, inverse relations not counted.
    views : mapping of str to (feat, ptr)
        Views of each modality, as `MultiViewKG.views` gives them. They are no part of the model's
        state: a checkpoint holds what was learned. Features stay in their dtype and, where they are
        mapped, in their file; only double precision and what `moderate` has to scale are copied.
        They move with the model to another device unless they are too large for it (the setting
        ``views_on``); then those that are asked for go there.
    settings : Settings, optional
        The group *model*, and ``alignment``, ``temperature`` and ``information_dim``. Default: all
        as they are by default.
    shards : Shards, optional
        Which entities are this process's, where there are several (`imvia_graph.distributed`).
        Default: all.

    Attributes
    ----------
    modalities : list of str
    sources : list of str
        What is aligned, disentangled and joined: ``structure`` and the modalities.
    heads : list of str
        What scores: the sources, ``joint`` where there are several of them and, with the setting
        ``complex_head``, ``complex``.
    widths : dict of str to int
        Of each head's embeddings and query vectors.
    tucker_heads : list of str
        Those with a Tucker decoder: all but ``complex``.

    Raises
    ------
    SettingsError
        Settings that leave nothing to score by, or that do not go together.

    Notes
    -----
    Of several processes each holds the rows of its own entities. All ask the same: `embed` and
    `decode` then answer for a process's part of the queries (`Shards.part`), `queries` for all of
    them, and `candidates` for entities that are the process's own.

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
                "Setting structure: false leaves nothing to score by, since there are no views"
                " (settings: modalities). Leave the structure in, or add a modality."
            )
        # With nothing to join, the joint head would repeat the only one.
        self.joint = JointFusion(s.dim, len(sources)) if s.joint and len(sources) > 1 else None
        self.tucker_heads = [*sources, JOINT] if self.joint is not None else list(sources)
        self.heads = [*self.tucker_heads, COMPLEX] if s.complex_head else self.tucker_heads
        if s.complex_head and COMPLEX in views:
            raise SettingsError(
                f"Setting complex_head: the head is called {COMPLEX!r}, as one of the graph's"
                " modalities is. Rename that, or set complex_head: false."
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
            # As small as is usual for ComplEx: what it starts from is soon forgotten.
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
                "Setting lambda_relation: relations are predicted by their own blocks, which there"
                " are with relation_residual: true alone. Set that, or lambda_relation: 0."
            )

    @classmethod
    def from_kg(
        cls, kg: MultiViewKG, settings: Settings | None = None, shards: Shards | None = None
    ) -> IMVIA:
        """A model for a graph, with the modalities that the settings name (default: all)."""
        settings = Settings() if settings is None else checked_settings(settings)
        views = _wanted_views(kg, settings)
        model = cls(kg.num_entities, kg.num_relations, views, settings, shards)
        model._labels = kg.label_columns
        return model

    def check_graph(self, kg: MultiViewKG) -> None:
        """Refuse a graph whose ids are not those of the model's.

        Parameters
        ----------
        kg : MultiViewKG
            Has to have as many entities and relations as the model and, where the model was made
            `from_kg`, the same labels in the same order.

        Raises
        ------
        DataError
            It has not; the message says where they part.
        """
        kinds = ("entities", "relations")
        ours, theirs = (self.num_entities, self.num_relations), (kg.num_entities, kg.num_relations)
        for kind, mine, other in zip(kinds, ours, theirs, strict=True):
            if mine != other:
                raise DataError(
                    f"The model is of a graph with {mine:,} {kind}; {kg} has {other:,}. Take the"
                    " graph that it was trained on: `imvia_graph.load` gives both."
                )
        for kind, labels, column in zip(kinds, self._labels or (), kg.label_columns, strict=False):
            if labels is not column and not labels.equals(column):
                place = int((labels != column).arg_max() or 0)
                raise DataError(
                    f"The model is of a graph whose {kind} are in another order: number {place} is"
                    f" {labels[place]!r} there and {column[place]!r} in {kg}. Take the graph that"
                    " it was trained on (`imvia_graph.load` gives both), or fix the order of ids: a"
                    " KG folder does, and so do entities= and relations= of load_kg."
                )

    def reset_parameters(self) -> None:
        """Initialise the tables and the layers anew."""
        # Parts before the layers that they are in, which may want another start for their parts.
        for module in reversed(list(self.modules())[1:]):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        # What a seed gives depends on the order.
        for table in (self.entity, *self.relation, *self.residual):
            if isinstance(table, EntityTable):
                table.reset_parameters()
            else:
                assert isinstance(table, nn.Embedding)
                nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)
        if self.complex_entity is not None and self.complex_relation is not None:
            self.complex_entity.reset_parameters()
            nn.init.normal_(self.complex_relation.weight, std=self.complex_entity.std)
        # Small beside the matrices that the core makes: what relations share is learned first.
        for table in self.relation_residual:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.05)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.entity.weight.device

    @property
    def entity_tables(self) -> list[EntityTable]:
        """The tables of which each process holds its own entities' rows."""
        tables = (self.entity, *self.residual, self.complex_entity)
        return [table for table in tables if isinstance(table, EntityTable)]

    @property
    def relation_tables(self) -> list[nn.Embedding]:
        """The tables of relations, their own blocks included."""
        tables = (*self.relation, *self.relation_residual, self.complex_relation)
        return [table for table in tables if isinstance(table, nn.Embedding)]

    @property
    def complex_tables(self) -> list[EntityTable | nn.Embedding]:
        """The tables of the head of ComplEx, where there is one."""
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
        """(V, d_m) features as the model sees them: see `moderate`; double precision as single."""
        scale = self.view_scale[modality]
        if scale is None:
            return feat.float() if feat.dtype == torch.float64 else feat
        scaled = torch.empty_like(feat, dtype=torch.float32)
        for part, out in zip(_files.portions(feat), _files.portions(scaled), strict=True):
            out.copy_(part.double() * scale.to(feat.device))
        return scaled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IMVIA:
        """Move or convert the model; features move where they fit, and are never converted."""
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
        """Scores of triples, by the decision.

        Scores rank the answers to one query; those of different queries do not compare.

        Parameters
        ----------
        head, relation, tail : Tensor
            (B,) int64 ids. ``(tail, relation + num_relations, head)`` asks for the head.

        Returns
        -------
        Tensor
            (B,), with gradients where they are wanted.

        Raises
        ------
        IMVIAError
            Of several processes, each of which has a part of the entities; ids of other shapes or
            numbers than each other; on a CPU also ids that the model does not have.
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
        """Refuse what one process does for all, where each of several has a part of the entities.

        Raises
        ------
        IMVIAError
        """
        if not self.shards.alone:
            raise IMVIAError(
                f"IMVIA: {what} in one process, and this model has a part of the entities, as each"
                f" of the {self.shards.size} processes has; `imvia_graph.load` of the run folder"
                " has all."
            )

    def check_ids(self, **given: Tensor) -> None:
        """Refuse (B,) ids that are none, or on a CPU none of the model's; by their names.

        Those called ``relation`` are of relations, the inverse ones with them, others of entities.

        Raises
        ------
        IMVIAError
        """
        for name, ids in given.items():
            number = 2 * self.num_relations if name == "relation" else self.num_entities
            picking.check_ids("IMVIA", name, ids, number)

    @property
    def gate_sees_relations(self) -> bool:
        """Whether the weights of views depend on the relation that is asked about."""
        return self.settings.gate == "relation"

    def gate_relation(self, relation: Tensor) -> Tensor | None:
        """(B, relation_dim) features of (B,) relations for the gates; None if they see none."""
        found: Tensor = self.relation[0](relation)
        return found if self.gate_sees_relations else None

    def embed(
        self,
        entity: Tensor | None = None,
        relation: Tensor | None = None,
        streams: Streams | None = None,
    ) -> Embedding:
        """Embeddings of (B,) entities, or all, under (B,) relations, or one relation, or none.

        With ``streams`` modalities are done beside each other.
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
        """Heads of (n,) entities with the rows of theirs in each table."""
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
        given = structure, rel_feat, relation, halves, streams
        heads.update(self.encoder.encode(self.views, entity, *given))
        for modality, table in zip(self.modalities, self.residual, strict=False):
            assert isinstance(table, EntityTable)
            heads[modality] = heads[modality] + rows(table)
        if self.joint is not None:
            heads[JOINT] = self.joint(list(heads.values()))
        if self.complex_entity is not None:
            heads[COMPLEX] = rows(self.complex_entity)
        return heads

    def grouped(self, relation: Tensor, most_relations: int | None = None) -> RelationGroups:
        """(B,) relations as `decode` takes them, once for all that ask.

        ``most_relations`` is how many are distinct at most, where that is known.
        """
        most = 2 * self.num_relations if most_relations is None else most_relations
        return group_by_relation(relation, self.shards, most)

    def decode(
        self,
        embedding: Embedding,
        relation: Tensor | RelationGroups,
        streams: Streams | None = None,
    ) -> dict[str, Tensor]:
        """Query vectors of embedded entities and (B,) relations, head by head.

        They are (B, dim), those of the head ``complex`` (B, 2 complex_rank): see `widths`.
        Relations may be `grouped` already. With ``streams`` the heads are done beside each other.
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
        """Query vectors (B, width) of (B,) entities and (B,) relations, head by head: `widths`."""
        found = self.decode(self.embed(entity, relation), relation)
        return {head: self.shards.gather(query, len(entity)) for head, query in found.items()}

    def queries_alike(self, entity: Tensor, relation: Tensor) -> dict[str, Tensor]:
        """What `queries` gives, made whole by every process, for evaluation.

        A product of a part of the rows may differ from that of all in its last bits; these are the
        same for any number of processes.
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
        """Candidate tables (N, width), head by head; see `widths`.

        Parameters
        ----------
        relation : Tensor, optional
            A scalar: the relation that all queries share, for ``candidates="relation"``, the exact
            form of Eq. 1. None for relation-free tables.
        entity : Tensor, optional
            (N,) int64 candidates; None for all entities. Of several processes, each has its own:
            the rows of other entities are of no meaning.
        halves : dict, optional
            Empty at first: what tables of the same entities under other relations share, as long
            as nothing is learned between them; see `GatedViewConv.aggregate`.
        streams : Streams, optional
            With which modalities are done beside each other.
        """
        if entity is None:
            own = torch.arange(self.shards.start, self.shards.stop, device=self.device)
            return self._heads(own, lambda table: table.weight, relation, halves, streams)
        own = (entity - self.shards.start).clamp(0, len(self.shards) - 1)
        return self._heads(entity, lambda table: table(own), relation, halves)

    def scores(
        self, queries: Mapping[str, Tensor], candidates: Mapping[str, Tensor], relation: Tensor
    ) -> dict[str, Tensor]:
        """Scores (B, N), head by head and, last, ``decision``.

        Parameters
        ----------
        queries : mapping
            (B, width) a head; see `widths`.
        candidates : mapping
            (N, width) a head, or (B, N, width): candidates of each query's own.
        relation : Tensor
            (B,) int64.
        """
        scores = {head: inner(queries[head], candidates[head]) for head in self.heads}
        scores[DECISION] = self.decide(list(scores.values()), relation)
        return scores

    def relation_scores(
        self, heads: Mapping[str, Tensor], tails: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        r"""Scores (P, 2R) of all relations, by each head but ``complex``, for pairs of entities.

        By the relations' own blocks, :math:`\operatorname{Re} \langle e_h, c_r, \overline{e_t}
        \rangle`, without the core, which each pair would have to be multiplied with.

        Parameters
        ----------
        heads, tails : mapping
            (P, dim) a head.

        Raises
        ------
        SettingsError
            Without the setting ``relation_residual`` there are no blocks.
        """
        self._check_blocks()
        found: dict[str, Tensor] = {}
        for head, blocks in zip(self.tucker_heads, self.relation_residual, strict=True):
            assert isinstance(blocks, nn.Embedding)
            pairs = complex_product(tails[head], conjugate(heads[head]))
            found[head] = pairs @ blocks.weight.T
        return found

    def decide(self, scores: Sequence[Tensor], relation: Tensor) -> Tensor:
        """The relation-aware decision over the heads' scores."""
        if self.settings.decision == "detached":
            scores = [score.detach() for score in scores]
        return weighted_sum(scores, self.decision_weights(relation))

    def decision_weights(self, relation: Tensor) -> Tensor:
        """(B, heads) weights of the heads in the decision under (B,) relations; rows sum to 1.

        The head ``complex`` has the weight that the settings name, whatever the relation; the
        others share the rest.
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
        """Whether the decision has weights to learn: not of one head, nor those of a mean."""
        return self.decision is not None and self.settings.decision != "mean"


def state_shapes(kg: MultiViewKG, settings: Settings) -> dict[str, list[int]]:
    """Shapes of the state of `IMVIA.from_kg`, which is not made for them; no view is read."""
    views = {name: (feat[:0], ptr) for name, (feat, ptr) in _wanted_views(kg, settings).items()}
    with torch.device("meta"), _NothingDrawn():
        model = IMVIA(kg.num_entities, kg.num_relations, views, settings)
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def _wanted_views(kg: MultiViewKG, settings: Settings) -> dict[str, tuple[Tensor, Tensor]]:
    wanted = kg.modalities if settings.modalities is None else settings.modalities
    return {modality: kg.views(modality) for modality in wanted}


class _NothingDrawn(TorchFunctionMode):
    """Leaves tensors as they are that normal numbers are to be drawn into.

    On the device meta torch would import its compiler first, which takes seconds.
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


#: So many entities and more have other defaults: no head of ComplEx, and less regularisation.
MANY = 50_000

#: Largest magnitude of a column of features that is left as it is, and the smallest of them all.
LARGEST, SMALLEST = 2.0**10, 2.0**-10
#: Longest median length of the views of a modality that is left as it is; the shortest is 1 / LONG.
LONG = 2.0**5


def moderate(feat: Tensor, typical: bool = True) -> Tensor | None:
    """Powers of two that bring features to a size that can be squared and learned from.

    Where the views' median length is above `LONG` or below 1 / `LONG`, all are multiplied by one
    number, for a length of about 1: what is learned from a modality does not depend on the unit
    that its features are in. A column whose magnitudes are then above `LARGEST` is brought below
    it; where all columns are below `SMALLEST`, all are multiplied by one number. Most features are
    left as they are, and need not be copied.

    Parameters
    ----------
    feat : Tensor
        (V, d), finite.
    typical : bool
        Whether to look at the median length, too.

    Returns
    -------
    Tensor or None
        (d,) float64 to multiply columns by, or None where nothing is to be done.

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
    # Autocast, where it is on around this, knows no float16 on a CPU.
    with torch.autocast(feat.device.type, enabled=False):
        sizes, lengths = [], []
        for part in _files.portions(feat):  # once: features may be mapped, and large
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
    """What brings (d,) magnitudes of columns to where float32 can square them."""
    largest = float(size.max())
    if SMALLEST <= largest <= LARGEST or not largest:
        return None
    # 2 to the exponent is above the size, by a factor of two at most.
    exponent = torch.frexp(size if largest > LARGEST else size.max())[1].double()
    if largest > LARGEST:
        exponent = (exponent - 10).clamp(min=0)
    return torch.ones_like(size) * (2.0**-exponent)


def _unit_of(lengths: Sequence[Tensor]) -> float:
    """What brings the median of the lengths of views to about 1; 1 for most."""
    length = float(torch.cat(list(lengths)).median())
    if not length or not math.isfinite(length) or 1 / LONG <= length <= LONG:
        return 1.0
    return float(2.0 ** -round(math.log2(length)))


#: Share of a device's free memory that features may take; the rest is for training.
_SHARE = 0.5


def _belong_on(device: torch.device, size: int, views_on: str) -> bool:
    """Whether features of so many bytes are to be on the device of a model."""
    if views_on != "auto" or device.type != "cuda":
        return views_on != "host" or device.type in ("cpu", "meta")
    return size <= _SHARE * torch.cuda.mem_get_info(device)[0]


def inner(query: Tensor, candidate: Tensor) -> Tensor:
    """(B, N) inner products of (B, d) with (N, d) or with (B, N, d)."""
    if candidate.dim() == 2:
        return query @ candidate.T
    return torch.einsum("bd,bnd->bn", query, candidate)
