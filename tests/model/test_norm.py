"""The norms, and RMSNorm's own backward, against the formulas in float64 and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.model.norm import LayerNorm, RMSNorm, norm_of, unit_length
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


def layer_formula(x: Tensor, weight_D: Tensor, bias_D: Tensor | float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_D + bias_D


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 4, 6), (0, 8)])
def test_layer_norm_equals_the_formula_with_every_gradient(shape: tuple[int, ...], bias: bool) -> None:
    norm = LayerNorm(shape[-1], EPS, bias).double()
    tiny.fill(norm)
    assert {name for name, _ in norm.named_parameters()} == ({"weight", "bias"} if bias else {"weight"})
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    x.requires_grad_()
    leaves = [x, *norm.parameters()]
    true = layer_formula(x, norm.weight, 0.0 if norm.bias is None else norm.bias)
    y = norm(x)
    tiny.assert_exact(y, true)
    ours, theirs = (torch.autograd.grad(one, leaves, grad, retain_graph=True) for one in (y, true))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


def test_layer_norm_keeps_the_dtype_of_the_input() -> None:
    norm, x = LayerNorm(8, EPS, True), torch.randn(3, 8).bfloat16().requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert norm.weight.grad is not None
    assert (y.dtype, norm.weight.grad.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16


def test_which_norm_a_model_has() -> None:
    assert isinstance(norm_of(tiny.config()), RMSNorm)
    for bias in (False, True):
        made = norm_of(tiny.config(norm="layer", norm_bias=bias, norm_eps=0.5))
        assert isinstance(made, LayerNorm) and made.eps == 0.5 and (made.bias is not None) == bias
        assert made.weight.shape == (20,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unit_length_is_that_of_llama_4(dtype: torch.dtype) -> None:
    from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm

    x = torch.randn(2, 3, 5, 6).to(dtype)
    y = unit_length(x, EPS)
    assert y.dtype == dtype
    true = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    assert (y.double() - true).abs().max() <= 2 * torch.finfo(dtype).eps * true.abs().max()
    torch.testing.assert_close(y, Llama4TextL2Norm(EPS)(x), rtol=1e-6, atol=1e-6)
