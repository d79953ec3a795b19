"""Two processes that train one model over a bad network: slow, lossy, and cut for good or for a while."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import moiety
from moiety.train.state import latest_checkpoint
from tests.parallel import ranks
from tests.parallel.network import Network, refused
from tests.parallel.test_lost import arguments, stored, torchrun
from tests.train.tiny import assert_same_bits

TIMEOUT_S = 12.0
MORE_S = 16.0  # to ask who was lost (8 s), and to end; two timeouts would be noticed
PATIENT_S = 30.0
BOTH = frozenset({0, 1})

REFUSED = refused()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REFUSED), reason=REFUSED)]


class Run:
    """`moiety train` with its experts on both sides of a network, started by a torchrun on each.

    Args:
        network: Between them.
        text: To train on.
        out: Where to; shared by the sides, as a network never is in a test of its failure.
        timeout_s: After which a rank counts as lost.
        stop: Rank, phase and step in which it waits for `stopped`; None never waits.
    """

    def __init__(
        self,
        network: Network,
        text: Path,
        out: Path,
        timeout_s: float,
        stop: tuple[int, str, int] = (-1, "forward", 0),
    ) -> None:
        self.network, self.out, self.file = network, out, out.with_suffix(".stopped")
        self.said = [out.with_suffix(f".{side}") for side in range(2)]
        rank, phase, step = stop
        given = ["tests.parallel.victim", str(rank), str(self.file), phase, str(step), "--"]
        given += arguments(text, out, timeout_s)
        self.children = [self._start(side, given) for side in range(2)]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        ranks.end(self.children)

    def _start(self, side: int, given: Sequence[str]) -> subprocess.Popen[str]:
        name, leader = self.network.names[side], self.network.addresses[0]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={side}"]
        command += ["--nproc-per-node=1", f"--master-addr={leader}", "--master-port=29500"]
        with self.said[side].open("w") as said:
            return subprocess.Popen(
                ["ip", "netns", "exec", name, *command, "--monitor-interval=0.2", "-m", *given],
                cwd=ranks.ROOT,
                env=ranks.environment(GLOO_SOCKET_IFNAME=name),
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def stopped(self, timeout_s: float = 120.0) -> None:
        """Wait until the rank has come to its place."""
        end_s = time.monotonic() + timeout_s
        while not self.file.exists():
            assert time.monotonic() < end_s and None in [one.poll() for one in self.children], self.heard()
            time.sleep(0.01)

    def go_on(self) -> None:
        """Let it."""
        self.file.unlink()

    def ended(self, timeout_s: float) -> list[int]:
        """Exit codes of both sides."""
        end_s = time.monotonic() + timeout_s
        try:
            return [child.wait(max(end_s - time.monotonic(), 0.01)) for child in self.children]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {timeout_s} s: {self.heard()}") from None

    def heard(self) -> list[str]:
        """What each side said."""
        return [said.read_text() for said in self.said]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text, and the run of two processes on it with no network between them."""
    folder = tmp_path_factory.mktemp("whole")
    text, out = folder / "cats.txt", folder / "run"
    text.write_text("".join(f"the cat {i} sat on mat {i % 7} and saw {i * i} birds.\n\n" for i in range(200)))
    done = torchrun("moiety", *arguments(text, out, 60))
    assert done.returncode == 0, done.stdout + done.stderr
    return text, out


def assert_same_run(first: Path, second: Path) -> None:
    """Equal weights, moments and losses, bit for bit."""
    assert_same_bits(*(stored(out / "checkpoints" / "step-00000004") for out in (first, second)))
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (first, second)]
    losses = [[json.loads(line)["loss"] for line in one] for one in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize(
    "kind",
    [
        {"delay_s": 0.02, "jitter_s": 0.01},
        {"delay_s": 0.002, "lost": 0.01},
        {"delay_s": 0.002, "lost": 0.05},
        {"delay_s": 0.005, "rate": 50_000.0},
    ],
    ids=["delay", "loss of 1 %", "loss of 5 %", "slow link"],
)
def test_a_bad_network_changes_nothing(
    kind: dict[str, float], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    text, straight = whole
    with Network(**kind) as network, Run(network, text, tmp_path / "run", PATIENT_S) as run:
        assert run.ended(240) == [0, 0], run.heard()
    assert min(network.carried) > 100, network.carried
    assert (min(network.dropped) > 0) == ("lost" in kind), network.dropped
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize(
    ("rank", "phase", "step", "cut"),
    [
        (1, "forward", 2, BOTH),
        (0, "between", 3, BOTH),
        (0, "save", 4, BOTH),
        (0, "write", 4, BOTH),
        (1, "moments", 4, BOTH),
        (1, "forward", 2, {0}),
        (0, "forward", 2, {1}),
        (0, "between", 3, {0}),
        (1, "between", 3, {1}),
        (1, "write", 4, {0}),
        (0, "moments", 4, {1}),
    ],
)
def test_both_sides_of_a_partition_end_and_name_the_other(
    rank: int, phase: str, step: int, cut: set[int], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    """Where the packets of one side alone are lost, too; then the run goes on from what is on disk."""
    (text, straight), out = whole, tmp_path / "run"
    with Network() as network, Run(network, text, out, TIMEOUT_S, (rank, phase, step)) as run:
        run.stopped()
        network.cut = frozenset(cut)
        run.go_on()
        assert run.ended(TIMEOUT_S + MORE_S) == [1, 1], run.heard()
    for side, said in enumerate(run.heard()):
        assert re.search(rf"error: rank {1 - side} of 2 was lost", said), said
        assert f"error: rank {side} " not in said and "exitcode  : 1 " in said, said
    assert [one.name for one in (out / "checkpoints").iterdir()] == ["step-00000002"]
    checkpoint, damaged = latest_checkpoint(out)
    assert checkpoint is not None and not damaged
    assert sum(one.numel() for one in moiety.load(checkpoint).parameters()) > 0
    resumed = torchrun("moiety", "train", "--resume", f"--out={out}", "--expert-parallel=2")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same_run(straight, out)


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize(
    ("rank", "phase", "step", "cut"),
    [
        (1, "forward", 2, BOTH),
        (0, "between", 3, {0}),
        (0, "write", 4, BOTH),
        (1, "write", 4, {1}),
        (1, "moments", 4, {0}),
    ],
)
def test_a_short_partition_heals(
    rank: int, phase: str, step: int, cut: set[int], whole: tuple[Path, Path], tmp_path: Path
) -> None:
    text, straight = whole
    with Network() as network, Run(network, text, tmp_path / "run", PATIENT_S, (rank, phase, step)) as run:
        run.stopped()
        network.cut = frozenset(cut)
        run.go_on()
        time.sleep(4.0)
        assert [one.poll() for one in run.children] == [None, None], run.heard()
        network.cut = frozenset()
        assert run.ended(120) == [0, 0], run.heard()
    lost_from = {side for side in range(2) if network.dropped[side]}
    assert lost_from and lost_from <= cut, network.dropped
    assert_same_run(straight, tmp_path / "run")
