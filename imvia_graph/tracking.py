"""What a training tells others: its losses and metrics in TensorBoard.

`Callback` is all that another tracker needs: `on_epoch` gets the record that ``metrics.jsonl``
holds of each epoch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from imvia_graph.errors import IMVIAError
from imvia_graph.training import Callback, Trainer


class TensorBoard(Callback):
    """Writes the metrics of each epoch for TensorBoard.

    Parameters
    ----------
    folder : path
        Where to write; ``tensorboard --logdir FOLDER`` shows it. A training that is resumed with
        the same folder goes on with the same curves.

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

    def on_start(self, trainer: Trainer) -> None:
        """Go on after the last epoch there is, hiding what was written of later ones."""
        step = trainer.progress.epoch + 1
        self.writer: Any = self._make(os.fspath(self.folder), purge_step=step)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Write each number under its name: ``loss``, ``valid/mrr`` and so on."""
        for name, value in scalars(record):
            if name != "epoch":
                self.writer.add_scalar(name, value, record["epoch"])
        self.writer.flush()

    def on_end(self, trainer: Trainer) -> None:
        """Close the file."""
        self.writer.close()


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested record with their paths.

    >>> from imvia_graph.tracking import scalars
    >>> list(scalars({"loss": 2.0, "valid": {"mrr": 0.5}}))
    [('loss', 2.0), ('valid/mrr', 0.5)]
    """
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


__all__ = ["TensorBoard", "scalars"]
