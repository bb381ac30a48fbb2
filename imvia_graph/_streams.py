"""CUDA streams in which a GPU runs independent parts of a training step concurrently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor


class Streams:
    """Named streams for parts of a step that do not depend on each other.

    On a small graph a single kernel keeps only a part of the GPU busy. Autograd runs the backward
    pass of an operation in the stream of its forward pass. Results are the same to the bit as in
    one stream.

    Once nobody refers to a tensor, the stream that allocated it may reuse its memory, even if
    another stream has yet to read it. Tensors that pass between streams must therefore be given to
    `keep` until the streams have joined. For gradients that pass between streams autograd does this
    itself.

    Parameters
    ----------
    device : torch.device, optional
        A GPU. Default: no streams; everything runs in the current stream.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._streams: dict[str, torch.cuda.Stream] = {}
        #: Names of the streams used in this step. Waiting for any other would end the capture of a
        #: CUDA graph with an error.
        self._split: set[str] = set()
        #: Names of the enclosing `beside` contexts.
        self._names: list[str] = []
        self._device = device
        #: `mark` of the beginning of the step; None outside a step and without streams.
        self.begun: torch.cuda.Event | None = None
        self._kept: list[Tensor] = []

    def mark(self) -> torch.cuda.Event | None:
        """Return an event after the work queued so far in the current stream, for `beside`."""
        if self._device is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def beside(
        self, name: str, after: torch.cuda.Event | None, join: bool = True
    ) -> Iterator[None]:
        """Run the operations of the context in another stream, after the event of a `mark`.

        Parameters
        ----------
        name : str
            Name of the stream, which is created when first used. In nested contexts the names of
            the outer ones are part of it.
        after : torch.cuda.Event or None
            A `mark`. None: run in the current stream.
        join : bool, optional
            Whether the current stream waits for the other one at the end of the context. Default:
            ``True``.
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
        """Make the current stream wait for the stream of a `beside` that did not join."""
        if name in self._split:
            torch.cuda.current_stream(self._device).wait_stream(self._streams[name])

    @contextmanager
    def used_by(self, owner: Any) -> Iterator[None]:
        """Set the ``streams`` attribute of ``owner``, a trainer, to this object for a step."""
        before = owner.streams
        try:
            owner.streams, self.begun = self, self.mark()
            with _accumulating_in_any_stream():
                yield
            self.join()
        except BaseException:
            # The caller undoes the step, while other streams may still be writing. After a failed
            # capture waiting is an error, which must not hide the first one.
            with suppress(RuntimeError):
                self.join()
            raise
        finally:
            owner.streams, self.begun = before, None
            self._split.clear()
            self._kept.clear()

    @property
    def are_several(self) -> bool:
        """Whether there are streams besides the current one."""
        return self._device is not None

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Keep references to tensors that pass between streams, until the end of the step."""
        if self._device is not None:
            self._kept += tensors

    def join(self) -> None:
        """Make the current stream wait for all streams used in this step."""
        for name in sorted(self._split):
            torch.cuda.current_stream(self._device).wait_stream(self._streams[name])


@contextmanager
def _accumulating_in_any_stream() -> Iterator[None]:
    """Suppress torch's warning about parameters used in several streams, which is intended here."""
    set_warning = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if set_warning is None:
        yield
        return
    before = getattr(torch._C, "_warn_on_accumulate_grad_stream_mismatch", lambda: True)()
    set_warning(False)
    try:
        yield
    finally:
        set_warning(before)
