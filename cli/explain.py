"""``imvia-graph explain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape
from rich.table import Table

from imvia_graph._display import shown
from imvia_graph.cli.display import cell, json_text, results
from imvia_graph.cli.options import device_option, run_argument

if TYPE_CHECKING:
    from imvia_graph.inference import End, Explanation, Side


@click.command()
@run_argument
@click.option("--head", required=True, help="Label or name of the head.")
@click.option("--relation", required=True, help="Label or name of the relation.")
@click.option("--tail", required=True, help="Label or name of the tail.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@device_option
def explain(run: Path, head: str, relation: str, tail: str, as_json: bool, device: str) -> None:
    """Explain a triple, true or not, with the trained run in the folder RUN.

    First, for each of the model's heads (structure, each modality, joint, complex) and for their
    weighted sum, the decision: the filtered rank and the score of the tail and of the head of the
    triple, and the head's weight in the decision under this relation. Ties get their mean rank.
    Then, for each view of both entities: its weight under the relation (for the tail, under the
    inverse relation), its weight without a relation, and the difference.

    \b
    Examples:
      imvia-graph explain runs/countries-1 --head France --relation borders --tail Spain
      imvia-graph explain runs/countries-1 --head France --relation currency --tail Euro --json
    """
    from imvia_graph.run import load

    found = load(run, device).explain(head=head, relation=relation, tail=tail)
    if as_json:
        click.echo(json_text(found.as_dict()))
        return
    where = f"in {found.known}" if found.known else "not in the graph"
    triple = f"({shown(found.head.name)}, {shown(found.relation_name)}, {shown(found.tail.name)})"
    results.print(f"{escape(triple)}: {where}")
    results.print(_judgements(found))
    for end, under in ((found.head, ""), (found.tail, ", inverse")):
        if end.views:
            results.print(_views(end, f"{shown(found.relation_name)}{under}"))


def _judgements(found: Explanation) -> Table:
    table = Table()
    table.add_column("")
    sides: tuple[Side, ...] = ("tail", "head")
    for side in sides:
        for column in (f"{side} rank", "score", "weight"):
            table.add_column(column, justify="right")
    for name in found.judgements["tail"]:
        cells: list[str] = []
        for side in sides:
            rank, score, weight = found.judgements[side][name]
            cells += [f"{rank:g}", f"{score:.3f}", f"{100 * weight:.1f} %"]
        table.add_row(cell(name), *cells)
    return table


def _views(end: End, relation: str) -> Table:
    table = Table(title=escape(f"Views of {shown(end.name)}"), title_justify="left")
    table.add_column("modality")
    table.add_column("view")
    table.add_column(f"weight under {escape(relation)}", justify="right")
    table.add_column("without relation", justify="right")
    table.add_column("difference", justify="right")
    for modality, views in end.views.items():
        for place, view in enumerate(views, 1):
            table.add_row(
                cell(modality) if place == 1 else "",
                cell(view.source) or f"number {place}",
                f"{100 * view.weight:.1f} %",
                f"{100 * view.plain_weight:.1f} %",
                f"{100 * (view.weight - view.plain_weight):+.1f} %",
            )
        if not views:
            table.add_row(cell(modality), "(none)", "", "", "")
    return table
