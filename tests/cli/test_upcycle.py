"""`moiety upcycle` and `moiety dense`: doors to what the functions do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiety.model import checkpoint
from moiety.train import upcycle as module
from moiety.train.upcycle import RECEIPT
from tests import tiny
from tests.cli.conftest import Call
from tests.train.tiny import text as tiny_text


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    _, tokenizer = tiny_text(tmp_path / "tokens")
    torch.manual_seed(0)
    model = tiny.model("", vocab_size=tokenizer.vocab_size, d_ff=24)
    checkpoint.save(model, tmp_path / "parent", tokenizer=tokenizer)
    return tmp_path / "parent"


def test_there_and_back(call: Call, parent: Path, texts: list[str], tmp_path: Path) -> None:
    words = ("--experts", 4, "--top-k", 2, "--method", "split", "--slices", 2, "--router", "kmeans")
    said = call("upcycle", parent, tmp_path / "moe", *texts, *words)
    assert said.code == 0 and "keeps the parent's function" in said.out and "whole copies" in said.err
    assert (tmp_path / "moe" / RECEIPT).is_file()
    found = call("dense", tmp_path / "moe", tmp_path / "dense", *texts, "--sequences", 2, "--json")
    assert found.code == 0 and found.json["loss_before"] < found.json["loss_after"]
    assert found.json["total_after"] < found.json["total_before"]
    written = call("dense", tmp_path / "moe", tmp_path / "learnt", *texts, "--sequences", 2, "--steps", 2)
    assert written.code == 0 and "perplexity" in written.out and "as written" in written.out


def test_a_dry_run_and_a_merge_as_json(call: Call, parent: Path, tmp_path: Path) -> None:
    said = call(
        "upcycle", parent, tmp_path / "moe", "--merge", parent, "--layers", "every:3", "--dry-run", "--json"
    )
    assert said.code == 0 and said.json["path"] is None and said.json["layers"] == [2]
    assert len(said.json["parents"]) == 2 and not said.json["promised"]
    assert not (tmp_path / "moe").exists()


def test_a_broken_promise_ends_with_4_and_leaves_nothing(
    call: Call, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "expert_tensor", lambda dense, *rest, **named: 2 * dense)
    said = call("upcycle", parent, tmp_path / "moe")
    assert said.code == 4 and "promises the parent's function" in said.err
    assert not (tmp_path / "moe").exists()


def test_what_is_no_dense_model_is_a_wrong_use(call: Call, trained: Path, tmp_path: Path) -> None:
    call("upcycle", trained / "checkpoints" / "step-00000006", tmp_path / "moe").assert_refused(
        2, "has experts already"
    )
    assert call("upcycle", tmp_path / "nothing", tmp_path / "moe").code != 0
