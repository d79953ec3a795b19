"""`moiety adapter`, and --adapter of the commands that answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiety.infer.open import open_model
from moiety.model import checkpoint
from moiety.model.adapter_files import family_at, load_adapter, save_adapter
from moiety.model.adapters import attach
from tests.cli.conftest import Call
from tests.model.test_adapters import adapters


@pytest.fixture
def adapted(trained: Path, tmp_path: Path) -> Path:
    """An adapter for the trained model."""
    opened = open_model(trained)
    attach(opened.model, "default", adapters(opened.model))
    save_adapter(opened.model, tmp_path / "adapter", family=family_at(opened.path))
    return tmp_path / "adapter"


def test_show(call: Call, trained: Path, adapted: Path) -> None:
    targets = {row["target"]: row for row in call("adapter", "show", trained, "--json").json}
    assert {"attention.q", "experts.gate_up", "experts.down"} <= targets.keys()
    rows = {row["group"]: row for row in call("adapter", "show", trained, adapted, "--json").json}
    assert rows["experts"]["trained"] > 0 and rows["embedding"]["trained"] == 0
    assert "experts.down" in call("adapter", "show", trained).out
    assert "attention" in call("adapter", "show", trained, adapted).out


def test_check_says_who_acts(call: Call, trained: Path, adapted: Path, tmp_path: Path) -> None:
    said = call("adapter", "check", trained, adapted, "--prompt", "the cat sat", "--json")
    assert said.code == 0 and said.json["acts"] == "whole" and said.json["largest_logit_change"] > 0
    assert call("adapter", "check", trained, adapted).out.count("experts.down") == 2 * 4
    opened = open_model(trained)
    made = adapters(opened.model)
    made["blocks.1.feed_forward.experts", "up"].b.data[2].zero_()
    attach(opened.model, "default", made)
    save_adapter(opened.model, tmp_path / "part", family=family_at(opened.path))
    said = call("adapter", "check", trained, tmp_path / "part")
    assert said.code == 4 and "blocks.1.feed_forward.experts.gate_up[2]" in said.err
    for one in made.values():
        one.b.data.zero_()
    save_adapter(opened.model, tmp_path / "nothing", family=family_at(opened.path))
    said = call("adapter", "check", trained, tmp_path / "nothing")
    assert said.code == 4 and "does nothing" in said.err


def test_merged_is_a_model(call: Call, trained: Path, adapted: Path, tmp_path: Path) -> None:
    said = call("adapter", "merge", trained, adapted, tmp_path / "new", "--json")
    assert said.code == 0 and said.json["lost"] == {}
    opened = open_model(trained)
    load_adapter(opened.model, adapted, family=family_at(opened.path))
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        found, true = checkpoint.load(tmp_path / "new")(tokens).logits, opened.model(tokens).logits
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
    packed = tmp_path / "packed"
    assert call("quantize", trained, packed, "--format", "int8-g32").code == 0
    said = call("adapter", "merge", packed, adapted, tmp_path / "again")
    assert said.code == 2 and "is packed" in said.err and not (tmp_path / "again").exists()
    said = call("adapter", "merge", packed, adapted, tmp_path / "again", "--requantize")
    assert said.code == 0 and "rounding took up to" in said.out


def test_answers_with_it(call: Call, trained: Path, adapted: Path, tmp_path: Path) -> None:
    words = ("the cat", "--max-tokens", 12, "--temperature", 0, "--json")
    assert call("adapter", "merge", trained, adapted, tmp_path / "new").code == 0
    with_it = call("generate", trained, *words, "--adapter", adapted).json["text"]
    assert with_it == call("generate", trained, *words, "--adapter", adapted, "--plain").json["text"]
    assert with_it == call("generate", tmp_path / "new", *words).json["text"]
    assert with_it != call("generate", trained, *words).json["text"]
    rows = call(
        "eval",
        trained,
        "--ppl",
        "--bytes-per-domain",
        20000,
        "--sequences",
        1,
        "--adapter",
        adapted,
        "--json",
    ).json
    by_name = {row["variant"]: row["perplexity"]["value"] for row in rows}
    assert by_name["as it is"] != by_name["without adapter"]


def test_words_that_do_not_fit(call: Call, trained: Path, adapted: Path, tmp_path: Path) -> None:
    call("adapter", "check", trained).assert_refused(2, "check wants", hint="adapter")
    call("adapter", "merge", trained, adapted).assert_refused(2, "merge wants", hint="adapter")
    call("adapter", "show", trained, adapted, "--requantize").assert_refused(2, "--requantize")
    call("adapter", "check", trained, tmp_path).assert_refused(1, "is not an adapter")
    call("adapter", "merge", trained, adapted, adapted).assert_refused(
        2, "to be written and is read", hint="new"
    )
