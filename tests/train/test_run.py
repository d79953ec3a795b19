"""A run's folder: its plan comes back whole, and its text is prepared once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moiety.errors import DataError, FormatError, MoietyError, UsageError
from moiety.train.run import RunPlan, prepare_text, read_plan, write_plan
from tests.train import tiny


def _plan(**changes: object) -> RunPlan:
    return RunPlan(
        **{  # type: ignore[arg-type]
            "model": tiny.shape(router="sigmoid", selection_bias=True).config(300, 32),
            "train": tiny.options(schedule="wsd", balance_scope="sequence", learning_rate=3.3e-4),
            "sources": ("one.txt", "two.jsonl:domain=größer"),
            "bytes_per_domain": 12345,
            "vocab_size": 300,
            "fingerprint": "0f" * 32,
            **changes,
        }
    )


@pytest.mark.parametrize(
    "plan",
    [
        _plan(),
        _plan(sources=()),
        _plan(model=tiny.shape(experts=0).config(300, 32)),
        _plan(model=tiny.shape(shared_d_ff=16, tied=False, kv_heads=1).config(301, 64)),
    ],
    ids=["sigmoid", "default corpus", "dense", "shared"],
)
def test_a_plan_comes_back(plan: RunPlan, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    write_plan(folder, plan)
    assert [path.name for path in folder.iterdir()] == ["run.json"]
    found = read_plan(folder)
    assert found == plan
    assert type(found.sources) is tuple and type(found.train.learning_rate) is float
    again = dataclasses.replace(plan, vocab_size=301)
    write_plan(folder, again)
    assert read_plan(folder) == again


def test_no_run_here(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=place.name) as caught:
            read_plan(place)
        assert caught.value.hint is not None and "moiety train" in caught.value.hint


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: json.dumps({"model": {}}),
        lambda text: text.replace('"steps": 30', '"steps": "many"'),
        lambda text: text.replace('"steps": 30', '"steps": -4'),
        lambda text: text.replace('"train"', '"trian"'),
        lambda text: text.replace('"vocab_size"', '"vocab\ud83d_size"'),
    ],
    ids=["empty", "cut", "list", "null", "other", "type", "value", "key", "surrogate"],
)
def test_a_damaged_plan_is_refused_with_a_message(damage: object, tmp_path: Path) -> None:
    assert callable(damage)
    write_plan(tmp_path, _plan())
    path = tmp_path / "run.json"
    before = path.read_text(encoding="utf-8")
    after = damage(before)
    assert after != before
    path.write_bytes(after.encode("utf-8", "surrogatepass"))
    with pytest.raises(MoietyError) as caught:
        read_plan(tmp_path)
    assert caught.value.message
    if "cut" in str(after) or not after:
        assert isinstance(caught.value, FormatError)


def _texts(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "plain.txt").write_text("".join(document.text for document in tiny.documents()[:30]))
    lines = [
        json.dumps({"text": document.text, "domain": document.domain}) for document in tiny.documents()[30:]
    ]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return [f"{folder}/plain.txt:domain=animals", f"{folder}/lines.jsonl"]


def test_prepared_once(tmp_path: Path) -> None:
    sources = _texts(tmp_path / "texts")
    first = prepare_text(tmp_path / "run", sources, vocab_size=300)
    assert first.data.domains == ("animals", "code") and first.tokenizer.vocab_size <= 300
    assert any("one document" in note for note in first.notes), first.notes
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(files) > 5
    second = prepare_text(tmp_path / "run", sources, vocab_size=300)
    assert second.data.fingerprint == first.data.fingerprint
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert files == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()
    }


def test_another_text_has_another_fingerprint(tmp_path: Path) -> None:
    sources = _texts(tmp_path / "texts")
    first = prepare_text(tmp_path / "run", sources, vocab_size=300)
    with (tmp_path / "texts" / "plain.txt").open("a") as file:
        file.write("one more line\n")
    second = prepare_text(tmp_path / "run", sources, vocab_size=300)
    assert first.data.fingerprint != second.data.fingerprint
    third = prepare_text(tmp_path / "other", sources, vocab_size=300)
    assert third.data.fingerprint == second.data.fingerprint, "the folder is no part of it"


def test_notes_are_said_once(tmp_path: Path) -> None:
    text = prepare_text(tmp_path / "run", _texts(tmp_path / "texts"), vocab_size=300)
    assert len(set(text.notes)) == len(text.notes), text.notes


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    sources = _texts(tmp_path / "texts")
    tokenizer = prepare_text(tmp_path / "first", sources, vocab_size=290).tokenizer
    text = prepare_text(tmp_path / "second", sources, vocab_size=400, tokenizer=tokenizer)
    assert text.tokenizer is tokenizer and not (tmp_path / "second" / "tokenizer").exists()


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt"):
        prepare_text(tmp_path / "run", [str(tmp_path / "absent.txt")], vocab_size=300)
    assert not (tmp_path / "run").exists()
