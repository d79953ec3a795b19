"""`/v1/chat/completions`: messages through the model's template, tools, formats."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moiety.errors import FormatError, MoietyError
from moiety.infer.engine import Event
from moiety.serve.answers import (
    Answers,
    EventStream,
    Served,
    Tap,
    call_of,
    event_line,
    finished,
    form_of,
    new_id,
    request_options,
    room,
    routed,
    usage_of,
)
from moiety.serve.gate import Ask
from moiety.serve.grammar import call_grammar, schema_grammar
from moiety.serve.refusal import Refusal, refusal_of
from moiety.serve.replies import Call, ChatMessage, TokenLogprob, TopLogprob
from moiety.serve.requests import ChatRequest, Message, NamedTool
from moiety.serve.tools import CallForm, CallsInText, call, calls_in

__all__ = ["chat", "rendered"]

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
OUR_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "documents", "self"})


async def chat(served: Served, asked: ChatRequest, request: Request) -> Response:
    """Answer a request.

    Raises:
        Refusal: it cannot be, or not now.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    if asked.tool_choice == "none":
        tools = []
    prompt = await asyncio.to_thread(rendered, served, messages_of(asked.messages), tools, _variables(asked))
    grammar, param = _grammar(asked)
    n = asked.n or 1
    if grammar and (asked.min_tokens or asked.ignore_eos):
        raise Refusal(400, f"{param} does not go with min_tokens or ignore_eos", param=param)
    made = await asyncio.to_thread(served.grammars.made, grammar, n, param) if grammar else [None] * n
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    most = room(
        served,
        prompt,
        limit,
        "messages",
        "max_completion_tokens" if asked.max_tokens is None else "max_tokens",
    )
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    asks = [
        Ask(
            prompt=prompt,
            options=request_options(
                asked, most=most, logprobs=logprobs, number=number, adapter=served.names[asked.model]
            ),
            constraint=made[number],
            shown=served.call_marks if _may_call(asked) else None,
        )
        for number in range(n)
    ]
    answers = Answers(served, served.gate.submit(asks, in_pieces=bool(asked.stream)))
    head: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk" if asked.stream else "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": served.fingerprint,
    }
    if asked.stream:
        return _stream(served, answers, asked, head)
    found = await call_of(request.receive, finished(answers))
    if found is None:
        return Response(status_code=499)
    choices = [_choice(served, answers, asked, index, events) for index, events in enumerate(found)]
    return JSONResponse({**head, "choices": choices, "usage": usage_of(answers.group)})


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates know them: content as one text, arguments of calls as objects, no `developer`."""
    found = []
    for message in messages:
        plain = message.model_dump(exclude_none=True, exclude={"refusal", "annotations"})
        if isinstance(message.content, list):
            plain["content"] = "".join(part.text for part in message.content)
        plain.setdefault("content", "")
        if message.role == "developer":
            plain["role"] = "system"
        for one in plain.get("tool_calls", ()):
            one["function"]["arguments"] = _object(one["function"]["arguments"])
        found.append(plain)
    return found


def _object(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _variables(asked: ChatRequest) -> dict[str, Any]:
    given = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        given.setdefault("reasoning_effort", asked.reasoning_effort)
    taken = OUR_VARIABLES & given.keys()
    if taken:
        raise Refusal(
            400, f"chat_template_kwargs may not set {', '.join(sorted(taken))}", param="chat_template_kwargs"
        )
    return given


def rendered(
    served: Served,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    param: str = "messages",
) -> list[int]:
    """Tokens of messages.

    Raises:
        Refusal: the model was not taught to chat or to call, or its template refuses them.
    """
    template = served.template
    if template is None:
        raise Refusal(
            400, "this model has no chat template: it continues text, see /v1/completions", code="no_chat"
        )
    if tools and not any("tools" in text for text in template.templates.values()):
        raise Refusal(
            400, "this model's chat template has no place for tools", param="tools", code="no_tools"
        )
    try:
        text = template.render(messages, tools=list(tools) or None, **variables)
    except FormatError as error:
        raise Refusal(400, f"the chat template failed: {error.message}", param=param) from error
    except MoietyError as error:
        raise refusal_of(error, param) from error
    return served.encode(text, param, with_special=True)


def _functions(asked: ChatRequest) -> dict[str, Mapping[str, Any]]:
    return {tool.function.name: tool.function.parameters or ANY_OBJECT for tool in asked.tools or ()}


def _grammar(asked: ChatRequest) -> tuple[str, str]:
    """The grammar of the answer, empty where it is free; the field that wants it."""
    functions, choice = _functions(asked), asked.tool_choice
    if isinstance(choice, NamedTool):
        return schema_grammar(functions[choice.function.name]), "tools"
    if choice == "required":
        return call_grammar(functions), "tools"
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        return "", ""
    schema = None if wanted.json_schema is None else wanted.json_schema.schema_
    return schema_grammar(ANY_OBJECT if schema is None else schema), "response_format"


def _may_call(asked: ChatRequest) -> bool:
    """True if the answer's text may be calls."""
    return bool(asked.tools) and asked.tool_choice in (None, "auto", "required")


def _message(asked: ChatRequest, text: str, form: CallForm) -> ChatMessage:
    content, calls = text, list[Call]()
    if isinstance(asked.tool_choice, NamedTool):
        content, calls = "", [call(asked.tool_choice.function.name, text)]
    elif _may_call(asked):
        content, calls = calls_in(text, _functions(asked), form)
    message: ChatMessage = {"role": "assistant", "content": content, "refusal": None}
    if calls:
        message["content"] = content or None
        message["tool_calls"] = calls
    return message


def _choice(
    served: Served, answers: Answers, asked: ChatRequest, index: int, events: Sequence[Event]
) -> dict[str, Any]:
    message = _message(asked, "".join(event.text for event in events), served.call_form)
    calls = "tool_calls" in message and events[-1].reason == "stop"
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(served, asked, events),
        "finish_reason": "tool_calls" if calls else events[-1].reason,
        **routed(answers.group, index),
    }


def _logprobs(served: Served, asked: ChatRequest, events: Sequence[Event]) -> dict[str, Any] | None:
    if not asked.logprobs:
        return None

    def one(token: int, logprob: float) -> TopLogprob:
        return {
            "token": served.piece(token),
            "logprob": logprob,
            "bytes": list(served.tokenizer.bytes_of((token,))),
        }

    content: list[TokenLogprob] = [
        {**one(event.token, event.logprob), "top_logprobs": [one(*best) for best in event.top]}
        for event in events
        if event.token is not None and event.logprob is not None
    ]
    return {"content": content, "refusal": None}


def _stream(served: Served, answers: Answers, asked: ChatRequest, head: dict[str, Any]) -> EventStream:
    wants_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    more = {"usage": None} if wants_usage else {}

    def line(index: int, delta: Mapping[str, Any], reason: str | None = None, **further: Any) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **further}
        return event_line({**head, "choices": [choice], **more})

    async def chunks() -> AsyncIterator[list[str]]:
        deltas = [_Deltas(asked, served.call_form) for _ in answers.group.asks]
        first = {"role": "assistant", "content": "", "refusal": None}
        yield [line(index, first) for index in range(len(deltas))]
        async for batch in answers.events():
            lines = []
            for index, event in batch:
                logprobs = _logprobs(served, asked, [event]) if event.token is not None else None
                found, reason = deltas[index].push(event), deltas[index].reason
                if not found and logprobs:
                    found = [{}]
                for number, delta in enumerate(found):
                    lines.append(line(index, delta, logprobs=logprobs if number == 0 else None))
                if reason is not None:
                    lines.append(line(index, {}, reason, **routed(answers.group, index)))
            yield lines
        if wants_usage:
            yield [event_line({**head, "choices": [], "usage": usage_of(answers.group)})]

    is_plain = len(answers.group.asks) == 1 and not (
        asked.logprobs or _may_call(asked) or isinstance(asked.tool_choice, NamedTool)
    )
    tap = Tap(answers.group, form_of(lambda text: line(0, {"content": text}))) if is_plain else None
    return EventStream(chunks(), served.options.stall_s, tap=tap)


@final
class _Deltas:
    """One answer's pieces: text as it comes, calls when they are whole."""

    def __init__(self, asked: ChatRequest, form: CallForm) -> None:
        self._named = asked.tool_choice.function.name if isinstance(asked.tool_choice, NamedTool) else ""
        self._calls = CallsInText(_functions(asked), form) if _may_call(asked) else None
        self._has_called = False
        self.reason: str | None = None

    def push(self, event: Event) -> list[dict[str, Any]]:
        """What an event adds."""
        found: list[dict[str, Any]] = []
        if self._named:
            found = self._arguments(event.text)
        elif self._calls is None:
            found = [{"content": event.text}] if event.text else []
        else:
            text, calls = self._calls.push(event.text), list[Call]()
            if event.reason is not None:
                rest, calls = self._calls.finish()
                text += rest
            found = [{"content": text}] if text else []
            found += [{"tool_calls": [{**one, "index": number}]} for number, one in enumerate(calls)]
            self._has_called = bool(calls)
        if event.reason is not None:
            self.reason = "tool_calls" if self._has_called and event.reason == "stop" else event.reason
        return found

    def _arguments(self, text: str) -> list[dict[str, Any]]:
        """A piece of the one call's arguments; its name comes with the first."""
        if not text:
            return []
        if self._has_called:
            return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}]
        self._has_called = True
        return [{"tool_calls": [{**call(self._named, text), "index": 0}]}]
