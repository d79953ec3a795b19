"""Traces: the parts add up to what the layer gave, the figures are the model's own, and the words fit every router."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.errors import UsageError
from moiety.model.transformer import Transformer
from moiety.moe.layer import MoE
from moiety.observe.trace import (
    GLOSSARY,
    Choice,
    LayerTrace,
    TokenTrace,
    Trace,
    contributions,
    explain,
    glossary,
    in_short,
    trace,
)

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "plain": {"renormalize": False, "experts_per_token": 3},
    "sigmoid": {"router": "sigmoid", "selection_bias": True, "groups": 3, "groups_kept": 2, "scale": 2.5},
    "switch": {"router": "switch", "experts_per_token": 1},
    "noisy": {"router": "noisy"},
    "gshard": {"router": "gshard"},
    "top_p": {"router": "top_p", "router_options": ("p=0.5",)},
    "relu": {"router": "relu"},
    "sparsemixer": {"router": "sparsemixer"},
    "hash": {"router": "hash"},
    "expert_choice": {"router": "expert_choice"},
    "sinkhorn": {"router": "sinkhorn"},
    "base": {"router": "base", "experts_per_token": 1},
    "all": {"experts_per_token": 6},
    "shared": {"shared_d_ff": 12},
    "shared_gate": {"shared_d_ff": 12, "shared_gate": True},
    "null": {"null_experts": 3},
    "null_zero": {"null_experts": 3, "null_kind": "zero"},
    "biases": {"bias": True, "router_bias": True, "gated": False, "activation": "relu"},
    "temperature": {"temperature": 3.0},
    "full": {"eval_capacity_factor": 0.5},
    "reroute": {"eval_capacity_factor": 1.0, "overflow": "reroute"},
    "dense": {"eval_capacity_factor": 0.8, "overflow": "dense"},
    "queue": {"eval_capacity_factor": 0.5, "overflow": "queue"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str = "softmax", *, dense_layers: tuple[int, ...] = (), seed: int = 0) -> Transformer:
    """Three narrow layers in float64 with weights large enough to differ, and a selection bias that sways."""
    sizes: dict[str, Any] = {"experts": 6, "experts_per_token": 2, "d_ff": 10}
    config = ModelConfig(
        vocab_size=40,
        d_model=16,
        layers=3,
        attention=AttentionConfig(heads=2, kv_heads=1, head_dim=8),
        d_ff=20,
        moe=MoEConfig(**sizes | KINDS[kind]),
        dense_layers=dense_layers,
    )
    torch.manual_seed(seed)
    model = Transformer(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                buffer.normal_(0.0, 0.2)
    return model.eval()


def moe_of(model: Transformer, layer: int) -> MoE:
    found = model.blocks[layer].feed_forward
    assert isinstance(found, MoE)
    return found


def close(ours: float, true: float | Tensor, tolerance: float = 1e-5) -> None:
    assert ours == pytest.approx(float(true), rel=tolerance, abs=tolerance)


@torch.no_grad()
def one_expert(moe: MoE, expert: int, x_D: Tensor) -> Tensor:
    """An expert by hand."""
    hidden = moe.gate_up[expert] @ x_D
    gate, up = hidden.chunk(2)
    return moe.down[expert] @ (nn.functional.silu(gate) * up)


@pytest.mark.parametrize(
    ("kind", "weigh_input"), [*((kind, False) for kind in KINDS), ("plain", True), ("shared_gate", True)]
)
@torch.no_grad()
def test_contributions_add_up_to_the_output(kind: str, weigh_input: bool) -> None:
    moe = moe_of(build(kind), 1)
    moe.weigh_input = weigh_input
    x_TD, ids_T = torch.randn(23, 16, dtype=torch.float64), torch.randint(40, (23,))
    output, routing = moe(x_TD, token_ids=ids_T)
    part_ND = contributions(moe, x_TD, routing)
    assert part_ND.shape == (routing.pairs, 16)
    summed_TD = torch.zeros_like(x_TD).index_add(0, routing.token_N, part_ND)
    if moe.shared is not None:
        shared_TD = moe.shared(x_TD)
        summed_TD += shared_TD if moe.shared_gate is None else moe.shared_gate(x_TD).sigmoid() * shared_TD
    torch.testing.assert_close(summed_TD, output, rtol=1e-11, atol=1e-11)
    assert output.norm() > 0.1


@torch.no_grad()
def test_a_contribution_by_hand() -> None:
    moe, x_TD = moe_of(build(), 0), torch.randn(7, 16, dtype=torch.float64)
    routing = moe.route(x_TD)
    part_ND = contributions(moe, x_TD, routing)
    for pair in range(routing.pairs):
        token, expert = int(routing.token_N[pair]), int(routing.expert_N[pair])
        by_hand_D = routing.weight_N[pair] * one_expert(moe, expert, x_TD[token])
        torch.testing.assert_close(part_ND[pair], by_hand_D, rtol=1e-11, atol=1e-11)


@every_kind
@torch.no_grad()
def test_the_trace_is_the_models_own_routing(kind: str) -> None:
    model = build(kind, dense_layers=(1,))
    traced = trace(model, PROMPT)
    routings = model(torch.tensor([PROMPT])).routing
    assert [one.layer for one in traced.layers] == [0, 2] and traced.token_ids == tuple(PROMPT)
    for one in traced.layers:
        routing = routings[one.layer]
        weight_TE = routing.dense()
        assert (one.router, one.experts, len(one.tokens)) == (model.config.moe.router, 6, len(PROMPT))  # type: ignore[union-attr]
        for token, found in enumerate(one.tokens):
            chosen = {choice.expert: choice for choice in found.chosen}
            assert sorted(chosen) == routing.mask_TE[token].nonzero().squeeze(1).tolist()
            for expert, choice in chosen.items():
                close(choice.weight, weight_TE[token, expert])
                assert choice.null == (expert >= 6)
            weights = [choice.weight for choice in found.chosen]
            assert weights == sorted(weights, reverse=True)
            if routing.score_TE is None:
                assert kind == "hash" and found.scores is None
            else:
                assert found.scores is not None and len(found.scores) == routing.experts
                torch.testing.assert_close(
                    torch.tensor(found.scores), routing.score_TE[token].float(), rtol=1e-5, atol=1e-6
                )


@every_kind
def test_shares_and_norms(kind: str) -> None:
    model = build(kind)
    traced = trace(model, PROMPT)
    seen = 0
    for one in traced.layers:
        for found in one.tokens:
            parts = [choice.share for choice in found.chosen]
            parts += [] if found.shared_share is None else [found.shared_share]
            assert (found.shared_norm is None) == (found.shared_share is None) == ("shared" not in kind)
            if found.output_norm > 0:
                close(sum(parts), 1.0)
                seen += 1
            else:
                assert not found.shared_norm and all(choice.norm == 0 for choice in found.chosen)
            norms = sum(choice.norm for choice in found.chosen) + (found.shared_norm or 0)
            assert found.output_norm <= norms * (1 + 1e-6)  # a sum is no longer than its parts
    assert seen > 10


@torch.no_grad()
def test_norms_are_those_of_the_layers_real_input() -> None:
    """The first layer's input by hand: embedding, attention, norm."""
    model = build("shared")
    traced = trace(model, PROMPT)
    caught: list[Tensor] = []
    moe_of(model, 2).register_forward_pre_hook(lambda module, given: caught.append(given[0]))
    model(torch.tensor([PROMPT]))
    (x_BSD,) = caught
    moe = moe_of(model, 2)
    output, routing = moe(x_BSD[0])
    for token, found in enumerate(traced.layer(2).tokens):
        close(found.output_norm, output[token].norm())
        assert moe.shared is not None and found.shared_norm is not None
        close(found.shared_norm, moe.shared(x_BSD[0, token]).norm())
        for choice in found.chosen:
            weight = routing.dense()[token, choice.expert]
            part_D = weight * one_expert(moe, choice.expert, x_BSD[0, token])
            close(choice.norm, part_D.norm())
            close(choice.share, part_D @ output[token] / output[token].square().sum())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "plain", "all", "null", "temperature"])
@torch.no_grad()
def test_runner_up_by_hand(kind: str) -> None:
    model = build(kind)
    traced = trace(model, PROMPT)
    margins = []
    for one in traced.layers:
        bias_E = moe_of(model, one.layer).selection_bias
        for found in one.tokens:
            assert found.scores is not None
            compared = [s + (0.0 if bias_E is None else float(bias_E[e])) for e, s in enumerate(found.scores)]
            got = {choice.expert for choice in found.chosen}
            rest = {expert: score for expert, score in enumerate(compared) if expert not in got}
            if not rest:
                assert kind == "all" and found.runner_up is None and found.margin is None
                continue
            assert found.runner_up is not None and found.margin is not None
            close(rest[found.runner_up], max(rest.values()))
            close(found.margin, min(compared[expert] for expert in got) - max(rest.values()))
            margins.append(found.margin)
    if kind == "sigmoid":
        assert min(margins) < 0  # a better one in a group that was not kept
    else:
        assert min(margins, default=0.0) >= 0


@pytest.mark.parametrize("kind", ["full", "reroute", "dense"])
def test_what_capacity_took_away(kind: str) -> None:
    model = build(kind)
    routing = model(torch.tensor([PROMPT])).routing
    lost = added = 0
    for one in trace(model, PROMPT).layers:
        there = routing[one.layer]
        lost += sum(len(found.lost) for found in one.tokens)
        added += sum(len(found.added) for found in one.tokens)
        assert there.wanted is not None
        for token, found in enumerate(one.tokens):
            wanted = set(there.wanted.mask_TE[token].nonzero().squeeze(1).tolist())
            assert wanted - set(found.lost) | set(found.added) == {choice.expert for choice in found.chosen}
    assert lost == sum(one.dropped for one in routing.values()) and (lost > 0) == (kind != "dense")
    assert added == sum(one.moved for one in routing.values()) and (added > 0) == (kind != "full")


def test_the_model_is_left_as_it_was() -> None:
    model = build("noisy")
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = trace(model, PROMPT)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert trace(model.eval(), PROMPT) == first


def test_a_model_in_bfloat16() -> None:
    traced = trace(build("shared").bfloat16(), PROMPT)
    assert all(found.output_norm > 0 for one in traced.layers for found in one.tokens)


# Words


def said(kind: str, layer: int = 0, **given: Any) -> list[str]:
    """The explanations of every token."""
    traced = trace(build(kind), PROMPT, **given)
    return [explain(traced, token, layer) for token in range(len(PROMPT))]


@every_kind
def test_every_router_can_be_put_in_words(kind: str) -> None:
    texts = [f" t{i}" for i in range(len(PROMPT))]
    for token, line in enumerate(said(kind, layer=2, texts=texts)):
        assert line.startswith(f"Layer 2 sent ' t{token}' to "), line
        assert line.endswith(".") and ".." not in line and "nan" not in line and "  " not in line, line
        assert "-" not in line.replace("runner-up", ""), line


def test_words_for_each_rule() -> None:
    assert all("the token's id decides" in line and "runner-up" not in line for line in said("hash"))
    assert all("experts choose their best tokens" in line for line in said("expert_choice"))
    assert all("every expert with a positive score" in line for line in said("relu"))
    assert all("until their probabilities reach p" in line for line in said("top_p"))
    assert all(re.search(r"runner-up \d was [\d.e-]+ behind", line) for line in said("softmax"))
    assert all("alone, with weight" in line for line in said("switch"))
    assert all("the shared expert" in line for line in said("shared"))
    assert any("group was passed over" in line for layer in range(3) for line in said("sigmoid", layer))
    assert any("had no room for it" in line for line in said("full"))
    assert any("took it instead" in line for line in said("reroute"))
    assert any("took it too, as others were too full" in line for line in said("dense"))
    assert any("null" in line for line in said("null"))


def told(*chosen: tuple[int, float, float], router: str = "softmax", **changes: Any) -> str:
    """The explanation of a token made up: (expert, weight, share) of each expert; null from 4 on."""
    choices = [
        Choice(expert=expert, weight=weight, norm=1.0, share=share, null=expert >= 4)
        for expert, weight, share in chosen
    ]
    usual: dict[str, Any] = {
        "scores": (0.1, 0.2, 0.3, 0.4), "chosen": tuple(choices), "lost": (), "added": (), "output_norm": 1.0,
        "shared_norm": None, "shared_share": None, "runner_up": None, "margin": None,
    }  # fmt: skip
    one = TokenTrace(**usual | changes)
    layer = LayerTrace(layer=2, router=router, experts=4, tokens=(one,))
    return explain(Trace(token_ids=(7,), texts=(" def",), layers=(layer,)), 0, 2)


def test_whole_sentences() -> None:
    assert told((3, 0.61, 0.7), (2, 0.39, 0.3), runner_up=1, margin=0.1) == (
        "Layer 2 sent ' def' to experts 3 (61 %) and 2 (39 %); expert 3 contributed 70 % of the layer's output; "
        "runner-up 1 was 0.1 behind."
    )
    assert told((3, 0.6, 0.7), (2, 0.4, 0.3), runner_up=1, margin=0.01).endswith("0.01 behind, a near tie.")
    assert told((1, 2.0, 1.4), (0, 2.0, -0.4)) == (
        "Layer 2 sent ' def' to experts 1 (50 %) and 0 (50 %); expert 1 contributed 140 % of the layer's output; "
        "expert 0 worked against the others."
    )
    assert told((2, 0.8, 1.0), runner_up=3, margin=-0.5) == (
        "Layer 2 sent ' def' to expert 2 alone, with weight 0.80; "
        "expert 3 scored higher by 0.5, but its group was passed over."
    )
    assert told((2, 0.8, 0.4), shared_norm=1.0, shared_share=0.6) == (
        "Layer 2 sent ' def' to expert 2 alone, with weight 0.80; expert 2 contributed 40 % of the layer's output; "
        "the shared expert 60 %."
    )


def test_sentences_about_nothing() -> None:
    assert told(router="relu", output_norm=0.0) == (
        "Layer 2 sent ' def' to no expert: it passes unchanged; the layer adds nothing to it; "
        "every expert with a positive score is taken, however many."
    )
    assert told(shared_norm=1.0, shared_share=1.0) == (
        "Layer 2 sent ' def' to no expert: only the shared expert worked on it."
    )
    assert told(lost=(1, 3), output_norm=0.0) == (
        "Layer 2 sent ' def' to no expert: it passes unchanged; experts 1, 3 had no room for it; "
        "the layer adds nothing to it."
    )
    assert told((4, 0.5, 0.6), (5, 0.5, 0.4)) == (
        "Layer 2 sent ' def' to experts null 4 (50 %) and null 5 (50 %); null expert 4 contributed 60 % of the "
        "layer's output; null experts multiply nothing, so it cost nothing."
    )
    assert told((1, 0.0, 0.0), (2, 0.0, 0.0), output_norm=0.0) == (
        "Layer 2 sent ' def' to experts 1 and 2; the layer adds nothing to it."
    )


def test_in_short() -> None:
    traced = trace(build("plain"), PROMPT)
    for found in traced.layers[0].tokens:
        total = sum(choice.weight for choice in found.chosen)
        first, second, _ = found.chosen
        wanted = [f"{one.expert} {100 * one.weight / total:.0f}%" for one in (first, second)]
        assert in_short(found, 2) == f"{wanted[0]}, {wanted[1]}, +1"
        assert in_short(found, 1) == f"{wanted[0]}, +2" and "+" not in in_short(found, 3)
    empty = trace(build("full"), PROMPT)
    shown = {in_short(found, 2) for one in empty.layers for found in one.tokens}
    assert any("full: " in cell for cell in shown), shown


def test_the_glossary() -> None:
    assert len(glossary()) == len(GLOSSARY) > 8
    assert glossary(["router"]) == (f"router: {GLOSSARY['router']}",)
    with pytest.raises(UsageError, match="routr"):
        glossary(["routr"])


# Refusals


def test_refusals() -> None:
    model = build(dense_layers=(1,))
    with pytest.raises(UsageError, match="no token"):
        trace(model, [])
    with pytest.raises(UsageError, match="range from 3 to 40"):
        trace(model, [3, 40])
    traced = trace(model, PROMPT)
    with pytest.raises(UsageError, match="layers with experts: 0, 2"):
        explain(traced, 0, 1)
    for token in (-1, len(PROMPT)):
        with pytest.raises(UsageError, match=f"no token {token}"):
            explain(traced, token, 0)
    with pytest.raises(UsageError, match="dense"):
        trace(build(dense_layers=(0, 1, 2)), PROMPT)


def test_damaged_weights_are_named_and_the_mode_restored() -> None:
    model = build().train()
    with torch.no_grad():
        moe_of(model, 1).down[:] = float("nan")
    with pytest.raises(UsageError, match=r"block 1 .*not finite"):
        trace(model, PROMPT)
    assert model.training and all(module.training for module in model.modules())
