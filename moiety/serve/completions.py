"""`/v1/completions`: texts or tokens, continued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from moiety.infer.engine import Event
from moiety.model.tokenizer import TextStream
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
from moiety.serve.options import MOST_CHOICES
from moiety.serve.refusal import Refusal
from moiety.serve.replies import CompletionChoice, CompletionLogprobs
from moiety.serve.requests import CompletionRequest

__all__ = ["complete"]

SHORT_CHARACTERS = 1_000  # are tokens sooner than another thread has begun


async def complete(served: Served, asked: CompletionRequest, request: Request) -> Response:
    """Answer a request.

    Raises:
        Refusal: it cannot be, or not now.
    """
    given = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
    is_short = sum(len(one) for one in given if isinstance(one, str)) <= SHORT_CHARACTERS
    prompts = _prompts(served, asked) if is_short else await asyncio.to_thread(_prompts, served, asked)
    n = asked.n or 1
    if len(prompts) * n > MOST_CHOICES:
        raise Refusal(
            400, f"{len(prompts)} prompts with n {n} are more than {MOST_CHOICES} answers", param="n"
        )
    if not asked.max_tokens and not asked.echo and asked.max_tokens is not None:
        raise Refusal(400, "max_tokens: 0 draws nothing, which is for echo: true alone", param="max_tokens")
    texts = [_Text(served, asked, prompt) for prompt in prompts for _ in range(n)]
    asks = [
        Ask(prompt=prompt, options=_options(served, asked, prompt, number))
        for prompt in prompts
        for number in range(n)
    ]
    answers = Answers(served, served.gate.submit(asks, in_pieces=bool(asked.stream)))
    head: dict[str, Any] = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        "system_fingerprint": served.fingerprint,
    }
    if asked.stream:
        return _stream(served, answers, asked, texts, head)
    found = await call_of(request.receive, finished(answers))
    if found is None:
        return Response(status_code=499)
    choices = [
        text.choice(events, index, answers)
        for index, (text, events) in enumerate(zip(texts, found, strict=True))
    ]
    return JSONResponse(
        {**head, "choices": choices, "usage": usage_of(answers.group, drawn_off=_off(asked, texts))}
    )


def _prompts(served: Served, asked: CompletionRequest) -> list[list[int]]:
    """Every prompt as tokens."""
    given = asked.prompt
    several: Sequence[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    return [served.encode(one, "prompt") if isinstance(one, str) else list(one) for one in several]


def _options(served: Served, asked: CompletionRequest, prompt: list[int], number: int) -> Any:
    most = room(served, prompt, asked.max_tokens, "prompt", "max_tokens") if asked.max_tokens != 0 else 1
    return request_options(
        asked,
        most=most,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.logprobs if asked.echo else None,
        number=number,
        adapter=served.names[asked.model],
    )


def _off(asked: CompletionRequest, texts: Sequence[_Text]) -> int:
    """Tokens that were drawn though none were asked for: the engine draws at least one."""
    return len(texts) if asked.max_tokens == 0 else 0


def _stream(
    served: Served,
    answers: Answers,
    asked: CompletionRequest,
    texts: Sequence[_Text],
    head: dict[str, Any],
) -> EventStream:
    wants_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    more = {"usage": None} if wants_usage else {}

    def line(text: str) -> str:
        choice = CompletionChoice(index=0, text=text, logprobs=None, finish_reason=None)
        return event_line({**head, "choices": [choice], **more})

    async def chunks() -> AsyncIterator[list[str]]:
        async for batch in answers.events():
            lines = []
            for index, event in batch:
                choice = texts[index].choice([event], index, answers)
                if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
                    lines.append(event_line({**head, "choices": [choice], **more}))
            yield lines
        if wants_usage:
            usage = usage_of(answers.group, drawn_off=_off(asked, texts))
            yield [event_line({**head, "choices": [], "usage": usage})]

    is_plain = len(texts) == 1 and asked.logprobs is None and not asked.echo
    tap = Tap(answers.group, form_of(line)) if is_plain else None
    return EventStream(chunks(), served.options.stall_s, tap=tap)


@final
class _Text:
    """One answer's text and logarithms as its events come.

    Args:
        served: The model.
        asked: The request.
        prompt: The tokens.
    """

    def __init__(self, served: Served, asked: CompletionRequest, prompt: Sequence[int]) -> None:
        self._served, self._asked, self._prompt = served, asked, prompt
        self._has_begun = False
        self._spans = TextStream(served.tokenizer)
        self._offset = 0

    def choice(self, events: Sequence[Event], index: int, answers: Answers) -> CompletionChoice:
        """What these events add."""
        asked, is_last = self._asked, events[-1].reason is not None
        handle = answers.group.handles[index]
        text, logprobs = "", None
        if asked.logprobs is not None:
            logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if asked.echo and not self._has_begun:
            text = self._served.tokenizer.decode(self._prompt)
            if logprobs is not None:
                self._add(logprobs, self._prompt[0], None, None)
                for drawn in handle.request.scored:
                    self._add(logprobs, drawn.token, drawn.logprob, drawn.top)
        self._has_begun = True
        if asked.max_tokens != 0:
            text += "".join(event.text for event in events)
            for event in events if logprobs is not None else ():
                if event.token is not None and logprobs is not None:
                    self._add(logprobs, event.token, event.logprob, event.top)
        reason = events[-1].reason
        assert reason in (None, "stop", "length"), (index, reason)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if is_last and asked.max_tokens == 0 else reason,
            **(routed(answers.group, index) if is_last else {}),  # type: ignore[typeddict-item]
        }

    def _add(
        self,
        logprobs: CompletionLogprobs,
        token: int,
        logprob: float | None,
        top: Sequence[tuple[int, float]] | None,
    ) -> None:
        piece = self._served.piece
        logprobs["tokens"].append(piece(token))
        logprobs["token_logprobs"].append(logprob)
        best = None
        if top is not None and logprob is not None:
            best = {piece(one): value for one, value in reversed(top)} | {piece(token): logprob}
        logprobs["top_logprobs"].append(best)
        logprobs["text_offset"].append(self._offset)
        self._offset += len(self._spans.push(token))
