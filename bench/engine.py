"""Whole models from prompt to tokens: ours on 4-bit weights, llama.cpp on Q4_0, transformers and vLLM on bfloat16.

Each engine is a process of its own that keeps its model; they take turns, so that all see the same moments of a noisy
machine. Weights are random, shapes are real. Decoding's limit is the bytes of active weights over the memory's speed,
measured in turn too. llama.cpp is the wheel `xllamacpp`; vLLM is where MOIETY_VLLM_PYTHON says (`make interop` makes
one). An engine that is not installed is named and left out. --only PEER measures against one alone.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _harness import Row, arguments, finish
from _models import shape_named, write_gguf

from moiety.backends.cpu_limits import read_all
from moiety.config import ModelConfig
from moiety.formats import format_named
from moiety.model.families import family_for

# Model, layers of it (0: all), against whom: transformers needs four times our memory, so it gets half the layers.
CASES = (
    ("olmoe-1b-7b", 0, "llama.cpp"),
    ("olmoe-1b-7b", 8, "transformers"),
    ("qwen3-30b-a3b", 8, "llama.cpp"),
    ("qwen3-30b-a3b", 8, "transformers"),
    ("olmoe-1b-7b", 8, "vllm"),
    ("qwen3-30b-a3b", 8, "vllm"),
)
PEERS = {"llama.cpp": "xllamacpp", "transformers": "transformers"}
VLLM_VARIABLE = "MOIETY_VLLM_PYTHON"
DECODE_BARS: dict[str, dict[int, float | None]] = {
    "llama.cpp": {1: 1.5, 8: 2.5, 32: 4.0},
    "transformers": {1: 5.0, 8: None, 32: None},
    "vllm": {1: None, 8: None, 32: None},
}
PREFILL_BARS = {"llama.cpp": 10.0, "transformers": 2.5, "vllm": 2.5}
LIMIT_BAR = 0.8


class Child:
    """An engine in its process."""

    def __init__(self, engine: str, model: str, layers: int, file: Path) -> None:
        folder = Path(__file__).parent
        command = [sys.executable, str(folder / "_engine_child.py"), engine, model, str(layers), str(file)]
        if engine == "vllm":
            command = [os.environ[VLLM_VARIABLE], "-P", str(folder / "_vllm_child.py"), str(file)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer("ready")

    def _answer(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()
        raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")

    def seconds(self, job: str) -> float:
        """What it takes for a job."""
        assert self.process.stdin is not None
        print(job, file=self.process.stdin, flush=True)
        return float(self._answer("seconds")[1])

    def close(self) -> None:
        """End it, so that the next has the memory."""
        self.process.terminate()
        self.process.wait()


def active_bytes(config: ModelConfig) -> int:
    """Weights that one token reads, as ours are stored: 4 bits with scales, the head in 8, routers in 32."""
    moe, attention = config.moe, config.attention
    assert moe is not None
    heads = attention.heads + attention.kv_heads
    experts = moe.experts_per_token * 3 * config.d_model * moe.d_ff
    numbers = config.layers * (2 * config.d_model * attention.head_dim * heads + experts)
    bits = numbers * format_named("int4-g32").bits_per_weight
    bits += config.vocab_size * config.d_model * format_named("int8-g32").bits_per_weight
    bits += config.layers * moe.experts * config.d_model * 32
    return round(bits / 8)


def read_seconds(memory: torch.Tensor, size_bytes: int) -> float:
    """How long this machine takes to read so many bytes."""
    begun = time.perf_counter()
    read_all([memory])
    return (time.perf_counter() - begun) * size_bytes / memory.numel()


def in_turn(methods: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            found[name].append(method())
    return found


def row(case: str, amount: float, times: dict[str, list[float]], peer: str, bar: float | None) -> Row:
    """Ours against a peer, as tokens a second: `amount` in the median time."""
    ours, theirs = (amount / statistics.median(times[name]) for name in ("ours", peer))
    spread = ", ".join(
        f"{name} {amount / max(times[name]):.1f}..{amount / min(times[name]):.1f} (n={len(times[name])})"
        for name in ("ours", peer)
    )
    ratio = ours / theirs
    return Row(
        case=case,
        ours=round(ours, 2),
        peer=round(theirs, 2),
        peer_name=peer,
        unit="tok/s",
        ratio=round(ratio, 3),
        bar=bar,
        met=None if bar is None else ratio >= bar,
        note=spread,
    )


def jobs(children: dict[str, Child], job: str) -> dict[str, Callable[[], float]]:
    """The same job for all."""
    return {name: functools.partial(child.seconds, job) for name, child in children.items()}


def against(peer: str, model: str, layers: int, file: Path, quick: bool) -> list[Row]:
    """Every case of a model against one peer."""
    config = shape_named(model, layers)
    label = f"{model}{f', {layers} layers' if layers else ''}"
    memory = torch.ones(1 << 30, dtype=torch.uint8)
    limit = functools.partial(read_seconds, memory, active_bytes(config))
    children = {name: Child(name, model, layers, file) for name in ("ours", peer)}
    rows: list[Row] = []
    for batch in (1,) if quick else (1, 8, 32):
        drawn, rounds = (32, 5) if batch == 1 and not quick else (8, 3)
        for child in children.values():
            child.seconds(f"decode {batch} 2")  # a first time, which does not count
        times = in_turn({**jobs(children, f"decode {batch} {drawn}"), "memory": limit}, rounds)
        rows.append(row(f"{label}: decode, batch {batch}", batch, times, peer, DECODE_BARS[peer][batch]))
        if batch == 1:
            rows.append(row(f"{label}: decode, batch 1, share of the limit", 1, times, "memory", LIMIT_BAR))
    for length in (512,) if quick else (512, 2048):
        times = in_turn(jobs(children, f"prefill {length}"), 2)
        rows.append(row(f"{label}: prefill {length}", length, times, peer, PREFILL_BARS[peer]))
    for child in children.values():
        child.close()
    for one in rows:
        print(
            f"{one.case}: {one.ours} and {one.peer} {one.unit}, {one.ratio}x {one.peer_name}", file=sys.stderr
        )
    return rows


def is_here(peer: str) -> bool:
    """Whether an engine is installed."""
    if peer == "vllm":
        return VLLM_VARIABLE in os.environ
    return importlib.util.find_spec(PEERS[peer]) is not None


def main() -> int:
    """The peers one after the other: their models do not fit into memory together."""
    options = arguments(__doc__ or "", (*PEERS, "vllm"))
    if options.device != "cpu":
        print("this measures CPUs", file=sys.stderr)
        return finish("engine", [])
    rows: list[Row] = []
    for model, most, peer in CASES[:2] if options.quick and not options.only else CASES:
        layers = 2 if options.quick else most
        if options.only not in (None, peer):
            continue
        if not is_here(peer):
            print(f"{peer} is left out: it is not installed", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
            file = Path(folder) / "random.gguf"
            if peer == "llama.cpp":
                write_gguf(shape_named(model, layers), file)
            elif peer == "vllm":
                file, config = Path(folder), shape_named(model, layers)
                (file / "config.json").write_text(json.dumps(family_for(config).family.write(config)))
            rows += against(peer, model, layers, file, options.quick)
    return finish("engine", rows)


if __name__ == "__main__":
    sys.exit(main())
