"""Answers over HTTP: `moiety serve` on 4-bit weights against llama.cpp's server on Q4_0, and our engine without HTTP.

Each server is a process of its own; they take turns. Clients stream /v1/completions from token ids, so many at a time,
from one thread that only counts bytes. Weights are random, shapes are real. The full run takes OLMoE-1B-7B whole: 4 GB
for each server.

What HTTP takes is measured with the whole model, and with two layers of it, where a token costs so little that its way
to the client weighs most. There the server has one half of the processor's cores to itself and the client the other
half, so that the client's work is not taken for the server's. In the same process on the same cores the engine alone
answers the same prompts with the same options. Seconds give the share of throughput that is left, processor time what
a token costs. `--http` measures that alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from _harness import Row, arguments, finish
from _models import letters_tokenizer, shape_named, write_gguf
from _serve_child import prompts_of

MODEL = "olmoe-1b-7b"
BARS = {1: None, 8: 1.5, 32: 1.5}
SMALL = 2  # layers
LEAST_SHARE = 0.97  # of the engine's throughput that is left with HTTP


class Times(NamedTuple):
    """Of one round: tokens per second of all, seconds to each first piece, seconds between pieces."""

    tokens_per_s: float
    first_s: list[float]
    between_s: list[float]


class Cost(NamedTuple):
    """Of one round: seconds, and seconds of processor time that the server's process took."""

    seconds: float
    busy_s: float


class Child:
    """A server in its process, on all cores or on some."""

    def __init__(self, name: str, layers: int, file: Path, cores: set[int] | None = None) -> None:
        script = Path(__file__).with_name("_serve_child.py")
        mine = None if cores is None else os.sched_getaffinity(0)
        if cores is not None:
            os.sched_setaffinity(0, cores)  # which the child inherits
        self.process = subprocess.Popen(
            [sys.executable, str(script), name, MODEL, str(layers), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ if cores is None else {**os.environ, "OMP_NUM_THREADS": str(len(cores))},
        )
        if mine is not None:
            os.sched_setaffinity(0, mine)
        self.name, self.seed = name, 0
        self.port = int(self._answer("ready"))

    def _answer(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1]
        raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")

    def _told(self, word: str, *line: object) -> float:
        assert self.process.stdin is not None
        print(*line, file=self.process.stdin, flush=True)
        return float(self._answer(word))

    def alone(self, requests: int, prompt: int, tokens: int) -> Cost:
        """Our engine without HTTP, with the prompts of the round before."""
        busy_s = self._told("cpu", "cpu")
        seconds = self._told("seconds", "engine", self.seed, requests, prompt, tokens)
        return Cost(seconds, self._told("cpu", "cpu") - busy_s)

    def served(self, requests: int, prompt: int, tokens: int, *, stream: bool) -> Cost:
        """The same over HTTP; of our server."""
        busy_s, begun = self._told("cpu", "cpu"), time.perf_counter()
        self.answered(requests, prompt, tokens, stream=stream)
        seconds = time.perf_counter() - begun
        return Cost(seconds, self._told("cpu", "cpu") - busy_s)

    def answered(self, requests: int, prompt: int, tokens: int, *, stream: bool = True) -> Times:
        """So many requests at a time, in streams or as plain answers."""
        self.seed += 1
        found = selectors.DefaultSelector()
        bodies = [
            _request(one, tokens, stream=stream, cached=self.name != "ours")
            for one in prompts_of(self.seed, requests, prompt)
        ]
        begun = time.perf_counter()
        for body in bodies:
            one = socket.create_connection(("127.0.0.1", self.port))
            one.sendall(body)
            found.register(one, selectors.EVENT_READ, [])
        heads: dict[int, bytes] = {}
        first_s: list[float] = []
        between_s: list[float] = []
        while found.get_map():
            for key, _ in found.select():
                assert isinstance(key.fileobj, socket.socket)
                piece, now = key.fileobj.recv(1 << 16), time.perf_counter()
                heads.setdefault(key.fd, piece[:12])
                for _ in range(piece.count(b"data: {")):
                    if key.data:
                        between_s.append(now - key.data[-1])
                    else:
                        first_s.append(now - begun)
                    key.data.append(now)
                if not piece:
                    assert heads[key.fd] == b"HTTP/1.1 200", (self.name, heads[key.fd])
                    assert not stream or len(key.data) >= tokens // 2, (self.name, len(key.data))
                    del heads[key.fd]
                    found.unregister(key.fileobj)
                    key.fileobj.close()
        return Times(requests * tokens / (time.perf_counter() - begun), first_s, between_s)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def _request(prompt: list[int], tokens: int, *, stream: bool, cached: bool) -> bytes:
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
        "ignore_eos": True,
        **({"cache_prompt": False} if cached else {}),
    }
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


def percentiles(times_s: list[float]) -> tuple[float, float]:
    """The median and the 99th, in ms."""
    cuts = statistics.quantiles(times_s, n=100, method="inclusive")
    return 1e3 * cuts[49], 1e3 * cuts[98]


def rows_of(label: str, count: int, rounds: dict[str, list[Times]]) -> list[Row]:
    """Throughput, time to the first piece and between pieces at one concurrency."""
    both = {name: [one.tokens_per_s for one in times] for name, times in rounds.items()}
    ours, peer = (statistics.median(both[name]) for name in ("ours", "llama.cpp"))
    spread = "; ".join(f"{name} {min(all):.1f}..{max(all):.1f} (n={len(all)})" for name, all in both.items())
    bar = BARS[count]
    more = {"peer_name": "llama.cpp", "bar": bar, "met": None if bar is None else ours / peer >= bar}
    rows = [
        Row(
            case=f"{label}: {count} at a time",
            ours=round(ours, 2),
            peer=round(peer, 2),
            unit="tok/s",
            ratio=round(ours / peer, 3),
            note=spread,
            **more,  # type: ignore[arg-type]
        )
    ]
    for what, place in (("first token", 1), ("between tokens", 2)):
        times = {name: [value for one in all for value in one[place]] for name, all in rounds.items()}  # type: ignore[misc]
        cuts = {name: percentiles(values) for name, values in times.items()}
        for number, cut in enumerate(("p50", "p99")):
            mine, theirs = cuts["ours"][number], cuts["llama.cpp"][number]
            rows.append(
                Row(
                    case=f"{label}: {count} at a time, {what}, {cut}",
                    ours=round(mine, 2),
                    peer=round(theirs, 2),
                    peer_name="llama.cpp",
                    unit="ms",
                    ratio=round(theirs / mine, 3),
                    bar=None,
                    met=None,
                )
            )
    return rows


def halves() -> tuple[set[int], set[int]] | None:
    """Cores of the server and of the client; None where there is one core, or a system that cannot keep them apart."""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        return None
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[: len(cores) // 2]), set(cores[len(cores) // 2 :])


def overhead(label: str, child: Child, count: int, tokens: int, rounds: int) -> list[Row]:
    """What HTTP takes from the engine: streams, plain answers and the engine alone in turn."""
    drawn, rows = count * tokens, list[Row]()
    for kind, stream in (("streams", True), ("plain answers", False)):
        child.served(count, 16, 4, stream=stream)  # a first time, which does not count
        pairs = [
            (child.served(count, 16, tokens, stream=stream), child.alone(count, 16, tokens))
            for _ in range(rounds)
        ]
        ratios = [alone.seconds / served.seconds for served, alone in pairs]
        shares = [alone.busy_s / served.busy_s for served, alone in pairs]
        medians = [
            [statistics.median(column) for column in zip(*side, strict=True)]
            for side in zip(*pairs, strict=True)
        ]
        (served_s, served_busy_s), (alone_s, alone_busy_s) = medians
        ratio, share = statistics.median(ratios), statistics.median(shares)
        rows.append(
            Row(
                case=f"{label}: {count} {kind} at a time, throughput",
                ours=round(drawn / served_s, 2),
                peer=round(drawn / alone_s, 2),
                peer_name="engine alone",
                unit="tok/s",
                ratio=round(ratio, 3),
                bar=LEAST_SHARE,
                met=ratio >= LEAST_SHARE,
                note=f"by round {', '.join(f'{one:.3f}' for one in ratios)}",
            )
        )
        rows.append(
            Row(
                case=f"{label}: {count} {kind} at a time, processor time of a token",
                ours=round(1e6 * served_busy_s / drawn, 1),
                peer=round(1e6 * alone_busy_s / drawn, 1),
                peer_name="engine alone",
                unit="us",
                ratio=round(share, 3),
                bar=None,
                met=None,
                note=f"HTTP is {1 - share:.1%} of it; by round {', '.join(f'{one:.3f}' for one in shares)}",
            )
        )
    return rows


def overheads(file: Path, layers: int, counts: Iterable[int], tokens: int, rounds: int) -> list[Row]:
    """The engine alone against itself behind HTTP: the whole model on all cores, a small one where no client is."""
    cores = halves() if layers else None
    if layers and cores is None:
        print(
            "server and client share their cores: what HTTP takes looks like more than it is", file=sys.stderr
        )
    child = Child("ours", layers, file, cores and cores[0])
    label = f"{MODEL}{f', {layers} layers' if layers else ''}{f', {len(cores[0])} cores' if cores else ''}"
    if cores is not None:
        os.sched_setaffinity(0, cores[1])
    rows = [row for count in counts for row in overhead(label, child, count, tokens, rounds)]
    child.close()
    if cores is not None:
        os.sched_setaffinity(0, cores[0] | cores[1])
    return rows


def against_llama_cpp(label: str, layers: int, file: Path, tokens: int, rounds: int) -> list[Row]:
    """The two servers in turn."""
    children, rows = [Child(name, layers, file) for name in ("ours", "llama.cpp")], list[Row]()
    for count in BARS:
        for child in children:
            child.answered(count, 32, 4)  # a first time, which does not count
        found: dict[str, list[Times]] = {child.name: [] for child in children}
        for _ in range(rounds):
            for child in children:
                found[child.name].append(child.answered(count, 32, tokens))
        rows += rows_of(label, count, found)
    for child in children:
        child.close()
    return rows


def main() -> int:
    """The two servers in turn, then ours against its engine."""
    http_alone = "--http" in sys.argv  # leave llama.cpp's server out
    sys.argv = [word for word in sys.argv if word != "--http"]
    options = arguments(__doc__ or "")
    if options.device != "cpu":
        print("this measures CPUs", file=sys.stderr)
        return finish("serve", [])
    layers, rounds, tokens = (SMALL, 3, 24) if options.quick else (0, 3, 64)
    label = f"{MODEL}{f', {layers} layers' if layers else ''}"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
        file = Path(folder) / "random.gguf"
        shape = shape_named(MODEL, layers)
        write_gguf(shape, file, tokenizer=letters_tokenizer(shape.vocab_size))
        if http_alone or importlib.util.find_spec("xllamacpp") is None:
            print(
                "llama.cpp is left out" + ("" if http_alone else ": xllamacpp is not installed"),
                file=sys.stderr,
            )
        else:
            rows += against_llama_cpp(label, layers, file, tokens, rounds)
        if options.quick:
            rows += overheads(file, SMALL, (32,), 48, 2)
        else:
            rows += overheads(file, 0, (32,), 64, 3)
            rows += overheads(file, SMALL, (8, 32), 96, 5)
    return finish("serve", rows)


if __name__ == "__main__":
    sys.exit(main())
