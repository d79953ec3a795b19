"""One safetensors file: checked in every number before anything is read, and read straight into its place.

A file is eight bytes (the length of the header), the header (JSON: name to type, shape and the two ends of its
bytes), and the bytes of all tensors without a gap. Nothing is mapped unless asked for (`TensorFile.mapped`), so what
is in memory is what was read.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moiety import storage
from moiety.errors import FormatError, StorageError

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "Entry",
    "Place",
    "TensorFile",
    "open_tensors",
    "read_tensors",
    "shown",
    "write_tensors",
]

HEADER_BYTES_MAX = 16 << 20
DIMENSIONS_MAX = 8
LENGTH_MAX = 1 << 48
WORTH_TWO_THREADS_BYTES = 1 << 20
CHUNK_BYTES = 4 << 20  # read and converted while still in the processor's cache
# Types by their names in the file; other names are other formats.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor to write: what it is, and how to get it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class Place(NamedTuple):
    """A tensor in a file: its type, shape, first byte and number of bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorFile:
    """An open safetensors file whose header is sound."""

    path: Path
    places: Mapping[str, Place]
    descriptor: int
    helper: ThreadPoolExecutor

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of its first axis, in memory of its own.

        Raises:
            FormatError: the file was cut meanwhile.
            StorageError: the system refused to read.
        """
        place = self.places[name]
        tensor = torch.empty(place.shape if row is None else place.shape[1:], dtype=place.dtype)
        self._fill(name, tensor, place.start + (row or 0) * tensor.nbytes)
        return tensor

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill a tensor that has the same elements in the same order, whatever its axes, strides and dtype.

        A contiguous target of the stored dtype is filled in place; another one takes a few megabytes beside it,
        or one row of its first axis where that is more. Errors as for `read`.
        """
        place = self.places[name]
        assert target.numel() == math.prod(place.shape), (name, target.shape, place)
        if target.is_contiguous() and target.dtype == place.dtype:
            self._fill(name, target, place.start)
            return
        rows = target.view(-1) if target.is_contiguous() else target
        row_bytes = math.prod(rows.shape[1:]) * place.dtype.itemsize
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        scratch = torch.empty(rows[:step].shape, dtype=place.dtype)
        at = place.start
        for part in (rows[first : first + step] for first in range(0, len(rows), step)):
            chunk = scratch[: len(part)]
            self._fill(name, chunk, at)
            part.copy_(chunk)
            at += chunk.nbytes

    def mapped(self) -> dict[str, Tensor]:
        """Every tensor where it lies: pages are read when they are touched, and what is written to stays in memory.

        Raises:
            StorageError: the system refused to map the file.
        """
        try:
            memory = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise StorageError(f"cannot map {self.path}: {error.strerror}", hint="check its disk") from error
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        return {
            name: whole[place.start : place.start + place.size_bytes].view(place.dtype).view(place.shape)
            for name, place in self.places.items()
        }

    def _fill(self, name: str, tensor: Tensor, at: int) -> None:
        """Fill a contiguous tensor with the file's bytes from `at` on; a large one in two halves at once.

        One thread cannot use all of a memory's bandwidth, and half of this time goes into touching new pages.
        """
        whole: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
        half = len(whole) // 2 if len(whole) >= WORTH_TWO_THREADS_BYTES else 0
        second = self.helper.submit(self._fill_part, name, whole[half:], at + half) if half else None
        try:
            self._fill_part(name, whole[:half] if half else whole, at)
        finally:
            if second is not None:  # the memory must not be given away while it is written
                second.result()

    def _fill_part(self, name: str, left: memoryview, at: int) -> None:
        while left:
            try:
                count = os.preadv(self.descriptor, [left], at)
            except OSError as error:
                raise StorageError(
                    f"cannot read {self.path}: {error.strerror}", hint="check the disk"
                ) from error
            if count == 0:
                raise FormatError(f"{self.path} was cut while tensor {shown(name)} was read")
            left, at = left[count:], at + count


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Raises:
        FormatError: it is not one, or its header contradicts itself or the file's size; the tensor is named.
        StorageError: the system refused to read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is not waited for
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing", hint="write or download it again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error
    try:
        places = _read_header(path, descriptor)
        with ThreadPoolExecutor(max_workers=1) as helper:  # no thread starts before it has something to read
            yield TensorFile(path=path, places=places, descriptor=descriptor, helper=helper)
    finally:
        os.close(descriptor)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; errors as for `open_tensors`."""
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.places}


def write_tensors(file: Path, entries: Mapping[str, Entry], *, multiple: int | None = None) -> None:
    """Write a safetensors file, fetching one tensor at a time.

    Args:
        file: Must not exist.
        entries: By name.
        multiple: Tensors stay in their order, and the first begins at a multiple of so many bytes. None puts wide types
            first, and begins at a cache line, so that every tensor is aligned and can be mapped.

    Raises:
        OSError: the system refused.
    """
    order = [*entries] if multiple else sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        entry = entries[name]
        place = [at, at + entry.size_bytes]
        header[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": place,
        }
        at = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % (multiple or 64))
    with open(file, "xb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = entries[name].fetch()
            assert tuple(tensor.shape) == entries[name].shape, (name, tensor.shape, entries[name].shape)
            flat = tensor.detach().to("cpu", entries[name].dtype).contiguous().reshape(-1)
            opened.write(flat.view(torch.uint8).numpy().data)


def shown(name: str) -> str:
    """A name out of a file as an error says it: short, and without control characters."""
    return name if name.isprintable() and len(name) <= 200 else reprlib.repr(name)


def _read_header(path: Path, descriptor: int) -> dict[str, Place]:
    """Every tensor's place; the whole header holds, or the first thing in it that does not is an error."""
    hint = "it was cut or altered: write or download it again"
    size = os.fstat(descriptor).st_size
    try:
        first = os.pread(descriptor, 8, 0)
        length = int.from_bytes(first, "little")
        data = size - 8 - length
        if len(first) < 8 or not 2 <= length <= HEADER_BYTES_MAX or data < 0:
            raise FormatError(
                f"{path} has {size:,} bytes and a header of {length:,}; allowed is at least 2, at most the rest "
                f"of the file and {HEADER_BYTES_MAX:,}",
                hint=hint,
            )
        raw = os.pread(descriptor, length, 8)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint="check the disk") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: its header is not UTF-8 at byte {8 + error.start}", hint=hint) from error
    header = storage.parse_json(path, text)
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry, 8 + length, data) for name, entry in header.items()}
    at, before = 8 + length, ""
    for name, place in sorted(places.items(), key=lambda one: (one[1].start, one[1].size_bytes)):
        if place.start != at:
            after = f"tensor {shown(before)}" if before else "the header"
            said = "overlaps" if place.start < at else f"lies {place.start - at:,} bytes behind"
            raise FormatError(f"{path}: tensor {shown(name)} {said} {after}", hint=hint)
        at, before = at + place.size_bytes, name
    if at != size:
        raise FormatError(f"{path} has {size - at:,} bytes behind its last tensor {shown(before)}", hint=hint)
    return places


def _place(path: Path, name: str, entry: Any, begin: int, size: int) -> Place:
    """One entry of a header; `begin` is where the tensors' bytes begin, `size` how many there are."""
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} is {reprlib.repr(entry)}; allowed is dtype, shape and data_offsets")
    kind, shape, ends = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise FormatError(f"{where} has dtype {reprlib.repr(kind)}; allowed is {', '.join(DTYPES)}")
    if not _lengths(shape, LENGTH_MAX) or len(shape) > DIMENSIONS_MAX:
        raise FormatError(
            f"{where} has shape {reprlib.repr(shape)}; allowed is up to {DIMENSIONS_MAX} whole numbers below 2**48"
        )
    if not _lengths(ends, size) or len(ends) != 2 or ends[0] > ends[1]:
        raise FormatError(
            f"{where} has data_offsets {reprlib.repr(ends)}; allowed is a first and a last up to {size:,}, "
            "the bytes that the file has",
            hint="it was cut or altered: write or download it again",
        )
    needed = math.prod(shape) * DTYPES[kind].itemsize
    if needed != ends[1] - ends[0]:
        raise FormatError(
            f"{where} of dtype {kind} and shape {shape} needs {needed:,} bytes, but data_offsets gives it "
            f"{ends[1] - ends[0]:,}"
        )
    return Place(DTYPES[kind], tuple(shape), begin + ends[0], needed)


def _lengths(values: Any, most: int) -> bool:
    """True for a list of whole numbers from 0 to `most`."""
    return isinstance(values, list) and all(type(one) is int and 0 <= one <= most for one in values)
