"""The header of a GGUF file, read with suspicion: values by key, and where each tensor lies.

Every size in the file is compared with the file before anything is read or allocated by it, so a file that lies
costs no more than a file that does not. Tensors stay in the file, mapped, until somebody decodes them.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moiety.errors import FormatError, StorageError

__all__ = ["MAGIC", "TYPES", "GGUFFile", "StoredTensor", "TensorType", "read_file"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the same layout; version 1 had shorter counts
ALIGNMENT = 32
KEYS_MAX = 1 << 16
TENSORS_MAX = 1 << 17
NAME_BYTES_MAX = 256
TEXT_BYTES_MAX = 48 << 20  # of all strings together; the largest vocabularies and their merges take 16 MB
STRINGS_MAX = 1_500_000
PARTS_MAX = 1000
DIMENSIONS_MAX = 4
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

SCALARS: Mapping[int, tuple[str, int]] = {
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    7: ("<?", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
BOOL, STRING, ARRAY = 7, 8, 9


class TensorType(NamedTuple):
    """How the numbers of a tensor are stored: so many of them in a block of so many bytes."""

    name: str
    block: int
    block_bytes: int


TYPES: Mapping[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 40),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
}


class StoredTensor(NamedTuple):
    """A tensor in a file: `shape` with the axis that varies fastest last, `raw` its bytes, mapped."""

    file: Path
    name: str
    shape: tuple[int, ...]
    type: TensorType
    raw: memoryview

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return _product(self.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class GGUFFile:
    """A GGUF file, or the parts of a split one.

    Args:
        path: The file, or its first part.
        values: Everything the header says; numeric arrays are numpy arrays on the file.
        tensors: By name.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def error(self, about: str, problem: str, hint: str | None = None) -> FormatError:
        """A FormatError of this file about a key or a tensor."""
        return FormatError(f"{self.path}: {about} {problem}", hint=hint)


def read_file(path: str | Path) -> GGUFFile:
    """Read the header of a GGUF file; a split one is given by its first part.

    Raises:
        FormatError: not such a file, cut, or sizes in it that the file cannot have.
        StorageError: the system refused to read.
    """
    first = _read_part(Path(path))
    count = _count_of_parts(first)
    if count == 1:
        return first
    match = PART_NAME.fullmatch(first.path.name)
    if match is None or _number_of_part(first) != 0 or int(match["number"]) != 1:
        raise first.error(
            "split.count",
            f"is {count}, but this is not the first part",
            "give the file ...-00001-of-....gguf",
        )
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        part = _read_part(first.path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf"))
        if part.values.get("split.no") != number - 1 or part.values.get("split.count") != count:
            raise part.error(
                "split.no", f"is {part.values.get('split.no')!r}; by its name it is {number - 1}"
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise part.error(f"tensor {name}", f"also stands in {tensors[name].file}")
            tensors[name] = tensor
    return GGUFFile(path=first.path, values=first.values, tensors=tensors)


def _count_of_parts(part: GGUFFile) -> int:
    count = part.values.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= PARTS_MAX:
        raise part.error("split.count", f"is {count!r}; allowed is 1 to {PARTS_MAX}")
    return max(count, 1)


def _number_of_part(part: GGUFFile) -> int:
    number = part.values.get("split.no", 0)
    if not isinstance(number, int):
        raise part.error("split.no", f"is {number!r}; a whole number is wanted")
    return number


def _read_part(path: Path) -> GGUFFile:
    cursor = _Cursor(path, _mapped(path))
    if cursor.take(4, "its magic number") != MAGIC:
        raise FormatError(f"{path} is not a GGUF file: it does not begin with GGUF")
    version = cursor.number("<I", "its version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = (
            "it is for big-endian machines" if swapped in VERSIONS else "convert it again with a current tool"
        )
        raise FormatError(f"{path} has GGUF version {version}; allowed are {VERSIONS}", hint=hint)
    tensor_count = cursor.count("its count of tensors", TENSORS_MAX, 24)
    key_count = cursor.count("its count of keys", KEYS_MAX, 13)
    values: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("a key", NAME_BYTES_MAX)
        if key in values:
            raise FormatError(f"{path}: key {key} stands twice")
        values[key] = cursor.value(f"key {key}")
    tensors = _tensors(cursor, tensor_count, values)
    return GGUFFile(path=path, values=values, tensors=tensors)


def _mapped(path: Path) -> memoryview:
    """The bytes of a regular file, mapped and not yet read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path} is not a regular file", hint="give the GGUF file itself")
            if status.st_size < 24:
                raise FormatError(f"{path} has {status.st_size} bytes; the smallest GGUF header has 24")
            return memoryview(mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ))
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise FormatError(f"{path} does not exist", hint="check the name") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error


def _tensors(cursor: _Cursor, count: int, values: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors, each inside the file and none on top of another."""
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment not in (8 << step for step in range(18)):
        raise FormatError(
            f"{cursor.path}: general.alignment is {alignment!r}; allowed are powers of 2 from 8"
        )
    found: dict[str, tuple[tuple[int, ...], TensorType, int]] = {}
    for _ in range(count):
        name = cursor.text("the name of a tensor", NAME_BYTES_MAX)
        if name in found:
            raise FormatError(f"{cursor.path}: tensor {name} stands twice")
        found[name] = _tensor_info(cursor, f"tensor {name}", alignment)
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    end, before = 0, ""
    for name, (shape, kind, offset) in sorted(found.items(), key=lambda item: item[1][2]):
        size_bytes = _product(shape) // kind.block * kind.block_bytes
        if offset < end:
            raise FormatError(f"{cursor.path}: tensor {name} overlaps tensor {before}")
        end, before = offset + size_bytes, name
        if start + end > cursor.size:
            raise FormatError(
                f"{cursor.path}: tensor {name} ends at byte {start + end} of {cursor.size}",
                hint="the file was cut: download or write it again",
            )
        raw = cursor.data[start + offset : start + end]
        tensors[name] = StoredTensor(cursor.path, name, shape, kind, raw)
    return {name: tensors[name] for name in found}


def _tensor_info(cursor: _Cursor, what: str, alignment: int) -> tuple[tuple[int, ...], TensorType, int]:
    dimensions = cursor.number("<I", what)
    if not 1 <= dimensions <= DIMENSIONS_MAX:
        raise FormatError(
            f"{cursor.path}: {what} has {dimensions} dimensions; allowed is 1 to {DIMENSIONS_MAX}"
        )
    shape = tuple(cursor.number("<Q", what) for _ in range(dimensions))
    number, offset = cursor.number("<I", what), cursor.number("<Q", what)
    kind = TYPES.get(number)
    if kind is None:
        known = ", ".join(one.name for one in TYPES.values())
        raise FormatError(f"{cursor.path}: {what} is of type {number}; known are {known}")
    if not all(shape) or _product(shape) > cursor.size * kind.block:
        raise FormatError(f"{cursor.path}: {what} has shape {shape[::-1]}, which this file cannot hold")
    if shape[0] % kind.block:
        raise FormatError(
            f"{cursor.path}: {what} has rows of {shape[0]}; {kind.name} needs whole {kind.block}s"
        )
    if offset % alignment:
        raise FormatError(f"{cursor.path}: {what} begins at {offset}, which is not a multiple of {alignment}")
    return shape[::-1], kind, offset


class _Cursor:
    """A place in a file; everything it takes is there, or it says what is not."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0
        self.text_left, self.strings_left = TEXT_BYTES_MAX, STRINGS_MAX

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        if count > self.size - self.at:
            raise FormatError(
                f"{self.path} ends within {what}: {count} bytes are wanted, {self.size - self.at} are left",
                hint="it was cut or altered: download or write it again",
            )
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def number(self, layout: str, what: str) -> int:
        """The next number."""
        number: int = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return number

    def count(self, what: str, largest: int, entry_bytes: int) -> int:
        """How many entries follow, each of at least so many bytes."""
        count = self.number("<Q", what)
        if count > largest or count * entry_bytes > self.size - self.at:
            raise FormatError(f"{self.path}: {what} is {count}, more than the file holds or than {largest}")
        return count

    def text(self, what: str, largest: int = TEXT_BYTES_MAX) -> str:
        """The next string."""
        length = self.number("<Q", what)
        if length > min(largest, self.text_left):
            raise FormatError(f"{self.path}: {what} is a string of {length} bytes; allowed are {largest}")
        self.text_left -= length
        return self._decoded(self.take(length, what), what)

    def value(self, what: str) -> Any:
        """The next value, whatever it is."""
        kind = self.number("<I", what)
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self._array(what)
        if kind not in SCALARS:
            raise FormatError(f"{self.path}: {what} is of type {kind}; allowed is 0 to 12")
        layout, size_bytes = SCALARS[kind]
        taken = self.take(size_bytes, what)
        if kind == BOOL and taken not in (b"\0", b"\1"):
            raise FormatError(f"{self.path}: {what} is a truth value of {taken[0]}; allowed is 0 or 1")
        return struct.unpack(layout, taken)[0]

    def _array(self, what: str) -> Any:
        kind = self.number("<I", what)
        if kind == STRING:
            return self._strings(what)
        if kind not in SCALARS:
            allowed = "numbers, truth values or strings"
            raise FormatError(f"{self.path}: {what} is an array of type {kind}; allowed are {allowed}")
        layout, size_bytes = SCALARS[kind]
        count = self.count(f"the length of {what}", self.size, size_bytes)
        at = self.at
        self.at += count * size_bytes
        return np.frombuffer(self.data, dtype=np.dtype(layout), count=count, offset=at)

    def _strings(self, what: str) -> list[str]:
        count = self.count(f"the length of {what}", self.strings_left, 8)
        self.strings_left -= count
        data, size, at, first = self.data, self.size, self.at, self.at
        unpack: Callable[[memoryview, int], tuple[int]] = struct.Struct("<Q").unpack_from
        found: list[str] = []
        for number in range(count):
            if at + 8 > size:
                break
            length = unpack(data, at)[0]
            at += 8 + length
            if at > size or at - first - 8 * len(found) > self.text_left:
                break
            found.append(self._decoded(bytes(data[at - length : at]), f"{what}[{number}]"))
        if len(found) < count:
            raise FormatError(
                f"{self.path}: {what}[{len(found)}] is a string that the file does not hold, or is too long",
                hint="it was cut or altered: download or write it again",
            )
        self.text_left -= at - first - 8 * count
        self.at = at
        return found

    def _decoded(self, taken: bytes, what: str) -> str:
        try:
            return taken.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: {what} is not UTF-8 at byte {error.start}") from error


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product
