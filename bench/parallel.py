"""A training step in two processes against one, one thread each: how much faster, and the share of communication.

One process and a mesh of two take turns, some steps each; both train the same model on the same batches. The ratio is
of medians of step times; the most there can be is 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _harness import Row, arguments, finish
from _models import letters_tokenizer

from moiety.train.corpus import Document, split_held_out
from moiety.train.data import build

VOCABULARY = 2048
MESHES = {
    "data": {"data_parallel": 2},
    "expert": {"expert_parallel": 2},
    "shard (FSDP2)": {"shard_parallel": 2},
    "tensor": {"tensor_parallel": 2},
}
SHAPES = {
    "width 128, 4 layers of 8 experts, 2,048 tokens": {
        "model": {"d_model": 128, "layers": 4, "heads": 4, "d_ff": 256, "experts": 8, "experts_per_token": 2},
        "train": {"batch": 8, "length": 256, "warmup": 1},
    },
    "width 512, 2 layers of 16 experts and a shared one, 4,096 tokens": {
        "model": {
            "d_model": 512,
            "layers": 2,
            "heads": 8,
            "d_ff": 512,
            "experts": 16,
            "experts_per_token": 2,
            "shared_d_ff": 512,
        },
        "train": {"batch": 16, "length": 256, "warmup": 1},
    },
}


class Group:
    """The processes of one mesh, waiting for their turn."""

    def __init__(
        self, stack: contextlib.ExitStack, tokens: Path, shape: str, mesh: dict[str, int], ranks: int
    ) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        script = Path(__file__).with_name("_parallel_child.py")
        self.children = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            child = subprocess.Popen(
                [sys.executable, str(script), str(tokens), shape, json.dumps(mesh)],
                env={**os.environ, **meeting, **place},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(child.wait)
            stack.callback(child.kill)
            self.children.append(child)
        self.seconds: list[float] = []
        self.shares: list[float] = []
        self.bytes = 0

    def turn(self, steps: int, *, counts: bool = True) -> None:
        """So many steps; what the first process says of them counts."""
        for child in self.children:
            assert child.stdin is not None
            child.stdin.write(f"{steps}\n")
            child.stdin.flush()
        said = [json.loads(child.stdout.readline()) for child in self.children if child.stdout is not None]
        if counts:
            self.seconds += said[0]["seconds"]
            self.shares.append(statistics.fmean(one["communication"] for one in said))
            self.bytes = sum(one["bytes"] for one in said) // len(said)


def row_of(name: str, case: str, shape: dict[str, object], tokens: Path, rounds: int, steps: int) -> Row:
    """One mesh of two processes against one process."""
    given = json.dumps({**shape, "vocabulary": VOCABULARY})
    with contextlib.ExitStack() as stack:
        alone = Group(stack, tokens, given, {}, 1)
        group = Group(stack, tokens, given, MESHES[name], 2)
        for number in range(rounds + 1):
            for one in (alone, group):
                one.turn(steps, counts=number > 0)
    ours, peer = statistics.median(group.seconds), statistics.median(alone.seconds)
    note = f"{100 * statistics.fmean(group.shares):.0f} % of the time in communication and waiting"
    if group.bytes:
        note += f"; {group.bytes / 1e6:.1f} MB a step and process into all-to-alls"
    note += f"; {1e3 * min(group.seconds):.1f}..{1e3 * max(group.seconds):.1f} (n={len(group.seconds)})"
    return Row(
        case=f"{name} 2: {case}",
        ours=round(1e3 * ours, 2),
        peer=round(1e3 * peer, 2),
        peer_name="one process",
        unit="ms",
        ratio=round(peer / ours, 3),
        bar=None,
        met=None,
        note=note,
    )


def main() -> int:
    """--quick has the first shape alone, and expert and data parallelism."""
    options = arguments(__doc__ or "")
    rounds, steps = (2, 3) if options.quick else (4, 3)
    letters = "abcdefghijklmnopqrstuvwxyz "
    documents = [
        Document(
            text="".join(letters[(n * 7 + i * i) % 27] for i in range(4000)), domain=("one", "two")[n % 2]
        )
        for n in range(60)
    ]
    with tempfile.TemporaryDirectory() as folder:
        build(split_held_out(documents), letters_tokenizer(VOCABULARY), Path(folder))
        shapes = [*SHAPES.items()][: 1 if options.quick else None]
        meshes = [*MESHES][: 2 if options.quick else None]
        rows = [
            row_of(name, case, shape, Path(folder), rounds, steps)
            for case, shape in shapes
            for name in meshes
        ]
    return finish("parallel", rows)


if __name__ == "__main__":
    sys.exit(main())
