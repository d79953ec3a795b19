"""Whether a placement pays: said with figures, for uniform, skewed and drifting routing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moiety.errors import ConfigError
from moiety.parallel.worth import AS_IT_IS, BALANCED, IN_NODES, compare
from moiety.plan.hardware import DEVICES
from moiety.plan.links import Cluster
from moiety.plan.search import short_bytes
from moiety.registry import lookup_decoder
from moiety.tracefile import Chunk, RoutingTrace, TraceHeader, trace_of
from moiety.traceimport import from_counts, from_routed_experts

CONFIG = lookup_decoder("olmoe-1b-7b")
LAYERS = len(CONFIG.moe_layers)
SIZES = [12.6e6] * LAYERS


def cluster(ranks: int = 8, nodes: int = 2) -> Cluster:
    return Cluster(device=DEVICES["h100"], ranks=ranks, nodes=nodes)


def skewed(tokens: int = 600, fall: float = 0.6) -> RoutingTrace:
    """Popularity that falls with the rank, in another order in each layer."""
    draw = np.random.default_rng(0)
    counts = [draw.permutation(np.arange(1, 65) ** -fall) for _ in range(LAYERS)]
    return from_counts(np.stack(counts), k=8, tokens=tokens)


def test_a_skewed_trace_pays() -> None:
    found = compare(CONFIG, cluster(), SIZES, trace=skewed(), redundant=8)
    before, balanced, inside = found.ways
    assert [way.name for way in found.ways] == [AS_IT_IS, BALANCED, IN_NODES]
    assert before.imbalance > 1.3 and 1 <= balanced.imbalance < 1.15
    assert found.advice.startswith("placing experts anew pays: the busiest rank has")
    assert "repaid after" in found.advice and "judged by the second half" in found.notes[0]
    assert before.rank_bytes == pytest.approx(LAYERS * 8 * 12.6e6)
    assert balanced.rank_bytes == pytest.approx(LAYERS * 9 * 12.6e6)
    assert inside.rank_bytes == pytest.approx(LAYERS * 18 * 12.6e6)
    assert sum(before.moved) == 0 and before.repaid_tokens is None
    assert f"moving {short_bytes(sum(balanced.moved))} takes" in found.advice
    assert sum(balanced.moved) > 0 and balanced.move_seconds.high > balanced.move_seconds.low > 0
    assert all(size.between == 0 for size in inside.token_bytes.values())
    for way in found.ways[:2]:
        sizes = way.token_bytes
        assert sizes["pair"].between > sizes["rank"].between > sizes["node"].between > 0
        # K (1 - 1/nodes) rows of 2,048 in bfloat16, out and back, in each layer
        assert sizes["pair"].between == pytest.approx(LAYERS * 8 * 0.5 * 2048 * 2 * 2)
    plain = json.loads(json.dumps(found.values()))
    assert np.array(plain["ways"][1]["expert_of_slot"]).shape == (LAYERS, 8, 9)
    assert plain["ways"][1]["mode"] == "global" and plain["layers"] == list(range(LAYERS))


def test_the_limit_of_nodes_is_counted() -> None:
    found = compare(CONFIG, cluster(16, 4), SIZES, trace=skewed(200), node_limit=2)
    for way in found.ways[:2]:
        assert way.limited_bytes is not None
        assert 0 < way.limited_bytes.between < way.token_bytes["node"].between
        assert way.limited_bytes.between <= LAYERS * 2 * 0.75 * 2048 * 2 * 2


def test_uniform_loads_are_said_and_balanced() -> None:
    found = compare(CONFIG, cluster(), SIZES, redundant=8, node_limit=1)
    assert found.advice.startswith("nothing says that a placement pays, as loads are unknown")
    assert (
        found.notes[0].startswith("loads are taken for uniform")
        and "node_limit is left out" in found.notes[1]
    )
    assert found.ways[0].imbalance == pytest.approx(1)
    assert [way.imbalance for way in found.ways[1:]] == pytest.approx([1, 1], abs=0.15)


def test_even_routing_does_not_pay_and_says_so() -> None:
    even = from_routed_experts([np.tile(np.arange(64).reshape(8, 1, 8), (20, LAYERS, 1))], experts=64)
    found = compare(CONFIG, cluster(nodes=1), SIZES, trace=even, redundant=8)
    assert found.advice.startswith("placing experts anew does not pay: the busiest rank has 1.0")
    assert len(found.ways) == 2, "one node has no other nodes"


def test_a_load_that_turns_is_not_flattered() -> None:
    """Hot experts of the second half are not those of the first: a placement for the first is judged by the second."""
    first, second = np.arange(8), np.arange(56, 64)
    rows = np.concatenate([np.tile(one, (50, 1)) for one in (first, second)])
    trace = from_routed_experts([np.repeat(rows[:, None], LAYERS, 1)], experts=64)
    found = compare(CONFIG, cluster(nodes=1), SIZES, trace=trace, redundant=8)
    assert found.ways[1].imbalance > 1.9, found.ways[1].imbalance
    own = compare(CONFIG, cluster(nodes=1), SIZES, trace=from_routed_experts(
        [np.repeat(rows[:50, None], LAYERS, 1)], experts=64), redundant=8)  # fmt: skip
    assert own.ways[1].imbalance < 1.2


def test_counts_alone_balance_and_say_what_they_cannot() -> None:
    header = TraceHeader(level="counts", layers=tuple(range(LAYERS)), experts=(64,) * LAYERS, k=8)
    counts_SLE = np.tile(np.arange(64), (4, LAYERS, 1)).astype("u4")
    trace = trace_of(header, [Chunk(tokens_S=np.full(4, 252, "i4"), counts_SLE=counts_SLE)])
    found = compare(CONFIG, cluster(), SIZES, trace=trace)
    assert found.ways[0].imbalance == pytest.approx(480 - 28, rel=1) and found.ways[0].imbalance > 1.7
    assert found.ways[1].imbalance < 1.01
    assert any("counts alone" in note for note in found.notes)


def test_a_node_that_has_no_room_and_groups_that_stay_together() -> None:
    config = lookup_decoder("deepseek-v3")
    layers, h800 = config.moe_layers, Cluster(device=DEVICES["h800"], ranks=16, nodes=2)
    header = TraceHeader(level="counts", layers=layers, experts=(256,) * len(layers), k=8)
    counts_SLE = np.tile(np.arange(256), (2, len(layers), 1)).astype("u4")
    trace = trace_of(header, [Chunk(tokens_S=np.full(2, 4080, "i4"), counts_SLE=counts_SLE)])
    found = compare(config, h800, [88e6] * len(layers), trace=trace)
    assert "more than the 68.5 GiB of a h800" in found.advice
    assert found.ways[1].placement.mode == "hierarchical"
    assert 1.9 < found.ways[0].imbalance < 2 and found.ways[1].imbalance < 1.01
    node_of_group = [
        {
            rank // 8
            for rank in np.flatnonzero((found.ways[1].placement.layers[0].expert_RS // 32 == group).any(1))
        }
        for group in range(8)
    ]
    assert all(len(nodes) == 1 for nodes in node_of_group)
    even = compare(config, h800, [88e6] * len(layers))
    assert even.ways[1].placement is even.ways[0].placement, "of equals the one that moves nothing"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="the trace has 16 layers of 64 to 64 experts, the model 58 of 256"):
        compare(lookup_decoder("deepseek-v3"), cluster(), [1.0] * 58, trace=skewed(20))
    with pytest.raises(ConfigError, match="dense"):
        compare(lookup_decoder("llama-3-70b"), cluster(), [])
    with pytest.raises(ConfigError, match="not shared evenly by 6 ranks"):
        compare(CONFIG, cluster(6), SIZES)
