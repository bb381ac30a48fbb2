"""`load_kg`: one way in for every kind of source."""

from __future__ import annotations

import logging
import os
from typing import Literal, get_args

from imvia_graph import datasets
from imvia_graph.errors import DataError
from imvia_graph.io.openke import read_openke
from imvia_graph.kg import MultiViewKG
from imvia_graph.splits import count_shared, hold_out

logger = logging.getLogger(__name__)

Validation = Literal["auto", "published", "held-out"]
#: Share of the training triples that "held-out" validation takes.
HELD_OUT_FRACTION = 0.05


def load_kg(
    source: str | os.PathLike[str] | MultiViewKG, validation: Validation = "auto", seed: int = 0
) -> MultiViewKG:
    """Load a knowledge graph.

    Parameters
    ----------
    source : str, path or MultiViewKG
        The name of a built-in or published data set (``imvia-graph datasets`` lists them), or a
        folder: a KG folder (``train.tsv`` …, see `MultiViewKG.save`) or one in the OpenKE layout
        (``train2id.txt`` …). A `MultiViewKG` is taken as it is.
    validation : {"auto", "published", "held-out"}
        ``published`` takes the source's validation set as it is; ``held-out`` carves 5 % of the
        training triples instead (see `imvia_graph.splits.hold_out`) and puts the source's
        validation set aside; ``auto`` is held-out where the source's validation set shares triples
        with its train set, published otherwise. `MultiViewKG.notes` says what was done.
    seed : int
        Seed of the held-out set.

    Returns
    -------
    MultiViewKG

    Raises
    ------
    DataError
        No such data set or folder, or one that cannot be read.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.load_kg("countries")
    >>> kg.id_of("France") < kg.num_entities
    True
    """
    if validation not in get_args(Validation):
        raise DataError(
            f"validation: expected one of {', '.join(get_args(Validation))}; received"
            f" {validation!r}."
        )
    kg = source if isinstance(source, MultiViewKG) else _read(os.fspath(source))
    return with_validation(kg, validation, seed)


def _read(source: str) -> MultiViewKG:
    folder = datasets.find(source)
    if not folder.exists():
        raise DataError(
            f"{source!r} is neither a folder nor a data set; the data sets are"
            f" {', '.join(datasets.names())}."
        )
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; expected a folder with train.tsv or train2id.txt.")
    if (folder / "train.tsv").is_file():
        return MultiViewKG.load(folder)
    if (folder / "train2id.txt").is_file():
        return read_openke(folder)
    found = sorted(path.name for path in folder.iterdir())[:8]
    raise DataError(
        f"{folder}: expected train.tsv (a KG folder: head, relation, tail labels a line) or"
        f" train2id.txt (the OpenKE layout), found {', '.join(found) or 'nothing'}."
    )


def with_validation(kg: MultiViewKG, validation: Validation, seed: int = 0) -> MultiViewKG:
    """The graph with its validation set as `load_kg` describes it."""
    shared = count_shared(kg.valid, kg.train) if validation == "auto" and len(kg.valid) else 0
    if validation == "published" or (validation == "auto" and not shared):
        return kg
    train, valid = hold_out(kg.train, HELD_OUT_FRACTION, seed)
    if not len(valid):
        raise DataError(
            f"{kg}: no training triple can be held out without losing an entity or a relation from"
            " train. Give a validation set, or use validation='published'."
        )
    reason = (
        f"{shared} of the {len(kg.valid.unique(dim=0))} distinct published validation triples are"
        " in train, so it cannot validate; it is put aside. "
        if shared
        else ""
    )
    note = f"{reason}Validation: {len(valid)} triples held out of train (seed {seed})."
    logger.warning("%s: %s", kg.name or "graph", note)
    return kg.replace(train=train, valid=valid, notes=[*kg.notes, note])
