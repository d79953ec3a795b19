"""The loop: it learns, it does not matter how a step is cut or a run is interrupted, and NaN changes nothing."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moiety.errors import TrainingError
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.moe.routers import Router, RouterContext, TopK
from moiety.train.data import TokenData
from moiety.train.loop import check_router_gradient, moe_layers, train
from moiety.train.state import RunState, latest_checkpoint, read_state
from moiety.train.track import open_trackers, values_of
from tests.train import tiny
from tests.train.tiny import LENGTH, Poison, assert_same_bits

KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "switch": {"router": "switch"},
    "sigmoid": {"router": "sigmoid", "selection_bias": True, "balance_loss": 0.0},
    "dense": {"experts": 0},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenData, Tokenizer]:
    return tiny.text(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def data(text: tuple[TokenData, Tokenizer]) -> TokenData:
    return text[0]


@pytest.fixture(scope="module")
def vocabulary(text: tuple[TokenData, Tokenizer]) -> int:
    return text[1].vocab_size


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: str, dtype: str, data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary, **KINDS[kind])
    records = tiny.run(net, data, tiny.options(dtype=dtype))
    assert math.log(vocabulary) * 0.95 < records[0].loss < math.log(vocabulary) * 1.05
    assert records[-1].loss < 0.6 * records[0].loss, [round(record.loss, 2) for record in records]
    assert not any(record.skipped for record in records) and records[-1].evaluation is not None
    assert all(bits < 3 for bits in records[-1].evaluation.bits_per_byte.values())
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    for record in records:
        assert (record.balance_loss is None) == (record.z_loss is None) == (kind == "dense")
        assert set(record.health) == (set() if kind == "dense" else {0, 1})
        if record.balance_loss is not None:  # scores and load may disagree a little, so the floor is soft
            assert 0.9 < record.balance_loss < 4 and record.z_loss is not None and record.z_loss > 0


def test_selection_bias_follows_the_load(data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary, **KINDS["sigmoid"])
    moved = {layer: np.zeros(4) for layer in (0, 1)}
    for record in train(net, data, tiny.options(steps=8)):
        for layer, health in record.health.items():
            moved[layer] += np.sign(health.counts_E.mean() - health.counts_E)
            bias = moe_layers(net)[layer].selection_bias
            assert bias is not None and not bias.requires_grad
            np.testing.assert_allclose(bias.numpy(), 0.001 * moved[layer], atol=1e-8)
    assert all(np.abs(total).max() >= 3 for total in moved.values()), moved


def test_selection_bias_sees_the_whole_step(data: TokenData, vocabulary: int) -> None:
    """One update from the load of all micro-batches; four updates would move four times as far."""
    whole, cut = (tiny.model(vocabulary, **KINDS["sigmoid"]) for _ in range(2))
    (first,) = tiny.run(whole, data, tiny.options(steps=1))
    (second,) = tiny.run(cut, data, tiny.options(steps=1, batch=2, accumulate=4))
    for layer in (0, 1):
        np.testing.assert_array_equal(first.health[layer].counts_E, second.health[layer].counts_E)
        one, other = moe_layers(whole)[layer].selection_bias, moe_layers(cut)[layer].selection_bias
        assert one is not None and other is not None and one.abs().max() == pytest.approx(0.001)
        assert torch.equal(one, other)


def _after(
    data: TokenData, vocabulary: int, batch: int, accumulate: int, **changes: Any
) -> dict[str, Tensor]:
    net = tiny.model(vocabulary, balance_loss=0.5, z_loss=0.01)
    how = tiny.options(steps=3, warmup=0, learning_rate=1e-3, batch=batch, accumulate=accumulate, **changes)
    records = tiny.run(net, data, how)
    assert [record.state.sequences_seen for record in records] == [8, 16, 24]
    assert [record.state.tokens_seen for record in records] == [8 * LENGTH, 16 * LENGTH, 24 * LENGTH]
    return tiny.values(net)


@pytest.mark.parametrize("scope", ["step", "sequence"])
def test_cutting_a_step_changes_nothing(scope: str, data: TokenData, vocabulary: int) -> None:
    whole = _after(data, vocabulary, 8, 1, balance_scope=scope)
    for batch, accumulate in ((2, 4), (4, 2), (1, 8)):
        cut = _after(data, vocabulary, batch, accumulate, balance_scope=scope)
        assert tiny.distance(whole, cut) < 1e-5, (batch, accumulate)


def test_cutting_a_step_matters_to_the_balance_of_a_micro_batch(data: TokenData, vocabulary: int) -> None:
    """What the test above would see if the balance loss were not right under accumulation."""
    whole = _after(data, vocabulary, 8, 1, balance_scope="micro_batch")
    assert tiny.distance(whole, _after(data, vocabulary, 2, 4, balance_scope="micro_batch")) > 1e-4
    assert tiny.distance(whole, _after(data, vocabulary, 8, 1, balance_scope="step")) < 1e-7


def test_what_is_reported_does_not_depend_on_the_cut(data: TokenData, vocabulary: int) -> None:
    first, second = (
        tiny.run(tiny.model(vocabulary), data, tiny.options(steps=1, batch=batch, accumulate=8 // batch))[0]
        for batch in (8, 2)
    )
    for name in ("loss", "balance_loss", "z_loss", "gradient_norm"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-5), name
    for layer, health in first.health.items():
        one, other = health.numbers(), second.health[layer].numbers()
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-5), name


def test_reported_health_adds_up(data: TokenData, vocabulary: int) -> None:
    for kind, chosen in (("softmax", 2), ("switch", 1), ("sigmoid", 2)):
        for record in train(tiny.model(vocabulary, **KINDS[kind]), data, tiny.options(steps=3, accumulate=2)):
            for health in record.health.values():
                assert health.tokens == 2 * 8 * LENGTH
                assert health.counts_E.sum() == health.tokens * chosen
                assert health.experts_per_token == chosen and health.drop_rate == 0


def test_clipping_limits_the_update(data: TokenData, vocabulary: int) -> None:
    """Reported norms are those before clipping; what acts is clipped, to nothing here."""
    runs = {}
    for clip in (0.0, 1e-20, 1e9):
        net = tiny.model(vocabulary)
        norm = tiny.run(net, data, tiny.options(steps=1, clip=clip, weight_decay=0.0))[0].gradient_norm
        runs[clip] = norm, tiny.values(net)
    assert runs[0.0][0] == runs[1e-20][0] == runs[1e9][0] > 0.1
    assert_same_bits(runs[0.0][1], runs[1e9][1])
    untouched = tiny.values(tiny.model(vocabulary))
    assert tiny.distance(untouched, runs[1e-20][1]) < 1e-6 < tiny.distance(untouched, runs[0.0][1])


def _tracked(
    net: Transformer, data: TokenData, how: Any, folder: Path, *, resume: Path | None = None, stop_at: int = 0
) -> None:
    """A run with metrics.jsonl as the command keeps it, stopped after some step."""
    stop = threading.Event()
    after = 0 if resume is None else read_state(resume).step
    (tracker,) = open_trackers((), folder, after_step=after)
    for record in train(net, data, how, run_folder=folder, resume=resume, stop=stop):
        tracker.log(record.state.step, values_of(record))
        if record.state.step == stop_at - 1:
            stop.set()
    tracker.close()


def _metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "step_seconds"} for line in lines]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_stopped_twice_is_the_run_never_stopped(
    kind: str, dtype: str, data: TokenData, vocabulary: int, tmp_path: Path
) -> None:
    how = tiny.options(steps=16, batch=3, accumulate=5, dtype=dtype, evaluate_every=5, seed=7)
    assert 4 * 15 < data.sequences(LENGTH) < 14 * 15, (
        "one stop should be in the first epoch, one in the second"
    )
    straight = tiny.model(vocabulary, **KINDS[kind])
    (tmp_path / "straight").mkdir()
    (tmp_path / "stopped").mkdir()
    _tracked(straight, data, how, tmp_path / "straight")
    at, net = None, straight
    for number, stop_at in enumerate((4, 14, 0)):
        torch.rand(number + 1)  # what else the process drew does not matter
        net = tiny.model(vocabulary, seed=number, **KINDS[kind])
        _tracked(net, data, how, tmp_path / "stopped", resume=at, stop_at=stop_at)
        at = latest_checkpoint(tmp_path / "stopped").path
        assert at is not None and at.name == f"step-{stop_at or 16:08}"
    assert_same_bits(tiny.values(straight), tiny.values(net))
    last = latest_checkpoint(tmp_path / "straight").path
    assert last is not None and at is not None
    fresh = tiny.model(vocabulary, **KINDS[kind])
    assert_same_bits(tiny.moments(last, fresh, how), tiny.moments(at, fresh, how))
    assert_same_bits(tiny.values(straight), tiny.values(fresh))
    assert _metrics(tmp_path / "straight") == _metrics(tmp_path / "stopped")
    one, other = read_state(last), read_state(at)
    seconds = {"seconds": 0.0, "last_evaluation": None, "best_evaluation": None}
    assert replace(one, **seconds) == replace(other, **seconds)  # type: ignore[arg-type]


def test_metrics_after_the_checkpoint_are_cut(data: TokenData, vocabulary: int, tmp_path: Path) -> None:
    """Killed after step 5, saved at step 4: step 5 is done again and stands in the metrics once."""
    how = tiny.options(steps=6, save_every=2)
    net = tiny.model(vocabulary)
    (tracker,) = open_trackers((), tmp_path)
    for record in itertools.islice(train(net, data, how, run_folder=tmp_path), 5):
        tracker.log(record.state.step, values_of(record))
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    before = _metrics_steps(tmp_path)
    assert before == [1, 2, 3, 4, 5]
    _tracked(tiny.model(vocabulary), data, how, tmp_path, resume=latest_checkpoint(tmp_path).path)
    assert [line["step"] for line in _metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def _metrics_steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def test_a_finished_run_has_nothing_left_to_do(data: TokenData, vocabulary: int, tmp_path: Path) -> None:
    how = tiny.options(steps=2)
    net = tiny.model(vocabulary)
    tiny.run(net, data, how, run_folder=tmp_path)
    again = tiny.model(vocabulary, seed=1)
    assert tiny.run(again, data, how, resume=latest_checkpoint(tmp_path).path) == []
    assert_same_bits(tiny.values(net), tiny.values(again))


def test_keep_and_save_every(data: TokenData, vocabulary: int, tmp_path: Path) -> None:
    records = tiny.run(
        tiny.model(vocabulary), data, tiny.options(steps=7, save_every=2, keep=2), run_folder=tmp_path
    )
    written = [record.checkpoint.name for record in records if record.checkpoint is not None]
    assert written == ["step-00000002", "step-00000004", "step-00000006", "step-00000007"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == written[-2:]


PLANTS: dict[str, Callable[[Transformer, Poison], None]] = {
    "loss": tiny.poison_loss,
    "gradient": tiny.poison_gradient,
    "logit": tiny.poison_logits,
}


def _finite_on_disk(folder: Path) -> int:
    """Check every number under a run's folder; returns how many tensors there were."""
    seen = 0
    for path in folder.rglob("*.safetensors"):
        for name, value in load_file(path).items():
            assert bool(value.isfinite().all()), (path, name)
            seen += 1
    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        text = path.read_text(encoding="utf-8")
        assert "NaN" not in text and "Infinity" not in text, path
    return seen


@pytest.mark.parametrize("scope", ["step", "sequence"])
@pytest.mark.parametrize("planted", PLANTS)
def test_a_step_with_nan_changes_nothing(
    planted: str, scope: str, data: TokenData, vocabulary: int, tmp_path: Path
) -> None:
    how = tiny.options(steps=8, batch=4, accumulate=2, save_every=1, keep=20, balance_scope=scope)
    net = tiny.model(vocabulary, router="sigmoid", selection_bias=True)
    poison = Poison(frozenset({3, 4}))
    PLANTS[planted](net, poison)
    (tracker,) = open_trackers((), tmp_path)
    states: dict[int, dict[str, Tensor]] = {}
    records = []
    for record in poison.over(train(net, data, how, run_folder=tmp_path)):
        tracker.log(record.state.step, values_of(record))
        states[record.state.step] = tiny.values(net)
        records.append(record)
    tracker.close()
    assert set(poison.used) == {3, 4}
    assert [record.state.step for record in records if record.skipped] == [4, 5]
    assert [record.state.skipped_steps for record in records] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [record.state.consecutive_skips for record in records] == [0, 0, 0, 1, 2, 0, 0, 0]
    assert [record.state.sequences_seen for record in records] == [8 * step for step in range(1, 9)]
    assert_same_bits(states[3], states[4])
    assert_same_bits(states[3], states[5])
    weights = {name for name, _ in net.named_parameters()}
    assert tiny.differing(states[5], states[6]) >= weights, "training goes on"
    assert any("selection_bias" in name for name in tiny.differing(states[5], states[6]))
    spare = tiny.model(vocabulary, router="sigmoid", selection_bias=True)
    before, after, later = (
        tiny.moments(tmp_path / "checkpoints" / f"step-{step:08}", spare, how) for step in (3, 5, 6)
    )
    assert_same_bits(before, after)
    assert tiny.differing(after, later)
    assert _finite_on_disk(tmp_path) > 100
    lines = _metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert "loss" in lines[2] and ("loss" not in lines[3]) == (planted != "gradient")
    assert "gradient_norm" not in lines[3]


@pytest.mark.parametrize("planted", PLANTS)
def test_nan_without_end_stops_the_run(
    planted: str, data: TokenData, vocabulary: int, tmp_path: Path
) -> None:
    how = tiny.options(steps=20, save_every=2, most_skips=3, keep=20)
    net = tiny.model(vocabulary)
    poison = Poison(frozenset(range(5, 20)))
    PLANTS[planted](net, poison)
    records = []
    with pytest.raises(TrainingError, match="3 steps in a row") as caught:
        for record in poison.over(train(net, data, how, run_folder=tmp_path)):
            records.append(record)
    assert [record.skipped for record in records] == [False] * 5 + [True] * 3
    found = latest_checkpoint(tmp_path)
    assert found.path is not None and caught.value.hint is not None
    assert str(found.path) in caught.value.hint, "the last good checkpoint is named"
    assert records[-1].checkpoint is None and records[-1].evaluation is None
    assert found.path.name in ("step-00000004", "step-00000006")
    assert _finite_on_disk(tmp_path) > 20


def test_nan_from_the_start_says_that_nothing_was_saved(
    data: TokenData, vocabulary: int, tmp_path: Path
) -> None:
    net = tiny.model(vocabulary, balance_loss=0.0)
    with torch.no_grad():
        net.embed.weight.fill_(torch.nan)
    with pytest.raises(TrainingError) as caught:
        tiny.run(net, data, tiny.options(most_skips=2), run_folder=tmp_path)
    assert "no checkpoint" in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


def test_a_resumed_run_remembers_its_skips(data: TokenData, vocabulary: int, tmp_path: Path) -> None:
    """Two skips before the stop and one after it are three in a row."""
    how = tiny.options(steps=9, save_every=1, most_skips=3)
    net, poison = tiny.model(vocabulary), Poison(frozenset(range(1, 9)))
    tiny.poison_gradient(net, poison)
    list(itertools.islice(poison.over(train(net, data, how, run_folder=tmp_path)), 3))
    net, poison = tiny.model(vocabulary), Poison(frozenset(range(1, 9)), step=3)
    tiny.poison_gradient(net, poison)
    records = []
    latest = latest_checkpoint(tmp_path).path
    with pytest.raises(TrainingError, match="3 steps in a row") as caught:
        for record in train(net, data, how, run_folder=tmp_path, resume=latest):
            records.append(record)
    assert len(records) == 1 and latest is not None and str(latest) in str(caught.value)


def test_weights_that_overflow_are_not_written(data: TokenData, vocabulary: int, tmp_path: Path) -> None:
    """A finite gradient times an absurd rate: the update itself is what is not finite."""
    how = tiny.options(steps=6, warmup=0, learning_rate=1e39, save_every=1, keep=20, most_skips=3)
    net = tiny.model(vocabulary)
    with pytest.raises(TrainingError):
        tiny.run(net, data, how, run_folder=tmp_path)
    _finite_on_disk(tmp_path)


@dataclass(frozen=True)
class Detached(TopK):
    """A router whose scores have lost their way back."""

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return super().score(logits_TE.detach(), context)


def _with_router(vocabulary: int, router: Router, layer: int, **changes: Any) -> Transformer:
    net = tiny.model(vocabulary, **changes)
    moe_layers(net)[layer].router = router
    return net


def test_a_detached_balance_loss_is_found_before_training(data: TokenData, vocabulary: int) -> None:
    net = _with_router(vocabulary, Detached(2), 1)
    untouched = tiny.values(net)
    with pytest.raises(TrainingError, match=r"layer 1 .*norm 0") as caught:
        tiny.run(net, data, tiny.options())
    assert caught.value.hint is not None and "balance_loss" in caught.value.hint
    assert_same_bits(untouched, tiny.values(net))
    records = tiny.run(
        _with_router(vocabulary, Detached(2), 1, balance_loss=0.0), data, tiny.options(steps=2)
    )
    assert len(records) == 2, "without a balance loss there is nothing to check"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": "switch"},
        {"router": "sigmoid"},
        {"router": "sigmoid", "selection_bias": True},
        {"experts": 0},
        {"experts": 2, "router": "switch"},
        {"experts": 2, "experts_per_token": 2},
        {"experts": 1, "experts_per_token": 1},
    ],
    ids=str,
)
def test_the_check_passes_for_our_own_routers(
    changes: dict[str, Any], data: TokenData, vocabulary: int
) -> None:
    """With every expert chosen the balance loss is a constant: that is in order, and no reason to refuse a run."""
    net = tiny.model(vocabulary, **changes)
    for dtype in ("fp32", "bf16"):
        how = tiny.options(dtype=dtype)
        check_router_gradient(net, next(data.batches(B=1, S=LENGTH, seed=0)), how)
    assert all(parameter.grad is None for parameter in net.parameters()), (
        "the check leaves no gradient behind"
    )


def test_the_check_does_not_take_perfect_balance_for_a_fault(data: TokenData, vocabulary: int) -> None:
    """On a sequence of 2 tokens, two experts often get one each, and the balance loss is flat there."""
    for seed in range(20):
        net = tiny.model(vocabulary, seed=seed, experts=2, router="switch", layers=1)
        check_router_gradient(net, next(data.batches(B=1, S=2, seed=seed)), tiny.options(length=2))


def test_frozen_parts_stay(data: TokenData, vocabulary: int) -> None:
    net = tiny.model(vocabulary)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("gate" not in name and "embed" not in name)
    before = tiny.values(net)
    tiny.run(net, data, tiny.options(steps=2))
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen and tiny.differing(before, tiny.values(net)) == set(before) - frozen


def test_run_state_counts_from_zero() -> None:
    state = RunState()
    assert (state.step, state.sequences_seen, state.skipped_steps, state.consecutive_skips) == (0, 0, 0, 0)
