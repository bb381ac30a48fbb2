"""`load_kg`: load a knowledge graph from any supported source."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from imvia_graph import datasets
from imvia_graph._files import inside, read_lines
from imvia_graph._forms import FOLDERS, FORMATS
from imvia_graph._tables import Columns, columns_by_name, frame_of_triples
from imvia_graph.errors import DataError
from imvia_graph.io import arrays, graphs, rdf, releases, tables
from imvia_graph.io.openke import read_openke
from imvia_graph.io.source import Source, from_frames
from imvia_graph.kg import SPLITS, MultiViewKG, Split
from imvia_graph.splits import (
    HELD_OUT_FRACTION,
    By,
    checked_shares,
    count_shared,
    drawn_by,
    hold_out,
    split_triples,
)

logger = logging.getLogger(__name__)

Validation = Literal["auto", "published", "held-out"]
#: The options of `load_kg` that apply to each kind of source.
_OPTIONS = {
    "tables": ("columns", "header", "separator", "entities", "relations"),
    "rdf": ("literals", "base", "entities", "relations"),
    "arrays": ("entities", "relations"),
    "graphs": ("relation_attribute", "entities", "relations"),
    "folders": (),
}


def load_kg(
    source: Any,
    validation: Validation | None = "auto",
    seed: int = 0,
    *,
    hold_out_by: By | Literal["auto"] = "auto",
    format: str | None = None,
    split: Sequence[float] | str | bool | None = True,
    columns: Columns | None = None,
    header: bool | None = None,
    separator: str | None = None,
    relation_attribute: str | None = None,
    literals: rdf.Literals | None = None,
    base: tuple[str, str] | None = None,
    entities: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    relations: Sequence[str] | None = None,
) -> MultiViewKG:
    r"""Load a knowledge graph from files, an in-memory object or the name of a data set.

    The form of the source is detected. The log names it, and so does `MultiViewKG.notes`, except
    for KG folders and OpenKE folders, whose notes are unchanged.

    Parameters
    ----------
    source
        - the name of a built-in or published data set (``imvia-graph datasets`` lists them);
        - a folder: a KG folder (`MultiViewKG.save`), the OpenKE layout (``train2id.txt``), the
          layouts of the MoMoK and MyGO releases, or files ``train``, ``valid``, ``test`` of one of
          the forms below;
        - a file of triples: TSV, CSV, text with spaces between the columns (``.txt``), Parquet,
          N-Triples, Turtle, npz or npy; text also as ``.gz`` or ``.zst``;
        - a networkx ``DiGraph`` or ``MultiDiGraph``, a DGL graph, a polars or pandas frame, an
          (n, 3) numpy or torch array of ids or labels, a PyKEEN factory or data set;
        - a dict of such files, frames, arrays or factories by split (``train``, ``valid``,
          ``test``);
        - a `MultiViewKG`, to which ``validation`` applies and, if it has no splits, ``split``.
    validation : {"auto", "published", "held-out"} or None
        ``published`` uses the source's validation set as it is. ``held-out`` holds out 5 % of the
        training triples instead (see `imvia_graph.splits.hold_out`) and sets the source's
        validation set aside in `MultiViewKG.known`. ``auto`` means ``held-out`` if the source's
        validation set shares triples with its train or test set, else ``published``.
        `MultiViewKG.notes` records what was done. `fit` keeps a choice made here; with None, the
        choice is left to the setting ``validation`` of `fit`. Default: ``auto``.
    hold_out_by : {"auto", "pair", "triple"}
        Unit of holding out: ``pair`` keeps triples between the same two entities together, so that
        no held-out triple has its inverse in train; ``triple`` draws single triples; ``auto``
        draws as the source's test set was drawn (see `imvia_graph.splits.drawn_by`), or by pair if
        there is no test set. Default: ``auto``.
    seed : int
        Seed of the held-out set, and of the split of a source without splits. Default: 0.
    format : str, optional
        Form of a file or folder whose name does not show it: ``kg``, ``openke``, ``momok``,
        ``mygo``, ``tsv``, ``csv``, ``text``, ``parquet``, ``ntriples``, ``turtle``, ``npz``.
        Default: detected.
    split : sequence of float, str, bool or None
        Shares of train, validation and test for a source without splits (True, the default: 0.8,
        0.1, 0.1), by the rules of `imvia_graph.splits.split_triples`: every entity and relation
        stays in train, and triples between the same two entities stay together. False and None
        leave all triples in train. A folder with a ``train`` file only is split if shares are
        passed; otherwise its triples stay in train. Shares are an error for a source that has
        splits. Strings have the form of the command line: ``"0.8,0.1,0.1"`` or ``"none"``.
    columns : sequence of int or of str, optional
        Tables: positions (from 0) or names of the head, relation and tail columns. Default: the
        columns that the header names, or the only three columns.
    header : bool, optional
        Tables: whether the first line is a header. Default: it is one if its cells are
        ``head, relation, tail``, ``subject, predicate, object`` or similar names.
    separator : str, optional
        Tables: the character between columns; a space stands for any run of spaces and tabs.
        Default: that of the format.
    relation_attribute : str, optional
        Graphs: the edge attribute (networkx) or edge data (DGL) that holds the relation.
    literals : {"leave-out", "numbers"}, optional
        RDF: what to do with literals. ``numbers`` turns numeric literals into the modality
        ``number`` (see `imvia_graph.io.rdf`). `imvia_graph.io.read_literals` reads texts.
    base : tuple of str, optional
        RDF: the prefixes under which entity and relation labels that are not IRIs were written.
    entities, relations : sequence of str, optional
        Labels in id order: the labels of the ids in arrays and DGL graphs (entities also as a
        mapping by node type), or a fixed order of ids for other sources.

    Returns
    -------
    MultiViewKG

    Raises
    ------
    DataError
        The source does not exist, is not recognised or cannot be read, or an option does not apply
        to its format.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> kg.id_of("France") < kg.num_entities
    True

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "facts.csv"
    >>> _ = path.write_text("id,subject,predicate,object\n1,France,borders,Spain\n")
    >>> kg = ig.load_kg(path, split=False)
    >>> kg.entities, kg.notes[0]
    (['France', 'Spain'], 'Read as one file of label triples, CSV.')
    """
    if validation is not None and validation not in get_args(Validation):
        raise DataError(
            f"validation: expected one of {', '.join(get_args(Validation))}; received"
            f" {validation!r}."
        )
    if hold_out_by not in ("auto", *get_args(By)):
        raise DataError(
            f"hold_out_by: expected one of auto, {', '.join(get_args(By))}; received"
            f" {hold_out_by!r}."
        )
    shares = _shares(split)
    options = {
        "columns": columns,
        "header": header,
        "separator": separator,
        "relation_attribute": relation_attribute,
        "literals": literals,
        "base": base,
        "entities": entities,
        "relations": relations,
    }
    options = {name: value for name, value in options.items() if value is not None}
    read: Source | MultiViewKG
    if isinstance(source, MultiViewKG):
        _checked_options(options, "folders", "a MultiViewKG")
        read = source
    else:
        read = _read(source, format, options)
    if isinstance(read, Source):
        # A folder that holds train only is split if shares were passed.
        read.whole |= _are_shares(shares) and set(read.parts) == {"train"}
        if _are_shares(shares) and not read.whole:
            raise _has_splits_error(read.parts)
        read = _build(read, shares, seed)
    elif _are_shares(shares):
        if len(read.valid) or len(read.test):
            raise _has_splits_error([part for part in SPLITS if len(read.triples(part))])
        parts, note = _split(read.train, shares, seed)
        read = read.replace(**parts, notes=[*read.notes, note])
    return read if validation is None else with_validation(read, validation, seed, hold_out_by)


def _build(source: Source, split: Sequence[float] | bool, seed: int) -> MultiViewKG:
    """Build the graph, split if the source is whole, with notes on what was done."""
    notes = [f"Read as {source.description}.", *source.options.pop("notes", [])]
    if source.whole and split is not False:
        source.parts, note = _split(source.parts["train"], split, seed)
        notes.append(note)
    logger.info("%s: %s", source.options.get("name") or "graph", " ".join(notes))
    return source.build(notes=notes)


def _shares(split: Sequence[float] | str | bool | None) -> Sequence[float] | bool:
    """Parse ``split`` into shares, or into whether to split; raise a DataError if it is neither."""
    if isinstance(split, str) and split.strip().lower() == "none":
        return False
    if split is None or isinstance(split, (bool, np.bool_)):
        return bool(split)
    try:
        return checked_shares("split", split)
    except DataError as error:
        raise DataError(f"{error} 'none' or False keeps all triples in train.") from None


def _has_splits_error(parts: Iterable[str]) -> DataError:
    return DataError(
        f"split: the source has splits of its own ({', '.join(parts)}). Omit split to use them."
    )


def _are_shares(split: Sequence[float] | bool) -> bool:
    """Return whether the caller passed shares, rather than a bool or nothing."""
    return not isinstance(split, bool)


def _split(
    triples: Tensor, split: Sequence[float] | bool, seed: int
) -> tuple[dict[Split, Tensor], str]:
    """Split the triples; return the parts by split and a note."""
    shares = (0.8, 0.1, 0.1) if isinstance(split, bool) else split
    parts = dict(zip(SPLITS, split_triples(triples, shares, seed), strict=True))
    sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    return parts, (
        f"The source has no splits; split into {sizes} (seed {seed}), each entity and relation"
        " kept in train, triples between the same two entities kept together."
    )


def _read(source: Any, format: str | None, options: dict[str, Any]) -> Source | MultiViewKG:
    if format is not None and format not in FORMATS:
        raise DataError(f"format: expected one of {', '.join(FORMATS)}; received {format!r}.")
    if isinstance(source, (str, os.PathLike)):
        return _read_path(os.fspath(source), format, options)
    if isinstance(source, Mapping):
        return _read_parts(source, format, options)
    if arrays.is_pykeen_dataset(source):
        named = {"train": "training", "valid": "validation", "test": "testing"}
        parts = {name: getattr(source, attribute, None) for name, attribute in named.items()}
        return _read_parts(
            {name: part for name, part in parts.items() if part is not None}, format, options
        )
    if _is_a("networkx", "Graph", source):
        return graphs.from_networkx(
            source, **_checked_options(options, "graphs", "a networkx graph")
        )
    if _is_a("dgl", "DGLGraph", source):
        return graphs.from_dgl(source, **_checked_options(options, "graphs", "a DGL graph"))
    if _is_a("pandas", "DataFrame", source):
        source = _from_pandas(source)
    if isinstance(source, pl.DataFrame) or arrays.is_pykeen(source) or _is_array(source):
        return _read_parts({"train": source}, format, options, whole=True)
    raise DataError(
        f"load_kg: expected a path, the name of a data set, a graph, an array, a data frame, a"
        f" PyKEEN factory, or a dict of these by split; received {type(source).__name__}."
    )


def _is_a(package: str, name: str, value: Any) -> bool:
    """Return whether a value is an instance of a class of a package, without importing it."""
    kind = getattr(sys.modules.get(package), name, None)
    return kind is not None and isinstance(value, kind)


def _from_pandas(frame: Any) -> pl.DataFrame:
    """Convert a pandas frame to polars without `polars.from_pandas`, which needs pyarrow."""
    columns = {
        str(name): column.astype(object).where(column.notna(), None).tolist()
        for name, column in frame.items()
    }
    return pl.DataFrame(columns, strict=False)


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, Tensor)) or (
        isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    )


def _checked_options(options: dict[str, Any], kind: str, what: str) -> dict[str, Any]:
    """Return the options; raise a DataError for one that does not apply to this kind of source."""
    for name in options:
        if name not in _OPTIONS[kind]:
            known = ", ".join(_OPTIONS[kind]) or "none"
            raise DataError(f"{name}: {what} has no such option; its options: {known}.")
    return options


def _read_parts(
    source: Mapping[Any, Any], format: str | None, options: dict[str, Any], whole: bool = False
) -> Source:
    """Read files, frames, arrays or factories by split."""
    parts: dict[Split, Any] = {}
    for key, value in source.items():
        name = arrays.split_of(key) if isinstance(key, str) else None
        if name is None:
            raise DataError(
                "load_kg: expected a dict with the keys train, valid and test; received the key"
                f" {key!r}."
            )
        if name in parts:
            raise DataError(
                f"load_kg: two keys of the dict mean the {name} triples, the second is {key!r}."
                " Remove one."
            )
        if value is not None:
            parts[name] = value
    if "train" not in parts:
        raise DataError(
            "load_kg: expected a dict with the key train (and optionally valid, test); received"
            f" {', '.join(map(repr, source)) or 'an empty one'}."
        )
    parts = {
        name: _from_pandas(value) if _is_a("pandas", "DataFrame", value) else value
        for name, value in parts.items()
    }
    values = list(parts.values())
    if all(isinstance(value, (str, os.PathLike)) for value in values):
        paths = {name: Path(value).expanduser() for name, value in parts.items()}
        for path in paths.values():
            if not path.is_file():
                raise DataError(f"{path}: there is no such file; expected a file of triples.")
        return _read_files(paths, format, options, whole=False, name="")
    if all(arrays.is_pykeen(value) for value in values):
        return arrays.from_pykeen(
            parts, whole=whole, **_checked_options(options, "arrays", "a factory")
        )
    if all(isinstance(value, pl.DataFrame) for value in values):
        frames = {name: _checked_frame(name, value, options) for name, value in parts.items()}
        labels = {name: value for name, value in options.items() if name in _OPTIONS["arrays"]}
        return from_frames("polars frames of labels", frames, whole=whole, **labels)
    if all(_is_array(value) for value in values):
        labels = _checked_options(options, "arrays", "an array")
        description = "an array" if whole else f"arrays by split ({', '.join(parts)})"
        return arrays.from_arrays(parts, whole=whole, description=description, **labels)
    raise DataError(
        "load_kg: expected a dict of paths, frames, arrays or factories, all of one kind; received"
        f" {', '.join(type(value).__name__ for value in values)}."
    )


def _checked_frame(name: str, frame: pl.DataFrame, options: dict[str, Any]) -> pl.DataFrame:
    columns = {key: value for key, value in options.items() if key not in _OPTIONS["arrays"]}
    for key in columns:
        if key != "columns":
            raise DataError(
                f"{key}: a frame has no such option; its options: columns,"
                f" {', '.join(_OPTIONS['arrays'])}."
            )
    return frame_of_triples(frame.lazy(), name, columns.get("columns"))


def _read_path(source: str, format: str | None, options: dict[str, Any]) -> Source | MultiViewKG:
    path = datasets.find(source)
    if not path.exists() and source in datasets.names():
        raise DataError(
            f"The published data set {source} is not in {path}. Put it there, or set the"
            f" environment variable {datasets.DATA_VARIABLE} to the folder that contains it;"
            " `imvia-graph datasets` says where to get it."
        )
    if not path.exists():
        raise DataError(
            f"{source!r} is neither a file, a folder nor a data set; the data sets are"
            f" {', '.join(datasets.names())}."
        )
    if not path.is_dir():
        if format in FOLDERS:
            raise DataError(f"{path} is a file; format={format!r} expects a folder.")
        name = path.name.split(".")[0]
        return _read_files({"train": path}, format, options, whole=True, name=name)
    return _read_folder(path, format, options)


def _read_folder(folder: Path, format: str | None, options: dict[str, Any]) -> Source | MultiViewKG:
    def has(name: str) -> bool:
        return (folder / name).is_file()

    tables_meant = bool(set(options) & set(_OPTIONS["tables"]))
    if format is None:
        if has("train2id.txt") and not has("train.tsv"):
            format = "openke"
        elif has("kg.json") and has("train.tsv"):
            format = "kg"
        elif has("train.tsv") and not (tables_meant or _has_header(folder)):
            format = "kg" if _has_kg_file_names(folder) else None
        elif releases.is_momok(folder):
            format = "momok"
        elif releases.is_mygo(folder):
            format = "mygo"
    if format in FOLDERS:
        _checked_options(options, "folders", f"a folder in the format {format!r}")
        if format in ("kg", "openke"):
            kg = MultiViewKG.load(folder) if format == "kg" else read_openke(folder)
            what = "a KG folder" if format == "kg" else "a folder in the OpenKE layout"
            logger.info("%s: Read as %s.", kg.name, what)
            return kg
        return releases.read_momok(folder) if format == "momok" else releases.read_mygo(folder)
    if has(arrays.NPZ_NAME) and format in (None, "npz"):
        path = inside(folder, arrays.NPZ_NAME)
        return _read_files({"train": path}, "npz", options, whole=True, name=folder.resolve().name)
    files = tables.split_files(folder)
    if "train" not in files:
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise DataError(
            f"{folder}: expected train.tsv (a KG folder: head, relation and tail labels on each"
            " line), train2id.txt (the OpenKE layout), or a train file in another format (.csv,"
            f" .parquet, .txt, .nt, .ttl), found {', '.join(found) or 'nothing'}."
        )
    return _read_files(files, format, options, whole=False, name=folder.resolve().name)


def _has_kg_file_names(folder: Path) -> bool:
    """Return whether all split files of a folder with a train.tsv are named as in a KG folder.

    Raises a DataError if one is named otherwise although the folder has files that only a KG
    folder has.
    """
    files = {path.name: tables.split_of_file(path) for path in folder.iterdir() if path.is_file()}
    for name, split in sorted(files.items()):
        if split in (None, "train") or f"{split}.tsv" in files:
            continue
        if any((folder / own).exists() for own in ("entities.tsv", "relations.tsv", "views")):
            raise DataError(
                f"{folder / name}: a KG folder's {split} triples are in {split}.tsv (head,"
                " relation, tail labels, separated by tabs). Rename the file, or move it away."
            )
        return False
    return True


def _has_header(folder: Path) -> bool:
    """Return whether a split file begins with a header, which files of a KG folder do not have."""
    for split in SPLITS:
        if not (folder / f"{split}.tsv").is_file():
            continue
        first = next(iter(read_lines(inside(folder, f"{split}.tsv"))), None)
        if first is not None and columns_by_name(first[1].split("\t")) is not None:
            return True
    return False


def _read_files(
    files: Mapping[Split, Path],
    format: str | None,
    options: dict[str, Any],
    *,
    whole: bool,
    name: str,
) -> Source:
    forms: dict[Split, str] = {}
    for split, path in files.items():
        form = format or tables.form_of(path)
        if form is None:
            raise DataError(
                f"{path}: the format is not clear from the file name; expected a name that ends in"
                f" {', '.join(tables.FORMS)} (optionally with .gz or .zst). Name it with"
                f" format= (--from), one of {', '.join(FORMATS[len(FOLDERS) :])}."
            )
        if path.stat().st_size == 0 and split == "train":
            raise DataError(f"{path} is empty: expected triples (head, relation, tail).")
        forms[split] = form
    kinds = {"rdf" if form in ("ntriples", "turtle") else form for form in forms.values()}
    if kinds == {"rdf"}:
        options = _checked_options(options, "rdf", "RDF")
        return rdf.read_rdf(files, forms, whole=whole, name=name, **options)
    if "rdf" in kinds or ("npz" in kinds and len(files) > 1):
        raise DataError(
            f"{', '.join(path.name for path in files.values())}: expected all splits in one format,"
            " or one npz file with all splits; found"
            f" {', '.join(dict.fromkeys(forms.values()))}."
        )
    if kinds == {"npz"}:
        options = _checked_options(options, "arrays", "an npz file")
        return arrays.read_npz(files["train"], name=name, **options)
    options = _checked_options(options, "tables", "a table")
    return tables.read_files(files, forms, whole=whole, name=name, **options)


def with_validation(
    kg: MultiViewKG,
    validation: Validation,
    seed: int = 0,
    hold_out_by: By | Literal["auto"] = "auto",
) -> MultiViewKG:
    """Return the graph with its validation set chosen as `load_kg` describes.

    If the choice was made before, ``auto`` keeps it and ``held-out`` holds nothing out again.

    Parameters
    ----------
    kg : MultiViewKG
    validation : {"auto", "published", "held-out"}
    seed : int
        Seed of the held-out set. Default: 0.
    hold_out_by : {"auto", "pair", "triple"}
        Unit of holding out; see `hold_out <imvia_graph.splits.hold_out>`. Default: ``auto``, the
        unit by which the test set was drawn.

    Raises
    ------
    DataError
        No training triple can be held out.
    """
    if kg.validation is not None and validation in ("auto", kg.validation):
        return kg
    if validation == "published":
        return _with_choice(copy.copy(kg), "published")
    leaks = {split: count_shared(kg.valid, kg.triples(split)) for split in ("train", "test")}
    leaks = {split: count for split, count in leaks.items() if count}
    if validation == "auto" and not leaks:
        return kg
    # A test triple must not be used for validation, even if it is in train as well.
    by = drawn_by(kg.train, kg.test) if hold_out_by == "auto" else hold_out_by
    train, valid = hold_out(kg.train, HELD_OUT_FRACTION, seed, keep=kg.test, by=by)
    if not len(valid):
        raise DataError(
            f"{kg.title}: no training triple can be held out: there are too few, or each is the"
            " only one of an entity or a relation. Add a validation set, or use"
            " validation='published'."
        )
    reason = ""
    if leaks:
        distinct = len(kg.valid.unique(dim=0))
        found = " and ".join(f"{count} are in {split}" for split, count in leaks.items())
        what = f"of the {distinct} distinct published validation triples"
        reason = f"{found.replace(' ', f' {what} ', 1)}. "
    if len(kg.valid):
        reason += "The published validation set is set aside and only filters ranks. "
    note = (
        f"{reason}Validation: {len(valid)} triples held out of train, {by} by {by} (seed {seed})."
    )
    logger.warning("%s: %s", kg.name or "graph", note)
    known = torch.cat([kg.known, kg.valid])
    held_out = kg.replace(train=train, valid=valid, known=known, notes=[*kg.notes, note])
    return _with_choice(held_out, "held-out")


def _with_choice(kg: MultiViewKG, validation: Literal["published", "held-out"]) -> MultiViewKG:
    kg.validation = validation
    return kg
