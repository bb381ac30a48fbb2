"""A kernel that only shows whether Triton compiles and launches kernels on a device."""

from __future__ import annotations

import functools
import logging
from typing import Any, no_type_check

import torch

from imvia_graph import _gpu

logger = logging.getLogger(__name__)

#: triton.language, once `launches` has been called.
tl: Any = None


@functools.cache
def launches(device: torch.device) -> bool:
    """Return whether Triton is installed and launches a kernel on a GPU; warn if it cannot.

    Triton compiles its launcher with a C compiler and Python's headers, which many container images
    lack, and may be older than the GPU. The class of the error depends on the version of Triton.
    """
    if not _gpu.load(globals(), _KERNELS):
        return False
    out = torch.zeros((), device=device)
    try:
        with torch.cuda.device_of(out):
            _store_one[(1,)](out, num_warps=1, **_gpu.OPTIONS)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        logger.warning(
            "Triton cannot launch kernels on %s (%s: %s), and slower operations of PyTorch are used"
            " instead. Triton needs a C compiler, which the variable CC may name, the headers of"
            " Python, and a version that supports the GPU.",
            device,
            type(error).__name__,
            reason,
        )
        return False
    return True


@no_type_check
def _store_one(out):
    """Write 1."""
    tl.store(out, 1.0)


_KERNELS = (_store_one,)
