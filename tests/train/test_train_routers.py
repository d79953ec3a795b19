"""What a run does about its routers: schedules, further losses, wrappers, steering; every router resumes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moiety.errors import ConfigError
from moiety.infer.open import set_experts_per_token
from moiety.model.checkpoint import load
from moiety.moe.losses import LOSSES
from moiety.moe.routers import ROUTERS, ExpertDropout, Explore, SoftToSparse, Tempered, TopK
from moiety.schedule import Schedule
from moiety.train.data import TokenData
from moiety.train.loop import StepRecord, train
from moiety.train.routers import coefficients, loss_terms, moe_layers, steered
from moiety.train.state import latest_checkpoint
from tests.train import tiny


@pytest.fixture(scope="module")
def data_and_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenData, int]:
    data, tokenizer = tiny.text(tmp_path_factory.mktemp("tokens"))
    return data, tokenizer.vocab_size


@pytest.fixture
def data(data_and_vocabulary: tuple[TokenData, int]) -> TokenData:
    return data_and_vocabulary[0]


@pytest.fixture
def vocabulary(data_and_vocabulary: tuple[TokenData, int]) -> int:
    return data_and_vocabulary[1]


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_trains_saves_and_resumes_bit_for_bit(
    name: str, data: TokenData, vocabulary: int, tmp_path: Path
) -> None:
    """Noise, draws and the sparsity coefficient included: a stopped run goes on as if it never stopped."""
    shape: dict[str, Any] = {"router": name, "layers": 1, "selection_bias": name == "sigmoid"}
    how = tiny.options(steps=6, batch=4, accumulate=2, save_every=3, keep=5, explore="0.3")
    if name in ("gshard", "sparsemixer"):  # these draw their experts themselves
        how = tiny.options(steps=6, batch=4, accumulate=2, save_every=3, keep=5)
    whole = tiny.model(vocabulary, **shape)
    records = tiny.run(whole, data, how, run_folder=tmp_path)
    assert records[-1].loss < records[0].loss and not any(record.skipped for record in records)
    again = tiny.model(vocabulary, seed=1, **shape)
    rest = tiny.run(again, data, how, resume=tmp_path / "checkpoints" / "step-00000003")
    assert [record.loss for record in rest] == [record.loss for record in records[3:]]
    tiny.assert_same_bits(tiny.values(whole), tiny.values(again))
    found = latest_checkpoint(tmp_path).path
    assert found is not None
    tiny.assert_same_bits(tiny.values(whole), tiny.values(load(found)))


def test_the_sparsity_of_relu_is_steered_to_k(data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary, router="relu", experts=8, experts_per_token=2, layers=1, balance_loss=0.0)
    records = tiny.run(net, data, tiny.options(steps=150, warmup=10, learning_rate=5e-3))
    used = [record.health[0].experts_per_token for record in records]
    assert used[0] > 3, "it begins nearly dense"
    late = sum(used[-30:]) / 30
    assert abs(late - 2) < 0.5, late
    assert records[-1].state.sparsity > 1e-6 and records[0].state.sparsity == pytest.approx(1.2e-8)
    assert set(records[0].router_losses) == {"load", "z", "sparsity"}


def test_losses_are_added_with_their_schedule(data: TokenData, vocabulary: int) -> None:
    config = tiny.shape().config(vocabulary, tiny.LENGTH).moe
    assert config is not None
    terms = loss_terms(config, tiny.options(losses=("load=0.5:0.1@10", "importance=0.2", "entropy=0")))
    assert coefficients(terms, config, 0, 1.0) == {"load": 0.5, "z": 0.001, "importance": 0.2, "entropy": 0}
    assert coefficients(terms, config, 5, 1.0)["load"] == pytest.approx(0.3)
    assert coefficients(terms, config, 99, 1.0)["load"] == 0.1
    records = tiny.run(
        tiny.model(vocabulary),
        data,
        tiny.options(steps=2, losses=("importance=0.2", "communication=0.1"), balance_groups=2),
    )
    assert set(records[0].router_losses) == {"load", "z", "importance", "communication"}
    assert all(math.isfinite(value) for value in records[1].router_losses.values())


def test_a_coefficient_counts(data: TokenData, vocabulary: int) -> None:
    """The same step with a loss of coefficient 0, 1 and 2: the routers' gradients lie on a line."""
    moved = []
    for coefficient in (0, 1, 2):
        net = tiny.model(vocabulary, balance_loss=0.0, z_loss=0.0)
        how = tiny.options(steps=1, clip=0.0, losses=(f"importance={coefficient}",))
        before = moe_layers(net)[0].gate.weight.detach().clone()  # type: ignore[union-attr]
        norm = tiny.run(net, data, how)[0].gradient_norm
        assert not torch.equal(before, moe_layers(net)[0].gate.weight)  # type: ignore[union-attr]
        moved.append(norm)
    assert moved[0] != moved[1] != moved[2]


@pytest.mark.parametrize(
    "losses, shape, text",
    [
        (("lod=1",), {}, "no loss 'lod'"),
        (("smooth_load=0.1",), {}, "noise of router 'noisy'"),
        (("group=0.1",), {}, "groups of experts"),
        (("load=0.1",), {"router": "hash"}, "nothing to learn"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(
    losses: tuple[str, ...], shape: dict[str, Any], text: str, data: TokenData, vocabulary: int
) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny.run(tiny.model(vocabulary, **shape), data, tiny.options(losses=losses))


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"losses": ("load",)}, "losses names 'load'"),
        ({"losses": ("load=much",)}, "'much' is no schedule"),
        ({"explore": "1.5"}, "explore is '1.5'"),
        ({"explore": "often"}, "'often' is no schedule"),
        ({"router_temperature": "2"}, "must be positive and end at 1"),
        ({"router_temperature": "0:1@5"}, "must be positive"),
        ({"expert_dropout": 1.0}, "expert_dropout is 1.0"),
        ({"router_warmup": -1}, "router_warmup is -1"),
        ({"freeze_router": True, "router_rate": 0.1}, "freeze_router"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        tiny.options(**wrong)


def test_wrappers_are_there_while_training_and_gone_afterwards(data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary)
    own = moe_layers(net)[0].router
    how = tiny.options(
        steps=4,
        router_warmup=2,
        explore="0.5:0@3",
        router_temperature="2:1@3",
        soft_steps=3,
        expert_dropout=0.2,
    )
    with steered(net, how):
        kinds, router = [], moe_layers(net)[0].router
        while not isinstance(router, TopK):
            kinds.append(type(router))
            router = router.router  # type: ignore[attr-defined]
        assert kinds == [Explore, Explore, ExpertDropout, Tempered, SoftToSparse]
    assert moe_layers(net)[0].router is own
    used = [record.health[0].experts_per_token for record in train(net, data, how)]
    assert used[0] == 4 and used[-1] == 2, "from a dense mixture to k"
    assert moe_layers(net)[0].router is own


def test_wrappers_are_gone_after_an_abandoned_run(data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary)
    own = moe_layers(net)[0].router
    run: Iterator[StepRecord] = train(net, data, tiny.options(explore="0.5", freeze_router=True))
    next(run)
    assert isinstance(moe_layers(net)[0].router, Explore)
    run.close()  # type: ignore[attr-defined]
    assert moe_layers(net)[0].router is own
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_uniform_warm_up_is_even_and_then_ends(data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary, experts=8)
    with torch.no_grad():
        for layer in moe_layers(net).values():
            assert layer.gate is not None
            layer.gate.weight[0] += 1.0  # a router that has made up its mind
    records = tiny.run(net, data, tiny.options(steps=8, router_warmup=4, learning_rate=1e-6))
    spread = [record.health[0].variation for record in records]
    assert max(spread[:4]) < 0.25 < min(spread[4:]), spread


def test_frozen_routers_stay_and_experts_learn(data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary)
    before = tiny.values(net)
    records = tiny.run(net, data, tiny.options(steps=3, freeze_router=True))
    moved = tiny.differing(before, tiny.values(net))
    assert moved and not any(".gate." in name for name in moved)
    assert any("experts.down" in name for name in moved) and records[-1].loss < records[0].loss


@pytest.mark.parametrize("rule, rate", [("sign", 0.01), ("proportional", 0.01), ("quantile", 0.001)])
def test_each_bias_rule_evens_the_load(rule: str, rate: float, data: TokenData, vocabulary: int) -> None:
    shape = {"router": "sigmoid", "selection_bias": True, "balance_loss": 0.0, "layers": 1, "experts": 8}
    net = tiny.model(vocabulary, bias_rule=rule, bias_rate=rate, **shape)
    left = tiny.model(vocabulary, bias_rate=0.0, **shape)
    how = tiny.options(steps=40)
    steered_vio, left_vio = (
        sum(record.health[0].max_vio for record in tiny.run(one, data, how)[-10:]) / 10 for one in (net, left)
    )
    assert steered_vio < 0.6 * left_vio, (steered_vio, left_vio)


@pytest.mark.parametrize("overflow", ["position", "priority", "random", "reroute", "queue"])
def test_capacity_holds_in_training(overflow: str, data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary, capacity_factor=1.0, overflow=overflow, layers=1)
    record = tiny.run(net, data, tiny.options(steps=3))[-1]
    limit = 8 * tiny.LENGTH * 2 / 4
    seen = record.health[0]
    wanted = 8 * tiny.LENGTH * 2
    if overflow == "reroute":  # a pair is lost only where all that has room is used by its token
        assert seen.dropped < 0.05 * wanted
    else:
        assert (seen.dropped > 0) == (overflow != "queue")
    assert (seen.counts_E.max() <= limit) == (overflow != "queue")


def test_losses_have_names_that_the_table_knows() -> None:
    assert {"load", "z", "sparsity", "importance", "smooth_load", "group", "communication"} <= set(LOSSES)


def test_experts_per_token_can_be_set_after_training(vocabulary: int) -> None:
    net = tiny.model(vocabulary).eval()
    tokens_BS = torch.arange(12)[None]
    set_experts_per_token(net, 3)
    assert net(tokens_BS).routing[0].pairs == 36
    with pytest.raises(ConfigError, match="k is 5"):
        set_experts_per_token(net, 5)
    with pytest.raises(ConfigError, match="dense"):
        set_experts_per_token(tiny.model(vocabulary, experts=0), 2)
    with pytest.raises(ConfigError, match="ReLU has no k"):
        set_experts_per_token(tiny.model(vocabulary, router="relu"), 2)


def test_an_alarm_names_the_layer_that_collapses(data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary, experts=8, experts_per_token=1, balance_loss=0.0, z_loss=0.0)
    with torch.no_grad():
        gate = moe_layers(net)[1].gate
        assert gate is not None
        gate.weight.zero_()
        gate.weight[3].fill_(1e-3)
        net.blocks[1].feed_forward_norm.weight.fill_(1.0)
    how = tiny.options(steps=15, freeze_router=True)
    alarms = [alarm for record in tiny.run(net, data, how) for alarm in record.alarms]
    assert any(alarm.layer == 1 and alarm.kind == "collapsed" for alarm in alarms), alarms
    assert len({(alarm.layer, alarm.kind) for alarm in alarms}) == len(alarms), "each is said once"
    assert all(alarm.advice for alarm in alarms)


def test_schedules_reach_the_model(data: TokenData, vocabulary: int) -> None:
    """A temperature that never ends changes what is trained; one that is 1 does not."""
    plain, same, hot = (tiny.model(vocabulary, layers=1) for _ in range(3))
    how = tiny.options(steps=3)
    tiny.run(plain, data, how)
    tiny.run(same, data, tiny.options(steps=3, router_temperature="1:1@2"))
    tiny.run(hot, data, tiny.options(steps=3, router_temperature="5:1@100"))
    tiny.assert_same_bits(tiny.values(plain), tiny.values(same))
    assert tiny.differing(tiny.values(plain), tiny.values(hot))
    assert Schedule.parse("5:1@100").at(3) == pytest.approx(4.88)
