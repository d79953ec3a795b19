"""Replays against plain definitions of each cache, against arithmetic, and against published counts."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moiety.errors import ConfigError, FormatError, UsageError
from moiety.plan.replay import BELADY, Point, Rates, Replay, replay
from moiety.residency import POLICIES
from moiety.tracefile import Chunk, RoutingTrace, TraceHeader, trace_of
from moiety.traceimport import from_counts, from_routed_experts

REAL = tuple(POLICIES)


def zipf(
    *, layers: int, experts: int, k: int, tokens: int, power: float = 0.7, **header: Any
) -> RoutingTrace:
    """Tokens whose experts fall off as a power of their rank, another order in every layer."""
    draw = np.random.default_rng(7)
    weights_LE = np.stack([draw.permutation(1.0 / np.arange(1, experts + 1) ** power) for _ in range(layers)])
    drawn = from_counts(weights_LE, k=k, tokens=tokens, seed=1)
    return trace_of(replace(drawn.header, **header), list(drawn.chunks()))


def by_policy(found: Replay, policy: str) -> list[Point]:
    return [point for point in found.points if point.policy == policy]


def rates_of(found: Replay, policy: str) -> dict[int, float]:
    return {point.slots: point.hit_rate for point in by_policy(found, policy)}


def naive_lru(trace: RoutingTrace, slots: int) -> float:
    """When each was used last; the longest unused goes, of equals the lower, never one of the call at hand."""
    last: dict[tuple[int, int], int] = {}
    hits = uses = call = 0
    for step in trace.steps():
        for layer, experts in enumerate(step.experts):
            keys = {(layer, expert) for expert in experts}
            hits, uses, call = hits + len(keys & last.keys()), uses + len(keys), call + 1
            missing = sorted(keys - last.keys())
            last |= dict.fromkeys(keys & last.keys(), call)
            for key in missing:
                if len(last) == slots:
                    del last[min(last.keys() - keys, key=lambda one: (last[one], one))]
                last[key] = call
    return hits / uses


def test_lru_is_its_definition() -> None:
    trace = zipf(layers=3, experts=12, k=2, tokens=300)
    found = replay(trace, policies=("lru",), shares=(0.2, 0.3, 0.5, 0.8))
    for point in found.points:
        assert point.hit_rate == pytest.approx(naive_lru(trace, point.slots), abs=1e-12), point.slots
    assert found.uses == 300 * 6 and found.tokens == found.of_tokens == 300
    assert rates_of(found, "lru")[36] == pytest.approx(1 - found.first_uses / found.uses)


def test_recency_of_uniform_routing_hits_its_share() -> None:
    """Every expert alike: with S of E slots of one layer a token finds its expert S/E of the time, by any policy."""
    experts, tokens = 64, 6000
    trace = from_counts(np.ones((1, experts)), k=1, tokens=tokens, seed=3)
    found = replay(trace, policies=REAL, shares=(0.25, 0.5, 0.75))
    for point in found.points:
        share = point.slots / experts
        spread = (share * (1 - share) / tokens) ** 0.5
        assert abs(point.hit_rate - share) <= 4 * spread + 2 * experts / tokens, point


def test_nobody_is_better_than_who_knows_the_future() -> None:
    trace = zipf(layers=4, experts=16, k=2, tokens=400)
    found = replay(trace, shares=(0.05, 0.1, 0.15, 0.3, 0.6))
    best = rates_of(found, BELADY)
    assert len(best) == 6
    for point in found.points:
        assert point.hit_rate <= best[point.slots] + 1e-12, point
    for policy in (*REAL, BELADY):  # more memory, more hits: recency and foresight exactly, the others nearly
        rates = list(rates_of(found, policy).values())
        assert all(more >= less - 0.02 for less, more in itertools.pairwise(rates)), (policy, rates)
    assert rates_of(found, "lfru")[19] > rates_of(found, "lru")[19] + 0.05


def test_the_cliff() -> None:
    """With fewer slots than a token goes through recency finds nothing at all; policies that know it do."""
    layers, k = 12, 2
    trace = zipf(layers=layers, experts=8, k=k, tokens=200, power=0.5)
    found = replay(trace, policies=("lru", "lfru", "fixed"), shares=(20 / 96, 40 / 96))
    assert found.cycle == layers * k and "goes through 24 slots" in found.advice
    below, above, _ = rates_of(found, "lru").values()
    assert below == 0 and above > 0.3
    assert rates_of(found, "lfru")[20] > 0.2 and rates_of(found, "fixed")[20] > 0.2


def test_times_are_arithmetic() -> None:
    """Missed bytes over the disk, touched bytes over memory, side by side or one after the other."""
    trace = zipf(layers=2, experts=8, k=2, tokens=100, expert_bytes=(1000, 3000), dense_bytes=5000)
    found = replay(trace, policies=("layered", BELADY), shares=(0.5,), rates=Rates((1e4, 2e4), (1e6, 1e6)))
    half, full = by_policy(found, "layered")
    assert half.size_bytes == 16_000 and full.size_bytes == 32_000
    # each layer misses at its own size, what it misses is between all small and all large ones
    assert half.missed_bytes is not None and half.tokens_per_s is not None
    assert 1000 < half.missed_bytes / (4 * (1 - half.hit_rate)) < 3000
    touched = 5000 + 2 * 1000 + 2 * 3000
    assert found.cycle_bytes == 8000 and half.limit == "disk"
    assert half.tokens_per_s[0] == pytest.approx(1 / (half.missed_bytes / 1e4 + touched / 1e6))
    assert half.tokens_per_s[1] == pytest.approx(1 / (half.missed_bytes / 2e4))
    fast = replay(trace, policies=("layered",), shares=(0.5,), rates=Rates((1e12, 1e12), (1e6, 1e6)))
    assert fast.points[0].tokens_per_s == pytest.approx((1e6 / touched, 1e6 / touched), rel=1e-3)
    assert fast.points[0].limit == "memory" and fast.knee == fast.points[0]
    assert "90% of the tokens/s of all experts" in fast.advice and "16 MB" not in fast.advice
    slow = replay(trace, policies=("layered",), shares=(0.5,), rates=Rates((1e2, 1e2), (1e6, 1e6)))
    assert slow.knee is None and "no budget here below all experts" in slow.advice
    other = replay(trace, policies=("layered",), budgets=(16_000,), expert_bytes=(2000, 2000), dense_bytes=1)
    assert [point.size_bytes for point in other.points] == [16_000, 32_000]
    assert other.points[0].tokens_per_s is None and any("no tokens/s" in note for note in other.notes)


def test_a_batch_shares_its_experts() -> None:
    """Two requests in a step, the same expert: one use; tokens per second count both."""
    one = np.zeros((50, 1, 1), np.int64)
    one[:, 0, 0] = np.arange(50) % 2 + 1
    trace = from_routed_experts([one, one], experts=4, prompts=[0, 0])
    (chunk,) = trace.chunks()
    order = np.argsort(np.tile(np.arange(50), 2), kind="stable")
    rows = {name: array[order] for name, array in chunk.arrays.items() if name != "tokens_S"}
    both = trace_of(
        replace(trace.header, expert_bytes=(100,)), [Chunk(tokens_S=np.full(50, 2, np.int32), **rows)]
    )
    assert [step.requests for step in both.steps()] == [2] * 50
    found = replay(both, policies=("lru",), shares=(0.25,), rates=Rates((100, 100), (1e9, 1e9)))
    assert found.uses == 50 and found.points[0].hit_rate == 0 and found.points[1].hit_rate == 1 - 2 / 50
    assert found.points[0].tokens_per_s == pytest.approx((2, 2))


def text_and_answer(prompt: int, answer: int) -> RoutingTrace:
    draw = np.random.default_rng(0)
    rows = np.stack([[draw.permutation(8)[:2] for _ in range(2)] for _ in range(prompt + answer)])
    return from_routed_experts([rows], experts=8, prompts=[prompt])


def test_prompts_are_left_out_and_texts_are_taken_apart() -> None:
    found = replay(text_and_answer(100, 80), policies=("lru",), shares=(0.5,))
    assert found.tokens == 80 and "100 tokens of prompts are left out" in found.notes
    found = replay(text_and_answer(100, 10), policies=("lru",), shares=(0.5,))
    assert found.tokens == 110 and any("hardly any answers" in note for note in found.notes)
    assert found.uses == 110 * 4


def test_null_experts_take_no_slot() -> None:
    trace = zipf(layers=2, experts=8, k=2, tokens=100, null_experts=3)
    found = replay(trace, policies=("lru",), shares=(1.0,))
    assert found.points[0].slots == 10 and found.uses < 400


def test_long_traces_are_cut_and_it_is_said() -> None:
    trace = zipf(layers=2, experts=8, k=2, tokens=2000, skipped_tokens=7, dropped_tokens=9)
    found = replay(trace, policies=("lru", "lfu"), shares=(0.5,), most_uses=4 * 4 * 500)
    assert found.tokens == 500 and found.of_tokens == 2000
    assert any("first 500 of 2,000 tokens" in note for note in found.notes)
    assert any("7 tokens of the run were skipped" in note for note in found.notes)
    assert any("9 tokens of the run were dropped" in note for note in found.notes)


def test_policies_that_need_more_slots_have_no_point() -> None:
    trace = zipf(layers=5, experts=8, k=2, tokens=80)
    found = replay(trace, policies=REAL, shares=(1 / 40, 3 / 40, 0.5))
    assert [point.slots for point in by_policy(found, "layered")] == [20, 40]
    assert [point.slots for point in by_policy(found, "fixed")] == [3, 20, 40]
    assert [point.slots for point in by_policy(found, "lru")] == [1, 3, 20, 40]


def test_refusals() -> None:
    trace = zipf(layers=2, experts=8, k=2, tokens=80)
    with pytest.raises(UsageError, match="belady"):
        replay(trace, policies=("best",))
    with pytest.raises(UsageError):
        replay(trace, policies=())
    with pytest.raises(UsageError, match="how large"):
        replay(trace, budgets=(1000,))
    for shares in ((), (0.0,), (-1.0, 0.5)):
        with pytest.raises(ConfigError, match="shares"):
            replay(trace, shares=shares)
    with pytest.raises(UsageError, match="empty"):
        replay(trace_of(trace.header, []))
    counts = TraceHeader(level="counts", layers=(0,), experts=(4,))
    some = Chunk(tokens_S=np.ones(1, np.int32), counts_SLE=np.ones((1, 1, 4), np.uint32))
    with pytest.raises(FormatError, match="counts alone"):
        replay(trace_of(counts, [some]))


def test_a_large_trace_is_answered_within_a_minute() -> None:
    """48 layers of 128 experts: a tenth of the work that is allowed, and it is said to be cut."""
    trace = zipf(layers=48, experts=128, k=8, tokens=1500, power=0.6)
    begun = time.process_time()
    found = replay(trace, shares=(0.25, 0.5), most_uses=2_000_000)
    assert time.process_time() - begun < 10
    assert found.tokens == 2_000_000 // (3 * 6 * 384)
    assert any("of 1,500 tokens are replayed" in note for note in found.notes)


def published(name: str) -> tuple[Any, int]:
    folder = os.environ.get("MOIETY_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(folder) / "olmoe_mixtral_routing_counts.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not here; MOIETY_SHARED_DATA names its folder")
    models: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["models"]
    one = next(one for key, one in models.items() if key.startswith(name))
    return one["counts"], one["top_k"]


def hits(counts_LE: Sequence[Any], k: int, share: float) -> dict[str, float]:
    found = replay(from_counts(counts_LE, k=k, tokens=600, seed=0), shares=(share,))
    return {point.policy: point.hit_rate for point in found.points if point.share < 1}


def test_published_counts() -> None:
    """Half of OLMoE's experts hold more than half of what a domain wants, half of Mixtral's no more than half."""
    olmoe, k = published("OLMoE")
    mixtral, few = published("Mixtral")
    half, even = hits(olmoe["github"], k, 0.5), hits(mixtral["github"], few, 0.5)
    assert half["fixed"] > 0.75 and half["lfu"] > 0.7 and half["lru"] > 0.6
    assert 0.45 < even["fixed"] < 0.6 and 0.45 < even["lfu"] < 0.6
    # what a fixed set can have at most is the share of the most used experts
    counts_LE = np.array(olmoe["github"], float)
    chance = np.sort((counts_LE / counts_LE.sum(1, keepdims=True)).ravel())[::-1]
    bound = chance[: counts_LE.size // 2].sum() / len(counts_LE)
    assert half["fixed"] == pytest.approx(bound, abs=0.03)
