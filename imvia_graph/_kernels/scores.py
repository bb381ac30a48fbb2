"""Softmax cross-entropy of several heads' scores and their decision; its gradient, in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from imvia_graph._kernels.floats import as_bits, as_float, compiled, exp, narrowed, widened


@compiled
def largest(row: Any) -> Any:
    """The largest element; NaN (unless its sign is set) where there is one."""
    # As integers, whose maximum needs no order of comparisons: of a negative float all bits but
    # the sign are turned, and back at the end.
    top = np.int32(-0x80000000)
    for n in range(row.size):
        bits = np.int32(as_bits(row[n]))
        top = max(top, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return as_float(np.uint32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@compiled
def exponentials(row: Any) -> Any:
    """Turn s_n into exp(s_n - max s), in place; returns their sum and the maximum."""
    top = largest(row)
    total = np.float32(0)
    for n in range(row.size):
        row[n] = exp(row[n] - top)
        total += row[n]
    return total, top


@compiled
def softmax_cross_entropy(
    start: int,
    stop: int,
    scores: Any,
    weight: Any,
    ptr: Any,
    col: Any,
    smoothing: Any,
    detached: Any,
    loss: Any,
    grad_weight: Any,
) -> None:
    """Rows start to stop: (heads, rows, candidates) scores become the gradient of their loss.

    The loss of a row is that of `imvia_graph.losses.softmax_completion`, summed over the heads and,
    unless ``weight`` (rows, heads) is empty, their weighted sum. Positives of row i are
    ``col[ptr[i]:ptr[i + 1]]``.
    """
    heads, _, size = scores.shape
    decided = weight.shape[0] > 0
    through = decided and not detached[0]
    uniform = smoothing[0] / np.float32(size)
    values = np.empty((heads, size), np.float32)
    decision = np.empty(size if decided else 0, np.float32)
    for i in range(start, stop):
        positives = col[ptr[i] : ptr[i + 1]]
        share = (np.float32(1) - smoothing[0]) / np.float32(positives.size)
        row_loss = np.float32(0)
        decision[:] = 0
        for m in range(heads):
            head, value = scores[m, i], values[m]
            total = np.float32(0)
            for n in range(size):
                value[n] = widened(head[n])
                total += value[n]
            at = np.float32(0)
            for n in positives:
                at += value[n]
            # Of the head itself, and of its part in the decision.
            linear = share * at + uniform * total
            row_loss -= linear
            if decided:
                w = weight[i, m]
                row_loss -= w * linear
                grad_weight[i, m] = -linear
                for n in range(size):
                    decision[n] += w * value[n]
        decision_scale = np.float32(0)
        if decided:
            total, top = exponentials(decision)
            row_loss += np.log(total) + top
            decision_scale = np.float32(1) / total
            for m in range(heads):
                value = values[m]
                expected = np.float32(0)
                for n in range(size):
                    expected += decision[n] * value[n]
                grad_weight[i, m] += expected * decision_scale
        for m in range(heads):
            head, value = scores[m, i], values[m]
            total, top = exponentials(value)
            row_loss += np.log(total) + top
            scale = np.float32(1) / total
            w = weight[i, m] if through else np.float32(0)
            fixed = uniform * (np.float32(1) + w)
            if through:
                mixed = w * decision_scale
                for n in range(size):
                    value[n] = value[n] * scale + decision[n] * mixed - fixed
            else:
                for n in range(size):
                    value[n] = value[n] * scale - fixed
            for n in positives:
                value[n] -= share * (np.float32(1) + w)
            for n in range(size):
                head[n] = narrowed(value[n], head[n])
        loss[i] = row_loss
        if not np.isfinite(row_loss):
            for m in range(heads):
                for n in range(size):
                    scores[m, i, n] = narrowed(np.float32(np.nan), scores[m, i, n])
