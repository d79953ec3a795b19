"""`moiety train`: any text, stop and go on, and every wrong thing refused before it costs anything."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from moiety.model.checkpoint import load
from moiety.train.run import read_plan
from moiety.train.state import latest_checkpoint
from tests.cli.conftest import Call, interrupt_when, small, start, write_texts
from tests.train import tiny


def _steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_a_run_from_its_start_to_its_end(call: Call, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = call("train", *texts, "--out", out, *small())
    assert said.code == 0
    assert said.out.startswith(f"done: {out}") and "moiety generate" in said.out
    assert "step 6" in said.err and "bits/byte" in said.err and "parameters" in said.err
    assert _steps(out) == [1, 2, 3, 4, 5, 6] and _names(out) == ["step-00000006"]
    first, *_, last = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"] and set(last) >= {"bits_per_byte/animals", "bits_per_byte/code"}
    plan = read_plan(out)
    assert plan.sources == tuple(texts) and plan.train.steps == 6
    assert load(out / "checkpoints" / "step-00000006").config.vocab_size == plan.model.vocab_size


def test_json_is_all_there_is_on_stdout(call: Call, texts: list[str], tmp_path: Path) -> None:
    said = call("train", *texts, "--out", tmp_path, *small(), "--json")
    assert said.code == 0 and said.json["step"] == 6 and said.json["run"] == str(tmp_path)
    assert 0 < said.json["loss"] < 10 and said.json["seconds"] > 0


def test_json_of_a_run_whose_last_step_was_not_finite(call: Call, texts: list[str], tmp_path: Path) -> None:
    """NaN is no JSON; the command still says what it did and ends well."""
    rate = small(learning_rate=1e38, warmup=0, steps=3, clip=0)
    said = call("train", *texts, "--out", tmp_path, *rate, "--json")
    assert said.code in (0, 1) and "not finite" in said.err
    if said.code == 0:
        assert said.json["step"] == 3


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal(columns: int, call: Call, texts: list[str], tmp_path: Path) -> None:
    said = call("train", *texts, "--out", tmp_path, *small(steps=2), columns=columns)
    assert said.code == 0
    assert all(len(line) <= columns for line in said.err.splitlines()), said.err


def test_dry_run_writes_no_run(call: Call, texts: list[str], tmp_path: Path) -> None:
    said = call("train", *texts, "--out", tmp_path, *small(), "--dry-run")
    assert said.code == 0 and "parameters" in said.err and "epochs" in said.err
    assert not (tmp_path / "run.json").exists() and not (tmp_path / "checkpoints").exists()
    assert call("train", *texts, "--out", tmp_path, *small(steps=1)).code == 0


def test_every_kind_of_source(call: Call, texts: list[str], tmp_path: Path) -> None:
    folder = Path(texts[1]).parent
    for number, sources in enumerate(([f"{folder}/plain.txt"], [texts[0]], [texts[1]], [str(folder)])):
        out = tmp_path / str(number)
        assert call("train", *sources, "--out", out, *small(steps=1)).code == 0
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        domains = {name.partition("/")[2] for name in last if name.startswith("bits_per_byte/")} - {"mean"}
        assert domains == [{"plain"}, {"animals"}, {"code"}, {"plain", "code"}][number]


def _bad(folder: Path) -> dict[str, str]:
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "binary.txt").write_bytes(b"abc\0def" * 100)
    (folder / "latin.txt").write_bytes("größer ".encode("latin-1") * 100)
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "textless.jsonl").write_text('{"body": "fine"}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "hollow").mkdir()
    (folder / "short.txt").write_text("too short to train on")
    return {name.name: str(name) for name in folder.iterdir()} | {"absent.txt": str(folder / "absent.txt")}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty.txt", "empty"),
        ("blank.txt", "empty"),
        ("binary.txt", "binary"),
        ("latin.txt", "UTF-8"),
        ("broken.jsonl", "broken.jsonl:2"),
        ("textless.jsonl", "text"),
        ("picture.png", ".png"),
        ("hollow", "hollow"),
        ("absent.txt", "does not exist"),
    ],
)
def test_bad_text_is_named(name: str, said: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    path = _bad(tmp_path / "texts")[name]
    for source in (path, f"{path}:domain=x"):
        call("train", source, "--out", tmp_path / "run", *small()).assert_refused(1, name, said)
    assert not (tmp_path / "run").exists(), "nothing is written for a text that cannot be read"


def test_too_little_text_leaves_no_run_behind(call: Call, texts: list[str], tmp_path: Path) -> None:
    """What failed before its first step can be tried again with other options in the same folder."""
    said = call("train", *texts, "--out", tmp_path, *small(length=100_000))
    said.assert_refused(1, "tokens", hint="shorter")
    again = call("train", *texts, "--out", tmp_path, *small(steps=1))
    assert again.code == 0, again.err


def test_a_wrong_tracker_leaves_no_run_behind(call: Call, texts: list[str], tmp_path: Path) -> None:
    said = call("train", *texts, "--out", tmp_path, *small(), "--track", "tensorbored")
    said.assert_refused(2, "tensorbored", hint="tensorboard")
    again = call("train", *texts, "--out", tmp_path, *small(steps=1))
    assert again.code == 0, again.err


def test_a_domain_too_short_to_hold_out(call: Call, texts: list[str], tmp_path: Path) -> None:
    """Said at the start or lived with at the end, but no run is lost to it after its last step."""
    (tmp_path / "note.txt").write_text("x")
    out = tmp_path / "run"
    said = call("train", *texts, tmp_path / "note.txt", "--out", out, *small())
    assert (said.code == 0 and _names(out) == ["step-00000006"]) or not (out / "metrics.jsonl").exists(), (
        said.err
    )


@pytest.mark.parametrize(
    "extra", [{"experts": 2, "experts_per_token": 2}, {"experts": 1, "router": "switch"}]
)
def test_every_expert_chosen(extra: dict[str, object], call: Call, texts: list[str], tmp_path: Path) -> None:
    said = call("train", *texts, "--out", tmp_path, *small(steps=1, **extra))
    assert said.code == 0, said.err


def test_brackets_in_names_are_brackets(call: Call, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "[/run]"
    source = texts[0].replace("domain=animals", "domain=[/animals]")
    said = call("train", source, "--out", out, *small(steps=2, evaluate_every=1))
    assert said.code == 0 and "[/animals]" in said.err.replace("\n", ""), said.err


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, 2**64, 10**30])
def test_a_seed_of_any_size_is_taken_or_refused(
    seed: int, call: Call, texts: list[str], tmp_path: Path
) -> None:
    said = call("train", *texts, "--out", tmp_path, *small(steps=1, seed=seed))
    assert said.code == 0 or (said.code == 2 and "seed" in said.err)


def test_out_is_a_file(call: Call, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    said = call("train", *texts, "--out", tmp_path / "taken", *small())
    assert said.code in (1, 2) and "taken" in said.err and said.out == ""
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_is_not_used_twice(call: Call, texts: list[str], trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    call("train", *texts, "--out", trained, *small()).assert_refused(2, str(trained.name), hint="--resume")
    assert (trained / "metrics.jsonl").read_bytes() == before and _names(trained) == ["step-00000006"]


def test_resume_needs_a_run(call: Call, tmp_path: Path) -> None:
    call("train", "--resume", "--out", tmp_path / "nowhere").assert_refused(2, "nowhere", hint="--out")
    assert not (tmp_path / "nowhere").exists()


def test_resume_of_a_finished_run_says_that_it_is_done(call: Call, trained: Path) -> None:
    said = call("train", "--resume", "--out", trained)
    assert said.code == 0 and "done" in said.out and _steps(trained) == [1, 2, 3, 4, 5, 6]
    said = call("train", "--resume", "--out", trained, "--json")
    assert said.code == 0 and said.json["step"] == 6, "JSON was asked for, and there is a result"


def test_resume_with_other_text_is_refused(call: Call, tmp_path: Path) -> None:
    sources = write_texts(tmp_path / "texts")
    out = tmp_path / "run"
    assert call("train", *sources, "--out", out, *small()).code == 0
    metrics = (out / "metrics.jsonl").read_bytes()
    with (tmp_path / "texts" / "plain.txt").open("a") as file:
        file.write("and one line more\n" * 20)
    call("train", "--resume", "--out", out).assert_refused(2, "text", hint="new run")
    assert (out / "metrics.jsonl").read_bytes() == metrics
    write_texts(tmp_path / "texts")
    assert call("train", "--resume", "--out", out).code == 0, "with the old text it goes on"


def test_a_damaged_checkpoint_is_passed_over_aloud(call: Call, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("train", *texts, "--out", out, *small(save_every=2, keep=3)).code == 0
    straight = tiny.values(load(out / "checkpoints" / "step-00000006"))
    weights = out / "checkpoints" / "step-00000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))
    said = call("train", "--resume", "--out", out)
    assert said.code == 0, said.err
    assert "step-00000006" in said.err and "passed over" in said.err
    assert _steps(out) == [1, 2, 3, 4, 5, 6]
    found = latest_checkpoint(out)
    assert found.path is not None and found.path.name == "step-00000006" and not found.damaged
    tiny.assert_same_bits(straight, tiny.values(load(found.path)))


def test_no_whole_checkpoint_starts_anew_and_says_so(call: Call, texts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("train", *texts, "--out", out, *small(steps=2)).code == 0
    shutil.rmtree(out / "checkpoints")
    said = call("train", "--resume", "--out", out)
    assert said.code == 0 and _steps(out) == [1, 2] and _names(out) == ["step-00000002"]


def test_ctrl_c_saves_and_resume_finishes(call: Call, texts: list[str], tmp_path: Path) -> None:
    """The real program, a real signal; the end is bit for bit that of a run left alone."""
    words = [*texts, *small(steps=160, batch=2)]
    out, straight = tmp_path / "stopped", tmp_path / "straight"
    said = interrupt_when(start("train", *words, "--out", out), "step 8,")
    assert said.code in (0, 130) and "Traceback" not in said.err
    assert "saved" in said.err and f"moiety train --resume --out {out}" in " ".join(said.err.split())
    (name,) = _names(out)
    stopped_at = int(name.removeprefix("step-"))
    assert 8 <= stopped_at < 160 and _steps(out) == list(range(1, stopped_at + 1))
    assert "done" not in said.out
    said = call("train", "--resume", "--out", out, "--json")
    assert said.code == 0 and said.json["step"] == 160
    assert _steps(out) == list(range(1, 161)) and "step-00000160" in _names(out)
    assert call("train", *words, "--out", straight).code == 0
    ends = [load(folder / "checkpoints" / "step-00000160") for folder in (out, straight)]
    tiny.assert_same_bits(tiny.values(ends[0]), tiny.values(ends[1]))


def test_relative_sources_are_found_from_elsewhere(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "texts")
    assert call("train", "plain.txt", "--out", tmp_path / "run", *small(steps=1)).code == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = call("train", "--resume", "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert not os.listdir(tmp_path / "elsewhere")
