"""The command line as a person meets it: words in, exit code, stdout and stderr out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moiety.cli import main
from tests.train import tiny

SMALL = {
    "d_model": 32,
    "layers": 2,
    "heads": 2,
    "d_ff": 32,
    "experts": 4,
    "vocab_size": 300,
    "steps": 6,
    "batch": 4,
    "length": 32,
    "learning_rate": 1e-2,
    "warmup": 2,
    "evaluate_every": 0,
    "evaluate_sequences": 4,
}


def small(**changes: object) -> list[str]:
    """Options of a run that takes a fraction of a second."""
    options = {**SMALL, **changes}
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)

    def assert_refused(self, code: int, *named: str, hint: str | None = None) -> None:
        """The exit code, one error with these words in it, a hint, nothing on stdout, and no traceback."""
        assert self.code == code, (self.code, self.err)
        assert self.out == "", self.out
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1, self.err
        for word in named:
            assert word in self.err, (word, self.err)
        if hint is not None:
            hints = self.err.partition("hint: ")[2]
            assert hint in hints, self.err


Call = Callable[..., Said]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `moiety WORDS` in this process, without changing its allocator."""
    monkeypatch.setattr("moiety.train.host.keep_freed_memory", lambda largest=0: True)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object, columns: int = 100) -> Said:
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert "\x1b" not in captured.out + captured.err, "colour although this is no terminal"
        return Said(code, captured.out, captured.err)

    return run


def _heed_interruptions() -> None:
    """Programs that a shell put into the background ignore Ctrl-C, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*words: object, **given: Any) -> subprocess.Popen[str]:
    """`python -m moiety WORDS` as a process of its own, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-m", "moiety", *map(str, words)],
        preexec_fn=_heed_interruptions,  # noqa: PLW1509 - it touches no lock
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, **given},
    )


def run_apart(*words: object) -> Said:
    """The same, to its end."""
    process = start(*words)
    out, err = process.communicate(timeout=60)
    return Said(process.returncode, out, err)


def interrupt_when(process: subprocess.Popen[str], marker: str) -> Said:
    """Press Ctrl-C once a line of stderr has `marker` in it, and wait for the end."""
    assert process.stderr is not None and process.stdout is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if marker in line:
            process.send_signal(signal.SIGINT)
            break
    else:
        raise AssertionError(f"{marker!r} was never said: {seen}")
    out, err = process.communicate(timeout=60)
    return Said(process.returncode, out, "".join(seen) + err)


def write_texts(folder: Path) -> list[str]:
    """A text file and a jsonl file of two domains; as they are named on the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = tiny.documents()
    (folder / "plain.txt").write_text("".join(document.text for document in documents[:30]))
    lines = [json.dumps({"text": document.text, "domain": "code"}) for document in documents[30:]]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    return [f"{folder}/plain.txt:domain=animals", f"{folder}/lines.jsonl"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A finished run of six steps; read it, do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moiety.train.host.keep_freed_memory", lambda largest=0: True)
        assert main(["train", *texts, "--out", str(folder), *small()]) == 0
    torch.set_num_threads(before)
    return folder
