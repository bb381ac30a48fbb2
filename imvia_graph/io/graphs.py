"""Graphs of other libraries: networkx and DGL, in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import polars as pl
import torch
from torch import Tensor

from imvia_graph._dgl import dgl
from imvia_graph._labels import decode_triples
from imvia_graph.errors import DataError
from imvia_graph.io.arrays import split_of
from imvia_graph.io.source import Source, from_frames, numbered
from imvia_graph.kg import SPLITS, MultiViewKG, Split, Views

#: Edge attributes and edge data in which the relation is looked for, in this order.
RELATION_NAMES = ("relation", "rel", "predicate", "label", "type", "etype", "rel_type", "r")
#: Edge data by which DGL's own data sets tell the splits. Those of the first kind are there where
#: each triple has a reverse edge, too, which they leave out and the others do not.
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
    """A networkx ``DiGraph`` or ``MultiDiGraph``: nodes are entities, edges triples.

    The relation is an edge attribute (``relation_attribute``, or the first of `RELATION_NAMES` that
    every edge has) or else the key of a ``MultiDiGraph``'s edge. Edges with the attribute ``split``
    (train, valid, test, or what else files of those are called) are split so. Node attributes
    ``name`` become display names.
    """
    kind = type(graph).__name__
    if not graph.is_directed():
        raise DataError(
            f"networkx: expected a DiGraph or MultiDiGraph, received an undirected {kind}. Triples"
            " have a direction: graph.to_directed() has both for each edge."
        )
    if not graph.number_of_edges():
        raise DataError(f"networkx: the {kind} has no edges; expected one a triple.")
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
                f" {attribute!r}; it has {', '.join(map(repr, data[missing])) or 'none'}. Say with"
                " relation_attribute= which attribute holds the relation."
            )
        found = [item[attribute] for item in data]
        where = f"relations in the edge attribute {attribute!r}"
        # NaN is the one number that is not itself.
        empty = next((i for i, item in enumerate(found) if item is None or item != item), None)
        if empty is not None:
            raise DataError(
                f"networkx: the edge {heads[empty]!r} -> {tails[empty]!r} has no relation: its"
                f" attribute {attribute!r} is {found[empty]!r}. Give it one, or leave it out."
            )
    elif multiple and not all(isinstance(key, int) for key in keys):
        found, where = list(keys), "relations in the edge keys"
    else:
        raise DataError(
            f"networkx: the edges of this {kind} do not say their relation: expected one of the"
            f" attributes {', '.join(RELATION_NAMES[:5])}, or keys that are no numbers. Say with"
            " relation_attribute= which attribute holds it."
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
    """The split of each edge, all None where the edge attribute ``split`` does not tell splits."""
    given = [item.get("split") for item in data]
    splits = [split_of(value) if isinstance(value, str) else None for value in given]
    unknown = next((i for i, split in enumerate(splits) if split is None), None)
    if unknown is not None and any(splits):
        what = repr(given[unknown]) if "split" in data[unknown] else "missing"
        other = next(value for value, split in zip(given, splits, strict=True) if split)
        raise DataError(
            f"networkx: the edge attribute 'split' of {heads[unknown]!r} -> {tails[unknown]!r} is"
            f" {what}, and that of another edge {other!r}. Expected train, valid (val, dev) or test"
            " for every edge, or for none."
        )
    return splits


def to_networkx(kg: MultiViewKG) -> Any:
    """A networkx ``MultiDiGraph``: nodes are entity labels, edge keys relation labels.

    Edges carry ``relation`` and ``split``, nodes ``name`` where that differs from the label. A
    triple that stands more than once in one split gives one edge; views stay behind.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG.from_labels([("France", "borders", "Spain")])
    >>> list(ig.io.to_networkx(kg).edges(keys=True))
    [('France', 'Spain', 'borders')]
    """
    graph = nx.MultiDiGraph(name=kg.name, relations=list(kg.relations))
    for label, name in zip(kg.entities, kg.entity_names, strict=True):
        graph.add_node(label, **({"name": name} if name != label else {}))
    for split in SPLITS:
        frame = decode_triples(kg.triples(split), kg.entities, kg.relations)
        for head, relation, tail in frame.iter_rows():
            # The same triple in another split is another edge, so that no split loses any.
            key = (relation, split) if graph.has_edge(head, tail, key=relation) else relation
            if key != relation and graph.edges[head, tail, relation]["split"] == split:
                continue
            graph.add_edge(head, tail, key=key, relation=relation, split=split)
    return graph


# -- DGL ------------------------------------------------------------------------------------------


def is_dgl(value: Any) -> bool:
    """Whether a value is a DGL graph."""
    return isinstance(value, dgl.DGLGraph)


def from_dgl(
    graph: Any,
    *,
    relation_attribute: str | None = None,
    entities: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    relations: Sequence[str] | None = None,
) -> Source:
    """A DGL graph: homogeneous with a relation an edge, or heterogeneous.

    - one node type, one edge type: the relation of an edge is in its data (``relation_attribute``,
      or the first of `RELATION_NAMES`); masks as of DGL's data sets (`MASKS`) tell the splits;
    - heterogeneous: each canonical edge type is a relation, called as the edge type if that name is
      the only one of its kind, else ``source type/edge type/destination type``. Entities are called
      ``node type/id`` where there are several node types, unless labels are given, by node type;
    - ``(modality, 'of', 'entity')`` edges beside a node type ``entity`` are views, the rest the
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
        # "_E" is what DGL calls the edges of a graph whose edge types have no names.
        if attribute is None and facts[0][1] == "_E":
            raise DataError(
                "DGL: the edges of this homogeneous graph do not say their relation: expected edge"
                f" data called {', '.join(RELATION_NAMES[:6])}, found"
                f" {', '.join(map(repr, data)) or 'none'}. Say with relation_attribute= which."
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
                    f"DGL: expected one integer an edge in {attribute!r}, received"
                    f" {relation.dtype} of shape {tuple(relation.shape)}."
                )
        columns = [head + offsets[etype[0]], relation, tail + offsets[etype[2]]]
        rows.append(torch.stack([column.cpu().to(torch.int64) for column in columns], dim=1))
    triples = torch.cat(rows)
    parts, outside = _dgl_splits(graph, facts, triples)
    options = {}
    if outside:
        note = f"{outside} edges lie in no mask of {', '.join(parts)} and are left out."
        if "train_edge_mask" in graph.edges[facts[0]].data:
            note = (
                f"{outside} edges lie in none of train_edge_mask, …, the reverse edges that DGL's"
                " data sets add among them, and are left out."
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
    """Views and their edge types, in the form of `MultiViewKG.graph`."""
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
    graph: Any, ntypes: list[str], given: Sequence[str] | Mapping[str, Sequence[str]] | None
) -> tuple[dict[str, int], list[str]]:
    """Where the ids of each node type start, and the labels."""
    offsets: dict[str, int] = {}
    labels: list[str] = []
    for ntype in ntypes:
        offsets[ntype] = len(labels)
        count = graph.num_nodes(ntype)
        if isinstance(given, Mapping) and ntype in given:
            listed = list(given[ntype])
        elif given is not None and not isinstance(given, Mapping) and len(ntypes) == 1:
            listed = list(given)
        elif given is not None and not isinstance(given, Mapping):
            raise DataError(
                "DGL: expected labels by node type, entities={'type': [...]}; the graph has the"
                f" node types {', '.join(ntypes)}."
            )
        elif len(ntypes) == 1:
            listed = [str(i) for i in range(count)]
        else:
            listed = [f"{ntype}/{i}" for i in range(count)]
        if len(listed) != count:
            raise DataError(
                f"DGL: expected {count} labels of {ntype!r} nodes, received {len(listed)}."
            )
        labels += listed
    return offsets, labels


def _dgl_splits(
    graph: Any, facts: list[tuple[str, str, str]], triples: Tensor
) -> tuple[dict[Split, Tensor], int]:
    """Triples by split, where masks tell, and how many are in none; empty without train masks."""
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
    """A DGL graph of all triples.

    Parameters
    ----------
    kg : MultiViewKG
        The graph.
    form : {"heterogeneous", "homogeneous"}
        ``heterogeneous``: an edge type a relation, and views as in `MultiViewKG.graph`;
        ``homogeneous``: the relation's id in the edge data ``rel``, no views. Either has the edge
        data ``train_mask``, ``valid_mask``, ``test_mask``: unlike in `MultiViewKG.graph`,
        validation and test triples are edges here. Labels are not part of a DGL graph: node ids
        are the ids of ``kg.entities``.

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
