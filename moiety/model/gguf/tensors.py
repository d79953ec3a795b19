"""Numbers of GGUF files: decoded into our tensors and encoded out of them, a piece of a tensor at a time.

Quantised blocks are decoded and encoded by the `gguf` package, which is imported when one turns up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from moiety.config import MLAConfig
from moiety.errors import FormatError, UsageError
from moiety.formats.numbers import Codes
from moiety.model.gguf.header import TYPES, StoredTensor, TensorType
from moiety.model.gguf.names import Link
from moiety.packages import need

__all__ = ["BLOCKS", "codes_of", "decode_into", "encode_to", "type_named", "view"]

CHUNK_ELEMENTS = 1 << 17  # float32 of this many fit the cache, which makes decoding twice as fast
SCALED_MAX = 65504 * 8  # of Q4_0, whose float16 scale is an eighth of the largest number
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUMBERS = {type_.name: number for number, type_ in TYPES.items()}
# Types whose blocks are groups of a packed format.
BLOCKS = {"Q4_0": "int4-g32", "Q4_1": "int4-g32-asym", "Q8_0": "int8-g32"}
# What `gguf` decodes: 8-bit types for sums within a product, and integers, never hold weights.
DECODED = frozenset(NUMBERS) - {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64"}


def type_named(name: str) -> tuple[int, TensorType]:
    """A tensor type and its number in files."""
    return NUMBERS[name], TYPES[NUMBERS[name]]


def view(ours: Tensor, link: Link, mla: MLAConfig | None) -> Tensor:
    """The part of our tensor that a link is: the same memory, in the order in which the file has it.

    A reordered tensor comes as (heads, half, 2, ...); its shape in the file is the same numbers in fewer axes.
    """
    if link.part == "row":
        return ours[0]
    if link.part:
        assert mla is not None, link
        heads = ours.view(-1, mla.nope_dim + mla.value_dim, ours.shape[1])
        return heads[:, : mla.nope_dim].transpose(1, 2) if link.part == "key" else heads[:, mla.nope_dim :]
    if link.stacked:
        return ours[:, link.start : link.stop]
    part = ours[link.start : link.stop] if link.expert is None else ours[link.expert, link.start : link.stop]
    if link.turned:
        return part.view(link.turned, 2, -1, *part.shape[1:]).transpose(1, 2)
    return part


def decode_into(target: Tensor, stored: StoredTensor) -> None:
    """Fill a tensor of ours with a stored one of as many elements, in the stored order.

    Raises:
        FormatError: a type that holds no weights.
        DependencyError: a quantised type, and `gguf` is not installed.
    """
    if stored.type.name not in DECODED:
        raise FormatError(
            f"{stored.file}: tensor {stored.name} is {stored.type.name}, which does not hold weights",
            hint=f"read are {', '.join(sorted(DECODED))}",
        )
    assert target.numel() == stored.elements, (stored.name, target.shape, stored.shape)
    at = 0
    for piece in _pieces(target):
        count = piece.numel()
        piece.copy_(_decoded(stored, at, at + count).view(piece.shape))
        at += count


def codes_of(stored: StoredTensor) -> Codes:
    """The codes and scales of a stored matrix or stack as they stand, in the format of `BLOCKS`.

    Raises:
        FormatError: a scale that is no number.
    """
    kind, shape = stored.type, stored.shape
    block = torch.from_numpy(np.frombuffer(stored.raw, dtype=np.uint8).copy()).view(-1, kind.block_bytes)
    heads = 2 if kind.name == "Q4_1" else 1
    head = block[:, : 2 * heads].contiguous().view(torch.float16)
    if not bool(head.isfinite().all()):
        raise FormatError(f"{stored.file}: tensor {stored.name} has a scale that is not finite")
    code = block[:, 2 * heads :]
    code = code ^ 128 if kind.name == "Q8_0" else torch.cat([code & 15, code >> 4], dim=1)
    scale, minimum = (head[:, part].reshape(*shape[:-1], -1) for part in (0, heads - 1))
    return Codes(code.reshape(shape), scale, minimum if heads == 2 else None)


def encode_to(file: BinaryIO, source: Tensor, kind: TensorType, name: str) -> None:
    """Append a tensor's numbers to a file.

    Raises:
        UsageError: numbers that the type cannot hold.
        DependencyError: a quantised type, and `gguf` is not installed.
    """
    for piece in _pieces(source):
        flat = piece.detach().to("cpu", torch.float32).contiguous().view(-1)
        plain = PLAIN.get(kind.name)
        data = flat if plain is None else flat.to(plain)
        if bool((data.isinf() & flat.isfinite()).any()) or (plain is None and not _fits_a_scale(flat)):
            raise UsageError(
                f"{name} holds numbers up to {flat.abs().max().item():.4g}, beyond what {kind.name} can",
                hint="use kind 'bf16' or 'f32'",
            )
        if plain is None:
            file.write(_quants().quantize(data.numpy()[None], _gguf_type(kind.name)).tobytes())
        else:
            file.write(data.view(torch.uint8).numpy().data)


def _fits_a_scale(flat: Tensor) -> bool:
    """False also where a number is none."""
    return float(flat.abs().max()) <= SCALED_MAX


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Consecutive parts of a tensor, of about a chunk each; a part is never less than a row."""
    if tensor.dim() == 0:
        yield tensor
    elif tensor.dim() > 2 and tensor[0].numel() > CHUNK_ELEMENTS:
        for part in tensor:
            yield from _pieces(part)
    else:
        step = len(tensor) if tensor.dim() == 1 else max(1, CHUNK_ELEMENTS // max(1, tensor[0].numel()))
        for start in range(0, len(tensor), step):
            yield tensor[start : start + step]


def _decoded(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Elements of a stored tensor, flat; `start` and `stop` are at the edges of blocks."""
    block, block_bytes = stored.type.block, stored.type.block_bytes
    assert start % block == 0 and stop % block == 0, (stored.name, start, stop, block)
    place = slice(start // block * block_bytes, stop // block * block_bytes)
    taken = np.frombuffer(stored.raw[place], dtype=np.uint8).copy()
    if stored.type.name in PLAIN:
        return torch.from_numpy(taken).view(PLAIN[stored.type.name])
    with np.errstate(all="ignore"):  # scales of damaged files overflow; the numbers say so themselves
        decoded = _quants().dequantize(taken[None], _gguf_type(stored.type.name))
    return torch.from_numpy(np.ascontiguousarray(decoded[0]))


def _quants() -> Any:
    return need("gguf", "a quantised GGUF tensor", "moiety[gguf]").quants


def _gguf_type(name: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[name]
