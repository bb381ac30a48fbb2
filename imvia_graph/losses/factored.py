"""L3 of scores that are inner products, without storing all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from imvia_graph._factored import FactoredCompletion, Terms
from imvia_graph.distributed import Shards
from imvia_graph.errors import IMVIAError
from imvia_graph.losses.scored import Positives, check_loss, check_weights, outside


def factored_completion(
    queries: Sequence[Tensor],
    candidates: Sequence[Tensor],
    positives: Positives,
    weights: Tensor | None = None,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    detached: bool = False,
    parts: int = 1,
    shards: Shards | None = None,
    among: tuple[int, int] | None = None,
) -> Tensor:
    r"""Compute L3 for heads whose scores are inner products, and for their decision.

    The value and the gradients equal those of `completion` for the scores
    :math:`S_m = Q_m C_m^\top` and :math:`\sum_m w_m S_m`, at a fraction of its time and memory: the
    gradients are computed together with the loss and overwrite the scores.

    Parameters
    ----------
    queries, candidates : sequence of Tensor
        (B, d) query vectors and (N, d) candidates of each of the M heads.
    positives : Positives
    weights : Tensor, optional
        (B, M) weights of the heads in the decision. Default: no decision.
    loss : {"softmax", "binary"}, optional
        Default: ``"softmax"``.
    label_smoothing : float, optional
        Default: ``0``.
    detached : bool, optional
        Whether the decision gives the heads no gradient. Default: ``False``.
    parts : int, optional
        Divisor of the number of queries whose scores are held at a time. Default: ``1``.
    shards : Shards, optional
        With several processes: ``candidates`` are those of this process, and ``positives.col``
        indexes the candidates of all. The loss is that of all processes; the gradients are this
        process's terms of sums over the processes. Default: a single process.
    among : tuple of int, optional
        Numbers of positives and of queries in a larger batch that these queries belong to: the
        binary loss is then their part of the means over that batch. Default: these queries are the
        whole batch.

    Returns
    -------
    Tensor
        A scalar. Under autocast, products are computed in its dtype.

    Raises
    ------
    SettingsError
        If the loss is unknown, or if rows are weighted and the loss is a mean over terms.
    IMVIAError
        If shapes do not match. On a CPU also if positives are out of range; on a GPU this is not
        checked, since the check would wait for the device. Also if second-order gradients are asked
        for, which `completion` supports.

    Examples
    --------
    >>> import torch
    >>> from imvia_graph.losses import Positives, factored_completion
    >>> queries, candidates = [torch.zeros(2, 8)], [torch.rand(4, 8)]
    >>> positives = Positives(row=torch.tensor([0, 1]), col=torch.tensor([3, 0]))
    >>> factored_completion(queries, candidates, positives)  # log 4
    tensor(1.3863)
    """
    check_loss(loss)
    check_weights(loss, positives)
    if shards is not None and shards.alone:
        shards = None
    _check_factored(queries, candidates, positives, weights, shards)
    tensors = [*queries, *candidates]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    row, col, _, counts = positives
    num_positives: int | Tensor = len(row)
    if counts is None:
        order = torch.argsort(row, stable=True)
        row, col = row[order], col[order]
    else:
        num_positives = counts.sum()
    num_queries, num_candidates = len(queries[0]), len(candidates[0])
    in_all = num_queries
    if among is not None:
        num_positives, in_all = among
    exact = torch.promote_types(dtype, torch.float32)
    # Not by bincount, which waits for a GPU.
    ones = torch.ones_like(row, dtype=exact) if counts is None else counts.to(exact)
    of_each = torch.zeros(num_queries, dtype=exact, device=row.device).index_add_(0, row, ones)
    share = of_each.reciprocal()[row]
    if shards is not None:
        num_candidates = shards.num_entities
        mine = shards.owned(col)
        row, col, share = row[mine], col[mine] - shards.start, share[mine]
        counts = None if counts is None else counts[mine]
    terms = Terms(
        loss=loss,
        label_smoothing=label_smoothing,
        detached=detached,
        dtype=dtype,
        num_queries=num_queries,
        num_candidates=num_candidates,
        num_positives=num_positives,
        num_in_all=in_all,
        parts=parts,
        shards=shards,
    )
    # Relative to the mean weight: the mean over the rows is then the weighted mean.
    of_rows = positives.weight
    if of_rows is not None:
        of_rows = of_rows.to(terms.exact) / of_rows.to(terms.exact).mean()
    total: Tensor = FactoredCompletion.apply(
        row, col, share, counts, of_rows, weights, terms, *tensors
    )
    return total


def _check_factored(
    queries: Sequence[Tensor],
    candidates: Sequence[Tensor],
    positives: Positives,
    weights: Tensor | None,
    shards: Shards | None,
) -> None:
    """Raise if shapes or ids do not match: compiled loops would read and write out of bounds."""

    def refuse(expected: str, received: str) -> IMVIAError:
        return IMVIAError(f"factored_completion: expected {expected}; received {received}.")

    shapes = [[tuple(part.shape) for part in parts] for parts in (queries, candidates)]
    if not len(queries) == len(candidates) > 0:
        number = f"{len(queries)} and {len(candidates)} of them"
        raise refuse("as many queries as candidates, one pair per head", number)
    fits = all(len(shape) == 2 for shape in (*shapes[0], *shapes[1])) and all(
        query == (shapes[0][0][0], candidate[1]) and candidate[0] == shapes[1][0][0]
        for query, candidate in zip(*shapes, strict=True)
    )
    if not fits:
        raise refuse(
            "queries (B, d) and candidates (N, d), with one d per head",
            f"{shapes[0][:4]} and {shapes[1][:4]}",
        )
    num_queries, num_candidates = len(queries[0]), len(candidates[0])
    if weights is not None and weights.shape != (num_queries, len(queries)):
        raise refuse(f"weights {(num_queries, len(queries))}", str(tuple(weights.shape)))
    row, col, of_rows, counts = positives
    if of_rows is not None and of_rows.shape != (num_queries,):
        raise refuse(f"a weight for each of {num_queries} rows", str(tuple(of_rows.shape)))
    lengths = {tuple(part.shape) for part in (row, col, counts) if part is not None}
    if row.dim() != 1 or len(lengths) > 1:
        raise refuse("positives of one length (P,)", f"{tuple(row.shape)}, {tuple(col.shape)}")
    num_all = num_candidates if shards is None else shards.num_entities
    for what, found, size in outside(positives, num_queries, num_all):
        raise refuse(f"{what} of positives from 0 to {size - 1}", str(found))
