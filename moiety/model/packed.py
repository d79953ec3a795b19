"""Weights as a family knows them, whatever they are stored as: plain, or packed in eight or four bits.

`config.json` says in `quantization_config` how weights are packed. A packed weight is several tensors in the
files: fp8 adds `NAME_scale_inv` to NAME; mxfp4 has `NAME_blocks` and `NAME_scales` and no NAME.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moiety.errors import FormatError
from moiety.formats.numbers import Codes
from moiety.formats.stored import E8M0_NAN, MXFP4_BLOCK, dequantize_fp8, dequantize_mxfp4
from moiety.model.tensor_file import DTYPE_NAMES, Place, TensorFile, shown

__all__ = ["WEIGHT_DTYPES", "Packing", "Weight", "packing_of", "weights_of"]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKED_AS = torch.bfloat16  # what both formats were made from
SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
Unpack = Callable[[list[Tensor], torch.dtype], Tensor]
Stored = Mapping[str, TensorFile]


class Packing(NamedTuple):
    """How the weights of a checkpoint are packed; `block` is rows and columns under one fp8 scale.

    "moiety" are tiles, which `quantized` reads.
    """

    method: Literal["fp8", "mxfp4", "moiety"]
    block: tuple[int, int] = (128, 128)


class Weight(NamedTuple):
    """A weight to load: `names` are the stored tensors that make it up, each in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    files: tuple[TensorFile, ...]
    names: tuple[str, ...]
    unpack: Unpack | None = None

    @property
    def path(self) -> Path:
        """The file that holds its numbers."""
        return self.files[0].path

    def read(self) -> Tensor:
        """The weight in memory of its own.

        Raises:
            FormatError, StorageError: as `TensorFile.read`.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor

    def read_into(self, target: Tensor) -> None:
        """Fill a tensor that has the same elements in the same order, whatever its axes, strides and dtype.

        Raises:
            FormatError, StorageError: as `TensorFile.read`.
        """
        if self.unpack is None:
            self.files[0].read_into(self.names[0], target)
        elif len(self.shape) == 2:
            target.copy_(self._unpacked(None, target.dtype).reshape(target.shape))
        else:  # matrix by matrix
            for row, part in enumerate(target):
                part.copy_(self._unpacked(row, target.dtype).reshape(part.shape))

    @property
    def is_mxfp4(self) -> bool:
        """True for what `codes` can give."""
        return self.unpack is _unpack_mxfp4

    def codes(self) -> Codes:
        """The codes and scales of an mxfp4 weight as they stand, (..., outputs, inputs).

        Raises:
            FormatError: a scale that is no number; and as `TensorFile.read`.
        """
        assert self.is_mxfp4, self.names
        blocks, scales = (file.read(name) for file, name in zip(self.files, self.names, strict=True))
        if bool((scales == E8M0_NAN).any()):
            raise FormatError(f"{self.path}: tensor {shown(self.names[1])} has a scale that is not a number")
        pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1)
        return Codes(pairs.flatten(-3), scales)

    def _unpacked(self, row: int | None, dtype: torch.dtype) -> Tensor:
        assert self.unpack is not None, self
        parts = [file.read(name, row) for file, name in zip(self.files, self.names, strict=True)]
        return self.unpack(parts, dtype)


def packing_of(config: Mapping[str, Any]) -> Packing | None:
    """How a `config.json` says that weights are packed; None where they are not.

    Raises:
        FormatError: a way that this program does not know.
    """
    for key in ("quantization_config", "compression_config"):
        said = config.get(key)
        if said is None:
            continue
        method = said.get("quant_method") if isinstance(said, dict) else None
        if key == "quantization_config" and isinstance(said, dict):
            if method in ("mxfp4", "moiety"):
                return Packing(method)
            if method == "fp8" and said.get("fmt", "e4m3") == "e4m3":
                return Packing("fp8", _block(said.get("weight_block_size")))
        raise FormatError(
            f"config.json has {key} with quant_method {reprlib.repr(method or said)}; allowed is fp8 in e4m3, "
            "mxfp4, or moiety",
            hint="take the weights that were not quantized, or a GGUF",
        )
    return None


def _block(said: Any) -> tuple[int, int]:
    if isinstance(said, list) and len(said) == 2 and all(type(size) is int and size > 0 for size in said):
        return said[0], said[1]
    raise FormatError(
        f"config.json has weight_block_size {reprlib.repr(said)}; allowed is two positive whole numbers",
        hint="only fp8 weights with one scale per block are known",
    )


def weights_of(stored: Stored, packing: Packing | None) -> dict[str, Weight]:
    """The weights that stored tensors make up.

    Args:
        stored: Each tensor's file.
        packing: From `packing_of`.

    Raises:
        FormatError: a type that weights do not have, or scales that do not fit; file and tensor are named.
    """
    weights: dict[str, Weight] = {}
    for name, file in stored.items():
        place, whole = file.places[name], name
        if packing is not None and packing.method == "mxfp4" and name.endswith(BLOCKS):
            whole = name.removesuffix(BLOCKS)
            weight = _mxfp4(stored, name, whole + SCALES)
        elif packing is not None and packing.method == "fp8" and place.dtype == torch.float8_e4m3fn:
            weight = _fp8(stored, name, name + SCALE, packing.block)
        elif _is_companion(stored, name, packing):
            continue
        else:
            weight = Weight(place.shape, place.dtype, (file,), (name,))
        if whole in weights:
            raise FormatError(f"{file.path}: tensor {shown(whole)} is stored as it is and in blocks")
        weights[whole] = weight
    return weights


def _is_companion(stored: Stored, name: str, packing: Packing | None) -> bool:
    """True for scales whose weight is there."""
    if packing is None:
        return False
    if packing.method == "mxfp4":
        return name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in stored
    weight = name.removesuffix(SCALE)
    return weight != name and weight in stored and stored[weight].places[weight].dtype == torch.float8_e4m3fn


def _fp8(stored: Stored, name: str, scale: str, block: tuple[int, int]) -> Weight:
    place, scales = _place(stored, name), _companion(stored, name, scale)
    rows, columns = place.shape[-2:] if len(place.shape) >= 2 else (0, 0)
    _expect(stored, scale, (*place.shape[:-2], -(-rows // block[0]), -(-columns // block[1])))
    if not scales.dtype.is_floating_point:
        raise FormatError(f"{stored[scale].path}: tensor {shown(scale)} is {DTYPE_NAMES[scales.dtype]}")
    unpack = functools.partial(_unpack_fp8, block=block)
    return Weight(place.shape, PACKED_AS, (stored[name], stored[scale]), (name, scale), unpack)


def _mxfp4(stored: Stored, blocks: str, scales: str) -> Weight:
    place = _place(stored, blocks)
    shape = place.shape
    for name, one in ((blocks, place), (scales, _companion(stored, blocks, scales))):
        if one.dtype != torch.uint8:
            raise FormatError(
                f"{stored[name].path}: tensor {shown(name)} is {DTYPE_NAMES[one.dtype]}; allowed is U8"
            )
    if len(shape) < 3 or shape[-1] != MXFP4_BLOCK // 2:
        raise FormatError(
            f"{stored[blocks].path}: tensor {shown(blocks)} has shape {shape}; allowed is (..., rows, blocks, "
            f"{MXFP4_BLOCK // 2})"
        )
    _expect(stored, scales, shape[:-1])
    whole = (*shape[:-3], shape[-2] * MXFP4_BLOCK, shape[-3])
    return Weight(whole, PACKED_AS, (stored[blocks], stored[scales]), (blocks, scales), _unpack_mxfp4)


def _unpack_fp8(parts: list[Tensor], dtype: torch.dtype, *, block: tuple[int, int]) -> Tensor:
    return dequantize_fp8(parts[0], parts[1], block=block, dtype=dtype)


def _unpack_mxfp4(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """gpt-oss packs along the inputs, and names the weight as (..., inputs, outputs)."""
    return dequantize_mxfp4(parts[0], parts[1], dtype=dtype).transpose(-1, -2)


def _place(stored: Stored, name: str) -> Place:
    return stored[name].places[name]


def _companion(stored: Stored, weight: str, name: str) -> Place:
    if name not in stored:
        raise FormatError(
            f"{stored[weight].path}: tensor {shown(weight)} is packed, but there is no {shown(name)}",
            hint="a shard is missing, or the weights are packed in another way than config.json says",
        )
    return _place(stored, name)


def _expect(stored: Stored, name: str, shape: tuple[int, ...]) -> None:
    found = _place(stored, name).shape
    if found != shape:
        raise FormatError(
            f"{stored[name].path}: tensor {shown(name)} has shape {found}; by its weight it is {shape}"
        )
