"""``imvia-graph compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imvia_graph._display import shown
from imvia_graph.cli.display import Bar, heading, json_text, results, value_text
from imvia_graph.cli.options import NamedFile, device_option, split_option
from imvia_graph.cli.tables import FRAMES, TEXTS, check_suffix, write_frame, write_text

if TYPE_CHECKING:
    import polars as pl

#: Metrics of the printed table; files with all digits have every metric.
COLUMNS = ("mrr", "hits@1", "hits@3", "hits@10")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]RUN...")
@split_option
@click.option(
    "--out",
    type=NamedFile(),
    help="Also write the table to this file: .tex and .md as printed, .csv, .tsv and .parquet with"
    " all digits.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing file of --out.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of rows (fractions).")
@device_option
def compare(
    runs: tuple[str, ...], split: str, out: Path | None, force: bool, as_json: bool, device: str
) -> None:
    """Compare the trained runs in the folders RUN in one table.

    Runs with the same NAME make a row of means and standard deviations; without names, runs do
    whose settings differ in the seed alone. The last column is the difference in MRR to the first
    row, with its 95 % confidence interval over the triples. All runs must have been trained on the
    same graph. The command ranks the triples with each run, as `imvia-graph evaluate` does.

    \b
    Examples:
      imvia-graph compare runs/seed-0 runs/seed-1 runs/wide-0 runs/wide-1
      imvia-graph compare all=runs/a0 all=runs/a1 text=runs/t0 text=runs/t1 --out table.tex
      imvia-graph compare runs/* --split valid
    """
    from imvia_graph.comparison import compare
    from imvia_graph.export import check_free

    if out is not None:
        check_suffix("--out", out, [*TEXTS, *FRAMES])
        check_free(out, force)
    groups = _by_name(runs)
    with Bar() as bar:
        frame = compare(
            groups or list(runs),
            split,
            device=device,
            on_batch=lambda name, done, total: bar.show(f"{Path(name).name}: queries", done, total),
        )
    columns, rows = _cells(frame)
    if out is not None:
        if out.suffix.lower() in TEXTS:
            write_text(columns, rows, out)
        else:
            write_frame(frame, out)
    if as_json:
        click.echo(json_text(frame.to_dicts()))
        return
    _print(f"{split}, filtered", columns, rows)
    for row in frame.iter_rows(named=True):
        if row["settings"]:
            line = f"{shown(row['name'])}: {shown(row['settings'], 10_000)}"
            results.print(line, markup=False, soft_wrap=True)


def _by_name(runs: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the folders by name; empty if no run has one."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        name, equals, folder = run.partition("=")
        if equals and not Path(run).exists():
            groups.setdefault(name.strip(), []).append(folder)
    if groups and sum(map(len, groups.values())) < len(runs):
        unnamed = next(run for run in runs if "=" not in run or Path(run).exists())
        raise click.UsageError(f"Give a name to each run or to none: {unnamed} has none.")
    for name, folders in groups.items():
        for folder in folders:
            if not name or not folder:
                raise click.UsageError(f"{name}={folder}: expected NAME=RUN, a name and a folder.")
    return groups


def _cells(frame: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells: means, with standard deviations where there are several runs."""
    columns = ["", "runs", *map(heading, COLUMNS)]
    compared = frame.height > 1
    if compared:
        columns.append("ΔMRR (95 %)")
    rows = []
    for row in frame.to_dicts():
        cells = [shown(row["name"]), str(row["runs"])]
        cells += [_spread(column, row) for column in COLUMNS]
        if compared:
            cells.append(_difference(row))
        rows.append(cells)
    return columns, rows


def _spread(column: str, row: dict[str, Any]) -> str:
    mean, deviation = row[column], row[f"{column}_std"]
    text = value_text(column, mean)
    return text if deviation is None else f"{text} ± {value_text(column, deviation)}"


def _difference(row: dict[str, Any]) -> str:
    difference, interval = row["difference"], row["interval"]
    if difference is None:
        return ""
    text = f"{100 * difference:+.2f}"
    return text if interval is None else f"{text} ± {100 * interval:.2f}"


def _print(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(escape, row))
    results.print(table)
