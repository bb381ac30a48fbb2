"""``imvia-graph inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from imvia_graph._display import printable
from imvia_graph.cli.display import cell, json_text
from imvia_graph.cli.options import loading_options, skip_unknown_option, views_option

if TYPE_CHECKING:
    from imvia_graph.io.load import Validation

#: Rows of the table of views: key of the findings, label.
VIEW_ROWS = {
    "views": "views",
    "none": "entities without views",
    "one": "entities with one view",
    "many": "entities with several views",
    "mean": "views per entity, mean",
    "max": "views per entity, max",
    "width": "width",
    "dtype": "dtype",
    "non_finite": "views with NaN or infinity",
    "zero": "all-zero views",
    "constant": "constant views",
    "repeated": "views equal to an earlier one",
    "constant_columns": "columns equal in all views",
}


@click.command()
@click.argument("source")
@click.option(
    "--views",
    "features",
    multiple=True,
    metavar="NAME=FILE",
    help="Precomputed features of a modality to inspect as well, as for `imvia-graph fit`.",
)
@skip_unknown_option
@loading_options
@click.option(
    "--validation",
    type=click.Choice(["published", "auto", "held-out"]),
    default="published",
    show_default=True,
    help="Validation set to inspect: the source's, or the one that `fit` would use.",
)
@click.option(
    "--patterns",
    "shown",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Number of symmetric, inverse and copied relations to list; --json lists all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(
    source: str,
    features: tuple[str, ...],
    skip_unknown: bool,
    loading: dict[str, Any],
    validation: Validation,
    shown: int,
    as_json: bool,
) -> None:
    """Check the knowledge graph SOURCE before trusting metrics measured on it.

    Shows sizes and degrees, views and broken features, entities and relations that train lacks,
    triples that splits share, and symmetric, inverse or copied relations that leak test triples;
    then lists the problems with advice. SOURCE is anything that `imvia-graph fit` takes.

    \b
    Examples:
      imvia-graph inspect countries
      imvia-graph inspect my-graph/ --patterns 50
      imvia-graph inspect DB15K --views image=visual.pth
      imvia-graph inspect export.csv --columns subject,predicate,object
      imvia-graph inspect DB15K --json | jq .validation
    """
    from imvia_graph.inspection import inspect_kg
    from imvia_graph.io import load_kg, with_views

    kg = load_kg(source, validation, **loading)
    if features:
        kg = with_views(kg, views_option(features), skip_unknown=skip_unknown)
    found = inspect_kg(kg)
    if as_json:
        click.echo(json_text(found))
        return
    console = Console(highlight=False)
    first = f"{found['name'] or source}: {found['entities']:,} entities, {found['relations']:,}"
    for line in (f"{first} relations", *found["notes"]):
        console.print(printable(line), markup=False)
    console.print(_triples_table(found))
    console.print(f"Validation: {_validation(found['validation'])}", markup=False)
    console.print(_degree_table(found))
    if found["views"]:
        console.print(_views_table(found["views"]))
    names = dict(zip(kg.relations, kg.relation_names, strict=True))
    patterns = _patterns_table(found["patterns"], names, shown)
    if patterns is not None:
        console.print(patterns)
    _print_warnings(console, found["warnings"])


def _triples_table(found: dict[str, Any]) -> Table:
    table = _table(
        "Triples",
        "",
        "triples",
        "distinct",
        "in train",
        "in test",
        "with unseen entity",
        "unseen heads, tails",
    )
    shared = found["shared"]
    others = {
        "train": ("", shared["train-test"]),
        "valid": (shared["train-valid"], shared["valid-test"]),
        "test": (shared["train-test"], ""),
    }
    for split, among in others.items():
        triples = found["triples"][split]
        unseen = found["unseen"].get(split, {"triples": "", "ends": ""})
        row = [triples["triples"], triples["distinct"], *among]
        table.add_row(split, *map(_cell, [*row, unseen["triples"], unseen["ends"]]))
    return table


def _validation(validation: dict[str, Any]) -> str:
    if validation["auto"] == "none":
        return f"{validation['why']}."
    return (
        f"of {validation['distinct']:,} distinct triples, {validation['in_train']:,} are in train,"
        f" {validation['in_test']:,} in test and {validation['held_out']:,} in neither;"
        f" {validation['why']} ({validation['auto']})."
    )


def _degree_table(found: dict[str, Any]) -> Table:
    table = _table("In train", "", "min", "median", "mean", "max", "zero")
    for what, values, zero in (
        ("triples per entity", found["degree"], "isolated"),
        ("triples per relation", found["relation_size"], "unseen"),
    ):
        row = (values[key] for key in ("min", "median", "mean", "max", zero))
        table.add_row(what, *map(_cell, row))
    return table


def _views_table(views: dict[str, Any]) -> Table:
    table = _table("Views", "", *map(cell, views))
    for key, what in VIEW_ROWS.items():
        table.add_row(what, *(_cell(values[key]) for values in views.values()))
    return table


def _patterns_table(patterns: dict[str, Any], names: dict[str, str], shown: int) -> Table | None:
    entries = [entry for sort in ("inverse", "copy", "symmetric") for entry in patterns[sort]]
    entries.sort(key=lambda entry: (-entry["test_answered"], -entry["pairs"]))
    if not entries or not shown:
        return None
    limits = patterns["thresholds"]
    more = f"; the first {shown} of {len(entries)}" if len(entries) > shown else ""
    table = _table(
        f"Relations that repeat each other (common pairs: at least {limits['threshold']:.0%} of"
        f' both, or for "near" {limits["near"]:.0%} of one{more})',
        "kind",
        "relations",
        "pairs",
        "share",
        "leaked test triples",
        left=2,
    )
    for entry in entries[:shown]:
        both = [cell(names[entry[key]]) for key in ("relation", "other") if key in entry]
        shares = [f"{entry[key]:.0%}" for key in ("share", "other_share") if key in entry]
        table.add_row(
            entry["kind"],
            "\nand ".join(both),
            _cell(entry["pairs"]),
            " / ".join(shares),
            _cell(entry["test_answered"]),
        )
    return table


def _print_warnings(console: Console, warnings: list[dict[str, str]]) -> None:
    if not warnings:
        console.print("No warnings.")
        return
    console.print(f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}:")
    table = Table.grid(padding=(0, 1))
    for warning in warnings:
        table.add_row("-", escape(printable(warning["text"])))
    console.print(table)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """Return a table whose first ``left`` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", overflow="fold")
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
