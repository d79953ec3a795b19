"""Every numeric field against 13 values: what fits is answered, the rest is refused with the field's name."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx2 as httpx
import pytest

from moiety.serve.openapi import description
from moiety.serve.options import MOST_LOGPROBS, MOST_N
from moiety.serve.server import Server
from tests.serve.conftest import NAME

ROOM = 256 - 17  # for an answer to the message
LARGEST = 2**31 - 1
SHARED: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "top_k": (0, LARGEST),
}
DRAWN = SHARED | {
    "n": (1, MOST_N),
    "seed": (-(2**63), 2**63 - 1),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "min_tokens": (0, 8),
    "stop_token_ids.1": (0, 299),
    "logit_bias.7": (-100.0, 100.0),
}
# By route: a body, and for each numeric field the least and the most. Where these are floats, so is the field.
FIELDS: dict[str, tuple[dict[str, Any], dict[str, tuple[float, float]]]] = {
    "/v1/completions": (
        {"prompt": [5, 6], "max_tokens": 8},
        DRAWN | {"max_tokens": (1, 254), "logprobs": (0, MOST_LOGPROBS), "prompt.1": (0, 299)},
    ),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 8, "logprobs": True},
        DRAWN
        | {
            "max_tokens": (1, LARGEST),
            "max_completion_tokens": (1, ROOM),
            "top_logprobs": (0, MOST_LOGPROBS),
        },
    ),
    "/v1/responses": (
        {"input": "a", "max_output_tokens": 8},
        SHARED | {"max_output_tokens": (1, ROOM), "top_logprobs": (0, 0)},
    ),
}
CASES = [(route, field) for route, (_, fields) in FIELDS.items() for field in fields]


def values(least: float, most: float) -> list[tuple[str, bool]]:
    """Each value as JSON, and whether it fits."""
    if isinstance(least, float):
        edges = [math.nextafter(least, -math.inf), least, most, math.nextafter(most, math.inf)]
    else:
        edges = [least - 1, least, most, most + 1]
    numbers: list[float] = [*edges, 0, -1, 10**30, 1.5]
    fits = [least <= one <= most and (isinstance(least, float) or float(one).is_integer()) for one in numbers]
    others = [("NaN", False), ("-Infinity", False), ('"1"', False), ("true", False), ("null", True)]
    return [*((json.dumps(one), fit) for one, fit in zip(numbers, fits, strict=True)), *others]


def body_with(body: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """The body with a mark in the field's place."""
    name, _, key = field.partition(".")
    inner: Any = "MARK"
    if key:
        inner = [5, "MARK"] if key.isdigit() and name != "logit_bias" else {key: "MARK"}
    return {**body, "model": NAME, name: inner}, name


def answer_to(http: httpx.Client, route: str, field: str, value: str) -> httpx.Response:
    body = json.dumps(body_with(FIELDS[route][0], field)[0]).replace('"MARK"', value)
    return http.post(route, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(("route", "field"), CASES)
def test_a_numeric_field_at_its_edges(server: Server, route: str, field: str) -> None:
    cases = values(*FIELDS[route][1][field])
    assert len(cases) == 13
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as http:
        for value, fits in cases:
            answer = answer_to(http, route, field, value)
            is_right = fits and (value != "null" or "." not in field)  # an entry may not be nothing
            assert answer.status_code == (200 if is_right else 400), (value, answer.text)
            if not is_right:
                param = answer.json()["error"]["param"]
                assert param in (field, field.partition(".")[0]), (value, answer.text)


def test_the_table_has_every_numeric_field() -> None:
    document = description("0", has_key=False)

    def is_number(schema: Any) -> bool:
        kinds = [schema, *schema.get("anyOf", ())]
        return any(one.get("type") in ("integer", "number") for one in kinds)

    for route, (_, fields) in FIELDS.items():
        body = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        found = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
        named = {name for name, schema in found.items() if is_number(schema)}
        assert named == {field for field in fields if "." not in field}, route
