"""MultiViewEncoder: the views of all modalities to one vector a modality and query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imvia_graph.errors import IMVIAError
from imvia_graph.nn.gated_view_conv import GatedViewConv
from imvia_graph.ops import Backend


class MultiViewEncoder(nn.Module):
    r"""One `GatedViewConv` and one projection a modality.

    .. math:: P_m(\hat e_{m,i}) = W_m \hat e_{m,i} + b_m

    Views are aggregated as they come (d_m) and projected afterwards: a product a query, not one a
    view.

    Parameters
    ----------
    view_feats : mapping of str to int
        Width d_m of each modality's views.
    entity_feats, rel_feats : int
        Widths of the structural entity and relation features that the gates see.
    out_feats : int
        Width of the result.
    backend : str, optional
        See `imvia_graph.ops.gated_view_aggregate`. Default: ``"auto"``.

    Examples
    --------
    >>> import torch, imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> widths = {m: kg.views(m)[0].shape[1] for m in kg.modalities}
    >>> encoder = ig.nn.MultiViewEncoder(widths, entity_feats=8, rel_feats=8, out_feats=16)
    >>> out = encoder(kg.graph, torch.rand(kg.num_entities, 8), torch.rand(8))
    >>> sorted(out) == sorted(kg.modalities), out["text"].shape == (kg.num_entities, 16)
    (True, True)
    """

    def __init__(
        self,
        view_feats: Mapping[str, int],
        entity_feats: int,
        rel_feats: int,
        out_feats: int,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        #: Modalities in the order of ``convs`` and ``projections``. Lists, since a modality's name
        #: may be anything and a module's may not.
        self.modalities = list(view_feats)
        self.out_feats = out_feats
        self.convs = nn.ModuleList(
            GatedViewConv(
                width, entity_feats, rel_feats, allow_zero_in_degree=True, backend=backend
            )
            for width in view_feats.values()
        )
        self.projections = nn.ModuleList(
            nn.Linear(width, out_feats) for width in view_feats.values()
        )

    def reset_parameters(self) -> None:
        """Initialise the layers anew."""
        for _, conv, projection in self._layers():
            conv.reset_parameters()
            projection.reset_parameters()

    def conv(self, modality: str) -> GatedViewConv:
        """The aggregation layer of a modality."""
        conv = self.convs[self.modalities.index(modality)]
        assert isinstance(conv, GatedViewConv)
        return conv

    def forward(
        self, graph: Any, entity_feat: Tensor, rel_feat: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode every entity of a heterograph (see `MultiViewKG.graph`).

        Parameters
        ----------
        graph : DGLGraph
            With the edge types ``(modality, 'of', 'entity')`` and the node data ``feat``.
        entity_feat : Tensor
            (entities, entity_feats).
        rel_feat : Tensor, optional
            (entities, rel_feats), or (rel_feats,) for all; None for the relation-free gate.

        Returns
        -------
        dict of str to Tensor
            (entities, out_feats) a modality.
        """
        out = {}
        for modality, conv, projection in self._layers():
            part = graph[modality, "of", "entity"]
            feat = part.nodes[modality].data["feat"].to(entity_feat.device)
            aggregated = conv(part, (feat, entity_feat), rel_feat)
            out[modality] = projection(aggregated.to(projection.weight.dtype))
        return out

    def encode(
        self,
        views: Mapping[str, tuple[Tensor, Tensor]],
        entity: Tensor,
        entity_feat: Tensor,
        rel_feat: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode a batch of queries, straight from the CSR of each modality's views.

        Parameters
        ----------
        views : mapping of str to (feat, ptr)
            As `MultiViewKG.views` gives them.
        entity : Tensor
            (B,) int64.
        entity_feat, rel_feat : Tensor
            (B, entity_feats) and (B, rel_feats) or (rel_feats,) or None.

        Returns
        -------
        dict of str to Tensor
            (B, out_feats) a modality.
        """
        out = {}
        for modality, conv, projection in self._layers():
            if modality not in views:
                raise IMVIAError(
                    f"MultiViewEncoder: expected views of {self.modalities}, received"
                    f" {list(views)}."
                )
            feat, ptr = views[modality]
            aggregated = conv.aggregate(feat, ptr, entity, entity_feat, rel_feat)
            out[modality] = projection(aggregated.to(projection.weight.dtype))
        return out

    def _layers(self) -> list[tuple[str, Any, Any]]:
        return list(zip(self.modalities, self.convs, self.projections, strict=True))

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"modalities={self.modalities}, out_feats={self.out_feats}"


def views_present(views: Mapping[str, tuple[Tensor, Tensor]], entity: Tensor) -> dict[str, Tensor]:
    """(B,) bool a modality: whether each entity has a view of it."""
    return {modality: ptr[entity + 1] > ptr[entity] for modality, (_, ptr) in views.items()}


def stack(embeddings: Mapping[str, Tensor]) -> Tensor:
    """(B, M, d) of M tensors (B, d)."""
    return torch.stack(list(embeddings.values()), dim=1)
