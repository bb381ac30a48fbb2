"""Terminal output: messages, progress bars, tables of metrics."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from imvia_graph._display import printable, shown

#: Progress and messages go to standard error, results to standard output.
console = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def say(*lines: str) -> None:
    """Print lines to standard error, without markup, control characters made visible."""
    console.print(printable("\n".join(lines)), markup=False, soft_wrap=True)


def cell(text: str) -> str:
    """Return a label or another text of the data, escaped for a table cell."""
    return escape(shown(text))


def json_text(value: Any) -> str:
    """Return one line of JSON, escaping only the characters that a terminal would obey."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        text,
    )


class Bar:
    """Progress bars with the remaining time, one per task; silent without a terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}

    def show(self, task: str, done: int, total: int) -> None:
        """Update the bar of a task, which the first call adds."""
        if task not in self.tasks:
            if not self.tasks:
                self.progress.start()
            self.tasks[task] = self.progress.add_task(shown(task), total=total)
        self.progress.update(self.tasks[task], completed=done)

    def close(self) -> None:
        """Stop drawing the bars."""
        if not self.progress.disable:  # else rich prints an empty line
            self.progress.stop()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_terminal() -> None:
    """Print the library's warnings to standard error as plain lines."""
    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(_Printable("%(message)s"))


COLUMNS = ("mrr", "mr", "hits@1", "hits@3", "hits@10", "hits@100")


def metrics_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """Return the metrics of both sides, each side and each of the model's heads, in per cent."""
    table = Table(title=cell(f"{title}, against {metrics['candidates']}"), title_justify="left")
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(heading(column), justify="right")
    rows = {
        "all": metrics["both"],
        "predict heads": metrics["head"],
        "predict tails": metrics["tail"],
    }
    if len(metrics["heads"]) > 1:
        rows.update({f"{name} head": m for name, m in metrics["heads"].items()})
    for name, row in rows.items():
        table.add_row(cell(name), *(value_text(column, row[column]) for column in COLUMNS))
    return table


def relations_table(metrics: Mapping[str, Any], names: Mapping[str, str]) -> Table:
    """Return the metrics of both sides per relation, the most frequent relation first.

    ``names`` maps the labels of the relations to their display names.
    """
    table = Table(title="By relation", title_justify="left")
    table.add_column("relation")
    table.add_column("triples", justify="right")
    for column in COLUMNS[:1] + COLUMNS[2:5]:
        table.add_column(heading(column), justify="right")
    rows = sorted(metrics["relations"].items(), key=lambda item: -item[1]["triples"])
    for label, row in rows:
        cells = (value_text(column, row[column]) for column in COLUMNS[:1] + COLUMNS[2:5])
        table.add_row(cell(names[label]), str(row["triples"]), *cells)
    return table


def heading(column: str) -> str:
    """Return the heading of a metric's column."""
    return {"mrr": "MRR %", "mr": "MR"}.get(column, f"{column.replace('hits', 'H')} %")


def value_text(column: str, value: float) -> str:
    """Return a metric as its column shows it: in per cent, except the mean rank."""
    return f"{value:.1f}" if column == "mr" else f"{100 * value:.2f}"
