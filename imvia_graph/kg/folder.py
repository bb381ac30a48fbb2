"""Writing and reading the folder of a graph, whose layout `MultiViewKG.save` describes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from torch import Tensor

from imvia_graph import _files, _linked, _owner, _tables
from imvia_graph._display import bounded, shorten, shown
from imvia_graph._labels import (
    Vocabulary,
    decode_triples,
    encode_runs,
    encode_triples,
    index_triples,
)
from imvia_graph.errors import DataError
from imvia_graph.kg.parts import PARTS, SPLITS, Split, Views

if TYPE_CHECKING:
    from imvia_graph.kg.graph import MultiViewKG

logger = logging.getLogger(__name__)

#: Format and version of the folder in ``kg.json``.
FORMAT, FORMAT_VERSION = "imvia-graph/kg", 1
#: Key in ``kg.json`` while the folder is being written.
UNFINISHED = "unfinished"


def write(kg: MultiViewKG, folder: str | Path, may_link: bool) -> Path:
    """Write a graph; see `MultiViewKG.save`."""
    folder = Path(folder)
    tables = (
        ("entities.tsv", "entity", kg._entities, kg._entity_names),
        ("relations.tsv", "relation", kg._relations, kg._relation_names),
    )
    for file, _, *columns in tables:
        for labels in columns:
            if labels is not None:
                _files.check_tsv_labels(folder / file, labels)
    folder.mkdir(parents=True, exist_ok=True)
    # Large files are first written beside the old ones: until then the old graph stays whole.
    links, staged = {}, {}
    try:
        for modality, held in kg._held.items():
            path = folder / "views" / f"{modality}.safetensors"
            _files.check_target(path, follow=False)
            if not _linked.is_at(path, held.file):
                staged[path] = path.with_name(f"{path.name}.new")
                staged[path].unlink(missing_ok=True)
            linked = _linked.put(staged.get(path, path), held.feat, held.file, may_link)
            if linked is not None:
                links[modality] = linked
    except BaseException:
        for new in staged.values():
            new.unlink(missing_ok=True)
        raise
    left_over = _old_modalities(folder)
    # From here to the end, `load` refuses the folder.
    marked = {"format": FORMAT, "version": FORMAT_VERSION, UNFINISHED: True}
    _files.write_json(folder / "kg.json", {**_old_about(folder), **marked})
    for file, column, labels, names in tables:
        _files.write_label_table(folder / file, column, labels, names)
    for part in PARTS:
        path = folder / f"{part}.tsv"
        if part in SPLITS or len(kg.known):
            frame = decode_triples(getattr(kg, part), kg._entities, kg._relations)
            _tables.write_table(path, frame)
        else:
            path.unlink(missing_ok=True)  # from a graph that was saved here before
    for path, new in staged.items():
        new.replace(path)
    for modality, held in kg._held.items():
        path = folder / "views" / f"{modality}.safetensors"
        owners = kg._entities.gather(pl.Series(held.entity.numpy()))
        _files.write_view_table(path.with_suffix(".csv"), owners, held.source)
    for modality in left_over:
        if modality not in kg._held:
            for ending in (".safetensors", ".csv"):
                (folder / "views" / f"{modality}{ending}").unlink(missing_ok=True)
    about: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": kg.name,
        "notes": kg.notes,
        "modalities": kg.modalities,
    }
    roots = {name: _root_in(folder, held.root) for name, held in kg._held.items() if held.root}
    if roots:
        about["roots"] = roots
        if (signature := _owner.sign(roots)) is not None:
            about["roots_signature"] = signature
    if links:
        about["links"] = links
    _files.write_json(folder / "kg.json", about)
    return folder


def read(cls: type[MultiViewKG], folder: str | Path) -> MultiViewKG:
    """Read a graph; see `MultiViewKG.load`."""
    folder = Path(folder)
    about = _read_about(folder)
    frames = [_read_split(folder, part) for part in PARTS]
    entities = relations = pl.Series(dtype=pl.String)
    triples: list[Tensor] = []
    entity_names = relation_names = None
    listed_entities = _files.inside(folder, "entities.tsv")
    listed_relations = _files.inside(folder, "relations.tsv")
    if not (listed_entities.is_file() and listed_relations.is_file()):
        entities, relations, triples = index_triples(frames)
    if listed_entities.is_file():
        entities, entity_names = _files.read_label_table(listed_entities, "entity")
    if listed_relations.is_file():
        relations, relation_names = _files.read_label_table(listed_relations, "relation")
    if listed_entities.is_file() or listed_relations.is_file():
        ends, kinds = Vocabulary(entities), Vocabulary(relations)
        triples = [
            encode_triples(frame, ends, kinds, str(folder / f"{part}.tsv"))
            for frame, part in zip(frames, PARTS, strict=True)
        ]
        del ends, kinds
    del frames
    files = {path.stem: path for path in sorted((folder / "views").glob("*.safetensors"))}
    listed = [name for name in about.get("modalities", []) if name in files]
    names = listed + [name for name in files if name not in listed]
    roots = _followed_roots(folder, about)
    read = {name: _read_views(files[name], entities) for name in names}
    links = about.get("links", {})
    for name, (views, _) in read.items():
        if name in links:
            _linked.check(files[name], views.feat, links[name])
    graph = cls(
        entities,
        relations,
        triples[0],
        triples[1],
        triples[2],
        known=triples[3],
        views={name: views._replace(root=roots.get(name)) for name, (views, _) in read.items()},
        name=about.get("name") or folder.resolve().name,
        entity_names=entity_names,
        relation_names=relation_names,
        notes=about.get("notes", []),
    )
    for name, (views, mapped) in read.items():
        held = graph._held[name]
        if held.feat.data_ptr() == views.feat.data_ptr():  # not copied: still mapped from the file
            graph._held[name] = held._replace(file=mapped)
    return graph


def _root_in(folder: Path, root: Path) -> str:
    """Return the name of an image folder in ``kg.json``: relative if inside the KG folder."""
    try:
        return str(root.resolve().relative_to(folder.resolve()))
    except (ValueError, OSError, RuntimeError):
        return str(root)


def _followed_roots(folder: Path, about: Mapping[str, Any]) -> dict[str, Path]:
    """Return the image folders named in ``kg.json``, except unsigned ones outside the KG folder."""
    named: dict[str, str] = about.get("roots", {})
    own = bool(named) and _owner.is_own(named, about.get("roots_signature"))
    followed = {}
    for modality, root in named.items():
        path = folder / root  # absolute, or relative to the KG folder
        try:
            within = path.resolve().is_relative_to(folder.resolve())
        except (ValueError, OSError, RuntimeError):  # a NUL byte, or a loop of symbolic links
            continue
        if own or within:
            followed[modality] = path
        else:
            logger.warning(
                "%s: the folder of the views %r, %s, lies outside of the KG folder and was not"
                " written there by you on this machine; its files are not read. To use a folder of"
                " images, pass --images FOLDER to `report` or `explore`.",
                shown(str(folder / "kg.json")),
                modality,
                shown(shorten(root)),
            )
    return followed


def _read_about(folder: Path) -> dict[str, Any]:
    path = _files.inside(folder, "kg.json")
    if not path.is_file():
        return {}
    about = _files.read_json(path)
    if not isinstance(about, dict) or about.get("format", FORMAT) != FORMAT:
        raise DataError(f"{path}: expected the description of a KG folder ({FORMAT!r}).")
    if about.get(UNFINISHED):
        raise DataError(
            f"{path}: the graph was not written to its end: writing was interrupted, or the disk"
            " was full. Write it again; if that is impossible, remove 'unfinished' from this file,"
            " but the triples, labels and views in the folder may then belong to two graphs."
        )
    for key in ("modalities", "notes"):
        listed = about.get(key, [])
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise DataError(
                f"{path}: expected a list of strings for {key!r}, found {bounded(listed)}."
            )
    roots = about.get("roots", {})
    if not isinstance(roots, dict) or not all(isinstance(root, str) for root in roots.values()):
        raise DataError(
            f"{path}: expected one folder per modality for 'roots', found {bounded(roots)}."
        )
    links = about.get("links", {})
    if not isinstance(links, dict) or not all(map(_linked.is_record, links.values())):
        raise DataError(
            f"{path}: expected size, time and checksum for each modality in 'links', found"
            f" {bounded(links)}."
        )
    if not isinstance(about.get("name") or "", str):
        raise DataError(f"{path}: expected a string for 'name', found {bounded(about['name'])}.")
    _files.checked_version(path, about.get("version", FORMAT_VERSION), FORMAT_VERSION)
    return about


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds a graph that `MultiViewKG.save` has written to its end."""
    path = folder / "kg.json"
    if not path.is_file():
        return False
    about = _files.read_json(path)
    return not (isinstance(about, dict) and about.get(UNFINISHED))


def _old_about(folder: Path) -> dict[str, Any]:
    """Return the kg.json of a folder that is overwritten, or {} if it cannot be read."""
    try:
        about = _files.read_json(folder / "kg.json")
    except (OSError, DataError):
        return {}
    return about if isinstance(about, dict) else {}


def _old_modalities(folder: Path) -> list[str]:
    """Return the modalities of the graph saved here before, whose files `load` would pick up."""
    if not (folder / "kg.json").is_file():
        return []
    there = [path.stem for path in (folder / "views").glob("*.safetensors")]
    if not is_whole(folder):
        return there  # from that graph or an earlier one
    names = _read_about(folder).get("modalities") or []
    return [name for name in names if name in there]


def _read_split(folder: Path, split: Split) -> pl.DataFrame:
    path = _files.inside(folder, f"{split}.tsv")
    if path.is_file():
        return _tables.read_triples(path)
    if split == "train":
        raise DataError(
            f"{path}: a KG folder needs this file, with one triple per line: head, relation, tail,"
            " separated by tabs."
        )
    return pl.DataFrame(schema=dict.fromkeys(_files.TRIPLE_COLUMNS, pl.String))


def _read_views(path: Path, entities: pl.Series) -> tuple[Views, _linked.Mapped | None]:
    folder = path.parent.parent
    path = _files.inside(folder, f"views/{path.name}")
    table = _files.inside(folder, f"views/{path.stem}.csv")
    if not table.is_file():
        raise DataError(
            f"{table}: missing; it names the entity (and source) of each row of {path.name}."
        )
    feat, mapped = _linked.map_features(path)
    labels, source = _files.read_view_table(table)
    if len(labels) != len(feat):
        raise DataError(
            f"{path} holds {len(feat)} rows of features, but {table.name} names {len(labels)}"
            " views; expected one row each. Write both files again from the same source."
        )
    entity = encode_runs(labels, entities, str(table))
    return Views(feat, entity, source), mapped
