"""`moiety evaluate`: a trained model's bits per byte, with its own number of experts and with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiety.infer.open import open_model
from moiety.train.evaluate import evaluate
from moiety.train.run import prepare_text
from tests.cli.conftest import Call, small


def test_figures_are_those_of_the_evaluation(
    call: Call, trained: Path, texts: list[str], tmp_path: Path
) -> None:
    said = call("evaluate", trained, *texts, "--experts-per-token", "1,2,4", "--json")
    assert said.code == 0 and [row["experts_per_token"] for row in said.json] == [1, 2, 4]
    opened = open_model(trained)
    text = prepare_text(tmp_path, texts, vocab_size=0, tokenizer=opened.tokenizer)
    own = evaluate(opened.model, text.data, batch=8, length=32, limit=64)
    assert said.json[1]["bits_per_byte"] == pytest.approx(dict(own.bits_per_byte))
    assert len({row["mean_bits_per_byte"] for row in said.json}) == 3, "k matters"
    plain = call("evaluate", trained, *texts, "--json")
    assert plain.json[0]["experts_per_token"] is None
    assert plain.json[0]["bits_per_byte"] == pytest.approx(said.json[1]["bits_per_byte"])


@pytest.mark.parametrize("columns", [40, 100])
def test_the_table(columns: int, call: Call, trained: Path, texts: list[str]) -> None:
    said = call("evaluate", trained, *texts, "--experts-per-token", "1,3", columns=columns)
    assert said.code == 0 and max(map(len, said.out.splitlines())) <= columns
    assert all(word in said.out for word in ("animals", "code", "bytes/s"))


@pytest.mark.parametrize("wrong, named", [("two", "two"), ("9", "k is 9"), ("0,1", "k is 0")])
def test_impossible_numbers_are_refused(
    wrong: str, named: str, call: Call, trained: Path, texts: list[str]
) -> None:
    call("evaluate", trained, *texts, "--experts-per-token", wrong).assert_refused(2, named, hint="")


def test_generate_takes_the_number_too(call: Call, trained: Path) -> None:
    words = ("generate", trained, "the cat", "--max-tokens", 8, "--temperature", 0, "--json")
    texts = {call(*words, "--experts-per-token", k).json["text"] for k in (1, 2, 4)}
    assert call(*words).json["text"] in texts
    call(*words, "--experts-per-token", 7).assert_refused(2, "k is 7")


OWN = """
from dataclasses import dataclass
from moiety.moe.routers import Needs, choose_top_k

@dataclass(frozen=True)
class Mine:
    k: int = 2
    needs = Needs()

    def check(self, experts): pass
    def score(self, logits_TE, context): return (2 * logits_TE).softmax(-1)
    def choose(self, score_TE, context): return choose_top_k(score_TE, context, self.k)
    def weigh(self, score_TE, pairs, context): return pairs.at_pairs(score_TE)
"""


def test_a_router_of_ones_own_by_name(
    call: Call, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, resume, generate and compare with a router that is a file in the working directory."""
    (tmp_path / "minerouter.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    run = ["--out", "run", *small(steps=3, save_every=1)]
    assert call("train", *texts, *run, "--router", "minerouter:Mine").code == 0
    monkeypatch.delitem(__import__("sys").modules, "minerouter")
    words = ("generate", "run", "the", "--max-tokens", 4)
    call(*words).assert_refused(2, "minerouter", "is not imported", hint="--router minerouter:Mine")
    assert call(*words, "--router", "minerouter:Mine").code == 0
    said = call(
        "compare", *texts, "--out", "c", *small(steps=1), "--seeds", 1, "--routers", "switch,minerouter:Mine"
    )
    assert said.code == 0 and "minerouter:Mine" in said.out
    run[1] = "other"
    call("train", *texts, *run, "--router", "minerouter:Other").assert_refused(2, "no dataclass 'Other'")
    (tmp_path / "broken.py").write_text("def (")
    call("train", *texts, *run, "--router", "broken:Mine").assert_refused(2, "broken", "cannot be imported")
