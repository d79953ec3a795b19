"""Connections: those that send no whole request for some time are closed, and streams are written without detours."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any, final

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Pipe", "pipe_of", "watched"]

CONNECTION = "moiety.connection"  # of a request's state: a weak reference to what reads and writes it


def watched(idle_s: float) -> Callable[..., H11Protocol]:
    """Makes connections that are closed when they send no whole request for some time.

    Nothing here keeps a connection that was closed: there may be thousands within that time.
    """

    def made(**given: Any) -> H11Protocol:
        made = H11Protocol(**given)
        loop, found = asyncio.get_running_loop(), weakref.ref(made)
        made.app_state = {**made.app_state, CONNECTION: found}

        def look(seen: Callable[[], object]) -> None:
            protocol = found()
            if protocol is None or protocol.transport.is_closing():
                return
            idle = protocol.conn.their_state is h11.IDLE and protocol.conn.our_state is h11.IDLE
            if idle and seen() is protocol.cycle:
                protocol.transport.close()
                return
            cycle: Any = protocol.cycle  # None before the first request, which its type leaves out
            loop.call_later(
                idle_s, look, (_nothing if cycle is None else weakref.ref(cycle)) if idle else object
            )

        loop.call_later(idle_s, look, _nothing)
        return made

    return made


def _nothing() -> None:
    """What a connection has answered that was asked nothing."""


@final
class Pipe:
    """The way of a stream's pieces straight to a connection: a server writes thousands of them in a second.

    Each becomes a chunk of HTTP/1.1. h11, which reads requests and writes all else, keeps no account of chunks.

    Args:
        protocol: Of the connection.
    """

    def __init__(self, protocol: H11Protocol) -> None:
        self._transport, self._flow = protocol.transport, protocol.flow

    @property
    def is_free(self) -> bool:
        """False while the client does not read what is written, and when it has gone."""
        return not (self._flow.write_paused or self._transport.is_closing())

    async def freed(self) -> None:
        """Wait until the client reads."""
        if self._flow.write_paused:
            await self._flow.drain()

    def put(self, piece: bytes) -> None:
        """Write a piece, or nothing if it is empty: an empty chunk would be the last."""
        if piece and not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def pipe_of(scope: Scope) -> Pipe | None:
    """The pipe of a request whose answer is in chunks; None for a client of HTTP/1.0, and under another server."""
    protocol = scope.get("state", {}).get(CONNECTION, _nothing)()
    return None if protocol is None or scope["http_version"] != "1.1" else Pipe(protocol)
