"""``imvia-graph convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imvia_graph._display import printable
from imvia_graph._forms import FORMATS
from imvia_graph.cli.options import NamedFile, loading_options

if TYPE_CHECKING:
    from imvia_graph.io.load import Validation


@click.command()
@click.argument("source")
@click.argument("target", type=NamedFile())
@click.option(
    "--to",
    "form",
    type=click.Choice(FORMATS),
    help="Form to write; if not told, what TARGET's name says, else kg.",
)
@loading_options
@click.option(
    "--validation",
    type=click.Choice(["auto", "published", "held-out"]),
    default="published",
    show_default=True,
    help="Which validation set to write.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the split.")
@click.option(
    "--compression", type=click.Choice(["gzip", "zstd"]), help="Compress the files of a folder."
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Write even if TARGET is there already; replaces the graph that a folder holds, and names"
    " the files that are removed.",
)
def convert(
    source: str,
    target: Path,
    form: str | None,
    loading: dict[str, Any],
    validation: Validation,
    seed: int,
    compression: str | None,
    overwrite: bool,
) -> None:
    """Write SOURCE, a knowledge graph in any form, to TARGET in the form --to.

    SOURCE is a data set's name, a folder or a file: what imvia-graph reads is recognised. TARGET is
    a folder, or a file for npz and, if all triples shall stand in one, for tables and RDF. Views go
    along in the form kg.

    \b
    Examples:
      imvia-graph convert facts.csv my-graph --to kg
      imvia-graph convert DB15K db15k.nt --to ntriples
      imvia-graph convert dump.ttl.gz my-graph --to parquet --split none
      imvia-graph convert export.tsv my-graph --to openke --columns subject,predicate,object
    """
    from imvia_graph.io import load_kg, write_kg

    kg = load_kg(source, validation, seed, **loading)
    for note in kg.notes:
        click.echo(printable(note))
    read = source if Path(source).exists() else None  # a data set's name is no path
    lost = write_kg(kg, target, form, compression=compression, overwrite=overwrite, source=read)
    click.echo(printable(f"Wrote {target}: {repr(kg)[1:-1]}."))
    for sentence in lost:
        click.echo(printable(f"Note: {sentence}"), err=True)
