"""Families: what a `config.json` says is read, or refused; never ignored."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moiety.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
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
        (dataclasses.replace(DENSE, attention=dataclasses.replace(DENSE.attention, qkv_bias=True)), "qwen2"),
        (dataclasses.replace(DENSE, d_model=14), "mistral"),
        (moe(shared_d_ff=4), "moiety"),
        (moe(router="sigmoid", selection_bias=True), "moiety"),
        (moe(renormalize=False), "moiety"),
        (moe(scale=2.0), "moiety"),
        (moe(gated=False), "moiety"),
        (moe(bias=True), "moiety"),
        (moe(router_bias=True), "moiety"),
        (dataclasses.replace(MOE, dense_layers=(0,)), "moiety"),
        (dataclasses.replace(MOE, attention=dataclasses.replace(MOE.attention, rope_fraction=0.7)), "moiety"),
        (dataclasses.replace(MOE, head_bias=True), "moiety"),
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
    linear = RopeConfig(kind="linear", factor=2.0)
    stretched = dataclasses.replace(base, attention=dataclasses.replace(base.attention, rope=linear))
    for rope in (
        {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 123.0, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 123.0, "rope_type": "linear", "factor": 2.0, "beta_fast": None}},
    ):
        assert family.read({**written, **rope}) == stretched
    for rope in (
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 3.0}},
        {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3}},
        {"rope_scaling": {"type": "longrope", "short_factor": 1.0, "long_factor": [2.0] * 3}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}},
        {"rope_scaling": {"type": "mrope", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"rope_scaling": "default"},
        {"rope_scaling": ["default"]},
        {"rope_parameters": {"rope_theta": 1.0, "rope_type": "llama3"}},
        {"rope_parameters": {"rope_theta": 1.0, "factor": 8}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}},
        {"rope_theta": 1.0, "partial_rotary_factor": 0.5},
    ):
        with pytest.raises(FormatError, match=r"rope|rotary|factor"):
            family.read({**written, **rope})


def test_yarn_is_written_with_its_edges() -> None:
    """At their defaults too: vLLM reads gpt-oss with config.rope_parameters["beta_fast"]."""
    stretched = RopeConfig(kind="yarn", factor=4.0, original_positions=16)
    attention = dataclasses.replace(DENSE.attention, rope=stretched)
    written = FAMILIES["llama"].write(dataclasses.replace(DENSE, attention=attention))
    for key in ("rope_parameters", "rope_scaling"):
        assert (written[key]["beta_fast"], written[key]["beta_slow"]) == (32.0, 1.0)
    assert "beta_fast" not in FAMILIES["llama"].write(DENSE)["rope_parameters"]


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
        {"compression_config": {}},
        {"clip_qkv": "8"},
        {"use_sliding_window": 1},
        {"num_hidden_layers": 10**9},
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
    assert pieces[1][:6] == (
        f"{layer}self_attn.k_proj.weight",
        "blocks.2.attention.qkv.weight",
        None,
        24,
        36,
        0,
    )
    up = f"{layer}block_sparse_moe.experts.4.w3.weight"
    assert [piece[2:7] for piece in pieces if piece.theirs == up] == [(4, 7, 14, 0, (7, 12))]
    covered = {(piece.ours, piece.expert, row) for piece in pieces for row in range(piece.start, piece.stop)}
    assert len(covered) == sum(piece.stop - piece.start for piece in pieces) == 48 + 5 * 14 + 5 * 12


def test_pieces_of_other_layouts() -> None:
    up, down = "blocks.1.feed_forward.experts.gate_up", "blocks.1.feed_forward.experts.down"
    shapes = {up: (5, 14, 12), down: (5, 12, 7), "blocks.1.feed_forward.selection_bias": (5,)}
    new = {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    stack, narrow = FAMILIES["qwen3_moe"].pieces(MOE, {up: shapes[up], down: shapes[down]}, new)
    assert stack[2:] == (None, 0, 14, 1, (5, 14, 12), False, False)
    assert narrow[2:] == (None, 0, 12, 1, (5, 12, 7), False, False)
    slabs = list(FAMILIES["dbrx"].pieces(MOE, {up: shapes[up], down: shapes[down]}))
    assert [piece[2:] for piece in slabs] == [
        (None, 0, 7, 1, (35, 12), False, False),
        (None, 7, 14, 1, (35, 12), False, False),
        (None, 0, 12, 1, (35, 12), True, False),
    ]
    alternating, turned = FAMILIES["gpt_oss"].pieces(MOE, {up: shapes[up], down: shapes[down]})
    assert alternating[2:] == (None, 0, 14, 1, (5, 12, 14), True, True)
    assert turned[2:] == (None, 0, 12, 1, (5, 7, 12), True, False)
    *_, bias = FAMILIES["ernie4_5_moe"].pieces(MOE, shapes)
    assert bias.shape == (1, 5) and bias.theirs == "model.layers.1.mlp.moe_statics.e_score_correction_bias"


def test_tensors_that_hold_nothing_of_the_model() -> None:
    table = "model.layers.17.self_attn.rotary_emb.inv_freq"
    assert FAMILIES["llama"].ignored_names([table, "model.norm.weight"], DENSE) == {table}
    assert OWN.ignored_names([table], DENSE) == set()
    extra = {f"model.layers.3.{name}" for name in ("eh_proj.weight", "enorm.weight", "mlp.gate.weight")}
    deepseek = FAMILIES["deepseek_v3"]
    assert deepseek.ignored_names(extra | {"model.layers.2.mlp.gate.weight"}, MOE) == extra
    lost = {name for name in extra if "eh_proj" not in name}  # a layer too many is not of another kind
    assert deepseek.ignored_names(lost, MOE) == set()
    assert FAMILIES["ernie4_5_moe"].ignored_names(["model.mtp_block.0.x", "mtp"], MOE) == {
        "model.mtp_block.0.x"
    }


def test_the_text_model_inside_a_larger_one() -> None:
    assert MOE.moe is not None
    inner = {
        "model_type": "llama4_text", "vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 99,
        "intermediate_size": 7, "intermediate_size_mlp": 20, "num_local_experts": 5, "num_experts_per_tok": 1,
    }  # fmt: skip
    outer = {"model_type": "llama4", "text_config": inner, "vision_config": {"hidden_size": 3}}
    family = family_of(outer)
    assert family.read(outer) == family_of(inner).read(inner)
    assert family.read({**outer, "tie_word_embeddings": True}).tied
    (piece,) = family.pieces(MOE, {"embed.weight": (50, 12)})
    assert piece.theirs == "language_model.model.embed_tokens.weight"
    assert family.head == "language_model.lm_head.weight"
    assert family_for(family.read(outer)).family.model_type == "llama4_text"
    with pytest.raises(FormatError, match="text_config"):
        family.read({"model_type": "llama4", **inner, "text_config": None})


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "moiety"])
def test_no_value_of_any_kind_makes_a_traceback(name: str) -> None:
    family = FAMILIES[name]
    sizes = dict.fromkeys((*family.keys, *(key for rule in family.rules for key in rule.keys)), 2)
    tried = 0
    for key in sizes:
        for value in (None, True, -1, 0, 1, 10**30, 1.5, "x", [], [1], [None], {}, {"rope_type": []}, [[1]]):
            section, dot, inner = key.partition(".")
            values: dict[str, Any] = {"model_type": name, **{one: 2 for one in sizes if "." not in one}}
            values |= {
                part: {one.partition(".")[2]: 2 for one in sizes if one.startswith(part)}
                for part in family.sections
            }
            for plain in (
                "rope_scaling",
                "rope_parameters",
                "layer_types",
                "partial_rotary_factor",
                "rotary_dim",
            ):
                values.pop(plain, None)
            place = values[section] if dot else values
            place[inner if dot else key] = value
            values = {"model_type": name, family.inside: values} if family.inside else values
            try:
                family.read(values)
            except (FormatError, ConfigError):
                tried += 1
    assert tried > 20
