"""Families whose router is a softmax.

Class defaults are transformers'. A size that a file leaves out has none: a wrong guess would be another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiety.config import ModelConfig
from moiety.errors import FormatError
from moiety.model.families.base import Family, Match, Rule, Stored
from moiety.model.families.names import (
    BIASES,
    COMMON_DEFAULTS,
    COMMON_KEYS,
    COMMON_TENSORS,
    DENSE_TENSORS,
    KEYS_OF_EVEN_HEADS,
    LAYER,
    LAYER_NORM_TENSORS,
    SHARED,
    SWITCHED,
    attention_tensors,
    expert_tensors,
    one,
    shared_tensors,
)
from moiety.model.families.rope import rope
from moiety.model.families.rules import (
    biases,
    dense_layers_between,
    dense_layers_named,
    even_heads,
    inverse,
    number_or_zero,
    shared_experts,
    windows,
)
from moiety.model.families.values import Values

__all__ = ["SOFTMAX"]


def _every_other(values: Values, layers: int) -> list[int]:
    return list(range(0, min(values.whole("max_window_layers"), layers), 2))


_LOCAL_EXPERTS = {
    "num_local_experts": "moe.experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "router_aux_loss_coef": "moe.balance_loss",
}
_EXPERTS = {
    "num_experts": "moe.experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "norm_topk_prob": "moe.renormalize",
    "router_aux_loss_coef": "moe.balance_loss",
}
_WIDTHS: Mapping[str, str | tuple[str, ...]] = {
    "intermediate_size": "d_ff",
    "moe_intermediate_size": "moe.d_ff",
    "hidden_act": ("moe.activation", "activation"),
}

_MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys={
        **COMMON_KEYS, **_LOCAL_EXPERTS, "intermediate_size": "moe.d_ff", "hidden_act": "moe.activation",
    },
    aliases={"num_experts": "num_local_experts"},
    defaults={**COMMON_DEFAULTS, "rms_norm_eps": 1e-5},
    rules=(rope(1_000_000.0), windows()),
    ignored=frozenset({"router_jitter_noise"}),  # noise of training only
    tensors={**COMMON_TENSORS, **expert_tensors("block_sparse_moe", ("w1", "w3", "w2"))},
)  # fmt: skip
_QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys={
        **COMMON_KEYS, **_EXPERTS, **_WIDTHS,
        "shared_expert_intermediate_size": "moe.shared_d_ff",
        "qkv_bias": "attention.qkv_bias",
    },
    aliases={"num_local_experts": "num_experts"},
    defaults={
        **COMMON_DEFAULTS, **SWITCHED,
        "qkv_bias": True, "norm_topk_prob": False, "mlp_only_layers": (), "decoder_sparse_step": 1,
    },
    absent={"sliding_window": 4096},
    fixed={"moe.shared_gate": True},
    rules=(
        rope(),
        windows(
            switch="use_sliding_window", default=_every_other, typed=True, more_keys=("max_window_layers",)
        ),
        dense_layers_named(),
    ),
    needs=SHARED,
    tensors={**COMMON_TENSORS, **DENSE_TENSORS, **expert_tensors(), **shared_tensors("mlp.shared_expert")},
)  # fmt: skip
_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    # norm_topk_prob has no default here: the class says false and every checkpoint true
    keys={**COMMON_KEYS, **_EXPERTS, **_WIDTHS, "attention_bias": BIASES},
    aliases={"num_local_experts": "num_experts"},
    defaults={
        **COMMON_DEFAULTS, "use_sliding_window": False, "mlp_only_layers": (), "decoder_sparse_step": 1,
    },
    absent={"sliding_window": 4096},
    fixed={"attention.qk_norm": "head"},
    rules=(rope(), windows(switch="use_sliding_window"), dense_layers_named()),
    ignored=frozenset({"max_window_layers"}),
    tensors={**COMMON_TENSORS, **DENSE_TENSORS, **expert_tensors()},
)  # fmt: skip
_OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys={
        **KEYS_OF_EVEN_HEADS, **_EXPERTS,
        "intermediate_size": "moe.d_ff", "hidden_act": "moe.activation", "attention_bias": BIASES,
    },
    aliases={"num_local_experts": "num_experts"},
    defaults={
        **COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.01, "norm_topk_prob": False,
    },
    fixed={"attention.qk_norm": "full"},
    rules=(rope(), even_heads(), number_or_zero("clip_qkv", "attention.clip_qkv")),
    tensors={**COMMON_TENSORS, **expert_tensors()},
)  # fmt: skip
_FLEX_OLMO = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    keys={**COMMON_KEYS, **_OLMOE.keys},
    aliases=_OLMOE.aliases,
    defaults={**_OLMOE.defaults, "rms_norm_eps": 1e-6},
    fixed={"attention.qk_norm": "full", "norm_place": "post"},
    rules=(rope(500_000.0),),
    tensors={
        **_OLMOE.tensors,
        "blocks.{l}.attention_post_norm.weight": one(LAYER + "post_attention_layernorm.weight"),
        "blocks.{l}.feed_forward_post_norm.weight": one(LAYER + "post_feedforward_layernorm.weight"),
    },
)


def _granite_scale() -> Rule:
    def read(values: Values, match: Match) -> dict[str, Any]:
        return {"attention.scale": values.number("attention_multiplier")}

    def write(config: ModelConfig) -> dict[str, Any]:
        scale = config.attention.scale
        return {"attention_multiplier": config.attention.head_dim**-0.5 if scale is None else scale}

    return Rule(keys=("attention_multiplier",), read=read, write=write)


_GRANITE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    keys={
        **COMMON_KEYS, **_LOCAL_EXPERTS,
        "intermediate_size": "moe.d_ff", "hidden_act": "moe.activation", "attention_bias": BIASES,
        "embedding_multiplier": "embedding_multiplier", "residual_multiplier": "residual_multiplier",
    },
    defaults={
        **COMMON_DEFAULTS, "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
        "attention_multiplier": 1.0, "logits_scaling": 1.0,
    },
    rules=(rope(), _granite_scale(), inverse("logits_scaling", "logits_multiplier")),
    tensors={
        **COMMON_TENSORS,
        "blocks.{l}.feed_forward.gate.weight": (
            Stored((LAYER + "block_sparse_moe.router.layer.weight",)),
            Stored((LAYER + "block_sparse_moe.router.weight",)),
        ),
        "blocks.{l}.feed_forward.experts.gate_up": (
            Stored((LAYER + "block_sparse_moe.input_linear.weight",)),
            Stored((LAYER + "block_sparse_moe.experts.gate_up_proj",)),
        ),
        "blocks.{l}.feed_forward.experts.down": (
            Stored((LAYER + "block_sparse_moe.output_linear.weight",)),
            Stored((LAYER + "block_sparse_moe.experts.down_proj",)),
        ),
    },
)  # fmt: skip


def _sparse_mixer() -> Rule:
    """The jitter of SparseMixer, which also acts outside training."""

    def read(values: Values, match: Match) -> dict[str, Any]:
        jitter = values.number("router_jitter_noise")
        return {"moe.router_options": () if jitter == 0.01 else (f"jitter={jitter}",)}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        jitter = 0.01
        for option in config.moe.router_options:
            name, _, text = option.partition("=")
            jitter = float(text) if name == "jitter" else jitter
        return {"router_jitter_noise": jitter}

    return Rule(keys=("router_jitter_noise",), read=read, write=write)


_PHIMOE = Family(
    model_type="phimoe",
    architecture="PhiMoEForCausalLM",  # the name in the published files; transformers goes by model_type
    keys={
        **COMMON_KEYS, **_LOCAL_EXPERTS,
        "intermediate_size": "moe.d_ff", "hidden_act": "moe.activation", "attention_bias": BIASES,
        "lm_head_bias": "head_bias",
    },
    defaults={
        **COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "router_jitter_noise": 0.01, "lm_head_bias": False,
        "num_experts_per_tok": 2,
    },
    fixed={"norm": "layer", "norm_bias": True, "moe.router": "sparsemixer"},
    rules=(rope(1_000_000.0), windows(), _sparse_mixer()),
    allowed={"num_experts_per_tok": (2,)},
    ignored=frozenset({"input_jitter_noise"}),
    tensors={
        **COMMON_TENSORS, **LAYER_NORM_TENSORS,
        **expert_tensors("block_sparse_moe", ("w1", "w3", "w2"), new_router="router"),
    },
)  # fmt: skip


def _hunyuan_lists() -> Rule:
    """Sizes that may be listed layer by layer; the class in transformers has one for all."""

    def read(values: Values, match: Match) -> dict[str, Any]:
        width = values["intermediate_size"]
        if values.get("moe_intermediate_size") is not None and values.same("moe_intermediate_size") != width:
            raise FormatError(
                f"config.json has moe_intermediate_size {values['moe_intermediate_size']!r} and "
                f"intermediate_size {width!r}; experts of another width than the shared one are not known"
            )
        return {"moe.experts": values.same("num_experts"), "moe.experts_per_token": values.same("moe_topk")}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        return {"num_experts": config.moe.experts, "moe_topk": config.moe.experts_per_token}

    return Rule(keys=("num_experts", "moe_topk", "moe_intermediate_size"), read=read, write=write)


_HUNYUAN = Family(
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    keys={
        **COMMON_KEYS,
        "intermediate_size": ("moe.d_ff", "moe.shared_d_ff"), "hidden_act": "moe.activation",
        "attention_bias": BIASES,
    },
    aliases={"num_experts_per_tok": "moe_topk", "num_local_experts": "num_experts", "attention_head_dim": "head_dim"},
    defaults={**COMMON_DEFAULTS, "rms_norm_eps": 1e-5},
    fixed={"attention.qk_norm": "head_rotated"},
    rules=(rope(alpha=True), _hunyuan_lists()),
    # what vLLM and the authors' code look at, and the one value of each that is computed here
    constants={"num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True},
    allowed={
        "mlp_bias": (False,), "use_cla": (False,), "norm_type": ("rms",), "moe_layer_num_skipped": (0,),
        "position_embedding_xdrope": (False,), "group_limited_greedy": (False,), "use_mla": (False,),
        "add_classification_head": (False,), "qk_norm": (True,), "norm_topk_prob": (True,),
    },
    ignored=frozenset({
        "cla_share_factor", "moe_drop_tokens", "moe_random_routing_dropped_token", "capacity_factor", "class_num",
        "dense_list", "org_vocab_size", "pool_type", "mask_init_id", "max_seq_length", "text_start_id",
        "text_end_id", "im_start_id", "im_end_id", "im_newline_id", "image_token_id", "video_start_id",
        "video_end_id", "vit_path", "vit_type", "num_media_embeds", "anyres_vit_max_image_size",
        "anyres_pooling_size", "n_group", "topk_group", "routed_scaling_factor", "q_lora_rank", "kv_lora_rank",
        "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "skip_cls_token", "max_image_size", "vit_token",
    }),
    tensors={
        **COMMON_TENSORS, **attention_tensors(q_norm="query_layernorm", k_norm="key_layernorm"),
        **expert_tensors(router="gate.wg", new_router="gate.wg"), **shared_tensors("mlp.shared_mlp"),
    },
)  # fmt: skip

_GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys={
        **COMMON_KEYS, **_LOCAL_EXPERTS,
        "intermediate_size": "moe.d_ff", "attention_bias": BIASES, "swiglu_limit": "moe.activation_limit",
    },
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    defaults={**COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "attention_bias": True, "swiglu_limit": 7.0},
    absent={"sliding_window": 128, "head_dim": 64},
    fixed={
        "attention.sinks": True, "moe.router_bias": True, "moe.bias": True, "moe.activation": "clamped_swiglu",
    },
    rules=(
        rope(150_000.0, scaled=_GPT_OSS_ROPE),
        windows(default=lambda values, layers: list(range(0, layers, 2)), typed=True, unused=128),
    ),
    constants={"hidden_act": "silu"},
    allowed={"swiglu_alpha": (1.702,)},
    ignored=frozenset({"initial_context_length"}),
    tensors={
        **COMMON_TENSORS,
        "blocks.{l}.feed_forward.gate.weight": one(LAYER + "mlp.router.weight"),
        "blocks.{l}.feed_forward.gate.bias": one(LAYER + "mlp.router.bias"),
        "blocks.{l}.feed_forward.experts.gate_up": (
            Stored((LAYER + "mlp.experts.gate_up_proj",), transposed=True, interleaved=True),
        ),
        "blocks.{l}.feed_forward.experts.gate_up_bias": (
            Stored((LAYER + "mlp.experts.gate_up_proj_bias",), interleaved=True),
        ),
        "blocks.{l}.feed_forward.experts.down": (
            Stored((LAYER + "mlp.experts.down_proj",), transposed=True),
        ),
        "blocks.{l}.feed_forward.experts.down_bias": one(LAYER + "mlp.experts.down_proj_bias"),
    },
)  # fmt: skip

_ERNIE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    keys={
        **COMMON_KEYS, **_WIDTHS,
        "moe_num_experts": "moe.experts", "moe_k": "moe.experts_per_token",
        "router_aux_loss_coef": "moe.balance_loss",
    },
    aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    defaults={
        **COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1, "use_bias": False,
    },
    absent={"moe_num_shared_experts": 2},
    fixed={"moe.selection_bias": True, "attention.rope_pairs": "interleaved"},
    rules=(
        rope(500_000.0), shared_experts("moe_num_shared_experts"), dense_layers_between(),
        biases("use_bias", "moe_num_shared_experts", *BIASES, "head_bias"),
    ),
    constants={"moe_norm_min": 1e-12},
    allowed={"moe_use_aux_free": (True,), "moe_gate": ("topk",), "moe_gate_act": ("softmax",)},
    ignored=frozenset({"moe_capacity", "num_nextn_predict_layers", "moe_dropout_prob"}),
    tensors={
        **COMMON_TENSORS, **DENSE_TENSORS, **shared_tensors("mlp.shared_experts"), "head.bias": one("lm_head.bias"),
        **expert_tensors(
            bias="moe_statics.e_score_correction_bias",
            new_bias="gate.moe_statics.e_score_correction_bias",
            row=True,
        ),
    },
    ignored_tensors=("model.mtp_",),
)  # fmt: skip


def _dbrx_norm() -> Rule:
    """Weights are divided by their p-norm: p is 1, or null for none."""
    key = "ffn_config.moe_normalize_expert_weights"

    def read(values: Values, match: Match) -> dict[str, Any]:
        power = values.get(key)
        if power is not None and power != 1:
            raise FormatError(f"config.json has {key} {power!r}; allowed is 1 or null")
        return {"moe.renormalize": power is not None}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        return {key: 1.0 if config.moe.renormalize else None}

    return Rule(keys=(key,), read=read, write=write)


def _dbrx_activation() -> Rule:
    key = "ffn_config.ffn_act_fn"

    def read(values: Values, match: Match) -> dict[str, Any]:
        said = values.get(key, {"name": "silu"})
        inner = Values(said if isinstance(said, dict) else {"name": said}, "dbrx", {"name": "silu"}, {})
        return {"moe.activation": inner.activation("name")}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        name = config.moe.activation
        return {key: {"name": "gelu_pytorch_tanh" if name == "gelu_tanh" else name}}

    return Rule(keys=(key,), read=read, write=write)


_DBRX_BLOCK = "transformer.blocks.{l}."
_DBRX_EXPERTS = _DBRX_BLOCK + "ffn.experts.mlp."
_DBRX = Family(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    sections=("attn_config", "ffn_config"),
    keys={
        "vocab_size": "vocab_size", "d_model": "d_model", "n_layers": "layers", "n_heads": "attention.heads",
        "max_seq_len": "max_positions", "attn_config.kv_n_heads": "attention.kv_heads",
        "ffn_config.ffn_hidden_size": "moe.d_ff", "ffn_config.moe_num_experts": "moe.experts",
        "ffn_config.moe_top_k": "moe.experts_per_token", "ffn_config.moe_loss_weight": "moe.balance_loss",
    },
    aliases={
        "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len", "num_key_value_heads": "attn_config.kv_n_heads",
    },
    defaults={"ffn_config.moe_loss_weight": 0.01},
    absent={"ffn_config.moe_normalize_expert_weights": 1.0},
    fixed={"norm": "layer", "norm_eps": 1e-5},
    # transformers rotates by the outer rope_theta, 10000 where there is none; the authors by the inner one
    rules=(
        rope(theta_key="attn_config.rope_theta"),
        number_or_zero("attn_config.clip_qkv", "attention.clip_qkv"),
        _dbrx_norm(),
        _dbrx_activation(),
    ),
    constants={"tie_word_embeddings": False},
    allowed={"ffn_config.uniform_expert_assignment": (False,)},
    ignored=frozenset({
        "resid_pdrop", "emb_pdrop", "attn_config.attn_pdrop", "attn_config.tie_word_embeddings",
        "ffn_config.tie_word_embeddings", "ffn_config.hidden_size", "ffn_config.moe_jitter_eps",
    }),
    tensors={
        "embed.weight": one("transformer.wte.weight"),
        "norm.weight": one("transformer.norm_f.weight"),
        "head.weight": one("lm_head.weight"),
        "blocks.{l}.attention_norm.weight": one(_DBRX_BLOCK + "norm_attn_norm.norm_1.weight"),
        "blocks.{l}.feed_forward_norm.weight": one(_DBRX_BLOCK + "norm_attn_norm.norm_2.weight"),
        "blocks.{l}.attention.qkv.weight": one(_DBRX_BLOCK + "norm_attn_norm.attn.Wqkv.weight"),
        "blocks.{l}.attention.out.weight": one(_DBRX_BLOCK + "norm_attn_norm.attn.out_proj.weight"),
        "blocks.{l}.feed_forward.gate.weight": one(_DBRX_BLOCK + "ffn.router.layer.weight"),
        "blocks.{l}.feed_forward.experts.gate_up": (
            Stored((_DBRX_EXPERTS + "w1", _DBRX_EXPERTS + "v1"), folded=True),
        ),
        "blocks.{l}.feed_forward.experts.down": (
            Stored((_DBRX_EXPERTS + "w2",), transposed=True, folded=True),
        ),
    },
)  # fmt: skip


def _grok_activation() -> Rule:
    """xAI's own code approximates GELU by tanh (jax.nn.gelu); the ports to torch do not."""

    def read(values: Values, match: Match) -> dict[str, Any]:
        if "hidden_act" in values:
            return {"moe.activation": values.activation("hidden_act")}
        return {"moe.activation": "gelu_tanh" if match == "original" else "gelu"}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        name = config.moe.activation
        return {"hidden_act": "gelu_pytorch_tanh" if name == "gelu_tanh" else name}

    return Rule(keys=("hidden_act",), read=read, write=write)


def _grok_names() -> Mapping[str, Any]:
    """Names of the ports of xai-org/grok-1 to torch, which keep the modules of the JAX code.

    There `linear` is the gate, `linear_v` the other half and `linear_1` the way down, and a norm's weight is
    its `scale`, which some ports call `weight`.
    """
    norms = {
        "norm": "model.norm",
        "blocks.{l}.attention_norm": LAYER + "pre_attn_norm",
        "blocks.{l}.attention_post_norm": LAYER + "post_attn_norm",
        "blocks.{l}.feed_forward_norm": LAYER + "pre_moe_norm",
        "blocks.{l}.feed_forward_post_norm": LAYER + "post_moe_norm",
    }
    return {
        **COMMON_TENSORS,
        **attention_tensors(LAYER + "attn."),
        **expert_tensors("moe_block", ("linear", "linear_v", "linear_1")),
        **{
            f"{ours}.weight": (Stored((f"{theirs}.scale",)), Stored((f"{theirs}.weight",)))
            for ours, theirs in norms.items()
        },
    }


_GROK = Family(
    model_type="grok-1",
    architecture="Grok1ModelForCausalLM",
    keys={
        **KEYS_OF_EVEN_HEADS,
        "num_experts": "moe.experts", "num_experts_per_tok": "moe.experts_per_token",
        "intermediate_size": "moe.d_ff", "attn_output_multiplier": "attention.scale",
        "max_attn_value": "attention.logit_cap", "embedding_multiplier_scale": "embedding_multiplier",
        "output_multiplier_scale": "logits_multiplier", "router_aux_loss_coef": "moe.balance_loss",
    },
    defaults={
        **COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_attn_value": 30.0,
    },
    fixed={"norm_place": "both", "moe.renormalize": False},
    rules=(rope(), even_heads(), _grok_activation()),
    tensors=_grok_names(),
)  # fmt: skip

SOFTMAX = (
    _MIXTRAL, _QWEN3_MOE, _OLMOE, _QWEN2_MOE, _FLEX_OLMO, _GRANITE, _PHIMOE, _HUNYUAN, _GPT_OSS, _ERNIE, _DBRX, _GROK,
)  # fmt: skip
