"""Built-in knowledge graphs, and where the published benchmarks are found.

`find` turns a name or a path into a folder; reading is the affair of `imvia_graph.io`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

#: The folder of published benchmarks is named by this environment variable.
DATA_VARIABLE = "IMVIA_DATA"


class Dataset(NamedTuple):
    """What is known of a data set.

    Attributes
    ----------
    name : str
        What ``load_kg`` and the command line call it.
    title : str
        One line on what it is.
    built_in : bool
        Whether it comes with the package.
    origin : str
        Where a published one is to be had.
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
    """Names of all known data sets."""
    return [dataset.name for dataset in DATASETS]


def data_folder() -> Path:
    """The folder for published benchmarks: ``$IMVIA_DATA``, or ``data`` in the working folder."""
    return Path(os.environ.get(DATA_VARIABLE) or "data")


def find(source: str) -> Path:
    """The folder of a data set's name or, for anything else, of a path.

    A published benchmark that is not there gives the path at which it is looked for.
    """
    for dataset in DATASETS:
        if dataset.name == source:
            if dataset.built_in:
                return Path(__file__).resolve().parent / source
            return data_folder() / source
    return Path(source).expanduser()
