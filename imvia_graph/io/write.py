"""`write_kg`: write a graph in any of the forms that `load_kg` reads."""

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

#: Files, besides those of the splits, that belong to a graph in some form.
LAYOUT_FILES = frozenset(
    {
        *("kg.json", "entities.tsv", "relations.tsv"),
        *("train2id.txt", "valid2id.txt", "test2id.txt", "entity2id.txt", "relation2id.txt"),
        *("entity_names.tsv", "relation_names.tsv", "entities.txt", "relations.txt"),
        arrays.NPZ_NAME,
    }
)

#: The files of a KG folder, except for features.
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
        A folder, which gets one file per split; for ``tsv``, ``csv``, ``text``, ``parquet``,
        ``ntriples`` and ``turtle`` also a single file for all triples, if its name has the suffix
        of the form (``.gz``, ``.zst`` compress text). ``npz`` is a single file with all splits.
    format : str, optional
        ``kg`` (the only form that holds views), ``openke``, ``momok``, ``mygo``, ``tsv``, ``csv``,
        ``text`` (spaces between the columns), ``parquet``, ``ntriples``, ``turtle`` or ``npz``.
        Default: the form of the target's suffix, else ``kg``. In RDF, labels that are not IRIs are
        percent-encoded under a base (see `imvia_graph.io.rdf`).
    compression : {"gzip", "zstd"}, optional
        Compression of the files in a folder of ``tsv``, ``csv``, ``text``, ``ntriples`` or
        ``turtle``.
    overwrite : bool
        Whether to write into a folder that is not empty, or over a file. Triple and label files of
        a graph that the folder held before, in any form, are removed if they are not overwritten,
        so that the folder holds this graph only; other files stay. A form without views is not
        written into a KG folder with views.
    source : path, optional
        What the graph was read from. If it lies in the target folder, the files beside it that
        would be removed do not belong to this graph, and nothing is written.

    Returns
    -------
    list of str
        One sentence for each kind of data that the form did not hold, and one that lists the
        removed files; empty if nothing was lost.

    Raises
    ------
    DataError
        A label that the form cannot hold (such as a tab in TSV), a target that already exists, or
        a file that would be removed but does not belong to the graph in the folder.

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
            f"{target} already exists{' and is not empty' if target.is_dir() else ''}. Name another"
            " target, or allow overwriting (overwrite=True, on the command line --overwrite)."
        )
    folder = target
    whole = target.resolve()
    if taken and whole.name == "kg" and (whole.parent / "run.json").is_file():
        raise DataError(
            f"{target} is the graph that the run in {whole.parent} was trained on, which cannot be"
            " replaced. Name another target."
        )
    if format != "kg" and any((folder / "views").glob("*.safetensors")):
        raise DataError(
            f"{folder} is a KG folder with views, which the format {format} cannot hold. Name"
            " another target, or remove the folder first."
        )
    if folder.is_dir():
        _check_removals(folder, _file_names(kg, folder, format, compression), source)
    written = _write(kg, target, format, compression)
    # Old files are removed last: a graph that cannot be written must not cost the old one.
    removed = []
    if folder.is_dir():
        kept = {folder / name for name in KG_FILES} if format == "kg" else set(written)
        removed = [path for path in _graph_files(folder) if path not in kept]
        for path in removed:
            path.unlink()
    lost = _lost(kg, format, written == [target] and format not in ("kg", "npz"))
    if removed:
        lost.append(
            "Removed the files of the graph that was there before:"
            f" {', '.join(str(path) for path in removed)}."
        )
    return lost


def _file_names(kg: MultiViewKG, folder: Path, format: str, compression: str | None) -> set[str]:
    """Return the names of the files that a form may have in a folder."""
    if format == "kg":
        return set(KG_FILES)
    if format == "npz":
        return {arrays.NPZ_NAME}
    if format in ("openke", "momok", "mygo"):
        return {*LAYOUT_FILES, *(f"{split}.txt" for split in SPLITS)}
    return {path.name for path, _ in tables.target_files(kg, folder, format, compression)}


def _check_removals(folder: Path, kept: set[str], source: str | os.PathLike[str] | None) -> None:
    """Raise a DataError if files would be removed that belong to neither graph.

    The two graphs are the one that was read and the one that the folder holds.
    """
    removed = [path for path in _graph_files(folder) if path.name not in kept]
    whole = None if source is None else Path(source).resolve()
    if whole is not None and folder.resolve() in whole.parents:
        unread = [path.name for path in removed if path.resolve() != whole]
        if unread:
            raise DataError(
                f"{folder}: {', '.join(map(repr, unread))} would be removed, but only {source} was"
                " read. Name another target, or read the folder."
            )
    # `load_kg` expects all splits in one npz file, so it never reads one array file per split.
    arrays_of_splits = [
        path.name
        for path in removed
        if tables.form_of(path) == "npz"
        and path.name != arrays.NPZ_NAME
        and tables.split_of_file(path) != "train"
    ]
    if arrays_of_splits:
        raise DataError(
            f"{folder}: {', '.join(map(repr, arrays_of_splits))} would keep the graph from being"
            " read again, and belongs to no graph itself. Move it away, or name another target."
        )


def _write(kg: MultiViewKG, target: Path, format: str, compression: str | None) -> list[Path]:
    """Write the graph; return the files written, or the folder for a KG folder."""
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
    """Return the files in a folder from which `load_kg` would read a graph, in any form."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name in LAYOUT_FILES or tables.split_of_file(path) is not None)
    ]


def _lost(kg: MultiViewKG, format: str, one_file: bool) -> list[str]:
    """Describe what the form cannot hold, one sentence each."""
    lost = []
    if format != "kg" and kg.modalities:
        views = sum(kg.graph.num_nodes(modality) for modality in kg.modalities)
        lost.append(
            f"{views} views of {len(kg.modalities)} modalities ({', '.join(kg.modalities)}) are"
            " left out; only the format kg holds views."
        )
    if format != "kg" and len(kg.known):
        lost.append(
            f"{len(kg.known)} triples that are in no split and only filter ranks, such as a"
            " validation set that was set aside, are left out; only the format kg holds them."
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
                    f"{unused} {what} without a triple are left out; this format holds only the"
                    " labels of triples."
                )
    if format not in ("kg", "openke") and (
        kg.entity_names != kg.entities or kg.relation_names != kg.relations
    ):
        lost.append("Display names are left out.")
    return lost
