"""Packed weights against their definitions written out number by number, and against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moiety.errors import FormatError
from moiety.formats.stored import FP4_VALUES, dequantize_fp8, dequantize_mxfp4, quantize_fp8, quantize_mxfp4

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "shape", [(128, 128), (130, 300), (1, 1), (7, 129), (3, 5, 260), (2, 3, 4, 4), (0, 4)]
)
@pytest.mark.parametrize("block", [(128, 128), (3, 2), (1, 128)])
def test_fp8_is_number_times_scale_of_its_block(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    packed = torch.randn(shape).mul(50).to(FP8)
    grid = (math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))
    scale = torch.rand(*shape[:-2], *grid) + 0.01
    found = dequantize_fp8(packed, scale, block=block, dtype=torch.float32)
    of_row, of_column = torch.arange(shape[-2]) // block[0], torch.arange(shape[-1]) // block[1]
    wanted = packed.float() * scale[..., of_row, :][..., of_column]
    assert torch.equal(found, wanted)
    assert torch.equal(dequantize_fp8(packed, scale, block=block), wanted.bfloat16())


def test_fp8_there_and_back() -> None:
    weight = torch.randn(3, 200, 130) * torch.logspace(-6, 3, 130)
    weight[1] = 0
    packed, scale = quantize_fp8(weight, block=(64, 32))
    assert packed.dtype == FP8 and scale.shape == (3, 4, 5) and bool((scale > 0).all())
    back = dequantize_fp8(packed, scale, block=(64, 32), dtype=torch.float32)
    largest = weight.abs().amax((1, 2), keepdim=True)
    assert (back - weight).abs().max() <= largest.max() / 16
    assert torch.equal(back[1], weight[1])
    close = (
        back - weight
    ).abs() <= weight.abs() / 16 + largest * 2**-9 / 448  # half a step, or below the smallest
    assert close.all()
    again, _ = quantize_fp8(back, block=(64, 32))
    assert torch.equal(again.view(torch.uint8), packed.view(torch.uint8))


def test_mxfp4_is_a_table_and_a_power_of_two() -> None:
    blocks = torch.randint(0, 256, (2, 3, 5, 16), dtype=torch.uint8)
    scales = torch.randint(0, 255, (2, 3, 5), dtype=torch.uint8)
    found = dequantize_mxfp4(blocks, scales, dtype=torch.float64)
    assert found.shape == (2, 3, 160)
    for place in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        for byte in range(16):
            power = 2.0 ** (int(scales[place]) - 127)
            code = int(blocks[place][byte])
            at = place[2] * 32 + 2 * byte
            assert found[place[0], place[1], at] == FP4_VALUES[code % 16] * power
            assert found[place[0], place[1], at + 1] == FP4_VALUES[code // 16] * power
    assert dequantize_mxfp4(blocks[..., :0, :], scales[..., :0]).shape == (2, 3, 0)


def test_mxfp4_as_transformers() -> None:
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(90, 140, (3, 10, 4), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(dequantize_mxfp4(blocks, scales).transpose(-1, -2), theirs)


def test_mxfp4_edges() -> None:
    blocks = torch.full((1, 1, 16), 0x77, dtype=torch.uint8)
    for byte, wanted in ((0, 6 * 2.0**-127), (127, 6.0), (254, math.inf), (255, math.nan)):
        scale = torch.tensor([[byte]], dtype=torch.uint8)
        found = dequantize_mxfp4(blocks, scale, dtype=torch.float32)
        assert torch.allclose(found, torch.full((1, 32), wanted), rtol=0, equal_nan=True), byte


def test_mxfp4_there_and_back() -> None:
    exact = torch.tensor(FP4_VALUES).repeat(3, 4) * 2.0 ** torch.tensor([[-20.0], [0.0], [9.0]])
    blocks, scales = quantize_mxfp4(exact)
    assert blocks.shape == (3, 2, 16) and scales.shape == (3, 2)
    assert torch.equal(dequantize_mxfp4(blocks, scales, dtype=torch.float32), exact)
    weight = torch.randn(5, 4, 96)
    back = dequantize_mxfp4(*quantize_mxfp4(weight), dtype=torch.float32)
    largest = weight.view(5, 4, 3, 32).abs().amax(-1, keepdim=True)
    # A step is at most a quarter of the block's largest, and what lies above 6 becomes 6.
    assert ((back - weight).view(5, 4, 3, 32).abs() <= largest / 4 + 1e-7).all()
    assert not dequantize_mxfp4(*quantize_mxfp4(torch.zeros(2, 32))).any()


def test_shapes_that_do_not_fit() -> None:
    byte = torch.zeros(2, 3, 16, dtype=torch.uint8)
    for blocks, scales in (
        (byte, byte[..., 0][:1]),
        (byte[..., :8], byte[..., 0]),
        (byte[0, 0], byte[0, 0, 0]),
        (byte.int(), byte[..., 0]),
    ):
        with pytest.raises(FormatError, match="allowed is"):
            dequantize_mxfp4(blocks, scales)
    with pytest.raises(FormatError, match="blocks of 32"):
        quantize_mxfp4(torch.zeros(2, 31))
    with pytest.raises(FormatError, match=r"allowed is \(2, 3\)"):
        dequantize_fp8(torch.zeros(200, 300).to(FP8), torch.ones(2, 2), block=(128, 128))
    with pytest.raises(FormatError, match="not a matrix"):
        dequantize_fp8(torch.zeros(4).to(FP8), torch.ones(1), block=(128, 128))
