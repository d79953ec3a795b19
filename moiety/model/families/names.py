"""Keys and names of tensors that most families have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiety.config import ModelConfig
from moiety.model.families.base import Stored

__all__ = [
    "BIASES",
    "COMMON_DEFAULTS",
    "COMMON_KEYS",
    "COMMON_TENSORS",
    "DENSE_TENSORS",
    "KEYS_OF_EVEN_HEADS",
    "LAYER",
    "LAYER_NORM_TENSORS",
    "LEAVES",
    "SHARED",
    "SWITCHED",
    "WHOLE_HEADS",
    "Ways",
    "attention_tensors",
    "expert_tensors",
    "has_shared",
    "one",
    "shared_tensors",
    "whole_heads",
]

Ways = tuple[Stored, ...]
Tensors = Mapping[str, Ways]

LAYER = "model.layers.{l}."
BLOCK = "blocks.{l}."
BIASES = ("attention.qkv_bias", "attention.out_bias")
# Their three matrices of a feed-forward: gate, up, down.
LEAVES = ("gate_proj", "up_proj", "down_proj")

COMMON_KEYS: Mapping[str, str | tuple[str, ...]] = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention.heads",
    "num_key_value_heads": "attention.kv_heads",
    "head_dim": "attention.head_dim",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}
COMMON_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": "=num_attention_heads",
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "router_aux_loss_coef": 0.001,
}


SWITCHED: Mapping[str, Any] = {"use_sliding_window": False, "max_window_layers": 28}
KEYS_OF_EVEN_HEADS = {key: path for key, path in COMMON_KEYS.items() if key != "head_dim"}


def whole_heads(config: ModelConfig) -> bool:
    """The heads divide the width, which some classes insist on."""
    return config.d_model % config.attention.heads == 0


def has_shared(config: ModelConfig) -> bool:
    """There is a shared expert, which some classes always build."""
    return config.moe is not None and config.moe.shared_d_ff > 0


WHOLE_HEADS = {"d_model that is no multiple of heads": whole_heads}
SHARED = {"moe.shared_d_ff of 0": has_shared}


def one(*names: str) -> Ways:
    """Stored under these names, each a block of our rows, and in no other way."""
    return (Stored(names),)


def attention_tensors(
    block: str = f"{LAYER}self_attn.", q_norm: str = "q_norm", k_norm: str = "k_norm"
) -> Tensors:
    """Query, key, value and output projections, and the norms of queries and keys."""
    tensors = {
        "out.weight": one(f"{block}o_proj.weight"),
        "out.bias": one(f"{block}o_proj.bias"),
        "q_norm.weight": one(f"{block}{q_norm}.weight"),
        "k_norm.weight": one(f"{block}{k_norm}.weight"),
        "sinks": one(f"{block}sinks"),
        "qkv.weight": one(*(f"{block}{part}_proj.weight" for part in "qkv")),
        "qkv.bias": one(*(f"{block}{part}_proj.bias" for part in "qkv")),
        "q.weight": one(f"{block}q_proj.weight"),
        "q_a.weight": one(f"{block}q_a_proj.weight"),
        "q_a.bias": one(f"{block}q_a_proj.bias"),
        "q_a_norm.weight": one(f"{block}q_a_layernorm.weight"),
        "q_b.weight": one(f"{block}q_b_proj.weight"),
        "kv_a.weight": one(f"{block}kv_a_proj_with_mqa.weight"),
        "kv_a.bias": one(f"{block}kv_a_proj_with_mqa.bias"),
        "kv_a_norm.weight": one(f"{block}kv_a_layernorm.weight"),
        "kv_b.weight": one(f"{block}kv_b_proj.weight"),
    }
    return {f"{BLOCK}attention.{ours}": ways for ours, ways in tensors.items()}


COMMON_TENSORS: Tensors = {
    "embed.weight": one("model.embed_tokens.weight"),
    "norm.weight": one("model.norm.weight"),
    "head.weight": one("lm_head.weight"),
    f"{BLOCK}attention_norm.weight": one(f"{LAYER}input_layernorm.weight"),
    f"{BLOCK}feed_forward_norm.weight": one(f"{LAYER}post_attention_layernorm.weight"),
    **attention_tensors(),
}
LAYER_NORM_TENSORS: Tensors = {
    "norm.bias": one("model.norm.bias"),
    "head.bias": one("lm_head.bias"),
    f"{BLOCK}attention_norm.bias": one(f"{LAYER}input_layernorm.bias"),
    f"{BLOCK}feed_forward_norm.bias": one(f"{LAYER}post_attention_layernorm.bias"),
}


def _feed_forward(ours: str, theirs: str) -> Tensors:
    gate, up, down = LEAVES
    return {
        f"{BLOCK}{ours}gate_up": one(f"{theirs}{gate}.weight", f"{theirs}{up}.weight"),
        f"{BLOCK}{ours}down": one(f"{theirs}{down}.weight"),
        f"{BLOCK}{ours}gate_up_bias": one(f"{theirs}{gate}.bias", f"{theirs}{up}.bias"),
        f"{BLOCK}{ours}down_bias": one(f"{theirs}{down}.bias"),
    }


DENSE_TENSORS: Tensors = _feed_forward("feed_forward.", f"{LAYER}mlp.")


def shared_tensors(block: str) -> Tensors:
    """A shared expert in `block`, and its gate."""
    theirs = f"{LAYER}{block}"
    return {
        **_feed_forward("feed_forward.shared.", f"{theirs}."),
        f"{BLOCK}feed_forward.shared_gate.weight": one(f"{theirs}_gate.weight"),
    }


def expert_tensors(
    block: str = "mlp",
    leaves: tuple[str, str, str] = LEAVES,
    *,
    router: str = "gate",
    bias: str = "gate.e_score_correction_bias",
    new_router: str = "gate",
    new_bias: str = "gate.e_score_correction_bias",
    row: bool = False,
) -> Tensors:
    """Experts stored one by one in `block`, their router, and its selection bias.

    Files that keep the names of transformers' modules in memory have a stack in one tensor, all below `mlp`.

    Args:
        block: Their module.
        leaves: Their gate, up and down projections.
        router: Their router.
        bias: Their selection bias.
        new_router: The same in memory.
        new_bias: The same in memory.
        row: The selection bias has a leading axis of 1.
    """
    theirs, new = f"{LAYER}{block}.", f"{LAYER}mlp."
    gate, up, down = (f"{theirs}experts.{{e}}.{leaf}.weight" for leaf in leaves)
    ours = f"{BLOCK}feed_forward."
    return {
        f"{ours}gate.weight": (Stored((f"{theirs}{router}.weight",)), Stored((f"{new}{new_router}.weight",))),
        f"{ours}selection_bias": (
            Stored((f"{theirs}{bias}",), row=row), Stored((f"{new}{new_bias}",), row=row)
        ),
        f"{ours}experts.gate_up": (Stored((gate, up)), Stored((f"{new}experts.gate_up_proj",))),
        f"{ours}experts.down": (Stored((down,)), Stored((f"{new}experts.down_proj",))),
    }  # fmt: skip
