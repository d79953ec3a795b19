"""A race is fair: the same data, each as if alone; the twins are equal where they are said to be."""

from __future__ import annotations

import dataclasses
import statistics
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moiety import cost
from moiety.errors import ConfigError
from moiety.model.tokenizer import Tokenizer
from moiety.train.compare import Contender, Spread, over_seeds, pair, race, seeded_pairs
from moiety.train.data import TokenData
from moiety.train.evaluate import Evaluation
from moiety.train.loop import StepRecord
from moiety.train.state import RunState, latest_checkpoint
from tests.train import tiny
from tests.train.tiny import LENGTH


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenData, Tokenizer]:
    return tiny.text(tmp_path_factory.mktemp("tokens"))


def _twins(vocabulary: int, steps: int = 4, **changes: object) -> tuple[Contender, Contender]:
    return pair(
        tiny.shape(**changes), tiny.options(steps=steps), vocab_size=vocabulary, dense_learning_rate=5e-3
    )


def test_contenders_see_the_same_tokens(text: tuple[TokenData, Tokenizer]) -> None:
    twins = _twins(text[1].vocab_size)
    seen: dict[str, list[Tensor]] = {twin.name: [] for twin in twins}
    for twin in twins:

        def note(module: nn.Module, given: tuple[Tensor, ...], name: str = twin.name) -> None:
            if module.training and len(given[0]) == 8:
                seen[name].append(given[0].clone())

        twin.build().embed.register_forward_pre_hook(note)
    order = [(twin.name, record.state.step) for twin, record in race(twins, text[0])]
    assert order == [(name, step) for step in (1, 2, 3, 4) for name in ("moe", "dense")]
    assert len(seen["moe"]) == len(seen["dense"]) == 4
    for first, second in zip(seen["moe"], seen["dense"], strict=True):
        assert torch.equal(first, second)
    assert len({tokens.numpy().tobytes() for tokens in seen["moe"]}) == 4


def test_a_race_is_each_one_alone(text: tuple[TokenData, Tokenizer]) -> None:
    raced, alone = _twins(text[1].vocab_size), _twins(text[1].vocab_size)
    for _ in race(raced, text[0]):
        torch.rand(3)  # what is drawn in between does not matter
    for twin in reversed(alone):
        twin.records += tiny.run(twin.build(), text[0], twin.options)
    for first, second in zip(raced, alone, strict=True):
        tiny.assert_same_bits(tiny.values(first.build()), tiny.values(second.build()))
        assert [record.loss for record in first.records] == [record.loss for record in second.records]
        assert first.evaluation.bits_per_byte == second.evaluation.bits_per_byte
    assert raced[0].records[-1].loss != raced[1].records[-1].loss


def test_runs_of_unequal_length(text: tuple[TokenData, Tokenizer]) -> None:
    first, second = _twins(text[1].vocab_size)
    second.options = dataclasses.replace(second.options, steps=2)
    order = [twin.name for twin, _ in race([first, second], text[0])]
    assert order == ["moe", "dense", "moe", "dense", "moe", "moe"]
    assert len(first.records) == 4 and len(second.records) == 2


def test_a_stop_saves_all(text: tuple[TokenData, Tokenizer], tmp_path: Path) -> None:
    twins, stop = _twins(text[1].vocab_size, steps=50), threading.Event()
    for twin, record in race(twins, text[0], run_folder=tmp_path, tokenizer=text[1], stop=stop):
        if twin.name == "moe" and record.state.step == 2:
            stop.set()
    for twin in twins:
        latest = latest_checkpoint(tmp_path / twin.name)
        assert latest.path is not None and latest.path == twin.records[-1].checkpoint
        assert int(latest.path.name.removeprefix("step-")) in (2, 3)
        assert (latest.path / "tokenizer.json").is_file()


def test_models_are_built_once_from_the_seed(text: tuple[TokenData, Tokenizer]) -> None:
    twins = [_twins(text[1].vocab_size)[0] for _ in range(3)]
    twins[2].options = dataclasses.replace(twins[2].options, seed=1)
    torch.rand(5)
    first, second, other = (tiny.values(twin.build()) for twin in twins)
    tiny.assert_same_bits(first, second)
    assert tiny.distance(first, other) > 0.5
    assert twins[0].build() is twins[0].build()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": "switch"},
        {"router": "sigmoid", "selection_bias": True},
        {"shared_d_ff": 24},
        {"experts": 16, "experts_per_token": 4, "d_ff": 8, "tied": False},
    ],
    ids=str,
)
def test_twins_are_equal_in_active_parameters_up_to_the_router(changes: dict[str, object]) -> None:
    moe, dense = _twins(300, **changes)
    assert moe.config.moe is not None and dense.config.moe is None
    difference = cost.dense_twin_difference(moe.config)
    assert moe.parameters.active - dense.parameters.active == difference
    biases = moe.config.moe.experts if moe.config.moe.selection_bias else 0
    expected = 2 * (moe.config.moe.experts * 32 + biases)
    assert difference == expected
    assert moe.parameters.total > dense.parameters.total
    for twin in (moe, dense):
        counted = sum(value.numel() for value in tiny.values(twin.build()).values())
        assert counted == twin.parameters.total
    assert (moe.name, dense.name) == ("moe", "dense")
    assert dense.options == dataclasses.replace(moe.options, learning_rate=5e-3)
    assert dense.options.batch * dense.options.length == moe.options.batch * moe.options.length


def test_pairs_over_seeds() -> None:
    pairs = seeded_pairs(
        tiny.shape(), tiny.options(seed=5), seeds=3, vocab_size=300, dense_learning_rate=2e-3
    )
    assert [[twin.options.seed for twin in twins] for twins in pairs] == [[5, 5], [6, 6], [7, 7]]
    assert all(twins[0].config == pairs[0][0].config for twins in pairs)
    assert [twins[1].options.learning_rate for twins in pairs] == [2e-3] * 3
    for seeds in (0, -1):
        with pytest.raises(ConfigError, match=str(seeds)):
            seeded_pairs(tiny.shape(), tiny.options(), seeds=seeds, vocab_size=300)


def test_without_a_rate_of_its_own_the_twin_takes_the_other_ones() -> None:
    moe, dense = pair(tiny.shape(), tiny.options(), vocab_size=300)
    assert moe.options == dense.options


def test_a_dense_model_has_no_twin() -> None:
    with pytest.raises(ConfigError) as caught:
        pair(tiny.shape(experts=0), tiny.options(), vocab_size=300)
    assert caught.value.hint is not None and "experts" in caught.value.hint


def _record(step: int, seconds: float, bits: float | None = None) -> StepRecord:
    evaluation = None
    if bits is not None:
        nothing = np.zeros(0, np.int64)
        evaluation = Evaluation(
            bits_per_byte={"a": bits, "b": bits + 2},
            nats={},
            size_bytes={},
            counts_DLE=None,
            counts_SLE=None,
            domain_S=nothing,
            seconds=0.0,
        )
    return StepRecord(
        state=RunState(step=step),
        loss=1.0,
        tokens=8 * LENGTH,
        router_losses={},
        gradient_norm=1.0,
        learning_rate=1.0,
        skipped=False,
        health={},
        step_seconds=seconds,
        evaluation=evaluation,
    )


def test_tokens_per_second_leave_the_first_tenth_out() -> None:
    one = Contender(
        name="one",
        config=tiny.shape().config(300, LENGTH),
        options=tiny.options(batch=4, accumulate=2),
        records=[_record(step, 1000.0 if step < 2 else 0.5) for step in range(20)],
    )
    assert one.tokens_per_second == pytest.approx(4 * 2 * LENGTH / 0.5)


def test_the_last_evaluation_counts() -> None:
    one = Contender(name="one", config=tiny.shape().config(300, LENGTH), options=tiny.options())
    one.records = [_record(1, 1.0, 3.0), _record(2, 1.0, 2.0), _record(3, 1.0)]
    assert one.evaluation.bits_per_byte == {"a": 2.0, "b": 4.0}


def test_spread_over_seeds() -> None:
    bits = {"moe": (1.0, 1.5, 2.5), "dense": (2.0, 2.0, 2.0)}
    finished = [
        tuple(
            Contender(
                name=name,
                config=tiny.shape().config(300, LENGTH),
                options=tiny.options(),
                records=[_record(1, 0.25, values[seed])],
            )
            for name, values in bits.items()
        )
        for seed in range(3)
    ]
    found = over_seeds(finished)
    assert list(found) == ["moe", "dense"]
    assert list(found["moe"]) == ["mean", "a", "b", "tokens_per_second"]
    assert found["moe"]["a"].values == (1.0, 1.5, 2.5)
    assert found["moe"]["a"].mean == pytest.approx(5 / 3)
    assert found["moe"]["a"].deviation == pytest.approx(statistics.stdev([1.0, 1.5, 2.5]))
    assert found["moe"]["mean"].values == (2.0, 2.5, 3.5)
    assert found["dense"]["b"] == Spread(mean=4.0, deviation=0.0, values=(4.0, 4.0, 4.0))
    assert found["dense"]["tokens_per_second"].mean == pytest.approx(8 * LENGTH / 0.25)
    assert str(found["dense"]["b"]) == "4.000 ± 0.000"
    assert str(Spread.of([1.25])) == "1.250" and Spread.of([1.25]).deviation == 0
