"""Codes and scales in the order in which a processor multiplies them: the packed layout, one for all processors.

A tile is 16 rows by one group of columns, and holds everything that is needed to multiply with it:

- codes of 4 bits: for j = 0 .. group/8 - 1 64 bytes; byte 4 n + i has the code of row n, column 4 j + i in its low four
  bits and that of column group/2 + 4 j + i in its high four;
- codes of 8 bits: for j = 0 .. group/4 - 1 64 bytes; byte 4 n + i has row n, column 4 j + i;
- bfloat16: for j = 0 .. group/2 - 1 64 bytes; number 2 n + i has row n, column 2 j + i;
- float32: for j = 0 .. group - 1 64 bytes; number n has row n, column j;
- then the scales of the 16 rows, float16 or one byte each, then their float16 minimums, where the format has them.

Tiles of a row block follow each other by column group, row blocks by row, experts by number. Rows are padded to 16 and
columns to the group, with code 0, which meets only zeros. Where a matrix has two halves that meet in an activation
(gate and up), its row blocks alternate: 16 gate rows, the 16 up rows that belong to them, and so on.

An expert is the tiles of its projections, gate and up first, then zeros up to a multiple of 4096 bytes: one aligned
read brings it from a file, and it can stand in any slot of its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.errors import FormatError
from moiety.formats import Format
from moiety.formats.numbers import Codes, dequantize, quantize

__all__ = [
    "EXPERT_MULTIPLE",
    "ROWS",
    "PackedWeight",
    "Projection",
    "codes_of",
    "expert_bytes",
    "pack",
    "pack_codes",
    "projections_in",
    "shape_of",
    "tile_bytes",
    "unpack",
]

ROWS = 16
EXPERT_MULTIPLE = 4096  # bytes of an expert, and its place in a file: what direct reads ask for


def tile_bytes(form: Format) -> int:
    """Bytes of one tile."""
    return ROWS * (form.group * form.bits + form.scale_bits + 16 * form.minimum) // 8


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """A stack of matrices, packed.

    Args:
        form: What its numbers are.
        experts: E, 1 for a plain matrix.
        rows: Of one matrix, both halves of an interleaved one counted.
        columns: What is multiplied over.
        interleaved: The first and the second half of the rows alternate, block by block.
        tiles: uint8 (E, row blocks, groups, bytes of a tile); the matrices may lie apart, each one lies together.
    """

    form: Format
    experts: int
    rows: int
    columns: int
    interleaved: bool
    tiles: Tensor

    def __post_init__(self) -> None:
        sizes = {"experts": self.experts, "rows": self.rows, "columns": self.columns}
        shape = shape_of(self.form, **sizes, interleaved=self.interleaved)
        if tuple(self.tiles.shape) != shape or self.tiles.dtype != torch.uint8:
            raise FormatError(
                f"tiles of {self.experts} x {self.rows} x {self.columns} in {self.form.name} are {self.tiles.dtype} "
                f"{tuple(self.tiles.shape)}; allowed is uint8 {shape}"
            )

    @property
    def size_bytes(self) -> int:
        """Of the tiles."""
        return self.tiles.numel()


def shape_of(
    form: Format, *, experts: int, rows: int, columns: int, interleaved: bool
) -> tuple[int, int, int, int]:
    """The shape of a weight's tiles."""
    halves = 2 if interleaved else 1
    return experts, halves * -(-rows // halves // ROWS), -(-columns // form.group), tile_bytes(form)


class Projection(NamedTuple):
    """One projection of an expert as it is packed; fields as of `PackedWeight`."""

    form: Format
    rows: int
    columns: int
    interleaved: bool

    def shape(self, experts: int) -> tuple[int, int, int, int]:
        """Of the tiles of so many."""
        return shape_of(
            self.form, experts=experts, rows=self.rows, columns=self.columns, interleaved=self.interleaved
        )


def expert_bytes(projections: Sequence[Projection]) -> int:
    """Of one expert with these projections, and the zeros behind them."""
    needed = sum(math.prod(one.shape(1)) for one in projections)
    return -(-needed // EXPERT_MULTIPLE) * EXPERT_MULTIPLE


def projections_in(tiles: Tensor, projections: Sequence[Projection]) -> list[PackedWeight]:
    """Each projection of the experts in `tiles`, uint8 (E, at least `expert_bytes`), as a view of them."""
    found, at = [], 0
    for one in projections:
        shape = one.shape(len(tiles))
        size = math.prod(shape[1:])
        view = tiles[:, at : at + size].view(shape)
        found.append(PackedWeight(**one._asdict(), experts=len(tiles), tiles=view))
        at += size
    return found


def _into_blocks(values: Tensor, interleaved: bool, columns: int) -> Tensor:
    """(E, R, C) to (E, row blocks, 16, columns), rows interleaved and padded with zeros."""
    halves = values.unflatten(1, (2, -1)) if interleaved else values[:, None]
    padded = F.pad(halves, (0, columns - values.shape[2], 0, -halves.shape[2] % ROWS))
    blocks: Tensor = padded.unflatten(2, (-1, ROWS)).transpose(1, 2).flatten(1, 2)
    return blocks


def _from_blocks(blocks: Tensor, interleaved: bool, rows: int, columns: int) -> Tensor:
    """The opposite of `_into_blocks`."""
    halves: Tensor = blocks.unflatten(1, (-1, 2 if interleaved else 1)).transpose(1, 2).flatten(2, 3)
    return halves[:, :, : rows // halves.shape[1], :columns].flatten(1, 2).contiguous()


def pack(weight: Tensor, form: Format, *, interleaved: bool = False) -> PackedWeight:
    """Quantize and pack (R, C) or (E, R, C).

    Raises:
        FormatError: not a matrix or a stack, halves of unequal size, or weights that are not finite.
    """
    return pack_codes(quantize(weight, form), form, interleaved=interleaved)


def pack_codes(codes: Codes, form: Format, *, interleaved: bool = False) -> PackedWeight:
    """Pack what is quantized already; nothing is rounded again."""
    if codes.code.dim() not in (2, 3) or (interleaved and codes.code.shape[-2] % 2):
        raise FormatError(
            f"weights of shape {tuple(codes.code.shape)} cannot be packed; allowed is (rows, columns) or "
            f"(experts, rows, columns){', with an even number of rows' if interleaved else ''}"
        )
    if codes.code.dim() == 2:
        scale, minimum = (None if part is None else part[None] for part in codes[1:])
        codes = Codes(codes.code[None], scale, minimum)
    experts, rows, columns = codes.code.shape
    groups = -(-columns // form.group)
    blocks = _into_blocks(codes.code, interleaved, groups * form.group)
    parts = [_codes_to_bytes(blocks.unflatten(3, (groups, form.group)).transpose(2, 3), form)]
    for extra in (codes.scale, codes.minimum):
        if extra is not None:
            by_group = _into_blocks(extra, interleaved, groups).transpose(2, 3)
            parts.append(by_group.contiguous().view(torch.uint8))
    return PackedWeight(
        form=form,
        experts=experts,
        rows=rows,
        columns=columns,
        interleaved=interleaved,
        tiles=torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0],
    )


def _codes_to_bytes(tile: Tensor, form: Format) -> Tensor:
    """Codes (..., 16, group) to the bytes of their tiles."""
    if form.bits == 4:
        low, high = tile[..., : form.group // 2], tile[..., form.group // 2 :]
        tile = low | high << 4
    numbers = max(4 * 8 // max(form.bits, 8), 1)  # of a row in one 64-byte line
    lines: Tensor = tile.unflatten(-1, (-1, numbers)).transpose(-3, -2)
    return lines.contiguous().view(torch.uint8).flatten(-3)


def codes_of(packed: PackedWeight) -> Codes:
    """The codes and scales that were packed, (E, R, C) and (E, R, groups)."""
    form, tiles = packed.form, packed.tiles
    code_bytes = ROWS * form.group * form.bits // 8
    scale_end = code_bytes + ROWS * form.scale_bits // 8
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(form.kind, torch.uint8)
    lines = tiles[..., :code_bytes].contiguous().view(dtype)
    numbers = max(4 * 8 // max(form.bits, 8), 1)
    tile = lines.unflatten(-1, (-1, ROWS, numbers)).transpose(-3, -2).flatten(-2)
    if form.bits == 4:
        tile = torch.cat([tile & 15, tile >> 4], dim=-1)
    blocks = tile.transpose(2, 3).flatten(3)
    code = _from_blocks(blocks, packed.interleaved, packed.rows, packed.columns)
    groups = tiles.shape[2]
    extras: list[Tensor | None] = [None, None]
    for number, (start, stop, present) in enumerate(
        ((code_bytes, scale_end, form.scale_bits), (scale_end, tiles.shape[3], form.minimum))
    ):
        if present:
            raw = tiles[..., start:stop].contiguous()
            values = raw if number == 0 and form.scale_bits == 8 else raw.view(torch.float16)
            extras[number] = _from_blocks(values.transpose(2, 3), packed.interleaved, packed.rows, groups)
    return Codes(code, *extras)


def unpack(packed: PackedWeight) -> Tensor:
    """The weights that are meant, (E, R, C) float32."""
    return dequantize(codes_of(packed), packed.form)
