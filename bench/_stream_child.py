"""One engine in a memory cgroup, for bench/stream.py: bench/_stream_child.py ENGINE PATH MEMORY_BYTES VOCABULARY.

After "ready" it reads lines "decode TOKENS" and "prefill TOKENS" and answers "seconds S READ HITS MISSES PEAK": of one
token after a prompt of 16, or of a prompt; bytes read from disk, experts found and missed in that job, and the most
that the process ever held.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

PROMPT = 16


class Job(NamedTuple):
    """What a job took."""

    seconds: float
    read_bytes: int
    hits: int = 0
    misses: int = 0


Run = Callable[[int, int, int], Job]  # prompt tokens, tokens drawn, vocabulary


def prompt_of(length: int, vocabulary: int) -> list[int]:
    """Different each time, so that nothing is found in a cache of prompts."""
    return [random.randrange(100, vocabulary - 100) for _ in range(length)]


def disk_bytes() -> int:
    """What this process had read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def peak_bytes() -> int:
    """The most memory that this process held; getrusage would count what the parent held when it started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def ours(path: str, memory_bytes: int) -> Run:
    """`moiety.Engine`, within the memory, or resident where it is 0."""
    from moiety.infer.engine import Engine
    from moiety.infer.offload import store_of
    from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions, StreamOptions
    from moiety.infer.streaming import load_streamed
    from moiety.model import checkpoint

    options = EngineOptions(max_positions=512, max_requests=1, step_tokens=128, prefix_cache=False)
    if memory_bytes:
        stream = StreamOptions(memory=str(memory_bytes))
        model = load_streamed(
            Path(path), stream, engine=options, say=lambda line: print(line, file=sys.stderr)
        )
    else:
        model = checkpoint.load(path)
    engine, store = Engine(model, options=options), store_of(model)

    def run(length: int, drawn: int, vocabulary: int) -> Job:
        asked = RequestOptions(
            max_tokens=drawn,
            ignore_end=True,
            sampling=SamplingOptions(temperature=1.0, seed=random.randrange(1 << 30)),
        )
        handle = engine.submit(prompt_of(length, vocabulary), asked)
        counts = []
        while not handle.is_done:
            if len(handle.request.times_s) == (drawn > 1):
                counts.append(store.statistics() if store else None)
            engine.step()
        counts.append(store.statistics() if store else None)
        result = handle.result()
        assert not result.error, result.error
        seconds = sum(result.between_tokens_s) / (drawn - 1) if drawn > 1 else result.first_token_s
        first, last = counts[0], counts[-1]
        if first is None or last is None:
            return Job(seconds, 0)
        return Job(
            seconds,
            (last.read_bytes - first.read_bytes) // max(drawn - 1, 1),
            last.hits - last.right - (first.hits - first.right),  # a right guess was read all the same
            last.misses + last.right - (first.misses + first.right),
        )

    return run


def llama_cpp(path: str, memory_bytes: int) -> Run:
    """llama.cpp's server as its wheel has it: the file mapped, and no second copy of weights, which would not fit."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = path, 1, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.no_extra_bufts, params.warmup, params.verbosity = bool(memory_bytes), False, 0
    server = xllamacpp.Server(params)

    def run(length: int, drawn: int, vocabulary: int) -> Job:
        request: dict[str, Any] = {
            "prompt": prompt_of(length, vocabulary),
            "n_predict": drawn,
            "temperature": 1.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "seed": random.randrange(1 << 30),
        }
        before = disk_bytes()
        timings = server.handle_completions(request)["timings"]
        if drawn == 1:
            return Job(timings["prompt_ms"] / 1e3, disk_bytes() - before)
        return Job(timings["predicted_ms"] / 1e3 / drawn, (disk_bytes() - before) // drawn)

    return run


def main() -> None:
    """Load, say so, answer."""
    name, path, memory, vocabulary = sys.argv[1:]
    run = {"ours": ours, "resident": ours, "llama.cpp": llama_cpp}[name](path, int(memory))
    print("ready", flush=True)
    for line in sys.stdin:
        what, number = line.split()
        length, drawn = (PROMPT, int(number)) if what == "decode" else (int(number), 1)
        begun = time.perf_counter()
        job = run(length, drawn, int(vocabulary))
        print("seconds", *job, peak_bytes(), flush=True)
        print(f"{name} {what} {number}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
