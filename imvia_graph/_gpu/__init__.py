"""Triton kernels for GPUs, created at their first use.

Importing Triton takes time. It reads the environment variable TRITON_INTERPRET, with which kernels
run in Python on the CPU: tests without a GPU use it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: Dtypes that kernels take. Sums are in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Options of all launches: Triton 3.9 warns that from 3.10 on, multiplications and additions are
#: not fused by default.
OPTIONS = {"enable_fp_fusion": True}


def runs_on(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a device."""
    if device.type == "cuda":
        # Of NVIDIA's GPUs, Triton supports Ampere and later.
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return False
        if torch.compiler.is_compiling():  # a launch cannot be traced
            return True
        from imvia_graph._gpu import probe

        return probe.launches(device)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def reading_synchronizes(device: torch.device) -> bool:
    """Return whether reading a value on a device makes the host wait.

    Under Triton's interpreter the CPU counts as such a device, so that tests take the same paths.
    """
    return device.type == "cuda" or runs_on(device)


def cannot_check(ids: torch.Tensor) -> bool:
    """Return whether ids cannot be checked: there are none, or the host would have to wait."""
    return torch.compiler.is_compiling() or not len(ids) or reading_synchronizes(ids.device)


def id_out_of_range(ids: torch.Tensor, number: int) -> int | None:
    """Return an id outside 0 … ``number`` - 1, or None if all are within or `cannot_check`."""
    if cannot_check(ids):
        return None
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        return low
    return high if high >= number else None


#: Number of arguments that kernels have for a variable number of tensors.
ARGUMENTS = 8


def padded(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return `ARGUMENTS` tensors: those given, then the first again, which kernels do not read."""
    return [*tensors, *[tensors[0]] * (ARGUMENTS - len(tensors))]


def load(
    module: dict[str, Any], kernels: Sequence[Callable[..., Any]], unspecialized: Sequence[str] = ()
) -> bool:
    """Turn functions of a module into kernels at the first call; return whether Triton is there.

    Parameters
    ----------
    module : dict
        Globals of the module, in which kernels look up ``tl`` (None until then) and each other.
    kernels : sequence of function
    unspecialized : sequence of str, optional
        Arguments for which Triton does not compile variants by value or divisibility.

    Returns
    -------
    bool
        False if Triton is not installed.
    """
    if module["tl"] is None:
        try:
            import triton
            import triton.language
        except ImportError:
            return False
        for function in kernels:
            names = function.__code__.co_varnames[: function.__code__.co_argcount]
            hidden = [name for name in unspecialized if name in names]
            module[function.__name__] = triton.jit(function, do_not_specialize=hidden)
        module["tl"] = triton.language
    return True
