"""Ways to fit a model into memory: format, resident experts, the cache's dtype; and the best one in a sentence.

`flags` says the same placement in the words of llama.cpp and vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moiety.config import ModelConfig
from moiety.plan.estimate import Memory, memory
from moiety.plan.hardware import KINDS
from moiety.plan.speed import Machine, Setting, Speed, decode
from moiety.plan.weights import Stored

__all__ = ["Layout", "advice", "best", "cycle_share", "flags", "layouts", "least_share", "short_bytes"]

FORMATS = ("bf16", "int8-g32", "int4-g32")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to hold a model.

    Args:
        stored: Its weights.
        setting: Of the run; how many experts are resident.
        memory: What that takes; the smallest that works where it does not fit.
        fits: It does.
        decode: How fast tokens are drawn; None where it does not fit.
        below_cycle: Fewer experts are resident than one step uses: a cache that evicts the least recently used would
            never hit, so a fixed set has to stay.
    """

    stored: Stored
    setting: Setting
    memory: Memory
    fits: bool
    decode: Speed | None
    below_cycle: bool


def cycle_share(config: ModelConfig, batch: int = 1) -> float:
    """Share of all experts that a step touches at most: K x batch of each layer's E."""
    return _chosen(config, batch) / _total(config)


def least_share(config: ModelConfig, batch: int = 1) -> float:
    """Share of the experts without which a step of one layer cannot be computed."""
    moe = config.moe
    assert moe is not None
    most = max(
        min(moe.at(layer).experts_per_token * batch, moe.at(layer).stored) for layer in config.moe_layers
    )
    return most / _total(config)


def _total(config: ModelConfig) -> int:
    assert config.moe is not None
    return sum(config.moe.at(layer).stored for layer in config.moe_layers)


def _chosen(config: ModelConfig, batch: int) -> int:
    moe = config.moe
    assert moe is not None
    return sum(
        min(moe.at(layer).experts_per_token * batch, moe.at(layer).stored) for layer in config.moe_layers
    )


def layouts(
    config: ModelConfig,
    choices: Sequence[Stored],
    machine: Machine,
    setting: Setting,
    memory_bytes: float,
    *,
    kv_dtypes: Sequence[str] = ("bf16",),
    context: int,
    ours: bool = False,
) -> list[Layout]:
    """Each choice of weights with each dtype of the cache, with as many experts resident as fit.

    Args:
        config: The model's.
        choices: Its weights, in several formats.
        machine: What runs it.
        setting: Batch and hit rate; `resident` is found here.
        memory_bytes: Of all devices.
        kv_dtypes: Of the cache.
        context: Tokens for which the cache has room, of each sequence.
        ours: As of `estimate.memory`.
    """
    found = []
    for stored in choices:
        for kv_dtype in kv_dtypes:

            def needed(share: float, stored: Stored = stored, kv_dtype: str = kv_dtype) -> Memory:
                return memory(
                    config,
                    stored,
                    machine.device,
                    context=context,
                    batch=setting.batch,
                    kv_dtype=kv_dtype,
                    resident=share,
                    ours=ours,
                    profile=machine.profile,
                    devices=machine.count,
                )

            least = least_share(config, setting.batch) if config.moe is not None else 1.0
            share = 1.0
            if needed(1.0).total > memory_bytes and config.moe is not None:
                share = (memory_bytes - needed(0.0).total) / stored.expert_bytes
                whole = int(max(share, 0.0) * _total(config))
                share = min(whole, _total(config) - 1) / _total(config)  # without the embedding all may fit
            fits = share >= least and needed(share).total <= memory_bytes
            mine = replace(setting, kv_dtype=kv_dtype, resident=share if fits else least)
            found.append(
                Layout(
                    stored=stored,
                    setting=mine,
                    memory=needed(mine.resident),
                    fits=fits,
                    decode=decode(config, stored, machine, mine) if fits else None,
                    below_cycle=fits and share < 1 and share < cycle_share(config, setting.batch),
                )
            )
    return found


def short_bytes(size: float) -> str:
    """Bytes in the unit that people say: 24.0 GiB, 350 MiB."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1024:,.0f} KiB"


def best(found: Sequence[Layout]) -> Layout | None:
    """The fastest layout that fits; between layouts within a tenth of each other the one of more bits."""
    speeds = [(one.decode.tokens_per_s.middle, one) for one in found if one.decode is not None]
    enough = 0.9 * max((middle for middle, _ in speeds), default=0.0)
    near = [one for middle, one in speeds if middle >= enough]
    return max(near, key=lambda one: one.stored.bits_per_weight, default=None)


def advice(found: Sequence[Layout], memory_bytes: float) -> str:
    """The best layout in one sentence; where none fits, the smallest that would work, and what it needs."""
    chosen = best(found)
    if chosen is None:
        least = min(found, key=lambda one: one.memory.total)
        part = "" if least.setting.resident >= 1 else " with one layer's experts at a time in memory"
        return (
            f"does not fit in {short_bytes(memory_bytes)}: the smallest that works is {least.stored.form}{part}, "
            f"{short_bytes(least.memory.total)}"
        )
    assert chosen.decode is not None
    where = "wholly in memory"
    if chosen.setting.resident < 1:
        where = f"with {100 * chosen.setting.resident:.0f} % of experts resident"
    said = (
        f"fits in {short_bytes(memory_bytes)} at {chosen.stored.form} {where}: expect "
        f"{_figures(chosen.decode.tokens_per_s.low)} to {_figures(chosen.decode.tokens_per_s.high)} tokens/s, "
        f"limited by {chosen.decode.limit}"
    )
    if chosen.below_cycle:
        said += "; fewer experts are resident than one token uses, so keep a fixed set: LRU would never hit"
    return said


def _figures(value: float) -> str:
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def flags(
    config: ModelConfig, layout: Layout, machine: Machine, *, name: str, context: int, devices: int
) -> dict[str, str]:
    """The placement for llama.cpp (b11549) and vLLM (0.32); a format of theirs stands for ours of as many bits."""
    resident, kind, batch = layout.setting.resident, machine.device.kind, layout.setting.batch
    cache = {"fp32": "f32", "bf16": "bf16", "fp8": "q8_0"}[layout.setting.kv_dtype]
    llama = f"llama-server -m {name}.gguf -ngl {99 if kind in ('gpu', 'mac') else 0} -c {context * batch}"
    llama += f" --cache-type-k {cache}"
    found = {"llama.cpp": llama}
    if resident < 1 and kind in ("gpu", "mac"):
        away = config.moe_layers[: max(round((1 - resident) * len(config.moe_layers)), 1)]
        blocks = "|".join(map(str, away))
        found = {
            "llama.cpp": f"{llama} --n-cpu-moe {away[-1] + 1}",
            "llama.cpp by name": f"{llama} -ot 'blk\\.({blocks})\\.ffn_.*_exps.*=CPU'",
        }
    elif resident < 1:
        found["llama.cpp note"] = (
            "without --no-mmap: what does not fit is paged in by the system, not by expert"
        )
    if kind != "gpu" and resident < 1:
        return found | {"vllm": "not possible: on a CPU it keeps all experts in memory"}
    vllm = [f"vllm serve {name} --max-model-len {context} --max-num-seqs {batch}"]
    if devices > 1:
        vllm.append(f"--tensor-parallel-size {devices}{' --enable-expert-parallel' if config.moe else ''}")
    if layout.setting.kv_dtype == "fp8":
        vllm.append("--kv-cache-dtype fp8")
    if resident < 1:
        away_bytes = (1 - resident) * layout.stored.expert_bytes / devices
        vllm.append(f"--cpu-offload-gb {away_bytes / 2**30:.1f} --cpu-offload-params experts")
    if kind == "gpu":
        vllm.append(f"--gpu-memory-utilization {KINDS['gpu'].usable}")
    return found | {"vllm": " ".join(vllm)}
