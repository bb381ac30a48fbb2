"""TuckerDecoder: Tucker scores (Eq. 6), batched by relation."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imvia_graph import _gpu
from imvia_graph._gpu import grouped
from imvia_graph._gpu.lookup import lookup
from imvia_graph._gpu.products import product
from imvia_graph.answers import pointer
from imvia_graph.distributed import Shards
from imvia_graph.errors import IMVIAError
from imvia_graph.nn._checks import check_width, refuse_tracing
from imvia_graph.nn.dropout import Dropout
from imvia_graph.ops import picking


class Share(NamedTuple):
    """What a process's queries are among those of all processes.

    Attributes
    ----------
    shards : Shards
    rows : Tensor
        (B,) int64: places of its queries.
    relations : Tensor
        (R,) int64: places of its distinct relations among all that are distinct.
    num_rows, num_relations : int
        How many there are of each in all.
    """

    shards: Shards
    rows: Tensor
    relations: Tensor
    num_rows: int
    num_relations: int


class Run(NamedTuple):
    """Relations, one after the other in their groups, that have about as many queries each.

    Attributes
    ----------
    relations, queries : int
        How many there are.
    room : int
        For how many queries each relation has room: for as many as the largest has, or some more.
    slot : Tensor or None
        (queries,) int64: their places in these rooms; None where all are full.
    """

    relations: int
    queries: int
    room: int
    slot: Tensor | None


class RelationGroups(NamedTuple):
    """Queries grouped by relation.

    Attributes
    ----------
    distinct : Tensor
        (R,) int64: those with few queries first; with ``offsets`` ascending, filled up with zeros.
    order : Tensor
        (B,) int64: positions of the queries of the first of them, then of the second, …
    counts : list of int or None
        How many queries each has; None with ``offsets``.
    share : Share or None
        None where they are all queries that there are.
    offsets : Tensor or None
        (R + 1,) int64: where each relation's queries begin in ``order``. On a GPU, which would have
        to be waited for to learn the counts.
    runs : list of Run or None
        All of them; None with ``offsets``.
    """

    distinct: Tensor
    order: Tensor
    counts: list[int] | None
    share: Share | None = None
    offsets: Tensor | None = None
    runs: list[Run] | None = None

    def of_each(self) -> Tensor:
        """(B,) int64: the relation of each query."""
        return torch.empty_like(self.order).index_copy(0, self.order, _of_each(self))


def group_by_relation(
    relation: Tensor, shards: Shards | None = None, most: int | None = None
) -> RelationGroups:
    """Group (B,) relations; with several processes, those of this one's part of them.

    No more than ``most`` are distinct; None for any number.
    """
    relation = relation.to(torch.int64)  # a graph's may be in int32
    alone = shards is None or shards.alone
    # Where no gradient is wanted, waiting costs less than matrices of relations that are not there.
    wanted = alone and len(relation) and torch.is_grad_enabled()
    if wanted and _gpu.runs_on(relation.device) and grouped.loads():
        return _without_counts(relation, most)
    everything = relation
    if shards is not None:
        relation = relation[shards.part(len(relation))]
    distinct, place, counts = _by_size(relation)
    order = torch.argsort(place, stable=True)
    groups = RelationGroups(distinct, order, counts, runs=_runs(counts, relation.device))
    if shards is None or shards.alone:
        return groups
    rows = torch.arange(len(everything), device=relation.device)[shards.part(len(everything))]
    of_all, of_query, _ = _by_size(everything)
    share = Share(shards, rows, of_query[rows[order]], len(everything), len(of_all))
    first = pointer(torch.tensor(counts, dtype=torch.int64, device=relation.device))[:-1]
    return groups._replace(share=share._replace(relations=share.relations[first]))


#: Rooms are powers of two up to this, and multiples of it.
_ROOM = 64


def _room(count: int) -> int:
    """Room for so many queries of a relation.

    Of a few sizes: a CPU's products are compiled for each shape, and what is compiled is kept.
    """
    if count > _ROOM:
        return -(-count // _ROOM) * _ROOM
    return 1 << (count - 1).bit_length() if count else 0


def _by_size(relation: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Distinct relations by how many queries they have, the place of each query's, and how many."""
    distinct, place, counts = relation.unique(return_inverse=True, return_counts=True)
    sizes = counts.tolist()
    order = sorted(range(len(sizes)), key=lambda i: _room(sizes[i]))
    by_size = torch.tensor(order, dtype=torch.int64, device=relation.device)
    return distinct[by_size], torch.argsort(by_size)[place], [sizes[i] for i in order]


def _runs(counts: list[int], device: torch.device) -> list[Run]:
    """The groups of relations that have so many queries in runs of one room, of 2^n relations."""
    runs = []
    for room, same in itertools.groupby(counts, _room):
        left = list(same)
        while left:
            number = 1 << (len(left).bit_length() - 1)
            sizes, left = left[:number], left[number:]
            slot, queries = None, sum(sizes)
            if number * room > queries:
                slot = torch.tensor([i * room + j for i, n in enumerate(sizes) for j in range(n)])
                slot = slot.to(device)
            runs.append(Run(number, queries, room, slot))
    return runs


def _without_counts(relation: Tensor, most: int | None) -> RelationGroups:
    """`group_by_relation` in shapes that do not depend on what the relations are."""
    size = len(relation) if most is None else min(most, len(relation))
    order = torch.argsort(relation, stable=True)
    ascending = relation[order]
    is_new = torch.ones_like(ascending)
    is_new[1:] = ascending[1:] != ascending[:-1]
    place = is_new.cumsum(0) - 1
    distinct = torch.zeros(size, dtype=torch.int64, device=relation.device)
    counts = torch.zeros_like(distinct).scatter_add_(0, place, torch.ones_like(place))
    distinct.scatter_(0, place, ascending)
    return RelationGroups(distinct, order, None, offsets=pointer(counts))


class TuckerDecoder(nn.Module):
    r"""Tucker decomposition as a score function.

    .. math:: S(h, r, t) = \mathcal W \times_1 e_h \times_2 e_r \times_3 e_t

    A query :math:`\mathcal W \times_1 e_h \times_2 e_r` is one vector, whose products with the
    candidates are their scores. The relation matrix :math:`\mathcal W \times_2 e_r` is made once a
    distinct relation of the batch. Normalisation and dropout are those of
    `TuckER <https://arxiv.org/abs/1901.09590>`__: on the entity, on the relation matrix, on the
    query; the mask on the matrix is drawn once a distinct relation.

    Relations share the core, which spans as many matrices as :math:`e_r` is wide. ``rel_blocks``
    adds to each relation's a matrix of its own, of blocks of two by two that turn and stretch:

    .. math:: S(h, r, t) = \mathcal W \times_1 e_h \times_2 e_r \times_3 e_t
        + \operatorname{Re} \langle e_h, c_r, \overline{e_t} \rangle

    with the halves of :math:`e_h`, :math:`c_r`, :math:`e_t` as real and imaginary parts: the score
    of `ComplEx <https://arxiv.org/abs/1606.06357>`__, itself a Tucker decomposition whose core is
    given.

    Parameters
    ----------
    entity_feats, rel_feats : int
        Widths of entity and relation embeddings.
    input_dropout, relation_dropout, hidden_dropout : float, optional
        Dropout on the entity, the relation matrix and the query. Default: ``0``.
    batch_norm : bool, optional
        Whether to normalise the entity and the query over the batch. Default: ``True``.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.nn import TuckerDecoder
    >>> decoder = TuckerDecoder(entity_feats=6, rel_feats=4)
    >>> relations, entities = torch.rand(3, 4), torch.rand(10, 6)
    >>> query = decoder(entities[:5], relations, torch.tensor([0, 2, 2, 0, 1]))
    >>> (query @ entities.T).shape  # five queries, ten candidates
    torch.Size([5, 10])

    With a block-diagonal matrix for each relation:

    >>> blocks = torch.rand(3, 6)
    >>> decoder(entities[:5], relations, torch.tensor([0, 2, 2, 0, 1]), blocks).shape
    torch.Size([5, 6])
    """

    def __init__(
        self,
        entity_feats: int,
        rel_feats: int,
        input_dropout: float = 0.0,
        relation_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if entity_feats < 1:
            raise IMVIAError(
                f"TuckerDecoder: expected entity_feats of 1 or more; received {entity_feats}."
            )
        self.entity_feats = entity_feats
        self.rel_feats = rel_feats
        #: The core tensor, (rel_feats, entity_feats, entity_feats): relation, head, tail.
        self.core = nn.Parameter(torch.empty(rel_feats, entity_feats, entity_feats))
        self.input_dropout = Dropout(input_dropout)
        self.relation_dropout = Dropout(relation_dropout)
        self.hidden_dropout = Dropout(hidden_dropout)
        self.input_norm = nn.BatchNorm1d(entity_feats) if batch_norm else None
        self.hidden_norm = nn.BatchNorm1d(entity_feats) if batch_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a uniform core, scaled so that queries keep their size at any width."""
        bound = (3 / self.entity_feats) ** 0.5
        nn.init.uniform_(self.core, -bound, bound)
        for norm in (self.input_norm, self.hidden_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self,
        head: Tensor,
        rel_feat: Tensor,
        relation: Tensor | RelationGroups,
        rel_blocks: Tensor | None = None,
    ) -> Tensor:
        """Query vectors.

        Parameters
        ----------
        head : Tensor
            (B, entity_feats).
        rel_feat : Tensor
            (R, rel_feats), a row a relation.
        relation : Tensor or RelationGroups
            (B,) int64, the relation of each query; grouped already where several decoders are
            asked the same.
        rel_blocks : Tensor, optional
            (R, entity_feats), c of each relation. Default: ``None``, the core alone.

        Returns
        -------
        Tensor
            (B, entity_feats).

        Raises
        ------
        IMVIAError
            Another number of relations than of rows of ``head``, features of other widths than the
            decoder's, blocks of another number of relations than ``rel_feat``; on a CPU also
            relations beyond its rows.

        Notes
        -----
        On a GPU, except in float64, gradients are of first order; who asks for theirs gets an
        error.
        """
        refuse_tracing("TuckerDecoder")
        check_width("TuckerDecoder", "head", head, "B", self.entity_feats)
        check_width("TuckerDecoder", "rel_feat", rel_feat, "R", self.rel_feats)
        if rel_blocks is not None:
            check_width("TuckerDecoder", "rel_blocks", rel_blocks, len(rel_feat), self.entity_feats)
        groups = relation
        if not isinstance(groups, RelationGroups):
            picking.check_ids("TuckerDecoder", "relation", groups, len(rel_feat))
            groups = group_by_relation(groups, most=len(rel_feat))
        share = groups.share
        if share is None and len(head) != len(groups.order):
            raise IMVIAError(
                "TuckerDecoder: expected a relation for each row of head; received"
                f" {len(groups.order)} for {tuple(head.shape)}."
            )
        head = _normalise(self.input_norm, head, share)
        # A product of matrices, which autocast knows on every device; tensordot it does not on all.
        matrix = product(lookup(groups.distinct, rel_feat), self.core.flatten(1))
        matrix = matrix.unflatten(1, self.core.shape[1:])
        if share is None:
            head, matrix = self.input_dropout(head), self.relation_dropout(matrix)
        else:
            head = self.input_dropout(head, share.rows, share.num_rows)
            matrix = self.relation_dropout(matrix, share.relations, share.num_relations)
        # Sorted by relation, each relation's queries are one product with its matrix.
        head = head.index_select(0, groups.order)
        query = _products(head, matrix, groups)
        if rel_blocks is not None:
            of_each = _of_each(groups)
            query = query + complex_product(head, lookup(of_each, rel_blocks))
        query = torch.empty_like(query).index_copy(0, groups.order, query)
        query = _normalise(self.hidden_norm, query, share)
        if share is None:
            return self.hidden_dropout(query)
        return self.hidden_dropout(query, share.rows, share.num_rows)

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"entity_feats={self.entity_feats}, rel_feats={self.rel_feats}"


def _products(head: Tensor, matrix: Tensor, groups: RelationGroups) -> Tensor:
    """(B, d) of sorted queries, each with its relation's of (R, d, d) matrices."""
    runs = groups.runs
    if groups.offsets is not None:
        if grouped.usable(head, matrix):
            return grouped.product(head, matrix, groups.offsets)
        runs = _runs(groups.offsets.diff().tolist(), head.device)
    assert runs is not None
    if not runs:
        # All gradients are there, as DistributedDataParallel wants them.
        return head + 0 * matrix.sum()
    # Under autocast the matrices are in half precision: converted once, not for every product.
    head = head.to(matrix.dtype)
    parts = head.split([run.queries for run in runs])
    matrices = matrix.split([run.relations for run in runs])
    return torch.cat([_run_product(*one) for one in zip(parts, matrices, runs, strict=True)])


def _run_product(head: Tensor, matrix: Tensor, run: Run) -> Tensor:
    """`_products` of the queries of a run, in one batched product."""
    if not run.queries:
        return head
    if run.slot is None:
        return torch.bmm(head.unflatten(0, (run.relations, run.room)), matrix).flatten(0, 1)
    rooms = head.new_zeros(run.relations * run.room, head.shape[1]).index_copy(0, run.slot, head)
    query = torch.bmm(rooms.unflatten(0, (run.relations, run.room)), matrix)
    return query.flatten(0, 1).index_select(0, run.slot)


def _of_each(groups: RelationGroups) -> Tensor:
    """(B,) int64: the relation of each sorted query."""
    size = len(groups.order)
    if groups.counts is not None:
        counts = torch.tensor(groups.counts, dtype=torch.int64, device=groups.order.device)
        return groups.distinct.repeat_interleave(counts, output_size=size)
    assert groups.offsets is not None
    position = torch.arange(size, device=groups.order.device)
    place = torch.searchsorted(groups.offsets, position, right=True) - 1
    return groups.distinct[place]


def complex_product(left: Tensor, right: Tensor) -> Tensor:
    """Products, element by element, of numbers whose real parts are the first half of a row.

    Of an odd number of columns the last one is real.

    Parameters
    ----------
    left, right : Tensor
        (B, d), or (1, d) for the same numbers in each row.

    Returns
    -------
    Tensor
        (B, d).

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.nn.tucker_decoder import complex_product
    >>> complex_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))  # (1 + 2i) (3 + 4i)
    tensor([[-5., 10.]])
    """
    dtype = torch.promote_types(left.dtype, right.dtype)
    # Rows alone: a column is no number.
    rows = torch.broadcast_shapes(left.shape[:1], right.shape[:1])
    both = (numbers.to(dtype).expand(*rows, -1) for numbers in (left, right))
    out: Tensor = _ComplexProduct.apply(*both)
    return out


def conjugate(numbers: Tensor) -> Tensor:
    """The conjugates of (B, d) numbers as `complex_product` has them.

    >>> import torch
    >>> from imvia_graph.nn.tucker_decoder import conjugate
    >>> conjugate(torch.tensor([[1.0, 2.0]]))
    tensor([[ 1., -2.]])
    """
    half = numbers.shape[1] // 2
    real, imaginary, rest = numbers.split([half, half, numbers.shape[1] % 2], dim=1)
    return torch.cat([real, -imaginary, rest], dim=1)


class _ComplexProduct(torch.autograd.Function):
    """In a third of the passes over memory that products of halves take, and their gradients."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return _complex_product(left, right, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        if torch.is_grad_enabled():
            of_left = _ComplexProduct.apply(grad, conjugate(right))
            return of_left, _ComplexProduct.apply(grad, conjugate(left))
        return _complex_product(grad, right, -1), _complex_product(grad, left, -1)


def _complex_product(left: Tensor, right: Tensor, sign: int) -> Tensor:
    """Products of numbers with others, whose imaginary parts count with a sign."""
    half = left.shape[1] // 2
    sizes = [half, half, left.shape[1] % 2]
    out = torch.empty_like(left)
    (a, b, last), (c, d, times) = left.split(sizes, dim=1), right.split(sizes, dim=1)
    real, imaginary, rest = out.split(sizes, dim=1)
    torch.mul(a, c, out=real)
    real.addcmul_(b, d, value=-sign)
    torch.mul(b, c, out=imaginary)
    imaginary.addcmul_(a, d, value=sign)
    if sizes[2]:
        torch.mul(last, times, out=rest)
    return out


def _normalise(norm: nn.BatchNorm1d | None, feat: Tensor, share: Share | None = None) -> Tensor:
    """Batch normalisation; fewer than two rows have no variance and use the running statistics.

    With several processes it is over the rows of all.
    """
    if norm is None:
        return feat
    if share is not None:
        rows = share.shards.gather(feat, share.num_rows)
        return _normalise(norm, rows)[share.rows]
    if norm.training and len(feat) <= 1:
        return nn.functional.batch_norm(
            feat, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    out: Tensor = norm(feat)
    return out
