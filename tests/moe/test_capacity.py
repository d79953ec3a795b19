"""Capacity: every policy against a definition in plain loops, the queue against one pass, and the accounting."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety.errors import ConfigError
from moiety.moe.capacity import POLICIES, Capacity, Overflow, accounting, buffer_bytes, passes
from moiety.moe.experts import Experts
from moiety.routing import Routing, top_k
from tests.oracle import choose_at_random

Pair = tuple[int, int]  # expert, token
KINDS = ("topk", "ranked", "mask", "one_for_all")
DROPS = ("position", "priority", "random")


def pairs_of(routing: Routing) -> list[Pair]:
    return list(zip(routing.expert_N.tolist(), routing.token_N.tolist(), strict=True))


def draw_pairs(
    tokens: int, experts: int, k: int, *, kind: str = "topk", padded: bool = False, ties: bool = False
) -> tuple[Routing, Tensor]:
    """A skewed choice and the scores it was made by; with ties, only a few different scores."""
    score_TE = torch.rand(tokens, experts, dtype=torch.float64) + torch.linspace(0.5, 0, experts)
    if ties:
        score_TE = (score_TE * 4).round() / 4
    valid_T = torch.rand(tokens) > 0.3 if padded else None
    if kind == "topk":
        return Routing.from_choices(top_k(score_TE, k), experts=experts, valid_T=valid_T), score_TE
    if kind == "ranked":
        ranked_TK = score_TE.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return Routing.from_choices(ranked_TK, experts=experts, valid_T=valid_T, ranked=True), score_TE
    if kind == "mask":
        mask_TE = torch.rand(tokens, experts) < k / experts * torch.rand(tokens, 1)
        return Routing.from_mask(mask_TE, valid_T=valid_T), score_TE
    assert kind == "one_for_all", kind
    every_TK = torch.arange(k).expand(tokens, k)
    return Routing.from_choices(every_TK, experts=experts, valid_T=valid_T), score_TE


def apply(policy: str, pairs: Routing, score_TE: Tensor, limit: int, seed: int = 0) -> Routing:
    return POLICIES[policy](pairs, score_TE, limit, torch.Generator().manual_seed(seed))


# The definitions, a pair at a time


def first_of_each(wanted: list[Pair], key: Callable[[Pair], tuple[float, ...]], limit: int) -> set[Pair]:
    """Serve the pairs in order of their key, each expert until it is full."""
    served: Counter[int] = Counter()
    kept = set()
    for pair in sorted(wanted, key=key):
        if served[pair[0]] < limit:
            served[pair[0]] += 1
            kept.add(pair)
    return kept


def by_position(pairs: Routing, score: list[list[float]], limit: int) -> set[Pair]:
    wanted = pairs_of(pairs)
    ranks = [0] * len(wanted) if pairs.rank_N is None else pairs.rank_N.tolist()
    rank = dict(zip(wanted, ranks, strict=True))
    return first_of_each(wanted, lambda pair: (rank[pair], pair[1]), limit)


def by_priority(pairs: Routing, score: list[list[float]], limit: int) -> set[Pair]:
    return first_of_each(pairs_of(pairs), lambda pair: (-score[pair[1]][pair[0]], pair[1]), limit)


def by_reroute(pairs: Routing, score: list[list[float]], limit: int) -> set[Pair]:
    wanted = pairs_of(pairs)
    got = by_priority(pairs, score, limit)
    lost = [pair for pair in wanted if pair not in got]
    filled = Counter(e for e, _ in got)
    while True:
        flying: dict[int, Pair] = {}  # token: its first lost pair
        for pair in lost:
            flying.setdefault(pair[1], pair)
        asked: list[tuple[float, int, int]] = []
        for token in flying:
            open_experts = [
                e
                for e, value in enumerate(score[token])
                if filled[e] < limit and (e, token) not in got and value > float("-inf")
            ]
            if open_experts:
                best = min(open_experts, key=lambda e: (-score[token][e], e))
                asked.append((-score[token][best], token, best))
        if not asked:
            return got
        for _, token, e in sorted(asked):
            if filled[e] < limit:
                filled[e] += 1
                got.add((e, token))
                lost.remove(flying[token])


def by_dense(pairs: Routing, score: list[list[float]], limit: int) -> set[Pair]:
    wanted = pairs_of(pairs)
    kept = by_priority(pairs, score, limit)
    hit = {token for e, token in wanted if (e, token) not in kept}
    return set(wanted) | {(e, token) for token in hit for e in range(pairs.experts)}


DEFINITIONS = {
    "position": by_position,
    "priority": by_priority,
    "reroute": by_reroute,
    "dense": by_dense,
}


def check(after: Routing, before: Routing) -> None:
    """What every result promises: sorted, each pair once, counts right, padding untouched, nothing forgotten."""
    pairs, wanted = pairs_of(after), pairs_of(before)
    assert pairs == sorted(set(pairs))
    counts = Counter(e for e, _ in pairs)
    assert after.counts_E.tolist() == [counts[e] for e in range(before.experts)]
    assert len(after.weight_N) == after.pairs and after.tokens == before.tokens
    assert after.valid_T is before.valid_T
    if before.valid_T is not None:
        assert all(before.valid_T[token] for _, token in pairs)
    if after is before:
        return
    assert after.wanted is before
    assert after.dropped == len(set(wanted) - set(pairs)) and after.moved == len(set(pairs) - set(wanted))
    if after.kept_N is None:
        assert after.moved > 0
    else:
        assert pairs == [pair for pair, kept in zip(wanted, after.kept_N.tolist(), strict=True) if kept]


@given(
    tokens=st.integers(0, 300),
    experts=st.integers(1, 64),
    share=st.floats(0, 1),
    factor=st.floats(0.01, 3),
    kind=st.sampled_from(KINDS),
    padded=st.booleans(),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
@example(tokens=0, experts=1, share=0.0, factor=1.0, kind="topk", padded=False, ties=False, seed=0)
@example(tokens=300, experts=64, share=0.1, factor=1.0, kind="ranked", padded=True, ties=True, seed=1)
@example(tokens=30, experts=8, share=0.5, factor=1.0, kind="one_for_all", padded=False, ties=True, seed=2)
@example(tokens=9, experts=5, share=1.0, factor=0.5, kind="topk", padded=False, ties=True, seed=3)
@settings(max_examples=150)
def test_policies_are_their_definitions(
    tokens: int, experts: int, share: float, factor: float, kind: str, padded: bool, ties: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    k = max(1, round(share * experts))
    before, score_TE = draw_pairs(tokens, experts, k, kind=kind, padded=padded, ties=ties)
    score = score_TE.tolist()
    wanted = set(pairs_of(before))
    for policy in POLICIES:
        capacity = Capacity(factor, policy=policy)
        limit = capacity.limit(before, training=True)
        assert limit is not None and limit == -(-Fraction(str(factor)) * before.pairs // experts)
        after = capacity.fit(before, score_TE, training=True, generator=torch.Generator().manual_seed(seed))
        check(after, before)
        if int(before.counts_E.max()) <= limit:
            assert after is before
            continue
        got = set(pairs_of(after))
        if policy in DEFINITIONS:
            assert got == DEFINITIONS[policy](before, score, limit)
        if policy in DROPS:
            assert got < wanted
            assert after.counts_E.tolist() == before.counts_E.clamp(max=limit).tolist()
        if policy != "dense":
            assert int(after.counts_E.max()) <= limit
        if policy == "reroute":
            lacking = Counter(t for _, t in wanted) - Counter(t for _, t in got)
            room = [e for e, count in enumerate(after.counts_E.tolist()) if count < limit]
            assert all((e, t) in got for t in lacking for e in room), "a lost pair and room for it"
            assert after.rank_N is None


def test_the_definitions_differ() -> None:
    """The comparison above tells the policies apart: no two agree on an ordinary problem."""
    before, score_TE = draw_pairs(60, 6, 2, kind="ranked")
    limit = 22
    results = [frozenset(pairs_of(apply(policy, before, score_TE, limit))) for policy in POLICIES]
    assert len(set(results)) == len(POLICIES)
    unranked = dataclasses.replace(before, rank_N=None)
    assert pairs_of(apply("position", unranked, score_TE, limit)) != pairs_of(
        apply("position", before, score_TE, limit)
    )


def test_position_serves_first_choices_first() -> None:
    """Expert 0 is the second choice of tokens 0 and 1, the first of 2 and 3."""
    choices = torch.tensor([[1, 0], [2, 0], [0, 1], [0, 2]])
    score_TE = torch.rand(4, 3)
    ranked = Routing.from_choices(choices, experts=3, ranked=True)
    kept = apply("position", ranked, score_TE, 2)
    assert kept.token_N[kept.expert_N == 0].tolist() == [2, 3]
    assert kept.rank_N is not None and kept.rank_N[kept.expert_N == 0].tolist() == [0, 0]
    plain = apply("position", Routing.from_choices(choices, experts=3), score_TE, 2)
    assert plain.token_N[plain.expert_N == 0].tolist() == [0, 1] and plain.rank_N is None


def test_priority_prefers_the_lower_token_among_equals() -> None:
    pairs = Routing.from_choices(torch.zeros(5, 1, dtype=torch.int64), experts=2)
    score_TE = torch.tensor([[0.5, 0], [0.75, 0], [0.5, 0], [0.75, 0], [0.5, 0]])
    assert apply("priority", pairs, score_TE, 3).token_N.tolist() == [0, 1, 3]


def test_reroute_by_hand() -> None:
    """All want expert 0, which takes two; expert 1 is next for all and takes two more; 2 is forbidden to token 4."""
    score_TE = torch.tensor(
        [[0.9, 0.3, 0.2], [0.8, 0.5, 0.2], [0.7, 0.6, 0.5], [0.6, 0.1, 0.0], [0.5, 0.4, 0.3]]
    )
    score_TE[4, 2] = float("-inf")
    pairs = Routing.from_choices(torch.zeros(5, 1, dtype=torch.int64), experts=3)
    after = apply("reroute", pairs, score_TE, 2)
    assert pairs_of(after) == [(0, 0), (0, 1), (1, 2), (1, 4), (2, 3)]
    assert (after.dropped, after.moved, after.kept_N) == (3, 3, None)
    score_TE[:, 2] = float("-inf")
    after = apply("reroute", pairs, score_TE, 2)
    assert pairs_of(after) == [(0, 0), (0, 1), (1, 2), (1, 4)] and (after.dropped, after.moved) == (3, 2)
    score_TE[:, 1] = float("-inf")
    after = apply("reroute", pairs, score_TE, 2)
    assert after.kept_N is not None and after.kept_N.tolist() == [True, True, False, False, False]
    assert (after.dropped, after.moved) == (3, 0)


def test_dense_with_every_expert_wanted_changes_nothing() -> None:
    pairs, score_TE = draw_pairs(6, 3, 3)
    assert apply("dense", pairs, score_TE, 2) is pairs


def test_random_is_reproducible_and_blind_to_position() -> None:
    tokens, limit, draws = 45, 15, 400
    pairs = Routing.from_choices(torch.zeros(tokens, 1, dtype=torch.int64), experts=2)
    score_TE = torch.rand(tokens, 2)
    same = [apply("random", pairs, score_TE, limit, seed=7).token_N.tolist() for _ in range(2)]
    assert same[0] == same[1] != apply("random", pairs, score_TE, limit, seed=8).token_N.tolist()
    kept_T = torch.zeros(tokens)
    for seed in range(draws):
        after = apply("random", pairs, score_TE, limit, seed=seed)
        assert after.pairs == limit
        kept_T[after.token_N] += 1
    deviation = (draws * (1 / 3) * (2 / 3)) ** 0.5
    assert (kept_T - draws / 3).abs().max() < 4.5 * deviation  # each is 0 or 400 for any fixed order
    assert kept_T.std() > 0.4 * deviation


def test_a_second_capacity_adds_to_what_the_first_took() -> None:
    pairs, score_TE = draw_pairs(50, 5, 2)
    once = apply("priority", pairs, score_TE, 18)
    for policy in ("position", "reroute"):
        twice = apply(policy, once, score_TE, 12)
        assert twice.wanted is pairs and twice.dropped > once.dropped > 0
        assert twice.pairs == pairs.pairs - twice.dropped + twice.moved
        assert Capacity(1.0).limit(twice, training=True) == Capacity(1.0).limit(pairs, training=True)


# The numbers


@pytest.mark.parametrize(
    ("factor", "tokens", "k", "experts", "limit"),
    [
        (1.1, 1000, 1, 10, 110),  # 1.1 * 100 is 110.00000000000001 in floating point
        (1.25, 64, 2, 8, 20),
        (1.25, 65, 2, 8, 21),
        (1.0, 7, 3, 4, 6),
        (2, 5, 1, 5, 2),
        (0.01, 1, 1, 4, 1),
        (1e-5, 10, 1, 10, 1),
        (1.25, 0, 1, 4, 0),
    ],
)
def test_limit(factor: float, tokens: int, k: int, experts: int, limit: int) -> None:
    pairs, score_TE = draw_pairs(tokens, experts, k)
    capacity = Capacity(factor, eval_factor=2.0)
    assert capacity.limit(pairs, training=True) == limit
    assert capacity.limit(pairs, training=False) == -(-2 * tokens * k // experts)
    assert Capacity(0).limit(pairs, training=True) is None
    assert Capacity(0).fit(pairs, score_TE, training=True) is pairs
    assert Capacity(factor).limit(pairs, training=False) is None
    assert Capacity(factor).fit(pairs, score_TE, training=False) is pairs


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf"), True, "1.25", None])
def test_bad_factors_are_refused(factor: float) -> None:
    for bad in ({"factor": factor}, {"eval_factor": factor}):
        with pytest.raises(ConfigError, match=f"{next(iter(bad))} is .*; it must be 0 or a positive"):
            Capacity(**bad)


def test_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no overflow policy 'prio'\n.*position, priority, .*, queue"):
        Capacity(policy="prio")
    assert not any(Capacity(policy=policy).queues for policy in POLICIES)


def test_queue_leaves_the_pairs_alone() -> None:
    pairs, score_TE = draw_pairs(40, 4, 2)
    capacity = Capacity(1.0, policy="queue")
    assert capacity.queues and capacity.fit(pairs, score_TE, training=True) is pairs


def test_scores_of_other_tokens_are_our_bug() -> None:
    pairs, score_TE = draw_pairs(10, 4, 2)
    with pytest.raises(AssertionError):
        Capacity(1.0).fit(pairs, score_TE[:9], training=True)


# The queue


@pytest.mark.parametrize("backend", ["reference", "grouped"])
@pytest.mark.parametrize("limit", [1, 3, 7, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_passes_add_up_to_one(backend: str, limit: int, padded: bool) -> None:
    pairs, _ = draw_pairs(23, 5, 2, padded=padded)
    weight_N = torch.rand(pairs.pairs, dtype=torch.float64, requires_grad=True)
    routing = pairs.with_weights(weight_N)
    experts = Experts(6, 4, 5, backend=backend, dtype=torch.float64)
    x_TD = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    parts = passes(routing, limit)
    assert len(parts) == -(-int(routing.counts_E.max()) // limit)
    for part in parts:
        assert int(part.counts_E.max()) <= limit and pairs_of(part) == sorted(set(pairs_of(part)))
        assert part.tokens == 23 and part.valid_T is routing.valid_T
        assert part.counts_E.tolist() == [sum(e == f for f, _ in pairs_of(part)) for e in range(5)]
    assert sorted(pair for part in parts for pair in pairs_of(part)) == pairs_of(routing)
    for e in range(5):  # first come, first served
        order = [token for part in parts for expert, token in pairs_of(part) if expert == e]
        assert order == sorted(order)
    leaves = [x_TD, weight_N, *experts.parameters()]
    grad_TD = torch.randn(23, 6, dtype=torch.float64)
    whole_TD = experts(x_TD, routing)
    expected = torch.autograd.grad(whole_TD, leaves, grad_TD)
    sum_TD = torch.stack([experts(x_TD, part) for part in parts]).sum(0)
    torch.testing.assert_close(sum_TD, whole_TD, rtol=1e-12, atol=1e-14)
    for got, want in zip(torch.autograd.grad(sum_TD, leaves, grad_TD), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
        assert want.norm() > 1e-2


def test_passes_of_nothing_and_of_no_room() -> None:
    empty, _ = draw_pairs(0, 4, 1)
    assert passes(empty, 0) == [empty]
    pairs, _ = draw_pairs(3, 4, 1)
    with pytest.raises(AssertionError):
        passes(pairs, 0)


# The accounting


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("padded", [False, True])
def test_accounting_by_hand(policy: str, padded: bool) -> None:
    before, score_TE = draw_pairs(40, 5, 2, padded=padded)
    limit = Capacity(0.8).limit(before, training=True)
    assert limit is not None
    after = apply(policy, before, score_TE, limit)
    weight_N = torch.rand(before.pairs)
    wanted, got = pairs_of(before), set(pairs_of(after))
    lost = [pair not in got for pair in wanted]
    hit = {t for e, t in set(wanted) ^ got}
    lost_all = {t for _, t in wanted if all(pair not in got for pair in wanted if pair[1] == t)}
    share = sum(w for w, gone in zip(weight_N.tolist(), lost, strict=True) if gone) / weight_N.sum().item()
    expected = Overflow(
        wanted=len(wanted),
        dropped=sum(lost),
        moved=len(got - set(wanted)),
        tokens_hit=len(hit),
        tokens_lost=len(lost_all),
        weight_lost=pytest.approx(share, rel=1e-6),
        buffer_rows=5 * limit,
        padding_rows=sum(limit - min(count, limit) for count in after.counts_E.tolist()),
    )
    result = accounting(after, limit, weight_N)
    assert result == expected
    assert (result.dropped, result.moved) == (after.dropped, after.moved)
    assert (result.tokens_hit > 0) and (policy == "dense") == (result.dropped == 0)
    unweighted = accounting(after, limit).weight_lost
    assert unweighted == (0.0 if policy == "dense" else None)


def test_accounting_of_a_routing_that_lost_nothing() -> None:
    pairs, _ = draw_pairs(9, 4, 2)
    result = accounting(pairs, None)
    assert result.padding_rows == 0 and result.buffer_rows == result.wanted == 18
    assert result.weight_lost == 0.0 and (result.dropped, result.moved, result.tokens_hit) == (0, 0, 0)
    empty, _ = draw_pairs(0, 4, 2)
    assert accounting(empty, 0, torch.empty(0)) == Overflow(
        wanted=0,
        dropped=0,
        moved=0,
        tokens_hit=0,
        tokens_lost=0,
        weight_lost=0.0,
        buffer_rows=0,
        padding_rows=0,
    )


def test_a_token_is_lost_when_all_its_experts_are_full() -> None:
    """Tokens 0 to 2 want experts 0 and 1, which take two each: token 2 gets none, token 3 keeps one of its two."""
    mask_TE = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    after = apply("position", Routing.from_mask(mask_TE), torch.rand(4, 3), 2)
    result = accounting(after, 2, torch.ones(8))
    assert (result.dropped, result.tokens_hit, result.tokens_lost) == (3, 2, 1)
    assert result.weight_lost == pytest.approx(3 / 8) and result.padding_rows == 1


def test_buffer_bytes() -> None:
    assert buffer_bytes(1.25, 128, 8, 512, 2) == 8 * 20 * 512 * 2
    assert buffer_bytes(1.1, 1000, 10, 3, 4) == 10 * 110 * 3 * 4
    assert buffer_bytes(0, 128, 8, 512, 2) == 128 * 512 * 2
    mask_TE = choose_at_random(64, 8, 2)
    limit = Capacity(1.25).limit(Routing.from_mask(mask_TE), training=True)
    assert buffer_bytes(1.25, 128, 8, 1, 1) == accounting(Routing.from_mask(mask_TE), limit).buffer_rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sequences", "rows"), [(1, 1), (3, 2), (4, 3), (12, 1), (2, 99)])
def test_rows_of_each_sequence_are_those_it_gets_alone(kind: str, sequences: int, rows: int) -> None:
    """Sequence by sequence, the plain policy with the same limit says who stays."""
    pairs, score_TE = draw_pairs(12, 4, 2, kind=kind, padded=kind == "topk")
    capacity = Capacity(factor=3.0, sequence_rows=rows)
    kept = capacity.fit(pairs, score_TE, training=False, sequences=sequences)
    length = 12 // sequences
    expected = set()
    for number in range(sequences):
        mine = [pair for pair in pairs_of(pairs) if pair[1] // length == number]
        ranks = [0] * pairs.pairs if pairs.rank_N is None else pairs.rank_N.tolist()
        rank = dict(zip(pairs_of(pairs), ranks, strict=True))
        expected |= first_of_each(mine, lambda pair, rank=rank: (rank[pair], pair[1]), rows)
    assert set(pairs_of(kept)) == expected
    assert kept.dropped == pairs.pairs - len(expected)
    assert (kept is pairs) == (len(expected) == pairs.pairs)
    assert capacity.limit(pairs, True, sequences) == rows * sequences


@pytest.mark.parametrize(("rows", "policy"), [(-1, "position"), (2, "priority"), (2, "queue")])
def test_rows_of_a_sequence_that_are_refused(rows: int, policy: str) -> None:
    with pytest.raises(ConfigError, match=f"sequence_rows is {rows} with overflow policy '{policy}'"):
        Capacity(sequence_rows=rows, policy=policy)
