"""Models larger than their memory: our streaming against llama.cpp's mapped file, both under the same limit.

Each engine is a process in a memory cgroup of its own (version 1, writable by root); for llama.cpp the pages of its
file count there, as they do for a machine. Our budget is all of the limit, where a process that holds a hundredth more
is killed (docs/streaming.md). Weights are random, shapes are real with fewer layers and a smaller
vocabulary, and both sides have the same numbers: one Q4_0 file, and what `moiety` packs from it. Routers are made so
that every token draws its experts anew and each expert is as popular as the case says. Some cases have a slower disk,
as many machines do: each process may then read so many bytes a second and no more (a cgroup again).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _harness import Row, arguments, finish
from _models import shape_named, write_gguf

from moiety.backends.cpu_limits import read_all
from moiety.config import ModelConfig
from moiety.formats import format_named
from moiety.infer import limits
from moiety.infer.offload import PART_BYTES
from moiety.model.expert_file import expert_stacks
from moiety.model.transformer import Transformer
from moiety.moe.layer import MoE

CGROUPS, DISK_CGROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup/blkio")
VOCABULARY = 16_000
OVERHEAD_BYTES = 435 << 20  # of our process: the interpreter, torch, what a step holds
DATA = Path(os.environ.get("MOIETY_SHARED_DATA", "."))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape, how much memory there is for it, and the bars.

    Args:
        shape: A name of the registry.
        layers: Of them.
        over: The file has so many times the bytes of the limit; 0 makes it by `share`.
        share: Of the experts that our process has room for.
        popular: How popular experts are: even, zipf (s = 1), or olmoe (as its counts say, where they are at hand).
        decode_bar: Against llama.cpp.
        prefill: Tokens of a prompt.
        prefill_bar: Against llama.cpp.
        resident_bar: Against ourselves with everything in memory.
        experts: Of a layer, if not those of the shape.
        disk_rate: Bytes a second that each process may read; 0 is what the disk gives.
    """

    shape: str
    layers: int
    over: float = 0.0
    share: float = 0.0
    popular: str = "even"
    decode_bar: float
    prefill: int = 128
    prefill_bar: float | None = None
    resident_bar: float | None = None
    experts: int = 0
    disk_rate: int = 0

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        config = replace(shape_named(self.shape, self.layers), vocab_size=VOCABULARY)
        assert config.moe is not None
        return replace(config, moe=replace(config.moe, experts=self.experts or config.moe.experts))


CASES = (
    Case(shape="mixtral-8x7b", layers=8, over=1.1, decode_bar=1.5, prefill_bar=5.0),
    Case(shape="mixtral-8x7b", layers=4, over=2.2, decode_bar=1.5, prefill_bar=5.0),
    Case(shape="qwen3-30b-a3b", layers=12, share=0.5, popular="zipf", decode_bar=3.0, resident_bar=0.6),
    Case(shape="qwen3-30b-a3b", layers=12, share=0.5, popular="olmoe", decode_bar=3.0, resident_bar=0.6),
)
SLOW_DISK = 700_000_000
CASES += tuple(replace(one, disk_rate=SLOW_DISK, resident_bar=None) for one in (CASES[0], CASES[2]))
QUICK = replace(CASES[1], layers=2, share=0.15, prefill=32, experts=32)


def popularity(kind: str, experts: int) -> torch.Tensor | None:
    """How often each expert is chosen, (E,); None where the counts of OLMoE are not here.

    OLMoE's are of its middle layer over all of its texts, stretched.
    """
    if kind != "olmoe":
        return torch.arange(1, experts + 1).pow(-1.0 if kind == "zipf" else 0.0)
    file = DATA / "olmoe_mixtral_routing_counts.json"
    if not file.is_file():
        return None
    model = json.loads(file.read_text())["models"]["OLMoE-1B-7B-0824"]
    total = np.sum([layers[1] for layers in model["counts"].values()], axis=0, dtype=float)
    total = np.sort(total)[::-1] / total.max()
    places = np.linspace(0, len(total) - 1, experts)
    return torch.from_numpy(np.interp(places, np.arange(len(total)), total)).float()


def gates_of(config: ModelConfig, popularity_E: torch.Tensor) -> Callable[[Transformer], list[torch.Tensor]]:
    """Routers that send tokens to experts as often as `popularity_E` says, at every depth of a random model.

    What random blocks add is common to all tokens and drowns what tells them apart, so embeddings are made large, and a
    router is made of what reaches its layer: of random tokens' inputs the mean says how popular an expert is, and what
    is left of an input, which is the token's own, draws. Drawing by weights without putting back is taking the largest
    of log(weight) + Gumbel noise, of deviation 1.28; the noise here is a product with a random row, near enough normal.
    """

    def make(one: Transformer) -> list[torch.Tensor]:
        one.embed.weight.data.mul_(config.d_model**0.5)
        with torch.device("meta"):
            model = Transformer(config, initialize=False)
        shared = dict(one.named_parameters())
        for name, module in model.named_modules():
            for own in dict(module.named_parameters(recurse=False)):
                full = f"{name}.{own}" if name else own
                setattr(module, own, shared[re.sub(r"^blocks[.]\d+[.]", "blocks.0.", full)])
        gates: list[torch.Tensor] = []

        def calibrate(moe: MoE, arguments: tuple[torch.Tensor, ...]) -> None:
            x_TD = arguments[0].flatten(0, -2)
            mean_D = x_TD.mean(0)
            wanted_E = popularity_E.log()[torch.randperm(len(popularity_E))]
            noise_ED = torch.randn(len(wanted_E), config.d_model)
            noise_ED -= torch.outer(noise_ED @ mean_D, mean_D) / mean_D.square().sum()
            noise_ED *= 1.28 / ((x_TD - mean_D) @ noise_ED.T).std(0)[:, None]
            gates.append(noise_ED + torch.outer(wanted_E, mean_D) / mean_D.square().sum())
            assert moe.gate is not None
            moe.gate.weight = torch.nn.Parameter(gates[-1], requires_grad=False)

        for block in model.blocks:
            block.feed_forward.register_forward_pre_hook(calibrate)
        with torch.inference_mode():
            model(torch.randint(100, VOCABULARY - 100, (16, 32)))
        return gates

    return make


def packed_of(gguf: Path, folder: Path) -> None:
    """The same numbers as we pack them, in a process of its own, which holds them all; then out of the page cache.

    What is read of a file counts to who reads it first.
    """
    script = (
        "import sys; from moiety.model import checkpoint; "
        "checkpoint.save(checkpoint.load(sys.argv[1], packed=True), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, str(gguf), str(folder)], check=True)
    for file in folder.iterdir():
        forget(file)
    forget(gguf)


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@contextmanager
def cgroup(name: str, limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup; 0 bytes is no limit."""
    folder = CGROUPS / f"moiety-{name}-{os.getpid()}"
    folder.mkdir()
    try:
        if limit_bytes:
            (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield folder
    finally:
        for _ in range(50):
            try:
                folder.rmdir()
                break
            except OSError:  # its last page is on the way out
                time.sleep(0.1)


@contextmanager
def slow_disk(name: str, folder: Path, bytes_per_second: int) -> Iterator[Path | None]:
    """A cgroup whose processes read no faster from the disk that a folder is on; None where there is no limit."""
    if not bytes_per_second:
        yield None
        return
    device = folder.stat().st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    if (disk / "partition").exists():
        disk = disk.parent
    group = DISK_CGROUPS / f"moiety-{name}-{os.getpid()}"
    group.mkdir()
    try:
        number = (disk / "dev").read_text().strip()
        (group / "blkio.throttle.read_bps_device").write_text(f"{number} {bytes_per_second}")
        yield group
    finally:
        group.rmdir()


class Child:
    """An engine in its process and its cgroups."""

    def __init__(self, engine: str, path: Path, memory_bytes: int, *groups: Path | None) -> None:
        script = Path(__file__).with_name("_stream_child.py")
        self.engine = engine
        self.process = subprocess.Popen(
            [sys.executable, str(script), engine, str(path), str(memory_bytes), str(VOCABULARY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for group in groups:
            if group is not None:
                (group / "cgroup.procs").write_text(str(self.process.pid))
        self._answer("ready")

    def _answer(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()
        raise SystemExit(f"{self.engine} ended with {self.process.wait()}")

    def job(self, line: str) -> list[float]:
        """Seconds, bytes read, hits, misses, peak of the process."""
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        return [float(one) for one in self._answer("seconds")[1:]]

    def close(self) -> None:
        """End it, so that the next has the memory."""
        self.process.terminate()
        self.process.wait()


def disk_rate(file: Path) -> float:
    """Bytes per second of direct reads from random places, as many at a time and as large as the store's."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    found = limits.disk_rate(descriptor, file.stat().st_size, PART_BYTES)
    os.close(descriptor)
    return found.middle


def memory_rate(buffer: torch.Tensor) -> float:
    """Bytes per second that all threads together read."""
    begun = time.perf_counter()
    read_all([buffer])
    return buffer.numel() / (time.perf_counter() - begun)


def touched_bytes(config: ModelConfig, expert_bytes: int) -> float:
    """What one token multiplies with: experts, attention in 4 bits, head in 8, routers in 32."""
    moe, attention = config.moe, config.attention
    assert moe is not None
    numbers = config.layers * 2 * config.d_model * attention.head_dim * (attention.heads + attention.kv_heads)
    bits = numbers * format_named("int4-g32").bits_per_weight
    bits += config.vocab_size * config.d_model * format_named("int8-g32").bits_per_weight
    bits += config.layers * moe.experts * config.d_model * 32
    return bits / 8 + config.layers * moe.experts_per_token * expert_bytes


def row(
    case: str, ours: list[float], theirs: list[float], amount: float, peer: str, bar: float | None
) -> Row:
    """Ours against a peer as tokens a second, `amount` in the median time."""
    mine, other = amount / statistics.median(ours), amount / statistics.median(theirs)
    spread = ", ".join(
        f"{name} {amount / max(times):.2f}..{amount / min(times):.2f} (n={len(times)})"
        for name, times in (("ours", ours), (peer, theirs))
    )
    ratio = mine / other
    met = None if bar is None else ratio >= bar
    return Row(
        case=case, ours=round(mine, 3), peer=round(other, 3), peer_name=peer, unit="tok/s", ratio=round(ratio, 3),
        bar=bar, met=met, note=spread,
    )  # fmt: skip


def decode_rows(
    label: str, case: Case, config: ModelConfig, children: dict[str, Child], tiles: Path, quick: bool
) -> list[Row]:
    """Decoding: against llama.cpp, our own resident speed, and the bound for the bytes that had to be read."""
    drawn, rounds = (8, 2) if quick else (16, 8)
    expert_bytes = expert_stacks(tiles.parent).stacks[0].expert_bytes
    memory = torch.ones(1 << 30, dtype=torch.uint8)
    times: dict[str, list[float]] = {name: [] for name in children}
    bounds, hits, wanted, read = [], 0.0, 0.0, 0.0
    for child in children.values():
        for _ in range(2):  # warm: what is popular is in memory
            child.job(f"decode {drawn}")
    for _ in range(rounds):
        disk, ram = disk_rate(tiles), memory_rate(memory)
        for name, child in children.items():
            seconds, read_bytes, hit, miss, _peak = child.job(f"decode {drawn}")
            times[name].append(seconds)
            if name == "ours":
                missed, disk = miss / (drawn - 1) * expert_bytes, min(disk, case.disk_rate or disk)
                bounds.append(max(missed / disk, touched_bytes(config, expert_bytes) / ram))
                hits, wanted, read = hits + hit, wanted + hit + miss, read + read_bytes
    about = (
        f"{100 * hits / max(wanted, 1):.0f} % of experts in memory, {read / rounds / 1e6:.0f} MB read a token"
    )
    rows = [
        row(f"{label}: decode", times["ours"], times["llama.cpp"], 1, "llama.cpp", case.decode_bar),
        row(f"{label}: decode, share of the bound", times["ours"], bounds, 1, "bound", 0.8),
    ]
    if "resident" in times:
        bar, title = case.resident_bar, f"{label}: decode, share of resident"
        rows.append(row(title, times["ours"], times["resident"], 1, "resident", bar))
    return [replace(one, note=f"{about}; {one.note}") for one in rows]


def prefill_row(label: str, case: Case, children: dict[str, Child], quick: bool) -> Row:
    """One prompt, each time another."""
    rounds, length = 1 if quick else 5, case.prefill
    times = {
        name: [child.job(f"prefill {length}")[0] for _ in range(rounds)] for name, child in children.items()
    }
    title = f"{label}: prompt of {length}"
    return row(title, times["ours"], times["llama.cpp"], length, "llama.cpp", case.prefill_bar)


def against(case: Case, quick: bool, folder: Path) -> list[Row]:
    """One case: files, processes, rows."""
    config, gguf, packed = case.config, folder / "random.gguf", folder / "packed"
    assert config.moe is not None
    popular_E = popularity(case.popular, config.moe.experts)
    if popular_E is None:
        print("left out: the counts of OLMoE are not here (MOIETY_SHARED_DATA)", file=sys.stderr)
        return []
    write_gguf(config, gguf, gates_of(config, popular_E))
    packed_of(gguf, packed)
    stacks = expert_stacks(packed)
    experts = sum(one.experts * one.expert_bytes for one in stacks.stacks)
    embedding = config.vocab_size * config.d_model * 4  # stays on disk, as llama.cpp's may
    dense = sum(file.stat().st_size for file in packed.iterdir()) - experts - embedding
    limit = round(case.share * experts) + dense + OVERHEAD_BYTES
    if case.over:
        limit = round(gguf.stat().st_size / case.over)
    sizes = f"{gguf.stat().st_size / 1e9:.1f} GB in {limit / 1e9:.1f} GB"
    label = f"{case.shape}, {case.layers} layers, {case.popular}, {sizes}"
    if case.disk_rate:
        label += f", a disk of {case.disk_rate / 1e9:.1f} GB/s"
    with (
        cgroup("ours", limit) as mine,
        cgroup("theirs", limit) as their,
        cgroup("resident", 0) as whole,
        slow_disk("ours", folder, case.disk_rate) as my_disk,
        slow_disk("theirs", folder, case.disk_rate) as their_disk,
    ):
        children = {
            "ours": Child("ours", packed, limit, mine, my_disk),
            "llama.cpp": Child("llama.cpp", gguf, limit, their, their_disk),
        }
        if case.resident_bar is not None:
            children["resident"] = Child("resident", packed, 0, whole)
        try:
            rows = decode_rows(label, case, config, children, stacks.path, quick)
            rows.append(prefill_row(label, case, children, quick))
            peak = children["ours"].job("prefill 16")[4]
            met = peak <= 1.03 * limit
            rows.append(
                Row(
                    case=f"{label}: memory of the process", ours=round(peak / 1e6), peer=round(limit / 1e6),
                    peer_name="limit", unit="MB", ratio=round(limit / peak, 3), bar=round(1 / 1.03, 3), met=met,
                )
            )  # fmt: skip
        finally:
            for child in children.values():
                child.close()
    return rows


def main() -> int:
    """The cases one after the other: their files do not fit beside each other on every disk."""
    numbers = {str(number): case for number, case in enumerate(CASES)}
    options = arguments(__doc__ or "", files=f"cases: {', '.join(numbers)}; all where none is named")
    if unknown := set(options.files) - numbers.keys():
        sys.exit(f"there is no case {', '.join(unknown)}; there are {', '.join(numbers)}")
    missing = "xllamacpp is not installed" if importlib.util.find_spec("xllamacpp") is None else ""
    for folder in (CGROUPS, DISK_CGROUPS):
        if not os.access(folder, os.W_OK):
            missing = (
                f"{folder} is not there or not writable, and without its limits there is nothing to compare"
            )
    if options.device != "cpu" or missing:
        print(missing or "this measures CPUs", file=sys.stderr)
        return finish("stream", [])
    rows: list[Row] = []
    for case in (QUICK,) if options.quick else [numbers[one] for one in options.files] or CASES:
        with tempfile.TemporaryDirectory(prefix="moiety-") as name:
            rows += against(case, options.quick, Path(name))
    return finish("stream", rows)


if __name__ == "__main__":
    sys.exit(main())
