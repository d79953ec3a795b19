"""Routing in C: what the routers in torch decide, ties and groups included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety.backends import cpu, cpu_routing
from moiety.moe.routers.base import RouterContext
from moiety.moe.routers.token_choice import SigmoidTopK, TopK, compiled
from moiety.routing import Routing
from tests.backends.builds import tried


@st.composite
def routers(draw: st.DrawFn) -> tuple[TopK | SigmoidTopK, int]:
    """A router and how many experts it has."""
    groups, size = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    kept = draw(st.integers(1, groups))
    options = {
        "k": draw(st.integers(1, kept * size)),
        "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "groups": groups,
        "groups_kept": kept,
        "group_best": draw(st.integers(1, size)),
        "bias": draw(st.booleans()),
    }
    kind = draw(st.sampled_from([TopK, SigmoidTopK]))
    return kind(**options), groups * size


def decided(router: TopK | SigmoidTopK, logits_TE: Tensor, bias_E: Tensor | None) -> Routing:
    """By the router itself, with these logits."""
    context = RouterContext(logits_TE=logits_TE, bias_E=bias_E)
    score_TE = router.score(logits_TE, context)
    pairs = router.choose(score_TE, context)
    return pairs.with_weights(router.weigh(score_TE, pairs, context), score_TE=score_TE)


def route(
    router: TopK | SigmoidTopK, x: Tensor, gate: Tensor, gate_bias: Tensor | None, bias: Tensor | None
) -> Routing:
    best = compiled(router)
    assert best is not None
    return cpu_routing.route(x, cpu_routing.CompiledRouter(gate, best, gate_bias_E=gate_bias, bias_E=bias))


def check(router: TopK | SigmoidTopK, found: Routing, bias_E: Tensor | None) -> None:
    """Scores from the logits, then the choice from those very scores: equal to the router's, pair by pair."""
    assert found.logits_TE is not None and found.score_TE is not None
    plain = decided(router, found.logits_TE, bias_E)
    assert plain.score_TE is not None
    torch.testing.assert_close(found.score_TE, plain.score_TE, rtol=1e-5, atol=1e-7)
    context = RouterContext(logits_TE=found.logits_TE, bias_E=bias_E)
    pairs = router.choose(found.score_TE, context)
    assert torch.equal(found.counts_E, pairs.counts_E) and torch.equal(found.token_N, pairs.token_N)
    torch.testing.assert_close(
        found.weight_N, router.weigh(found.score_TE, pairs, context), rtol=1e-5, atol=1e-7
    )


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=routers(),
    tokens=st.integers(0, 11),
    width=st.integers(1, 80),
    gate_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equal_to_the_routers_in_torch(
    made: tuple[TopK | SigmoidTopK, int], tokens: int, width: int, gate_bias: bool, seed: int, level: str
) -> None:
    router, experts = made
    torch.manual_seed(seed)
    x, gate = torch.randn(tokens, width), torch.randn(experts, width)
    offset = torch.randn(experts) if gate_bias else None
    bias = torch.randn(experts) * 0.1 if router.bias else None
    found = route(router, x, gate, offset, bias)
    assert found.tokens == tokens and found.pairs == tokens * router.k
    assert found.logits_TE is not None
    true = torch.nn.functional.linear(x.double(), gate.double(), None if offset is None else offset.double())
    torch.testing.assert_close(found.logits_TE.double(), true, rtol=1e-4, atol=1e-5)
    check(router, found, bias)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=routers(), seed=st.integers(0, 2**31), biased=st.booleans())
def test_of_equal_scores_the_lower_expert_wins(
    made: tuple[TopK | SigmoidTopK, int], seed: int, biased: bool, level: str
) -> None:
    """Small whole numbers: every product is exact and most scores are equal to some other."""
    router, experts = made
    torch.manual_seed(seed)
    x, gate = torch.randint(-1, 2, (9, 6)).float(), torch.randint(-1, 2, (experts, 6)).float()
    bias = torch.randint(0, 2, (experts,)).float() * 0.5 if biased else None
    found = route(router, x, gate, None, bias)
    assert found.logits_TE is not None and torch.equal(found.logits_TE, x @ gate.T)
    check(router, found, bias)
    same = route(router, x, torch.zeros_like(gate), None, None)
    if router.groups == 1:
        assert same.expert_N.view(router.k, 9)[:, 0].tolist() == list(range(router.k))


@pytest.mark.parametrize("router", [TopK(k=4), SigmoidTopK(k=4, groups=8, groups_kept=3)])
def test_the_same_bits_in_any_company(router: TopK | SigmoidTopK, level: str) -> None:
    gate, x, bias = torch.randn(64, 75), torch.randn(23, 75), torch.randn(64) * 0.1
    whole = route(router, x, gate, None, bias)
    assert whole.logits_TE is not None and whole.score_TE is not None
    dense = torch.zeros(23, 64).index_put_((whole.token_N, whole.expert_N), whole.weight_N)
    try:
        for number, rows in enumerate([*torch.randperm(23).split(6), *torch.arange(5)[:, None]]):
            torch.set_num_threads(1 + number % 2)
            one = route(router, x[rows], gate, None, bias)
            assert torch.equal(one.logits_TE, whole.logits_TE[rows])
            assert torch.equal(one.score_TE, whole.score_TE[rows])
            again = torch.zeros(len(rows), 64).index_put_((one.token_N, one.expert_N), one.weight_N)
            assert torch.equal(again, dense[rows])
    finally:
        torch.set_num_threads(1)


def test_odd_sizes_types_and_strides(level: str) -> None:
    for experts, k in ((1, 1), (1, 1), (cpu_routing.MOST_EXPERTS, 9)):
        gate, x = torch.randn(experts, 40), torch.randn(7, 100)
        for rows in (x[:, 30:70], x[::3, :40], x[:, 10:90:2], x[:, :40].bfloat16()):
            found = route(TopK(k=k), rows, gate.bfloat16(), None, None)
            same = route(TopK(k=k), rows.float().contiguous(), gate.bfloat16().float(), None, None)
            assert torch.equal(found.weight_N, same.weight_N) and torch.equal(found.token_N, same.token_N)
            check(TopK(k=k), found, None)


@pytest.mark.parametrize("router", [TopK(k=2), SigmoidTopK(k=2, groups=3, groups_kept=2)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(router: TopK | SigmoidTopK, bad: float, level: str) -> None:
    """In the logits; every token still has its pairs, so that nothing is read outside of what there is."""
    gate, x = torch.randn(6, 33), torch.randn(5, 33)
    clean = route(router, x, gate, None, None)
    x[3, 32] = bad
    found = route(router, x, gate, None, None)
    assert found.logits_TE is not None and clean.logits_TE is not None
    kept = [0, 1, 2, 4]
    assert not bool(found.logits_TE[3].isfinite().any())
    assert torch.equal(found.logits_TE[kept], clean.logits_TE[kept])
    assert torch.bincount(found.token_N, minlength=5).tolist() == [2] * 5
    if math.isnan(bad):
        assert bool(found.weight_N[found.token_N == 3].isnan().all())


def test_levels_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, x, found = torch.randn(16, 300), torch.randn(40, 300), []
    for level in tried():
        monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
        cpu.level.cache_clear()
        found.append(route(TopK(k=3), x, gate, None, None))
    cpu.level.cache_clear()
    for one in found[1:]:
        assert torch.equal(one.token_N, found[0].token_N) and torch.equal(one.counts_E, found[0].counts_E)
        torch.testing.assert_close(one.weight_N, found[0].weight_N, rtol=1e-5, atol=1e-7)
