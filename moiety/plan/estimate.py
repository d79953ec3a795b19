"""What a model takes besides time: memory by use, capacity buffers, bytes on links, devices, savings. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

from moiety import cost
from moiety.config import ModelConfig, MoEConfig, require
from moiety.plan.hardware import KINDS, Device
from moiety.plan.profile import Profile
from moiety.plan.weights import Stored

__all__ = [
    "KV_BYTES",
    "Memory",
    "activations",
    "capacity",
    "communication",
    "dense_equivalents",
    "devices_needed",
    "kv_bytes",
    "memory",
    "router_share",
    "savings",
    "training_memory",
]

KV_BYTES: Mapping[str, float] = {"fp32": 4, "bf16": 2, "fp8": 1}
PAGE_TOKENS = 16
GROWTH_BYTES = 8 << 20  # code and small pieces that come when a process first computes
STEP_TOKENS = 512  # of a prompt that go through the model at once, as `EngineOptions` has it
# Bytes for each parameter while it is trained: weight and gradient, a float32 copy where these are 16 bits wide, and
# AdamW's two moments in float32.
TRAINED_BYTES: Mapping[str, tuple[int, int, int, int]] = {"bf16": (2, 2, 4, 8), "fp32": (4, 4, 0, 8)}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by use.

    Args:
        weights: That are resident.
        kv: Keys and values of all sequences.
        activations: Of a step, at its peak.
        runtime: Of the process before any weight.
    """

    weights: int
    kv: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.activations + self.runtime


def _layers(config: ModelConfig) -> list[MoEConfig]:
    return [] if config.moe is None else [config.moe.at(layer) for layer in config.moe_layers]


def kv_bytes(
    config: ModelConfig, context: int, dtype: str = "bf16", *, batch: int = 1, paged: bool = False
) -> int:
    """Keys and values of `batch` sequences of `context` tokens each.

    Args:
        config: The model's.
        context: Tokens, prompt and answer.
        dtype: A name of `KV_BYTES`.
        batch: Sequences.
        paged: As our engine keeps them: whole pages, and windows bound nothing.

    Raises:
        ConfigError: no such dtype, or a negative context.
    """
    require(dtype in KV_BYTES, f"kv_dtype is {dtype!r}; allowed are {', '.join(KV_BYTES)}")
    if not paged:
        return batch * cost.kv_bytes(config, context, KV_BYTES[dtype])
    pages = -(-context // PAGE_TOKENS)
    return batch * pages * PAGE_TOKENS * cost.kv_bytes_per_token(config, KV_BYTES[dtype])


def activations(
    config: ModelConfig, tokens: int, sequences: int = 1, bytes_per_value: int = 4, *, copies: int = 2
) -> dict[str, int]:
    """What one step of inference holds beside weights and cache, at its peak, by use.

    The residual stream with what is added to it; queries, keys, values and what attention answers; logits of the
    sequences that draw, with the copies that sampling makes. `dispatch` is what a Mixture of Experts has more than a
    dense layer: each token's row once for each of its experts, in and out, K x tokens x D each; `hidden` is the rows
    between the projections.

    Args:
        config: The model's.
        tokens: Of the step.
        sequences: That draw.
        bytes_per_value: Of activations.
        copies: Of the dispatched rows: 2, or 1 where experts read a token's row from where it is, as our kernels do.
    """
    attention, d_model = config.attention, config.d_model
    heads = attention.heads * attention.head_dim * 2 + 2 * attention.kv_heads * attention.head_dim
    layers = _layers(config)
    pairs = max((tokens * one.experts_per_token for one in layers), default=0)
    width = max((one.experts_per_token * one.d_ff + one.shared_d_ff for one in layers), default=0)
    dense = config.d_ff if len(layers) < config.layers else 0
    numbers = {
        "stream": 4 * tokens * d_model,
        "attention": tokens * heads,
        "hidden": tokens * max(width, dense),
        "dispatch": copies * pairs * d_model,
        "logits": 3 * sequences * config.vocab_size,
    }
    return {name: count * bytes_per_value for name, count in numbers.items()}


def memory(
    config: ModelConfig,
    stored: Stored,
    device: Device,
    *,
    context: int,
    batch: int = 1,
    kv_dtype: str = "bf16",
    resident: float = 1.0,
    ours: bool = False,
    profile: Profile | None = None,
    devices: int = 1,
) -> Memory:
    """What serving takes, in all devices together.

    Args:
        config: The model's.
        stored: Its weights.
        device: For what a process takes by itself.
        context: Tokens of each sequence.
        batch: Sequences at a time.
        kv_dtype: Of keys and values.
        resident: Share of the routed experts that is in memory.
        ours: In our engine: pages as of `kv_bytes`, rows that are dispatched without a copy, and the embedding on disk
            where experts are.
        profile: Measured figures of it; None assumes.
        devices: On each of which a process takes that.
    """
    step = max(min(STEP_TOKENS, context), batch)
    runtime = KINDS[device.kind].runtime_bytes
    if profile is not None:
        runtime = profile.process_bytes["plain" if stored.is_plain else "packed"]
    return Memory(
        weights=stored.size_bytes
        - round((1 - resident) * stored.expert_bytes)
        - ours * (resident < 1) * stored.looked_up_bytes,
        kv=kv_bytes(config, context, kv_dtype, batch=batch, paged=ours),
        activations=sum(activations(config, step, batch, copies=2 - ours).values()) + ours * GROWTH_BYTES,
        runtime=round(runtime) * devices,
    )


def training_memory(config: ModelConfig, tokens: int, dtype: str = "bf16") -> dict[str, int]:
    """Bytes of training with AdamW: weights, gradients, float32 copies, moments, and kept activations of `tokens`.

    Kept are x and the pre-activation of each expert's rows (nothing else of the experts; they are computed again), the
    inputs of attention and norms, queries, keys and values.
    """
    require(dtype in TRAINED_BYTES, f"dtype is {dtype!r}; allowed are {', '.join(TRAINED_BYTES)}")
    total, attention = cost.parameters(config).total, config.attention
    names = ("weights", "gradients", "float32_copies", "moments")
    sizes = {name: total * each for name, each in zip(names, TRAINED_BYTES[dtype], strict=True)}
    rows = sum(
        one.experts_per_token * (1 + one.gated) * one.d_ff + 3 * one.shared_d_ff for one in _layers(config)
    )
    dense = (config.layers - len(config.moe_layers)) * 3 * config.d_ff
    heads = (2 * attention.heads + 2 * attention.kv_heads) * attention.head_dim
    kept = config.layers * (6 * config.d_model + heads) + rows + dense
    return sizes | {"activations": tokens * kept * TRAINED_BYTES[dtype][0]}


def capacity(config: ModelConfig, tokens: int, factor: float, bytes_per_value: int = 2) -> dict[str, float]:
    """Buffers of experts that take at most ceil(factor x K x tokens / E) tokens each (arXiv 2006.16668, 2101.03961).

    Returns:
        Tokens of an expert's buffer; bytes of all buffers of a layer, in, between and out; the same for exactly the
        tokens that are there (dropless); their ratio; and the share of pairs that is dropped if routing is uniform and
        independent (normal approximation): what no balance loss can prevent.

    Raises:
        ConfigError: a dense model, or a factor that is not positive.
    """
    layers = _layers(config)
    require(bool(layers), "this model is dense: it has no experts with a capacity")
    require(
        factor > 0 and tokens > 0, f"capacity_factor is {factor}, tokens are {tokens}; both must be positive"
    )
    one = layers[0]
    pairs, share = tokens * one.experts_per_token, one.experts_per_token / one.experts
    slots = math.ceil(factor * pairs / one.experts)
    row = (2 * config.d_model + (1 + one.gated) * one.d_ff) * bytes_per_value
    mean, deviation = tokens * share, math.sqrt(tokens * share * (1 - share))
    dropped = max(mean - slots, 0.0)
    if deviation:
        distance, normal = (slots - mean) / deviation, NormalDist()
        dropped = deviation * (normal.pdf(distance) - distance * (1 - normal.cdf(distance)))
    return {
        "tokens_per_expert": slots,
        "buffer_bytes": one.experts * slots * row,
        "dropless_bytes": pairs * row,
        "ratio": one.experts * slots / pairs,
        "dropped_share": dropped / mean,
    }


def communication(
    config: ModelConfig, tokens: int, ranks: int, bytes_per_value: float = 2
) -> dict[str, float]:
    """Bytes that expert parallelism sends for `tokens`, spread evenly: 2 x K x tokens x D x bytes x (1 - 1 / ranks).

    Out to the experts and back, of one layer and of all; each rank sends its own tokens' share of it. A token with two
    of its experts on one rank is counted twice.

    Raises:
        ConfigError: a dense model, or fewer than one rank.
    """
    layers = _layers(config)
    require(bool(layers), "this model is dense: it has no experts to spread")
    require(ranks >= 1, f"ranks is {ranks}; it must be at least 1")
    each = [
        2 * one.experts_per_token * tokens * config.d_model * bytes_per_value * (1 - 1 / ranks)
        for one in layers
    ]
    return {"layer_bytes": fmean(each), "bytes": sum(each), "bytes_per_rank": sum(each) / ranks}


def devices_needed(size_bytes: float, device: Device, *, usable: bool = True) -> int:
    """How many devices hold so many bytes; `usable` leaves free what programs leave free."""
    return math.ceil(size_bytes / (device.memory_bytes * (KINDS[device.kind].usable if usable else 1)))


def router_share(config: ModelConfig) -> dict[str, float]:
    """What routers are of all parameters, of the active ones, and of the FLOPs of a token."""
    counts, flops = cost.parameters(config), cost.flops_per_token(config)
    routers = counts.components["routers"]
    return {
        "parameters": routers,
        "percent_of_total": 100 * routers / counts.total,
        "percent_of_active": 100 * routers / counts.active,
        "percent_of_flops": 100 * flops.components["routers"] / flops.total,
    }


def dense_equivalents(config: ModelConfig) -> list[dict[str, Any]]:
    """Parameters of a dense model that is said to be as good. Rules of thumb: none of them is a law."""
    counts = cost.parameters(config)
    rule = math.sqrt(counts.total * counts.active)
    return [
        {
            "rule": "square root of total x active",
            "parameters": round(rule),
            "kind": "rule of thumb, no paper",
        },
        {
            "rule": "active parameters",
            "parameters": counts.active,
            "kind": "lower end: equal compute for a token",
        },
        {"rule": "total parameters", "parameters": counts.total, "kind": "upper end: equal memory"},
    ]


def savings(config: ModelConfig, other: ModelConfig, *, batch: int = 1) -> dict[str, float]:
    """This model against another one, usually dense: percent saved, negative where it takes more.

    FLOPs by active parameters, as published comparisons have it; memory by all parameters; and what a decoding step of
    `batch` sequences reads, where the saving of a Mixture of Experts melts away.
    """
    mine, theirs = cost.parameters(config), cost.parameters(other)
    read = [_read(one, batch) for one in (config, other)]
    return {
        "flops_percent": 100 * (1 - mine.active / theirs.active),
        "memory_percent": 100 * (1 - mine.total / theirs.total),
        "read_percent": 100 * (1 - read[0] / read[1]),
    }


def _read(config: ModelConfig, batch: int) -> float:
    """Parameters that a decoding step reads."""
    counts = cost.parameters(config)
    experts, layers = counts.components["routed_experts"], _layers(config)
    used = cost.distinct_experts(config, batch) / fmean(one.stored for one in layers) if layers else 0.0
    return counts.total - experts - (0 if config.tied else counts.components["embedding"]) + used * experts
