"""The training loop: batches of queries, steps, epochs with validation, and early stopping.

Files and the terminal are left to callbacks.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imvia_graph._average import Average
from imvia_graph._guards import MEMORY_ERRORS, Before, Health, Parts, listed
from imvia_graph._machine import (
    Holes,
    cpu_has_bfloat16,
    give_back_freed_memory,
    keep_freed_memory,
    resolve_device,
    training_dtype,
)
from imvia_graph._objective import Objective
from imvia_graph._recorded import RecordedSteps, can_record
from imvia_graph._streams import Streams
from imvia_graph.batches import Batch, Batches
from imvia_graph.errors import IMVIAError, SettingsError, TrainingError
from imvia_graph.evaluation import draw_candidates, rank, rank_metrics
from imvia_graph.kg import MultiViewKG
from imvia_graph.model import DECISION, IMVIA, MANY
from imvia_graph.nn.entity_table import EntityTable
from imvia_graph.optimizers import (
    RowOptimizer,
    follows_rows,
    make_optimizer,
    set_rate,
    table_optimizer,
)
from imvia_graph.settings import Settings, checked_settings

logger = logging.getLogger(__name__)


class Callback:
    """Base class of training callbacks; override the hooks of interest."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        hooks = {name for name in vars(Callback) if name.startswith("on_")}
        for name in vars(cls).keys() - hooks:
            if name.startswith("on_"):
                logger.warning(
                    "%s.%s: training calls no hook of that name; it calls %s.",
                    cls.__name__,
                    name,
                    ", ".join(sorted(hooks)),
                )

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first epoch of a call of `Trainer.fit`."""

    def on_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        """Called after each step; ``losses`` are detached scalars on the model's device."""

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Called after each epoch and its validation, with its record in ``metrics.jsonl``."""

    def on_stop(self, trainer: Trainer) -> None:
        """Called where training ends early: on request or for a `TrainingError`.

        A checkpoint of the trainer saved here resumes with the next step, bit for bit.
        """

    def on_end(self, trainer: Trainer) -> None:
        """Called after the last epoch."""

    def on_close(self, trainer: Trainer) -> None:
        """Called last, however training ended, also after an error."""


class _Stopped(Exception):  # noqa: N818 - a request, not an error
    """Training was asked to stop."""


@dataclass
class Progress:
    """The progress of training; with the tensors of a `Trainer`, all that resuming needs."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_mrr: float | None = None
    #: Validations since the best one.
    waited: int = 0
    seconds: float = 0.0
    #: Why training ended: ``epochs`` or ``patience``; empty until then.
    ended: str = ""
    #: Batches done and seconds spent in the current epoch.
    batch: int = 0
    elapsed: float = 0.0
    #: Steps skipped because their loss or gradient was not finite.
    skipped: int = 0


class _Step(NamedTuple):
    """A step whose `Health` is not known yet, and what undoing it needs."""

    health: Health
    before: Before
    #: The batch or, of a recorded step, its rows (see `Batches.rows_of_epoch`).
    batch: Batch | Tensor
    #: Its index in the epoch and in training, and the generator state that its batch was drawn in.
    place: int
    number: int
    drawn: Tensor


def checked_callbacks(callbacks: Callback | Sequence[Callback] | None) -> list[Callback]:
    """Return one callback, several or none (None) as a list.

    Raises
    ------
    SettingsError
        One of them is no `Callback`.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, Callback):
        return [callbacks]
    found: list[Any] = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in found:
        if not isinstance(callback, Callback):
            what = f"the class {callback.__name__}" if isinstance(callback, type) else callback
            raise SettingsError(
                f"callbacks: expected instances of imvia_graph.Callback, received {what}."
                + (" Call it to make one." if isinstance(callback, type) else "")
            )
    return found


class Trainer:
    """Trains a model on the training triples of a graph.

    Parameters
    ----------
    model : IMVIA
        Trained in place, on its device; parameters that require no gradient do not change.
    kg : MultiViewKG
        ``train`` is trained on, ``valid`` selects the best epoch; ``test`` only filters ranks.
    settings : Settings
        See the groups *losses* and *training*.
    callbacks : Callback or sequence of Callback, optional
        Called in this order. Default: ``None``, none.

    Attributes
    ----------
    settings : Settings
        The settings passed in, with the values that training chose for ``epochs``,
        ``lambda_regularization``, ``complex_head`` and ``precision`` if these were left open. A
        callback may assign settings that differ in `CHANGEABLE` (``trainer.settings =
        trainer.settings.replace(patience=3)``); any other change is an error. Learning rates may
        change, too, unless the schedule is ``constant``: then change those of `optimizers`. A run
        folder keeps the settings that training began with.
    progress : Progress
        Epochs and steps done, and the best epoch so far.
    best_state : dict of str to Tensor or None
        The model's state_dict at the best validation MRR. From that validation to the next epoch,
        and once training has ended, these are the model's own tensors; otherwise a copy,
        memory-mapped from its file if there is one.
    average : Average or None
        The moving average of the weights; None without ``ema_decay``.
    sums : dict of str to Tensor
        The sum of each loss over the steps of the current epoch, and the number of ``steps``.

    Raises
    ------
    DataError
        The model was made for another graph.
    SettingsError
        ``settings`` is no `Settings`, or a callback no `Callback`; float16 with several processes;
        a model in half precision: parameters stay in float32, and the setting ``precision`` puts
        products in half precision.

    Notes
    -----
    Test triples are used for one thing only, as is customary: to filter validation ranks. Without
    validation triples no epoch is selected, and the last one is kept.

    Examples
    --------
    >>> import imvia_graph as ig
    >>> kg = ig.MultiViewKG.from_labels([("France", "borders", "Spain")])
    >>> settings = ig.Settings(dim=8, complex_head=False, epochs=2)
    >>> model = ig.IMVIA.from_kg(kg, settings)
    >>> progress = ig.Trainer(model, kg, settings).fit()
    >>> progress.epoch, progress.ended
    (2, 'epochs')
    """

    def __init__(
        self,
        model: IMVIA,
        kg: MultiViewKG,
        settings: Settings,
        callbacks: Callback | Sequence[Callback] | None = None,
    ) -> None:
        settings = checked_settings(settings)
        model.check_graph(kg)
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise SettingsError(
                    f"Training: expected a model in float32 or float64; {name} is in"
                    f" {parameter.dtype}. Train model.float(); the setting precision puts its"
                    " products in half precision."
                )
        self.model, self.kg, self.shards = model, kg, model.shards
        self.callbacks = checked_callbacks(callbacks)
        self.progress = Progress()
        self.sums: dict[str, Tensor] = {}
        self.parts = Parts("training on a batch of queries")
        self._holes = Holes()
        self._stopping = self._stopped = False
        self._started = time.perf_counter()
        self._unsettled: _Step | None = None
        self._best: dict[str, Tensor] | None = None
        self._best_is_model = False
        #: Whether the averaged weights are in the model, and the trained ones in `average`.
        self._averaged = False
        self.batches = Batches(kg, settings, model.device)
        self.precision = self._precision(settings)
        self._settings = settings = self._with_choices(settings)
        self.objective = Objective(model, settings, self.parts)
        self.known = kg.answers()
        number = settings.ranking_candidates
        self._ranked_against = (
            None if number is None else draw_candidates(kg.num_entities, number, settings.seed)
        )
        information = model.information
        self.estimators = [] if information is None else list(information.parameters())
        tables = {id(table.weight): table for table in model.entity_tables}
        by_rows = follows_rows(settings)
        of_estimators = {id(parameter) for parameter in self.estimators}
        of_model = [p for p in model.parameters() if id(p) not in of_estimators]
        #: Parameters that every process holds in full, and those whose ``grad`` autograd fills.
        self.replicated = [p for p in of_model if id(p) not in tables]
        self.parameters = self.replicated if by_rows else of_model
        named = dict(model.named_parameters())
        #: Entity tables that are updated row by row, by the names of their weights.
        self.tables = {
            name: tables[id(p)] for name, p in named.items() if by_rows and id(p) in tables
        }
        self.named = {name: p for name, p in named.items() if name not in self.tables}
        # Persistent buffers only: the views are buffers, too, but never change.
        self.buffers = [model.get_buffer(name) for name in model.state_dict().keys() - named.keys()]
        kind, rate = table_optimizer(settings)
        decay = settings.weight_decay
        apart = [*model.relation_tables, *model.entity_tables]
        of_tables = {id(table.weight) for table in apart if settings.table_optimizer != "same"}
        layers = [p for p in self.parameters if id(p) not in of_tables]
        looked_up = [p for p in self.parameters if id(p) in of_tables]
        small = [table.weight for table in model.complex_tables]
        self.optimizer = make_optimizer(
            settings.optimizer, layers, settings.learning_rate, decay, small
        )
        #: Dense optimizer of the tables; None where `optimizer` updates them.
        self.table_optimizer = (
            make_optimizer(kind, looked_up, rate, decay, small) if looked_up else None
        )
        self.row_optimizer: RowOptimizer | None = None
        if by_rows:
            rowwise = settings.entity_optimizer == "rowwise"
            of_complex = [table for table in model.complex_tables if isinstance(table, EntityTable)]
            self.row_optimizer = RowOptimizer(
                model.entity_tables, kind, rate, decay, rowwise, of_complex
            )
        self.estimator_optimizer: torch.optim.Optimizer | None = None
        if self.estimators and settings.lambda_information:
            fused = True if model.device.type == "cuda" else None
            self.estimator_optimizer = torch.optim.Adam(
                self.estimators, lr=settings.information_learning_rate, fused=fused
            )
        self.scaler = torch.amp.GradScaler(
            model.device.type, enabled=self.precision == torch.float16
        )
        self.average = Average(model, settings.ema_decay) if settings.ema_decay else None
        #: `sums` of the last epoch that ended.
        self._summed: dict[str, Tensor] = {}
        #: On a GPU: the recorded steps, and the streams that their parts run in.
        self.recorded: RecordedSteps | None = None
        self.streams = Streams()

    def _precision(self, settings: Settings) -> torch.dtype:
        """Return the dtype of products; with "auto", one that all processes support."""
        device = self.model.device
        found = training_dtype(settings, device)
        if settings.precision == "auto":
            lacks_bfloat16 = torch.tensor([float(found == torch.float32)], device=device)
            if self.shards.max_(lacks_bfloat16).item():
                return torch.float32
        if found == torch.float16 and not self.shards.alone:
            raise SettingsError(
                "Setting precision: float16 is for one process; with several, use bfloat16 or"
                " float32."
            )
        return found

    def _with_choices(self, settings: Settings) -> Settings:
        """Return the settings with values for those that were left open; see `Trainer`."""
        chosen: dict[str, Any] = {}
        if settings.epochs is None:
            chosen["epochs"] = max(_EPOCHS, math.ceil(_STEPS / max(len(self.batches), 1)))
        if settings.lambda_regularization is None:
            chosen["lambda_regularization"] = _WEIGHTS[self.kg.num_entities >= MANY]
        if settings.complex_head is None:
            chosen["complex_head"] = self.model.settings.complex_head
        if settings.precision == "auto":
            chosen["precision"] = str(self.precision).removeprefix("torch.")
        return settings.replace(**chosen)

    @property
    def settings(self) -> Settings:
        """The settings of training; see `Trainer`."""
        return self._settings

    @settings.setter
    def settings(self, changed: Settings) -> None:
        changed, now = checked_settings(changed), self._settings
        free = CHANGEABLE if now.schedule == "constant" else (*CHANGEABLE, *_SCHEDULED)
        for key in Settings.model_fields.keys() - {*free}:
            if getattr(changed, key) != getattr(now, key):
                raise SettingsError(
                    f"Setting {key}: it cannot change from {getattr(now, key)!r} to"
                    f" {getattr(changed, key)!r} during training. These can: {', '.join(free)}."
                )
        self._settings = changed

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return all optimizers."""
        every = (
            self.optimizer,
            self.table_optimizer,
            self.row_optimizer,
            self.estimator_optimizer,
        )
        return [optimizer for optimizer in every if optimizer is not None]

    @property
    def epochs(self) -> int:
        """The maximum number of epochs."""
        assert self.settings.epochs is not None
        return self.settings.epochs

    @property
    def best_state(self) -> dict[str, Tensor] | None:
        """The model's state_dict at the best validation MRR; see `Trainer`."""
        return self.model.state_dict() if self._best_is_model else self._best

    @best_state.setter
    def best_state(self, state: dict[str, Tensor] | None) -> None:
        self._best, self._best_is_model = state, False

    def _keep_best(self) -> None:
        """Copy the best state if it is the model's own tensors, which are about to change."""
        if self._best_is_model:
            self.best_state = _copy(self.model.state_dict())
        if self._averaged and self.average is not None:  # training continues without averaging
            self.average.exchange()
            self._averaged = False

    def keep_average(self) -> None:
        """Put the averaged weights, if there are any, into the model until training continues."""
        if self.average is not None and not self._averaged:
            self.average.exchange()
            self._averaged = True

    # -- the loop -------------------------------------------------------------------------------

    def fit(self) -> Progress:
        """Train for ``epochs``, or until ``patience`` validations in a row did not improve.

        Raises
        ------
        TrainingError
            A loss or a gradient is not finite, and ``non_finite`` is not ``skip``; the model is as
            it was before that step.
        OutOfMemoryError
            A single query does not fit into memory.
        """
        if self._stopped:  # the last call did what was asked
            self._stopping = self._stopped = False
        settings, progress = self.settings, self.progress
        more_patience = settings.patience is None or progress.waited < settings.patience
        if progress.epoch < self.epochs and more_patience:
            progress.ended = ""  # a run that ended, resumed with more epochs or patience
        try:
            return self._fit()
        finally:
            self._stopped = self._stopping
            for table in self.tables.values():
                table.forget()
            with ExitStack() as closing:  # closes every callback, even if another one raises
                for callback in reversed(self.callbacks):
                    closing.callback(callback.on_close, self)

    def _fit(self) -> Progress:
        progress = self.progress
        for callback in self.callbacks:
            callback.on_start(self)
        try:
            while not progress.ended:
                if self._is_stopping():
                    raise _Stopped
                give_back_freed_memory()
                if progress.epoch < self.epochs:
                    self._epoch()
                else:
                    progress.ended = "epochs"
        except (_Stopped, TrainingError) as error:
            for callback in self.callbacks:
                callback.on_stop(self)
            if isinstance(error, TrainingError):
                raise
            return progress
        if self._best is not None:
            self.model.load_state_dict(self._best)
            self._best, self._best_is_model = None, True
        elif not self._best_is_model:
            progress.best_epoch = progress.epoch
            self.keep_average()
        for callback in self.callbacks:
            callback.on_end(self)
        return progress

    def stop(self) -> None:
        """Make `fit` return after the current step, with ``progress.ended`` empty.

        If no step is in progress, as in `Callback.on_epoch` and before `fit`, no further one is
        taken. The next call of `fit` continues. May be called from a callback, another thread or a
        signal handler.
        """
        self._stopping = True

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether `stop` was called in this process."""
        return self._stopping

    def _is_stopping(self) -> bool:
        """Return whether any process was asked to stop; all stop after the same step."""
        if self.shards.alone:
            return self._stopping
        return bool(self.shards.max_(torch.tensor(float(self._stopping), device=self.model.device)))

    def _stop(self) -> None:
        self.progress.elapsed = time.perf_counter() - self._started
        raise _Stopped

    def _stop_if_asked(self, done: int = 0, total: int = 0) -> None:
        if self._is_stopping():
            self._stop()

    def _epoch(self) -> None:
        """Train an epoch, or the rest of one, and validate."""
        settings, progress = self.settings, self.progress
        self._started = time.perf_counter() - progress.elapsed
        losses = self.train_epoch()
        progress.epoch += 1
        record: dict[str, Any] = {"epoch": progress.epoch, **losses}
        # Counts the whole epoch, even if a part was trained before a stop.
        skipped = len(self.batches) - round(self._summed["steps"].item())
        if skipped:
            record["skipped"] = skipped
        record["seconds"] = time.perf_counter() - self._started
        last = progress.epoch >= self.epochs
        if len(self.kg.valid) and (progress.epoch % settings.validate_every == 0 or last):
            try:
                record["valid"] = self.validate()
            except _Stopped:  # the epoch ends with its validation
                progress.epoch -= 1
                progress.batch, self.sums = len(self.batches), self._summed
                raise
        give_back_freed_memory()  # before checkpoints are written
        progress.seconds += time.perf_counter() - self._started
        progress.elapsed = 0.0
        if settings.patience is not None and progress.waited >= settings.patience:
            progress.ended = "patience"
        elif last:
            progress.ended = "epochs"
        for callback in self.callbacks:
            callback.on_epoch(self, record)

    def train_epoch(self) -> dict[str, float]:
        """Train on all queries, or on the rest of an epoch's; return the mean of each loss."""
        self._keep_best()
        self.model.train()
        progress = self.progress
        for step in self._steps():
            self._set_learning_rate(progress.batch)
            losses = step()
            progress.batch += 1
            progress.step += 1
            self._holes.look()
            for callback in self.callbacks:
                callback.on_step(self, losses)
            if self._is_stopping():
                self._settle()
                self._stop()
        self._settle()
        self._check_scale()
        sums = self.sums
        if not sums["steps"]:
            raise TrainingError(
                f"Epoch {progress.epoch + 1}: no step had a finite loss and gradient. {_ADVICE}"
            )
        progress.batch, self.sums, self._summed = 0, {}, sums
        return {
            name: (value / sums["steps"]).item() for name, value in sums.items() if name != "steps"
        }

    def _steps(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Yield the steps of an epoch, or of the rest of one, as callables."""
        done = self.progress.batch
        if not can_record(self):
            for batch in self.batches.epoch(done):
                yield functools.partial(self.train_step, batch)
            return
        if self.recorded is None:
            self.recorded = RecordedSteps(self)
        self.recorded.begin()
        for rows in self.batches.rows_of_epoch(done):
            yield functools.partial(self.recorded.step, rows)

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Run one step: losses (Eq. 8), backward pass, optimizers. Return the detached losses."""
        before = Before(self.buffers, self.model.device)
        losses, estimation, gradients = self.gradients_of(batch, before)
        health, bad = Health.of(
            losses if estimation is None else {**losses, "estimation": estimation},
            # In float16 the scaler checks the gradients: some overflow until it has found a scale.
            {} if self.scaler.is_enabled() else gradients,
            self.shards,
        )
        # The host does not wait for a GPU, which skips a bad step itself. The host learns of the
        # bad step during the next one, before that one changes anything.
        self.follow(health, before, batch)
        if self.model.device.type == "cuda":
            before.restore_buffers(where=bad)
            self.update(bad)
        elif self._settle():
            self.update()
            self._check_scale()
        else:
            before.restore_buffers()
        for name, value in {**losses, "steps": torch.ones_like(bad)}.items():
            added = torch.where(bad > 0, 0.0, value)
            self.sums[name] = self.sums[name] + added if name in self.sums else added
        return losses

    def follow(self, health: Health, before: Before, batch: Batch | Tensor) -> None:
        """Check the previous step (`_settle`), and register the one that is now running."""
        self._settle()
        progress = self.progress
        self._unsettled = _Step(
            health, before, batch, progress.batch, progress.step, self.batches.drawn
        )

    def gradients_of(
        self, batch: Batch, before: Before | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Tensor]]:
        """Return detached losses, the loss of L1's estimators, and the gradients by name.

        If ``before`` is passed, the batch is split into parts where memory runs out.
        """
        losses, estimation = self._gradients(batch, before)
        gradients = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        gradients.update({name: table.gradients()[1] for name, table in self.tables.items()})
        return losses, estimation, gradients

    def _gradients(
        self, batch: Batch, before: Before | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Run `_backward`, with smaller parts of the batch each time that memory runs out."""
        while True:
            try:
                return self._backward(batch)
            except MEMORY_ERRORS as error:
                # Several processes cannot retry: the others wait for this one in a collective.
                if before is None or not self.shards.alone:
                    raise
                self.parts.halve(error, len(batch.entity))
            # Only after the handler do tracebacks no longer hold the failed step's tensors.
            self.take_back(before)

    def take_back(self, before: Before) -> None:
        """Undo a step that ran out of memory, as if it had not begun."""
        self.forget_gradients()
        before.restore_random_states()
        before.restore_buffers()
        give_back_freed_memory()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_gradients(self) -> None:
        """Free the last step's gradients."""
        for parameter in self.named.values():
            parameter.grad = None
        for table in self.tables.values():
            table.forget()

    def _backward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Compute the gradients of a batch; return its losses and that of L1's estimators."""
        # Before the forward pass, whose memory need not hold the last step's gradients.
        self.forget_gradients()
        # Around the backward pass, too: what it recomputes looks rows up again.
        with self._following_rows():
            # With several streams, one could read from the cache what another is still casting.
            with torch.autocast(
                self.model.device.type,
                self.precision,
                enabled=self.precision != torch.float32,
                cache_enabled=not self.streams.are_several,
            ):
                losses, estimation = self.losses(batch)
            # L1's estimators learn from their own loss only, and the model does not learn from it.
            # Its backward pass comes first and retains the graph, which the model's then frees.
            estimating = [p for p in self.estimators if p.requires_grad]
            if (
                self.estimator_optimizer is None
                or estimation is None
                or not estimation.requires_grad
                or not estimating
            ):
                estimation = None
            else:
                # In the stream that computed L1; nothing else waits for it.
                with self.streams.beside("modalities", self.streams.begun, join=False):
                    estimation.backward(inputs=estimating, retain_graph=True)
                estimation = estimation.detach()
            wanted = [*(p for p in self.parameters if p.requires_grad), *self._looked_up()]
            if wanted and losses["loss"].requires_grad:
                self.scaler.scale(losses["loss"]).backward(inputs=wanted)
            elif estimation is None:
                raise IMVIAError(
                    "Training: the loss depends on no parameter that requires gradients, so"
                    " nothing would change. Call requires_grad_() on the parameters to train."
                )
        self.shards.sum_gradients(self.replicated)
        return {name: value.detach() for name, value in losses.items()}, estimation

    @contextmanager
    def _following_rows(self) -> Iterator[None]:
        """Make rows of `tables` that are looked up in this context leaves of their own."""
        for table in self.tables.values():
            table.lazy = True
        try:
            yield
        finally:
            for table in self.tables.values():
                table.lazy = False

    def update(self, bad: Tensor | None = None) -> None:
        """Step the optimizers, which skip the step where ``bad`` is 1, and update `average`."""
        if self.estimator_optimizer is not None:
            self.estimator_optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.estimator_optimizer.step()
        scale = None
        # The scaler refuses an optimizer without any gradient.
        optimizers: list[Any] = [
            optimizer
            for optimizer in (self.optimizer, self.table_optimizer)
            if optimizer is not None and _has_gradients(optimizer)
        ]
        rows = self.row_optimizer
        if rows is not None and self.scaler.is_enabled():
            step_by = rows.step_by
            leaves = [part for part in self._looked_up() if part.grad is not None]
            if leaves:
                optimizers.append(_Scaled(leaves, lambda: step_by(scale)))
            rows = None  # stepped by the scaler
        overflows = False
        if self.settings.gradient_clip is not None:
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)
            scale = self._clip(self.settings.gradient_clip)
            # The norm is over all gradients: an overflow in one optimizer's is now in all of them.
            overflows = self.scaler.is_enabled() and not scale > 0
        for optimizer in optimizers:
            if not self.scaler.is_enabled():
                optimizer.found_inf = bad
            if not overflows:
                self.scaler.step(optimizer)
        if optimizers:
            self.scaler.update()
        if rows is not None and (bad is None or not bad):
            rows.step_by(scale)
        if self.average is not None:
            self.average.update(self.progress.step)

    def _clip(self, max_norm: float) -> Tensor:
        """Clip the gradient, over all processes' rows, to a norm; return the factor."""

        def square(grads: list[Tensor]) -> Tensor:
            norms = torch._foreach_norm(grads) if grads else []
            zero = torch.zeros((), device=self.model.device)
            return torch.stack([zero, *norms]).square().sum()

        shared = {id(p) for p in self.replicated}
        grads = [(id(p) in shared, p.grad) for p in self.parameters if p.grad is not None]
        own = [grad for common, grad in grads if not common]
        own += [table.gradients()[1] for table in self.tables.values()]
        norm = square([grad for common, grad in grads if common])
        norm = (norm + self.shards.sum_(square(own))).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if grads:
            torch._foreach_mul_([grad for _, grad in grads], scale)
        return scale

    def _settle(self) -> bool:
        """Return whether the last step was finite; if not, raise or count it, by ``non_finite``."""
        step, self._unsettled = self._unsettled, None
        if step is None:
            return True
        losses, parameters = step.health.problems()
        if not losses and not parameters:
            return True
        message = self._described(step, losses, parameters)
        if self.settings.non_finite == "skip":
            self.progress.skipped += 1
            if self.progress.skipped == 1:
                logger.warning("%s The step is skipped, and so are further ones like it.", message)
            return False
        step.before.restore_buffers()
        step.before.restore_random_states()
        # At the first batch of an epoch, the order of the epoch is drawn again, too.
        state = step.drawn if step.place else self.batches.order_state
        self.batches.generator.set_state(state)
        self.progress.batch, self.progress.step = step.place, step.number
        self.progress.elapsed = time.perf_counter() - self._started
        raise TrainingError(f"{message} The weights are those from before this step. {_ADVICE}")

    def _described(self, step: _Step, losses: list[str], parameters: list[str]) -> str:
        problems = list(losses)
        if parameters:
            problems.append(f"the gradient of {listed(parameters)} is not finite")
        kg, batch = self.kg, step.batch
        if isinstance(batch, Tensor):
            batch = self.batches.filled(batch)
        relation = int(batch.relation[0])
        inverse = ", inverse" if relation >= kg.num_relations else ""
        return (
            f"Epoch {self.progress.epoch + 1}, batch {step.place + 1} of {len(self.batches)}"
            f" ({len(batch.entity)} queries, the first of {kg.entities[int(batch.entity[0])]!r}"
            f" under {kg.relations[relation % kg.num_relations]!r}{inverse}):"
            f" {', '.join(problems)}."
        )

    def _check_scale(self) -> None:
        """Raise where float16 gradients overflow although the loss is not scaled up any more."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise TrainingError(
                f"Epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}: gradients"
                f" overflow float16 at any scale. {_ADVICE}"
            )

    def _set_learning_rate(self, step: int) -> None:
        """Set the learning rates of the schedule; ``step`` counts within the epoch."""
        settings = self.settings
        if settings.schedule == "constant":
            return
        done = (self.progress.epoch + step / len(self.batches)) / max(self.epochs, 1)
        left = max(1 - done, 0.0)
        factor = left if settings.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
        rate = table_optimizer(settings)[1]
        rates = [
            (self.optimizer, settings.learning_rate),
            (self.table_optimizer, rate),
            (self.row_optimizer, rate),
        ]
        for optimizer, rate in rates:
            if optimizer is not None:
                set_rate(optimizer, rate * factor)

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the total loss and its terms (Eq. 4, 5, 7, 8), and that of L1's estimators."""
        return self.objective.losses(batch, self.streams)

    def _looked_up(self) -> list[Tensor]:
        return [rows for table in self.tables.values() for rows in table.looked_up()]

    def validate(self) -> dict[str, float]:
        """Rank both sides of the validation triples; keep the state if its MRR is the best."""
        if self.average is None or self._averaged:
            return self._validate()
        self.average.exchange()
        try:
            return self._validate()
        finally:
            self.average.exchange()

    def _warn_of_chance(self, mrr: float) -> None:
        """Warn, at the first validation, if the model ranks hardly better than by chance."""
        drawn = self._ranked_against
        number = self.kg.num_entities if drawn is None else len(drawn)
        first = self.progress.best_mrr is None and self.progress.epoch > 0
        if not (first and self.shards.is_first and number >= _WARN_FROM):
            return
        by_chance = (math.log(number) + 0.5772) / number  # the mean of 1, 1/2, …, 1/number
        if mrr < 2 * by_chance:
            logger.warning(
                "After epoch %d the validation MRR is %.2g, and by chance it would be %.2g: nothing"
                " was learned yet. If it does not rise, try a smaller lambda_regularization (it is"
                " %g), or another learning rate.",
                self.progress.epoch,
                mrr,
                by_chance,
                self.settings.lambda_regularization,
            )

    def _validate(self) -> dict[str, float]:
        ranking = rank(
            self.model,
            self.kg.valid,
            self.known,
            self.settings.ranking_batch_size,
            heads=(),
            on_batch=self._stop_if_asked,
            candidates=self._ranked_against,
        )
        metrics = rank_metrics(torch.cat([ranking.head[DECISION], ranking.tail[DECISION]]))
        progress = self.progress
        self._warn_of_chance(metrics["mrr"])
        if progress.best_mrr is None or metrics["mrr"] > progress.best_mrr:
            progress.best_mrr, progress.best_epoch = metrics["mrr"], progress.epoch
            progress.waited = 0
            # The averaged weights are in the model during this validation only.
            averaged = self.average is not None
            self._best = _copy(self.model.state_dict()) if averaged else None
            self._best_is_model = not averaged
        else:
            progress.waited += 1
        return metrics


class _Scaled:
    """Looked-up rows of tables as an optimizer for `torch.amp.GradScaler`.

    The scaler unscales their gradients, and skips the step where one of them has overflowed.
    """

    def __init__(self, rows: Sequence[Tensor], step: Callable[[], None]) -> None:
        self.param_groups = [{"params": list(rows)}]
        self.step = step


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


#: Default of ``epochs``: as many as take `_STEPS` steps, and `_EPOCHS` at least.
_STEPS, _EPOCHS = 500, 32

#: Defaults of ``lambda_regularization``: below `MANY` entities, and from there on.
_WEIGHTS = (0.1, 0.01)
#: Smallest number of candidates for `_warn_of_chance`; fewer are soon ranked better.
_WARN_FROM = 10_000

#: Settings that are read during training, and so may change; the rates do so under a schedule.
CHANGEABLE = ("epochs", "patience", "validate_every", "ranking_batch_size", "checkpoint_every")
_SCHEDULED = ("learning_rate", "table_learning_rate")

#: What to try where a loss or gradient is not finite.
_ADVICE = (
    "Try a smaller learning_rate, a gradient_clip, or precision=float32, or skip such steps with"
    " non_finite=skip, which may also be set when a run is resumed."
)


__all__ = [
    "Average",
    "Batch",
    "Batches",
    "Callback",
    "Progress",
    "Trainer",
    "cpu_has_bfloat16",
    "give_back_freed_memory",
    "keep_freed_memory",
    "resolve_device",
    "training_dtype",
]
