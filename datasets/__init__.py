"""Built-in knowledge graphs, and the location of published benchmarks.

`find` resolves a name or a path to a folder; `imvia_graph.io` reads it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

#: Environment variable with the path of the folder of published benchmarks.
DATA_VARIABLE = "IMVIA_DATA"


class Dataset(NamedTuple):
    """Description of a data set.

    Attributes
    ----------
    name : str
        Name of the data set in ``load_kg`` and on the command line.
    title : str
        Description in one line.
    built_in : bool
        Whether the package contains it.
    origin : str
        Where to get a published data set.
    """

    name: str
    title: str
    built_in: bool
    origin: str = ""


_RELEASE = "https://github.com/zjukg/NATIVE, folder benchmarks/ (OpenKE layout)"

DATASETS: tuple[Dataset, ...] = (
    Dataset("countries", "Countries with flags, outlines and names in many languages", True),
    Dataset("DB15K", "DBpedia part of MMKG, 12,842 entities, 279 relations", False, _RELEASE),
    Dataset("MKG-W", "Wikidata part of MKG, 15,000 entities, 169 relations", False, _RELEASE),
    Dataset("MKG-Y", "YAGO part of MKG, 15,000 entities, 28 relations", False, _RELEASE),
)


def names() -> list[str]:
    """Return the names of all known data sets."""
    return [dataset.name for dataset in DATASETS]


def data_folder() -> Path:
    """Return the folder of published benchmarks: ``$IMVIA_DATA``, else ``./data``."""
    return Path(os.environ.get(DATA_VARIABLE) or "data")


def find(source: str) -> Path:
    """Return the folder of a data set by name, or any other source as a path.

    The folder of a published benchmark need not exist.
    """
    for dataset in DATASETS:
        if dataset.name == source:
            if dataset.built_in:
                return Path(__file__).resolve().parent / source
            return data_folder() / source
    return Path(source).expanduser()
