"""`tune`: a search for the settings with the best validation MRR, by Optuna.

A study is an SQLite file. It can be stopped or killed, resumed, and shared by several workers.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from imvia_graph import _files
from imvia_graph._display import first_line
from imvia_graph.errors import (
    DataError,
    IMVIAError,
    SettingsError,
    StorageError,
    TrainingError,
)
from imvia_graph.kg import MultiViewKG
from imvia_graph.run import fit, graph_for
from imvia_graph.settings import Settings, as_number
from imvia_graph.training import Callback, Trainer

#: The default space.
SPACE: dict[str, Any] = {
    "learning_rate": {"low": 3e-4, "high": 1e-2, "log": True},
    "table_learning_rate": {"low": 0.02, "high": 0.5, "log": True},
    "batch_size": [256, 512, 1024],
    "label_smoothing": {"low": 0.0, "high": 0.5, "step": 0.1},
    "input_dropout": {"low": 0.0, "high": 0.6, "step": 0.1},
    "relation_dropout": {"low": 0.0, "high": 0.6, "step": 0.1},
    "hidden_dropout": {"low": 0.0, "high": 0.7, "step": 0.1},
    "relation_dim": [32, 64, 128, 256],
    "lambda_regularization": {"low": 0.01, "high": 0.3, "log": True},
    "lambda_alignment": [0.0, 0.01, 0.1, 1.0],
}

#: Largest number of combinations of a space that are listed to find one that was not tried.
_MOST_LISTED = 1_000_000

#: Number of consecutive draws of settings tried before, after which a space counts as exhausted.
_MOST_REPEATED = 100

#: Settings of the machine, which may differ between the workers of a study.
MACHINE = ("device", "backend", "ranking_batch_size")


class Range(BaseModel):
    """The range of numbers to search, from ``low`` to ``high``, both included."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"low, {self.low}, is above high, {self.high}")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step is {self.step}; expected more than 0")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0 and no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether the numbers are integers."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))

    def values(self) -> list[int | float] | None:
        """Return all numbers of the range; None if they are too many to list."""
        if self.low == self.high:
            return [_plain(self.low)]
        step = (self.step or 1) if self.whole else self.step
        if step is None or (self.high - self.low) / step > _MOST_LISTED:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9)
        return [_plain(self.low + i * step) for i in range(count + 1)]


#: A setting's values: a range, or a list.
Space = Mapping[str, Range | list[Any]]


@dataclass
class Tuned:
    """The result of a search.

    Attributes
    ----------
    settings : dict
        The best settings, including the fixed ones, for `Settings.create`.
    mrr : float or None
        Their validation MRR; None if no trial is complete.
    trial : int or None
        The number of their trial; None if no trial is complete.
    trials : list of dict
        ``number``, ``state``, ``mrr``, ``epochs`` and the searched ``settings`` of each trial. The
        state is ``complete``, ``pruned`` (ended early, or by an error), ``running``, or ``fail``
        (abandoned and queued again).

    Examples
    --------
    >>> from imvia_graph import Settings, Tuned
    >>> found = Tuned(settings={"dim": 64}, mrr=0.48, trial=3)
    >>> Settings.create(found.settings).dim
    64
    """

    settings: dict[str, Any]
    mrr: float | None
    trial: int | None
    trials: list[dict[str, Any]] = field(default_factory=list)


#: Called during the search with the trial's number, its state, its best MRR, and its epochs done.
Progress = Callable[[int, str, float | None, int], None]


def tune(
    kg: Any,
    study: str | os.PathLike[str],
    *,
    trials: int = 50,
    space: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    prune: bool = True,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Search for the settings with the best validation MRR.

    Another call with the same study resumes it. Several processes may share a study, each on its
    own device. If a worker is killed, another one, or the next call, repeats its trial. No settings
    are tried twice. Test triples are set aside before the first trial: as is customary, they filter
    validation ranks, but are never ranked.

    Parameters
    ----------
    kg : MultiViewKG, name or folder
        Anything that `load_kg` accepts.
    study : path
        The SQLite file; created if it does not exist.
    trials : int
        Total number of trials in the study, over all calls and workers. Default: 50.
    space : mapping, optional
        For each setting to search, a list of values, or a mapping with ``low``, ``high`` and
        optionally ``step`` or ``log``. All calls for a study must pass the same. Default: `SPACE`.
    settings : mapping, optional
        Settings that all trials share, over the defaults. All calls for a study must pass the same,
        except ``device``, ``backend`` and ``ranking_batch_size``. Default: none.
    seed : int
        Seed of the search. Each trial trains with the seed of ``settings``. Default: 0.
    prune : bool
        Whether to end a trial that is worse than the median of the others at the same epoch.
        Default: True.
    timeout : float, optional
        Seconds after which no further trial starts. Default: None, no limit.
    progress : callable, optional
        Called with trial number, state, best MRR and epochs, after each epoch and at the end of
        each trial. Default: none.

    Returns
    -------
    Tuned

    Raises
    ------
    SettingsError
        The space or the settings are invalid, or differ from those of the study; or the graph does.
    DataError
        The graph has no validation triples, or the file cannot be used as a study.
    StorageError
        The study cannot be written because the disk is full.

    Examples
    --------
    >>> import imvia_graph as ig, pathlib, tempfile
    >>> study = pathlib.Path(tempfile.mkdtemp()) / "study.db"
    >>> found = ig.tune("countries", study, trials=2, space={"dim": [8, 16]},
    ...                 settings={"epochs": 1})
    >>> sorted(trial["settings"]["dim"] for trial in found.trials)
    [8, 16]
    """
    optuna = _optuna()
    if trials < 1:
        raise SettingsError(f"tune: trials is {trials}; expected 1 or more.")
    fixed = dict(settings or {})
    chosen = check_space(SPACE if space is None else space, fixed)
    path = Path(study)
    graph = _without_test(kg, Settings.create(fixed))
    shared = _open(optuna, path, chosen, fixed, graph)
    stop = math.inf if timeout is None else time.monotonic() + timeout
    worker = _Worker(optuna, shared, path, graph, chosen, fixed, seed, prune, progress, stop)
    with _storing(optuna, path):
        while time.monotonic() < stop and worker.more(trials):
            pass
        return _found(optuna, shared, fixed)


@contextmanager
def _storing(optuna: Any, path: Path) -> Iterator[None]:
    """Raise errors of the study's file as `StorageError` or `DataError`."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = first_line(error.__cause__ or error)
        if "disk is full" in reason or "disk I/O error" in reason:
            raise StorageError(
                f"{path} cannot be written ({reason}). It has the trials that ended; free some"
                " space and run the same command again."
            ) from error
        raise DataError(
            f"{path}: the study cannot be read or written ({reason}). Use another file."
        ) from error


def read_space(path: str | Path) -> dict[str, Any]:
    """Read a space from a YAML or TOML file; `tune` checks it together with the settings."""
    return Settings.read_mapping(path, "settings to search")


def check_space(space: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Range | list[Any]]:
    """Convert a space, and check that its values and the ends of its ranges are valid settings."""
    if not space:
        raise SettingsError("tune: the space is empty; name at least one setting to search.")
    checked: dict[str, Range | list[Any]] = {}
    for key, values in space.items():
        if isinstance(values, Mapping):
            try:
                found = Range(**{name: as_number(value) for name, value in values.items()})
            except (ValidationError, TypeError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                raise SettingsError(
                    f"Space, {key}: {reason}; expected a list, or low, high and optionally step or"
                    f" log; received {dict(values)!r}."
                ) from None
            ends = [found.low, found.high]
            checked[key] = found
        elif isinstance(values, list) and values:
            ends = checked[key] = [as_number(value) for value in values]
        else:
            raise SettingsError(
                f"Space, {key}: expected a list of values, or low, high and optionally step or log;"
                f" received {values!r}."
            )
        for value in ends:
            if Settings.create(fixed, {key: value}).epochs == 0:
                raise SettingsError("Setting epochs is 0; a trial needs one epoch or more.")
        if key in fixed:
            raise SettingsError(f"Setting {key} is both fixed and searched; leave one of them out.")
    return checked


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise IMVIAError(
            "tune needs Optuna, which is not installed: pip install 'imvia-graph[tune]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _without_test(kg: Any, settings: Settings) -> MultiViewKG:
    """Return the graph with `fit`'s choice of validation set, and test triples moved to known."""
    graph = graph_for(kg, settings)
    if not len(graph.valid):
        raise DataError(f"{graph.title}: there are no validation triples to choose settings by.")
    return graph.replace(known=torch.cat([graph.known, graph.test]), test=graph.test[:0])


def _open(
    optuna: Any,
    path: Path,
    space: Mapping[str, Range | list[Any]],
    fixed: Mapping[str, Any],
    graph: MultiViewKG,
) -> Any:
    """Open or create the study in a file; refuse a study of another space, settings or graph."""
    about = {
        "space": {
            key: part.model_dump(exclude_defaults=True) if isinstance(part, Range) else part
            for key, part in space.items()
        },
        "settings": {key: value for key, value in fixed.items() if key not in MACHINE},
        "graph": {
            "name": graph.name,
            "entities": graph.num_entities,
            "relations": graph.num_relations,
            "train": len(graph.train),
            "valid": len(graph.valid),
            "views": {name: list(graph.views(name)[0].shape) for name in graph.modalities},
        },
    }
    about = json.loads(json.dumps(about))  # in the form that the study returns
    if path.is_dir():
        raise SettingsError(f"{path} is a folder; expected the SQLite file of a study.")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(path):
            storage = optuna.storages.RDBStorage(
                url=f"sqlite:///{path.resolve()}",
                # Seconds that a worker waits while another one writes.
                engine_kwargs={"connect_args": {"timeout": 120}},
            )
            study = optuna.create_study(
                storage=storage,
                study_name="imvia-graph",
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3),
            )
            if "about" not in study.user_attrs:
                study.set_user_attr("about", about)
    except _storage_errors(optuna) as error:
        raise DataError(
            f"{path} cannot be used as a study ({first_line(error)}). Use another file."
        ) from None
    stored = study.user_attrs["about"]
    for what, value in about.items():
        if stored.get(what) != value:
            raise SettingsError(
                f"{path} is a study with {what} {stored.get(what)!r}, not {value!r}. Use the same"
                f" {what}, or another file."
            )
    return study


def _storage_errors(optuna: Any) -> tuple[type[Exception], ...]:
    """Return the errors that Optuna raises for a file that is no study or cannot be written."""
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    # RuntimeError: a study of another version.
    return (optuna.exceptions.OptunaError, SQLAlchemyError, CommandError, RuntimeError, OSError)


def _lock(path: Path, what: str = "") -> FileLock:
    """Return the lock of a study or of a part of it, which is released when its process dies."""
    return FileLock(path.with_name(f"{path.name}{what}.lock"))


def _release(lock: FileLock) -> None:
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


@dataclass
class _Worker:
    """One of the processes that work on a study."""

    optuna: Any
    study: Any
    path: Path
    graph: MultiViewKG
    space: Mapping[str, Range | list[Any]]
    fixed: Mapping[str, Any]
    seed: int
    prune: bool
    progress: Progress | None
    #: Time on the monotonic clock after which no further trial starts.
    stop: float

    def __post_init__(self) -> None:
        self.axes = _axes(self.space)
        #: Number of settings that had been tried when drawing found no others.
        self.exhausted: int | None = None

    def more(self, trials: int) -> bool:
        """Run a trial if any is left; return False once the study is complete."""
        kinds = self.optuna.trial.TrialState
        with _lock(self.path):
            self._requeue_abandoned()
            states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
            ended = sum(state in (kinds.COMPLETE, kinds.PRUNED) for state in states)
            running = states.count(kinds.RUNNING)
            if ended >= trials:
                return False
            trial = None if ended + running >= trials else self._ask()
            if trial is not None:
                # Held while this process works on the trial.
                lock = self._trial_lock(trial.number)
                lock.acquire(timeout=0)
        if trial is None:
            if running:
                time.sleep(0.5)  # other workers do the last trials, and may be killed
            return running > 0
        try:
            self._try(trial)
        finally:
            _release(lock)
        return True

    def _trial_lock(self, number: int) -> FileLock:
        return _lock(self.path, f".trial-{number}")

    def _requeue_abandoned(self) -> None:
        """Queue the trials of killed workers again."""
        kinds = self.optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(kinds.RUNNING,)):
            lock = self._trial_lock(trial.number)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            # A worker ends its trial before it releases the lock, and may have done both just now.
            if self.study.get_trials(deepcopy=False)[trial.number].state == kinds.RUNNING:
                self._requeue(trial.number, trial.params)
            _release(lock)

    def _requeue(self, number: int, params: Mapping[str, Any]) -> None:
        """Mark a trial as failed and queue its settings again."""
        self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
        if len(params) == len(self.space):
            self.study.enqueue_trial(dict(params))

    def _ask(self) -> Any:
        """Draw a trial whose settings no other trial has.

        Returns None if all settings were tried, as far as drawing shows, or the time is up.
        """
        waiting = (self.optuna.trial.TrialState.WAITING,)
        queued = self.study.get_trials(deepcopy=False, states=waiting)
        if self.exhausted == len(self._tried()) and not queued:
            return None
        for _ in range(_MOST_REPEATED):
            if self._all_tried() or time.monotonic() >= self.stop:
                break
            trial = self.study.ask()
            # The draws of a trial depend on its number, not on the worker.
            self.study.sampler = self.optuna.samplers.TPESampler(
                seed=(self.seed * 1_000_003 + trial.number) % 2**32, constant_liar=True
            )
            for key, part in self.space.items():
                _suggest(trial, key, part)
            tried = self._tried(trial.number)
            if _key(trial.params) not in tried:
                return trial
            trial.set_user_attr("repeated", True)
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            if self.axes is not None:
                every = itertools.product(*self.axes.values())
                combinations = (dict(zip(self.axes, values, strict=True)) for values in every)
                others = [params for params in combinations if _key(params) not in tried]
                self.study.enqueue_trial(random.Random(trial.number).choice(others))
        else:
            self.exhausted = len(self._tried())
        return None

    def _all_tried(self) -> bool:
        if self.axes is None:
            return False
        return len(self._tried()) >= math.prod(len(values) for values in self.axes.values())

    def _tried(self, excluded: int | None = None) -> set[tuple[Any, ...]]:
        """Return the settings of all trials except one and those that failed."""
        kinds = self.optuna.trial.TrialState
        states = (kinds.COMPLETE, kinds.PRUNED, kinds.RUNNING)
        others = self.study.get_trials(deepcopy=False, states=states)
        return {_key(other.params) for other in others if other.number != excluded}

    def _try(self, trial: Any) -> None:
        """Train with the trial's settings."""
        kinds = self.optuna.trial.TrialState
        watcher = _Watcher(self, trial)
        found = {key: _plain(value) for key, value in trial.params.items()}
        try:
            run = fit(
                self.graph,
                settings=Settings.create(self.fixed, found),
                validation="published",
                callbacks=[watcher],
            )
        except _Pruned:
            self._end(trial, "pruned", watcher)
        except TrainingError as error:
            self._end(trial, "diverged", watcher, error)
        except torch.cuda.OutOfMemoryError as error:
            self._end(trial, "out of memory", watcher, error)
        except IMVIAError as error:
            # Settings that exclude each other; but if no trial has succeeded, the cause is another.
            self._end(trial, "refused", watcher, error)
            if not self.study.get_trials(deepcopy=False, states=(kinds.COMPLETE,)):
                raise
        except BaseException:
            self._requeue(trial.number, trial.params)
            raise
        else:
            trial.set_user_attr("best_epoch", run.progress.best_epoch)
            self._tell(trial, "done", watcher)
            self.study.tell(trial, run.progress.best_mrr)

    def _end(
        self, trial: Any, state: str, watcher: _Watcher, error: Exception | None = None
    ) -> None:
        """End a trial that is pruned or cannot be trained; its settings count as tried."""
        if error is not None:
            trial.set_user_attr("error", str(error))
        self._tell(trial, state, watcher)
        self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)

    def _tell(self, trial: Any, state: str, watcher: _Watcher) -> None:
        trial.set_user_attr("epochs", watcher.epochs)
        if self.progress is not None:
            self.progress(trial.number, state, watcher.best, watcher.epochs)


def _suggest(trial: Any, key: str, part: Range | list[Any]) -> None:
    if isinstance(part, list):
        # Optuna stores numbers, strings, booleans and None; lists, as of modalities, go as YAML.
        trial.suggest_categorical(key, [_kept(value) for value in part])
    elif part.whole:
        trial.suggest_int(key, part.low, part.high, step=part.step or 1, log=part.log)
    else:
        trial.suggest_float(key, part.low, part.high, step=part.step, log=part.log)


def _axes(space: Mapping[str, Range | list[Any]]) -> dict[str, list[Any]] | None:
    """Return the values of each setting; None if a space has too many combinations to list."""
    axes = {}
    for key, part in space.items():
        values = part.values() if isinstance(part, Range) else [_kept(value) for value in part]
        if values is None:
            return None
        axes[key] = list({_text(value): value for value in values}.values())
    return axes if math.prod(map(len, axes.values())) <= _MOST_LISTED else None


def _key(params: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a key that is equal for equal settings."""
    return tuple((key, _text(value)) for key, value in sorted(params.items()))


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def _kept(value: Any) -> Any:
    """Convert a value to the form that Optuna stores; see `_plain`."""
    return yaml.safe_dump(value) if isinstance(value, (list, dict)) else value


def _plain(value: Any) -> Any:
    """Convert a value of Optuna's to that of the setting: lists, and 0.1 for 0.1 + 1e-17."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    loaded = yaml.safe_load(value) if isinstance(value, str) else value
    return loaded if isinstance(loaded, (list, dict)) else value


class _Pruned(Exception):  # noqa: N818 - ends a trial, is no error
    """The trial is pruned."""


class _Watcher(Callback):
    """Reports each validation to Optuna, and ends a trial that should be pruned."""

    def __init__(self, worker: _Worker, trial: Any) -> None:
        self.worker, self.trial = worker, trial
        self.best: float | None = None
        self.epochs = 0

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Report the validation MRR; raise `_Pruned` if the trial should be pruned."""
        self.epochs = record["epoch"]
        self.best = trainer.progress.best_mrr
        if "valid" in record:
            self.trial.report(record["valid"]["mrr"], self.epochs)
        if self.worker.progress is not None:
            self.worker.progress(self.trial.number, "training", self.best, self.epochs)
        if self.worker.prune and "valid" in record and self.trial.should_prune():
            raise _Pruned


def _found(optuna: Any, study: Any, fixed: Mapping[str, Any]) -> Tuned:
    """Return the trials of a study and the best settings."""
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "mrr": trial.value,
            "epochs": trial.user_attrs.get("epochs", 0),
            "settings": {key: _plain(value) for key, value in trial.params.items()},
        }
        for trial in study.get_trials(deepcopy=False)
        if "repeated" not in trial.user_attrs and trial.state != optuna.trial.TrialState.WAITING
    ]
    complete = [t for t in trials if t["state"] == "complete" and not math.isnan(t["mrr"])]
    if not complete:
        return Tuned(dict(fixed), None, None, trials)
    best = max(complete, key=lambda trial: (trial["mrr"], -trial["number"]))
    return Tuned({**fixed, **best["settings"]}, best["mrr"], best["number"], trials)


def write_best(path: Path, found: Tuned, about: str) -> None:
    """Write the best settings, without the machine's, as a YAML file for ``fit --settings``."""
    values = {key: value for key, value in found.settings.items() if key not in MACHINE}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    _files.write_text(path, f"# {about}\n{text}", follow=True)


__all__ = ["SPACE", "Range", "Tuned", "check_space", "read_space", "tune", "write_best"]
