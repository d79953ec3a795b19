"""`--memory`: the same answers from less memory, one line that says what it took, and every way to get it wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import Call, interrupt_when, run_apart, start
from tests.infer import test_harness
from tests.infer.test_streaming import write_middle

WORDS = ("one two", "--max-tokens", 12, "--temperature", 0)


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with 170 MB of experts."""
    return write_middle(tmp_path_factory.mktemp("middle") / "model")


@pytest.fixture(scope="module")
def smallest(middle: Path) -> str:
    """The least memory it runs in, as the refusal of less says."""
    said = run_apart("generate", middle, *WORDS, "--memory", "100MiB")
    said.assert_refused(2, "100 MiB is too small", hint="for keys and values")
    found = re.search(r"the\s+smallest\s+is\s+(\d+)\s+MiB", said.err)
    assert found, said.err
    return f"{found[1]}MiB"


def test_the_same_answer_and_what_it_took(middle: Path, smallest: str) -> None:
    whole, streamed = (run_apart("generate", middle, *WORDS, *more) for more in ((), ("--memory", smallest)))
    assert whole.code == streamed.code == 0 and whole.out == streamed.out
    assert "in memory" not in whole.err
    said = " ".join(streamed.err.split())
    assert re.search(
        r"12 tokens, [\d.]+ tokens/s; experts: [\d.]+ % in memory, [\d.]+ GB read, [\d.]+ s wait", said
    )
    assert "for a step" in said and "of 192 experts" in said


def test_two_processes_on_one_file(middle: Path, smallest: str) -> None:
    both = [start("generate", middle, *WORDS, "--memory", smallest) for _ in range(2)]
    outs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and outs[0] == outs[1] != ""


def test_an_interruption_ends_cleanly(middle: Path, smallest: str) -> None:
    process = start("generate", middle, "one", "--max-tokens", 3000, "--memory", smallest, "--temperature", 2)
    said = interrupt_when(process, "memory: ")
    assert said.code == 130 and "interrupted" in said.err and "Traceback" not in said.err


def test_bench_counts_what_it_needs_itself(middle: Path) -> None:
    words = ("bench", middle, "--batches", "1,2", "--tokens", 4, "--prefill", "20", "--json", "--memory")
    refused = run_apart(*words, "100MiB")
    found = re.search(r"the\s+smallest\s+is\s+(\d+)\s+MiB", refused.err)
    assert refused.code == 2 and found and int(found[1]) > 256, refused.err
    said = run_apart(*words, f"{found[1]}MiB")
    assert said.code == 0 and [row["sequences"] for row in said.json["decode"]] == [1, 2]
    assert "% in memory" in said.err and said.json["decode"][0]["distinct_experts"] == 2


def test_what_a_preference_costs(middle: Path, smallest: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three two one\n" * 400)
    words = (
        f"{text}:domain=x",
        "--ppl",
        "--length",
        24,
        "--batch",
        1,
        "--sequences",
        2,
        "--json",
        "--memory",
        smallest,
    )
    said = run_apart("eval", middle, *words, "--resident-bias", 0.2)
    assert said.code == 0, said.err
    as_it_is, streamed = said.json
    assert as_it_is["variant"] == "as it is" and streamed["variant"] == "streamed"
    assert streamed["kl"]["value"] > 0 and "% of pairs changed" in " ".join(said.err.split())
    said = run_apart("eval", middle, *words)
    assert said.json[1]["kl"]["value"] == 0 and said.json[1]["agreement"]["value"] == 1


def test_tasks_have_the_same_figures(
    call: Call, middle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm_eval forks for errors of its figures
    folder = test_harness.tasks(tmp_path)
    words = ("eval", middle, "--tasks", "choice_task", "--include-path", folder, "--limit", 3, "--json")
    refused = run_apart(*words, "--memory", "100MiB")
    found = re.search(r"the\s+smallest\s+is\s+(\d+)\s+MiB", refused.err)
    assert refused.code == 2 and found, refused.err
    said = run_apart(*words, "--memory", f"{found[1]}MiB")
    assert said.code == 0 and "% in memory" in said.err, said.err
    assert said.json["figures"] == call(*words).json["figures"] != []


def test_refusals(call: Call, trained: Path, middle: Path) -> None:
    call("generate", trained, "x", "--memory", "1GiB").assert_refused(
        2, "is not packed", hint="moiety quantize"
    )
    call("generate", middle, "x", "--memory", "much").assert_refused(2, "memory is 'much'", hint="12GiB")
    call("chat", middle, "--no-prefetch").assert_refused(2, "memory is not", hint="--memory 12GiB")
    call("bench", "--shape", "olmoe-1b-7b", "--memory", "1GiB").assert_refused(2, "no file to stream")
    call("generate", middle, "--memory", "1GiB", "--expert-policy", "best").assert_refused(
        2, "auto, lru, lfu"
    )
