"""Loops that numba compiles for the CPU, and the threads that share them.

A loop takes ``(start, stop, *arrays)``, does the rows from start to stop, and holds no interpreter
lock. It is compiled at its first call and cached on disk.
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

# numpy has no bfloat16: half precision goes through it as bits, whose signs tell the two kinds.
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


@cache
def load(name: Literal["dropout", "labels", "scores", "views"]) -> Any:
    """The loops of one kind, None where numba does not load; it takes half a second to import."""
    try:
        return importlib.import_module(f"imvia_graph._kernels.{name}")
    except ImportError as error:
        warnings.warn(
            f"The compiled loops {name!r} do not load ({error}); plain torch is used, which is"
            " slower. Reinstall numba to have them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def share_out(kernel: Callable[..., None], cuts: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Run a loop over ``tensors`` with a thread for each range between two cuts."""
    arrays = [
        tensor.detach().view(_BITS.get(tensor.dtype, tensor.dtype)).numpy() for tensor in tensors
    ]
    _threads.run([partial(kernel, *part, *arrays) for part in pairwise(cuts)])


def even_cuts(rows: int) -> list[int]:
    """Cuts of so many rows into a part a thread."""
    parts = max(1, min(torch.get_num_threads(), rows))
    return [rows * i // parts for i in range(parts + 1)]
