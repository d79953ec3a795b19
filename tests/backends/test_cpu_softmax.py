"""Cross entropy of rows and causal attention by the C kernels: as near to float64 as torch, at every level."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.backends import causal, cpu_loss
from moiety.errors import UsageError
from moiety.model.loss import _by_torch
from tests.backends.builds import tried
from tests.oracle import assert_close_enough

pytestmark = pytest.mark.skipif(not tried(), reason="the kernels are not compiled here")
DTYPES = (torch.float32, torch.bfloat16)

# Cross entropy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1000, 1024 + 7])
@pytest.mark.parametrize(("multiplier", "cap"), [(1.0, 0.0), (0.5, 0.0), (1.5, 4.0)])
@pytest.mark.parametrize("scaled", [False, True])
def test_losses_and_gradients(
    vocabulary: int, multiplier: float, cap: float, scaled: bool, dtype: torch.dtype, level: str
) -> None:
    wider = 4 * torch.randn(9, vocabulary + 5)
    logits = wider.to(dtype)[:, :vocabulary]  # rows with room between them
    target = torch.randint(vocabulary, (9,))
    target[0], target[1] = 0, vocabulary - 1
    scale = torch.randn(9) if scaled else None
    wide = None if scale is None else scale.double()
    nats, grad = _by_torch(logits.double(), target, wide, multiplier, cap, True)
    plain_nats, plain_grad = _by_torch(logits.clone(), target, scale, multiplier, cap, True)
    given = logits.clone(memory_format=torch.preserve_format)
    found = cpu_loss.cross_entropy_rows(given, target, scale, multiplier=multiplier, cap=cap, gradient=False)
    assert torch.equal(given, logits), "the logits are not to be touched"
    assert grad is not None and plain_grad is not None
    again = cpu_loss.cross_entropy_rows(given, target, scale, multiplier=multiplier, cap=cap, gradient=True)
    assert torch.equal(found, again)
    torch.testing.assert_close(found, nats, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(plain_nats, nats, rtol=2e-6, atol=2e-6)
    zero = vocabulary == 1  # one word is certain
    assert_close_enough(given, plain_grad, grad, zero=zero)


def test_what_lies_between_rows_stays(level: str) -> None:
    wider = torch.randn(3, 40, dtype=torch.bfloat16)
    before = wider.clone()
    cpu_loss.cross_entropy_rows(wider[:, 3:20], torch.tensor([0, 5, 16]), gradient=True)
    assert torch.equal(wider[:, :3], before[:, :3]) and torch.equal(wider[:, 20:], before[:, 20:])
    assert not torch.equal(wider[:, 3:20], before[:, 3:20])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_no_numbers_or_infinite(dtype: torch.dtype, level: str) -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0], [-math.inf, 0.0, 0.0], [1e4, -1e4, 0.0]]).to(dtype)
    each = [
        cpu_loss.cross_entropy_rows(row[None].clone(), torch.tensor([2]), gradient=False) for row in logits
    ]
    assert each[0].isnan() and float(each[1]) == pytest.approx(math.log(2))
    assert float(each[2]) == pytest.approx(float(logits[2, 0]))
    masked = logits[1:2].clone()
    cpu_loss.cross_entropy_rows(masked, torch.tensor([2]), gradient=True)
    torch.testing.assert_close(masked.float(), torch.tensor([[0.0, 0.5, -0.5]]))
    broken = logits[:1].clone()
    cpu_loss.cross_entropy_rows(broken, torch.tensor([2]), gradient=True)
    assert bool(broken.isnan().all())


@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_token_outside_of_the_vocabulary(wrong: int) -> None:
    with pytest.raises(UsageError, match=f"token {wrong} is to be predicted") as refused:
        cpu_loss.cross_entropy_rows(torch.zeros(2, 7), torch.tensor([0, wrong]), gradient=True)
    assert refused.value.hint is not None and "0 to 6" in refused.value.hint


def test_whom_the_kernels_take(level: str) -> None:
    assert cpu_loss.takes(torch.zeros(2, 3)) and cpu_loss.takes(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert not cpu_loss.takes(torch.zeros(2, 3, dtype=torch.float64))
    assert not cpu_loss.takes(torch.zeros(3, 2).t())


# Causal attention


def by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def by_kernels(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return causal.causal_attention(q, k, v, scale=scale)


def solved(
    attend: Callable[..., Tensor], given: tuple[Tensor, ...], grad: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    leaves = [one.clone().requires_grad_() for one in given]
    y = attend(*leaves, scale)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sequences", "heads", "kv_heads", "positions", "width", "value_width", "scale"),
    [
        (2, 2, 2, 1, 8, 8, None),
        (1, 2, 1, 17, 16, 16, None),
        (2, 4, 2, 130, 24, 24, 0.3),
        (1, 3, 3, 600, 32, 32, None),
        (1, 8, 1, 300, 16, 16, None),
        (2, 2, 2, 128, 48, 32, 0.1),  # keys wider than values, as in MLA
        (1, 40, 1, 50, 8, 8, None),  # more heads than rows of a block
    ],
)
def test_attention_and_gradients(
    sequences: int, heads: int, kv_heads: int, positions: int, width: int, value_width: int, scale: float | None,
    dtype: torch.dtype, level: str,
) -> None:  # fmt: skip
    q = torch.randn(sequences, positions, heads, width).to(dtype).transpose(1, 2)  # as projections give them
    k = torch.randn(sequences, positions, kv_heads, width).to(dtype).transpose(1, 2)
    v = torch.randn(sequences, kv_heads, positions, value_width).to(dtype)
    grad = torch.randn(sequences, heads, positions, value_width).to(dtype)
    true = solved(by_torch, tuple(one.double() for one in (q, k, v)), grad.double(), scale)
    plain, ours = (solved(one, (q, k, v), grad, scale) for one in (by_torch, by_kernels))
    for name, fast, noisy, right in zip(("y", "q", "k", "v"), ours, plain, true, strict=True):
        alone = positions == 1 and name in ("q", "k")  # of one key every score gives the share 1
        assert_close_enough(fast, noisy, right, name, zero=alone)


def test_nobody_sees_the_future(level: str) -> None:
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    before = by_kernels(q, k, v)
    k[:, :, 150:], v[:, :, 150:] = math.nan, 1e9
    after = by_kernels(q, k, v)
    assert torch.equal(before[:, :, :150], after[:, :, :150]) and bool(after[:, :, 150:].isnan().all())


def test_great_scores_do_not_overflow(level: str) -> None:
    q, k, v = 300 * torch.randn(1, 1, 140, 16), torch.randn(1, 1, 140, 16), torch.randn(1, 1, 140, 16)
    torch.testing.assert_close(
        by_kernels(q, k, v), by_torch(q.double(), k.double(), v.double()).float(), rtol=1e-3, atol=1e-4
    )


def test_autocast_does_not_reach_the_scores(level: str) -> None:
    q, k, v = (torch.randn(1, 2, 140, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = by_kernels(q, k, v)
    assert torch.equal(inside, by_kernels(q, k, v))


def test_whose_attention_the_kernels_take(level: str) -> None:
    x = torch.randn(1, 2, 384, 8)
    assert causal.takes(x, x, x, None) and causal.takes(x, x, x, 0.5)
    assert not causal.takes(x[:, :, 1:], x, x, None), "there are keys of earlier positions"
    assert not causal.takes(x[:, :, 1:], x[:, :, 1:], x[:, :, 1:], None), "torch is as fast"
    assert not causal.takes(x, x, x.bfloat16(), None) and not causal.takes(x, x, x, -1.0)
    assert not causal.takes(x.double(), x.double(), x.double(), None)
