"""Models in GGUF files, which llama.cpp and what is built on it read: in, whatever their quantisation, and out.

Tensors come in and go out a piece at a time; a file takes its name when it is whole.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moiety import cost, storage
from moiety.config import ModelConfig
from moiety.errors import UsageError
from moiety.formats import FORMATS
from moiety.formats.numbers import Codes
from moiety.formats.tiles import PackedWeight, pack_codes
from moiety.model.gguf import header, metadata, names, tensors, vocabulary
from moiety.model.gguf.header import GGUFFile, StoredTensor, TensorType
from moiety.model.gguf.names import Architecture, Link
from moiety.model.parts import Parts, hollow, shapes_of
from moiety.model.slots import install_stored, slots
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer

__all__ = [
    "KINDS",
    "load_config",
    "load_gguf",
    "open_gguf",
    "read_chat_template",
    "read_ends",
    "read_special_tokens",
    "read_tokenizer",
    "save_gguf",
]

# Of a kind of file: its number, the type of its matrices, and the type of its embedding and head.
KINDS: Mapping[str, tuple[int, str, str]] = {
    "f32": (0, "F32", "F32"),
    "f16": (1, "F16", "F16"),
    "bf16": (32, "BF16", "BF16"),
    "q8_0": (7, "Q8_0", "Q8_0"),
    "q4_0": (2, "Q4_0", "Q8_0"),
}
QUANTISATION_VERSION = 2
LAYER = re.compile(r"blk\.(\d{1,6})\.")
Shapes = dict[str, tuple[int, ...]]
# What stays float32 although it is a matrix: small, and it decides where tokens go.
ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def load_gguf(
    path: str | Path, dtype: torch.dtype | None = None, backend: str = "auto", packed: bool = False
) -> Transformer:
    """Read a model from a GGUF file; it comes in evaluation mode.

    Args:
        path: The file; of a split one its first part.
        dtype: Of the weights in memory; None is float32 for quantised files, else what the matrices are stored as.
            A selection bias is float32.
        backend: Who multiplies the experts; see `moiety.backends`.
        packed: Keep blocks of the types in `tensors.BLOCKS` as they are; other quantised tensors are decoded.

    Raises:
        FormatError: not a GGUF file, cut, of an unknown architecture, or tensors missing, left over or misshapen.
        ConfigError: a model that this program does not compute.
        DependencyError: quantised, and the package gguf is not installed.
        StorageError: the system refused to read.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"weights cannot be {dtype}", hint="use a floating point dtype")
    file = header.read_file(path)
    row, config = metadata.read_config(file)
    _check_sizes(file, config)
    with torch.device("meta"):  # shapes alone: the weights come from the file
        model = Transformer(config, backend=backend, initialize=False)
    shapes, links = _linked(file, row, model)
    stored = dict(_blocks(file, config, links, model)) if packed else {}
    parts = _parts(file, config, shapes, links, dtype)
    filled = {name: parts.read(name) for name in shapes if name not in stored}
    model.load_state_dict(filled, assign=True, strict=not packed)
    if packed:
        install_stored(model, stored)
    return model.eval()


def open_gguf(path: str | Path) -> Parts:
    """A GGUF file opened without reading its weights, which stays mapped; errors as of `load_gguf`."""
    file = header.read_file(path)
    row, config = metadata.read_config(file)
    _check_sizes(file, config)
    return _parts(file, config, *_linked(file, row, hollow(config)), None)


def _linked(file: GGUFFile, row: Architecture, model: Transformer) -> tuple[Shapes, list[Link]]:
    """The shapes of our tensors and where theirs lie in them, all checked."""
    shapes = shapes_of(model)
    links = list(names.links(model.config, row, shapes, frozenset(file.tensors)))
    _check(file, model.config, links, model.state_dict())
    return shapes, links


def _parts(
    file: GGUFFile, config: ModelConfig, shapes: Shapes, links: list[Link], dtype: torch.dtype | None
) -> Parts:
    kind = dtype or _stored_dtype(file, links)
    dtypes = {name: torch.float32 if name.endswith("selection_bias") else kind for name in shapes}
    mine: dict[str, list[Link]] = {name: [] for name in shapes}
    for link in links:
        mine[link.ours].append(link)

    def read(name: str) -> Tensor:
        tensor = torch.empty(shapes[name], dtype=dtypes[name])
        for link in mine[name]:
            tensors.decode_into(tensors.view(tensor, link, config.attention.mla), file.tensors[link.theirs])
        return tensor

    return Parts(config=config, dtypes=dtypes, read=read)


def _blocks(
    file: GGUFFile, config: ModelConfig, links: list[Link], model: Transformer
) -> Iterator[tuple[str, PackedWeight]]:
    """What is stored in blocks that can be multiplied with, by our parameter; rows move, a row's blocks do not."""
    for slot in (slot for group in slots(model).values() for slot in group):
        ours = slot.parameter if slot.parameter in model.state_dict() else "embed.weight"
        mine = [link for link in links if link.ours == ours]
        kinds = {file.tensors[link.theirs].type.name for link in mine}
        if len(kinds) != 1 or not kinds <= tensors.BLOCKS.keys():
            continue
        form = FORMATS[tensors.BLOCKS[kinds.pop()]]
        shape = model.get_parameter(ours).shape
        groups = (*shape[:-1], shape[-1] // form.group)
        whole = Codes(
            torch.empty(shape, dtype=torch.uint8),
            torch.empty(groups, dtype=torch.float16),
            torch.empty(groups, dtype=torch.float16) if form.minimum else None,
        )
        for link in mine:
            for target, part in zip(whole, tensors.codes_of(file.tensors[link.theirs]), strict=True):
                if target is not None and part is not None:
                    view = tensors.view(target, link, config.attention.mla)
                    view.copy_(part.view(view.shape))
        yield slot.parameter, pack_codes(whole, form, interleaved=slot.interleaved)


def load_config(path: str | Path) -> ModelConfig:
    """The config of a model in a GGUF file, without its weights; errors as of `load_gguf`."""
    return metadata.read_config(header.read_file(path))[1]


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary inside a GGUF file.

    Raises:
        FormatError: not such a file, or its vocabulary is missing, damaged or of another kind.
    """
    return vocabulary.read(header.read_file(path))


def read_chat_template(path: str | Path) -> str | None:
    """The chat template inside a GGUF file, as text; None where there is none."""
    return vocabulary.chat_template(header.read_file(path))


def read_ends(path: str | Path) -> tuple[int, ...]:
    """The tokens of a GGUF file that end an answer besides its end token."""
    return vocabulary.ends(header.read_file(path))


def read_special_tokens(path: str | Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on of a GGUF file, those that it names."""
    return vocabulary.special_tokens(header.read_file(path))


def save_gguf(
    model: Transformer,
    path: str | Path,
    kind: str = "f16",
    tokenizer: Tokenizer | None = None,
    *,
    chat_template: str | None = None,
    name: str | None = None,
    ends: Sequence[int] = (),
) -> str:
    """Write a model as a GGUF file; one that is there is replaced in one step.

    Norms, biases and routers stay float32. In a quantised file a matrix whose rows are no multiple of 32 is float16.

    Args:
        model: What to write.
        path: The file.
        kind: Of the matrices: "f32", "f16", "bf16", "q8_0" or "q4_0" (embedding and head are then q8_0).
        tokenizer: Written into the file; None writes a file that takes and gives token numbers.
        chat_template: Written into the file.
        name: The model's name in the file; None takes the file's.
        ends: Tokens that end an answer besides the tokenizer's end token, at most two.

    Returns:
        The architecture it was written as.

    Raises:
        UsageError: no architecture expresses the model, or the tokenizer does not fit, or numbers beyond the kind.
        DependencyError: a quantised kind, and the package gguf is not installed.
        StorageError: the system refused; a file that was there still is.
    """
    if kind not in KINDS:
        raise UsageError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    state = model.state_dict()
    packed = [name for name in state if name.endswith(".tiles")]
    if packed:
        raise UsageError(
            f"{len(packed)} of the model's tensors are packed, {packed[0]} for one: GGUF is written from weights",
            hint="convert the model that it was packed from, with --kind q8_0 or q4_0 for fewer bits",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    row = metadata.architecture_for(model.config, shapes)
    title = Path(path).name.removesuffix(".gguf") if name is None else name
    values: dict[str, Any] = {
        "general.architecture": row.name,
        "general.type": "model",
        "general.name": title,
        "general.file_type": KINDS[kind][0],
        **metadata.write_config(model.config, row),
    }
    if kind.startswith("q"):
        values["general.quantization_version"] = QUANTISATION_VERSION
    values |= vocabulary.metadata(tokenizer, model.config.vocab_size, ends)
    if chat_template is not None:
        values["tokenizer.chat_template"] = chat_template
    entries = _entries(model.config, row, state, kind)
    needed_bytes = sum(entry.size_bytes + header.ALIGNMENT for entry in entries)
    with storage.new_file(path, needed_bytes=needed_bytes) as file:
        _write(file, values, entries)
    return row.name


class _Entry(NamedTuple):
    """A tensor to write: its name, its shape in the file, its type, and the part of ours that it is."""

    name: str
    shape: tuple[int, ...]
    number: int
    kind: TensorType
    part: Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.part.numel() // self.kind.block * self.kind.block_bytes


def _entries(config: ModelConfig, row: Architecture, state: Mapping[str, Tensor], kind: str) -> list[_Entry]:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parts: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for link in names.links(config, row, shapes):
        part = tensors.view(state[link.ours], link, config.attention.mla)
        parts[link.theirs] = (_shape(part, link), part)
    if row.own_output and "output.weight" not in parts:
        parts["output.weight"] = parts["token_embd.weight"]
    rope = config.attention.rope
    if rope is not None and rope.kind == "llama3":
        divisors = metadata.rope_divisors(rope, config.attention.rotary_dim, config.attention.rope_theta)
        parts[metadata.ROPE_FREQUENCIES] = (divisors.shape, torch.from_numpy(divisors))
    entries = []
    for name, (shape, part) in parts.items():
        wanted = KINDS[kind][2] if name in ("token_embd.weight", "output.weight") else KINDS[kind][1]
        if len(shape) == 1 or name.endswith(ROUTERS):
            wanted = "F32"
        elif shape[-1] % tensors.type_named(wanted)[1].block:
            wanted = "F16"
        entries.append(_Entry(name, shape, *tensors.type_named(wanted), part))
    return entries


def _shape(part: Tensor, link: Link) -> tuple[int, ...]:
    """The shape of a part in the file: heads whose rows are reordered are one axis there."""
    return (link.stop - link.start, *part.shape[3:]) if link.turned else tuple(part.shape)


def _check_sizes(file: GGUFFile, config: ModelConfig) -> None:
    """Refuse a config far beyond the tensors before anything is built by it."""
    stored = sum(tensor.elements for tensor in file.tensors.values())
    described = cost.parameters(config).total
    if described > 2 * stored + (1 << 20):
        raise file.error(
            "the metadata",
            f"describes {described:,} parameters, but {stored:,} are stored",
            "the file is cut or of another model",
        )


def _check(file: GGUFFile, config: ModelConfig, links: list[Link], state: Mapping[str, Tensor]) -> None:
    needed = {link.theirs for link in links}
    missing = sorted(needed - file.tensors.keys())
    if missing:
        raise file.error(_some(missing), "is missing", "the file is cut, split, or of another model")
    left = sorted(
        name
        for name in file.tensors.keys() - needed - {metadata.ROPE_FREQUENCIES}
        if not _predicts_further(file, config, name)
    )
    if left:
        raise file.error(_some(left), "is not part of such a model", "it may change what the model computes")
    for link in links:
        stored = file.tensors[link.theirs]
        shape = _shape(tensors.view(state[link.ours], link, config.attention.mla), link)
        if stored.shape != shape:
            raise file.error(
                f"tensor {stored.name}", f"has shape {stored.shape}; by the metadata it is {shape}"
            )


def _predicts_further(file: GGUFFile, config: ModelConfig, name: str) -> bool:
    """True for a tensor of the layers that predict further tokens, which a model is run without."""
    count = file.values.get(f"{file.values['general.architecture']}.nextn_predict_layers", 0)
    match = LAYER.match(name)
    return match is not None and config.layers <= int(match[1]) < config.layers + count


def _stored_dtype(file: GGUFFile, links: list[Link]) -> torch.dtype:
    """What the matrices are stored as, where all of them are the same plain type."""
    kinds = {file.tensors[link.theirs].type.name for link in links if _is_matrix(file.tensors[link.theirs])}
    return tensors.PLAIN[kinds.pop()] if len(kinds) == 1 and kinds <= {*tensors.PLAIN} else torch.float32


def _is_matrix(stored: StoredTensor) -> bool:
    return len(stored.shape) > 1 and not stored.name.endswith(ROUTERS)


def _some(names: list[str]) -> str:
    return "tensor " + ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _write(file: BinaryIO, values: Mapping[str, Any], entries: list[_Entry]) -> None:
    file.write(header.MAGIC + struct.pack("<IQQ", 3, len(entries), len(values)))
    for key, value in values.items():
        file.write(_text(key) + _value(value))
    at = 0
    for entry in entries:
        dimensions = struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape))
        place = struct.pack("<IQ", entry.number, at)
        file.write(_text(entry.name) + struct.pack("<I", len(entry.shape)) + dimensions + place)
        at += entry.size_bytes + -entry.size_bytes % header.ALIGNMENT
    for entry in entries:
        file.write(b"\0" * (-file.tell() % header.ALIGNMENT))
        before = file.tell()
        tensors.encode_to(file, entry.part, entry.kind, entry.name)
        assert file.tell() - before == entry.size_bytes, (entry.name, file.tell() - before, entry.size_bytes)
    file.write(b"\0" * (-file.tell() % header.ALIGNMENT))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """A value with its type before it: integers have 32 bits here, floats too."""
    if isinstance(value, bool):
        return struct.pack("<IB", header.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", header.STRING) + _text(value)
    if isinstance(value, np.ndarray):
        kind = {np.dtype(np.int32): 5, np.dtype(np.float32): 6}[value.dtype]
        return struct.pack("<IIQ", header.ARRAY, kind, len(value)) + value.tobytes()
    assert isinstance(value, list), value
    count = struct.pack("<IIQ", header.ARRAY, header.STRING, len(value))
    return count + b"".join(_text(text) for text in value)
