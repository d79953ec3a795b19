"""Measuring: each figure means what its name says. How large it is depends on the machine and is not asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moiety import cost
from moiety.config import ModelConfig
from moiety.errors import DependencyError, StorageError
from moiety.infer import limits
from moiety.infer.streaming import process_bytes
from moiety.plan.profile import ATTENTION, OVERHEADS, ROWS, Figure, read_profile, write_profile
from moiety.quant.pretend import packed_model

TRUE = {"step": 3e-4, "layer": 2e-5, "sequence": 5e-5, "vocabulary": 3e-10, "token": 4e-6, "width": 7e-10}
WEIGHT_S, VALUE_S, OPERATION_S = 2e-11, 4e-10, 1e-11


def exact(value: float) -> Figure:
    return Figure(value, value, value)


class MadeUp:
    """Steps that take what a formula says."""

    def step(
        self, config: ModelConfig, *, batch: int = 1, prompt: int = 16, kv_dtype: str = "auto"
    ) -> Figure:
        seconds = TRUE["step"] + config.layers * TRUE["layer"] + batch * TRUE["sequence"]
        seconds += batch * config.vocab_size * TRUE["vocabulary"]
        seconds += 2 * WEIGHT_S * config.vocab_size * config.d_model if batch > 1 else 0
        values = batch * cost.kv_bytes(config, prompt, 1)
        return exact(
            seconds + values * VALUE_S * (0.5 if kv_dtype == "bf16" else 1.0 if kv_dtype == "fp32" else 0)
        )

    def prompt(self, config: ModelConfig, tokens: int) -> Figure:
        seconds = tokens * config.layers * (TRUE["token"] + config.d_model * TRUE["width"])
        seconds += TRUE["step"] + config.layers * TRUE["layer"] + TRUE["sequence"]
        seconds += 32 * WEIGHT_S * cost.flops_per_token(config).total / 2 * tokens / 512
        for done in range(0, tokens, 512):
            scores = cost.flops_per_token(config, done + 256).components["attention_scores"]
            seconds += 512 * scores * OPERATION_S
        return exact(seconds)


def test_costs_besides_products_are_found_again() -> None:
    linear = {
        "1": exact(WEIGHT_S),
        "8": exact(WEIGHT_S),
        "64": exact(8 * WEIGHT_S),
        "512": exact(32 * WEIGHT_S),
    }
    found = limits._overhead(MadeUp(), linear, linear, exact(OPERATION_S))  # type: ignore[arg-type]
    assert set(found) == set(OVERHEADS)
    # the head's products at 16 rows and the little ones of the small model are where the formula and reality part
    for name in ("layer", "vocabulary", "token", "width"):
        assert found[name].middle == pytest.approx(TRUE[name], rel=0.02), name
    for name in ("step", "sequence"):
        assert found[name].middle == pytest.approx(TRUE[name], rel=0.25), name
    attention = limits._attention(MadeUp())  # type: ignore[arg-type]
    assert set(attention) == set(ATTENTION)
    assert attention["fp32"].middle == pytest.approx(VALUE_S) and attention["bf16"].middle == pytest.approx(
        VALUE_S / 2
    )
    assert attention["operation"].middle == pytest.approx(OPERATION_S)


def test_figures_are_median_least_and_nine_of_ten() -> None:
    assert limits._figure([5.0, 1.0, 3.0]) == (3.0, 1.0, 5.0)
    assert limits._figure(list(range(101))) == (50, 0, 90)
    assert limits._figure([2.0]) == (2.0, 2.0, 2.0)
    assert limits._spread(4.0, Figure(3.0, 2.0, 5.0)) == (6.0, 4.0, 10.0)
    assert limits._spread(-1.0, Figure(3.0, 2.0, 5.0)) == (0.0, 0.0, 0.0), "nothing takes less than no time"


@pytest.mark.parametrize(("busy", "rows"), [(4, 1), (4, 8), (2, 512), (6, 3)])
def test_even_routing_gives_every_busy_expert_its_rows(busy: int, rows: int) -> None:
    routing = limits._even_routing(6, busy, rows)
    assert routing.counts_E.tolist() == [rows] * busy + [0] * (6 - busy)
    assert routing.tokens == busy // 2 * rows == len(routing.token_N.unique())
    assert torch.bincount(routing.token_N).eq(2).all(), "each token has two experts"
    for token_R in routing.token_N.split(rows):
        assert len(token_R.unique()) == rows, "and an expert each token once"


def test_a_disk_is_read_in_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READS", (1 << 12, 1 << 16, 1 << 30))
    found, note = limits.disk_rates(tmp_path, 1 << 20)
    assert set(found) == {"4096", "65536"}, "a read that is longer than a quarter of the file says nothing"
    assert all(one.low > 0 and one.low <= one.middle <= one.high for one in found.values())
    assert "page cache" in note and list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="nowhere"):
        limits.disk_rates(tmp_path / "nowhere", 1 << 20)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "COLD_BYTES": 1 << 18,
        "WIDTH": 192,
        "EXPERT_WIDTH": 64,
        "BUFFER_BYTES": 1 << 20,
        "READS": (1 << 12, 1 << 14),
    }.items():
        monkeypatch.setattr(limits, name, value)


@pytest.mark.parametrize("form", limits.FORMATS)
@pytest.mark.usefixtures("small")
def test_kernels_in_every_format(form: str) -> None:
    for table in (
        limits.expert_seconds(packed_model, form, 0.0),
        limits.linear_seconds(packed_model, form, 0.0),
    ):
        assert set(table) == set(map(str, ROWS))
        assert all(0 < one.low <= one.middle <= one.high < 1e-3 for one in table.values())


@pytest.mark.usefixtures("small")
def test_a_whole_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    shape = limits._shape

    def short(**changes: Any) -> ModelConfig:
        changes["vocab_size"] = min(changes.get("vocab_size", 256), 512)
        return shape(**changes)

    monkeypatch.setattr(limits, "_shape", short)
    monkeypatch.setattr(limits, "disk_rates", lambda folder, size: ({"4096": exact(1e9)}, f"{size}"))
    profile = limits.measure(packed_model, tmp_path, said.append, quick=True)
    assert (
        "memory" in said
        and any("disk" in line for line in said)
        and profile.threads == torch.get_num_threads()
    )
    assert {"fp32", "int8-g32", "int4-g32"} == profile.experts.keys() == profile.linear.keys()
    assert profile.process_bytes.keys() == {"plain", "packed"} and min(profile.process_bytes.values()) > 1e7
    assert profile.memory_bytes > 1e8 and str(profile.threads) in profile.read_rate
    write_profile(profile, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile


def test_without_kernels_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moiety.backends.cpu.level", lambda: "")
    with pytest.raises(DependencyError, match="kernels"):
        limits.measure(packed_model, tmp_path, print)


def test_the_smallest_memory_is_a_processs_own() -> None:
    before = process_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert process_bytes() - before > 48 << 20
    assert held.numel() == 64 << 20
