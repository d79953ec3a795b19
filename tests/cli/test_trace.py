"""`moiety trace`: the figures of `moiety.observe.trace`, in a table that fits, as JSON, and in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiety.infer.open import open_model
from moiety.observe.trace import GLOSSARY, explain, in_short, trace
from tests.cli.conftest import Call

PROMPT = "the cat 3 sat"


def test_json_is_what_trace_says(call: Call, trained: Path) -> None:
    opened = open_model(trained)
    ids = opened.tokenizer.encode(PROMPT)
    traced = trace(opened.model, ids)
    said = call("trace", trained, PROMPT, "--json")
    assert said.code == 0 and said.err == ""
    assert said.json["prompt"] == PROMPT and said.json["explanations"] == []
    assert [token["id"] for token in said.json["tokens"]] == ids and len(ids) > 3
    assert "".join(token["text"] for token in said.json["tokens"]) == PROMPT
    assert [layer["layer"] for layer in said.json["layers"]] == [0, 1]
    for layer, wanted in zip(said.json["layers"], traced.layers, strict=True):
        assert (layer["router"], layer["experts"]) == ("softmax", 4)
        assert [token["token"] for token in layer["tokens"]] == [*range(len(ids))]
        for token, one in zip(layer["tokens"], wanted.tokens, strict=True):
            assert token["scores"] == pytest.approx(one.scores) and len(token["chosen"]) == 2
            assert [choice["expert"] for choice in token["chosen"]] == [
                choice.expert for choice in one.chosen
            ]
            assert [choice["norm"] for choice in token["chosen"]] == pytest.approx(
                [choice.norm for choice in one.chosen]
            )
            assert sum(choice["share"] for choice in token["chosen"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_the_table_fits_and_has_every_cell(columns: int, call: Call, trained: Path) -> None:
    opened = open_model(trained)
    traced = trace(opened.model, opened.tokenizer.encode(PROMPT))
    said = call("trace", trained, PROMPT, columns=columns)
    assert said.code == 0 and said.err == "" and max(map(len, said.out.splitlines())) <= columns
    for layer in traced.layers:
        for one in layer.tokens:
            assert in_short(one, 2) in said.out
    assert said.out.count("layer 0") == (len(traced.texts) if columns < 60 else 1)


def test_one_token_of_one_layer(call: Call, trained: Path) -> None:
    said = call("trace", trained, PROMPT, "--layer", 1, "--token", 2, "--json")
    (layer,) = said.json["layers"]
    assert layer["layer"] == 1 and [token["token"] for token in layer["tokens"]] == [2]
    assert [token["token"] for token in said.json["tokens"]] == [2]
    table = call("trace", trained, PROMPT, "--layer", 1, "--token", 2, "--top", 1)
    assert "layer 0" not in table.out and ", +1" in table.out


def test_words(call: Call, trained: Path) -> None:
    opened = open_model(trained)
    ids = opened.tokenizer.encode(PROMPT)
    texts = [opened.tokenizer.decode([one]) for one in ids]
    traced = trace(opened.model, ids, texts=texts)
    said = call("trace", trained, PROMPT, "--explain")
    for layer in (0, 1):  # of the last token, unless one is named
        assert explain(traced, len(ids) - 1, layer) in said.out.splitlines()
    assert call("trace", trained, PROMPT, "--explain", "--json").json["explanations"] == [
        explain(traced, len(ids) - 1, layer) for layer in (0, 1)
    ]
    named = call("trace", trained, PROMPT, "--explain", "--token", 0, "--layer", 1)
    assert named.out.splitlines()[-1] == explain(traced, 0, 1)
    taught = call("trace", trained, PROMPT, "--teach")
    assert said.out.rstrip("\n") in taught.out
    assert all(f"\n{term}: {line}" in taught.out for term, line in GLOSSARY.items())
    assert GLOSSARY["router"] not in said.out


def test_refusals(call: Call, trained: Path, tmp_path: Path) -> None:
    call("trace", trained, "").assert_refused(2, "no token")
    call("trace", trained, PROMPT, "--layer", 7).assert_refused(2, "layer 7", hint="0, 1")
    call("trace", trained, PROMPT, "--token", 99).assert_refused(2, "99", hint="0 to ")
    call("trace", trained, PROMPT, "--token", -1).assert_refused(2, "-1", hint="0 to ")
    call("trace", trained, PROMPT, "--top", 0).assert_refused(2, "top is 0")
    call("trace", tmp_path, PROMPT).assert_refused(2, "config.json")
    call("trace", trained).assert_refused(2, "PROMPT", hint="--help")


def test_a_dense_model(call: Call, texts: list[str], tmp_path: Path) -> None:
    from tests.cli.conftest import small

    assert call("train", *texts, "--out", tmp_path / "dense", *small(experts=0, steps=1)).code == 0
    call("trace", tmp_path / "dense", PROMPT).assert_refused(2, "dense")
    call("gradients", tmp_path / "dense").assert_refused(2, "dense")
