"""Losses and ranks of several heads' scores and their weighted sum, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from imvia_graph._kernels import _compile
from imvia_graph._kernels.floats import as_bits, as_float, compiled, exp, inlined, narrowed, widened


@inlined
def largest(row: Any) -> Any:
    """Return the largest element, or NaN if there is one whose sign is not set."""
    # Compared as integers, whose maximum can be reordered: all bits of a negative float but the
    # sign are flipped, and flipped back at the end.
    top = np.int32(-0x80000000)
    for n in range(row.size):
        bits = np.int32(as_bits(row[n]))
        top = max(top, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return as_float(np.uint32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@inlined
def softmax_head(row: Any, positives: Any, weight: Any, smoothing: Any) -> Any:
    """Return `imvia_graph.losses.softmax_completion` of a row and overwrite it by its gradient."""
    size = np.float32(row.size)
    share = weight * (np.float32(1) - smoothing) / np.float32(max(positives.size, 1))
    uniform = weight * smoothing / size
    loss = np.float32(0)
    for n in positives:
        loss -= share * row[n]
    top = largest(row)
    total = everything = np.float32(0)
    for n in range(row.size):
        everything += row[n]
        row[n] = exp(row[n] - top)
        total += row[n]
    scale = weight / total
    for n in range(row.size):
        row[n] = row[n] * scale - uniform
    for n in positives:
        row[n] -= share
    return loss - uniform * everything + weight * (np.log(total) + top)


@inlined
def binary_head(row: Any, positives: Any, smoothing: Any, positive: Any, negative: Any) -> Any:
    """Return `imvia_graph.losses.binary_completion` of a row and overwrite it by its gradient.

    ``positive`` and ``negative`` are the weights of a positive and a negative term.
    """
    smooth = smoothing / np.float32(row.size)
    slope = smoothing - smooth
    loss = np.float32(0)
    kept = np.empty(positives.size, np.float32)
    for k in range(positives.size):
        kept[k] = row[positives[k]]
    # softplus(s) = max(s, 0) + log(1 + e) with e = exp(-|s|); one logarithm for 64 factors 1 + e.
    for start in range(0, row.size, 64):
        factor = np.float32(1)
        linear = np.float32(0)
        # Indexed from 0: the compiler does not vectorise reads at indices that may be negative.
        part = row[start : start + 64]
        for n in range(part.size):
            s = part[n]
            e = exp(-abs(s))
            factor *= np.float32(1) + e
            linear += max(s, np.float32(0)) - smooth * s
            sigmoid = (np.float32(1) if s >= 0 else e) / (np.float32(1) + e)
            part[n] = negative * (sigmoid - smooth)
        loss += negative * (linear + np.log(factor))
    for k in range(positives.size):
        s = kept[k]
        above, below = max(s, np.float32(0)), max(-s, np.float32(0))
        e = exp(-abs(s))
        rest = np.log(np.float32(1) + e)
        loss -= negative * (above + rest - smooth * s)
        loss += positive * (below + rest + slope * s)
        sigmoid = (np.float32(1) if s >= 0 else e) / (np.float32(1) + e)
        row[positives[k]] = positive * (sigmoid - np.float32(1) + slope)
    return loss


@compiled
def losses(
    start: int,
    stop: int,
    scores: Any,
    of_row: Any,
    weight: Any,
    ptr: Any,
    col: Any,
    terms: Any,
    loss: Any,
    grad_weight: Any,
) -> None:
    """Compute the losses of rows start to stop, and overwrite the scores by their gradients.

    Scores are (heads, rows, candidates). The loss of a row is summed over the heads and, unless
    ``weight`` (rows, heads) is empty, their weighted sum. The positives of row i are
    ``col[ptr[i]:ptr[i + 1]]``, and its weight in the softmax loss is ``of_row[i]``. ``terms`` are:
    1 for softmax or 0 for binary, the label smoothing, 1 if the weighted sum gives the heads no
    gradient, and the weights of a positive and a negative term in the binary loss.
    """
    heads, _, size = scores.shape
    smoothing = terms[1]
    decided = weight.shape[0] > 0
    value = np.empty(size, np.float32)
    decision = np.empty(size if decided else 0, np.float32)
    for i in range(start, stop):
        positives = col[ptr[i] : ptr[i + 1]]
        total = np.float32(0)
        if decided:
            decision[:] = 0
            for m in range(heads):
                head, w = scores[m, i], weight[i, m]
                for n in range(size):
                    decision[n] += w * widened(head[n])
            if terms[0] == 1:
                total += softmax_head(decision, positives, of_row[i], smoothing)
            else:
                total += binary_head(decision, positives, smoothing, terms[3], terms[4])
        for m in range(heads):
            head = scores[m, i]
            for n in range(size):
                value[n] = widened(head[n])
            if decided:
                along = np.float32(0)
                for n in range(size):
                    along += decision[n] * value[n]
                grad_weight[i, m] = along
            if terms[0] == 1:
                total += softmax_head(value, positives, of_row[i], smoothing)
            else:
                total += binary_head(value, positives, smoothing, terms[3], terms[4])
            if decided and terms[2] == 0:
                w = weight[i, m]
                for n in range(size):
                    value[n] += w * decision[n]
            for n in range(size):
                head[n] = narrowed(value[n], head[n])
        loss[i] = total
        # `exp` does not propagate NaN: where a loss is not finite, the gradient must not be either.
        if not np.isfinite(total):
            for m in range(heads):
                for n in range(size):
                    scores[m, i, n] = narrowed(np.float32(np.nan), scores[m, i, n])


#: Sums are not reordered: a score is the same at any position in a row.
_in_order = _compile.compiled()
_in_order_inlined = _compile.compiled(forceinline=True)


@_in_order_inlined
def decide(scores: Any, weight: Any, i: int, decision: Any) -> None:
    """Write the weighted sum over the heads of row i of (heads, rows, candidates) scores."""
    decision[:] = 0
    for m in range(scores.shape[0]):
        head, w = scores[m, i], weight[i, m]
        for n in range(decision.size):
            decision[n] += w * head[n]


@_in_order
def diagonals(start: int, stop: int, scores: Any, weight: Any, found: Any) -> None:
    """Write the scores of rows start to stop for the candidates at the same positions.

    ``found`` is (rows, heads + 1): the score of each head, and their weighted sum.
    """
    heads, _, size = scores.shape
    decision = np.empty(size, scores.dtype)
    for i in range(start, stop):
        decide(scores, weight, i, decision)
        for m in range(heads):
            found[i, m] = scores[m, i, i]
        found[i, heads] = decision[i]


@_in_order
def outranked(
    start: int,
    stop: int,
    scores: Any,
    weight: Any,
    truth: Any,
    wanted: Any,
    place: Any,
    left_out: Any,
    cursor: Any,
    end: Any,
    counts: Any,
) -> None:
    """Count in rows start to stop the candidates that are better than the truth, and the ties.

    NaN counts as better. The counts are added to ``counts`` (rows, heads + 1, 2), for each head
    that is ``wanted`` (heads + 1,) and, last, for their weighted sum.

    ``place`` holds the position of the first of the (heads, rows, candidates) scores among all
    candidates, and the range of columns to count. The candidates left out of row i are at the
    ascending positions ``left_out[cursor[i]:end[i]]``; the cursor advances past those in the range.
    """
    heads, _, size = scores.shape
    first, low, high = place
    decision = np.empty(size, scores.dtype)
    for i in range(start, stop):
        here = cursor[i]
        while here < end[i] and left_out[here] < first + low:
            here += 1
        behind = here
        while behind < end[i] and left_out[behind] < first + high:
            behind += 1
        cursor[i] = behind
        if wanted[heads] and heads > 1:
            decide(scores, weight, i, decision)
        for m in range(heads + 1):
            if not wanted[m]:
                continue
            if heads == 1 and m == 1 and wanted[0]:
                counts[i, 1] = counts[i, 0]
                continue
            # A single head is the decision.
            row = scores[min(m, heads - 1), i] if m < heads or heads == 1 else decision
            t = truth[i, m]
            better = tied = np.int32(0)
            for n in range(low, high):
                better += np.int32(not row[n] <= t)
                tied += np.int32(row[n] == t)
            for k in range(here, behind):
                value = row[left_out[k] - first]
                better -= np.int32(not value <= t)
                tied -= np.int32(value == t)
            counts[i, m, 0] += better
            counts[i, m, 1] += tied
