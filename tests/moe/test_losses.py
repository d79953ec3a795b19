"""The table of losses: closed forms, floors and where they are none, gradients, padding, micro-batches, capacity."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moiety.errors import UsageError
from moiety.moe.balance import load_balance_loss
from moiety.moe.losses import (
    LOSSES,
    LossContext,
    communication_loss,
    entropy_loss,
    group_balance_loss,
    gshard_balance_loss,
    importance_loss,
    pooled_balance_loss,
    smooth_load_loss,
    sparsity_loss,
    squared_variation,
)
from moiety.routing import Noise, Routing, top_k
from tests.oracle import choose_at_random

E, K, GROUPS, GROUPS_KEPT = 6, 2, 3, 2
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
    "relu": lambda logits_TE: logits_TE.relu(),
}
ADDITIVE = ("load", "group", "entropy", "sparsity", "z")
every_loss = pytest.mark.parametrize("name", LOSSES)
every_score = pytest.mark.parametrize("scores", SCORES)


def context(load_E: Tensor | None = None) -> LossContext:
    return LossContext(k=K, load_E=load_E, sequences=3, groups=GROUPS, groups_kept=GROUPS_KEPT)


def routed(
    leaf_TAE: Tensor,
    valid_T: Tensor | None = None,
    *,
    scores: str = "softmax",
    k: int = K,
    drop: float = 0.0,
) -> Routing:
    """A noisy top-k routing (variable k for relu). The leaf holds clean logits, raw deviations and draws."""
    clean_TE, deviation_TE = leaf_TAE[:, 0], torch.nn.functional.softplus(leaf_TAE[:, 1])
    logits_TE = clean_TE + deviation_TE * leaf_TAE[:, 2]
    score_TE = SCORES[scores](logits_TE)
    if scores == "relu":
        pairs = Routing.from_mask(score_TE > 0, valid_T=valid_T)
    else:
        pairs = Routing.from_choices(top_k(score_TE.detach(), k), experts=leaf_TAE.shape[2], valid_T=valid_T)
    if drop:
        pairs = pairs.keep(torch.rand(pairs.pairs) > drop)
    noise = Noise(clean_TE, deviation_TE)
    return pairs.with_weights(pairs.at_pairs(score_TE), logits_TE=logits_TE, score_TE=score_TE, noise=noise)


def leaf(tokens: int, experts: int = E) -> Tensor:
    """Random, with favourites."""
    leaf_TAE = torch.randn(tokens, 3, experts, dtype=torch.float64)
    leaf_TAE[:, 0] += torch.linspace(0, 1.5, experts)
    return leaf_TAE


def plain(logits_TE: Tensor, chosen: list[list[int]] | None = None, k: int = K) -> Routing:
    """Softmax scores of the logits, and either given experts or the k best."""
    score_TE = logits_TE.softmax(dim=-1)
    if chosen is None:
        pairs = Routing.from_choices(top_k(score_TE.detach(), k), experts=logits_TE.shape[1])
    else:
        pairs = Routing.from_choices(torch.tensor(chosen), experts=logits_TE.shape[1])
    return pairs.with_weights(pairs.at_pairs(score_TE), logits_TE=logits_TE, score_TE=score_TE)


# Closed forms, in plain Python


class ByHand:
    """The sums of one routing of real tokens as Python lists."""

    def __init__(self, routing: Routing) -> None:
        assert routing.score_TE is not None and routing.logits_TE is not None and routing.noise is not None
        self.score: list[list[float]] = routing.score_TE.tolist()
        self.logits: list[list[float]] = routing.logits_TE.tolist()
        self.clean: list[list[float]] = routing.noise.clean_TE.tolist()
        self.deviation: list[list[float]] = routing.noise.deviation_TE.tolist()
        self.weights: list[list[float]] = routing.dense().tolist()
        self.tokens, self.experts = routing.tokens, routing.experts
        self.chosen = [[i for i in range(self.experts) if row[i]] for row in routing.mask_TE.tolist()]
        self.p = [[s / (sum(row) or 1) for s in row] for row in self.score]
        self.mean_p = [sum(row[i] for row in self.p) / self.tokens for i in range(self.experts)]
        self.count = [sum(i in row for row in self.chosen) for i in range(self.experts)]
        self.f = [self.experts * count / sum(self.count) for count in self.count]

    def load(self) -> float:
        return sum(f * p for f, p in zip(self.f, self.mean_p, strict=True))

    def gshard(self) -> float:
        first = [max(row, key=lambda i: (self.score[t][i], -i)) for t, row in enumerate(self.chosen) if row]
        return sum(first.count(i) / self.tokens * self.mean_p[i] for i in range(self.experts)) / self.experts

    def importance(self) -> float:
        return variation([sum(row[i] for row in self.weights) for i in range(self.experts)])

    def smooth_load(self) -> float:
        load = [0.0] * self.experts
        for t, row in enumerate(self.logits):
            for i in range(self.experts):
                edge = sorted((x for j, x in enumerate(row) if j != i), reverse=True)[K - 1]
                z = (self.clean[t][i] - edge) / self.deviation[t][i]
                load[i] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
        return variation(load)

    def group(self) -> float:
        size = self.experts // GROUPS
        parts = [range(j * size, j * size + size) for j in range(GROUPS)]
        return sum(sum(self.f[i] for i in part) / size * sum(self.mean_p[i] for i in part) for part in parts)

    def communication(self) -> float:
        size = self.experts // GROUPS
        total = 0.0
        for j in range(GROUPS):
            sent = sum(any(i // size == j for i in row) for row in self.chosen)
            share = sum(self.mean_p[j * size : j * size + size])
            total += GROUPS / (GROUPS_KEPT * self.tokens) * sent * share
        return total

    def entropy(self) -> float:
        return -sum(p * math.log(p) for row in self.p for p in row if p > 0) / self.tokens

    def sparsity(self) -> float:
        return sum(self.f[i] * row[i] for row in self.score for i in range(self.experts)) / self.tokens

    def z(self) -> float:
        return sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in self.logits) / self.tokens


def variation(load: list[float]) -> float:
    mean = sum(load) / len(load)
    return sum((value - mean) ** 2 for value in load) / len(load) / mean**2


@every_score
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sequence"])
def test_losses_by_hand(name: str, scores: str) -> None:
    routing = routed(leaf(30), scores=scores)
    expected = getattr(ByHand(routing), name)()
    assert LOSSES[name](routing, context()).item() == pytest.approx(expected, rel=1e-12)
    assert abs(expected) > 1e-2


def test_sequence_in_the_table_is_the_mean_over_sequences() -> None:
    leaf_TAE = leaf(12)
    parts = [load_balance_loss(routed(part)).item() for part in leaf_TAE.split(4)]
    assert LOSSES["sequence"](routed(leaf_TAE), context()).item() == pytest.approx(sum(parts) / 3, rel=1e-12)


def test_squared_variation() -> None:
    load_E = torch.tensor([3.0, 1.0, 0.0, 4.0], dtype=torch.float64)
    assert squared_variation(load_E).item() == pytest.approx(variation([3, 1, 0, 4]), rel=1e-12)
    assert squared_variation(torch.tensor([0.0, 7.0, 0.0, 0.0, 0.0])).item() == pytest.approx(4)
    for even_E in (torch.full((5,), 0.3), torch.zeros(5), torch.tensor([9.0])):
        assert squared_variation(even_E).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_pooled_loss_is_that_of_transformers(k: int, padded: bool) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [torch.randn(40, 8) + torch.linspace(0, slope, 8) for slope in (1.0, -2.0, 0.0)]
    valid_T = torch.rand(40) > 0.4 if padded else None
    mask = None if valid_T is None else valid_T.view(4, 10)
    theirs = load_balancing_loss_func(tuple(layers), 8, k, attention_mask=mask)
    routings = []
    for logits_TE in layers:
        score_TE = logits_TE.softmax(dim=-1)
        pairs = Routing.from_choices(top_k(score_TE, k), experts=8, valid_T=valid_T)
        routings.append(pairs.with_weights(pairs.at_pairs(score_TE), score_TE=score_TE))
    ours = pooled_balance_loss(routings)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    apart = k * sum(load_balance_loss(routing).item() for routing in routings) / 3
    assert ours.item() < apart - 0.01, "pooling hides the imbalance of single layers"
    with pytest.raises(AssertionError):
        pooled_balance_loss([])


def test_gshard_takes_first_choices_from_ranks() -> None:
    logits_TE = torch.randn(20, E, dtype=torch.float64)
    score_TE = logits_TE.softmax(dim=-1)
    best_TK = score_TE.sort(dim=1, descending=True).indices[:, :K]
    for ranked_TK, place in ((best_TK, 0), (best_TK.flip(1), 1)):
        pairs = Routing.from_choices(ranked_TK, experts=E, ranked=True)
        routing = pairs.with_weights(pairs.at_pairs(score_TE), score_TE=score_TE)
        count_E = torch.bincount(best_TK[:, place], minlength=E)
        expected = (count_E.double() / 20 * score_TE.mean(0)).sum().item() / E
        assert gshard_balance_loss(routing).item() == pytest.approx(expected, rel=1e-12)
    unranked = Routing.from_choices(best_TK.flip(1), experts=E)
    routing = unranked.with_weights(unranked.at_pairs(score_TE), score_TE=score_TE)
    count_E = torch.bincount(best_TK[:, 0], minlength=E)
    expected = (count_E.double() / 20 * score_TE.mean(0)).sum().item() / E
    assert gshard_balance_loss(routing).item() == pytest.approx(expected, rel=1e-12)


# Floors


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_perfect_balance_reaches_the_floor(k: int) -> None:
    chosen = [[(t + i) % E for i in range(k)] for t in range(2 * E)]
    logits_TE = torch.zeros(2 * E, E, dtype=torch.float64)
    for t, row in enumerate(chosen):
        logits_TE[t, row] = 2.0
        logits_TE[t, t % E] += 0.5  # the first choice
    routing = plain(logits_TE, chosen)
    assert load_balance_loss(routing).item() == pytest.approx(1, rel=1e-12)
    assert group_balance_loss(routing, GROUPS).item() == pytest.approx(1, rel=1e-12)
    assert gshard_balance_loss(routing).item() == pytest.approx(1 / E**2, rel=1e-12)
    assert pooled_balance_loss([routing] * 3).item() == pytest.approx(k, rel=1e-12)
    assert importance_loss(routing).item() == pytest.approx(0, abs=1e-12)
    noisy = routing.with_weights(
        routing.weight_N, logits_TE=logits_TE, noise=Noise(logits_TE, torch.ones_like(logits_TE))
    )
    assert smooth_load_loss(noisy, k).item() == pytest.approx(0, abs=1e-12)


def test_communication_is_one_for_all_groups_and_one_over_m_for_one() -> None:
    """Six experts in three groups of two; tokens use two groups each, then one, always evenly."""
    for chosen, expected in (
        ([[t % 6, (t + 2) % 6] for t in range(12)], 1.0),
        ([[t % 3 * 2, t % 3 * 2 + 1] for t in range(12)], 0.5),
    ):
        logits_TE = torch.zeros(12, 6, dtype=torch.float64)
        for t, row in enumerate(chosen):
            logits_TE[t, row] = 1.0
        routing = plain(logits_TE, chosen)
        assert communication_loss(routing, 3, 2).item() == pytest.approx(expected, rel=1e-12)
        assert communication_loss(routing, 1, 1).item() == pytest.approx(1, rel=1e-12)


def test_entropy_floor_and_ceiling() -> None:
    sure_TE = torch.full((5, E), -800.0, dtype=torch.float64)
    sure_TE[:, 2] = 0.0
    sure_TE.requires_grad_()
    loss = entropy_loss(plain(sure_TE))
    loss.backward()
    assert loss.item() == 0 and sure_TE.grad is not None and bool(sure_TE.grad.isfinite().all())
    assert entropy_loss(plain(torch.ones(5, E, dtype=torch.float64))).item() == pytest.approx(math.log(E))


def test_true_floors_are_never_undercut() -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        routing = routed(leaf(1 + seed % 7, 1 + seed % 5) * (seed % 4), k=1, scores=list(SCORES)[seed % 3])
        for loss in (importance_loss, entropy_loss, sparsity_loss, lambda r: smooth_load_loss(r, 1)):
            assert loss(routing).item() >= 0


def test_the_products_of_load_and_probability_have_no_floor() -> None:
    """Nine tokens choose expert 0 by a hair, one chooses expert 1 for sure: the load is 9 to 1, P leans to 1."""
    logits_TE = torch.zeros(10, 2, dtype=torch.float64)
    logits_TE[:9, 0], logits_TE[9, 1] = 0.02, 9.0
    routing = plain(logits_TE, k=1)
    assert routing.counts_E.tolist() == [9, 1]
    below = load_balance_loss(routing).item()
    assert below == pytest.approx(2 * (0.9 * 0.4546 + 0.1 * 0.5454), abs=1e-3)
    assert below < 0.95
    assert group_balance_loss(routing, 2).item() == pytest.approx(below, rel=1e-12)
    assert communication_loss(routing, 2, 1).item() == pytest.approx(below, rel=1e-12)
    assert gshard_balance_loss(routing).item() == pytest.approx(below / 4, rel=1e-12)
    assert pooled_balance_loss([routing]).item() == pytest.approx(below, rel=1e-12)


def test_collapse_costs_more_than_balance() -> None:
    collapsed = torch.zeros(12, 3, E, dtype=torch.float64)
    collapsed[:, 0, :K] = 30.0
    routing = routed(collapsed)
    assert load_balance_loss(routing).item() == pytest.approx(E / K, rel=1e-6)
    assert gshard_balance_loss(routing).item() == pytest.approx(1 / (E * K), rel=1e-6)
    assert importance_loss(routing).item() == pytest.approx(E / K - 1, rel=1e-6)
    assert smooth_load_loss(routing, K).item() == pytest.approx(E / K - 1, rel=1e-6)
    assert group_balance_loss(routing, GROUPS).item() == pytest.approx(GROUPS, rel=1e-6)
    assert communication_loss(routing, GROUPS, 1).item() == pytest.approx(GROUPS, rel=1e-6)
    assert sparsity_loss(routing).item() == pytest.approx(E / K, rel=1e-6)


def test_one_expert_is_always_balanced() -> None:
    routing = routed(leaf(5, 1), k=1)
    assert importance_loss(routing).item() == smooth_load_loss(routing, 1).item() == 0
    assert smooth_load_loss(routed(leaf(5), k=E), E).item() == 0
    assert load_balance_loss(routing).item() == gshard_balance_loss(routing).item() == 1


# Gradients


@every_score
@every_loss
def test_gradient_by_finite_differences(name: str, scores: str) -> None:
    leaf_TAE = leaf(6).requires_grad_()
    torch.autograd.gradcheck(lambda x: LOSSES[name](routed(x, scores=scores), context()), leaf_TAE)
    (grad,) = torch.autograd.grad(LOSSES[name](routed(leaf_TAE, scores=scores), context()), leaf_TAE)
    assert grad[:, 0].norm() > 1e-3


@pytest.mark.parametrize("name", ["load", "sequence", "gshard", "group", "communication"])
def test_only_the_probability_carries_a_gradient(name: str) -> None:
    """The combine weights carry none, and none of it scales a token's scores as a whole: P would not change."""
    logits_TE = torch.randn(9, E, dtype=torch.float64)
    chosen = top_k(logits_TE, K).tolist()
    score_TE = logits_TE.softmax(dim=-1).requires_grad_()
    weight_N = torch.ones(9 * K, dtype=torch.float64, requires_grad=True)
    pairs = Routing.from_choices(torch.tensor(chosen), experts=E)
    loss = LOSSES[name](pairs.with_weights(weight_N, logits_TE=logits_TE, score_TE=score_TE), context())
    (grad_TE,) = torch.autograd.grad(loss, score_TE, retain_graph=True)
    (none,) = torch.autograd.grad(loss, weight_N, allow_unused=True)
    assert none is None
    assert float((grad_TE * score_TE.detach()).sum(1).abs().max()) < 1e-12
    assert grad_TE.norm() > 1e-3


def test_importance_reaches_chosen_weights_alone() -> None:
    leaf_TAE = leaf(9)
    leaf_TAE[:, 2] = 0
    logits_TE = leaf_TAE[:, 0].clone().requires_grad_()
    score_TE = logits_TE.sigmoid()
    pairs = Routing.from_choices(top_k(score_TE.detach(), K), experts=E)
    importance_loss(pairs.with_weights(pairs.at_pairs(score_TE))).backward()
    assert logits_TE.grad is not None
    assert torch.equal(logits_TE.grad != 0, pairs.mask_TE)


def test_smooth_load_reaches_clean_logits_deviation_and_edge() -> None:
    leaf_TAE = leaf(9)
    clean, deviation, noisy = (
        value.clone().requires_grad_()
        for value in (leaf_TAE[:, 0], leaf_TAE[:, 1].exp(), leaf_TAE[:, 0] + leaf_TAE[:, 2])
    )
    pairs = Routing.from_choices(top_k(noisy.detach(), K), experts=E)
    weight_N = torch.ones(pairs.pairs)
    smooth_load_loss(
        pairs.with_weights(weight_N, logits_TE=noisy, noise=Noise(clean, deviation)), K
    ).backward()
    for value in (clean, deviation, noisy):
        assert value.grad is not None and value.grad.norm() > 1e-3


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "z"])
def test_steps_down_the_gradient_lower_the_loss(name: str) -> None:
    x_TD = torch.randn(60, 8, dtype=torch.float64) + 0.5
    gate = torch.randn(E, 8, dtype=torch.float64) * 0.5
    gate += torch.linspace(0, 0.5, E)[:, None]  # favourites, and neighbours of the same group among them
    gate.requires_grad_()
    draw_TE = torch.randn(60, E, dtype=torch.float64)
    costs = []
    for _ in range(40):
        logits_TE = x_TD @ gate.T
        routing = routed(torch.stack([logits_TE, torch.zeros_like(logits_TE), 0.3 * draw_TE], dim=1))
        cost = LOSSES[name](routing, context())
        costs.append(cost.item())
        (grad,) = torch.autograd.grad(cost, gate)
        with torch.no_grad():
            gate -= 0.05 * grad / grad.norm()
    assert costs[-1] < costs[0] - 0.002 and costs[-1] < 0.98 * costs[0]


# Padding, no tokens, micro-batches, capacity


@every_score
@every_loss
def test_padding_equals_absence(name: str, scores: str) -> None:
    """12 real tokens in 3 sequences of 6, two of each being padding with wild values."""
    valid_T = torch.tensor([True, True, False, True, False, True] * 3)
    real = leaf(12).requires_grad_()
    padded = (torch.randn(18, 3, E, dtype=torch.float64) * 30).masked_scatter(valid_T[:, None, None], real)
    padded = padded.detach().requires_grad_()
    without = LOSSES[name](routed(real, scores=scores), context())
    masked = LOSSES[name](routed(padded, valid_T, scores=scores), context())
    assert masked.item() == pytest.approx(without.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(without, real)
    (grad_padded,) = torch.autograd.grad(masked, padded)
    torch.testing.assert_close(grad_padded[valid_T], grad, rtol=1e-9, atol=1e-13)
    assert not grad_padded[~valid_T].any() and grad.norm() > 1e-3


@every_score
@every_loss
def test_nothing_but_padding_costs_nothing(name: str, scores: str) -> None:
    for tokens, valid_T in ((6, torch.zeros(6, dtype=torch.bool)), (0, None)):
        leaf_TAE = leaf(tokens).requires_grad_()
        cost = LOSSES[name](routed(leaf_TAE, valid_T, scores=scores), context())
        cost.backward()
        assert cost.item() == 0
        assert leaf_TAE.grad is not None and not leaf_TAE.grad.any()
    assert pooled_balance_loss([routed(leaf(0))]).item() == 0


@pytest.mark.parametrize("cuts", [[12, 12], [5, 19], [1, 2, 3, 18], [24, 0]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ADDITIVE)
@every_score
def test_additive_losses_do_not_depend_on_the_micro_batches(
    name: str, scores: str, padded: bool, cuts: list[int]
) -> None:
    leaf_TAE = leaf(24).requires_grad_()
    valid_T = torch.rand(24) > 0.3 if padded else torch.ones(24, dtype=torch.bool)
    whole = routed(leaf_TAE, valid_T, scores=scores)
    expected = LOSSES[name](whole, context())
    got = torch.zeros((), dtype=torch.float64)
    for part, valid in zip(leaf_TAE.split(cuts), valid_T.split(cuts), strict=True):
        loss = LOSSES[name](routed(part, valid, scores=scores), context(whole.counts_E))
        got = got + loss * (int(valid.sum()) / int(valid_T.sum()))
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(got, leaf_TAE)
    (expected_grad,) = torch.autograd.grad(expected, leaf_TAE)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "importance"])
def test_losses_see_what_was_wanted_and_not_what_had_room(name: str) -> None:
    leaf_TAE = leaf(24)
    whole, dropped = routed(leaf_TAE), routed(leaf_TAE, drop=0.5)
    assert dropped.wanted is not None and dropped.pairs < whole.pairs
    assert LOSSES[name](dropped, context()).item() == LOSSES[name](whole, context()).item()
    assert pooled_balance_loss([dropped]).item() == pooled_balance_loss([whole]).item()


def test_smooth_load_needs_noise() -> None:
    with pytest.raises(UsageError, match="needs a router with noise"):
        LOSSES["smooth_load"](plain(torch.randn(4, E)), context())


def test_groups_must_divide_the_experts() -> None:
    routing = plain(torch.randn(4, E))
    for groups in (0, 4):
        with pytest.raises(AssertionError):
            group_balance_loss(routing, groups)
        with pytest.raises(AssertionError):
            communication_loss(routing, groups, 1)
    with pytest.raises(AssertionError):
        communication_loss(routing, 3, 4)


def test_a_choice_that_is_not_by_score_counts_as_it_is() -> None:
    """Random pairs: counts are of the pairs, probabilities of the scores."""
    logits_TE = torch.randn(30, E, dtype=torch.float64)
    pairs = Routing.from_mask(choose_at_random(30, E, 3, zipf=1.0))
    score_TE = logits_TE.softmax(dim=-1)
    noise = Noise(logits_TE, torch.ones_like(logits_TE))
    routing = pairs.with_weights(
        pairs.at_pairs(score_TE), logits_TE=logits_TE, score_TE=score_TE, noise=noise
    )
    by_hand = ByHand(routing)
    for name in ("load", "gshard", "group", "communication", "sparsity"):
        expected = getattr(by_hand, name)()
        assert LOSSES[name](routing, context()).item() == pytest.approx(expected, rel=1e-12)
