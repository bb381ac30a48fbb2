"""What training and ranking watch for: memory that runs out, and numbers that are none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from imvia_graph import _gpu
from imvia_graph.distributed import Shards
from imvia_graph.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

# -- memory that runs out -------------------------------------------------------------------------

#: What a lack of memory is raised as: by Python and NumPy, and by torch.
MEMORY_ERRORS = (MemoryError, RuntimeError)
#: How torch says that a CPU has no memory left, where it has no class of its own for it.
_SAID = ("not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


class Parts:
    """Into how many parts rows are cut so that the work on them fits into memory.

    Parameters
    ----------
    what : str
        What is being done, for messages.

    Attributes
    ----------
    count : int
        1 until memory runs out; then a power of two that only grows.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 1

    def rows(self, whole: int) -> int:
        """Rows at a time, of so many; at least 1."""
        return max(1, -(-whole // self.count))

    def halve(self, error: BaseException, whole: int) -> None:
        """After an error: half the rows from now on; called where the error is handled.

        Raises
        ------
        OutOfMemoryError
            It was one row at a time already.
        Exception
            The error itself, where it is not of memory.
        """
        if not is_out_of_memory(error):
            raise error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if self.rows(whole) == 1:
            raise OutOfMemoryError(
                f"Out of memory while {self.what}, one row at a time ({reason}). Close other"
                " programs, use a larger machine, or a smaller dim, relation_dim or batch_size."
            ) from error
        if self.count == 1:
            logger.warning(
                "Out of memory while %s (%s). From now on fewer rows are taken at a time, with the"
                " same result.",
                self.what,
                reason,
            )
        self.count *= 2


# -- numbers that are none ------------------------------------------------------------------------


class Kept:
    """The values that tensors had, in one tensor a dtype."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        self._groups = [(group, _flat(group)) for group in by_dtype.values()]

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Have the tensors as they were; with ``where``, a scalar on the device if it is not 0."""
        for group, kept in self._groups:
            values = kept if where is None else torch.where(where > 0, kept, _flat(group))
            parts = values.split([tensor.numel() for tensor in group])
            shaped = [part.view_as(to) for part, to in zip(parts, group, strict=True)]
            torch._foreach_copy_(group, shaped)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Before:
    """What a step changes before its gradients are known to be good: to take the step back.

    That is the random states, and buffers of the model: running statistics.
    """

    def __init__(self, buffers: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._buffers = Kept(buffers)

    def restore_random_states(self) -> None:
        """Have the step draw again what it drew."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def restore_buffers(self, where: Tensor | None = None) -> None:
        """Have the buffers as they were; see `Kept`."""
        self._buffers.restore(where)


class Health:
    """Whether the losses and the gradients of a step are finite.

    Parameters
    ----------
    losses : mapping of str to Tensor
        Scalars.
    gradients : mapping of str to Tensor
        Those of parameters, by their names.
    shards : Shards, optional
        With several processes a step is bad for all where it is for one.

    Attributes
    ----------
    bad : Tensor
        float32 scalar on the device: 1 where one of them is not finite, else 0. Optimizers take it
        as ``found_inf`` and leave their step out without the host having to wait for it.
    """

    def __init__(
        self,
        losses: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        shards: Shards | None = None,
    ) -> None:
        gradients = {name: grad for name, grad in gradients.items() if grad.numel()}
        numbers = self.numbers_of(losses, gradients)
        self.bad = (~numbers.isfinite().all()).float()
        self._elsewhere = False
        if shards is not None and not shards.alone:
            mine = self.bad.clone()
            self._elsewhere = bool(shards.max_(self.bad) > mine)
        self._watch([*losses, *gradients], len(losses), numbers)

    @staticmethod
    def numbers_of(losses: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
        """(losses + gradients,) numbers that are finite where these are; gradients not empty."""
        values = [value.detach().float() for value in losses.values()]
        return torch.stack([*values, *_told(list(gradients.values()))])

    @classmethod
    def of(cls, names: Sequence[str], num_losses: int, numbers: Tensor) -> Health:
        """The health of a step whose `numbers_of` are known; it has no ``bad``."""
        health = cls.__new__(cls)
        health._elsewhere = False
        health._watch(names, num_losses, numbers)
        return health

    def _watch(self, names: Sequence[str], num_losses: int, numbers: Tensor) -> None:
        self.names, self.num_losses = list(names), num_losses
        self._numbers = numbers
        self._event = None
        if numbers.device.type == "cuda":
            # Copied while the host goes on; read when the step is over.
            self._numbers = torch.empty(numbers.shape, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def problems(self) -> tuple[list[str], list[str]]:
        """What is not finite: losses with their values, and names of parameters."""
        if self._elsewhere:
            return ["another process has a gradient that is not finite"], []
        if self._event is not None:
            self._event.synchronize()
        told = list(zip(self.names, self._numbers.tolist(), strict=True))
        finite = self._numbers.isfinite().tolist()
        losses = [
            f"{name} is {value}"
            for (name, value), good in zip(told[: self.num_losses], finite, strict=False)
            if not good
        ]
        rest = zip(self.names[self.num_losses :], finite[self.num_losses :], strict=True)
        return losses, [name for name, good in rest if not good]


def _told(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """A scalar a gradient that is finite if, and only if, all of the gradient is."""
    if not gradients:
        return []
    if not _gpu.is_waited_for(gradients[0].device):
        # A sum is finite only where all is, and much sooner there; the sum of a gradient that is
        # finite and huge may not be.
        sums = [gradient.sum().float() for gradient in gradients]
        if torch.stack(sums).isfinite().all():
            return sums
    return torch._foreach_norm(list(gradients), torch.inf)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


__all__ = ["MEMORY_ERRORS", "Before", "Health", "Kept", "Parts", "is_out_of_memory", "listed"]
