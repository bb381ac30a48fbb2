"""Kernels that Triton compiles for a GPU: made when one is first wanted.

Importing Triton takes time and reads TRITON_INTERPRET, with which it runs kernels in Python: that
is how they are tested where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: What kernels take; sums are in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Options of all launches: Triton 3.9 warns that from 3.10 on, multiplications and additions are
#: not fused by default.
OPTIONS = {"enable_fp_fusion": True}


def runs_on(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a device."""
    if device.type == "cuda":
        from imvia_graph._gpu import probe

        # Of NVIDIA's GPUs, Triton supports Ampere and later.
        is_new = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        return is_new and probe.launches(device)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def is_waited_for(device: torch.device) -> bool:
    """Whether the host would have to wait for a device to learn what it computed.

    Triton's interpreter counts as one, so that there, too, nobody asks.
    """
    return device.type == "cuda" or runs_on(device)


def may_not_ask(ids: torch.Tensor) -> bool:
    """Whether ids are not to be looked at: there are none, or they would have to be waited for."""
    return torch.compiler.is_compiling() or not len(ids) or is_waited_for(ids.device)


def beyond(ids: torch.Tensor, number: int) -> int | None:
    """One of the ids that is not from 0 to ``number`` - 1; None where there is none.

    Those that `may_not_ask` tells are not looked at.
    """
    if may_not_ask(ids):
        return None
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        return low
    return high if high >= number else None


#: Arguments that kernels have for tensors whose number differs.
ARGUMENTS = 8


def filled(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """As many as kernels have arguments for: the first again and again, which none reads."""
    return [*tensors, *[tensors[0]] * (ARGUMENTS - len(tensors))]


def load(
    module: dict[str, Any], kernels: Sequence[Callable[..., Any]], unspecialized: Sequence[str] = ()
) -> bool:
    """Make kernels of a module's functions, the first time; False where Triton is not installed.

    A kernel finds ``tl``, which is None until then, and other kernels among its module's globals.
    Of arguments that are ``unspecialized`` it does not look at what they are divisible by.
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
