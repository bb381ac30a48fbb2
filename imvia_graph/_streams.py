"""Parts of a step that a GPU does beside each other: streams that split off and join again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor


class Streams:
    """Streams for what does not depend on what is done meanwhile.

    A step of a small graph is made of kernels that each keep a part of the GPU busy. What is done
    forward in a stream autograd does backward in the same; what comes of it is the same to the bit.

    A tensor's memory is free, for its stream, once nobody refers to it, although another stream may
    still have to read it: what passes between streams has to be kept until they have `joined`.
    Gradients, which pass between them, too, autograd sees to.

    Parameters
    ----------
    device : torch.device, optional
        A GPU. Default: there are no streams, and all is done in its order.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._streams: dict[str, torch.cuda.Stream] = {}
        #: Names of those that this step has split off: another's are none of its capture.
        self._split: set[str] = set()
        self._names: list[str] = []
        self._device = device
        #: Where the step began, for `beside`; None where there are no streams.
        self.begun: torch.cuda.Event | None = None
        self._kept: list[Tensor] = []

    def mark(self) -> torch.cuda.Event | None:
        """A point in what is being done, for `beside`."""
        if self._device is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def beside(
        self, name: str, after: torch.cuda.Event | None, join: bool = True
    ) -> Iterator[None]:
        """Have what is asked for within, in the stream of a name, depend on what a mark depends on.

        What comes after the context depends on it, too, unless it is not to ``join``. Within
        another of these names are told apart by that one's, too.
        """
        if self._device is None or after is None:
            yield
            return
        self._names.append(name)
        path = "/".join(self._names)
        if path not in self._streams:
            self._streams[path] = torch.cuda.Stream(self._device)
        stream = self._streams[path]
        self._split.add(path)
        stream.wait_event(after)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self._names.pop()
        if join:
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def meet(self, name: str) -> None:
        """Have what comes next depend on what was done beside without joining."""
        if name in self._split:
            torch.cuda.current_stream(self._device).wait_stream(self._streams[name])

    @contextmanager
    def used_by(self, owner: Any) -> Iterator[None]:
        """Be the ``streams`` of a trainer, for a step."""
        before = owner.streams
        try:
            owner.streams, self.begun = self, self.mark()
            with _accumulating_in_any_stream():
                yield
            self.join()
        except BaseException:
            # What is taken back next, others may still be writing. Where a recording failed there
            # is nothing to wait for, and the error that is told of is the first.
            with suppress(RuntimeError):
                self.join()
            raise
        finally:
            owner.streams, self.begun = before, None
            self._split.clear()
            self._kept.clear()

    @property
    def are_several(self) -> bool:
        """Whether anything is done beside anything."""
        return self._device is not None

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Keep what passes between streams."""
        if self._device is not None:
            self._kept += tensors

    def join(self) -> None:
        """Wait, in the current stream, for all that this step has split off."""
        for name in sorted(self._split):
            torch.cuda.current_stream(self._device).wait_stream(self._streams[name])


@contextmanager
def _accumulating_in_any_stream() -> Iterator[None]:
    """Spare the user torch's warning of parameters that are used in several streams, as meant."""
    told = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if told is None:
        yield
        return
    before = getattr(torch._C, "_warn_on_accumulate_grad_stream_mismatch", lambda: True)()
    told(False)
    try:
        yield
    finally:
        told(before)
