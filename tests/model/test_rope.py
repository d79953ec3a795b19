"""Rotary positions against complex numbers: which dimensions turn together, how far, and which way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moiety.model.rope import rotary_table, rotate

THETA = 500.0


def by_complex_numbers(x_BHSd: Tensor, positions_S: Tensor, rotary_dim: int, *, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, times exp(i position theta^(-2j / rotary_dim)), in float64."""
    turning, rest = x_BHSd.double().split((rotary_dim, x_BHSd.shape[-1] - rotary_dim), dim=-1)
    if interleaved:  # dimensions 2j and 2j + 1
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:  # dimensions j and j + half
        first, second = turning[..., : rotary_dim // 2], turning[..., rotary_dim // 2 :]
    frequency = torch.tensor([THETA ** (-2 * j / rotary_dim) for j in range(rotary_dim // 2)]).double()
    angle = positions_S.double()[:, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        return torch.cat([torch.stack([turned.real, turned.imag], dim=-1).flatten(-2), rest], dim=-1)
    return torch.cat([turned.real, turned.imag, rest], dim=-1)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(6, 6), (10, 10), (2, 2), (10, 4), (7, 6), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_complex_multiplication(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    x_BHSd, positions_S = torch.randn(2, 3, 40, head_dim, dtype=dtype), torch.arange(7, 47)
    y = rotate(x_BHSd, rotary_table(positions_S, rotary_dim, THETA))
    assert y.dtype == dtype and y.shape == x_BHSd.shape
    true = by_complex_numbers(x_BHSd, positions_S, rotary_dim, interleaved=False)
    torch.testing.assert_close(y.double(), true, rtol=0, atol=2e-5)  # angles are float32
    assert torch.equal(y[..., rotary_dim:], x_BHSd[..., rotary_dim:])


def test_the_pairing_is_half_split_and_not_interleaved() -> None:
    x_BHSd, positions_S = torch.randn(1, 2, 9, 8), torch.arange(9)
    y = rotate(x_BHSd, rotary_table(positions_S, 8, THETA)).double()
    other = by_complex_numbers(x_BHSd, positions_S, 8, interleaved=True)
    assert (y - other)[:, :, 1:].abs().amax(-1).min() > 0.05, "every turned position must tell them apart"
    assert torch.equal(y[:, :, 0], x_BHSd[:, :, 0].double()), "position 0 does not turn"


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(query_at: int, key_at: int) -> float:
        tables = [rotary_table(torch.tensor([at]), 12, THETA) for at in (query_at, key_at)]
        return float((rotate(query, tables[0]) * rotate(key, tables[1])).sum())

    assert score(3, 1) == pytest.approx(score(43, 41), abs=1e-4)
    assert abs(score(3, 1) - score(1, 3)) > 1e-2, "the way round matters"


def test_turning_keeps_the_length_and_the_gradient() -> None:
    x_BHSd = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.arange(5), 4, THETA)
    torch.testing.assert_close(rotate(x_BHSd, table).norm(dim=-1), x_BHSd.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x_BHSd,))


def test_a_table_is_float32_whatever_the_dtype_and_no_positions_are_fine() -> None:
    cos, sin = rotary_table(torch.arange(0), 6, THETA)
    assert cos.shape == sin.shape == (0, 3) and cos.dtype == sin.dtype == torch.float32
    assert rotate(torch.randn(1, 2, 0, 6), (cos, sin)).shape == (1, 2, 0, 6)
    x = torch.randn(1, 1, 3000, 6).bfloat16()
    y = rotate(x, rotary_table(torch.arange(3000), 6, THETA))
    true = by_complex_numbers(x, torch.arange(3000), 6, interleaved=False)
    assert y.dtype == torch.bfloat16
    assert (y.double() - true).abs().max() < 0.04, "angles of thousands must not be rounded to bfloat16"
