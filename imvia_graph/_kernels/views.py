"""The gated view aggregation: Eq. 2 and 3 and their gradients, a view at a time.

Constants are made in the type of the arrays: with an integer, float32 becomes float64, and a vector
register holds half as many of those. Rows are taken as such before they are looped over: of an
index into two dimensions, either of which may be negative as far as the compiler knows, no vector
is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from imvia_graph._kernels.floats import (
    as_floats,
    compiled,
    inlined,
    largest_magnitude,
    narrowed,
    prefetch,
    sigmoid,
    widened,
)

# Squares of a view within these bounds, and sums of them, neither over- nor underflow; nor do they
# where they are multiplied by the square of a gate within the others.
_SMALL, _LARGE = 1e-12, 1e12
_SMALL_GATE, _LARGE_GATE = 1e-3, 1e3


@inlined
def ahead(order: Any, place: int, stop: int, ptr: Any, entity: Any) -> Any:
    """The first view of a query to come, and how many there are; none behind the last query."""
    if place >= stop:
        return np.int64(0), np.int64(0)
    of = entity[order[place]]
    return ptr[of], ptr[of + 1] - ptr[of]


@inlined
def ask_for(address: Any, stride: Any, size: Any, first: int, count: int, k: int, of: int) -> None:
    """Have the k-th of so many parts of an entity's views on their way into the cache.

    Entities lie apart in memory; of one with many views the processor sees itself that they follow
    each other.
    """
    count = min(count, 16)
    for view in range(count * k // of, count * (k + 1) // of):
        at = address + (first + view) * stride
        for offset in range(0, size, 64):
            prefetch(at + offset)


@inlined
def unit_gate(gate: Any, added: Any, logits: bool, unit: Any) -> Any:
    """A gate in `unit`, divided by the number that is returned, so that none of it is far from 1.

    With ``logits``, of the sigmoid of the sum of two halves.
    """
    one = unit.dtype.type(1)
    if logits:
        for j in range(unit.size):
            unit[j] = sigmoid(widened(gate[j]) + widened(added[j]))
    else:
        for j in range(unit.size):
            unit[j] = widened(gate[j])
    largest = largest_magnitude(unit)
    if largest == 0 or _SMALL_GATE < largest < _LARGE_GATE:
        return one
    for j in range(unit.size):
        unit[j] = unit[j] / largest
    return largest


@inlined
def three_sums(row: Any, gate: Any) -> Any:
    """Sum g x^2, sum g^2 x^2 and sum x^2 of a view x."""
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
    added: Any,
    row_of: Any,
    order: Any,
    weight_ptr: Any,
    weight: Any,
    kept: Any,
    absent: Any,
    out: Any,
) -> None:
    """Eq. 2 and 3 of queries order[start] to order[stop].

    The gates are those that are given or, with ``row_of``, the sigmoid of what is given and the row
    of ``added`` that it names. An entity without views gets ``absent``.

    Of each view and query, `kept` holds the scale s that was put on the view, and with a, b and c
    of `three_sums`: 1 / sqrt(b c), a / b and a / c; zeros where b c is 0.
    """
    width = gate.shape[1]
    logits = row_of.size > 0
    unit = np.empty(width, out.dtype)
    buffer, scaled = np.empty(width, out.dtype), np.empty(width, out.dtype)
    zero, one, tiny = out.dtype.type(0), out.dtype.type(1), np.finfo(out.dtype).tiny
    data, stride, size = feat.ctypes.data, feat.strides[0], width * feat.itemsize
    for place in range(start, stop):
        i = order[place]
        sums = out[i]
        first, at = ptr[entity[i]], weight_ptr[i]
        count = weight_ptr[i + 1] - at
        if count == 0:
            for j in range(width):
                sums[j] = absent[j]
            continue
        sums[:] = 0
        unit_gate(gate[i], added[row_of[i] if logits else 0], logits, unit)
        total = shift = zero
        following, left = ahead(order, place + 1, stop, ptr, entity)
        for k in range(count):
            ask_for(data, stride, size, following, left, k, count)
            row = as_floats(feat[first + k], buffer)
            scale = one
            a, b, c = three_sums(row, unit)
            if not (_SMALL < b < _LARGE and _SMALL < c < _LARGE):
                largest = largest_magnitude(row)
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
            # Relative to the first view: a single one is returned to the bit.
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
def difference(above: Any, row: Any, base: Any) -> Any:
    """By how much more the loss changes with the weight of a view than with that of another."""
    total = above.dtype.type(0)
    for j in range(row.size):
        total += above[j] * (row[j] - base[j])
    return total


@compiled
def backward(
    start: int,
    stop: int,
    feat: Any,
    ptr: Any,
    entity: Any,
    gate: Any,
    added: Any,
    row_of: Any,
    order: Any,
    weight_ptr: Any,
    weight: Any,
    kept: Any,
    grad_out: Any,
    grad_weight: Any,
    grad_gate: Any,
    grad_feat: Any,
) -> None:
    """Gradients of queries order[start] to order[stop]; of the views unless grad_feat is empty.

    With cos = a / sqrt(b c) of x = s f: dcos/dg = x^2 (1 - g a / b) / sqrt(b c) and
    dcos/df = s x (2 g - g^2 a / b - a / c) / sqrt(b c).
    """
    width = gate.shape[1]
    logits = row_of.size > 0
    unit = np.empty(width, weight.dtype)
    buffer, scaled = np.empty(width, weight.dtype), np.empty(width, weight.dtype)
    slope, base = np.empty(width, weight.dtype), np.empty(width, weight.dtype)
    one, two = weight.dtype.type(1), weight.dtype.type(2)
    data, stride, size = feat.ctypes.data, feat.strides[0], width * feat.itemsize
    most = 0
    for place in range(start, stop):
        most = max(most, weight_ptr[order[place] + 1] - weight_ptr[order[place]])
    slopes = np.empty(most, weight.dtype)
    for place in range(start, stop):
        i = order[place]
        first, at = ptr[entity[i]], weight_ptr[i]
        count = weight_ptr[i + 1] - at
        mine = grad_gate[i]
        if count == 0:
            mine[:] = 0
            continue
        largest = unit_gate(gate[i], added[row_of[i] if logits else 0], logits, unit)
        above = grad_out[i]
        following, left = ahead(order, place + 1, stop, ptr, entity)
        # Relative to the first view: of a single one, and of equal ones, they are zeros.
        origin = as_floats(feat[first], base)
        # What the mean is off by, all views are: it is of twice the precision.
        mean = total = 0.0
        for k in range(count):
            slopes[k] = grad_weight[at + k]
            slopes[k] += difference(above, as_floats(feat[first + k], buffer), origin)
            total += weight[at + k]
            mean += np.float64(weight[at + k]) * slopes[k]
        mean /= total
        slope[:] = 0
        for k in range(count):
            # Not before: what is read for the second time is to be in the cache still.
            ask_for(data, stride, size, following, left, k, count)
            row = as_floats(feat[first + k], buffer)
            scale, ab, ac = kept[at + k, 0], kept[at + k, 2], kept[at + k, 3]
            p = weight[at + k] * weight.dtype.type(slopes[k] - mean) * kept[at + k, 1]
            q = p * ab
            # In a loop of its own, or the compiler might square the scale, which may overflow.
            if scale != one:
                for j in range(width):
                    scaled[j] = row[j] * scale
                row = scaled
            for j in range(width):
                slope[j] += (p - unit[j] * q) * (row[j] * row[j])
            if grad_feat.shape[0]:
                share, slant, into = weight[at + k], p * scale, grad_feat[first + k]
                for j in range(width):
                    x = row[j] * (unit[j] * (two - unit[j] * ab) - ac)
                    into[j] += share * above[j] + slant * x
        if logits:
            for j in range(width):
                mine[j] = narrowed(slope[j] * unit[j] * (one - unit[j] * largest), mine[j])
        else:
            for j in range(width):
                mine[j] = narrowed(slope[j] / largest, mine[j])
