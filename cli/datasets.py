"""``imvia-graph datasets``."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from imvia_graph.datasets import DATA_VARIABLE, DATASETS, data_folder, find


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def datasets(as_json: bool) -> None:
    """List the built-in and the published data sets, with where to get and put the latter.

    \b
    Examples:
      imvia-graph datasets
      IMVIA_DATA=~/data imvia-graph datasets
    """
    rows = []
    for dataset in DATASETS:
        folder = find(dataset.name)
        rows.append({**dataset._asdict(), "folder": str(folder), "there": folder.is_dir()})
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    console = Console(highlight=False)
    table = Table()
    for column in ("name", "description", "ready to use"):
        table.add_column(column)
    for row in rows:
        ready = "built in" if row["built_in"] else "yes" if row["there"] else "no"
        table.add_row(row["name"], row["title"], ready)
    console.print(table)
    console.print(
        f"Published data sets are read from the folder {data_folder()} (the environment variable"
        f" {DATA_VARIABLE} names another): one folder each, with entity2id.txt, relation2id.txt,"
        " train2id.txt, valid2id.txt, test2id.txt.",
        markup=False,
    )
    for row in rows:
        if row["origin"]:
            console.print(f"{row['name']}: get it from {row['origin']}; put it in {row['folder']}")
