"""The order of tiles, byte by byte, and the way back."""

from __future__ import annotations

import struct

import pytest
import torch

from moiety.errors import FormatError
from moiety.formats import FORMATS, Format
from moiety.formats.numbers import dequantize, quantize
from moiety.formats.tiles import ROWS, PackedWeight, codes_of, pack, pack_codes, shape_of, tile_bytes, unpack

# (shape, interleaved): edges in rows and columns, one matrix and several
CASES = (
    ((16, 32), False),
    ((1, 1), False),
    ((17, 33), False),
    ((3, 40, 130), False),
    ((2, 6, 31), True),
    ((34, 64), True),
    ((2, 64, 128), True),
    ((0, 16, 32), False),
)


def place_of(row: int, rows: int, interleaved: bool) -> tuple[int, int]:
    """Row block and row in it."""
    if not interleaved:
        return row // ROWS, row % ROWS
    half, inside = divmod(row, rows // 2)
    return 2 * (inside // ROWS) + half, inside % ROWS


def code_at(tile: bytes, form: Format, row: int, column: int) -> float:
    """A code of a tile, from the words in the docstring of `tiles`."""
    if form.kind == "float32":
        return float(struct.unpack_from("<f", tile, 64 * column + 4 * row)[0])
    if form.kind == "bfloat16":
        (high,) = struct.unpack_from("<H", tile, 64 * (column // 2) + 2 * (2 * row + column % 2))
        return float(struct.unpack("<f", struct.pack("<I", high << 16))[0])
    if form.bits == 8:
        return tile[64 * (column // 4) + 4 * row + column % 4]
    half, inside = divmod(column, form.group // 2)
    byte = tile[64 * (inside // 4) + 4 * row + inside % 4]
    return byte >> 4 if half else byte & 15


@pytest.mark.parametrize(("shape", "interleaved"), CASES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back(name: str, shape: tuple[int, ...], interleaved: bool) -> None:
    form, weight = FORMATS[name], torch.randn(shape)
    codes = quantize(weight, form)
    packed = pack_codes(codes, form, interleaved=interleaved)
    stack = shape if len(shape) == 3 else (1, *shape)
    assert (packed.experts, packed.rows, packed.columns) == stack
    assert packed.size_bytes == packed.tiles.numel()
    for part, back in zip(codes, codes_of(packed), strict=True):
        assert (part is None) == (back is None)
        assert part is None or back is None or torch.equal(part.view(back.shape), back)
    assert torch.equal(unpack(packed), dequantize(codes, form).view(stack))
    assert torch.equal(pack(weight, form, interleaved=interleaved).tiles, packed.tiles)


@pytest.mark.parametrize(("shape", "interleaved"), [((2, 40, 130), False), ((2, 36, 70), True)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_where_the_layout_says(name: str, shape: tuple[int, int, int], interleaved: bool) -> None:
    form = FORMATS[name]
    codes = quantize(torch.randn(shape), form)
    tiles = pack_codes(codes, form, interleaved=interleaved).tiles
    size = tile_bytes(form)
    assert (
        tiles.shape[3] == size == ROWS * (form.group * form.bits + form.scale_bits + 16 * form.minimum) // 8
    )
    scales = ROWS * form.group * form.bits // 8
    for row in range(0, shape[1], 5):
        for column in range(0, shape[2], 7):
            block, inside = place_of(row, shape[1], interleaved)
            tile = bytes(tiles[1, block, column // form.group].tolist())
            assert code_at(tile, form, inside, column % form.group) == float(codes.code[1, row, column])
            group = column // form.group
            if form.scale_bits == 8:
                assert codes.scale is not None and tile[scales + inside] == int(codes.scale[1, row, group])
            elif form.scale_bits:
                (scale,) = struct.unpack_from("<e", tile, scales + 2 * inside)
                assert codes.scale is not None and scale == float(codes.scale[1, row, group])
            if codes.minimum is not None:
                (low,) = struct.unpack_from("<e", tile, scales + 2 * ROWS + 2 * inside)
                assert low == float(codes.minimum[1, row, group])


def test_what_cannot_be_packed() -> None:
    form = FORMATS["int4-g32"]
    for shape, interleaved in (((4,), False), ((1, 2, 3, 4), False), ((5, 32), True)):
        with pytest.raises(FormatError, match="cannot be packed"):
            pack(torch.zeros(shape), form, interleaved=interleaved)
    sizes = {"experts": 2, "rows": 20, "columns": 40}
    shape = shape_of(form, **sizes, interleaved=False)
    assert shape == (2, 2, 2, 288)
    for tiles in (torch.zeros(2, 2, 2, 287, dtype=torch.uint8), torch.zeros(shape)):
        with pytest.raises(FormatError, match="allowed is uint8"):
            PackedWeight(form=form, **sizes, interleaved=False, tiles=tiles)
