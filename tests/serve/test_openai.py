"""What is left of the real clients: helpers of openai's Python client, its errors, asynchronous calls; npm's client."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from moiety.serve.server import Server
from tests.serve.conftest import NAME, client_of, eventually, serving

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
CHAT: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}


def test_the_helper_for_streams_of_chats(client: openai.OpenAI, server: Server) -> None:
    fox = str(server.served.tokenizer.encode(" fox")[0])
    asked = CHAT | {"logprobs": True, "logit_bias": {fox: 100}, "stop": "x fox fox fox"}
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in events]
    assert kinds[0] == "chunk"
    assert kinds.count("content.delta") >= 1
    assert kinds.count("content.done") == 1
    assert kinds.count("logprobs.content.done") == 1
    assert final.choices[0].message.content == whole.message.content == " fo"
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].logprobs is not None and whole.logprobs is not None
    tokens = [one.token for one in final.choices[0].logprobs.content or ()]
    assert tokens == [one.token for one in whole.logprobs.content or ()]
    assert final.model == NAME


def test_the_helper_for_streams_of_calls(client: openai.OpenAI) -> None:
    asked = CHAT | {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    with client.chat.completions.stream(**asked | {"max_tokens": 90}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert final.finish_reason == "tool_calls"
    (call,) = final.message.tool_calls or ()
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    assert call.id.startswith("call_")
    function = {"name": call.function.name, "arguments": call.function.arguments}
    made = {"id": call.id, "type": "function", "function": function}
    result: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
    ]
    again = client.chat.completions.create(**CHAT | {"messages": result, "tools": TOOLS})
    assert again.choices[0].message.role == "assistant"
    assert again.usage is not None and again.usage.prompt_tokens > 30


def test_the_helper_for_streams_of_responses(client: openai.OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    asked: dict[str, Any] = {
        "model": NAME,
        "input": "hello",
        "max_output_tokens": 60,
        "temperature": 0,
        "text": form,
    }
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.usage is not None and whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens
    assert final.status == "completed"
    assert {event.type for event in events} > {"response.created", "response.output_text.delta"}
    assert events[-1].type == "response.completed"
    assert whole.output[0].type == "message" and whole.output[0].content[0].type == "output_text"
    assert whole.tools == [] and whole.parallel_tool_calls is True
    assert whole.temperature == 0


def test_what_is_around_an_answer(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**CHAT)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert int(raw.headers["content-length"]) == len(raw.content)
    assert raw.parse().choices[0].message.content
    with client.chat.completions.with_streaming_response.create(**CHAT, stream=True) as streaming:
        assert streaming.headers["content-type"].startswith("text/event-stream")
        assert streaming.headers["cache-control"] == "no-cache"
        lines = [line for line in streaming.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}


@pytest.mark.parametrize(
    ("more", "param", "kind"),
    [
        ({"temperature": 3}, "temperature", openai.BadRequestError),
        ({"n": 0}, "n", openai.BadRequestError),
        ({"model": "other"}, "model", openai.NotFoundError),
        ({"messages": []}, "messages", openai.BadRequestError),
        ({"max_tokens": 100_000}, "max_tokens", openai.BadRequestError),
        ({"extra_body": {"nonsense": 1}}, "nonsense", openai.BadRequestError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(
    client: openai.OpenAI, more: dict[str, Any], param: str, kind: type[openai.APIStatusError], stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**CHAT | more, stream=stream)
    error = caught.value
    assert error.param == param
    assert error.type in ("invalid_request_error", "not_found_error")
    assert isinstance(error.body, dict) and set(error.body) == {"message", "type", "param", "code"}


def test_asynchronous_calls_of_every_kind(server: Server) -> None:
    async def run() -> None:
        base = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
            assert [one.id async for one in client.models.list()] == [NAME]
            chat = await client.chat.completions.create(**CHAT)
            assert chat.usage is not None and chat.usage.completion_tokens == 12
            form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
            found = await client.chat.completions.create(**CHAT | {"max_tokens": 60}, response_format=form)
            assert json.loads(found.choices[0].message.content or "")["city"] in ("Rome", "Oslo")
            called = await client.chat.completions.create(
                **CHAT | {"max_tokens": 90}, tools=TOOLS, tool_choice="required"
            )
            assert called.choices[0].finish_reason == "tool_calls"
            async with client.chat.completions.stream(
                **CHAT | {"max_tokens": 60}, response_format=form
            ) as stream:
                final = await stream.get_final_completion()
            assert final.choices[0].message.content == found.choices[0].message.content
            response = await client.responses.create(
                model=NAME, input="hello", max_output_tokens=12, temperature=0
            )
            assert response.output_text == chat.choices[0].message.content
            events = await client.responses.create(
                model=NAME, input="hello", max_output_tokens=12, temperature=0, stream=True
            )
            deltas = [event.delta async for event in events if event.type == "response.output_text.delta"]
            assert "".join(deltas) == response.output_text
            with pytest.raises(openai.BadRequestError):
                await client.responses.create(model=NAME, input="", max_output_tokens=0)
            leaving = await client.completions.create(
                model=NAME, prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in leaving:
                break
            await leaving.close()

    asyncio.run(run())
    eventually(lambda: server.served.gate.live == 0)


def test_the_client_comes_again_when_told() -> None:
    seen: list[int] = []

    def note(answer: httpx.Response) -> None:
        seen.append(answer.status_code)
        if answer.status_code == 429:  # the true wait is a second or more
            assert int(answer.headers["retry-after"]) >= 1
            answer.headers["retry-after-ms"] = "50"

    engine = {"max_requests": 1, "max_queue": 1}
    short: dict[str, Any] = {"model": NAME, "prompt": "c", "max_tokens": 2}
    long = short | {"max_tokens": 240, "stream": True, "extra_body": {"ignore_eos": True}}
    with (
        serving(engine=engine) as server,
        httpx.Client(event_hooks={"response": [note]}) as http,
        client_of(server, http_client=http) as client,
    ):
        with client.completions.create(**long) as holding:
            next(iter(holding))  # it waits no more, so that there is room for one who does
            with client.completions.create(**long), pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**short)
            assert caught.value.status_code == 429
        assert client.with_options(max_retries=50).completions.create(**short).usage is not None
    assert seen[:3] == [200, 200, 429] and seen[-1] == 200, seen


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_the_client_of_npm(tmp_path: Path) -> None:
    """Installed from npm's registry into a folder of its own: the one test here that needs a network."""
    script = Path(__file__).with_name("client.mjs")
    shutil.copy(script, tmp_path)
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(tmp_path), "openai@6"]
    subprocess.run(install, check=True, timeout=100, cwd=tmp_path)
    with serving(key="sesame") as server:
        address = f"http://127.0.0.1:{server.port}/v1"
        word = str(server.served.tokenizer.encode(" fox")[0])
        command = ["node", script.name, address, NAME, "sesame", word]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        held = re.search(r"(\d+) checks held", done.stdout)
        assert held is not None and int(held[1]) >= 30, done.stdout
        eventually(lambda: server.served.gate.live == 0)
