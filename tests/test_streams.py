"""Streams of a GPU that split off and join: which waits for which, told by stand-ins for them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers import ring_kg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import imvia_graph as ig
from imvia_graph import _factored, _recorded
from imvia_graph._recorded import RecordedSteps
from imvia_graph._streams import Streams
from imvia_graph.training import Trainer


class FakeGPU:
    """Streams that note what was asked for in them, and all that this came after."""

    def __init__(self, monkeypatch):
        self.streams = []
        self.main = self.Stream(self)
        self.current = [self.main]
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.Stream(self))
        monkeypatch.setattr(torch.cuda, "Event", lambda: self.Event(self))
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current[-1])

    class Stream:
        def __init__(self, gpu):
            self.seen = set()
            gpu.streams.append(self)

        def wait_event(self, event):
            self.seen |= event.seen

        def wait_stream(self, other):
            self.seen |= other.seen

    class Event:
        def __init__(self, gpu):
            self.gpu = gpu

        def record(self, stream):
            self.seen = set(stream.seen)

    @contextmanager
    def entered(self, stream):
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    def work(self, name):
        """Ask for something; returns what it comes after."""
        before = set(self.current[-1].seen)
        self.current[-1].seen.add(name)
        return before


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPU(monkeypatch)


def test_what_is_done_beside_depends_on_the_mark_alone_and_what_follows_on_all(gpu):
    streams = Streams(torch.device("cuda"))
    gpu.work("begin")
    mark = streams.mark()
    gpu.work("queries")
    with streams.beside("candidates", mark):
        assert gpu.work("tables") == {"begin"}
        inner = streams.mark()
        for modality in ("image", "text"):
            with streams.beside(modality, inner):
                assert gpu.work(modality) == {"begin", "tables"}
        assert gpu.work("joined") == {"begin", "tables", "image", "text"}
    everything = {"begin", "queries", "tables", "image", "text", "joined"}
    assert gpu.work("loss") == everything
    # Of the same names, but not within the same.
    with streams.beside("image", mark):
        assert gpu.work("other") == {"begin"}
    assert len(gpu.streams) == 1 + 4


def test_what_is_not_to_join_is_waited_for_at_the_end(gpu):
    streams = Streams(torch.device("cuda"))
    owner = SimpleNamespace(streams=Streams())
    before = owner.streams
    gpu.work("begin")
    with streams.used_by(owner):
        assert owner.streams is streams
        with streams.beside("modalities", streams.begun, join=False):
            gpu.work("estimation")
        assert gpu.work("loss") == {"begin"}
        with streams.beside("positives", streams.begun, join=False):
            gpu.work("answers")
        streams.meet("positives")
        streams.meet("what there is not")
        assert gpu.work("more") == {"begin", "loss", "answers"}
        streams.keep([torch.zeros(1)])
        assert len(streams._kept) == 1
    assert owner.streams is before
    assert streams.begun is None
    assert not streams._kept
    assert gpu.work("update") == {"begin", "loss", "answers", "more", "estimation"}


def test_a_step_that_fails_leaves_no_streams_behind(gpu):
    streams = Streams(torch.device("cuda"))
    owner = SimpleNamespace(streams=None)

    def step():
        with streams.used_by(owner):
            streams.keep([torch.zeros(1)])
            with streams.beside("candidates", streams.begun):
                gpu.work("half done")
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="memory"):
        step()
    assert owner.streams is None
    assert not streams._kept
    assert not streams._names
    assert gpu.current == [gpu.main]
    assert gpu.work("taken back") == {"half done"}


def test_without_a_device_all_is_done_in_its_order():
    streams = Streams()
    owner = SimpleNamespace(streams=None)
    with streams.used_by(owner):
        assert streams.begun is streams.mark() is None
        with streams.beside("candidates", streams.begun):
            pass
        streams.keep([torch.zeros(1)])
    assert not streams._kept
    assert not streams._streams


# -- a step of training ---------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Finds what is read, or written, by a stream that has not waited for who wrote, or read, it.

    And what one stream reads of another's without its being kept until they have joined: its memory
    may belong to something else by then.
    """

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu
        self.alive, self.owner, self.writer, self.readers = [], {}, {}, {}
        self.crossed, self.raced = {}, []
        #: What was done, told apart from what was in another step.
        self.number = self.first = 10_000 * len(gpu.streams)

    @staticmethod
    def memory(tensor):
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given, made = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)]
            for part in ([args, kwargs], out)
        )
        changed = set()
        for place, argument in enumerate(function._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                parts = [part for part in tree_leaves(value) if isinstance(part, torch.Tensor)]
                changed |= {self.memory(part) for part in parts}
        known = {self.memory(tensor) for tensor in given}
        fresh = {self.memory(tensor) for tensor in made} - known
        if not fresh and not changed:
            return out  # a view
        self.number += 1
        stream = self.gpu.current[-1]
        for memory in known:
            self.expect(function, stream, [self.writer.get(memory)])
            self.readers.setdefault(memory, []).append(self.number)
            if self.owner.get(memory, stream) is not stream:
                self.crossed[memory] = str(function)
        for memory in changed:
            self.expect(function, stream, self.readers.get(memory, [])[:-1])
        for memory in fresh | changed:
            self.writer[memory], self.readers[memory] = self.number, []
        for memory in fresh:
            self.owner[memory] = stream
        self.alive += [tensor for tensor in made if self.memory(tensor) in fresh]
        stream.seen.add(self.number)
        return out

    def expect(self, function, stream, numbers):
        missed = [number for number in numbers if number is not None and number not in stream.seen]
        if missed:
            self.raced.append(str(function))


class CheckedStreams(Streams):
    """Streams that look, before they join, whether what passed between them was kept."""

    watch, lost = None, ()

    def join(self):
        kept = {self.watch.memory(tensor) for tensor in self._kept}
        self.lost = [name for memory, name in self.watch.crossed.items() if memory not in kept]
        super().join()


def recorded_steps(monkeypatch, **changes):
    """Steps of a trainer in plain torch, which can be watched."""
    kg = ring_kg()
    given = {"dim": 8, "relation_dim": 8, "batch_size": 16, "device": "cpu", "precision": "float32"}
    settings = ig.Settings(backend="reference", **given, **changes)
    trainer = Trainer(ig.IMVIA.from_kg(kg, settings), kg, settings)
    monkeypatch.setattr(_factored._kernels, "load", lambda name: None)
    for group in trainer.estimator_optimizer.param_groups if trainer.estimator_optimizer else ():
        group["fused"] = True  # as it is on a GPU
    return RecordedSteps(trainer, on_gpu=False)


def watched_step(gpu, monkeypatch, broken=None, **changes):
    """The streams and the watch of one step of training, of which ``broken`` is left undone."""
    recorded = recorded_steps(monkeypatch, **changes)
    trainer = recorded.trainer
    recorded.streams = CheckedStreams(torch.device("cuda"))
    watch = recorded.streams.watch = Watch(gpu)
    rows = next(trainer.batches.rows_of_epoch(0))
    losses, filled = trainer.losses, trainer.batches.filled

    def watched_batch(*what):
        with watch:
            batch = filled(*what)
        # The step holds it until its end.
        there = [batch.entity, batch.relation, *batch.positives]
        recorded.streams.keep(part for part in there if part is not None)
        return batch

    def watched_losses(batch):
        saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with watch, saved:
            return losses(batch)

    def pack(tensor):
        memory = watch.memory(tensor)
        if watch.owner.get(memory, gpu.current[-1]) is not gpu.current[-1]:
            watch.crossed[memory] = "what is saved for a gradient"
        return tensor

    monkeypatch.setattr(trainer.batches, "filled", watched_batch)
    monkeypatch.setattr(trainer, "losses", watched_losses)
    if broken is not None:
        monkeypatch.setattr(*broken)
    recorded._begin(rows)
    assert len(gpu.streams) > 5
    return watch, recorded.streams


CHANGES = [
    {},
    {"lambda_alignment": 0.1, "decision": "trained", "batch_norm": True, "complex_head": False},
    {"regime": "kvsall", "loss": "binary", "gate": "entity", "joint": False, "structure": False},
    {"residual": False, "relation_residual": False, "lambda_information": 0.0},
    {"lambda_relation": 0.1, "hidden_dropout": 0.2, "relation_dropout": 0.2, "input_dropout": 0.2},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes), "defaults"))
def test_no_part_of_a_step_reads_what_it_did_not_wait_for(gpu, monkeypatch, changes):
    watch, streams = watched_step(gpu, monkeypatch, **changes)
    assert watch.number - watch.first > 200
    assert watch.crossed
    assert not watch.raced
    assert not streams.lost


def test_what_a_part_did_not_wait_for_or_keep_is_found(gpu, monkeypatch):
    watch, _ = watched_step(gpu, monkeypatch, broken=(Streams, "meet", lambda *given: None))
    assert watch.raced
    nothing = (CheckedStreams, "keep", lambda *given: None)
    assert watched_step(gpu, monkeypatch, broken=nothing)[1].lost
    # As where relations were grouped beside what they are made in.
    mark = Streams.mark
    early = (Streams, "mark", lambda self: self.begun or mark(self))
    assert watched_step(gpu, monkeypatch, broken=early)[0].raced


# -- graphs ----------------------------------------------------------------------------------------


def other_memory(trainer):
    """As ``model.cpu().cuda()`` does."""
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.clone()


def other_rate(trainer):
    trainer.optimizer.param_groups[0]["lr"] = 0.5


def other_state(trainer):
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())


def fewer_trained(trainer):
    trainer.model.entity.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [other_memory, other_rate, other_state, fewer_trained])
def test_graphs_of_tensors_that_are_others_now_are_deleted(monkeypatch, change):
    recorded = recorded_steps(monkeypatch, complex_head=False)
    trainer = recorded.trainer
    recorded.begin()
    for rows in trainer.batches.rows_of_epoch():
        recorded.step(rows)
    assert recorded.done
    recorded.graphs[16], recorded.known = "a graph", recorded._tensors()
    trainer.model.load_state_dict(trainer.model.state_dict())
    recorded.begin()
    assert recorded.graphs
    change(trainer)
    recorded.begin()
    assert not recorded.graphs
    assert not recorded.done  # of which kernels are compiled in the next steps
    assert all(torch.is_tensor(group["lr"]) for group in trainer.optimizer.param_groups)


def test_steps_in_another_shape_are_done_before_one_is_recorded(monkeypatch):
    recorded = recorded_steps(monkeypatch)
    recorded.begin()
    batches = recorded.trainer.batches
    for rows in batches.rows_of_epoch():
        recorded.step(rows)
    recorded.graphs[len(rows)] = "a graph"
    assert recorded.done.total() == len(batches) > 1
    batches.most_positives += 128
    recorded.step(rows)
    assert not recorded.graphs
    assert recorded.done == {len(rows): 1}


def test_where_memory_runs_out_the_memory_of_graphs_is_given_back(monkeypatch):
    recorded = recorded_steps(monkeypatch)
    recorded.begin()
    rows = next(recorded.trainer.batches.rows_of_epoch())
    recorded.step(rows)
    recorded.graphs[1] = "a graph"
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "_begin", lambda rows: torch.empty(2**60))
        recorded.step(rows)
    assert recorded.trainer.parts.count == 2
    assert not recorded.graphs
    assert recorded.pool is None


def test_a_loss_of_the_estimators_that_is_not_finite_is_no_gradient(monkeypatch):
    recorded = recorded_steps(monkeypatch)
    trainer = recorded.trainer
    recorded.begin()
    plain = trainer.gradients_of

    def spoiled(batch):
        losses, estimation, gradients = plain(batch)
        return losses, estimation * torch.nan, gradients

    monkeypatch.setattr(trainer, "gradients_of", spoiled)
    recorded.step(next(trainer.batches.rows_of_epoch()))
    with pytest.raises(ig.TrainingError, match=r": estimation is nan\."):
        trainer._settle()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes), "defaults"))
def test_a_gpu_computes_the_same_bits_beside_each_other_and_one_after_the_other(
    monkeypatch, changes
):
    kg = ig.load_kg("countries")
    # Kernels long enough to be at work at the same time.
    settings = ig.Settings(dim=128, information_dim=128, device="cuda", seed=3, **changes)
    states = []
    for most in (-1, -1, _recorded._MOST_ENTITIES):
        monkeypatch.setattr(_recorded, "_MOST_ENTITIES", most)
        monkeypatch.setattr(_recorded, "_STREAMS_SINCE", "0")  # any torch
        torch.manual_seed(0)
        trainer = Trainer(ig.IMVIA.from_kg(kg, settings).to("cuda"), kg, settings)
        for _ in range(6):
            trainer.train_epoch()
        assert trainer.recorded.graphs
        assert trainer.recorded.streams.are_several == (most > 0)
        states.append(trainer.model.state_dict())
    alone, again, beside = states
    # What differs from run to run without streams says nothing of them.
    steady = [name for name in alone if torch.equal(alone[name], again[name])]
    assert steady
    assert [name for name in steady if not torch.equal(alone[name], beside[name])] == []
