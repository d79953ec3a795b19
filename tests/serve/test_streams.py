"""The short way of a stream's text to its connection: the same bytes in the same order as the long way."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import random
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from moiety.infer.engine import Event
from moiety.infer.options import RequestOptions
from moiety.serve.answers import event_line, form_of
from moiety.serve.connection import Pipe
from moiety.serve.gate import Ask, Group
from moiety.serve.metrics import FAST_S, _Between
from moiety.serve.server import Server
from tests.serve.conftest import NAME

ASKED = {"model": NAME, "prompt": [7, 8, 9], "max_tokens": 40, "temperature": 0, "ignore_eos": True}


@given(st.text(), st.text())
def test_a_filled_form_is_the_whole_event(name: str, text: str) -> None:
    def line(text: str) -> str:
        return event_line({"model": name, "choices": [{"text": text, "index": 0}], "usage": None})

    assert form_of(line).filled(text) == line(text)
    assert json.loads(line(text).removeprefix("data: "))["choices"][0]["text"] == text


def streamed(server: Server, path: str, version: str, **more: Any) -> tuple[list[dict[str, Any]], bytes]:
    """Events of a stream and its head, asked for with a version of HTTP."""
    body = json.dumps(more | {"stream": True}).encode()
    lines = [
        f"POST {path} {version}",
        "Host: localhost",
        "Content-Type: application/json",
        "Connection: close",
    ]
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        one.settimeout(20)
        answer = http.client.HTTPResponse(one)
        answer.begin()
        raw, is_chunked = answer.read(), answer.getheader("Transfer-Encoding") == "chunked"
    assert answer.status == 200 and is_chunked is (version == "HTTP/1.1")
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and len(events) > 20
    found = [json.loads(one.removeprefix("data: ")) for one in events[:-2]]
    return [{**one, "id": "", "created": 0} for one in found], raw


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_both_ways_write_the_same(server: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = dict(ASKED)
    if path.endswith("chat/completions"):
        more["messages"] = [{"role": "user", "content": "hello"}]
        del more["prompt"]
    puts: list[bytes] = []
    put = Pipe.put
    monkeypatch.setattr(Pipe, "put", lambda pipe, piece: (puts.append(piece), put(pipe, piece))[1])
    short, raw = streamed(server, path, "HTTP/1.1", **more)
    assert b"".join(puts) in raw and len(puts) > 20
    monkeypatch.setattr(Pipe, "is_free", False)
    queued, _ = streamed(server, path, "HTTP/1.1", **more)
    old, _ = streamed(server, path, "HTTP/1.0", **more)
    assert short == queued == old


def events_of(count: int) -> list[Event]:
    return [
        Event(number=1, token=place, text=str(place), reason="length" if place == count - 1 else None)
        for place in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_events_stay_in_order(seed: int) -> None:
    chance, written, counted = random.Random(seed), list[str](), list[int]()

    def tap(events: Any) -> bool:
        if events[-1].reason is not None or chance.random() < 0.3:
            return False
        written.extend(event.text for event in events)
        return True

    async def write(group: Group) -> None:
        async for batch in group.batches(lambda group, index: counted.append(index)):
            if chance.random() < 0.5:
                await asyncio.sleep(0)  # a client that reads slowly: what comes meanwhile must wait
            written.extend(event.text for _, event in batch)

    async def run() -> None:
        ended: list[Group] = []
        group = Group([Ask(prompt=[1], options=RequestOptions())], ended.append, in_pieces=True)
        group.tap = tap
        writing = asyncio.create_task(write(group))
        events = events_of(200)
        while events:
            size = chance.randrange(1, 4)
            group.put(0, events[:size])
            del events[:size]
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        await writing
        assert ended == [group] and counted == [0]

    asyncio.run(run())
    assert written == [str(place) for place in range(200)]


def test_whole_answers_wake_once() -> None:
    async def run() -> list[int]:
        group = Group([Ask(prompt=[1], options=RequestOptions())], lambda group: None, in_pieces=False)
        woken = [group.put(0, [event]) for event in events_of(9)]
        assert woken == [True] * 8 + [False]
        return [len(batch) async for batch in group.batches(lambda group, index: None)]

    assert asyncio.run(run()) == [9]


def test_gaps_are_counted_as_prometheus_counts() -> None:
    chance, registry, own = random.Random(1), CollectorRegistry(), CollectorRegistry()
    true = Histogram(
        "moiety:inter_token_latency_seconds", "From one token to the next.", buckets=FAST_S, registry=registry
    )
    between = _Between()
    own.register(between)
    between.add([])
    for _ in range(3):
        gaps = [*chance.choices(FAST_S, k=5), *(chance.expovariate(9) for _ in range(50)), 11.0, 0.0]
        times = [0.0]
        for gap in gaps:
            times.append(times[-1] + gap)
        between.add(times)
        for early, late in itertools.pairwise(times):
            true.observe(late - early)

    def figures(registry: CollectorRegistry) -> dict[str, float]:
        lines = [line for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    found, wanted = figures(own), figures(registry)
    wanted = {name: value for name, value in wanted.items() if not name.endswith("_created")}
    assert found.keys() == wanted.keys() and len(found) == len(FAST_S) + 3
    assert found == pytest.approx(wanted)
