"""The machine a run is on: what it is, how much memory was used, and an allocator that keeps what it has."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path

import torch

__all__ = [
    "LARGEST_KEPT",
    "cpu_features",
    "cpu_name",
    "give_back_freed_memory",
    "host_line",
    "keep_freed_memory",
    "peak_memory_bytes",
]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # from malloc.h
LARGEST_KEPT = (
    8_000_000  # under adapters, whose temporaries are the largest part of what a step is working on
)
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def keep_freed_memory(largest: int = 0) -> bool:
    """Let this process keep freed memory for itself instead of giving it back to the system.

    By default every large temporary is new memory that the kernel clears page by page; a step of
    training asks for the same sizes over and over (LOG.md has the timings). Peak memory does not change, resident
    memory stays near the peak. Has an effect with glibc only.

    What lives as long as a step lies between what does not, so freed memory is in pieces, and a large temporary finds
    none that it fits in: under an adapter that was half a gigabyte of holes. With `largest` those are new memory again.

    Args:
        largest: Bytes from which on a piece is given back; 0 keeps all.

    Returns:
        True if it took effect.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    border = libc.mallopt(M_MMAP_THRESHOLD, largest) if largest else libc.mallopt(M_MMAP_MAX, 0)
    return bool(border) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_freed_memory() -> bool:
    """Let this process give every freed piece of 1 MiB and more back to the system at once.

    By default glibc raises that border to 32 MiB, and what a step of inference has freed stays, with holes in which the
    next piece does not fit: resident memory then differs from run to run by up to some hundred MB. With the fixed
    border it is what is in use. A prompt's step takes longer, because the kernel clears new pages (`docs/planning.md`).

    Returns:
        True if it took effect: with glibc only.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 1 << 24))


def peak_memory_bytes() -> int:
    """Most memory this process has had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count a larger process that this one was started from
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(words[1]) * 1024 for words in lines if words and words[0] == "VmHWM:")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """The processor's own name for itself."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> dict[str, bool]:
    """Instruction sets that matter to expert kernels, and whether this processor has them."""
    flags = _cpuinfo().get("flags", "").split()
    return {name: name in flags for name in FEATURES}


def host_line() -> str:
    """One line that says what the figures beside it were measured on."""
    features = " ".join(name for name, there in cpu_features().items() if there)
    parts = [f"{len(os.sched_getaffinity(0))} cores {cpu_name()}", features, f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return " · ".join(part for part in parts if part)


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
