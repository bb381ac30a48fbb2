"""Dropout whose mask is never stored: it is computed from a seed and an element's position."""

from __future__ import annotations

from typing import Any

import numpy as np

from imvia_graph._kernels.floats import compiled, narrowed, widened


@compiled
def dropout(start: int, stop: int, source: Any, numbers: Any, scale: Any, out: Any) -> None:
    """Multiply elements start to stop by ``scale``, or set them to 0 with a given probability.

    ``numbers`` are a seed and the probability times 2^32. The mask is Wellons' hash lowbias32 of
    the position XOR the seed.
    """
    seed, dropped = np.uint32(numbers[0]), np.uint32(numbers[1])
    inputs, outputs = source[start:stop], out[start:stop]
    factor = scale[0]
    for n in range(inputs.size):
        x = np.uint32(n + start) ^ seed
        # numba widens products of 32 bits to 64 bits unless they are cast back.
        x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD))
        x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0xD35A2D97))
        x = x ^ (x >> np.uint32(15))
        kept = widened(inputs[n]) * factor if x >= dropped else np.float32(0)
        outputs[n] = narrowed(kept, inputs[n])
