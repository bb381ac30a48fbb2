"""MultiViewKG: a multi-modal knowledge graph with any number of views per entity, over DGL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from imvia_graph import _files, _linked
from imvia_graph._display import nearest
from imvia_graph._labels import are_distinct, encode_labels, index_triples
from imvia_graph.answers import AnswerIndex, pointer
from imvia_graph.errors import DataError, UnknownLabelError
from imvia_graph.kg.folder import read, write
from imvia_graph.kg.parts import SPLITS, Held, Split, Views

#: Names that a modality cannot have: node types of the graph and heads of the model.
RESERVED_MODALITIES = ("entity", "structure", "joint", "complex", "decision")


class MultiViewKG:
    """A multi-modal knowledge graph: vocabularies, split triples, and a DGL heterograph.

    The heterograph `graph` has the node type ``entity`` and, for the *training* triples, the edge
    type ``('entity', 'fact', 'entity')`` with the edge data ``rel`` (int64). Each modality adds a
    node type of the same name with one node per view, the node data ``feat`` (V, d_m) and the edge
    type ``(modality, 'of', 'entity')``. Views are sorted by entity, so the in-degrees give the CSR
    pointer of `views`. Validation and test triples never become edges.

    Parameters
    ----------
    entities, relations : sequence of str
        Distinct, non-empty labels in id order.
    train : Tensor
        (n, 3) int64 rows of (head, relation, tail). Repeated rows are kept.
    valid, test : Tensor, optional
        Triples as in ``train``; may be empty. Default: ``None``, no triples.
    known : Tensor, optional
        (n, 3) triples that are known to be true but are in no split: they are neither trained on
        nor ranked, but they are filtered from the candidates in ranks and are never predicted.
        Default: ``None``, no triples.
    views : mapping of str to Views, optional
        Views by modality. The name of a modality must be a valid file name and none of ``entity``,
        ``structure``, ``joint``, ``complex``, ``decision``. Default: no views.
    name : str, optional
        Name of the graph. Default: ``""``.
    entity_names, relation_names : sequence of str, optional
        Display names in id order; an empty name is replaced by the label. Default: the labels.
    notes : sequence of str, optional
        Notes for readers on how the splits were made. Default: none.

    Attributes
    ----------
    entities, relations : list of str
        Labels in id order.
    num_entities, num_relations : int
        Numbers of entities and relations. Inverse relations, which the model adds, do not count.
    train, valid, test, known : Tensor
        (n, 3) int64 triples.
    validation : {"published", "held-out"} or None
        How `load_kg` set the validation set, which `fit` then keeps; None if it did not set it.
    modalities : list of str
        Names of the modalities, in the order of ``views``.
    graph : dgl.DGLGraph
        The heterograph described above, built on first access.

    Raises
    ------
    DataError
        If labels repeat or are empty, ids are out of range, shapes or dtypes are wrong, or features
        are not finite.

    Examples
    --------
    >>> import torch
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG(
    ...     entities=["France", "Germany", "Paris"],
    ...     relations=["borders", "capital"],
    ...     train=torch.tensor([[0, 0, 1], [0, 1, 2]]),
    ...     views={"image": ig.Views(torch.rand(3, 8), entity=torch.tensor([2, 0, 2]))},
    ... )
    >>> kg.graph.num_nodes("image"), kg.graph.in_degrees(etype="of").tolist()
    (3, [1, 0, 2])
    >>> feat, ptr = kg.views("image")
    >>> feat.shape, ptr.tolist()
    (torch.Size([3, 8]), [0, 1, 1, 3])
    """

    def __init__(
        self,
        entities: Sequence[str] | pl.Series,
        relations: Sequence[str] | pl.Series,
        train: Tensor,
        valid: Tensor | None = None,
        test: Tensor | None = None,
        views: Mapping[str, Views] | None = None,
        *,
        known: Tensor | None = None,
        name: str = "",
        entity_names: Sequence[str] | pl.Series | None = None,
        relation_names: Sequence[str] | pl.Series | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.notes = list(notes)
        self.validation: Literal["published", "held-out"] | None = None
        # Columns; the lists of Python strings, possibly millions, are built on first access.
        self._entities = _checked_labels(entities, "entities")
        self._relations = _checked_labels(relations, "relations")
        self._entity_names = _checked_names(entity_names, self._entities, "entity_names")
        self._relation_names = _checked_names(relation_names, self._relations, "relation_names")
        self.train = self._checked_triples(train, "train")
        self.valid = self._checked_triples(valid, "valid")
        self.test = self._checked_triples(test, "test")
        self.known = self._checked_triples(known, "known")
        if not len(self.train):
            raise DataError(f"{self.title}: there are no training triples; at least one is needed.")
        if not isinstance(views or {}, Mapping):
            raise DataError(
                f"views: expected Views by modality, {{modality: Views(…)}}; received"
                f" {type(views).__name__}."
            )
        self._held = {
            modality: self._checked_views(modality, value)
            for modality, value in (views or {}).items()
        }

    # -- construction ---------------------------------------------------------------------------

    @classmethod
    def from_labels(
        cls,
        train: Iterable[Sequence[str]],
        valid: Iterable[Sequence[str]] = (),
        test: Iterable[Sequence[str]] = (),
        views: Mapping[str, Views | tuple[Tensor, Sequence[str]]] | None = None,
        **options: Any,
    ) -> MultiViewKG:
        """Build a graph from triples of labels; ids follow the order of first appearance.

        Parameters
        ----------
        train, valid, test : iterable of (head, relation, tail)
            Labels. Default of ``valid`` and ``test``: none.
        views : mapping, optional
            ``(feat, entity)`` or `Views` by modality, where ``entity`` holds the label or id of the
            entity of each row of ``feat``. Default: no views.
        **options
            Further arguments of `MultiViewKG`.

        Raises
        ------
        DataError
            If a triple is not three non-empty labels or a view belongs to an entity that is in no
            triple; see also `MultiViewKG`.

        Examples
        --------
        >>> import torch
        >>> import imvia_graph as ig
        >>> kg = ig.MultiViewKG.from_labels(
        ...     train=[("France", "borders", "Germany")],
        ...     test=[("Germany", "borders", "Poland")],
        ...     views={"text": (torch.rand(2, 4), ["Poland", "France"])},
        ... )
        >>> kg.entities, kg.views("text")[1].tolist()
        (['France', 'Germany', 'Poland'], [0, 1, 1, 2])
        """
        frames = [
            _label_frame(part, split)
            for part, split in zip((train, valid, test), SPLITS, strict=True)
        ]
        entities, relations, triples = index_triples(frames)
        by_id: dict[str, Views] = {}
        for modality, value in (views or {}).items():
            where = f"views[{modality!r}]"
            pair = isinstance(value, (tuple, list)) and len(value) == 2
            if not (pair or isinstance(value, Views)):
                raise DataError(
                    f"{where}: expected Views, or a pair of features (views, width) and the entity"
                    f" label of each row; received {type(value).__name__}."
                )
            feat, ids = value[0], value[1]
            if not isinstance(ids, Tensor):
                column = pl.Series("label", ids)
                is_text = column.dtype == pl.String
                ids = encode_labels(column, entities, where) if is_text else torch.as_tensor(ids)
            by_id[modality] = (
                value._replace(entity=ids) if isinstance(value, Views) else Views(feat, ids)
            )
        return cls(entities, relations, triples[0], triples[1], triples[2], views=by_id, **options)

    def _checked_triples(self, triples: Tensor | None, split: Split) -> Tensor:
        if triples is None:
            return torch.empty(0, 3, dtype=torch.int64)
        triples = _as_tensor(triples, split)
        if triples.numel() == 0:
            return torch.empty(0, 3, dtype=torch.int64)
        if triples.dim() != 2 or triples.shape[1] != 3:
            raise DataError(
                f"{split}: expected triples of shape (n, 3), received {tuple(triples.shape)}."
            )
        if triples.is_floating_point() or triples.is_complex() or triples.dtype == torch.bool:
            raise DataError(f"{split}: expected integer ids, received {triples.dtype}.")
        triples = triples.to(torch.int64).cpu().contiguous()
        limits = (
            ("head", self.num_entities),
            ("relation", self.num_relations),
            ("tail", self.num_entities),
        )
        for column, (what, limit) in enumerate(limits):
            _check_ids(split, what, triples[:, column], limit)
        return triples

    def _checked_views(self, modality: str, views: Views) -> Held:
        if not isinstance(modality, str) or not re.fullmatch(
            r"[^\x00-\x1f\x7f/\\.][^\x00-\x1f\x7f/\\]*", modality
        ):
            raise DataError(
                f"views: the modality {modality!r} cannot be the name of a file: expected a"
                " non-empty name without slashes, control characters or a leading dot."
            )
        if modality in RESERVED_MODALITIES:
            raise DataError(
                f"views: a modality cannot be called {modality!r}; the names"
                f" {', '.join(RESERVED_MODALITIES)} are reserved. Rename it."
            )
        where = f"views[{modality!r}]"
        if not isinstance(views, Views):
            raise DataError(
                f"{where}: expected Views(feat, entity, source), received"
                f" {type(views).__name__}. MultiViewKG.from_labels takes pairs of features and"
                " labels."
            )
        feat, entity = _as_tensor(views.feat, where), _as_tensor(views.entity, where)
        if feat.dim() != 2 or feat.shape[1] == 0:
            raise DataError(
                f"{where}: expected features of shape (views, width), received {tuple(feat.shape)}."
            )
        if feat.layout != torch.strided:
            raise DataError(f"{where}: expected dense features, received {feat.layout}.")
        if not feat.is_floating_point():
            raise DataError(f"{where}: expected floating-point features, received {feat.dtype}.")
        if (entity.is_floating_point() or entity.dtype == torch.bool) and entity.numel():
            raise DataError(f"{where}: expected integer entity ids, received {entity.dtype}.")
        if entity.shape != feat.shape[:1]:
            raise DataError(
                f"{where}: expected one entity per view, received {len(feat)} rows of features and"
                f" {tuple(entity.shape)} entities."
            )
        entity = entity.to(torch.int64).cpu()
        _check_ids(where, "entity", entity, self.num_entities)
        feat = feat.detach().cpu()
        self._check_finite(where, feat, entity)
        source = None if views.source is None else _texts(views.source)
        if source is not None and len(source) != len(feat):
            raise DataError(
                f"{where}: expected one source per view, received {len(source)} for {len(feat)}."
            )
        if not (entity[1:] >= entity[:-1]).all():
            order = torch.argsort(entity, stable=True)
            feat, entity = feat[order], entity[order]
            source = None if source is None else source.gather(pl.Series(order.numpy()))
        ptr = pointer(torch.bincount(entity, minlength=self.num_entities))
        root = None if views.root is None else Path(views.root).absolute()
        return Held(feat, ptr, None if source is None else _files.known_texts(source), root)

    def _check_finite(self, where: str, feat: Tensor, entity: Tensor) -> None:
        # In portions: features may be mapped from a file and be larger than memory.
        if all(part.abs().amax().isfinite() for part in _files.portions(feat) if len(part)):
            return
        finite = torch.cat([part.isfinite().all(dim=1) for part in _files.portions(feat)])
        row = int((~finite).nonzero()[0])
        raise DataError(
            f"{where}, row {row}: a view of {self._entities[int(entity[row])]!r} has NaN or"
            f" infinite features ({int((~finite).sum())} such rows). Leave these views out."
        )

    # -- what the graph holds -------------------------------------------------------------------

    @property
    def label_columns(self) -> tuple[pl.Series, pl.Series]:
        """Labels of entities and of relations in id order, as columns, not lists of strings."""
        return self._entities, self._relations

    @cached_property
    def entities(self) -> list[str]:
        """Labels of the entities in id order."""
        return self._entities.to_list()

    @cached_property
    def relations(self) -> list[str]:
        """Labels of the relations in id order."""
        return self._relations.to_list()

    @cached_property
    def entity_names(self) -> list[str]:
        """Display names of the entities in id order; the label of an entity without a name."""
        return self.entities if self._entity_names is None else self._entity_names.to_list()

    @cached_property
    def relation_names(self) -> list[str]:
        """Display names of the relations in id order; the label of a relation without a name."""
        return self.relations if self._relation_names is None else self._relation_names.to_list()

    @cached_property
    def graph(self) -> Any:
        """The heterograph described in `MultiViewKG`."""
        head, relation, tail = self.train.unbind(dim=1)
        edges = {("entity", "fact", "entity"): (head, tail)}
        num_nodes = {"entity": self.num_entities}
        for modality, held in self._held.items():
            edges[modality, "of", "entity"] = (torch.arange(len(held.feat)), held.entity)
            num_nodes[modality] = len(held.feat)
        graph = _heterograph(edges, num_nodes)
        graph.edges["fact"].data["rel"] = relation
        for modality, held in self._held.items():
            graph.nodes[modality].data["feat"] = held.feat
        return graph

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities, in the order of ``views``."""
        return list(self._held)

    @property
    def num_entities(self) -> int:
        """Number of entities."""
        return len(self._entities)

    @property
    def num_relations(self) -> int:
        """Number of relations, inverses not counted."""
        return len(self._relations)

    def triples(self, split: Split) -> Tensor:
        """Return the (n, 3) int64 triples of ``"train"``, ``"valid"`` or ``"test"``.

        Raises
        ------
        UnknownLabelError
            If there is no such split.
        """
        if split not in SPLITS:
            raise UnknownLabelError(f"There is no split {split!r}; expected train, valid or test.")
        part: Tensor = getattr(self, split)
        return part

    def views(self, modality: str) -> tuple[Tensor, Tensor]:
        """Return the view features of a modality and their CSR pointer.

        Returns
        -------
        feat : Tensor
            (V, d_m) features, sorted by entity.
        ptr : Tensor
            (num_entities + 1,) int64: the views of entity i are ``feat[ptr[i]:ptr[i + 1]]``.

        Raises
        ------
        UnknownLabelError
            If there is no such modality.
        """
        self._check_modality(modality)
        return self._held[modality].feat, self._held[modality].ptr

    def view_sources(self, modality: str) -> list[str]:
        """Return the source of each view of a modality, in the order of `views`; "" if unknown."""
        self._check_modality(modality)
        feat, _, source, *_ = self._held[modality]
        return [""] * len(feat) if source is None else source.to_list()

    def view_source(self, modality: str, view: int) -> str:
        """Return the source of one view of a modality, by its row in `views`; "" if unknown."""
        self._check_modality(modality)
        source = self._held[modality].source
        return "" if source is None else source[view]

    def view_root(self, modality: str) -> Path | None:
        """Return the folder that relative sources of a modality start from, or None."""
        self._check_modality(modality)
        return self._held[modality].root

    def written_into(self, modality: str) -> Path | None:
        """Return the file that a modality is mapped from if it was written into since, or None.

        The features in memory have then changed. They do not change if the file is replaced, which
        is how this library writes files.
        """
        self._check_modality(modality)
        file = self._held[modality].file
        return file.path if file is not None and _linked.is_written_into(file) else None

    def _check_modality(self, modality: str) -> None:
        if modality not in self._held:
            raise UnknownLabelError(
                f"{self.title} has no modality {modality!r}; it has"
                f" {', '.join(map(repr, self.modalities)) or 'none'}."
            )

    def id_of(self, label: str, kind: str = "entity") -> int:
        """Return the id of an entity (or, with ``kind="relation"``, of a relation).

        Labels are looked up first, then display names that only one entity (or relation) has.

        Raises
        ------
        UnknownLabelError
            If neither a label nor a name matches; the message lists the nearest ones. Also if
            several entities have the name.
        """
        if kind not in self._lookup:
            raise UnknownLabelError(f"There is no kind {kind!r}; expected entity or relation.")
        if not isinstance(label, str):
            raise UnknownLabelError(
                f"Expected the label of one {kind}, a string; received {label!r}. For a table of"
                " many queries, use `imvia_graph.export.predict_all`; for ids, `Predictor.answers`."
            )
        labels, names = self._lookup[kind]
        if label in labels:
            return labels[label]
        found = names.get(label, [])
        if len(found) == 1:
            return found[0]
        of_kind = self.entities if kind == "entity" else self.relations
        if found:
            raise UnknownLabelError(
                f"{len(found)} {'entities' if kind == 'entity' else 'relations'} are called"
                f" {label!r}; give the label of one:"
                f" {', '.join(repr(of_kind[i]) for i in found[:5])}."
            )
        shown = nearest(label, [*labels, *names])
        near = f"The nearest known: {', '.join(map(repr, shown))}" if shown else "None is like it"
        raise UnknownLabelError(f"Unknown {kind} {label!r} in {self.title}. {near}.")

    def ids_of(self, triples: Iterable[Sequence[str]]) -> Tensor:
        """Return triples of labels or display names as (n, 3) int64 ids; see `id_of`.

        Raises
        ------
        DataError
            If a row is not (head, relation, tail).
        UnknownLabelError
            As in `id_of`.

        Examples
        --------
        >>> import imvia_graph as ig
        >>> kg = ig.MultiViewKG.from_labels([("France", "borders", "Spain")])
        >>> kg.ids_of([("Spain", "borders", "France")]).tolist()
        [[1, 0, 0]]
        """
        ids = []
        for row, triple in enumerate(triples):
            if isinstance(triple, str) or len(triple) != 3:
                raise DataError(
                    f"Expected (head, relation, tail) in row {row}, received {triple!r}."
                )
            head, relation, tail = triple
            ids.append((self.id_of(head), self.id_of(relation, "relation"), self.id_of(tail)))
        return torch.tensor(ids, dtype=torch.int64).reshape(-1, 3)

    @cached_property
    def _lookup(self) -> dict[str, tuple[dict[str, int], dict[str, list[int]]]]:
        tables = {}
        for kind, labels, names in (
            ("entity", self.entities, self._entity_names),
            ("relation", self.relations, self._relation_names),
        ):
            by_name: dict[str, list[int]] = {}
            for i, name in enumerate([] if names is None else names.to_list()):
                by_name.setdefault(name, []).append(i)
            tables[kind] = ({label: i for i, label in enumerate(labels)}, by_name)
        return tables

    def answers(self, splits: Sequence[Split] | None = None) -> AnswerIndex:
        """Return the known answers in both directions, of some splits or of all known triples."""
        if splits is None:
            parts = [self.train, self.valid, self.test, self.known]
        else:
            parts = [self.triples(split) for split in splits]
        return AnswerIndex.from_triples(parts, self.num_entities, self.num_relations)

    def unseen_entities(self) -> Tensor:
        """Return the (K,) int64 ids of the entities that are in no training triple."""
        seen = torch.zeros(self.num_entities, dtype=torch.bool)
        seen[self.train[:, 0]] = True
        seen[self.train[:, 2]] = True
        return (~seen).nonzero().flatten()

    def per_relation(self) -> Any:
        """Return the graph with one canonical edge type per relation, for ``HeteroGraphConv``.

        Edge types are ``('entity', relation label, 'entity')``; a relation without training
        triples has no edges. View nodes, their ``of`` edges and features are as in `graph`.

        Raises
        ------
        DataError
            If a relation is called ``of`` and there are views, since DGL could not distinguish the
            two edge types.
        """
        if self.modalities and "of" in self.relations:
            raise DataError(
                f"{self.title}: per_relation() needs the edge type 'of' for views, but a relation"
                " has that label. Rename the relation."
            )
        edges = {}
        order = torch.argsort(self.train[:, 1], stable=True)
        counts = torch.bincount(self.train[:, 1], minlength=self.num_relations)
        parts = self.train[order].split(counts.tolist())
        for label, part in zip(self.relations, parts, strict=True):
            edges["entity", label, "entity"] = (part[:, 0], part[:, 2])
        for modality in self.modalities:
            edges[modality, "of", "entity"] = self.graph.edges(etype=(modality, "of", "entity"))
        num_nodes = {ntype: self.graph.num_nodes(ntype) for ntype in self.graph.ntypes}
        graph = _heterograph(edges, num_nodes)
        for modality in self.modalities:
            graph.nodes[modality].data["feat"] = self._held[modality].feat
        return graph

    # -- in and out -----------------------------------------------------------------------------

    def save(self, folder: str | Path, *, may_link: bool = False) -> Path:
        """Write the graph as a KG folder, which `load` and ``load_kg`` read.

        Features that are mapped from a file are written without being read into memory: they are
        cloned where the file system supports it, else copied in portions.

        The layout, format version 1:

        - ``kg.json``: format, version, name, notes, modalities, and the folders that relative
          sources of views start from. These are signed: `load` uses a folder outside the KG folder
          only if the same user wrote its name here;
        - ``entities.tsv``, ``relations.tsv``: labels in id order under the header ``entity`` (or
          ``relation``) and ``name``;
        - ``train.tsv``, ``valid.tsv``, ``test.tsv``: ``head<TAB>relation<TAB>tail`` labels, no
          header, no quoting, UTF-8;
        - ``known.tsv``, in the same form, if there are known triples that are in no split;
        - ``views/<modality>.safetensors``: the tensor ``feat`` (V, d_m);
        - ``views/<modality>.csv``: header ``entity,source``; row i describes row i of ``feat``.

        Parameters
        ----------
        folder : path
            Target folder; created if it does not exist.
        may_link : bool, optional
            Whether large unchanged features that are mapped from a file may be hard-linked to that
            file. Replacing the file leaves the link unchanged; writing into it changes both.
            ``kg.json`` therefore records what was linked, and `load` refuses a link whose content
            has changed. Default: ``False``.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        DataError
            If a label contains a tab or a line break, which TSV cannot represent. Nothing is
            written then.
        """
        return write(self, folder, may_link)

    @classmethod
    def load(cls, folder: str | Path) -> MultiViewKG:
        """Read a KG folder in the layout that `save` describes.

        Only ``train.tsv`` is required. Without ``entities.tsv`` or ``relations.tsv``, these ids
        follow the order of first appearance in train, valid, test, known.

        Raises
        ------
        DataError
            If a file is missing or malformed, or labels or rows do not match; the message says
            where.
        """
        return read(cls, folder)

    def replace(self, **changes: Any) -> MultiViewKG:
        """Return the graph with some constructor arguments changed; all others are kept."""
        arguments: dict[str, Any] = {
            "entities": self._entities,
            "relations": self._relations,
            "train": self.train,
            "valid": self.valid,
            "test": self.test,
            "known": self.known,
            "name": self.name,
            "entity_names": self._entity_names,
            "relation_names": self._relation_names,
            "notes": self.notes,
        }
        # Kept views need no new check as long as the entities are kept, too.
        kept = "views" not in changes and "entities" not in changes
        if not kept:
            arguments["views"] = {modality: self._views(modality) for modality in self._held}
        other = MultiViewKG(**{**arguments, **changes})
        if kept:
            other._held = dict(self._held)
        other.validation = self.validation
        return other

    def _views(self, modality: str) -> Views:
        held = self._held[modality]
        return Views(held.feat, held.entity, held.source, held.root)

    def __repr__(self) -> str:
        title = f"MultiViewKG {self.name!r}" if self.name else "MultiViewKG"
        sizes = [f"{self.num_entities} entities", f"{self.num_relations} relations"]
        for split in SPLITS:
            if hasattr(self, split):
                sizes.append(f"{len(getattr(self, split))} {split}")
        for modality, held in getattr(self, "_held", {}).items():
            sizes.append(f"{len(held.feat)} {modality} views")
        return f"<{title}: {', '.join(sizes)}>"

    @property
    def title(self) -> str:
        """How a message calls the graph: ``the graph 'countries'``, or ``the graph``."""
        return f"the graph {self.name!r}" if self.name else "the graph"


# -- labels and ids -------------------------------------------------------------------------------


def _heterograph(edges: Mapping[tuple[str, str, str], Any], num_nodes: Mapping[str, int]) -> Any:
    from imvia_graph._dgl import dgl  # here, because DGL takes seconds to import

    return dgl.heterograph(edges, num_nodes_dict=num_nodes)


def _as_tensor(numbers: Any, where: str) -> Tensor:
    """Convert a tensor, an array or nested lists of numbers to a tensor."""
    try:
        return torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{where}: expected a tensor of numbers; received {type(numbers).__name__}, which does"
            f" not convert to one ({error}). MultiViewKG.from_labels takes labels."
        ) from None


def _label_frame(triples: Iterable[Sequence[str]], split: Split) -> pl.DataFrame:
    rows = [tuple(row) for row in triples]
    for number, row in enumerate(rows):
        if len(row) != 3 or not all(isinstance(label, str) and label for label in row):
            raise DataError(
                f"{split}, triple {number}: expected three non-empty labels (head, relation,"
                f" tail), received {row!r}."
            )
    schema = dict.fromkeys(_files.TRIPLE_COLUMNS, pl.String)
    return pl.DataFrame(rows, schema=schema, orient="row")


def _check_ids(where: str, what: str, ids: Tensor, limit: int) -> None:
    bad = (ids < 0) | (ids >= limit)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(
            f"{where}, row {row}: the {what} id {int(ids[row])} is out of range; expected 0 to"
            f" {limit - 1} ({int(bad.sum())} such rows)."
        )


def _checked_labels(labels: Sequence[str] | pl.Series, what: str) -> pl.Series:
    listed = labels if isinstance(labels, pl.Series) else list(labels)
    try:
        column = pl.Series(what, listed, dtype=pl.String)
        wrong = (column.is_null() | (column == "")).arg_true()
        bad = int(wrong[0]) if len(wrong) else None
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what}: the label {error.object!r} holds half of a surrogate pair, which UTF-8 cannot"
            " encode. Rename it."
        ) from None
    except (TypeError, pl.exceptions.PolarsError):
        bad = next(i for i, label in enumerate(listed) if not isinstance(label, str) or not label)
    if bad is not None:
        raise DataError(
            f"{what}, number {bad}: expected a non-empty label, received {listed[bad]!r}."
        )
    if not are_distinct(column):
        twice = listed[int((~column.is_first_distinct()).arg_true()[0])]
        raise DataError(
            f"{what}: the label {twice!r} occurs more than once; labels must be distinct."
        )
    return column


def _checked_names(
    names: Sequence[str] | pl.Series | None, labels: pl.Series, what: str
) -> pl.Series | None:
    if names is None:
        return None
    if len(names) != len(labels):
        raise DataError(f"{what}: expected {len(labels)} names, received {len(names)}.")
    column = _texts(names)
    return pl.select(pl.when(column == "").then(labels).otherwise(column)).to_series()


def _texts(items: Sequence[Any] | pl.Series) -> pl.Series:
    """Convert items to a column of strings; nulls of a column become ""."""
    if isinstance(items, pl.Series) and items.dtype == pl.String:
        return items.fill_null("")
    return pl.Series([str(item) for item in items], dtype=pl.String)
