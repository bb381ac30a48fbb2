"""What people see in the terminal: progress of a training, tables of metrics."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from imvia_graph._display import printable, shown
from imvia_graph.training import Callback, Trainer

#: What goes on, on standard error; and what comes out of it, on standard output.
console = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def say(*lines: str) -> None:
    """Print lines to standard error as they are, but for what a terminal would obey."""
    console.print(printable("\n".join(lines)), markup=False, soft_wrap=True)


def cell(text: str) -> str:
    """A label or another text of the data as it goes into a table."""
    return escape(shown(text))


def json_text(value: Any) -> str:
    """One line of JSON; what a terminal would obey is escaped, all other text is as it is."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        text,
    )


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_terminal() -> None:
    """Have warnings of the library on standard error, as plain lines."""
    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(_Printable("%(message)s"))


COLUMNS = ("mrr", "mr", "hits@1", "hits@3", "hits@10", "hits@100")


class ProgressBar(Callback):
    """A progress bar with loss and the last validation MRR; plain lines without a terminal."""

    def __init__(self) -> None:
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.loss: Tensor | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar: a unit a step."""
        steps = len(trainer.batches)
        self.task = self.progress.add_task(
            "Training",
            total=trainer.epochs * steps,
            completed=trainer.progress.epoch * steps + trainer.progress.batch,
            status="",
        )
        if self.live:
            self.progress.start()

    def on_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        """Advance; the loss is read once an epoch, so that a GPU is not waited for."""
        self.loss = losses["loss"]
        self.progress.advance(self.task)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Show loss and validation MRR; without a terminal a line for every tenth of the way."""
        valid = record.get("valid")
        status = f"epoch {record['epoch']}/{trainer.epochs}  loss {record['loss']:.4g}"
        if valid:
            status += f"  valid MRR {100 * valid['mrr']:.2f} %"
        if trainer.progress.best_mrr is not None:
            status += (
                f"  best {100 * trainer.progress.best_mrr:.2f} % (epoch"
                f" {trainer.progress.best_epoch})"
            )
        self.progress.update(self.task, status=status)
        every = max(1, trainer.epochs // 10)
        if not self.live and (record["epoch"] % every == 0 or trainer.progress.ended):
            print(f"{status}  {record['seconds']:.1f} s", file=sys.stderr, flush=True)

    def on_stop(self, trainer: Trainer) -> None:
        """Take the bar away: a word about the stop follows."""
        self.close()

    def on_end(self, trainer: Trainer) -> None:
        """Say why training ended."""
        self.close()
        progress = trainer.progress
        reason = {
            "epochs": "all epochs are done",
            "patience": f"no better validation MRR for {progress.waited} validations",
        }[progress.ended]
        chosen = (
            f"the best epoch is {progress.best_epoch}"
            if progress.best_mrr is not None
            else "nothing was validated, the last epoch is kept"
        )
        left = f" {progress.skipped} steps were left out." if progress.skipped else ""
        console.print(
            f"Trained {progress.epoch} epochs in {progress.seconds:.0f} s: {reason}; {chosen}."
            f"{left}"
        )

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.live:
            self.progress.stop()


def metrics_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """Both sides, each side, and each head of the model, in per cent; of what, says the title."""
    table = Table(title=cell(f"{title}, against {metrics['candidates']}"), title_justify="left")
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        name = {"mrr": "MRR %", "mr": "MR"}.get(column, f"{column.replace('hits', 'H')} %")
        table.add_column(name, justify="right")
    rows = {"all": metrics["both"], "heads asked": metrics["head"], "tails asked": metrics["tail"]}
    if len(metrics["modalities"]) > 1:
        rows.update({f"{name} head": m for name, m in metrics["modalities"].items()})
    for name, row in rows.items():
        table.add_row(cell(name), *(_cell(column, row[column]) for column in COLUMNS))
    return table


def relations_table(metrics: Mapping[str, Any]) -> Table:
    """Both sides by relation, the most frequent first."""
    table = Table(title="By relation", title_justify="left")
    table.add_column("relation")
    table.add_column("triples", justify="right")
    for column in COLUMNS[:1] + COLUMNS[2:5]:
        name = {"mrr": "MRR %"}.get(column, f"{column.capitalize()} %")
        table.add_column(name, justify="right")
    rows = sorted(metrics["relations"].items(), key=lambda item: -item[1]["triples"])
    for label, row in rows:
        cells = (_cell(column, row[column]) for column in COLUMNS[:1] + COLUMNS[2:5])
        table.add_row(cell(label), str(row["triples"]), *cells)
    return table


def _cell(column: str, value: float) -> str:
    return f"{value:.1f}" if column == "mr" else f"{100 * value:.2f}"
