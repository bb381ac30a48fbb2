"""The fit loop: batches of queries, one step, epochs with validation and early stopping.

It knows nothing of files or the terminal but through callbacks.
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
    """What training tells whoever wants to know; override what is of interest."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        told = {name for name in vars(Callback) if name.startswith("on_")}
        for name in vars(cls).keys() - told:
            if name.startswith("on_"):
                logger.warning(
                    "%s.%s: training tells a callback nothing of that name; it calls %s.",
                    cls.__name__,
                    name,
                    ", ".join(sorted(told)),
                )

    def on_start(self, trainer: Trainer) -> None:
        """Before the first epoch of this call."""

    def on_step(self, trainer: Trainer, losses: dict[str, Tensor]) -> None:
        """After a step; ``losses`` are detached scalars on the model's device."""

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After an epoch and its validation, with what ``metrics.jsonl`` holds of it."""

    def on_stop(self, trainer: Trainer) -> None:
        """Where training ends before its time, on request or for a `TrainingError`: after a step.

        What is kept of the trainer now is gone on with at the next step, to the bit.
        """

    def on_end(self, trainer: Trainer) -> None:
        """After the last epoch."""

    def on_close(self, trainer: Trainer) -> None:
        """Last of all, however training ended: by an error, too."""


class _Stopped(Exception):  # noqa: N818 - it was asked for
    """Training was asked to stop."""


@dataclass
class Progress:
    """How far training has come; with the tensors of a `Trainer`, all that resuming needs."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_mrr: float | None = None
    #: Validations since the best one.
    waited: int = 0
    seconds: float = 0.0
    #: Why training ended; empty while it has not.
    ended: str = ""
    #: Of the epoch that is not over: batches done, and seconds.
    batch: int = 0
    elapsed: float = 0.0
    #: Steps that were left out because their loss or gradient was not finite.
    skipped: int = 0


class _Step(NamedTuple):
    """A step whose health is not known yet, and what taking it back needs."""

    health: Health
    before: Before
    #: Or the rows that it is made of.
    batch: Batch | Tensor
    #: Its place in the epoch and in all, and the state that its batch was drawn in.
    place: int
    number: int
    drawn: Tensor


def checked_callbacks(callbacks: Callback | Sequence[Callback]) -> list[Callback]:
    """A list of callbacks, of one too."""
    if isinstance(callbacks, Callback):
        return [callbacks]
    found: list[Any] = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in found:
        if not isinstance(callback, Callback):
            what = f"the class {callback.__name__}" if isinstance(callback, type) else callback
            raise SettingsError(
                f"callbacks: expected objects of imvia_graph.Callback, received {what}."
                + (" Call it, to make one." if isinstance(callback, type) else "")
            )
    return found


class Trainer:
    """Trains a model on the training triples of a graph.

    Parameters
    ----------
    model : IMVIA
        Trained in place, on the device where it is; parameters that require no gradient stay as
        they are.
    kg : MultiViewKG
        Its ``train`` is trained on, its ``valid`` chooses the epoch; ``test`` only filters.
    settings : Settings
        See the groups *losses* and *training*.
    callbacks : sequence of Callback, optional
        What is told of training, in this order. Default: none.

    Attributes
    ----------
    settings : Settings
        Those given, with ``epochs``, ``lambda_regularization``, ``complex_head`` and ``precision``
        where they leave these open.
    progress : Progress
        How far it has come.
    best_state : dict of str to Tensor or None
        The model's state at the best validation MRR. Until training goes on, and once it has ended,
        these are the model's own tensors; else a copy, mapped from its file where there is one.
    average : Average or None
        The moving average of the weights, with ``ema_decay``.
    sums : dict of str to Tensor
        The losses of the epoch so far, added up, and the number of ``steps``.

    Raises
    ------
    DataError
        The graph is not that of the model.
    SettingsError
        Settings or callbacks that are none; float16 with several processes; a model in half
        precision, which is not trained: where ``precision`` says so, products are in it, and
        parameters in float32.

    Notes
    -----
    The test triples take part in one thing only: the filter of validation ranks, as is customary.
    Without validation triples nothing is chosen, and the last epoch is kept.

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
        callbacks: Sequence[Callback] = (),
    ) -> None:
        settings = checked_settings(settings)
        model.check_graph(kg)
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise SettingsError(
                    f"Training: expected a model in float32 or float64; {name} is in"
                    f" {parameter.dtype}. Train model.float(), whose products the setting precision"
                    " has in half precision."
                )
        self.model, self.kg, self.shards = model, kg, model.shards
        self.callbacks = checked_callbacks(callbacks)
        self.progress = Progress()
        self.sums: dict[str, Tensor] = {}
        self.parts = Parts("training on a batch of queries")
        self._holes = Holes()
        self._stopping = False
        self._started = time.perf_counter()
        self._unsettled: _Step | None = None
        self._best: dict[str, Tensor] | None = None
        self._best_is_model = False
        #: Whether the average is in the model, and what is trained in the average.
        self._averaged = False
        self.batches = Batches(kg, settings, model.device)
        if settings.epochs is None:
            enough = math.ceil(_STEPS / max(len(self.batches), 1))
            settings = settings.replace(epochs=max(_EPOCHS, enough))
        if settings.lambda_regularization is None:
            weight = _WEIGHTS[kg.num_entities >= MANY]
            settings = settings.replace(lambda_regularization=weight)
        if settings.complex_head is None:
            settings = settings.replace(complex_head=model.settings.complex_head)
        self.precision = training_dtype(settings, model.device)
        if settings.precision == "auto":
            lacks = float(self.precision == torch.float32)
            if self.shards.max_(torch.tensor([lacks], device=model.device)).item():
                self.precision = torch.float32  # what all processes have
            chosen = str(self.precision).removeprefix("torch.")
            settings = settings.replace(precision=chosen)
        self.settings = settings
        self.objective = Objective(model, settings, self.parts)
        self.known = kg.answers()
        several = settings.ranking_candidates
        self._ranked_against = (
            None if several is None else draw_candidates(kg.num_entities, several, settings.seed)
        )
        estimators = [] if model.information is None else list(model.information.parameters())
        self.estimators = estimators
        tables = {id(table.weight): table for table in model.entity_tables}
        by_rows = follows_rows(settings)
        theirs = {id(parameter) for parameter in estimators}
        ours = [p for p in model.parameters() if id(p) not in theirs]
        #: What every process holds, and what autograd makes gradients of.
        self.replicated = [p for p in ours if id(p) not in tables]
        self.parameters = self.replicated if by_rows else ours
        #: Tables whose rows are followed one by one, by the names of their weights.
        self.tables = {
            name: tables[id(p)] for name, p in model.named_parameters() if id(p) in tables
        }
        if not by_rows:
            self.tables = {}
        self.named = {name: p for name, p in model.named_parameters() if name not in self.tables}
        # Persistent ones: the views are buffers, too, but nothing changes them.
        learned = {name for name, _ in model.named_parameters()}
        self.buffers = [model.get_buffer(name) for name in model.state_dict().keys() - learned]
        kind, rate = table_optimizer(settings)
        decay = settings.weight_decay
        apart = {id(table.weight) for table in (*model.relation_tables, *model.entity_tables)}
        if settings.table_optimizer == "same":
            apart = set()
        layers = [p for p in self.parameters if id(p) not in apart]
        looked_up = [p for p in self.parameters if id(p) in apart]
        small = [table.weight for table in model.complex_tables]
        self.optimizer = make_optimizer(
            settings.optimizer, layers, settings.learning_rate, decay, small
        )
        #: That of the tables, where they have one of their own: all rows of each.
        self.table_optimizer = (
            make_optimizer(kind, looked_up, rate, decay, small) if looked_up else None
        )
        self.row_optimizer = (
            RowOptimizer(
                model.entity_tables,
                kind,
                rate,
                decay,
                settings.entity_optimizer == "rowwise",
                [table for table in model.complex_tables if isinstance(table, EntityTable)],
            )
            if by_rows
            else None
        )
        self.estimator_optimizer = (
            torch.optim.Adam(
                estimators,
                lr=settings.information_learning_rate,
                fused=True if model.device.type == "cuda" else None,
            )
            if estimators and settings.lambda_information
            else None
        )
        if self.precision == torch.float16 and not self.shards.alone:
            raise SettingsError(
                "Setting precision: float16 is for one process; with several take bfloat16 or"
                " float32."
            )
        self.scaler = torch.amp.GradScaler(
            model.device.type, enabled=self.precision == torch.float16
        )
        self.average = Average(model, settings.ema_decay) if settings.ema_decay else None
        #: Sums of the last epoch that was trained whole.
        self._summed: dict[str, Tensor] = {}
        #: On a GPU: steps that were recorded, and what their parts run in.
        self.recorded: RecordedSteps | None = None
        self.streams = Streams()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All of them."""
        every = (
            self.optimizer,
            self.table_optimizer,
            self.row_optimizer,
            self.estimator_optimizer,
        )
        return [optimizer for optimizer in every if optimizer is not None]

    @property
    def epochs(self) -> int:
        """How many there are to be at most."""
        assert self.settings.epochs is not None
        return self.settings.epochs

    @property
    def best_state(self) -> dict[str, Tensor] | None:
        """The model's state at the best validation MRR; see above."""
        return self.model.state_dict() if self._best_is_model else self._best

    @best_state.setter
    def best_state(self, state: dict[str, Tensor] | None) -> None:
        self._best, self._best_is_model = state, False

    def _keep_best(self) -> None:
        """Copy the best state where it is the model's own: that is about to change."""
        if self._best_is_model:
            self.best_state = _copy(self.model.state_dict())
        if self._averaged and self.average is not None:  # training goes on with its own weights
            self.average.exchange()
            self._averaged = False

    def keep_average(self) -> None:
        """Put the average, if there is one, into the model, until training goes on."""
        if self.average is not None and not self._averaged:
            self.average.exchange()
            self._averaged = True

    # -- the loop -------------------------------------------------------------------------------

    def fit(self) -> Progress:
        """Train until the epochs are done or validation has not improved for ``patience`` times.

        Raises
        ------
        TrainingError
            A loss or a gradient that is not finite, unless ``non_finite`` has such steps skipped;
            the model is as it was before that step.
        OutOfMemoryError
            A single query that does not fit into memory.
        """
        settings, progress = self.settings, self.progress
        epochs = self.epochs
        more_patience = settings.patience is None or progress.waited < settings.patience
        if progress.epoch < epochs and more_patience:
            progress.ended = ""  # a run that ended, resumed with more epochs or patience
        try:
            return self._fit(epochs)
        finally:
            for table in self.tables.values():
                table.forget()
            with ExitStack() as closing:  # each is closed, whatever another one raises
                for callback in reversed(self.callbacks):
                    closing.callback(callback.on_close, self)

    def _fit(self, epochs: int) -> Progress:
        progress = self.progress
        for callback in self.callbacks:
            callback.on_start(self)
        try:
            while not progress.ended:
                give_back_freed_memory()
                if progress.epoch < epochs:
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
        """Have `fit` return once the step in hand is done, with ``progress.ended`` empty.

        May be called from a callback, another thread or a signal handler.
        """
        self._stopping = True

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether `stop` was called, in this process."""
        return self._stopping

    def _is_stopping(self) -> bool:
        """Whether any process was asked to stop: all do, after the same step."""
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
        """An epoch, or what is left of it, and its validation."""
        settings, progress = self.settings, self.progress
        self._started = time.perf_counter() - progress.elapsed
        losses = self.train_epoch()
        progress.epoch += 1
        record: dict[str, Any] = {"epoch": progress.epoch, **losses}
        # Of the whole epoch, also where a part of it was trained before a stop.
        skipped = len(self.batches) - round(self._summed["steps"].item())
        if skipped:
            record["skipped"] = skipped
        record["seconds"] = time.perf_counter() - self._started
        last = progress.epoch >= self.epochs
        if len(self.kg.valid) and (progress.epoch % settings.validate_every == 0 or last):
            try:
                record["valid"] = self.validate()
            except _Stopped:  # without its validation it is not over
                progress.epoch -= 1
                progress.batch, self.sums = len(self.batches), self._summed
                raise
        give_back_freed_memory()  # saving is next
        progress.seconds += time.perf_counter() - self._started
        progress.elapsed = 0.0
        if settings.patience is not None and progress.waited >= settings.patience:
            progress.ended = "patience"
        elif last:
            progress.ended = "epochs"
        for callback in self.callbacks:
            callback.on_epoch(self, record)

    def train_epoch(self) -> dict[str, float]:
        """One pass over the queries, or what is left of it: the mean of each loss."""
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
                f"Epoch {progress.epoch + 1}: not one of its steps was finite. {_ADVICE}"
            )
        progress.batch, self.sums, self._summed = 0, {}, sums
        return {
            name: (value / sums["steps"]).item() for name, value in sums.items() if name != "steps"
        }

    def _steps(self) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Yield the steps of an epoch, or what is left of it."""
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
        """One step: losses of Eq. 8, backward, optimizers. Returns detached losses."""
        before = Before(self.buffers, self.model.device)
        losses, estimation, gradients = self.gradients_of(batch, before)
        health = Health(
            losses if estimation is None else {**losses, "estimation": estimation},
            # In float16 the scaler sees to the gradients: some overflow until it has found a scale.
            {} if self.scaler.is_enabled() else gradients,
            self.shards,
        )
        # A GPU is not waited for: it leaves a bad step out itself, and the host learns of it while
        # the next one is under way, before that changes anything.
        self.follow(health, before, batch)
        if self.model.device.type == "cuda":
            before.restore_buffers(where=health.bad)
            self.update(health.bad)
        elif self._settle():
            self.update()
            self._check_scale()
        else:
            before.restore_buffers()
        for name, value in {**losses, "steps": torch.ones_like(health.bad)}.items():
            added = torch.where(health.bad > 0, 0.0, value)
            self.sums[name] = self.sums[name] + added if name in self.sums else added
        return losses

    def follow(self, health: Health, before: Before, batch: Batch | Tensor) -> None:
        """Take note of a step that is under way, and settle the one before it."""
        self._settle()
        progress = self.progress
        self._unsettled = _Step(
            health, before, batch, progress.batch, progress.step, self.batches.drawn
        )

    def gradients_of(
        self, batch: Batch, before: Before | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Tensor]]:
        """Detached losses of a batch, that of L1's estimators, and the gradients, by name.

        With what was ``before``, the batch is done in parts where memory runs out.
        """
        losses, estimation = self._gradients(batch, before)
        gradients = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        gradients.update({name: table.gradients()[1] for name, table in self.tables.items()})
        return losses, estimation, gradients

    def _gradients(
        self, batch: Batch, before: Before | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Detached losses of a batch, whose gradients are in the parameters; fit into memory."""
        while True:
            try:
                return self._backward(batch)
            except MEMORY_ERRORS as error:
                # With several processes the others wait for this one's part of the step.
                if before is None or not self.shards.alone:
                    raise
                self.parts.halve(error, len(batch.entity))
            # Only here are the tensors of the step that failed let go of.
            self.take_back(before)

    def take_back(self, before: Before) -> None:
        """Let go of a step whose memory ran out, as if it had not been begun."""
        self.forget_gradients()
        before.restore_random_states()
        before.restore_buffers()
        give_back_freed_memory()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_gradients(self) -> None:
        """Let go of the last step's gradients."""
        for parameter in self.named.values():
            parameter.grad = None
        for table in self.tables.values():
            table.forget()

    def _backward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        # Before the forward pass: the last step's gradients need not be held beside it.
        self.forget_gradients()
        # What is computed again in the backward pass is looked up again, too.
        with self._following_rows():
            # What autocast has converted in one stream it would use in another without waiting.
            with torch.autocast(
                self.model.device.type,
                self.precision,
                enabled=self.precision != torch.float32,
                cache_enabled=not self.streams.are_several,
            ):
                losses, estimation = self.losses(batch)
            # The estimators of L1 learn from their own loss alone, and the model not from that. It
            # comes first: the graph is kept for the model's, which lets go of it as it passes.
            estimating = [p for p in self.estimators if p.requires_grad]
            if (
                self.estimator_optimizer is None
                or estimation is None
                or not estimation.requires_grad
                or not estimating
            ):
                estimation = None
            else:
                # Where L1 was computed, and nothing else waits for it.
                with self.streams.beside("modalities", self.streams.begun, join=False):
                    estimation.backward(inputs=estimating, retain_graph=True)
                estimation = estimation.detach()
            wanted = [*(p for p in self.parameters if p.requires_grad), *self._looked_up()]
            if wanted and losses["loss"].requires_grad:
                self.scaler.scale(losses["loss"]).backward(inputs=wanted)
            elif estimation is None:
                raise IMVIAError(
                    "Training: the loss depends on no parameter that requires gradients, and"
                    " nothing would change. Call requires_grad_() on what is to be trained."
                )
        self.shards.sum_gradients(self.replicated)
        return {name: value.detach() for name, value in losses.items()}, estimation

    @contextmanager
    def _following_rows(self) -> Iterator[None]:
        """Have rows of `tables` that are looked up meanwhile be leaves of their own."""
        for table in self.tables.values():
            table.lazy = True
        try:
            yield
        finally:
            for table in self.tables.values():
                table.lazy = False

    def update(self, bad: Tensor | None = None) -> None:
        """Step the optimizers; on a GPU they leave it out where ``bad`` is 1."""
        if self.estimator_optimizer is not None:
            self.estimator_optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.estimator_optimizer.step()
        scale = None
        # The scaler takes none all of whose parameters are left as they are.
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
            rows = None  # the scaler sees to them
        overflows = False
        if self.settings.gradient_clip is not None:
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)
            scale = self._clip(self.settings.gradient_clip)
            # The norm is that of all: what overflowed of one optimizer's is in every gradient now.
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

    def _clip(self, most: float) -> Tensor:
        """Shorten the gradient, of all processes' rows, to a norm; returns the factor."""

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
        scale = (most / (norm + 1e-6)).clamp(max=1.0)
        if grads:
            torch._foreach_mul_([grad for _, grad in grads], scale)
        return scale

    def _settle(self) -> bool:
        """Whether the last step was finite; where it was not, stop or count, as set."""
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
                logger.warning("%s The step is left out, and so are others like it.", message)
            return False
        # As if the step had not been begun.
        step.before.restore_buffers()
        step.before.restore_random_states()
        # At the first batch of an epoch its order is drawn again, too.
        again = step.drawn if step.place else self.batches.order_state
        self.batches.generator.set_state(again)
        self.progress.batch, self.progress.step = step.place, step.number
        self.progress.elapsed = time.perf_counter() - self._started
        raise TrainingError(f"{message} The weights are those from before it. {_ADVICE}")

    def _described(self, step: _Step, losses: list[str], parameters: list[str]) -> str:
        told = list(losses)
        if parameters:
            told.append(f"the gradient of {listed(parameters)} is not finite")
        kg, batch = self.kg, step.batch
        if isinstance(batch, Tensor):
            batch = self.batches.filled(batch)
        relation = int(batch.relation[0])
        inverse = ", inverse" if relation >= kg.num_relations else ""
        return (
            f"Epoch {self.progress.epoch + 1}, batch {step.place + 1} of {len(self.batches)}"
            f" ({len(batch.entity)} queries, the first of {kg.entities[int(batch.entity[0])]!r}"
            f" under {kg.relations[relation % kg.num_relations]!r}{inverse}):"
            f" {', '.join(told)}."
        )

    def _check_scale(self) -> None:
        """In float16: gradients that overflow although they are not scaled up any more."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise TrainingError(
                f"Epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}: gradients"
                f" overflow float16 at any scale. {_ADVICE}"
            )

    def _set_learning_rate(self, step: int) -> None:
        """Follow the schedule; ``step`` counts within the epoch."""
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
        """The total and its parts (Eq. 4, 5, 7, 8), and the loss of L1's estimators."""
        return self.objective.losses(batch, self.streams)

    def _looked_up(self) -> list[Tensor]:
        return [rows for table in self.tables.values() for rows in table.looked_up()]

    def validate(self) -> dict[str, float]:
        """Metrics of both sides on the validation triples; keeps the state if they are the best."""
        if self.average is None or self._averaged:
            return self._validate()
        self.average.exchange()
        try:
            return self._validate()
        finally:
            self.average.exchange()

    def _warn_of_chance(self, mrr: float) -> None:
        """Say, at the first validation, that nothing was learned before it."""
        several = self._ranked_against
        number = self.kg.num_entities if several is None else len(several)
        first = self.progress.best_mrr is None and self.progress.epoch > 0
        if not (first and self.shards.is_first and number >= _TELLING):
            return
        by_chance = (math.log(number) + 0.5772) / number  # the mean of 1, 1/2, …, 1/number
        if mrr < 2 * by_chance:
            logger.warning(
                "After epoch %d the validation MRR is %.2g, and by chance it would be %.2g: nothing"
                " was learned yet. If that stays so, try a smaller lambda_regularization (it is"
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
            # The average is in the model for this validation alone.
            averaged = self.average is not None
            self._best = _copy(self.model.state_dict()) if averaged else None
            self._best_is_model = not averaged
        else:
            progress.waited += 1
        return metrics


class _Scaled:
    """Rows of tables that were looked up, as `torch.amp.GradScaler` takes an optimizer.

    It unscales their gradients, and leaves the step out where one of them has overflowed.
    """

    def __init__(self, rows: Sequence[Tensor], step: Callable[[], None]) -> None:
        self.param_groups = [{"params": list(rows)}]
        self.step = step


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


#: Where the settings name no number of epochs: as many as take so many steps, but at least …
_STEPS, _EPOCHS = 500, 32

#: Where the settings name no weight of the regularisation: below `MANY` entities, and from there.
_WEIGHTS = (0.1, 0.01)
#: Entities from which on ranks like those of chance are told of: fewer are soon ranked better.
_TELLING = 10_000

#: What to try where numbers are none.
_ADVICE = (
    "Try a smaller learning_rate, a gradient_clip, or precision=float32, or leave such steps out"
    " with non_finite=skip, which a resumed run takes, too."
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
