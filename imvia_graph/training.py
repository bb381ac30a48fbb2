"""The fit loop: batches of queries, one step, epochs with validation and early stopping.

It knows nothing of files or the terminal but through callbacks.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import logging
import math
import mmap
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from imvia_graph._guards import MEMORY_ERRORS, Before, Health, Parts, listed
from imvia_graph.answers import AnswerIndex, expand
from imvia_graph.errors import SettingsError, TrainingError
from imvia_graph.evaluation import rank, rank_metrics
from imvia_graph.kg import MultiViewKG
from imvia_graph.losses import (
    Positives,
    completion,
    dura,
    factored_completion,
    total_loss,
)
from imvia_graph.model import DECISION, IMVIA
from imvia_graph.settings import Settings

logger = logging.getLogger(__name__)


class Callback:
    """What training tells whoever wants to know; override what is of interest."""

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


@dataclass
class Batch:
    """A batch of queries: (entity, relation, answer), and which scores are positives.

    ``candidate`` is None where all entities are candidates, else (B, 1 + negatives) int64 with the
    answer in column 0.
    """

    entity: Tensor
    relation: Tensor
    positives: Positives
    candidate: Tensor | None = None

    def of(self, rows: Tensor) -> Batch:
        """The batch of some of the queries."""
        place = torch.full_like(self.entity, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        row, col, weight = self.positives
        row = place[row]
        weight = None if weight is None else weight[rows]
        positives = Positives(row[row >= 0], col[row >= 0], weight)
        candidate = None if self.candidate is None else self.candidate[rows]
        return Batch(self.entity[rows], self.relation[rows], positives, candidate)


class _Step(NamedTuple):
    """A step whose health is not known yet, and what taking it back needs."""

    health: Health
    before: Before
    batch: Batch
    #: Its place in the epoch and in all, and the state that its batch was drawn in.
    place: int
    number: int
    drawn: Tensor


class Trainer:
    """Trains a model on the training triples of a graph.

    Parameters
    ----------
    model : IMVIA
        Trained in place, on the device where it is.
    kg : MultiViewKG
        Its ``train`` is trained on, its ``valid`` chooses the epoch; ``test`` only filters.
    settings : Settings
        See the groups *losses* and *training*.
    callbacks : sequence of Callback, optional

    Attributes
    ----------
    settings : Settings
        Those given, with a number of ``epochs`` where they leave it open.
    progress : Progress
        How far it has come.
    best_state : dict of str to Tensor or None
        Copy of the model's state at the best validation MRR.
    average : Average or None
        The moving average of the weights, with ``ema_decay``.
    sums : dict of str to Tensor
        The losses of the epoch so far, added up, and the number of ``steps``.

    Notes
    -----
    The test triples take part in one thing only: the filter of validation ranks, as is customary.
    Without validation triples nothing is chosen, and the last epoch is kept.
    """

    def __init__(
        self,
        model: IMVIA,
        kg: MultiViewKG,
        settings: Settings,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model, self.kg = model, kg
        self.callbacks = list(callbacks)
        self.progress = Progress()
        self.sums: dict[str, Tensor] = {}
        self.parts = Parts("training on a batch of queries")
        self._holes = _Holes()
        self._stopping = False
        self._started = time.perf_counter()
        self._unsettled: _Step | None = None
        self.best_state: dict[str, Tensor] | None = None
        self.batches = Batches(kg, settings, model.device)
        if settings.epochs is None:
            enough = math.ceil(_STEPS / max(len(self.batches), 1))
            settings = settings.replace(epochs=max(_EPOCHS, enough))
        self.settings = settings
        self.precision = training_dtype(settings, model.device)
        self.known = kg.answers()
        estimators = [] if model.information is None else list(model.information.parameters())
        self.estimators = estimators
        theirs = {id(parameter) for parameter in estimators}
        ours = [p for p in model.parameters() if id(p) not in theirs]
        self.parameters = ours
        self.named = dict(model.named_parameters())
        # Persistent ones: the views are buffers, too, but nothing changes them.
        self.buffers = [model.get_buffer(name) for name in model.state_dict().keys() - self.named]
        self.optimizer = make_optimizer(settings, ours)
        self.estimator_optimizer = (
            torch.optim.Adam(
                estimators,
                lr=settings.information_learning_rate,
                fused=True if model.device.type == "cuda" else None,
            )
            if estimators and settings.lambda_information
            else None
        )
        self.scaler = torch.amp.GradScaler(
            model.device.type, enabled=self.precision == torch.float16
        )
        self.average = Average(model, settings.ema_decay) if settings.ema_decay else None

    @property
    def epochs(self) -> int:
        """How many there are to be at most."""
        assert self.settings.epochs is not None
        return self.settings.epochs

    # -- the loop -------------------------------------------------------------------------------

    def fit(self) -> Progress:
        """Train until the epochs are done or validation has not improved for ``patience`` times."""
        settings, progress = self.settings, self.progress
        epochs = self.epochs
        more_patience = settings.patience is None or progress.waited < settings.patience
        if progress.epoch < epochs and more_patience:
            progress.ended = ""  # a run that ended, resumed with more epochs or patience
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
        if self.best_state is not None:
            self.model.load_state_dict(self.best_state)
        else:
            progress.best_epoch = progress.epoch
            if self.average is not None:
                self.average.exchange()
        for callback in self.callbacks:
            callback.on_end(self)
        return progress

    def stop(self) -> None:
        """Have `fit` return once the step in hand is done, with ``progress.ended`` empty.

        May be called from a callback, another thread or a signal handler.
        """
        self._stopping = True

    def _stop_if_asked(self, done: int = 0, total: int = 0) -> None:
        if self._stopping:
            self.progress.elapsed = time.perf_counter() - self._started
            raise _Stopped

    def _epoch(self) -> None:
        """An epoch, or what is left of it, and its validation."""
        settings, progress = self.settings, self.progress
        self._started = time.perf_counter() - progress.elapsed
        skipped = progress.skipped
        sums = self.sums
        losses = self.train_epoch()
        progress.epoch += 1
        record: dict[str, Any] = {"epoch": progress.epoch, **losses}
        if progress.skipped > skipped:
            record["skipped"] = progress.skipped - skipped
        record["seconds"] = time.perf_counter() - self._started
        last = progress.epoch >= self.epochs
        if len(self.kg.valid) and (progress.epoch % settings.validate_every == 0 or last):
            try:
                record["valid"] = self.validate()
            except _Stopped:  # without its validation it is not over
                progress.epoch -= 1
                progress.batch, self.sums = len(self.batches), sums
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
        self.model.train()
        progress, sums = self.progress, self.sums
        for batch in self.batches.epoch(progress.batch):
            self._set_learning_rate(progress.batch)
            losses = self.train_step(batch)
            progress.batch += 1
            progress.step += 1
            self._holes.look()
            for callback in self.callbacks:
                callback.on_step(self, losses)
            if self._stopping:
                self._settle()
                self._stop_if_asked()
        self._settle()
        self._check_scale()
        if not sums["steps"]:
            raise TrainingError(
                f"Epoch {progress.epoch + 1}: not one of its steps was finite. {_ADVICE}"
            )
        progress.batch, self.sums = 0, {}
        return {
            name: (value / sums["steps"]).item() for name, value in sums.items() if name != "steps"
        }

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step: losses of Eq. 8, backward, optimizers. Returns detached losses."""
        before = Before(self.buffers, self.model.device)
        losses, estimation = self._gradients(batch, before)
        health = Health(
            losses if estimation is None else {**losses, "estimation": estimation},
            # In float16 the scaler sees to the gradients: some overflow until it has found a scale.
            {} if self.scaler.is_enabled() else self.named,
        )
        # A GPU is not waited for: it leaves a bad step out itself, and the host learns of it while
        # the next one is under way, before that changes anything.
        self._settle()
        progress = self.progress
        self._unsettled = _Step(
            health, before, batch, progress.batch, progress.step, self.batches.drawn
        )
        if self.model.device.type == "cuda":
            before.restore_buffers(where=health.bad)
            self._update(health.bad)
        elif self._settle():
            self._update()
            self._check_scale()
        else:
            before.restore_buffers()
        for name, value in {**losses, "steps": torch.ones_like(health.bad)}.items():
            added = torch.where(health.bad > 0, 0.0, value)
            self.sums[name] = self.sums[name] + added if name in self.sums else added
        return losses

    def _gradients(self, batch: Batch, before: Before) -> tuple[dict[str, Tensor], Tensor | None]:
        """Detached losses of a batch, whose gradients are in the parameters; fit into memory."""
        while True:
            try:
                return self._backward(batch)
            except MEMORY_ERRORS as error:
                self.parts.halve(error, len(batch.entity))
            # Only here are the tensors of the step that failed let go of.
            self._zero_grad()
            before.restore_random_states()
            before.restore_buffers()
            give_back_freed_memory()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    def _zero_grad(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None

    def _backward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        # Before the forward pass: the last step's gradients need not be held beside it.
        self._zero_grad()
        with torch.autocast(
            self.model.device.type, self.precision, enabled=self.precision != torch.float32
        ):
            losses, estimation = self.losses(batch)
        # The estimators of L1 learn from their own loss alone, and the model not from that. It
        # comes first: the graph is kept for the model's, which lets go of it as it passes.
        if self.estimator_optimizer is None or estimation is None or not estimation.requires_grad:
            estimation = None
        else:
            estimation.backward(inputs=self.estimators, retain_graph=True)
            estimation = estimation.detach()
        self.scaler.scale(losses["loss"]).backward(inputs=self.parameters)
        return {name: value.detach() for name, value in losses.items()}, estimation

    def _update(self, bad: Tensor | None = None) -> None:
        """Step the optimizers; on a GPU they leave it out where ``bad`` is 1."""
        if self.estimator_optimizer is not None:
            self.estimator_optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.estimator_optimizer.step()
        if self.settings.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.parameters, self.settings.gradient_clip)
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.progress.step)

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
        self.batches.generator.set_state(step.drawn)
        self.progress.batch, self.progress.step = step.place, step.number
        self.progress.elapsed = time.perf_counter() - self._started
        raise TrainingError(f"{message} The weights are those from before it. {_ADVICE}")

    def _described(self, step: _Step, losses: list[str], parameters: list[str]) -> str:
        told = list(losses)
        if parameters:
            told.append(f"the gradient of {listed(parameters)} is not finite")
        kg, batch = self.kg, step.batch
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
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None]:
        """The total and its parts (Eq. 4, 5, 7, 8), and the loss of L1's estimators."""
        model, settings = self.model, self.settings
        embedding = model.embed(batch.entity, batch.relation)
        queries = model.decode(embedding, batch.relation)
        l3, regularization = self._completion(batch, embedding.heads, queries)
        l1 = l2 = l3.new_zeros(())
        estimation = None
        sources = {name: embedding.heads[name] for name in model.sources}
        # Autocast makes the products in them; the sums over what comes of those want float32.
        sources = {name: value.float() for name, value in sources.items()}
        if model.alignment is not None and settings.lambda_alignment:
            l2 = model.alignment(sources, batch.entity, embedding.present)
        if model.information is not None and settings.lambda_information:
            l1, estimation = model.information.both(sources, embedding.present)
        total = total_loss(
            l1,
            l2,
            l3,
            settings.lambda_information,
            settings.lambda_alignment,
            settings.lambda_completion,
        )
        parts = {"information": l1, "alignment": l2, "completion": l3}
        if settings.lambda_regularization:
            total = total + settings.lambda_regularization * regularization
            parts["regularization"] = regularization
        return {"loss": total, **parts}, estimation

    def _completion(
        self, batch: Batch, heads: Mapping[str, Tensor], queries: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """L3 and the regularisation of a batch; ``heads`` are its entities' embeddings.

        With ``candidates="relation"`` the tables are made a relation.
        """
        if self.settings.candidates == "shared":
            return self._part(batch, heads, queries)
        total = torch.zeros(2, device=self.model.device)
        weight = batch.positives.weight
        if weight is None:
            weight = torch.ones(len(batch.entity), device=total.device)
        for one in batch.relation.unique():
            rows = (batch.relation == one).nonzero().flatten()
            entities = {head: part[rows] for head, part in heads.items()}
            asked = {head: part[rows] for head, part in queries.items()}
            part = self._part(batch.of(rows), entities, asked, one)
            total = total + torch.stack(part) * (weight[rows].sum() / weight.sum())
        return total[0], total[1]

    def _part(
        self,
        batch: Batch,
        heads: Mapping[str, Tensor],
        queries: Mapping[str, Tensor],
        relation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`_completion` of queries whose candidates are the same, or are sampled for each."""
        model, settings = self.model, self.settings
        positives = batch.positives
        if batch.candidate is None:
            tables = model.candidates(relation)
            learns = model.learns_decision
            loss = factored_completion(
                [queries[head] for head in model.heads],
                [tables[head] for head in model.heads],
                positives,
                model.decision_weights(batch.relation) if learns else None,
                settings.loss,
                settings.label_smoothing,
                settings.decision == "detached",
                self.parts.count,
            )
            answers = positives.col
        else:
            # Each entity is embedded once, however many queries it is a candidate of.
            distinct, place = batch.candidate.unique(return_inverse=True)
            tables = model.candidates(relation, distinct)
            scores = self._sampled_scores(queries, tables, place, batch.relation)
            if not model.learns_decision:
                del scores[DECISION]
            loss = completion(scores, positives, settings.loss, settings.label_smoothing)
            answers = place[positives.row, positives.col]
        if not settings.lambda_regularization:
            return loss, torch.zeros_like(loss)
        terms = [
            dura(heads[head], queries[head], tables[head][answers], positives.weight)
            for head in model.heads
        ]
        return loss, torch.stack(terms).sum()

    def _sampled_scores(
        self,
        queries: Mapping[str, Tensor],
        tables: Mapping[str, Tensor],
        place: Tensor,
        relation: Tensor,
    ) -> dict[str, Tensor]:
        """Scores of candidates of each query's own, which stand at ``place`` in the tables."""

        def of(rows: slice) -> dict[str, Tensor]:
            asked = {head: query[rows] for head, query in queries.items()}
            answers = {head: table[place[rows]] for head, table in tables.items()}
            return self.model.scores(asked, answers, relation[rows])

        size = self.parts.rows(len(place))
        if size >= len(place):
            return of(slice(None))
        # Candidates of one part are held at a time, and gathered again for the gradient.
        starts = range(0, len(place), size)
        found = [checkpoint(of, slice(i, i + size), use_reentrant=False) for i in starts]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def validate(self) -> dict[str, float]:
        """Metrics of both sides on the validation triples; keeps the state if they are the best."""
        if self.average is None:
            return self._validate()
        self.average.exchange()
        try:
            return self._validate()
        finally:
            self.average.exchange()

    def _validate(self) -> dict[str, float]:
        ranking = rank(
            self.model,
            self.kg.valid,
            self.known,
            self.settings.ranking_batch_size,
            heads=(),
            on_batch=self._stop_if_asked,
        )
        metrics = rank_metrics(torch.cat([ranking.head[DECISION], ranking.tail[DECISION]]))
        progress = self.progress
        if progress.best_mrr is None or metrics["mrr"] > progress.best_mrr:
            progress.best_mrr, progress.best_epoch = metrics["mrr"], progress.epoch
            progress.waited = 0
            self.best_state = {
                name: value.detach().clone() for name, value in self.model.state_dict().items()
            }
        else:
            progress.waited += 1
        return metrics


#: Where the settings name no number of epochs: as many as take so many steps, but at least …
_STEPS, _EPOCHS = 500, 6

#: What to try where numbers are none.
_ADVICE = (
    "Try a smaller learning_rate, a gradient_clip, or precision=float32, or leave such steps out"
    " with non_finite=skip, which a resumed run takes, too."
)


class Average:
    r"""The exponential moving average of a model's state, running statistics included.

    .. math:: \bar\theta_s = d_s \bar\theta_{s-1} + (1 - d_s) \theta_s, \quad
        d_s = \min\left(d, \frac{1 + s}{10 + s}\right)

    The decay starts lower, so that the first weights are soon forgotten.

    Parameters
    ----------
    model : IMVIA
    decay : float
        d.
    """

    def __init__(self, model: IMVIA, decay: float) -> None:
        self.model, self.decay = model, decay
        self.state = {name: value.clone() for name, value in self._followed().items()}

    def _followed(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number ``step``, from 0 on."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        now = self._followed()
        torch._foreach_lerp_(list(self.state.values()), [now[name] for name in self.state], weight)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average into the model and the model's weights here; twice is as before."""
        for name, value in self._followed().items():
            kept = value.clone()
            value.copy_(self.state[name])
            self.state[name].copy_(kept)


# -- batches --------------------------------------------------------------------------------------


class Batches:
    """The queries of an epoch, in batches, shuffled by a generator of its own.

    The queries are shared out evenly, so that no batch is small. With ``candidates="relation"`` a
    batch holds queries of few relations (`pack`).

    Notes
    -----
    In the regime 1vsall each triple is two queries, each with one answer. Queries that differ in
    nothing but the answer have the same scores, and their softmax losses one sum over the
    candidates: up to `_ANSWERS_AT_A_TIME` of them are one row of a batch, with their number as its
    weight. A batch holds as many rows as come of ``batch_size`` queries on average.
    """

    def __init__(self, kg: MultiViewKG, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.num_entities = kg.num_entities
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.order_state = self.drawn = self.generator.get_state()
        self.answers = kg.answers(["train"])
        at_a_time = {"kvsall": max(len(self.answers.answer), 1), "sampled": 1}.get(
            settings.regime, _ANSWERS_AT_A_TIME if settings.loss == "softmax" else 1
        )
        #: Rows of batches: (query of the index, first of its answers, how many).
        self.rows = _rows_of(self.answers, at_a_time).to(device)
        self.answers = self.answers.to(device)
        self.queries = self.answers.queries()
        #: What `batch_size` counts.
        self.size = len(self.queries if settings.regime == "kvsall" else self.answers.answer)
        self.ranges = None
        if settings.candidates == "relation" and self.size:
            relation = self.queries[self.rows[:, 0], 1]
            counts = relation.unique(return_counts=True)[1].tolist()
            limit = max(1, settings.batch_size * len(self.rows) // self.size)
            self.ranges = pack(counts, limit)
        if settings.regime == "sampled":
            self.true_keys = self.answers.pair_keys()

    def __len__(self) -> int:
        if self.ranges is not None:
            return len(self.ranges)
        return math.ceil(self.size / self.settings.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()

    def epoch(self, done: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, but for the first so many: of one that was begun before.

        ``order_state`` is the generator's state that the epoch's order was drawn in, ``drawn`` the
        one that the last batch was.
        """
        if done:
            now = self.generator.get_state()
            self.generator.set_state(self.order_state)
            parts = self._parts()
            self.generator.set_state(now)
        else:
            self.order_state = self.generator.get_state()
            parts = self._parts()
        for part in parts[done:]:
            self.drawn = self.generator.get_state()
            yield self._batch(self.rows[part.to(self.rows.device)])

    def _parts(self) -> list[Tensor]:
        """Places of the queries of each batch, in an order that is drawn."""
        order = torch.randperm(len(self.rows), generator=self.generator)
        if self.ranges is not None:
            relation = self.queries[self.rows[:, 0], 1].cpu()
            order = order[torch.argsort(relation[order], stable=True)]
            parts = [torch.cat([order[start:stop] for start, stop in part]) for part in self.ranges]
            return [parts[i] for i in torch.randperm(len(parts), generator=self.generator)]
        return list(order.tensor_split(len(self)))

    def _batch(self, rows: Tensor) -> Batch:
        query, start, count = rows.unbind(1)
        entity, relation = self.queries[query].unbind(1)
        row, position = expand(start, count)
        answer = self.answers.answer[position]
        if self.settings.regime == "kvsall":
            return Batch(entity, relation, Positives(row, answer))
        if self.settings.regime == "1vsall":
            weight = count.float() if self.settings.loss == "softmax" else None
            return Batch(entity, relation, Positives(row, answer, weight))
        negative = self._entities(len(rows), self.settings.negatives)
        for _ in range(_REDRAWS):
            true = self.answers.contains(entity, relation, negative, self.true_keys)
            negative = torch.where(true, self._entities(*negative.shape), negative)
        candidate = torch.cat([answer[:, None], negative], dim=1)
        return Batch(entity, relation, Positives(row, torch.zeros_like(row)), candidate)

    def _entities(self, *shape: int) -> Tensor:
        drawn = torch.randint(self.num_entities, shape, generator=self.generator)
        return drawn.to(self.rows.device)


def _rows_of(answers: AnswerIndex, at_a_time: int) -> Tensor:
    """(rows, 3) int64: query, first of its answers, their number, ``at_a_time`` at most."""
    counts = answers.ptr.diff()
    parts = -(-counts // at_a_time)
    query, part = expand(torch.zeros_like(parts), parts)
    start = answers.ptr[query] + at_a_time * part
    return torch.stack([query, start, (answers.ptr[query + 1] - start).clamp(max=at_a_time)], dim=1)


def pack(counts: Sequence[int], limit: int) -> list[list[tuple[int, int]]]:
    """Batches of queries sorted by relation, with few relations each and cut between relations.

    Parameters
    ----------
    counts : sequence of int
        How many queries each relation has.
    limit : int
        Queries in a batch at most; none has less than half of that where there are as many.

    Returns
    -------
    list of list of (int, int)
        Of each batch the ranges (start, stop) of queries in it.
    """
    pieces = []
    start = 0
    for count in counts:
        parts = math.ceil(count / limit)
        cuts = [start + count * i // parts for i in range(parts + 1)]
        pieces += list(itertools.pairwise(cuts))
        start += count
    # The largest first, each into the batch that it fills best.
    batches: list[list[tuple[int, int]]] = []
    free: list[tuple[int, int]] = []  # (room, batch), ascending
    for piece in sorted(pieces, key=lambda piece: piece[0] - piece[1]):
        size = piece[1] - piece[0]
        place = bisect.bisect_left(free, (size, -1))
        if place < len(free):
            room, batch = free.pop(place)
            batches[batch].append(piece)
        else:
            room, batch = limit, len(batches)
            batches.append([piece])
        bisect.insort(free, (room - size, batch))
    # At most one is not half full: what fits no other makes a new one. It shares with the fullest.
    room, small = free[-1]
    if 2 * room > limit and len(batches) > 1:
        other = free[0][1]
        both = batches[other] + batches[small]
        half = (sum(stop - start for start, stop in both) + 1) // 2
        batches[other], batches[small] = _cut(both, half)
    return batches


def _cut(
    ranges: Sequence[tuple[int, int]], size: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Ranges of the first ``size`` positions, and of the others."""
    first, second = [], []
    for start, stop in ranges:
        middle = min(stop, start + size)
        size -= middle - start
        first += [(start, middle)] if middle > start else []
        second += [(middle, stop)] if stop > middle else []
    return first, second


#: How many queries of the regime 1vsall that differ in nothing but the answer are one row. All of
#: them would crowd a batch where most entities answer.
_ANSWERS_AT_A_TIME = 32

#: How often sampled negatives that are true answers are drawn anew. What is true still after that
#: belongs to a query that most entities answer.
_REDRAWS = 4


# -- optimizers and precision ---------------------------------------------------------------------


def make_optimizer(
    settings: Settings, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, fused where torch has that."""
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adagrad": torch.optim.Adagrad,
    }
    return kinds[settings.optimizer](
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )


def training_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The precision of training on a device."""
    if settings.precision != "auto":
        dtype: torch.dtype = getattr(torch, settings.precision)
        return dtype
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if gains else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported()) and any(
        flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16")
    )


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next step, and not return it to the system.

    A step on a CPU frees tensors of tens of megabytes and asks for them again. As glibc is set,
    each of them is mapped anew, and every page of it zeroed by the system at its first touch: half
    the time of a training on MKG-Y. The command line calls this; in a program of your own it is
    your choice, since it holds for the whole process: its resident size stays at its peak.

    Returns
    -------
    bool
        Whether it was done: on Linux with glibc.
    """
    libc = _glibc()
    # From malloc.h: M_MMAP_MAX = -4, the number of blocks that may be mapped one by one;
    # M_TRIM_THRESHOLD = -1, the free bytes on top of the heap that are kept.
    return libc is not None and bool(libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Return to the system what is free now, where that can be done: on Linux with glibc.

    So that reading a graph, training, ranking and saving do not each leave their own holes.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


class _Holes:
    """Gives memory back where steps, whose tensors differ a little in size, leave holes in it.

    That costs the page faults of a step, and so is done only once the process has grown.
    """

    #: Growth in bytes since the first step after memory was given back.
    GROWTH = 192 * 2**20

    def __init__(self) -> None:
        self.before: int | None = None

    def look(self) -> None:
        """After a step."""
        now = _resident_size()
        if self.before is None or now < self.before:
            self.before = now
        elif now - self.before > self.GROWTH:
            give_back_freed_memory()
            self.before = None


def _resident_size() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def resolve_device(name: str) -> torch.device:
    """The device that a setting names, ``auto`` included."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"Setting device: {name!r} cannot be used here ({str(error).splitlines()[0]})."
        ) from None
    return device


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
    "make_optimizer",
    "resolve_device",
    "training_dtype",
]
