"""RMSNorm and its own backward, against the formula in float64 and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.model.norm import RMSNorm
from tests import tiny
from tests.oracle import assert_all_close_enough

EPS = 1e-3


def formula(x: Tensor, weight_D: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D


def built(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, EPS).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.5)
    return norm


def solved(x: Tensor, weight_D: Tensor, grad: Tensor, function: Any) -> dict[str, Tensor | None]:
    """Output and both gradients of `function(x, weight)`."""
    x, weight_D = x.clone().requires_grad_(), weight_D.clone().requires_grad_()
    y = function(x, weight_D)
    y.backward(grad.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, "weight": weight_D.grad}


def ours(x: Tensor, weight_D: Tensor) -> Tensor:
    norm = RMSNorm(len(weight_D), EPS)
    y: Tensor = torch.func.functional_call(norm, {"weight": weight_D}, (x,))
    return y


@pytest.mark.parametrize("shape", [(5,), (1, 1), (7, 5), (2, 3, 4, 6), (0, 8)])
def test_float64_equals_the_formula(shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    weight_D = torch.randn(shape[-1], dtype=torch.float64)
    fast, true = solved(x, weight_D, grad, ours), solved(x, weight_D, grad, formula)
    for name, value in true.items():
        tiny.assert_exact(fast[name], value, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_noisier_than_twice_torch(dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 33, 21, 48).bfloat16()
    x = x * torch.logspace(-2, 2, 33)[:, None, None].bfloat16()
    weight_D = torch.randn(48).bfloat16()
    true = solved(x.double(), weight_D.double(), grad.double(), formula)
    plain = solved(
        x.to(dtype), weight_D.to(dtype), grad, lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, EPS)
    )
    assert_all_close_enough(solved(x.to(dtype), weight_D.to(dtype), grad, ours), plain, true)


def test_gradcheck() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(built(5, torch.float64), (x,))
    weight_D = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x, weight_D))


def test_rows_of_zeros_and_strided_input() -> None:
    norm, x = built(6, torch.float64), torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (norm.weight.detach() / EPS**0.5).expand(2, 6))
    strided = torch.randn(6, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    assert not strided.is_contiguous()
    grad = torch.randn(4, 3, 6, dtype=torch.float64).transpose(0, 1)
    fast, true = (solved(strided, norm.weight.detach(), grad, f) for f in (ours, formula))
    for name, value in true.items():
        tiny.assert_exact(fast[name], value, name)


def test_input_and_weight_are_left_as_they_were() -> None:
    norm, x = built(9, torch.float32), torch.randn(4, 9, requires_grad=True)
    before = x.detach().clone(), norm.weight.detach().clone()
    norm(x).square().sum().backward()
    assert torch.equal(before[0], x) and torch.equal(before[1], norm.weight)


def test_keeps_the_dtype_of_the_input_and_gives_the_weight_its_own() -> None:
    norm, x = built(8, torch.float32), torch.randn(3, 8).bfloat16().requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    assert (y.dtype, x.grad.dtype, norm.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm, x = built(8, torch.float64), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    norm.weight.requires_grad_(False)
    norm(x).square().sum().backward()
    assert norm.weight.grad is None and x.grad is not None and bool(x.grad.any())
