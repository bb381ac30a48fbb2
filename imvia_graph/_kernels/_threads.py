"""Threads for compiled loops: torch's own OpenMP threads where possible.

After a parallel operation, torch's OpenMP threads keep their cores busy for some milliseconds while
they wait for the next one. Other threads would have to share the cores with them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


def run(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks that hold the interpreter lock only briefly, in parallel if there are threads."""
    if len(tasks) == 1:
        tasks[0]()
    elif not _forked and (team := _openmp()) is not None:
        _run_on(team, tasks)
    else:
        waiting = [_pool().submit(task) for task in tasks[1:]]
        tasks[0]()
        for task in waiting:
            task.result()


def _run_on(team: Any, tasks: Sequence[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def body(_: Any) -> None:
        # There may be fewer threads than requested.
        try:
            for i in range(team.omp_get_thread_num(), len(tasks), team.omp_get_num_threads()):
                tasks[i]()
        except BaseException as error:  # an exception cannot propagate through C
            errors.append(error)

    team.GOMP_parallel(_BODY(body), None, min(len(tasks), torch.get_num_threads()), 0)
    if errors:
        raise errors[0]


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Any:
    """Return the GNU OpenMP library if torch has loaded it; None if torch uses another one."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.GOMP_parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num.restype = library.omp_get_num_threads.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return library


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="imvia-kernel")


def _after_fork() -> None:
    # No thread survives a fork. GNU OpenMP does not restart its threads; a new pool does.
    global _forked
    _forked = True
    _pool.cache_clear()


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
