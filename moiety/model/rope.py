"""Rotary position embedding (arXiv 2104.09864), half-split pairing: dimension i turns with i + half."""

from __future__ import annotations

import torch
from torch import Tensor

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


def rotate(x_BHSd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the leading dimensions of every head by its position; the rest passes through.

    Args:
        x_BHSd: Queries or keys, (B, H, S, head_dim).
        table: From `rotary_table`, for the same S positions.
    """
    cos, sin = (part.to(x_BHSd.dtype) for part in table)
    half = cos.shape[-1]
    first, second = x_BHSd[..., :half], x_BHSd[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x_BHSd.shape[-1]:
        parts.append(x_BHSd[..., 2 * half :])
    return torch.cat(parts, dim=-1)
