"""Steps of training that a GPU has recorded and repeats: CUDA graphs.

A step of a small graph is some hundred short kernels, and the host takes longer to ask for them
than the GPU to run them. Recorded, they are asked for all at once. What a step does is then the
same down to the shapes: the batches are filled up (`imvia_graph.batches.Batches.filled`), and what
differs from step to step - rows, learning rates, whether a step is bad - lies in tensors that stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imvia_graph._factored import fits_at_once
from imvia_graph._guards import MEMORY_ERRORS, Before, Health, Kept
from imvia_graph._streams import Streams
from imvia_graph.errors import SettingsError
from imvia_graph.ops import fused_triton, picking
from imvia_graph.optimizers import to_record

#: Steps that are done before one is recorded: they compile kernels and make optimizers' states.
WARM_UP = 3
#: Losses of a step at most.
_LOSSES = 16
#: So many entities and fewer: parts of a step are done beside each other.
_FEW = 2**17


class Told(NamedTuple):
    """What a step leaves, in tensors that the next one of its shape overwrites."""

    names: list[str]
    losses: Tensor
    watched: list[str]
    #: How many of those watched are losses.
    num_losses: int
    numbers: Tensor


class _Begun(NamedTuple):
    kept: Kept
    losses: dict[str, Tensor]
    watched: dict[str, Tensor]
    gradients: dict[str, Tensor]


class _Graph(NamedTuple):
    rows: Tensor
    graph: Any
    told: Told


class RecordedSteps:
    """The steps of a trainer, each shape of batch recorded once and then replayed.

    Parameters
    ----------
    trainer : imvia_graph.training.Trainer
        One that `can_record`.
    on_gpu : bool, optional
        Whether steps are recorded. Else they are done, one after the other, as they would be:
        that is for tests.
    """

    def __init__(self, trainer: Any, on_gpu: bool = True) -> None:
        self.trainer, self.on_gpu = trainer, on_gpu
        device = trainer.model.device
        self.bad = torch.zeros((), device=device)
        self.sums = torch.zeros(_LOSSES, device=device)
        self.before: Mapping[str, Tensor] = {}
        self.graphs: dict[int, _Graph] = {}
        self.shape = (0, 0)
        #: Steps of each number of rows that were done without recording.
        self.done: Counter[int] = Counter()
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.pool: Any = None
        #: `_tensors` when the last graph was recorded.
        self.known: list[tuple[int, bool]] = []
        # Kernels over more entities than that leave no room for others beside them.
        beside = on_gpu and trainer.model.num_entities <= _FEW
        self.streams = Streams(device if beside else None)

    def begin(self) -> None:
        """Before an epoch, or what is left of one."""
        trainer = self.trainer
        for optimizer in trainer.optimizers():
            to_record(optimizer, trainer.model.device)
        if self.graphs and self._tensors() != self.known:
            self._forget()
        # What was added up of the epoch before it was broken off.
        self.before = {name: value.clone() for name, value in trainer.sums.items()}
        trainer.sums = dict(self.before)
        self.sums.zero_()
        self.bad.zero_()

    def _tensors(self) -> list[tuple[int, bool]]:
        """Return where the tensors that graphs read and write lie, and which of them are trained.

        A graph holds addresses: after ``model.cpu().cuda()`` or ``optimizer.load_state_dict`` it
        would go on with memory that belongs to something else.
        """
        model, optimizers = self.trainer.model, self.trainer.optimizers()
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        values = [value for state in states for value in state.values()]
        values += [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        tensors = [value for value in values if isinstance(value, Tensor)]
        tensors += [*model.parameters(), *model.buffers()]
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]

    def _forget(self) -> None:
        """Delete the graphs and their memory; new ones are recorded after steps without."""
        self.graphs.clear()
        self.done.clear()
        self.pool = None

    def step(self, rows: Tensor) -> dict[str, Tensor]:
        """`Trainer.train_step` of the batch of some rows."""
        with torch.cuda.device_of(self.bad):  # events are recorded on the current device
            return self._step(rows)

    def _step(self, rows: Tensor) -> dict[str, Tensor]:
        trainer = self.trainer
        before = Before([], trainer.model.device)
        told = self._told(rows)
        if told is None:
            return trainer.train_step(trainer.batches.filled(rows))
        health = Health.of(told.watched, told.num_losses, told.numbers)
        trainer.follow(health, before, rows)
        names = [*told.names, "steps"]
        for name, value in self.before.items():
            self.sums[names.index(name)] += value
        self.before = {}
        trainer.sums = dict(zip(names, self.sums.unbind(), strict=False))
        # Of their own: the next step writes where these are.
        return dict(zip(told.names, told.losses.clone().unbind(), strict=True))

    def _told(self, rows: Tensor) -> Told | None:
        """What a step leaves; None where memory is too short to do it so."""
        trainer = self.trainer
        if trainer.parts.count > 1:  # memory ran out before
            return None
        shape = trainer.batches.most_positives, trainer.batches.most_relations
        if shape != self.shape:
            self._forget()
            self.shape = shape
        # Each number of rows once: kernels are compiled for what numbers are divisible by.
        warm = self.done.total() >= WARM_UP and self.done[len(rows)]
        if not self.on_gpu or not warm:
            self.done[len(rows)] += 1
            return self._do(rows)
        graph = self.graphs.get(len(rows))
        if graph is None:
            graph = self.graphs[len(rows)] = self._record(rows)
        graph.rows.copy_(rows)
        graph.graph.replay()
        return graph.told

    def _do(self, rows: Tensor) -> Told | None:
        """A step as it is, in the stream that others are recorded in."""
        trainer = self.trainer
        if self.stream is None:
            return self._work(rows)
        here = torch.cuda.current_stream(trainer.model.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            told = self._work(rows)
        here.wait_stream(self.stream)
        return told

    def _record(self, rows: Tensor) -> _Graph:
        own = rows.clone()
        graph = torch.cuda.CUDAGraph()
        self.trainer.forget_gradients()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                told = self._finish(*self._begin(own))
        except RuntimeError as error:
            # What is random on the device may be left in a state that nothing can go on from.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SettingsError(
                f"A step of training could not be recorded for the GPU to repeat ({reason}). Set"
                " cuda_graph=false, which does without; `fit --resume` takes it, too."
            ) from error
        self.pool, self.known = graph.pool(), self._tensors()
        return _Graph(own, graph, told)

    def _work(self, rows: Tensor) -> Told | None:
        """A step whole; None, and nothing is changed, where memory runs out."""
        trainer = self.trainer
        before = Before(trainer.buffers, trainer.model.device)
        begun = None
        try:
            begun = self._begin(rows)
        except MEMORY_ERRORS as error:
            trainer.parts.halve(error, len(rows))
        if begun is not None:
            return self._finish(*begun)
        # Outside the handler, whose traceback holds the tensors of the failed step. From now on
        # no graph is replayed.
        self._forget()
        trainer.take_back(before)
        return None

    def _begin(self, rows: Tensor) -> _Begun:
        """Losses and gradients of a step. With `_finish`, what is recorded: no word to the host."""
        trainer = self.trainer
        kept = Kept(trainer.buffers)
        with self.streams.used_by(trainer):
            batch = trainer.batches.filled(rows, self.streams)
            losses, estimation, gradients = trainer.gradients_of(batch)
        watched = dict(losses) if estimation is None else {**losses, "estimation": estimation}
        gradients = {name: grad for name, grad in gradients.items() if grad.numel()}
        return _Begun(kept, losses, watched, gradients)

    def _finish(
        self,
        kept: Kept,
        losses: Mapping[str, Tensor],
        watched: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> Told:
        """The update of a step, unless it is bad."""
        trainer = self.trainer
        numbers = Health.numbers_of(watched, gradients)
        bad = (~numbers.isfinite().all()).float()
        if trainer.settings.non_finite == "stop":
            # The host learns of it while later steps are under way: those change nothing, too.
            bad = torch.maximum(bad, self.bad)
            self.bad.copy_(bad)
        kept.restore(bad)
        trainer.update(bad)
        told = torch.stack([*losses.values(), torch.ones_like(bad)])
        self.sums[: len(told)].add_(torch.where(bad > 0, 0.0, told))
        return Told(list(losses), told[:-1], [*watched, *gradients], len(watched), numbers)


def can_record(trainer: Any) -> bool:
    """Whether a trainer's steps have but the shapes and the operations that can be recorded."""
    model, settings = trainer.model, trainer.settings
    device = model.device
    entity = model.entity.weight
    return (
        settings.cuda_graph
        and device.type == "cuda"
        and trainer.shards.alone
        and has_one_shape(trainer)
        and all(
            fused_triton.usable(feat, entity) and not picking.apart(feat, entity)
            for feat, _ in model.views.values()
        )
        and settings.backend in ("auto", "triton")
    )


def has_one_shape(trainer: Any) -> bool:
    """Whether steps of as many rows can be done in the same shapes, without a word to the host."""
    settings, model = trainer.settings, trainer.model
    return (
        settings.regime != "sampled"
        and settings.candidates == "shared"
        and trainer.precision in (torch.float32, torch.bfloat16)
        and trainer.average is None
        and trainer.row_optimizer is None
        and trainer.parts.count == 1
        and fits_at_once(
            trainer.batches.most_rows,
            len(model.heads),
            model.num_entities,
            trainer.precision,
            model.device,
        )
    )
