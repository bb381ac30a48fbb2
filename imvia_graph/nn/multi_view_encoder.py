"""MultiViewEncoder: the views of all modalities to one vector a modality and query."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imvia_graph._dgl import dgl
from imvia_graph._gpu.products import linear
from imvia_graph._streams import Streams
from imvia_graph.errors import IMVIAError, UnknownLabelError
from imvia_graph.nn.gated_view_conv import GatedViewConv
from imvia_graph.ops import Backend, picking

#: A modality, whose edge type is ``(modality, 'of', 'entity')``, or any canonical edge type.
EdgeType: TypeAlias = str | tuple[str, str, str]
Features: TypeAlias = Tensor | Mapping[str, Tensor]

#: Entities whose views are held on the device of the model at a time, where they are picked.
ENTITIES_AT_A_TIME = 2**15

#: What DGL can make of several tensors.
_TOGETHER = ("sum", "max", "min", "mean", "stack")


class MultiViewEncoder(nn.Module):
    r"""One `GatedViewConv` and one projection a modality.

    .. math:: P_m(\hat e_{m,i}) = W_m \hat e_{m,i} + b_m

    Views are aggregated as they come (d_m) and projected afterwards: a product a query, not one a
    view.

    Parameters
    ----------
    view_feats : mapping of str or tuple to int
        Width d_m of each modality's views. The key ``"image"`` stands for the edge type
        ``('image', 'of', 'entity')`` of `MultiViewKG.graph`; other graphs' are given in full, as in
        ``dgl.nn.HeteroGraphConv``.
    entity_feats, rel_feats : int
        Widths of the structural entity and relation features that the gates see; ``rel_feats`` of 0
        for gates that never see a relation.
    out_feats : int
        Width of the result.
    backend : str, optional
        See `imvia_graph.ops.gated_view_aggregate`. Default: ``"auto"``.
    aggregate : str or callable, optional
        What makes one tensor of the modalities', as in ``dgl.nn.HeteroGraphConv``: ``"sum"``,
        ``"max"``, ``"min"``, ``"mean"``, ``"stack"`` (along dimension 1, as `JointFusion` takes
        it), or a callable of a list of tensors and the destination node type. Default: ``None``, a
        dict.
    activation : callable, optional
        That of the gates; see `GatedViewConv`. Default: ``torch.sigmoid``.

    Examples
    --------
    >>> import torch, imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> widths = {m: kg.views(m)[0].shape[1] for m in kg.modalities}
    >>> widths
    {'image': 1280, 'text': 384}

    **All entities** of the heterograph, under one relation:

    >>> encoder = ig.nn.MultiViewEncoder(widths, entity_feats=8, rel_feats=8, out_feats=16)
    >>> entities, relation = torch.rand(kg.num_entities, 8), torch.rand(8)
    >>> out = encoder(kg.graph, entities, relation)
    >>> {modality: tuple(part.shape) for modality, part in out.items()}
    {'image': (1475, 16), 'text': (1475, 16)}

    **A block** of a sampler: the views of the entities 3 and 5, and no others.

    >>> import dgl
    >>> seeds = {"entity": torch.tensor([3, 5])}
    >>> block = dgl.to_block(dgl.in_subgraph(kg.graph, seeds), seeds)
    >>> encoder(block, entities[[3, 5]], relation)["text"].shape
    torch.Size([2, 16])

    **The views themselves**, as arrays; here each entity under a relation of its own:

    >>> views = {m: kg.views(m) for m in kg.modalities}
    >>> ids = torch.tensor([5, 5, 3])
    >>> encoder.encode(views, ids, entities[ids], torch.rand(3, 8))["text"].shape
    torch.Size([3, 16])

    **One vector an entity**, and no relation:

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
        if not (aggregate is None or callable(aggregate) or aggregate in _TOGETHER):
            raise IMVIAError(
                f"MultiViewEncoder: unknown aggregate {aggregate!r}; expected None, a callable, or"
                f" one of {', '.join(_TOGETHER)}."
            )
        #: Modalities in the order of ``convs`` and ``projections``. Lists, since a modality's name
        #: may be anything and a module's may not.
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
        """The aggregation layer of a modality, by its key in ``view_feats``."""
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
        """Encode every entity of a heterograph or of a block.

        Parameters
        ----------
        graph : DGLGraph
            With the edge types of the constructor; other edge types are left alone.
        feat : Tensor, dict or pair of dict
            The entities' features, (destination nodes, entity_feats); the views' are then the
            sources' node data ``feat``. Or both by node type, as ``dgl.nn.HeteroGraphConv`` takes
            them: a dict, of which a block's destinations are the first rows, or a pair of dicts.
        rel_feat : Tensor, optional
            (destination nodes, rel_feats), or (rel_feats,) for all; None for the relation-free
            gate.

        Returns
        -------
        dict of str to Tensor
            (destination nodes, out_feats) a modality.
        Tensor
            With ``aggregate``.

        Raises
        ------
        DGLError
            An edge type that the graph does not have.
        IMVIAError
            Features of a node type that are not there; and see `GatedViewConv.forward`.
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
                        " views are taken where feat is one tensor. Set it, or give features by"
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
        return self._together(out, shown)

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
        """Encode a batch of queries, straight from the CSR of each modality's views.

        Parameters
        ----------
        views : mapping of str to (feat, ptr)
            As `MultiViewKG.views` gives them. Features may be on another device than the rest; see
            `GatedViewConv.aggregate`.
        entity : Tensor
            (B,) int64.
        entity_feat, rel_feat : Tensor
            (B, entity_feats) and (B, rel_feats) or (rel_feats,) or None.
        relation : Tensor, optional
            (B,) int64 rows of ``rel_feat``, which is then (relations, rel_feats); see
            `GatedViewConv.aggregate`.
        halves : dict, optional
            Empty at first: what calls for the same entities under other relations share; see
            `GatedViewConv.aggregate`.
        streams : Streams, optional
            With which modalities are done beside each other on a GPU. Default: one after the other.

        Returns
        -------
        dict of str to Tensor
            (B, out_feats) a modality.
        Tensor
            With ``aggregate``.

        Raises
        ------
        IMVIAError
            A modality whose views are not there; and see `GatedViewConv.aggregate`.
        """
        out = {}
        streams = Streams() if streams is None else streams
        begun = streams.mark()
        for modality, conv, projection in self._layers():
            if modality not in views:
                raise IMVIAError(
                    f"MultiViewEncoder: expected views of {self.modalities}, received"
                    f" {list(views)}."
                )

            def part(
                rows: slice | None,
                csr: tuple[Tensor, Tensor] = views[modality],
                conv: GatedViewConv = conv,
                projection: nn.Linear = projection,
                halves: dict[Any, Tensor] | None = halves,
            ) -> Tensor:
                a_row_each = relation is None and rel_feat is not None and rel_feat.dim() == 2
                aggregated = conv.aggregate(
                    *csr,
                    _rows(entity, rows),
                    _rows(entity_feat, rows),
                    _rows(rel_feat, rows) if a_row_each and rel_feat is not None else rel_feat,
                    relation=None if relation is None else _rows(relation, rows),
                    halves=halves,
                )
                assert isinstance(aggregated, Tensor)
                return _project(projection, aggregated, conv.backend)

            picked = picking.apart(views[modality][0], entity)
            if picked:
                out[modality] = _in_parts(functools.partial(part, halves=None), len(entity))
            else:
                with streams.beside(str(modality), begun):
                    out[modality] = part(None)
        shared = (entity, entity_feat, rel_feat, relation)
        streams.keep([*(part for part in shared if part is not None), *out.values()])
        return self._together(out)

    def _together(self, parts: dict[str, Tensor], destination: str = "entity") -> Any:
        """The modalities' tensors as ``aggregate`` wants them."""
        if self.aggregate is None:
            return parts
        if callable(self.aggregate):
            combine = self.aggregate
        else:
            combine = dgl.nn.pytorch.hetero.get_aggregate_fn(self.aggregate)
        return combine(list(parts.values()), destination)

    def _layers(self) -> list[tuple[str, Any, Any]]:
        return list(zip(self.modalities, self.convs, self.projections, strict=True))

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"modalities={self.modalities}, out_feats={self.out_feats}"


def _is_edge_type(key: Any) -> bool:
    return isinstance(key, str) or (isinstance(key, tuple) and len(key) == 3)


def _of_type(feat: Any, node_type: str) -> Tensor:
    """Features of a node type."""
    if not isinstance(feat, Mapping) or node_type not in feat:
        received = list(feat) if isinstance(feat, Mapping) else f"the type {type(feat).__name__}"
        raise IMVIAError(
            f"MultiViewEncoder: expected features of the nodes {node_type!r} in feat, which is one"
            f" tensor of the entities', a dict by node type or a pair of such; received {received}."
        )
    found: Tensor = feat[node_type]
    return found


def _rows(tensor: Tensor, rows: slice | None) -> Tensor:
    """Some of the rows; None for all, whose gradient then need not be copied."""
    return tensor if rows is None else tensor[rows]


def _in_parts(part: Callable[[slice | None], Tensor], rows: int) -> Tensor:
    """What a function makes of so many rows, so many at a time; and again for the gradient."""
    if rows <= ENTITIES_AT_A_TIME:
        return part(None)
    slices = [slice(i, i + ENTITIES_AT_A_TIME) for i in range(0, rows, ENTITIES_AT_A_TIME)]
    if not torch.is_grad_enabled():
        return torch.cat([part(rows) for rows in slices])
    return torch.cat([checkpoint(part, rows, use_reentrant=False) for rows in slices])


def _project(projection: nn.Linear, aggregated: Tensor, backend: Backend) -> Tensor:
    """Features come in any dtype; the result is in the layer's."""
    aggregated = aggregated.to(projection.weight.dtype)
    # Gradients of gradients are promised for the reference alone.
    plain = backend == "reference"
    found: Tensor = projection(aggregated) if plain else linear(projection, aggregated)
    return found


def views_present(views: Mapping[str, tuple[Tensor, Tensor]], entity: Tensor) -> dict[str, Tensor]:
    """(B,) bool a modality: whether each entity has a view of it."""
    return {modality: ptr[entity + 1] > ptr[entity] for modality, (_, ptr) in views.items()}
