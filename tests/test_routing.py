"""`Routing`: ways to make one, what every one promises, and the operations on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety.routing import Routing, top_k
from tests.oracle import choose_at_random, routing_of
from tests.router_oracle import best


def pairs_of(routing: Routing) -> list[tuple[int, int, float]]:
    """(expert, token, weight) of every pair, in order."""
    return list(
        zip(routing.expert_N.tolist(), routing.token_N.tolist(), routing.weight_N.tolist(), strict=True)
    )


def check(routing: Routing) -> None:
    """What every routing promises."""
    pairs = [(e, t) for e, t, _ in pairs_of(routing)]
    assert pairs == sorted(set(pairs)), "pairs are sorted by expert, then token, each once"
    assert routing.counts_E.tolist() == [sum(e == f for f, _ in pairs) for e in range(routing.experts)]
    assert routing.counts_E.dtype == routing.token_N.dtype == torch.int64
    assert routing.pairs == len(pairs) == len(routing.weight_N)
    assert routing.ends_E.tolist() == [sum(f <= e for f, _ in pairs) for e in range(routing.experts)]
    assert [e for e, _, _ in routing.slices] == sorted({e for e, _ in pairs})
    for e, start, stop in routing.slices:
        assert start < stop and [f for f, _ in pairs[start:stop]] == [e] * (stop - start)
    by_token = routing.pairs_of_token_N.tolist()
    first = [*routing.first_pair_T.tolist(), routing.pairs]
    for t in range(routing.tokens):
        mine = by_token[first[t] : first[t + 1]]
        assert mine == [i for i, (_, token) in enumerate(pairs) if token == t], "ascending experts of a token"


@given(data=st.data(), tokens=st.integers(0, 12), experts=st.integers(1, 6), padded=st.booleans())
@settings(max_examples=80)
def test_from_choices(data: Any, tokens: int, experts: int, padded: bool) -> None:
    k = data.draw(st.integers(1, experts))
    rows = [data.draw(st.permutations(range(experts)))[:k] for _ in range(tokens)]
    expert_TK = torch.tensor(rows, dtype=torch.int64).view(tokens, k)
    weight_TK = torch.rand(tokens, k)
    valid = (
        data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)) if padded else [True] * tokens
    )
    valid_T = torch.tensor(valid, dtype=torch.bool) if padded else None
    routing = Routing.from_choices(expert_TK, weight_TK, experts=experts, valid_T=valid_T)
    check(routing)
    expected = [(rows[t][j], t, weight_TK[t, j].item()) for t in range(tokens) for j in range(k) if valid[t]]
    assert pairs_of(routing) == sorted(expected)
    assert routing.tokens == tokens and routing.experts == experts and routing.dropped == 0
    assert int(routing.valid_tokens) == sum(valid)
    unweighted = Routing.from_choices(expert_TK, experts=experts, valid_T=valid_T)
    assert bool((unweighted.weight_N == 1).all()) and torch.equal(unweighted.token_N, routing.token_N)


@given(data=st.data(), tokens=st.integers(1, 10), experts=st.integers(1, 6))
@settings(max_examples=60)
def test_from_pairs_and_from_lists(data: Any, tokens: int, experts: int) -> None:
    row = st.lists(st.booleans(), min_size=experts, max_size=experts)
    chosen_TE = torch.tensor(data.draw(st.lists(row, min_size=tokens, max_size=tokens)))
    weight_TE = torch.rand(tokens, experts)
    token_N, expert_N = chosen_TE.nonzero(as_tuple=True)
    shuffle_N = torch.tensor(data.draw(st.permutations(range(len(token_N)))), dtype=torch.int64)
    token_N, expert_N = token_N[shuffle_N], expert_N[shuffle_N]
    routing = Routing.from_pairs(
        token_N, expert_N, weight_TE[token_N, expert_N], tokens=tokens, experts=experts
    )
    check(routing)
    assert torch.equal(routing.dense(), weight_TE * chosen_TE)
    token_E = [chosen_TE[:, e].nonzero().squeeze(1).flip(0) for e in range(experts)]
    lists = Routing.from_lists(token_E, [weight_TE[t, e] for e, t in enumerate(token_E)], tokens=tokens)
    check(lists)
    assert pairs_of(lists) == pairs_of(routing)


def test_an_expert_number_too_high_is_our_bug() -> None:
    ones = torch.ones(2)
    with pytest.raises(AssertionError):
        Routing.from_pairs(torch.tensor([0, 1]), torch.tensor([0, 3]), ones, tokens=2, experts=3)
    with pytest.raises(AssertionError):
        Routing.from_pairs(torch.tensor([0, 1]), torch.tensor([0]), ones, tokens=2, experts=3)
    with pytest.raises(AssertionError):
        Routing.from_lists([torch.tensor([0])], [], tokens=2)


# Operations


def some_routing(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Routing]:
    """Seven tokens, five experts; expert 3 idle, token 2 without a pair."""
    chosen_TE = choose_at_random(7, 5, 2)
    chosen_TE[:, 3] = chosen_TE[2] = False
    weight_TE = torch.rand(7, 5, dtype=dtype, requires_grad=True)
    return chosen_TE, weight_TE, routing_of(chosen_TE, weight_TE)


def test_operations_against_the_dense_matrix() -> None:
    chosen_TE, weight_TE, routing = some_routing()
    check(routing)
    masked_TE = weight_TE * chosen_TE
    value_TE, value_N = (
        torch.randn(7, 5, dtype=torch.float64),
        torch.randn(routing.pairs, dtype=torch.float64),
    )
    assert routing.pairs > 5
    assert torch.equal(routing.dense(), masked_TE)
    assert torch.equal(routing.at_pairs(value_TE), value_TE.T[chosen_TE.T])
    value_dense_TE = routing.with_weights(value_N).dense()
    torch.testing.assert_close(routing.sum_by_token(value_N), value_dense_TE.sum(1))
    assert routing.sum_by_token(value_N)[2] == 0
    x_TD = torch.randn(7, 4, dtype=torch.float64)
    assert torch.equal(routing.gather(x_TD), torch.stack([x_TD[t] for _, t, _ in pairs_of(routing)]))
    y_ND = torch.randn(routing.pairs, 4, dtype=torch.float64)
    spread_TED = torch.zeros(7, 5, 4, dtype=torch.float64)
    spread_TED[routing.token_N, routing.expert_N] = y_ND
    torch.testing.assert_close(routing.combine(y_ND), torch.einsum("te,ted->td", masked_TE, spread_TED))
    # a function of x that all experts share: combining is multiplying by the row sums of the matrix
    torch.testing.assert_close(routing.combine(routing.gather(x_TD)), masked_TE.sum(1, keepdim=True) * x_TD)


def test_combine_keeps_the_dtype_of_the_rows() -> None:
    _, _, routing = some_routing(torch.float32)
    assert routing.combine(torch.ones(routing.pairs, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_of_the_operations() -> None:
    chosen_TE, weight_TE, routing = some_routing()
    y_ND = torch.randn(routing.pairs, 3, dtype=torch.float64, requires_grad=True)
    value_N = torch.randn(routing.pairs, dtype=torch.float64, requires_grad=True)
    x_TD = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda w, y: routing_of(chosen_TE, w).combine(y), (weight_TE, y_ND))
    assert check(lambda w: routing_of(chosen_TE, w).dense(), weight_TE)
    assert check(routing.at_pairs, weight_TE)
    assert check(routing.sum_by_token, value_N)
    assert check(routing.gather, x_TD)
    routing.dense().sum().backward()
    assert torch.equal(weight_TE.grad, chosen_TE.double())  # type: ignore[arg-type]


def test_keep_counts_what_it_drops() -> None:
    _, _, routing = some_routing()
    keep_N = torch.arange(routing.pairs) % 3 != 0
    kept = routing.keep(keep_N)
    check(kept)
    assert pairs_of(kept) == [
        pair for pair, keep in zip(pairs_of(routing), keep_N.tolist(), strict=True) if keep
    ]
    assert kept.dropped == int((~keep_N).sum()) > 0 and kept.tokens == routing.tokens
    again = kept.keep(torch.zeros(kept.pairs, dtype=torch.bool))
    check(again)
    assert again.pairs == 0 and again.dropped == routing.pairs and again.experts == routing.experts
    assert kept.weight_N.requires_grad


def test_renumber_permutes_and_embeds() -> None:
    _, _, routing = some_routing()
    number_E = torch.tensor([4, 0, 7, 2, 1])
    renumbered = routing.renumber(number_E, 8)
    check(renumbered)
    expected_TE = torch.zeros(7, 8, dtype=torch.float64)
    expected_TE[:, number_E] = routing.dense()
    assert torch.equal(renumbered.dense(), expected_TE) and renumbered.experts == 8
    back_E = torch.full((8,), -1)
    back_E[number_E] = torch.arange(5)
    assert pairs_of(renumbered.renumber(back_E, 5)) == pairs_of(routing)


def test_renumber_and_pinned_keep_padding_and_drops() -> None:
    valid_T = torch.tensor([True, False, True, True])
    choices = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 2]])
    routing = Routing.from_choices(choices, experts=3, valid_T=valid_T).keep(
        torch.tensor([True] * 5 + [False])
    )
    for other in (routing.renumber(torch.tensor([2, 0, 1]), 3), routing.pinned()):
        check(other)
        assert other.valid_T is valid_T and other.dropped == 1 and other.tokens == 4
        assert 1 not in other.token_N


def test_pinned_is_bare() -> None:
    _, _, routing = some_routing()
    pinned = routing.pinned()
    check(pinned)
    assert not pinned.weight_N.requires_grad and pinned.logits_TE is None and pinned.score_TE is None
    assert torch.equal(pinned.token_N, routing.token_N) and torch.equal(pinned.counts_E, routing.counts_E)


def test_with_weights_wants_one_weight_per_pair() -> None:
    _, _, routing = some_routing()
    assert torch.equal(routing.with_weights(routing.weight_N * 2).dense(), routing.dense() * 2)
    with pytest.raises(AssertionError):
        routing.with_weights(torch.ones(routing.pairs + 1))


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_routed(tokens: int) -> None:
    valid_T = torch.zeros(tokens, dtype=torch.bool)
    empty = torch.empty(0, dtype=torch.int64)
    weight = torch.empty(0, requires_grad=True)
    for routing in (
        Routing.from_choices(torch.zeros(tokens, 1, dtype=torch.int64), experts=3, valid_T=valid_T),
        Routing.from_pairs(empty, empty, weight, tokens=tokens, experts=3),
        Routing.from_lists([empty] * 3, [weight] * 3, tokens=tokens),
    ):
        check(routing)
        assert routing.pairs == 0 and routing.counts_E.tolist() == [0, 0, 0] and routing.slices == []
        assert routing.combine(torch.empty(0, 4)).tolist() == [[0.0] * 4] * tokens
        assert routing.gather(torch.ones(tokens, 4)).shape == (0, 4)
        assert routing.dense().shape == (tokens, 3) and not routing.dense().any()
        assert routing.sum_by_token(torch.empty(0)).tolist() == [0.0] * tokens
        assert routing.keep(torch.empty(0, dtype=torch.bool)).pairs == 0
        check(routing.renumber(torch.tensor([2, 1, 0]), 3))


def test_two_routings_share_no_memory_of_each_other() -> None:
    """The cached facts belong to one routing: a copy with fewer pairs must not inherit them."""
    _, _, routing = some_routing()
    facts = (routing.ends_E, routing.slices, routing.expert_N, routing.pairs_of_token_N, routing.first_pair_T)
    assert len(facts) == 5
    check(routing.keep(torch.arange(routing.pairs) % 2 == 0))
    check(routing.renumber(torch.tensor([4, 3, 2, 1, 0]), 5))


# top_k


@given(data=st.data(), tokens=st.integers(0, 6), experts=st.integers(1, 8))
@settings(max_examples=120)
def test_top_k_and_its_tie_rule(data: Any, tokens: int, experts: int) -> None:
    """Few different values, so that ties fall on every position; whole groups may be out of the question."""
    k = data.draw(st.integers(1, experts))
    value = st.sampled_from([0.0, 0.25, 0.5, float("-inf")])
    row = st.lists(value, min_size=experts, max_size=experts)
    score = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
    score_TE = torch.tensor(score, dtype=torch.float32).view(tokens, experts)
    expected = [best(dict(enumerate(score_E)), k) for score_E in score]
    got_TK = top_k(score_TE, k)
    assert got_TK.dtype == torch.int64 and got_TK.shape == (tokens, k)
    assert got_TK.tolist() == expected


@pytest.mark.parametrize("experts", [3, 16, 64, 200])
def test_top_k_ties_at_every_position(experts: int) -> None:
    for k in sorted({1, 2, experts // 2, experts - 1, experts}):
        score_TE = torch.rand(30, experts)
        order_TE = score_TE.argsort(dim=1, descending=True)
        for t in range(30):  # make the k-th best equal to the next few
            score_TE[t, order_TE[t, max(k - 1 - t % 3, 0) : k + 1 + t % 4]] = float(
                score_TE[t, order_TE[t, k - 1]]
            )
        score_TE[0] = 0.5
        expected = [best(dict(enumerate(score_E)), k) for score_E in score_TE.tolist()]
        assert top_k(score_TE, k).tolist() == expected
        assert top_k(score_TE[:1], k).tolist() == [list(range(k))]


def test_top_k_bounds() -> None:
    for k in (0, 4):
        with pytest.raises(AssertionError):
            top_k(torch.rand(2, 3), k)
