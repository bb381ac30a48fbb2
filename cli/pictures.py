"""``imvia-graph pictures``."""

from __future__ import annotations

from pathlib import Path

import click

from imvia_graph.cli.options import run_argument
from imvia_graph.datasets.pictures import draw_countries
from imvia_graph.errors import DataError


@click.command()
@run_argument
def pictures(run: Path) -> None:
    """Draw flags and outlines for the run in the folder RUN, trained on `countries`.

    The built-in graph holds features of pictures, not the pictures. This command draws the pictures
    into RUN/pictures, where `report` and `explore` find them. It needs npm, a network, and the
    extra `pictures`, and takes a few seconds.

    Graphs that `imvia-graph encode` wrote record where their pictures are and do not need it.

    \b
    Examples:
      imvia-graph pictures runs/countries-1
    """
    from imvia_graph.checkpoint import open_run

    kg, _ = open_run(run)
    sources = (source for modality in kg.modalities for source in kg.view_sources(modality))
    if not any(source.startswith(("flags/", "outlines/")) for source in sources):
        raise DataError(
            f"{run}: {kg.title} has no views of the flags and outlines of `countries`, so these"
            " would not be shown. Name a run that was trained on `countries`."
        )
    folder = run / "pictures"
    click.echo(f"{draw_countries(folder)} pictures in {folder}")
