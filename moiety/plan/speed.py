"""How long a step of inference takes, as a band, and what it waits for: from published limits or from measured ones.

A step reads each matrix that its tokens meet once: attention, head, shared and dense feed-forwards whole, of the routed
experts those that some token chose, E (1 - (1 - K/E)^tokens) of a layer if routing is uniform.

Published limits (`hardware`): the longer of reading (bytes over bandwidth) and multiplying (operations over its rate),
each over the share of it that programs reach. Measured ones (`profile`): the sum over all matrices of their weights
times the seconds that a weight of that format took at so many rows, attention by values or operations, and what steps,
layers, sequences and tokens take besides; the spread of those measurements widened by `MARGIN`.

Experts that are not resident come from the next tier, a disk or the host's memory: a share (1 - hit rate) of those that
a step needs. The lower end of the time has reading and computing side by side, the upper one after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from moiety import cost
from moiety.config import ModelConfig
from moiety.formats import FORMATS
from moiety.plan.estimate import KV_BYTES, STEP_TOKENS
from moiety.plan.hardware import DISK, KINDS, Band, Device, flops_of
from moiety.plan.links import EXCHANGE, Cluster, Copies, Once, exchange, sent
from moiety.plan.profile import ROWS, Figure, Profile
from moiety.plan.weights import PLAIN, Stored

__all__ = [
    "MARGIN",
    "TRAINING_SHARE",
    "Machine",
    "Setting",
    "Speed",
    "decode",
    "distinct_share",
    "prefill",
    "read_share_limit",
    "roofline",
    "training",
]

# Beyond the spread of the measured figures: what the model of a step leaves out, and a machine's other moments.
MARGIN = Band(0.85, 1.25)
# Of dense bfloat16 arithmetic while training, without the exchange of expert parallelism, which is counted apart: OLMoE
# reached 0.188 on H100 (arXiv 2409.02060, 23,600 tokens/s of 1.3B active parameters, no expert parallelism), a dense
# model of 405B 0.43 (arXiv 2407.21783, table 4). No run that docs/parallel-plan.md judges by is among them.
TRAINING_SHARE = Band(0.18, 0.43)
LINKS = "links between devices"
MEMORY, COMPUTE, FIXED, DISK_WAIT, LINK_WAIT = (
    "memory bandwidth",
    "arithmetic",
    "fixed costs",
    "disk",
    "link to the host",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What runs the model.

    Args:
        device: As published, or as this machine says of itself.
        count: How many, each with its share of every matrix; they exchange results twice in a layer.
        profile: Measured figures, which then count instead.
        disk: Bytes per second of the tier below, where the user knows; None takes the profile's, or assumes.
    """

    device: Device
    count: int = 1
    profile: Profile | None = None
    disk: Band | None = None

    @property
    def tier(self) -> str:
        """Where experts wait that are not resident."""
        return LINK_WAIT if self.device.kind == "gpu" else DISK_WAIT

    def tier_rate(self, piece_bytes: float) -> Band:
        """Bytes per second of that tier, reading pieces of this size."""
        if self.disk is not None:
            return self.disk
        if self.tier == LINK_WAIT:
            return Band(0.5 * self.device.host_link, 0.9 * self.device.host_link)
        found = self.profile.disk_rate(piece_bytes) if self.profile else None
        return DISK if found is None else Band(found.low, found.high)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is run.

    Args:
        batch: Sequences that draw together.
        context: Tokens that each has while it draws.
        kv_dtype: Of keys and values.
        resident: Share of the routed experts in memory.
        hit_rate: Of the experts that a step needs, the share found there; None is `resident`: uniform routing.
    """

    batch: int = 1
    context: int = 512
    kv_dtype: str = "bf16"
    resident: float = 1.0
    hit_rate: float | None = None

    @property
    def hits(self) -> float:
        """The hit rate that is planned with."""
        return 1.0 if self.resident >= 1 else self.resident if self.hit_rate is None else self.hit_rate


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One estimate.

    Args:
        tokens_per_s: Of all sequences.
        seconds: Of a step, or of the whole prompt.
        limit: What most of the time goes to, in words.
        read_bytes: Weights read from memory in that time.
        missed_bytes: Experts that come from the tier below in that time.
    """

    tokens_per_s: Band
    seconds: Band
    limit: str
    read_bytes: float
    missed_bytes: float


class _Work(NamedTuple):
    """What a step does with the matrices of one part in one format."""

    kind: str
    form: str
    numbers: float
    size_bytes: float
    rows: float


class _Times(NamedTuple):
    """Seconds of a pass, and where they go."""

    band: Band
    limit: str


def distinct_share(config: ModelConfig, tokens: int) -> float:
    """Share of the experts that some of `tokens` choose, the mean over layers; 0 for a dense model."""
    if config.moe is None:
        return 0.0
    return cost.distinct_experts(config, tokens) / _experts(config)


def _experts(config: ModelConfig) -> float:
    assert config.moe is not None
    return fmean(config.moe.at(layer).stored for layer in config.moe_layers)


def _works(config: ModelConfig, stored: Stored, tokens: int, drawn: int) -> Iterator[_Work]:
    """Everything that a step of `tokens` multiplies with; the head only meets those after which a token is drawn."""
    share = distinct_share(config, tokens)
    rows = cost.tokens_per_expert(config, tokens) / share if share else 0.0
    for kind, form, numbers, size in stored.parts:
        if kind == "experts":
            yield _Work(kind, form, share * numbers, share * size, rows)
        elif kind == "head":
            # a tied head is read where the embedding is, whose bytes stand there
            embedding = next(one.size_bytes for one in stored.parts if one.kind == "embedding")
            if drawn:
                yield _Work(kind, form, numbers, size or embedding, drawn)
        elif kind != "embedding":
            yield _Work(kind, form, numbers, size, tokens)


def decode(config: ModelConfig, stored: Stored, machine: Machine, setting: Setting) -> Speed:
    """One step of `batch` sequences that draw a token each."""
    works = list(_works(config, stored, setting.batch, setting.batch))
    kv = setting.batch * cost.kv_bytes(config, setting.context, KV_BYTES[setting.kv_dtype])
    scores = setting.batch * cost.flops_per_token(config, setting.context).components["attention_scores"]
    if machine.profile is None:
        times = _published(config, works, kv, scores, machine, setting.batch)
    else:
        kind = "fp32" if setting.kv_dtype == "fp32" else "bf16"
        values = setting.batch * cost.kv_bytes(config, setting.context, 1)
        attention = Figure(*machine.profile.attention[kind]).times(values)
        times = _measured(
            works, config, attention, machine.profile, tokens=setting.batch, sequences=setting.batch
        )
    return _with_misses(config, stored, machine, 1 - setting.hits, times, works, [setting.batch])


def prefill(config: ModelConfig, stored: Stored, machine: Machine, setting: Setting, tokens: int) -> Speed:
    """A prompt, in steps of at most `STEP_TOKENS`, up to its first token."""
    steps = [STEP_TOKENS] * (tokens // STEP_TOKENS) + ([tokens % STEP_TOKENS] if tokens % STEP_TOKENS else [])
    parts: list[_Times] = []
    works: list[_Work] = []
    done = 0
    for number, step in enumerate(steps):
        last = int(number == len(steps) - 1)
        mine = list(_works(config, stored, step, last))
        kv = cost.kv_bytes(config, done + step, KV_BYTES[setting.kv_dtype])
        once = cost.flops_per_token(config, done + (step + 1) // 2, absorbed=False)
        scores = step * once.components["attention_scores"]
        if machine.profile is None:
            parts.append(_published(config, mine, kv, scores, machine, step))
        else:
            attention = Figure(*machine.profile.attention["operation"]).times(scores)
            parts.append(_measured(mine, config, attention, machine.profile, tokens=step, sequences=last))
        works, done = [*works, *mine], done + step
    whole = Band(sum(one.band.low for one in parts), sum(one.band.high for one in parts))
    longest = max(parts, key=lambda one: one.band.middle)
    # each expert once in a step, whatever drawing finds in memory
    return _with_misses(
        config, stored, machine, 1 - setting.resident, _Times(whole, longest.limit), works, steps
    )


def _limits(works: list[_Work], kv: float, scores: float, machine: Machine) -> Band:
    """Seconds of reading and of multiplying, if nothing else took any and all of a limit were reached."""
    device = machine.device
    multiplying = scores / device.flops["bf16"]
    for one in works:
        bits = 8 * one.size_bytes / one.numbers
        multiplying += 2 * one.numbers * one.rows / flops_of(device, bits, one.form)
    reading = (sum(one.size_bytes for one in works) + kv) / device.bandwidth
    return Band(reading / machine.count, multiplying / machine.count)


def _published(
    config: ModelConfig, works: list[_Work], kv: float, scores: float, machine: Machine, tokens: int
) -> _Times:
    kind = KINDS[machine.device.kind]
    reading, multiplying = _limits(works, kv, scores, machine)
    ends = [
        (reading / kind.decode.high, multiplying / kind.prefill.high),
        (reading / kind.decode.low, multiplying / kind.prefill.low),
    ]
    seconds = Band(*(max(end) for end in ends))
    limit = COMPUTE if sum(end[1] for end in ends) > sum(end[0] for end in ends) else MEMORY
    if machine.count > 1:
        exchanges = 2 * config.layers
        moved = 2 * tokens * config.d_model * 2 / machine.device.link  # bfloat16, to the others and back
        waiting = Band(exchanges * (EXCHANGE.low + moved), exchanges * (EXCHANGE.high + moved))
        limit = LINKS if waiting.middle > seconds.middle else limit
        seconds = Band(seconds.low + waiting.low, seconds.high + waiting.high)
    return _Times(seconds, limit)


def _seconds_each(table: Mapping[str, Mapping[str, tuple[float, ...]]], form: str, rows: float) -> Figure:
    """Seconds for a weight at so many rows: between the measured in proportion, beyond the last as many times it."""
    if form not in table:  # like its nearest, and slower where it has more bits
        near = _nearest(list(table), form)
        return _seconds_each(table, near, rows).times(max(_bits(form) / _bits(near), 1.0))
    found = table[form]
    if rows <= ROWS[0]:
        return Figure(*found[str(ROWS[0])])
    if rows >= ROWS[-1]:
        return Figure(*found[str(ROWS[-1])]).times(rows / ROWS[-1])
    low, high = next(pair for pair in itertools.pairwise(ROWS) if rows < pair[1])
    first, last = Figure(*found[str(low)]), Figure(*found[str(high)])
    part = (rows - low) / (high - low)
    return first.times(1 - part).plus(last.times(part))


def _bits(form: str) -> float:
    return PLAIN[form] if form in PLAIN else FORMATS[form].bits_per_weight


def _nearest(known: list[str], form: str) -> str:
    """The format that was measured whose weights are most like these in size, packed like packed."""
    return min(known, key=lambda name: ((name in PLAIN) != (form in PLAIN), abs(_bits(name) - _bits(form))))


def _measured(
    works: list[_Work],
    config: ModelConfig,
    attention: Figure,
    profile: Profile,
    *,
    tokens: int,
    sequences: int,
) -> _Times:
    products, reading = Figure(0.0, 0.0, 0.0), 0.0
    for one in works:
        table = profile.experts if one.kind == "experts" else profile.linear
        products = products.plus(_seconds_each(table, one.form, one.rows).times(one.numbers))
        reading += one.size_bytes / profile.best_read_rate.middle
    overhead = profile.overhead["plain" if all(one.form in PLAIN for one in works) else "packed"]
    each = {name: Figure(*figure) for name, figure in overhead.items()}
    counts = {
        "step": 1,
        "layer": config.layers,
        "sequence": sequences,
        "vocabulary": sequences * config.vocab_size,
        "token": tokens * config.layers,
        "width": tokens * config.layers * config.d_model,
    }
    fixed = Figure(0.0, 0.0, 0.0)
    for name, count in counts.items():
        fixed = fixed.plus(each[name].times(count))
    total = products.plus(attention).plus(fixed)
    limit = COMPUTE
    if fixed.middle > 0.5 * total.middle:
        limit = FIXED
    elif reading > 0.5 * total.middle:
        limit = MEMORY
    return _Times(Band(total.low * MARGIN.low, total.high * MARGIN.high), limit)


def _with_misses(
    config: ModelConfig,
    stored: Stored,
    machine: Machine,
    misses: float,
    times: _Times,
    works: list[_Work],
    steps: list[int],
) -> Speed:
    """With the experts that come from the tier below, for steps of so many tokens."""
    tokens = sum(steps)
    missed = misses * stored.expert_bytes * sum(distinct_share(config, step) for step in steps)
    seconds, limit = times.band, times.limit
    if missed:
        assert config.moe is not None
        rate = machine.tier_rate(stored.expert_bytes / (len(config.moe_layers) * _experts(config)))
        waiting = Band(missed / rate.high / machine.count, missed / rate.low / machine.count)
        limit = machine.tier if waiting.middle > seconds.middle else limit
        seconds = Band(max(seconds.low, waiting.low), seconds.high + waiting.high)
    return Speed(
        tokens_per_s=Band(tokens / seconds.high, tokens / seconds.low),
        seconds=seconds,
        limit=limit,
        read_bytes=sum(one.size_bytes for one in works),
        missed_bytes=missed,
    )


def roofline(config: ModelConfig, stored: Stored, machine: Machine, setting: Setting) -> float:
    """Tokens per second that cannot be passed: all weights of a step read at the published bandwidth, or multiplied."""
    works = list(_works(config, stored, setting.batch, setting.batch))
    kv = setting.batch * cost.kv_bytes(config, setting.context, KV_BYTES[setting.kv_dtype])
    scores = setting.batch * cost.flops_per_token(config, setting.context).components["attention_scores"]
    return setting.batch / max(_limits(works, kv, scores, machine))


def read_share_limit(config: ModelConfig) -> int:
    """The batch from which on a step reads at least nine of ten experts; 0 for a dense model."""
    if config.moe is None:
        return 0
    stay = max(
        1 - config.moe.at(layer).experts_per_token / config.moe.at(layer).stored
        for layer in config.moe_layers
    )
    return math.ceil(math.log(0.1) / math.log(stay)) if stay else 1


def training(
    config: ModelConfig,
    machine: Machine,
    tokens: float,
    context: int,
    *,
    cluster: Cluster | None = None,
    step_tokens: float = 0.0,
    row_bytes: float = 2.0,
    once: Once = "node",
    stages: int = 1,
) -> dict[str, Band]:
    """A step of training, and the hours and days of so many tokens; nothing is computed twice.

    A step's seconds are computing, the all-to-alls of experts (out and back, forward and backward) and the summing of
    gradients (bfloat16, each number sent twice): side by side at the lower end, one after the other at the upper.

    Args:
        config: The model's.
        machine: All devices; as many as there are in the cluster, or a multiple.
        tokens: To train on.
        context: Of a sequence.
        cluster: Over which experts are spread; None leaves out everything that devices tell one another.
        step_tokens: Of all devices together; 0 is four sequences on each.
        row_bytes: Of a number on its way, the mean of out and back.
        once: How often a row is sent, as of `links.Once`.
        stages: Of a pipeline, each of which holds its share of the layers.
    """
    devices, step_tokens = machine.count, step_tokens or 4 * context * machine.count
    group = stages * (cluster.ranks if cluster else 1)
    assert devices % group == 0, (devices, cluster, stages)
    flops = cost.training_flops_per_token(config, (context + 1) // 2)
    work = step_tokens * flops.total / machine.device.flops["bf16"] / devices
    computing = Band(work / TRAINING_SHARE.high, work / TRAINING_SHARE.low)
    parts = {"computing_seconds": computing}
    if cluster is not None and devices > 1:
        size = sent(config, cluster, once).times(4 * step_tokens / devices * config.d_model * row_bytes)
        rounds = 4 * len(config.moe_layers) * step_tokens / devices / context
        parts["exchange_seconds"] = exchange(cluster, size, rounds)
        parts["gradient_seconds"] = _gradients(config, cluster, devices, stages)
    step = Band(max(one.low for one in parts.values()), sum(one.high for one in parts.values()))
    hours = Band(*(end * tokens / step_tokens * devices / 3600 for end in step))
    days = Band(hours.low / 24 / devices, hours.high / 24 / devices)
    return {"device_hours": hours, "days": days, "step_seconds": step, **parts}


def _gradients(config: ModelConfig, cluster: Cluster, devices: int, stages: int) -> Band:
    """Seconds of summing what devices hold alike: all but the experts, and experts where there are replicas."""
    counts = cost.parameters(config)
    experts = counts.components["routed_experts"]
    copies = devices // (cluster.ranks * stages)
    mine = (counts.total - experts) * (1 - stages / devices) + experts / cluster.ranks * (1 - 1 / copies)
    size = 2 * 2 * mine / stages
    alone = devices <= cluster.per_node
    return exchange(cluster, Copies(size, 0.0) if alone else Copies(0.0, size))
