"""`moiety gradients`: the report as a table and as JSON; exit code 4 when a router learns nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiety.infer.open import open_model
from moiety.observe.gradients import gradient_report
from tests.cli.conftest import Call, small

PROMPT = "the cat 3 sat on the mat and saw 3 birds.\n" * 3


def test_json_is_the_report(call: Call, trained: Path) -> None:
    opened = open_model(trained)
    report = gradient_report(opened.model, torch.tensor([opened.tokenizer.encode(PROMPT)]))
    said = call("gradients", trained, "--prompt", PROMPT, "--json")
    assert said.code == 0 and said.err == "" and said.json["ok"] is True
    assert said.json["tokens"] == report.tokens > 20
    for layer, one in zip(said.json["layers"], report.layers, strict=True):
        assert layer["layer"] == one.layer and layer["verdict"] == one.verdict
        assert layer["router_norm"] == pytest.approx(one.router_norm, rel=1e-4) and layer["router_norm"] > 0
        assert layer["balance_norm"] == pytest.approx(one.balance_norm, rel=1e-4)
        assert layer["experts_reached"] == one.experts_reached > 0


def test_a_file_is_read_in_sequences(call: Call, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(PROMPT * 10)
    said = call(
        "gradients", trained, "--text", tmp_path / "text.txt", "--length", 20, "--sequences", 3, "--json"
    )
    assert said.code == 0 and said.json["tokens"] == 3 * 19


def test_without_text_it_takes_random_tokens(call: Call, trained: Path) -> None:
    said = call("gradients", trained, "--length", 16, "--sequences", 4, "--json")
    assert said.code == 0 and said.json["tokens"] == 60
    assert said.json == call("gradients", trained, "--length", 16, "--sequences", 4, "--json").json


@pytest.mark.parametrize("columns", [40, 100])
def test_the_table(columns: int, call: Call, trained: Path) -> None:
    said = call("gradients", trained, "--prompt", PROMPT, columns=columns)
    assert said.code == 0 and said.err == ""
    table = said.out.partition("router of layer 0")[0]
    assert max(map(len, table.splitlines())) <= columns and "layer 1" in table
    assert "router of layer 0 learns" in said.out and "router of layer 1 learns" in said.out


def test_a_router_that_cannot_learn_is_exit_code_4(call: Call, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "cut"
    assert call("train", *texts, "--out", out, *small(experts_per_token=1, steps=1)).code == 0
    said = call("gradients", out, "--prompt", PROMPT)
    assert said.code == 4 and "error: in layers 0, 1 " in said.err
    assert "router of layer 1 gets no gradient from the language-model loss" in said.out
    as_json = call("gradients", out, "--prompt", PROMPT, "--json")
    assert as_json.code == 4 and as_json.json["ok"] is False


def test_the_checkpoint_is_not_touched(call: Call, trained: Path) -> None:
    files = {path: path.read_bytes() for path in (trained / "checkpoints").rglob("*") if path.is_file()}
    assert call("gradients", trained).code == 0
    assert {path: path.read_bytes() for path in files} == files


def test_refusals(call: Call, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("a")
    both = ("--text", tmp_path / "short.txt", "--prompt", "the")
    call("gradients", trained, *both).assert_refused(2, "--text", "--prompt")
    call("gradients", trained, "--text", tmp_path / "none.txt").assert_refused(1, "none.txt")
    call("gradients", trained, "--text", tmp_path / "bad.txt").assert_refused(1, "bad.txt")
    call("gradients", trained, "--text", tmp_path / "short.txt").assert_refused(
        2, "two tokens", hint="longer"
    )
    call("gradients", trained, "--length", 1).assert_refused(2, "length is 1")
    call("gradients", trained, "--sequences", 0).assert_refused(2, "sequences is 0")
    call("gradients", tmp_path).assert_refused(2, "config.json")
