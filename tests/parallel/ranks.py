"""Real processes that meet over gloo on this machine, each with one thread, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """For a child: one thread, this repository."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **more}


def start(script: str, arguments: Sequence[str], ranks: int) -> list[subprocess.Popen[str]]:
    """`python -m script arguments` once for each rank, with its number in the place of RANK in an argument."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", script, *(one.replace("RANK", str(rank)) for one in arguments)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            ),
        )
        for rank in range(ranks)
    ]


def end(children: Sequence[subprocess.Popen[str]]) -> None:
    """None of them is left."""
    for child in children:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def finish(children: Sequence[subprocess.Popen[str]], timeout_s: float = 240.0) -> list[str]:
    """What each said, when all have ended well."""
    try:
        said = [child.communicate(timeout=timeout_s)[0] for child in children]
    finally:
        end(children)
    for rank, child in enumerate(children):
        assert child.returncode == 0, (
            f"rank {rank} of {len(children)} ended with {child.returncode}:\n{said[rank]}"
        )
    return said
