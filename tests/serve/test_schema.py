"""Every operation of /openapi.json against requests made from it: no 5xx, no answer that the page does not describe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from moiety.serve.server import Server
from tests.serve.conftest import NAME, serving

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
)
VOCABULARY = 280


@pytest.fixture(scope="module")
def short() -> Iterator[Server]:
    with serving(engine={"max_positions": 128}) as running:
        yield running


def operations(server: Server) -> list[Any]:
    base = f"http://127.0.0.1:{server.port}"
    document = httpx.get(f"{base}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=base)
    found = [one.ok() for one in schema.get_all_operations()]
    named = {(one.method.upper(), one.path) for one in found}
    assert named == {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    return found


def try_all(server: Server, examples: int) -> dict[str, Counter[int]]:
    """How often each operation answered with which status."""
    seen: dict[str, Counter[int]] = {}
    limits = hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck))
    queries = st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=4)
    for operation in operations(server):
        statuses = seen.setdefault(f"{operation.method.upper()} {operation.path}", Counter())
        modes = list(schemathesis.GenerationMode)
        if operation.method == "get":
            modes = modes[:1]  # where nothing is asked for, nothing can be wrong
        for mode in modes:
            cases = operation.as_strategy(generation_mode=mode)
            extra = queries if operation.method == "get" else st.just({})
            hypothesis.given(case=cases, query=extra)(limits(_tried(statuses)))()
    return seen


def _tried(statuses: Counter[int]) -> Any:
    def run(case: Any, query: dict[str, str]) -> None:
        # nearly no name that fits the schema is the model's, and a request for another one is not read further
        if isinstance(case.body, dict) and len(str(case.body.get("model", ""))) > 1:
            case.body["model"] = NAME
            if case.meta.generation.mode is schemathesis.GenerationMode.POSITIVE:
                case.body = possible(case.body)
        if case.path_parameters and len(query) > 1:
            case.path_parameters["model"] = NAME
        answer = case.call(params=query, timeout=60)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    return run


def possible(body: dict[str, Any]) -> dict[str, Any]:
    """A body that fits the schema, nearer to what this model can answer: a schema does not know of its sizes."""
    found = dict(body)
    if isinstance(body.get("prompt"), list):
        found["prompt"] = [_small(one) for one in body["prompt"]][:4]
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if name in body:
            found[name] = min(body[name] or 6, 6)
    if body.get("n"):
        found["n"] = min(body["n"], 3)
    if body.get("min_tokens"):
        found["min_tokens"] = 1
    if body.get("stop_token_ids"):
        found["stop_token_ids"] = _small(body["stop_token_ids"])
    if body.get("logit_bias"):
        found["logit_bias"] = {
            str(int(token) % VOCABULARY): bias for token, bias in body["logit_bias"].items()
        }
    if not body.get("stream"):
        found.pop("stream_options", None)
    if "messages" in body:
        found["messages"] = [
            one if one["role"] == "assistant" and one.get("tool_calls") else one | {"content": "a"}
            for one in body["messages"][:2]
        ]
    return found


def _small(value: Any) -> Any:
    """Tokens that the vocabulary has; few of them, and few letters."""
    if isinstance(value, list):
        return [_small(one) for one in value][:6]
    return value[:6] if isinstance(value, str) else int(value) % VOCABULARY


def check(seen: dict[str, Counter[int]], examples: int) -> None:
    assert len(seen) == 10
    for operation, statuses in seen.items():
        assert statuses.total() >= examples and statuses[200] >= examples // 8, (operation, statuses)
        assert set(statuses) <= {200, 400, 404}, (operation, statuses)


def test_a_few_requests_for_every_operation(short: Server) -> None:
    check(try_all(short, 24), 24)


@pytest.mark.slow
@pytest.mark.timeout_s(1800)
def test_a_thousand_requests_for_every_operation(short: Server) -> None:
    check(try_all(short, 1000), 1000)
    short.served.engine.check()
