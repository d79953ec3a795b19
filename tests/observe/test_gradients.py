"""The gradient report: figures are those of an ordinary backward pass, what is cut off is named, nothing is changed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.errors import UsageError
from moiety.model.loss import cross_entropy
from moiety.model.transformer import Transformer
from moiety.moe.balance import load_balance_loss
from moiety.moe.layer import MoE
from moiety.moe.routers import ROUTERS, RouterContext, TopK
from moiety.observe.gradients import gradient_report

KINDS: dict[str, dict[str, Any]] = {
    **{name: {"router": name, "experts_per_token": kind.fixed_k or 2} for name, kind in ROUTERS.items()},
    "shared": {"shared_d_ff": 12, "shared_gate": True},
    "null": {"null_experts": 2},
    "sigmoid_one": {"router": "sigmoid", "experts_per_token": 1, "renormalize": False},
    "straight_through": {"router_gradient": "straight_through"},
    "dense_mixer": {"router_gradient": "dense"},
    "full": {"capacity_factor": 0.6, "overflow": "priority"},
    "queue": {"capacity_factor": 0.6, "overflow": "queue"},
    "biases": {"bias": True, "router_bias": True, "gated": False},
}


def build(*, dense_layers: tuple[int, ...] = (), checkpointing: bool = False, **changes: Any) -> Transformer:
    sizes: dict[str, Any] = {"experts": 5, "experts_per_token": 2, "d_ff": 10}
    config = ModelConfig(
        vocab_size=40,
        d_model=16,
        layers=3,
        attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8),
        d_ff=20,
        moe=MoEConfig(**sizes | changes),
        dense_layers=dense_layers,
    )
    torch.manual_seed(0)
    model = Transformer(config, checkpointing=checkpointing)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(0.0, 0.3)
    return model


def moe_of(model: Transformer, layer: int) -> MoE:
    found = model.blocks[layer].feed_forward
    assert isinstance(found, MoE)
    return found


def text(sequences: int = 4, length: int = 17) -> Tensor:
    return torch.randint(40, (sequences, length), generator=torch.Generator().manual_seed(1))


def plain_backward(model: Transformer, tokens_BS: Tensor, *, balance: bool) -> None:
    """`.grad` of every parameter, the ordinary way."""
    model.train()
    model.zero_grad()
    output, targets_BS = model(tokens_BS[:, :-1], seed=0), tokens_BS[:, 1:]
    if balance:
        assert model.config.moe is not None
        losses = [load_balance_loss(routing) for routing in output.routing.values()]
        loss = model.config.moe.balance_loss * torch.stack(losses).mean()
    else:
        loss = cross_entropy(output.hidden, output.head_weight, targets_BS) / targets_BS.numel()
    loss.backward()


def norm(parameter: Tensor) -> float:
    return 0.0 if parameter.grad is None else float(parameter.grad.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_a_plain_backward_pass(kind: str) -> None:
    model, tokens_BS = build(dense_layers=(1,), **KINDS[kind]), text()
    report = gradient_report(model, tokens_BS)
    assert report.tokens == 64 and [one.layer for one in report.layers] == [0, 2]
    plain_backward(model, tokens_BS, balance=False)
    for one in report.layers:
        moe = moe_of(model, one.layer)
        if moe.gate is None:
            assert kind == "hash" and one.router_norm is None and one.balance_norm is None
            assert "no router to train" in one.verdict
        else:
            assert one.router_norm == pytest.approx(norm(moe.gate.weight), rel=1e-4) and one.router_norm > 0
        squares_E = torch.zeros(5)
        for parameter in moe.experts.parameters():
            assert parameter.grad is not None
            squares_E += parameter.grad.flatten(1).square().sum(1)
        reached = [expert for expert in range(5) if squares_E[expert] > 0]
        assert one.experts == 5 and one.experts_reached == len(reached)
        assert set(one.experts_without) == set(range(5)) - set(reached)
        assert one.expert_norm_max == pytest.approx(float(squares_E.max().sqrt()), rel=1e-4)
        assert one.expert_norm_median == pytest.approx(float(squares_E[reached].sqrt().median()), rel=1e-4)
        assert one.ok, one.verdict
    assert report.ok and report.by_layer[2] == report.layers[1]
    if kind != "hash":
        plain_backward(model, tokens_BS, balance=True)
        for one in report.layers:
            gate = moe_of(model, one.layer).gate
            assert gate is not None
            assert one.balance_norm == pytest.approx(norm(gate.weight), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_changed(checkpointing: bool) -> None:
    model, tokens_BS = build(router="noisy", checkpointing=checkpointing), text()
    plain_backward(model, tokens_BS, balance=False)
    model.eval()
    model.blocks[1].train()
    modes = [module.training for module in model.modules()]
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        report = gradient_report(model, tokens_BS)
    assert report.ok and torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    now = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert now.keys() == grads.keys() and all(torch.equal(now[name], grads[name]) for name in grads)
    assert gradient_report(model, tokens_BS) == report


def test_checkpointing_makes_no_difference() -> None:
    plain, again = (gradient_report(build(checkpointing=how), text()) for how in (False, True))
    for one, two in zip(plain.layers, again.layers, strict=True):
        assert one.router_norm == pytest.approx(two.router_norm, rel=1e-4) and one.verdict == two.verdict


# What is cut off


def test_one_expert_divided_by_itself() -> None:
    report = gradient_report(build(experts_per_token=1), text())
    assert not report.ok
    for one in report.layers:
        assert not one.ok and one.router_norm is not None and one.router_norm < 1e-5
        assert one.balance_norm is not None and one.balance_norm > 1e-6
        assert f"router of layer {one.layer} gets no gradient from the language-model loss" in one.verdict
        assert "the balance loss alone moves it" in one.verdict and "use router switch" in one.verdict
    report = gradient_report(build(experts_per_token=1, balance_loss=0.0), text())
    assert all(one.balance_norm is None and "alone" not in one.verdict for one in report.layers)
    assert gradient_report(build(experts_per_token=1, renormalize=False), text()).ok


@dataclass(frozen=True)
class Detached(TopK):
    """Routes as TopK does, and cuts the weights off."""

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return super().score(logits_TE, context).detach()


def test_detached_scores() -> None:
    model = build()
    moe_of(model, 1).router = Detached(2)
    report = gradient_report(model, text())
    assert [one.ok for one in report.layers] == [True, False, True]
    one = report.by_layer[1]
    assert one.router_norm == 0.0 and one.experts_reached > 0
    assert "router of layer 1 gets no gradient" in one.verdict and "detached" in one.verdict


def test_a_saturated_router() -> None:
    model = build(router="switch", experts_per_token=1)
    gate = moe_of(model, 2).gate
    assert gate is not None
    with torch.no_grad():
        gate.weight *= 1000
    one = gradient_report(model, text()).by_layer[2]
    assert not one.ok and "gets no gradient" in one.verdict


def test_experts_that_answer_nothing() -> None:
    model = build()
    with torch.no_grad():
        for parameter in moe_of(model, 0).experts.parameters():
            parameter.zero_()
    one = gradient_report(model, text()).by_layer[0]
    assert not one.ok and "do the experts answer anything but zero" in one.verdict
    assert "got tokens but no gradient" in one.verdict and one.experts_reached == 0
    assert one.expert_norm_max == one.expert_norm_median == 0.0


def test_idle_experts_are_named() -> None:
    model = build(router_bias=True)
    gate = moe_of(model, 0).gate
    assert gate is not None
    with torch.no_grad():
        gate.bias[3] = -1000.0
    one = gradient_report(model, text()).by_layer[0]
    assert one.ok and one.experts_without == one.experts_unused == (3,) and one.experts_reached == 4
    assert one.verdict == "router of layer 0 learns; expert 3 got no token of this text"


def test_what_is_frozen_is_no_fault() -> None:
    model = build()
    moe_of(model, 0).gate.requires_grad_(False)  # type: ignore[union-attr]
    moe_of(model, 1).experts.requires_grad_(False)
    report = gradient_report(model, text())
    assert report.ok and report.by_layer[0].router_norm is None
    assert "its router is frozen" in report.by_layer[0].verdict
    assert "its experts are frozen" in report.by_layer[1].verdict
    model.requires_grad_(False)
    assert gradient_report(model, text()).ok


def test_no_pairs_at_all() -> None:
    model = build(router="relu", router_bias=True)
    gate = moe_of(model, 1).gate
    assert gate is not None
    with torch.no_grad():
        gate.bias[:] = -1000.0
    one = gradient_report(model, text()).by_layer[1]
    assert not one.ok and "sends no token to any expert" in one.verdict


def test_a_gradient_that_is_not_finite() -> None:
    model = build()
    with torch.no_grad():
        moe_of(model, 2).down[:] = math.inf
    one = gradient_report(model, text()).by_layer[2]
    assert not one.ok and "not finite" in one.verdict
    plain = gradient_report(model, text()).plain()
    assert plain["ok"] is False and plain["layers"][2]["router_norm"] is None
    json.dumps(plain, allow_nan=False)


def test_one_expert_has_nothing_to_choose() -> None:
    report = gradient_report(build(experts=1, experts_per_token=1), text())
    assert report.ok and all("nothing to choose" in one.verdict for one in report.layers)


# Refusals


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (3, 0)], ids=str)
def test_too_short(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="two tokens"):
        gradient_report(build(), torch.zeros(shape, dtype=torch.int64))


def test_a_dense_model() -> None:
    model = build(dense_layers=(0, 1, 2)).eval()
    with pytest.raises(UsageError, match="dense"):
        gradient_report(model, text())
    with pytest.raises(UsageError, match="vocabulary"):
        gradient_report(build().eval(), text() + 40)
