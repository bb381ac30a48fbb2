"""Carving a validation set from training triples without leaks."""

from __future__ import annotations

import torch
from torch import Tensor

from imvia_graph.errors import DataError


def hold_out(triples: Tensor, fraction: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split training triples into a smaller train set and a held-out set.

    All triples between the same two entities, in either direction and under any relation, stay
    together, so that no held-out triple has its inverse, its symmetric twin or its copy in train.
    Every entity and every relation of ``triples`` keeps at least one triple in train.

    Parameters
    ----------
    triples : Tensor
        (n, 3) int64.
    fraction : float
        Share of the triples to hold out, in (0, 1). Fewer are held out where the rules above leave
        fewer.
    seed : int
        The same seed gives the same split.

    Returns
    -------
    tuple of Tensor
        Train and held-out triples, each in the order in which they came.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.splits import hold_out
    >>> triples = torch.cartesian_prod(torch.arange(9), torch.arange(2), torch.arange(9))
    >>> train, valid = hold_out(triples, fraction=0.1)
    >>> len(train), len(valid)
    (146, 16)
    """
    if not 0 < fraction < 1:
        raise DataError(f"hold_out: expected a fraction between 0 and 1, received {fraction}.")
    generator = torch.Generator().manual_seed(seed)
    n = len(triples)
    order = torch.randperm(n, generator=generator)
    shuffled = triples[order]

    # Groups that may not be torn: triples between the same two entities.
    ends = shuffled[:, [0, 2]].sort(dim=1).values
    _, group = torch.unique(ends, dim=0, return_inverse=True)
    num_groups = int(group.max()) + 1 if n else 0

    # In the shuffled order, the first triple of each entity and each relation stays in train.
    anchored = torch.zeros(num_groups, dtype=torch.bool)
    head, relation, tail = shuffled.unbind(dim=1)
    anchored[group[first_occurrence(relation)]] = True
    anchored[group[first_occurrence(torch.stack([head, tail], dim=1).flatten()) // 2]] = True

    # Whole groups, in order of their first triple, until the wanted number is reached.
    size = torch.bincount(group, minlength=num_groups)
    candidates = group[first_occurrence(group).sort().values]
    candidates = candidates[~anchored[candidates]]
    chosen = candidates[size[candidates].cumsum(0) <= round(n * fraction)]
    held = torch.zeros(num_groups, dtype=torch.bool)
    held[chosen] = True
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order] = held[group]
    return triples[~mask], triples[mask]


def first_occurrence(values: Tensor) -> Tensor:
    """Positions at which each distinct value of a 1-dim tensor stands first."""
    _, inverse = torch.unique(values, return_inverse=True)
    num = int(inverse.max()) + 1 if len(values) else 0
    position = torch.arange(len(values))
    first = torch.full((num,), len(values))
    return first.scatter_reduce(0, inverse, position, reduce="amin")


def count_shared(part: Tensor, other: Tensor) -> int:
    """How many distinct triples of ``part`` stand in ``other`` too."""
    mine = torch.unique(part, dim=0)
    theirs = torch.unique(other, dim=0)
    both = torch.cat([mine, theirs])
    _, counts = torch.unique(both, dim=0, return_counts=True)
    return int((counts > 1).sum())
