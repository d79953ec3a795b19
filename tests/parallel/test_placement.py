"""Where experts go: brute force on small layers, what always holds, hot experts, recorded tokens, and refusals."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.errors import ConfigError
from moiety.parallel.placement import (
    LayerPlacement,
    Placement,
    _pack,
    contiguous,
    place,
    reached,
    trace_loads,
)
from moiety.plan.hardware import DEVICES
from moiety.plan.links import Cluster, Copies, leaving, sent
from moiety.registry import lookup_decoder
from moiety.traceimport import from_counts, from_routed_experts


def drawn(seed: int, experts: int) -> np.ndarray:
    """Loads of a layer: even, skewed, or with many that are equal."""
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 20, experts), draw.pareto(1.0, experts) + 0.01, draw.integers(0, 3, experts)][
        seed % 3
    ].astype(float)


def divisions(items: list[int], ranks: int) -> Iterator[list[list[int]]]:
    """Every way to put items into ranks that hold equally many; ranks are alike."""
    if ranks == 1:
        yield [items]
        return
    first, rest = items[0], items[1:]
    for others in itertools.combinations(range(len(rest)), len(items) // ranks - 1):
        mine = [first, *(rest[one] for one in others)]
        left = [item for number, item in enumerate(rest) if number not in others]
        for more in divisions(left, ranks - 1):
            yield [mine, *more]


def best(load_E: np.ndarray, ranks: int) -> float:
    """Load of the busiest rank in the best of all packings."""
    ways = divisions(list(range(len(load_E))), ranks)
    return min(max(float(load_E[part].sum()) for part in way) for way in ways)


@pytest.mark.parametrize(("ranks", "slots"), [(2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2)])
def test_packing_is_near_the_best_there_is(ranks: int, slots: int) -> None:
    """Within 4/3 - 1/(3 R) of it (Graham 1969, for the heaviest first), and within an item of the mean."""
    found = []
    for seed in range(30):
        load_E = drawn(seed, ranks * slots)
        if not load_E.any():
            continue
        busiest = place([load_E], ranks=ranks).layers[0].load_R(load_E).max()
        found.append(busiest / best(load_E, ranks))
        spread = (1 - 1 / ranks) * (load_E.max() - load_E.min())
        assert busiest <= (load_E.sum() / ranks + spread) * (1 + 1e-9), load_E
    assert 1 - 1e-9 <= min(found) <= max(found) <= 4 / 3 - 1 / (3 * ranks) + 1e-9
    assert np.mean(found) < 1.05


def test_copies_are_near_the_best_there_is() -> None:
    """Against every number of copies and every packing of four experts on two and three ranks."""
    found = []
    for (ranks, redundant), seed in itertools.product([(2, 2), (2, 4), (3, 2), (3, 5)], range(12)):
        load_E = drawn(seed, 4)
        if not load_E.any():
            continue
        busiest = place([load_E], ranks=ranks, redundant=redundant).layers[0].load_R(load_E).max()
        most = range(1, ranks + 1)
        counts = (one for one in itertools.product(most, repeat=4) if sum(one) == 4 + redundant)
        each = (np.repeat(load_E / one, one) for one in counts)
        found.append(busiest / min(best(loads, ranks) for loads in each))
    assert max(found) < 1.35 and np.mean(found) < 1.06, (max(found), np.mean(found))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, int]]:
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks = nodes * per_node
    groups = nodes * draw(st.integers(1, 3))
    experts = groups * draw(st.integers(max(1, -(-ranks // groups)), 6))
    step = -experts % ranks
    room = experts * (per_node - 1)  # so that both modes can hold them
    more = [count for count in range(step, room + 1, ranks) if count % nodes == 0]
    redundant = draw(st.sampled_from(more[:6])) if more else step
    loads = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return np.array(loads, float), {"ranks": ranks, "nodes": nodes, "groups": groups, "redundant": redundant}


@given(cases())
@settings(max_examples=150, deadline=None)
def test_what_always_holds(case: tuple[np.ndarray, dict[str, int]]) -> None:
    load_E, sizes = case
    ranks, nodes, experts = sizes["ranks"], sizes["nodes"], len(load_E)
    fits = sizes["redundant"] <= experts * (ranks // nodes - 1)
    modes = ("global", "hierarchical") if fits and sizes["redundant"] % nodes == 0 else ("global",)
    for mode in modes if sizes["redundant"] <= experts * (ranks - 1) else ():
        (layer,) = place([load_E], mode=mode, **sizes).layers  # type: ignore[arg-type]
        assert layer.expert_RS.shape == (ranks, (experts + sizes["redundant"]) // ranks)
        assert layer.replicas_E.min() >= 1 and layer.replicas_E.sum() == layer.expert_RS.size
        assert all(len(set(row)) == len(row) for row in layer.expert_RS.tolist()), "an expert twice on a rank"
        assert layer.load_R(load_E).sum() == pytest.approx(load_E.sum())
        for expert, rank_C in enumerate(layer.rank_EC.tolist()):
            there = [rank for rank in rank_C if rank >= 0]
            assert there == np.flatnonzero((layer.expert_RS == expert).any(1)).tolist()
            assert len(there) == layer.replicas_E[expert]
        if mode == "hierarchical":
            by_node = layer.expert_RS.reshape(nodes, -1)
            group_of = [set((one // (experts // sizes["groups"])).tolist()) for one in by_node]
            assert sum(map(len, group_of)) == sizes["groups"], "a group on two nodes"


def test_no_rank_holds_an_expert_twice_where_the_last_ones_find_no_other_room() -> None:
    words = "1 5 1 10 9.9 5.06 9.9 1 10 2 2 9.9 5.06 10 2 5 5.06 1 5 10 5.06 10 2 10 9.9 1 10 5 5 5 2 1 10 1 10 5.06"
    load_E = np.array(words.split(), float)
    (layer,) = place([load_E], ranks=3, redundant=63).layers
    assert all(len(set(row)) == 33 for row in layer.expert_RS.tolist())
    for seed in range(200):  # of any weights, which copies never have
        draw = np.random.default_rng(seed)
        bins, room = int(draw.integers(2, 6)), int(draw.integers(1, 5))
        copies = draw.integers(1, bins + 1, 30)
        copies = copies[: np.searchsorted(np.cumsum(copies), bins * room)]
        kind_N = np.repeat(np.arange(len(copies)), copies)
        kind_N = np.append(kind_N, len(copies) + np.arange(bins * room - len(kind_N)))
        bin_N = _pack(draw.random(len(kind_N)), kind_N, bins)
        assert np.bincount(bin_N, minlength=bins).tolist() == [room] * bins
        assert len({*zip(kind_N.tolist(), bin_N.tolist(), strict=True)}) == len(kind_N), (seed, kind_N, bin_N)


def test_a_hot_expert_gets_the_copies() -> None:
    load_E = np.ones(16)
    load_E[3] = 100.0
    before = contiguous([16], 8).imbalance([load_E])
    assert before == pytest.approx(101 / (115 / 8))
    alone = place([load_E], ranks=8)
    assert alone.imbalance([load_E]) == pytest.approx(101 / (115 / 8)), "one copy of it cannot be balanced"
    copied = place([load_E], ranks=8, redundant=8)
    assert copied.layers[0].replicas_E[3] == 8 and copied.imbalance([load_E]) < 1.1
    assert all(3 in row for row in copied.layers[0].expert_RS.tolist())
    most = place([load_E], ranks=8, redundant=16 * 7)
    assert (most.layers[0].replicas_E == 8).all() and most.imbalance([load_E]) == pytest.approx(1)


def test_a_small_case_by_hand() -> None:
    """Twelve experts in four groups, two nodes with four ranks each, four slots more.

    Groups have 230, 310, 120, 330: 330 to one node, 310 to the other, 230 to that one as it is lighter, 120 beside 330.
    In the first node 175 and then 95 get a copy, in the second 150 and then 120.
    """
    load_E = np.array([80.0, 120, 30, 50, 110, 150, 45, 5, 70, 60, 175, 95])
    placed = place([load_E], ranks=8, nodes=2, groups=4, redundant=4)
    (layer,) = placed.layers
    assert placed.mode == "hierarchical"
    nodes = [set(part.tolist()) for part in layer.expert_RS.reshape(2, -1)]
    assert nodes == [{6, 7, 8, 9, 10, 11}, {0, 1, 2, 3, 4, 5}]
    assert np.flatnonzero(layer.replicas_E == 2).tolist() == [1, 5, 10, 11]
    load_R = layer.load_R(load_E)
    assert load_R[:4].sum() == 450 and load_R[4:].sum() == 540
    everywhere = place([load_E], ranks=8, nodes=2, groups=4, redundant=4, mode="global")
    assert np.flatnonzero(everywhere.layers[0].replicas_E == 2).tolist() == [1, 4, 5, 10]


def test_a_layer_without_load_is_uniform() -> None:
    placed = place([np.zeros(8), np.ones(8)], ranks=4, redundant=4)
    for layer in placed.layers:
        assert sorted(layer.replicas_E.tolist()) == [1] * 4 + [2] * 4
    assert placed.imbalance([np.zeros(8), np.zeros(8)]) == 1
    assert placed.layers[0].imbalance(np.zeros(8)) == 1


def test_layers_may_differ() -> None:
    placed = place([np.ones(8), np.ones(12)], ranks=4)
    assert [layer.expert_RS.shape for layer in placed.layers] == [(4, 2), (4, 3)]
    before = contiguous([8, 10], 4)
    assert before.layers[1].expert_RS.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, -1], [8, 9, -1]]
    assert before.layers[1].load_R(np.ones(10)).tolist() == [3, 3, 2, 2]
    assert before.rank_bytes([5, 7]).tolist() == [31, 31, 24, 24]


def test_imbalance_is_of_a_step_that_waits_in_every_layer() -> None:
    """Two layers whose busy ranks differ: each by itself 1.5, and together too, not the 1 of the summed loads."""
    loads = [np.array([3.0, 1.0]), np.array([1.0, 3.0])]
    assert contiguous([2, 2], 2).imbalance(loads) == pytest.approx(1.5)


def test_what_moves() -> None:
    """Two nodes with two ranks: expert 1 comes from the other rank of its node, expert 0 from the other node."""
    before = contiguous([4], 4, 2)
    now = LayerPlacement(expert_RS=np.array([[0, 1], [1, 2], [2, 3], [3, 0]]), experts=4)
    worst, total = Placement(layers=(now,), ranks=4, nodes=2, mode="global").moved(before, [10])
    assert total == Copies(20, 20), "1 to rank 0 and 3 to rank 2 inside; 2 to rank 1 and 0 to rank 3 between"
    assert sum(worst) == 10
    assert before.moved(before, [10]) == (Copies(0, 0), Copies(0, 0))
    with pytest.raises(ConfigError, match="2 ranks on 1 nodes before"):
        before.moved(contiguous([4], 2), [10])


def test_ranks_and_nodes_of_recorded_tokens() -> None:
    """By hand: four experts on four ranks on two nodes; 255 would be none."""
    trace = from_routed_experts([np.array([[[0, 1]], [[0, 3]], [[2, 3]]])], experts=4)
    placement = contiguous([4], 4, 2)
    assert reached(trace, placement) == pytest.approx((2, 2, 4 / 3))
    assert reached(trace, placement, node_limit=1) == pytest.approx((2, 2, 1))
    assert reached(trace, contiguous([4], 2, 1)) == pytest.approx((2, 4 / 3, 1))
    both = LayerPlacement(expert_RS=np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), experts=4)
    copied = Placement(layers=(both,), ranks=2, nodes=2, mode="global")
    assert reached(trace, copied) == pytest.approx((2, 1, 1)), (
        "a token's turn is the same for all its experts"
    )
    with pytest.raises(ConfigError, match="other experts"):
        reached(trace, contiguous([8], 4, 2))


def test_uniform_tokens_reach_what_the_formula_says() -> None:
    """Drawn uniformly, with and without groups, against the closed form of `plan.links`."""
    config = lookup_decoder("olmoe-1b-7b")
    layers, cluster = len(config.moe_layers), Cluster(device=DEVICES["h100"], ranks=16, nodes=4)
    trace = from_counts(np.ones((layers, 64)), k=8, tokens=1000)
    spread = reached(trace, contiguous([64] * layers, 16, 4))
    for once in ("pair", "rank", "node"):
        assert leaving(*spread, cluster, once) == pytest.approx(sent(config, cluster, once), rel=0.02)
    limited = lookup_decoder("deepseek-v3")
    draw, layers = np.random.default_rng(0), len(limited.moe_layers)
    group_TM = np.argsort(draw.random((4000, 8)), axis=1)[:, :4]
    place_TK = np.argsort(draw.random((4000, 128)), axis=1)[:, :8]
    expert_TK = np.take_along_axis(group_TM, place_TK // 32, 1) * 32 + place_TK % 32
    for ranks, nodes in ((64, 8), (16, 2), (32, 4)):
        cluster = Cluster(device=DEVICES["h800"], ranks=ranks, nodes=nodes)
        one = reached(from_routed_experts([expert_TK[:, None]], experts=256), contiguous([256], ranks, nodes))
        for once in ("pair", "rank", "node"):
            rows = leaving(*one, cluster, once).times(layers)
            assert rows == pytest.approx(sent(limited, cluster, once), rel=0.02), (ranks, nodes, once)


def test_loads_of_the_two_halves_of_a_trace() -> None:
    expert_TLK = np.array([[[0, 1]], [[0, 1]], [[0, 2]], [[3, 2]], [[3, 2]]])
    trace = from_routed_experts([expert_TLK], experts=4)
    first, second = trace_loads(trace)
    assert [one.tolist() for one in (*first, *second)] == [[2, 2, 0, 0], [1, 0, 3, 2]]
    whole = trace.counts()[0]
    assert (first[0] + second[0] == whole).all()
    short = trace_loads(from_routed_experts([expert_TLK[:1]], experts=4))
    assert [one[0].tolist() for one in short] == [[1, 1, 0, 0]] * 2, "one token has no halves"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"ranks": 3},
            "8 experts and 0 redundant slots are not shared evenly by 3 ranks.*\n.*redundant 1 or 4",
        ),
        ({"ranks": 4, "redundant": -4}, "4 slots for 8 experts are fewer than experts"),
        ({"ranks": 4, "nodes": 3}, "4 ranks on 3 nodes"),
        ({"ranks": 0}, "0 ranks on 1 nodes"),
        ({"ranks": 16}, "8 experts on 16 ranks"),
        ({"ranks": 2, "redundant": 10}, "redundant is 10"),
        ({"ranks": 4, "nodes": 2, "groups": 1, "mode": "hierarchical"}, "whole groups into nodes"),
        ({"ranks": 4, "groups": 3}, "8 experts in 3 groups"),
        ({"ranks": 4, "mode": "best"}, "mode is 'best'"),
    ],
)
def test_refusals(words: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        place([np.ones(8)], **words)  # type: ignore[arg-type]


def test_loads_that_cannot_be() -> None:
    for wrong in (np.array([1.0, np.nan]), np.array([1.0, -1.0]), np.array([np.inf, 1.0])):
        with pytest.raises(ConfigError, match="finite and not negative"):
            place([wrong], ranks=2)


def test_no_torch_is_loaded() -> None:
    code = "import sys, moiety.parallel.worth; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def published(name: str) -> dict[str, np.ndarray]:
    """Pairs of each expert in three layers, by domain (allenai/OLMoE, scripts/routing_output)."""
    folder = os.environ.get("MOIETY_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(folder) / "olmoe_mixtral_routing_counts.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not here; MOIETY_SHARED_DATA names its folder")
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    counts = next(one for key, one in models.items() if key.startswith(name))["counts"]
    return {domain: np.array(counts_LE, float) for domain, counts_LE in counts.items()}


def test_published_counts() -> None:
    """OLMoE on eight ranks: code is balanced by code, papers are not balanced by code; Mixtral hardly needs it."""
    olmoe, mixtral = published("OLMoE"), published("Mixtral")
    before = {
        domain: contiguous([64] * 3, 8).imbalance(list(olmoe[domain])) for domain in ("github", "arxiv")
    }
    assert before == pytest.approx({"github": 1.57, "arxiv": 1.66}, abs=0.01)
    code = place(list(olmoe["github"]), ranks=8, redundant=8)
    assert code.imbalance(list(olmoe["github"])) == pytest.approx(1.01, abs=0.01)
    assert code.imbalance(list(olmoe["arxiv"])) == pytest.approx(1.47, abs=0.01)
    assert contiguous([8] * len(mixtral["github"]), 4).imbalance(list(mixtral["github"])) < 1.1
