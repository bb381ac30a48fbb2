"""The completion loss of heads whose scores are inner products, along with its gradients.

`imvia_graph.losses.factored_completion` describes what is computed. For each block of queries the
scores are computed and replaced by their gradients in place; two more products give the gradients
of queries and candidates. No score matrix is kept or copied, and no target of its size is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from imvia_graph import _kernels
from imvia_graph._gpu import scores as _gpu_scores
from imvia_graph._gpu.products import wide_mm
from imvia_graph._gradients import first_order
from imvia_graph.answers import pointer
from imvia_graph.distributed import Shards

#: Bytes of scores held at a time, on a CPU and on a GPU, whose kernels are faster on large blocks.
SCORES_AT_A_TIME, SCORES_ON_GPU = 2**27, 2**30


class Terms(NamedTuple):
    """The kind of the loss, and over how many terms it averages."""

    loss: str
    label_smoothing: float
    #: Whether the decision has no gradient with respect to the heads.
    detached: bool
    #: Dtype of the products.
    dtype: torch.dtype
    num_queries: int
    num_candidates: int
    #: A scalar on the device where the host does not know the number.
    num_positives: int | Tensor
    #: Number of queries over whose terms the binary loss averages, of which ``num_queries`` may be
    #: a part.
    num_in_all: int
    #: Factor by which blocks of queries are smaller than memory for scores would allow.
    parts: int = 1
    #: With several processes, how the candidates are split.
    shards: Shards | None = None

    @property
    def exact(self) -> torch.dtype:
        """Dtype of sums."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def scale(self) -> float | Tensor:
        """Factor of losses and of gradients of scores, which float16 can then represent."""
        if self.loss == "softmax":
            return max(self.num_queries, 1)
        return (_at_least_one(self.num_positives) * self.num_negatives) ** 0.5

    @property
    def num_negatives(self) -> int | Tensor:
        """Number of terms that are not positive, at least 1."""
        return _at_least_one(self.num_in_all * self.num_candidates - self.num_positives)

    @property
    def of_a_term(self) -> tuple[float | Tensor, float | Tensor]:
        """Weights of the terms of positives and of negatives in the binary loss, times `scale`."""
        return self.scale / _at_least_one(self.num_positives), self.scale / self.num_negatives


def _at_least_one(number: int | Tensor) -> int | Tensor:
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)


def fits_at_once(
    rows: int, heads: int, num_candidates: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Return whether the kernels for a GPU compute the scores of so many queries in one block."""
    size = heads * _gpu_scores.room(num_candidates) * dtype.itemsize
    return _gpu_scores.room(rows) * size <= SCORES_ON_GPU and _gpu_scores.usable(device, dtype)


class FactoredCompletion(torch.autograd.Function):
    """Loss of M pairs of (B, d) queries and (N, d) candidates, and of their decision.

    ``row`` and ``col`` are the positives, sorted by row, and ``share`` is the share of each in its
    row. ``counts`` is None, or 0 for repetitions that only pad the positives and else 1.
    ``of_rows`` is None or (B,) weights of the queries, of mean 1; ``weights`` is None or (B, M)
    weights of the decision. With several processes, candidates, positives and gradients are those
    of this process, and the loss is the sum over all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        row: Tensor,
        col: Tensor,
        share: Tensor,
        counts: Tensor | None,
        of_rows: Tensor | None,
        weights: Tensor | None,
        terms: Terms,
        *inputs: Tensor,
    ) -> Tensor:
        heads = len(inputs) // 2
        with torch.autocast(row.device.type, enabled=False):
            queries = [part.detach() for part in inputs[:heads]]
            candidates = [part.detach() for part in inputs[heads:]]
            work = _Work(queries, candidates, of_rows, weights, terms)
            if counts is not None and not work.on_gpu:
                # Only a GPU needs padded positives.
                once = counts > 0
                row, col, share, counts = row[once], col[once], share[once], None
            for start, stop in work.blocks():
                work.do(start, stop, row, col, share, counts)
            if terms.shards is not None:
                terms.shards.sum_(work.loss)
        ctx.save_for_backward(work.grad_weights, *work.grad_queries, *work.grad_candidates)
        ctx.dtypes = [part.dtype for part in inputs]
        ctx.scale = terms.scale
        return work.loss / terms.scale

    @staticmethod
    @first_order("factored_completion", "Use losses.completion on the scores.")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_out / ctx.scale
        grad_weights, *gradients = _times(ctx.saved_tensors, factor)
        typed = (part.to(dtype) for part, dtype in zip(gradients, ctx.dtypes, strict=True))
        has_weights = ctx.needs_input_grad[5]
        return None, None, None, None, None, grad_weights if has_weights else None, None, *typed


def _on_device(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Return numbers and scalar tensors as one float32 tensor on a device."""
    parts = [
        number.float() if isinstance(number, Tensor) else torch.full((), number, device=device)
        for number in numbers
    ]
    return torch.stack(parts)


def _with_room(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix padded with rows of zeros, with which products on a GPU are faster."""
    size = len(part)
    if size == _gpu_scores.room(size):
        return part.to(dtype)
    out = part.new_empty(_gpu_scores.room(size), part.shape[1], dtype=dtype)
    out[:size] = part
    out[size:] = 0
    return out


def _times(parts: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """Multiply each tensor with a scalar on their device."""
    if factor.is_cuda and all(part.dtype == factor.dtype for part in parts):
        return torch._foreach_mul(list(parts), factor)  # few kernels
    return [part * factor.reshape(1) for part in parts]


class _Work:
    """Loss and gradients, summed over blocks of queries."""

    def __init__(
        self,
        queries: list[Tensor],
        candidates: list[Tensor],
        of_rows: Tensor | None,
        weights: Tensor | None,
        terms: Terms,
    ) -> None:
        self.terms = terms
        first = queries[0]
        ones = first.new_ones(len(first), dtype=terms.exact)
        self.of_rows = ones if of_rows is None else of_rows.detach()
        none = first.new_empty(0, len(queries), dtype=terms.exact)
        # Contiguous, as the kernels for a GPU read them.
        self.weights = none if weights is None else weights.detach().to(terms.exact).contiguous()
        self.loss = first.new_zeros((), dtype=terms.exact)
        self.grad_weights = torch.empty_like(self.weights)
        self.grad_candidates: list[Tensor] = []
        if not len(first):
            self.grad_candidates = [
                torch.zeros_like(part, dtype=terms.dtype) for part in candidates
            ]
        self.fused = (
            first.device.type == "cpu"
            and terms.dtype in (torch.float32, torch.bfloat16)
            and terms.shards is None
            and _kernels.load("scores") is not None
        )
        self.on_gpu = (
            not self.fused
            and terms.shards is None
            and _gpu_scores.usable(first.device, terms.dtype)
        )
        self.queries, self.candidates = (
            [
                _with_room(part, terms.dtype) if self.on_gpu else part.to(terms.dtype)
                for part in parts
            ]
            for parts in (queries, candidates)
        )
        self.size = len(candidates[0])
        kept = terms.exact if self.on_gpu else terms.dtype
        self.grad_queries = [torch.empty_like(part, dtype=kept) for part in queries]

    def blocks(self) -> list[tuple[int, int]]:
        """Return ranges of queries as large as the memory for scores allows."""
        # All processes need the same ranges, hence the largest number of candidates of any.
        shards = self.terms.shards
        size = len(self.candidates[0]) if shards is None else shards.bounds[1]
        a_row = len(self.queries) * size * self.queries[0].element_size()
        if not (self.fused or self.on_gpu):
            a_row += 4 * size * self.terms.exact.itemsize  # temporaries of `_gradients`
        held = SCORES_ON_GPU if self.on_gpu else SCORES_AT_A_TIME
        most = min(held // max(a_row, 1), self.terms.num_queries)
        rows = max(1, -(-most // self.terms.parts))
        if self.on_gpu and rows < self.terms.num_queries:
            rows = _gpu_scores.whole(rows) or rows
        starts = range(0, self.terms.num_queries, rows)
        return [(start, min(start + rows, self.terms.num_queries)) for start in starts]

    def do(
        self,
        start: int,
        stop: int,
        row: Tensor,
        col: Tensor,
        share: Tensor,
        counts: Tensor | None,
    ) -> None:
        """Add the loss and compute the gradients of the queries from start to stop."""
        if stop - start < self.terms.num_queries:
            mine = (row >= start) & (row < stop)
            row, col, share = row[mine] - start, col[mine], share[mine]
            counts = None if counts is None else counts[mine]
        # The last block includes the padding, unless it is very small.
        last = stop == self.terms.num_queries and _gpu_scores.whole(stop - start)
        end = len(self.queries[0]) if last else stop
        queries = [part[start:end] for part in self.queries]
        scores = queries[0].new_empty(len(queries), end - start, len(self.candidates[0]))
        for query, candidate, score in zip(queries, self.candidates, scores, strict=True):
            torch.mm(query, candidate.T, out=score)
        weights, grad_weights = (
            part[start:stop] if len(part) else part for part in (self.weights, self.grad_weights)
        )
        of_rows = self.of_rows[start:stop]
        if self.fused:
            loss = _compiled_gradients(scores, row, col, of_rows, weights, grad_weights, self.terms)
        elif self.on_gpu:
            terms = self.terms
            softmax = terms.loss == "softmax"
            loss = _gpu_scores.gradients(
                scores,
                size=self.size,
                row=row,
                col=col,
                share=share,
                counts=counts,
                of_rows=of_rows,
                weights=weights,
                grad_weights=grad_weights,
                softmax=softmax,
                label_smoothing=terms.label_smoothing,
                detached=terms.detached,
                numbers=None if softmax else _on_device(terms.of_a_term, scores.device),
            )
        else:
            loss = _gradients(scores, row, col, share, of_rows, weights, grad_weights, self.terms)
        self.loss += loss
        first = not self.grad_candidates
        for m, (query, candidate, grad) in enumerate(
            zip(queries, self.candidates, scores, strict=True)
        ):
            if self.on_gpu:
                self.grad_queries[m][start:stop] = wide_mm(grad, candidate)[: stop - start]
                total = wide_mm(grad.T, query)[: self.size]
            else:
                torch.mm(grad, candidate, out=self.grad_queries[m][start:stop])
                total = grad.T @ query
            if first:
                self.grad_candidates.append(total)
            else:
                # Sums over blocks need more digits than the products have.
                before = self.grad_candidates[m].to(self.terms.exact)
                self.grad_candidates[m] = before.add_(total)


def _compiled_gradients(
    scores: Tensor,
    row: Tensor,
    col: Tensor,
    of_rows: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    terms: Terms,
) -> Tensor:
    """Compute `_gradients` in compiled loops over the rows."""
    rows = scores.shape[1]
    ptr = pointer(torch.bincount(row, minlength=rows))
    loss = scores.new_empty(rows, dtype=torch.float32)
    softmax = terms.loss == "softmax"
    numbers = torch.tensor(
        [softmax, terms.label_smoothing, terms.detached, *terms.of_a_term], dtype=torch.float32
    )
    given = (scores, of_rows, weights, ptr, col, numbers, loss)
    kernel = _kernels.load("scores").losses
    _kernels.share_out(kernel, _kernels.even_cuts(rows), (*given, grad_weights))
    return loss.sum()


def _gradients(
    scores: Tensor,
    row: Tensor,
    col: Tensor,
    share: Tensor,
    of_rows: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    terms: Terms,
) -> Tensor:
    """Replace (M, B, N) scores by their gradients and return the loss, both times ``terms.scale``.

    ``of_rows`` are (B,) weights of the queries in the softmax loss. ``weights`` and
    ``grad_weights`` are (B, M), or (0, M) without a decision.
    """

    def one_head(values: Tensor) -> Tensor:
        if terms.loss == "softmax":
            return _softmax(values, row, col, share, of_rows, terms)
        return _binary(values, row, col, terms)

    total = scores.new_zeros((), dtype=terms.exact)
    decided = len(weights) > 0
    if decided:
        decision = torch.zeros_like(scores[0], dtype=terms.exact)
        for m, score in enumerate(scores):
            decision.addcmul_(score.to(terms.exact), weights[:, m, None])
        total += one_head(decision)  # which replaces the decision by its gradient
    for m, score in enumerate(scores):
        values = score.to(terms.exact, copy=True)
        if decided:
            torch.linalg.vecdot(decision, values, out=grad_weights[:, m])
        total += one_head(values)
        if decided and not terms.detached:
            values.addcmul_(decision, weights[:, m, None])
        score.copy_(values)
    return total


def _softmax(
    scores: Tensor, row: Tensor, col: Tensor, share: Tensor, of_rows: Tensor, terms: Terms
) -> Tensor:
    """Return a scaled `imvia_graph.losses.softmax_completion`; replace scores by its gradient."""
    smoothing = terms.label_smoothing
    share = (1 - smoothing) * share * of_rows[row]
    uniform = smoothing / terms.num_candidates
    if terms.shards is None:
        log_sum, counted = scores.logsumexp(dim=1), 1.0
    else:  # the sum is that of all processes, each of which adds its share to the loss
        log_sum, counted = terms.shards.logsumexp(scores), 1 / terms.shards.size
    loss = of_rows @ (counted * log_sum - uniform * scores.sum(dim=1)) - share @ scores[row, col]
    scores.sub_(log_sum[:, None]).exp_().sub_(uniform).mul_(of_rows[:, None])
    scores.index_put_((row, col), -share, accumulate=True)
    return loss


def _binary(scores: Tensor, row: Tensor, col: Tensor, terms: Terms) -> Tensor:
    """Return a scaled `imvia_graph.losses.binary_completion`; replace scores by its gradient."""
    smooth = terms.label_smoothing / terms.num_candidates
    of_positive, of_negative = terms.of_a_term
    positive = scores[row, col]
    everything = functional.softplus(scores).sum() - smooth * scores.sum()
    as_negatives = (functional.softplus(positive) - smooth * positive).sum()
    slope = terms.label_smoothing - smooth
    as_positives = (functional.softplus(-positive) + slope * positive).sum()
    loss = of_negative * (everything - as_negatives) + of_positive * as_positives
    scores.sigmoid_().sub_(smooth).mul_(of_negative)
    scores.index_put_((row, col), of_positive * (positive.sigmoid() - 1 + slope))
    return loss
