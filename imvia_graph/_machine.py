"""The machine that training runs on: its device, precision and memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform

import torch

from imvia_graph.errors import SettingsError
from imvia_graph.settings import Settings


def training_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """Return the precision of matrix products in training on a device."""
    if settings.precision != "auto":
        dtype: torch.dtype = getattr(torch, settings.precision)
        return dtype
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported()) and any(
        flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16")
    )


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next step instead of returning it to the system.

    A step on a CPU frees tensors of tens of megabytes and allocates them again. By default, glibc
    maps each of them anew, and the system zeroes every page at its first access: half the time of a
    training on MKG-Y. The command line calls this function. A program of your own may do so, but
    the whole process then stays at its peak resident size.

    Returns
    -------
    bool
        Whether the C library was set: True on Linux with glibc.
    """
    libc = _glibc()
    # From malloc.h: M_MMAP_MAX = -4, the largest number of blocks allocated by mmap;
    # M_TRIM_THRESHOLD = -1, the number of free bytes at the top of the heap that are kept.
    return libc is not None and bool(libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Return free memory to the system, on Linux with glibc.

    Else reading a graph, training, ranking and saving would each leave free blocks of their own.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


class Holes:
    """Returns memory to the system when it fragments, as tensors vary in size between steps.

    This costs the page faults of a step, and is done only after the process has grown.
    """

    #: Growth in bytes, since the first step after memory was last returned, that triggers it.
    GROWTH = 192 * 2**20

    def __init__(self) -> None:
        self.before: int | None = None

    def look(self) -> None:
        """Check the resident size after a step; return memory if it has grown."""
        now = _resident_size()
        if self.before is None or now < self.before:
            self.before = now
        elif now - self.before > self.GROWTH:
            give_back_freed_memory()
            self.before = None


def _resident_size() -> int:
    """Return the resident size of this process in bytes; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def resolve_device(name: str) -> torch.device:
    """Return the device of the setting ``device``.

    Raises
    ------
    SettingsError
        The device cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"Setting device: {name!r} cannot be used here ({str(error).splitlines()[0]})."
        ) from None
    return device
