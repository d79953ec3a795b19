"""Several processes behind one port against one: `moiety serve`, with `--replicas 2`, and under torchrun with two.

Each is started as anybody would, on the same plain checkpoint (a shape of the registry, fewer layers, random
weights), and has as many threads as there are cores. All are there at the same time and asked in turn, by the clients
of `moiety bench --url`, which share the cores with them. A ratio above 1 means that several processes pay.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from _harness import Row, arguments, finish
from _models import letters_tokenizer, shape_named

from moiety.infer.options import BenchOptions
from moiety.model import checkpoint
from moiety.model.transformer import Transformer
from moiety.serve.client import Client, RemoteOptions
from moiety.serve.load import Load, run

SHAPE, LAYERS, VOCABULARY = "olmoe-1b-7b", 2, 16_000
SERVERS = {
    "one process": ["moiety", "serve"],
    "2 replicas": ["moiety", "serve", "--replicas", "2"],
    "experts on 2": ["torch.distributed.run", "--nproc-per-node", "2", "-m", "moiety", "serve"],
}
START_S = 300.0


def write_model(folder: Path) -> None:
    """A plain checkpoint with a tokenizer."""
    config = replace(shape_named(SHAPE, LAYERS), vocab_size=VOCABULARY)
    checkpoint.save(Transformer(config), folder, tokenizer=letters_tokenizer(VOCABULARY))


@contextlib.contextmanager
def serving(words: list[str], folder: Path, log: Path) -> Iterator[Client]:
    """A server in processes of its own."""
    threads = torch.get_num_threads()
    each = threads // 2 if "torch.distributed.run" in words else threads
    command = ["env", f"OMP_NUM_THREADS={each}", sys.executable, "-m", *words, str(folder), "--port", "0"]
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + START_S
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            if child.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(command)}: {log.read_text()}")
            time.sleep(0.2)
        yield Client(RemoteOptions(url=found[0]))
    finally:
        child.terminate()
        child.wait(60)


def rows_of(found: dict[str, list[list[Load]]]) -> Iterator[Row]:
    """Tokens per second of all answers, medians of the rounds."""
    rates = {
        name: [[one.tokens_per_s or 0.0 for one in round_] for round_ in rounds]
        for name, rounds in found.items()
    }
    for name in list(SERVERS)[1:]:
        for place, load in enumerate(found[name][0]):
            ours, peer = ([round_[place] for round_ in rates[which]] for which in (name, "one process"))
            yield Row(
                case=f"{SHAPE}, {LAYERS} layers, {load.concurrency} at a time: {name}",
                ours=round(statistics.median(ours), 1),
                peer=round(statistics.median(peer), 1),
                peer_name="one process",
                unit="tok/s",
                ratio=round(statistics.median(ours) / statistics.median(peer), 3),
                bar=None,
                met=None,
                note=f"ours {_range(ours)}, one process {_range(peer)} (n={len(ours)})",
            )


def _range(rates: list[float]) -> str:
    return f"{min(rates):.1f}..{max(rates):.1f}"


def main() -> int:
    """Print a table, then one JSON line."""
    given = arguments(__doc__.splitlines()[0])
    options = BenchOptions(batches="1,4" if given.quick else "1,8", prompt=8, tokens=8 if given.quick else 32)
    found: dict[str, list[list[Load]]] = {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as servers:
        folder = Path(place) / "model"
        write_model(folder)
        clients = {
            name: servers.enter_context(serving(words, folder, Path(place) / f"{number}.log"))
            for number, (name, words) in enumerate(SERVERS.items())
        }
        for _ in range(1 if given.quick else 3):
            for name, client in clients.items():
                loads = run(client, client.models()[0], options, lambda line: print(line, file=sys.stderr))
                assert not any(load.errors for load in loads), (name, loads)
                found[name].append(loads)
    return finish("replicas", list(rows_of(found)))


if __name__ == "__main__":
    sys.exit(main())
