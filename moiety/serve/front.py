"""Before several replicas: one door, one queue of connections, and every request handed to whoever has least to do.

A replica is a whole server on a socket of the file system that only its user can open (`moiety/serve/replicas.py`). The
front checks key, Host, head and body, hands the body on, and passes back what comes. It knows no tokens: what a request
weighs is its bytes over four and the tokens that it asks for, until its answer has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import json
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, final

import h11
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from moiety.serve.answers import Served, call_of, event_line
from moiety.serve.body import read_body
from moiety.serve.connection import pipe_of
from moiety.serve.dashboard import PERIOD_S, Dashboard, Totals
from moiety.serve.options import ServeOptions
from moiety.serve.refusal import Refusal
from moiety.serve.replies import RoutingTotals
from moiety.serve.server import guarded, routing_totals, told

__all__ = ["Front", "Life", "Sums", "front_app", "weight_of"]

ASKED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
WANTED = re.compile(rb'"max_(?:completion_|output_)?tokens"\s*:\s*([0-9]{1,9})')
TIMES = re.compile(rb'"n"\s*:\s*([0-9]{1,3})')
UNSAID_TOKENS = 256  # of an answer whose request names no number
TOLD_S = 2.0  # within which a replica tells its numbers, or is left out
HUNG_S = 60.0  # a replica that tells nothing for so long is ended, and what it held with it
NOT_PASSED = (b"connection", b"transfer-encoding", b"date")
EVENTS = b"text/event-stream; charset=utf-8"
HERE = ("moiety:http_requests",)  # counted at the door, with what was refused there
logger = logging.getLogger("moiety.serve")


class Life(ctypes.Structure):
    """A replica's process, in memory that all share: its number or 0, whether it listens, how often it began anew."""

    process: int
    is_up: int
    restarts: int
    _fields_ = (("process", ctypes.c_int64), ("is_up", ctypes.c_int64), ("restarts", ctypes.c_int64))


def weight_of(body: bytes) -> int:
    """About how many tokens a request is: of its prompt, and of the answers that it asks for."""
    wanted = max((int(one) for one in WANTED.findall(body)), default=UNSAID_TOKENS)
    return 1 + len(body) // 4 + wanted * max((int(one) for one in TIMES.findall(body)), default=1)


@final
class Upstream:
    """One request to a replica, on a connection of its own: closing it is how the replica learns that nobody waits.

    Args:
        reader: From the replica.
        writer: To it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._wire = h11.Connection(h11.CLIENT)

    async def ask(self, method: str, target: bytes, body: bytes) -> h11.Response | None:
        """Send a request; the head of what comes back, or None if the replica has gone with some of it unread.

        Raises:
            EOFError: it has gone with all of it.
        """
        headers = [("host", "localhost"), ("connection", "close"), ("content-length", str(len(body)))]
        headers += [("content-type", "application/json")] if method == "POST" else []
        request = h11.Request(method=method, target=target, headers=headers)
        for event in (request, h11.Data(data=body), h11.EndOfMessage()):
            self._writer.write(self._wire.send(event) or b"")
        try:
            head = await self._next()
        except ConnectionError:  # Linux resets what was in the queue of a socket; what was read ends
            return None
        assert isinstance(head, h11.Response), head
        return head

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, in the pieces that the replica wrote.

        Raises:
            EOFError: the replica has gone.
        """
        kept = b""
        try:
            while isinstance(event := await self._next(), h11.Data):
                kept += event.data
                if event.chunk_end:
                    yield kept
                    kept = b""
        except ConnectionError as error:
            raise EOFError("the connection broke") from error
        if kept:
            yield kept

    async def _next(self) -> Any:
        try:
            while (event := self._wire.next_event()) is h11.NEED_DATA:
                self._wire.receive_data(await self._reader.read(65536))
        except h11.RemoteProtocolError as error:
            raise EOFError("the connection broke") from error
        if isinstance(event, h11.ConnectionClosed):
            raise EOFError("the replica closed the connection")
        return event

    def close(self) -> None:
        """Let go, whatever is still to come."""
        self._writer.transport.abort()


async def _connected(path: str) -> Upstream | None:
    try:
        return Upstream(*await asyncio.open_unix_connection(path))
    except OSError:
        return None


@dataclass(kw_only=True)
class Replica:
    """One of them as the front sees it.

    Args:
        number: From 0.
        path: Of its socket.
        held: Weight of the requests that it works on.
        lost: Requests that ended with it.
        live: Connections of requests for answers.
    """

    number: int
    path: str
    held: int = 0
    lost: int = 0
    live: set[Upstream] = field(default_factory=set)

    @asynccontextmanager
    async def asked(
        self, method: str, target: bytes, body: bytes = b"", weight: int = 0
    ) -> AsyncIterator[tuple[h11.Response, Upstream] | None]:
        """The answer to a request, from its head on; None if the replica cannot have begun it.

        Raises:
            EOFError: it ended, and may have begun.
        """
        self.held += weight
        try:
            found = await _connected(self.path)
            if found is None:
                yield None
                return
            if weight:
                self.live.add(found)
            try:
                head = await found.ask(method, target, body)
                yield None if head is None else (head, found)
            finally:
                self.live.discard(found)
                found.close()
        finally:
            self.held -= weight

    async def get(self, path: str) -> bytes | None:
        """What it tells; None if it does not, or not in time."""
        with contextlib.suppress(TimeoutError, EOFError):
            async with asyncio.timeout(TOLD_S), self.asked("GET", path.encode()) as found:
                if found is not None and found[0].status_code == 200:
                    return b"".join([piece async for piece in found[1].pieces()])
        return None


@final
class Sums:
    """Where the tokens of all replicas went, of those that have ended too.

    Args:
        replicas: How many.
    """

    def __init__(self, replicas: int) -> None:
        nothing: RoutingTotals = {"layers": [], "counts": {}, "tokens": 0, "steps": 0}
        self._past, self._now = nothing, [(0, nothing)] * replicas

    def take(self, number: int, start: int, found: RoutingTotals) -> None:
        """What a replica told after it was started anew so many times."""
        before, told = self._now[number]
        if before != start:
            self._past = _added(self._past, told)
        self._now[number] = start, found

    @property
    def whole(self) -> RoutingTotals:
        """All counts; `layers` is left to whoever shows them."""
        return functools.reduce(_added, [told for _, told in self._now], self._past)

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the models."""
        return self.whole["tokens"]

    def expert_totals(self) -> dict[int, Tensor]:
        """Of each layer the pairs of each expert, (E,)."""
        return {int(layer): torch.tensor(counts) for layer, counts in self.whole["counts"].items()}


def _added(one: RoutingTotals, other: RoutingTotals) -> RoutingTotals:
    counts = dict(one["counts"])
    for layer, added in other["counts"].items():
        counts[layer] = [a + b for a, b in zip(added, counts.get(layer, [0] * len(added)), strict=True)]
    tokens, steps = one["tokens"] + other["tokens"], one["steps"] + other["steps"]
    return {"layers": [], "counts": counts, "tokens": tokens, "steps": steps}


@final
class Front:
    """Hands requests on.

    Args:
        lives: What is known of the replicas' processes.
        paths: Where each listens.
        options: Limits.
    """

    def __init__(
        self, lives: Sequence[Life] | ctypes.Array[Life], paths: Sequence[str], options: ServeOptions
    ) -> None:
        self.replicas = [Replica(number=number, path=path) for number, path in enumerate(paths)]
        self.lives, self.options, self.sums = lives, options, Sums(len(paths))
        self.is_draining = self._is_stopping = False

    @property
    def live(self) -> int:
        """Requests that are not answered."""
        return sum(len(one.live) for one in self.replicas)

    def drain(self) -> None:
        """Take nothing in from now on."""
        self.is_draining = True

    def stop(self) -> None:
        """End every answer."""
        self.drain()
        self._is_stopping = True
        for one in self.replicas:
            for connection in list(one.live):
                connection.close()

    def least(self, tried: set[int]) -> Replica | None:
        """The replica that has least to do, of those that listen and were not tried; of equals the first, whose pages
        are the likeliest to have a prompt's beginning."""
        others = [one for one in self.replicas if one.number not in tried and self.lives[one.number].is_up]
        return min(others, key=lambda one: one.held, default=None)

    def gone(self, replica: Replica) -> Refusal:
        """What a client is told whose answer ended with the connection to a replica."""
        if self._is_stopping:
            return Refusal(503, "the server is stopping", code="unavailable", retry_after_s=5)
        replica.lost += 1
        said = "the process that worked on this has ended; it is not tried again elsewhere, because it may be why"
        return Refusal(503, said, code="replica_failed", retry_after_s=1)

    async def look(self, one: Replica) -> bool:
        """Ask a replica where its tokens went; True if it told."""
        start = self.lives[one.number].restarts
        found = await one.get("/v1/routing")
        if found is not None:
            self.sums.take(one.number, start, json.loads(found))
        return found is not None

    @asynccontextmanager
    async def watching(self, ready: Callable[[], None]) -> AsyncIterator[None]:
        """Look after every replica while this is open.

        Args:
            ready: Called once all of them listen.
        """
        tasks = [asyncio.create_task(self._watch(one)) for one in self.replicas]
        tasks.append(asyncio.create_task(self._wait(ready)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self, ready: Callable[[], None]) -> None:
        while not all(self.lives[one.number].is_up for one in self.replicas):
            await asyncio.sleep(0.02)
        ready()

    async def _watch(self, one: Replica) -> None:
        heard_s = time.monotonic()
        while True:
            await asyncio.sleep(PERIOD_S)
            if not self.lives[one.number].is_up or await self.look(one):
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > HUNG_S:
                process = self.lives[one.number].process
                logger.error(
                    "replica %d (process %d) says nothing for %.0f s: ended", one.number, process, HUNG_S
                )
                os.kill(process, signal.SIGKILL)
                heard_s = time.monotonic()


@final
class Relayed(Response):
    """The answer of a replica.

    Args:
        front: Who chooses it.
        body: Of the request.
    """

    def __init__(self, front: Front, body: bytes) -> None:
        super().__init__()
        self._front, self._body, self._weight = front, body, weight_of(body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and what comes back."""
        await call_of(receive, self._relay(scope, send))

    async def _relay(self, scope: Scope, send: Send) -> None:
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        tried: set[int] = set()
        while (replica := self._front.least(tried)) is not None:
            tried.add(replica.number)
            try:
                async with replica.asked(scope["method"], target, self._body, self._weight) as found:
                    if found is None or (found[0].status_code == 429 and self._front.least(tried)):
                        continue  # it has not begun
                    head, upstream = found
                    headers = [pair for pair in head.headers if pair[0] not in NOT_PASSED]
                    if (b"content-type", EVENTS) in headers:
                        return await self._stream(replica, upstream, headers, scope, send)
                    body = b"".join([piece async for piece in upstream.pieces()])
            except EOFError:
                raise self._front.gone(replica) from None
            await send({"type": "http.response.start", "status": head.status_code, "headers": headers})
            return await send({"type": "http.response.body", "body": body})
        raise Refusal(503, "no replica is up", code="unavailable", retry_after_s=1)

    async def _stream(
        self, replica: Replica, upstream: Upstream, headers: Any, scope: Scope, send: Send
    ) -> None:
        pipe, last = pipe_of(scope), b""
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for piece in upstream.pieces():
                async with asyncio.timeout(self._front.options.stall_s):
                    if pipe is None:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                    else:
                        await pipe.freed()
                        pipe.put(piece)
        except TimeoutError:
            return
        except EOFError:
            body, is_named = self._front.gone(replica).body, scope["path"] == "/v1/responses"
            last = (event_line(body, "error") if is_named else event_line(body) + "data: [DONE]\n\n").encode()
        await send({"type": "http.response.body", "body": last})


@final
class _Pages(Collector):
    """Metrics that were collected already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        yield from self._families


def _page(front: Front, served: Served, pages: Mapping[int, bytes]) -> bytes:
    """What Prometheus reads: every series of every replica, labelled with its number, and what the front counts."""
    found: dict[str, Metric] = {}
    for number, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            if family.name.startswith(HERE):
                continue
            into = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for one in family.samples:
                into.add_sample(one.name, {"replica": str(number), **one.labels}, one.value)
    for name, help, values in (
        ("up", "1 while it listens.", [one.is_up for one in front.lives]),
        ("outstanding_tokens", "About what it has to do.", [one.held for one in front.replicas]),
        ("restarts", "Starts after the first.", [one.restarts for one in front.lives]),
        ("lost_requests", "Requests that ended with it.", [one.lost for one in front.replicas]),
    ):
        kind = CounterMetricFamily if name in ("restarts", "lost_requests") else GaugeMetricFamily
        family = kind(f"moiety:replica_{name}", help, labels=["replica"])
        for number, value in enumerate(values):
            family.add_metric([str(number)], value)
        found[name] = family
    registry = CollectorRegistry()
    registry.register(_Pages([*found.values(), *served.metrics.http.collect()]))
    return generate_latest(registry)


def front_app(
    served: Served,
    *,
    key: str = "",
    version: str = "unknown",
    crowd: Callable[[], int] = int,
    front: Front,
    ready: Callable[[], None] = lambda: None,
) -> ASGIApp:
    """The application before replicas: what `app_of` makes for one engine.

    Args:
        served: The model, for its name and limits; its own engine makes no step.
        key: What clients must send as bearer token; empty asks for none.
        version: Of the program.
        crowd: How many connections there are.
        front: Hands requests on.
        ready: Called once every replica listens.
    """
    sums, options = front.sums, served.options
    dashboard = Dashboard(
        Totals(sums, served.name, lambda: sums.whole["steps"]), ended=lambda: front.is_draining
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with front.watching(ready), dashboard.looking():
            yield

    async def asked(request: Request) -> Response:
        body = await read_body(request, options.body_bytes, options.idle_s)
        if front.is_draining:
            raise Refusal(503, "the server is not taking requests", code="unavailable", retry_after_s=5)
        return Relayed(front, body)

    async def health(request: Request) -> Response:
        down = [one.number for one in front.replicas if not front.lives[one.number].is_up]
        if front.is_draining or len(down) == len(front.replicas):
            raise Refusal(503, "the server is not taking requests", code="unavailable", retry_after_s=5)
        return JSONResponse({"status": "degraded", "down": down} if down else {"status": "ok"})

    async def metrics(request: Request) -> Response:
        pages = await asyncio.gather(*(one.get("/metrics") for one in front.replicas))
        told = {number: page for number, page in enumerate(pages) if page is not None}
        return Response(_page(front, served, told), media_type="text/plain; version=0.0.4")

    async def routing(request: Request) -> Response:
        await asyncio.gather(*(front.look(one) for one in front.replicas))
        return JSONResponse(routing_totals(sums, sums.whole["steps"]))

    own = [Route("/health", health), Route("/metrics", metrics), Route("/v1/routing", routing)]
    routes = [*own, *told(served, version, has_key=bool(key)), *dashboard.routes()]
    routes += [Route(path, asked, methods=["POST"]) for path in ASKED]
    return guarded(routes, lifespan, served, key=key, crowd=crowd)
