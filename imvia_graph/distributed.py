"""Training in several processes: queries split by position, entity tables and scores by entity.

All processes draw the same batch. Each embeds and decodes its part of the queries, all-gathers the
query vectors, and scores all queries against the entities that it owns. All-reduced are the
gradients of replicated parameters (relations, decoders, projections), the sums of the softmax, and
the counts of ranks. The collectives are torch.distributed's: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import functools
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from imvia_graph.errors import CheckpointError, IMVIAError


class Shards:
    """The partition of entities into a range of ids per process, with the collectives between them.

    Parameters
    ----------
    num_entities : int
    rank, size : int, optional
        The rank of this process and the number of processes. Default: a single process, which
        communicates with no other.

    Attributes
    ----------
    start, stop : int
        The entities of this process: ids from start to stop, stop excluded.

    Examples
    --------
    >>> from imvia_graph.distributed import Shards
    >>> Shards(10).start, Shards(10).stop
    (0, 10)
    >>> Shards(10, rank=1, size=3).start, Shards(10, rank=1, size=3).stop
    (4, 7)
    """

    def __init__(self, num_entities: int, rank: int = 0, size: int = 1) -> None:
        self.num_entities, self.rank, self.size = num_entities, rank, size
        self.bounds = [_cut(num_entities, i, size) for i in range(size + 1)]
        self.start, self.stop = self.bounds[rank : rank + 2]

    @classmethod
    def of_world(cls, num_entities: int) -> Shards:
        """Create the shards of the process group; of a single process if there is none."""
        if not dist.is_initialized():
            return cls(num_entities)
        return cls(num_entities, dist.get_rank(), dist.get_world_size())

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows messages."""
        return self.rank == 0

    def part(self, rows: int) -> slice:
        """Return this process's slice of a batch of ``rows`` rows."""
        return slice(_cut(rows, self.rank, self.size), _cut(rows, self.rank + 1, self.size))

    def owned(self, entity: Tensor) -> Tensor:
        """Return (n,) bool: whether this process owns each entity."""
        return (entity >= self.start) & (entity < self.stop)

    # -- differentiable collectives ---------------------------------------------------------------

    def gather(self, part: Tensor, rows: int) -> Tensor:
        """All-gather (rows, …) from the `part` of each process; gradients are summed."""
        if self.alone:
            return part
        out: Tensor = _Gather.apply(part, self, rows)
        return out

    def rows_of(self, table: Callable[[Tensor], Tensor], entity: Tensor) -> Tensor:
        """Look up rows of a table that is split by entities, by an all-to-all exchange.

        Parameters
        ----------
        table : callable
            Returns the rows (k, d) of (k,) positions in this process's range.
        entity : Tensor
            (n,) int64, the same on every process.

        Returns
        -------
        Tensor
            (len(part), d): the rows of this process's `part` of the n entities.
        """
        if self.alone:
            return table(entity)
        owner = torch.bucketize(entity, entity.new_tensor(self.bounds[1:-1]), right=True)
        own = (owner == self.rank).nonzero().flatten()
        cuts = own.new_tensor([_cut(len(entity), i, self.size) for i in range(1, self.size)])
        sent = torch.bincount(torch.bucketize(own, cuts, right=True), minlength=self.size)
        sender = owner[self.part(len(entity))]
        received = torch.bincount(sender, minlength=self.size)
        picked = table(entity[own] - self.start)
        rows = _Exchange.apply(picked, sent.tolist(), received.tolist())
        order = torch.argsort(sender, stable=True)
        return torch.empty_like(rows).index_copy(0, order, rows)

    def all_rows_of(self, table: Callable[[Tensor], Tensor], entity: Tensor) -> Tensor:
        """Look up rows as `rows_of`, but all (n, d) on every process, and without gradients."""
        if self.alone:
            return table(entity)
        own = self.owned(entity).nonzero().flatten()
        picked = table(entity[own] - self.start).detach()
        rows = picked.new_zeros(len(entity), *picked.shape[1:])
        return self.sum_(rows.index_copy_(0, own, picked))

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the processes; the gradient passes unchanged to each process's own term.

        Every process thus has the loss of all, and its backward pass computes the gradients of its
        own term.
        """
        if self.alone:
            return tensor
        out: Tensor = _Total.apply(tensor)
        return out

    def repeated(self, tensor: Tensor) -> Tensor:
        """Return a value that all processes compute alike, with its gradient divided by ``size``.

        Gradients are summed over the processes elsewhere, which gives the gradient of one value.
        """
        if self.alone:
            return tensor
        return tensor / self.size + (tensor * (1 - 1 / self.size)).detach()

    def logsumexp(self, tensor: Tensor) -> Tensor:
        """Compute log-sum-exp over the last dimension, split over the processes; see `total`."""
        if self.alone:
            return tensor.logsumexp(-1)
        detached = tensor.detach()
        if tensor.shape[-1]:
            top = self.max_(detached.amax(-1))
        else:
            top = self.max_(detached.new_full(tensor.shape[:-1], -torch.inf))
        top = torch.where(top.isinf(), 0.0, top)
        return top + self.total((tensor - top[..., None]).exp().sum(-1)).log()

    # -- collectives without gradients ------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Take the maximum over the processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients of replicated parameters over the processes.

        A missing gradient counts as 0, unless it is missing on all processes: then it stays None.
        """
        if self.alone or not parameters:
            return
        has_one = [float(parameter.grad is not None) for parameter in parameters]
        anywhere = self.max_(torch.tensor(has_one, device=parameters[0].device)).tolist()
        grads = []
        for parameter, one in zip(parameters, anywhere, strict=True):
            if one and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                grads.append(parameter.grad)
        if not grads:
            return
        flat = _flatten_dense_tensors(grads)
        dist.all_reduce(flat)
        for grad, total in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
            grad.copy_(total)

    def send_rows(self, own: Tensor) -> None:
        """Send this process's rows of a table, in portions, to the first; see `receive_rows`."""
        for portion in own.detach().split(self._portion(own)):
            if len(portion):  # nothing is received from a process without entities
                dist.send(portion.contiguous(), 0)

    def receive_rows(self, own: Tensor) -> Iterator[Tensor]:
        """Yield all rows of a table in portions; exhaust it, as the other processes block."""
        size = self._portion(own)
        yield from own.detach().split(size)
        for rank in range(1, self.size):
            left = self.bounds[rank + 1] - self.bounds[rank]
            while left:
                portion = own.new_empty(min(size, left), *own.shape[1:])
                dist.recv(portion, rank)
                left -= len(portion)
                yield portion

    def _portion(self, rows: Tensor) -> int:
        return max(1, _PORTION // max(1, rows[:1].numel() * rows.element_size()))

    def first_tells(self, value: Any) -> Any:
        """Broadcast a value that JSON can hold from the first process."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def first_does(self, do: Callable[[], None]) -> None:
        """Call a function on the first process while the others wait.

        Raises
        ------
        IMVIAError, OSError
            The function raised it on the first process; the others raise a CheckpointError with the
            same message.
        """
        self.all_do(lambda: do() if self.is_first else None)

    def all_do(self, do: Callable[[], None]) -> None:
        """Call a function on all processes; an error of the first is raised as in `first_does`."""
        raised: Exception | None = None
        try:
            do()
        except (IMVIAError, OSError) as error:  # raised below: the others wait for the broadcast
            raised = error
        message = self.first_tells(None if raised is None else str(raised))
        if message is not None:
            raise raised or CheckpointError(message)
        if raised is not None:
            raise raised

    def wait(self) -> None:
        """Wait for all processes."""
        if not self.alone:
            dist.barrier()


#: Largest size in bytes of a portion of a table that is sent at a time.
_PORTION = 2**26


def _cut(rows: int, part: int, parts: int) -> int:
    """Return where a part starts if rows are divided evenly, larger parts first."""
    return part * (rows // parts) + min(part, rows % parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shards: Shards, rows: int) -> Tensor:
        ctx.shards, ctx.rows = shards, rows
        most = -(-rows // shards.size)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        out = padded.new_empty(shards.size * most, *part.shape[1:])
        dist.all_gather_into_tensor(out, padded)
        sizes = [
            _cut(rows, i + 1, shards.size) - _cut(rows, i, shards.size) for i in range(shards.size)
        ]
        pieces = [piece[:size] for piece, size in zip(out.split(most), sizes, strict=True)]
        return torch.cat(pieces) if rows else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.shards.part(ctx.rows)], None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Exchange(torch.autograd.Function):
    """All-to-all exchange of rows; gradients are sent back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _exchanged(rows, sent, received)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchanged(grad, ctx.received, ctx.sent), None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent)
    return out


# -- starting -------------------------------------------------------------------------------------


#: Exit code of a process that could not join the others (EX_TEMPFAIL).
NOT_JOINED = 75
#: Time limits of joining the process group, and of collectives.
_TO_JOIN, _TO_WAIT = timedelta(seconds=90), timedelta(minutes=30)

#: Environment variable with the name of the `job`; ``fit --processes`` sets it in its processes.
JOB = "IMVIA_GRAPH_JOB"


def is_launched() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def job() -> str | None:
    """Return the name that all processes of one torchrun share, restarted ones included.

    The first call stores the name in torchrun's store. Returns None if torchrun did not start this
    process, or if the first call comes after the process group was created.
    """
    if not is_launched():
        return None
    if JOB not in os.environ and not dist.is_initialized():
        name: bytes = _rendezvous()[0].compare_set("imvia_graph/job", "", uuid.uuid4().hex)
        os.environ[JOB] = name.decode()
    return os.environ.get(JOB)


def is_first() -> bool:
    """Return whether this process writes files and shows messages: the only one, or rank 0."""
    return not is_launched() or os.environ.get("RANK", "0") == "0"


def local_device(name: str) -> str:
    """Resolve the setting ``device`` for this process; under torchrun, each has its own GPU."""
    if not is_launched() or name not in ("auto", "cuda"):
        return name
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def join(device: torch.device) -> None:
    """Join the process group that torchrun describes, unless it is joined already.

    torchrun keeps one store for all restarts, which still has the addresses of dead processes, so
    each restart uses a prefix of its own. If the other processes cannot be reached in time, this
    process exits with the code `NOT_JOINED`, upon which its launcher restarts all.
    """
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = _rendezvous()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with _reaching_others():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"imvia_graph/{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=_TO_JOIN,
        )
    # Later, processes may have to wait for one that writes a checkpoint.
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(_TO_WAIT)
    else:  # torch before 2.15
        dist.distributed_c10d._set_pg_timeout(_TO_WAIT, dist.group.WORLD)


@functools.cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """Return torchrun's store, the rank of this process, and the number of processes."""
    with _reaching_others():
        store, rank, size = next(dist.rendezvous("env://", timeout=_TO_JOIN))
    return store, rank, size


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Exit with `NOT_JOINED` if the other processes cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        print(f"The other processes cannot be reached: {error}", file=sys.stderr)
        raise SystemExit(NOT_JOINED) from None


__all__ = [
    "JOB",
    "NOT_JOINED",
    "Shards",
    "is_first",
    "is_launched",
    "job",
    "join",
    "local_device",
]
