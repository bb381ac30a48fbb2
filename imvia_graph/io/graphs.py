"""Conversion from and to the graphs of networkx and DGL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from imvia_graph._labels import decode_triples
from imvia_graph.errors import DataError
from imvia_graph.io.arrays import split_of
from imvia_graph.io.source import Source, from_frames, numbered
from imvia_graph.kg import SPLITS, MultiViewKG, Split, Views

#: Names of edge attributes (networkx) or edge data (DGL) that may hold the relation, in this order.
RELATION_NAMES = ("relation", "rel", "predicate", "label", "type", "etype", "rel_type", "r")
#: Edge data that mark the splits in DGL's own data sets. The ``_edge_mask`` names come first: data
#: sets that also store a reverse edge for each triple leave it out of these masks only.
MASKS: dict[Split, tuple[str, ...]] = {
    "train": ("train_edge_mask", "train_mask"),
    "valid": ("valid_edge_mask", "val_edge_mask", "valid_mask", "val_mask"),
    "test": ("test_edge_mask", "test_mask"),
}


# -- networkx -------------------------------------------------------------------------------------


def from_networkx(
    graph: Any,
    *,
    relation_attribute: str | None = None,
    entities: Sequence[str] | None = None,
    relations: Sequence[str] | None = None,
) -> Source:
    """Read a networkx ``DiGraph`` or ``MultiDiGraph``: nodes are entities, edges are triples.

    The relation is an edge attribute (``relation_attribute``, or the first of `RELATION_NAMES` that
    every edge has) or else the edge key of a ``MultiDiGraph``. The edge attribute ``split`` assigns
    an edge to a split (train, valid, test, or another name of these). The node attribute ``name``
    becomes the display name.
    """
    kind = type(graph).__name__
    if not graph.is_directed():
        raise DataError(
            f"networkx: expected a DiGraph or MultiDiGraph, received an undirected {kind}. Triples"
            " have a direction; graph.to_directed() returns a graph with both directions."
        )
    if not graph.number_of_edges():
        raise DataError(f"networkx: the {kind} has no edges; expected one edge per triple.")
    multiple = graph.is_multigraph()
    if multiple:
        heads, tails, keys, data = zip(*graph.edges(keys=True, data=True), strict=True)
    else:
        heads, tails, data = zip(*graph.edges(data=True), strict=True)
        keys = ()
    attribute = relation_attribute or next(
        (name for name in RELATION_NAMES if all(name in item for item in data)), None
    )
    if attribute is not None:
        missing = next((i for i, item in enumerate(data) if attribute not in item), None)
        if missing is not None:
            raise DataError(
                f"networkx: the edge {heads[missing]!r} -> {tails[missing]!r} has no attribute"
                f" {attribute!r}; it has {', '.join(map(repr, data[missing])) or 'none'}. Name the"
                " attribute that holds the relation with relation_attribute=."
            )
        found = [item[attribute] for item in data]
        where = f"relations in the edge attribute {attribute!r}"
        # NaN is not equal to itself.
        empty = next((i for i, item in enumerate(found) if item is None or item != item), None)
        if empty is not None:
            raise DataError(
                f"networkx: the edge {heads[empty]!r} -> {tails[empty]!r} has no relation: its"
                f" attribute {attribute!r} is {found[empty]!r}. Set the attribute, or remove the"
                " edge."
            )
    elif multiple and not all(isinstance(key, int) for key in keys):
        found, where = list(keys), "relations in the edge keys"
    else:
        raise DataError(
            f"networkx: the edges of this {kind} have no relation: expected one of the attributes"
            f" {', '.join(RELATION_NAMES[:5])}, or edge keys that are not integers. Name the"
            " attribute that holds the relation with relation_attribute=."
        )
    nodes = list(graph.nodes)
    label_of = {node: str(node) for node in nodes}
    if len(set(label_of.values())) != len(nodes):
        seen: dict[str, Any] = {}
        for node, label in label_of.items():
            if label in seen:
                raise DataError(
                    f"networkx: the nodes {seen[label]!r} and {node!r} have the same label"
                    f" {label!r}. Rename one (networkx.relabel_nodes)."
                )
            seen[label] = node
    frame = pl.DataFrame(
        {
            "head": [label_of[node] for node in heads],
            "relation": [str(relation) for relation in found],
            "tail": [label_of[node] for node in tails],
            "split": _splits_of(heads, tails, data),
        },
        schema=dict.fromkeys(("head", "relation", "tail", "split"), pl.String),
        strict=False,
    )
    split = frame["split"]
    whole = split[0] is None
    frames = {
        name: frame.filter(split == name).drop("split") for name in SPLITS if (split == name).any()
    }
    source = from_frames(
        f"a networkx {kind}, {where}" + ("" if whole else ", splits in the edge attribute 'split'"),
        {"train": frame.drop("split")} if whole else frames,
        whole=whole,
        entities=list(label_of.values()) if entities is None else entities,
        relations=relations if relations is not None else graph.graph.get("relations"),
        name=str(graph.graph.get("name") or ""),
    )
    names = [str(graph.nodes[node].get("name") or "") for node in nodes]
    if any(names) and entities is None:
        source.options["entity_names"] = names
    return source


def _splits_of(heads: Sequence[Any], tails: Sequence[Any], data: Sequence[Any]) -> list[Any]:
    """Return the split of each edge, or all None if the attribute ``split`` names no splits."""
    values = [item.get("split") for item in data]
    splits = [split_of(value) if isinstance(value, str) else None for value in values]
    unknown = next((i for i, split in enumerate(splits) if split is None), None)
    if unknown is not None and any(splits):
        what = repr(values[unknown]) if "split" in data[unknown] else "missing"
        other = next(value for value, split in zip(values, splits, strict=True) if split)
        raise DataError(
            f"networkx: the edge attribute 'split' of {heads[unknown]!r} -> {tails[unknown]!r} is"
            f" {what}, but another edge has {other!r}. Expected train, valid (val, dev) or test on"
            " every edge, or on none."
        )
    return splits


def to_networkx(kg: MultiViewKG) -> Any:
    """Return a networkx ``MultiDiGraph``: nodes are entity labels, edge keys relation labels.

    Edges have the attributes ``relation`` and ``split``, nodes the attribute ``name`` if the
    display name differs from the label. A triple that occurs more than once in a split becomes one
    edge. Views are left out.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG.from_labels([("France", "borders", "Spain")])
    >>> list(ig.io.to_networkx(kg).edges(keys=True))
    [('France', 'Spain', 'borders')]
    """
    import networkx as nx

    graph = nx.MultiDiGraph(name=kg.name, relations=list(kg.relations))
    for label, name in zip(kg.entities, kg.entity_names, strict=True):
        graph.add_node(label, **({"name": name} if name != label else {}))
    for split in SPLITS:
        frame = decode_triples(kg.triples(split), kg.entities, kg.relations)
        for head, relation, tail in frame.iter_rows():
            # A triple that occurs in two splits becomes two edges, so that no split loses it.
            key = (relation, split) if graph.has_edge(head, tail, key=relation) else relation
            if key != relation and graph.edges[head, tail, relation]["split"] == split:
                continue
            graph.add_edge(head, tail, key=key, relation=relation, split=split)
    return graph


# -- DGL ------------------------------------------------------------------------------------------


def from_dgl(
    graph: Any,
    *,
    relation_attribute: str | None = None,
    entities: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    relations: Sequence[str] | None = None,
) -> Source:
    """Read a DGL graph, homogeneous with the relation of each edge, or heterogeneous.

    - One node type and one edge type: edge data hold the relation (``relation_attribute``, or the
      first of `RELATION_NAMES`). Masks as in DGL's data sets (`MASKS`) hold the splits.
    - Heterogeneous: each canonical edge type is a relation, labelled with the name of the edge type
      if that is unique, else with ``source type/edge type/destination type``. With several node
      types, entities are labelled ``node type/id`` unless ``entities`` has labels by node type.
    - ``(modality, 'of', 'entity')`` edges to a node type ``entity`` are views, all other edges are
      facts, as in `MultiViewKG.graph` and `MultiViewKG.per_relation`.
    """
    views, of = _dgl_views(graph)
    facts = [etype for etype in graph.canonical_etypes if etype not in of]
    ntypes = [ntype for ntype in graph.ntypes if ntype not in views]
    if not facts:
        raise DataError("DGL: the graph has no edges that are facts.")
    attribute = None
    if len(facts) == 1:
        data = graph.edges[facts[0]].data
        attribute = relation_attribute or next((n for n in RELATION_NAMES if n in data), None)
        # DGL names the edge type of a graph without named edge types "_E".
        if attribute is None and facts[0][1] == "_E":
            raise DataError(
                "DGL: the edges of this homogeneous graph have no relation: expected edge data"
                f" named one of {', '.join(RELATION_NAMES[:6])}, found"
                f" {', '.join(map(repr, data)) or 'none'}. Name the edge data that hold the"
                " relation with relation_attribute=."
            )
        if attribute is not None and attribute not in data:
            raise DataError(
                f"DGL: there is no edge data {attribute!r}; the edges have"
                f" {', '.join(map(repr, data)) or 'none'}."
            )
    offsets, labels = _dgl_entities(graph, ntypes, entities)
    numbers = list(range(len(facts)))
    if attribute is None:
        names = [etype[1] for etype in facts]
        names = [etype[1] if names.count(etype[1]) == 1 else "/".join(etype) for etype in facts]
        if relations is None:
            relations = names
        elif set(names) <= set(relations):
            numbers = [list(relations).index(name) for name in names]
    rows: list[Tensor] = []
    for number, etype in zip(numbers, facts, strict=True):
        head, tail = graph.edges(etype=etype, order="eid")
        if attribute is None:
            relation = torch.full_like(head, number)
        else:
            relation = graph.edges[etype].data[attribute]
            if relation.dim() != 1 or relation.is_floating_point():
                raise DataError(
                    f"DGL: expected one integer per edge in {attribute!r}, received"
                    f" {relation.dtype} of shape {tuple(relation.shape)}."
                )
        columns = [head + offsets[etype[0]], relation, tail + offsets[etype[2]]]
        rows.append(torch.stack([column.cpu().to(torch.int64) for column in columns], dim=1))
    triples = torch.cat(rows)
    parts, outside = _dgl_splits(graph, facts, triples)
    options = {}
    if outside:
        note = f"{outside} edges are in no mask of {', '.join(parts)} and are left out."
        if "train_edge_mask" in graph.edges[facts[0]].data:
            note = (
                f"{outside} edges are in none of the masks train_edge_mask, … and are left out,"
                " among them the reverse edges that DGL's data sets add."
            )
        options["notes"] = [note]
    kept = torch.cat(list(parts.values())) if parts else triples
    labels, relation_labels = numbered({"all": kept}, labels, relations)
    kind = "homogeneous" if len(graph.canonical_etypes) == 1 else "heterogeneous"
    how = f"relations in the edge data {attribute!r}" if attribute else "edge types are relations"
    return Source(
        f"a {kind} DGL graph, {how}",
        labels,
        relation_labels,
        parts or {"train": triples},
        whole=not parts,
        views=views,
        options=options,
    )


def _dgl_views(graph: Any) -> tuple[dict[str, Views], list[tuple[str, str, str]]]:
    """Return the views by modality and their edge types, as in `MultiViewKG.graph`."""
    views, of = {}, []
    for etype in graph.canonical_etypes:
        modality, name, owner = etype
        if name == "of" and owner == "entity" and modality != "entity":
            data = graph.nodes[modality].data
            if "feat" not in data:
                continue
            view, entity = (end.cpu() for end in graph.edges(etype=etype, order="eid"))
            views[modality] = Views(data["feat"][view], entity)
            of.append(etype)
    return views, of


def _dgl_entities(
    graph: Any, ntypes: list[str], entities: Sequence[str] | Mapping[str, Sequence[str]] | None
) -> tuple[dict[str, int], list[str]]:
    """Return the first entity id of each node type, and the labels in id order."""
    offsets: dict[str, int] = {}
    labels: list[str] = []
    for ntype in ntypes:
        offsets[ntype] = len(labels)
        count = graph.num_nodes(ntype)
        if isinstance(entities, Mapping) and ntype in entities:
            listed = list(entities[ntype])
        elif entities is not None and not isinstance(entities, Mapping) and len(ntypes) == 1:
            listed = list(entities)
        elif entities is not None and not isinstance(entities, Mapping):
            raise DataError(
                "DGL: expected labels by node type, entities={'type': [...]}, because the graph has"
                f" several node types: {', '.join(ntypes)}."
            )
        elif len(ntypes) == 1:
            listed = [str(i) for i in range(count)]
        else:
            listed = [f"{ntype}/{i}" for i in range(count)]
        if len(listed) != count:
            raise DataError(
                f"DGL: expected {count} labels, one per {ntype!r} node, received {len(listed)}."
            )
        labels += listed
    return offsets, labels


def _dgl_splits(
    graph: Any, facts: list[tuple[str, str, str]], triples: Tensor
) -> tuple[dict[Split, Tensor], int]:
    """Return the triples by split according to masks, and how many triples are in no mask.

    Without a train mask on all edge types, the dict is empty.
    """
    parts: dict[Split, Tensor] = {}
    inside = torch.zeros(len(triples), dtype=torch.bool)
    for split, names in MASKS.items():
        masks = []
        for etype in facts:
            data = graph.edges[etype].data
            name = next((name for name in names if name in data), None)
            if name is None:
                break
            masks.append(data[name].cpu().bool())
        if len(masks) == len(facts):
            mask = torch.cat(masks)
            parts[split] = triples[mask]
            inside |= mask
        elif split == "train":
            return {}, 0
    return parts, int((~inside).sum())


def to_dgl(kg: MultiViewKG, form: str = "heterogeneous") -> Any:
    """Return a DGL graph of the triples of all splits.

    Parameters
    ----------
    kg : MultiViewKG
        The graph.
    form : {"heterogeneous", "homogeneous"}
        ``heterogeneous``: one edge type per relation, and views as in `MultiViewKG.graph`.
        ``homogeneous``: the relation id in the edge data ``rel``, and no views. Unlike in
        `MultiViewKG.graph`, validation and test triples are edges; the edge data ``train_mask``,
        ``valid_mask`` and ``test_mask`` mark the splits. DGL graphs hold no labels: node ids are
        positions in ``kg.entities``.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG.from_labels([("France", "borders", "Spain")])
    >>> ig.io.to_dgl(kg).canonical_etypes
    [('entity', 'borders', 'entity')]
    """
    if form not in ("heterogeneous", "homogeneous"):
        raise DataError(f"form: expected heterogeneous or homogeneous, received {form!r}.")
    triples = torch.cat([kg.triples(split) for split in SPLITS])
    sizes = [len(kg.triples(split)) for split in SPLITS]
    split = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    if form == "homogeneous":
        from imvia_graph._dgl import dgl

        graph = dgl.graph((triples[:, 0], triples[:, 2]), num_nodes=kg.num_entities)
        graph.edata["rel"] = triples[:, 1].contiguous()
        for number, name in enumerate(SPLITS):
            graph.edata[f"{name}_mask"] = split == number
        return graph
    if sizes[1] or sizes[2]:
        kg = kg.replace(train=triples, valid=None, test=None)
    graph = kg.per_relation()
    order = torch.argsort(triples[:, 1], stable=True)
    counts = torch.bincount(triples[:, 1], minlength=kg.num_relations).tolist()
    for label, part in zip(kg.relations, split[order].split(counts), strict=True):
        for number, name in enumerate(SPLITS):
            graph.edges["entity", label, "entity"].data[f"{name}_mask"] = part == number
    return graph
