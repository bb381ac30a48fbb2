"""What training asks of the machine that it runs on: a device, a precision, memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform

import torch

from imvia_graph.errors import SettingsError
from imvia_graph.settings import Settings


def training_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The precision of training on a device."""
    if settings.precision != "auto":
        dtype: torch.dtype = getattr(torch, settings.precision)
        return dtype
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = device.type == "cpu" and cpu_has_bfloat16()
    return torch.bfloat16 if gains else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
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
    """Have the C library keep freed memory for the next step, and not return it to the system.

    A step on a CPU frees tensors of tens of megabytes and asks for them again. As glibc is set,
    each of them is mapped anew, and every page of it zeroed by the system at its first touch: half
    the time of a training on MKG-Y. The command line calls this; in a program of your own it is
    your choice, since it holds for the whole process: its resident size stays at its peak.

    Returns
    -------
    bool
        Whether it was done: on Linux with glibc.
    """
    libc = _glibc()
    # From malloc.h: M_MMAP_MAX = -4, the number of blocks that may be mapped one by one;
    # M_TRIM_THRESHOLD = -1, the free bytes on top of the heap that are kept.
    return libc is not None and bool(libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Return to the system what is free now, where that can be done: on Linux with glibc.

    So that reading a graph, training, ranking and saving do not each leave their own holes.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


class Holes:
    """Gives memory back where steps, whose tensors differ a little in size, leave holes in it.

    That costs the page faults of a step, and so is done only once the process has grown.
    """

    #: Growth in bytes since the first step after memory was given back.
    GROWTH = 192 * 2**20

    def __init__(self) -> None:
        self.before: int | None = None

    def look(self) -> None:
        """After a step."""
        now = _resident_size()
        if self.before is None or now < self.before:
            self.before = now
        elif now - self.before > self.GROWTH:
            give_back_freed_memory()
            self.before = None


def _resident_size() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def resolve_device(name: str) -> torch.device:
    """The device that a setting names, ``auto`` included."""
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
