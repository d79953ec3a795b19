"""Requests that mean harm, by the hundred: after each hundred, one fixed question has the answer it had before."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest

from moiety.serve.server import Server
from tests.serve.conftest import NAME, eventually, serving

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
FIXED = {"model": NAME, "prompt": [7, 8, 9], "max_tokens": 24, "temperature": 0, "logprobs": 1}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
BODIES: dict[str, dict[str, Any]] = {
    PATHS[0]: {
        "model": NAME,
        "prompt": "the quick",
        "max_tokens": 6,
        "stop": ["zz"],
        "logit_bias": {"7": 1},
        "n": 2,
    },
    PATHS[1]: {
        "model": NAME,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 6,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    },
    PATHS[2]: {"model": NAME, "input": [{"role": "user", "content": "hello"}], "max_output_tokens": 6},
}
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1e308, 5e-324, "", "\x00", "\ud83d\ude00" * 99, "{{ 7 * 7 }}", "../../etc/passwd",
    "<|endoftext|>" * 9, [], {}, [[]], [[[]]], {"": {}}, {"$ref": "#"}, {"type": "string", "pattern": "(a+)+$"},
    ["a"] * 300, [0] * 300, "a" * 70_000, "http://127.0.0.1:1/", float("nan"),
)  # fmt: skip


def mutated(chance: random.Random, value: Any) -> Any:
    """A value with something in it put in place of another, taken away or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice([*value])
        changed = {name: one for name, one in value.items() if name != key or chance.random() < 0.9}
        return changed | {chance.choice([key, key, key, key + "s", "x"]): mutated(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], mutated(chance, value[place]), *value[place : place + chance.randrange(3)]]
    return chance.choice(ODD)


def wrong_body(chance: random.Random, http: httpx.Client) -> int:
    path = chance.choice(PATHS)
    body = BODIES[path]
    for _ in range(chance.randrange(1, 4)):
        body = mutated(chance, body)
        if not isinstance(body, dict):
            break
    if isinstance(body, dict) and chance.random() < 0.3:
        body["stream"] = True
    raw = json.dumps(body).encode()
    return http.post(path, content=raw, headers={"content-type": "application/json"}).status_code


def wrong_bytes(chance: random.Random, http: httpx.Client) -> int:
    path = chance.choice(PATHS)
    raw = bytearray(json.dumps(BODIES[path]).encode())
    for _ in range(chance.randrange(1, 9)):
        place = chance.randrange(len(raw))
        raw[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    return http.post(path, content=bytes(raw), headers={"content-type": "application/json"}).status_code


def wrong_place(chance: random.Random, http: httpx.Client) -> int:
    path = chance.choice(
        ["/", "//", "/v1", "/v1/models/%2e%2e/x", "/v1/completions/", "/%00", "/metrics?a=%ff", *PATHS]
    )
    method = chance.choice(["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "TRACE"])
    headers = {f"x-{number}": "y" * chance.randrange(300) for number in range(chance.randrange(40))}
    return http.request(method, path, headers=headers, content=b"x" * chance.randrange(99)).status_code


def wrong_protocol(chance: random.Random, http: httpx.Client) -> int:
    """Bytes that are hardly HTTP, or a request whose sender leaves at any moment."""
    body = json.dumps(BODIES[PATHS[0]] | {"stream": True, "max_tokens": 90}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = (
        head.encode()
        + f"Content-Length: {len(body) + chance.choice([0, 0, 0, -5, 5, -(10**9)])}\r\n\r\n".encode()
        + body
    )
    whole = chance.choice(
        [whole, whole, whole[: chance.randrange(len(whole))], chance.randbytes(300), b"\x16\x03\x01" + whole]
    )
    address = ("127.0.0.1", http.base_url.port)
    assert address[1] is not None
    with socket.create_connection(address) as one:
        one.settimeout(0.02)
        try:
            one.sendall(whole)
            return int(one.recv(12)[9:12] or 0)
        except (TimeoutError, ValueError, ConnectionError):
            return 0


KINDS: tuple[Callable[[random.Random, httpx.Client], int], ...] = (
    wrong_body, wrong_body, wrong_body, wrong_bytes, wrong_place, wrong_protocol
)  # fmt: skip


def attack(server: Server, count: int) -> Counter[int]:
    """Statuses of so many requests, with the fixed one after every hundred."""
    chance, seen, true = random.Random(7), Counter[int](), None
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
        for number in range(count + 1):
            if number % 100 == 0:
                answer = http.post(PATHS[0], json=FIXED)
                assert answer.status_code == 200, answer.text
                (choice,) = answer.json()["choices"]
                true = true or choice
                assert choice["text"] == true["text"], number
                assert choice["logprobs"]["tokens"] == true["logprobs"]["tokens"], number
            kind = chance.choice(KINDS)
            status = kind(chance, http)
            assert status < 500 and (status or kind is wrong_protocol), (number, kind, status)
            seen[status] += 1
        assert http.get("/health").status_code == 200
    eventually(lambda: server.served.gate.live == 0, 30)
    eventually(lambda: server.served.engine.statistics().pages_used == 0)
    server.served.engine.check()
    return seen


def test_hostile_requests_change_nothing() -> None:
    with serving(idle_s=2) as server:
        seen = attack(server, 600)
    assert {200, 400, 404, 405} <= set(seen) <= {0, 200, 400, 404, 405, 413, 415, 431}, seen


@pytest.mark.slow
@pytest.mark.timeout_s(1200)
def test_very_many_hostile_requests_change_nothing() -> None:
    with serving(idle_s=2) as server:
        seen = attack(server, 20_000)
    assert seen[200] > 500 and seen[400] > 5_000, seen
