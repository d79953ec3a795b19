"""Loading a model into a memory budget: what it may hold, what that leaves for experts, and who streams the others.

The budget is that of the whole process. What is needed all the time (weights outside of the experts, routers, pages of
keys and values, the largest step) is counted first; the rest is slots for experts.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from moiety.backends import cpu
from moiety.config import ModelConfig
from moiety.errors import BudgetError, DependencyError, UsageError
from moiety.infer.embedding import leave_embedding
from moiety.infer.engine import Engine
from moiety.infer.offload import ExpertStore, silent, slot_bytes
from moiety.infer.options import EngineOptions, StreamOptions
from moiety.infer.room import AUTOMATIC_BYTES, page_count
from moiety.model import checkpoint, layout
from moiety.model.expert_file import ExpertFile, stacks_in
from moiety.model.norm import RMSNorm
from moiety.model.paged import PagePool
from moiety.model.quantized import open_quantized, plain_state
from moiety.model.transformer import Block, Transformer
from moiety.moe.hosted import HostedExperts
from moiety.moe.layer import MoE
from moiety.moe.packed import MixedExperts, PackedExperts
from moiety.moe.routers import CostAware
from moiety.moe.streamed import Foresight, StreamedExperts
from moiety.residency import Residency, settle

__all__ = ["Budget", "activation_bytes", "connect", "load_streamed", "process_bytes", "residency_of"]

GROWTH_BYTES = 48 << 20  # code that is loaded and memory that is kept aside when a process first computes
MARGIN_BYTES = 32 << 20  # what a process holds differs from run to run by less
GUESSED_BYTES = 16 << 20  # an expert that takes longer to read than a layer to compute is not read on a guess
SPARE_SHARE = 32  # of the slots at most one in so many is for guesses: what is known has none of them
KEY_VALUE_SHARE = 8  # of the budget at most an eighth, where nobody says how much


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a memory budget is spent on.

    Args:
        total_bytes: Of the process.
        process_bytes: What it holds before the first step, all weights but the experts included.
        kv_bytes: For keys and values.
        step_bytes: What a step of the engine holds at most.
        slots: For experts.
        slot_bytes: Of each.
        experts: How many the model has.
    """

    total_bytes: int
    process_bytes: int
    kv_bytes: int
    step_bytes: int
    slots: int
    slot_bytes: int
    experts: int

    @property
    def rest_bytes(self) -> int:
        """What is left for experts."""
        return self.total_bytes - self.process_bytes - self.kv_bytes - self.step_bytes

    @property
    def words(self) -> str:
        """One line for people."""
        held, keys, step, slot = (
            f"{size / 2**20:,.0f}"
            for size in (self.process_bytes, self.kv_bytes, self.step_bytes, self.slots * self.slot_bytes)
        )
        return (
            f"memory: {self.total_bytes / 2**20:,.0f} MiB = {held} for the process and what is always needed + "
            f"{keys} for keys and values + {step} for a step + {slot} for {self.slots} of {self.experts} experts"
        )


def process_bytes() -> int:
    """Memory that this process has resident and uses now; outside of Linux the most that it ever had."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def activation_bytes(config: ModelConfig, options: EngineOptions) -> int:
    """What the largest step holds at its peak: one block's activations in float32, and logits."""
    attention, width = config.attention, config.d_model
    qkv = attention.head_dim * (2 * attention.heads + 2 * attention.kv_heads)
    wide = 3 * config.d_ff
    if config.moe is not None:
        for layer in config.moe_layers:
            moe = config.moe.at(layer)
            wide = max(wide, moe.experts_per_token * (width + 2 * moe.d_ff) + 3 * moe.shared_d_ff)
    numbers = options.step_tokens * (6 * width + 2 * qkv + wide)
    if attention.mla is not None:
        longest = options.max_positions or config.max_positions
        numbers += attention.heads * options.step_tokens * min(longest, options.step_tokens * 4)
    rows = options.max_requests * (1 + options.draft)
    return 4 * (numbers + 4 * rows * config.vocab_size) + GROWTH_BYTES


def load_streamed(
    folder: Path,
    options: StreamOptions,
    *,
    engine: EngineOptions | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = silent,
) -> Transformer:
    """Load a packed model within `options.memory`; where all of it fits, it is simply loaded.

    Args:
        folder: Of a model that `moiety quantize` wrote.
        options: The budget, and how it is used.
        engine: What the engine will be given; its pages and its largest step are counted.
        backend: Who multiplies what is not packed.
        dtype: Of what is not packed.
        say: Told what was decided, in sentences.

    Raises:
        BudgetError: the model cannot be run within so little.
        UsageError: the model is not packed, or has no experts.
        DependencyError: the kernels were not compiled here.
        FormatError, ConfigError, StorageError: as `checkpoint.load`.
    """
    engine = EngineOptions() if engine is None else engine
    _check(folder)
    with open_quantized(layout.checked_folder(folder), backend=backend) as opened:
        model, file = opened.model, stacks_in(opened)
        if not file.stacks:
            raise UsageError(f"{folder} has no experts to stream", hint="load it without a memory budget")
        streamed = {f"{stack.path}.tiles" for stack in file.stacks}
        names = [name for name in opened.tiles.places if name.endswith(".tiles") and name not in streamed]
        embedding, on_disk = model.embed, leave_embedding(opened, dtype)
        state = plain_state(opened, dtype, on_disk) | {name: opened.tiles.read(name) for name in names}
        missing, unexpected = model.load_state_dict(state, assign=True, strict=False)
        assert set(missing) == streamed and not unexpected, (folder, missing, unexpected)
        del state
        budget = _budget(model, file, options.memory_bytes, engine)
        weights = sum(stack.experts * stack.expert_bytes for stack in file.stacks)
        fits = budget.rest_bytes >= weights + (model.embed.weight.nbytes if on_disk else 0)
        if fits:
            model.embed = embedding
            mapped = {name: one for name, one in opened.tiles.mapped().items() if name in streamed}
            rest = plain_state(opened, dtype, opened.plain.places.keys() - on_disk)
            model.load_state_dict(mapped | rest, assign=True, strict=False)
    model.requires_grad_(False).eval()
    if fits:
        say(f"all {budget.experts} experts fit into {options.memory}: nothing is streamed")
    else:
        _stream(model, file, budget, options, say)
    return model


def _check(folder: Path) -> None:
    """Refuse what cannot be streamed, or not here."""
    if checkpoint.is_gguf(folder) or not checkpoint.is_packed(folder):
        raise UsageError(
            f"{folder} is not packed: its experts cannot be read one at a time",
            hint="moiety quantize MODEL FOLDER packs it, in any format, the original's numbers too (bf16)",
        )
    if not cpu.level():
        raise DependencyError(
            "streaming needs the compiled kernels, which are not here",
            hint="install a C compiler and the package again; `moiety doctor` says more",
        )


def _budget(model: Transformer, file: ExpertFile, total_bytes: int, engine: EngineOptions) -> Budget:
    """What each part gets; the least is a slot for every expert that a token uses in one layer."""
    config, dtype = model.config, Engine.kv_dtype(model, engine)
    assert config.moe is not None, file.path
    page_bytes = PagePool(config, 1, engine.page_tokens, dtype=dtype).page_bytes
    held, step, slot = process_bytes(), activation_bytes(config, engine), slot_bytes(file)

    def keys(total: int) -> int:
        automatic = max(min(total // KEY_VALUE_SHARE, AUTOMATIC_BYTES), page_bytes)
        return page_bytes * page_count(config, engine, dtype, automatic)[0]

    experts = sum(stack.experts for stack in file.stacks)
    budget = Budget(
        total_bytes=total_bytes,
        process_bytes=held,
        kv_bytes=keys(total_bytes),
        step_bytes=step,
        slots=0,
        slot_bytes=slot,
        experts=experts,
    )
    least = max(_chosen(config))
    slots = min(budget.rest_bytes // slot, experts)
    if slots < least:
        smallest = total_bytes
        for _ in range(16):  # keys and values grow with the budget, by an eighth of it at most
            smallest = held + step + least * slot + keys(smallest)
        smallest = -(-(smallest + MARGIN_BYTES) // 2**20)
        needed = replace(budget, total_bytes=smallest << 20, kv_bytes=keys(smallest << 20), slots=least)
        raise BudgetError(
            f"a budget of {total_bytes / 2**20:,.0f} MiB is too small for this model; the smallest is {smallest} MiB",
            hint=f"{needed.words}. Less for a step: a lower step_tokens; for keys and values: kv_bytes, max_positions",
        )
    return replace(budget, slots=slots)


def _chosen(config: ModelConfig) -> list[int]:
    """Experts that a token uses, by layer that has some."""
    assert config.moe is not None
    return [config.moe.at(layer).experts_per_token for layer in config.moe_layers]


def _stream(
    model: Transformer, file: ExpertFile, budget: Budget, options: StreamOptions, say: Callable[[str], None]
) -> None:
    """Put layers that ask a store in the place of those that hold their experts."""
    pays = options.prefetch and budget.slot_bytes <= GUESSED_BYTES
    chosen = _chosen(model.config)
    residency, guesses, said = residency_of(
        budget.slots, budget.slot_bytes, chosen, options.expert_policy, prefetch=pays
    )
    store = ExpertStore(file, residency, say=say)
    store.kv_bytes = budget.kv_bytes
    layers: list[tuple[Block, StreamedExperts | HostedExperts]] = []
    for block in model.blocks:
        assert isinstance(block, Block), type(block)
        feed_forward = block.feed_forward
        if isinstance(feed_forward, MoE) and isinstance(feed_forward.experts, PackedExperts | MixedExperts):
            experts = StreamedExperts(
                feed_forward.experts,
                store,
                len(layers),
                prefer=options.resident_bias,
                skip_below=options.skip_misses_below,
            )
            feed_forward.experts = experts
            if options.resident_bias:
                feed_forward.router = CostAware(feed_forward.router, options.resident_bias)
                feed_forward.router.check(feed_forward.choices)
            layers.append((block, experts))
    connect(layers, guesses=guesses)
    say(budget.words)
    if said:
        say(said)


def residency_of(
    slots: int, slot_bytes: int, chosen: Sequence[int], policy: str, *, prefetch: bool
) -> tuple[Residency, bool, str]:
    """Who is in which of so many slots, whether some are for guesses, and why the policy is not the one asked for.

    Args:
        slots: All there are.
        slot_bytes: Of each.
        chosen: Experts that a token uses, by layer.
        policy: A name, or "auto".
        prefetch: Keep a few for guesses.

    Raises:
        ConfigError: no such policy, or too few slots.
    """
    spare = min(max(chosen), slots // SPARE_SHARE)
    spare = spare if prefetch and slots - spare > sum(chosen) else 0
    settled = settle(slots - spare, chosen, policy)
    rest = min(2 * max(chosen), slots - spare)
    residency = Residency(
        slots, settled.policy, layers=len(chosen), spare=spare, rest=rest, slot_bytes=slot_bytes
    )
    return residency, spare > 0, settled.said


def connect(layers: Sequence[tuple[Block, StreamedExperts | HostedExperts]], *, guesses: bool) -> None:
    """Let each layer foresee the experts of the next, if there are slots for guesses."""
    for (block, experts), (following, _) in pairwise(layers):
        experts.foresight = _foresight(block, following, experts.layer + 1) if guesses else None


def _foresight(block: Block, following: Block, layer: int) -> Foresight | None:
    """How a block's experts are foreseen by the one before; None where its router looks at more than its input."""
    moe, before, after = following.feed_forward, block.feed_forward_norm, following.feed_forward_norm
    if not isinstance(moe, MoE) or moe.gate is None or moe.router.needs.token_ids or moe.capacity is not None:
        return None
    if before is None and after is None:
        return Foresight(moe, layer, None)
    if not isinstance(before, RMSNorm) or not isinstance(after, RMSNorm):
        return None
    safe_D = torch.where(before.weight.abs() < 1e-6, torch.inf, before.weight.float())
    return Foresight(moe, layer, (after.weight.float() / safe_D).to(before.weight.dtype))
