"""Tiny models of every kind, and what transformers calls them: sizes differ, so a transposed weight cannot fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.model import checkpoint
from moiety.model.transformer import Transformer


def assert_exact(ours: Tensor | None, true: Tensor | None, name: str = "") -> None:
    """Equal as far as the order of a float64 sum allows."""
    assert ours is not None and true is not None, name
    torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")


def attention(**changes: Any) -> AttentionConfig:
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 6, "rope_theta": 500.0}
    return AttentionConfig(**sizes | changes)


def experts(**changes: Any) -> MoEConfig:
    sizes: dict[str, Any] = {"experts": 5, "experts_per_token": 2, "d_ff": 14, "balance_loss": 0.001}
    return MoEConfig(**sizes | changes)


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"vocab_size": 61, "d_model": 20, "layers": 3, "d_ff": 26}
    return ModelConfig(**{**sizes, "attention": attention(), **changes})


CONFIGS: Mapping[str, ModelConfig] = {
    "mixtral": config(moe=experts(), d_ff=14),
    "qwen3_moe": config(
        attention=attention(qk_norm="head", qkv_bias=True, out_bias=True),
        moe=experts(experts=7, experts_per_token=3),
        dense_layers=(1,),
        norm_eps=1e-3,
    ),
    "qwen3_moe_plain": config(
        attention=attention(qk_norm="head", kv_heads=1),
        moe=experts(renormalize=False, activation="gelu_tanh"),
        activation="gelu_tanh",
        tied=True,
    ),
    "olmoe": config(
        d_model=24,
        attention=attention(qk_norm="full"),
        moe=experts(experts_per_token=3, renormalize=False),
        d_ff=14,
    ),
    "llama": config(attention=attention(heads=5, kv_heads=1), tied=True),
    "llama_biases": config(attention=attention(qkv_bias=True, out_bias=True, kv_heads=4), norm_eps=1e-4),
    "all_biases": config(
        attention=attention(qkv_bias=True, out_bias=True),
        moe=experts(bias=True, router_bias=True, shared_d_ff=18, shared_bias=True),
        dense_layers=(1,),
        feed_forward_bias=True,
    ),
    "shared": config(
        attention=attention(kv_heads=1, qkv_bias=True),
        moe=experts(shared_d_ff=18, shared_gate=True, scale=1.5),
    ),
    "sigmoid": config(
        moe=experts(
            experts=8,
            experts_per_token=3,
            router="sigmoid",
            selection_bias=True,
            groups=4,
            groups_kept=2,
            scale=2.5,
            shared_d_ff=14,
        ),
        dense_layers=(0, 2),
        tied=True,
    ),
    "softmax_groups": config(
        moe=experts(experts=6, groups=3, groups_kept=2, group_score="max", selection_bias=True), layers=2
    ),
    "switch": config(moe=experts(experts_per_token=1, router="switch"), layers=1),
    "relu": config(
        attention=attention(rope_fraction=0.7, out_bias=True),
        moe=experts(gated=False, activation="relu", bias=True, router_bias=True),
        dense_layers=(0,),
        activation="relu",
        gated=False,
    ),
}
# What has a twin in transformers: its class of config, and what this config says in its words.
TWINS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "mixtral": (
        transformers.MixtralConfig,
        {"intermediate_size": 14, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "moe_intermediate_size": 14,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    "qwen3_moe_plain": (
        transformers.Qwen3MoeConfig,
        {
            "moe_intermediate_size": 14,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": (
        transformers.OlmoeConfig,
        {
            "hidden_size": 24,
            "intermediate_size": 14,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
            "head_dim": None,
            "eos_token_id": None,
        },
    ),
    "llama": (
        transformers.LlamaConfig,
        {"num_attention_heads": 5, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama_biases": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 4, "attention_bias": True, "rms_norm_eps": 1e-4},
    ),
}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights that keep activations near 1 and leave nothing at 0 or 1, biases and norms included."""
    for name, parameter in model.named_parameters():
        if name.endswith(("embed.weight", "embed_tokens.weight")):
            parameter.normal_()
        elif name.endswith("bias"):
            parameter.normal_(std=0.3)
        elif parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.normal_(mean=1.0, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.normal_(std=0.2)


def model(
    name: str, *, dtype: torch.dtype = torch.float32, checkpointing: bool = False, **changes: Any
) -> Transformer:
    """A tiny model with random weights, which the seed of the test decides; `changes` are to its config."""
    made = Transformer(config(**changes) if name == "" else CONFIGS[name], checkpointing=checkpointing)
    fill(made)
    return made.to(dtype)


def clone(original: Transformer, **options: Any) -> Transformer:
    """Another model with the same weights."""
    other = Transformer(original.config, **options).to(original.embed.weight.dtype)
    other.load_state_dict(original.state_dict())
    return other


def tokens(of: Transformer | ModelConfig, *shape: int) -> Tensor:
    vocabulary = (of.config if isinstance(of, Transformer) else of).vocab_size
    return torch.randint(vocabulary, shape)


def twin_from(original: Transformer, folder: Path) -> Any:
    """The same model in transformers, by way of a checkpoint that we write."""
    checkpoint.save(original, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER).eval()


def twin(name: str) -> Any:
    """A random model of transformers that `CONFIGS[name]` describes; nothing of ours is asked."""
    kind, values = TWINS[name]
    common = {
        "vocab_size": 61,
        "hidden_size": 20,
        "intermediate_size": 26,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "tie_word_embeddings": False,
    }
    said = {key: value for key, value in {**common, **values}.items() if value is not None or "eos" in key}
    made = transformers.AutoModelForCausalLM.from_config(kind(**said), **EAGER)
    fill(made)
    return made.eval()
