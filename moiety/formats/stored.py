"""Weights as they are stored in fewer bits: what the bytes mean, and the way back.

Pure functions on tensors: no files, no modules. The last dimension of a matrix is the one it is multiplied over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moiety.errors import FormatError

__all__ = [
    "E8M0_NAN",
    "FP4_VALUES",
    "MXFP4_BLOCK",
    "dequantize_fp8",
    "dequantize_mxfp4",
    "quantize_fp8",
    "quantize_mxfp4",
]

# The sixteen numbers of four bits (E2M1): sign, two exponent bits, one mantissa bit.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MXFP4_BLOCK = 32
E8M0_BIAS = 127
E8M0_NAN = 255
CHUNK_NUMBERS = 1 << 22  # what is worked on at once beside the result


def dequantize_fp8(
    packed: Tensor, scale: Tensor, *, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Numbers of eight bits times the scale of their block, as DeepSeek-V3 stores them (arXiv 2412.19437).

    Args:
        packed: (..., R, C) in float8_e4m3fn.
        scale: (..., ceil(R / block[0]), ceil(C / block[1])), any floating point type; the last block of a row or
            column may be cut off by the edge. Files call it `scale_inv`, but it multiplies.
        block: Rows and columns of a block.
        dtype: Of the result; products are taken in float32.

    Raises:
        FormatError: the scales do not fit the shape.
    """
    rows, columns = _matrix(packed, "fp8 weights")
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    _expect(scale, (*packed.shape[:-2], *grid), f"scales of {tuple(packed.shape)} in blocks of {block}")
    out = torch.empty(packed.shape, dtype=dtype)
    count = math.prod(packed.shape[:-2])
    flat, scales = packed.reshape(count, rows, columns), scale.reshape(count, *grid).float()
    for into, values, factors in zip(out.view(count, rows, columns), flat, scales, strict=True):
        for number, factor in enumerate(factors):
            part = slice(number * block[0], (number + 1) * block[0])
            spread = factor.repeat_interleave(block[1])[:columns]
            into[part] = (values[part].float() * spread).to(dtype)
    return out


def quantize_fp8(weight: Tensor, *, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The opposite of `dequantize_fp8`: each block's largest number becomes the format's largest, 448.

    Returns:
        The (..., R, C) numbers in float8_e4m3fn, and their float32 scales.
    """
    rows, columns = _matrix(weight, "weights")
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    padded = weight.new_zeros(
        (*weight.shape[:-2], grid[0] * block[0], grid[1] * block[1]), dtype=torch.float32
    )
    padded[..., :rows, :columns] = weight
    blocks = padded.view(*weight.shape[:-2], grid[0], block[0], grid[1], block[1])
    largest = blocks.abs().amax((-3, -1), keepdim=True)
    scale = torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    packed = (blocks / scale).view(padded.shape)[..., :rows, :columns].to(torch.float8_e4m3fn)
    return packed.contiguous(), scale[..., 0, :, 0]


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers of four bits in blocks of 32 with a power of two each, as gpt-oss stores them (OCP MX 1.0).

    Args:
        blocks: (..., G, 16) uint8, two numbers in a byte, the first one in its low four bits.
        scales: (..., G) uint8: the block is multiplied by 2 ** (scale - 127); 255 is not a number.
        dtype: Of the result.

    Returns:
        (..., G * 32), in the order of storage.

    Raises:
        FormatError: the shapes do not belong together.
    """
    if blocks.dim() < 2 or blocks.shape[-1] != MXFP4_BLOCK // 2 or blocks.dtype != torch.uint8:
        raise FormatError(
            f"mxfp4 blocks are {blocks.dtype} {tuple(blocks.shape)}; allowed is uint8 (..., blocks, {MXFP4_BLOCK // 2})"
        )
    _expect(scales, tuple(blocks.shape[:-1]), f"scales of mxfp4 blocks {tuple(blocks.shape)}")
    powers = torch.tensor([2.0 ** (byte - E8M0_BIAS) for byte in range(E8M0_NAN)] + [torch.nan])
    numbers = torch.tensor(FP4_VALUES)
    pairs = torch.stack(
        (numbers.repeat(16), numbers.repeat_interleave(16)), dim=1
    )  # of every byte: low, high
    out = torch.empty((scales.numel(), MXFP4_BLOCK), dtype=dtype)
    step = CHUNK_NUMBERS // MXFP4_BLOCK
    parts = (part.split(step) for part in (out, blocks.reshape(-1, MXFP4_BLOCK // 2), scales.reshape(-1)))
    for into, bytes_, factors in zip(*parts, strict=True):
        values = pairs.index_select(0, bytes_.reshape(-1).int()).view(-1, MXFP4_BLOCK)
        into.copy_(values.mul_(powers.index_select(0, factors.int())[:, None]))
    return out.view(*blocks.shape[:-2], blocks.shape[-2] * MXFP4_BLOCK)


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The opposite of `dequantize_mxfp4`: to the nearest number, with the power that keeps a block's largest below 8.

    Args:
        weight: (..., C), C a multiple of 32.

    Returns:
        The (..., C / 32, 16) blocks and the (..., C / 32) scales, both uint8.
    """
    if weight.dim() < 1 or weight.shape[-1] % MXFP4_BLOCK:
        raise FormatError(f"weights of shape {tuple(weight.shape)} are not made of blocks of {MXFP4_BLOCK}")
    values = weight.float().reshape(*weight.shape[:-1], -1, MXFP4_BLOCK)
    _, exponent = torch.frexp(values.abs().amax(-1))  # largest = m * 2 ** exponent with m in [0.5, 1)
    scales = (exponent - 3 + E8M0_BIAS).clamp(0, E8M0_NAN - 1)
    scaled = torch.ldexp(values, (E8M0_BIAS - scales)[..., None])
    codes = (scaled[..., None] - torch.tensor(FP4_VALUES)).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales.to(torch.uint8)


def _matrix(tensor: Tensor, name: str) -> tuple[int, int]:
    if tensor.dim() < 2:
        raise FormatError(f"{name} of shape {tuple(tensor.shape)} are not a matrix")
    return tensor.shape[-2], tensor.shape[-1]


def _expect(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(tensor.shape) != shape:
        raise FormatError(f"{name} have shape {tuple(tensor.shape)}; allowed is {shape}")
