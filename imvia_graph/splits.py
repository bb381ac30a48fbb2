"""Splits of triples into train, validation and test sets without leaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from imvia_graph.errors import DataError

By = Literal["pair", "triple"]
#: Share of the training triples that "held-out" validation takes.
HELD_OUT_FRACTION = 0.05


def hold_out(
    triples: Tensor,
    fraction: float = HELD_OUT_FRACTION,
    seed: int = 0,
    keep: Tensor | None = None,
    by: By = "pair",
) -> tuple[Tensor, Tensor]:
    """Split training triples into a smaller train set and a held-out set.

    With ``by="pair"``, all triples between the same two entities, in either direction and under any
    relation, stay together, so that train has no inverse, symmetric twin or copy of a held-out
    triple. Every entity and every relation of ``triples`` keeps at least one triple in train.

    Parameters
    ----------
    triples : Tensor
        (n, 3) int64.
    fraction : float
        Fraction of the triples to hold out, in (0, 1). Fewer are held out if these rules do not
        allow as many. Default: 0.05.
    seed : int
        The same seed gives the same split. Default: 0.
    keep : Tensor, optional
        (m, 3) int64: triples between the two entities of one of these stay in train; with
        ``by="triple"``, only copies of these triples. Default: none.
    by : {"pair", "triple"}
        Which triples stay together: those between the same two entities, or only copies of a
        triple, which suits a test set drawn in this way (`drawn_by`). Default: ``pair``.

    Returns
    -------
    tuple of Tensor
        Train and held-out triples, each in the original order.

    Raises
    ------
    DataError
        ``fraction`` is not between 0 and 1, or ``by`` is neither pair nor triple.

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
    if by not in get_args(By):
        raise DataError(f"hold_out: expected by to be pair or triple, received {by!r}.")
    train, held = _hold_out_parts(triples, [fraction], seed, keep, by)
    return train, held


def drawn_by(train: Tensor, test: Tensor) -> By:
    """Return whether a test set was drawn by pairs of entities or by single triples.

    Compare the fraction of test triples whose two entities a training triple joins, in either
    direction, with the fraction of training triples whose two entities another training triple
    joins. The fractions are about equal if the test set was drawn triple by triple; the first is 0
    if it was drawn pair by pair. The nearer case is returned, and ``pair`` if the second fraction
    is 0 or there is no test set. Nothing else of the test set is used, neither relations nor ranks.

    Parameters
    ----------
    train, test : Tensor
        (n, 3) and (m, 3) int64.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.splits import drawn_by
    >>> train = torch.tensor([[0, 0, 1], [1, 1, 0], [1, 0, 2], [2, 1, 1]])
    >>> drawn_by(train, torch.tensor([[0, 1, 1]]))
    'triple'
    >>> drawn_by(train, torch.tensor([[0, 1, 2]]))
    'pair'
    """
    train, test = (part.unique(dim=0) if len(part) else part for part in (train, test))
    if not len(train) or not len(test):
        return "pair"
    both = torch.cat([train, test])
    pair = _numbered_pairs(*both[:, [0, 2]].sort(dim=1).values.unbind(dim=1))
    of_train, of_test = pair.split([len(train), len(test)])
    count = torch.bincount(of_train, minlength=int(pair.max()) + 1)
    expected = (count[of_train] > 1).double().mean()
    found = (count[of_test] > 0).double().mean()
    return "triple" if 2 * found > expected > 0 else "pair"


def split_triples(
    triples: Tensor, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Split triples into train, validation and test sets, by the rules of `hold_out`.

    All triples between the same two entities are in the same set, and every entity and every
    relation keeps at least one triple in train.

    Parameters
    ----------
    triples : Tensor
        (n, 3) int64.
    fractions : sequence of float
        Fractions of train, validation and test; their sum is 1. Validation and test sets are
        smaller if the rules do not allow as many triples. Default: 0.8, 0.1, 0.1.
    seed : int
        The same seed gives the same split. Default: 0.

    Returns
    -------
    tuple of Tensor
        Train, validation and test triples, each in the original order.

    Raises
    ------
    DataError
        ``fractions`` are not three numbers from 0 to 1 whose sum is 1, that of train above 0.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.splits import split_triples
    >>> triples = torch.cartesian_prod(torch.arange(20), torch.arange(2), torch.arange(20))
    >>> [len(part) for part in split_triples(triples)]
    [640, 80, 80]
    """
    shares = checked_shares("fractions", fractions)
    train, test, valid = _hold_out_parts(triples, [shares[2], shares[1]], seed)
    return train, valid, test


def checked_shares(name: str, value: object) -> tuple[float, float, float]:
    """Parse fractions of train, validation and test; ``name`` names them in a DataError."""
    expected = (
        f"{name}: expected three numbers from 0 to 1, of train (not 0), validation and test, as"
        " 0.8, 0.1, 0.1"
    )
    numbers: Any = value.split(",") if isinstance(value, str) else value
    try:
        shares = [float(share) for share in numbers]
    except (TypeError, ValueError):
        shares = []
    if len(shares) != 3 or not all(0 <= share <= 1 for share in shares) or not shares[0]:
        raise DataError(f"{expected}; received {value!r}.")
    if abs(sum(shares) - 1) > 1e-6:
        raise DataError(f"{expected}, with a sum of 1; the sum of {shares} is {sum(shares):g}.")
    return shares[0], shares[1], shares[2]


def _hold_out_parts(
    triples: Tensor,
    fractions: Sequence[float],
    seed: int,
    keep: Tensor | None = None,
    by: By = "pair",
) -> list[Tensor]:
    """Return the train triples, then the held-out triples of each fraction."""
    n = len(triples)
    if not n:
        return [triples] + [triples[:0]] * len(fractions)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    head, relation, tail = (column[order] for column in triples.unbind(dim=1))

    # Groups that stay together: triples between the same two entities, or copies of a triple.
    kept = triples[:0] if keep is None else keep
    heads, tails = torch.cat([head, kept[:, 0]]), torch.cat([tail, kept[:, 2]])
    if by == "pair":
        group = _numbered_pairs(torch.minimum(heads, tails), torch.maximum(heads, tails))
    else:
        relations = torch.cat([relation, kept[:, 1]])
        group = _numbered_pairs(relations, _numbered_pairs(heads, tails))
    num_groups = int(group.max()) + 1
    group, kept_group = group.split([n, len(kept)])

    # In the shuffled order, the first triple of each entity and each relation stays in train.
    anchored = torch.zeros(num_groups, dtype=torch.bool)
    anchored[kept_group] = True
    anchored[group[_first(relation)]] = True
    anchored[group[_first(torch.stack([head, tail], dim=1).flatten()) // 2]] = True

    # Whole groups, in order of their first triple, each into the first part that has room for it.
    size = torch.bincount(group, minlength=num_groups)
    candidates = group[_first(group).sort().values]
    candidates = candidates[~anchored[candidates]]
    part = torch.zeros(num_groups, dtype=torch.int8)
    for number, fraction in enumerate(fractions, 1):
        chosen = _fill(size[candidates], round(n * fraction))
        part[candidates[chosen]] = number
        candidates = candidates[~chosen]
    place = torch.empty(n, dtype=torch.int8)
    place[order] = part[group]
    return [triples[place == number] for number in range(len(fractions) + 1)]


def _fill(size: Tensor, room: int) -> Tensor:
    """Return which groups are taken if each in turn is taken when it still fits into ``room``."""
    taken = torch.zeros(len(size), dtype=torch.bool)
    waiting = (size <= room).nonzero().flatten()
    while len(waiting):
        fits = size[waiting].cumsum(0) <= room
        taken[waiting[fits]] = True
        room -= int(size[waiting[fits]].sum())
        waiting = waiting[~fits]
        waiting = waiting[size[waiting] <= room]
    return taken


def _numbered_pairs(one: Tensor, other: Tensor) -> Tensor:
    """Number pairs from 0; equal pairs have equal numbers."""
    base = int(other.max()) + 1
    if (int(one.max()) + 1) * base < 2**63 and int(one.min()) >= 0 and int(other.min()) >= 0:
        _, number = torch.unique(one * base + other, return_inverse=True)
    else:
        _, number = torch.unique(torch.stack([one, other], dim=1), dim=0, return_inverse=True)
    return number


def _first(values: Tensor) -> Tensor:
    """Compute `first_occurrence` without sorting if the values are ids of a small enough range."""
    if not len(values) or int(values.min()) < 0 or int(values.max()) > 4 * len(values) + 1024:
        return first_occurrence(values)
    position = torch.arange(len(values))
    first = torch.full((int(values.max()) + 1,), len(values))
    first.scatter_reduce_(0, values, position, reduce="amin")
    return first[first < len(values)]


def first_occurrence(values: Tensor) -> Tensor:
    """Return the position of the first occurrence of each distinct value of a 1-dim tensor."""
    _, inverse = torch.unique(values, return_inverse=True)
    num = int(inverse.max()) + 1 if len(values) else 0
    position = torch.arange(len(values))
    first = torch.full((num,), len(values))
    return first.scatter_reduce(0, inverse, position, reduce="amin")


def count_shared(part: Tensor, other: Tensor) -> int:
    """Count the distinct triples of ``part`` that are in ``other``, too."""
    if not len(part) or not len(other):
        return 0
    # Most triples of a large graph have a head or a tail that a small part of it does not have.
    for column in (0, 2):
        in_part = torch.zeros(int(torch.maximum(part.max(), other.max())) + 1, dtype=torch.bool)
        in_part[part[:, column]] = True
        other = other[in_part[other[:, column]]]
        if not len(other):
            return 0
    both = torch.cat([part, other])
    pair = _numbered_pairs(both[:, 0], both[:, 2])
    number = _numbered_pairs(both[:, 1], pair)
    of_part, of_other = number.split([len(part), len(other)])
    in_other = torch.zeros(int(number.max()) + 1, dtype=torch.bool)
    in_other[of_other] = True
    return int(in_other[of_part.unique()].sum())
