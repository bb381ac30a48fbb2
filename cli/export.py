"""``imvia-graph export``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from imvia_graph.cli.display import Bar, console
from imvia_graph.cli.options import NamedFile, device_option, run_argument

if TYPE_CHECKING:
    from imvia_graph.export import Side, What

EMBEDDINGS = ("safetensors", "npz", "parquet", "word2vec")
PREDICTIONS = ("tsv", "ntriples")


@click.command()
@run_argument
@click.option("--out", type=NamedFile(), required=True, help="File to write.")
@click.option(
    "--format",
    type=click.Choice([*EMBEDDINGS, *PREDICTIONS]),
    help="Format of the file.  [default: by its suffix: .safetensors, .npz, .parquet, .txt or .vec"
    " (word2vec), .tsv, .nt (ntriples)]",
)
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option(
    "--what",
    type=click.Choice(["entities", "relations"]),
    help="Which embeddings to write.  [default: entities]",
)
@click.option(
    "--modality",
    "heads",
    multiple=True,
    help="Head to write: structure, a modality, joint or complex; repeatable.  [default: all]",
)
@click.option("--predictions", is_flag=True, help="Write predictions instead of embeddings.")
@click.option(
    "--relation",
    "relations",
    multiple=True,
    help="Label or name of a relation to predict; repeatable.",
)
@click.option(
    "--ask",
    type=click.Choice(["tail", "head"]),
    help="Which end of the triples to predict.  [default: tail]",
)
@click.option(
    "--entities",
    type=click.Choice(["seen", "all"]),
    help="Entities at the other end: those seen there in triples of the relation, or all."
    "  [default: seen]",
)
@click.option(
    "--queries",
    type=NamedFile(),
    help="File of queries, one per line: head, relation and tail, separated by tabs, ? for the"
    " missing end.",
)
@click.option("--top", type=click.IntRange(min=1), help="Answers per query.  [default: 10]")
@click.option("--known", is_flag=True, help="Keep known facts of the graph among the answers.")
@click.option(
    "--self", "itself", is_flag=True, help="Keep the query's own entity among the answers."
)
@device_option
def export(
    run: Path,
    out: Path,
    format: str | None,
    force: bool,
    what: What | None,
    heads: tuple[str, ...],
    predictions: bool,
    relations: tuple[str, ...],
    ask: Side | None,
    entities: Literal["seen", "all"] | None,
    queries: Path | None,
    top: int | None,
    known: bool,
    itself: bool,
    device: str,
) -> None:
    """Export embeddings or predictions of the trained run in the folder RUN.

    Embeddings are written unless --predictions or --queries is given: one table per head, with the
    labels of its rows, as safetensors (labels in NAME.labels.json), npz, Parquet, or word2vec text
    (one file per head; %, white space and unprintable characters of labels are percent-encoded).

    Predictions are written as TSV (head, relation, tail, asked, rank, score, known) or as N-Triples
    (labels that are not IRIs are percent-encoded after urn:imvia:entity: or urn:imvia:relation:).
    Known facts of the graph are left out unless --known is given. So is the query's own entity,
    unless --self is given or a training triple of the relation has the same head and tail.

    \b
    Examples:
      imvia-graph export runs/c --out entities.parquet
      imvia-graph export runs/c --out relations.npz --what relations
      imvia-graph export runs/c --out text.vec --modality text
      imvia-graph export runs/c --out borders.tsv --predictions --relation borders --top 5
      imvia-graph export runs/c --out answers.nt --queries queries.tsv
    """
    asks = predictions or queries is not None
    mine = {"--what": what, "--modality": heads}
    others: dict[str, Any] = {
        "--relation": relations,
        "--ask": ask,
        "--entities": entities,
        "--top": top,
        "--known": known,
        "--self": itself,
    }
    _refuse(mine if asks else others, "predictions" if asks else "embeddings")
    if asks and (queries is None) == (not relations):
        raise click.UsageError("Predictions need either --relation or --queries.")
    if queries is not None:
        _refuse({"--ask": ask, "--entities": entities}, "queries from a file")
    from imvia_graph.export import (
        export_embeddings,
        export_predictions,
        queries_of,
        read_queries,
    )
    from imvia_graph.run import load

    trained = load(run, device)
    if not asks:
        written = export_embeddings(
            trained,
            out,
            format,  # type: ignore[arg-type]  # checked there
            what=what or "entities",
            heads=heads or None,
            force=force,
        )
        for path in written:
            click.echo(path)
        return
    to_answer = (
        read_queries(queries, trained.kg)
        if queries is not None
        else queries_of(trained.kg, relations, ask=ask or "tail", entities=entities or "seen")
    )
    with Bar() as bar:
        path = export_predictions(
            trained,
            out,
            to_answer,
            format,  # type: ignore[arg-type]  # checked there
            k=top or 10,
            include_known=known,
            include_self=itself or None,
            force=force,
            on_batch=partial(bar.show, "Queries answered"),
        )
    console.print(f"Answered {len(to_answer):,} queries.")
    click.echo(path)


def _refuse(options: dict[str, Any], what: str) -> None:
    """Refuse options that have no effect."""
    given = [name for name, value in options.items() if value]
    if given:
        raise click.UsageError(f"No effect on {what}: {', '.join(given)}. Leave out these options.")
