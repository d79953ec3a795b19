"""`--record` of every command that runs a model, and `moiety plan --trace` of what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moiety import tracefile
from moiety.traceimport import from_counts
from tests.cli.conftest import Call


@pytest.fixture(autouse=True)
def nobody_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A trace of 3 layers with 8 experts, 300 tokens."""
    counts_LE = np.stack(
        [np.random.default_rng(seed).permutation([8, 7, 5, 4, 3, 2, 2, 1]) for seed in range(3)]
    )
    tracefile.write(tmp_path / "drawn", from_counts(counts_LE, k=2, tokens=300, model="made"))
    return tmp_path / "drawn"


def test_generate_records(call: Call, trained: Path, tmp_path: Path) -> None:
    words = ("generate", trained, "--max-tokens", 9, "--temperature", 0)
    file = tmp_path / "a"
    said = call(*words, "the cat", "--record", file)
    header = tracefile.read(file).header
    assert said.code == 0 and f"recorded {header.tokens} tokens to {file}" in said.err
    assert said.out == call(*words, "the cat").out
    assert (header.source, header.model, header.level) == ("moiety generate", str(trained), "choices")
    engine = list(tracefile.read(file).steps())
    assert call(*words, "the cat", "--record", file, "--plain").code == 0
    assert list(tracefile.read(file).steps()) == engine
    assert call(*words, "the cat", "--n", 3, "--record", file, "--record-level", "scores").code == 0
    trace = tracefile.read(file)
    (chunk,) = trace.chunks()
    assert chunk.request_T is not None and set(chunk.request_T.tolist()) == {0, 1, 2}
    assert (
        trace.header.level == "scores" and chunk.score_TLE is not None and chunk.score_TLE.shape[1:] == (2, 4)
    )


def test_chat_bench_and_eval_record(
    call: Call, trained: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hello", "you"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, ""))
    asked: dict[str, tuple[Any, ...]] = {
        "chat": ("chat", trained, "--max-tokens", 3),
        "bench": ("bench", trained, "--batches", "2", "--prompt", 3, "--tokens", 4, "--prefill", "7"),
        "eval": ("eval", trained, *texts, "--ppl", "--sequences", 2, "--length", 16),
    }
    for name, words in asked.items():
        said = call(*words, "--record", tmp_path / name)
        trace = tracefile.read(tmp_path / name)
        assert said.code == 0 and trace.header.source == f"moiety {name}" and trace.header.tokens > 0, (
            said.err
        )
        (chunk,) = trace.chunks()
        assert chunk.request_T is not None and len(set(chunk.request_T.tolist())) >= 2, name
    # two prefills after one to warm up, of which each is a request, then two batches of two
    assert len(set(next(tracefile.read(tmp_path / "bench").chunks()).request_T.tolist())) == 4 + 4  # type: ignore[union-attr]


def test_record_refusals(call: Call, trained: Path, tmp_path: Path) -> None:
    words = ("generate", trained, "the", "--max-tokens", 2)
    call(*words, "--record-sample", 2).assert_refused(2, "no file", hint="--record FILE")
    call(*words, "--record", tmp_path / "a", "--record-sample", 0).assert_refused(2, "record_sample is 0")
    assert call(*words, "--record", tmp_path / "a", "--record-level", "all").code == 2
    said = call(*words, "--record", tmp_path)  # a folder
    assert said.code == 1 and "hint" in said.err and not list(tmp_path.glob(".*moiety*"))


def test_replay_in_words_and_figures(call: Call, drawn: Path, tmp_path: Path) -> None:
    said = call("plan", "--trace", drawn, "--json")
    found = said.json
    assert said.code == 0 and found["tokens"] == 300 and found["first_uses"] == 24
    assert {point["policy"] for point in found["points"]} == {
        "lru",
        "lfu",
        "lfru",
        "layered",
        "fixed",
        "belady",
    }
    assert all(0 <= point["hit_rate"] <= 1 and point["tokens_per_s"] is None for point in found["points"])
    said = call("plan", "--trace", drawn, "--policies", "lru,belady", "--budgets", "25%,50%", columns=80)
    assert said.code == 0 and "hits, %" in said.out and said.out.count("┏") == 1
    assert (
        "6 (25%)" in said.out and "24 (100%)" in said.out and "belady" in said.out and "lfu" not in said.out
    )
    page = tmp_path / "p.html"
    assert call("plan", "--trace", drawn, "--plot", page).code == 0
    text = page.read_text()
    assert "belady" in text and "one step" in text and 'src="http' not in text


def test_a_named_model_gives_the_sizes(call: Call, drawn: Path) -> None:
    words = ("plan", "mixtral-8x7b", "--trace", drawn, "--policies", "lfru", "--budgets", "50%", "--json")
    half, full = call(*words, "--disk-rate", "1GB").json["points"]
    assert half["tokens_per_s"][0] < full["tokens_per_s"][0] and half["limit"] == "disk"
    assert full["size_bytes"] == pytest.approx(2 * half["size_bytes"], rel=1e-6)
    # all of mixtral's experts at 4 bits and a scale for each 32
    assert 23e9 < full["size_bytes"] < 27e9 and full["missed_bytes"] == 0
    large = call(*words, "--disk-rate", "1GB", "--format", "int8-g32").json["points"][1]
    assert large["size_bytes"] > 1.5 * full["size_bytes"]
    device = call(*words, "--device", "h100").json
    assert device["points"][1]["tokens_per_s"][0] > full["tokens_per_s"][0] and "link" in device["assumed"]
    said = call("plan", "mixtral-8x7b", "--trace", drawn, "--policies", "lfru", "--budgets", "4GB,99TB")
    assert said.code == 0 and "tokens/s" in said.out and "(100%" in said.out


def test_a_recorded_run_is_replayed(call: Call, trained: Path, tmp_path: Path) -> None:
    call("generate", trained, "the cat", "--max-tokens", 20, "--record", tmp_path / "a")
    said = call("plan", "--trace", tmp_path / "a", columns=40)
    assert said.code == 0 and all(len(line) <= 40 for line in said.out.splitlines()), said.out
    assert "not measured" in " ".join(said.out.split()) and "tokens/s" in said.out


def test_replay_refusals(call: Call, drawn: Path, tmp_path: Path) -> None:
    call("plan", "--trace", tmp_path / "none").assert_refused(1, "none", hint="path")
    call("plan", "--policies", "lru").assert_refused(2, "no trace", hint="--trace")
    call("plan", "--trace", drawn, "--policies", "best").assert_refused(2, "best", hint="belady")
    call("plan", "--trace", drawn, "--budgets", "4GB").assert_refused(2, "how large", hint="shares")
    call("plan", "--trace", drawn, "--budgets", "25%,4GB").assert_refused(2, "25%,4GB")
    call("plan", "--trace", drawn, "--budgets", "x%").assert_refused(2, "x%", hint="25%,50%")
    call("plan", "--trace", drawn, "--budgets", "50%,-5%").assert_refused(2, "-5%")
    call("plan", "--trace", __file__).assert_refused(1, "not a whole trace")


def test_experts_are_placed_by_a_trace(call: Call, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    counts_LE = np.stack([draw.permutation(np.arange(1, 65) ** -0.6) for _ in range(16)])
    file, page = tmp_path / "skewed", tmp_path / "placed.html"
    tracefile.write(file, from_counts(counts_LE, k=8, tokens=200))
    words = ("plan", "olmoe-1b-7b", "--ranks", 8, "--nodes", 2, "--trace", file, "--device", "h100")
    said = call(*words, "--redundant", 8, "--plot", page, columns=80)
    assert said.code == 0 and f"{page} is written" in " ".join(said.err.split())
    text = " ".join(said.out.split())
    assert text.startswith("placing experts anew pays: the busiest rank has 1.")
    for part in ("judged by the second half", "in order", "balanced", "all in every node", "once per node"):
        assert part in text, part
    assert max(map(len, said.out.splitlines())) <= 80
    drawing = page.read_text()
    assert "busiest rank over the mean" in drawing and "balanced, once per node" in drawing
    found = call(*words, "--redundant", 8, "--json").json
    assert found["name"] == "olmoe-1b-7b" and len(found["ways"]) == 3
    assert np.array(found["ways"][1]["expert_of_slot"]).shape == (16, 8, 9)
    assert found["ways"][0]["imbalance"] > found["ways"][1]["imbalance"] >= 1
    limited = call(*words, "--node-limit", 1, "--json").json["ways"][0]
    assert 0 < limited["limited_bytes"]["between"] < limited["token_bytes"]["node"]["between"]


def test_placing_is_refused_with_what_to_do(call: Call, drawn: Path) -> None:
    for words, part in (
        (("--trace", drawn), "it wants a model"),
        (("olmoe-1b-7b", "--trace", drawn, "--policies", "lru"), "no policies, budgets or training"),
        (("olmoe-1b-7b", "--trace", drawn, "--train-tokens", "1B"), "no policies, budgets or training"),
        (("olmoe-1b-7b", "--trace", drawn), "the trace has 3 layers of 8 to 8 experts, the model 16 of 64"),
        (("switch-base-8", "--trace", drawn), "an encoder-decoder"),
        (("llama-3-70b", "--trace", drawn), "this model is dense"),
    ):
        said = call("plan", *words, "--ranks", 4)
        assert said.code == 2 and part in " ".join(said.err.split()), (words, said.err)
    said = call("plan", "olmoe-1b-7b", "--ranks", 6, "--device", "h100")
    assert said.code == 2 and "hint: redundant 2 or 8 for instance" in said.err


def test_a_plan_over_ranks_takes_uniform_loads_and_says_so(call: Call) -> None:
    words = ("plan", "olmoe-1b-7b", "--device", "h100", "--ranks", 8, "--nodes", 2, "--train-tokens", "1B")
    text = " ".join(call(*words).out.split())
    for part in (
        "loads are taken for uniform",
        "over 8 ranks",
        "a step of 131k tokens on 8 devices",
        "with all experts in every node",
        "busiest rank over the mean",
    ):
        assert part in text, part
    found = call(*words, "--json").json
    assert [way["imbalance"] for way in found["placement"]["ways"]] == pytest.approx([1, 1, 1])
    assert found["placement"]["ways"][1]["mode"] == "contiguous", "of equals the one that moves nothing"
    assert found["training"]["inside_nodes"]["exchange_seconds"]["low"] > 0
