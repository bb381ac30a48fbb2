"""The gated view aggregation: Eq. 2 and 3 and their gradients, view by view.

Constants have the type of the arrays: an integer constant would turn float32 into float64, of which
a vector register holds half as many.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from imvia_graph._kernels.floats import compiled, inlined, narrowed, prefetch, widened

# Sums of squares within these bounds have neither over- nor underflowed.
_SMALL, _LARGE = 1e-12, 1e12


@inlined
def prefetch_row(address: Any, size: Any) -> None:
    """Prefetch a view into the cache, since the views of different entities are far apart."""
    for offset in range(0, size, 64):
        prefetch(address + offset)


@inlined
def unit_gate(gate: Any, scaled: Any) -> Any:
    """Divide a gate by its largest absolute value; return that value (1 for a gate of zeros)."""
    for j in range(gate.size):
        scaled[j] = widened(gate[j])
    largest = abs(scaled[0])
    for j in range(1, gate.size):
        largest = max(largest, abs(scaled[j]))
    if largest == 0:
        largest = scaled.dtype.type(1)
    for j in range(gate.size):
        scaled[j] = scaled[j] / largest
    return largest


@inlined
def three_sums(row: Any, gate: Any) -> Any:
    """Return the sums of g x^2, g^2 x^2 and x^2 for a view x."""
    a = b = c = gate.dtype.type(0)
    for j in range(row.size):
        square = row[j] * row[j]
        gated = gate[j] * square
        a += gated
        b += gate[j] * gated
        c += square
    return a, b, c


@compiled
def forward(
    start: int,
    stop: int,
    feat: Any,
    ptr: Any,
    entity: Any,
    gate: Any,
    weight_ptr: Any,
    out: Any,
    weight: Any,
    kept: Any,
) -> None:
    """Compute Eq. 2 and 3 for queries start to stop.

    For each view and query, `kept` holds the scale s applied to the view and, with a, b and c of
    `three_sums`, 1 / sqrt(b c), a / b and a / c; the last three are 0 where b c is 0.
    """
    width = gate.shape[1]
    unit = np.empty(width, out.dtype)
    row, scaled = np.empty(width, out.dtype), np.empty(width, out.dtype)
    zero, one, tiny = out.dtype.type(0), out.dtype.type(1), np.finfo(out.dtype).tiny
    data, stride, size = feat.ctypes.data, feat.strides[0], width * feat.itemsize
    for i in range(start, stop):
        sums = out[i]
        sums[:] = 0
        first, at = ptr[entity[i]], weight_ptr[i]
        count = weight_ptr[i + 1] - at
        if count == 0:
            continue
        unit_gate(gate[i], unit)
        total = shift = zero
        following = ptr[entity[i + 1]] if i + 1 < stop else first
        for k in range(count):
            prefetch_row(data + (following + k) * stride, size)
            for j in range(width):
                row[j] = widened(feat[first + k, j])
            scale = one
            a, b, c = three_sums(row, unit)
            if not (_SMALL < b < _LARGE and _SMALL < c < _LARGE):
                largest = abs(row[0])
                for j in range(width):
                    largest = max(largest, abs(row[j]))
                if largest != 0:
                    # The inverse of a subnormal number would be infinite.
                    scale = one / max(largest, tiny)
                for j in range(width):
                    scaled[j] = row[j] * scale
                a, b, c = three_sums(scaled, unit)
            kept[at + k, 0] = scale
            cosine = zero
            if b * c == 0:
                kept[at + k, 1:] = 0
            else:
                kept[at + k, 1] = one / np.sqrt(b * c)
                kept[at + k, 2] = a / b
                kept[at + k, 3] = a / c
                cosine = a / np.sqrt(b * c)
            # Relative to the first view, so that a single view is returned bit for bit.
            if k == 0:
                shift = cosine
            raw = np.exp(cosine - shift)
            weight[at + k] = raw
            total += raw
            for j in range(width):
                sums[j] += raw * row[j]
        shrink = one / total
        for j in range(width):
            sums[j] *= shrink
        for k in range(count):
            weight[at + k] *= shrink


@inlined
def similarity_gradient(grad_out: Any, out: Any, row: Any) -> Any:
    """Return the derivative of the loss by the weight of a view, less its mean over the views."""
    total = row.dtype.type(0)
    for j in range(row.size):
        total += grad_out[j] * (row[j] - out[j])
    return total


@compiled
def backward(
    start: int,
    stop: int,
    feat: Any,
    ptr: Any,
    entity: Any,
    gate: Any,
    weight_ptr: Any,
    out: Any,
    weight: Any,
    kept: Any,
    grad_out: Any,
    grad_weight: Any,
    order: Any,
    grad_gate: Any,
    grad_feat: Any,
) -> None:
    """Compute the gradients of queries order[start] to order[stop].

    The gradients of the views are skipped if ``grad_feat`` is empty. For cos = a / sqrt(b c) with
    x = s f: dcos/dg = x^2 (1 - g a / b) / sqrt(b c) and
    dcos/df = s x (2 g - g^2 a / b - a / c) / sqrt(b c).
    """
    width = gate.shape[1]
    unit = np.empty(width, out.dtype)
    row = np.empty(width, out.dtype)
    plain, gated = np.empty(width, out.dtype), np.empty(width, out.dtype)
    one, two = out.dtype.type(1), out.dtype.type(2)
    data, stride, size = feat.ctypes.data, feat.strides[0], width * feat.itemsize
    for place in range(start, stop):
        i = order[place]
        first, at = ptr[entity[i]], weight_ptr[i]
        count = weight_ptr[i + 1] - at
        mine = grad_gate[i]
        if count == 0:
            mine[:] = 0
            continue
        largest = unit_gate(gate[i], unit)
        above, result = grad_out[i], out[i]
        plain[:] = 0
        gated[:] = 0
        mean = out.dtype.type(0)
        for k in range(count):
            mean += weight[at + k] * grad_weight[at + k]
        following = ptr[entity[order[place + 1]]] if place + 1 < stop else first
        for k in range(count):
            prefetch_row(data + (following + k) * stride, size)
            for j in range(width):
                row[j] = widened(feat[first + k, j])
            slope = similarity_gradient(above, result, row)
            slope = weight[at + k] * (slope + grad_weight[at + k] - mean)
            scale, ab, ac = kept[at + k, 0], kept[at + k, 2], kept[at + k, 3]
            p = slope * kept[at + k, 1]
            q = p * ab
            # In a separate loop, since the compiler might square the scale, which may overflow.
            if scale != one:
                for j in range(width):
                    row[j] *= scale
            for j in range(width):
                square = row[j] * row[j]
                plain[j] += p * square
                gated[j] += q * square
            if grad_feat.shape[0]:
                share, slant = weight[at + k], p * scale
                for j in range(width):
                    x = row[j] * (unit[j] * (two - unit[j] * ab) - ac)
                    grad_feat[first + k, j] += share * above[j] + slant * x
        for j in range(width):
            mine[j] = narrowed((plain[j] - unit[j] * gated[j]) / largest, mine[j])
