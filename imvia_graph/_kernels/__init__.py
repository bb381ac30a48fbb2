"""Loops that numba compiles for the CPU, and the threads that share them.

A loop takes ``(start, stop, *arrays)``, does the rows from start to stop, and holds no interpreter
lock. It is compiled at its first call and cached on disk.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

# numpy has no bfloat16: half precision goes through it as bits, whose signs tell the two kinds.
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


@cache
def load(name: Literal["labels", "scores", "views"]) -> Any:
    """The loops of one kind, None where numba does not load; it takes half a second to import."""
    try:
        return importlib.import_module(f"imvia_graph._kernels.{name}")
    except ImportError:
        return None


def share_out(kernel: Callable[..., None], cuts: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Run a loop over ``tensors`` with a thread for each range between two cuts."""
    arrays = [
        tensor.detach().view(_BITS.get(tensor.dtype, tensor.dtype)).numpy() for tensor in tensors
    ]
    first, *others = pairwise(cuts)
    waiting = [_pool().submit(kernel, *part, *arrays) for part in others]
    kernel(*first, *arrays)
    for part in waiting:
        part.result()


def even_cuts(rows: int) -> list[int]:
    """Cuts of so many rows into a part a thread."""
    parts = max(1, min(torch.get_num_threads(), rows))
    return [rows * i // parts for i in range(parts + 1)]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="imvia-kernel")


# Threads do not survive a fork; a child starts its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
