"""Alarms: a planted collapse is always found, in its layer and nowhere else; a healthy router never rings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moiety.errors import UsageError
from moiety.model.transformer import Transformer
from moiety.moe.layer import MoE
from moiety.moe.routers import ReLU, Router, Switch, TopK
from moiety.observe.alarm import HISTORY, Alarm, batch_advice, collapse
from moiety.observe.stats import RoutingHealth, health
from moiety.train.routers import moe_layers
from tests.train import tiny

History = list[tuple[int, dict[int, RoutingHealth]]]
Lean = Callable[[int, int], torch.Tensor]  # (layer, step) -> what is added to the logits of every token, (E,)


def layer_of(experts: int, router: Router, *, plain: bool) -> MoE:
    """A router whose gate ends in a column for the lean; before it random numbers, or the tokens as they are."""
    layer = MoE(d_model=experts + 1 if plain else 65, d_ff=2, experts=experts, router=router)
    assert layer.gate is not None
    with torch.no_grad():
        if plain:
            layer.gate.weight[:, :-1] = torch.eye(experts)
        else:
            layer.gate.weight.normal_(std=0.2)
        layer.gate.weight[:, -1] = 0
    return layer


def tokens_for(layer: MoE, tokens: int) -> torch.Tensor:
    """Gumbel noise, of which the largest is a draw from the softmax of the lean; the last entry is 1."""
    x_TD = -torch.empty(tokens, layer.choices + 1).exponential_().log()
    if layer.gate_up.shape[2] != layer.choices + 1:
        x_TD = torch.randn(tokens, layer.gate_up.shape[2])
    x_TD[:, -1] = 1
    return x_TD


def drive(
    seed: int,
    *,
    tokens: int,
    experts: int,
    router: Router,
    steps: int,
    lean: Lean,
    layers: int = 3,
    plain: bool = True,
) -> History:
    """The health of `layers` layers over `steps` steps of random tokens."""
    torch.manual_seed(seed)
    made = [layer_of(experts, router, plain=plain) for _ in range(layers)]
    history: History = []
    for step in range(steps):
        seen = {}
        for number, layer in enumerate(made):
            assert layer.gate is not None
            with torch.no_grad():
                layer.gate.weight[:, -1] = lean(number, step)
                seen[number] = health(layer.route(tokens_for(layer, tokens)))
        history.append((step, seen))
    return history


def ring(history: History, **how: bool) -> dict[int, list[Alarm]]:
    """The alarms of every step, as a training loop would ask for them."""
    return {
        step: list(collapse(history[max(0, at + 1 - HISTORY) : at + 1], **how))
        for at, (step, _) in enumerate(history)
    }


def zipf(experts: int) -> Lean:
    """Logits that lean towards low numbers: of single choices, shares near 1, 1/2, 1/3, ..."""
    return lambda layer, step: -torch.arange(1, experts + 1).log()


def even(experts: int) -> Lean:
    return lambda layer, step: torch.zeros(experts)


def towards(experts: int, favourites: int, steps: int, *, most: float = 12.0) -> Lean:
    """Layer 1 leans more and more towards its first few experts; the others stay even."""

    def lean(layer: int, step: int) -> torch.Tensor:
        added_E = torch.zeros(experts)
        if layer == 1:
            added_E[:favourites] = most * step / steps
        return added_E

    return lean


HEALTHY = [
    ("zipf", 64, 8, 2),
    ("zipf", 64, 8, 1),
    ("zipf", 512, 16, 4),
    ("zipf", 4096, 64, 8),
    ("zipf", 64, 64, 2),
    ("even", 64, 64, 2),
    ("even", 16, 4, 2),
    ("random gate", 64, 8, 2),
    ("random gate", 4096, 64, 1),
]


@pytest.mark.parametrize(("kind", "tokens", "experts", "k"), HEALTHY, ids=str)
def test_healthy_routers_never_ring(kind: str, tokens: int, experts: int, k: int) -> None:
    steps, layers = (6, 1) if tokens == 4096 else (30, 2)
    for seed in range(20):
        history = drive(
            seed,
            tokens=tokens,
            experts=experts,
            router=TopK(k),
            steps=steps,
            lean=zipf(experts) if kind == "zipf" else even(experts),
            layers=layers,
            plain=kind != "random gate",
        )
        rung = {step: alarms for step, alarms in ring(history).items() if alarms}
        assert not rung, (seed, rung)


def test_the_zipf_router_is_uneven_and_alive() -> None:
    history = drive(0, tokens=20000, experts=64, router=TopK(1), steps=1, lean=zipf(64), layers=1)
    found = history[0][1][0]
    wanted_E = 1 / np.arange(1, 65)
    assert np.allclose(found.load_E[:8], 64 * wanted_E[:8] / wanted_E.sum(), rtol=0.1)
    assert found.max_vio > 10 and 0.1 < found.min_load < 0.3, (found.max_vio, found.min_load)


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "favourites"),
    [(64, 8, 1, 1), (64, 8, 2, 2), (512, 16, 1, 2), (256, 64, 8, 8)],
    ids=str,
)
def test_a_creeping_collapse_is_found_before_its_end(
    tokens: int, experts: int, k: int, favourites: int
) -> None:
    steps = 24
    for seed in range(20):
        lean = towards(experts, favourites, steps)
        history = drive(seed, tokens=tokens, experts=experts, router=TopK(k), steps=steps, lean=lean)
        rung = ring(history)
        load = [alarm for alarms in rung.values() for alarm in alarms if alarm.kind != "overconfident"]
        assert load and {alarm.layer for alarm in load} == {1}, (seed, load)
        assert 5 <= load[0].step < steps - 1, (seed, load[0])
        last = [alarm for alarm in rung[steps - 1] if alarm.layer == 1]
        assert "collapsed" in {alarm.kind for alarm in last}, (seed, last)


def test_what_is_said() -> None:
    lean = towards(16, 2, 20)
    history = drive(3, tokens=512, experts=16, router=TopK(2), steps=20, lean=lean)
    (alarm,) = (one for one in collapse(history) if one.kind == "collapsed")
    assert (alarm.layer, alarm.step) == (1, 19)
    counts_E = sum(seen[1].counts_E for _, seen in history[-10:])
    assert alarm.message.startswith("layer 1, step 19: ")
    assert "of 16 experts" in alarm.message and "last 10 steps" in alarm.message
    assert f"experts 0, 1 got {100 * counts_E[:2].sum() / counts_E.sum():.0f} % of the pairs" in alarm.message
    assert "(fair: 12 %)" in alarm.message and "balance_loss" in alarm.advice


def counted(*loads: int, tokens: int = 0, **known: float) -> RoutingHealth:
    counts_E = np.array(loads, np.int64)
    return RoutingHealth(counts_E=counts_E, tokens=tokens or int(counts_E.sum()), **known)  # type: ignore[arg-type]


def lasting(one: RoutingHealth, steps: int = 50) -> History:
    return [(step, {4: one}) for step in range(steps)]


def kinds(history: History, **how: bool) -> list[str]:
    return [alarm.kind for alarm in collapse(history, **how)]


def test_one_bad_step_is_no_alarm() -> None:
    good, bad = counted(100, 100, 100, 100), counted(400, 0, 0, 0)
    assert kinds([(0, {4: bad})]) == []
    assert kinds([(step, {4: bad}) for step in range(4)]) == []
    assert kinds([(step, {4: bad}) for step in range(5)]) == ["collapsed"]
    assert kinds([*lasting(good), (12, {4: bad})]) == []
    assert kinds([*lasting(bad), *((12 + step, {4: good}) for step in range(10))]) == []


def test_dead_experts() -> None:
    gone = counted(100, 100, 100, 100, 100, 100, 100, 0)
    assert kinds(lasting(gone, 49)) == []
    back = counted(100, 100, 100, 100, 100, 100, 100, 20)
    assert kinds([*lasting(gone, 60), (60, {4: back})]) == []
    assert kinds(lasting(counted(100, 100, 100, 100, 100, 100, 100, 0))) == ["dead"]
    assert kinds(lasting(counted(*[100] * 60, *[0] * 4))) == []  # four of 64 are few
    (alarm,) = collapse(lasting(counted(*[100] * 56, *[1] * 8)))
    assert alarm.kind == "dead" and "8 experts (56, 57, 58, 59, 60, 61, ...) of 64" in alarm.message
    assert "less than 2 % of a fair share" in alarm.message and "selection_bias" in alarm.advice


def test_too_few_pairs_prove_nothing() -> None:
    few = counted(3, 3, 3, 3, 3, 3, 3, 0)
    assert kinds(lasting(few, 20)) == []  # 60 pairs per expert: a rare one may be unlucky
    assert kinds(lasting(few, 90)) == ["dead"]  # the window reaches back until it can tell
    assert kinds(lasting(counted(1, 1, *[0] * 62), 100)) == []
    assert kinds(lasting(counted(), 20)) == [] and collapse([]) == ()
    assert kinds(lasting(counted(0, 0, 0, tokens=0), 20)) == []
    assert kinds(lasting(counted(500), 20)) == []  # one expert has no balance


def test_a_router_that_gives_up_entirely() -> None:
    (alarm,) = collapse(lasting(counted(0, 0, 0, 0, tokens=64)))
    assert alarm.kind == "dead" and "no token went to any expert" in alarm.message


def test_capacity_does_not_hide_a_collapse() -> None:
    assert kinds(lasting(counted(20, 20, 1, 0, 0, 0, 0, 0, tokens=64, dropped=87))) == ["collapsed"]


def test_null_experts_are_not_judged() -> None:
    history = lasting(counted(100, 100, 100, 100, 9000, 0))
    (alarm,) = collapse(history)
    assert alarm.kind == "collapsed"
    assert collapse(history, null_experts=2) == ()


def test_overconfidence() -> None:
    fair = (100, 100, 100, 100)
    assert kinds(lasting(counted(*fair, router_entropy=0.3, router_z=30.0))) == []
    (alarm,) = collapse(lasting(counted(*fair, router_entropy=0.01, router_z=30.0)))
    assert alarm.kind == "overconfident" and "1.0 % of the entropy" in alarm.message
    assert "z_loss" in alarm.advice and "router_rate" in alarm.advice
    (alarm,) = collapse(lasting(counted(*fair, router_entropy=0.3, router_z=400.0)))
    assert alarm.kind == "overconfident" and "is 20 " in alarm.message
    assert kinds(lasting(counted(*fair, router_z=math.inf))) == ["overconfident"]


def test_a_sure_switch_rings_and_a_sparse_relu_does_not() -> None:
    for router, scale, wanted in ((Switch(), 60.0, ["overconfident"]), (ReLU(), 1.0, [])):
        torch.manual_seed(0)
        layer = layer_of(4, router, plain=False)
        assert layer.gate is not None
        with torch.no_grad():
            layer.gate.weight *= scale
            if isinstance(router, ReLU):
                layer.gate.weight[:, -1] = -1.5
            history: History = [(step, {0: health(layer.route(tokens_for(layer, 256)))}) for step in range(8)]
        entropy = history[-1][1][0].router_entropy
        assert entropy is not None and entropy < 0.05
        assert kinds(history, sparse_scores=isinstance(router, ReLU)) == wanted


def test_layers_and_steps_that_come_and_go() -> None:
    bad, good = counted(400, 0, 0, 0), counted(100, 100, 100, 100)
    history: History = [(10 * step, {2: good, 7: bad} if step % 2 else {2: good}) for step in range(20)]
    (alarm,) = collapse(history)
    assert (alarm.layer, alarm.step, alarm.kind) == (7, 190, "collapsed")
    assert collapse([*history, (200, {2: good})]) == ()  # judged is what the last step has


def test_it_is_cheap() -> None:
    seen = {layer: counted(*[512] * 256) for layer in range(32)}
    history: History = [(step, seen) for step in range(HISTORY)]
    begun = time.process_time()
    for _ in range(10):
        assert collapse(history) == ()
    assert time.process_time() - begun < 0.5  # 32 layers of 256 experts: a few milliseconds


def real_model(vocab_size: int, *, planted: bool) -> Transformer:
    """A small model; planted are no balance loss and a router of layer 1 that prefers two experts from the start."""
    if not planted:
        return tiny.model(vocab_size, experts=8)
    config = tiny.shape(experts=8, balance_loss=0.0, z_loss=0.0).config(vocab_size, tiny.LENGTH)
    assert config.moe is not None
    torch.manual_seed(0)
    net = Transformer(replace(config, moe=replace(config.moe, router_bias=True)))
    gate = moe_layers(net)[1].gate
    assert gate is not None
    with torch.no_grad():
        gate.bias[:2] = 6.0
    return net


@pytest.mark.parametrize("planted", [False, True])
def test_a_real_training(planted: bool, tmp_path: Path) -> None:
    data, tokenizer = tiny.text(tmp_path)
    net = real_model(tokenizer.vocab_size, planted=planted)
    records = tiny.run(net, data, tiny.options(steps=24, learning_rate=3e-3))
    history = [(record.state.step, dict(record.health)) for record in records]
    alarms = [alarm for found in ring(history).values() for alarm in found]
    assert {(alarm.layer, alarm.kind) for alarm in alarms} == ({(1, "collapsed")} if planted else set())


def test_batch_advice_by_hand() -> None:
    small = batch_advice(64, 64, 2)
    assert small.tokens_per_expert == 2.0
    assert small.load_noise == pytest.approx(math.sqrt((1 - 1 / 32) / 2))
    assert small.verdict == "too few" and small.tokens_wanted == 3100
    for word in ("64 tokens", "2 of 64", "2.0 tokens per expert", "70 %", "too few", "3,100 tokens"):
        assert word in small.message, small.message
    middle = batch_advice(512, 16, 2)
    assert middle.verdict == "few" and "12 %" in middle.message
    large = batch_advice(65536, 64, 8)
    assert large.verdict == "enough" and large.message.endswith(": enough")
    assert batch_advice(small.tokens_wanted, 64, 2).load_noise == pytest.approx(0.1)
    assert batch_advice(10, 4, 4).load_noise == 0.0 and batch_advice(1, 1, 1).verdict == "enough"


def test_the_noise_is_what_a_balanced_router_shows() -> None:
    history = drive(0, tokens=128, experts=16, router=TopK(2), steps=60, lean=even(16), layers=1)
    expected = batch_advice(128, 16, 2).load_noise
    measured = float(np.mean([seen[0].load_E.std() for _, seen in history]))
    assert 0.9 * expected < measured < 1.5 * expected  # the gate itself is not quite even


@pytest.mark.parametrize("given", [(0, 8, 2), (64, 0, 1), (64, 8, 0), (64, 4, 5)], ids=str)
def test_batch_advice_refuses(given: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="is"):
        batch_advice(*given)
