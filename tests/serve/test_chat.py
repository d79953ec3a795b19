"""`/v1/chat/completions` and `/v1/responses` through the real client: templates, tools, formats, streams, events."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest

from moiety.serve.requests import Message
from moiety.serve.server import Server
from tests.serve.conftest import NAME, client_of, opened, serving

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
REFERRING = {
    "type": "object",
    "properties": {"day": {"$ref": "#/$defs/day"}},
    "required": ["day"],
    "additionalProperties": False,
    "$defs": {"day": {"enum": ["mon", "tue"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "calendar", "parameters": REFERRING}},
]


def ask(client: openai.OpenAI, messages: Any = None, **more: Any) -> Any:
    given = {"model": NAME, "messages": messages or HELLO, "max_tokens": 120, "temperature": 0} | more
    return client.chat.completions.create(**given)


def streamed(client: openai.OpenAI, **more: Any) -> tuple[dict[int, dict[str, Any]], Any]:
    """Each choice put together from its pieces, and the usage."""
    found: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **more):
        assert chunk.object == "chat.completion.chunk" and usage is None
        usage = chunk.usage
        for choice in chunk.choices:
            one = found.setdefault(
                choice.index, {"roles": [], "text": "", "calls": {}, "reasons": [], "tokens": []}
            )
            one["roles"] += [choice.delta.role] if choice.delta.role else []
            one["text"] += choice.delta.content or ""
            one["reasons"].append(choice.finish_reason)
            one["tokens"] += choice.logprobs.content if choice.logprobs else []
            for part in choice.delta.tool_calls or ():
                call = one["calls"].setdefault(part.index, {"id": part.id, "name": "", "arguments": ""})
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
    return found, usage


def test_a_chat_goes_through_the_template(client: openai.OpenAI, server: Server) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
    ]
    answer = ask(client, messages, max_tokens=5)
    prompt = server.served.tokenizer.encode("system: be kind\nuser: hello\nassistant: ")
    assert answer.usage.prompt_tokens == len(prompt) and answer.object == "chat.completion"
    plain = client.completions.create(model=NAME, prompt=prompt, max_tokens=5, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == plain.choices[0].text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.message.tool_calls is None and choice.logprobs is None


def test_a_stream_is_the_answer(client: openai.OpenAI) -> None:
    more = {"n": 2, "seed": 4, "temperature": 1.0, "max_tokens": 7, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, **more)
    found, usage = streamed(client, **more)
    assert usage.completion_tokens == whole.usage.completion_tokens == 14 and len(found) == 2
    for choice in whole.choices:
        one = found[choice.index]
        assert one["roles"] == ["assistant"] and one["text"] == choice.message.content
        assert one["reasons"][-1] == choice.finish_reason and set(one["reasons"][:-1]) == {None}
        pairs = list(zip(one["tokens"], choice.logprobs.content, strict=True))
        assert len(pairs) == 7 and all(here.bytes == there.bytes for here, there in pairs)
        assert all(here.logprob == pytest.approx(there.logprob, abs=1e-4) for here, there in pairs)
        for token in one["tokens"]:
            assert len(token.top_logprobs) == 2 and token.logprob <= token.top_logprobs[0].logprob + 1e-6
    assert ask(client, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_formats_are_kept_to(client: openai.OpenAI, temperature: float) -> None:
    given = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    answer = ask(client, response_format=given, temperature=temperature, n=4)
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert (
            set(value) == {"city", "warm"}
            and value["city"] in ("Rome", "Oslo")
            and choice.finish_reason == "stop"
        )
        assert isinstance(value["warm"], bool)
    found, _ = streamed(client, response_format=given, temperature=temperature)
    assert json.loads(found[0]["text"]).keys() == {"city", "warm"}
    loose = ask(client, response_format={"type": "json_object"}, temperature=temperature)
    assert loose.choices[0].message.content.startswith("{")


def test_parsed_models_of_the_client(client: openai.OpenAI) -> None:
    class Weather(pydantic.BaseModel):
        warm: bool
        windy: bool

    answer = client.chat.completions.parse(
        model=NAME, messages=HELLO, response_format=Weather, temperature=0, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)
    response = client.responses.parse(model=NAME, input="hello", text_format=Weather, max_output_tokens=60)
    assert isinstance(response.output_parsed, Weather)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calendar"}}])
def test_calls_that_must_be_made(client: openai.OpenAI, choice: Any) -> None:
    answer = ask(client, tools=TOOLS, tool_choice=choice, n=3, temperature=1.5).choices
    found, _ = streamed(client, tools=TOOLS, tool_choice=choice, temperature=1.5)
    assert found[0]["reasons"][-1] == "tool_calls" and found[0]["text"] == ""
    calls = [call for one in answer for call in one.message.tool_calls]
    assert len(calls) == 3 and {one.finish_reason for one in answer} == {"tool_calls"}
    assert all(call.type == "function" and call.id.startswith("call_") for call in calls)
    (streamed_call,) = found[0]["calls"].values()
    assert streamed_call["id"].startswith("call_")
    named = [(call.function.name, call.function.arguments) for call in calls]
    for name, arguments in [*named, (streamed_call["name"], streamed_call["arguments"])]:
        assert name in (("weather", "calendar") if choice == "required" else ("calendar",))
        keys = {"city", "warm"} if name == "weather" else {"day"}
        assert set(json.loads(arguments)) == keys


def test_calls_and_results_go_back_in(client: openai.OpenAI, server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = ask(client, messages, tools=TOOLS, tool_choice="none", max_tokens=4)
    prompt = "user: hello\nassistant: \ntool: sunny\nassistant: "
    assert answer.usage.prompt_tokens == len(server.served.tokenizer.encode(prompt))
    assert answer.choices[0].message.tool_calls is None
    with_tools = ask(client, tools=TOOLS, max_tokens=4)  # the template names them
    prompt = "[weather][calendar]user: hello\nassistant: "
    assert with_tools.usage.prompt_tokens == len(server.served.tokenizer.encode(prompt))


def test_arguments_reach_templates_as_objects() -> None:
    from moiety.serve.chat import messages_of

    function = {"name": "f", "arguments": '{"a": [1]}'}
    message = Message.model_validate(
        {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": function}]}
    )
    (plain,) = messages_of([message])
    assert plain["tool_calls"][0]["function"]["arguments"] == {"a": [1]} and plain["content"] == ""
    assert messages_of([Message(role="developer", content="x")])[0]["role"] == "system"


def test_models_that_cannot_chat_or_call() -> None:
    with serving(opened(None)) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
            ask(client)
        assert caught.value.code == "no_chat"
    silent = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with serving(opened(silent)) as server, client_of(server) as client:
        assert ask(client, max_tokens=2).choices[0].message.content is not None
        with pytest.raises(openai.BadRequestError, match="no place for tools"):
            ask(client, tools=TOOLS)
    broken = (
        "{{ raise_exception('roles must alternate') if messages|length > 1 else messages[0].nothing.at.all }}"
    )
    with serving(opened(broken)) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match=r"the chat template refuses .*alternate") as caught:
            ask(client, [*HELLO, *HELLO])
        assert "/" not in caught.value.message.split("refuses")[0]
        with pytest.raises(openai.BadRequestError, match="chat template failed"):
            ask(client)


# Responses


def respond(client: openai.OpenAI, **more: Any) -> Any:
    given = {"model": NAME, "input": "hello", "max_output_tokens": 8, "temperature": 0} | more
    return client.responses.create(**given)


def test_a_response_is_the_chats_answer(client: openai.OpenAI) -> None:
    found = respond(client, instructions="be kind", metadata={"a": "b"})
    messages = [{"role": "system", "content": "be kind"}, *HELLO]
    chat = ask(client, messages, max_tokens=8)
    assert found.output_text == chat.choices[0].message.content and found.object == "response"
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.input_tokens == chat.usage.prompt_tokens and found.usage.output_tokens == 8
    assert found.metadata == {"a": "b"} and found.instructions == "be kind" and found.error is None
    parts = [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]
    items = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": parts},
    ]
    assert respond(client, input=items).output_text == found.output_text
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    kept = respond(client, text=form, max_output_tokens=60)
    assert kept.status == "completed" and json.loads(kept.output_text)["city"] in ("Rome", "Oslo")


def test_the_events_of_a_response(client: openai.OpenAI) -> None:
    events = list(respond(client, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1].response
    assert text == last.output_text == events[-4].text == respond(client).output_text
    assert last.usage.output_tokens == 8 and last.id == events[0].response.id
    with client.responses.stream(model=NAME, input="hello", max_output_tokens=8, temperature=0) as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == text


def test_the_async_client_streams_chats(server: Server) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none"
        ) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model=NAME,
                    messages=HELLO,  # type: ignore[arg-type]
                    stream=True,
                    max_tokens=6,
                    temperature=0,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(12)))

    assert len(set(asyncio.run(run()))) == 1
