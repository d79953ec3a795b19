"""Writes checkpoints and GGUFs that lie, and says what an error about each must name.

    python -m tests.hostile.make FOLDER

Every case is a copy of a good model with one thing wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.hostile.make_gguf import gguf_cases

__all__ = ["Case", "write_all"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSOR = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
DEEP = 100_000
SPARSE_BYTES = 1 << 40
Change = Callable[[Path], None]


class Case(NamedTuple):
    """A hostile model: what to load, and the file and tensor that the error must name."""

    group: str
    path: str
    file: str
    tensor: str = ""


def write_all(folder: Path, plain: Path, sharded: Path) -> list[Case]:
    """Write every case into `folder`.

    Args:
        folder: An empty one.
        plain: A good checkpoint in one file.
        sharded: A good checkpoint in several.
    """
    cases = []
    groups: dict[str, tuple[Path, Iterator[tuple[str, str, str, Change]]]] = {
        "entry": (plain, entry_cases()),
        "header": (plain, header_cases()),
        "index": (sharded, index_cases(sharded)),
        "config": (plain, config_cases()),
    }
    for group, (source, changes) in groups.items():
        for number, (name, file, tensor, change) in enumerate(changes):
            place = folder / f"{group}-{number:03}-{name}"
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("manifest.json"))
            change(place)
            cases.append(Case(group, place.name, file, tensor))
    for name, data in gguf_cases():
        place = folder / f"gguf-{name}.gguf"
        place.write_bytes(data)
        cases.append(Case("gguf", place.name, place.name))
    for name, change in no_files("gguf.gguf"):
        place = folder / f"gguf-{name}"
        place.mkdir()
        (place / "gguf.gguf").touch()
        change(place)
        cases.append(Case("gguf", f"{place.name}/gguf.gguf", "gguf.gguf"))
    return cases


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a good safetensors file and the bytes behind it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """A safetensors file of any header, saying any length of it."""
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the parsed header of the weights."""

    def edit(folder: Path) -> None:
        header, data = header_of(folder / SINGLE)
        header = change(header) or header
        write_raw(folder / SINGLE, json.dumps(header).encode(), data)

    return edit


def edit_text(change: Callable[[bytes], bytes]) -> Change:
    """Change the text of the header of the weights."""

    def edit(folder: Path) -> None:
        header, data = header_of(folder / SINGLE)
        write_raw(folder / SINGLE, change(json.dumps(header).encode()), data)

    return edit


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of a file."""

    def edit(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return edit


def edit_json(name: str, **changes: Any) -> Change:
    """Change values of a JSON file; Python's writer also writes NaN and Infinity."""

    def edit(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def instead(name: str, make: Callable[[Path], object]) -> Change:
    """Something else in the place of a file."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def sparse(start: bytes) -> Callable[[Path], None]:
    """A file that claims a terabyte and takes a page."""

    def make(file: Path) -> None:
        file.write_bytes(start)
        os.truncate(file, SPARSE_BYTES)

    return make


def no_files(name: str) -> Iterator[tuple[str, Change]]:
    """What may stand where a file should."""
    yield "folder", instead(name, Path.mkdir)
    yield "pipe", instead(name, os.mkfifo)
    yield "link-out", instead(name, lambda file: file.symlink_to("/etc/passwd"))
    yield "link-up", instead(name, lambda file: file.symlink_to(f"../../{name}"))
    yield "link-to-device", instead(name, lambda file: file.symlink_to("/dev/zero"))
    yield "link-to-itself", instead(name, lambda file: file.symlink_to(file.name))
    yield "link-to-nothing", instead(name, lambda file: file.symlink_to("nothing"))
    yield "empty", instead(name, Path.touch)


def no_json(name: str) -> Iterator[tuple[str, Change]]:
    """Texts that are no JSON object, or that take more to read than they should."""
    texts: dict[str, bytes] = {
        "list": b"[1]",
        "text": b'"a"',
        "null": b"null",
        "words": b"to be or not",
        "nan": b'{"a": NaN}',
        "infinity": b'{"a": [-Infinity]}',
        "deep-lists": b'{"a":' + b"[" * DEEP,
        "deep-objects": b'{"a":' * DEEP,
        "deep-whole": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
        "key-twice": b'{"a": 1, "a": 2}',
        "key-twice-inside": b'{"a": {"b": 1, "b": 2}}',
        "not-utf8": b'{"a": "\xff\xfe"}',
        "utf16": '{"a": 1}'.encode("utf-16"),
        "zero-byte": b'{"a": 1}\0',
        "two": b'{"a": 1}{"a": 1}',
        "long-number": b'{"a": ' + b"9" * 10_000 + b"}",
        "many-values": b'{"a": [' + b"0," * 3_000_000 + b"0]}",
        "many-objects": b'{"a": [' + b"{}," * 2_000_000 + b"0]}",
        "cut": b'{"a": {"b": 1',
    }
    for kind, text in texts.items():
        yield kind, lambda folder, text=text: (folder / name).write_bytes(text)  # type: ignore[misc]


def entry_cases() -> Iterator[tuple[str, str, str, Change]]:
    """One tensor whose entry in the header lies."""
    huge = 10**30
    shapes: list[Any] = [
        [2**62, 2**62],
        [2**63, 1],
        [huge, 0],
        [2**32, 2**32, 2**32],
        [-5, -8],
        [-1],
        [5.0, 8],
        ["5", 8],
        [True, 40],
        [None],
        [[5, 8]],
        [1] * 100_000,
        [5, 8] * 5,
        None,
        40,
        "5x8",
        {},
        [5, 9],
        [8, 5],
        [40],
        [],
        [0, 8],
    ]
    types = [
        "F64",
        "F16",
        "I32",
        "U8",
        "BOOL",
        "F8_E4M3",
        "F4",
        "f32",
        "",
        "Q4_0",
        "x" * 100_000,
        5,
        None,
        ["F32"],
        "\x1b[2J",
    ]
    offsets: list[Any] = [
        [0, 160],
        [4, 164],
        [160, 0],
        [-160, 0],
        [0, 2**63],
        [2**63, 2**63 + 160],
        [2**64 - 80, 80],
        [huge, huge + 160],
        [0.0, 160.0],
        ["0", "160"],
        [0],
        [0, 160, 320],
        [],
        None,
        [0, 0],
        [False, True],
        [[0], [160]],
        "0-160",
    ]
    for key, values in (("shape", shapes), ("dtype", types), ("data_offsets", offsets)):
        for value in values:
            yield key, SINGLE, TENSOR, edit_header(lambda h, k=key, v=value: h[TENSOR].update({k: v}))  # type: ignore[misc]
    whole: list[Any] = [None, [], "F32", 7, {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [5, 8]}]
    for value in whole:
        yield "entry", SINGLE, TENSOR, edit_header(lambda h, v=value: h.update({TENSOR: v}))  # type: ignore[misc]
    yield "more", SINGLE, TENSOR, edit_header(lambda h: h[TENSOR].update(code="import os"))
    yield "overlap", SINGLE, "", edit_header(swap_offsets)
    yield "gone", "", TENSOR, edit_header(lambda h: h.pop(TENSOR) and empty_instead(h))
    yield "upper", "", TENSOR, edit_header(lambda h: h.update({TENSOR.upper(): h.pop(TENSOR)}))
    yield "spaced", "", TENSOR, edit_header(lambda h: h.update({TENSOR + " ": h.pop(TENSOR)}))


def swap_offsets(header: dict[str, Any]) -> None:
    """Two tensors in the same bytes."""
    other = TENSOR.replace("experts.2", "experts.1")
    header[other]["data_offsets"] = header[TENSOR]["data_offsets"]


def empty_instead(header: dict[str, Any]) -> None:
    """Keep the bytes covered by another name."""
    names = [name for name in header if name != "__metadata__"]
    ends = sorted(header[name]["data_offsets"] for name in names)
    free = next((one[1], two[0]) for one, two in zip([[0, 0], *ends], ends, strict=False) if one[1] != two[0])
    header["other"] = {"dtype": "U8", "shape": [free[1] - free[0]], "data_offsets": [*free]}


def header_cases() -> Iterator[tuple[str, str, str, Change]]:
    """Weights whose file or header as a whole is wrong."""
    for kind, change in no_files(SINGLE):
        yield kind, SINGLE, "", change
    for kind, change in no_json("header"):

        def edit(folder: Path, change: Change = change) -> None:
            change(folder)
            _, data = header_of(folder / SINGLE)
            write_raw(folder / SINGLE, (folder / "header").read_bytes(), data)
            (folder / "header").unlink()

        yield kind, SINGLE, "", edit
    for size in (1, 7, 8, 9, 200):
        yield f"cut-{size}", SINGLE, "", edit_bytes(SINGLE, lambda data, size=size: data[:size])  # type: ignore[misc]
    for name, cut in (("half", lambda n: n // 2), ("last", lambda n: n - 1), ("four", lambda n: n - 4)):
        yield f"cut-{name}", SINGLE, "", edit_bytes(SINGLE, lambda data, cut=cut: data[: cut(len(data))])  # type: ignore[misc]
    for length in (0, 1, 2, 2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8):
        said = struct.pack("<Q", length)
        yield f"length-{length}", SINGLE, "", edit_bytes(SINGLE, lambda data, said=said: said + data[8:])  # type: ignore[misc]
    for more in (b"\0", b"x" * 100_000):
        yield "more", SINGLE, "", edit_bytes(SINGLE, lambda data, more=more: data + more)  # type: ignore[misc]
    for length in (2**39, 60 << 20, 16 << 20):
        yield "sparse", SINGLE, "", instead(SINGLE, sparse(struct.pack("<Q", length) + b"{"))
    yield "sparse-end", SINGLE, "", lambda folder: os.truncate(folder / SINGLE, SPARSE_BYTES)
    yield "byte-order", SINGLE, "", edit_bytes(SINGLE, lambda data: data[7::-1] + data[8:])
    yield "other-format", SINGLE, "", edit_bytes(SINGLE, lambda data: b"PK\3\4" + data)
    yield "pickle", SINGLE, "", lambda folder: (folder / SINGLE).write_bytes(PICKLE)
    yield "tensor-twice", SINGLE, TENSOR, edit_text(twice)
    yield "many", SINGLE, "", edit_text(many)
    yield "long-name", "", "", edit_header(lambda h: h.update({"x" * 1_000_000: h.pop(TENSOR)}))
    yield "control-name", "", TENSOR, edit_header(lambda h: h.update({"\x1b[2J\n": h.pop(TENSOR)}))
    yield "only-pickle", SINGLE, "", only_pickle


# Calls os.system("touch executed") when unpickled.
PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."


def only_pickle(folder: Path) -> None:
    """A checkpoint as torch wrote it before safetensors."""
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


def twice(header: bytes) -> bytes:
    """A tensor with two entries, of which a reader may take either."""
    entry = json.dumps(json.loads(header)[TENSOR])
    return header[:-1] + f', "{TENSOR}": {entry}}}'.encode()


def many(header: bytes) -> bytes:
    """Far more tensors than a file has bytes for."""
    rows = ", ".join(
        f'"t{n}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}' for n in range(250_000)
    )
    return header[:-1] + f", {rows}}}".encode()


def index_cases(sharded: Path) -> Iterator[tuple[str, str, str, Change]]:
    """Shards whose index lies."""
    where = json.loads((sharded / INDEX).read_text())["weight_map"]
    first = where[TENSOR]
    other = next(file for file in where.values() if file != first)
    places: list[Any] = [
        f"../{first}",
        f"./{first}",
        f"x/../{first}",
        f"{first}/",
        f"..\\{first}",
        f"{first}\0",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/mem",
        "..",
        ".",
        "",
        "~/x.safetensors",
        "file:///etc/passwd",
        "gone.safetensors",
        "x" * 300,
        "config.json",
        INDEX,
        other,
    ]
    for place in places:
        file = "" if isinstance(place, str) and ("\0" in place or len(place) > 200) else place
        yield "place", file.replace("\\", "\\\\"), "", edit_json(INDEX, weight_map={**where, TENSOR: place})
    yield "inside-a-file", "config.json", "", edit_json(INDEX, weight_map={**where, TENSOR: "config.json/x"})
    for place in (None, 3, ["x"], {"a": "b"}, True, 1.5):
        yield "no-place", INDEX, "", edit_json(INDEX, weight_map={**where, TENSOR: place})
    for wrong in (None, [], "x", 7, [first] * 50, {}):
        yield "no-map", "", "", edit_json(INDEX, weight_map=wrong)
    for kind, change in no_json(INDEX):
        yield kind, INDEX, "", change
    for kind, change in no_files(INDEX):
        yield kind, INDEX, "", change
    for kind, change in no_files(first):
        yield f"shard-{kind}", first, "", change
    less = {name: file for name, file in where.items() if name != TENSOR}
    yield "less", first, TENSOR, edit_json(INDEX, weight_map=less)
    yield "more", first, "lm_head.bias", edit_json(INDEX, weight_map={**where, "lm_head.bias": first})
    yield "many-files", "", "", edit_json(INDEX, weight_map={f"t{n}": f"f{n}" for n in range(100_000)})
    yield "twins", SINGLE, "", lambda folder: shutil.copy(folder / first, folder / SINGLE)
    yield "shard-gone", first, "", lambda folder: (folder / first).unlink()
    yield "shard-of-other", other, "", lambda folder: shutil.copy(folder / first, folder / other)
    yield "shard-sparse", first, "", lambda folder: os.truncate(folder / first, SPARSE_BYTES)
    yield "shard-cut", first, "", edit_bytes(first, lambda data: data[:-8])


def config_cases() -> Iterator[tuple[str, str, str, Change]]:
    """A `config.json` that describes no model, or another one."""
    for kind, change in no_json("config.json"):
        yield kind, "config.json", "", change
    for kind, change in no_files("config.json"):
        yield kind, "config.json", "", change
    yield "gone", "config.json", "", lambda folder: (folder / "config.json").unlink()
    yield "sparse", "config.json", "", instead("config.json", sparse(b"{"))
    values: dict[str, list[Any]] = {
        "num_hidden_layers": [10**9, 10**18, 0, -1, 2.5, "2", None, [2], True],
        "hidden_size": [10**30, 0, -8, "x", 1e300],
        "vocab_size": [10**12, 0, -19],
        "num_local_experts": [10**9, 0, -3, "3"],
        "num_experts_per_tok": [4, 0, -1, 10**9],
        "num_attention_heads": [0, 3, -2, 10**9],
        "num_key_value_heads": [3, 0],
        "head_dim": [0, -6, 10**9, 5],
        "intermediate_size": [10**12, 0, 6],
        "rms_norm_eps": [-1, float("nan"), float("inf"), "small"],
        "rope_theta": [0, -1, "10000", [1]],
        "max_position_embeddings": [0, -1, "many"],
        "hidden_act": ["exec", 5, ["silu"]],
        "model_type": ["gpt2", "", None, 5, ["mixtral"], "../mixtral", "x" * 10_000],
        "tie_word_embeddings": ["yes", True],
        "sliding_window": [-1, "4096"],
        "rope_scaling": [{"type": "yarn"}, "yarn", 7, {"rope_type": "linear", "factor": "x"}],
        "quantization_config": [{"quant_method": "gptq"}, "fp8", [], {"quant_method": {}}, 8],
        "no_such_key": [1],
    }
    for key, wrong in values.items():
        for value in wrong:
            yield key, "", "", edit_json("config.json", **{key: value})


def main() -> int:
    """Write the cases into the folder that is named, from models made for it."""
    import torch

    from tests.hostile.models import write_models

    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    torch.manual_seed(0)
    random.seed(0)
    folder = Path(sys.argv[1])
    cases = write_all(folder / "cases", *write_models(folder / "good"))
    print(f"{len(cases)} cases in {folder / 'cases'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
