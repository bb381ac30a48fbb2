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
    help="By default that of the suffix: .safetensors, .npz, .parquet, .txt or .vec (word2vec);"
    " .tsv, .nt (ntriples).",
)
@click.option("--force", is_flag=True, help="Write over files that exist.")
@click.option(
    "--what",
    type=click.Choice(["entities", "relations"]),
    help="Whose embeddings.  [default: entities]",
)
@click.option(
    "--modality",
    "heads",
    multiple=True,
    help="Head to write: structure, a modality, joint, complex; repeat for more.  [default: all]",
)
@click.option("--predictions", is_flag=True, help="Write predictions instead of embeddings.")
@click.option(
    "--relation",
    "relations",
    multiple=True,
    help="Relation to predict, label or name; repeat for more.",
)
@click.option(
    "--ask",
    type=click.Choice(["tail", "head"]),
    help="Which end of the relation's triples to predict.  [default: tail]",
)
@click.option(
    "--entities",
    type=click.Choice(["seen", "all"]),
    help="The other end: entities that stand there in triples of the relation, or all."
    "  [default: seen]",
)
@click.option(
    "--queries",
    type=NamedFile(),
    help="File of queries: head, relation, tail a line, separated by tabs, ? for the missing end.",
)
@click.option("--top", type=click.IntRange(min=1), help="Answers a query.  [default: 10]")
@click.option("--known", is_flag=True, help="Keep facts of the graph among the answers.")
@click.option("--self", "itself", is_flag=True, help="Keep the given entity among the answers.")
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
    """Write embeddings or predictions of the trained run in the folder RUN.

    Embeddings, unless --predictions or --queries is given: a table a head with the labels of its
    rows, as safetensors (with NAME.labels.json beside it), npz, Parquet, or word2vec text (labels
    with %, white space and unprintable characters percent-encoded; a file a head).

    Predictions as TSV (head, relation, tail, asked, rank, score, known) or as N-Triples (labels
    that are no IRIs percent-encoded behind urn:imvia:entity: and urn:imvia:relation:). Facts of
    the graph are left out unless --known asks for them, and the given entity itself unless --self
    asks for it or the relation is known to relate entities to themselves.

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
        raise click.UsageError("Predictions: give either --relation or --queries: what to predict.")
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
    asked = (
        read_queries(queries, trained.kg)
        if queries is not None
        else queries_of(trained.kg, relations, ask=ask or "tail", entities=entities or "seen")
    )
    with Bar() as bar:
        path = export_predictions(
            trained,
            out,
            asked,
            format,  # type: ignore[arg-type]  # checked there
            k=top or 10,
            include_known=known,
            include_self=itself or None,
            force=force,
            on_batch=partial(bar.show, "Queries answered"),
        )
    console.print(f"Answered {len(asked):,} queries.")
    click.echo(path)


def _refuse(options: dict[str, Any], what: str) -> None:
    """An option without effect is a mistake."""
    given = [name for name, value in options.items() if value]
    if given:
        raise click.UsageError(f"{', '.join(given)}: of no use for {what}.")
