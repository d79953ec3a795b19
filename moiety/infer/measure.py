"""How fast a model is here, against what this machine can do: decoding at several batch sizes, and prompts.

The limit of decoding is reading: weights that a step needs, over the rate at which this machine reads memory. The
experts that a step needs are counted in the steps themselves, because how many different ones a batch chooses depends
on the model. The limit of a prompt is multiplying. Both limits are measured beside what they are compared with. A model
that fits into the processor's caches may pass the limit of the memory.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moiety import cost
from moiety.backends import cpu
from moiety.backends.cpu_limits import multiply_rate, read_all
from moiety.config import ModelConfig
from moiety.errors import MoietyError, UsageError
from moiety.infer.engine import Engine, Handle
from moiety.infer.offload import store_of
from moiety.infer.options import BenchOptions, EngineOptions, RequestOptions, SamplingOptions, StreamOptions
from moiety.infer.runner import imbalance
from moiety.infer.streaming import load_streamed
from moiety.model import checkpoint
from moiety.model.paged import PagePool
from moiety.model.slots import packed_matrices
from moiety.model.transformer import Block, Transformer
from moiety.moe.layer import MoE
from moiety.moe.packed import MixedExperts
from moiety.moe.streamed import StreamedExperts
from moiety.observe.record import Recorder

__all__ = [
    "Decoding",
    "Knee",
    "Prefill",
    "Report",
    "Weights",
    "decoding",
    "knee",
    "largest_engine",
    "model_at",
    "multiplies_integers",
    "percentile",
    "prefill",
    "prefill_operations",
    "read_rate",
    "run",
    "weights_of",
]

ENOUGH = 0.9  # of the most tokens per second
BUFFER_BYTES = 1 << 28


class Weights(NamedTuple):
    """Bytes that a step reads: `dense` every time, and of each layer those of the experts that it chose."""

    dense: int
    experts: Mapping[int, tuple[float, ...]]

    def read(self, counts: Mapping[int, Tensor]) -> float:
        """Bytes of one step, whose experts of a layer got so many pairs; choices past the experts are null experts."""
        chosen = self.dense + 0.0
        for layer, counts_E in counts.items():
            pairs = zip(self.experts[layer], counts_E.tolist(), strict=False)
            chosen += sum(size for size, count in pairs if count)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Some sequences that draw tokens together.

    Args:
        sequences: How many.
        tokens_per_s: Of all of them, after each one's first.
        latency_p50_s: From a sequence's token to its next, over all sequences and tokens.
        latency_p99_s: The same.
        first_token_s: From submission to a sequence's first token, p50.
        imbalance: Pairs of the busiest expert over the mean, mean over layers and steps; 0 without experts.
        distinct_experts: Experts of a layer that a step reads, mean over layers and steps; 0 without experts.
        step_bytes: Weights that a step reads, mean over steps.
        read_rate: Bytes per second that this machine reads; None where the kernels that measure it are not here.
        read_share: Of that rate, what the weights alone take.
    """

    sequences: int
    tokens_per_s: float
    latency_p50_s: float
    latency_p99_s: float
    first_token_s: float
    imbalance: float
    distinct_experts: float
    step_bytes: float
    read_rate: float | None
    read_share: float | None


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """One prompt.

    Args:
        tokens: Of it.
        first_token_s: From submission to the first token.
        tokens_per_s: Of the prompt.
        operations_per_s: A multiplication and an addition are two.
        multiply_rate: What this machine can do, of integers or of float32; None as in `Decoding`.
        multiply_share: Of that rate.
    """

    tokens: int
    first_token_s: float
    tokens_per_s: float
    operations_per_s: float
    multiply_rate: float | None
    multiply_share: float | None


class Knee(NamedTuple):
    """The batch size from which on more sequences bring little, and the reason in words."""

    sequences: int
    words: str


class Report(NamedTuple):
    """Everything that `run` measured."""

    prefill: list[Prefill]
    decode: list[Decoding]
    knee: Knee | None


def _bytes_of(module: nn.Module) -> int:
    return sum(part.nbytes for part in (*module.parameters(), *module.buffers()))


def weights_of(model: Transformer) -> Weights:
    """What a model's steps read. An embedding that is only looked up is left out; a tied head's is read whole."""
    experts: dict[int, tuple[float, ...]] = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block), type(block)
        if isinstance(block.feed_forward, MoE):
            mine = block.feed_forward.experts
            if isinstance(mine, StreamedExperts):
                experts[layer] = tuple(mine.expert_bytes[number] for number in range(mine.count))
                continue
            stacks = [(mine, range(mine.count))]
            if isinstance(mine, MixedExperts):
                stacks = list(zip(mine.parts, mine.numbers, strict=True))  # type: ignore[arg-type]
            found = {number: _bytes_of(part) / len(numbers) for part, numbers in stacks for number in numbers}
            experts[layer] = tuple(found[number] for number in sorted(found))
    has_own_head = any(part.dim() > 1 for part in (model.head or nn.Module()).state_dict().values())
    dense = _bytes_of(model) - (_bytes_of(model.embed) if has_own_head else 0)
    held = 0 if store_of(model) else round(sum(map(sum, experts.values())))
    return Weights(dense - held, experts)


def multiplies_integers(model: Transformer) -> bool:
    """True if most bytes of the model are packed integers, which are multiplied as such."""
    packed = [one.tiles.nbytes for one in packed_matrices(model).values() if one.form.kind == "integer"]
    return 2 * sum(packed) > _bytes_of(model)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them do not pass."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def read_rate(buffer: Tensor) -> float | None:
    """Bytes per second of this memory, the best of three readings; None where the kernels were not compiled."""
    if not cpu.level():
        return None
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        read_all([buffer])
        seconds.append(time.perf_counter() - begun)
    return buffer.nbytes / min(seconds)


def prefill_operations(model: Transformer, tokens: int) -> int:
    """Operations of a prompt; the head is multiplied with its last token alone."""
    once = cost.flops_per_token(model.config, (tokens + 1) // 2, absorbed=False)
    return tokens * once.total - (tokens - 1) * once.components["head"]


def _engine(
    model: Transformer,
    sequences: int,
    prompt: int,
    tokens: int,
    kv_dtype: str,
    step: int,
    recorder: Recorder | None = None,
) -> Engine:
    """An engine in which so many sequences have room at the same time."""
    longest, most = prompt + tokens - 1, model.config.max_positions
    if sequences > 1:  # a prompt is let in when every sequence that runs has a page in reserve
        longest = max(longest, -(-prompt // 16) * 16 + 16)
    if min(sequences, prompt, tokens) < 1 or longest > most:
        raise UsageError(
            f"{sequences} sequences of {prompt} tokens and {tokens} more cannot be measured",
            hint=f"all are at least 1, and the model has {most} positions",
        )
    small = EngineOptions(page_tokens=16, kv_dtype=kv_dtype)
    page_bytes = PagePool(model.config, 1, 16, dtype=Engine.kv_dtype(model, small)).page_bytes
    return Engine(
        model,
        recorder=recorder,
        options=EngineOptions(
            kv_bytes=sequences * -(-longest // 16) * page_bytes,
            kv_dtype=kv_dtype,
            max_positions=longest,
            step_tokens=max(step, sequences),
            max_requests=sequences,
            prefix_cache=False,
        ),
    )


def largest_engine(config: ModelConfig, options: BenchOptions) -> EngineOptions:
    """An engine that holds as much as the largest of those that `run` makes, for a budget of memory."""
    lengths = [min(length, config.max_positions) for length in options.lengths]
    each = max(options.prompt + options.tokens, -(-options.prompt // 16) * 16 + 16)
    dtype = {"bf16": torch.bfloat16}.get(options.kv_dtype, torch.float32)
    pages = max([-(-length // 16) for length in lengths] + [size * -(-each // 16) for size in options.sizes])
    return EngineOptions(
        kv_bytes=pages * PagePool(config, 1, 16, dtype=dtype).page_bytes
        + BUFFER_BYTES,  # it is read for the limit
        kv_dtype=options.kv_dtype,
        max_positions=min(max([*lengths, each]), config.max_positions),
        step_tokens=max([*lengths, *(size * options.prompt for size in options.sizes)]),
        max_requests=max(options.sizes),
    )


def model_at(
    place: Path, options: BenchOptions, stream: StreamOptions, packed: bool, say: Callable[[str], None]
) -> Transformer:
    """The model to measure; `packed` as of `checkpoint.load`, `say` as of `load_streamed`, and the errors of both."""
    if not stream.memory:
        return checkpoint.load(place, packed=packed).eval()
    return load_streamed(
        place, stream, engine=largest_engine(checkpoint.load_config(place), options), say=say
    )


def _answered(engine: Engine, model: Transformer, sequences: int, prompt: int, tokens: int) -> list[Handle]:
    """Requests with random prompts, submitted and not yet worked on."""
    asked = RequestOptions(max_tokens=tokens, ignore_end=True, sampling=SamplingOptions(temperature=0))
    top = range(model.config.vocab_size)
    return [engine.submit(random.choices(top, k=prompt), asked) for _ in range(sequences)]


def _run(engine: Engine, handles: Sequence[Handle]) -> list[Mapping[int, Tensor]]:
    """Answer all; the experts' pairs in each step in which every one of the sequences drew a token and nothing else."""
    found = []
    while not all(handle.is_done for handle in handles):
        begun = all(handle.request.times_s for handle in handles)
        events = engine.step()
        if begun and len(events) == len(handles):
            found.append(engine.expert_counts())
    for handle in handles:
        if handle.result().error:
            raise MoietyError(handle.result().error)
    return found


def _stored(model: Transformer, layer: int, counts_E: Tensor) -> Tensor:
    """A layer's pairs by stored expert, where one answers for several."""
    assert model.config.moe is not None
    answers = torch.tensor(model.config.moe.at(layer).answers)
    return torch.bincount(answers, weights=counts_E[: len(answers)].cpu()) if len(answers) else counts_E


def decoding(
    model: Transformer,
    sequences: int,
    *,
    prompt: int = 16,
    tokens: int = 32,
    kv_dtype: str = "auto",
    memory: Tensor | None = None,
    recorder: Recorder | None = None,
) -> Decoding:
    """Let sequences of random tokens go on together, greedily, after a short round that does not count.

    Args:
        model: In evaluation mode.
        sequences: How many at a time; all prompts go through the model in one step, so that they keep pace.
        prompt: Tokens of each prompt.
        tokens: That each draws, at least two.
        kv_dtype: Of `EngineOptions`.
        memory: To read for the limit, larger than caches; None makes some.
        recorder: Takes the routing of every step, those of the short round too.

    Raises:
        UsageError: more tokens than the model has positions.
        MoietyError: logits that are not finite.
    """
    assert tokens >= 2, tokens
    engine = _engine(model, sequences, prompt, tokens, kv_dtype, sequences * prompt, recorder)
    _run(engine, _answered(engine, model, sequences, prompt, 2))
    rate = read_rate(torch.ones(BUFFER_BYTES, dtype=torch.uint8) if memory is None else memory)
    handles = _answered(engine, model, sequences, prompt, tokens)
    steps = _run(engine, handles)
    results, weights = [handle.result() for handle in handles], weights_of(model)
    times = [handle.request.times_s for handle in handles]
    seconds = max(map(max, times)) - max(map(min, times))
    between = [one for result in results for one in result.between_tokens_s]
    assert len(steps) == tokens - 1, (len(steps), tokens, "the sequences did not keep pace")
    stored = [
        {layer: _stored(model, layer, found_E) for layer, found_E in counts.items()} for counts in steps
    ]
    step_bytes = fmean(weights.read(counts) for counts in stored)
    used = [
        int((counts_E[: len(weights.experts[layer])] > 0).sum())
        for counts in stored
        for layer, counts_E in counts.items()
    ]
    return Decoding(
        sequences=sequences,
        tokens_per_s=sequences * len(steps) / seconds,
        latency_p50_s=percentile(between, 0.5),
        latency_p99_s=percentile(between, 0.99),
        first_token_s=percentile([result.first_token_s for result in results], 0.5),
        imbalance=fmean(imbalance(list(counts.values())) for counts in steps),
        distinct_experts=fmean(used) if used else 0.0,
        step_bytes=step_bytes,
        read_rate=rate,
        read_share=None if rate is None else step_bytes * len(steps) / seconds / rate,
    )


def prefill(
    model: Transformer,
    tokens: int,
    *,
    kv_dtype: str = "auto",
    repeats: int = 3,
    recorder: Recorder | None = None,
) -> Prefill:
    """The median of some random prompts, one after the other, in the steps that an engine makes of them.

    Raises:
        UsageError: more tokens than the model has positions.
        MoietyError: logits that are not finite.
    """
    engine = _engine(model, 1, tokens, 1, kv_dtype, EngineOptions().step_tokens, recorder)
    seconds = []
    for _ in range(repeats + 1):
        handles = _answered(engine, model, 1, tokens, 1)
        _run(engine, handles)
        seconds.append(handles[0].result().first_token_s)
    median = percentile(seconds[1:], 0.5)
    integers = multiplies_integers(model)
    rate = max(multiply_rate(integers=integers) for _ in range(3)) if cpu.level() else None
    operations = prefill_operations(model, tokens) / median
    return Prefill(
        tokens=tokens,
        first_token_s=median,
        tokens_per_s=tokens / median,
        operations_per_s=operations,
        multiply_rate=rate,
        multiply_share=None if rate is None else operations / rate,
    )


def knee(rows: Sequence[Decoding]) -> Knee | None:
    """The smallest batch with at least 90 % of the most tokens per second; None for fewer than two batches.

    Args:
        rows: Of batches of different size, in any order.
    """
    rows = sorted(rows, key=lambda row: row.sequences)
    if len(rows) < 2:
        return None
    most = max(row.tokens_per_s for row in rows)
    place = next(place for place, row in enumerate(rows) if row.tokens_per_s >= ENOUGH * most)
    here = rows[place]
    one, other = (here, rows[place + 1]) if place + 1 < len(rows) else (rows[place - 1], here)
    change = (
        f"from {one.sequences} to {other.sequences} sequences tokens/s {_grown(one.tokens_per_s, other.tokens_per_s)}, "
        f"latency {_grown(one.latency_p50_s, other.latency_p50_s)}"
    )
    end = "still worth it, and more may be" if other is here else "enough"
    return Knee(here.sequences, f"{change}: {here.sequences} is {end}")


def run(
    model: Transformer,
    options: BenchOptions,
    say: Callable[[str], object],
    recorder: Recorder | None = None,
) -> Report:
    """Measure prompts, then batches.

    Args:
        model: In evaluation mode.
        options: Which.
        say: Called with a line before each.
        recorder: Takes the routing of every step.

    Raises:
        UsageError, MoietyError, ConfigError: as of `decoding` and of the engine.
    """
    prompts, rows = [], []
    for length in sorted({min(length, model.config.max_positions) for length in options.lengths}):
        say(f"a prompt of {length} tokens")
        prompts.append(prefill(model, length, kv_dtype=options.kv_dtype, recorder=recorder))
    memory = torch.ones(BUFFER_BYTES, dtype=torch.uint8)
    how = {"prompt": options.prompt, "tokens": options.tokens}
    for size in options.sizes:
        say(f"{size} sequences")
        rows.append(decoding(model, size, **how, kv_dtype=options.kv_dtype, memory=memory, recorder=recorder))
    return Report(prompts, rows, knee(rows))


def _grown(before: float, after: float) -> str:
    """A change in words."""
    change = 100 * (after / before - 1)
    return f"{'grows' if change >= 0 else 'falls'} by {abs(change):.0f} %"
