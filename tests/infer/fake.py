"""A model made of arithmetic, and a loop that drives scheduler and pages with it: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from moiety.infer.options import RequestOptions
from moiety.infer.pages import Pages
from moiety.infer.request import Request, State
from moiety.infer.scheduler import Scheduler, Slice

VOCABULARY = 7


def next_token(tokens: Sequence[int]) -> int:
    """What the fake model draws: from the last tokens alone half of the time, so that texts repeat."""
    whole = blake2b(bytes(tokens), digest_size=2).digest()
    few = blake2b(bytes(tokens[-2:]), digest_size=2).digest()
    return (few if whole[0] < 160 else whole)[1] % VOCABULARY


def alone(prompt: Sequence[int], options: RequestOptions, longest: int) -> list[int]:
    """The answer of a request that has everything to itself."""
    written = list(prompt)
    most = min(options.max_tokens, longest - len(prompt) + 1)
    while len(written) - len(prompt) < most:
        written.append(next_token(written))
        if written[-1] in options.stop_ids and len(written) - len(prompt) >= options.min_tokens:
            break
    return written[len(prompt) :]


@dataclass
class Fake:
    """Scheduler, pages, and a memory that says which token every place of every page was written with."""

    pages: Pages
    scheduler: Scheduler
    longest: int
    memory: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    computed: int = 0

    def submit(self, prompt: Sequence[int], **options: Any) -> Request:
        request = Request(len(self.requests), prompt, RequestOptions(**options), longest=self.longest)
        self.scheduler.submit(request)
        self.requests.append(request)
        return request

    def step(self, step_tokens: int) -> list[Slice]:
        """One step; every token that a slice looks at is read back from the pages."""
        slices = self.scheduler.schedule()
        self.scheduler.check()
        assert sum(len(piece.tokens) for piece in slices) <= step_tokens
        assert len({piece.request.number for piece in slices}) == len(slices)
        oldest = min((one.number for one in self.requests if one.state is not State.FINISHED), default=None)
        assert oldest is None or oldest in {piece.request.number for piece in slices}, (
            "the oldest waits in vain"
        )
        for piece in slices:
            self._write(piece)
        for piece in slices:
            appended = self._draw(piece)
            self.scheduler.commit(piece, appended)
            self.computed += len(piece.tokens)
        self.scheduler.check()
        return slices

    def _write(self, piece: Slice) -> None:
        size = self.pages.page_tokens
        for position, token in enumerate(piece.tokens, start=piece.start):
            page = piece.request.table.pages[position // size]
            self.memory[page, position % size] = (position, token)

    def _draw(self, piece: Slice) -> int:
        request, size = piece.request, self.pages.page_tokens
        stop = piece.start + len(piece.tokens)
        seen = [self.memory[request.table.pages[place // size], place % size] for place in range(stop)]
        assert seen == list(enumerate([*request.tokens, *piece.drafts][:stop])), "another request's tokens"
        if not piece.draws:
            return 0
        appended, ends = 0, request.ends
        for row in range(len(piece.drafts) + 1):
            request.ends = frozenset() if request.drawn + 1 < request.options.min_tokens else ends
            token = next_token([token for _, token in seen[: piece.start + piece.size + row]])
            request.append(token)
            request.ends = ends
            appended += 1
            if request.reason is not None or row == len(piece.drafts) or token != piece.drafts[row]:
                break
        return appended


def fake(
    count: int = 12,
    page_tokens: int = 4,
    *,
    prefix_cache: bool = True,
    step_tokens: int = 8,
    max_requests: int = 4,
    max_queue: int = 1000,
    draft: Any = None,
    longest: int | None = None,
) -> Fake:
    pages = Pages(count, page_tokens, prefix_cache=prefix_cache)
    scheduler = Scheduler(
        pages, step_tokens=step_tokens, max_requests=max_requests, max_queue=max_queue, draft=draft
    )
    return Fake(pages, scheduler, longest or count * page_tokens)
