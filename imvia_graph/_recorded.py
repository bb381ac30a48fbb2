"""Training steps that are recorded as CUDA graphs and replayed.

A step on a small knowledge graph is some hundred short kernels, which the host takes longer to
launch than the GPU to run. A CUDA graph launches them all at once. Each replay runs the same
kernels on the same shapes and addresses: batches are padded (`imvia_graph.batches.Batches.filled`),
and values that change between steps (rows, learning rates, whether a step is bad) live in static
tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imvia_graph._display import first_line
from imvia_graph._factored import fits_at_once
from imvia_graph._guards import MEMORY_ERRORS, Before, Health, Kept
from imvia_graph._streams import Streams
from imvia_graph.errors import SettingsError
from imvia_graph.ops import fused_triton, picking
from imvia_graph.optimizers import to_record

#: Steps that run before one is recorded: they compile kernels and create the optimizers' states.
WARM_UP = 3
#: Maximum number of losses of a step.
_LOSSES = 16
#: Maximum number of entities for which parts of a step run in separate streams. Kernels over
#: more entities fill the GPU.
_MOST_ENTITIES = 2**17
#: The first torch with which steps in several streams were measured and compared to the bit.
_STREAMS_SINCE = "2.11"


class _Result(NamedTuple):
    """The losses of a step and the numbers for `Health`, which the next replay overwrites."""

    names: list[str]
    losses: Tensor
    #: Names of the ``numbers``: of losses, that of the estimators included, then of parameters.
    watched: list[str]
    num_losses: int
    numbers: Tensor


class _Gradients(NamedTuple):
    """What `RecordedSteps._begin` computes and `RecordedSteps._finish` takes."""

    kept: Kept
    losses: dict[str, Tensor]
    watched: dict[str, Tensor]
    gradients: dict[str, Tensor]


class _Graph(NamedTuple):
    """A CUDA graph, the tensor that it reads the rows of a batch from, and its result."""

    rows: Tensor
    graph: Any
    result: _Result


class RecordedSteps:
    """The steps of a trainer, recorded once for each number of rows and then replayed.

    Parameters
    ----------
    trainer : imvia_graph.training.Trainer
        One for which `can_record` is true.
    on_gpu : bool, optional
        Whether to record steps. With ``False``, for tests, every step runs the operations that
        would be recorded. Default: ``True``.
    """

    def __init__(self, trainer: Any, on_gpu: bool = True) -> None:
        self.trainer, self.on_gpu = trainer, on_gpu
        device = trainer.model.device
        #: With ``non_finite="stop"``: 1 from the first bad step on.
        self.bad = torch.zeros((), device=device)
        #: Sums of the losses over the epoch, then the number of good steps.
        self.sums = torch.zeros(_LOSSES, device=device)
        #: Sums of the part of the epoch that ran before training was interrupted.
        self.before: Mapping[str, Tensor] = {}
        #: By number of rows.
        self.graphs: dict[int, _Graph] = {}
        #: Numbers of positives and relations that batches are padded to.
        self.shape = (0, 0)
        #: How many steps of each number of rows ran without a graph.
        self.done: Counter[int] = Counter()
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.pool: Any = None
        #: `_tensors` when the last graph was recorded.
        self.known: list[tuple[int, bool]] = []
        concurrent = (
            on_gpu
            and trainer.model.num_entities <= _MOST_ENTITIES
            and torch.__version__ >= _STREAMS_SINCE
        )
        self.streams = Streams(device if concurrent else None)

    def begin(self) -> None:
        """Prepare for an epoch, or for the rest of one."""
        trainer = self.trainer
        for optimizer in trainer.optimizers():
            to_record(optimizer, trainer.model.device)
        if self.graphs and self._tensors() != self.known:
            self._forget()
        self.before = {name: value.clone() for name, value in trainer.sums.items()}
        trainer.sums = dict(self.before)
        self.sums.zero_()
        self.bad.zero_()

    def _tensors(self) -> list[tuple[int, bool]]:
        """Return address and ``requires_grad`` of all tensors that graphs read or write.

        A graph holds addresses. After ``model.cpu().cuda()`` or ``optimizer.load_state_dict`` a
        replay would use memory that belongs to other tensors.
        """
        model, optimizers = self.trainer.model, self.trainer.optimizers()
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        values = [value for state in states for value in state.values()]
        values += [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        tensors = [value for value in values if isinstance(value, Tensor)]
        tensors += [*model.parameters(), *model.buffers()]
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]

    def _forget(self) -> None:
        """Delete the graphs and release their memory pool; warm up again before the next."""
        self.graphs.clear()
        self.done.clear()
        self.pool = None

    def step(self, rows: Tensor) -> dict[str, Tensor]:
        """Do what `Trainer.train_step` does for the batch of (B, 3) rows; see `Batches.filled`."""
        with torch.cuda.device_of(self.bad):  # events are recorded on the current device
            return self._step(rows)

    def _step(self, rows: Tensor) -> dict[str, Tensor]:
        trainer = self.trainer
        before = Before([], trainer.model.device)
        result = self._run(rows)
        if result is None:
            return trainer.train_step(trainer.batches.filled(rows))
        health = Health(result.watched, result.num_losses, result.numbers)
        trainer.follow(health, before, rows)
        names = [*result.names, "steps"]
        for name, value in self.before.items():
            self.sums[names.index(name)] += value
        self.before = {}
        trainer.sums = dict(zip(names, self.sums.unbind(), strict=False))
        # A copy: the next replay overwrites the losses.
        return dict(zip(result.names, result.losses.clone().unbind(), strict=True))

    def _run(self, rows: Tensor) -> _Result | None:
        """Replay, record or run a step; None where its batch does not fit into memory at once."""
        trainer = self.trainer
        if trainer.parts.count > 1:  # memory ran out before
            return None
        shape = trainer.batches.most_positives, trainer.batches.most_relations
        if shape != self.shape:
            self._forget()
            self.shape = shape
        # Each number of rows runs once before it is recorded: Triton compiles a variant of a kernel
        # for numbers that are divisible by 16.
        warm = self.done.total() >= WARM_UP and self.done[len(rows)]
        if not self.on_gpu or not warm:
            self.done[len(rows)] += 1
            return self._run_plainly(rows)
        graph = self.graphs.get(len(rows))
        if graph is None:
            graph = self.graphs[len(rows)] = self._record(rows)
        graph.rows.copy_(rows)
        graph.graph.replay()
        return graph.result

    def _run_plainly(self, rows: Tensor) -> _Result | None:
        """Run a step without a graph, in the stream in which graphs are recorded."""
        trainer = self.trainer
        if self.stream is None:
            return self._work(rows)
        here = torch.cuda.current_stream(trainer.model.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = self._work(rows)
        here.wait_stream(self.stream)
        return result

    def _record(self, rows: Tensor) -> _Graph:
        own = rows.clone()
        graph = torch.cuda.CUDAGraph()
        self.trainer.forget_gradients()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                result = self._finish(self._begin(own))
        except RuntimeError as error:
            # Not run without a graph instead: a failed capture may leave the random generator of
            # the GPU in a state from which it cannot continue.
            raise SettingsError(
                f"A training step could not be recorded as a CUDA graph ({first_line(error)}). Set"
                " cuda_graph=false to train without graphs; `fit --resume` takes it, too."
            ) from error
        self.pool, self.known = graph.pool(), self._tensors()
        return _Graph(own, graph, result)

    def _work(self, rows: Tensor) -> _Result | None:
        """Run a step; where memory runs out, undo it and return None."""
        trainer = self.trainer
        before = Before(trainer.buffers, trainer.model.device)
        begun = None
        try:
            begun = self._begin(rows)
        except MEMORY_ERRORS as error:
            trainer.parts.halve(error, len(rows))
        if begun is not None:
            return self._finish(begun)
        # Outside the handler, whose traceback holds the tensors of the failed step. From now on
        # no graph is replayed.
        self._forget()
        trainer.take_back(before)
        return None

    def _begin(self, rows: Tensor) -> _Gradients:
        """Compute losses and gradients.

        Graphs record this and `_finish`, in which the host must not wait for the GPU.
        """
        trainer = self.trainer
        kept = Kept(trainer.buffers)
        with self.streams.used_by(trainer):
            batch = trainer.batches.filled(rows, self.streams)
            losses, estimation, gradients = trainer.gradients_of(batch)
        watched = dict(losses) if estimation is None else {**losses, "estimation": estimation}
        gradients = {name: grad for name, grad in gradients.items() if grad.numel()}
        return _Gradients(kept, losses, watched, gradients)

    def _finish(self, begun: _Gradients) -> _Result:
        """Update the parameters, unless a loss or a gradient is not finite."""
        trainer = self.trainer
        kept, losses, watched, gradients = begun
        numbers = Health.numbers_of(watched, gradients)
        bad = (~numbers.isfinite().all()).float()
        if trainer.settings.non_finite == "stop":
            # The host reads the numbers when later steps are queued already: these must not change
            # anything either.
            bad = torch.maximum(bad, self.bad)
            self.bad.copy_(bad)
        kept.restore(bad)
        trainer.update(bad)
        values = torch.stack([*losses.values(), torch.ones_like(bad)])
        self.sums[: len(values)].add_(torch.where(bad > 0, 0.0, values))
        return _Result(list(losses), values[:-1], [*watched, *gradients], len(watched), numbers)


def can_record(trainer: Any) -> bool:
    """Return whether the steps of a trainer can be recorded as CUDA graphs."""
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
    """Return whether steps of one number of rows have one shape, and no wait for the GPU."""
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
