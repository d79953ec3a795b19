"""Rotary position embedding (arXiv 2104.09864), plain or stretched to a longer context."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moiety.config import RopeConfig
from moiety.errors import ConfigError

__all__ = ["check_rope", "depends_on_length", "frequencies", "rotary_table", "rotate", "softmax_factor"]


def check_rope(rope: RopeConfig | None, rotary_dim: int, theta: float) -> None:
    """Refuse a stretching that has no value for these sizes.

    Args:
        rope: How the frequencies are stretched; None is fine.
        rotary_dim: Rotated dimensions of a head.
        theta: Base of the frequencies.

    Raises:
        ConfigError: what is wrong with it.
    """
    if rope is None or rotary_dim == 0:
        return
    if rope.kind in ("dynamic", "alpha") and rotary_dim == 2:
        raise ConfigError(
            f"rope of kind {rope.kind!r} raises theta to rotary_dim / (rotary_dim - 2), and rotary_dim is 2",
            hint="use kind 'linear' or at least 4 rotated dimensions",
        )
    if rope.kind == "yarn" and (theta == 1 or min(rope.beta_fast, rope.beta_slow) <= 0):
        raise ConfigError(
            f"rope of kind 'yarn' with theta {theta}, beta_fast {rope.beta_fast} and beta_slow {rope.beta_slow}",
            hint="theta must differ from 1 and both betas must be positive",
        )
    if rope.kind != "longrope":
        return
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if len(factors) != rotary_dim // 2 or min(factors) <= 0:
            raise ConfigError(
                f"RopeConfig.{name} has {len(factors)} numbers, the smallest {min(factors)}; "
                f"{rotary_dim // 2} positive ones are wanted",
                hint="one for each pair of rotated dimensions",
            )
    if rope.original_positions == 1 and rope.factor > 1:
        raise ConfigError("rope of kind 'longrope' divides by ln(original_positions), which is 0 for 1")


def depends_on_length(rope: RopeConfig | None) -> bool:
    """True where a sequence's frequencies change as it grows."""
    return rope is not None and rope.kind in ("dynamic", "longrope")


def frequencies(
    rotary_dim: int, theta: float, rope: RopeConfig | None = None, *, length: int = 0, max_positions: int = 0
) -> tuple[Tensor, float]:
    """Radians per position of each pair, float32 (rotary_dim / 2), and the factor on cosines and sines.

    Args:
        rotary_dim: Rotated dimensions of a head, even.
        theta: Base of the frequencies.
        rope: How they are stretched; None leaves them plain.
        length: Tokens from the start of the sequence to the last one computed now; 'dynamic' and 'longrope'
            depend on it.
        max_positions: The model's, where 'dynamic' names no original_positions.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / max(rotary_dim, 1)
    if rope is None:
        return 1.0 / theta**exponent, 1.0
    if rope.kind in ("alpha", "dynamic") and rotary_dim:
        stretch = rope.factor
        if rope.kind == "dynamic":
            original = rope.original_positions or max_positions
            stretch = rope.factor * max(length, original) / original - (rope.factor - 1)
        theta *= stretch ** (rotary_dim / (rotary_dim - 2))
    plain = 1.0 / theta**exponent
    given = rope.attention_factor
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _llama3(plain, rope)
    elif rope.kind == "yarn":
        plain = _yarn(plain, rope, rotary_dim, theta)
        given = _yarn_factor(rope) if given is None else given
    elif rope.kind == "longrope":
        beyond = length > rope.original_positions
        divisor = rope.long_factor if beyond and not rope.always_short else rope.short_factor
        plain = 1.0 / (torch.tensor(divisor, dtype=torch.float32) * theta**exponent)
        said = rope.long_mscale if beyond else rope.short_mscale
        given = said or (_longrope_factor(rope) if given is None else given)
    return plain, 1.0 if given is None else given


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Slow turns are divided by the factor, fast ones stay, and those between are mixed by their turns."""
    turns = rope.original_positions / (2 * math.pi / plain)
    share = (turns - rope.low_freq_factor) / max(rope.high_freq_factor - rope.low_freq_factor, 1e-12)
    share = share.clamp(0, 1)
    return (1 - share) * plain / rope.factor + share * plain


def _yarn(plain: Tensor, rope: RopeConfig, rotary_dim: int, theta: float) -> Tensor:
    """Frequencies with many turns in the original context stay, those with few are divided by the factor."""

    def dimension(turns: float) -> float:
        turned = math.log(rope.original_positions / (turns * 2 * math.pi))
        return rotary_dim * turned / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    divided = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * divided + plain * (1 - divided)


def _mscale(factor: float, multiplier: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _yarn_factor(rope: RopeConfig) -> float:
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor)


def _longrope_factor(rope: RopeConfig) -> float:
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions))


def softmax_factor(rope: RopeConfig | None) -> float:
    """What latent attention multiplies its scores by when its frequencies are stretched (arXiv 2405.04434)."""
    if rope is None or not rope.mscale_all_dim:
        return 1.0
    return _mscale(rope.factor, rope.mscale_all_dim) ** 2


def rotary_table(
    positions_S: Tensor,
    rotary_dim: int,
    theta: float,
    rope: RopeConfig | None = None,
    *,
    length: int = 0,
    max_positions: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, each float32 (S, rotary_dim / 2).

    Args:
        positions_S: Positions, (S,).
        rotary_dim: Rotated dimensions of a head, even.
        theta: Base of the frequencies.
        rope: How they are stretched; None leaves them plain.
        length: See `frequencies`.
        max_positions: See `frequencies`.
    """
    frequency, factor = frequencies(rotary_dim, theta, rope, length=length, max_positions=max_positions)
    angle = positions_S[:, None].to(torch.float32) * frequency.to(positions_S.device)
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


class _Rotate(torch.autograd.Function):
    """Turning is linear and its transpose turns back, so backward keeps only the table."""

    @staticmethod
    def forward(ctx: Any, x_BHSd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(x_BHSd, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSd: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_BHSd, cos, -sin, ctx.interleaved), None, None, None


def _turned(x_BHSd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    one, other = slice(0, half), slice(half, 2 * half)
    if interleaved:
        one, other = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    first, second = x_BHSd[..., one], x_BHSd[..., other]
    turned = torch.empty_like(x_BHSd)
    torch.mul(first, cos, out=turned[..., one]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., other]).addcmul_(first, sin)
    turned[..., 2 * half :] = x_BHSd[..., 2 * half :]
    return turned


def rotate(x_BHSd: Tensor, table: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """Turn the leading dimensions of every head by its position; the rest passes through.

    Args:
        x_BHSd: Queries or keys, (B, H, S, head_dim).
        table: From `rotary_table`, for the same S positions.
        interleaved: Dimensions 2 i and 2 i + 1 turn together, instead of i and i + half.
    """
    cos, sin = (part.to(x_BHSd.dtype) for part in table)
    turned: Tensor = _Rotate.apply(x_BHSd, cos, sin, interleaved)
    return turned
