"""Run a server for a while under mixed load and see whether its memory grows: python tools/soak.py --minutes 10.

`moiety serve` runs as a process of its own on a tiny model (or on --model). Clients ask for whole answers and for
streams, leave streams, send what is refused, and look things up. After a warm-up, the slope of the resident memory is
the median of the slopes between all pairs of samples (Theil and Sen), which a single jump does not move. The last
line on stdout is JSON; exit code 4 if the slope is 1 MB/h or more, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

BAR_MB_PER_H = 1.0
NAME = "soak"
PATHS = ("/health", "/version", "/metrics", "/openapi.json", "/v1/models", "/v1/routing")


def tiny_model(folder: Path) -> None:
    """A random model of two layers and its tokenizer."""
    import torch

    from moiety.config import AttentionConfig, ModelConfig, MoEConfig
    from moiety.model import checkpoint
    from moiety.model.tokenizer import train_tokenizer
    from moiety.model.transformer import Transformer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        layers=2,
        d_ff=16,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
        moe=MoEConfig(experts=8, experts_per_token=2, d_ff=16),
    )
    checkpoint.save(Transformer(config).eval(), folder, tokenizer=tokenizer)


class Load:
    """Clients that ask until they are told to stop.

    Args:
        port: Of the server.
        name: Of its model.
        clients: How many threads.
        rate_per_s: Requests of all of them together at most (0: each asks again at once).
    """

    def __init__(self, port: int, name: str, clients: int, rate_per_s: float = 0) -> None:
        self.port, self.name = port, name
        self.pause_s = clients / rate_per_s if rate_per_s else 0.0
        self.statuses: dict[int, int] = {}
        self.wrong: list[str] = []
        self._over, self._lock = threading.Event(), threading.Lock()
        self._fixed: str | None = None
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(clients)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, when each is done with its request."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int) -> None:
        chance = random.Random(number)
        while not self._over.wait(2 * chance.random() * self.pause_s):
            try:
                self._ask(chance)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.wrong.append(repr(error))

    def _ask(self, chance: random.Random) -> None:
        kind = chance.choice(("fixed", "whole", "stream", "stream", "leave", "bad", "look"))
        body: dict[str, Any] = {"model": self.name, "prompt": "the quick", "max_tokens": 12, "temperature": 0}
        if kind != "fixed":
            prompt = [chance.randrange(256) for _ in range(chance.randrange(1, 90))]
            body |= {"prompt": prompt, "temperature": 1, "max_tokens": chance.randrange(1, 60)}
            body |= {"n": chance.randrange(1, 4), "logprobs": chance.choice([None, 3])}
            body |= {"return_routed_experts": chance.random() < 0.2}
        body |= {"stream": True} if kind in ("stream", "leave") else {}
        body |= {"top_p": 7, f"x{chance.random()}": "y" * chance.randrange(9000)} if kind == "bad" else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            if kind == "look":
                connection.request("GET", chance.choice(PATHS))
            else:
                raw = json.dumps(body)
                connection.request("POST", "/v1/completions", raw, {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read(400 if kind == "leave" else None)
        with self._lock:
            self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
            if answer.status != (400 if kind == "bad" else 200) and answer.status not in (429, 503):
                self.wrong.append(f"{kind}: {answer.status}")
            if kind == "fixed" and answer.status == 200:
                found = json.loads(text)["choices"][0]["text"]
                self._fixed = self._fixed or found
                if found != self._fixed:
                    self.wrong.append(f"another answer: {found!r}")


def resident_mb(process: int) -> float:
    """Memory of a process that is in memory, in MB of 10^6 bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope_per_h(samples: list[tuple[float, float]]) -> float:
    """Theil's and Sen's slope of (seconds, value) pairs, per hour."""
    slopes = [
        (late[1] - early[1]) / (late[0] - early[0])
        for number, early in enumerate(samples)
        for late in samples[number + 1 :]
    ]
    return 3600 * statistics.median(slopes)


def main() -> int:
    """Serve, load, sample, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--warm-up-minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0, help="requests a second at most; 0: as many as go")
    parser.add_argument("--model", default="", help="a model to serve; none makes a tiny one")
    options = parser.parse_args()
    warm_s, whole_s = 60 * options.warm_up_minutes, 60 * (options.warm_up_minutes + options.minutes)
    with tempfile.TemporaryDirectory(prefix="moiety-soak-") as folder:
        path = options.model or f"{folder}/{NAME}"
        if not options.model:
            tiny_model(Path(path))
        command = [sys.executable, "-m", "moiety", "serve", path, "--port", "0", "--name", NAME]
        command += ["--max-positions", "256", "--kv-bytes", "2000000", "--max-requests", "8"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            port = re.search(r":(\d+)/v1", server.stderr.readline())
            assert port is not None, "the server does not listen"
            load = Load(int(port[1]), NAME, options.clients, options.rate)
            samples: list[tuple[float, float]] = []
            begun_s = time.monotonic()
            load.start()
            while (now_s := time.monotonic() - begun_s) < whole_s and server.poll() is None:
                samples.append((now_s, resident_mb(server.pid)))
                time.sleep(max(0.2, whole_s / 600))
            load.stop()
            server.terminate()
            code = server.wait(30)
    kept = [(at_s, size_mb) for at_s, size_mb in samples if at_s > warm_s]
    slope = slope_per_h(kept)
    found = {
        "minutes": options.minutes,
        "requests": sum(load.statuses.values()),
        "statuses": load.statuses,
        "resident_mb": [round(size_mb, 1) for _, size_mb in samples[:: max(1, len(samples) // 20)]],
        "slope_mb_per_h": round(slope, 3),
        "bar_mb_per_h": BAR_MB_PER_H,
        "wrong": load.wrong[:5],
        "exit_code": code,
    }
    print(json.dumps(found))
    return 0 if slope < BAR_MB_PER_H and not load.wrong and code == 0 else 4


if __name__ == "__main__":
    sys.exit(main())
