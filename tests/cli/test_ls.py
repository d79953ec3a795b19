"""`moiety ls`: models of the hub's cache, runs, checkpoints and GGUF files, also damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiety.model import checkpoint
from tests import tiny
from tests.cli.conftest import Call, Said


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    return place


def test_nothing_is_here(call: Call, tmp_path: Path, cache: Path) -> None:
    said = call("ls", tmp_path / "runs")
    assert (said.code, said.out) == (0, "") and "no model is here" in said.err
    assert call("ls", tmp_path / "runs", "--json").json == []


def test_all_kinds(call: Call, tmp_path: Path, cache: Path, trained: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "a").symlink_to(trained)
    model = tiny.model("", moe=tiny.experts())
    checkpoint.save(model, runs / "plain")
    checkpoint.save(model, cache / "models--owner--model" / "snapshots" / ("0123456789" * 4))
    from moiety.model.gguf import save_gguf

    save_gguf(tiny.model("mixtral"), runs / "small.gguf")
    rows = {row["name"]: row for row in call("ls", runs, "--json").json}
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert {"owner/model@01234567", str(runs / "plain"), str(runs / "small.gguf")} <= set(rows)
    for name in ("owner/model@01234567", str(runs / "plain")):
        row = rows[name]
        assert row["parameters"] == expected and 0 < row["active"] < expected and not row["problem"]
        assert row["bytes"] > 4 * expected and row["date"].startswith("20")
    assert rows[str(runs / "small.gguf")]["family"] == "gguf"
    assert rows[str(runs / "small.gguf")]["parameters"] > 0
    assert str(trained) in {row["name"] for row in call("ls", trained.parent, "--json").json}


def test_damaged_models_are_listed_with_the_reason(call: Call, tmp_path: Path, cache: Path) -> None:
    for name, text in (("cut", "{"), ("other", '{"model_type": "resnet"}')):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(text)
    (tmp_path / "runs" / "bad.gguf").write_bytes(b"GGUF")
    said = call("ls", tmp_path / "runs")
    assert said.code == 0
    for word in ("resnet", "not whole JSON", "bad.gguf"):
        assert word in " ".join(said.err.split()), (word, said.err)
    rows = call("ls", tmp_path / "runs", "--json").json
    assert [row["parameters"] for row in rows] == [None, None, None] and all(row["problem"] for row in rows)


@pytest.mark.parametrize("columns", [40, 100])
def test_the_table_fits(columns: int, call: Call, trained: Path, cache: Path) -> None:
    said: Said = call("ls", trained.parent, columns=columns)
    assert said.code == 0 and max(map(len, said.out.splitlines())) <= columns
    assert "active" in said.out
