"""Run folders and checkpoints: save, load, resume.

A run folder, format version 5:

- ``run.json``: format, version, the graph's name, and the versions of imvia-graph, torch and
  Python; if torchrun started the command line, also the `job`, by which restarted processes
  recognise their own run;
- ``settings.yaml``: every setting;
- ``kg/``: the graph that was trained on, splits included (see `MultiViewKG.save`);
- ``metrics.jsonl``: a line per epoch;
- ``best.safetensors``: the model of the best validation MRR; without validation, the last one;
- ``last.safetensors``: all that resuming needs: model, best model, optimizers, random states, and
  within an epoch its position, order and sums of losses;
- ``previous.safetensors``: the previous ``last.safetensors``;
- ``.lock``: locked while a process trains here;
- ``test.json``: the test metrics of ``best.safetensors``, if the command line trained.

Every file is written to a temporary file, flushed to disk and renamed, so that readers, also after
a crash, find either the old or the new content. The metadata of the safetensors files hold a
SHA-256 of their content. If ``last.safetensors`` is damaged, training resumes from
``previous.safetensors``; if ``best.safetensors`` is, the best model is read from the checkpoint.

Version 1 had no checksums, no ``previous.safetensors``, and no position within an epoch. Up to
version 2, relations had no block-diagonal matrices, and layers and tables shared one optimizer; up
to version 3 there was no ComplEx head; up to version 4 views were not rescaled (`scale_views`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imvia_graph import _files
from imvia_graph._version import __version__
from imvia_graph.distributed import Shards, job
from imvia_graph.errors import CheckpointError, DataError, IMVIAError, StorageError
from imvia_graph.kg import MultiViewKG
from imvia_graph.model import IMVIA, state_shapes
from imvia_graph.optimizers import plain_groups
from imvia_graph.settings import Settings
from imvia_graph.training import Callback, Progress, Trainer

logger = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "imvia-graph/run", 5
#: By format version: former values of settings that folders of older versions do not name.
_BEFORE: dict[int, dict[str, Any]] = {
    3: {"relation_residual": False, "table_optimizer": "same"},
    4: {"complex_head": False},
    5: {"scale_views": False},
}
BEST, LAST, METRICS = "best.safetensors", "last.safetensors", "metrics.jsonl"
TEST = "test.json"
#: The checkpoint before the last one, and the lock file of the training process.
PREVIOUS, LOCK = "previous.safetensors", ".lock"
#: Files of a run folder; the graph is in a folder of its own.
_OWN_FILES = (BEST, LAST, PREVIOUS, METRICS, TEST, LOCK, "run.json", "settings.yaml")
#: Key of the checksum in the metadata of a file.
CHECKSUM = "sha256"


# -- the run folder -------------------------------------------------------------------------------


def check_free(folder: Path) -> None:
    """Refuse a folder that a new run cannot be written to.

    A folder with a lock file but no ``run.json`` is accepted: a process was killed while it started
    a run there.

    Raises
    ------
    CheckpointError
        The folder is not empty; nothing in it is changed.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder to write. Choose another.")
    if not (folder / LOCK).is_file() or is_run(folder):
        hint = "; --resume (resume=True) resumes its run" if is_resumable(folder) else ""
        raise CheckpointError(f"{folder} exists and is not empty{hint}. Choose another folder.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder in this context; create the folder if it does not exist.

    The operating system releases the lock when its process ends, however it ends.

    Raises
    ------
    CheckpointError
        Another process is training there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{folder}: another process is training there. Wait for it to end, or choose another"
            " folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def start_run(folder: Path, kg: MultiViewKG, settings: Settings) -> None:
    """Create a run folder; call this with the folder `locked`.

    Raises
    ------
    CheckpointError
        The folder is not empty; nothing in it is changed.
    """
    check_free(folder)
    _write_graph(folder, kg, settings)
    about, name = _about(kg), job()
    _files.write_json(folder / "run.json", about if name is None else {**about, "job": name})


def _write_graph(folder: Path, kg: MultiViewKG, settings: Settings) -> None:
    shutil.rmtree(folder / "kg", ignore_errors=True)  # left by a killed process
    kg.save(folder / "kg", may_link=True)
    _files.write_text(folder / "settings.yaml", settings.to_yaml())


def _about(kg: MultiViewKG) -> dict[str, Any]:
    versions = {
        "imvia-graph": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {"format": FORMAT, "version": FORMAT_VERSION, "kg": kg.name, "versions": versions}


def save_run(
    folder: Path,
    kg: MultiViewKG,
    settings: Settings,
    model: IMVIA,
    progress: Progress,
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Create a run folder for a trained model; with several processes, all call this.

    Raises
    ------
    CheckpointError
        The folder is not empty, and nothing in it is changed; or another process has its lock.
    """
    shards = model.shards
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            check_free(folder)
            stack.enter_context(locked(folder))
            _write_graph(folder, kg, settings)
            lines = (json.dumps(record, ensure_ascii=False) for record in history)
            _files.write_text(folder / METRICS, "".join(f"{line}\n" for line in lines))

        def finish() -> None:  # last, so that every folder with a run.json has a model
            _files.write_json(folder / "run.json", {**_about(kg), "resumable": False})

        state, split = model.state_dict(), split_names(model)
        shards.first_does(begin)
        shards.all_do(lambda: save_model(folder / BEST, state, progress, shards, split))
        shards.first_does(finish)


def is_resumable(folder: Path) -> bool:
    """Return whether a folder holds a run that can be resumed, by its ``run.json``."""
    about = _read_about(folder)
    return about is not None and about.get("resumable") is not False


def is_of_job(folder: Path, name: str | None) -> bool:
    """Return whether processes of the `job` of that name created a run folder."""
    about = _read_about(folder)
    return about is not None and name is not None and about.get("job") == name


def _read_about(folder: Path) -> dict[str, Any] | None:
    """Read a folder's ``run.json``; None if it cannot be read."""
    try:
        about = _files.read_json(folder / "run.json")
    except (OSError, DataError):
        return None
    return about if isinstance(about, dict) else None


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder."""
    return (folder / "run.json").is_file()


def check_run(folder: Path) -> None:
    """Raise a CheckpointError if a folder is no run folder."""
    if not is_run(folder):
        what = "holds no run (no run.json)" if folder.is_dir() else "does not exist"
        if folder.is_file():
            what = "is a file"
        raise CheckpointError(f"{folder} {what}; expected a folder that `fit` wrote.")


def open_run(folder: Path) -> tuple[MultiViewKG, Settings]:
    """Read the graph and the settings of a run folder.

    Raises
    ------
    CheckpointError
        The folder is not a run folder, or is of a newer format version.
    """
    check_run(folder)
    about = _files.read_json(_files.inside(folder, "run.json"))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / 'run.json'}: expected the description of a run ({FORMAT!r})."
        )
    version = _files.checked_version(
        folder / "run.json", about.get("version"), FORMAT_VERSION, CheckpointError
    )
    older = [settings for since, settings in _BEFORE.items() if version < since]
    settings = Settings.create(*older, Settings.read(_files.inside(folder, "settings.yaml")))
    return MultiViewKG.load(_files.inside(folder, "kg")), settings


def upgrade(folder: Path, settings: Settings) -> None:
    """Upgrade the format version of a run folder before training resumes in it.

    ``settings`` must come from `open_run`, which fills in the former values of settings that an
    older folder does not name.
    """
    about = _files.read_json(folder / "run.json")
    if about["version"] < FORMAT_VERSION:
        _files.write_text(folder / "settings.yaml", settings.to_yaml())
        _files.write_json(folder / "run.json", {**about, "version": FORMAT_VERSION})


def run_of(path: Path) -> Path | None:
    """Return the run folder that contains a path, links followed; None if there is none."""
    whole = path.resolve()
    for folder in whole.parents:
        first, *deeper = whole.relative_to(folder).parts
        if is_run(folder) and (first == "kg" if deeper else first in {"kg", *_OWN_FILES}):
            return folder
    return None


class RunFolder(Callback):
    """Writes the metrics and checkpoints of a training into its run folder.

    Parameters
    ----------
    folder : Path
        A folder from `start_run`.
    shards : Shards, optional
        With several processes, each has this callback, and the first one writes.
    """

    def __init__(self, folder: Path, shards: Shards | None = None) -> None:
        self.folder = folder
        self.shards = Shards(0) if shards is None else shards
        self._best_epoch: int | None = None
        self._lines: list[str] = []
        self._made = _when_made(folder)

    def on_start(self, trainer: Trainer) -> None:
        """Remove unfinished files of a killed process, and metrics of later epochs."""
        self._check_there()
        self.shards.first_does(self._remove_unfinished)
        lines = read_metrics(self.folder)
        self._lines = [line for line in lines if _epoch_of(line) <= trainer.progress.epoch]
        self._write(trainer, self._write_metrics)
        self._best_epoch = trainer.progress.best_epoch
        # The file may hold a best model found after the checkpoint that training resumes from.
        path = self.folder / BEST
        if trainer.best_state is not None:
            saved = _best_epoch_of(path) if self.shards.is_first else None
            if self.shards.first_tells(saved) != self._best_epoch:
                self._write_best(trainer)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Append the metrics, write the best model if it is new, and write a checkpoint if due."""
        progress, settings = trainer.progress, trainer.settings
        self._check_views(trainer)
        if trainer.best_state is not None and progress.best_epoch != self._best_epoch:
            self._write_best(trainer)
        self._lines.append(json.dumps(record, ensure_ascii=False))
        self._write(trainer, self._write_metrics)
        if progress.ended or progress.epoch % settings.checkpoint_every == 0:
            self._write(trainer, lambda: save_trainer(self.folder / LAST, trainer))

    def on_stop(self, trainer: Trainer) -> None:
        """Write a checkpoint within the epoch."""
        self._check_views(trainer)
        self._write(trainer, lambda: save_trainer(self.folder / LAST, trainer))

    def on_end(self, trainer: Trainer) -> None:
        """Without validation, write the last epoch's model as the best."""
        if trainer.best_state is None:
            self._write_best(trainer)

    def _write_best(self, trainer: Trainer) -> None:
        best = trainer.best_state
        state = trainer.model.state_dict() if best is None else best
        path = self.folder / BEST
        split = split_names(trainer.model)
        self._check_there()
        # The test metrics are of the best model until now.
        self.shards.first_does(lambda: (self.folder / TEST).unlink(missing_ok=True))
        if self._write(
            trainer, lambda: save_model(path, state, trainer.progress, self.shards, split)
        ):
            self._best_epoch = trainer.progress.best_epoch
            if best is not None and self.shards.alone and _MAY_REPLACE_MAPPED:
                trainer.best_state = _mapped(path)

    def _remove_unfinished(self) -> None:
        for name in (BEST, LAST, METRICS, "run.json", "settings.yaml", TEST):
            _files.remove_unfinished(self.folder / name)

    def _write_metrics(self) -> None:
        if self.shards.is_first:
            _files.write_text(self.folder / METRICS, "".join(f"{line}\n" for line in self._lines))

    def _write(self, trainer: Trainer, write: Callable[[], None]) -> bool:
        """Write a file; return False if the disk is full and ``disk_full`` is ``continue``."""
        self._check_there()
        problem: Exception | None = None
        try:
            write()
        except (IMVIAError, OSError) as error:
            problem = error
        # An error of the first process is raised in all.
        message, is_full = self.shards.first_tells(
            [None if problem is None else str(problem), isinstance(problem, StorageError)]
        )
        if message is None:
            if problem is not None:
                raise problem
            return True
        if not is_full:
            raise problem or CheckpointError(message)
        if trainer.settings.disk_full == "stop":
            raise problem or StorageError(message)
        if self.shards.is_first:
            logger.warning("%s Training continues and will write the next checkpoint.", message)
        return False

    def _check_there(self) -> None:
        """Stop training if the folder was moved, deleted or replaced."""
        gone = None
        if self.shards.is_first and (self._made is None or _when_made(self.folder) != self._made):
            gone = (
                f"The run folder {self.folder} is gone: it was moved, deleted or replaced during"
                " training. If it was moved, its last checkpoint can be resumed at its new place."
            )
        message = self.shards.first_tells(gone)
        if message is not None:
            raise StorageError(message)

    def _check_views(self, trainer: Trainer) -> None:
        """Stop training if something wrote into a memory-mapped file of features."""
        changed = None
        for modality, (feat, _) in trainer.model.views.items() if self.shards.is_first else ():
            path = trainer.kg.written_into(modality)
            # Features that the model has copied are unaffected.
            if path and feat.data_ptr() == trainer.kg.views(modality)[0].data_ptr():
                changed = (
                    f"{path} has changed during training: something wrote into that file instead of"
                    f" replacing it. The last checkpoint in {self.folder} was written before, and"
                    " can be resumed if the graph in that folder is unchanged."
                )
        message = self.shards.first_tells(changed)
        if message is not None:
            raise DataError(message)


def _when_made(folder: Path) -> int | None:
    """Return when a run folder was created or upgraded, in seconds; None if there is none.

    Unlike the inode number, this does not change on any file system while the folder exists.
    """
    try:
        return int((folder / "run.json").stat().st_mtime)
    except OSError:
        return None


#: Whether a memory-mapped file can be replaced; the mapping then keeps the old content.
_MAY_REPLACE_MAPPED = os.name == "posix"


def _mapped(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_metrics(folder: Path) -> list[str]:
    """Read the lines of ``metrics.jsonl``."""
    path = _files.inside(folder, METRICS)
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Read the records of the epochs, without truncated lines of ``metrics.jsonl``."""
    found = []
    for line in read_metrics(folder):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [record for record in found if isinstance(record, dict) and "epoch" in record]


def _epoch_of(line: str) -> float:
    """Return the epoch of a line of metrics; infinity for a truncated line."""
    try:
        return int(json.loads(line)["epoch"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return float("inf")


def _best_epoch_of(path: Path) -> int | None:
    """Return the epoch of a saved model; None if there is none, or it is damaged."""
    try:
        return _progress(path, _read(path)[1]).best_epoch
    except CheckpointError:
        return None


# -- checkpoints ----------------------------------------------------------------------------------


class DamagedError(CheckpointError):
    """A checkpoint that is truncated, altered or missing."""


def split_names(model: IMVIA) -> set[str]:
    """Return the names, in a model's state_dict, of the tensors split over processes."""
    tables = {id(table.weight) for table in model.entity_tables}
    return {name for name, value in model.named_parameters() if id(value) in tables}


def save_model(
    path: Path,
    state: Mapping[str, Tensor],
    progress: Progress,
    shards: Shards | None = None,
    split: Set[str] = frozenset(),
) -> None:
    """Write a model's state as safetensors, with ``progress`` in the metadata.

    With several processes, all call this, each with its rows of the tensors named in ``split``.
    """
    _write(path, state, {"progress": json.dumps(asdict(progress))}, None, shards, split)


def load_model(path: Path, model: IMVIA) -> Progress:
    """Read a saved state into a model of the same settings; return its progress."""
    tensors, metadata = _read(path)
    _load_state(path, model, _own_rows(tensors, split_names(model), model.shards))
    return _progress(path, metadata)


def fitting_model(
    folder: Path,
    kg: MultiViewKG,
    settings: Settings,
    names: Sequence[str] = (LAST, PREVIOUS),
    shards: Shards | None = None,
) -> IMVIA:
    """Create the model of a run folder after comparing its shapes with the checkpoint's.

    Altered settings thus cannot allocate more memory than the checkpoint takes. The shapes are read
    from the first of the files ``names`` that can be read.

    Raises
    ------
    CheckpointError
        The checkpoint has tensors of other shapes.
    """
    expected = state_shapes(kg, settings)
    for name in names:
        path = _files.inside(folder, name)
        shapes = _shapes(path, "" if name == BEST else "model/")
        if shapes is None:
            continue
        for key, shape in expected.items():
            if shapes.get(key) != shape:
                raise CheckpointError(
                    f"{path}: the checkpoint does not fit the model ({key}: expected"
                    f" {shape}, found {shapes.get(key)})."
                )
        break
    return IMVIA.from_kg(kg, settings, shards)


def _shapes(path: Path, prefix: str) -> dict[str, list[int]] | None:
    """Read the shapes of the tensors under a prefix from the header; None if that fails."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name[len(prefix) :]: file.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError):
        return None


def load_best(folder: Path, model: IMVIA) -> Progress:
    """Read the best model of a run folder; return the progress of the whole training.

    If its file is damaged or does not exist yet, the best model of the last checkpoint is read.
    """
    path = _files.inside(folder, BEST)
    try:
        return _whole_progress(folder, load_model(path, model))
    except DamagedError as error:
        damage = error
    for name in (LAST, PREVIOUS):
        checkpoint = _files.inside(folder, name)
        try:
            tensors, metadata = _read(checkpoint)
        except DamagedError:
            continue
        groups = _grouped(tensors)
        state = groups.get("best") or {**groups.get("model", {}), **groups.get("average", {})}
        _load_state(checkpoint, model, _own_rows(state, split_names(model), model.shards))
        if path.exists():
            logger.warning("%s The best model in %s is used instead.", damage, checkpoint)
        return _progress(checkpoint, metadata)
    raise damage


def _whole_progress(folder: Path, best: Progress) -> Progress:
    """Return the progress of the last checkpoint, with the best epoch and MRR of ``best``."""
    for name in (LAST, PREVIOUS):
        path = _files.inside(folder, name)
        try:
            with safe_open(path, framework="pt") as file:
                last = _progress(path, file.metadata() or {})
        except (SafetensorError, OSError, ValueError, RuntimeError, CheckpointError):
            continue
        if last.step < best.step:  # the best model is newer than the checkpoint
            return best
        return replace(last, best_epoch=best.best_epoch, best_mrr=best.best_mrr)
    return best


def save_trainer(path: Path, trainer: Trainer) -> None:
    """Write all that is needed to resume a run bit for bit as if it had not stopped.

    The existing checkpoint is kept as ``previous.safetensors``. With several processes, all call
    this; the file does not depend on their number.
    """
    split = split_names(trainer.model)
    split = {f"{group}/{name}" for group in ("model", "best", "average") for name in split}
    tables = {id(table.weight) for table in trainer.model.entity_tables}
    tensors = {f"model/{name}": value for name, value in trainer.model.state_dict().items()}
    for name, value in (trainer.best_state or {}).items():
        # A copy where the best state is the model's own: safetensors files hold no shared memory.
        shared = value.data_ptr() == tensors[f"model/{name}"].data_ptr()
        tensors[f"best/{name}"] = value.clone() if shared else value
    if trainer.average is not None:
        tensors.update({f"average/{name}": v for name, v in trainer.average.state.items()})
    plain: dict[str, Any] = {}
    for label, optimizer in _optimizers(trainer).items():
        state = optimizer.state_dict()
        plain[label] = plain_groups(optimizer)
        followed = [p for group in optimizer.param_groups for p in group["params"]]
        for index, entries in state["state"].items():
            for name, value in entries.items():
                tensors[f"{label}/{index}/{name}"] = torch.as_tensor(value)
                if id(followed[index]) in tables and torch.as_tensor(value).dim():
                    split.add(f"{label}/{index}/{name}")
    tensors["random/data"] = trainer.batches.generator.get_state()
    if trainer.progress.batch:
        tensors["random/order"] = trainer.batches.order_state
        # Clones: the sums may be views of one tensor, and safetensors files hold no shared memory.
        tensors.update({f"sums/{name}": value.clone() for name, value in trainer.sums.items()})
    tensors["random/cpu"] = torch.get_rng_state()
    if trainer.model.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(trainer.model.device)
    metadata = {
        "progress": json.dumps(asdict(trainer.progress)),
        "optimizers": json.dumps(plain),
        "scaler": json.dumps(trainer.scaler.state_dict()),
    }
    _write(path, tensors, metadata, path.with_name(PREVIOUS), trainer.shards, split)


def load_last(folder: Path, trainer: Trainer) -> None:
    """Read the last checkpoint of a run folder into a trainer; call this with it `locked`.

    If the checkpoint is damaged, the one before it is read; if there is none yet, the trainer is
    unchanged, and the run starts again.

    Raises
    ------
    CheckpointError
        All checkpoints are damaged, or the checkpoint does not fit the trainer.
    """
    last, previous = (_files.inside(folder, name) for name in (LAST, PREVIOUS))
    if not last.is_file() and not previous.is_file():
        if not is_resumable(folder):
            raise CheckpointError(
                f"{folder} holds a model that was saved after training, without the state that"
                " resuming needs. To be able to resume, train with a run folder: fit(..., out=...)."
            )
        return
    first = trainer.shards.is_first
    try:
        load_trainer(last, trainer)
        trainer.shards.wait()
    except DamagedError as error:
        if not previous.is_file():
            raise
        load_trainer(previous, trainer)
        trainer.shards.wait()
        if not first:
            return
        logger.warning(
            "%s Training resumes from the checkpoint before it, after epoch %d.",
            error,
            trainer.progress.epoch,
        )
        # Else the next checkpoint would replace this one by the damaged one.
        previous.replace(last)


def load_trainer(path: Path, trainer: Trainer) -> None:
    """Read a file of `save_trainer` into a trainer of the same graph and settings."""
    tensors, metadata = _read(path)
    groups = _grouped(tensors)
    progress = _progress(path, metadata)
    shards, split = trainer.shards, split_names(trainer.model)
    for group in ("model", "best", "average"):
        if group in groups:
            groups[group] = _own_rows(groups[group], split, shards)
    _load_state(path, trainer.model, groups.get("model", {}))
    if "best" in groups:
        trainer.best_state = groups["best"]  # stays memory-mapped until the end of training
    tables = {id(table.weight) for table in trainer.model.entity_tables}
    trainer.recorded = None  # recorded steps use the tensors that are replaced here
    try:
        plain = json.loads(metadata["optimizers"])
        for label, optimizer in _optimizers(trainer).items():
            state: dict[int, dict[str, Tensor]] = {}
            followed = [p for group in optimizer.param_groups for p in group["params"]]
            for name, value in groups.get(label, {}).items():
                index, _, key = name.partition("/")
                if id(followed[int(index)]) in tables and value.dim() and not shards.alone:
                    value = value[shards.start : shards.stop].clone()
                state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": state, "param_groups": plain[label]})
        if trainer.average is not None:
            for name, value in trainer.average.state.items():
                value.copy_(groups["average"][name])
        trainer.scaler.load_state_dict(json.loads(metadata["scaler"]))
        trainer.batches.generator.set_state(groups["random"]["data"])
        if progress.batch:
            trainer.batches.order_state = groups["random"]["order"]
            device = trainer.model.device
            trainer.sums = {name: value.to(device) for name, value in groups["sums"].items()}
        torch.set_rng_state(groups["random"]["cpu"])
        if "cuda" in groups["random"] and trainer.model.device.type == "cuda":
            torch.cuda.set_rng_state(groups["random"]["cuda"], trainer.model.device)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the checkpoint does not fit this run ({error}). Was it made with other"
            " settings or another version?"
        ) from error
    trainer.progress = progress


def _optimizers(trainer: Trainer) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by the names of their tensors in checkpoints."""
    every = {
        "optimizer": trainer.optimizer,
        "tables": trainer.table_optimizer,
        "rows": trainer.row_optimizer,
        "estimator": trainer.estimator_optimizer,
    }
    return {label: optimizer for label, optimizer in every.items() if optimizer is not None}


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the prefix of their names, up to the first slash."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    return groups


def _write(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    previous: Path | None = None,
    shards: Shards | None = None,
    split: Set[str] = frozenset(),
) -> None:
    """Write tensors with a checksum; the first process writes, and receives rows of the others."""
    if shards is None or shards.alone:
        checked = {**metadata, CHECKSUM: _files.digest(tensors, metadata)}
        _files.write_tensors(path, tensors, checked, previous)
        return
    # Tables are sent and received in the order of the file.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    tables = [name for name in order if name in split]
    if not shards.is_first:
        for name in tables:
            shards.send_rows(tensors[name])
        return
    received = {name: shards.receive_rows(tensors[name]) for name in tables}

    def parts(name: str) -> Iterator[Tensor]:
        return received[name] if name in split else iter([tensors[name]])

    shapes = {
        name: (
            value.dtype,
            (shards.num_entities, *value.shape[1:]) if name in split else tuple(value.shape),
        )
        for name, value in tensors.items()
    }
    try:
        _files.write_tensor_parts(path, shapes, parts, metadata, CHECKSUM, previous)
    finally:
        # If writing failed, receive the rest: the other processes send in any case.
        for rows in received.values():
            for _ in rows:
                pass


def _own_rows(state: Mapping[str, Tensor], split: Set[str], shards: Shards) -> dict[str, Tensor]:
    """Return a state with only this process's rows of the tensors in ``split``."""
    if shards.alone:
        return dict(state)
    return {
        name: value[shards.start : shards.stop].clone() if name in split else value
        for name, value in state.items()
    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise DamagedError(f"{path} does not exist: the run has not reached its first checkpoint.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{path} cannot be read ({error}); it may be truncated.") from error
    # Files of the first format version have no checksum.
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _files.digest(tensors, metadata):
        raise DamagedError(f"{path} is damaged: its content does not match its checksum.")
    return tensors, metadata


def _progress(path: Path, metadata: Mapping[str, str]) -> Progress:
    try:
        progress = Progress(**json.loads(metadata["progress"]))
        plain = asdict(progress)
        for name, default in asdict(Progress(best_mrr=0.0)).items():
            kind = (int, float) if isinstance(default, float) else type(default)
            if not isinstance(plain[name], kind) and (name, plain[name]) != ("best_mrr", None):
                raise ValueError(f"{name} is {plain[name]!r}")
        return progress
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of imvia-graph ({error}).") from error


def _load_state(path: Path, model: IMVIA, state: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(dict(state))
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise CheckpointError(
            f"{path}: the checkpoint does not fit the model ({reason})."
        ) from error


__all__ = [
    "RunFolder",
    "check_free",
    "check_run",
    "fitting_model",
    "history_of",
    "is_of_job",
    "is_run",
    "load_best",
    "load_last",
    "load_model",
    "load_trainer",
    "locked",
    "open_run",
    "run_of",
    "save_model",
    "save_run",
    "save_trainer",
    "start_run",
    "upgrade",
]
