"""Well-known models by name, as data: `lookup("mixtral-8x7b")`.

Sizes are exact: they give the parameter counts of the published weights (without multi-token-prediction
layers and vision towers). What has no parameters is here where it was published in a form that could be checked; an
entry says under `unknown` what is not. So an entry is for counting and planning; to run a model its own `config.json`
is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from moiety.config import (
    Architecture,
    AttentionConfig,
    EncoderDecoderConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from moiety.errors import ConfigError

__all__ = [
    "NOT_YET",
    "REGISTRY",
    "UNDISCLOSED",
    "Decoder",
    "Hybrid",
    "Report",
    "Switch",
    "lookup",
    "lookup_decoder",
]


@dataclass(frozen=True)
class Decoder:
    """One decoder-only model as a row of the table; `build` makes its config.

    `attention`, `moe` and `model` are further options of the three config classes; `unknown` is what the model
    computes besides, of which this table has no figures.
    """

    source: str
    shape: tuple[int, int, int, int, int, int]  # layers, d_model, heads, kv_heads, head_dim, vocab_size
    _: KW_ONLY
    positions: int
    experts: tuple[int, int, int] | None = None  # experts, experts_per_token, d_ff of one expert
    d_ff: int | None = None  # of the dense layers
    attention: Mapping[str, Any] = field(default_factory=dict)
    moe: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    unknown: str = ""

    def build(self) -> ModelConfig:
        """The model's config."""
        layers, d_model, heads, kv_heads, head_dim, vocab_size = self.shape
        moe = None
        if self.experts is not None:
            count, chosen, expert_d_ff = self.experts
            moe = MoEConfig(experts=count, experts_per_token=chosen, d_ff=expert_d_ff, **self.moe)
        d_ff = self.d_ff if self.d_ff is not None or moe is None else moe.d_ff
        assert d_ff is not None, f"a dense entry needs d_ff: {self.source}"
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            layers=layers,
            attention=AttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **self.attention),
            d_ff=d_ff,
            moe=moe,
            max_positions=self.positions,
            **self.model,
        )


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One Switch Transformer as a row of the table; `build` makes its config."""

    source: str
    shape: tuple[int, int, int, int]  # layers of each stack, d_model, heads, head_dim
    experts: int
    d_ff: int
    every: int = 2
    gated: bool = False

    def build(self) -> EncoderDecoderConfig:
        """The model's config."""
        layers, d_model, heads, head_dim = self.shape
        return EncoderDecoderConfig(
            vocab_size=32128,
            d_model=d_model,
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            moe_every=self.every,
            moe=MoEConfig(
                experts=self.experts,
                experts_per_token=1,
                d_ff=self.d_ff,
                router="switch",
                renormalize=False,
                activation="gelu_tanh" if self.gated else "relu",
                gated=self.gated,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """An open model with layers that `ModelConfig` cannot describe: where it is, its counts, and what is missing."""

    source: str
    total: int
    active: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What somebody said in public about a model whose maker did not publish its sizes."""

    said: str
    by: str
    date: str  # as exact as it is known: year, month, day


def lookup(name: str) -> Architecture:
    """The architecture of a well-known model.

    Args:
        name: The last part of its hub name, in any case.

    Raises:
        ConfigError: the name is unknown (with the nearest known one), the model's sizes were never
            published, or its layers are of a kind that `ModelConfig` cannot describe yet.
    """
    key = name.strip().lower()
    if key in REGISTRY:
        return REGISTRY[key].build()
    if key in UNDISCLOSED:
        raise ConfigError(
            f"the sizes of {name!r} are undisclosed: {_reported(UNDISCLOSED[key])}", hint="name an open model"
        )
    if key in NOT_YET:
        raise ConfigError(
            f"{name!r} cannot be described yet: {NOT_YET[key].reason}", hint=f"one of {_some_names()}"
        )
    close = difflib.get_close_matches(key, [*REGISTRY, *NOT_YET, *UNDISCLOSED], n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {_some_names()}"
    raise ConfigError(f"there is no model {name!r} in the registry", hint=hint)


def lookup_decoder(name: str) -> ModelConfig:
    """Like `lookup`, for what needs a decoder.

    Raises:
        ConfigError: as `lookup`, or the model is an encoder-decoder.
    """
    config = lookup(name)
    if isinstance(config, EncoderDecoderConfig):
        raise ConfigError(
            f"{name!r} is an encoder-decoder; this needs a decoder-only model",
            hint="its parameters can be counted",
        )
    return config


def _reported(reports: tuple[Report, ...]) -> str:
    return "; ".join(f"{one.said} ({one.by}, {one.date})" for one in reports)


def _some_names() -> str:
    return ", ".join(list(REGISTRY)[:8]) + f", ... ({len(REGISTRY)} in all)"


def _latent(q_rank: int = 1536, *, factor: float = 40.0, mscale: float = 1.0) -> dict[str, Any]:
    """Latent attention as in DeepSeek, with YaRN from 4096 positions on."""
    mla = MLAConfig(q_rank=q_rank, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    rope = RopeConfig(
        kind="yarn", original_positions=4096, factor=factor, mscale=mscale, mscale_all_dim=mscale
    )
    return {"mla": mla, "rope_pairs": "interleaved", "rope": rope}


def _leading(count: int) -> tuple[int, ...]:
    return tuple(range(count))


# fmt: off
# Options that the models of one family share.
_UNNORMALIZED: Mapping[str, Any] = {"renormalize": False}
_SIGMOID_BIAS: Mapping[str, Any] = {"router": "sigmoid", "selection_bias": True, "balance_loss": 0.0001}
_QWEN_SHARED: Mapping[str, Any] = {"renormalize": False, "shared_gate": True, "balance_loss": 0.001}
_QWEN3: Mapping[str, Any] = {
    "attention": {"qk_norm": "head", "rope_theta": 1e6},
    "moe": {"balance_loss": 0.001},
    "model": {"norm_eps": 1e-6},
}
_GRANITE: Mapping[str, Any] = {
    "attention": {"scale": 1 / 64},
    "moe": {"balance_loss": 0.001},
    "model": {
        "tied": True, "norm_eps": 1e-6, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "logits_multiplier": 1 / 6,
    },
}
_GPT_OSS_ATTENTION: Mapping[str, Any] = {
    "qkv_bias": True, "out_bias": True, "sinks": True, "window": 128, "rope_theta": 150_000.0,
    "rope": RopeConfig(kind="yarn", factor=32.0, original_positions=4096, truncate=False),
}
_GPT_OSS_MOE: Mapping[str, Any] = {"router_bias": True, "bias": True, "activation": "clamped_swiglu"}
_LLAMA4_MOE: Mapping[str, Any] = {
    "router": "sigmoid", "renormalize": False, "shared_d_ff": 8192, "weigh_input": True, "balance_loss": 0.001
}
# Three layers of four rotate and attend in chunks, the fourth does neither.
_LLAMA4_ROTATING = tuple(layer for layer in range(48) if layer % 4 != 3)
_LLAMA4_ATTENTION: Mapping[str, Any] = {
    "rope_theta": 500_000.0, "rope_pairs": "interleaved", "rope_layers": _LLAMA4_ROTATING,
    "window": 8192, "chunked": True, "window_layers": _LLAMA4_ROTATING, "query_scale": 0.1,
}

# Each model: where it is, its sizes, and what differs from the defaults.
_ONE_KIND: Mapping[str, Decoder] = {
    "mixtral-8x7b": Decoder(
        "mistralai/Mixtral-8x7B-v0.1, arXiv 2401.04088",
        (32, 4096, 32, 8, 128, 32000), experts=(8, 2, 14336), positions=32_768,
        attention={"rope_theta": 1e6}, moe={"balance_loss": 0.02},
    ),
    "mixtral-8x22b": Decoder(
        "mistralai/Mixtral-8x22B-v0.1",
        (56, 6144, 48, 8, 128, 32000), experts=(8, 2, 16384), positions=65_536,
        attention={"rope_theta": 1e6},
    ),
    "mixtral-8x22b-instruct": Decoder(
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        (56, 6144, 48, 8, 128, 32768), experts=(8, 2, 16384), positions=65_536,
        attention={"rope_theta": 1e6},
    ),
    "dbrx": Decoder(
        "databricks/dbrx-base",
        (40, 6144, 48, 8, 128, 100352), experts=(16, 4, 10752), positions=32_768,
        attention={"rope_theta": 500_000.0, "clip_qkv": 8.0}, moe={"balance_loss": 0.05}, model={"norm": "layer"},
    ),
    "phi-3.5-moe": Decoder(
        "microsoft/Phi-3.5-MoE-instruct, arXiv 2409.12136",
        (32, 4096, 32, 8, 128, 32064), experts=(16, 2, 6400), positions=131_072,
        attention={"qkv_bias": True, "out_bias": True},
        moe={"router": "sparsemixer", "balance_loss": 0.0},
        model={"norm": "layer", "norm_bias": True, "head_bias": True},
        unknown="the two tables of longrope factors and their scales: positions are plain here",
    ),
    "grok-1": Decoder(
        "xai-org/grok-1",
        (64, 6144, 48, 8, 128, 131072), experts=(8, 2, 32768), positions=8192,
        attention={"logit_cap": 30.0}, moe={"renormalize": False, "activation": "gelu_tanh"},
        model={
            "tied": True, "norm_place": "both", "embedding_multiplier": 78.38367176906169,
            "logits_multiplier": 0.5773502691896257,
        },
    ),
    "grok-2": Decoder(
        "xai-org/grok-2",
        (64, 8192, 64, 8, 128, 131072), experts=(8, 2, 16384), positions=131_072,
        attention={"rope_theta": 208_533_496.0, "logit_cap": 30.0},
        moe={
            "renormalize": False, "shared_d_ff": 32768, "activation": "gelu_tanh", "router_options": ("cap=30.0",),
        },
        model={
            "norm_place": "both", "embedding_multiplier": 8192**0.5, "logits_multiplier": 0.5, "logits_cap": 50.0,
        },
        unknown="the sum of experts and dense feed-forward is divided by sqrt(2) before its norm, which no option says",
    ),
    "olmoe-1b-7b": Decoder(
        "allenai/OLMoE-1B-7B-0924, arXiv 2409.02060",
        (16, 2048, 16, 16, 128, 50304), experts=(64, 8, 1024), positions=4096, attention={"qk_norm": "full"},
        moe=_UNNORMALIZED,
    ),
    "flexolmo-7x7b": Decoder(
        "allenai/FlexOlmo-7x7B-1T, arXiv 2507.07024",
        (32, 4096, 32, 32, 128, 100352), experts=(7, 5, 11008), positions=4096,
        attention={"qk_norm": "full", "rope_theta": 500_000.0}, moe=_UNNORMALIZED,
        model={"norm_place": "post", "norm_eps": 1e-6},
    ),
    "granite-3.0-1b-a400m": Decoder(
        "ibm-granite/granite-3.0-1b-a400m-base",
        (24, 1024, 16, 8, 64, 49155), experts=(32, 8, 512), positions=4096, **_GRANITE,
    ),
    "granite-3.0-3b-a800m": Decoder(
        "ibm-granite/granite-3.0-3b-a800m-base",
        (32, 1536, 24, 8, 64, 49155), experts=(40, 8, 512), positions=4096, **_GRANITE,
    ),
    "gpt-oss-20b": Decoder(
        "openai/gpt-oss-20b, arXiv 2508.10925",
        (24, 2880, 64, 8, 64, 201088), experts=(32, 4, 2880), positions=131_072,
        attention={**_GPT_OSS_ATTENTION, "window_layers": tuple(range(0, 24, 2))}, moe=_GPT_OSS_MOE,
    ),
    "gpt-oss-120b": Decoder(
        "openai/gpt-oss-120b, arXiv 2508.10925",
        (36, 2880, 64, 8, 64, 201088), experts=(128, 4, 2880), positions=131_072,
        attention={**_GPT_OSS_ATTENTION, "window_layers": tuple(range(0, 36, 2))}, moe=_GPT_OSS_MOE,
    ),
    "llama-4-scout": Decoder(
        "meta-llama/Llama-4-Scout-17B-16E, text model",
        (48, 5120, 40, 8, 128, 202048), experts=(16, 1, 8192), positions=10_485_760,
        attention={**_LLAMA4_ATTENTION, "qk_norm": "l2_rotated"}, moe=_LLAMA4_MOE,
        unknown="the factors by which positions are stretched: they are plain here",
    ),
    "llama-4-maverick": Decoder(
        "meta-llama/Llama-4-Maverick-17B-128E, text model",
        (48, 5120, 40, 8, 128, 202048), experts=(128, 1, 8192), d_ff=16384, positions=1_048_576,
        attention=_LLAMA4_ATTENTION, moe=_LLAMA4_MOE, model={"dense_layers": tuple(range(0, 48, 2))},
    ),
}

_DEEPSEEK: Mapping[str, Decoder] = {
    "deepseek-moe-16b": Decoder(
        "deepseek-ai/deepseek-moe-16b-base, arXiv 2401.06066",
        (28, 2048, 16, 16, 128, 102400), experts=(64, 6, 1408), d_ff=10944, positions=4096,
        moe={"renormalize": False, "shared_d_ff": 2816, "balance_loss": 0.001},
        model={"dense_layers": _leading(1), "norm_eps": 1e-6},
    ),
    "deepseek-v2-lite": Decoder(
        "deepseek-ai/DeepSeek-V2-Lite, arXiv 2405.04434",
        (27, 2048, 16, 16, 192, 102400), experts=(64, 6, 1408), d_ff=10944, positions=163_840,
        attention=_latent(q_rank=0, mscale=0.707),
        moe={"renormalize": False, "shared_d_ff": 2816, "balance_loss": 0.001},
        model={"dense_layers": _leading(1), "norm_eps": 1e-6},
    ),
    "deepseek-v2": Decoder(
        "deepseek-ai/DeepSeek-V2, arXiv 2405.04434",
        (60, 5120, 128, 128, 192, 102400), experts=(160, 6, 1536), d_ff=12288, positions=163_840,
        attention=_latent(mscale=0.707),
        moe={"renormalize": False, "shared_d_ff": 3072, "groups": 8, "groups_kept": 3, "group_score": "max",
             "scale": 16.0, "balance_loss": 0.003},
        model={"dense_layers": _leading(1), "norm_eps": 1e-6},
    ),
    "deepseek-v3": Decoder(
        "deepseek-ai/DeepSeek-V3-Base, arXiv 2412.19437",
        (61, 7168, 128, 128, 192, 129280), experts=(256, 8, 2048), d_ff=18432, positions=163_840,
        attention=_latent(),
        moe={**_SIGMOID_BIAS, "shared_d_ff": 2048, "groups": 8, "groups_kept": 4, "scale": 2.5},
        model={"dense_layers": _leading(3), "norm_eps": 1e-6},
    ),
    "kimi-k2": Decoder(
        "moonshotai/Kimi-K2-Base, arXiv 2507.20534",
        (61, 7168, 64, 64, 192, 163840), experts=(384, 8, 2048), d_ff=18432, positions=131_072,
        attention={**_latent(factor=32.0), "rope_theta": 50_000.0},
        moe={**_SIGMOID_BIAS, "shared_d_ff": 2048, "scale": 2.827},
        model={"dense_layers": _leading(1), "norm_eps": 1e-6},
    ),
    "glm-4.5": Decoder(
        "zai-org/GLM-4.5-Base, arXiv 2508.06471",
        (92, 5120, 96, 8, 128, 151552), experts=(160, 8, 1536), d_ff=12288, positions=131_072,
        attention={"qkv_bias": True, "qk_norm": "head", "rope_theta": 1e6, "rope_fraction": 0.5},
        moe={**_SIGMOID_BIAS, "shared_d_ff": 1536, "scale": 2.5}, model={"dense_layers": _leading(3)},
    ),
    "glm-4.5-air": Decoder(
        "zai-org/GLM-4.5-Air-Base, arXiv 2508.06471",
        (46, 4096, 96, 8, 128, 151552), experts=(128, 8, 1408), d_ff=10944, positions=131_072,
        attention={"qkv_bias": True, "rope_theta": 1e6, "rope_fraction": 0.5},
        moe={**_SIGMOID_BIAS, "shared_d_ff": 1408}, model={"dense_layers": _leading(1)},
    ),
    "dots.llm1": Decoder(
        "rednote-hilab/dots.llm1.base, arXiv 2506.05767",
        (62, 4096, 32, 32, 128, 152064), experts=(128, 6, 1408), d_ff=10944, positions=32_768,
        attention={"qk_norm": "head", "rope_theta": 1e7},
        moe={**_SIGMOID_BIAS, "shared_d_ff": 2816, "scale": 2.5}, model={"dense_layers": _leading(1)},
    ),
    "minimax-m2": Decoder(
        "MiniMaxAI/MiniMax-M2",
        (62, 3072, 48, 8, 128, 200064), experts=(256, 8, 1536), positions=196_608,
        attention={"qk_norm": "full", "rope_theta": 5e6, "rope_fraction": 0.5},
        moe={**_SIGMOID_BIAS, "balance_loss": 0.001}, model={"norm_eps": 1e-6},
    ),
}

_QWEN: Mapping[str, Decoder] = {
    "qwen3-30b-a3b": Decoder(
        "Qwen/Qwen3-30B-A3B, arXiv 2505.09388",
        (48, 2048, 32, 4, 128, 151936), experts=(128, 8, 768), positions=40_960, **_QWEN3,
    ),
    "qwen3-235b-a22b": Decoder(
        "Qwen/Qwen3-235B-A22B, arXiv 2505.09388",
        (94, 4096, 64, 4, 128, 151936), experts=(128, 8, 1536), positions=40_960, **_QWEN3,
    ),
    "qwen3-coder-480b-a35b": Decoder(
        "Qwen/Qwen3-Coder-480B-A35B-Instruct",
        (62, 6144, 96, 8, 128, 151936), experts=(160, 8, 2560), positions=262_144,
        attention={"qk_norm": "head", "rope_theta": 1e7}, moe={"balance_loss": 0.001},
        model={"norm_eps": 1e-6},
    ),
    "qwen1.5-moe-a2.7b": Decoder(
        "Qwen/Qwen1.5-MoE-A2.7B",
        (24, 2048, 16, 16, 128, 151936), experts=(60, 4, 1408), positions=8192,
        attention={"qkv_bias": True, "rope_theta": 1e6}, moe={**_QWEN_SHARED, "shared_d_ff": 5632},
        model={"norm_eps": 1e-6},
    ),
    "qwen2-57b-a14b": Decoder(
        "Qwen/Qwen2-57B-A14B, arXiv 2407.10671",
        (28, 3584, 28, 4, 128, 151936), experts=(64, 8, 2560), positions=131_072,
        attention={"qkv_bias": True, "rope_theta": 1e6}, moe={**_QWEN_SHARED, "shared_d_ff": 20480},
        model={"norm_eps": 1e-6},
    ),
    "ernie-4.5-21b-a3b": Decoder(
        "baidu/ERNIE-4.5-21B-A3B-Base-PT",
        (28, 2560, 20, 4, 128, 103424), experts=(64, 6, 1536), d_ff=12288, positions=131_072,
        attention={"rope_theta": 500_000.0, "rope_pairs": "interleaved"},
        moe={"selection_bias": True, "shared_d_ff": 3072, "balance_loss": 0.001},
        model={"tied": True, "dense_layers": _leading(1)},
    ),
    "ernie-4.5-300b-a47b": Decoder(
        "baidu/ERNIE-4.5-300B-A47B-Base-PT",
        (54, 8192, 64, 8, 128, 103424), experts=(64, 8, 3584), d_ff=28672, positions=131_072,
        attention={"rope_theta": 500_000.0, "rope_pairs": "interleaved"},
        moe={"selection_bias": True, "balance_loss": 0.001},
        model={"dense_layers": _leading(3)},
    ),
    "hunyuan-a13b": Decoder(
        "tencent/Hunyuan-A13B-Pretrain",
        (32, 4096, 32, 8, 128, 128167), experts=(64, 8, 3072), positions=32_768,
        attention={"qk_norm": "head_rotated"}, moe={"shared_d_ff": 3072}, model={"tied": True},
        unknown="the alpha by which the rotary base grows, 10000 * alpha^(d / (d - 2)): positions are plain here",
    ),
}

_DENSE: Mapping[str, Decoder] = {
    "llama-2-70b": Decoder(
        "meta-llama/Llama-2-70b-hf, arXiv 2307.09288",
        (80, 8192, 64, 8, 128, 32000), d_ff=28672, positions=4096,
    ),
    "llama-3-70b": Decoder(
        "meta-llama/Meta-Llama-3-70B, arXiv 2407.21783",
        (80, 8192, 64, 8, 128, 128256), d_ff=28672, positions=8192, attention={"rope_theta": 500_000.0},
    ),
    "mistral-7b": Decoder(
        "mistralai/Mistral-7B-v0.1, arXiv 2310.06825",
        (32, 4096, 32, 8, 128, 32000), d_ff=14336, positions=32_768, attention={"window": 4096},
    ),
}

# fmt: on

_SWITCH_PAPER = "arXiv 2101.03961"
_SWITCH: Mapping[str, Switch] = {
    **{
        f"switch-base-{experts}": Switch(
            source=f"google/switch-base-{experts}, {_SWITCH_PAPER}",
            shape=(12, 768, 12, 64),
            experts=experts,
            d_ff=3072,
        )
        for experts in (8, 16, 32, 64, 128, 256)
    },
    "switch-large-128": Switch(
        source=f"google/switch-large-128, {_SWITCH_PAPER}", shape=(24, 1024, 16, 64), experts=128, d_ff=4096
    ),
    "switch-xxl-128": Switch(
        source=f"google/switch-xxl-128, {_SWITCH_PAPER}",
        shape=(24, 4096, 64, 64),
        experts=128,
        d_ff=10240,
        gated=True,
    ),
    "switch-c-2048": Switch(
        source=f"google/switch-c-2048, {_SWITCH_PAPER}",
        shape=(15, 2080, 32, 64),
        experts=2048,
        d_ff=6144,
        every=1,
    ),
}

REGISTRY: Mapping[str, Decoder | Switch] = {**_ONE_KIND, **_DEEPSEEK, **_QWEN, **_DENSE, **_SWITCH}

NOT_YET: Mapping[str, Hybrid] = {
    "jamba-v0.1": Hybrid(
        source="ai21labs/Jamba-v0.1, arXiv 2403.19887",
        total=51_570_323_328,
        active=12_110_311_296,
        reason="28 of its 32 layers are Mamba layers",
    ),
    "lfm2-8b-a1b": Hybrid(
        source="LiquidAI/LFM2-8B-A1B",
        total=8_339_930_560,
        active=1_557_740_992,
        reason="18 of its 24 layers are short convolutions",
    ),
    "minimax-text-01": Hybrid(
        source="MiniMaxAI/MiniMax-Text-01, arXiv 2501.08313",
        total=456_089_655_296,
        active=48_403_306_496,
        reason="70 of its 80 layers are linear attention",
    ),
    "qwen3-next-80b-a3b": Hybrid(
        source="Qwen/Qwen3-Next-80B-A3B-Instruct",
        total=79_674_391_296,
        active=3_874_929_408,
        reason="36 of its 48 layers are gated delta networks",
    ),
}

_NOTHING = "gave neither size nor architecture"
UNDISCLOSED: Mapping[str, tuple[Report, ...]] = {
    "gemini-1.5-pro": (
        Report(
            said="a sparse Mixture-of-Experts, without sizes", by="its report, arXiv 2403.05530", date="2024"
        ),
    ),
    "gpt-4": (
        Report(said=_NOTHING, by="OpenAI's report, arXiv 2303.08774", date="2023-03"),
        Report(said="rumour, unconfirmed: 8 x 220B", by="George Hotz, in an interview", date="2023-06"),
        Report(
            said="rumour, unconfirmed and at odds with the other: 1.8T in 16 experts, 2 for each token",
            by="SemiAnalysis",
            date="2023-07",
        ),
    ),
    "gpt-4-turbo": (Report(said=_NOTHING, by="OpenAI's announcement", date="2023-11"),),
    "grok-3": (Report(said="gave no parameter counts", by="xAI's announcement", date="2025-02-17"),),
    "o1-preview": (Report(said=_NOTHING, by="OpenAI's announcement", date="2024-09"),),
}
