"""What the three ways to ask share: the served model, options, usage, and answers as one body or as a stream."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, NamedTuple, TypeVar, cast, final

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moiety.errors import MoietyError
from moiety.infer.engine import Engine, Event
from moiety.infer.options import RequestOptions, SamplingOptions
from moiety.infer.routed import RoutedExperts
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer
from moiety.serve.connection import Pipe, pipe_of
from moiety.serve.gate import Gate, Group
from moiety.serve.grammar import Grammars
from moiety.serve.metrics import Metrics
from moiety.serve.options import ServeOptions
from moiety.serve.refusal import Refusal, refusal_of
from moiety.serve.replies import Usage
from moiety.serve.requests import Drawn, Sampled
from moiety.serve.tools import CallForm, call_form

__all__ = [
    "Answers",
    "EventStream",
    "Form",
    "Served",
    "Tap",
    "call_of",
    "event_line",
    "finished",
    "form_of",
    "new_id",
    "request_options",
    "room",
    "routed",
    "usage_of",
]

JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model behind a server.

    Args:
        name: What clients call it.
        gate: Its engine.
        tokenizer: Its vocabulary.
        template: How messages are written for it; None if it was not taught to chat.
        grammars: For answers that must fit a schema.
        metrics: What is counted.
        options: Limits.
        created: When it was loaded.
    """

    name: str
    gate: Gate
    tokenizer: Tokenizer
    template: ChatTemplate | None
    grammars: Grammars
    metrics: Metrics
    options: ServeOptions
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> Engine:
        """The engine itself."""
        return self.gate.engine

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the vocabulary, and so with most models; a whole vocabulary is hashed once, not per request."""
        return f"fp_{self.tokenizer.fingerprint[:12]}"

    @property
    def names(self) -> dict[str, str]:
        """What clients may call: the model, and the model with an adapter, `model:adapter`; and whose adapter it is."""
        return {self.name: "", **{f"{self.name}:{one}": one for one in self.engine.adapters}}

    def check_name(self, model: str) -> None:
        """Refuse a request for another model."""
        if model not in self.names:
            raise Refusal(
                404,
                f"there is no model {model[:100]!r}; here is {', '.join(map(repr, self.names))}",
                param="model",
                code="model_not_found",
            )

    def encode(self, text: str, param: str, *, with_special: bool = False) -> list[int]:
        """Tokens of a text; one that cannot be short enough is not even looked at."""
        longest = self.engine.max_positions
        if len(text) > longest * self._longest_piece:
            raise Refusal(
                400,
                f"{param} has {len(text)} characters, which are more than {longest} tokens",
                param=param,
                code="context_length_exceeded",
            )
        if with_special:
            return self.tokenizer.encode_with_special(text) or [self.tokenizer.end_id]
        return self.tokenizer.encode_prompt(text)

    @functools.cached_property
    def _longest_piece(self) -> int:
        letters = max(map(len, self._special.values()), default=0)
        return max(letters, *self.tokenizer.byte_counts())

    def piece(self, token: int) -> str:
        """A token as text; a special one by its letters, a part of a character by its bytes."""
        written = self.tokenizer.bytes_of((token,))
        try:
            return written.decode() or self._special.get(token, "")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)

    @functools.cached_property
    def call_form(self) -> CallForm:
        """How the model writes calls."""
        return call_form([] if self.template is None else self.template.templates.values())

    @functools.cached_property
    def call_marks(self) -> dict[int, str]:
        """Special tokens of calls."""
        marks = self.call_form.marks
        return {token: letters for token, letters in self._special.items() if letters in marks}

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        return {token: letters for letters, token in self.tokenizer.special_ids().items()}


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


def room(served: Served, prompt: Sequence[int], asked: int | None, *params: str) -> int:
    """How many tokens an answer may have.

    Args:
        served: The model.
        prompt: Token ids.
        asked: How many are asked for; None is what there is room for.
        params: The fields of the prompt and of the number.

    Raises:
        Refusal: prompt and answer are longer than the longest sequence.
    """
    longest = served.engine.max_positions
    if len(prompt) >= longest or len(prompt) + (asked or 0) > longest:
        raise Refusal(
            400,
            f"the prompt has {len(prompt)} tokens and {asked or 'some'} are asked for; together {longest} are allowed",
            param=params[len(prompt) < longest],
            code="context_length_exceeded",
        )
    return asked or longest - len(prompt)


def request_options(
    asked: Sampled,
    *,
    most: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    number: int = 0,
    adapter: str = "",
) -> RequestOptions:
    """The engine's options for one answer.

    Args:
        asked: The request.
        most: Most tokens to draw.
        logprobs: How many best ones with each token; None gives no logarithms.
        prompt_logprobs: The same for the prompt's.
        number: Of the answer among those to one prompt: seeds are one apart.
        adapter: Who answers.

    Raises:
        Refusal: values that do not go together.
    """
    greedy = asked.temperature == 0 or asked.top_p == 0
    drawn = asked if isinstance(asked, Drawn) else Drawn.model_construct(model=asked.model)
    seed = secrets.randbits(62) if drawn.seed is None else drawn.seed
    stop = [drawn.stop] if isinstance(drawn.stop, str) else drawn.stop or []
    try:
        return RequestOptions(
            sampling=SamplingOptions(
                temperature=0.0 if greedy else _or(asked.temperature, 1.0),
                top_p=1.0 if greedy else _or(asked.top_p, 1.0),
                top_k=asked.top_k or 0,
                min_p=float(asked.min_p or 0),
                repetition_penalty=_or(asked.repetition_penalty, 1.0),
                presence_penalty=float(drawn.presence_penalty or 0),
                frequency_penalty=float(drawn.frequency_penalty or 0),
                seed=(seed + number) % 2**63,
            ),
            max_tokens=most,
            min_tokens=drawn.min_tokens or 0,
            stop=tuple(stop),
            stop_ids=tuple(drawn.stop_token_ids or ()),
            ignore_end=bool(drawn.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias={int(token): float(bias) for token, bias in (drawn.logit_bias or {}).items()},
            record_routing=bool(asked.return_routed_experts),
            salt=asked.prompt_cache_key or "",
            adapter=adapter,
        )
    except MoietyError as error:
        raise refusal_of(error) from error


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


class Answers:
    """The answers of a group as they come.

    Args:
        served: The model.
        group: The requests.
    """

    def __init__(self, served: Served, group: Group) -> None:
        self._served, self.group = served, group

    def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """The group's batches, counted."""
        return self.group.batches(self._served.metrics.count)


async def finished(answers: Answers) -> list[list[Event]]:
    """All events of every answer, once all are done."""
    found: list[list[Event]] = [[] for _ in answers.group.asks]
    async for events in answers.events():
        for index, event in events:
            found[index].append(event)
    return found


def usage_of(group: Group, *, drawn_off: int = 0) -> Usage:
    """Tokens of a group; a prompt counts once for all its answers.

    Args:
        group: Its answers are done.
        drawn_off: Tokens that were drawn and not asked for.
    """
    prompts = {id(ask.prompt): len(ask.prompt) for ask in group.asks}
    seen: dict[int, int] = {}
    for ask, handle in zip(group.asks, group.handles, strict=True):
        seen.setdefault(id(ask.prompt), min(handle.request.reused, len(ask.prompt)))
    answered = sum(handle.request.drawn for handle in group.handles) - drawn_off
    total = sum(prompts.values())
    return {
        "prompt_tokens": total,
        "completion_tokens": answered,
        "total_tokens": total + answered,
        "prompt_tokens_details": {"cached_tokens": sum(seen.values())},
    }


def routed(group: Group, index: int) -> dict[str, Any]:
    """`routed_experts` and `routing` of an answer that asked for them, else nothing."""
    record = group.handles[index].request.routed
    if not isinstance(record, RoutedExperts):
        return {}
    buffer = io.BytesIO()
    np.save(buffer, record.experts(), allow_pickle=False)
    return {
        "routed_experts": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "routing": record.summary(),
    }


def event_line(value: Any, event: str = "") -> str:
    """One event of a stream."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {JSON.encode(value)}\n\n"


class Form(NamedTuple):
    """An event of which only one string changes from token to token: what is before it, and after.

    Args:
        before: Up to the string.
        after: From behind it.
    """

    before: str
    after: str

    def filled(self, text: str) -> str:
        """The event: to the byte what `event_line` makes of the whole object."""
        return f"{self.before}{encode_basestring(text)}{self.after}"


def form_of(make: Callable[[str], str]) -> Form:
    """The form of events.

    Args:
        make: Writes one with a string that is given to it.
    """
    hole = uuid.uuid4().hex  # nothing else in the event is this
    before, found, after = make(hole).partition(f'"{hole}"')
    assert found and hole not in after, before
    return Form(before, after)


async def call_of(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What comes of some work; None, and the work is cancelled, if the client leaves before."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; a client that leaves, or reads nothing for long, ends them.

    Args:
        lines: The events; a Refusal becomes the last one.
        stall_s: How long a client may read nothing.
        done: Sent at the very end.
        tap: Events that need not go through `lines`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        lines: AsyncIterator[Iterable[str]],
        stall_s: float,
        done: str = "data: [DONE]\n\n",
        tap: Tap | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._stall_s, self._done, self._tap = lines, stall_s, done, tap

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the events."""
        pipe = pipe_of(scope)
        if pipe is not None and self._tap is not None:
            self._tap.join(pipe)
        await call_of(receive, self._write(send, pipe))

    async def _write(self, send: Send, pipe: Pipe | None) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for lines in self._lines:
                text = "".join(lines)
                async with asyncio.timeout(self._stall_s):
                    if pipe is None:
                        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                    else:
                        await pipe.freed()
                        pipe.put(text.encode())
            last = self._done
        except Refusal as refusal:
            last = event_line(refusal.body, "error" if not self._done else "") + self._done
        except TimeoutError:
            return
        finally:
            await cast(Any, self._lines).aclose()
        await send({"type": "http.response.body", "body": last.encode(), "more_body": False})


@final
class Tap:
    """Writes plain pieces of text as they come from the engine, and wakes no task for them.

    Args:
        group: One answer.
        form: Of its events that have nothing but text.
    """

    def __init__(self, group: Group, form: Form) -> None:
        self._group, self._form = group, form

    def join(self, pipe: Pipe) -> None:
        """From now on, whenever nothing else waits to be written."""
        form = self._form

        def taken(events: Sequence[Event]) -> bool:
            if events[-1].reason is not None or not pipe.is_free:
                return False
            pipe.put("".join(form.filled(event.text) for event in events if event.text).encode())
            return True

        self._group.tap = taken
