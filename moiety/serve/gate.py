"""Between event loop and engine: one thread makes steps, requests come in under a budget, events go out in batches.

All of `Gate` but `_work` runs in the event loop's thread; nothing there waits for a step. A step's events cross over in
one call, so a step with 32 tokens wakes the loop once, and the next step waits a moment until they are written.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import operator
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from moiety.errors import MoietyError
from moiety.infer.engine import Engine, Event, Handle
from moiety.infer.options import RequestOptions
from moiety.infer.request import Constraint
from moiety.serve.refusal import Refusal, refusal_of

__all__ = ["Ask", "Gate", "Group"]

LONGEST_RETRY_S = 60
LONGEST_WRITE_S = 0.01  # two threads of Python at once take longer than one after the other
QUEUED_SEQUENCES = 16  # of the longest there can be: what may wait when nothing else is said
FAILURES = (MoietyError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)
NUMBER = operator.attrgetter("number")
logger = logging.getLogger("moiety.serve")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One answer that is wanted.

    Args:
        prompt: Token ids.
        options: How to answer.
        constraint: What the answer may be.
        shown: Special tokens whose letters belong to its text.
    """

    prompt: Sequence[int]
    options: RequestOptions
    constraint: Constraint | None = None
    shown: Mapping[int, str] | None = None


@final
class Group:
    """The answers to one HTTP request.

    Args:
        asks: What is wanted.
        ended: Called when nobody waits for the answers any more.
        in_pieces: Wake whoever waits with every token, and not with whole answers alone.
    """

    def __init__(self, asks: Sequence[Ask], ended: Callable[[Group], None], *, in_pieces: bool) -> None:
        self.asks, self.handles = asks, list[Handle]()
        self._ended, self._in_pieces = ended, in_pieces
        self.tap: Callable[[Sequence[Event]], bool] | None = (
            None  # writes events of a single answer, if it can
        )
        self.begun_s = time.perf_counter()
        self._left = len(asks)
        self._events: list[tuple[int, Event]] = []
        self._ready = asyncio.Event()
        self._is_written = False  # all events so far, and whoever writes them waits for more
        self._failure: Refusal | None = None

    @property
    def waiting_tokens(self) -> int:
        """Tokens of prompts that have no answer yet."""
        return sum(
            len(ask.prompt) for ask, handle in zip(self.asks, self.handles, strict=False) if not handle.events
        )

    def put(self, index: int, events: Sequence[Event]) -> bool:
        """Take events of an answer; True if that was all, False if somebody was woken who has yet to run."""
        if self._is_written and self.tap is not None and self.tap(events):
            return True
        self._events += [(index, event) for event in events]
        if not self._in_pieces and events[-1].reason is None:
            return True
        self._is_written = False
        self._ready.set()
        return False

    def fail(self, failure: Refusal) -> None:
        """End all answers with an error."""
        self._failure = failure
        self._ready.set()

    async def batches(self, done: Callable[[Group, int], object]) -> AsyncIterator[list[tuple[int, Event]]]:
        """Events as they come, with the number of their answer; leaving the loop cancels what is not done.

        Args:
            done: Called with the number of every answer that ended without an error.

        Raises:
            Refusal: an answer ended with an error, or the server ends.
        """
        try:
            while self._left:
                self._is_written = not self._events
                await self._ready.wait()
                self._ready.clear()
                events, self._events = self._events, []
                for index, event in events:
                    if event.reason is None:
                        continue
                    if event.reason == "error":
                        logger.error("an answer ended with an error: %s", event.error)
                        raise Refusal(500, _told(event.error))
                    self._left -= 1
                    done(self, index)
                if self._failure is not None and self._left:
                    raise self._failure
                yield events
        finally:
            self._ended(self)


def _told(error: str) -> str:
    """What a client is told of an error: its first line, unless that may name a file."""
    first = error.partition("\n")[0]
    return "the answer could not be computed" if "/" in first or "\\" in first else first


@final
class Gate:
    """Takes requests in, and brings their events to whoever waits for them.

    Args:
        engine: Nobody else may step it.
        queue_tokens: Most prompt tokens that wait; 0 is 16 times the longest sequence.
    """

    def __init__(self, engine: Engine, *, queue_tokens: int = 0) -> None:
        self.engine = engine
        self.queue_tokens = queue_tokens or QUEUED_SEQUENCES * engine.max_positions
        self.refused = 0
        self._groups: dict[int, tuple[Group, int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fresh: deque[Event] = deque()  # the engine's thread puts them in and takes them out
        self._stopping = threading.Event()
        self._written = threading.Event()
        self._is_draining = False
        self._tokens_per_s = 0.0
        self._thread: threading.Thread | None = None  # a fork would end one that is made before it

    @property
    def is_well(self) -> bool:
        """True if requests can be answered."""
        return self._thread is not None and self._thread.is_alive() and not self._is_draining

    @property
    def live(self) -> int:
        """Answers that are not done."""
        return len(self._groups)

    def start(self) -> None:
        """Begin to make steps; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="moiety-engine", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Take nothing in from now on."""
        self._is_draining = True

    def stop(self) -> None:
        """End every answer, and the thread after its step."""
        self.drain()
        self._stopping.set()
        self._fail_all("the server is stopping")

    def submit(self, asks: Sequence[Ask], *, in_pieces: bool) -> Group:
        """Take in the answers that one request wants: all of them, or none.

        Args:
            asks: The answers.
            in_pieces: They are wanted token by token.

        Raises:
            Refusal: 429 or 503 if there is no room now, 400 if there never will be.
        """
        if not self.is_well:
            self.refused += 1
            raise Refusal(503, "the server is not taking requests", code="unavailable", retry_after_s=5)
        waiting = sum(group.waiting_tokens for group in {group for group, _ in self._groups.values()})
        coming = sum(len(ask.prompt) for ask in asks)
        if waiting and waiting + coming > self.queue_tokens:
            self.refused += 1
            raise Refusal(
                429,
                f"{waiting} tokens of prompts are waiting; with these {coming} there would be more than "
                f"{self.queue_tokens}",
                code="queue_full",
                retry_after_s=self._retry_s(waiting),
            )
        group = Group(asks, self._forget, in_pieces=in_pieces)
        try:
            for index, ask in enumerate(asks):
                handle = self.engine.submit(
                    ask.prompt,
                    ask.options,
                    listener=self._fresh.append,
                    constraint=ask.constraint,
                    shown=ask.shown,
                )
                group.handles.append(handle)
                self._groups[handle.number] = (group, index)
        except MoietyError as error:
            self._forget(group)
            refusal = refusal_of(error, retry_after_s=self._retry_s(waiting))
            if refusal.status != 429:
                raise refusal_of(error) from error
            self.refused += 1
            raise refusal from error
        return group

    def _retry_s(self, waiting: int) -> int:
        """About when the prompts that wait will have been worked on."""
        seconds = waiting / self._tokens_per_s if self._tokens_per_s else 1.0
        return min(max(1, math.ceil(seconds)), LONGEST_RETRY_S)

    def _forget(self, group: Group) -> None:
        """Let go of a group's answers; those that are not done are cancelled and give their pages back."""
        for handle in group.handles:
            self._groups.pop(handle.number, None)
            if not handle.is_done:
                self.engine.cancel(handle.number)

    def _fail_all(self, why: str) -> None:
        for group in {group for group, _ in self._groups.values()}:
            group.fail(Refusal(503, why, code="unavailable", retry_after_s=5))

    def _deliver(self, events: Sequence[Event]) -> None:
        assert self._loop is not None
        woken = False
        for number, some in itertools.groupby(events, NUMBER):
            found = self._groups.get(number)
            if found is not None:
                woken |= not found[0].put(found[1], [*some])
        if woken:
            self._loop.call_soon(self._written.set)  # behind those that were woken just now
        else:
            self._written.set()

    def _work(self) -> None:
        """The engine's thread."""
        assert self._loop is not None
        try:
            while not self._stopping.is_set():
                if not self.engine.wait(0.2):
                    continue
                begun_s, before = time.perf_counter(), self.engine.computed_tokens
                try:
                    self.engine.step()
                except FAILURES:  # the step's requests have ended with an error, and the next ones need not
                    logger.exception("a step failed")
                spent_s = max(time.perf_counter() - begun_s, 1e-6)
                rate = (self.engine.computed_tokens - before) / spent_s
                self._tokens_per_s += 0.1 * (rate - self._tokens_per_s)
                events = [self._fresh.popleft() for _ in range(len(self._fresh))]
                self._written.clear()
                self._loop.call_soon_threadsafe(self._deliver, events)
                self._written.wait(LONGEST_WRITE_S)
        finally:
            if not self._stopping.is_set():  # something that only a bug can cause: nobody may wait for ever
                self.drain()
                self._loop.call_soon_threadsafe(self._fail_all, "the engine has failed")
