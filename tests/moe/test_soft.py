"""Soft MoE against its formula, written out one slot and one token at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moiety.errors import ConfigError
from moiety.moe.soft import SoftMoE
from tests import oracle


def define(layer: SoftMoE, x_BSD: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Slot after slot, token after token, in float64."""
    experts, slots = len(layer.experts.down), layer.slots
    weights = layer.experts.weights(x_BSD.dtype)
    phi = layer.phi.double() / layer.phi.double().norm(dim=0)
    sequences = []
    for b, x_SD in enumerate(x_BSD):
        real = [s for s in range(len(x_SD)) if valid_BS is None or bool(valid_BS[b, s])]
        logit = {
            s: [(x_SD[s] / x_SD[s].norm() * layer.scale) @ phi[:, p] for p in range(experts * slots)]
            for s in real
        }
        answer = []
        for p in range(experts * slots):
            total = sum((logit[s][p].exp() for s in real), torch.zeros((), dtype=torch.float64))
            mixed = sum((logit[s][p].exp() / total * x_SD[s] for s in real), torch.zeros_like(x_SD[0]))
            e = p // slots
            answer.append(oracle.one_expert(mixed, weights.up[e], weights.down[e], weights, None, None))
        rows = [torch.zeros_like(x_SD[0])] * len(x_SD)
        for s in real:
            share = torch.stack(logit[s]).softmax(0)
            rows[s] = sum((share[p] * answer[p] for p in range(len(answer))), torch.zeros_like(x_SD[0]))
        sequences.append(torch.stack(rows))
    return torch.stack(sequences)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["reference", "grouped"])
@pytest.mark.parametrize("experts, slots", [(1, 1), (3, 1), (4, 3)])
def test_output_and_every_gradient(experts: int, slots: int, backend: str, padded: bool) -> None:
    layer = SoftMoE(d_model=6, d_ff=5, experts=experts, slots=slots, backend=backend, dtype=torch.float64)
    with torch.no_grad():
        layer.scale.fill_(3.0)
    x_BSD = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    valid_BS = torch.arange(7) < torch.tensor([[7], [4]]) if padded else None
    grad_BSD = torch.randn(2, 7, 6, dtype=torch.float64)
    wanted = [x_BSD, *layer.parameters()]
    output = layer(x_BSD, valid_BS=valid_BS).output
    truth = define(layer, x_BSD, valid_BS)
    oracle.assert_close_enough(output.detach(), truth.detach(), truth.detach())
    got = torch.autograd.grad(output, wanted, grad_BSD)
    true = torch.autograd.grad(truth, wanted, grad_BSD)
    for one, two in zip(got, true, strict=True):
        flat = bool(two.norm() < 1e-9)  # a single slot leaves the router nothing to say about combining
        oracle.assert_close_enough(one, two, two, zero=flat)


def test_mixtures_sum_to_one_and_padding_is_in_none() -> None:
    layer = SoftMoE(d_model=8, d_ff=4, experts=3, slots=2)
    x_BSD = torch.randn(2, 5, 8)
    valid_BS = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    found = layer(x_BSD, valid_BS=valid_BS)
    torch.testing.assert_close(found.dispatch[0].sum(0), torch.ones(6))
    torch.testing.assert_close(found.combine[0, :3].sum(1), torch.ones(3))
    assert not found.dispatch[0, 3:].any() and not found.output[1].any() and not found.output[0, 3:].any()
    other = x_BSD.clone()
    other[0, 3:] = 9.0
    assert torch.equal(layer(other, valid_BS=valid_BS).output, found.output)


def test_it_is_not_causal_and_knows_no_order() -> None:
    layer = SoftMoE(d_model=8, d_ff=4, experts=2, slots=2, dtype=torch.float64)
    x_BSD = torch.randn(1, 6, 8, dtype=torch.float64)
    changed = x_BSD.clone()
    changed[0, 5] += 1.0
    assert not torch.allclose(layer(changed).output[0, 0], layer(x_BSD).output[0, 0], atol=1e-6)
    order = torch.randperm(6)
    torch.testing.assert_close(layer(x_BSD[:, order]).output, layer(x_BSD).output[:, order])


def test_bf16_autocast_keeps_the_mixing_in_float32() -> None:
    layer = SoftMoE(d_model=16, d_ff=8, experts=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(torch.randn(2, 9, 16))
    assert found.output.dtype == torch.bfloat16 and found.dispatch.dtype == torch.float32
    found.output.float().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in layer.parameters())


@pytest.mark.parametrize("name", ["d_model", "d_ff", "experts", "slots"])
def test_sizes_must_be_positive(name: str) -> None:
    sizes = {"d_model": 4, "d_ff": 4, "experts": 2, "slots": 1, name: 0}
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        SoftMoE(**sizes)  # type: ignore[arg-type]
