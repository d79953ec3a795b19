"""Schedules against their formulas at every step, and every parameter in exactly one group."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from moiety.errors import ConfigError
from moiety.model.transformer import Transformer
from moiety.train.optim import build_optimizer, learning_rate, set_learning_rate
from moiety.train.options import ScheduleName
from tests.train import tiny

BETAS = (0.9, 0.95)
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "shared": {"shared_d_ff": 16, "tied": False},
    "sigmoid": {"router": "sigmoid", "selection_bias": True},
    "dense": {"experts": 0},
}


def _rates(schedule: ScheduleName, **changes: Any) -> list[float]:
    usual = {"peak": 0.02, "steps": 100, "warmup": 7, "final": 0.1, "decay": 0.25, **changes}
    return [learning_rate(step, schedule=schedule, **usual) for step in range(usual["steps"])]


def test_warmup_is_a_straight_line() -> None:
    for schedule in ("cosine", "wsd"):
        rates = _rates(schedule)
        assert rates[:7] == pytest.approx([0.02 * n / 7 for n in range(1, 8)], rel=1e-12)
        assert rates[0] > 0 and rates[6] == pytest.approx(0.02)


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (0, 0.1), (7, 0.1), (7, 1.0), (99, 0.5)])
def test_cosine(warmup: int, final: float) -> None:
    for step, rate in enumerate(_rates("cosine", warmup=warmup, final=final)):
        if step >= warmup:
            wave = (1 + math.cos(math.pi * (step - warmup) / (100 - warmup))) / 2
            assert rate == pytest.approx(0.02 * final + 0.02 * (1 - final) * wave, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("decay", [0.25, 0.5, 0.014, 1.0])
def test_wsd(decay: float) -> None:
    falling = round(100 * decay)
    for step, rate in enumerate(_rates("wsd", warmup=0, decay=decay)):
        left = (100 - step) / falling
        assert rate == pytest.approx(0.02 * (0.1 + 0.9 * min(left, 1.0)), rel=1e-12)


def test_wsd_without_a_fall_keeps_its_rate_until_the_last_step() -> None:
    assert _rates("wsd", warmup=0, decay=0.0) == pytest.approx([0.02] * 100)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_no_rate_is_above_the_peak_or_below_the_end(schedule: ScheduleName) -> None:
    for steps in (1, 2, 3, 10):
        for warmup in (0, 1, 2, 20):
            rates = _rates(schedule, steps=steps, warmup=warmup)
            assert all(0 < rate <= 0.02 * (1 + 1e-12) for rate in rates), (steps, warmup, rates)
            after = rates[warmup:]
            assert all(rate >= 0.002 * (1 - 1e-12) for rate in after)
            assert after == sorted(after, reverse=True)
    past = learning_rate(500, schedule=schedule, peak=0.02, steps=100, warmup=7, final=0.1, decay=0.2)
    assert past == pytest.approx(0.002)


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="linear") as caught:
        learning_rate(9, schedule="linear", peak=1, steps=10, warmup=0, final=0, decay=0)  # type: ignore[arg-type]
    assert caught.value.hint is not None and "cosine" in caught.value.hint and "wsd" in caught.value.hint


def _optimizer(
    net: nn.Module, scale: float = 0.25, decay: float = 0.1, down: float = 1.0
) -> torch.optim.AdamW:
    return build_optimizer(net, weight_decay=decay, betas=BETAS, router_scale=scale, down_scale=down)


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_in_exactly_one_group(kind: str) -> None:
    net = tiny.model(300, **MODELS[kind])
    optimizer = _optimizer(net, down=3.0)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    expected = dict(net.named_parameters())
    for group in optimizer.param_groups:
        assert len(group["names"]) == len(group["params"])
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is expected[name], name
            router = name.endswith("feed_forward.gate.weight") and kind != "dense"
            vector = name.endswith("norm.weight")
            down = name.endswith(".down") and ".shared." not in name
            wanted = "routers" if router else "vectors" if vector else "down" if down else "matrices"
            assert group["group"] == wanted, (name, group["group"])
            assert group["weight_decay"] == (0.1 if wanted in ("matrices", "down") else 0.0), name
            assert group["scale"] == (0.25 if router else 3.0 if down else 1.0), name
        assert tuple(group["betas"]) == BETAS
    assert {group["group"] for group in optimizer.param_groups} == {"matrices", "vectors", "down"} | (
        set() if kind == "dense" else {"routers"}
    )


def test_what_is_frozen_is_left_out() -> None:
    net = tiny.model(300)
    net.embed.weight.requires_grad_(False)
    names = {name for group in _optimizer(net).param_groups for name in group["names"]}
    assert names == {name for name, _ in net.named_parameters()} - {"embed.weight"}


def test_the_rate_reaches_each_group_with_its_scale() -> None:
    optimizer = _optimizer(tiny.model(300), scale=3.0, down=2.0)
    set_learning_rate(optimizer, 0.5)
    assert {group["group"]: group["lr"] for group in optimizer.param_groups} == {
        "matrices": 0.5,
        "vectors": 0.5,
        "routers": 1.5,
        "down": 1.0,
    }


def _first_update(net: Transformer, optimizer: torch.optim.AdamW) -> dict[str, float]:
    """Mean size of the first update where every gradient is 1: the learning rate, as Adam divides by |gradient|."""
    before = tiny.values(net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = tiny.values(net)
    return {name: float((before[name] - after[name]).mean()) for name, _ in net.named_parameters()}


def test_the_router_rate_acts_and_decay_spares_routers_and_norms() -> None:
    for scale in (0.1, 1.0, 4.0):
        net = tiny.model(300)
        optimizer = _optimizer(net, scale=scale, decay=0.0)
        set_learning_rate(optimizer, 0.01)
        for name, moved in _first_update(net, optimizer).items():
            assert moved == pytest.approx(0.01 * (scale if ".gate." in name else 1.0), rel=1e-4), name
    moves = {}
    for decay in (0.5, 0.0):
        net = tiny.model(300)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(1.0)
        optimizer = _optimizer(net, scale=1.0, decay=decay)
        set_learning_rate(optimizer, 0.01)
        moves[decay] = _first_update(net, optimizer)
    for name, moved in moves[0.5].items():
        spared = ".gate." in name or name.endswith("norm.weight")
        assert moved - moves[0.0][name] == pytest.approx(0.0 if spared else 0.005, abs=1e-6), name
