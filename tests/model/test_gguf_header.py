"""Headers that lie: each refused at once, with the file and the key or tensor named, and nothing allocated by it."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from moiety.errors import FormatError, MoietyError
from moiety.model import gguf
from moiety.model.gguf import header
from tests import gguf_models

STRING, ARRAY, U8, U32, U64 = 8, 9, 0, 4, 10
HUGE = (1 << 64) - 1


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


def whole(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    start = b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join((*pairs, *tensors))
    return start + b"\0" * (-len(start) % 32) + data


ROW = bytes(4 * 8)
LIES = {
    "empty": (b"", "has 0 bytes"),
    "short": (b"GGUF" + bytes(10), "has 14 bytes"),
    "magic": (b"GGML" + bytes(40), "does not begin with GGUF"),
    "version 1": (whole(version=1), "GGUF version 1"),
    "version 4": (whole(version=4), "GGUF version 4"),
    "big-endian": (whole(version=3 << 24), "big-endian"),
    "43 bytes": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a" * 7) + b"\x09\0\0\0",
        "ends within key a|count",
    ),
    "tensor count": (whole(counts=(HUGE, 0)), "count of tensors is 18446744073709551615"),
    "key count": (whole(counts=(0, HUGE)), "count of keys is 18446744073709551615"),
    "key count a little": (whole(counts=(0, 3)), "count of keys is 3|ends within"),
    "key length": (whole([struct.pack("<Q", HUGE) + bytes(40)]), "a key is a string of"),
    "key not UTF-8": (
        whole([text(b"\xff\xfe") + struct.pack("<II", U32, 1)]),
        "a key is not UTF-8 at byte 0",
    ),
    "key twice": (whole([pair("a", U8, b"\1"), pair("a", U8, b"\2")]), "key a stands twice"),
    "value type": (whole([pair("a", 77, bytes(8))]), "key a is of type 77"),
    "truth value": (whole([pair("a", 7, b"\2")]), "key a is a truth value of 2"),
    "string length": (
        whole([pair("a", STRING, struct.pack("<Q", 1 << 40))]),
        "key a is a string of 1099511627776",
    ),
    "string past the end": (whole([pair("a", STRING, struct.pack("<Q", 999))]), "ends within key a"),
    "string not UTF-8": (whole([pair("a", STRING, text(b"a\xff"))]), "key a is not UTF-8 at byte 1"),
    "array length": (whole([pair("a", ARRAY, struct.pack("<IQ", U32, HUGE))]), "length of key a is"),
    "array length times size": (
        whole([pair("a", ARRAY, struct.pack("<IQ", U64, 1 << 61))]),
        "length of key a is",
    ),
    "array of strings": (whole([pair("a", ARRAY, struct.pack("<IQ", STRING, HUGE))]), "length of key a is"),
    "array string length": (
        whole([pair("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + struct.pack("<Q", HUGE - 8))]),
        r"key a\[1\] is a string that the file does not hold",
    ),
    "array string not UTF-8": (
        whole([pair("a", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xc3"))]),
        r"key a\[0\] is not UTF-8",
    ),
    "array of arrays": (
        whole([pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 1000)]),
        "key a is an array of type 9",
    ),
    "alignment": (whole([pair("general.alignment", U32, struct.pack("<I", 0))]), "general.alignment is 0"),
    "alignment odd": (
        whole([pair("general.alignment", U32, struct.pack("<I", 48))]),
        "general.alignment is 48",
    ),
    "alignment text": (whole([pair("general.alignment", STRING, text("8"))]), "general.alignment is '8'"),
    "no dimensions": (whole([], [tensor("t", ())]), "tensor t has 0 dimensions"),
    "many dimensions": (whole([], [tensor("t", (1,) * 5)]), "tensor t has 5 dimensions"),
    "dimension 0": (whole([], [tensor("t", (4, 0))]), r"tensor t has shape \(0, 4\)"),
    "overflowing shape": (whole([], [tensor("t", (1 << 32, 1 << 32))]), "tensor t has shape"),
    "shape that wraps to 0": (whole([], [tensor("t", (1 << 63, 2, 1, 1))]), "tensor t has shape"),
    "tensor type": (whole([], [tensor("t", (4,), 99)], ROW), "tensor t is of type 99"),
    "removed tensor type": (whole([], [tensor("t", (4,), 4)], ROW), "tensor t is of type 4"),
    "block": (whole([], [tensor("t", (33,), 8)], bytes(99)), "tensor t has rows of 33; Q8_0 needs whole 32s"),
    "offset": (whole([], [tensor("t", (4,), 0, 7)], ROW), "tensor t begins at 7"),
    "offset past the end": (whole([], [tensor("t", (4,), 0, 1 << 60)], ROW), "tensor t ends at byte"),
    "offset that wraps": (whole([], [tensor("t", (4,), 0, HUGE - 31)], ROW), "tensor t ends at byte"),
    "cut": (whole([], [tensor("t", (9,))], ROW), "tensor t ends at byte"),
    "overlap": (whole([], [tensor("t", (8,)), tensor("u", (8,))], ROW), "tensor u overlaps tensor t"),
    "overlap in part": (
        whole([], [tensor("t", (16,)), tensor("u", (8,), 0, 32)], ROW * 3),
        "tensor u overlaps tensor t",
    ),
    "tensor twice": (
        whole([], [tensor("t", (4,)), tensor("t", (4,), 0, 32)], ROW * 2),
        "tensor t stands twice",
    ),
    "tensor name": (whole([], [tensor("t" * 300, (4,))], ROW), "the name of a tensor is a string of 300"),
    "split count": (whole([pair("split.count", U32, struct.pack("<I", 5000))]), "split.count is 5000"),
    "split without name": (
        whole([pair("split.count", U32, struct.pack("<I", 2))]),
        "this is not the first part",
    ),
    "architecture": (whole([pair("general.architecture", U8, b"\1")]), "general.architecture is 1"),
    "no architecture": (whole(), "general.architecture is None"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(name: str, tmp_path: Path) -> None:
    data, said = LIES[name]
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(FormatError, match=said) as caught:
        gguf.load_gguf(path)
    took_s, (_, peak_bytes) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "lie.gguf" in str(caught.value)
    assert took_s < 1 and peak_bytes < 1 << 20


def test_what_is_no_regular_file_is_refused_and_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FormatError, match=r"pipe\.gguf is not a regular file"):
        header.read_file(tmp_path / "pipe.gguf")
    with pytest.raises(FormatError, match="is not a regular file"):
        header.read_file(tmp_path)
    with pytest.raises(FormatError, match=r"none\.gguf does not exist"):
        header.read_file(tmp_path / "none.gguf")


def test_very_many_strings_are_refused_in_time(tmp_path: Path) -> None:
    """24 MB of empty strings would take a list of three million; a real vocabulary has a tenth of that."""
    count = 3_000_000
    (tmp_path / "many.gguf").write_bytes(
        whole([pair("a", ARRAY, struct.pack("<IQ", STRING, count) + bytes(8 * count))])
    )
    started = time.perf_counter()
    with pytest.raises(FormatError, match="the length of key a is 3000000"):
        header.read_file(tmp_path / "many.gguf")
    assert time.perf_counter() - started < 1


def test_long_arrays_of_numbers_cost_nothing(tmp_path: Path) -> None:
    count = 4_000_000
    (tmp_path / "long.gguf").write_bytes(
        whole([pair("a", ARRAY, struct.pack("<IQ", U32, count) + bytes(4 * count))])
    )
    tracemalloc.start()
    read = header.read_file(tmp_path / "long.gguf")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read.values["a"]) == count and peak_bytes < 1 << 20


def test_every_length_of_a_file_but_the_whole_is_refused(tmp_path: Path) -> None:
    gguf.save_gguf(gguf_models.model("deepseek2-yarn"), tmp_path / "it.gguf", "f16")
    data = (tmp_path / "it.gguf").read_bytes()
    last = max(len(data) - len(data) % 32, 1)  # the file ends with padding, which nobody misses
    path = tmp_path / "cut.gguf"
    for length in (*range(0, 4000, 37), *range(4000, last - 64, 9973), last - 64):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"cut.gguf"):
            gguf.load_gguf(path)


@pytest.mark.parametrize("name", ["llama-llama3", "deepseek2-yarn"])
def test_a_changed_byte_is_refused_or_makes_another_whole_model(name: str, tmp_path: Path) -> None:
    """Whatever byte of the header changes: an error of ours with the file's name, or a model; never anything else."""
    gguf.save_gguf(gguf_models.model(name), tmp_path / "it.gguf", "f16")
    data = bytearray((tmp_path / "it.gguf").read_bytes())
    end = next(iter(header.read_file(tmp_path / "it.gguf").tensors.values()))
    header_bytes = len(data) - sum(
        -(-one.raw.nbytes // 32) * 32 for one in header.read_file(tmp_path / "it.gguf").tensors.values()
    )
    assert end and header_bytes > 1000
    path, chance, refused = tmp_path / "changed.gguf", random.Random(0), 0
    places = range(0, header_bytes, 7)
    for place in places:
        before = data[place]
        data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        data[place] = before
        try:
            gguf.load_gguf(path)
        except MoietyError as error:
            refused += 1
            assert "changed.gguf" in str(error) or "position" in str(error), error
    assert refused > len(places) // 2
