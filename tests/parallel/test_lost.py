"""A process that is killed or stopped ends the run of the others, which say who it was; torchrun's restart goes on."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.parallel import ranks
from tests.train.tiny import assert_same_bits

PHASES, SIGNALS = ("forward", "backward", "optimizer", "save"), ("SIGKILL", "SIGSTOP")
TIMEOUT_S = 6.0
EVERY = [*itertools.product(PHASES, SIGNALS, (0, 1))]
SHAPE = [
    *(
        "--d-model=16",
        "--layers=1",
        "--heads=2",
        "--d-ff=16",
        "--experts=4",
        "--steps=4",
        "--batch=4",
        "--length=16",
    ),
    *("--vocab-size=280", "--warmup=1", "--save-every=2", "--evaluate-sequences=2"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "cats.txt"
    file.write_text("".join(f"the cat {i} sat on mat {i % 7} and saw {i * i} birds.\n\n" for i in range(200)))
    return file


def arguments(text: Path, out: Path, timeout_s: float = TIMEOUT_S) -> list[str]:
    return ["train", str(text), f"--out={out}", *SHAPE, "--expert-parallel=2", f"--rank-timeout={timeout_s}"]


def lose(text: Path, out: Path, phase: str, number: str, victim: int) -> None:
    """A run of two loses one in step 2, or while it saves after that."""
    step = "2"
    given = [str(victim), number, phase, step, "--", *arguments(text, out)]
    children = ranks.start("tests.parallel.victim", given, 2)
    survivor = children[1 - victim]
    try:
        said, _ = survivor.communicate(timeout=120)
    finally:
        ranks.end(children)
    assert survivor.returncode == 1, (survivor.returncode, said)
    assert f"rank {victim}" in said and "lost" in said, said
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[:1] == [1]
    left = sorted(one.name for one in (out / "checkpoints").glob("step-*"))
    assert left in ([], ["step-00000002"]), left  # whole, or not at all


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize(
    ("phase", "number", "victim"),
    [
        ("forward", "SIGKILL", 1),
        ("backward", "SIGSTOP", 1),
        ("save", "SIGKILL", 0),
        ("optimizer", "SIGSTOP", 0),
    ],
)
def test_the_others_end_and_say_who_was_lost(
    phase: str, number: str, victim: int, text: Path, tmp_path: Path
) -> None:
    lose(text, tmp_path / "run", phase, number, victim)


@pytest.mark.slow
@pytest.mark.timeout_s(3600)
@pytest.mark.parametrize(("phase", "number", "victim"), EVERY)
def test_nothing_hangs_ever(phase: str, number: str, victim: int, text: Path, tmp_path: Path) -> None:
    for turn in range(10):  # of either rank: each phase and signal twenty times
        lose(text, tmp_path / str(turn), phase, number, victim)


def torchrun(*given: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.2", "-m", *given]
    return subprocess.run(
        command,
        cwd=ranks.ROOT,
        env=ranks.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def stored(folder: Path) -> dict[str, Tensor]:
    """Weights and moments; of a moment in parts each part by its number."""
    found: dict[str, list[Tensor]] = {}
    for file in (folder / "model.safetensors", *sorted((folder / "state" / "moments").iterdir())):
        for name, value in load_file(file).items():
            found.setdefault(name, []).append(value)
    return {f"{name} {number}": one for name, parts in found.items() for number, one in enumerate(parts)}


@pytest.mark.timeout_s(600)
def test_a_restart_goes_on_exactly(text: Path, tmp_path: Path) -> None:
    whole = torchrun("moiety", *arguments(text, tmp_path / "whole", 60))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert f"done: {tmp_path / 'whole'}" in whole.stdout and whole.stdout.count("done:") == 1
    given = ["1", "SIGKILL", "optimizer", "3", "--", *arguments(text, tmp_path / "cut", 60)]
    cut = torchrun("tests.parallel.victim", *given, restarts=1)
    assert cut.returncode == 0, cut.stdout + cut.stderr
    first, second = (stored(tmp_path / name / "checkpoints" / "step-00000004") for name in ("whole", "cut"))
    assert_same_bits(first, second)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in one] for one in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 4
