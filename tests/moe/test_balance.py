"""Balance losses and updates: closed forms, known values, padding, micro-batches, gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moiety.errors import ConfigError
from moiety.moe.balance import (
    load_balance_loss,
    quantile_bias,
    sequence_balance_loss,
    update_bias,
    update_sparsity,
    z_loss,
)
from moiety.moe.layer import MoE
from moiety.moe.routers import Router, RouterContext, SigmoidTopK, Switch, TopK
from moiety.routing import Routing, top_k

ROUTERS = {
    "topk": TopK(2),
    "plain": TopK(3, renormalize=False),
    "switch": Switch(),
    "sigmoid": SigmoidTopK(2, bias=False),
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
LOSSES: dict[str, Callable[[Routing], Tensor]] = {
    "load": load_balance_loss,
    "sequence": lambda routing: sequence_balance_loss(routing, 3),
    "z": z_loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def routed(logits_TE: Tensor, router: Router, valid_T: Tensor | None = None) -> Routing:
    context = RouterContext(logits_TE=logits_TE, valid_T=valid_T)
    score_TE = router.score(logits_TE, context)
    pairs = router.choose(score_TE.detach(), context)
    weight_N = router.weigh(score_TE, pairs, context)
    return dataclasses.replace(pairs, weight_N=weight_N, logits_TE=logits_TE, score_TE=score_TE)


def by_hand(router: Router, logits_TE: Tensor) -> float:
    """E * sum_i f_i P_i in plain Python."""
    routing = routed(logits_TE, router)
    score = routing.score_TE.tolist()  # type: ignore[union-attr]
    tokens, experts = len(score), len(score[0])
    counts = [sum(e == f for f in routing.expert_N.tolist()) for e in range(experts)]
    mean = [sum(row[e] / sum(row) for row in score) / tokens for e in range(experts)]
    return experts * sum(counts[e] / sum(counts) * mean[e] for e in range(experts))


@every_router
def test_load_balance_loss_by_hand(router: Router) -> None:
    logits_TE = torch.randn(30, 7, dtype=torch.float64) + torch.linspace(0, 2, 7)
    loss = load_balance_loss(routed(logits_TE, router))
    assert loss.item() == pytest.approx(by_hand(router, logits_TE), rel=1e-6)
    assert loss > 1.05


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_uniform_routing_costs_one_and_collapse_costs_experts_over_k(k: int) -> None:
    logits_TE = torch.zeros(12, 6)
    for t in range(12):  # each expert is chosen equally often, and by the mean every one is as probable
        logits_TE[t, [(t + i) % 6 for i in range(k)]] = 2.0
    assert load_balance_loss(routed(logits_TE, TopK(k))).item() == pytest.approx(1.0, abs=1e-6)
    collapsed_TE = torch.full((12, 6), -60.0)
    collapsed_TE[:, :k] = 0.0
    assert load_balance_loss(routed(collapsed_TE, TopK(k))).item() == pytest.approx(6 / k, abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_transformers_pools_to_k_times_ours(k: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_TE = torch.randn(40, 8) + torch.linspace(0, 1, 8)
    theirs = load_balancing_loss_func((logits_TE,), 8, k)
    assert theirs.item() == pytest.approx(k * load_balance_loss(routed(logits_TE, TopK(k))).item(), rel=1e-5)
    valid_T = torch.rand(40) > 0.4
    theirs = load_balancing_loss_func((logits_TE,), 8, k, attention_mask=valid_T.view(4, 10))
    ours = load_balance_loss(routed(logits_TE, TopK(k), valid_T))
    assert theirs.item() == pytest.approx(k * ours.item(), rel=1e-5)


def test_z_loss_by_hand() -> None:
    logits_TE = torch.randn(9, 5, dtype=torch.float64) * 3
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits_TE.tolist()) / 9
    assert z_loss(routed(logits_TE, TopK(2))).item() == pytest.approx(expected, rel=1e-12)
    uniform = z_loss(routed(torch.zeros(3, 8), TopK(2))).item()
    assert uniform == pytest.approx(math.log(8) ** 2, rel=1e-6)
    large = z_loss(routed(torch.full((2, 4), 1e4), TopK(1)))
    assert large.item() == pytest.approx((1e4 + math.log(4)) ** 2, rel=1e-5)


@every_router
@every_loss
def test_gradient_by_finite_differences(loss: Callable[[Routing], Tensor], router: Router) -> None:
    logits_TE = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda logits: loss(routed(logits, router)), logits_TE)
    (grad_TE,) = torch.autograd.grad(loss(routed(logits_TE, router)), logits_TE)
    assert grad_TE.norm() > 1e-3


@every_router
@every_loss
def test_padding_equals_absence(loss: Callable[[Routing], Tensor], router: Router) -> None:
    """12 real tokens in 3 sequences of 6, two of each being padding with wild logits."""
    valid_T = torch.tensor([True, True, False, True, False, True] * 3)
    real_TE = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    wild_TE = torch.randn(18, 5, dtype=torch.float64) * 40
    padded_TE = wild_TE.masked_scatter(valid_T[:, None], real_TE).detach().requires_grad_()
    without, masked = loss(routed(real_TE, router)), loss(routed(padded_TE, router, valid_T))
    assert masked.item() == pytest.approx(without.item(), rel=1e-12)
    (grad,) = torch.autograd.grad(without, real_TE)
    (grad_padded,) = torch.autograd.grad(masked, padded_TE)
    torch.testing.assert_close(grad_padded[valid_T], grad, rtol=1e-10, atol=1e-14)
    assert not grad_padded[~valid_T].any() and grad.any()


@every_loss
def test_nothing_but_padding_costs_nothing(loss: Callable[[Routing], Tensor]) -> None:
    logits_TE = torch.randn(6, 5, requires_grad=True)
    cost = loss(routed(logits_TE, TopK(2), torch.zeros(6, dtype=torch.bool)))
    cost.backward()
    assert cost.item() == 0 and logits_TE.grad is not None and not logits_TE.grad.any()
    assert loss(routed(torch.zeros(0, 5), TopK(2))).item() == 0


@pytest.mark.parametrize("padded", [False, True])
@every_router
def test_sequence_loss_is_the_mean_over_sequences(router: Router, padded: bool) -> None:
    logits_TE = torch.randn(24, 5, dtype=torch.float64)
    valid_T = torch.rand(24) > 0.4 if padded else torch.ones(24, dtype=torch.bool)
    whole = sequence_balance_loss(routed(logits_TE, router, valid_T if padded else None), 4)
    parts = [
        (load_balance_loss(routed(logits[valid], router)).item(), int(valid.sum()))
        for logits, valid in zip(logits_TE.split(6), valid_T.split(6), strict=True)
    ]
    expected = sum(cost * tokens for cost, tokens in parts) / sum(tokens for _, tokens in parts)
    assert whole.item() == pytest.approx(expected, rel=1e-6)
    one = sequence_balance_loss(routed(logits_TE, router), 1)
    assert one.item() == pytest.approx(load_balance_loss(routed(logits_TE, router)).item(), rel=1e-6)


def test_sequence_loss_wants_equal_lengths() -> None:
    with pytest.raises(AssertionError):
        sequence_balance_loss(routed(torch.randn(10, 4), TopK(1)), 3)


@pytest.mark.parametrize("cuts", [[12, 12], [5, 19], [1, 2, 3, 18], [24, 0]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@every_router
def test_losses_do_not_depend_on_the_micro_batches(router: Router, padded: bool, cuts: list[int]) -> None:
    logits_TE = torch.randn(24, 6, dtype=torch.float64, requires_grad=True)
    valid_T = torch.rand(24) > 0.3 if padded else torch.ones(24, dtype=torch.bool)
    whole = routed(logits_TE, router, valid_T)
    real = int(valid_T.sum())
    for name, loss in (("load", lambda part: load_balance_loss(part, whole.counts_E)), ("z", z_loss)):
        expected = load_balance_loss(whole) if name == "load" else z_loss(whole)
        pieces = zip(logits_TE.split(cuts), valid_T.split(cuts), strict=True)
        got = sum(
            (loss(routed(logits, router, valid)) * (int(valid.sum()) / real) for logits, valid in pieces),
            torch.zeros((), dtype=torch.float64),
        )
        assert got.item() == pytest.approx(expected.item(), rel=1e-12)
        (grad,) = torch.autograd.grad(got, logits_TE, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected, logits_TE, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)
        assert expected_grad.norm() > 1e-4


@every_router
@every_loss
def test_gradient_reaches_the_router_of_a_layer(loss: Callable[[Routing], Tensor], router: Router) -> None:
    layer = MoE(d_model=8, d_ff=4, experts=6, router=router)
    loss(layer(torch.randn(3, 8, 8)).routing).backward()
    grad = layer.gate.weight.grad
    assert grad is not None and grad.norm() > 1e-4
    assert layer.gate_up.grad is None


@every_loss
def test_a_small_step_down_the_gradient_lowers_the_loss(loss: Callable[[Routing], Tensor]) -> None:
    layer = MoE(d_model=8, d_ff=4, experts=6, router=TopK(2), dtype=torch.float64)
    x = torch.randn(3, 20, 8, dtype=torch.float64) + 1
    costs = []
    for _ in range(30):
        cost = loss(layer(x).routing)
        costs.append(cost.item())
        (grad,) = torch.autograd.grad(cost, layer.gate.weight)
        with torch.no_grad():
            layer.gate.weight -= 0.05 * grad / grad.norm()
    assert costs[-1] < costs[0] - 0.02


# The selection bias


def test_update_bias_moves_by_the_rate_towards_the_mean() -> None:
    bias_E = torch.tensor([0.5, -0.25, 0.0, 1.0])
    update_bias(bias_E, torch.tensor([10, 0, 4, 2]), rate=0.125)
    assert bias_E.tolist() == [0.375, -0.125, 0.0, 1.125]
    with pytest.raises(AssertionError):
        update_bias(bias_E.bfloat16(), torch.ones(4), rate=0.1)
    huge = torch.full((3,), 2**60 // 3)
    even_E = torch.zeros(3)
    update_bias(even_E, huge, rate=1.0)
    assert not even_E.any()


def test_repeated_updates_balance_a_skewed_router() -> None:
    layer = MoE(d_model=8, d_ff=4, experts=8, router=SigmoidTopK(2), router_bias=True)
    with torch.no_grad():
        assert layer.gate.bias is not None
        layer.gate.bias.copy_(torch.linspace(-2, 2, 8))
    x_TD = torch.randn(1000, 8)
    assert isinstance(layer.selection_bias, Tensor)

    def worst() -> float:
        return layer.route(x_TD).counts_E.max().item() / 250

    before = worst()
    weight = layer.gate.weight.clone()
    for _ in range(400):
        update_bias(layer.selection_bias, layer.route(x_TD).counts_E, rate=0.01)
    assert before > 2 and worst() < 1.15
    assert torch.equal(weight, layer.gate.weight) and not layer.selection_bias.requires_grad


def test_bias_stays_float32_and_exact_whatever_the_layer_becomes() -> None:
    exact = torch.tensor([0.1, -1.001, 1e-8, 300.001])
    layer = MoE(d_model=8, d_ff=4, experts=4, router=SigmoidTopK(2))
    layer.selection_bias.copy_(exact)  # type: ignore[union-attr]
    block = torch.nn.Sequential(layer)
    for move in (
        block.bfloat16,
        block.half,
        block.double,
        lambda: block.to(torch.bfloat16),
        lambda: block.to("cpu", torch.float16),
        block.float,
    ):
        move()
        assert layer.selection_bias.dtype == torch.float32
        assert torch.equal(layer.selection_bias, exact)
    block.bfloat16()
    assert layer.gate.weight.dtype == torch.bfloat16
    state = block.state_dict()
    assert torch.equal(state["0.selection_bias"], exact) and state["0.selection_bias"].dtype == torch.float32
    other = torch.nn.Sequential(MoE(d_model=8, d_ff=4, experts=4, router=SigmoidTopK(2))).bfloat16()
    other.load_state_dict(state)
    assert torch.equal(other[0].selection_bias, exact)
    update_bias(other[0].selection_bias, torch.tensor([1, 2, 3, 4]), rate=0.001)
    assert "selection_bias" not in MoE(d_model=8, d_ff=4, experts=4, router=TopK(2)).state_dict()


def test_a_layer_built_without_memory_can_be_given_some() -> None:
    layer = MoE(d_model=8, d_ff=4, experts=4, router=SigmoidTopK(2), device="meta")
    assert layer.gate_up.is_meta and layer.selection_bias.is_meta
    layer.to_empty(device="cpu")
    assert layer.gate_up.device.type == layer.selection_bias.device.type == "cpu"
    assert layer.selection_bias.dtype == torch.float32


def test_proportional_rule_steps_by_the_error_over_the_mean() -> None:
    bias_E = torch.zeros(4)
    for scale in (1, 1000):
        bias_E.copy_(torch.tensor([0.5, -0.25, 0.0, 1.0]))
        update_bias(bias_E, torch.tensor([10, 0, 4, 2]) * scale, rate=0.125, rule="proportional")
        assert bias_E.tolist() == [0.3125, -0.125, 0.0, 1.0625]
    update_bias(bias_E, torch.zeros(4, dtype=torch.int64), rate=0.125, rule="proportional")
    assert bias_E.tolist() == [0.3125, -0.125, 0.0, 1.0625]
    with pytest.raises(ConfigError, match="no bias rule 'tanh'\nhint: there are sign, proportional"):
        update_bias(bias_E, torch.ones(4), rate=0.1, rule="tanh")  # type: ignore[arg-type]


def max_violation(score_TE: Tensor, bias_E: Tensor, k: int) -> float:
    """(most - mean) / mean of the loads of top-k of score + bias."""
    load_E = torch.bincount(top_k(score_TE + bias_E, k).reshape(-1), minlength=score_TE.shape[1]).double()
    return (load_E.max() / load_E.mean() - 1).item()


@pytest.mark.parametrize(("experts", "k"), [(16, 2), (64, 8), (8, 7)])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_few_rounds_of_quantiles_do_what_takes_sign_steps_hundreds(
    experts: int, k: int, scores: str
) -> None:
    logits_TE = torch.randn(2000, experts) + torch.linspace(-2, 2, experts)
    score_TE = logits_TE.softmax(dim=-1) if scores == "softmax" else logits_TE.sigmoid()
    before = max_violation(score_TE, torch.zeros(experts), k)
    assert before > 0.1
    bias_E = torch.zeros(experts)
    quantile_bias(score_TE, bias_E, k, rounds=4)
    assert max_violation(score_TE, bias_E, k) < 0.1
    assert abs(bias_E.mean().item()) < 1e-6
    again_E = torch.zeros(experts)
    for _ in range(4):
        quantile_bias(score_TE, again_E, k)
    assert torch.equal(again_E, bias_E)
    if k < 7 or scores == "sigmoid":  # else the scores are so small that steps of 0.001 get there early
        stepped_E = torch.zeros(experts)
        for _ in range(100):
            load_E = torch.bincount(top_k(score_TE + stepped_E, k).reshape(-1), minlength=experts)
            update_bias(stepped_E, load_E, 0.001)
        assert max_violation(score_TE, stepped_E, k) > 0.1


def test_quantile_bias_by_hand() -> None:
    """A round in plain Python: prices of the tokens, then biases of the experts, then these centred."""
    score_TE = torch.rand(14, 4, dtype=torch.float64) ** 2
    bias_E = torch.tensor([0.25, 0.0, -0.5, 0.125])
    score, start = score_TE.tolist(), bias_E.tolist()
    quantile_bias(score_TE, bias_E, 2)
    ranked = [sorted((s + b for s, b in zip(row, start, strict=True)), reverse=True) for row in score]
    price = [(row[1] + row[2]) / 2 for row in ranked]
    margins = [
        sorted((row[e] - a for row, a in zip(score, price, strict=True)), reverse=True) for e in range(4)
    ]
    edges = [(margin[6] + margin[7]) / 2 for margin in margins]  # 7 tokens for each
    expected = [sum(edges) / 4 - edge for edge in edges]
    assert bias_E.tolist() == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.05


def test_quantile_bias_leaves_out_padding_and_takes_odd_sizes() -> None:
    score_TE, valid_T = torch.rand(60, 5), torch.rand(60) > 0.4
    expected_E, bias_E = torch.zeros(5), torch.zeros(5)
    quantile_bias(score_TE[valid_T], expected_E, 2, rounds=3)
    quantile_bias(score_TE.masked_fill(~valid_T[:, None], 99.0), bias_E, 2, valid_T, rounds=3)
    assert torch.equal(bias_E, expected_E) and bias_E.any()
    start_E = torch.arange(5.0)
    for tokens, k in ((0, 2), (1, 2), (9, 5)):
        quantile_bias(torch.rand(tokens, 5), start_E, k)
        assert start_E.tolist() == [0, 1, 2, 3, 4]
    quantile_bias(torch.rand(2, 5), start_E, 1)
    assert bool(start_E.isfinite().all())
    with pytest.raises(AssertionError):
        quantile_bias(torch.rand(9, 5), start_E.double(), 2)


def test_update_sparsity_holds_the_target() -> None:
    assert update_sparsity(1e-8, 3.0, 2.0, 8) == pytest.approx(1.2e-8)
    assert update_sparsity(1e-8, 1.5, 2.0, 8, rate=2.0) == pytest.approx(0.5e-8)
    assert update_sparsity(1e-8, 2.0, 2.0, 8) == 1e-8
    coefficient, pairs_per_token = 1e-8, 8.0
    for _ in range(200):  # a router whose pairs shrink with the penalty
        coefficient = update_sparsity(coefficient, pairs_per_token, 2.0, 8)
        pairs_per_token = 8 / (1 + 1e4 * coefficient)
    assert pairs_per_token == pytest.approx(2, rel=0.2)
    for bad in ((0.0, 1.0, 2.0, 8), (1e-8, 1.0, 9.0, 8), (1e-8, 1.0, 2.0, 8, 1.0)):
        with pytest.raises(AssertionError):
            update_sparsity(*bad)


def test_losses_count_what_was_wanted() -> None:
    """Dropping until the load is even does not make the router even."""
    logits_TE = torch.randn(30, 6) + torch.linspace(0, 2, 6)
    whole = routed(logits_TE, TopK(2))
    place_N = torch.arange(whole.pairs) - (whole.ends_E - whole.counts_E)[whole.expert_N]
    kept = whole.keep(place_N < 2)
    assert kept.counts_E.max() == 2 and kept.dropped > 0
    assert load_balance_loss(kept).item() == load_balance_loss(whole).item() > 1.05
    assert sequence_balance_loss(kept, 3).item() == sequence_balance_loss(whole, 3).item()
