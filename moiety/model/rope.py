"""Rotary position embedding (arXiv 2104.09864), half-split pairing: dimension i turns with i + half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["rotary_table", "rotate"]


def rotary_table(positions_S: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, each float32 (S, rotary_dim / 2).

    Args:
        positions_S: Positions, (S,).
        rotary_dim: Rotated dimensions of a head, even.
        theta: Base of the frequencies.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions_S.device, dtype=torch.float32) / rotary_dim
    angle = positions_S[:, None].to(torch.float32) * theta**-exponent
    return angle.cos(), angle.sin()


class _Rotate(torch.autograd.Function):
    """Turning is linear and its own inverse with the other sign, so backward keeps only the table."""

    @staticmethod
    def forward(ctx: Any, x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BHSd, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSd: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_BHSd, cos, -sin), None, None


def _turned(x_BHSd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x_BHSd[..., :half], x_BHSd[..., half : 2 * half]
    turned = torch.empty_like(x_BHSd)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half : 2 * half]).addcmul_(first, sin)
    turned[..., 2 * half :] = x_BHSd[..., 2 * half :]
    return turned


def rotate(x_BHSd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the leading dimensions of every head by its position; the rest passes through.

    Args:
        x_BHSd: Queries or keys, (B, H, S, head_dim).
        table: From `rotary_table`, for the same S positions.
    """
    cos, sin = (part.to(x_BHSd.dtype) for part in table)
    turned: Tensor = _Rotate.apply(x_BHSd, cos, sin)
    return turned
