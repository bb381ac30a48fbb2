"""Dropout whose mask is never kept: it is a function of a seed and of an element's place."""

from __future__ import annotations

from typing import Any

import numpy as np

from imvia_graph._kernels.floats import compiled, narrowed, widened


@compiled
def dropout(start: int, stop: int, source: Any, numbers: Any, scale: Any, out: Any) -> None:
    """Elements start to stop times ``scale``, or 0 with a probability of numbers[1] / 2^32.

    ``numbers`` are a seed and that. The mask is that of Wellons' hash lowbias32 of the place.
    """
    seed, dropped = np.uint32(numbers[0]), np.uint32(numbers[1])
    inputs, outputs = source[start:stop], out[start:stop]
    factor = scale[0]
    for n in range(inputs.size):
        x = np.uint32(n + start) ^ seed
        # Products of 32 bits are 64 bits to numba, unless they are told otherwise.
        x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD))
        x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0xD35A2D97))
        x = x ^ (x >> np.uint32(15))
        kept = widened(inputs[n]) * factor if x >= dropped else np.float32(0)
        outputs[n] = narrowed(kept, inputs[n])
