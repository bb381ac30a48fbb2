"""Callbacks that show training: a progress bar, and losses and metrics in TensorBoard.

Other trackers need no more than a `Callback` whose `on_epoch` receives the record of each epoch, as
in ``metrics.jsonl``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from imvia_graph.errors import IMVIAError
from imvia_graph.training import Callback, Trainer


class ProgressBar(Callback):
    """A progress bar with the loss and the last validation MRR; plain lines without a terminal.

    Parameters
    ----------
    console : rich.console.Console, optional
        The console to write to. Default: standard error.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> run = ig.fit("countries", epochs=1, dim=8, callbacks=[ig.ProgressBar()])
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True, highlight=False) if console is None else console
        # Notebooks are no terminals, but can show a bar.
        self.live = self.console.is_terminal or self.console.is_jupyter
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def on_start(self, trainer: Trainer) -> None:
        """Show the bar, with a unit per step."""
        steps = len(trainer.batches)
        self.task = self.progress.add_task(
            "Training",
            total=trainer.epochs * steps,
            completed=trainer.progress.epoch * steps + trainer.progress.batch,
            status="",
        )
        if self.live and trainer.shards.is_first:
            self.progress.start()

    def on_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        """Advance the bar, without reading the loss, for which the host would wait for the GPU."""
        self.progress.advance(self.task)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Show loss and validation MRR; without a terminal, print a line per tenth of training."""
        valid = record.get("valid")
        status = f"epoch {record['epoch']}/{trainer.epochs}  loss {record['loss']:.4g}"
        if valid:
            drawn = trainer.settings.ranking_candidates
            against = "" if drawn is None else f" against {drawn:,} drawn"
            status += f"  valid MRR{against} {100 * valid['mrr']:.2f} %"
        if trainer.progress.best_mrr is not None:
            status += (
                f"  best {100 * trainer.progress.best_mrr:.2f} % (epoch"
                f" {trainer.progress.best_epoch})"
            )
        self.progress.update(self.task, status=status)
        every = max(1, trainer.epochs // 10)
        prints = not self.live and trainer.shards.is_first
        if prints and (record["epoch"] % every == 0 or trainer.progress.ended):
            self.console.print(f"{status}  {record['seconds']:.1f} s", soft_wrap=True)

    def on_close(self, trainer: Trainer) -> None:
        """Remove the bar."""
        self.progress.stop()

    def on_end(self, trainer: Trainer) -> None:
        """Print why training ended."""
        if not trainer.shards.is_first:
            return
        self.progress.stop()
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
        skipped = f" {progress.skipped} steps were skipped." if progress.skipped else ""
        epochs = "1 epoch" if progress.epoch == 1 else f"{progress.epoch} epochs"
        self.console.print(
            f"Trained {epochs} in {progress.seconds:.0f} s: {reason}; {chosen}.{skipped}"
        )


class TensorBoard(Callback):
    """Writes the metrics of each epoch for TensorBoard.

    Parameters
    ----------
    folder : path
        The folder to write to; ``tensorboard --logdir FOLDER`` shows it. Training resumed with the
        same folder continues the curves.

    Raises
    ------
    IMVIAError
        TensorBoard is not installed.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = ig.fit("countries", epochs=1, dim=8, callbacks=[ig.TensorBoard(folder)])
    >>> len(list(folder.iterdir()))
    1
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise IMVIAError(
                f"TensorBoard is not installed ({error}): pip install 'imvia-graph[tensorboard]'."
            ) from error
        self._make = SummaryWriter
        self.folder = folder
        self.writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Continue after the last epoch done, hiding points of later epochs."""
        step = trainer.progress.epoch + 1
        self.writer = self._make(os.fspath(self.folder), purge_step=step)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Write each number of the record under its name: ``loss``, ``valid/mrr`` and so on."""
        for name, value in scalars(record):
            if name != "epoch":
                self.writer.add_scalar(name, value, record["epoch"])
        self.writer.flush()

    def on_close(self, trainer: Trainer) -> None:
        """Close the file."""
        if self.writer is not None:  # None if training failed before `on_start`
            self.writer.close()


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the path and value of each number of a nested record.

    >>> from imvia_graph.tracking import scalars
    >>> list(scalars({"loss": 2.0, "valid": {"mrr": 0.5}}))
    [('loss', 2.0), ('valid/mrr', 0.5)]
    """
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


__all__ = ["ProgressBar", "TensorBoard", "scalars"]
