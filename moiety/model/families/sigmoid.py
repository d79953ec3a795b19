"""Families whose router is a sigmoid, and DeepSeek-V2, whose successors they are."""

from __future__ import annotations

import dataclasses
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
    LAYER,
    LEAVES,
    SHARED,
    WHOLE_HEADS,
    expert_tensors,
    one,
    shared_tensors,
)
from moiety.model.families.rope import rope
from moiety.model.families.rules import (
    biases,
    dense_layers_first,
    groups,
    late,
    latent_attention,
    moe_layers_named,
    norm_or_none,
    shared_experts,
    windows,
)
from moiety.model.families.values import Values

__all__ = ["SIGMOID"]

_GROUPED: Mapping[str, str | tuple[str, ...]] = {
    "n_routed_experts": "moe.experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "routed_scaling_factor": "moe.scale",
    "intermediate_size": "d_ff",
    "moe_intermediate_size": "moe.d_ff",
    "hidden_act": ("moe.activation", "activation"),
}
_LATENT_KEYS = {
    key: path for key, path in COMMON_KEYS.items() if key not in ("num_key_value_heads", "head_dim")
}
_LATENT_IGNORED = frozenset({"head_dim", "qk_head_dim", "ep_size"})
_GROUPED_TENSORS = {
    **COMMON_TENSORS,
    **DENSE_TENSORS,
    **expert_tensors(),
    **shared_tensors("mlp.shared_experts"),
}
_SIGMOID = {"moe.router": "sigmoid", "moe.selection_bias": True}


def _no_prediction() -> Rule:
    """Layers of multi-token prediction are left out, so a file that we write has none."""
    keys = ("num_nextn_predict_layers", "num_mtp_layers")
    return Rule(
        keys=keys, read=lambda values, match: {}, write=lambda config: {"num_nextn_predict_layers": 0}
    )


def _v2_choice() -> Rule:
    """Group-limited or plain choice, and what becomes of the weights.

    With norm_topk_prob the authors' code divides the weights by their sum instead of scaling them; transformers
    does not look at it.
    """

    def read(values: Values, match: Match) -> dict[str, Any]:
        if values.flag("norm_topk_prob") and match == "original":
            return {"moe.renormalize": True, "moe.scale": 1.0}
        return {"moe.renormalize": False}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        method = "greedy" if config.moe.groups == 1 else "group_limited_greedy"
        return {"topk_method": method, "norm_topk_prob": config.moe.renormalize}

    return Rule(keys=("norm_topk_prob", "topk_method"), read=read, write=write)


_DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys={**_LATENT_KEYS, **_GROUPED},
    aliases={"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"},
    defaults={
        **COMMON_DEFAULTS, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
        "topk_method": "greedy", "mlp_bias": False,
    },
    absent={"n_shared_experts": 2},
    fixed={"moe.group_score": "max"},
    rules=(
        latent_attention(), rope(), dense_layers_first(), shared_experts(), groups(), _v2_choice(),
        biases("mlp_bias", "n_shared_experts"), _no_prediction(),
    ),
    constants={"scoring_func": "softmax", "moe_layer_freq": 1},
    allowed={"topk_method": ("greedy", "group_limited_greedy")},
    ignored=_LATENT_IGNORED,
    needs={**WHOLE_HEADS, **SHARED},
    tensors=_GROUPED_TENSORS,
)  # fmt: skip
_DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys={**_LATENT_KEYS, **_GROUPED, "norm_topk_prob": "moe.renormalize"},
    aliases={"num_local_experts": "n_routed_experts"},
    defaults={
        **COMMON_DEFAULTS, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
        "rope_interleave": True,
    },
    absent={"n_shared_experts": 1, "n_group": 8, "topk_group": 4},
    fixed=_SIGMOID,
    rules=(
        latent_attention(pairs="rope_interleave"), rope(), dense_layers_first(), shared_experts(), groups(),
        _no_prediction(),
    ),
    constants={
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
    },
    ignored=_LATENT_IGNORED,
    needs=SHARED,
    tensors=_GROUPED_TENSORS,
)  # fmt: skip
# The same class under another name, so that servers know whose tokenizer it is.
_KIMI_K2 = dataclasses.replace(_DEEPSEEK_V3, model_type="kimi_k2", read_only=True)

_GLM4 = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys={
        **COMMON_KEYS, **_GROUPED, "norm_topk_prob": "moe.renormalize", "attention_bias": "attention.qkv_bias",
    },
    aliases={"num_local_experts": "n_routed_experts"},
    defaults={
        **COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1, "use_qk_norm": False,
    },
    absent={"n_shared_experts": 1},
    fixed=_SIGMOID,
    rules=(
        rope(partial=0.5), dense_layers_first(), shared_experts(), groups(), norm_or_none("use_qk_norm", "head"),
        _no_prediction(),
    ),
    allowed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    needs=SHARED,
    tensors=_GROUPED_TENSORS,
)  # fmt: skip
_DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    keys={**COMMON_KEYS, **_GROUPED, "norm_topk_prob": "moe.renormalize", "attention_bias": BIASES},
    aliases={"num_local_experts": "n_routed_experts"},
    defaults={
        **COMMON_DEFAULTS, "norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
        "n_shared_experts": None, "max_window_layers": 62,
    },
    absent={"sliding_window": 4096},
    fixed={**_SIGMOID, "attention.qk_norm": "head"},
    rules=(
        rope(), dense_layers_first(), shared_experts(), groups(),
        windows(
            default=late,
            typed=True, more_keys=("max_window_layers",),
        ),
    ),
    constants={"scoring_func": "sigmoid"},
    allowed={"topk_method": ("noaux_tc",), "use_sliding_window": (False,)},
    needs=SHARED,
    tensors=_GROUPED_TENSORS,
)  # fmt: skip
_MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    keys={
        **COMMON_KEYS, "num_local_experts": "moe.experts", "num_experts_per_tok": "moe.experts_per_token",
        "router_aux_loss_coef": "moe.balance_loss", "intermediate_size": "moe.d_ff",
        "hidden_act": "moe.activation",
    },
    aliases={"num_experts": "num_local_experts"},
    defaults=COMMON_DEFAULTS,
    absent={"head_dim": 128},
    fixed={**_SIGMOID, "attention.qk_norm": "full"},
    rules=(rope(5_000_000.0, partial=1.0, rotary_dim=True),),
    # what vLLM and the authors' code look at, and the one value of each that is computed here
    constants={
        "scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True,
        "shared_intermediate_size": 0,
    },
    allowed={"attn_type_list": (1,), "attention_bias": (False,), "sliding_window": ()},
    ignored=frozenset({
        "layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta",
        "max_model_len", "mlp_intermediate_size", "mtp_transformer_layers", "num_mtp_modules",
        "router_jitter_noise", "shared_moe_mode", "use_mtp",
    }),
    tensors={
        **COMMON_TENSORS,
        **expert_tensors(
            "block_sparse_moe", ("w1", "w3", "w2"), bias="e_score_correction_bias", new_bias="e_score_correction_bias"
        ),
    },
)  # fmt: skip


def _llama4_positions() -> Rule:
    """Which layers rotate, which see a chunk only, and how queries of those that do not rotate grow."""
    chunks = windows(
        key="attention_chunk_size",
        default=lambda values, layers: [
            at for at, rotates in enumerate(_rotating(values, layers)) if rotates
        ],
        typed=True,
        word="chunked_attention",
        unused=8192,
    )

    def read(values: Values, match: Match) -> dict[str, Any]:
        layers = values.layers()
        rotating = tuple(at for at, rotates in enumerate(_rotating(values, layers)) if rotates)
        tuned = values["attn_temperature_tuning"]
        if not isinstance(tuned, (bool, int)):
            raise FormatError(f"config.json has attn_temperature_tuning {tuned!r}; true or false is wanted")
        return {
            **chunks.read(values, match),
            "attention.rope_layers": None if len(rotating) == layers else rotating,
            "attention.query_scale": values.number("attn_scale") if tuned else 0.0,
            "attention.query_scale_floor": values.whole("floor_scale"),
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        attention = config.attention
        rotating = range(config.layers) if attention.rope_layers is None else attention.rope_layers
        return {
            **chunks.write(config),
            "no_rope_layers": [int(layer in rotating) for layer in range(config.layers)],
            "attn_temperature_tuning": attention.query_scale > 0,
            "attn_scale": attention.query_scale or 0.1,
            "floor_scale": attention.query_scale_floor,
        }

    keys = (
        "no_rope_layers",
        "no_rope_layer_interval",
        "attn_temperature_tuning",
        "attn_scale",
        "floor_scale",
    )
    return Rule(keys=(*keys, *chunks.keys), read=read, write=write)


def _rotating(values: Values, layers: int) -> list[bool]:
    """For each layer whether it rotates; despite its name, `no_rope_layers` says 1 for those that do."""
    if values.get("no_rope_layers"):
        said = values.wholes("no_rope_layers")
        if len(said) < layers:
            raise FormatError(f"config.json has {len(said)} no_rope_layers; there are {layers} layers")
        return [bool(one) for one in said[:layers]]
    every = values.whole("no_rope_layer_interval")
    if not every:
        raise FormatError("config.json has no_rope_layer_interval 0; at least 1 is wanted")
    return [(layer + 1) % every != 0 for layer in range(layers)]


_FEED_FORWARD = LAYER + "feed_forward."
_LLAMA4 = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    keys={
        **COMMON_KEYS, "num_local_experts": "moe.experts", "num_experts_per_tok": "moe.experts_per_token",
        "router_aux_loss_coef": "moe.balance_loss", "intermediate_size": ("moe.d_ff", "moe.shared_d_ff"),
        "intermediate_size_mlp": "d_ff", "hidden_act": ("moe.activation", "activation"),
        "attention_bias": BIASES,
    },
    defaults={
        **COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "moe_layers": None, "interleave_moe_layer_step": 1,
        "use_qk_norm": True, "no_rope_layer_interval": 4, "attn_temperature_tuning": True, "attn_scale": 0.1,
        "floor_scale": 8192,
    },
    absent={"attention_chunk_size": 8192, "head_dim": 128},
    fixed={
        "moe.router": "sigmoid", "moe.renormalize": False, "moe.weigh_input": True,
        "attention.rope_pairs": "interleaved",
    },
    rules=(
        rope(500_000.0), moe_layers_named(), norm_or_none("use_qk_norm", "l2_rotated"), _llama4_positions(),
    ),
    ignored=frozenset({"router_jitter_noise"}),
    needs=SHARED,
    tensors={
        **COMMON_TENSORS,
        "blocks.{l}.feed_forward.gate_up": one(*(f"{_FEED_FORWARD}{leaf}.weight" for leaf in LEAVES[:2])),
        "blocks.{l}.feed_forward.down": one(f"{_FEED_FORWARD}{LEAVES[2]}.weight"),
        "blocks.{l}.feed_forward.gate.weight": one(_FEED_FORWARD + "router.weight"),
        "blocks.{l}.feed_forward.experts.gate_up": (
            Stored((_FEED_FORWARD + "experts.gate_up_proj",), transposed=True),
        ),
        "blocks.{l}.feed_forward.experts.down": (
            Stored((_FEED_FORWARD + "experts.down_proj",), transposed=True),
        ),
        **shared_tensors("feed_forward.shared_expert"),
    },
)  # fmt: skip
# The text model of the one that also sees: only its own tensors may be in the file.
_LLAMA4_INSIDE = dataclasses.replace(
    _LLAMA4, model_type="llama4", inside="text_config", prefix="language_model.", read_only=True
)

SIGMOID = (_DEEPSEEK_V3, _DEEPSEEK_V2, _DOTS1, _GLM4, _MINIMAX_M2, _LLAMA4, _KIMI_K2, _LLAMA4_INSIDE)
