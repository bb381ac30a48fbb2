"""``imvia-graph evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from imvia_graph.cli.display import json_text, metrics_table, relations_table, results
from imvia_graph.cli.options import device_option, run_argument
from imvia_graph.run import load


@click.command()
@run_argument
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Which triples to rank.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (fractions).")
@click.option("--relations", is_flag=True, help="Show the metrics of each relation, too.")
@device_option
def evaluate(run: Path, split: str, as_json: bool, relations: bool, device: str) -> None:
    """Rank the triples of a split with the trained run in the folder RUN.

    Filtered by all known triples, heads and tails, ties at their mean rank.

    \b
    Examples:
      imvia-graph evaluate runs/countries-1
      imvia-graph evaluate runs/countries-1 --split valid --relations
      imvia-graph evaluate runs/countries-1 --json | jq .both.mrr
    """
    trained = load(run, device)
    metrics = trained.evaluate(split)
    if as_json:
        click.echo(json_text(metrics))
        return
    results.print(metrics_table(f"{trained.kg.name}: {split}, filtered", metrics))
    if relations:
        results.print(relations_table(metrics))
