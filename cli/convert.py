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
    help="Format to write.  [default: by TARGET's suffix, else kg]",
)
@loading_options
@click.option(
    "--validation",
    type=click.Choice(["auto", "published", "held-out"]),
    default="published",
    show_default=True,
    help="Validation set to write, as for `imvia-graph fit`.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the split.")
@click.option(
    "--compression", type=click.Choice(["gzip", "zstd"]), help="Compress the files of a folder."
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Write even if TARGET exists: replace the graph in a folder, and name the files that are"
    " removed.",
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
    """Convert the knowledge graph SOURCE to the format --to and write it to TARGET.

    SOURCE is anything that `imvia-graph fit` takes. TARGET is a folder or a file: npz with its
    splits, or a table or RDF with all triples in one file. Only the format kg includes views.

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
    click.echo(printable(repr(kg)))
    read = source if Path(source).exists() else None  # SOURCE may be the name of a data set
    lost = write_kg(kg, target, form, compression=compression, overwrite=overwrite, source=read)
    click.echo(printable(f"Wrote {target}."))
    for sentence in lost:
        click.echo(printable(f"Note: {sentence}"), err=True)
