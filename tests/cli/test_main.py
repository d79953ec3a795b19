"""Which command is which, and how failures leave: a code, one sentence, a hint, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from moiety.cli import COMMANDS
from tests.cli.conftest import Call, run_apart, start


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_the_overview_names_every_command(words: list[str], call: Call) -> None:
    said = call(*words)
    assert said.code == 0 and said.err == ""
    for name, line in COMMANDS.items():
        assert f"  {name} " in said.out and line in said.out
    assert all(len(line) <= 100 for line in said.out.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, call: Call) -> None:
    said = call(name, "--help")
    assert said.code == 0 and said.err == ""
    assert f"moiety {name}" in said.out and len(said.out.splitlines()) > 4
    assert "--version" not in said.out, "the version is the program's, not a command's"


def test_help_loads_no_torch() -> None:
    """All commands' help in one process of 40 columns: instant, because what is heavy is not there."""
    words = [["--help"], *([name, "--help"] for name in COMMANDS)]
    code = (
        "import sys\nfrom moiety.cli import main\n"
        f"codes = [main(words) for words in {words!r}]\n"
        "heavy = {'torch', 'transformers', 'plotly', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "print(codes, sorted(heavy), file=sys.stderr)"
    )
    narrow = {**os.environ, "COLUMNS": "40"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=narrow
    )
    assert found.stderr.strip() == f"{[0] * len(words)} []"
    boxes = [line for line in found.stdout.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert len(boxes) > 100 and max(map(len, boxes)) <= 40


def test_the_overview_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys\nfrom moiety.cli import main\nmain([])\n"
        "print({'cyclopts', 'rich', 'numpy', 'torch'} & set(sys.modules), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "set()"


def test_version(call: Call) -> None:
    try:
        said = call("--version")
    except PackageNotFoundError:
        pytest.fail("`moiety --version` fails where the package runs from its folder without being installed")
    assert said.code == 0 and said.out.strip().replace(".", "").isdigit()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("trian", "train"),
        ("Demo", "demo"),
        ("genrate", "generate"),
        ("docter", "doctor"),
        ("param", "params"),
    ],
)
def test_an_unknown_command_names_the_nearest(given: str, meant: str, call: Call) -> None:
    call(given, "--help").assert_refused(2, repr(given), hint=f"moiety {meant}")


def test_an_unknown_command_like_no_other(call: Call) -> None:
    call("xyzzy").assert_refused(2, "'xyzzy'", hint="--help")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "--stepz", "3"], ["--stepz", "--steps"]),
        (["train", "--learning-rat", "3"], ["--learning-rat", "--learning-rate"]),
        (["generate", "x", "y", "--temprature", "1"], ["--temprature", "--temperature"]),
        (["demo", "--step", "3"], ["--step", "--steps"]),
        (["train", "--steps", "many"], ["steps", "many"]),
        (["train", "--steps"], ["--steps"]),
        (["train", "--router", "sofmax"], ["sofmax", "softmax"]),
        (["train", "--dtype", "fp16"], ["fp16", "bf16", "fp32"]),
        (["train", "--steps", "0"], ["steps is 0", "positive"]),
        (["train", "--learning-rate", "-1"], ["learning_rate is -1", "positive"]),
        (["train", "--learning-rate", "nan"], ["learning_rate"]),
        (["train", "--d-model", "33", "--heads", "2"], ["33", "heads"]),
        (["train", "--experts", "-2"], ["experts is -2"]),
        (["generate", "x", "y", "--top-p", "1.5"], ["top_p is 1.5"]),
        (["generate", "x", "y", "--temperature", "-1"], ["temperature is -1"]),
        (["params"], ["name"]),
        (["generate"], ["path"]),
        (["params", "a", "b"], ["b"]),
        (["doctor", "more"], ["more"]),
        (["doctor", "--josn"], ["--josn", "--json"]),
        (["params", "mixtral-8x7c"], ["mixtral-8x7c", "mixtral-8x7b"]),
    ],
    ids=" ".join,
)
def test_wrong_words_are_refused_by_name(words: list[str], named: list[str], call: Call) -> None:
    said = call(*words)
    said.assert_refused(2)
    for word in named:
        assert word.lower() in said.err.lower(), (word, said.err)


def test_as_a_program() -> None:
    said = run_apart("trian")
    said.assert_refused(2, "'trian'", hint="train")


@pytest.mark.parametrize("words", [["--help"], ["params", "mixtral-8x7b"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_reason_to_complain(words: list[str]) -> None:
    """`moiety ... | head -0`: the pipe's other end is closed before anything is written."""
    process = start(*words)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 1), complaint
    assert complaint == "", complaint
