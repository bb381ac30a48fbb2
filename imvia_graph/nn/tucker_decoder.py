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
    """Positions of one process's queries among the queries of all processes.

    Attributes
    ----------
    shards : Shards
    rows : Tensor
        (B,) int64 positions of the process's queries.
    relations : Tensor
        (R,) int64 positions of its distinct relations among those of all processes.
    num_rows, num_relations : int
        Numbers of queries and of distinct relations over all processes.
    """

    shards: Shards
    rows: Tensor
    relations: Tensor
    num_rows: int
    num_relations: int


class Run(NamedTuple):
    """Consecutive relations of `RelationGroups` whose queries are padded to one number.

    Attributes
    ----------
    relations, queries : int
        Number of relations and of queries.
    room : int
        Number of queries that each relation is padded to; at least that of its largest relation.
    slot : Tensor or None
        (queries,) int64 positions of the queries in the padded array; None if nothing is padded.
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
        (R,) int64 distinct relations, those with few queries first; with ``offsets``, in ascending
        order and padded with zeros.
    order : Tensor
        (B,) int64 positions of the queries of the first relation, then of the second, …
    counts : list of int or None
        Number of queries of each relation; None with ``offsets``.
    share : Share or None
        Positions among the queries of all processes; None for a single process.
    offsets : Tensor or None
        (R + 1,) int64 start of each relation's queries in ``order``. Used on a GPU, where reading
        the counts would wait for the device.
    runs : list of Run or None
        The runs that the relations are split into; None with ``offsets``.
    """

    distinct: Tensor
    order: Tensor
    counts: list[int] | None
    share: Share | None = None
    offsets: Tensor | None = None
    runs: list[Run] | None = None

    def of_each(self) -> Tensor:
        """Return the (B,) int64 relation of each query."""
        return torch.empty_like(self.order).index_copy(0, self.order, _of_each(self))


def group_by_relation(
    relation: Tensor, shards: Shards | None = None, most: int | None = None
) -> RelationGroups:
    """Group queries by their (B,) relations; with several processes, only this process's queries.

    At most ``most`` relations are distinct; ``None`` if no bound is known.
    """
    relation = relation.to(torch.int64)  # ids of a graph may be int32
    alone = shards is None or shards.alone
    # Without gradients, waiting for the counts costs less than the matrices of padding relations.
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


#: Relations are padded to powers of two up to this number of queries, then to multiples of it.
_PADDING = 64


def _padded_size(count: int) -> int:
    """Return the number that a relation with ``count`` queries is padded to.

    There are only a few such numbers, since CPU products are compiled and cached for each shape.
    """
    if count > _PADDING:
        return -(-count // _PADDING) * _PADDING
    return 1 << (count - 1).bit_length() if count else 0


def _by_size(relation: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Return the distinct relations by padded size, each query's position in them, and counts."""
    distinct, place, counts = relation.unique(return_inverse=True, return_counts=True)
    sizes = counts.tolist()
    order = sorted(range(len(sizes)), key=lambda i: _padded_size(sizes[i]))
    by_size = torch.tensor(order, dtype=torch.int64, device=relation.device)
    return distinct[by_size], torch.argsort(by_size)[place], [sizes[i] for i in order]


def _runs(counts: list[int], device: torch.device) -> list[Run]:
    """Split relations with these query counts into runs of one padded size and 2^n relations."""
    runs = []
    for room, same in itertools.groupby(counts, _padded_size):
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
    """Group by relation with tensor shapes that do not depend on the values of ``relation``."""
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

    The query vector :math:`\mathcal W \times_1 e_h \times_2 e_r` scores each candidate by an inner
    product. The relation matrix :math:`\mathcal W \times_2 e_r` is computed once per distinct
    relation of the batch. Batch normalisation and dropout follow
    `TuckER <https://arxiv.org/abs/1901.09590>`__: dropout applies to the entity, the relation
    matrix and the query, normalisation to the entity and the query. The dropout mask of a relation
    matrix is drawn once per distinct relation.

    All relation matrices are combinations of the ``rel_feats`` matrices of the core. ``rel_blocks``
    adds a separate matrix for each relation, made of 2 x 2 blocks that rotate and scale:

    .. math:: S(h, r, t) = \mathcal W \times_1 e_h \times_2 e_r \times_3 e_t
        + \operatorname{Re} \langle e_h, c_r, \overline{e_t} \rangle

    where the halves of :math:`e_h`, :math:`c_r`, :math:`e_t` are real and imaginary parts. The
    added term is the score of `ComplEx <https://arxiv.org/abs/1606.06357>`__, itself a Tucker
    decomposition with a fixed core.

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
        """Compute the query vectors.

        Parameters
        ----------
        head : Tensor
            (B, entity_feats) entity embeddings of the queries.
        rel_feat : Tensor
            (R, rel_feats), one row per relation.
        relation : Tensor or RelationGroups
            (B,) int64 relation of each query, or the result of `group_by_relation`, which several
            decoders can share.
        rel_blocks : Tensor, optional
            (R, entity_feats), :math:`c_r` of each relation. Default: ``None``, the core only.

        Returns
        -------
        Tensor
            (B, entity_feats) query vectors.

        Raises
        ------
        IMVIAError
            If ``relation`` and ``head`` differ in length, ``rel_feat`` and ``rel_blocks`` in their
            number of rows, or the features in width from the decoder. On a CPU also if a relation
            is out of range.

        Notes
        -----
        On a GPU only first-order gradients are supported, except in float64; second-order gradients
        raise an error.
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
        # A matrix product, which autocast supports on every device, unlike tensordot.
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
        """Return the arguments that ``print`` shows."""
        return f"entity_feats={self.entity_feats}, rel_feats={self.rel_feats}"


def _products(head: Tensor, matrix: Tensor, groups: RelationGroups) -> Tensor:
    """Return the (B, d) products of sorted queries with their relations' (R, d, d) matrices."""
    runs = groups.runs
    if groups.offsets is not None:
        if grouped.usable(head, matrix):
            return grouped.product(head, matrix, groups.offsets)
        runs = _runs(groups.offsets.diff().tolist(), head.device)
    if not runs:
        # DistributedDataParallel needs a gradient for every parameter.
        return head + 0 * matrix.sum()
    # Under autocast the matrices are in half precision: convert the queries once for all products.
    head = head.to(matrix.dtype)
    parts = head.split([run.queries for run in runs])
    matrices = matrix.split([run.relations for run in runs])
    return torch.cat([_run_product(*one) for one in zip(parts, matrices, runs, strict=True)])


def _run_product(head: Tensor, matrix: Tensor, run: Run) -> Tensor:
    """Return the products of the queries of one run, as one batched matrix product."""
    if not run.queries:
        return head
    if run.slot is None:
        return torch.bmm(head.unflatten(0, (run.relations, run.room)), matrix).flatten(0, 1)
    padded = head.new_zeros(run.relations * run.room, head.shape[1]).index_copy(0, run.slot, head)
    query = torch.bmm(padded.unflatten(0, (run.relations, run.room)), matrix)
    return query.flatten(0, 1).index_select(0, run.slot)


def _of_each(groups: RelationGroups) -> Tensor:
    """Return the (B,) int64 relation of each sorted query."""
    size = len(groups.order)
    if groups.offsets is None:
        counts = torch.tensor(groups.counts, dtype=torch.int64, device=groups.order.device)
        return groups.distinct.repeat_interleave(counts, output_size=size)
    position = torch.arange(size, device=groups.order.device)
    place = torch.searchsorted(groups.offsets, position, right=True) - 1
    return groups.distinct[place]


def complex_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply rows of complex numbers element by element.

    The first half of a row holds the real parts, the second half the imaginary parts. If the number
    of columns is odd, the last column is real.

    Parameters
    ----------
    left, right : Tensor
        (B, d), or (1, d) for the same numbers in every row.

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
    # Only rows are broadcast: a single column is not a complex number. torch.broadcast_shapes would
    # import sympy, which takes a second.
    rows = len(left) if len(right) == 1 else len(right)
    both = (numbers.to(dtype).expand(rows, -1) for numbers in (left, right))
    out: Tensor = _ComplexProduct.apply(*both)
    return out


def conjugate(numbers: Tensor) -> Tensor:
    """Return the conjugates of (B, d) complex numbers in the layout of `complex_product`.

    >>> import torch
    >>> from imvia_graph.nn.tucker_decoder import conjugate
    >>> conjugate(torch.tensor([[1.0, 2.0]]))
    tensor([[ 1., -2.]])
    """
    half = numbers.shape[1] // 2
    real, imaginary, rest = numbers.split([half, half, numbers.shape[1] % 2], dim=1)
    return torch.cat([real, -imaginary, rest], dim=1)


class _ComplexProduct(torch.autograd.Function):
    """Complex product with a third of the memory passes that products of the halves take."""

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
    """Multiply complex numbers; ``sign`` is applied to the imaginary parts of ``right``."""
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
    """Batch-normalise the rows, with several processes over the rows of all.

    Fewer than two rows have no variance and use the running statistics.
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
