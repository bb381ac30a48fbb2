"""`write_kg`: a graph into any of the forms that `load_kg` reads."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from imvia_graph import _files
from imvia_graph._forms import FORMATS, TABLES
from imvia_graph.errors import DataError
from imvia_graph.io import arrays, rdf, releases, tables
from imvia_graph.io.openke import write_openke_files
from imvia_graph.kg import PARTS, SPLITS, MultiViewKG

logger = logging.getLogger(__name__)

#: Files beside those of the splits by which a folder is a graph in some form.
LAYOUT_FILES = frozenset(
    {
        *("kg.json", "entities.tsv", "relations.tsv"),
        *("train2id.txt", "valid2id.txt", "test2id.txt", "entity2id.txt", "relation2id.txt"),
        *("entity_names.tsv", "relation_names.tsv", "entities.txt", "relations.txt"),
        arrays.NPZ_NAME,
    }
)

#: The files of a KG folder, features aside.
KG_FILES = ("kg.json", "entities.tsv", "relations.tsv", *(f"{part}.tsv" for part in PARTS))


def write_kg(
    kg: MultiViewKG,
    target: str | os.PathLike[str],
    format: str | None = None,
    *,
    compression: str | None = None,
    overwrite: bool = False,
    source: str | os.PathLike[str] | None = None,
) -> list[str]:
    r"""Write a graph to disk in a form that `load_kg` reads.

    Parameters
    ----------
    kg : MultiViewKG
        The graph.
    target : path
        A folder, in which each split gets its file; for ``tsv``, ``csv``, ``text``, ``parquet``,
        ``ntriples``, ``turtle`` also one file for all triples, if its name ends as that form's do
        (``.gz``, ``.zst`` compress text). ``npz`` is one file that keeps the splits.
    format : str, optional
        ``kg`` (the only one that carries views), ``openke``, ``momok``, ``mygo``, ``tsv``, ``csv``,
        ``text`` (spaces between the columns), ``parquet``, ``ntriples``, ``turtle`` or ``npz``; if
        not told, what the target's name says, else ``kg``. In RDF, labels that are no IRIs are
        percent-encoded under a base (see `imvia_graph.io.rdf`).
    compression : {"gzip", "zstd"}, optional
        For the files of a folder of ``tsv``, ``csv``, ``text``, ``ntriples`` or ``turtle``.
    overwrite : bool
        Whether files may be written into a folder that is not empty, or over a file. Of a graph
        that the folder held in any form, the files of triples and labels that are not written anew
        are removed, so that the folder holds this graph and nothing of that; other files stay. A
        form without views is not written into a KG folder with views.
    source : path, optional
        What the graph was read from. Where that lies in the folder to write, files beside it that
        would be removed are not this graph's, and nothing is written.

    Returns
    -------
    list of str
        What the form did not carry, and which files were removed, a sentence each; empty where
        nothing was lost.

    Raises
    ------
    DataError
        A label that the form cannot carry (a tab in TSV), a target that is there already, files to
        be removed that are not of the graph that was there.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> kg = ig.MultiViewKG.from_labels([("New York", "located in", "USA")])
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "graph.nt"
    >>> ig.io.write_kg(kg, path)
    []
    >>> path.read_text().split()[0]
    '<urn:imvia:entity:New%20York>'
    >>> ig.load_kg(path, split=False).entities
    ['New York', 'USA']
    """
    target = Path(target)
    format = format or tables.form_of(target) or "kg"
    if format not in FORMATS:
        raise DataError(f"format: expected one of {', '.join(FORMATS)}; received {format!r}.")
    texts = ("tsv", "csv", "text", "ntriples", "turtle")
    if compression not in (None, "gzip", "zstd") or (compression and format not in texts):
        raise DataError(
            f"compression: expected gzip or zstd, with one of {', '.join(texts)}; received"
            f" {compression!r} with {format!r}."
        )
    if not target.is_dir():
        _files.check_target(target)
    taken = any(target.iterdir()) if target.is_dir() else os.path.lexists(target)
    if taken and not overwrite:
        raise DataError(
            f"{target} is there already and not empty. Name another target, or allow"
            " overwriting (overwrite=True, on the command line --overwrite)."
        )
    folder = target
    if format != "kg" and any((folder / "views").glob("*.safetensors")):
        raise DataError(
            f"{folder} is a KG folder with views, which the form {format} does not carry. Name"
            " another target, or remove it first."
        )
    if folder.is_dir():
        _refuse_strange(folder, _names(kg, folder, format, compression), source)
    written = _write(kg, target, format, compression)
    # Only now, so that a graph that cannot be written does not cost the one that is there.
    removed = []
    if folder.is_dir():
        kept = {folder / name for name in KG_FILES} if format == "kg" else set(written)
        removed = [path for path in _graph_files(folder) if path not in kept]
        for path in removed:
            path.unlink()
    lost = _lost(kg, format, written == [target] and format not in ("kg", "npz"))
    if removed:
        lost.append(
            "Removed, for they were of the graph that was there:"
            f" {', '.join(str(path) for path in removed)}."
        )
    return lost


def _names(kg: MultiViewKG, folder: Path, format: str, compression: str | None) -> set[str]:
    """The files that a form may have in a folder."""
    if format == "kg":
        return set(KG_FILES)
    if format == "npz":
        return {arrays.NPZ_NAME}
    if format in ("openke", "momok", "mygo"):
        return {*LAYOUT_FILES, *(f"{split}.txt" for split in SPLITS)}
    return {path.name for path, _ in tables.target_files(kg, folder, format, compression)}


def _refuse_strange(folder: Path, kept: set[str], source: str | os.PathLike[str] | None) -> None:
    """A DataError where files would be removed that are of no graph that was read or replaced."""
    removed = [path for path in _graph_files(folder) if path.name not in kept]
    whole = None if source is None else Path(source).resolve()
    if whole is not None and folder.resolve() in whole.parents:
        strange = [path.name for path in removed if path.resolve() != whole]
        if strange:
            raise DataError(
                f"{folder}: {', '.join(map(repr, strange))} would be removed, which were not read"
                f" with {source}. Name another target, or read the folder."
            )
    # Of arrays, all splits are in one file: `load_kg` reads no such file.
    arrays_of_splits = [
        path.name
        for path in removed
        if tables.form_of(path) == "npz"
        and path.name != arrays.NPZ_NAME
        and tables.split_of_file(path) != "train"
    ]
    if arrays_of_splits:
        raise DataError(
            f"{folder}: {', '.join(map(repr, arrays_of_splits))} is of no graph that can be read,"
            " and none could be read beside it. Move it away, or name another target."
        )


def _write(kg: MultiViewKG, target: Path, format: str, compression: str | None) -> list[Path]:
    """Write; the files, or for a KG folder the folder."""
    if format == "kg":
        return [kg.save(target)]
    if format == "openke":
        return write_openke_files(kg, target)
    if format == "momok":
        return releases.write_momok(kg, target)
    if format == "mygo":
        return releases.write_mygo(kg, target)
    if format == "npz":
        if target.suffix == ".npz":
            return arrays.write_npz(kg, target, follow=True)
        return arrays.write_npz(kg, target / arrays.NPZ_NAME)
    if format in ("ntriples", "turtle"):
        return rdf.write_rdf(kg, target, format, compression=compression)
    return tables.write_tables(kg, target, format, compression=compression)


def _graph_files(folder: Path) -> list[Path]:
    """The files from which `load_kg` would read a graph in this folder, whatever its form."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name in LAYOUT_FILES or tables.split_of_file(path) is not None)
    ]


def _lost(kg: MultiViewKG, format: str, one_file: bool) -> list[str]:
    """What the form does not carry."""
    lost = []
    if format != "kg" and kg.modalities:
        views = sum(kg.graph.num_nodes(modality) for modality in kg.modalities)
        lost.append(
            f"{views} views of {len(kg.modalities)} modalities ({', '.join(kg.modalities)}) are"
            " left out; only the form kg carries views."
        )
    if format != "kg" and len(kg.known):
        lost.append(
            f"{len(kg.known)} triples that are in no split and only filter ranks, as a validation"
            " set that was put aside, are left out; only the form kg carries them."
        )
    if one_file and any(len(kg.triples(split)) for split in SPLITS[1:]):
        lost.append("The splits are not kept: one file holds all triples.")
    if format in (*TABLES, "ntriples", "turtle"):
        triples = torch.cat([kg.triples(split) for split in SPLITS])
        for what, column, count in (
            ("entities", triples[:, [0, 2]], kg.num_entities),
            ("relations", triples[:, 1], kg.num_relations),
        ):
            unused = count - len(column.unique())
            if unused:
                lost.append(
                    f"{unused} {what} without a triple are left out; forms of labels hold triples"
                    " alone."
                )
    if format not in ("kg", "openke") and (
        kg.entity_names != kg.entities or kg.relation_names != kg.relations
    ):
        lost.append("Display names are left out.")
    return lost
