"""Tables that commands write to files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from imvia_graph.errors import DataError

if TYPE_CHECKING:
    import polars as pl

#: Methods of a polars frame by suffix, with their options.
FRAMES: dict[str, tuple[str, dict[str, str]]] = {
    ".tsv": ("write_csv", {"separator": "\t"}),
    ".csv": ("write_csv", {}),
    ".parquet": ("write_parquet", {}),
}
#: Formats of tabulate by suffix.
TEXTS = {".md": "pipe", ".tex": "latex_booktabs"}


def check_suffix(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Raise a DataError if the suffix of an option's file is none of those."""
    if path.suffix.lower() not in suffixes:
        raise DataError(f"{option} {path}: expected a suffix of {', '.join(suffixes)}.")


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Write a frame in the format of the file's suffix, one of `FRAMES`."""
    from imvia_graph import _files

    method, options = FRAMES[path.suffix.lower()]
    _files.write_atomically(path, partial(getattr(frame, method), **options), follow=True)


def write_text(columns: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> None:
    """Write cells as Markdown or LaTeX (booktabs); only the first column is aligned left."""
    from tabulate import tabulate

    from imvia_graph import _files

    if path.suffix.lower() == ".md":
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    text = tabulate(
        rows,
        columns,
        tablefmt=TEXTS[path.suffix.lower()],
        colalign=("left", *["right"] * (len(columns) - 1)),
        disable_numparse=True,
    )
    if path.suffix.lower() == ".tex":
        text = text.replace("±", r"$\pm$").replace("Δ", r"$\Delta$")
        text = re.sub(r"(& *)-(?=\d)", r"\1$-$", text)  # minus signs of numbers
    _files.write_text(path, f"{text}\n", follow=True)
