"""Calls in what a model wrote, whole and in pieces; grammars against a parser; the page that names the limits."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiety.infer.options import LONGEST_STOP, MOST_BIASES, MOST_STOPS
from moiety.model.tokenizer import train_tokenizer
from moiety.serve import options
from moiety.serve.grammar import Grammars, call_grammar, schema_grammar
from moiety.serve.options import ServeOptions
from moiety.serve.refusal import Refusal
from moiety.serve.tools import CallsInText, calls_in

NAMES = {"weather", "calendar"}
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'
MONDAY = '{"name": "calendar", "parameters": {"day": 1}}'


@pytest.mark.parametrize(
    ("text", "content", "called"),
    [
        (f"<tool_call>\n{ROME}\n</tool_call>", "", ["weather"]),
        (
            f"Let me see.\n<tool_call>{ROME}</tool_call>\n<tool_call>{MONDAY}",
            "Let me see.",
            ["weather", "calendar"],
        ),
        (ROME, "", ["weather"]),
        (f" [{ROME}, {MONDAY}]\n", "", ["weather", "calendar"]),
        ('{"name": "calendar"}', "", ["calendar"]),
        ("plain words", "plain words", []),
        ("[1, 2]", "[1, 2]", []),
        ("[]", "[]", []),
        ('{"name": "rm", "arguments": {}}', '{"name": "rm", "arguments": {}}', []),
        (f"{ROME} and more", f"{ROME} and more", []),
        ("<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", []),
        ('{"name": "weather", "arguments": "x"}', '{"name": "weather", "arguments": "x"}', []),
        ("[" * 100_000, "[" * 100_000, []),
        ('{"name": ["weather"]}', '{"name": ["weather"]}', []),
    ],
)
def test_calls_are_found(text: str, content: str, called: list[str]) -> None:
    found, calls = calls_in(text, NAMES)
    assert (found, [one["function"]["name"] for one in calls]) == (content, called)
    for one in calls:
        assert isinstance(json.loads(one["function"]["arguments"]), dict) and one["id"].startswith("call_")
    assert len({one["id"] for one in calls}) == len(calls)


@given(
    st.lists(
        st.sampled_from(["<tool", "_call>", ROME, "</tool_call>", "a", " ", "{", "<", "[", "\n"]), max_size=9
    )
)
def test_a_stream_says_what_the_whole_says(parts: list[str]) -> None:
    text, stream = "".join(parts), CallsInText(NAMES)
    for size in (1, 3, 1000):
        stream = CallsInText(NAMES)
        shown = "".join(stream.push(text[at : at + size]) for at in range(0, len(text), size))
        rest, calls = stream.finish()
        content, true = calls_in(text, NAMES)
        assert [one["function"] for one in calls] == [one["function"] for one in true]
        assert (shown + rest).strip() == content.strip()


def test_plain_text_is_not_held_back() -> None:
    stream = CallsInText(NAMES)
    assert [stream.push(piece) for piece in ("Hi ", "the", "re <", "b>")] == ["Hi ", "the", "re ", "<b>"]


CLOSED = {"type": "object", "additionalProperties": False}
SCHEMAS = [
    CLOSED | {"properties": {"a": {"enum": ["x", "y z"]}, "b": {"type": "boolean"}}, "required": ["a"]},
    {
        "type": "array",
        "items": {"type": "integer", "minimum": 3, "maximum": 99},
        "minItems": 1,
        "maxItems": 3,
    },
    {"anyOf": [{"const": "one"}, {"type": "null"}]},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    CLOSED | {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"], "$defs": {"n": {"enum": [1]}}},
]


def test_whatever_is_drawn_under_a_grammar_parses() -> None:
    tokenizer = train_tokenizer(['{"a": "x", "b": true} [3, 4] abc null one ' * 9], 320)
    grammars, chance = Grammars(tokenizer, [tokenizer.end_id]), random.Random(3)
    calls = call_grammar({"f": SCHEMAS[0], "g": SCHEMAS[4], "h": CLOSED})
    for text in [*map(schema_grammar, SCHEMAS), calls]:
        for grammar in grammars.made(text, 8, "x"):
            written: list[int] = []
            while not grammar.is_done:
                allowed = [token for token, may in enumerate(grammar.allowed()) if may]
                assert allowed and len(written) < 200
                written.append(chance.choice(allowed))
                grammar.push(written[-1])
                if written[-1] == tokenizer.end_id:
                    break
            value = json.loads(tokenizer.decode(written))
            assert text != calls or value["name"] in "fgh"


def test_grammars_that_cannot_be() -> None:
    tokenizer = train_tokenizer(["ab" * 9], 260)
    grammars = Grammars(tokenizer, [tokenizer.end_id])
    for schema in ({"type": "x"}, {"$ref": "https://example.org/x"}, {"not": {"type": "string"}}):
        with pytest.raises(Refusal) as caught:
            grammars.made(schema_grammar(schema), 1, "response_format")
        assert caught.value.status == 400 and caught.value.param == "response_format"
    (own,) = grammars.made(
        schema_grammar({"type": "null", "x-guidance": {"lenient": True, "nonsense": 1}}), 1, "x"
    )
    assert not own.is_done


def test_the_page_names_every_limit() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text("utf-8")
    table = page.partition("## Limits")[2].partition("\n## ")[0]
    defaults = ServeOptions()
    for field in dataclasses.fields(ServeOptions):
        if field.name not in ("host", "port", "name"):
            assert f"--{field.name.replace('_', '-')}" in table, field.name
            assert field.name == "queue_tokens" or str(getattr(defaults, field.name)) in table, field.name
    named = [getattr(options, name) for name in options.__all__ if name.startswith("MOST_")]
    numbers = set(map(int, re.findall(r"\d+", table)))
    assert {*named, LONGEST_STOP, MOST_BIASES, MOST_STOPS} <= numbers
