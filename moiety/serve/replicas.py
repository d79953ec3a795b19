"""Several engines behind one port: the process that loaded the model forks them and a front, and starts what ends anew.

It makes no step and has one thread, so that it can fork at any time, and a replica that ended is back within a moment,
without reading the model again. What nobody writes to after loading, weights above all, is in memory once for all.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import final

import torch
import uvicorn

from moiety.errors import UsageError
from moiety.serve.answers import Served
from moiety.serve.front import Front, Life, front_app
from moiety.serve.server import Server, cannot_listen, check_reach

__all__ = ["divide_threads", "run_replicas"]

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0  # before a start, doubled with each that did not last
LASTED_S = 60.0
LOOK_S = 0.1
DIE_WITH_PARENT, SET_NAME = 1, 15  # PR_SET_PDEATHSIG and PR_SET_NAME of Linux
ENDS = (signal.SIGTERM, signal.SIGINT)
FRONT = -1
logger = logging.getLogger("moiety.serve")


def divide_threads(replicas: int, *, plan: bool, memory: str) -> int:
    """The threads of one replica; from now on this process has one, because threads do not come along in a fork.

    Args:
        replicas: How many.
        plan: Whether a plan is to be judged.
        memory: A budget to stream experts in.

    Raises:
        UsageError: replicas cannot have these, or this system has no replicas.
    """
    for name, given, why in (
        ("--plan", plan, "a plan is of one process"),
        ("--memory", memory, "each would read experts from the same disk, into memory of its own"),
        (sys.platform, sys.platform != "linux", "a process with a model can fork on Linux alone"),
    ):
        if given:
            raise UsageError(f"replicas is {replicas}, with {name}: {why}", hint="--replicas 1")
    threads = max(1, torch.get_num_threads() // replicas)
    torch.set_num_threads(1)
    return threads


@dataclass
class _Child:
    """A process that must go on: the front, or a replica by its number."""

    number: int
    process: BaseProcess | None = None
    begun_s: float = 0.0
    due_s: float = 0.0
    short_lives: int = 0

    @property
    def name(self) -> str:
        return "the front" if self.number == FRONT else f"replica {self.number}"


@final
class _Parent:
    """Starts the others and ends them.

    Args:
        served: The model.
        threads: Of each replica.
        key: What clients must send; empty asks for none.
        version: Of the program.
        folder: For sockets.
        ready: Called in the front, with the port, once every replica listens.
    """

    def __init__(
        self,
        served: Served,
        *,
        threads: int,
        key: str,
        version: str,
        folder: Path,
        ready: Callable[[int], None],
    ) -> None:
        self._served, self._threads, self._key, self._version = served, threads, key, version
        count = served.options.replicas
        self._paths = [str(folder / str(number)) for number in range(count)]
        self._lives, self._ready, self._context = RawArray(Life, count), ready, get_context("fork")
        self._children = [_Child(number) for number in (*range(count), FRONT)]
        options = served.options
        try:
            self._listening = uvicorn.Config(
                "", host=options.host, port=options.port, log_level="critical"
            ).bind_socket()
        except SystemExit:  # uvicorn's way to say that it could not
            raise cannot_listen(options) from None
        self._is_stopping, self._process = False, os.getpid()

    def run(self) -> None:
        """Until SIGTERM or Ctrl-C."""
        for one in ENDS:
            signal.signal(one, self._stop)
        while not self._is_stopping:
            for child in self._children:
                if child.process is None and time.monotonic() >= child.due_s:
                    self._start(child)
            connection.wait([one.process.sentinel for one in self._children if one.process], LOOK_S)
            for child in self._children:
                if child.process is not None and child.process.exitcode is not None:
                    self._ended(child, child.process.exitcode)
        # the front first: what it has begun, replicas must end
        for child in reversed(self._children):
            self._end(child)

    def _stop(self, number: int, frame: object) -> None:
        self._is_stopping = True

    def _start(self, child: _Child) -> None:
        target = self._front if child.number == FRONT else functools.partial(self._replica, child.number)
        child.process = self._context.Process(target=target, name=child.name)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # until the child has let go of our answer to them
        child.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        child.begun_s = time.monotonic()
        if child.number != FRONT:
            self._lives[child.number].process = child.process.pid or 0

    def _ended(self, child: _Child, code: int) -> None:
        """Note an end that nobody asked for, and when to start anew."""
        assert child.process is not None
        child.short_lives = 0 if time.monotonic() - child.begun_s > LASTED_S else child.short_lives + 1
        wait_s = min(FIRST_WAIT_S * 2 ** max(0, child.short_lives - 1), LONGEST_WAIT_S)
        how = f"signal {-code}" if code < 0 else f"code {code}"
        logger.error(
            "%s (process %d) ended with %s; it starts anew in %.2f s",
            child.name,
            child.process.pid,
            how,
            wait_s,
        )
        child.process.close()
        child.process, child.due_s = None, time.monotonic() + wait_s
        if child.number != FRONT:
            life = self._lives[child.number]
            life.is_up, life.process, life.restarts = 0, 0, life.restarts + 1

    def _end(self, child: _Child) -> None:
        """Let a child end; one that does not is ended."""
        if child.process is None:
            return
        child.process.terminate()
        child.process.join(self._served.options.drain_s + 5)
        if child.process.exitcode is None:
            logger.error("%s does not end: killed", child.name)
            child.process.kill()
            child.process.join()

    # In the children

    def _begun(self, name: str) -> None:
        """A child ends with its parent, and leaves Ctrl-C to it."""
        os.setsid()
        libc = ctypes.CDLL(None)
        libc.prctl(SET_NAME, name.encode())
        libc.prctl(DIE_WITH_PARENT, signal.SIGTERM)
        for one in ENDS:
            signal.signal(one, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        if os.getppid() != self._process:
            sys.exit("the parent has gone")

    def _replica(self, number: int) -> None:
        self._begun(f"replica {number}")
        self._listening.close()
        torch.set_num_threads(self._threads)
        options = (
            self._served.options
        )  # the front's door has checked what these check, and asks for numbers besides
        options = replace(options, host="127.0.0.1", connections=2 * options.connections + 16)
        served = replace(self._served, options=options)
        server = Server(served, version=self._version, path=self._paths[number])
        life = self._lives[number]

        def look() -> None:
            """Whether the engine goes on; without it the process must end, to be started anew."""
            life.is_up = served.gate.is_well
            if life.is_up:
                asyncio.get_running_loop().call_later(LOOK_S, look)
            else:
                server.stop()

        server.run(look)

    def _front(self) -> None:
        self._begun("front")
        front = Front(self._lives, self._paths, self._served.options)
        port = self._listening.getsockname()[1]
        made = functools.partial(front_app, front=front, ready=lambda: self._ready(port))
        Server(self._served, key=self._key, version=self._version, app=made, taking=front).run(
            sockets=[self._listening]
        )


def run_replicas(
    served: Served, *, threads: int, key: str, version: str, ready: Callable[[int], None]
) -> None:
    """Serve with several engines until SIGTERM or Ctrl-C.

    Args:
        served: The model; options.replicas says how many engines.
        threads: Of each; see `divide_threads`, which comes before the model is loaded.
        key: What clients must send; empty asks for none.
        version: Of the program.
        ready: Called with the port once every replica listens, in another process.

    Raises:
        UsageError: the port is taken, or others could reach it and there is no key.
    """
    check_reach(served.options.host, key)
    with tempfile.TemporaryDirectory(prefix="moiety-") as folder:  # open to its user alone
        _Parent(served, threads=threads, key=key, version=version, folder=Path(folder), ready=ready).run()
