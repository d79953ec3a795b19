"""Metadata of GGUF files to `ModelConfig` and back. No torch here.

What an architecture expresses is not a table of its own: a model is written, read back, and compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moiety.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, from_dict, to_dict
from moiety.errors import ConfigError, FormatError, MoietyError, UsageError
from moiety.model.gguf.header import GGUFFile
from moiety.model.gguf.names import ARCHITECTURES, Architecture, links

__all__ = ["ROPE_FREQUENCIES", "architecture_for", "read_config", "rope_divisors", "write_config"]

ROPE_FREQUENCIES = "rope_freqs.weight"
MOE, LATENT = "moe", "attention.mla"
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func
# Keys of an architecture that change nothing that a model computes.
WITHOUT_EFFECT = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.causal", "nextn_predict_layers"}
)
# Keys of experts, which files of dense models may have all the same.
WITHOUT_EXPERTS = tuple(
    f"expert_{key}"
    for key in (
        "feed_forward_length",
        "shared_count",
        "shared_feed_forward_length",
        "weights_scale",
        "weights_norm",
        "gating_func",
        "group_count",
        "group_used_count",
    )
)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_positions": 8192}


def read_config(file: GGUFFile) -> tuple[Architecture, ModelConfig]:
    """The model that a file's metadata describes.

    Raises:
        FormatError: a key is missing, unknown, or asks for what this program does not do.
        ConfigError: the values cannot describe a model.
    """
    name = file.values.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise file.error(
            "general.architecture", f"is {name!r}", f"known are {', '.join(sorted(ARCHITECTURES))}"
        )
    shapes = {tensor.name: tensor.shape for tensor in file.tensors.values()}
    try:
        return ARCHITECTURES[name], _Reader(file, ARCHITECTURES[name], shapes).config()
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error.message}", hint=error.hint) from error


class _Reader:
    """Values of one architecture's keys; what was asked for is noted, and what nobody asked for is refused."""

    def __init__(self, file: GGUFFile, row: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.file, self.row, self.shapes = file, row, shapes
        self.asked: set[str] = set()

    def config(self) -> ModelConfig:
        layers = self.integer("block_count") - self.integer("nextn_predict_layers", 0)
        if not 0 < layers <= len(self.shapes):  # before anything is made for each of them
            raise self.error("block_count", f"is {layers}, but the file has {len(self.shapes)} tensors")
        d_model = self.integer("embedding_length")
        if "token_embd.weight" not in self.shapes:
            raise self.file.error("tensor token_embd.weight", "is missing")
        attention = self.attention(d_model)
        moe, dense_layers = self.moe(layers)
        wide = self.row.expert_width == "feed_forward_length" and moe is not None
        config = ModelConfig(
            vocab_size=self.shapes["token_embd.weight"][0],
            d_model=d_model,
            layers=layers,
            attention=attention,
            d_ff=moe.d_ff if wide and moe is not None else self.integer("feed_forward_length"),
            moe=moe,
            dense_layers=dense_layers,
            feed_forward_bias=self.row.qkv_bias is None and "blk.0.ffn_down.bias" in self.shapes,
            norm_eps=self.number("attention.layer_norm_rms_epsilon"),
            tied="output.weight" not in self.shapes,
            max_positions=self.integer("context_length"),
        )
        prefix = f"{self.row.name}."
        left = sorted(
            key
            for key in self.file.values
            if key.startswith(prefix)
            and key.removeprefix(prefix) not in self.asked
            and key.removeprefix(prefix) not in WITHOUT_EFFECT
        )
        if left:
            raise self.file.error(", ".join(left), "is not known and may change what the model computes")
        return config

    def attention(self, d_model: int) -> AttentionConfig:
        heads = self.integer("attention.head_count")
        sizes = self.latent(heads) if self.row.latent else self.grouped(heads, d_model)
        pairs = "half" if self.row.pairs == "permuted" else self.row.pairs
        window = self.integer("attention.sliding_window", 0)
        return AttentionConfig(
            heads=heads,
            qk_norm=self.row.qk_norm,
            rope_theta=self.number("rope.freq_base", 10_000.0),
            rope_pairs=pairs,
            rope=self.rope(sizes),
            window=window or None,
            **sizes,
        )

    def grouped(self, heads: int, d_model: int) -> dict[str, Any]:
        if not heads or ("attention.key_length" not in self and d_model % heads):
            raise self.error("attention.head_count", f"is {heads}, which does not divide {d_model}")
        head_dim = self.integer("attention.key_length", d_model // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.integer(key, head_dim) != head_dim:
                raise self.error(key, f"is {self.integer(key)}; allowed is the width of a head, {head_dim}")
        return {
            "kv_heads": self.integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "qkv_bias": "blk.0.attn_q.bias" in self.shapes,
            "out_bias": "blk.0.attn_output.bias" in self.shapes,
        }

    def latent(self, heads: int) -> dict[str, Any]:
        rope_dim = self.integer("rope.dimension_count")
        self.integer("attention.head_count_kv", heads)  # 1 where keys are read as one head, else the heads
        # Files of the absorbed form say the width of a decompressed head apart from that of the cached one.
        key = self.integer("attention.key_length_mla", self.integer("attention.key_length", 0))
        value = self.integer("attention.value_length_mla", self.integer("attention.value_length", 0))
        if key <= rope_dim:
            raise self.error(
                "attention.key_length", f"is {key}, not more than rope.dimension_count {rope_dim}"
            )
        mla = MLAConfig(
            q_rank=self.integer("attention.q_lora_rank", 0),
            kv_rank=self.integer("attention.kv_lora_rank"),
            nope_dim=key - rope_dim,
            rope_dim=rope_dim,
            value_dim=value,
            norm_eps=self.number("attention.layer_norm_rms_epsilon"),
        )
        return {"kv_heads": heads, "head_dim": key, "mla": mla}

    def rope(self, sizes: Mapping[str, Any]) -> RopeConfig | None:
        kind = str(self.value("rope.scaling.type", "none"))
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0))
        original = self.integer("rope.scaling.original_context_length", self.integer("context_length"))
        if ROPE_FREQUENCIES in self.shapes:
            return self.divided_rope(sizes)
        if kind == "yarn":
            mscale = 0.0
            if self.row.latent:  # the file has a tenth of it
                mscale = _short(self.number("rope.scaling.yarn_log_multiplier", 0.0) * 10)
            return RopeConfig(
                kind="yarn",
                factor=factor,
                original_positions=original,
                beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
                mscale=mscale,
                mscale_all_dim=mscale,
            )
        if kind not in ("none", "linear"):
            raise self.error("rope.scaling.type", f"is {kind!r}; allowed are none, linear and yarn")
        return None if factor in (0.0, 1.0) else RopeConfig(kind="linear", factor=factor)

    def divided_rope(self, sizes: Mapping[str, Any]) -> RopeConfig:
        """Frequencies divided one by one, as Llama 3.1 has them."""
        stored = self.file.tensors[ROPE_FREQUENCIES]
        half = sizes["head_dim"] // 2
        if stored.shape != (half,) or stored.type.name != "F32":
            raise self.error(
                ROPE_FREQUENCIES, f"is {stored.type.name} {stored.shape}; F32 ({half},) is wanted"
            )
        divisors = np.frombuffer(stored.raw, dtype="<f4").astype(np.float64)
        if not np.isfinite(divisors).all() or (divisors <= 0).any():
            raise self.error(ROPE_FREQUENCIES, "holds divisors that are not positive numbers")
        noted = {
            key: self.file.values.get(f"moiety.rope.{key}", value)
            for key, value in {**LLAMA3, "factor": float(divisors.max())}.items()
        }
        theta = self.number("rope.freq_base", 10_000.0)
        try:
            rope = from_dict(RopeConfig, {"kind": "llama3", **noted})
            if np.allclose(rope_divisors(rope, 2 * half, theta), divisors, rtol=1e-5):
                return rope
        except (ConfigError, TypeError, ValueError):
            pass  # not those of Llama 3: kept as they are
        factors = tuple(_short(value) for value in divisors)
        positions = self.integer("context_length")
        return RopeConfig(
            kind="longrope",
            original_positions=positions,
            attention_factor=1.0,
            short_factor=factors,
            long_factor=factors,
        )

    def moe(self, layers: int) -> tuple[MoEConfig | None, tuple[int, ...]]:
        row = self.row
        experts, used = self.integer("expert_count", 0), self.integer("expert_used_count", 0)
        lead = self.integer("leading_dense_block_count", 0) if row.latent else 0
        if row.latent and lead >= layers:
            experts = 0
        if row.experts is False or (row.experts is None and not experts):
            if experts:
                raise self.error("expert_count", f"is {experts}; architecture {row.name!r} has no experts")
            for key in WITHOUT_EXPERTS:
                self.value(key, None)
            return None, ()
        width = self.integer(row.expert_width)
        options: dict[str, Any] = {"renormalize": row.renormalize}
        if row.shared == "gated":
            default = self.integer("feed_forward_length")
            shared = self.integer("expert_shared_feed_forward_length", default)
            options |= {"shared_d_ff": shared, "shared_gate": True}
        if row.latent:
            options = self.deepseek(width, lead)
        if not 0 <= lead <= layers:
            raise self.error("leading_dense_block_count", f"is {lead} of {layers} layers")
        moe = MoEConfig(experts=experts, experts_per_token=used, d_ff=width, **options)
        return moe, tuple(range(lead))

    def deepseek(self, width: int, lead: int) -> dict[str, Any]:
        """What only DeepSeek's experts leave open."""
        gating = self.integer("expert_gating_func", SOFTMAX) or SOFTMAX
        if gating not in (SOFTMAX, SIGMOID):
            raise self.error("expert_gating_func", f"is {gating}; allowed are 1 (softmax) and 2 (sigmoid)")
        groups = self.integer("expert_group_count", 1) or 1
        kept = self.integer("expert_group_used_count", 1) or 1
        return {
            "router": "sigmoid" if gating == SIGMOID else "softmax",
            "renormalize": self.value("expert_weights_norm", False),
            "scale": self.number("expert_weights_scale", 1.0) or 1.0,
            "selection_bias": f"blk.{lead}.exp_probs_b.bias" in self.shapes,
            "groups": groups,
            "groups_kept": kept if groups > 1 else 1,
            "group_score": "top2" if gating == SIGMOID else "max",  # DeepSeek-V3; DeepSeek-V2
            "shared_d_ff": self.integer("expert_shared_count", 0) * width,
        }

    def __contains__(self, key: str) -> bool:
        return f"{self.row.name}.{key}" in self.file.values

    def value(self, key: str, default: Any = dataclasses.MISSING) -> Any:
        """A value as it stands in the file."""
        self.asked.add(key)
        value = self.file.values.get(f"{self.row.name}.{key}", default)
        if value is dataclasses.MISSING:
            raise self.error(key, "is missing")
        return value

    def integer(self, key: str, default: Any = dataclasses.MISSING) -> int:
        """A whole number, or one for each layer and all of them equal."""
        value = self.value(key, default)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu":
            if (value != value[0]).any():
                raise self.error(key, "differs between layers; allowed is one value for all of them")
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
            raise self.error(key, f"is {value!r}; a whole number is wanted")
        return value

    def number(self, key: str, default: Any = dataclasses.MISSING) -> float:
        """A number, by the shortest decimal that is the same float32."""
        value = self.value(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(key, f"is {value!r}; a number is wanted")
        short = _short(value)
        if not math.isfinite(short):
            raise self.error(key, f"is {value!r}; a float32 is wanted")
        return short

    def error(self, key: str, problem: str) -> FormatError:
        """A FormatError about one of the architecture's keys."""
        return self.file.error(f"{self.row.name}.{key}", problem)


def architecture_for(config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> Architecture:
    """The architecture that expresses a model exactly.

    Args:
        config: The model's.
        shapes: Our tensors' names and shapes.

    Raises:
        UsageError: there is none; it says what the closest one lacks.
    """
    lacks = {row.name: _cannot_say(config, row, shapes) for row in ARCHITECTURES.values()}
    for name, missing in lacks.items():
        if not missing:
            return ARCHITECTURES[name]
    closest = min(lacks, key=lambda name: (lacks[name] in ([MOE], [LATENT]), len(lacks[name])))
    raise UsageError(
        f"no GGUF architecture expresses this model; the closest, {closest}, cannot say {', '.join(lacks[closest])}",
        hint=f"written are {', '.join(ARCHITECTURES)}; save it as safetensors instead",
    )


def write_config(config: ModelConfig, row: Architecture) -> dict[str, Any]:
    """The architecture's keys and values for a model, integers and floats told apart by their type."""
    attention, moe = config.attention, config.moe
    values: dict[str, Any] = {
        "block_count": config.layers,
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "vocab_size": config.vocab_size,
        "attention.head_count": attention.heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(attention.rope_theta),
    }
    mla = attention.mla
    if mla is not None:
        values |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": mla.q_rank,
            "attention.kv_lora_rank": mla.kv_rank,
            "attention.key_length": mla.kv_rank + mla.rope_dim,
            "attention.value_length": mla.kv_rank,
            "attention.key_length_mla": mla.nope_dim + mla.rope_dim,
            "attention.value_length_mla": mla.value_dim,
            "rope.dimension_count": mla.rope_dim,
        }
    else:
        values |= {
            "attention.head_count_kv": attention.kv_heads,
            "attention.key_length": attention.head_dim,
            "attention.value_length": attention.head_dim,
            "rope.dimension_count": attention.head_dim,
        }
    values |= _rope_metadata(attention.rope, row)
    if moe is not None:
        values |= {"expert_count": moe.experts, "expert_used_count": moe.experts_per_token}
        values |= {row.expert_width: moe.d_ff}
        if row.shared == "gated":
            values["expert_shared_feed_forward_length"] = moe.shared_d_ff
    if row.latent:
        values |= _deepseek_metadata(config)
    named = {f"{row.name}.{key}": value for key, value in values.items()}
    if attention.rope is not None and attention.rope.kind == "llama3":
        named |= {
            f"moiety.rope.{key}": kind(getattr(attention.rope, key))
            for key, kind in _kinds_of_llama3().items()
        }
    return named


def _rope_metadata(rope: RopeConfig | None, row: Architecture) -> dict[str, Any]:
    if rope is None or rope.kind not in ("linear", "yarn"):
        return {}
    values: dict[str, Any] = {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        values |= {
            "rope.scaling.original_context_length": rope.original_positions,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        if row.latent and rope.mscale_all_dim:
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
    return values


def _deepseek_metadata(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {
            "leading_dense_block_count": config.layers,
            "expert_feed_forward_length": config.d_ff,
            "expert_shared_count": 0,
        }
    values: dict[str, Any] = {
        "leading_dense_block_count": len(config.dense_layers),
        "expert_shared_count": moe.shared_d_ff // moe.d_ff,
        "expert_weights_scale": float(moe.scale),
        "expert_weights_norm": moe.renormalize,
        "expert_gating_func": SIGMOID if moe.router == "sigmoid" else SOFTMAX,
    }
    if moe.groups > 1:
        values |= {"expert_group_count": moe.groups, "expert_group_used_count": moe.groups_kept}
    return values


def _kinds_of_llama3() -> dict[str, type[int] | type[float]]:
    return {key: type(value) for key, value in LLAMA3.items()}


def rope_divisors(rope: RopeConfig, rotary_dim: int, theta: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What each plain frequency is divided by under Llama 3's rule, float64 (rotary_dim / 2,)."""
    frequency = theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    turns = rope.original_positions * frequency / (2 * np.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(smooth, 0.0, 1.0)
    divisors: np.ndarray[Any, np.dtype[np.float64]] = 1.0 / ((1.0 - kept) / rope.factor + kept)
    return divisors


def _cannot_say(config: ModelConfig, row: Architecture, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Options of `config` that reading what would be written does not give back; empty if it is exact."""
    attention = config.attention
    if (attention.mla is not None) != row.latent:
        return [LATENT]
    if (config.moe is not None, row.experts) in ((True, False), (False, True)):
        return [MOE]
    lacks = []
    if row.whole_width and attention.heads * attention.head_dim != config.d_model:
        lacks.append("heads that together are not as wide as the model")
    if row.equal_heads and attention.heads != attention.kv_heads:
        lacks.append("fewer key heads than query heads")
    if row.qkv_bias is not None and attention.qkv_bias != row.qkv_bias:
        lacks.append("attention.qkv_bias")
    if attention.out_bias and row.qkv_bias is not None:
        lacks.append("attention.out_bias")
    if row.latent and config.moe is not None and not config.moe.shared_d_ff:
        lacks.append("experts without a shared one")
    if attention.window is not None:
        lacks.append("attention.window")  # files may say one, and llama.cpp does not look at it
    if config.moe is not None and config.moe.groups > 1 and config.moe.group_score == "max":
        lacks.append("moe.group_score 'max'")  # llama.cpp sums a group's two best, whatever the router
    rope = attention.rope
    if row.latent and rope is not None and rope.kind == "yarn" and not rope.mscale_all_dim:
        lacks.append("yarn without mscale_all_dim")  # llama.cpp scales the softmax all the same
    try:
        theirs = [link.theirs for link in links(config, row, shapes)]
        written = {"general.architecture": row.name, **write_config(config, row)}
        known = dict.fromkeys(theirs, (config.vocab_size,))
        written_file = GGUFFile(path=Path("the file"), values=written, tensors={})
        found = _Reader(written_file, row, known).config()
    except MoietyError as error:
        return [*lacks, error.message]
    wanted, got = _essence(config, row), _essence(found, row)
    return lacks + sorted(path for path in wanted if wanted[path] != got.get(path))


def _essence(config: ModelConfig, row: Architecture) -> dict[str, Any]:
    """What of a config a file should say, by dotted path and in float32; training and unused options are left out."""
    flat: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": _rounded(part) for name, part in value.items()}
        else:
            flat[key] = _rounded(value)
    inert = {"moe.balance_loss", "moe.z_loss", "moe.bias_rate", "moe.bias_rule"}
    attention, moe = config.attention, config.moe
    if moe is not None and not config.dense_layers:
        inert |= {"d_ff", "activation", "gated", "feed_forward_bias"}
    if moe is not None and moe.groups == 1:
        inert |= {"moe.group_score", "moe.groups_kept"}
    if attention.mla is not None:
        inert |= {"attention.head_dim", "attention.kv_heads", "attention.rope_fraction"}
    if row.pairs == "permuted":
        inert.add("attention.rope_pairs")  # rows are reordered or not, and both are right
    if attention.rope is not None and attention.rope.kind == "llama3":
        inert.add("attention.rope")  # its divisors are a tensor
    if row.own_output:
        inert.add("tied")
    return {key: value for key, value in flat.items() if key not in inert}


def _rounded(value: Any) -> Any:
    """A value with every float as the nearest float32, which is what a file holds."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-06 instead of 9.99999997475e-07."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
