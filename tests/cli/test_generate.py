"""`moiety generate`: the same text as the function under it, whichever way the model is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moiety.infer.generate import generate
from moiety.infer.open import open_model
from moiety.infer.options import SamplingOptions
from tests.cli.conftest import Call


def _expected(folder: Path, prompt: str, tokens: int, **sampling: float) -> str:
    opened = open_model(folder)
    ids = opened.tokenizer.encode(prompt) or [opened.tokenizer.end_id]
    how = SamplingOptions(**sampling)  # type: ignore[arg-type]
    drawn = generate(opened.model, ids, max_tokens=tokens, sampling=how, end_id=opened.tokenizer.end_id)
    return opened.tokenizer.decode(list(drawn))


def test_a_run_folder_and_its_checkpoint_are_the_same(call: Call, trained: Path) -> None:
    wanted = _expected(trained, "the cat", 12, temperature=0)
    assert wanted
    for folder in (trained, trained / "checkpoints" / "step-00000006"):
        said = call("generate", folder, "the cat", "--max-tokens", 12, "--temperature", 0)
        assert said.code == 0 and said.out == wanted + "\n"
        assert "12 tokens" in said.err and "tokens/s" in said.err


def test_json(call: Call, trained: Path) -> None:
    said = call("generate", trained, "größer", "--max-tokens", 7, "--seed", 3, "--json")
    assert said.code == 0 and set(said.json) >= {"prompt", "text", "tokens", "tokens_per_second"}
    assert said.json["prompt"] == "größer" and 1 <= said.json["tokens"] <= 7
    assert said.json["text"] == _expected(trained, "größer", 7, seed=3)
    other = call("generate", trained, "größer", "--max-tokens", 7, "--seed", 4, "--json")
    assert other.json["text"] != said.json["text"]


def test_no_prompt_starts_from_nothing(call: Call, trained: Path) -> None:
    said = call("generate", trained, "--max-tokens", 5, "--temperature", 0)
    assert said.code == 0 and said.out == _expected(trained, "", 5, temperature=0) + "\n"


def test_plain_generation_says_the_same(call: Call, trained: Path) -> None:
    words = ("generate", trained, "the cat", "--max-tokens", 12, "--seed", 5)
    said = call(*words)
    assert said.code == 0 and call(*words, "--plain").out == call(*words, "--draft", 3).out == said.out


def test_several_prompts_and_answers(call: Call, trained: Path) -> None:
    said = call("generate", trained, "the cat", "größer", "--n", 2, "--max-tokens", 7, "--seed", 3, "--json")
    assert [answer["prompt"] for answer in said.json] == ["the cat"] * 2 + ["größer"] * 2
    for answer, seed in zip(said.json, (3, 4, 3, 4), strict=True):
        assert answer["text"] == _expected(trained, answer["prompt"], 7, seed=seed)
    said = call("generate", trained, "the", "--n", 2, "--max-tokens", 4)
    assert said.code == 0 and said.out.startswith("[1] ") and "\n[2] " in said.out and "8 tokens" in said.err
    call("generate", trained, "the", "--n", 0).assert_refused(2, "n is 0")
    call("generate", trained, "the", "--n", 2, "--plain").assert_refused(2, "--plain gives one")


def test_stop_texts(call: Call, trained: Path) -> None:
    whole = _expected(trained, "the", 12, temperature=0)
    stop = whole[3:6]
    said = call("generate", trained, "the", "--max-tokens", 12, "--temperature", 0, "--stop", stop, "--json")
    assert said.json["text"] == whole[: whole.index(stop)]


@pytest.mark.parametrize("name", ["absent", "hollow"])
def test_nothing_to_open(name: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    said = call("generate", tmp_path / name, "the")
    assert said.code in (1, 2)
    said.assert_refused(said.code, name)
    assert "hint: " in said.err


@pytest.mark.parametrize("tokens", [0, -3])
def test_no_tokens(tokens: int, call: Call, trained: Path) -> None:
    call("generate", trained, "the", "--max-tokens", tokens).assert_refused(2, str(tokens))


def test_an_unknown_backend(call: Call, trained: Path) -> None:
    said = call("generate", trained, "the", "--backend", "groupd")
    said.assert_refused(2, "groupd", hint="grouped")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_named(
    file: str, damage: str, call: Call, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained / "checkpoints" / "step-00000006", folder)
    content = bytearray((folder / file).read_bytes())
    if damage == "missing":
        (folder / file).unlink()
    elif damage == "cut":
        (folder / file).write_bytes(bytes(content[: len(content) // 2]))
    else:
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(bytes(content))
    said = call("generate", folder, "the")
    assert said.code in (1, 2) and said.out == "", said
    assert file in said.err or (damage == "missing" and "copy" in said.err), said.err


def test_biases_and_the_engines_options(call: Call, trained: Path) -> None:
    words = ("generate", trained, "the cat", "--max-tokens", 6, "--temperature", 0)
    said = call(*words, "--logit-bias", "65=1000")
    assert said.code == 0 and said.out == call(*words, "--logit-bias", "65=1000", "--plain").out
    assert said.out != call(*words).out
    call(*words, "--logit-bias", "65:1").assert_refused(2, "'65:1'", hint="17=-5")
    call(*words, "--logit-bias", "99999=1").assert_refused(2, "logit_bias has tokens outside")
    assert call(*words, "--kv-dtype", "bf16", "--page-tokens", 4).code == 0
    call(*words, "--kv-dtype", "fp7").assert_refused(2, "kv_dtype is 'fp7'")
    call(*words, "--kv-dtype", "bf16", "--plain").assert_refused(2, "--plain")
