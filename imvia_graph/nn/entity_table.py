"""EntityTable: entity embeddings with optional gradients of the looked-up rows only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imvia_graph._gpu.lookup import lookup
from imvia_graph.distributed import Shards

#: Rows drawn at a time.
_PORTION = 2**16


class EntityTable(nn.Embedding):
    """``torch.nn.Embedding`` of the entities of one process.

    Parameters
    ----------
    shards : Shards
        The entities of this process; row 0 belongs to entity ``shards.start``.
    dim : int
        Width of the embeddings.
    std : float, optional
        Standard deviation of the initial embeddings. Default: ``dim ** -0.5``, for rows of length
        about 1, since shorter rows take epochs to grow.

    Attributes
    ----------
    std : float
    lazy : bool
        Whether each lookup returns its rows as a new leaf tensor, kept until `forget`, so that a
        step allocates no gradient of the table's size; `gradients` collects the gradients of the
        rows. It has no effect where the weight requires no gradient or gradients are disabled.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.distributed import Shards
    >>> from imvia_graph.nn.entity_table import EntityTable
    >>> table = EntityTable(Shards(1000), 4)
    >>> table.lazy = True
    >>> table(torch.tensor([7, 3, 7])).sum().backward()
    >>> rows, grad = table.gradients()
    >>> rows.tolist(), grad[:, 0].tolist(), table.weight.grad is None
    ([3, 7], [1.0, 2.0], True)
    """

    def __init__(self, shards: Shards, dim: int, std: float | None = None) -> None:
        # Set first: the constructor of nn.Embedding calls reset_parameters.
        self.shards, self.std = shards, dim**-0.5 if std is None else std
        super().__init__(len(shards), dim)
        self.lazy = False
        self._looked_up: list[tuple[Tensor, Tensor]] = []

    def reset_parameters(self) -> None:
        """Draw new rows.

        Every process draws the rows of all processes, in the same portions, and keeps its own, so
        that a seed gives the same rows for any number of processes.
        """
        shards = self.shards
        if self.weight.device.type == "meta":
            return
        with torch.no_grad():
            for first in range(0, shards.num_entities, _PORTION):
                last = min(first + _PORTION, shards.num_entities)
                drawn = self.weight.new_empty(last - first, self.embedding_dim)
                drawn.normal_(std=self.std)
                begin, end = max(first, shards.start), min(last, shards.stop)
                if begin < end:
                    mine = drawn[begin - first : end - first]
                    self.weight[begin - shards.start : end - shards.start] = mine

    def forward(self, row: Tensor) -> Tensor:
        """Return the (n, dim) embeddings of (n,) int64 rows."""
        learns = self.weight.requires_grad and torch.is_grad_enabled()
        if not (self.lazy and learns):
            return lookup(row, self.weight)
        rows = self.weight.detach()[row].requires_grad_()
        self._looked_up.append((row, rows))
        return rows

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the distinct rows (n,) looked up since `forget` and their gradients (n, dim)."""
        found = [(row, part.grad) for row, part in self._looked_up if part.grad is not None]
        if not found:
            none = torch.empty(0, dtype=torch.int64, device=self.weight.device)
            return none, self.weight.new_empty(0, self.embedding_dim)
        row, place = torch.cat([row for row, _ in found]).unique(return_inverse=True)
        grad = self.weight.new_zeros(len(row), self.embedding_dim)
        return row, grad.index_add_(0, place, torch.cat([part for _, part in found]))

    def looked_up(self) -> list[Tensor]:
        """Return the leaf tensors of the lookups since `forget`."""
        return [rows for _, rows in self._looked_up]

    def forget(self) -> None:
        """Release the leaf tensors of all lookups."""
        self._looked_up.clear()
