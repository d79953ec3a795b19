"""Every limit at its edge and one beyond it, and what a request may not say; answers name the field."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from moiety.infer.options import LONGEST_STOP, MOST_BIASES, MOST_STOPS
from moiety.serve.body import _parsed
from moiety.serve.options import (
    MOST_CHOICES,
    MOST_DEPTH,
    MOST_LOGPROBS,
    MOST_MESSAGES,
    MOST_N,
    MOST_PROMPTS,
    MOST_SCHEMA_BYTES,
    MOST_TOOLS,
)
from moiety.serve.refusal import Refusal
from moiety.serve.server import Server
from tests.serve.conftest import NAME, serving

BODY_BYTES, HEADER_BYTES = 20_000, 2_000
SCHEMA: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    with serving(body_bytes=BODY_BYTES, header_bytes=HEADER_BYTES, idle_s=1) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as made:
        yield made


def complete(http: httpx.Client, **more: Any) -> httpx.Response:
    return http.post("/v1/completions", json={"model": NAME, "prompt": "a", "max_tokens": 1} | more)


def chat(http: httpx.Client, **more: Any) -> httpx.Response:
    body = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | more
    return http.post("/v1/chat/completions", json=body)


def refused(answer: httpx.Response, param: str | None, status: int = 400) -> str:
    """The message of a refusal that has OpenAI's shape."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, error
    assert (
        len(answer.content) < 16_000
        and "Traceback" not in answer.text
        and "/site-packages" not in answer.text
    )
    return str(error["message"])


COMPLETION_EDGES: list[tuple[str, Any, Any]] = [
    ("n", MOST_N, MOST_N + 1),
    ("n", 1, 0),
    ("max_tokens", 1, -1),
    ("logprobs", MOST_LOGPROBS, MOST_LOGPROBS + 1),
    ("logprobs", 0, -1),
    ("temperature", 2, 2.01),
    ("temperature", 0, -0.01),
    ("top_p", 1, 1.01),
    ("top_p", 0, -0.01),
    ("presence_penalty", 2, 2.01),
    ("frequency_penalty", -2, -2.01),
    ("seed", 2**63 - 1, 2**63),
    ("seed", -(2**63), -(2**63) - 1),
    ("top_k", 0, -1),
    ("min_p", 1, 1.01),
    ("repetition_penalty", 0.01, 0.009),
    ("stop", ["x"] * MOST_STOPS, ["x"] * (MOST_STOPS + 1)),
    ("stop", "x" * LONGEST_STOP, "x" * (LONGEST_STOP + 1)),
    ("stop", "x", ""),
    ("stop_token_ids", [7] * MOST_STOPS, [7] * (MOST_STOPS + 1)),
    ("logit_bias", {"7": 100}, {"7": 101}),
    ("logit_bias", {"0": -100}, {"-1": 1}),
    ("prompt", ["a"] * 16, []),
    ("prompt", [[1]], [[]]),
    ("user", "x", 5),
    ("stream", False, "yes"),
    ("echo", True, 1),
    ("model", NAME, ""),
    ("metadata", {str(number): "" for number in range(16)}, {str(number): "" for number in range(17)}),
]


@pytest.mark.parametrize(("name", "fits", "too_much"), COMPLETION_EDGES)
def test_fields_at_their_edges(http: httpx.Client, name: str, fits: Any, too_much: Any) -> None:
    assert complete(http, **{name: fits}).status_code == 200
    answer = complete(http, **{name: too_much})
    assert str(answer.json()["error"]["param"]).startswith(name)
    refused(answer, answer.json()["error"]["param"])


@pytest.mark.parametrize("value", ["1", True, 1.5, [], {}, float("inf")])
@pytest.mark.parametrize("name", ["n", "max_tokens", "seed", "logprobs", "top_k", "min_tokens"])
def test_numbers_are_numbers(http: httpx.Client, name: str, value: Any) -> None:
    body = json.dumps({"model": NAME, "prompt": "a", name: value})
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] in (name, None)


def test_many_of_everything(http: httpx.Client) -> None:
    assert complete(http, prompt=["a"] * MOST_PROMPTS).status_code == 200
    refused(complete(http, prompt=["a"] * (MOST_PROMPTS + 1)), "prompt")
    assert complete(http, prompt=["a"] * (MOST_CHOICES // 4), n=4).status_code == 200
    refused(complete(http, prompt=["a"] * (MOST_CHOICES // 4 + 1), n=4), "n")
    biases = {str(token): 0.5 for token in range(280)}
    assert complete(http, logit_bias=biases).status_code == 200
    many = {str(token): 0.5 for token in range(MOST_BIASES + 1)}
    assert "1024" in refused(complete(http, logit_bias=many), "logit_bias")
    assert "outside" in refused(complete(http, logit_bias={"300": 1}), "logit_bias")
    assert "outside" in refused(complete(http, stop_token_ids=[300]), "stop_token_ids")
    assert "min_tokens" in refused(complete(http, min_tokens=2, max_tokens=1), "min_tokens")
    message = {"role": "user", "content": ""}
    tiny = {"content": "a", "role": "user"}
    assert chat(http, messages=[message] * 10 + [tiny]).status_code == 200
    refused(chat(http, messages=[message] * (MOST_MESSAGES + 1)), "messages")
    too_long = chat(http, messages=[message] * MOST_MESSAGES)  # counted as messages, refused as tokens
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    tools = [{"type": "function", "function": {"name": f"f{number}"}} for number in range(MOST_TOOLS + 1)]
    assert chat(http, tools=tools[:20]).status_code == 200
    refused(chat(http, tools=tools), "tools")


def test_contexts_at_their_edge(http: httpx.Client) -> None:
    assert complete(http, prompt=[7] * 255, max_tokens=1).json()["usage"]["total_tokens"] == 256
    refused(complete(http, prompt=[7] * 255, max_tokens=2), "max_tokens")
    assert "256" in refused(complete(http, prompt=[7] * 256, max_tokens=1), "prompt")
    assert complete(http, prompt=[7] * 256, max_tokens=0, echo=True).status_code == 200
    refused(complete(http, prompt=[7] * 257, max_tokens=0, echo=True), "prompt")
    assert complete(http, prompt=[7] * 250, max_tokens=None).json()["usage"]["total_tokens"] <= 256
    refused(complete(http, max_tokens=0), "max_tokens")
    assert "characters" in refused(complete(http, prompt="a" * 3_000_000), "prompt")
    assert "characters" in refused(
        chat(http, messages=[{"role": "user", "content": "a" * 500_000}]), "messages"
    )
    assert "299" in refused(complete(http, prompt=[300]), "prompt")


def test_schemas_at_their_edge(http: httpx.Client) -> None:
    def ask(padding: int) -> httpx.Response:
        schema = {**SCHEMA, "description": "x" * padding}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return chat(http, response_format=form, max_tokens=9)

    assert ask(MOST_SCHEMA_BYTES - 500).status_code == 200
    assert "bytes" in refused(ask(MOST_SCHEMA_BYTES), "response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/nowhere"},
        {"pattern": "((", "type": "string"},
        {"not": {}},
        {"type": "object", "required": 5},
        {"enum": []},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
    ],
)
def test_schemas_that_cannot_be_kept_to(http: httpx.Client, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused(chat(http, response_format=form), "response_format")
    assert chat(http).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": {}}, "prompt"),
        ({"nonsense": 1}, "nonsense"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"model": "gpt-9"}, "model"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ],
)
def test_completions_that_are_refused(http: httpx.Client, body: dict[str, Any], param: str | None) -> None:
    answer = complete(http, **body)
    found = answer.json()["error"]["param"]
    assert param is None or str(found).startswith(param), found
    refused(answer, found, 404 if param == "model" else 400)


def part(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [more]}]}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (
            part(type="image_url", image_url={"url": "http://127.0.0.1:1/"}),
            "messages.0.content.0",
            "image_url",
        ),
        (part(type="file", file={"file_id": "x"}), "messages.0.content.0", "file"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        ({"messages": "hello"}, "messages", "list"),
        ({"top_logprobs": 2}, None, "logprobs"),
        ({"tool_choice": "required"}, None, "no tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"functions": [{"name": "x"}]}, "functions", "tools"),
        ({"modalities": ["audio"]}, "modalities.0", "text"),
        ({"audio": {"voice": "x"}}, "audio", "text"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "program"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "messages"),
        ({"chat_template_kwargs": {"a.b": 1}}, "chat_template_kwargs.a.b", "pattern"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 1}, "response_format", "min_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater"),
    ],
)
def test_chats_that_are_refused(
    http: httpx.Client, body: dict[str, Any], param: str | None, said: str
) -> None:
    answer = chat(http, **body)
    found = answer.json()["error"]["param"]
    assert param is None or str(found).startswith(param), answer.text
    assert said in refused(answer, found)


def test_responses_that_are_refused(http: httpx.Client) -> None:
    for name, value in {
        "previous_response_id": "x",
        "background": True,
        "conversation": "x",
        "tools": [{}],
    }.items():
        answer = http.post("/v1/responses", json={"model": NAME, "input": "a", name: value})
        refused(answer, name)


# Bodies


def test_bodies_at_their_edge(small: Server) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{small.port}") as http:
        body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1}).encode()
        headers = {"content-type": "application/json"}
        fits = body + b" " * (BODY_BYTES - len(body))
        assert http.post("/v1/completions", content=fits, headers=headers).status_code == 200
        answer = http.post("/v1/completions", content=fits + b" ", headers=headers)
        assert "20000" in refused(answer, None, 413)
        chunked = http.post("/v1/completions", content=iter([fits, b" "]), headers=headers)
        refused(chunked, None, 413)


def test_headers_at_their_edge(small: Server) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{small.port}") as http:
        own = sum(len(name) + len(value) + 4 for name, value in http.get("/health").request.headers.raw)
        room = HEADER_BYTES - own - len("x-padding") - 4
        assert http.get("/health", headers={"x-padding": "x" * room}).status_code == 200
        refused(http.get("/health", headers={"x-padding": "x" * (room + 1)}), None, 431)
        assert http.get("/health", headers={"x-padding": "x" * 100_000}).status_code in (400, 431)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b"[]", "not an object"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": ' + b"[" * MOST_DEPTH + b"]" * MOST_DEPTH + b"}", "nested"),
        (b"[" * 200_000, "nested"),
        (b'{"a": "' + b'\\"' * 100_000, "Unterminated"),
    ],
)
def test_bodies_that_are_not_plain_json(http: httpx.Client, body: bytes, said: str) -> None:
    begun_s = time.monotonic()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert said in refused(answer, None)
    assert time.monotonic() - begun_s < 3


def test_numbers_that_json_lacks(http: httpx.Client) -> None:
    for number in ("NaN", "-Infinity", "1e999", "-1E+999", "9" * 400 + ".0", "1" + "0" * 308 + "e5"):
        for body, place in (
            ('{"temperature": %s}', "temperature"),
            ('{"tools": [{"a": {"b": [0, %s]}}]}', "tools.0.a.b.1"),
        ):
            answer = http.post(
                "/v1/completions", content=body % number, headers={"content-type": "application/json"}
            )
            assert "NaN" in refused(answer, place)


def test_depth_at_its_edge() -> None:
    deep = b'{"a": ' + b"[" * (MOST_DEPTH - 1) + b"]" * (MOST_DEPTH - 1) + b', "b": "[[[' + b"[" * 99 + b'"}'
    assert set(_parsed(deep)) == {"a", "b"}
    with pytest.raises(Refusal, match="nested"):
        _parsed(deep.replace(b'"a": [', b'"a": [[').replace(b"], ", b"]], "))


def test_other_kinds_of_bodies(http: httpx.Client) -> None:
    for headers in (
        {"content-type": "text/plain"},
        {},
        {"content-type": "application/x-www-form-urlencoded"},
    ):
        refused(http.post("/v1/completions", content=b"{}", headers=headers), None, 415)
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    refused(http.post("/v1/completions", content=b"\x1f\x8b", headers=packed), None, 415)


def test_slow_senders_are_cut_off(small: Server) -> None:
    address = ("127.0.0.1", small.port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(address) as waiting, socket.create_connection(address) as half:
        waiting.sendall(head)  # a head that never ends
        half.sendall(head + b"Content-Length: 100\r\n\r\n{")  # a body that never ends
        half.settimeout(5)
        assert half.recv(100).startswith(b"HTTP/1.1 408")
        waiting.settimeout(5)
        assert waiting.recv(100) == b""
