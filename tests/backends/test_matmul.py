"""The products under the backends: both libraries and none for 16 bits, both layouts, gradients through `linear`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.backends import matmul
from tests.oracle import DTYPES, assert_close_enough

ROWS = (0, 1, 31, 32, 33, 255, 256, 300)
either_processor = pytest.mark.parametrize("processor", ["blas", "onednn", "without 16 bits"], indirect=True)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Pretend to run where oneDNN is preferred, or where it is not, or has no products of 16 bits; parts are small."""
    assert torch.backends.mkldnn.is_available()
    name: str = request.param
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: name == "onednn")
    wide = (torch.float32, torch.float64)
    monkeypatch.setattr(matmul, "has_products", lambda dtype: dtype in wide or name != "without 16 bits")
    monkeypatch.setattr(matmul, "WIDE_BYTES", 4 * 13 * 4)
    return name


def rounded(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).bfloat16().double()


@pytest.mark.parametrize("rows", ROWS)
@either_processor
def test_three_products(processor: str, rows: int) -> None:
    x, weight, grad, bias = rounded(rows, 13), rounded(9, 13), rounded(rows, 9), rounded(9)
    for dtype in DTYPES:
        x_, weight_, grad_, bias_ = (tensor.to(dtype) for tensor in (x, weight, grad, bias))
        out = torch.full((9, 13), 7.0, dtype=dtype)
        matmul.multiply_into(out, grad_, x_)
        assert_close_enough(out, grad_.T @ x_, grad.T @ x, zero=rows == 0)
        assert_close_enough(matmul.multiply_rows(x_, weight_), x_ @ weight_.T, x @ weight.T)
        assert_close_enough(
            matmul.multiply_rows(x_, weight_, bias_), x_ @ weight_.T + bias_, x @ weight.T + bias
        )
        assert_close_enough(matmul.multiply_rows_back(grad_, weight_), grad_ @ weight_, grad @ weight)


@either_processor
def test_products_of_strided_operands_into_one_expert_of_many(processor: str) -> None:
    """Slices of stacked weights and of wider rows, as a backend hands them over."""
    stack, rows = rounded(3, 9, 13), rounded(300, 26)
    x, grad = rows[:, ::2], rounded(9, 300).T
    out = torch.full((3, 9, 13), 7.0)
    x32, grad32, stack32 = rows.float()[:, ::2], grad.float(), stack.float()
    assert not x32.is_contiguous() and not grad32.is_contiguous()
    matmul.multiply_into(out[1], grad32, x32)
    assert_close_enough(out[1], grad32.T @ x32, grad.T @ x)
    assert bool((out[0] == 7).all()) and bool((out[2] == 7).all())
    assert_close_enough(matmul.multiply_rows(x32, stack32[2]), x32 @ stack32[2].T, x @ stack[2].T)
    assert_close_enough(matmul.multiply_rows_back(grad32, stack32[0]), grad32 @ stack32[0], grad @ stack[0])


@pytest.mark.parametrize("shape", [(13,), (0, 13), (5, 13), (40, 13), (2, 30, 13), (2, 3, 50, 13)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@either_processor
def test_linear_and_its_gradients(processor: str, shape: tuple[int, ...], bias: bool) -> None:
    x, weight, offset, grad = rounded(*shape), rounded(9, 13), rounded(9), rounded(*shape[:-1], 9)

    def solve(dtype: torch.dtype, theirs: bool) -> list[Tensor]:
        leaf = [
            t.to(dtype, copy=True).requires_grad_() for t in ((x, weight, offset) if bias else (x, weight))
        ]
        y = F.linear(*leaf) if theirs else matmul.linear(*leaf)
        y.backward(grad.to(dtype))
        return [y.detach()] + [tensor.grad for tensor in leaf if tensor.grad is not None]

    for dtype in DTYPES:
        fast, plain, truth = solve(dtype, False), solve(dtype, True), solve(torch.float64, True)
        assert len(fast) == len(truth) == (4 if bias else 3)
        for ours, noisy, true in zip(fast, plain, truth, strict=True):
            assert_close_enough(ours, noisy, true, zero=x.numel() == 0)


@either_processor
def test_linear_frozen_parts(processor: str) -> None:
    x, weight, bias = torch.randn(40, 13), torch.randn(9, 13), torch.randn(9)
    for frozen in range(3):
        leaf = [tensor.clone().requires_grad_(i != frozen) for i, tensor in enumerate((x, weight, bias))]
        matmul.linear(*leaf).square().sum().backward()
        twin = [tensor.detach().clone().requires_grad_(i != frozen) for i, tensor in enumerate(leaf)]
        F.linear(*twin).square().sum().backward()
        for i, (ours, theirs) in enumerate(zip(leaf, twin, strict=True)):
            if i == frozen:
                assert ours.grad is None
            else:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
                assert ours.grad is not None and bool(ours.grad.any())


@either_processor
def test_linear_takes_an_expanded_gradient_and_a_strided_input(processor: str) -> None:
    x = torch.randn(13, 40).t().requires_grad_()
    weight = torch.randn(9, 13, requires_grad=True)
    matmul.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(40, 13))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(9, 13))


@either_processor
def test_linear_follows_autocast(processor: str) -> None:
    x, weight = torch.randn(40, 16), torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = matmul.linear(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x @ weight.T, rtol=0.05, atol=0.1)


@either_processor
@pytest.mark.parametrize("rows", [0, 7, 40])
def test_small_factors_and_their_gradients(processor: str, rows: int) -> None:
    """What an adapter adds, in place, into columns of something wider."""
    x, factor, out, grad = rounded(rows, 3), rounded(9, 3), rounded(rows, 20), rounded(rows, 9)
    for dtype in DTYPES:
        x_, factor_, grad_ = (tensor.to(dtype) for tensor in (x, factor, grad))
        sums, back = out.to(dtype, copy=True), out[:, :3].to(dtype, copy=True)
        matmul.add_rows(sums[:, 4:13], x_, factor_, 0.5)
        matmul.add_rows_back(back, grad_, factor_)
        plain = out.to(dtype, copy=True)
        plain[:, 4:13] += 0.5 * (x_ @ factor_.T)
        truth = out.clone()
        truth[:, 4:13] += 0.5 * (x @ factor.T)
        assert_close_enough(sums, plain, truth, zero=rows == 0)
        assert_close_enough(
            back, out[:, :3].to(dtype) + grad_ @ factor_, out[:, :3] + grad @ factor, zero=rows == 0
        )
        across = matmul.multiply_across(x_, grad_)
        assert_close_enough(across.to(dtype), x_.T @ grad_, x.T @ grad, zero=rows == 0)


@either_processor
@pytest.mark.parametrize("autocast", [False, True])
def test_stacks_of_matrices_and_their_gradients(processor: str, autocast: bool) -> None:
    left, right, grad = rounded(2, 3, 5, 4), rounded(3, 4, 6), rounded(2, 3, 5, 6)

    def solve(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        a, b = (one.to(dtype, copy=True).requires_grad_() for one in (left, right))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = matmul.batched(a, b) if ours else a @ b
        y.backward(grad.to(y.dtype))
        assert a.grad is not None and b.grad is not None
        return [y.detach(), a.grad, b.grad]

    for dtype in DTYPES:
        fast, plain, truth = solve(dtype, True), solve(dtype, False), solve(torch.float64, False)
        for ours, noisy, true in zip(fast, plain, truth, strict=True):
            low = autocast and dtype != torch.float64
            assert_close_enough(ours, noisy, true, dtype=torch.bfloat16 if low else None)


def test_this_processor_has_an_answer() -> None:
    assert matmul.has_products(torch.float32) and matmul.has_products(torch.float64)
    assert matmul.has_products(torch.bfloat16) in (False, True)
    assert matmul.prefers_onednn() in (False, True)
    if matmul.prefers_onednn():
        assert torch.backends.cpu.get_cpu_capability() == "AVX512"
