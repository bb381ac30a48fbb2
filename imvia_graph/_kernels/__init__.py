"""Loops compiled by numba for the CPU, and the threads that run them.

A loop takes ``(start, stop, *arrays)``, processes the rows from start to stop, and releases the
interpreter lock. It is compiled at its first call and cached on disk.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from imvia_graph._kernels import _threads

# numpy has no bfloat16: half precision is passed as bits, unsigned for bfloat16, else signed.
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


@cache
def load(name: Literal["dropout", "labels", "scores", "views"]) -> Any:
    """Import the loops of one kind, in half a second; return None if numba does not load."""
    try:
        return importlib.import_module(f"imvia_graph._kernels.{name}")
    except ImportError as error:
        warnings.warn(
            f"The compiled loops {name!r} do not load ({error}); plain torch is used instead, which"
            " is slower. Reinstall numba to use them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def share_out(kernel: Callable[..., None], cuts: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Run a loop over ``tensors`` with one thread for each range between two cuts."""
    arrays = [
        tensor.detach().view(_BITS.get(tensor.dtype, tensor.dtype)).numpy() for tensor in tensors
    ]
    _threads.run([partial(kernel, *part, *arrays) for part in pairwise(cuts)])


def even_cuts(rows: int) -> list[int]:
    """Return the cuts that split ``rows`` rows evenly between the threads."""
    parts = max(1, min(torch.get_num_threads(), rows))
    return [rows * i // parts for i in range(parts + 1)]
