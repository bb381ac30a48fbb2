"""``imvia-graph convert``."""

from __future__ import annotations

from pathlib import Path

import click

from imvia_graph.io.load import FORMATS, Validation, load_kg
from imvia_graph.io.write import WRITTEN, write_kg


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(WRITTEN),
    help="Form to write; if not told, what TARGET's name says, else kg.",
)
@click.option(
    "--from",
    "source_form",
    type=click.Choice(FORMATS),
    help="Form of SOURCE, where it is not recognised.",
)
@click.option(
    "--columns",
    help="Tables: places from 0 or names of the head, relation and tail columns, as 0,2,1.",
)
@click.option("--header/--no-header", default=None, help="Tables: whether line 1 names columns.")
@click.option("--separator", help="Tables: the character between columns.")
@click.option(
    "--literals",
    type=click.Choice(["leave-out", "numbers"]),
    help="RDF: what becomes of literals.",
)
@click.option(
    "--split",
    "shares",
    default="0.8,0.1,0.1",
    show_default=True,
    help="Shares of train, validation and test for a source without splits; none: all in train.",
)
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
    help="Write even if TARGET is there already; replaces the graph that a folder holds.",
)
def convert(
    source: str,
    target: Path,
    form: str | None,
    source_form: str | None,
    columns: str | None,
    header: bool | None,
    separator: str | None,
    literals: str | None,
    shares: str,
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
    kg = load_kg(
        source,
        validation,
        seed,
        format=source_form,
        split=_shares(shares),
        columns=_columns(columns),
        header=header,
        separator={"\\t": "\t", "tab": "\t", "space": " "}.get(separator or "", separator),
        literals=literals,  # type: ignore[arg-type]
    )
    for note in kg.notes:
        click.echo(note)
    lost = write_kg(kg, target, form, compression=compression, overwrite=overwrite)
    click.echo(f"Wrote {target}: {repr(kg)[1:-1]}.")
    for sentence in lost:
        click.echo(f"Note: {sentence}", err=True)


def _shares(text: str) -> list[float] | bool:
    if text.strip().lower() == "none":
        return False
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"expected three shares, as 0.8,0.1,0.1, or none; received {text!r}.",
            param_hint="--split",
        ) from None


def _columns(text: str | None) -> list[int] | list[str] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if all(part.isdecimal() for part in parts):
        return [int(part) for part in parts]
    return parts
