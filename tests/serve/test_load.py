"""Very many at once: answers are those of a request alone, who leaves gives back all, who dawdles holds up nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest

from moiety.serve.server import Server
from tests.serve.conftest import NAME, eventually, serving

PROMPTS = [[5 + number % 90, 11, 7 + number % 3] for number in range(24)]
JSON = {"content-type": "application/json"}


def body_of(number: int, **more: Any) -> dict[str, Any]:
    asked = {"model": NAME, "prompt": PROMPTS[number % len(PROMPTS)], "temperature": 0, "ignore_eos": True}
    return asked | {"max_tokens": 4 + number % 9} | more


def text_in(stream: str) -> str:
    """The text of a whole stream, which must end as one should."""
    lines = [line for line in stream.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def answers_alone(server: Server) -> list[str]:
    """What each request gets when there is no other."""
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
        answers = [http.post("/v1/completions", json=body_of(number)).json() for number in range(72)]
    return [answer["choices"][0]["text"] for answer in answers]


def flood(server: Server, alone: list[str], count: int, at_once: int) -> Counter[int]:
    """So many requests, so many of them at a time: their statuses; what is answered is what one alone would get."""
    base = f"http://127.0.0.1:{server.port}"
    seen: Counter[int] = Counter()
    numbers = iter(range(count))

    async def work(http: httpx.AsyncClient) -> None:
        for number in numbers:
            asked = body_of(number, stream=number % 2 == 1)
            answer = await http.post("/v1/completions", json=asked)
            seen[answer.status_code] += 1
            if answer.status_code == 200:
                whole = answer.text if number % 2 else answer.json()["choices"][0]["text"]
                assert (text_in(whole) if number % 2 else whole) == alone[number % len(alone)], number
            else:
                assert answer.status_code in (429, 503) and int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["message"]
                await asyncio.sleep(0.25)

    async def run() -> None:
        limits = httpx.Limits(max_connections=at_once)
        async with httpx.AsyncClient(base_url=base, timeout=300, limits=limits) as http:
            await asyncio.gather(*(work(http) for _ in range(at_once)))

    asyncio.run(run())
    return seen


def leave(server: Server, count: int) -> None:
    """Begin so many streams, and leave each at some moment."""
    numbers, lock = iter(range(count)), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            chance = random.Random(number)
            asked = body_of(number, stream=True, max_tokens=200, n=1 + number % 3)
            with contextlib.suppress(ConnectionError), asking(server, asked) as one:
                for _ in range(chance.randrange(6)):
                    one.recv(chance.randrange(1, 900))

    threads = [threading.Thread(target=work) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def asking(
    server: Server, body: dict[str, Any], cut: int = 0, buffer_bytes: int = 0
) -> Iterator[socket.socket]:
    """A connection that has sent a request, without its last so many bytes."""
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
    whole = head.encode() + b"Content-Type: application/json\r\n\r\n" + raw
    with socket.socket() as one:
        if buffer_bytes:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        one.connect(("127.0.0.1", server.port))
        one.sendall(whole[: len(whole) - cut])
        yield one


def check_empty(server: Server, within_s: float = 1.0) -> None:
    """Nothing is being answered, and no page is held."""
    eventually(lambda: server.served.gate.live == 0, within_s)
    eventually(lambda: server.served.engine.statistics().pages_used == 0, within_s)
    server.served.engine.check()


def test_two_hundred_at_once() -> None:
    with serving(engine={"max_queue": 400}) as server:
        alone = answers_alone(server)
        assert flood(server, alone, 200, 200) == {200: 200}
    with serving(engine={"max_queue": 60}) as server:
        seen = flood(server, alone, 200, 200)
        check_empty(server)
    assert seen.total() == 200 and 60 <= seen[200] < 200 and seen[429] == 200 - seen[200], seen


@pytest.mark.slow
@pytest.mark.timeout_s(1800)
def test_twenty_thousand() -> None:
    with serving(engine={"max_queue": 180}) as server:
        seen = flood(server, answers_alone(server), 20_000, 200)
        check_empty(server)
    print(seen)
    assert seen.total() == 20_000 and set(seen) <= {200, 429, 503} and seen[200] > 10_000, seen


@pytest.mark.parametrize(
    "count", [100, pytest.param(5_000, marks=[pytest.mark.slow, pytest.mark.timeout_s(900)])]
)
def test_streams_that_are_left(count: int) -> None:
    with serving() as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
            before = http.post("/v1/completions", json=body_of(3)).json()["choices"]
            leave(server, count)
            check_empty(server, 2.0)
            assert http.post("/v1/completions", json=body_of(3)).json()["choices"] == before
        assert server.served.engine.statistics().finished["cancelled"] > count // 2


def latencies_s(server: Server, count: int) -> list[float]:
    """How long each of some requests takes, one after the other."""
    found = []
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
        for number in range(count):
            begun_s = time.perf_counter()
            assert http.post("/v1/completions", json=body_of(number, max_tokens=8)).status_code == 200
            found.append(time.perf_counter() - begun_s)
    return found


@pytest.mark.slow
@pytest.mark.timeout_s(600)
def test_who_dawdles_holds_up_nobody() -> None:
    """Slow readers whose answers are done for the engine but not taken, and senders of half a request."""
    with serving(engine={"max_positions": 2000}, idle_s=300, stall_s=300) as server:
        quiet: list[float] = []
        dawdled: list[float] = []
        latencies_s(server, 30)
        for _ in range(2):
            quiet += latencies_s(server, 150)
            with contextlib.ExitStack() as held:
                for number in range(100):
                    held.enter_context(asking(server, body_of(number), cut=1 + number))
                asked = body_of(0, stream=True, max_tokens=800, logprobs=20, n=8)
                for _ in range(4):
                    held.enter_context(asking(server, asked, buffer_bytes=1024))
                eventually(lambda: server.served.gate.live == 32, 30)
                # first the answers are worked out, and until then others share the engine with them
                eventually(lambda: server.served.engine.statistics().running == 0, 300)
                dawdled += latencies_s(server, 150)
                assert server.served.gate.live == 32
            eventually(lambda: server.served.gate.live == 0, 30)
        p95s = [statistics.quantiles(times, n=20)[-1] for times in (quiet, dawdled)]
        print(f"p95 {1e3 * p95s[0]:.1f} ms alone, {1e3 * p95s[1]:.1f} ms beside slow ones")
        assert p95s[1] < 2 * p95s[0], p95s
        check_empty(server)
