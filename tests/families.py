"""Random settings of every family, in transformers' words: sizes differ, so that a transposed weight cannot fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

__all__ = ["FAMILY_SETTINGS", "random_settings"]

Settings = dict[str, Any]


def random_settings(name: str, seed: int) -> Settings:
    """What to give to the family's config class."""
    return FAMILY_SETTINGS[name](Random(f"{name} {seed}"))


def _base(rng: Random, *, whole_heads: bool = False, head_dim: bool = True) -> Settings:
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3])
    width = rng.choice([4, 6, 8, 10])
    hidden = rng.randint(17, 40)
    if whole_heads or not head_dim:  # wide enough that norms do not magnify rounding
        width += 0 if head_dim else 4 * (heads < 4)
        hidden = heads * (max(width, 20 // heads) if head_dim else width)
    settings = {
        "vocab_size": rng.randint(50, 90),
        "hidden_size": hidden,
        "intermediate_size": rng.randint(11, 30),
        "num_hidden_layers": rng.randint(2, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.4,
        "hidden_act": rng.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh", "relu"]),
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if head_dim:
        settings["head_dim"] = width
    return settings


def _flag(rng: Random, share: float = 0.5) -> bool:
    return rng.random() < share


def _rope(rng: Random, settings: Settings, *, plain: float = 0.3) -> Settings:
    """Plain or stretched rotary positions, short enough that stretching shows within 24 tokens."""
    theta = rng.choice([100.0, 500.0, 10_000.0])
    if rng.random() < plain:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    kind = rng.choice(["linear", "dynamic", "yarn", "llama3", "longrope"])
    factor = rng.choice([2.0, 4.0, 2.5])
    parameters: Settings = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    more: Settings = {}
    if kind == "dynamic":
        more = {"max_position_embeddings": 9}
    elif kind == "yarn":
        parameters |= {"original_max_position_embeddings": rng.choice([16, 32])}
        if _flag(rng):
            parameters |= {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": _flag(rng)}
        if _flag(rng, 0.3):
            parameters["attention_factor"] = 1.25
    elif kind == "llama3":
        parameters |= {
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16
        }  # fmt: skip
    elif kind == "longrope":
        pairs = settings["head_dim"] // 2 if "head_dim" in settings else None
        pairs = pairs or settings["hidden_size"] // settings["num_attention_heads"] // 2
        parameters |= {
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [1.5 + 0.7 * pair for pair in range(pairs)],
            "original_max_position_embeddings": rng.choice([13, 40]),
        }
        if _flag(rng):
            del parameters["factor"]
    return {"rope_parameters": parameters, **more}


def _moe(rng: Random, experts: str, chosen: str = "num_experts_per_tok") -> Settings:
    count = rng.randint(3, 9)
    return {experts: count, chosen: rng.randint(1, min(count, 4))}


def _groups(rng: Random, *, least: int) -> Settings:
    """Experts in groups of at least `least`, and a choice that the kept groups can serve."""
    groups = rng.choice([1, 2, 3, 4])
    size = rng.randint(least, 4)
    kept = rng.randint(1, groups)
    return {
        "n_routed_experts": groups * size,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": rng.randint(1, min(kept * size, 4)),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "n_shared_experts": rng.choice([1, 2]),
        "moe_intermediate_size": rng.randint(5, 16),
    }


def _latent(rng: Random, settings: Settings) -> Settings:
    del settings["head_dim"]
    return {
        "num_key_value_heads": settings["num_attention_heads"],
        "q_lora_rank": rng.choice([None, 7, 12]),
        "kv_lora_rank": rng.choice([9, 14]),
        "qk_nope_head_dim": rng.choice([5, 8]),
        "qk_rope_head_dim": rng.choice([4, 6]),
        "v_head_dim": rng.choice([3, 7, 10]),
        "attention_bias": _flag(rng, 0.3),
        "first_k_dense_replace": rng.randint(0, settings["num_hidden_layers"] - 1),
    }


def _latent_rope(rng: Random) -> Settings:
    theta = rng.choice([100.0, 10_000.0])
    if _flag(rng):
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    mscale, all_dim = rng.choice([(1.0, 1.0), (0.707, 0.707), (1.0, 0.5)])
    parameters = {
        "rope_type": "yarn", "rope_theta": theta, "factor": rng.choice([4.0, 40.0]), "beta_fast": 32, "beta_slow": 1,
        "mscale": mscale, "mscale_all_dim": all_dim, "original_max_position_embeddings": 16,
    }  # fmt: skip
    return {"rope_parameters": parameters}


def _windows(rng: Random, settings: Settings) -> Settings:
    layers = settings["num_hidden_layers"]
    if not _flag(rng, 0.6):
        return {"use_sliding_window": False}
    chosen = {"use_sliding_window": True, "sliding_window": rng.choice([3, 7, 40])}
    if _flag(rng):
        return {**chosen, "max_window_layers": rng.randint(0, layers - 1)}
    types = [rng.choice(["sliding_attention", "full_attention"]) for _ in range(layers)]
    return {**chosen, "layer_types": types}


def _llama(rng: Random) -> Settings:
    base = _base(rng, whole_heads=True)
    return {**base, **_rope(rng, base), "attention_bias": _flag(rng), "mlp_bias": _flag(rng)}


def _mistral(rng: Random) -> Settings:
    base = _base(rng)
    return {**base, **_rope(rng, base), "sliding_window": rng.choice([None, 5])}


def _qwen2(rng: Random) -> Settings:
    base = _base(rng)
    return {**base, **_rope(rng, base), **_windows(rng, base)}


def _qwen3(rng: Random) -> Settings:
    base = _base(rng)
    return {**base, **_rope(rng, base), **_windows(rng, base), "attention_bias": _flag(rng)}


def _mixtral(rng: Random) -> Settings:
    base = _base(rng)
    return {
        **base,
        **_rope(rng, base),
        **_moe(rng, "num_local_experts"),
        "sliding_window": rng.choice([None, 6]),
    }


def _sparse_step(rng: Random, settings: Settings) -> Settings:
    layers = settings["num_hidden_layers"]
    if _flag(rng):
        return {"decoder_sparse_step": rng.choice([1, 2])}
    return {"mlp_only_layers": sorted(rng.sample(range(layers), rng.randint(0, layers - 1)))}


def _qwen2_moe(rng: Random) -> Settings:
    base = _base(rng)
    return {
        **base, **_rope(rng, base), **_moe(rng, "num_experts"), **_sparse_step(rng, base), **_windows(rng, base),
        "moe_intermediate_size": rng.randint(5, 16), "shared_expert_intermediate_size": rng.randint(5, 16),
        "norm_topk_prob": _flag(rng), "qkv_bias": _flag(rng),
    }  # fmt: skip


def _qwen3_moe(rng: Random) -> Settings:
    base = _base(rng)
    return {
        **base, **_rope(rng, base), **_moe(rng, "num_experts"), **_sparse_step(rng, base),
        "moe_intermediate_size": rng.randint(5, 16), "norm_topk_prob": _flag(rng), "attention_bias": _flag(rng),
        "use_sliding_window": _flag(rng, 0.3), "sliding_window": 5,
    }  # fmt: skip


def _olmoe(rng: Random, *, head_dim: bool = False) -> Settings:
    base = _base(rng, head_dim=head_dim)
    return {
        **base, **_rope(rng, base), **_moe(rng, "num_experts"), "norm_topk_prob": _flag(rng),
        "attention_bias": _flag(rng), "clip_qkv": rng.choice([None, 0.7]),
    }  # fmt: skip


def _flex_olmo(rng: Random) -> Settings:
    settings = _olmoe(rng, head_dim=_flag(rng))
    del settings["clip_qkv"]
    return settings


def _deepseek_v2(rng: Random) -> Settings:
    base = _base(rng, whole_heads=True)
    groups = _groups(rng, least=1)
    method = rng.choice(["greedy", "group_limited_greedy"])
    # transformers views pairs as complex numbers, which only even strides allow
    latent = {**_latent(rng, base), "qk_nope_head_dim": 8, "kv_lora_rank": rng.choice([10, 14])}
    return {**base, **latent, **_latent_rope(rng), **groups, "topk_method": method, "mlp_bias": _flag(rng)}


def _deepseek_v3(rng: Random) -> Settings:
    base = _base(rng)
    latent = _latent(rng, base)
    return {
        **base, **latent, **_latent_rope(rng), **_groups(rng, least=2), "norm_topk_prob": _flag(rng, 0.7),
        "rope_interleave": _flag(rng, 0.8),
    }  # fmt: skip


def _glm4(rng: Random) -> Settings:
    base = _base(rng)
    base["head_dim"] = rng.choice([4, 8])
    rope = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": rng.choice([0.5, 1.0])}
    return {
        **base, **_groups(rng, least=2), "rope_parameters": rope, "norm_topk_prob": _flag(rng, 0.7),
        "attention_bias": _flag(rng), "use_qk_norm": _flag(rng), "first_k_dense_replace": rng.choice([0, 1]),
    }  # fmt: skip


def _dots1(rng: Random) -> Settings:
    base = _base(rng)
    return {
        **base, **_rope(rng, base), **_groups(rng, least=2), "norm_topk_prob": _flag(rng, 0.7),
        "attention_bias": _flag(rng), "first_k_dense_replace": rng.choice([0, 1]),
        "sliding_window": rng.choice([None, 4]), "max_window_layers": 1,
    }  # fmt: skip


def _ernie(rng: Random) -> Settings:
    base = _base(rng)
    rope = {"rope_type": "default", "rope_theta": rng.choice([100.0, 5e5])}
    return {
        **base, **_moe(rng, "moe_num_experts", "moe_k"), "rope_parameters": rope,
        "moe_num_shared_experts": rng.choice([0, 1, 2]), "moe_intermediate_size": rng.randint(5, 16),
        "moe_layer_start_index": rng.choice([0, 1]), "moe_layer_interval": rng.choice([1, 2]),
        "moe_layer_end_index": rng.choice([-1, 1]), "use_bias": _flag(rng),
    }  # fmt: skip


def _gpt_oss(rng: Random) -> Settings:
    base = {**_base(rng), "hidden_act": "silu"}
    settings = {
        **base, **_moe(rng, "num_local_experts"), "sliding_window": rng.choice([3, 6]),
        "attention_bias": _flag(rng, 0.7), "swiglu_limit": rng.choice([7.0, 1.5]),
    }  # fmt: skip
    if _flag(rng):
        kinds = [
            rng.choice(["sliding_attention", "full_attention"]) for _ in range(base["num_hidden_layers"])
        ]
        settings["layer_types"] = kinds
    return {**settings, **(_rope(rng, base) if _flag(rng) else {})}


def _granite(rng: Random) -> Settings:
    base = _base(rng, head_dim=_flag(rng))
    return {
        **base, **_rope(rng, base), **_moe(rng, "num_local_experts"), "attention_bias": _flag(rng),
        "embedding_multiplier": rng.choice([1.0, 3.0]), "residual_multiplier": rng.choice([1.0, 0.22]),
        "attention_multiplier": rng.choice([0.125, 0.5, 1.0]), "logits_scaling": rng.choice([1.0, 6.0, 0.7]),
    }  # fmt: skip


def _phimoe(rng: Random) -> Settings:
    base = _base(rng, head_dim=_flag(rng))
    rope: Settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
    if _flag(rng):
        pairs = (base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"]) // 2
        rope = {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 300.0, "short_mscale": 1.1, "long_mscale": 1.3,
                "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
                "long_factor": [1.5 + 0.7 * pair for pair in range(pairs)],
                "original_max_position_embeddings": rng.choice([13, 40]),
            }
        }  # fmt: skip
    return {
        **base, **rope, "num_local_experts": rng.randint(3, 8), "num_experts_per_tok": 2,
        "attention_bias": _flag(rng), "lm_head_bias": _flag(rng), "sliding_window": rng.choice([None, 6]),
        "router_jitter_noise": rng.choice([0.01, 0.3, 0.6]),
    }  # fmt: skip


def _minimax(rng: Random) -> Settings:
    base = {**_base(rng), "head_dim": rng.choice([8, 12])}
    rope: Settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
    if _flag(rng, 0.7):
        rope["rotary_dim"] = base["head_dim"] // 2
    return {**base, **rope, **_moe(rng, "num_local_experts")}


def _hunyuan(rng: Random) -> Settings:
    base = _base(rng)
    settings = {**base, **_moe(rng, "num_experts", "moe_topk"), "attention_bias": _flag(rng)}
    if _flag(rng):
        return {
            **settings,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "alpha": 50.0, "factor": 1.0},
        }
    return {**settings, **_rope(rng, base)}


def _dbrx(rng: Random) -> Settings:
    base = _base(rng, head_dim=False)
    theta = rng.choice([100.0, 5e5])
    count = rng.randint(3, 8)
    return {
        "d_model": base["hidden_size"], "n_heads": base["num_attention_heads"], "max_seq_len": 64,
        "n_layers": base["num_hidden_layers"], "vocab_size": base["vocab_size"], "rope_theta": theta,
        "attn_config": {
            "kv_n_heads": base["num_key_value_heads"], "clip_qkv": rng.choice([8, 0.8]), "rope_theta": theta
        },
        "ffn_config": {
            "ffn_hidden_size": rng.randint(5, 16), "moe_num_experts": count,
            "moe_top_k": rng.randint(1, min(count, 4)), "ffn_act_fn": {"name": base["hidden_act"]},
            "moe_normalize_expert_weights": rng.choice([1.0, None]),
        },
    }  # fmt: skip


def _llama4(rng: Random) -> Settings:
    base = {**_base(rng), "num_hidden_layers": rng.randint(2, 5)}
    layers = base["num_hidden_layers"]
    settings = {
        **base, **_moe(rng, "num_local_experts"), "intermediate_size_mlp": rng.randint(11, 30),
        "use_qk_norm": _flag(rng), "attention_bias": _flag(rng), "attention_chunk_size": rng.choice([4, 7]),
        "attn_temperature_tuning": _flag(rng, 0.7), "floor_scale": 5, "attn_scale": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    }  # fmt: skip
    if _flag(rng):
        settings["rope_parameters"] = {
            "rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": rng.choice([1.0, 4.0]), "original_max_position_embeddings": 16,
        }  # fmt: skip
    if _flag(rng):
        settings["no_rope_layers"] = [rng.choice([0, 1]) for _ in range(layers - 1)] + [1]
    else:
        settings["no_rope_layer_interval"] = rng.choice([2, 4])
    if _flag(rng):
        settings["moe_layers"] = sorted(rng.sample(range(layers), rng.randint(1, layers)))
    else:
        settings["interleave_moe_layer_step"] = rng.choice([1, 2])
    return settings


FAMILY_SETTINGS: Mapping[str, Callable[[Random], Settings]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "flex_olmo": _flex_olmo,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4,
    "dots1": _dots1,
    "ernie4_5_moe": _ernie,
    "gpt_oss": _gpt_oss,
    "granitemoe": _granite,
    "phimoe": _phimoe,
    "minimax_m2": _minimax,
    "hunyuan_v1_moe": _hunyuan,
    "dbrx": _dbrx,
    "llama4_text": _llama4,
}
