"""``imvia-graph report``."""

from __future__ import annotations

from pathlib import Path

import click

from imvia_graph.cli.display import Bar, console
from imvia_graph.cli.options import NamedFile, device_option


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=NamedFile(), required=True, help="HTML file to write.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder that the pictures' paths are relative to.  [default: as the graph records]",
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@device_option
def report(
    runs: tuple[Path, ...], out: Path, images: Path | None, force: bool, device: str
) -> None:
    """Write one HTML page about the trained runs in the folders RUN.

    The page shows the graphs, curves, metrics side by side with their differences, overall, by
    relation and by degree, the heads' weights, best and worst answers, pictures and texts with
    their weights, settings and commands. It needs neither a network nor scripts. The command ranks
    the test triples, which takes as long as `imvia-graph evaluate`, and needs the extra `report`.

    \b
    Examples:
      imvia-graph report runs/countries-1 --out report.html
      imvia-graph report runs/seed-0 runs/seed-1 runs/seed-2 --out seeds.html
      imvia-graph report runs/mine --images ~/pictures --out mine.html
    """
    from imvia_graph.report import write_report
    from imvia_graph.run import load

    loaded = []
    for folder in runs:
        loaded.append(load(folder, device))
        console.print(f"Loaded {folder}.", markup=False)
    with Bar() as bar:
        path = write_report(loaded, out, pictures=images, force=force, progress=bar.show)
    click.echo(path)
