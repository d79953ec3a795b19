"""Who goes through the model in the next step. No torch: requests, pages and counts.

Every step has room for `step_tokens` tokens. Requests that draw a token come first, one token each; prompts are
worked on in pieces with what is left, the oldest first; then the oldest waiting one is let in, if the pages hold all
its tokens and one more page for each request that runs; guesses get what remains. When pages run out the youngest
gives all of its back, keeps its tokens, and waits in front. Nobody overtakes: every running request is older
than every waiting one, and the oldest of all takes at least one token in every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from moiety.errors import BusyError, UsageError
from moiety.infer.drafts import NGrams
from moiety.infer.pages import Pages
from moiety.infer.request import Reason, Request, State

__all__ = ["Draft", "Scheduler", "Slice"]

Draft = Callable[[NGrams, Sequence[int], int, int, int], list[int]]


class Slice(NamedTuple):
    """Part of a step: tokens of one request from `start` on, then guesses of what comes after all of its tokens."""

    request: Request
    start: int
    size: int
    drafts: list[int]

    @property
    def tokens(self) -> list[int]:
        """What goes through the model."""
        return [*self.request.tokens[self.start : self.start + self.size], *self.drafts]

    @property
    def draws(self) -> bool:
        """True if it reaches the end of what is written, so that tokens are drawn after it."""
        return self.start + self.size == len(self.request.tokens)


@final
class Scheduler:
    """Requests that wait and requests that run, the oldest first in both.

    Args:
        pages: What they share.
        step_tokens: Most tokens in a step.
        max_requests: Most that run.
        max_queue: Most that wait.
        draft: Guesses tokens: (n-grams of the text, the text, most, sequences that draw, tokens so far).
    """

    def __init__(
        self, pages: Pages, *, step_tokens: int, max_requests: int, max_queue: int, draft: Draft | None = None
    ) -> None:
        assert step_tokens >= max_requests > 0, (step_tokens, max_requests)
        self.pages, self._step_tokens, self._max_requests = pages, step_tokens, max_requests
        self._max_queue, self._draft = max_queue, draft
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0

    def refuse(self, request: Request, coming: int = 0) -> None:
        """Raise unless this request can be taken in.

        Args:
            request: A new one.
            coming: Requests that were promised a place in the queue and are not in it yet.

        Raises:
            UsageError: the pages can never hold it.
            BusyError: too many wait.
        """
        needed, waiting = self.pages.needed(request.longest), len(self.waiting) + coming
        if needed > self.pages.count:
            size = self.pages.page_tokens
            raise UsageError(
                f"{len(request.prompt)} tokens of prompt and {request.most} to draw need {needed} pages of {size} "
                f"tokens, and there are {self.pages.count}",
                hint="ask for fewer tokens, or give the engine more kv_bytes",
            )
        if waiting >= self._max_queue:
            raise BusyError(
                f"{waiting} requests are waiting, and at most {self._max_queue} may", hint="try again later"
            )

    def submit(self, request: Request) -> None:
        """Put a new request behind all others; raises like `refuse`."""
        self.refuse(request)
        self.waiting.append(request)

    def schedule(self) -> list[Slice]:
        """What the next step computes; empty when nothing is to be done. `commit` each slice afterwards."""
        left = self._step_tokens - sum(1 for request in self.running if _missing(request) == 1)
        slices: list[Slice] = []
        for request in list(self.running):
            if request.state is not State.RUNNING:
                continue  # an older one took its pages in this very loop
            count = 1 if _missing(request) == 1 else min(_missing(request), left)
            if count and self._make_room(request, request.computed + count):
                slices.append(Slice(request, request.computed, count, []))
                left -= 0 if _missing(request) == 1 else count
        while left and self.waiting and self._admit(self.waiting[0]):
            request = self.waiting.popleft()
            count = min(_missing(request), left)
            slices.append(Slice(request, request.computed, count, []))
            left -= count
        return slices if self._draft is None else self._with_drafts(slices, left, self._draft)

    def _admit(self, request: Request) -> bool:
        """Give the oldest waiting request pages for all its tokens, if that leaves one for each that runs."""
        if len(self.running) >= self._max_requests:
            return False
        reused = self.pages.reuse(request.table, request.tokens[: request.reusable])
        if any(self._computes(other, request) for other in self.running):
            self.pages.release(request.table)
            return False
        missing = self.pages.needed(len(request.tokens)) - len(request.table.pages)
        if self.pages.available - missing < len(self.running):
            self.pages.release(request.table)
            return False
        assert self.pages.extend(request.table, len(request.tokens)), (missing, self.pages.available)
        request.computed, request.state = reused, State.RUNNING
        request.reused += reused
        self.running.append(request)
        return True

    def _computes(self, other: Request, request: Request) -> bool:
        """True if the page that a new request lacks is in another one's prompt and will soon be there."""
        wanted = self.pages.next_key(request.table, request.tokens, request.reusable - 1)
        return wanted is not None and wanted == self.pages.next_key(
            other.table, other.prompt, len(other.prompt)
        )

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Pages for so many tokens of a running request, the youngest's if need be; False if that was itself."""
        while not self.pages.extend(request.table, tokens):
            victim = self.running.pop()
            assert self.running, (victim.number, "it is alone and was let in, so its pages are there")
            self.pages.release(victim.table)
            victim.computed, victim.state = 0, State.PREEMPTED
            victim.preemptions += 1
            self.preemptions += 1
            self.waiting.appendleft(victim)
            if victim is request:
                return False
        return True

    def _with_drafts(self, slices: list[Slice], left: int, draft: Draft) -> list[Slice]:
        """The slices with guesses where they draw, as long as tokens and pages are left over."""
        sequences, tokens = sum(piece.draws for piece in slices), sum(piece.size for piece in slices)
        guessed = []
        for piece in slices:
            request = piece.request
            room = min(left, request.most - request.drawn - 1)
            if piece.draws and piece.size == 1 and room > 0 and request.guesses:
                request.ngrams = request.ngrams or NGrams()
                drafts = draft(request.ngrams, request.tokens, room, sequences, tokens)
                if drafts and not self.pages.extend(request.table, len(request.tokens) + len(drafts)):
                    held = len(request.table.pages) * self.pages.page_tokens
                    drafts = drafts[: held - len(request.tokens)]
                guessed.append(piece._replace(drafts=drafts))
                left, tokens = left - len(drafts), tokens + len(drafts)
                request.drafted += len(drafts)
            else:
                guessed.append(piece)
        return guessed

    def commit(self, piece: Slice, appended: int) -> None:
        """A slice was computed and is sound; `appended` tokens, the last of them not computed, now follow it."""
        request, right = piece.request, max(appended - 1, 0)
        request.computed = piece.start + piece.size + right
        request.accepted += right
        self.pages.publish(request.table, request.tokens, request.computed)
        if request.reason is not None:
            self.finish(request, request.reason)

    def finish(self, request: Request, reason: Reason, error: str = "") -> None:
        """End a request in any state and take its pages back."""
        if request.state is State.FINISHED:
            return
        if request.state is State.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pages.release(request.table)
        request.state, request.reason, request.error = State.FINISHED, reason, error

    def check(self) -> None:
        """Assert that nothing leaks and nobody overtakes."""
        self.pages.check([request.table for request in self.running])
        numbers = [request.number for request in [*self.running, *self.waiting]]
        assert numbers == sorted(numbers), (numbers, "the older come first")
        assert all(request.state is State.RUNNING for request in self.running), self.running
        assert all(not request.table.pages for request in self.waiting), self.waiting
        assert len(self.running) <= self._max_requests, len(self.running)


def _missing(request: Request) -> int:
    """Tokens that are written and not computed."""
    return len(request.tokens) - request.computed
