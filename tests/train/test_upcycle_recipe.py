"""The upcycling recipe, end to end on a parent of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moiety.model import checkpoint
from moiety.model.quantized import description
from recipes.upcycle_smollm2 import main
from tests import tiny
from tests.train.tiny import text as tiny_text


@pytest.mark.slow
def test_every_arm_is_trained_and_its_costs_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = tiny_text(tmp_path / "tokens")
    torch.manual_seed(0)
    model = tiny.model("", vocab_size=tokenizer.vocab_size, d_model=32, d_ff=64, tied=True)
    checkpoint.save(model, tmp_path / "parent", tokenizer=tokenizer)
    words = (
        "--steps",
        "3",
        "--layers",
        "1",
        "--bytes-per-domain",
        "120000",
        "--parent",
        f"{tmp_path / 'parent'}",
    )
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    arms = found["arms"]
    assert found["receipt"]["promised"] and found["receipt"]["exact_delta"] < 1e-9
    assert arms["parent"]["bits/byte"] == pytest.approx(arms["upcycled, untrained"]["bits/byte"], rel=1e-3)
    for name in ("upcycled", "upcycled, router frozen", "dense, equal FLOPs", "dense, equal time"):
        assert arms[name]["bits/byte"] != arms["parent"]["bits/byte"] and arms[name]["seconds"] > 0
        assert f"| {name} |" in said.err
    one = arms["dense, equal FLOPs"]["FLOPs"] / arms["dense, equal FLOPs"]["steps"]
    assert abs(arms["dense, equal FLOPs"]["FLOPs"] - arms["upcycled"]["FLOPs"]) <= one / 2
    assert arms["upcycled"]["max_vio"] >= 0 and arms["upcycled"]["specialisation"] is not None
    assert arms["upcycled, int8"]["bits/byte"] == pytest.approx(arms["upcycled"]["bits/byte"], rel=0.02)
    assert description(checkpoint.load(tmp_path / "out" / "int8"))
    assert all(isinstance(made, str) for made in arms["upcycled, int8"]["texts"].values())
