"""``imvia-graph predict``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from imvia_graph._display import shown
from imvia_graph.cli.display import cell, json_text, results
from imvia_graph.cli.options import device_option, run_argument

if TYPE_CHECKING:
    from imvia_graph.inference import Prediction

#: Letters of an answer that must fit beside the heads' scores, else these are not shown.
MIN_ANSWER = 24


@click.command()
@run_argument
@click.option("--head", help="Label or name of the head, to predict tails.")
@click.option("--relation", required=True, help="Label or name of the relation.")
@click.option("--tail", help="Label or name of the tail, to predict heads.")
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Number of answers."
)
@click.option("--known", is_flag=True, help="Also list known facts of the graph, marked [known].")
@click.option(
    "--self",
    "itself",
    is_flag=True,
    help="Keep the query's own entity among the answers.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@device_option
def predict(
    run: Path,
    head: str | None,
    relation: str,
    tail: str | None,
    top: int,
    known: bool,
    itself: bool,
    as_json: bool,
    device: str,
) -> None:
    """Complete a triple with the trained run in the folder RUN.

    Give --head and --relation to predict tails, or --relation and --tail to predict heads. Known
    facts of the graph are left out unless --known is given. So is the query's own entity, unless
    --self is given or a training triple of the relation has the same head and tail.

    \b
    Examples:
      imvia-graph predict runs/countries-1 --head France --relation borders --top 10
      imvia-graph predict runs/countries-1 --relation borders --tail France --known
    """
    if (head is None) == (tail is None):
        raise click.UsageError("Give either --head or --tail: the end of the triple that is known.")
    from imvia_graph.run import load

    trained = load(run, device)
    answers = trained.predict(
        head=head,
        relation=relation,
        tail=tail,
        k=top,
        include_known=known,
        include_self=itself or None,
    )
    if as_json:
        click.echo(json_text([answer._asdict() for answer in answers]))
        return
    query = f"({head}, {relation}, ?)" if head is not None else f"(?, {relation}, {tail})"
    heads = trained.model.heads if len(trained.model.heads) > 1 else []
    table = _table(query, answers, heads)
    # On a terminal too narrow for all columns, leave out the heads' scores rather than cut numbers.
    wide = results.options.update_width(10_000)
    least = results.measure(_table("", answers, heads, MIN_ANSWER), options=wide).minimum
    if least > results.width:
        table = _table(query, answers, [])
    results.print(table)


def _table(
    query: str, answers: Sequence[Prediction], heads: Sequence[str], longest: int = 120
) -> Table:
    """Return a table of rank, answer (at most ``longest`` letters), score, and scores of heads."""
    table = Table(title=cell(query), title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("answer", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    for head in heads:
        table.add_column(cell(head), justify="right", no_wrap=True)
    for place, answer in enumerate(answers, 1):
        name = answer.name if answer.name == answer.entity else f"{answer.name} ({answer.entity})"
        table.add_row(
            str(place),
            escape(shown(name, longest) + (" [known]" if answer.known else "")),
            f"{answer.score:.3f}",
            *(f"{answer.heads[head]:.3f}" for head in heads),
        )
    return table
