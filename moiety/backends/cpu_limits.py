"""What this machine can do at most, by measurement: the other side of every claim of a share of a limit."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from moiety.backends import cpu
from moiety.errors import DependencyError

__all__ = ["multiply_rate", "read_all"]

PART_BYTES = 256 << 10


def _ready() -> ctypes.CDLL:
    library = cpu.library()
    if library is None:
        raise DependencyError(
            "the compiled CPU kernels are not here, so no limit can be measured",
            hint="install a C compiler and `pip install -e .` again",
        )
    return library


def read_all(parts: Sequence[Tensor]) -> None:
    """Read every byte of some contiguous tensors once, with all threads, as fast as the machine gives them.

    Raises:
        DependencyError: the kernels were not compiled.
    """
    library = _ready()
    starts = [part.data_ptr() for part in parts]
    ends = [start + part.numel() * part.itemsize for start, part in zip(starts, parts, strict=True)]
    pieces = [
        (at, min(PART_BYTES, end - at))
        for start, end in zip(starts, ends, strict=True)
        for at in range(start, end, PART_BYTES)
    ]
    addresses = (ctypes.c_void_p * len(pieces))(*(at for at, _ in pieces))
    lengths = (ctypes.c_int64 * len(pieces))(*(length for _, length in pieces))
    library.moiety_read(addresses, lengths, ctypes.c_int64(len(pieces)), ctypes.c_void_p(cpu.crew()))


def multiply_rate(*, integers: bool, seconds: float = 0.05) -> float:
    """Operations per second (a multiplication and an addition are two) in registers, on all threads.

    Args:
        integers: Products of eight bits summed in 32; else of float32.
        seconds: About how long to measure.

    Raises:
        DependencyError: the kernels were not compiled.
    """
    library, crew, rounds = _ready(), ctypes.c_void_p(cpu.crew()), 1 << 12
    while True:
        begun = time.perf_counter()
        operations = library.moiety_multiply(ctypes.c_int32(integers), ctypes.c_int64(rounds), crew)
        took = time.perf_counter() - begun
        if took >= seconds:
            return float(operations * torch.get_num_threads() / took)
        rounds *= 4 if took < seconds / 4 else 2
