"""Small models of the families that vLLM knows, in sizes that its kernels for a CPU take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moiety.config import AttentionConfig, MLAConfig, ModelConfig, RopeConfig
from tests import gguf_models, tiny

__all__ = ["MODELS", "NOT_COMPUTED", "OPTIONS", "REFUSED"]

# vLLM has no positions beyond factor x original_positions.
YARN = RopeConfig(kind="yarn", factor=4.0, original_positions=64)
DEEPSEEK_YARN = replace(YARN, mscale=0.7, mscale_all_dim=0.7)
SIGMOID = {
    "experts": 8,
    "experts_per_token": 3,
    "router": "sigmoid",
    "selection_bias": True,
    "shared_d_ff": 64,
}
GROUPS = {"groups": 4, "groups_kept": 2}


def attention(**changes: Any) -> AttentionConfig:
    return tiny.attention(**{"head_dim": 32, "rope_theta": 10_000.0, **changes})


def latent(q_rank: int, rope: RopeConfig | None = None) -> AttentionConfig:
    """The one size that vLLM has a kernel for: a cache of 512 + 64."""
    mla = MLAConfig(q_rank=q_rank, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    return attention(kv_heads=4, head_dim=192, rope_pairs="interleaved", mla=mla, rope=rope)


def config(
    of: AttentionConfig | None = None, moe: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    sizes = {"vocab_size": gguf_models.VOCABULARY, "d_model": 160, "d_ff": 96, "attention": of or attention()}
    if moe is not None:
        sizes |= {"moe": tiny.experts(**{"d_ff": 64, **moe})}
        sizes |= {} if "dense_layers" in changes else {"d_ff": 64}
    return tiny.config(**{**sizes, **changes})


LLAMA4 = {
    "experts_per_token": 1,
    "router": "sigmoid",
    "renormalize": False,
    "weigh_input": True,
    "shared_d_ff": 64,
}


def chunked(chunk: int) -> AttentionConfig:
    """Llama 4: chunks and rotation in all layers but one, whose queries grow."""
    return attention(
        rope_pairs="interleaved",
        qk_norm="l2_rotated",
        window=chunk,
        window_layers=(0, 2),
        chunked=True,
        rope_layers=(0, 2),
        query_scale=0.1,
        query_scale_floor=32,
    )


# By what they are; the name before "-" is the family they are written as.
MODELS: Mapping[str, ModelConfig] = {
    "llama-tied": config(attention(heads=5, kv_heads=1), tied=True),
    "llama-llama3": config(attention(rope=RopeConfig(kind="llama3", factor=8.0, original_positions=16))),
    "llama-yarn": config(attention(rope=YARN)),
    "mistral-window": config(attention(window=7)),
    "qwen2-biases": config(attention(qkv_bias=True), d_model=128),
    "qwen3-one": config(attention(qk_norm="head", kv_heads=1), norm_eps=1e-3),
    "mixtral-window": config(attention(window=7), {}),
    "qwen2_moe-shared": config(
        attention(qkv_bias=True),
        {"renormalize": False, "shared_d_ff": 96, "shared_gate": True},
        d_model=128,
    ),
    "qwen3_moe-mixed": config(
        attention(qk_norm="head"), {"experts": 7, "experts_per_token": 3}, dense_layers=(1,)
    ),
    "olmoe-plain": config(
        attention(qk_norm="full", kv_heads=4), {"experts_per_token": 3, "renormalize": False}, d_model=128
    ),
    "flex_olmo-plain": config(attention(qk_norm="full"), {}, norm_place="post"),
    "granitemoe-factors": config(
        attention(scale=0.25),
        {},
        d_model=128,
        embedding_multiplier=3.0,
        residual_multiplier=0.22,
        logits_multiplier=0.5,
    ),
    "phimoe-plain": config(
        attention(qkv_bias=True, out_bias=True), {"router": "sparsemixer"}, norm="layer", norm_bias=True
    ),
    "phimoe-head_bias": config(
        attention(qkv_bias=True, out_bias=True),
        {"router": "sparsemixer"},
        norm="layer",
        norm_bias=True,
        head_bias=True,
    ),
    "hunyuan_v1_moe-plain": config(attention(qk_norm="head_rotated"), {"shared_d_ff": 64}),
    "gpt_oss-sinks": config(
        attention(sinks=True, qkv_bias=True, out_bias=True, window=7, window_layers=(0, 2), rope=YARN),
        {"activation": "clamped_swiglu", "bias": True, "router_bias": True},
    ),
    "ernie4_5_moe-shared": config(
        attention(rope_pairs="interleaved"),
        {"selection_bias": True, "shared_d_ff": 128},
        dense_layers=(0,),
    ),
    "deepseek_v2-lite": config(
        latent(0),
        {"experts": 8, "renormalize": False, "shared_d_ff": 128, "scale": 1.5},
        dense_layers=(0,),
        norm_eps=1e-6,
    ),
    "deepseek_v2-groups": config(
        latent(48),
        {
            "experts": 8,
            "renormalize": False,
            "shared_d_ff": 128,
            "scale": 1.5,
            **GROUPS,
            "group_score": "max",
        },
        norm_eps=1e-6,
    ),
    "deepseek_v3-groups": config(
        latent(48), {**SIGMOID, **GROUPS, "scale": 2.5}, dense_layers=(0,), norm_eps=1e-6
    ),
    "deepseek_v3-yarn": config(latent(0, DEEPSEEK_YARN), {**SIGMOID, "scale": 2.5}, norm_eps=1e-6),
    "glm4_moe-groups": config(
        attention(qkv_bias=True, qk_norm="head", rope_fraction=0.5),
        {**SIGMOID, **GROUPS, "scale": 2.5},
        dense_layers=(0,),
    ),
    "dots1-plain": config(attention(qk_norm="head"), SIGMOID),
    "llama4_text-chunks": config(chunked(128), LLAMA4),
}
# What vLLM must be told, by family. DeepSeek: its compiled rotation is wrong for queries with an axis for heads, so the
# definition in torch is used. Llama 4: the growth of queries is not taken from config.json. gpt-oss: attention with
# sinks gives NaN for the longer of two prompts computed together.
NATIVE_ROTATION = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": NATIVE_ROTATION,
    "deepseek_v3": NATIVE_ROTATION,
    "llama4_text": {"override_generation_config": {"attn_temperature_tuning": True}},
    "gpt_oss": {"max_num_seqs": 1},
}
# What vLLM leaves out without a word, so it is 0 in what we compare with.
NOT_COMPUTED = {"ernie4_5_moe-shared": "selection_bias", "phimoe-head_bias": "head.bias"}
# What vLLM does not run on a CPU, and part of what it says.
REFUSED: Mapping[str, tuple[ModelConfig, str]] = {
    "minimax_m2-plain": (
        config(attention(qk_norm="full", rope_fraction=0.5), {**SIGMOID, "shared_d_ff": 0}),
        'assert self.scoring_func == "softmax"',
    ),
    "dbrx-clipped": (
        config(attention(clip_qkv=1.5), {}, norm="layer", d_model=128),
        "KeyError: 'blocks.0.ffn.experts.w13_weight'",
    ),
    "grok-1-plain": (
        config(
            attention(logit_cap=30.0, scale=0.25),
            {"renormalize": False, "activation": "gelu"},
            norm_place="both",
            d_model=128,
        ),
        "grok-1",
    ),
    "qwen2-wide_heads": (config(attention(qkv_bias=True)), "length (80) exceeds dimension size (64)"),
    "mixtral-narrow_heads": (config(attention(head_dim=24), {}), "head_dim=24"),
    "mixtral-odd_experts": (config(moe={"d_ff": 40}, d_model=168), "No Unquantized MoE backend"),
    "deepseek_v3-narrow_latent": (
        config(
            attention(
                kv_heads=4,
                head_dim=24,
                rope_pairs="interleaved",
                mla=MLAConfig(kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16),
            ),
            SIGMOID,
        ),
        "Head dimension 40 is not supported by MLA",
    ),
    "llama4_text-short_chunks": (config(chunked(16), LLAMA4), "attn_chunk_size 16 is not divisible"),
}
