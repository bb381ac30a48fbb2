"""MultiViewEncoder: one vector per modality and query, from the views of the entity."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imvia_graph._gpu.products import linear
from imvia_graph._streams import Streams
from imvia_graph.errors import IMVIAError, UnknownLabelError
from imvia_graph.nn.gated_view_conv import GatedViewConv
from imvia_graph.ops import Backend, picking

#: A modality, for the edge type ``(modality, 'of', 'entity')``, or any canonical edge type.
EdgeType: TypeAlias = str | tuple[str, str, str]
Features: TypeAlias = Tensor | Mapping[str, Tensor]

#: Entities per chunk where the views have to be copied to the device of the model.
ENTITIES_AT_A_TIME = 2**15

#: The aggregation functions of ``dgl.nn.HeteroGraphConv``.
_AGGREGATES = ("sum", "max", "min", "mean", "stack")


class MultiViewEncoder(nn.Module):
    r"""One `GatedViewConv` and one projection per modality.

    .. math:: P_m(\hat e_{m,i}) = W_m \hat e_{m,i} + b_m

    Views are aggregated in their own width d_m and projected afterwards, which takes one product
    per query instead of one per view.

    Parameters
    ----------
    view_feats : mapping of str or tuple to int
        Width d_m of the views of each modality. The key ``"image"`` stands for the edge type
        ``('image', 'of', 'entity')`` of `MultiViewKG.graph`; for other graphs, the keys are
        canonical edge types.
    entity_feats, rel_feats : int
        Widths of the structural entity and relation features that enter the gates; ``rel_feats`` is
        0 for gates without relations.
    out_feats : int
        Width of the output.
    backend : str, optional
        See `imvia_graph.ops.gated_view_aggregate`. Default: ``"auto"``.
    aggregate : str or callable, optional
        How to combine the outputs of the modalities, as in ``dgl.nn.HeteroGraphConv``: ``"sum"``,
        ``"max"``, ``"min"``, ``"mean"``, ``"stack"`` (along dimension 1, the input of
        `JointFusion`), or a callable that takes a list of tensors and the destination node type.
        Default: ``None``, which returns a dict.
    activation : callable, optional
        Activation of the gates; see `GatedViewConv`. Default: ``torch.sigmoid``.

    Examples
    --------
    >>> import torch, imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> widths = {m: kg.views(m)[0].shape[1] for m in kg.modalities}
    >>> widths
    {'image': 1280, 'text': 384}

    **Heterograph**, here with one relation for all entities:

    >>> encoder = ig.nn.MultiViewEncoder(widths, entity_feats=8, rel_feats=8, out_feats=16)
    >>> entities, relation = torch.rand(kg.num_entities, 8), torch.rand(8)
    >>> out = encoder(kg.graph, entities, relation)
    >>> {modality: tuple(part.shape) for modality, part in out.items()}
    {'image': (1475, 16), 'text': (1475, 16)}

    **Block** of a sampler, with the views of entities 3 and 5 only:

    >>> import dgl
    >>> seeds = {"entity": torch.tensor([3, 5])}
    >>> block = dgl.to_block(dgl.in_subgraph(kg.graph, seeds), seeds)
    >>> encoder(block, entities[[3, 5]], relation)["text"].shape
    torch.Size([2, 16])

    **CSR arrays** of the views, here with a separate relation for each query:

    >>> views = {m: kg.views(m) for m in kg.modalities}
    >>> ids = torch.tensor([5, 5, 3])
    >>> encoder.encode(views, ids, entities[ids], torch.rand(3, 8))["text"].shape
    torch.Size([3, 16])

    **One vector per entity**, without relations:

    >>> encoder = ig.nn.MultiViewEncoder(widths, 8, 0, 16, aggregate="mean")
    >>> encoder(kg.graph, entities).shape
    torch.Size([1475, 16])
    """

    def __init__(
        self,
        view_feats: Mapping[EdgeType, int] | Mapping[str, int],
        entity_feats: int,
        rel_feats: int,
        out_feats: int,
        backend: Backend = "auto",
        aggregate: str | Callable[[list[Tensor], str], Tensor] | None = None,
        activation: Callable[[Tensor], Tensor] = torch.sigmoid,
    ) -> None:
        super().__init__()
        if not isinstance(view_feats, Mapping) or not all(map(_is_edge_type, view_feats)):
            raise IMVIAError(
                "MultiViewEncoder: expected view_feats to map each modality, or each edge type"
                f" (source, name, destination), to its views' width; received {view_feats!r}."
            )
        if not (aggregate is None or callable(aggregate) or aggregate in _AGGREGATES):
            raise IMVIAError(
                f"MultiViewEncoder: unknown aggregate {aggregate!r}; expected None, a callable, or"
                f" one of {', '.join(_AGGREGATES)}."
            )
        #: Modalities in the order of ``convs`` and ``projections``, which are lists because not
        #: every modality name is a valid module name.
        self.modalities: list[Any] = list(view_feats)
        self.out_feats = out_feats
        self.aggregate = aggregate
        self.convs = nn.ModuleList(
            GatedViewConv(width, entity_feats, rel_feats, activation, True, backend)
            for width in view_feats.values()
        )
        self.projections = nn.ModuleList(
            nn.Linear(width, out_feats) for width in view_feats.values()
        )

    def reset_parameters(self) -> None:
        """Reinitialise the layers."""
        for _, conv, projection in self._layers():
            conv.reset_parameters()
            projection.reset_parameters()

    def conv(self, modality: EdgeType) -> GatedViewConv:
        """Return the `GatedViewConv` of a modality, by its key in ``view_feats``."""
        if modality not in self.modalities:
            raise UnknownLabelError(
                f"MultiViewEncoder: there is no modality {modality!r}; expected one of"
                f" {self.modalities}."
            )
        conv = self.convs[self.modalities.index(modality)]
        assert isinstance(conv, GatedViewConv)
        return conv

    def forward(
        self,
        graph: Any,
        feat: Features | tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        rel_feat: Tensor | None = None,
    ) -> dict[str, Tensor] | Tensor:
        """Encode all entities of a heterograph, or the destination entities of a block.

        Parameters
        ----------
        graph : DGLGraph
            A graph with the edge types of the constructor; other edge types are ignored.
        feat : Tensor, dict or pair of dict
            Entity features of shape (destination nodes, entity_feats); the view features are then
            the node data ``feat`` of the source nodes. Or features by node type, as in
            ``dgl.nn.HeteroGraphConv``: a dict, in which the destinations of a block come first, or
            a pair of dicts for source and destination nodes.
        rel_feat : Tensor, optional
            Relation features of shape (destination nodes, rel_feats), or (rel_feats,) for one
            relation shared by all; ``None`` for the gate without a relation.

        Returns
        -------
        dict of str to Tensor
            (destination nodes, out_feats) for each modality.
        Tensor
            The combined output, if ``aggregate`` is set.

        Raises
        ------
        DGLError
            If the graph lacks an edge type.
        IMVIAError
            If the features of a node type are missing; see also `GatedViewConv.forward`.
        """
        out, shown = {}, "entity"
        for modality, conv, projection in self._layers():
            edge_type = modality if isinstance(modality, tuple) else (modality, "of", "entity")
            source, _, destination = edge_type
            part = graph[edge_type]
            if isinstance(feat, Tensor):
                data = part.srcnodes[source].data
                if "feat" not in data:
                    raise IMVIAError(
                        f"MultiViewEncoder: the nodes {source!r} have no data 'feat', from which"
                        " views are read if feat is a single tensor. Set it, or pass features by"
                        " node type: ({source: …}, {destination: …})."
                    )
                pair = data["feat"], feat
            elif isinstance(feat, tuple):
                pair = _of_type(feat[0], source), _of_type(feat[1], destination)
            else:
                pair = (
                    _of_type(feat, source),
                    _of_type(feat, destination)[: part.num_dst_nodes()],
                )
            out[modality] = _project(projection, conv(part, pair, rel_feat), conv.backend)
            shown = destination
        return self._combine(out, shown)

    def encode(
        self,
        views: Mapping[str, tuple[Tensor, Tensor]],
        entity: Tensor,
        entity_feat: Tensor,
        rel_feat: Tensor | None = None,
        relation: Tensor | None = None,
        halves: dict[Any, Tensor] | None = None,
        streams: Streams | None = None,
    ) -> Any:
        """Encode a batch of queries, directly from the CSR arrays of each modality's views.

        Parameters
        ----------
        views : mapping of str to (feat, ptr)
            Views of each modality, as returned by `MultiViewKG.views`. The features may be on
            another device than the other arguments; see `GatedViewConv.aggregate`.
        entity : Tensor
            (B,) int64 entity of each query.
        entity_feat : Tensor
            (B, entity_feats) features of these entities.
        rel_feat : Tensor, optional
            Relation features of shape (B, rel_feats), or (rel_feats,) for one relation shared by
            all; ``None`` for the gate without a relation.
        relation : Tensor, optional
            (B,) int64 row of ``rel_feat`` for each query; ``rel_feat`` is then
            (relations, rel_feats). See `GatedViewConv.aggregate`.
        halves : dict, optional
            A cache, initially empty, for calls with the same entities under different relations;
            see `GatedViewConv.aggregate`.
        streams : Streams, optional
            CUDA streams on which the modalities run concurrently. Default: one after the other.

        Returns
        -------
        dict of str to Tensor
            (B, out_feats) for each modality.
        Tensor
            The combined output, if ``aggregate`` is set.

        Raises
        ------
        IMVIAError
            If the views of a modality are missing; see also `GatedViewConv.aggregate`.
        """
        out = {}
        queries = (entity, entity_feat, rel_feat, relation)
        streams = Streams() if streams is None else streams
        begun = streams.mark()
        for modality, conv, projection in self._layers():
            if modality not in views:
                raise IMVIAError(
                    f"MultiViewEncoder: expected views of {self.modalities}, received"
                    f" {list(views)}."
                )
            encode = functools.partial(_encode, conv, projection, views[modality], *queries)
            if picking.apart(views[modality][0], entity):
                out[modality] = _in_parts(encode, len(entity))
            else:
                with streams.beside(str(modality), begun):
                    out[modality] = encode(None, halves)
        streams.keep([*(part for part in queries if part is not None), *out.values()])
        return self._combine(out)

    def _combine(self, parts: dict[str, Tensor], destination: str = "entity") -> Any:
        """Combine the outputs of the modalities as set by ``aggregate``."""
        if self.aggregate is None:
            return parts
        if callable(self.aggregate):
            combine = self.aggregate
        else:
            from imvia_graph._dgl import dgl  # here, because DGL takes seconds to import

            combine = dgl.nn.pytorch.hetero.get_aggregate_fn(self.aggregate)
        return combine(list(parts.values()), destination)

    def _layers(self) -> list[tuple[str, Any, Any]]:
        return list(zip(self.modalities, self.convs, self.projections, strict=True))

    def extra_repr(self) -> str:
        """Return the arguments that ``print`` shows."""
        return f"modalities={self.modalities}, out_feats={self.out_feats}"


def _is_edge_type(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, tuple) and len(key) == 3)


def _of_type(feat: Any, node_type: str) -> Tensor:
    """Return the features of a node type."""
    if not isinstance(feat, Mapping) or node_type not in feat:
        received = list(feat) if isinstance(feat, Mapping) else f"the type {type(feat).__name__}"
        raise IMVIAError(
            "MultiViewEncoder: expected feat to be one tensor for the entities, or a dict or pair"
            f" of dicts with features of the nodes {node_type!r}; received {received}."
        )
    found: Tensor = feat[node_type]
    return found


def _encode(
    conv: GatedViewConv,
    projection: nn.Linear,
    csr: tuple[Tensor, Tensor],
    entity: Tensor,
    entity_feat: Tensor,
    rel_feat: Tensor | None,
    relation: Tensor | None,
    rows: slice | None,
    halves: dict[Any, Tensor] | None = None,
) -> Tensor:
    """Encode one modality of some rows of a batch; see `MultiViewEncoder.encode`."""
    if relation is not None:
        relation = _rows(relation, rows)
    elif rel_feat is not None and rel_feat.dim() == 2:
        rel_feat = _rows(rel_feat, rows)
    entity, entity_feat = _rows(entity, rows), _rows(entity_feat, rows)
    aggregated = conv.aggregate(
        *csr, entity, entity_feat, rel_feat, relation=relation, halves=halves
    )
    assert isinstance(aggregated, Tensor)
    return _project(projection, aggregated, conv.backend)


def _rows(tensor: Tensor, rows: slice | None) -> Tensor:
    """Return some rows, or with ``None`` the tensor itself, whose gradient needs no copy."""
    return tensor if rows is None else tensor[rows]


def _in_parts(part: Callable[[slice | None], Tensor], rows: int) -> Tensor:
    """Call ``part`` on chunks of the rows; the backward pass recomputes each chunk."""
    if rows <= ENTITIES_AT_A_TIME:
        return part(None)
    slices = [slice(i, i + ENTITIES_AT_A_TIME) for i in range(0, rows, ENTITIES_AT_A_TIME)]
    if not torch.is_grad_enabled():
        return torch.cat([part(rows) for rows in slices])
    return torch.cat([checkpoint(part, rows, use_reentrant=False) for rows in slices])


def _project(projection: nn.Linear, aggregated: Tensor, backend: Backend) -> Tensor:
    """Project aggregated views of any dtype in the dtype of the layer."""
    aggregated = aggregated.to(projection.weight.dtype)
    # Only the reference backend supports second-order gradients.
    plain = backend == "reference"
    found: Tensor = projection(aggregated) if plain else linear(projection, aggregated)
    return found


def views_present(views: Mapping[str, tuple[Tensor, Tensor]], entity: Tensor) -> dict[str, Tensor]:
    """Return a (B,) bool mask for each modality: whether the entities have a view of it."""
    return {modality: ptr[entity + 1] > ptr[entity] for modality, (_, ptr) in views.items()}
