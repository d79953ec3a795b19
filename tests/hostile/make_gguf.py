"""GGUFs that lie, written byte by byte: no library would write them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["gguf_cases", "good_gguf"]

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10
ALIGNMENT = 32
WIDTH, HEADS, VOCABULARY, INNER = 8, 2, 12, 16


class Info(NamedTuple):
    """One tensor as the header describes it; dimensions are counted apart so that the count can lie."""

    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int
    dimensions: int | None = None


def text(value: bytes | str, length: int | None = None) -> bytes:
    """A string; its length may lie."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A key, the number of a type, and whatever bytes are its value."""
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    """A key with a whole number."""
    return pair(key, UINT32, struct.pack("<I", value))


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    """The value of an array; its count may lie."""
    return struct.pack("<IQ", kind, count) + data


def pairs() -> dict[str, bytes]:
    """What a small Llama says of itself."""
    return {
        "general.architecture": pair("general.architecture", STRING, text("llama")),
        "llama.context_length": u32("llama.context_length", 64),
        "llama.embedding_length": u32("llama.embedding_length", WIDTH),
        "llama.block_count": u32("llama.block_count", 1),
        "llama.feed_forward_length": u32("llama.feed_forward_length", INNER),
        "llama.attention.head_count": u32("llama.attention.head_count", HEADS),
        "llama.attention.head_count_kv": u32("llama.attention.head_count_kv", HEADS),
        "llama.vocab_size": u32("llama.vocab_size", VOCABULARY),
        "eps": pair("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", 1e-5)),
    }


def infos() -> dict[str, Info]:
    """Its tensors; a GGUF names the fastest axis first."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (WIDTH, VOCABULARY),
        "output_norm.weight": (WIDTH,),
        "output.weight": (WIDTH, VOCABULARY),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        **{f"blk.0.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (WIDTH, INNER),
        "blk.0.ffn_up.weight": (WIDTH, INNER),
        "blk.0.ffn_down.weight": (INNER, WIDTH),
    }
    found: dict[str, Info] = {}
    at = 0
    for name, shape in shapes.items():
        found[name] = Info(name.encode(), shape, 0, at)
        count = 1
        for length in shape:
            count *= length
        at = -(-(at + 4 * count) // ALIGNMENT) * ALIGNMENT
    return found


def gguf(
    keys: dict[str, bytes] | None = None,
    tensors: dict[str, Info] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """A file of these parts; the counts may lie."""
    keys, tensors = pairs() if keys is None else keys, infos() if tensors is None else tensors
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys.values())
    for info in tensors.values():
        dimensions = len(info.shape) if info.dimensions is None else info.dimensions
        head += text(info.name) + struct.pack("<I", dimensions & 0xFFFFFFFF)
        head += b"".join(struct.pack("<Q", length) for length in info.shape)
        head += struct.pack("<IQ", info.kind, info.offset)
    head += bytes(-len(head) % ALIGNMENT)
    generator = random.Random(0)
    last = max((info.offset for info in infos().values()), default=0) + 4 * WIDTH * INNER
    return head + b"".join(struct.pack("<f", generator.gauss(0, 0.1)) for _ in range(last // 4))


def good_gguf() -> bytes:
    """A GGUF that loads."""
    return gguf()


def gguf_cases() -> Iterator[tuple[str, bytes]]:
    """Every lie, by name."""
    yield from _files()
    yield from _keys()
    yield from _values()
    yield from _tensors()


def _files() -> Iterator[tuple[str, bytes]]:
    good = gguf()
    yield "empty", b""
    for size in (1, 4, 8, 16, 23, 24, 43, 100, 500, 900, len(good) // 2, len(good) - 1, len(good) - 4):
        yield f"cut-{size}", good[:size]
    yield "43-of-zeros", b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(19)
    yield "43-of-ones", b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\xff" * 19
    for magic in (b"GGML", b"ggjt", b"FUGG", b"PK\3\4", b"\0\0\0\0"):
        yield f"magic-{magic.hex()}", gguf(magic=magic)
    for version in (0, 1, 4, 3 << 24, 2**32 - 1):
        yield f"version-{version}", gguf(version=version)
    for count in (len(pairs()) + 1, 2**32, 2**63, 2**64 - 1):
        yield f"keys-{count}", gguf(key_count=count)
        yield f"tensors-{count}", gguf(tensor_count=max(count, len(infos()) + 1))
    yield "keys-0", gguf(key_count=0)
    yield "tensors-0", gguf(tensor_count=0)


def _keys() -> Iterator[tuple[str, bytes]]:
    for name, key in (
        ("endless", text("x", 2**64 - 1) + struct.pack("<II", UINT32, 0)),
        ("signed", text("x", 2**63) + struct.pack("<II", UINT32, 0)),
        ("long", text("x", 10**9) + struct.pack("<II", UINT32, 0)),
        ("longer-than-allowed", text("x" * 70_000) + struct.pack("<II", UINT32, 0)),
        ("not-utf8", pair(b"\xff\xfe", UINT32, bytes(4))),
    ):
        yield f"key-{name}", gguf({"first": key, **pairs()})
    yield "key-twice", gguf({"first": u32("llama.block_count", 1), **pairs()})


def _values() -> Iterator[tuple[str, bytes]]:
    nested = b"".join(array(ARRAY, 1) for _ in range(20_000)) + array(UINT32, 1, bytes(4))
    wide = array(ARRAY, 5000, b"".join(array(ARRAY, 0) for _ in range(5000)))
    values: dict[str, tuple[int, bytes]] = {
        "type-13": (13, bytes(8)),
        "type-huge": (2**32 - 1, bytes(8)),
        "truth-7": (BOOL, b"\7"),
        "string-endless": (STRING, text("x", 2**64 - 1)),
        "string-signed": (STRING, text("x", 2**63)),
        "string-not-utf8": (STRING, text(b"\xc3\x28")),
        "array-endless": (ARRAY, array(UINT32, 2**62)),
        "array-overflow": (ARRAY, array(UINT64, 2**61 + 1)),
        "array-strings": (ARRAY, array(STRING, 2**60)),
        "array-million": (ARRAY, array(STRING, 1 << 20)),
        "array-type": (ARRAY, array(99, 4, bytes(16))),
        "array-nested": (ARRAY, nested),
        "array-wide": (ARRAY, wide),
        "array-string-endless": (ARRAY, array(STRING, 2, text("a") + text("b", 2**64 - 9))),
    }
    for name, (kind, value) in values.items():
        yield f"value-{name}", gguf({"first": pair("x.y", kind, value), **pairs()})
    options: dict[str, tuple[int, ...]] = {
        "llama.embedding_length": (0, 16, 2**31, 2**32 - 1),
        "llama.block_count": (0, 2, 10**6, 2**32 - 1),
        "llama.attention.head_count": (0, 3, 2**31),
        "llama.attention.head_count_kv": (0, 7),
        "llama.feed_forward_length": (0, 2**32 - 1),
        "llama.context_length": (0,),
    }
    for key, numbers in options.items():
        for number in numbers:
            yield f"{key}-{number}", gguf({**pairs(), key: u32(key, number)})
        yield f"{key}-text", gguf({**pairs(), key: pair(key, STRING, text("many"))})
    for key in ("general.architecture", "llama.embedding_length", "llama.block_count"):
        yield f"no-{key}", gguf({name: one for name, one in pairs().items() if name != key})
    for architecture in ("", "gpt2", "../llama", "x" * 10_000):
        said = {"general.architecture": pair("general.architecture", STRING, text(architecture))}
        yield f"architecture-{len(architecture)}", gguf({**pairs(), **said})
    yield "architecture-number", gguf({**pairs(), "general.architecture": u32("general.architecture", 7)})
    for eps in (float("nan"), float("inf"), -1.0):
        said = {"eps": pair("llama.attention.layer_norm_rms_epsilon", FLOAT32, struct.pack("<f", eps))}
        yield f"eps-{eps}", gguf({**pairs(), **said})
    for number in (0, 3, 2**31, 2**32 - 1):
        yield f"alignment-{number}", gguf({**pairs(), "a": u32("general.alignment", number)})
    for number in (2, 65_535):
        yield f"split-{number}", gguf({**pairs(), "a": u32("split.count", number)})


def _tensors() -> Iterator[tuple[str, bytes]]:
    name = "blk.0.ffn_gate.weight"
    good = infos()[name]
    changes: dict[str, dict[str, Any]] = {
        "no-dimensions": {"dimensions": 0, "shape": ()},
        "many-dimensions": {"dimensions": 5, "shape": (2, 2, 2, 2, 8)},
        "endless-dimensions": {"dimensions": 2**32 - 1},
        "huge": {"shape": (2**62, 2**62)},
        "signed": {"shape": (2**63, 1)},
        "overflow": {"shape": (2**32, 2**32)},
        "zero": {"shape": (0, INNER)},
        "turned": {"shape": (INNER, WIDTH)},
        "flat": {"shape": (WIDTH * INNER,)},
        "wide": {"shape": (WIDTH, INNER + 1)},
        "type-99": {"kind": 99},
        "type-huge": {"kind": 2**32 - 1},
        "type-int": {"kind": 26},
        "type-ragged": {"kind": 2},
        "offset-odd": {"offset": good.offset + 1},
        "offset-over": {"offset": infos()["blk.0.attn_q.weight"].offset},
        "offset-far": {"offset": 2**40},
        "offset-signed": {"offset": 2**63},
        "offset-end": {"offset": 2**64 - 32},
        "name-empty": {"name": b""},
        "name-not-utf8": {"name": b"\xff"},
        "name-long": {"name": b"x" * 70_000},
        "name-other": {"name": b"blk.0.ffn_gat.weight"},
        "name-far": {"name": b"blk.99999999.ffn_gate.weight"},
        "name-twice": {"name": b"blk.0.ffn_up.weight"},
    }
    for kind, change in changes.items():
        yield f"tensor-{kind}", gguf(tensors={**infos(), name: good._replace(**change)})
    for gone in ("token_embd.weight", name):
        yield f"tensor-gone-{gone}", gguf(tensors={key: one for key, one in infos().items() if key != gone})
    more = good._replace(name=b"blk.0.extra.weight", offset=good.offset)
    yield "tensor-more", gguf(tensors={**infos(), "more": more})
