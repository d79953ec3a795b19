"""A model whose experts are on several processes answers as one that is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moiety.model import checkpoint
from tests import tiny
from tests.parallel import ranks
from tests.serve.conftest import opened

ASKED = ["the quick", "brown fox jumps over", "--n", "2", "--temperature", "0.8", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    what, folder = opened(moe=tiny.experts(experts=4)), tmp_path_factory.mktemp("model") / "four"
    checkpoint.save(what.model, folder, tokenizer=what.tokenizer)
    return folder


def alone(*words: str) -> Any:
    command = [sys.executable, "-m", "moiety", "generate", *words]
    ran = subprocess.run(
        command, env=ranks.environment(), capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(ran.stdout)


def together(count: int, *words: str) -> Any:
    """What the leader says; the others must say nothing."""
    first, *others = ranks.finish(ranks.start("moiety", ["generate", *words], count))
    assert not any(others), others
    return json.loads(first[: first.rindex("\n", 0, first.rindex(" tokens, ")) + 1])


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (2, ["the quick brown", "--temperature", "0"]),
        (4, [*ASKED, "--max-requests", "3"]),
        (2, ["lazy dog", "--plain", "--temperature", "0"]),
    ],
)
def test_the_same_tokens_as_one_process(folder: Path, count: int, words: list[str]) -> None:
    words = [str(folder), *words, "--json", "--max-tokens", "24"]
    one, several = alone(*words), together(count, *words)
    for answer in (one, several):
        if isinstance(answer, dict):
            assert answer.pop("tokens_per_second") > 0
    assert one == several


def test_each_keeps_its_experts_and_the_sums_are_right() -> None:
    """Logits of prompts, of single tokens, and of tokens that no expert of one process is chosen for."""
    said = ranks.finish(ranks.start("tests.parallel.share_child", [], 2))
    for one in said:
        found = json.loads(one)
        assert found["experts"] == [2, 2] and found["error"] < 1e-5 < found["size"], found
    assert json.loads(said[0])["logits"] == json.loads(said[1])["logits"]  # to the bit


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({"experts": 5}, [], "cannot share evenly"),
        ({"experts": 4}, ["--plan"], "--plan is for one process"),
        ({"experts": 4}, ["--draft", "3"], "--draft is for one process"),
    ],
)
def test_what_cannot_be_shared(changes: dict[str, int], more: list[str], said: str, tmp_path: Path) -> None:
    what = opened(moe=tiny.experts(**changes))
    checkpoint.save(what.model, tmp_path / "it", tokenizer=what.tokenizer)
    children = ranks.start("moiety", ["generate", str(tmp_path / "it"), "a", *more], 2)
    try:
        found = [child.communicate(timeout=100)[0] for child in children]
    finally:
        ranks.end(children)
    assert said in "".join(found) and all(child.returncode in (1, 2) for child in children), found
