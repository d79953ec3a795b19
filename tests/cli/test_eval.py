"""`moiety eval`: predictions of a model and of changed copies, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moiety.infer.harness import run_tasks
from moiety.infer.open import open_model
from moiety.infer.options import EngineOptions, TaskOptions
from moiety.train.evaluate import evaluate
from moiety.train.run import prepare_text
from tests.cli.conftest import Call, small
from tests.infer import test_harness


def test_figures_are_those_of_the_evaluation(
    call: Call, trained: Path, texts: list[str], tmp_path: Path
) -> None:
    said = call("eval", trained, *texts, "--ppl", "--experts-per-token", "1,2,4", "--sequences", 64, "--json")
    assert said.code == 0
    rows = {row["variant"]: row for row in said.json}
    assert [*rows] == ["as it is", "1 experts/token", "2 experts/token", "4 experts/token"]
    opened = open_model(trained)
    text = prepare_text(tmp_path, texts, vocab_size=0, tokenizer=opened.tokenizer)
    true = evaluate(opened.model, text.data, batch=8, length=32, limit=64)
    own = rows["as it is"]
    assert own["domains"] == pytest.approx(dict(true.bits_per_byte))
    assert own["mean_bits_per_byte"] == pytest.approx(true.mean_bits_per_byte)
    total = sum(true.nats.values()) / math.log(2) / sum(true.size_bytes.values())
    assert own["bits_per_byte"]["value"] == pytest.approx(total)
    assert own["kl"]["value"] == rows["2 experts/token"]["kl"]["value"] == 0, "2 is its own number"
    assert len({row["mean_bits_per_byte"] for row in said.json}) == 3, "the number matters"
    assert own["bytes"] == rows["4 experts/token"]["bytes"]


def test_formats_and_a_second_model(call: Call, trained: Path, texts: list[str], tmp_path: Path) -> None:
    assert call("quantize", trained, tmp_path / "out", "--format", "int8-g32").code == 0
    words = ("eval", trained, *texts, "--ppl", "--formats", "int8-g32,experts=int4-g32")
    words = (*words, "--against", tmp_path / "out", "--sequences", 8)
    said = call(*words, "--json")
    assert said.code == 0
    rows = {(Path(row["model"]).name, row["variant"]): row for row in said.json}
    assert len(rows) == len(said.json) == 6
    own, int8 = rows[(trained.name, "as it is")], rows[(trained.name, "int8-g32")]
    assert own["kl"]["value"] == 0 and own["agreement"]["value"] == 1 and 0 < int8["kl"]["value"] < 0.01
    assert int8["bytes"] < 0.6 * own["bytes"], (
        "experts as small as these are filled up to pages of 4096 bytes"
    )
    already = rows[("out", "as it is")]
    assert already["bits_per_byte"] == int8["bits_per_byte"] and rows[("out", "int8-g32")]["kl"]["value"] == 0
    table = call(*words, columns=160)
    assert table.code == 0 and "KL, nats/token" in table.out and "experts=int4-g32" in table.out


@pytest.mark.parametrize("columns", [40, 100])
def test_the_tables(columns: int, call: Call, trained: Path, texts: list[str]) -> None:
    said = call("eval", trained, *texts, "--ppl", "--experts-per-token", "1,3", columns=columns)
    assert said.code == 0 and max(map(len, said.out.splitlines())) <= columns
    assert all(word in said.out for word in ("animals", "code", "perplexity", "KL"))
    alone = call("eval", trained, *texts, "--ppl", columns=columns)
    assert alone.code == 0 and "perplexity" in alone.out and "KL" not in alone.out


@pytest.mark.parametrize("wrong, named", [("two", "two"), ("9", "k is 9"), ("0,1", "k is 0")])
def test_impossible_numbers_are_refused(
    wrong: str, named: str, call: Call, trained: Path, texts: list[str]
) -> None:
    call("eval", trained, *texts, "--ppl", "--experts-per-token", wrong).assert_refused(2, named, hint="")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--ppl", "--tasks", "mmlu"),
        ("--tasks", "mmlu", "--formats", "int4"),
        ("--tasks", "mmlu", "--length", 9),
        ("--tasks", "mmlu", "--record", "here.trace"),
        ("--ppl", "--limit", 3),
        ("--ppl", "--draft", 3),
    ],
)
def test_each_has_its_own_options(words: tuple[object, ...], call: Call, trained: Path) -> None:
    call("eval", trained, *words).assert_refused(2, "one of --ppl and --tasks", hint="--tasks mmlu")


def test_tasks(call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm_eval forks for errors of its figures
    folder = test_harness.tasks(tmp_path)
    words = ("eval", trained, "--tasks", "choice_task, text_task", "--include-path", folder, "--limit", 2)
    said = call(*words, "--max-positions", 30, "--json")
    assert said.code == 0, said.err
    rows = {(row["task"], row["metric"]): row for row in said.json["figures"]}
    opened = open_model(trained)
    options = (TaskOptions(limit=2, include_path=str(folder)), EngineOptions(max_positions=30))
    true = run_tasks(opened, ["choice_task", "text_task"], *options)["results"]
    assert rows[("text_task", "bits_per_byte")]["value"] == true["text_task"]["bits_per_byte,none"]
    assert rows[("choice_task", "acc")]["value"] == true["choice_task"]["acc,none"]
    assert rows[("choice_task", "acc")]["examples"] == 2 and rows[("choice_task", "acc")]["fewshot"] == 0
    assert rows[("choice_task", "acc")]["stderr"] is not None and len(rows) == 4


def test_without_the_package(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = __import__("sys").modules
    for name in [*modules]:
        if name == "moiety.infer.harness" or name.partition(".")[0] == "lm_eval":
            monkeypatch.delitem(modules, name)
    monkeypatch.setitem(modules, "lm_eval", None)
    said = call("eval", trained, "--tasks", "mmlu")
    said.assert_refused(3, "lm_eval", "not installed", hint="pip install 'moiety[eval]'")


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
