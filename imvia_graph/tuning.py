"""`tune`: a search for the settings with the best validation MRR, by Optuna.

A study is an SQLite file: it can be stopped, killed, gone on with, and shared by several workers.
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
from imvia_graph.errors import (
    DataError,
    IMVIAError,
    SettingsError,
    StorageError,
    TrainingError,
)
from imvia_graph.io import load_kg, with_validation
from imvia_graph.kg import MultiViewKG
from imvia_graph.run import fit
from imvia_graph.settings import Settings, as_number
from imvia_graph.training import Callback, Trainer

#: What is searched unless told otherwise.
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

#: The most combinations of a space that are listed to find one that was not tried.
_MOST_LISTED = 1_000_000

#: Draws one after the other that were all tried before, after which a space counts as tried.
_MOST_REPEATED = 100

#: Settings in which the workers of a study may differ: each is on a machine of its own.
MACHINE = ("device", "backend", "ranking_batch_size")


class Range(BaseModel):
    """Numbers to search: from ``low`` to ``high``, both included."""

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
            raise ValueError("log wants low above 0 and no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether the numbers are integers."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))

    def values(self) -> list[int | float] | None:
        """All of them; None where they are too many to list."""
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
    """What a search found.

    Attributes
    ----------
    settings : dict
        The best settings, those that were fixed included: what `Settings.create` takes.
    mrr : float or None
        Their validation MRR; None while no trial has ended.
    trial : int or None
        Their trial.
    trials : list of dict
        Each trial with ``number``, ``state``, ``mrr``, ``epochs`` and the ``settings`` searched.
        The state is ``complete``; ``pruned``: ended early, or by an error; ``running``; or
        ``fail``: given up and done again.

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


#: Told as things go on: the trial's number, its state, its best MRR so far, and epochs done.
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

    Called again with the same study it goes on; several processes that are given one study share
    the work, each on a device of its own if need be. The trial of a worker that was killed is done
    again by another, or by the next call. No settings are tried twice. Test triples are set aside
    before the first trial: they filter validation ranks, as is customary, and nothing ranks them.

    Parameters
    ----------
    kg : MultiViewKG, name or folder
        Anything that `load_kg` takes.
    study : path
        The SQLite file, made where it is not there.
    trials : int
        Trials in the study in all, those of other calls and workers included. Default: 50.
    space : mapping, optional
        For each setting to search a list of values, or a mapping with ``low``, ``high`` and
        optionally ``step`` or ``log``. Default: `SPACE`. A study keeps its space.
    settings : mapping, optional
        Settings that all trials share, over the defaults. A study keeps them, too, but for the
        machine's: ``device``, ``backend``, ``ranking_batch_size``. Default: none.
    seed : int
        Of the search. Each trial trains with the seed of ``settings``. Default: 0.
    prune : bool
        Whether to end a trial that is worse than the median of the others at the same epoch.
        Default: True.
    timeout : float, optional
        Seconds after which no further trial is begun. Default: None, no limit.
    progress : callable, optional
        Called with trial, state, best MRR and epochs: at each epoch and at the end of each trial.
        Default: nothing is.

    Returns
    -------
    Tuned

    Raises
    ------
    SettingsError
        A space or settings that cannot be, or that are not those of the study.
    DataError
        A graph that has no validation triples, or not the one of the study.

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
    work = _Worker(optuna, shared, path, graph, chosen, fixed, seed, prune, progress, stop)
    with _storing(optuna, path):
        while time.monotonic() < stop and work.more(trials):
            pass
        return _found(optuna, shared, fixed)


@contextmanager
def _storing(optuna: Any, path: Path) -> Iterator[None]:
    """What the study's file does not take or give, as an error of ours."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        if "disk is full" in reason or "disk I/O error" in reason:
            raise StorageError(
                f"{path} cannot be written ({reason}). The trials that ended are in it; free some"
                " space and give the same command again."
            ) from error
        raise DataError(
            f"{path}: the study cannot be read or written ({reason}). Name another file."
        ) from error


def read_space(path: str | Path) -> dict[str, Any]:
    """A space from a YAML or TOML file, to be checked by `tune` together with the settings."""
    return Settings.read_mapping(path, "settings to search")


def check_space(space: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Range | list[Any]]:
    """The space, each end of it a value that its setting takes."""
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
    """The graph with the validation set that `fit` would choose, and its test triples set aside."""
    graph = kg if isinstance(kg, MultiViewKG) else load_kg(kg, None, settings.split_seed)
    graph = with_validation(graph, settings.validation, settings.split_seed, settings.hold_out_by)
    if not len(graph.valid):
        raise DataError(f"{graph}: there are no validation triples to choose settings by.")
    return graph.replace(known=torch.cat([graph.known, graph.test]), test=graph.test[:0])


def _open(
    optuna: Any,
    path: Path,
    space: Mapping[str, Range | list[Any]],
    fixed: Mapping[str, Any],
    graph: MultiViewKG,
) -> Any:
    """The study in a file, made or gone on with; refused where it is of something else."""
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
    about = json.loads(json.dumps(about))  # as the study gives it back
    if path.is_dir():
        raise SettingsError(f"{path} is a folder; expected the SQLite file of a study.")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(path):
            storage = optuna.storages.RDBStorage(
                url=f"sqlite:///{path.resolve()}",
                # Several workers write; each waits for the other.
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be used as a study ({reason}). Name another file."
        ) from None
    there = study.user_attrs["about"]
    for what, mine in about.items():
        if there.get(what) != mine:
            raise SettingsError(
                f"{path} is a study with {what} {there.get(what)!r}; here it is {mine!r}. Go on"
                " with the same, or name another file."
            )
    return study


def _storage_errors(optuna: Any) -> tuple[type[Exception], ...]:
    """What Optuna raises of a file that is no study of its, or cannot be written."""
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    # RuntimeError: a study of another version.
    return (optuna.exceptions.OptunaError, SQLAlchemyError, CommandError, RuntimeError, OSError)


def _lock(path: Path, what: str = "") -> FileLock:
    """The lock of a study, or of something in it; the system lets go of it when its holder dies."""
    return FileLock(path.with_name(f"{path.name}{what}.lock"))


def _let_go(claim: FileLock) -> None:
    claim.release()
    Path(claim.lock_file).unlink(missing_ok=True)


class _Worker:
    """One process at work on a study."""

    def __init__(
        self,
        optuna: Any,
        study: Any,
        path: Path,
        graph: MultiViewKG,
        space: Mapping[str, Range | list[Any]],
        fixed: Mapping[str, Any],
        seed: int,
        prune: bool,
        progress: Progress | None,
        stop: float,
    ) -> None:
        self.optuna, self.study, self.path, self.graph = optuna, study, path, graph
        self.space, self.fixed, self.seed, self.prune = space, fixed, seed, prune
        #: On the monotonic clock: when no further trial is begun.
        self.progress, self.stop = progress, stop
        self.axes = _axes(space)
        #: How many settings were tried when drawing gave none but those.
        self.exhausted: int | None = None

    def more(self, trials: int) -> bool:
        """Do one trial if one is wanted; False where the study has its trials, or all there are."""
        kinds = self.optuna.trial.TrialState
        with _lock(self.path):
            self._bury_the_dead()
            states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
            ended = sum(state in (kinds.COMPLETE, kinds.PRUNED) for state in states)
            running = states.count(kinds.RUNNING)
            if ended >= trials:
                return False
            trial = None if ended + running >= trials else self._ask()
            if trial is not None:
                # Held as long as this process works on it.
                mine = self._claim(trial.number)
                mine.acquire(timeout=0)
        if trial is None:
            if running:
                time.sleep(0.5)  # the last ones are other workers', who may die
            return running > 0
        try:
            self._try(trial)
        finally:
            _let_go(mine)
        return True

    def _claim(self, number: int) -> FileLock:
        return _lock(self.path, f".trial-{number}")

    def _bury_the_dead(self) -> None:
        """Queue anew what a worker left that is no more."""
        kinds = self.optuna.trial.TrialState
        for trial in self.study.get_trials(deepcopy=False, states=(kinds.RUNNING,)):
            claim = self._claim(trial.number)
            try:
                claim.acquire(timeout=0)
            except Timeout:
                continue
            # A worker ends its trial before it lets go of it, and may have done both just now.
            if self.study.get_trials(deepcopy=False)[trial.number].state == kinds.RUNNING:
                self._leave(trial.number, trial.params)
            _let_go(claim)

    def _leave(self, number: int, params: Mapping[str, Any]) -> None:
        """Give a trial up; another one does the same."""
        self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)
        if len(params) == len(self.space):
            self.study.enqueue_trial(dict(params))

    def _ask(self) -> Any:
        """A trial whose settings are drawn and are no other's.

        None where all were tried, as far as drawing tells, or the time is up.
        """
        waiting = (self.optuna.trial.TrialState.WAITING,)
        left = self.study.get_trials(deepcopy=False, states=waiting)
        if self.exhausted == len(self._tried()) and not left:
            return None
        for _ in range(_MOST_REPEATED):
            if self._all_tried() or time.monotonic() >= self.stop:
                break
            trial = self.study.ask()
            # Each trial's draws are its own, whichever worker does it.
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

    def _tried(self, but: int | None = None) -> set[tuple[Any, ...]]:
        """Settings of all trials but one and those that were given up."""
        kinds = self.optuna.trial.TrialState
        states = (kinds.COMPLETE, kinds.PRUNED, kinds.RUNNING)
        others = self.study.get_trials(deepcopy=False, states=states)
        return {_key(other.params) for other in others if other.number != but}

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
            # Settings that do not go together; where nothing has gone well, it is more than that.
            self._end(trial, "refused", watcher, error)
            if not self.study.get_trials(deepcopy=False, states=(kinds.COMPLETE,)):
                raise
        except BaseException:
            self._leave(trial.number, trial.params)
            raise
        else:
            trial.set_user_attr("best_epoch", run.progress.best_epoch)
            self._tell(trial, "done", watcher)
            self.study.tell(trial, run.progress.best_mrr)

    def _end(
        self, trial: Any, state: str, watcher: _Watcher, error: Exception | None = None
    ) -> None:
        """End a trial that is not worth going on with, or cannot be; it counts as tried."""
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
        # Optuna keeps numbers, texts, truth values and null; a list, as of modalities, as YAML.
        trial.suggest_categorical(key, [_kept(value) for value in part])
    elif part.whole:
        trial.suggest_int(key, part.low, part.high, step=part.step or 1, log=part.log)
    else:
        trial.suggest_float(key, part.low, part.high, step=part.step, log=part.log)


def _axes(space: Mapping[str, Range | list[Any]]) -> dict[str, list[Any]] | None:
    """The values of each setting; None where a space has too many combinations to list."""
    axes = {}
    for key, part in space.items():
        values = part.values() if isinstance(part, Range) else [_kept(value) for value in part]
        if values is None:
            return None
        axes[key] = list({_text(value): value for value in values}.values())
    return axes if math.prod(map(len, axes.values())) <= _MOST_LISTED else None


def _key(params: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two trials of the same settings have in common."""
    return tuple((key, _text(value)) for key, value in sorted(params.items()))


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def _kept(value: Any) -> Any:
    """A value as Optuna keeps it; see `_plain`."""
    return yaml.safe_dump(value) if isinstance(value, (list, dict)) else value


def _plain(value: Any) -> Any:
    """A value as the settings have it: lists again, and 0.1 for 0.1 + 1e-17."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    loaded = yaml.safe_load(value) if isinstance(value, str) else value
    return loaded if isinstance(loaded, (list, dict)) else value


class _Pruned(Exception):  # noqa: N818 - ends a trial, is no error
    """The trial is not worth going on with."""


class _Watcher(Callback):
    """Reports each validation, and ends a trial that is not worth going on with."""

    def __init__(self, worker: _Worker, trial: Any) -> None:
        self.worker, self.trial = worker, trial
        self.best: float | None = None
        self.epochs = 0

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After an epoch and its validation."""
        self.epochs = record["epoch"]
        self.best = trainer.progress.best_mrr
        if "valid" in record:
            self.trial.report(record["valid"]["mrr"], self.epochs)
        if self.worker.progress is not None:
            self.worker.progress(self.trial.number, "training", self.best, self.epochs)
        if self.worker.prune and "valid" in record and self.trial.should_prune():
            raise _Pruned


def _found(optuna: Any, study: Any, fixed: Mapping[str, Any]) -> Tuned:
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
    """The best settings as a YAML file that ``fit --settings`` takes, on any device."""
    values = {key: value for key, value in found.settings.items() if key not in MACHINE}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    _files.write_text(path, f"# {about}\n{text}", follow=True)


__all__ = ["SPACE", "Range", "Tuned", "check_space", "read_space", "tune", "write_best"]
