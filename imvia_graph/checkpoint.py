"""Run folders and checkpoints: save, load, resume.

A run folder, format version 1:

- ``run.json``: format, version, the graph's name, versions of what ran it;
- ``settings.yaml``: every setting;
- ``kg/``: the graph as it was trained on, splits included (see `MultiViewKG.save`);
- ``metrics.jsonl``: a line an epoch;
- ``best.safetensors``: the model of the best validation MRR; without validation, the last one;
- ``last.safetensors``: all that resuming needs - model, best model, optimizers, random states;
- ``test.json``: the final test metrics, where the command line trained.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imvia_graph import _files
from imvia_graph._version import __version__
from imvia_graph.errors import CheckpointError
from imvia_graph.kg import MultiViewKG
from imvia_graph.model import IMVIA
from imvia_graph.settings import Settings
from imvia_graph.training import Callback, Progress, Trainer

FORMAT, FORMAT_VERSION = "imvia-graph/run", 1
BEST, LAST, METRICS = "best.safetensors", "last.safetensors", "metrics.jsonl"


# -- the run folder -------------------------------------------------------------------------------


def start_run(folder: Path, kg: MultiViewKG, settings: Settings) -> None:
    """Make a run folder.

    Raises
    ------
    CheckpointError
        The folder holds something already; nothing in it is touched.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = "; --resume (resume=True) goes on with it" if is_run(folder) else ""
        raise CheckpointError(f"{folder} exists and is not empty{hint}. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    kg.save(folder / "kg")
    _files.write_text(folder / "settings.yaml", settings.to_yaml())
    versions = {
        "imvia-graph": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    _files.write_json(
        folder / "run.json",
        {"format": FORMAT, "version": FORMAT_VERSION, "kg": kg.name, "versions": versions},
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder."""
    return (folder / "run.json").is_file()


def open_run(folder: Path) -> tuple[MultiViewKG, Settings]:
    """The graph and the settings of a run folder."""
    if not is_run(folder):
        what = "holds no run (no run.json)" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{folder} {what}; expected a folder that `fit` wrote.")
    about = _files.read_json(folder / "run.json")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(f"{folder / 'run.json'}: not the description of a run.")
    if not isinstance(about.get("version"), int) or about["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: format version {about.get('version')!r} is newer than this library reads"
            f" ({FORMAT_VERSION}). Update imvia-graph."
        )
    settings = Settings.create(Settings.read(folder / "settings.yaml"))
    return MultiViewKG.load(folder / "kg"), settings


class RunFolder(Callback):
    """Writes metrics and checkpoints of a training into its run folder.

    Parameters
    ----------
    folder : Path
        Made by `start_run`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._best_epoch: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Drop the metrics of epochs that the checkpoint does not hold."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if _epoch_of(line) <= trainer.progress.epoch]
        _files.write_text(path, "".join(f"{line}\n" for line in kept))
        self._best_epoch = trainer.progress.best_epoch
        # The best model may have been found after the checkpoint that is gone on from.
        path = self.folder / BEST
        if trainer.best_state is not None and _best_epoch_of(path) != self._best_epoch:
            save_model(path, trainer.best_state, trainer.progress)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Append the metrics; write the best model where it is new, and what resuming needs."""
        progress, settings = trainer.progress, trainer.settings
        if trainer.best_state is not None and progress.best_epoch != self._best_epoch:
            save_model(self.folder / BEST, trainer.best_state, progress)
            self._best_epoch = progress.best_epoch
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if progress.ended or progress.epoch % settings.checkpoint_every == 0:
            save_trainer(self.folder / LAST, trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Without validation, the last epoch is the best there is."""
        if trainer.best_state is None:
            save_model(self.folder / BEST, trainer.model.state_dict(), trainer.progress)


def _epoch_of(line: str) -> float:
    """The epoch of a line of metrics; of a line cut short, one that no checkpoint holds."""
    try:
        return int(json.loads(line)["epoch"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return float("inf")


def _best_epoch_of(path: Path) -> int | None:
    """The epoch of a saved model; None where there is none, or none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return _progress(path, file.metadata() or {}).best_epoch
    except (SafetensorError, OSError, CheckpointError):
        return None


# -- checkpoints ----------------------------------------------------------------------------------


def save_model(path: Path, state: Mapping[str, Tensor], progress: Progress) -> None:
    """Write a model's state as safetensors; the metadata says of which epoch."""
    _files.write_tensors(path, dict(state), {"progress": json.dumps(asdict(progress))})


def load_model(path: Path, model: IMVIA) -> Progress:
    """Read a model's state into a model of the same settings."""
    tensors, metadata = _read(path)
    _load_state(path, model, tensors)
    return _progress(path, metadata)


def save_trainer(path: Path, trainer: Trainer) -> None:
    """Write all that resuming needs: the run goes on bit by bit as if it had not stopped."""
    tensors = {f"model/{name}": value for name, value in trainer.model.state_dict().items()}
    for name, value in (trainer.best_state or {}).items():
        tensors[f"best/{name}"] = value
    if trainer.average is not None:
        tensors.update({f"average/{name}": v for name, v in trainer.average.state.items()})
    plain: dict[str, Any] = {}
    for label, optimizer in _optimizers(trainer).items():
        state = optimizer.state_dict()
        plain[label] = state["param_groups"]
        for index, entries in state["state"].items():
            for name, value in entries.items():
                tensors[f"{label}/{index}/{name}"] = torch.as_tensor(value)
    tensors["random/data"] = trainer.batches.generator.get_state()
    tensors["random/cpu"] = torch.get_rng_state()
    if trainer.model.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(trainer.model.device)
    metadata = {
        "progress": json.dumps(asdict(trainer.progress)),
        "optimizers": json.dumps(plain),
        "scaler": json.dumps(trainer.scaler.state_dict()),
    }
    _files.write_tensors(path, tensors, metadata)


def load_trainer(path: Path, trainer: Trainer) -> None:
    """Read what `save_trainer` wrote into a trainer of the same graph and settings."""
    tensors, metadata = _read(path)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    _load_state(path, trainer.model, groups.get("model", {}))
    if "best" in groups:
        device = trainer.model.device
        trainer.best_state = {name: value.to(device) for name, value in groups["best"].items()}
    try:
        plain = json.loads(metadata["optimizers"])
        for label, optimizer in _optimizers(trainer).items():
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in groups.get(label, {}).items():
                index, _, key = name.partition("/")
                state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": state, "param_groups": plain[label]})
        if trainer.average is not None:
            for name, value in trainer.average.state.items():
                value.copy_(groups["average"][name])
        trainer.scaler.load_state_dict(json.loads(metadata["scaler"]))
        trainer.batches.generator.set_state(groups["random"]["data"])
        torch.set_rng_state(groups["random"]["cpu"])
        if "cuda" in groups["random"] and trainer.model.device.type == "cuda":
            torch.cuda.set_rng_state(groups["random"]["cuda"], trainer.model.device)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint does not fit this run ({error}). Was it made with other"
            " settings or another version?"
        ) from error
    trainer.progress = _progress(path, metadata)


def _optimizers(trainer: Trainer) -> dict[str, torch.optim.Optimizer]:
    found = {"optimizer": trainer.optimizer}
    if trainer.estimator_optimizer is not None:
        found["estimator"] = trainer.estimator_optimizer
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: the run has not come to its first checkpoint."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be cut short.") from error


def _progress(path: Path, metadata: Mapping[str, str]) -> Progress:
    try:
        return Progress(**json.loads(metadata["progress"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of imvia-graph ({error}).") from error


def _load_state(path: Path, model: IMVIA, state: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{path}: the checkpoint does not fit the model ({reason})."
        ) from error


__all__ = [
    "RunFolder",
    "is_run",
    "load_model",
    "load_trainer",
    "open_run",
    "save_model",
    "save_trainer",
    "start_run",
]
