"""Counts against transformers' own modules, against closed forms, and against each other."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from moiety.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig
from moiety.cost import (
    dense_twin,
    dense_twin_difference,
    distinct_experts,
    flops_per_token,
    kv_bytes,
    kv_bytes_per_token,
    parameters,
    router_flops,
    tokens_per_expert,
    training_flops_per_token,
    weight_bytes,
)
from moiety.errors import ConfigError
from moiety.model.transformer import Transformer
from moiety.registry import REGISTRY, lookup, lookup_decoder
from tests import tiny

DECODERS = [name for name in REGISTRY if not name.startswith("switch-")]
Twin = tuple[ModelConfig, Any]


def config_of(*, moe: MoEConfig | None = None, **model: Any) -> ModelConfig:
    attention = model.pop("attention", AttentionConfig(heads=4, kv_heads=2, head_dim=6))
    sizes: dict[str, Any] = {"vocab_size": 101, "d_model": 24, "layers": 3, "d_ff": 40}
    return ModelConfig(attention=attention, moe=moe, **{**sizes, **model})


def sizes_of(draw: random.Random) -> dict[str, int]:
    """Sizes that every class below accepts; heads x head_dim is d_model, as some of them require."""
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 3])
    experts = draw.randint(2, 9)
    return {
        "vocab": draw.randint(17, 130),
        "layers": draw.randint(1, 4),
        "heads": heads,
        "kv_heads": kv_heads,
        "d_model": heads * 8,
        "experts": experts,
        "chosen": draw.randint(1, experts),
        "d_ff": draw.randint(3, 50),
    }


def ours(
    sizes: dict[str, int],
    tied: bool,
    *,
    attention: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
    **model: Any,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=sizes["vocab"],
        d_model=sizes["d_model"],
        layers=sizes["layers"],
        d_ff=model.pop("d_ff", sizes["d_ff"]),
        tied=tied,
        attention=AttentionConfig(
            **{
                "heads": sizes["heads"],
                "kv_heads": sizes["kv_heads"],
                "head_dim": 8,
                **(attention or {}),
            }
        ),
        moe=MoEConfig(
            experts=sizes["experts"],
            experts_per_token=sizes["chosen"],
            d_ff=sizes["d_ff"],
            **(moe or {}),
        ),
        **model,
    )


def theirs(sizes: dict[str, int], tied: bool, experts_key: str, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": sizes["vocab"],
        "hidden_size": sizes["d_model"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "intermediate_size": sizes["d_ff"],
        "num_experts_per_tok": sizes["chosen"],
        "tie_word_embeddings": tied,
        experts_key: sizes["experts"],
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **more,
    }


def mixtral(draw: random.Random) -> Twin:
    sizes, tied = sizes_of(draw), draw.random() < 0.5
    return ours(sizes, tied), transformers.MixtralConfig(
        **theirs(sizes, tied, "num_local_experts", head_dim=8)
    )


def qwen3_moe(draw: random.Random) -> Twin:
    sizes, tied = sizes_of(draw), draw.random() < 0.5
    dense = tuple(layer for layer in range(sizes["layers"]) if draw.random() < 0.3)
    head_dim = draw.choice([4, 8, 10])
    config = ours(
        sizes, tied, attention={"qk_norm": "head", "head_dim": head_dim}, d_ff=77, dense_layers=dense
    )
    values = theirs(sizes, tied, "num_experts", head_dim=head_dim, mlp_only_layers=list(dense))
    values |= {"moe_intermediate_size": sizes["d_ff"], "intermediate_size": 77}
    return config, transformers.Qwen3MoeConfig(**values)


def olmoe(draw: random.Random) -> Twin:
    sizes, tied = sizes_of(draw), draw.random() < 0.5
    config = ours(sizes, tied, attention={"qk_norm": "full"}, moe={"renormalize": False})
    return config, transformers.OlmoeConfig(**theirs(sizes, tied, "num_experts"))


def gpt_oss(draw: random.Random) -> Twin:
    sizes = sizes_of(draw)
    attention = {"qkv_bias": True, "out_bias": True, "sinks": True, "window": 5}
    config = ours(sizes, False, attention=attention, moe={"router_bias": True, "bias": True})
    return config, transformers.GptOssConfig(**theirs(sizes, False, "num_local_experts", head_dim=8))


def granite(draw: random.Random) -> Twin:
    sizes, tied = sizes_of(draw), draw.random() < 0.5
    config = ours(sizes, tied)
    return config, transformers.GraniteMoeConfig(**theirs(sizes, tied, "num_local_experts"))


def deepseek_v3(draw: random.Random) -> Twin:
    sizes, tied = sizes_of(draw), draw.random() < 0.5
    sizes |= {"kv_heads": sizes["heads"], "experts": 2 * sizes["experts"]}
    dense, shared = draw.randint(0, sizes["layers"]), draw.randint(1, 3)
    mla = MLAConfig(q_rank=draw.choice([0, 7]), kv_rank=5, nope_dim=6, rope_dim=4, value_dim=9)
    config = ours(
        sizes,
        tied,
        attention={"mla": mla},
        moe={"router": "sigmoid", "selection_bias": True, "shared_d_ff": shared * sizes["d_ff"]},
        d_ff=33,
        dense_layers=tuple(range(dense)),
    )
    values = theirs(sizes, tied, "n_routed_experts", n_shared_experts=shared, first_k_dense_replace=dense)
    values |= {"moe_intermediate_size": sizes["d_ff"], "intermediate_size": 33, "n_group": 1, "topk_group": 1}
    values |= {"q_lora_rank": mla.q_rank or None, "kv_lora_rank": 5, "v_head_dim": 9}
    values |= {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
    return config, transformers.DeepseekV3Config(**values)


@pytest.mark.parametrize("family", [mixtral, qwen3_moe, olmoe, gpt_oss, granite, deepseek_v3])
def test_total_equals_the_module_of_transformers(family: Callable[[random.Random], Twin]) -> None:
    """A selection bias is a buffer there; the rule counts it as what it is, a stored learnt value."""
    draw = random.Random(2101)
    for _ in range(6):
        config, oracle = family(draw)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(oracle)
        stored = sum(p.numel() for p in model.parameters())
        stored += sum(b.numel() for name, b in model.named_buffers() if "e_score_correction_bias" in name)
        assert parameters(config).total == stored, config


@pytest.mark.parametrize("name", REGISTRY)
def test_conventions_and_components_agree(name: str) -> None:
    config = lookup(name)
    counts = parameters(config)
    assert counts.active_without_input_embedding == counts.active - config.vocab_size * config.d_model
    assert (
        counts.active_without_embeddings == counts.active_without_input_embedding - counts.components["head"]
    )
    assert list(counts.active_components) == list(counts.components)
    unchosen = counts.total - counts.active
    assert unchosen == counts.components["routed_experts"] - counts.active_components["routed_experts"]
    if config.moe is not None:
        chosen = counts.active_components["routed_experts"] * config.moe.experts
        assert chosen == counts.components["routed_experts"] * config.moe.experts_per_token


@pytest.mark.parametrize("name", DECODERS)
def test_flops_are_twice_the_active_matrices(name: str) -> None:
    config = lookup_decoder(name)
    counts, flops = parameters(config), flops_per_token(config)
    assert sum(flops.components.values()) == flops.total
    multiplied = counts.active if config.tied else counts.active_without_input_embedding
    assert 0 < 2 * multiplied - flops.total < 0.002 * flops.total, "norms and biases alone are left out"
    assert flops.components["attention_scores"] == 0
    assert flops.components["routers"] == router_flops(config)


def test_parameters_by_hand() -> None:
    moe = MoEConfig(experts=5, experts_per_token=2, d_ff=7, shared_d_ff=11, shared_gate=True, bias=True)
    config = config_of(moe=moe, dense_layers=(0,), head_bias=True, norm="layer", norm_bias=True)
    components = parameters(config).components
    assert components == {
        "embedding": 101 * 24,
        "head": 101 * 24 + 101,
        "attention": 3 * (2 * 24 * 24 + 2 * 24 * 12),
        "norms": 7 * 2 * 24,
        "dense_feed_forward": 3 * 24 * 40,
        "routed_experts": 2 * 5 * (3 * 24 * 7 + 14 + 24),
        "shared_experts": 2 * 3 * 24 * 11,
        "routers": 2 * (24 * 5 + 24),
        "relative_position": 0,
    }
    plain = dataclasses.replace(moe, gated=False, selection_bias=True, router_bias=True, shared_gate=False)
    components = parameters(config_of(moe=plain, norm_place="both", tied=True)).components
    assert components["routed_experts"] == 3 * 5 * (2 * 24 * 7 + 7 + 24)
    assert components["routers"] == 3 * (24 * 5 + 10)
    assert components["norms"] == (4 * 3 + 1) * 24
    assert components["head"] == 0


def test_a_tied_head_still_multiplies() -> None:
    tied, untied = config_of(tied=True), config_of(tied=False)
    assert flops_per_token(tied) == flops_per_token(untied)
    assert parameters(untied).total - parameters(tied).total == 101 * 24


def test_attention_scores_by_hand() -> None:
    config = config_of(
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=6, window=10, window_layers=(1,))
    )
    scores = flops_per_token(config, 100).components["attention_scores"]
    assert scores == 4 * 4 * 6 * (100 + 10 + 100)
    mla = MLAConfig(kv_rank=5, nope_dim=6, rope_dim=4, value_dim=9)
    latent = config_of(attention=AttentionConfig(heads=4, kv_heads=4, head_dim=10, mla=mla))
    absorbed = flops_per_token(latent, 100).components["attention_scores"]
    expanded = flops_per_token(latent, 100, absorbed=False).components["attention_scores"]
    assert absorbed == 3 * 100 * 2 * 4 * (2 * 5 + 4)
    assert expanded == 3 * 100 * 2 * 4 * (6 + 4 + 9)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-20b"])
def test_training_is_three_forwards(name: str) -> None:
    config = lookup_decoder(name)
    forward, training = flops_per_token(config, 777, absorbed=False), training_flops_per_token(config, 777)
    assert training.total == 3 * forward.total == sum(training.components.values())


def test_weight_bytes() -> None:
    config = config_of(vocab_size=3, tied=True)
    total = parameters(config).total
    assert weight_bytes(config, 16) == 2 * total
    assert weight_bytes(config, 4) == (total + 1) // 2
    assert 0 <= weight_bytes(config, 4.5) - 4.5 * total / 8 < 1
    for bits in (0, -8, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="bits"):
            weight_bytes(config, bits)


def test_cache_bytes() -> None:
    config = config_of(
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=6, window=10, window_layers=(0, 2))
    )
    each = 2 * 2 * 6 * 2
    assert kv_bytes_per_token(config) == 3 * each
    assert [kv_bytes(config, context) for context in (0, 1, 10, 50)] == [
        0,
        3 * each,
        30 * each,
        (50 + 20) * each,
    ]
    assert kv_bytes_per_token(config, 0.5) * 4 == kv_bytes_per_token(config)
    all_windowed = config_of(attention=AttentionConfig(heads=4, kv_heads=2, head_dim=6, window=10))
    assert kv_bytes(all_windowed, 11) == kv_bytes(all_windowed, 10_000)
    gpt_oss = lookup_decoder("gpt-oss-20b")
    assert 0.5 < kv_bytes(gpt_oss, 131_072) / (131_072 * kv_bytes_per_token(gpt_oss)) < 0.501
    with pytest.raises(ConfigError, match="context"):
        kv_bytes(config, -1)


def test_distinct_experts() -> None:
    deepseek = lookup("deepseek-v3")
    assert [round(distinct_experts(deepseek, batch)) for batch in (0, 1, 32, 128)] == [0, 8, 163, 252]
    everything = config_of(moe=MoEConfig(experts=4, experts_per_token=4, d_ff=8))
    assert distinct_experts(everything, 1) == 4
    draw = random.Random(7)
    seen = [len({e for _ in range(32) for e in draw.sample(range(256), 8)}) for _ in range(200)]
    assert sum(seen) / len(seen) == pytest.approx(distinct_experts(deepseek, 32), rel=0.01)


def test_tokens_per_expert_and_dense_models() -> None:
    assert tokens_per_expert(lookup("mixtral-8x7b"), 100) == 25
    assert tokens_per_expert(lookup("switch-base-8"), 100) == 12.5
    dense = config_of()
    assert router_flops(dense) == 0
    for ask in (distinct_experts, tokens_per_expert):
        with pytest.raises(ConfigError, match="dense"):
            ask(dense, 4)
        with pytest.raises(ConfigError, match="at least 0"):
            ask(lookup("mixtral-8x7b"), -1)


def test_dense_twin_without_dense_layers_differs_by_the_routers_alone() -> None:
    for name in ("mixtral-8x7b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "hunyuan-a13b"):
        config = lookup_decoder(name)
        assert config.moe is not None
        twin = dense_twin(config)
        assert twin.d_ff == config.moe.experts_per_token * config.moe.d_ff + config.moe.shared_d_ff
        assert twin.moe is None and not twin.dense_layers
        assert dense_twin_difference(config) == parameters(config).components["routers"]


@pytest.mark.parametrize("name", DECODERS)
def test_dense_twin_has_the_active_parameters(name: str) -> None:
    config = lookup_decoder(name)
    twin = dense_twin(config)
    difference = dense_twin_difference(config)
    assert parameters(twin).total == parameters(twin).active == parameters(config).active - difference
    routers = parameters(config).components["routers"]
    biases = 0
    if config.moe is not None and config.moe.bias:
        each = 2 * config.moe.d_ff + config.d_model
        biases = len(config.moe_layers) * config.moe.experts_per_token * each
    rounding = difference - routers - biases
    assert 2 * abs(rounding) <= config.layers * 3 * config.d_model
    assert dense_twin(twin) == twin


def test_dense_twin_takes_the_gating_of_the_experts() -> None:
    moe = MoEConfig(experts=4, experts_per_token=2, d_ff=16, gated=False, activation="relu")
    twin = dense_twin(config_of(moe=moe, gated=True, dense_layers=(1,)))
    assert (twin.gated, twin.activation) == (False, "relu")
    assert twin.d_ff == round((2 * 2 * 2 * 16 + 3 * 40) / (2 * 3))
    assert dense_twin(config_of()) == config_of()


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_counts_are_those_of_our_own_model(name: str) -> None:
    """Active is counted by what the gradient of one token reaches: an expert as a whole, all else in full."""
    config = tiny.CONFIGS[name]
    counts, model = parameters(config), tiny.model(name, dtype=torch.float64)
    biases = sum(b.numel() for buffer, b in model.named_buffers() if buffer.endswith("selection_bias"))
    assert counts.total == biases + sum(p.numel() for p in model.parameters())
    model(tiny.tokens(config, 1, 1)).logits.square().sum().backward()
    touched = biases
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        if ".experts." in parameter_name:
            used_E = (parameter.grad != 0).flatten(1).any(dim=1)
            touched += int(used_E.sum()) * parameter[0].numel()
        else:
            touched += parameter.numel()
    assert counts.active == touched
    assert (counts.active < counts.total) == (config.moe is not None)


MLA = MLAConfig(kv_rank=5, nope_dim=6, rope_dim=4, value_dim=9)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer"},
        {"norm": "layer", "norm_bias": True, "norm_place": "both"},
        {"norm_place": "post"},
        {"head_bias": True},
        {"head_bias": True, "tied": True},
        {"attention": {"sinks": True, "qkv_bias": True, "out_bias": True}},
        {"attention": {"qk_norm": "head_rotated"}},
        {"attention": {"qk_norm": "l2_rotated", "rope_layers": (0,)}},
        {"attention": {"qk_norm": "full", "window": 3}, "norm_place": "both"},
        {"attention": {"mla": MLA}},
        {"attention": {"mla": dataclasses.replace(MLA, q_rank=7)}, "norm_place": "both"},
        {"moe": MoEConfig(experts=5, experts_per_token=2, d_ff=16, activation="clamped_swiglu", bias=True)},
        {"moe": MoEConfig(experts=5, experts_per_token=1, d_ff=16, router="sigmoid", weigh_input=True)},
    ],
    ids=str,
)
def test_every_option_of_the_decoder_is_counted(changes: dict[str, Any]) -> None:
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 6, **changes.get("attention", {})}
    config = config_of(**{**changes, "attention": AttentionConfig(**attention)})
    assert parameters(config).total == sum(p.numel() for p in Transformer(config).parameters())
    Transformer(dense_twin(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "noisy"},
        {"router": "hash", "balance_loss": 0.0, "z_loss": 0.0},
        {"null_experts": 3},
        {"null_experts": 2, "router": "sigmoid", "selection_bias": True, "router_bias": True},
    ],
    ids=str,
)
def test_routers_of_other_shapes_are_counted(changes: dict[str, object]) -> None:
    moe = MoEConfig(experts=5, experts_per_token=2, d_ff=16, **changes)  # type: ignore[arg-type]
    config = config_of(moe=moe)
    model = Transformer(config)
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("selection_bias"))
    assert parameters(config).total == biases + sum(p.numel() for p in model.parameters())
