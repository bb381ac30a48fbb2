"""The protocol of a row of the accuracy tables: training, selection of the epoch, and testing.

A model is trained on the train set, its epoch is selected on the validation set, and the test set
is ranked once, at the end, by the model of that epoch. During training and selection the test
triples are not a split of the graph. They are only among the known triples, which filter validation
ranks, as is customary.

DB15K cannot be validated as published, since most of its validation triples are in its train set.
Its epoch is selected on triples held out of train. Then a model is trained on the whole published
train set for that number of epochs, at the same learning rates, and ranks the test set.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import imvia_graph as ig
from imvia_graph.evaluation import rank, rank_metrics
from imvia_graph.io import with_validation
from imvia_graph.model import DECISION
from imvia_graph.training import Callback, Trainer

METRICS = ("mrr", "hits@1", "hits@3", "hits@10")
Row = dict[str, Any]


@dataclass
class Trained:
    """A model at its best validation epoch, or at its last epoch without validation triples."""

    model: Any
    #: Validation MRR of each epoch; None for an epoch without validation.
    curve: list[float | None]
    best_epoch: int


#: Trains on a graph. A number of epochs stops training after them without changing the schedule.
Method = Callable[[ig.MultiViewKG, int | None], Trained]


def run_row(
    kg: ig.MultiViewKG,
    method: Method,
    held_out: bool = False,
    split_seed: int = 0,
    selection: Row | None = None,
) -> Row:
    """Train and rank one row and return its results.

    Parameters
    ----------
    kg : MultiViewKG
        The graph with its published splits.
    method : callable
        Trains a model.
    held_out : bool
        Whether the epoch is selected on triples held out of train, as for DB15K.
    split_seed : int
        Seed of the held-out triples.
    selection : dict, optional
        With ``held_out``: a row whose number of epochs is used instead of selecting one.
    """
    started = time.perf_counter()
    known = kg.answers()
    if selection is None:
        validated = with_validation(kg, "held-out" if held_out else "published", split_seed)
        chosen = method(set_aside(validated, "test"), None)
        found: Row = {
            "curve": chosen.curve,
            "best_epoch": chosen.best_epoch,
            "valid": metrics(chosen.model, validated.valid, known),
        }
        model = chosen.model
    else:
        found = {key: selection[key] for key in ("curve", "best_epoch", "valid")}
    if held_out:
        model = method(set_aside(kg, "valid", "test"), found["best_epoch"]).model
    found["test"] = metrics(model, kg.test, known)
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def set_aside(kg: ig.MultiViewKG, *splits: Any) -> ig.MultiViewKG:
    """Return the graph without some splits, whose triples stay known and filter ranks."""
    known = torch.cat([kg.known, *(kg.triples(split) for split in splits)])
    return kg.replace(known=known, **{split: kg.train[:0] for split in splits})


def metrics(model: Any, triples: torch.Tensor, known: Any) -> dict[str, float]:
    """Return filtered metrics of both sides together, as fractions."""
    ranking = rank(model, triples, known, heads=())
    found = rank_metrics(torch.cat([ranking.head[DECISION], ranking.tail[DECISION]]))
    return {name: found[name] for name in METRICS}


# -- the library's model ---------------------------------------------------------------------------


def imvia(settings: ig.Settings, log: Callable[[str], None] = lambda line: None) -> Method:
    """Return a method that trains the library's model with these settings by `imvia_graph.fit`."""

    def method(kg: ig.MultiViewKG, epochs: int | None) -> Trained:
        watcher = _Watcher(epochs, log)
        run = ig.fit(kg, settings=settings, validation="published", callbacks=[watcher])
        return Trained(run.model, watcher.curve, run.progress.best_epoch)

    return method


class _Watcher(Callback):
    """Callback that records the validation curve and ends training after a number of epochs."""

    def __init__(self, epochs: int | None, log: Callable[[str], None]) -> None:
        self.epochs, self.log = epochs, log
        self.curve: list[float | None] = []

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        mrr = record.get("valid", {}).get("mrr")
        self.curve.append(mrr)
        self.log(epoch_line(record["epoch"], record["loss"], mrr))
        if record["epoch"] == self.epochs:
            # The schedule depends on the settings' number of epochs, which stays as it is.
            trainer.progress.ended = "epochs"


def epoch_line(epoch: int, loss: float, mrr: float | None) -> str:
    """Return one line of progress for an epoch."""
    return f"epoch {epoch}: loss {loss:.4g}" + ("" if mrr is None else f", MRR {100 * mrr:.2f} %")
