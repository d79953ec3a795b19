"""Every named model against the counts of its published weights."""

from __future__ import annotations

import dataclasses
import re

import pytest

from moiety.config import EncoderDecoderConfig, ModelConfig, MoEConfig, from_dict, to_dict
from moiety.cost import kv_bytes_per_token, parameters, weight_bytes
from moiety.errors import ConfigError
from moiety.registry import NOT_YET, REGISTRY, UNDISCLOSED, lookup, lookup_decoder

# Each row was counted on the transformers class of the architecture, built on the meta device.
# One rule holds for all: everything that is stored with the weights counts, the selection bias included,
# and multi-token-prediction layers and vision towers do not.
# name: total, active, active without input embedding
GOLDEN_COUNTS = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744, 38_955_423_744),
    "mixtral-8x22b-instruct": (140_630_071_296, 39_161_468_928, 38_960_142_336),
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496, 2_618_935_296),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520, 21_568_433_664),
    "qwen3-coder-480b-a35b": (480_154_875_392, 35_474_765_312, 34_541_270_528),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2_689_173_504, 2_378_008_576),
    "qwen2-57b-a14b": (57_408_658_944, 14_249_270_784, 13_704_732_160),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704, 3_608_307_264),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912, 5_132_849_472),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280, 1_178_994_688),
    "granite-3.0-1b-a400m": (1_334_628_352, 428_658_688, 378_323_968),
    "granite-3.0-3b-a800m": (3_298_793_472, 882_874_368, 807_372_288),
    "dbrx": (131_596_523_520, 36_469_708_800, 35_853_146_112),
    "phi-3.5-moe": (41_873_153_344, 6_640_999_744, 6_509_665_600),
    "llama-4-scout": (107_769_861_120, 17_172_894_720, 16_138_408_960),
    "llama-4-maverick": (400_711_848_960, 17_184_691_200, 16_150_205_440),
    "glm-4.5": (352_797_829_024, 33_632_266_144, 32_856_319_904),
    "glm-4.5-air": (106_852_251_264, 13_424_129_664, 12_803_372_672),
    "minimax-m2": (228_689_764_864, 11_030_553_088, 10_415_956_480),
    "grok-1": (315_684_820_992, 83_756_587_008, 82_951_280_640),
    "grok-2": (269_515_497_472, 114_896_674_816, 113_822_932_992),
    "ernie-4.5-21b-a3b": (21_825_437_888, 3_352_150_208, 3_087_384_768),
    "ernie-4.5-300b-a47b": (299_484_163_264, 47_926_586_560, 47_079_337_152),
    "hunyuan-a13b": (80_393_183_232, 12_747_448_320, 12_222_476_288),
    "dots.llm1": (142_774_381_696, 14_016_588_928, 13_393_734_784),
    "flexolmo-7x7b": (33_270_665_216, 24_613_621_760, 24_202_579_968),
    "llama-2-70b": (68_976_648_192, 68_976_648_192, 68_714_504_192),
    "llama-3-70b": (70_553_706_496, 70_553_706_496, 69_503_033_344),
    "mistral-7b": (7_241_732_096, 7_241_732_096, 7_110_660_096),
    "switch-base-8": (619_339_008, 222_977_280, 198_302_976),
    "switch-base-16": (1_072_397_568, 223_051_008, 198_376_704),
    "switch-base-32": (1_978_514_688, 223_198_464, 198_524_160),
    "switch-base-64": (3_790_748_928, 223_493_376, 198_819_072),
    "switch-base-128": (7_415_217_408, 224_083_200, 199_408_896),
    "switch-base-256": (14_664_154_368, 225_262_848, 200_588_544),
    "switch-large-128": (26_309_291_008, 740_813_824, 707_914_752),
    "switch-xxl-128": (394_543_476_736, 11_016_318_976, 10_884_722_688),
    "switch-c-2048": (1_571_308_972_448, 1_728_326_048, 1_661_499_808),
}

# name: GB of weights at 16, 8 and 4 bits, and KiB of cache for each token at 16 bits (none: not a decoder)
GOLDEN_BYTES: dict[str, tuple[str, str, str, str | None]] = {
    "mixtral-8x7b": ("93.41", "46.70", "23.35", "128.0"),
    "mixtral-8x22b": ("281.24", "140.62", "70.31", "224.0"),
    "mixtral-8x22b-instruct": ("281.26", "140.63", "70.32", "224.0"),
    "deepseek-moe-16b": ("32.75", "16.38", "8.19", "224.0"),
    "deepseek-v2-lite": ("31.41", "15.71", "7.85", "30.4"),
    "deepseek-v2": ("471.48", "235.74", "117.87", "67.5"),
    "deepseek-v3": ("1342.05", "671.03", "335.51", "68.6"),
    "kimi-k2": ("2052.82", "1026.41", "513.20", "68.6"),
    "qwen3-30b-a3b": ("61.06", "30.53", "15.27", "96.0"),
    "qwen3-235b-a22b": ("470.19", "235.09", "117.55", "188.0"),
    "qwen3-coder-480b-a35b": ("960.31", "480.15", "240.08", "248.0"),
    "qwen1.5-moe-a2.7b": ("28.63", "14.32", "7.16", "192.0"),
    "qwen2-57b-a14b": ("114.82", "57.41", "28.70", "56.0"),
    "gpt-oss-20b": ("41.83", "20.91", "10.46", "48.0"),
    "gpt-oss-120b": ("233.66", "116.83", "58.41", "72.0"),
    "olmoe-1b-7b": ("13.84", "6.92", "3.46", "128.0"),
    "granite-3.0-1b-a400m": ("2.67", "1.33", "0.67", "48.0"),
    "granite-3.0-3b-a800m": ("6.60", "3.30", "1.65", "64.0"),
    "dbrx": ("263.19", "131.60", "65.80", "160.0"),
    "phi-3.5-moe": ("83.75", "41.87", "20.94", "128.0"),
    "llama-4-scout": ("215.54", "107.77", "53.88", "192.0"),
    "llama-4-maverick": ("801.42", "400.71", "200.36", "192.0"),
    "glm-4.5": ("705.60", "352.80", "176.40", "368.0"),
    "glm-4.5-air": ("213.70", "106.85", "53.43", "184.0"),
    "minimax-m2": ("457.38", "228.69", "114.34", "248.0"),
    "grok-1": ("631.37", "315.68", "157.84", "256.0"),
    "grok-2": ("539.03", "269.52", "134.76", "256.0"),
    "ernie-4.5-21b-a3b": ("43.65", "21.83", "10.91", "56.0"),
    "ernie-4.5-300b-a47b": ("598.97", "299.48", "149.74", "216.0"),
    "hunyuan-a13b": ("160.79", "80.39", "40.20", "128.0"),
    "dots.llm1": ("285.55", "142.77", "71.39", "992.0"),
    "flexolmo-7x7b": ("66.54", "33.27", "16.64", "512.0"),
    "llama-2-70b": ("137.95", "68.98", "34.49", "320.0"),
    "llama-3-70b": ("141.11", "70.55", "35.28", "320.0"),
    "mistral-7b": ("14.48", "7.24", "3.62", "128.0"),
    "switch-base-8": ("1.24", "0.62", "0.31", None),
    "switch-base-16": ("2.14", "1.07", "0.54", None),
    "switch-base-32": ("3.96", "1.98", "0.99", None),
    "switch-base-64": ("7.58", "3.79", "1.90", None),
    "switch-base-128": ("14.83", "7.42", "3.71", None),
    "switch-base-256": ("29.33", "14.66", "7.33", None),
    "switch-large-128": ("52.62", "26.31", "13.15", None),
    "switch-xxl-128": ("789.09", "394.54", "197.27", None),
    "switch-c-2048": ("3142.62", "1571.31", "785.65", None),
}

# Millions of router parameters as tabulated; the gate of Qwen's shared expert is not in that column.
GOLDEN_ROUTERS = {
    "mixtral-8x7b": "1.049",
    "deepseek-v2": "48.333",
    "deepseek-v3": "106.445",
    "kimi-k2": "165.174",
    "glm-4.5": "72.923",
    "glm-4.5-air": "23.599",
    "minimax-m2": "48.775",
    "dots.llm1": "31.989",
    "ernie-4.5-21b-a3b": "4.425",
    "gpt-oss-120b": "13.276",
    "switch-c-2048": "127.795",
}


def test_every_entry_has_golden_counts() -> None:
    assert set(GOLDEN_COUNTS) == set(REGISTRY)
    assert set(GOLDEN_BYTES) == set(REGISTRY)


@pytest.mark.parametrize("name", GOLDEN_COUNTS)
def test_parameters_are_exact(name: str) -> None:
    counts = parameters(lookup(name))
    assert (counts.total, counts.active, counts.active_without_input_embedding) == GOLDEN_COUNTS[name]
    assert sum(counts.components.values()) == counts.total
    assert sum(counts.active_components.values()) == counts.active
    assert min(counts.components.values()) >= 0


@pytest.mark.parametrize("name", GOLDEN_BYTES)
def test_weight_and_cache_bytes(name: str) -> None:
    config = lookup(name)
    *weights, cache = GOLDEN_BYTES[name]
    assert [f"{weight_bytes(config, bits) / 1e9:.2f}" for bits in (16, 8, 4)] == weights
    if cache is None:
        assert isinstance(config, EncoderDecoderConfig)
    else:
        assert isinstance(config, ModelConfig)
        assert f"{kv_bytes_per_token(config) / 1024:.1f}" == cache


@pytest.mark.parametrize("name", GOLDEN_ROUTERS)
def test_router_parameters(name: str) -> None:
    assert f"{parameters(lookup(name)).components['routers'] / 1e6:.3f}" == GOLDEN_ROUTERS[name]


def test_published_active_figures() -> None:
    """The two makers that leave embeddings out: gpt-oss the input one, MiniMax both."""
    gpt_oss = parameters(lookup("gpt-oss-120b"))
    assert round(gpt_oss.active_without_input_embedding / 1e9, 1) == 5.1
    minimax = parameters(lookup("minimax-m2"))
    assert minimax.active_without_embeddings == minimax.active - 2 * 200_064 * 3072


@pytest.mark.parametrize("name", REGISTRY)
def test_entry_has_a_source_and_survives_json(name: str) -> None:
    assert "/" in REGISTRY[name].source
    config = lookup(name)
    assert from_dict(type(config), to_dict(config)) == config


def test_routing_of_some_entries() -> None:
    deepseek_v3 = lookup_decoder("deepseek-v3").moe
    assert deepseek_v3 is not None
    assert (deepseek_v3.experts, deepseek_v3.experts_per_token, deepseek_v3.shared_d_ff) == (256, 8, 2048)
    assert (deepseek_v3.router, deepseek_v3.groups, deepseek_v3.groups_kept) == ("sigmoid", 8, 4)
    assert (deepseek_v3.group_score, deepseek_v3.scale, deepseek_v3.renormalize) == ("top2", 2.5, True)
    deepseek_v2 = lookup_decoder("deepseek-v2").moe
    assert deepseek_v2 is not None
    assert (deepseek_v2.router, deepseek_v2.groups, deepseek_v2.groups_kept) == ("softmax", 8, 3)
    assert (deepseek_v2.group_score, deepseek_v2.scale, deepseek_v2.renormalize) == ("max", 16.0, False)
    gpt_oss = lookup_decoder("gpt-oss-20b")
    assert isinstance(gpt_oss.moe, MoEConfig)
    assert gpt_oss.moe.router_bias and gpt_oss.moe.bias
    assert gpt_oss.attention.sinks and gpt_oss.attention.window_layers == tuple(range(0, 24, 2))
    maverick = lookup_decoder("llama-4-maverick")
    assert len(maverick.moe_layers) == 24


def test_what_has_no_parameters() -> None:
    granite = lookup_decoder("granite-3.0-1b-a400m")
    assert (granite.embedding_multiplier, granite.residual_multiplier) == (12.0, 0.22)
    assert (granite.attention.scale, granite.logits_multiplier) == (1 / 64, 1 / 6)
    gpt_oss = lookup_decoder("gpt-oss-120b")
    assert gpt_oss.moe is not None and gpt_oss.moe.activation == "clamped_swiglu"
    rope = gpt_oss.attention.rope
    assert rope is not None and (rope.kind, rope.factor, rope.truncate) == ("yarn", 32.0, False)
    for name, factor, mscale in (
        ("deepseek-v2-lite", 40, 0.707), ("deepseek-v3", 40, 1.0), ("kimi-k2", 32, 1.0),
    ):  # fmt: skip
        attention = lookup_decoder(name).attention
        assert attention.rope is not None and attention.rope_pairs == "interleaved"
        assert (attention.rope.factor, attention.rope.mscale_all_dim) == (factor, mscale)
    scout, maverick = lookup_decoder("llama-4-scout"), lookup_decoder("llama-4-maverick")
    assert scout.attention.qk_norm == "l2_rotated" and maverick.attention.qk_norm == "none"
    for llama in (scout, maverick):
        assert llama.moe is not None and llama.moe.weigh_input and llama.attention.chunked
        assert llama.attention.rope_layers == llama.attention.window_layers
        assert llama.attention.rope_layers is not None and len(llama.attention.rope_layers) == 36
    grok = lookup_decoder("grok-1")
    assert grok.attention.logit_cap == 30 and grok.logits_multiplier == pytest.approx(3**-0.5)
    assert lookup_decoder("dbrx").attention.clip_qkv == 8


@pytest.mark.parametrize("name", [name for name in REGISTRY if not name.startswith("switch")])
def test_the_options_fit_the_model_code(name: str) -> None:
    """A twin of a few layers and units with every option of the entry can be built and runs."""
    import torch

    from moiety.model.transformer import Transformer

    big = lookup_decoder(name)
    layers = 4
    keep = {
        field: tuple(layer for layer in getattr(big.attention, field) if layer < layers)
        for field in ("window_layers", "rope_layers")
        if getattr(big.attention, field) is not None
    }
    mla = big.attention.mla and dataclasses.replace(
        big.attention.mla,
        q_rank=min(big.attention.mla.q_rank, 8),
        kv_rank=8,
        nope_dim=8,
        rope_dim=8,
        value_dim=8,
    )
    attention = dataclasses.replace(
        big.attention, heads=4, kv_heads=4 if mla else 2, head_dim=16, mla=mla, **keep
    )
    moe = big.moe and dataclasses.replace(
        big.moe, experts=16, experts_per_token=min(big.moe.experts_per_token, 2), d_ff=8,
        shared_d_ff=min(big.moe.shared_d_ff, 8),
    )  # fmt: skip
    small = dataclasses.replace(
        big, vocab_size=31, d_model=24, layers=layers, attention=attention, d_ff=16, moe=moe,
        dense_layers=tuple(layer for layer in big.dense_layers if layer < layers - 1),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        hidden = Transformer(small).eval()(torch.randint(0, 31, (1, 7))).hidden
    assert hidden.shape == (1, 7, 24) and hidden.isfinite().all()


@pytest.mark.parametrize("name", NOT_YET)
def test_hybrids_have_counts_and_a_source(name: str) -> None:
    entry = NOT_YET[name]
    assert "/" in entry.source and 0 < entry.active < entry.total


@pytest.mark.parametrize("name", UNDISCLOSED)
def test_reports_are_dated(name: str) -> None:
    for report in UNDISCLOSED[name]:
        assert report.said and report.by and re.fullmatch(r"20\d\d(-\d\d){0,2}", report.date)
        assert not re.search(r"\d", report.said) or "rumour, unconfirmed" in report.said


def test_lookup_ignores_case_and_outer_spaces() -> None:
    assert lookup(" Mixtral-8x7B ") == lookup("mixtral-8x7b")


@pytest.mark.parametrize("name", UNDISCLOSED)
def test_undisclosed_models_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="undisclosed"):
        lookup(name)


@pytest.mark.parametrize("name", NOT_YET)
def test_hybrids_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be described yet: \d+ of its \d+ layers"):
        lookup(name)


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mixtral-8x7b'") as near:
        lookup("mixtral-8x7")
    assert near.value.exit_code == 2
    with pytest.raises(ConfigError, match="known are"):
        lookup("zzz")
    with pytest.raises(ConfigError, match="no model ''"):
        lookup("")


def test_an_encoder_decoder_is_not_a_decoder() -> None:
    with pytest.raises(ConfigError, match="encoder-decoder"):
        lookup_decoder("switch-base-8")
    assert lookup_decoder("mistral-7b") == lookup("mistral-7b")


def test_names_are_lower_case_and_in_one_table_only() -> None:
    names = [*REGISTRY, *NOT_YET, *UNDISCLOSED]
    assert len(set(names)) == len(names)
    assert all(name == name.lower().strip() for name in names)
