"""Answers over HTTP: `moiety serve` on 4-bit weights against llama.cpp's server on Q4_0, and our engine without HTTP.

Each server is a process of its own; they take turns. Clients stream /v1/completions from token ids, so many at a time,
from one thread that only counts bytes. Weights are random, shapes are real. The full run takes OLMoE-1B-7B whole: 4 GB
for each server.
"""

from __future__ import annotations

import importlib.util
import json
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from _harness import Row, arguments, finish
from _models import letters_tokenizer, shape_named, write_gguf

MODEL = "olmoe-1b-7b"
BARS = {1: None, 8: 1.5, 32: 1.5}
LEAST_SHARE = 0.97  # of the engine's throughput that is left with HTTP


class Times(NamedTuple):
    """Of one round: tokens per second of all, seconds to each first piece, seconds between pieces."""

    tokens_per_s: float
    first_s: list[float]
    between_s: list[float]


class Child:
    """A server in its process."""

    def __init__(self, name: str, layers: int, file: Path) -> None:
        script = Path(__file__).with_name("_serve_child.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), name, MODEL, str(layers), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.name, self.port = name, int(self._answer("ready"))

    def _answer(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1]
        raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")

    def alone(self, requests: int, prompt: int, tokens: int) -> float:
        """Tokens per second without HTTP; of our server."""
        assert self.process.stdin is not None
        print("engine", requests, prompt, tokens, file=self.process.stdin, flush=True)
        return requests * tokens / float(self._answer("seconds"))

    def streamed(self, requests: int, prompt: int, tokens: int) -> Times:
        """So many streams at a time."""
        found = selectors.DefaultSelector()
        begun = time.perf_counter()
        for _ in range(requests):
            one = socket.create_connection(("127.0.0.1", self.port))
            one.sendall(_request(prompt, tokens, cached=self.name != "ours"))
            found.register(one, selectors.EVENT_READ, [])
        ends: dict[int, bytes] = {}
        first_s: list[float] = []
        between_s: list[float] = []
        while found.get_map():
            for key, _ in found.select():
                assert isinstance(key.fileobj, socket.socket)
                piece, now = key.fileobj.recv(1 << 16), time.perf_counter()
                ends[key.fd] = (ends.get(key.fd, b"") + piece)[-16:]
                for _ in range(piece.count(b"data: {")):
                    if key.data:
                        between_s.append(now - key.data[-1])
                    else:
                        first_s.append(now - begun)
                    key.data.append(now)
                if ends[key.fd].endswith(b"\r\n0\r\n\r\n") or not piece:
                    assert piece and len(key.data) >= tokens // 2, (self.name, len(key.data), ends[key.fd])
                    found.unregister(key.fileobj)
                    key.fileobj.close()
        return Times(requests * tokens / (time.perf_counter() - begun), first_s, between_s)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def _request(prompt: int, tokens: int, *, cached: bool) -> bytes:
    body = {
        "model": "bench",
        "prompt": [random.randrange(3, 50_000) for _ in range(prompt)],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        **({"cache_prompt": False} if cached else {}),
    }
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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


def overhead(label: str, child: Child, count: int, tokens: int, rounds: int) -> Row:
    """What HTTP takes from the engine, in turn."""
    pairs = [
        (child.streamed(count, 16, tokens).tokens_per_s, child.alone(count, 16, tokens))
        for _ in range(rounds)
    ]
    ours, engine = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(served / alone for served, alone in pairs)
    spread = ", ".join(f"{served / alone:.3f}" for served, alone in pairs)
    return Row(
        case=f"{label}: {count} at a time, share of the engine's throughput",
        ours=round(ours, 2),
        peer=round(engine, 2),
        peer_name="engine alone",
        unit="tok/s",
        ratio=round(ratio, 3),
        bar=LEAST_SHARE,
        met=ratio >= LEAST_SHARE,
        note=f"by round {spread}",
    )


def main() -> int:
    """The two servers in turn, then ours against its engine."""
    options = arguments(__doc__ or "")
    if options.device != "cpu":
        print("this measures CPUs", file=sys.stderr)
        return finish("serve", [])
    layers, rounds, tokens = (2, 3, 24) if options.quick else (0, 3, 64)
    label = f"{MODEL}{f', {layers} layers' if layers else ''}"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
        file = Path(folder) / "random.gguf"
        shape = shape_named(MODEL, layers)
        write_gguf(shape, file, tokenizer=letters_tokenizer(shape.vocab_size))
        mine = Child("ours", layers, file)
        children = [mine]
        if importlib.util.find_spec("xllamacpp") is None:
            print("llama.cpp is left out: xllamacpp is not installed", file=sys.stderr)
        else:
            children.append(Child("llama.cpp", layers, file))
        for count in BARS if len(children) > 1 else ():
            for child in children:
                child.streamed(count, 32, 4)  # a first time, which does not count
            found: dict[str, list[Times]] = {child.name: [] for child in children}
            for _ in range(rounds):
                for child in children:
                    found[child.name].append(child.streamed(count, 32, tokens))
            rows += rows_of(label, count, found)
        for child in children[1:]:
            child.close()
        # long answers: at the start of a round requests come one after the other, which is no work of HTTP's
        rows += [overhead(label, mine, count, 4 * tokens, rounds) for count in (8, 32)]
        mine.close()
    return finish("serve", rows)


if __name__ == "__main__":
    sys.exit(main())
