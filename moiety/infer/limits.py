"""Measuring this machine for plans: memory, disk, kernels, and what a step costs besides its products.

Kernels are timed as models use them, over weights larger than caches. What a step, a layer, a sequence and a token cost
besides is the difference between small models that differ in one size each, run by the engine.
"""

from __future__ import annotations

import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from moiety import cost
from moiety.backends import cpu
from moiety.backends.cpu_memory import huge_slab
from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.errors import DependencyError, StorageError
from moiety.infer.measure import decoding, prefill, read_rate
from moiety.infer.streaming import process_bytes
from moiety.model.transformer import Transformer
from moiety.moe.layer import MoE
from moiety.moe.packed import PackedLinear
from moiety.plan.profile import ROWS, VERSION, Figure, Profile
from moiety.routing import Routing

__all__ = ["FORMATS", "disk_rate", "disk_rates", "expert_seconds", "linear_seconds", "measure"]

FORMATS = ("fp32", "bf16", "int8-g32", "int4-g32", "mxfp4", "nf4-g64")
QUICK_FORMATS = ("fp32", "int8-g32", "int4-g32")
COLD_BYTES = 160 << 20  # weights of one kind that are passed before the first is met again
WIDTH, EXPERT_WIDTH = 2048, 1024
READS = (1 << 18, 1 << 20, 1 << 22, 1 << 24)
AHEAD = 4  # reads of a disk that are asked for at the same time
SLAB_BYTES = 32 << 20  # that these reads go to
BUFFER_BYTES = 1 << 28
# Makes a model of packed random weights from a shape and formats.
Make = Callable[[ModelConfig, str], Transformer]
Say = Callable[[str], object]


def _figure(values: Sequence[float]) -> Figure:
    """The median, the least, and the value that nine of ten do not pass."""
    ordered = sorted(values)
    return Figure(
        ordered[len(ordered) // 2], ordered[0], ordered[min(int(0.9 * len(ordered)), len(ordered) - 1)]
    )


def _timed(work: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of every call: at least five, for about so long; one before does not count."""
    work()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return times


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_rates() -> dict[str, Figure]:
    """Bytes of memory per second, by threads."""
    memory = torch.ones(BUFFER_BYTES, dtype=torch.uint8)
    counts = sorted(
        {1 << power for power in range(10) if 1 << power <= torch.get_num_threads()}
        | {torch.get_num_threads()}
    )
    found = {}
    for count in counts:
        with _threads(count):
            rates = [rate for _ in range(5) if (rate := read_rate(memory)) is not None]
        found[str(count)] = _figure(rates)
    return found


def disk_rates(folder: Path, size_bytes: int) -> tuple[dict[str, Figure], str]:
    """Bytes per second of random reads of a new file in a folder, by bytes of one read, and how they were made.

    Args:
        folder: On the disk in question.
        size_bytes: Of the file, which is removed again.

    Raises:
        StorageError: the system refused, the disk being full for instance.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="moiety-disk-") as file:
            piece = random.randbytes(1 << 22)
            for _ in range(max(size_bytes // len(piece), 4)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            length = os.fstat(file.fileno()).st_size
            direct = getattr(os, "O_DIRECT", 0)
            try:
                descriptor = os.open(file.name, os.O_RDONLY | direct)
            except OSError:  # a file system without it, such as tmpfs
                direct, descriptor = 0, os.open(file.name, os.O_RDONLY)
            try:
                found = {
                    str(size): disk_rate(descriptor, length, size) for size in READS if 4 * size <= length
                }
            finally:
                os.close(descriptor)
    except OSError as error:
        raise StorageError(f"the disk of {folder} cannot be measured: {error.strerror}") from error
    how = (
        "past the page cache" if direct else "through the page cache, which this disk does not let be passed"
    )
    return found, f"{AHEAD} reads at a time, {how}"


def disk_rate(descriptor: int, length: int, size: int) -> Figure:
    """Bytes per second of random reads of one size, in rounds of at most half of the file.

    They go where a store of experts reads to, into large pages: into small ones, which are all over the memory, a
    disk may be three times slower (LOG.md).
    """
    places = max(SLAB_BYTES // size, AHEAD)
    slab = huge_slab(places * size)
    slab[:] = bytes(len(slab))  # so that there are pages
    memory = memoryview(slab)

    def read(number: int, offset: int) -> None:
        first = number % places * size
        got = os.preadv(descriptor, [memory[first : first + size]], offset)
        assert got == size, (got, size)

    rates = []
    with ThreadPoolExecutor(AHEAD) as pool:
        for _ in range(5):
            count = min(max((64 << 20) // size, AHEAD), length // size)
            wanted = random.sample(range(length // size), count)
            begun = time.perf_counter()
            list(pool.map(read, range(count), [place * size for place in wanted]))
            rates.append(count * size / (time.perf_counter() - begun))
    memory.release()
    slab.close()
    return _figure(rates)


def _shape(**changes: object) -> ModelConfig:
    """A small model, of which one size is changed."""
    sizes: dict[str, object] = {
        "vocab_size": 256,
        "d_model": 128,
        "layers": 2,
        "d_ff": 64,
        "max_positions": 4096,
    }
    sizes["attention"] = AttentionConfig(heads=2, kv_heads=2, head_dim=64)
    sizes["moe"] = MoEConfig(experts=32, experts_per_token=8, d_ff=32)
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def _model(make: Make, config: ModelConfig, form: str) -> Transformer:
    """Random weights, packed or plain."""
    if form in ("fp32", "bf16"):
        with torch.no_grad():
            model = Transformer(config).to(torch.bfloat16 if form == "bf16" else torch.float32)
        return model.eval().requires_grad_(False)
    return make(config, form)


def _even_routing(experts: int, busy: int, rows: int) -> Routing:
    """So many rows for each busy expert, two experts for each token; the others have none."""
    token_GR = torch.arange(busy // 2 * rows).view(-1, rows)
    token_N = token_GR.repeat_interleave(2, dim=0).flatten()
    return Routing(
        token_N=token_N,
        weight_N=torch.full((len(token_N),), 0.5),
        counts_E=torch.tensor([rows] * busy + [0] * (experts - busy)),
        tokens=busy // 2 * rows,
    )


@torch.inference_mode()
def expert_seconds(make: Make, form: str, seconds: float) -> dict[str, Figure]:
    """Seconds for each weight of experts, by rows for each expert."""
    once = 3 * WIDTH * EXPERT_WIDTH
    bits = {"fp32": 32, "bf16": 16}.get(form, 8 if form.startswith("int8") else 4)
    experts = max(COLD_BYTES * 8 // (once * bits) // 2, 2) * 2
    moe = MoEConfig(experts=experts, experts_per_token=2, d_ff=EXPERT_WIDTH)
    model = _model(make, _shape(d_model=WIDTH, layers=1, moe=moe), form)
    block = model.get_submodule("blocks.0.feed_forward")
    assert isinstance(block, MoE), type(block)
    found = {}
    for rows in ROWS:
        busy = experts if rows < ROWS[-1] else 4
        routing = _even_routing(experts, busy, rows)
        x_TD = torch.randn(routing.tokens, WIDTH, dtype=model.embed.weight.dtype)

        def work(x_TD: Tensor = x_TD, routing: Routing = routing) -> None:
            block.experts(x_TD, routing)

        found[str(rows)] = _figure(_timed(work, seconds)).times(1 / (busy * once))
    return found


@torch.inference_mode()
def linear_seconds(make: Make, form: str, seconds: float) -> dict[str, Figure]:
    """Seconds for each weight of single matrices, by rows: the projections of attention of some layers."""
    bits = {"fp32": 32, "bf16": 16}.get(form, 8 if form.startswith("int8") else 4)
    heads = WIDTH // 64
    layers = max(COLD_BYTES * 8 // (4 * WIDTH * WIDTH * bits), 1)
    attention = AttentionConfig(heads=heads, kv_heads=heads, head_dim=64)
    model = _model(make, _shape(d_model=WIDTH, layers=layers, attention=attention, moe=None), form)
    matrices = [
        one
        for name, one in model.named_modules()
        if ".attention." in name and isinstance(one, nn.Linear | PackedLinear)
    ]
    numbers = 4 * layers * WIDTH * WIDTH
    assert 2 * layers <= len(matrices) <= 4 * layers, len(matrices)
    found = {}
    for rows in ROWS:
        x_TD = torch.randn(rows, WIDTH, dtype=model.embed.weight.dtype)

        some = matrices if rows < ROWS[-1] else matrices[: len(matrices) // layers]

        def work(x_TD: Tensor = x_TD, some: Sequence[nn.Module] = some) -> None:
            for one in some:
                one(x_TD)

        share = len(some) / len(matrices)
        found[str(rows)] = _figure(_timed(work, seconds)).times(1 / numbers / share)
    return found


class _Probes:
    """Seconds of steps of small models, each several times."""

    def __init__(self, make: Make, repeats: int, form: str = "int4-g32") -> None:
        self._make, self._repeats, self._form = make, repeats, form
        self._memory = torch.ones(1 << 16, dtype=torch.uint8)

    def step(
        self, config: ModelConfig, *, batch: int = 1, prompt: int = 16, kv_dtype: str = "auto"
    ) -> Figure:
        """A step of a batch that draws."""
        model = _model(self._make, config, self._form)
        found = [
            decoding(model, batch, prompt=prompt, tokens=16, kv_dtype=kv_dtype, memory=self._memory)
            for _ in range(self._repeats)
        ]
        return _figure([one.latency_p50_s for one in found])

    def prompt(self, config: ModelConfig, tokens: int) -> Figure:
        """A prompt."""
        model = _model(self._make, config, self._form)
        return _figure([prefill(model, tokens, repeats=1).first_token_s for _ in range(self._repeats)])


def _spread(value: float, of: Figure) -> Figure:
    """A figure computed from the least values of others, at least 0, with the relative spread of one of them."""
    return of.times(max(value, 0.0) / of.low)


def _overhead(
    probes: _Probes, linear: Mapping[str, Figure], head: Mapping[str, Figure], operation: Figure
) -> dict[str, Figure]:
    """What a step costs besides products: differences of the least times of steps, which others disturb least.

    Args:
        probes: That run them.
        linear: Seconds for each weight of matrices, as the probes' are.
        head: The same of their head's.
        operation: Seconds of each operation of a prompt's scores.
    """
    small, deep = _shape(), _shape(layers=10)
    one, ten, many = probes.step(small), probes.step(deep), probes.step(small, batch=16)
    layer = (ten.low - one.low) / (deep.layers - small.layers)
    sequence = (many.low - one.low) / 15
    words = _shape(vocab_size=1 << 16)
    spoken = probes.step(words, batch=16)
    vocabulary = (spoken.low - many.low) / 16 / words.vocab_size - 2 * head["8"].low * words.d_model / 16
    wide = _shape(d_model=WIDTH)
    read, narrow = probes.prompt(wide, 512), probes.prompt(small, 512)
    for_token = []
    for prompt, shape in ((narrow, small), (read, wide)):
        flops = cost.flops_per_token(shape, 256)
        scores = flops.components["attention_scores"]
        products = linear["512"].low * (flops.total - scores) / 2 + 512 * scores * operation.low
        for_token.append((prompt.low - one.low - products) / (512 * shape.layers))
    width = (for_token[1] - for_token[0]) / (wide.d_model - small.d_model)
    token = for_token[0] - small.d_model * max(width, 0.0)
    return {
        "step": _spread(one.low - small.layers * layer - sequence, one),
        "layer": _spread(layer, ten),
        "sequence": _spread(sequence, many),
        "vocabulary": _spread(vocabulary, spoken),
        "token": _spread(token, narrow),
        "width": _spread(width, read),
    }


def _attention(probes: _Probes) -> dict[str, Figure]:
    """Seconds of a value of the cache while drawing, by dtype, and of an operation of a prompt's scores."""
    heads = AttentionConfig(heads=16, kv_heads=16, head_dim=128)
    config, far, near = _shape(attention=heads), 2000, 16
    values = cost.kv_bytes(config, far, 1) - cost.kv_bytes(config, near, 1)
    found = {}
    for dtype in ("fp32", "bf16"):
        long, short = (probes.step(config, prompt=prompt, kv_dtype=dtype) for prompt in (far, near))
        found[dtype] = _spread((long.low - short.low) / values, long)
    whole, quarter = probes.prompt(config, 2048), probes.prompt(config, 512)

    def scores(tokens: int) -> int:
        steps = range(0, tokens, 512)
        return sum(
            512 * cost.flops_per_token(config, done + 256).components["attention_scores"] for done in steps
        )

    operations = scores(2048) - 4 * scores(512)
    found["operation"] = _spread((whole.low - 4 * quarter.low) / operations, whole)
    return found


def measure(make: Make, folder: Path, say: Say, *, quick: bool = False) -> Profile:
    """Everything that a plan for this machine needs; about a minute, quick a quarter of it.

    Args:
        make: Makes a model of packed random weights from a shape and a format.
        folder: On the disk that models will be read from.
        say: Called with a line before each part.
        quick: Three formats, and a small file.

    Raises:
        DependencyError: the kernels were not compiled.
        StorageError: the disk cannot be written to.
    """
    if not cpu.level():
        raise DependencyError(
            "the compiled CPU kernels are not here, so this machine cannot be measured",
            hint="install a C compiler and `pip install -e .` again",
        )
    repeats, seconds = (3, 0.1) if quick else (7, 0.5)
    probes, plain = _Probes(make, repeats), _Probes(make, repeats, "fp32")
    held_bytes = {}
    for kind, some in (("packed", probes), ("plain", plain)):
        some.step(_shape())
        some.prompt(_shape(), 512)
        held_bytes[kind] = process_bytes()
    busy = os.getloadavg()[0]
    if busy > 0.5:
        say(f"others are busy here (load {busy:.1f}): the figures will be too low and their bands wide")
    say("memory")
    read = _read_rates()
    say(f"the disk of {folder}")
    disk, note = disk_rates(folder, 1 << 28 if quick else 1 << 31)
    experts, linear = {}, {}
    for form in QUICK_FORMATS if quick else FORMATS:
        say(f"kernels of {form}")
        experts[form], linear[form] = expert_seconds(make, form, seconds), linear_seconds(make, form, seconds)
    say("steps and attention")
    attention = _attention(probes)
    eight, scores = linear["int8-g32"], attention["operation"]
    overhead = {
        "packed": _overhead(probes, linear["int4-g32"], eight, scores),
        "plain": _overhead(plain, linear["fp32"], linear["fp32"], scores),
    }
    return Profile(
        version=VERSION,
        machine=_machine(),
        measured=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        process_bytes=held_bytes,
        read_rate=read,
        disk=disk,
        disk_note=f"{folder}: {note}",
        experts=experts,
        linear=linear,
        overhead=overhead,
        attention=attention,
    )


def _machine() -> dict[str, str]:
    return {
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "kernels": cpu.level(),
        "torch": torch.__version__,
        "cores": str(os.cpu_count()),
    }
