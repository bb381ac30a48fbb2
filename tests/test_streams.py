"""Streams of a GPU that split off and join: which waits for which, told by stand-ins for them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from imvia_graph._streams import Streams


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

        def record(self):
            self.seen = set(self.gpu.current[-1].seen)

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
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="memory"):
        step()
    assert owner.streams is None
    assert not streams._kept
    assert not streams._names
    assert gpu.current == [gpu.main]


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
