"""Several engines behind one port, with real processes: the same answers, one that dies, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moiety.cli import main
from moiety.infer.options import EngineOptions
from moiety.model import checkpoint
from moiety.serve.front import Front, Life, Sums, _connected, front_app, weight_of
from moiety.serve.options import ServeOptions
from moiety.serve.server import Server, served_of
from tests.serve.conftest import NAME, client_of, eventually, opened, serving

KEY = "sesame"
POSITIONS = 2000
PATIENCE_S = 4.0  # several processes on what may be one busy core; test_server.py says within a second
LONG: dict[str, Any] = {"model": NAME, "prompt": "a", "temperature": 0, "extra_body": {"ignore_eos": True}}
PROMPTS = ["the quick", "brown fox jumps", "it was", "lazy dog; the best of times", "a"]


class Fleet:
    """The command, and what can be asked of it."""

    def __init__(self, running: subprocess.Popen[str], log: Path) -> None:
        self.running, self.log = running, log
        eventually(lambda: "Ctrl-C" in log.read_text() or running.poll() is not None, 60)
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", log.read_text())
        assert found, log.read_text()
        self.base = f"http://127.0.0.1:{found[1]}"
        self.http = httpx.Client(base_url=self.base, timeout=100, headers={"authorization": f"Bearer {KEY}"})

    def client(self, **options: Any) -> openai.OpenAI:
        given = {"api_key": KEY, "max_retries": 0, "timeout": 100} | options
        return openai.OpenAI(base_url=f"{self.base}/v1", **given)

    def processes(self) -> dict[str, int]:
        """Children by name: "front", "replica 0", ..."""
        process = self.running.pid
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        names = {}
        for child in found:
            with contextlib.suppress(OSError):
                names[Path(f"/proc/{child}/comm").read_text().strip()] = int(child)
        return names

    def metric(self, name: str) -> list[float]:
        """A metric of every replica."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        found = {
            int(sample.labels["replica"]): sample.value
            for family in families
            for sample in family.samples
            if sample.name == f"moiety:{name}" and "replica" in sample.labels
        }
        return [found.get(number, -1.0) for number in range(max(found, default=-1) + 1)]

    def await_restarts(self, count: int) -> None:
        """Until there were so many and all listen: an end is noticed a moment after it was.

        Restarts are asked for first: until they are counted, what has ended still says that it listens.
        """

        def is_back() -> bool:
            return sum(self.metric("replica_restarts_total")) == count and self.metric("replica_up") == [1, 1]

        eventually(is_back, 30)

    def health(self) -> Any:
        return self.http.get("/health").json()


@contextlib.contextmanager
def fleet_of(folder: Path, log: Path, *more: str) -> Iterator[Fleet]:
    command = [sys.executable, "-m", "moiety", "serve", str(folder), "--port", "0", *more]
    environment = os.environ | {"MOIETY_API_KEY": KEY, "OMP_NUM_THREADS": "2", "COLUMNS": "200"}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, env=environment, stderr=errors, text=True) as running,
    ):
        try:
            made = Fleet(running, log)
            with made.http:
                yield made
        finally:
            running.terminate()
            assert running.wait(30) == 0, log.read_text()
            assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    what, folder = opened(), tmp_path_factory.mktemp("model") / NAME
    checkpoint.save(what.model, folder, tokenizer=what.tokenizer)
    return folder


@pytest.fixture(scope="module")
def fleet(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    log = tmp_path_factory.mktemp("log") / "err"
    with fleet_of(folder, log, "--replicas", "2", "--max-positions", str(POSITIONS)) as made:
        yield made


@pytest.fixture(scope="module")
def alone() -> Iterator[Server]:
    """One engine with the same weights."""
    with serving(engine={"max_positions": POSITIONS}, key=KEY) as server:
        yield server


def answers(client: openai.OpenAI) -> list[str]:
    """Of everything that is the same every time: greedy, drawn with a seed, streamed, chat."""
    found = []
    for prompt in PROMPTS:
        asked: dict[str, Any] = {"model": NAME, "prompt": prompt, "max_tokens": 24}
        found.append(client.completions.create(**asked, temperature=0).choices[0].text)
        found += [one.text for one in client.completions.create(**asked, seed=7, n=2).choices]
        pieces = client.completions.create(**asked, temperature=0, stream=True)
        found.append("".join(piece.choices[0].text for piece in pieces))
        messages: Any = [{"role": "user", "content": prompt}]
        chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=16, temperature=0)
        found.append(chat.choices[0].message.content or "")
        said = client.responses.create(model=NAME, input=prompt, max_output_tokens=16, temperature=0)
        found.append(said.output_text)
    return found


# The same as one engine


def test_the_same_answers_from_every_replica(fleet: Fleet, alone: Server) -> None:
    with client_of(alone, api_key=KEY) as client:
        expected = answers(client)
    assert len(set(expected)) > len(expected) // 3
    with fleet.client() as client:
        before = fleet.metric("generation_tokens_total")
        assert answers(client) == expected
        first = fleet.metric("generation_tokens_total")
        assert first[0] > before[0] and first[1] == before[1]  # nobody else asks: the first has pages of it
        held = client.completions.create(**LONG, stream=True, max_tokens=1900)
        next(iter(held))
        assert answers(client) == expected  # by the other
        assert fleet.metric("generation_tokens_total")[1] > before[1]
        held.close()


def test_many_at_once_are_divided(fleet: Fleet) -> None:
    with fleet.client() as client:
        asked: dict[str, Any] = {"model": NAME, "max_tokens": 12, "temperature": 0}
        expected = [client.completions.create(prompt=one, **asked).choices[0].text for one in PROMPTS]
        before, found = fleet.metric("generation_tokens_total"), {}

        def ask(number: int) -> None:
            prompt = PROMPTS[number % len(PROMPTS)]
            found[number] = client.completions.create(prompt=prompt, **asked).choices[0].text

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {number: expected[number % len(PROMPTS)] for number in range(60)}
        grew = [
            after - old for after, old in zip(fleet.metric("generation_tokens_total"), before, strict=True)
        ]
        assert sum(grew) == 60 * 12 and min(grew) > 60 * 12 / 5, grew
        streams = [client.completions.create(**LONG, stream=True, max_tokens=1900) for _ in range(6)]
        for stream in streams:
            next(iter(stream))
        assert fleet.metric("num_requests_running") == [3, 3]
        assert all(3 * 1900 <= held < 3 * 2000 for held in fleet.metric("replica_outstanding_tokens"))
        for stream in streams:
            stream.close()
        eventually(lambda: fleet.metric("kv_cache_usage_perc") == [0, 0], PATIENCE_S)
        assert fleet.metric("replica_outstanding_tokens") == fleet.metric("num_requests_running") == [0, 0]


def test_a_client_that_leaves_a_plain_answer(fleet: Fleet) -> None:
    with fleet.client(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(**LONG, max_tokens=1990)
    eventually(lambda: fleet.metric("kv_cache_usage_perc") == [0, 0], PATIENCE_S)


def test_refusals_are_those_of_one_engine(fleet: Fleet, alone: Server) -> None:
    head = {"authorization": f"Bearer {KEY}"}
    short: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 2}
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/completions", {"json": {**short, "model": "other"}}),
        ("POST", "/v1/completions", {"json": {**short, "temperature": 3}}),
        ("POST", "/v1/completions", {"json": {**short, "nothing": 3}}),
        ("POST", "/v1/completions", {"json": {**short, "max_tokens": 10**9}}),
        ("POST", "/v1/completions", {"content": b"{", "headers": {"content-type": "application/json"}}),
        ("POST", "/v1/completions", {"content": b"", "headers": {"content-type": "application/json"}}),
        ("POST", "/v1/completions", {"content": b"{}", "headers": {"content-type": "text/plain"}}),
        ("POST", "/v1/completions?a=%20", {"json": {**short, "temperature": 0}}),
        ("POST", "/v1/completions", {"json": {**short, "prompt": "a" * 5 * 2**20}}),
        ("GET", "/v1/completions", {}),
        ("POST", "/v1/models", {"json": {}}),
        ("HEAD", "/v1/models", {}),
        ("GET", f"/v1/models/{NAME}", {}),
        ("GET", "/v1/models/other", {}),
        ("GET", "/nothing", {}),
        ("GET", "/version", {"headers": {"x": "y" * 20_000}}),
    ]
    with httpx.Client(base_url=f"http://127.0.0.1:{alone.port}", headers=head, timeout=100) as one:
        for method, path, more in asked:
            seen = []
            for http in (one, fleet.http):
                answer = http.request(method, path, **more)
                body = {} if method == "HEAD" else answer.json()
                body = {name: body[name] for name in body if name not in ("id", "created", "version")}
                same = ("content-type", "content-length", "allow", "retry-after")
                heads = [sorted(answer.headers.get(name, "").split(", ")) for name in same]
                seen.append((answer.status_code, body, heads))
            assert seen[0] == seen[1], (method, path)
    assert fleet.http.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 401
    assert fleet.http.post("/v1/completions", headers={"authorization": ""}, json=short).status_code == 401
    with httpx.Client(base_url=fleet.base) as stranger:
        assert stranger.get("/health").json() == {"status": "ok"}
        assert stranger.get("/metrics").status_code == stranger.get("/v1/routing").status_code == 401
    found = fleet.http.get("/openapi.json").json()
    assert found["security"] == [{"key": []}] and "/v1/completions" in found["paths"]


def test_numbers_are_of_all(fleet: Fleet) -> None:
    before = fleet.http.get("/v1/routing").json()
    with fleet.client() as client:
        held = client.completions.create(**LONG, stream=True, max_tokens=40)  # the other takes what comes now
        client.completions.create(**LONG, max_tokens=30)
        list(held)
    after = fleet.http.get("/v1/routing").json()
    tokens = after["tokens"] - before["tokens"]
    assert after["tokens"] == sum(fleet.metric("engine_computed_tokens_total")) and tokens >= 68
    assert sum(after["counts"]["1"]) == 2 * after["tokens"] and after["steps"] > before["steps"]
    assert after["layers"][0]["uniform_bits"] == 2.3219
    page = fleet.http.get("/metrics").text
    assert 'moiety:http_requests_total{route="/v1/completions",status="200"}' in page
    assert (
        'http_requests_total{replica="' not in page and page.count("# TYPE moiety:num_requests_running ") == 1
    )
    with fleet.http.stream("GET", "/dashboard/events") as events:
        line = next(one for one in events.iter_lines() if one.startswith("data:"))
        assert f'"tokens":{after["tokens"]}' in line and f'"title":"{NAME}"' in line


def test_weights_are_in_memory_once(fleet: Fleet) -> None:
    """What a replica has for itself is a small part of what it sees: it loaded nothing."""
    for name, process in fleet.processes().items():
        said = Path(f"/proc/{process}/smaps_rollup").read_text()
        own, all_kb = (
            int(re.findall(rf"^{what}:\s+(\d+)", said, re.M)[0]) for what in ("Private_Dirty", "Rss")
        )
        assert own < all_kb / 4, (name, own, all_kb)


# One that ends


def test_a_replica_that_is_killed(fleet: Fleet) -> None:
    """Its answers end with an error, the others' do not; it comes back, and that is seen."""
    lost, restarts = sum(fleet.metric("replica_lost_requests_total")), fleet.metric("replica_restarts_total")
    routed = fleet.http.get("/v1/routing").json()["tokens"]
    with fleet.client() as client:
        expected = answers(client)
        whole = client.completions.create(**LONG, max_tokens=600).choices[0].text
        streams = [client.completions.create(**LONG, stream=True, max_tokens=1900) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        spared = client.completions.create(**LONG, stream=True, max_tokens=600)  # by the first of equals
        plain: list[Any] = []

        def ask() -> None:
            try:
                plain.append(client.completions.create(**LONG, max_tokens=1990))
            except openai.APIStatusError as error:
                plain.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        eventually(lambda: fleet.metric("num_requests_running")[1] == 2)
        os.kill(fleet.processes()["replica 1"], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="has ended"):
            list(streams[1])
        thread.join(20)
        assert isinstance(plain[0], openai.InternalServerError) and plain[0].status_code == 503
        assert plain[0].code == "replica_failed" and plain[0].response.headers["retry-after"] == "1"
        assert answers(client) == expected
        assert "".join(piece.choices[0].text for piece in spared) == whole
        streams[0].close()
        fleet.await_restarts(int(sum(restarts)) + 1)
        assert fleet.health() == {"status": "ok"} and fleet.metric("replica_restarts_total") == [
            restarts[0],
            restarts[1] + 1,
        ]
        assert sum(fleet.metric("replica_lost_requests_total")) == lost + 2
        assert re.search(
            r"replica 1 \(process \d+\) ended with signal 9; it starts anew in", fleet.log.read_text()
        )
        held = client.completions.create(**LONG, stream=True, max_tokens=1900)
        next(iter(held))
        assert answers(client) == expected  # by the one that came back
        assert fleet.metric("generation_tokens_total")[1] > 100
        held.close()
    assert fleet.http.get("/v1/routing").json()["tokens"] > routed
    eventually(lambda: fleet.metric("kv_cache_usage_perc") == [0, 0], PATIENCE_S)


def test_answers_of_responses_end_in_their_own_shape(fleet: Fleet) -> None:
    restarts = int(sum(fleet.metric("replica_restarts_total")))
    with fleet.client() as client:
        stream = client.responses.create(
            model=NAME, input="a", stream=True, max_output_tokens=1900, temperature=0
        )
        assert next(iter(stream)).type == "response.created"
        os.kill(fleet.processes()["replica 0"], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="has ended"):
            list(stream)
    fleet.await_restarts(restarts + 1)


def test_none_is_left(fleet: Fleet) -> None:
    """Nobody waits for what is not there; the parent sleeps meanwhile, so that it is not there for a while."""
    restarts = int(sum(fleet.metric("replica_restarts_total")))
    fleet.running.send_signal(signal.SIGSTOP)
    try:
        for name, process in fleet.processes().items():
            if name != "front":
                os.kill(process, signal.SIGKILL)
        with fleet.client() as client, pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=NAME, prompt="a", max_tokens=2)
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "unavailable"
    finally:
        fleet.running.send_signal(signal.SIGCONT)
    fleet.await_restarts(restarts + 2)
    with fleet.client() as client:
        assert client.completions.create(model=NAME, prompt="a", max_tokens=2).choices


def test_the_front_comes_back_at_its_port(fleet: Fleet) -> None:
    os.kill(fleet.processes()["front"], signal.SIGKILL)
    with fleet.client(max_retries=2) as client:
        assert client.completions.create(model=NAME, prompt="a", max_tokens=2).choices
    eventually(lambda: fleet.health() == {"status": "ok"}, 20)
    assert "the front (process" in fleet.log.read_text()


# Its limits, and its end


def test_full_only_when_all_are_full(folder: Path, tmp_path: Path) -> None:
    """Then a server that is stopped lets answers go on, and leaves nobody behind."""
    more = ("--replicas", "2", "--max-positions", str(POSITIONS), "--max-requests", "1", "--max-queue", "1")
    more += ("--drain-s", "60")
    with fleet_of(folder, tmp_path / "err", *more) as fleet, fleet.client() as client:
        asked: dict[str, Any] = {"model": NAME, "prompt": "a", "max_tokens": 3}
        streams = [client.completions.create(**LONG, stream=True, max_tokens=1990) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        waiting = [threading.Thread(target=client.completions.create, kwargs=asked) for _ in range(2)]
        for number, thread in enumerate(waiting):
            thread.start()
            eventually(lambda number=number: sum(fleet.metric("num_requests_waiting")) == number + 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**asked)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert fleet.metric("requests_refused_total") == [1, 1]  # both were asked
        streams[1].close()
        for thread in waiting:
            thread.join(20)
        processes = fleet.processes()
        fleet.running.terminate()
        time.sleep(0.3)
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            client.completions.create(**asked)
        assert [piece.choices[0].finish_reason for piece in streams[0]][-1] == "length"
        assert fleet.running.wait(20) == 0
        assert sorted(processes) == ["front", "replica 0", "replica 1"]
        assert not any(Path(f"/proc/{one}").exists() for one in processes.values())
    assert (tmp_path / "err").read_text().endswith("stopped\n")


def test_children_end_with_their_parent(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moiety", "serve", str(folder), "--port", "0", "--replicas", "2"]
    log = tmp_path / "err"
    environment = os.environ | {"MOIETY_API_KEY": KEY, "TMPDIR": str(tmp_path)}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, env=environment, stderr=errors, text=True) as running,
    ):
        fleet = Fleet(running, log)
        processes = fleet.processes()
        assert len(processes) == 3
        fleet.http.close()
        running.kill()
    eventually(lambda: not any(Path(f"/proc/{one}").exists() for one in processes.values()), 10)


def test_what_replicas_cannot_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (("--plan",), ("--memory", "1GiB")):
        assert main(["serve", str(folder), "--port", "0", "--replicas", "2", *more]) == 2
        said = capsys.readouterr().err
        assert f"replicas is 2, with {more[0]}" in said and "--replicas 1" in said, said


# Parts


def test_health_says_who_is_down() -> None:
    served = served_of(opened(), EngineOptions(max_positions=64), ServeOptions())
    lives = [Life(process=1, is_up=1), Life(process=2, is_up=1)]
    front = Front(lives, ["/nowhere/0", "/nowhere/1"], ServeOptions())
    app, sent = front_app(served, front=front), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    def health() -> tuple[int, Any]:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/health",
            "raw_path": b"/health",
            "query_string": b"",
        }
        asyncio.run(app({**scope, "headers": [(b"host", b"localhost")]}, None, send))  # type: ignore[arg-type]
        head, body = sent[-2:]
        return head["status"], json.loads(body["body"])

    assert health() == (200, {"status": "ok"})
    lives[1].is_up = 0
    assert health() == (200, {"status": "degraded", "down": [1]})
    lives[0].is_up = 0
    assert health()[0] == 503
    lives[0].is_up = lives[1].is_up = 1
    front.drain()
    assert health()[0] == 503 and health()[1]["error"]["code"] == "unavailable"


@pytest.mark.parametrize("body", [b"{}", b" " * 2_000_000], ids=["small", "more than a socket holds"])
@pytest.mark.parametrize("is_read", [False, True], ids=["in the queue", "read"])
def test_what_cannot_have_begun_is_told_from_what_may_have(
    tmp_path: Path, is_read: bool, body: bytes
) -> None:
    """A dying process closes what it works on before the socket that it listens at: a request can come in between."""
    path, is_here = str(tmp_path / "0"), threading.Event()

    def live(listening: socket.socket) -> None:
        if is_read:
            with listening.accept()[0] as taken:
                read = bytearray()
                while not read.endswith(b"\r\n\r\n" + body):
                    read += taken.recv(65536)
        else:
            is_here.wait()
        listening.close()

    async def ask() -> Any:
        upstream = await _connected(path)
        assert upstream is not None
        asyncio.get_running_loop().call_later(0.1, is_here.set)
        try:
            return await upstream.ask("POST", b"/v1/completions", body)
        finally:
            upstream.close()

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        replica = threading.Thread(target=live, args=[listening])
        replica.start()
        if is_read:
            with pytest.raises(EOFError):
                asyncio.run(ask())
        else:
            assert asyncio.run(ask()) is None
        replica.join()


def test_the_weight_of_a_request() -> None:
    assert weight_of(b'{"prompt": "' + b"a" * 4000 + b'", "max_tokens": 50}') == 1009 + 50
    assert weight_of(b'{"max_completion_tokens" : 9, "n": 3}') == 10 + 27
    assert weight_of(b'{"prompt": "\\"max_tokens\\": 500"}') == 9 + 256
    assert weight_of(b"") == 257


def test_sums_keep_what_the_dead_counted() -> None:
    def told(first: int, second: int) -> Any:
        return {"layers": [], "counts": {"3": [first, second]}, "tokens": first + second, "steps": first}

    sums = Sums(2)
    assert sums.expert_totals() == {} and sums.computed_tokens == sums.whole["steps"] == 0
    sums.take(0, 0, told(5, 7))
    sums.take(1, 0, told(10, 0))
    sums.take(1, 0, told(20, 1))
    assert sums.expert_totals()[3].tolist() == [25, 8] and sums.whole["steps"] == 25
    sums.take(1, 1, told(1, 1))
    assert sums.expert_totals()[3].tolist() == [26, 9] and sums.computed_tokens == 35


def test_a_replica_that_says_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped takes connections and never answers."""
    monkeypatch.setattr("moiety.serve.front.TOLD_S", 0.1)
    monkeypatch.setattr("moiety.serve.front.PERIOD_S", 0.05)
    monkeypatch.setattr("moiety.serve.front.HUNG_S", 0.3)
    with subprocess.Popen(["sleep", "60"]) as hung:
        life = Life(process=hung.pid, is_up=1)

        async def watch() -> None:
            loop = asyncio.get_running_loop()
            silent = await loop.create_unix_server(asyncio.Protocol, str(tmp_path / "0"))
            front = Front([life], [str(tmp_path / "0")], ServeOptions())
            async with silent, front.watching(lambda: None):
                for _ in range(100):
                    await asyncio.sleep(0.05)
                    if hung.poll() is not None:
                        break

        asyncio.run(watch())
        assert hung.poll() == -signal.SIGKILL
