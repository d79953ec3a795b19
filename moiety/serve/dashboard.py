"""The page about routers, live: beside a server's model, or alone while a run trains.

The page itself holds nothing of the model; what it shows comes as server-sent events, under the server's key where
there is one. One task looks every two seconds, however many watch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol, final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from moiety.errors import DependencyError, MoietyError, UsageError
from moiety.observe.inspect_page import HISTORY_MAX, history_of, render
from moiety.observe.stats import RoutingHealth
from moiety.serve.answers import EventStream, event_line
from moiety.serve.refusal import Refusal, foreign_host

__all__ = ["EVENTS", "PAGE", "Counted", "Dashboard", "Source", "Totals", "show"]

PAGE, EVENTS = "/dashboard", "/dashboard/events"
PERIOD_S = 2.0
BEAT_S = 0.2  # how soon a watcher notices news and the end
MOST_WATCHERS = 8
KEPT = 16  # messages; who reads more slowly is told everything anew
STALL_S = 60.0

Message = dict[str, Any]
logger = logging.getLogger("moiety.serve")


class Source(Protocol):
    """Where the page's numbers come from; called by one task at a time."""

    def whole(self) -> Message:
        """Everything there is now, for one who begins to watch."""
        ...

    def news(self) -> Message | None:
        """What is new since the last call."""
        ...


@final
class Dashboard:
    """The page and its events.

    Args:
        source: Of the numbers.
        plain: An inspection that the page begins with; it is then in the page itself.
        ended: True once watchers must be let go.
        title: Shown until the events bring one.
        period_s: How often to look.
    """

    def __init__(
        self,
        source: Source,
        *,
        plain: Message | None = None,
        ended: Callable[[], bool],
        title: str = "moiety serve",
        period_s: float = PERIOD_S,
    ) -> None:
        self._source, self._plain, self._ended = source, plain, ended
        self._title, self._period_s = title, period_s
        self._recent: deque[tuple[int, Message]] = deque(maxlen=KEPT)
        self._number = self.watching = 0
        self._page: tuple[str, str] | None = None

    def routes(self) -> list[Route]:
        """The page and the events."""
        return [Route(PAGE, self._show), Route(EVENTS, self._watch)]

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look for news while this is open."""
        task = asyncio.create_task(self._look())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                message = self._source.news()
            except (MoietyError, OSError, ValueError, LookupError) as error:
                logger.error("the page gets no news: %s", error)
                continue
            if message is not None:
                self._number += 1
                self._recent.append((self._number, message))

    async def _show(self, request: Request) -> Response:
        if self._page is None:
            try:
                self._page = await asyncio.to_thread(render, self._plain, events=EVENTS, title=self._title)
            except DependencyError as error:
                raise Refusal(503, f"{error.message}; {error.hint}") from None
        page, policy = self._page
        headers = {
            "content-security-policy": f"{policy}; frame-ancestors 'none'",
            "cache-control": "no-store",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }
        return Response(page.encode("utf-8", errors="replace"), media_type="text/html", headers=headers)

    async def _watch(self, request: Request) -> Response:
        if self.watching >= MOST_WATCHERS:
            raise Refusal(503, f"{MOST_WATCHERS} pages watch already", code="unavailable", retry_after_s=30)
        return EventStream(self._lines(), STALL_S, done="")

    async def _lines(self) -> AsyncIterator[Iterable[str]]:
        self.watching += 1
        try:
            seen = self._number
            yield [event_line(self._source.whole())]
            while not self._ended():
                await asyncio.sleep(BEAT_S)
                if self._recent and self._recent[0][0] > seen + 1:
                    seen = self._number
                    yield [event_line(self._source.whole())]
                fresh = [event_line(message) for number, message in self._recent if number > seen]
                seen = self._number
                if fresh:
                    yield fresh
        finally:
            self.watching -= 1


class Counted(Protocol):
    """What has counted where tokens went: an engine, or the sum of several."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model."""
        ...

    def expert_totals(self) -> Mapping[int, Tensor]:
        """Of each layer the pairs of each expert since the start, (E,)."""
        ...


@final
class Totals:
    """Loads of a served model's experts since its start, and between looks.

    Args:
        engine: Of the server.
        name: What clients call the model.
        steps: How many were made.
    """

    def __init__(self, engine: Counted, name: str, steps: Callable[[], int]) -> None:
        self._engine, self._name, self._steps = engine, name, steps
        self._before: dict[int, Tensor] = {}
        self._points: list[Message] = []

    def whole(self) -> Message:
        """Loads since the start, and their history."""
        notes = [
            "Loads are of all tokens since the server started; over time, of the tokens between two looks."
        ]
        found = {"title": self._name, "notes": notes, "history": history_of(self._points)}
        return {"set": {**found, **self._now()}}

    def _now(self) -> Message:
        layers = [_layer(layer, counts_E) for layer, counts_E in self._engine.expert_totals().items()]
        return {"layers": layers, "tokens": self._engine.computed_tokens}

    def news(self) -> Message | None:
        """What was routed since the last look; None if nothing was."""
        # the engine's thread adds up in place
        totals = {layer: counts_E.clone() for layer, counts_E in self._engine.expert_totals().items()}
        between = {layer: counts_E - self._before.get(layer, 0) for layer, counts_E in totals.items()}
        if not any(int(counts_E.sum()) for counts_E in between.values()):
            return None
        self._before, begins = totals, not self._points
        found = [_health(counts_E) for counts_E in between.values()]
        step = self._steps()
        self._points += [
            {"step": step, "layer": layer, "max_vio": one.max_vio, "entropy": one.load_entropy, "dead": one.dead}
            for layer, one in zip(between, found, strict=True)
        ]  # fmt: skip
        if len(self._points) > 2 * HISTORY_MAX * len(found):  # half the steps, over the same time
            steps = sorted({point["step"] for point in self._points})[::-2]
            self._points = [point for point in self._points if point["step"] in set(steps)]
        if begins:
            return self.whole()
        values = {
            "max_vio": [one.max_vio for one in found],
            "entropy": [one.load_entropy for one in found],
            "dead": [one.dead for one in found],
        }
        return {"set": self._now(), "add": {"step": step, **values}}


def _health(counts_E: Tensor) -> RoutingHealth:
    return RoutingHealth(counts_E=counts_E.numpy(), tokens=0)


def _layer(layer: int, counts_E: Tensor) -> Message:
    """As in an inspection, of what counts can tell."""
    found = _health(counts_E)
    return {
        "layer": layer,
        "experts": len(counts_E),
        "load": [round(float(load), 3) for load in found.load_E],
        "pairs": found.pairs,
        "max_vio": found.max_vio,
        "variation": found.variation,
        "entropy": found.load_entropy,
        "router_entropy": None,
        "near_tie_rate": None,
        "dead": (counts_E == 0).nonzero()[:, 0].tolist(),
        "general": [],
        "repetition": None,
    }


# The page alone, on this machine


@final
class _Here:
    """Lets in only what names this machine: another site's page in the same browser must not read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = foreign_host(scope["headers"], "127.0.0.1") if scope["type"] == "http" else None
        await (self._app if refusal is None else refusal.response())(scope, receive, send)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal), error
    return error.response()


def show(
    source: Source, *, plain: Message | None, title: str, port: int, ready: Callable[[str, Callable[[], None]], None]
) -> None:  # fmt: skip
    """Serve the page on 127.0.0.1 until Ctrl-C.

    Args:
        source: Of the numbers.
        plain: An inspection to begin with.
        title: Shown until there is another.
        port: 0 takes a free one.
        ready: Called with the page's address, and with what ends it, once it is there.

    Raises:
        UsageError: the port is taken.
    """
    dashboard = Dashboard(source, plain=plain, ended=lambda: server.should_exit, title=title)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with dashboard.looking():
            yield

    app = Starlette(routes=dashboard.routes(), lifespan=lifespan, exception_handlers={Refusal: _refused})
    server = uvicorn.Server(
        uvicorn.Config(
            _Here(app), host="127.0.0.1", port=port, ws="none", log_level="warning", access_log=False,
            server_header=False, timeout_graceful_shutdown=2, limit_concurrency=64,
        )
    )  # fmt: skip

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.02)
        if server.started:
            address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{PAGE}"
            ready(address, lambda: setattr(server, "should_exit", True))
        await serving

    try:
        asyncio.run(run())
    except SystemExit:  # uvicorn's way to say that it could not listen
        raise UsageError(f"cannot listen on port {port}", hint="is it taken? 0 takes a free one") from None
