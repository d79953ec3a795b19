"""Families: what a `config.json` says is read, or refused; never ignored."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.errors import ConfigError, FormatError
from moiety.model.families import FAMILIES, OWN, family_for, family_of

DENSE = ModelConfig(
    vocab_size=50,
    d_model=12,
    layers=3,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=6),
    d_ff=20,
)
MOE = dataclasses.replace(DENSE, moe=MoEConfig(experts=5, experts_per_token=2, d_ff=7), d_ff=20)
QWEN = dataclasses.replace(
    MOE, attention=dataclasses.replace(MOE.attention, qk_norm="head"), dense_layers=(1,)
)
OLMOE = dataclasses.replace(
    MOE,
    d_model=24,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=6, qk_norm="full"),
    moe=MoEConfig(experts=5, experts_per_token=1, d_ff=7, renormalize=False, z_loss=0.5),
)


def moe(**changes: Any) -> ModelConfig:
    assert MOE.moe is not None
    return dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, **changes))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (DENSE, "llama"),
        (dataclasses.replace(DENSE, tied=True, activation="gelu_tanh"), "llama"),
        (MOE, "mixtral"),
        (moe(balance_loss=0.5, z_loss=0.0, bias_rate=0.7, group_score="max", activation="relu"), "mixtral"),
        (dataclasses.replace(MOE, attention=dataclasses.replace(MOE.attention, window=9)), "mixtral"),
        (QWEN, "qwen3_moe"),
        (OLMOE, "olmoe"),
        (moe(shared_d_ff=4), "moiety"),
        (moe(router="sigmoid", selection_bias=True), "moiety"),
        (moe(renormalize=False), "moiety"),
        (moe(scale=2.0), "moiety"),
        (moe(gated=False), "moiety"),
        (moe(bias=True), "moiety"),
        (moe(router_bias=True), "moiety"),
        (dataclasses.replace(MOE, dense_layers=(0,)), "moiety"),
        (dataclasses.replace(MOE, attention=dataclasses.replace(MOE.attention, rope_fraction=0.7)), "moiety"),
        (dataclasses.replace(DENSE, attention=dataclasses.replace(DENSE.attention, qkv_bias=True)), "moiety"),
        (dataclasses.replace(DENSE, norm="layer"), "moiety"),
    ],
)
def test_the_family_says_the_config_exactly(config: ModelConfig, name: str) -> None:
    family, reason = family_for(config)
    assert family.model_type == name and (name in reason or "cannot say" in reason)
    written = family.write(config)
    assert family_of(written) is family and family.read(written) == config


def test_the_reason_names_what_is_missing() -> None:
    assert "mixtral, cannot say moe.shared_d_ff" in family_for(moe(shared_d_ff=4)).reason
    assert "attention.qkv_bias" not in family_for(DENSE).reason


@pytest.mark.parametrize("config", [DENSE, MOE, QWEN, OLMOE])
def test_both_spellings_of_rope(config: ModelConfig) -> None:
    family = family_for(config).family
    written = {key: value for key, value in family.write(config).items() if not key.startswith("rope")}
    base = dataclasses.replace(config, attention=dataclasses.replace(config.attention, rope_theta=123.0))
    for rope in (
        {"rope_theta": 123.0},
        {"rope_theta": 123, "rope_scaling": None},
        {"rope_theta": 123.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}},
    ):
        assert family.read({**written, **rope}) == base
    for rope in (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"rope_scaling": "default"},
        {"rope_scaling": ["default"]},
        {"rope_parameters": {"rope_theta": 1.0, "rope_type": "llama3"}},
        {"rope_parameters": {"rope_theta": 1.0, "factor": 8}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}},
        {"rope_theta": 1.0, "partial_rotary_factor": 0.5},
    ):
        with pytest.raises(FormatError, match=r"rope|rotary"):
            family.read({**written, **rope})


@pytest.mark.parametrize("config", [DENSE, MOE, QWEN, OLMOE])
def test_bad_values_are_refused(config: ModelConfig) -> None:
    family = family_for(config).family
    written = family.write(config)
    tried = 0
    for key in family.keys:
        without = {name: value for name, value in written.items() if name != key}
        if key not in family.defaults:
            with pytest.raises(FormatError, match=key):
                family.read(without)
        for value in ("x", -1, [1], {}, 1.5, True, 10**30):
            try:
                read = family.read({**written, key: value})
            except (FormatError, ConfigError):
                tried += 1
            else:
                assert read != config or value == written[key] or key == "attention_bias", (key, value)
    assert tried > 40
    for change in (
        {"quantization_config": {}},
        {"clip_qkv": 8},
        {"mlp_bias": True},
        {"use_sliding_window": True},
    ):
        with pytest.raises(FormatError, match=next(iter(change))):
            family.read({**written, **change})
    assert family.read({**written, "something_new": None, "use_cache": False}) == config
    with pytest.raises(FormatError, match="notes"):
        family.read({**written, "moiety": {"layers": 4}})


def test_danger_defaults() -> None:
    family = FAMILIES["mixtral"]
    written = family.write(MOE)
    for key in ("head_dim", "num_key_value_heads"):
        del written[key]
    written["num_attention_heads"] = 2
    assert family.read(written).attention == AttentionConfig(heads=2, kv_heads=2, head_dim=6)
    with pytest.raises(FormatError, match="head_dim"):
        family.read({**written, "num_attention_heads": 5})
    assert family.read({**written, "head_dim": None, "tie_word_embeddings": None}).tied is False
    del written["rope_theta"], written["rope_parameters"]
    assert family.read(written).attention.rope_theta == 1e6
    with pytest.raises(FormatError, match="twice"):
        family.read({**written, "num_experts": 4})
    qwen = {key: value for key, value in FAMILIES["qwen3_moe"].write(QWEN).items() if key != "norm_topk_prob"}
    with pytest.raises(FormatError, match="norm_topk_prob"):
        FAMILIES["qwen3_moe"].read(qwen)
    for values in ({}, {"model_type": "bert"}, {"model_type": ["llama"]}):
        with pytest.raises(FormatError, match="model_type"):
            family_of(values)
    with pytest.raises(FormatError, match="lacks model"):
        OWN.read({"model_type": "moiety"})


def test_pieces_cover_every_row_once() -> None:
    shapes = {
        "blocks.2.attention.qkv.weight": (24 + 12 + 12, 12),
        "blocks.2.feed_forward.experts.gate_up": (5, 14, 12),
        "blocks.2.feed_forward.experts.down": (5, 12, 7),
    }
    pieces = list(FAMILIES["mixtral"].pieces(MOE, shapes))
    assert len(pieces) == 3 + 10 + 5
    layer = "model.layers.2."
    assert pieces[1] == (f"{layer}self_attn.k_proj.weight", "blocks.2.attention.qkv.weight", None, 24, 36)
    up = f"{layer}block_sparse_moe.experts.4.w3.weight"
    assert [piece[2:] for piece in pieces if piece.theirs == up] == [(4, 7, 14)]
    covered = {(piece.ours, piece.expert, row) for piece in pieces for row in range(piece.start, piece.stop)}
    assert len(covered) == sum(piece.stop - piece.start for piece in pieces) == 48 + 5 * 14 + 5 * 12
    assert FAMILIES["llama"].ignores("model.layers.17.self_attn.rotary_emb.inv_freq")
    assert not FAMILIES["llama"].ignores("model.layers.17.self_attn.q_proj.weight")
