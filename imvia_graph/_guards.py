"""Guards of training and ranking: against running out of memory, and values that are not finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from imvia_graph import _gpu
from imvia_graph._display import first_line
from imvia_graph.distributed import Shards
from imvia_graph.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

# -- running out of memory ------------------------------------------------------------------------

#: Classes of the errors that Python and NumPy, and torch, raise when memory runs out.
MEMORY_ERRORS = (MemoryError, RuntimeError)
#: Parts of torch's messages when a CPU has no memory left, for which it has no class of its own.
_MESSAGES = ("not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        message in str(error).lower() for message in _MESSAGES
    )


class Parts:
    """The number of parts into which rows are split so that the work on them fits into memory.

    Parameters
    ----------
    what : str
        Description of the work, for messages: "Out of memory while …".

    Attributes
    ----------
    count : int
        1 until memory runs out, then a power of two that only grows.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 1

    def rows(self, whole: int) -> int:
        """Return the number of rows of a part, at least 1, of ``whole`` rows."""
        return max(1, -(-whole // self.count))

    def halve(self, error: BaseException, whole: int) -> None:
        """Halve the number of rows of a part after an error; call this in its handler.

        Raises
        ------
        OutOfMemoryError
            A part has only one row already.
        Exception
            The error itself, if memory did not run out.
        """
        if not is_out_of_memory(error):
            raise error
        reason = first_line(error)
        if self.rows(whole) == 1:
            raise OutOfMemoryError(
                f"Out of memory while {self.what}, one row at a time ({reason}). Close other"
                " programs, use a larger machine, or a smaller dim, relation_dim or batch_size."
            ) from error
        if self.count == 1:
            logger.warning(
                "Out of memory while %s (%s). From now on fewer rows are processed at a time, with"
                " the same result.",
                self.what,
                reason,
            )
        self.count *= 2


# -- values that are not finite -------------------------------------------------------------------


class Kept:
    """A copy of the values of tensors, in one tensor per dtype."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        self._groups = [(group, _flat(group)) for group in by_dtype.values()]

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Restore the values; with ``where``, a scalar on the device, only if it is above 0."""
        for group, kept in self._groups:
            values = kept if where is None else torch.where(where > 0, kept, _flat(group))
            parts = values.split([tensor.numel() for tensor in group])
            shaped = [part.view_as(to) for part, to in zip(parts, group, strict=True)]
            torch._foreach_copy_(group, shaped)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Before:
    """The state that a step changes before its gradients are known to be finite, to undo the step.

    This is the random states and the model's persistent buffers (running statistics).
    """

    def __init__(self, buffers: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._buffers = Kept(buffers)

    def restore_random_states(self) -> None:
        """Restore the random states, so that the next step draws the same numbers."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def restore_buffers(self, where: Tensor | None = None) -> None:
        """Restore the buffers; see `Kept.restore`."""
        self._buffers.restore(where)


class Health:
    """The losses and gradients of a step, of which the host learns later whether they are finite.

    Parameters
    ----------
    names : sequence of str
        Names of the losses, then of the parameters.
    num_losses : int
    numbers : Tensor
        Result of `numbers_of`.
    elsewhere : bool, optional
        Whether the step is bad in another process and not in this one. Default: ``False``.
    """

    def __init__(
        self, names: Sequence[str], num_losses: int, numbers: Tensor, elsewhere: bool = False
    ) -> None:
        self.names, self.num_losses = list(names), num_losses
        self._numbers, self._elsewhere = numbers, elsewhere
        self._event = None
        if numbers.device.type == "cuda":
            # Copied asynchronously; `problems` reads the numbers when the step is over.
            self._numbers = torch.empty(numbers.shape, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            # In the stream of the copy: another GPU may be the current one.
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    @classmethod
    def of(
        cls,
        losses: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        shards: Shards | None = None,
    ) -> tuple[Health, Tensor]:
        """Return the health of a step, and a scalar: 1 if any loss or gradient is not finite.

        Optimizers take the scalar as ``found_inf`` and skip their step, without the host waiting
        for its value. With several processes, a step that is bad on one is bad on all.
        """
        gradients = {name: grad for name, grad in gradients.items() if grad.numel()}
        numbers = cls.numbers_of(losses, gradients)
        bad = (~numbers.isfinite().all()).float()
        elsewhere = False
        if shards is not None and not shards.alone:
            own = bad.clone()
            elsewhere = bool(shards.max_(bad) > own)
        return cls([*losses, *gradients], len(losses), numbers, elsewhere), bad

    @staticmethod
    def numbers_of(losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
        """Return (losses + gradients,) numbers, finite if the loss or (nonempty) gradient is."""
        values = [value.detach().float() for value in losses.values()]
        return torch.stack([*values, *_indicators(list(gradients.values()))])

    def problems(self) -> tuple[list[str], list[str]]:
        """Return the losses that are not finite, with their values, and names of parameters."""
        if self._elsewhere:
            return ["another process has a gradient that is not finite"], []
        if self._event is not None:
            self._event.synchronize()
        named = list(zip(self.names, self._numbers.tolist(), strict=True))
        finite = self._numbers.isfinite().tolist()
        losses = [
            f"{name} is {value}"
            for (name, value), good in zip(named[: self.num_losses], finite, strict=False)
            if not good
        ]
        rest = zip(self.names[self.num_losses :], finite[self.num_losses :], strict=True)
        return losses, [name for name, good in rest if not good]


def _indicators(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return a scalar per gradient that is finite if and only if all of its elements are."""
    if not gradients:
        return []
    if not _gpu.reading_synchronizes(gradients[0].device):
        # On a CPU sums are much faster than norms. A sum is finite only if all elements are; but it
        # may overflow if they are finite and huge, which the norm does not.
        sums = [gradient.sum().float() for gradient in gradients]
        if torch.stack(sums).isfinite().all():
            return sums
    return torch._foreach_norm(list(gradients), torch.inf)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Join the first ``most`` names, and say how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


__all__ = ["MEMORY_ERRORS", "Before", "Health", "Kept", "Parts", "is_out_of_memory", "listed"]
