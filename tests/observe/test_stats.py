"""Statistics of routings: numbers worked out by hand, nothing at all as input, and chance told from fact."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.errors import UsageError
from moiety.observe import stats
from moiety.routing import Routing, top_k


def routed(logits_TE: torch.Tensor, k: int, valid_T: torch.Tensor | None = None) -> Routing:
    score_TE = logits_TE.softmax(-1)
    pairs = Routing.from_choices(top_k(score_TE, k), experts=logits_TE.shape[1], valid_T=valid_T)
    return Routing(
        token_N=pairs.token_N,
        weight_N=pairs.weight_N,
        counts_E=pairs.counts_E,
        tokens=pairs.tokens,
        logits_TE=logits_TE,
        score_TE=score_TE,
        valid_T=valid_T,
    )


def test_health_by_hand() -> None:
    expert_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]])
    found = stats.health(Routing.from_choices(expert_TK, experts=4))
    assert found.counts_E.tolist() == [4, 3, 1, 0]
    assert (found.tokens, found.pairs, found.experts_per_token) == (4, 8, 2.0)
    assert found.load_E.tolist() == [2.0, 1.5, 0.5, 0.0]
    assert found.max_vio == 1.0
    assert found.min_load == 0.0
    assert found.dead == 1
    assert found.variation == pytest.approx(math.sqrt((1 + 0.25 + 0.25 + 1) / 4))
    entropy = -(0.5 * math.log(0.5) + 0.375 * math.log(0.375) + 0.125 * math.log(0.125)) / math.log(4)
    assert found.load_entropy == pytest.approx(entropy)
    assert found.router_z is None and found.router_entropy is None and found.near_tie_rate is None


def test_router_numbers_by_hand() -> None:
    logits_TE = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [1.0, 3.0, 0.5]])
    found = stats.health(routed(logits_TE, 1))
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits_TE.tolist()) / 3
    assert found.router_z == pytest.approx(z, rel=1e-5)
    p_TE = logits_TE.double().softmax(-1)
    assert found.router_entropy == pytest.approx(
        float(-(p_TE * p_TE.log()).sum(-1).mean()) / math.log(3), rel=1e-5
    )
    assert found.near_tie_rate == pytest.approx(1 / 3)  # the token without an opinion


def test_near_tie_needs_chosen_and_unchosen() -> None:
    even_TE = torch.zeros(5, 4)
    assert stats.health(routed(even_TE, 4)).near_tie_rate == 0.0
    assert stats.health(routed(even_TE, 2)).near_tie_rate == 1.0
    apart_TE = torch.tensor([[0.5, 0.4996, 0.0, 0.0], [0.5, 0.4, 0.0, 0.0]]).clamp(min=1e-9).log()
    assert stats.health(routed(apart_TE, 1)).near_tie_rate == 0.5


def test_near_tie_counts_the_selection_bias() -> None:
    score_TE = torch.tensor([[0.9, 0.5], [0.9, 0.2]])
    bias_E = torch.tensor([0.0, 0.4])
    pairs = Routing.from_choices(top_k(score_TE + bias_E, 1), experts=2)
    routing = Routing(
        token_N=pairs.token_N, weight_N=pairs.weight_N, counts_E=pairs.counts_E, tokens=2, score_TE=score_TE
    )
    assert stats.health(routing).near_tie_rate == 0.0
    assert stats.health(routing, bias_E=bias_E).near_tie_rate == 0.5


def test_padding_changes_nothing() -> None:
    logits_TE = torch.randn(11, 5)
    valid_T = torch.arange(11) < 7
    padded = stats.health(routed(logits_TE, 2, valid_T)).numbers()
    plain = stats.health(routed(logits_TE[:7], 2)).numbers()
    assert padded == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_pairs(tokens: int) -> None:
    valid_T = torch.zeros(tokens, dtype=torch.bool)
    found = stats.health(routed(torch.randn(tokens, 4), 2, valid_T))
    numbers = found.numbers()
    assert all(math.isfinite(value) for value in numbers.values() if value is not None)
    assert (found.tokens, found.pairs, found.dead, found.max_vio, found.load_entropy) == (0, 0, 4, 0.0, 1.0)
    assert json.loads(json.dumps(numbers)) == numbers


def test_one_expert_and_all_on_one() -> None:
    single = stats.health(routed(torch.randn(6, 1), 1))
    assert (single.max_vio, single.load_entropy, single.near_tie_rate, single.router_entropy) == (0, 1, 0, 0)
    collapsed = stats.health(Routing.from_choices(torch.full((6, 1), 2), experts=8))
    assert (collapsed.max_vio, collapsed.load_entropy, collapsed.dead) == (7.0, 0.0, 7)


def test_dropped_pairs() -> None:
    routing = Routing.from_choices(torch.tensor([[0], [0], [0], [1]]), experts=2)
    found = stats.health(routing.keep(torch.tensor([True, False, True, True])))
    assert found.dropped == 1
    assert found.drop_rate == 0.25


@settings(max_examples=25)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 5))
def test_adding_is_the_same_as_one_batch(first: int, second: int, k: int) -> None:
    generator = torch.Generator().manual_seed(first * 10 + second)
    logits_TE = torch.randn(first + second, 5, generator=generator)
    parts = stats.add(
        stats.health(routed(logits_TE[:first], k)), stats.health(routed(logits_TE[first:], k))
    ).numbers()
    assert parts == pytest.approx(stats.health(routed(logits_TE, k)).numbers(), rel=1e-4, abs=1e-6)


def test_counts_by_group() -> None:
    logits_TE = torch.randn(23, 5)
    routing = routed(logits_TE, 2, torch.arange(23) % 4 != 1)
    group_T = torch.arange(23) % 3
    counts_GE = stats.counts_by_group(routing, group_T, 4)
    expected = np.zeros((4, 5), np.int64)
    for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
        expected[group_T[token], expert] += 1
    assert counts_GE.dtype == np.int64 and counts_GE.tolist() == expected.tolist()
    empty = stats.counts_by_group(routed(torch.zeros(0, 5), 1), torch.zeros(0, dtype=torch.int64), 2)
    assert empty.tolist() == [[0] * 5] * 2


def test_coactivation() -> None:
    found = stats.coactivation(Routing.from_choices(torch.tensor([[0, 1], [0, 2], [0, 1]]), experts=4))
    assert found.tolist() == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_top_tokens() -> None:
    counts_VE = np.array([[9, 1], [30, 70], [2, 0], [0, 50]])
    seen_V = np.array([10, 100, 2, 50])
    first, second = stats.top_tokens(counts_VE, seen_V, best=2, at_least=10)
    assert [(one.token_id, one.share, one.occurrences) for one in first] == [(0, 0.9, 10), (1, 0.3, 100)]
    assert [one.token_id for one in second] == [3, 1]
    assert stats.top_tokens(counts_VE, seen_V, at_least=1000) == ((), ())


def test_shares_preference_and_score_by_hand() -> None:
    counts_LDE = np.array([[[10, 0, 0, 0], [0, 20, 0, 0]], [[5, 5, 0, 0], [10, 10, 0, 0]]])
    assert stats.shares(counts_LDE)[0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert stats.preference(counts_LDE)[0].tolist() == [[2, 0, 1, 1], [0, 2, 1, 1]]
    assert stats.displacement(counts_LDE).tolist() == [0.5, 0.0]


def test_a_domain_without_text_is_left_out() -> None:
    counts_LDE = np.array([[[10, 0], [0, 0], [0, 20]]])
    assert stats.displacement(counts_LDE).tolist() == [0.5]
    assert stats.preference(counts_LDE)[0, 1].tolist() == [1, 1]
    found = stats.specialization_of_counts(np.zeros((2, 3, 4), np.int64), ["a", "b", "c"], shuffles=20)
    assert found.score == 0.0 and not found.beyond_chance
    assert "No specialisation" in found.verdict


def sequences(lean: float, *, S: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts of 3 domains; experts 2 and 5 of layer 1 like domain 1 by `lean`. Sequences wander on their own."""
    generator = np.random.default_rng(seed)
    domain_S = np.arange(S) % 3
    share_SLE = generator.dirichlet(np.full(8, 8.0), size=(S, 2))
    share_SLE[domain_S == 1, 1, 2] += lean
    share_SLE[domain_S == 1, 1, 5] += lean
    share_SLE /= share_SLE.sum(-1, keepdims=True)
    return generator.multinomial(256, share_SLE), domain_S


def test_specialised_experts_are_found_and_named() -> None:
    counts_SLE, domain_S = sequences(0.5)
    found = stats.specialization_of_sequences(counts_SLE, domain_S, ["prose", "code", "sums"], layers=[1, 3])
    assert found.counts_LDE.sum() == counts_SLE.sum()
    assert found.counts_LDE[:, 1].tolist() == counts_SLE[domain_S == 1].sum(0).tolist()
    assert found.beyond_chance
    assert found.shuffled is not None and found.score_L[1] > 2 * found.shuffled.high_L[1]
    assert found.shuffled.low_L[0] < found.score_L[0] < 1.5 * found.shuffled.high_L[0]
    assert "layer 3, where experts" in found.verdict and "prefer code" in found.verdict
    domain, experts = found.favourites(1)
    assert domain == "code" and {expert for expert, _ in experts} == {2, 5}
    assert "shuffled-label" in found.verdict


def test_chance_is_not_called_specialisation() -> None:
    """Sequences that wander fool the uniform baseline, never (up to its 2.5 %) the shuffled one."""
    fooled = misled = 0
    for seed in range(40):
        counts_SLE, domain_S = sequences(0.0, S=30, seed=seed)
        found = stats.specialization_of_sequences(
            counts_SLE, domain_S, ["a", "b", "c"], shuffles=40, seed=seed
        )
        fooled += found.beyond_chance
        misled += found.score > found.uniform.overall_high
    assert fooled <= 6
    assert misled >= 30


def test_specialisation_is_repeatable() -> None:
    counts_SLE, domain_S = sequences(0.1)
    first, second, other = (
        stats.specialization_of_sequences(counts_SLE, domain_S, ["a", "b", "c"], shuffles=20, seed=seed)
        for seed in (3, 3, 4)
    )
    assert first.chance.mean_L.tolist() == second.chance.mean_L.tolist() != other.chance.mean_L.tolist()
    assert first.verdict == second.verdict


def test_bad_requests() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        stats.specialization_of_counts(np.ones((1, 1, 4), np.int64), ["only"])
    with pytest.raises(UsageError, match="shuffles is 3"):
        stats.specialization_of_counts(np.ones((1, 2, 4), np.int64), ["a", "b"], shuffles=3)


def test_published_models() -> None:
    """OLMoE specialises by domain, Mixtral hardly does (arXiv 2409.02060 section 5.3), from the published counts."""
    folder = os.environ.get("MOIETY_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(folder) / "olmoe_mixtral_routing_counts.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not here; MOIETY_SHARED_DATA names its folder")
    found = {}
    for name, model in json.loads(path.read_text(encoding="utf-8"))["models"].items():
        counts_LDE = np.array(list(model["counts"].values())).transpose(1, 0, 2)
        found[name.split("-")[0]] = stats.specialization_of_counts(
            counts_LDE, list(model["counts"]), shuffles=20
        )
    assert found["OLMoE"].score_L.min() > 0.15 and "Experts specialise" in found["OLMoE"].verdict
    assert found["Mixtral"].score_L.max() < 0.05 and "Hardly any" in found["Mixtral"].verdict
