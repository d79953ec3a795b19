"""`/v1/responses`: the newer way to ask for a text, whole or as events. Nothing is kept."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any, final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moiety.serve.answers import (
    Answers,
    EventStream,
    Served,
    call_of,
    event_line,
    finished,
    new_id,
    request_options,
    room,
    routed,
    usage_of,
)
from moiety.serve.chat import ANY_OBJECT, rendered
from moiety.serve.gate import Ask
from moiety.serve.grammar import schema_grammar
from moiety.serve.refusal import Refusal
from moiety.serve.replies import OutputMessage, OutputText, ResponseReply
from moiety.serve.requests import ResponsesRequest

__all__ = ["respond"]


async def respond(served: Served, asked: ResponsesRequest, request: Request) -> Response:
    """Answer a request.

    Raises:
        Refusal: it cannot be, or not now.
    """
    grammar = _grammar(asked)
    prompt = await asyncio.to_thread(rendered, served, _messages(asked), [], {}, "input")
    constraint = (await asyncio.to_thread(served.grammars.made, grammar, 1, "text"))[0] if grammar else None
    most = room(served, prompt, asked.max_output_tokens, "input", "max_output_tokens")
    ask = Ask(
        prompt=prompt,
        options=request_options(asked, most=most, adapter=served.names[asked.model]),
        constraint=constraint,
    )
    answers = Answers(served, served.gate.submit([ask], in_pieces=bool(asked.stream)))
    reply = _Reply(served, asked, answers)
    if asked.stream:
        return EventStream(reply.events(), served.options.stall_s, done="")
    found = await call_of(request.receive, finished(answers))
    if found is None:
        return Response(status_code=499)
    return JSONResponse(reply.whole("".join(event.text for event in found[0])))


def _messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    head = [] if asked.instructions is None else [{"role": "system", "content": asked.instructions}]
    if isinstance(asked.input, str):
        return [*head, {"role": "user", "content": asked.input}]
    return head + [
        {
            "role": "system" if item.role == "developer" else item.role,
            "content": item.content
            if isinstance(item.content, str)
            else "".join(part.text for part in item.content),
        }
        for item in asked.input
    ]


def _grammar(asked: ResponsesRequest) -> str:
    wanted = None if asked.text is None else asked.text.format
    if wanted is None or wanted.type == "text":
        return ""
    if wanted.type == "json_schema" and wanted.schema_ is None:
        raise Refusal(400, "text.format.schema is missing", param="text.format.schema")
    return schema_grammar(ANY_OBJECT if wanted.schema_ is None else wanted.schema_)


@final
class _Reply:
    """One response, as it grows."""

    def __init__(self, served: Served, asked: ResponsesRequest, answers: Answers) -> None:
        self._asked, self._answers = asked, answers
        self._id, self._item = new_id("resp"), new_id("msg")
        self._name, self._created = asked.model, int(time.time())

    def _body(self, status: Any, output: list[OutputMessage]) -> ResponseReply:
        asked = self._asked
        wanted = None if asked.text is None else asked.text.format
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._name,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "output": output,
            "parallel_tool_calls": True if asked.parallel_tool_calls is None else asked.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {
                "format": {"type": "text"}
                if wanted is None
                else wanted.model_dump(by_alias=True, exclude_none=True)
            },
            "tool_choice": asked.tool_choice or "auto",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _message(self, status: Any, parts: list[OutputText]) -> OutputMessage:
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": parts}

    def whole(self, text: str) -> ResponseReply:
        """The response, once the answer is done."""
        group = self._answers.group
        status: Any = "incomplete" if group.handles[0].request.reason == "length" else "completed"
        body = self._body(status, [self._message(status, [_part(text)])])
        usage = usage_of(group)
        body["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        return {**body, **routed(group, 0)}  # type: ignore[typeddict-item]

    async def events(self) -> AsyncIterator[list[str]]:
        """The events of a stream, numbered."""
        numbers, text = itertools.count(), ""
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}

        def line(kind: str, **more: Any) -> str:
            return event_line({"type": kind, "sequence_number": next(numbers), **more}, kind)

        begun = self._body("in_progress", [])
        yield [
            line("response.created", response=begun),
            line("response.in_progress", response=begun),
            line("response.output_item.added", output_index=0, item=self._message("in_progress", [])),
            line("response.content_part.added", **place, part=_part("")),
        ]
        try:
            async for batch in self._answers.events():
                piece = "".join(event.text for _, event in batch)
                text += piece
                if piece:
                    yield [line("response.output_text.delta", **place, delta=piece, logprobs=[])]
        except Refusal as refusal:
            failed = self._body("failed", [])
            failed["error"] = {"code": "server_error", "message": refusal.message}
            yield [line("response.failed", response=failed)]
            return
        whole = self.whole(text)
        yield [
            line("response.output_text.done", **place, text=text, logprobs=[]),
            line("response.content_part.done", **place, part=_part(text)),
            line("response.output_item.done", output_index=0, item=whole["output"][0]),
            line(f"response.{whole['status']}", response=whole),
        ]


def _part(text: str) -> OutputText:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
