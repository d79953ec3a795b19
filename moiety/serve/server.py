"""The server: who may ask, which function answers, and how it starts and stops."""

from __future__ import annotations

import asyncio
import gc
import hmac
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar, final

import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moiety.errors import UsageError
from moiety.infer.engine import Engine
from moiety.infer.open import Opened
from moiety.infer.options import EngineOptions
from moiety.infer.routed import load_summary
from moiety.model.adapters import activate
from moiety.model.template import ChatTemplate
from moiety.serve.answers import Served
from moiety.serve.body import parsed, read_body, validated
from moiety.serve.chat import chat
from moiety.serve.completions import complete
from moiety.serve.connection import watched
from moiety.serve.dashboard import EVENTS, PAGE, Counted, Dashboard, Totals
from moiety.serve.gate import Gate
from moiety.serve.grammar import Grammars
from moiety.serve.metrics import Metrics
from moiety.serve.openapi import description
from moiety.serve.options import KEY, ServeOptions, is_loopback
from moiety.serve.refusal import Refusal, foreign_host
from moiety.serve.replies import Model, RoutingTotals
from moiety.serve.requests import NOT_SERVED, ChatRequest, CompletionRequest, ResponsesRequest
from moiety.serve.responses import respond

__all__ = [
    "Server",
    "Taking",
    "app_of",
    "cannot_listen",
    "check_reach",
    "guarded",
    "handle_signals",
    "routing_totals",
    "served_of",
    "settle",
    "told",
]

Asked = TypeVar("Asked", bound=BaseModel)
logger = logging.getLogger("moiety.serve")


def served_of(opened: Opened, engine: EngineOptions, options: ServeOptions) -> Served:
    """A loaded model, ready to be asked.

    Raises:
        ConfigError: options that do not fit the model, or a model that cannot be batched.
    """
    activate(opened.model, "")  # clients say whose answer they want
    working = Engine(opened.model, opened.tokenizer, ends=opened.ends, options=engine)
    gate = Gate(working, queue_tokens=options.queue_tokens)
    template = opened.tokenizer.chat_template
    if template is not None:  # under a name that tells clients nothing about this machine
        template = ChatTemplate(
            template.templates, special_tokens=template.special_tokens, origin="the chat template"
        )
    return Served(
        name=options.name or opened.path.name.removesuffix(".gguf"),
        gate=gate,
        tokenizer=opened.tokenizer,
        template=template,
        grammars=Grammars(opened.tokenizer, sorted(opened.ends)),
        metrics=Metrics(gate),
        options=options,
    )


def app_of(
    served: Served, *, key: str = "", version: str = "unknown", crowd: Callable[[], int] = int
) -> ASGIApp:
    """The application.

    Args:
        served: The model.
        key: What clients must send as bearer token; empty asks for none.
        version: Of the program.
        crowd: How many connections there are.
    """

    totals = Totals(served.engine, served.name, lambda: served.engine.statistics().steps)
    dashboard = Dashboard(totals, ended=lambda: not served.gate.is_well)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        served.gate.start()
        async with dashboard.looking():
            yield
        served.gate.stop()

    routes = [
        Route("/v1/completions", _asked(served, CompletionRequest, complete), methods=["POST"]),
        Route("/v1/chat/completions", _asked(served, ChatRequest, chat), methods=["POST"]),
        Route("/v1/responses", _asked(served, ResponsesRequest, respond), methods=["POST"]),
        *told(served, version, has_key=bool(key)),
        *dashboard.routes(),
    ]
    return guarded(routes, lifespan, served, key=key, crowd=crowd)


def guarded(
    routes: Sequence[Route], lifespan: Any, served: Served, *, key: str, crowd: Callable[[], int]
) -> ASGIApp:
    """Routes behind the door, with every error in OpenAI's shape.

    Args:
        routes: What there is.
        lifespan: What goes on from start to end.
        served: The model.
        key: What clients must send as bearer token; empty asks for none.
        crowd: How many connections there are.
    """
    inner = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={Refusal: _refused, HTTPException: _not_here, Exception: _failed},
    )
    inner.router.redirect_slashes = False
    return Door(inner, served, key=key, crowd=crowd)


def _asked(
    served: Served, kind: type[Asked], answer: Callable[[Served, Asked, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        options = served.options
        body = await read_body(request, options.body_bytes, options.idle_s)
        asked = validated(kind, await parsed(body), NOT_SERVED)
        served.check_name(str(getattr(asked, "model", "")))
        return await answer(served, asked, request)

    return endpoint


def told(served: Served, version: str, *, has_key: bool) -> list[Route]:
    """What can be looked up."""
    models_of: dict[str, Model] = {
        name: {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "moiety",
            "max_model_len": served.engine.max_positions,
        }
        for name in served.names
    }
    document = description(version, has_key=has_key)

    async def health(request: Request) -> Response:
        if not served.gate.is_well:
            raise Refusal(503, "the server is not taking requests", code="unavailable", retry_after_s=5)
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [*models_of.values()]})

    async def one_model(request: Request) -> Response:
        served.check_name(request.path_params["model"])
        return JSONResponse(models_of[request.path_params["model"]])

    async def routing(request: Request) -> Response:
        return JSONResponse(routing_totals(served.engine, served.engine.statistics().steps))

    async def metrics(request: Request) -> Response:
        return Response(served.metrics.page(), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        return JSONResponse(document)

    async def told_version(request: Request) -> Response:
        return JSONResponse({"version": version})

    return [
        Route("/health", health),
        Route("/version", told_version),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", one_model),
        Route("/v1/routing", routing),
    ]


def routing_totals(counted: Counted, steps: int) -> RoutingTotals:
    """What /v1/routing tells of an engine, or of several together, after so many steps."""
    totals = counted.expert_totals()
    return {
        "layers": [{"layer": layer, **load_summary(counts_E)} for layer, counts_E in totals.items()],  # type: ignore[typeddict-item]
        "counts": {str(layer): counts_E.tolist() for layer, counts_E in totals.items()},
        "tokens": counted.computed_tokens,
        "steps": steps,
    }


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal), error
    return error.response()


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    said = {
        404: "there is nothing at this path; /openapi.json lists what there is",
        405: "this path takes another method",
    }
    return Refusal(error.status_code, said.get(error.status_code, "not possible")).response(error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return Refusal(500, "the server has a bug; its log says more").response()


@final
class Door:
    """Turns away whoever may not come in, and counts what was answered.

    Args:
        app: What is inside.
        served: The model, its limits and its metrics.
        key: What clients must send; empty asks for none.
        crowd: How many connections there are.
    """

    def __init__(self, app: ASGIApp, served: Served, *, key: str, crowd: Callable[[], int]) -> None:
        self._app, self._served, self._key, self._crowd = app, served, key.encode(), crowd
        self._paths = {"/health", "/version", "/metrics", "/openapi.json", "/v1/models", "/v1/routing"}
        self._paths |= {PAGE, EVENTS, "/v1/completions", "/v1/chat/completions", "/v1/responses"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._served.metrics.http.labels(path, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope)
        await (self._app if refusal is None else refusal.response())(scope, receive, counted)

    def _refusal(self, scope: Scope) -> Refusal | None:
        options, headers = self._served.options, scope["headers"]
        if sum(len(name) + len(value) + 4 for name, value in headers) > options.header_bytes:
            return Refusal(431, f"the headers have more than {options.header_bytes} bytes", closes=True)
        if self._crowd() > options.connections:
            return Refusal(503, "too many connections", code="unavailable", retry_after_s=1, closes=True)
        if not self._key:
            return foreign_host(headers, options.host)
        if scope["path"] not in ("/health", PAGE):  # which tell nothing of the model
            given = next((value for name, value in headers if name == b"authorization"), b"")
            kind, _, token = given.partition(b" ")
            if not hmac.compare_digest(token.strip(), self._key) or kind.lower() != b"bearer":
                return Refusal(401, "the key is missing or wrong", code="invalid_api_key")
        return None


def check_reach(host: str, key: str) -> None:
    """Refuse to let others in without a key.

    Raises:
        UsageError: others could reach this address, and there is no key.
    """
    if not key and not is_loopback(host):
        raise UsageError(
            f"host is {host}, which others can reach, and there is no key",
            hint=f"set {KEY}, or listen on 127.0.0.1 behind a proxy",
        )


class Taking(Protocol):
    """Who takes requests in: the gate of an engine here, or who hands them on."""

    @property
    def live(self) -> int:
        """Answers that are not done."""
        ...

    def drain(self) -> None:
        """Take nothing in from now on."""
        ...

    def stop(self) -> None:
        """End every answer."""
        ...


def cannot_listen(options: ServeOptions) -> UsageError:
    """The port is taken, or the address is not this machine's."""
    return UsageError(
        f"cannot listen on {options.host} port {options.port}", hint="is the port taken? try another"
    )


@final
class Server:
    """A server over one model.

    Args:
        served: The model; tests look into it.
        key: What clients must send; empty asks for none.
        version: Of the program.
        app: Makes the application.
        taking: Who takes requests in, where it is not the model's gate.
        path: Listen on a socket of the file system instead of host and port.

    Raises:
        UsageError: others could reach it, and there is no key.
    """

    def __init__(
        self,
        served: Served,
        *,
        key: str = "",
        version: str = "unknown",
        app: Callable[..., ASGIApp] = app_of,
        taking: Taking | None = None,
        path: str | None = None,
    ) -> None:
        options = served.options
        check_reach(options.host, key)
        self.served, self._taking = served, taking or served.gate
        self.inner: uvicorn.Server
        config = uvicorn.Config(
            app(served, key=key, version=version, crowd=lambda: len(self.inner.server_state.connections)),
            host=options.host,
            port=options.port,
            uds=path,
            http=watched(options.idle_s),  # type: ignore[arg-type]
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=options.idle_s,
            timeout_graceful_shutdown=options.drain_s + 2,
            h11_max_incomplete_event_size=options.header_bytes + 8192,
        )
        self.inner = uvicorn.Server(config)

    @property
    def port(self) -> int:
        """The port it listens on, once it does."""
        return int(self.inner.servers[0].sockets[0].getsockname()[1])

    def stop(self) -> None:
        """Take nothing more in, let answers go on for `drain_s`, and end; from any thread."""
        self.inner.should_exit = True

    def run(self, ready: Callable[[], None] = lambda: None, sockets: list[Any] | None = None) -> None:
        """Serve until SIGTERM, Ctrl-C or `stop`.

        Args:
            ready: Called once it listens.
            sockets: Bound ones to listen on, instead of host and port.

        Raises:
            UsageError: the port is taken.
        """
        asyncio.run(self._run(ready, sockets))

    async def _run(self, ready: Callable[[], None], sockets: list[Any] | None) -> None:
        watching = asyncio.create_task(self._watch(ready))
        try:
            await self.inner.serve(sockets)
        except SystemExit:  # uvicorn's way to say that it could not listen
            raise cannot_listen(self.served.options) from None
        finally:
            watching.cancel()

    async def _watch(self, ready: Callable[[], None]) -> None:
        """Say when it listens; when it should end, give answers their time and then end them."""
        while not self.inner.started:
            await asyncio.sleep(0.02)
        ready()
        while not self.inner.should_exit:
            await asyncio.sleep(0.05)
        self._taking.drain()
        deadline = asyncio.get_running_loop().time() + self.served.options.drain_s
        while self._taking.live and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self._taking.stop()


def settle() -> None:
    """Let the garbage collector look no more at what was loaded so far: it stays, and every stream waits for a look."""
    gc.collect()
    gc.freeze()


def handle_signals() -> None:
    """Let an end after SIGTERM or Ctrl-C be an ordinary one: uvicorn raises the signal again when it is done."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda number, frame: None)
