"""Many processes: queries split by position, entity tables and scores split by rows.

Every process asks for the same batch. It embeds and decodes its part of the queries, all gather the
query vectors, and each scores all queries against the entities that it owns. What is summed over
processes are gradients of what all hold (relations, decoders, projections), a row's sums in the
softmax, and counts in ranks. The collectives are torch.distributed's: NCCL on GPUs, gloo on CPUs.
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
    """Entities in ranges of ids, one a process, and what processes tell each other.

    Parameters
    ----------
    num_entities : int
    rank, size : int, optional
        This process and how many there are. Default: the only one, which talks to nobody.

    Attributes
    ----------
    start, stop : int
        The entities of this process: ids from start to stop, stop not counted.

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
        """Those of the process group, where there is one."""
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
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def part(self, rows: int) -> slice:
        """Which of so many rows of a batch are this process's."""
        return slice(_cut(rows, self.rank, self.size), _cut(rows, self.rank + 1, self.size))

    def owned(self, entity: Tensor) -> Tensor:
        """(n,) bool: whether entities are this process's."""
        return (entity >= self.start) & (entity < self.stop)

    # -- what is differentiated through -----------------------------------------------------------

    def gather(self, part: Tensor, rows: int) -> Tensor:
        """All (rows, …) of which each process has its `part`; gradients are summed."""
        if self.alone:
            return part
        out: Tensor = _Gather.apply(part, self, rows)
        return out

    def rows_of(self, table: Callable[[Tensor], Tensor], entity: Tensor) -> Tensor:
        """Rows of a table that is split by entities.

        Parameters
        ----------
        table : callable
            Rows (k, d) of (k,) positions in this process's range.
        entity : Tensor
            (n,) int64, the same on every process.

        Returns
        -------
        Tensor
            (len(part), d): those of this process's `part` of the n.
        """
        if self.alone:
            return table(entity)
        owner = torch.bucketize(entity, entity.new_tensor(self.bounds[1:-1]), right=True)
        mine = (owner == self.rank).nonzero().flatten()
        cuts = mine.new_tensor([_cut(len(entity), i, self.size) for i in range(1, self.size)])
        sent = torch.bincount(torch.bucketize(mine, cuts, right=True), minlength=self.size)
        asked = owner[self.part(len(entity))]
        received = torch.bincount(asked, minlength=self.size)
        picked = table(entity[mine] - self.start)
        rows = _Exchange.apply(picked, sent.tolist(), received.tolist())
        order = torch.argsort(asked, stable=True)
        return torch.empty_like(rows).index_copy(0, order, rows)

    def all_rows_of(self, table: Callable[[Tensor], Tensor], entity: Tensor) -> Tensor:
        """As `rows_of`, but (n, d), all on every process; nothing is differentiated through."""
        if self.alone:
            return table(entity)
        mine = self.owned(entity).nonzero().flatten()
        picked = table(entity[mine] - self.start).detach()
        rows = picked.new_zeros(len(entity), *picked.shape[1:])
        return self.sum_(rows.index_copy_(0, mine, picked))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes; each passes the gradient on as it is to its own term.

        So every process knows the loss of all, and its backward pass makes the gradients of what is
        its own.
        """
        if self.alone:
            return tensor
        out: Tensor = _Total.apply(tensor)
        return out

    def repeated(self, tensor: Tensor) -> Tensor:
        """What every process computes alike from gathered rows, as it is; gradients are shared out.

        They are summed over the processes elsewhere, as if each had made a part.
        """
        if self.alone:
            return tensor
        return tensor / self.size + (tensor * (1 - 1 / self.size)).detach()

    def logsumexp(self, tensor: Tensor) -> Tensor:
        """Log-sum-exp over the last dimension, which is split over the processes; see `total`."""
        if self.alone:
            return tensor.logsumexp(-1)
        detached = tensor.detach()
        if tensor.shape[-1]:
            top = self.max_(detached.amax(-1))
        else:
            top = self.max_(detached.new_full(tensor.shape[:-1], -torch.inf))
        top = torch.where(top.isinf(), 0.0, top)
        return top + self.total((tensor - top[..., None]).exp().sum(-1)).log()

    # -- what is not ------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest over the processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients of what all processes hold.

        Where a process has none it counts as 0; where all have none there stays none.
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
        """Send a table's rows, in portions, to the first process, which asks for them in turn."""
        for portion in own.detach().split(self._portion(own)):
            if len(portion):  # of a process without entities nothing is asked for
                dist.send(portion.contiguous(), 0)

    def receive_rows(self, own: Tensor) -> Iterator[Tensor]:
        """All rows of a table in portions; to be used up, since the others are waiting."""
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
        """What the first process has, on every process: anything that JSON could carry."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def first_does(self, do: Callable[[], None]) -> None:
        """Have the first process do something while the others wait; what it meets, all meet.

        Raises
        ------
        IMVIAError, OSError
            As the first process meets them; on the others a CheckpointError that says the same.
        """
        self.all_do(lambda: do() if self.is_first else None)

    def all_do(self, do: Callable[[], None]) -> None:
        """Have every process do its part of what the first one writes; see `first_does`."""
        met: Exception | None = None
        try:
            do()
        except (IMVIAError, OSError) as error:  # the others wait to hear of it
            met = error
        told = self.first_tells(None if met is None else str(met))
        if told is not None:
            raise met or CheckpointError(told)
        if met is not None:
            raise met

    def wait(self) -> None:
        """Until all processes are here."""
        if not self.alone:
            dist.barrier()


#: Bytes of a table that are sent at a time.
_PORTION = 2**26


def _cut(rows: int, part: int, parts: int) -> int:
    """Where a part begins of rows that are shared out evenly, larger parts first."""
    return part * (rows // parts) + min(part, rows % parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shards: Shards, rows: int) -> Tensor:
        ctx.shards, ctx.rows = shards, rows
        most = -(-rows // shards.size)
        mine = part.new_zeros(most, *part.shape[1:])
        mine[: len(part)] = part
        out = mine.new_empty(shards.size * most, *part.shape[1:])
        dist.all_gather_into_tensor(out, mine)
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
    """Rows to the processes that asked for them; gradients the way back."""

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
_TO_JOIN, _TO_WAIT = timedelta(seconds=90), timedelta(minutes=30)

#: Where processes have the name of their `job`; ``fit --processes`` gives it to those it starts.
JOB = "IMVIA_GRAPH_JOB"


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def job() -> str | None:
    """A name that the processes of one torchrun have in common, those started again, too.

    Whoever asks first leaves it in torchrun's store. None where torchrun started nothing, and where
    nobody asked before a process group was made.
    """
    if not is_launched():
        return None
    if JOB not in os.environ and not dist.is_initialized():
        named: bytes = _meeting()[0].compare_set("imvia_graph/job", "", uuid.uuid4().hex)
        os.environ[JOB] = named.decode()
    return os.environ.get(JOB)


def is_first() -> bool:
    """Whether this process writes files and talks to people: the only one, or the first."""
    return not is_launched() or os.environ.get("RANK", "0") == "0"


def local_device(name: str) -> str:
    """The setting ``device`` of this process: a GPU each, where torchrun started several."""
    if not is_launched() or name not in ("auto", "cuda"):
        return name
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def join(device: torch.device) -> None:
    """Join the process group that torchrun describes; once.

    torchrun keeps one store over all its restarts, in which the addresses of processes that died
    are still found: each restart has its own prefix in it. Where the others cannot be reached in
    time, the process ends with the exit code `NOT_JOINED`, and whoever started it starts all again.
    """
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = _meeting()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with _reaching_others():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"imvia_graph/{attempt}", store),
            rank=rank,
            world_size=size,
            timeout=_TO_JOIN,
        )
    # Later they may have to wait for one that writes a checkpoint.
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(_TO_WAIT)
    else:  # torch before 2.15
        dist.distributed_c10d._set_pg_timeout(_TO_WAIT, dist.group.WORLD)


@functools.cache
def _meeting() -> tuple[dist.Store, int, int]:
    """The store that torchrun describes, this process's rank, and how many there are."""
    with _reaching_others():
        store, rank, size = next(dist.rendezvous("env://", timeout=_TO_JOIN))
    return store, rank, size


@contextmanager
def _reaching_others() -> Iterator[None]:
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
