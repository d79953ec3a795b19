"""Routers against the definition, token by token, and against the routers of transformers."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moiety.config import MoEConfig
from moiety.errors import ConfigError, UsageError
from moiety.moe import routers
from moiety.moe.layer import MoE
from moiety.moe.routers import Router, RouterContext, SigmoidTopK, Switch, TopK, keep_groups
from moiety.routing import Routing
from tests import oracle, router_oracle

EXPERTS = 12
ROUTERS: dict[str, Router] = {
    "topk_1": TopK(1),
    "topk_2": TopK(2),
    "topk_all": TopK(EXPERTS),
    "topk_plain": TopK(3, renormalize=False),
    "topk_scaled": TopK(2, scale=2.5),
    "topk_groups": TopK(3, renormalize=False, groups=4, groups_kept=2, scale=16.0),
    "topk_groups_by_two": TopK(2, groups=3, groups_kept=1, group_best=2),
    "switch": Switch(),
    "sigmoid": SigmoidTopK(2),
    "sigmoid_plain": SigmoidTopK(4, renormalize=False, bias=False),
    "sigmoid_groups": SigmoidTopK(4, groups=4, groups_kept=2, scale=2.5),
    "sigmoid_groups_tight": SigmoidTopK(3, groups=4, groups_kept=1, group_best=3),
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)


def decide(
    router: Router, logits_TE: Tensor, bias_E: Tensor | None = None, valid_T: Tensor | None = None
) -> Routing:
    """The three questions in a row, as the layer asks them."""
    context = RouterContext(logits_TE=logits_TE, bias_E=bias_E, valid_T=valid_T)
    score_TE = router.score(logits_TE, context)
    pairs = router.choose(score_TE.detach(), context)
    return pairs.with_weights(router.weigh(score_TE, pairs, context))


@pytest.mark.parametrize("padded", [False, True])
@every_router
def test_choice_weight_and_gradient(router: Router, padded: bool) -> None:
    logits_TE = torch.randn(37, EXPERTS, dtype=torch.float64, requires_grad=True)
    bias_E = torch.randn(EXPERTS) if router.needs.bias else None
    valid_T = torch.rand(37) > 0.3 if padded else None
    grad_TE = torch.randn(37, EXPERTS, dtype=torch.float64)
    routing = decide(router, logits_TE, bias_E, valid_T)
    (got_TE,) = torch.autograd.grad(routing.dense(), logits_TE, grad_TE)
    chosen_TE, weight_TE = router_oracle.route(router, logits_TE, bias_E, valid_T)
    (true_TE,) = torch.autograd.grad(weight_TE, logits_TE, grad_TE)
    assert torch.equal(routing.with_weights(torch.ones(routing.pairs)).dense() > 0, chosen_TE)
    oracle.assert_close_enough(routing.dense().detach(), weight_TE.detach(), weight_TE.detach())
    fixed = router == TopK(1)  # one weight, divided by itself
    oracle.assert_close_enough(got_TE, true_TE, true_TE, zero=fixed)


@every_router
def test_choice_is_right_with_ties(router: Router) -> None:
    logits_TE = torch.randint(-1, 2, (60, EXPERTS)).double()
    logits_TE[0] = 0.0
    bias_E = torch.zeros(EXPERTS) if router.needs.bias else None
    chosen_TE, _ = router_oracle.route(router, logits_TE, bias_E)
    routing = decide(router, logits_TE, bias_E)
    assert torch.equal(routing.with_weights(torch.ones(routing.pairs)).dense() > 0, chosen_TE)
    k = int(chosen_TE[0].sum())
    assert chosen_TE[0].nonzero().squeeze(1).tolist() == list(range(k))


@every_router
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(router: Router, tokens: int) -> None:
    routing = decide(router, torch.randn(tokens, EXPERTS))
    assert routing.tokens == tokens and routing.experts == EXPERTS
    assert routing.dense().shape == (tokens, EXPERTS)


def test_renormalizing_is_a_softmax_over_the_chosen_logits() -> None:
    logits_TE = torch.randn(20, 9, dtype=torch.float64)
    best_TK, expert_TK = logits_TE.topk(4)
    expected_TE = torch.zeros(20, 9, dtype=torch.float64).scatter_(1, expert_TK, best_TK.softmax(1))
    torch.testing.assert_close(decide(TopK(4), logits_TE).dense(), expected_TE, rtol=1e-12, atol=0)
    assert not torch.allclose(decide(TopK(4, renormalize=False), logits_TE).dense(), expected_TE, rtol=1e-2)


def test_switch_weighs_by_probability_and_reaches_the_router() -> None:
    logits_TE = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    routing = decide(Switch(), logits_TE)
    probability_TE = logits_TE.softmax(1)
    torch.testing.assert_close(routing.dense().sum(1), probability_TE.max(1).values)
    assert bool((routing.weight_N < 0.999).all())
    routing.weight_N.sum().backward()
    assert logits_TE.grad is not None and bool((logits_TE.grad.abs().sum(1) > 1e-3).all())


def test_bias_changes_the_choice_and_not_the_weight() -> None:
    logits_TE = torch.randn(20, 6, dtype=torch.float64)
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 5.0])
    routing = decide(SigmoidTopK(2, renormalize=False), logits_TE, bias_E)
    assert routing.counts_E[5] == 20 > decide(SigmoidTopK(2), logits_TE).counts_E[5]
    torch.testing.assert_close(routing.weight_N, routing.at_pairs(logits_TE.sigmoid()), rtol=1e-14, atol=0)
    total_T = decide(SigmoidTopK(2, scale=2.5), logits_TE, bias_E).dense().sum(1)
    torch.testing.assert_close(total_T, torch.full_like(total_T, 2.5))


def test_groups_are_judged_by_their_best() -> None:
    score_TE = torch.tensor([[0.9, 0.0, 0.6, 0.5, 0.1, 0.2]])
    lost = float("-inf")
    assert keep_groups(score_TE, 3, 1, 1).tolist()[0] == pytest.approx([0.9, 0.0] + [lost] * 4)
    assert keep_groups(score_TE, 3, 1, 2).tolist()[0] == pytest.approx([lost, lost, 0.6, 0.5, lost, lost])
    tie_TE = torch.tensor([[0.3, 0.1, 0.1, 0.3, 0.3, 0.1]])
    assert keep_groups(tie_TE, 3, 2, 2).tolist()[0] == pytest.approx([0.3, 0.1, 0.1, 0.3, lost, lost])


def test_negative_biased_scores_still_choose_inside_the_kept_groups() -> None:
    """A mask of zeros instead of -inf would let lost experts win against negative ones."""
    bias_E = torch.full((8,), -3.0)
    routing = decide(SigmoidTopK(2, groups=4, groups_kept=1), torch.randn(50, 8), bias_E)
    group_TK = routing.expert_N[routing.pairs_of_token_N].view(50, 2) // 2
    assert torch.equal(group_TK[:, 0], group_TK[:, 1])


@pytest.mark.parametrize(
    "router, experts, text",
    [
        (TopK(5), 4, "k is 5.*4 experts"),
        (TopK(0), 4, "k is 0"),
        (Switch(), 0, "0 experts"),
        (SigmoidTopK(9), 8, "k is 9"),
        (TopK(2, groups=3), 8, "groups=3"),
        (TopK(2, groups=2, groups_kept=3), 8, "groups_kept=3"),
        (TopK(2, groups=2, groups_kept=0), 8, "groups_kept=0"),
        (TopK(5, groups=2, groups_kept=1), 8, "1 groups hold 4"),
        (SigmoidTopK(1, groups=8, groups_kept=2, group_best=2), 8, "group_best=2"),
        (SigmoidTopK(5, groups=4, groups_kept=2), 8, "2 groups hold 4"),
    ],
    ids=str,
)
def test_a_router_that_cannot_serve_is_refused_with_a_hint(router: Router, experts: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        router.check(experts)
    assert "hint" in str(caught.value)
    if experts:
        with pytest.raises(ConfigError, match=text):
            MoE(d_model=4, d_ff=4, experts=experts, router=router)


def test_zero_groups_is_refused() -> None:
    for router in (TopK(1, groups=0, groups_kept=0), SigmoidTopK(1, groups=0)):
        with pytest.raises(ConfigError):
            router.check(4)


def test_one_expert_serves_every_router_that_says_it_does() -> None:
    for router in (TopK(1), Switch(), SigmoidTopK(1, group_best=1)):
        router.check(1)
        assert decide(router, torch.randn(3, 1)).pairs == 3


def test_plain_sigmoid_serves_one_expert() -> None:
    """Without groups the number of experts that judge a group is beside the point."""
    SigmoidTopK(1).check(1)
    assert MoE(d_model=4, d_ff=4, experts=1, router=SigmoidTopK(1))(torch.randn(3, 4)).routing.pairs == 3


def test_from_config_names_every_router() -> None:
    common = {"d_ff": 8, "experts": 8, "experts_per_token": 2, "groups": 2, "groups_kept": 1, "scale": 1.5}
    config = MoEConfig(router="softmax", renormalize=False, group_score="max", **common)
    assert routers.from_config(config) == TopK(2, renormalize=False, scale=1.5, groups=2, group_best=1)
    config = MoEConfig(router="sigmoid", group_score="top2", selection_bias=True, **common)
    assert routers.from_config(config) == SigmoidTopK(2, scale=1.5, groups=2)
    config = MoEConfig(router="switch", d_ff=8, experts=8, experts_per_token=1)
    assert routers.from_config(config) == Switch()


@pytest.mark.parametrize("name", routers.ROUTERS)
def test_from_config_serves_as_few_experts_as_it_may(name: str) -> None:
    k = routers.ROUTERS[name].fixed_k or 1
    config = MoEConfig(router=name, d_ff=8, experts=k, experts_per_token=k)
    layer = MoE(d_model=4, d_ff=4, experts=k, router=routers.from_config(config)).eval()
    routing = layer.route(torch.randn(3, 4), token_id_T=torch.tensor([5, 0, 5]))
    if name == "relu":
        assert routing.logits_TE is not None
        assert routing.pairs == int((routing.logits_TE > 0).sum())
    else:
        assert routing.counts_E.tolist() == [3] * k


@pytest.mark.parametrize("name", [name for name, kind in routers.ROUTERS.items() if kind.fixed_k])
def test_from_config_refuses_another_k_than_the_fixed_one(name: str) -> None:
    k = routers.ROUTERS[name].fixed_k or 0
    config = MoEConfig(router="softmax", d_ff=8, experts=4, experts_per_token=k + 1)
    with pytest.raises(ConfigError, match=f"{name}.*experts_per_token is {k + 1}") as caught:
        routers.from_config(dataclasses.replace(config, router=name))
    assert "hint" in str(caught.value)


# Against transformers


def twin(family: str, **values: Any) -> tuple[Any, nn.Module]:
    """A transformers block with random weights, and its module."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    names = {
        "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock"),
        "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock"),
        "olmoe": ("OlmoeConfig", "OlmoeSparseMoeBlock"),
        "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE"),
        "gpt_oss": ("GptOssConfig", "GptOssMLP"),
    }
    config_name, block_name = names[family]
    config = getattr(module, config_name)(hidden_size=32, hidden_act="silu", **values)
    config._experts_implementation = "eager"
    block: nn.Module = getattr(module, block_name)(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
        for name, buffer in block.named_buffers():
            assert name == "gate.e_score_correction_bias", name
            buffer.normal_(std=0.3)
    return config, block.eval()


FAMILIES = {
    "mixtral": (
        "mixtral",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24},
        TopK(2),
    ),
    "qwen3": (
        "qwen3_moe",
        {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
        TopK(3),
    ),
    "qwen3_plain": (
        "qwen3_moe",
        {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": False},
        TopK(3, renormalize=False),
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 24},
        TopK(4, renormalize=False),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_local_experts": 16,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        SigmoidTopK(4, groups=4, groups_kept=2, scale=2.5),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_equals_the_block_of_transformers(name: str) -> None:
    family, values, router = FAMILIES[name]
    _, block = twin(family, **values)
    theirs = dict(block.named_parameters()) | dict(block.named_buffers())
    experts = len(theirs["gate.weight"])
    shared = 24 if family == "deepseek_v3" else 0
    layer = MoE(d_model=32, d_ff=24, experts=experts, router=router, shared_d_ff=shared)
    state = {
        "gate.weight": theirs["gate.weight"],
        "experts.gate_up": theirs["experts.gate_up_proj"],
        "experts.down": theirs["experts.down_proj"],
    }
    if shared:
        gate, up = (theirs[f"shared_experts.{side}_proj.weight"] for side in ("gate", "up"))
        state |= {
            "shared.gate_up": torch.cat([gate, up]),
            "shared.down": theirs["shared_experts.down_proj.weight"],
            "selection_bias": theirs["gate.e_score_correction_bias"],
        }
    layer.load_state_dict(state)
    x = torch.randn(3, 17, 32)
    with torch.no_grad():
        expected, (output, routing) = block(x), layer(x)
        _, weight_TK, expert_TK = block.gate(x.view(-1, 32))
    expected_TE = torch.zeros(51, experts).scatter_(1, expert_TK, weight_TK)
    torch.testing.assert_close(routing.dense(), expected_TE, rtol=1e-5, atol=1e-6)
    assert torch.equal(routing.dense() > 0, expected_TE > 0)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert expected.abs().mean() > 1e-2


def test_weights_equal_those_of_gpt_oss() -> None:
    _, block = twin("gpt_oss", num_local_experts=8, num_experts_per_tok=3, intermediate_size=24)
    layer = MoE(d_model=32, d_ff=24, experts=8, router=TopK(3), router_bias=True)
    layer.gate.load_state_dict(dict(block.router.named_parameters()))  # type: ignore[union-attr]
    x_TD = torch.randn(40, 32)
    with torch.no_grad():
        _, weight_TK, expert_TK = block.router(x_TD)  # type: ignore[operator]
        routing = layer.route(x_TD)
    expected_TE = torch.zeros(40, 8).scatter_(1, expert_TK, weight_TK)
    torch.testing.assert_close(routing.dense(), expected_TE, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"token_ids": torch.zeros(2, 2, dtype=torch.int64)},
            r"token_ids has shape \(4,\); one for each of 6 tokens",
        ),
        ({"token_ids": torch.zeros(1, dtype=torch.int64)}, r"token_ids has shape \(1,\)"),
        ({"token_ids": torch.tensor(3)}, r"token_ids has shape \(1,\)"),
        ({"valid": torch.ones(5, dtype=torch.bool)}, r"valid has shape \(5,\); one for each of 6 tokens"),
        ({"cost_E": torch.ones(5)}, r"cost_E has shape \(5,\); one for each of 4 experts"),
        ({"cost_E": torch.ones(1)}, r"cost_E has shape \(1,\)"),
        ({"cost_E": torch.tensor(1.0)}, r"cost_E has shape \(\)"),
        ({"cost_E": torch.ones(6, 4)}, r"cost_E has shape \(6, 4\)"),
    ],
)
@pytest.mark.parametrize("router", [routers.CostAware(TopK(2)), routers.Hash(2)], ids=["cost", "hash"])
def test_what_is_not_one_for_each_token_or_expert_is_refused(
    router: routers.Router, given: dict[str, torch.Tensor], said: str
) -> None:
    layer = MoE(d_model=4, d_ff=4, experts=4, router=router)
    right = {
        "token_ids": torch.arange(6).view(2, 3),
        "valid": torch.ones(2, 3, dtype=torch.bool),
        "cost_E": torch.arange(4.0),
    }
    assert layer(torch.randn(2, 3, 4), **right).routing.pairs == 12
    with pytest.raises(UsageError, match=said):
        layer(torch.randn(2, 3, 4), **{**right, **given})


def test_null_experts_have_a_cost_too() -> None:
    layer = MoE(d_model=4, d_ff=4, experts=4, null_experts=2, router=routers.CostAware(TopK(2)))
    assert layer.route(torch.randn(6, 4), cost_E=torch.ones(6)).pairs == 12
    with pytest.raises(UsageError, match=r"one for each of 6 experts"):
        layer.route(torch.randn(6, 4), cost_E=torch.ones(4))
