"""The `config.json` of published models: read without complaint, and the model is the one in the registry."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moiety import cost
from moiety.config import ModelConfig, RopeConfig
from moiety.model.families import FAMILIES, family_for, family_of
from moiety.registry import lookup_decoder

_NAMES = {
    "architectures": ["Any"],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
_USUAL = {
    **_NAMES,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
}
_YARN = {
    "type": "yarn",
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
}
_FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
_LONG = [1.0 + number / 10 for number in range(64)]

# What decides, as the files on the hub say it; generation settings and names left out where others have them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        **_USUAL, "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "sliding_window": None,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen1.5-moe-a2.7b": {
        **_USUAL, "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        **_USUAL, "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "olmoe-1b-7b": {
        **_USUAL, "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "pad_token_id": 1, "eos_token_id": 50279, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "flexolmo-7x7b": {
        **_USUAL, "model_type": "flex_olmo", "attention_bias": False, "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "norm_topk_prob": False,
        "num_attention_heads": 32, "num_experts": 7, "num_experts_per_tok": 5, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "deepseek-v2-lite": {
        **_USUAL, "model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
        "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    },
    "deepseek-v3": {
        **_USUAL, "model_type": "deepseek_v3", "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "quantization_config": _FP8, "rms_norm_eps": 1e-06,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
    },
    "kimi-k2": {
        **_USUAL, "model_type": "kimi_k2", "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 131072, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1,
        "n_routed_experts": 384, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "quantization_config": _FP8, "rms_norm_eps": 1e-06,
        "rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0},
        "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 163840,
    },
    "glm-4.5": {
        **_USUAL, "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 3, "head_dim": 128,
        "hidden_size": 5120, "intermediate_size": 12288, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 160, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 92,
        "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": True, "vocab_size": 151552,
        "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
    },
    "dots.llm1": {
        **_USUAL, "model_type": "dots1", "attention_bias": False, "first_k_dense_replace": 1, "hidden_size": 4096,
        "intermediate_size": 10944, "max_position_embeddings": 32768, "max_window_layers": 62,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 2,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 62,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000000, "routed_scaling_factor": 2.5,
        "sliding_window": None, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
        "use_sliding_window": False, "vocab_size": 152064,
    },
    "ernie-4.5-21b-a3b": {
        **_USUAL, "model_type": "ernie4_5_moe", "hidden_size": 2560, "intermediate_size": 12288,
        "max_position_embeddings": 131072, "moe_capacity": [64, 64, 64], "moe_gate": "topk",
        "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": 27, "moe_layer_interval": 1,
        "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": True,
        "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False,
        "vocab_size": 103424, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    "gpt-oss-20b": {
        **_USUAL, "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
        "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": False,
        "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
                         "original_max_position_embeddings": 4096, "truncate": False},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088,
    },
    "granite-3.0-1b-a400m": {
        **_USUAL, "model_type": "granitemoe", "attention_bias": False, "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0, "hidden_size": 1024, "intermediate_size": 512, "logits_scaling": 6.0,
        "max_position_embeddings": 4096, "num_attention_heads": 16, "num_experts_per_tok": 8,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True, "vocab_size": 49155,
    },
    "phi-3.5-moe": {
        **_USUAL, "model_type": "phimoe", "attention_bias": True, "hidden_dropout": 0.0, "hidden_size": 4096,
        "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": _LONG, "long_mscale": 1.243163121016122, "short_factor": _LONG,
                         "original_max_position_embeddings": 4096, "short_mscale": 1.243163121016122,
                         "type": "longrope"},
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072,
        "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "minimax-m2": {
        **_USUAL, "model_type": "minimax_m2", "attn_type_list": [1] * 62, "head_dim": 128, "hidden_size": 3072,
        "intermediate_size": 1536, "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0, "max_position_embeddings": 196608, "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1, "num_attention_heads": 48, "num_experts_per_tok": 8,
        "num_hidden_layers": 62, "num_key_value_heads": 8, "num_local_experts": 256, "num_mtp_modules": 3,
        "output_router_logits": False, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06,
        "quantization_config": {**_FP8, "fmt": "float8_e4m3fn"}, "rope_theta": 5000000, "rotary_dim": 64,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
        "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None,
        "tie_word_embeddings": False, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True,
        "vocab_size": 200064,
    },
    "hunyuan-a13b": {
        **_USUAL, "model_type": "hunyuan_v1_moe", "add_classification_head": False, "attention_bias": False,
        "attention_head_dim": 128, "class_num": 0, "cla_share_factor": 2, "dense_list": [4096, 0],
        "eod_token_id": 3, "group_limited_greedy": False, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 3072, "mask_init_id": 12, "max_position_embeddings": 32768, "mlp_bias": False,
        "moe_drop_tokens": False, "moe_intermediate_size": [3072] * 32, "moe_layer_num_skipped": 0,
        "moe_random_routing_dropped_token": False, "moe_topk": [8] * 32, "norm_topk_prob": True,
        "norm_type": "rms", "num_attention_heads": 32, "num_experts": 64, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_shared_expert": [1] * 32, "org_vocab_size": 128167, "pad_id": None,
        "pool_type": "last", "position_embedding_xdrope": False, "pretraining_tp": 1, "q_lora_rank": None,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "type": "dynamic"},
        "sep_token_id": 127962, "tie_word_embeddings": True, "use_cla": False, "use_mixed_mlp_moe": True,
        "use_qk_norm": True, "vocab_size": 128167,
    },
    "dbrx": {
        **_NAMES, "model_type": "dbrx",
        "attn_config": {"attn_pdrop": 0, "chunk_size_feed_forward": 0, "clip_qkv": 8, "id2label": {"0": "LABEL_0"},
                        "kv_n_heads": 8, "model_type": "", "return_dict": True, "rope_theta": 500000,
                        "temperature": 1.0, "tie_word_embeddings": True},
        "d_model": 6144, "emb_pdrop": 0.0,
        "ffn_config": {"ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 10752, "model_type": "",
                       "moe_jitter_eps": 0, "moe_loss_weight": 0.05, "moe_normalize_expert_weights": 1,
                       "moe_num_experts": 16, "moe_top_k": 4, "tie_word_embeddings": True,
                       "uniform_expert_assignment": False},
        "initializer_range": 0.02, "max_seq_len": 32768, "n_heads": 48, "n_layers": 40,
        "output_router_logits": False, "resid_pdrop": 0.0, "router_aux_loss_coef": 0.05,
        "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "llama-4-scout": {
        **_NAMES, "model_type": "llama4", "boi_token_index": 200080, "eoi_token_index": 200081,
        "image_token_index": 200092, "tie_word_embeddings": False, "vision_config": {"hidden_size": 1408},
        "text_config": {
            **_USUAL, "model_type": "llama4_text", "_attn_implementation_autoset": True, "attention_bias": False,
            "attention_chunk_size": 8192, "attn_scale": 0.1, "attn_temperature_tuning": 4, "floor_scale": 8192,
            "for_llm_compressor": False, "head_dim": 128, "hidden_size": 5120, "interleave_moe_layer_step": 1,
            "intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760,
            "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
            "num_key_value_heads": 8, "num_local_experts": 16, "output_router_logits": False,
            "pad_token_id": 200018, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "use_qk_norm": True, "vocab_size": 202048,
        },
    },
    "grok-1": {
        **_NAMES, "model_type": "grok-1", "attn_output_multiplier": 0.08838834764831845, "hidden_size": 6144,
        "embedding_multiplier_scale": 78.38367176906169, "intermediate_size": 32768, "max_attn_value": 30.0,
        "max_position_embeddings": 8192, "num_attention_heads": 48, "num_experts": 8, "num_experts_per_tok": 2,
        "num_hidden_layers": 64, "num_key_value_heads": 8, "output_multiplier_scale": 0.5773502691896257,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True, "vocab_size": 131072,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_model_of_the_registry(name: str) -> None:
    values = PUBLISHED[name]
    config = family_of(values).read(values)
    known = lookup_decoder(name)
    assert cost.parameters(config).components == cost.parameters(known).components
    for path in ("layers", "d_model", "tied", "norm", "norm_place", "norm_eps", "dense_layers"):
        assert getattr(config, path) == getattr(known, path), path
    assert config.moe is not None and known.moe is not None
    for path in (
        "router",
        "experts_per_token",
        "scale",
        "groups",
        "groups_kept",
        "selection_bias",
        "shared_gate",
    ):
        assert getattr(config.moe, path) == getattr(known.moe, path) or known.moe.router == "softmax", path
    for path in ("heads", "head_dim", "kv_heads", "rope_theta", "rope_fraction", "qk_norm"):
        same = getattr(config.attention, path) == getattr(known.attention, path)
        assert same or getattr(known.attention, path) == "none", path
    choice = family_for(config)
    assert choice.family.model_type != "moiety", choice.reason
    again = choice.family.read(choice.family.write(config))
    assert again == config


def read(name: str, **changes: Any) -> ModelConfig:
    values = PUBLISHED[name]
    return family_of(values).read({**values, **changes})


def test_what_no_parameter_count_shows() -> None:
    scout = read("llama-4-scout")
    assert scout.attention.rope == RopeConfig(
        kind="llama3", factor=16.0, original_positions=8192, low_freq_factor=1.0, high_freq_factor=1.0
    )
    assert scout.attention.rope_layers == tuple(layer for layer in range(48) if layer % 4 != 3)
    assert scout.attention.window_layers == scout.attention.rope_layers and scout.attention.chunked
    assert (scout.attention.qk_norm, scout.attention.query_scale) == ("l2_rotated", 0.1)
    assert scout.moe is not None and scout.moe.weigh_input and scout.moe.shared_d_ff == 8192
    oss = read("gpt-oss-20b").attention
    assert oss.rope == RopeConfig(kind="yarn", factor=32.0, original_positions=4096, truncate=False)
    assert oss.sinks and oss.window == 128 and oss.window_layers == tuple(range(0, 24, 2))
    granite = read("granite-3.0-1b-a400m")
    assert (granite.embedding_multiplier, granite.residual_multiplier) == (12.0, 0.22)
    assert (granite.attention.scale, granite.logits_multiplier) == (1 / 64, 1 / 6)
    hunyuan = read("hunyuan-a13b").attention
    assert hunyuan.rope == RopeConfig(kind="alpha", factor=1000.0) and hunyuan.qk_norm == "head_rotated"
    grok = read("grok-1")
    assert grok.attention.logit_cap == 30.0 and grok.logits_multiplier == 0.5773502691896257
    assert grok.moe is not None and grok.moe.activation == "gelu_tanh" and not grok.moe.renormalize
    phi = read("phi-3.5-moe")
    assert phi.attention.rope is not None and phi.attention.rope.factor == 32.0
    assert phi.moe is not None and phi.moe.router == "sparsemixer"
    lite = read("deepseek-v2-lite")
    assert lite.attention.rope_pairs == "interleaved" and lite.attention.mla is not None
    assert lite.attention.rope is not None and lite.attention.rope.mscale_all_dim == 0.707
    assert lite.moe is not None and not lite.moe.renormalize and lite.moe.group_score == "max"
    m2 = read("minimax-m2")
    assert m2.attention.rope_fraction == 0.5 and m2.attention.qk_norm == "full"
    ernie = read("ernie-4.5-21b-a3b")
    assert ernie.dense_layers == (0,) and ernie.attention.rope_pairs == "interleaved"


def test_where_transformers_departs_there_is_a_choice() -> None:
    dbrx, family = PUBLISHED["dbrx"], FAMILIES["dbrx"]
    assert family.read(dbrx).attention.rope_theta == 500_000
    assert family.read(dbrx, match="hf").attention.rope_theta == 10_000
    phi, family = PUBLISHED["phi-3.5-moe"], FAMILIES["phimoe"]
    original, theirs = family.read(phi).attention.rope, family.read(phi, match="hf").attention.rope
    assert original is not None and not original.always_short
    assert theirs == dataclasses.replace(original, always_short=True)
    grok, family = PUBLISHED["grok-1"], FAMILIES["grok-1"]
    ours, ported = family.read(grok).moe, family.read(grok, match="hf").moe
    assert ours is not None and ported == dataclasses.replace(ours, activation="gelu")
    lite, family = {**PUBLISHED["deepseek-v2-lite"], "norm_topk_prob": True}, FAMILIES["deepseek_v2"]
    ours, ported = family.read(lite).moe, family.read(lite, match="hf").moe
    assert ours is not None and ported is not None and ours.renormalize and not ported.renormalize
