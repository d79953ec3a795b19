"""Who may ask, what can be looked up, who waits, who leaves, and how it ends."""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from moiety.errors import ConfigError, UsageError
from moiety.infer.engine import Engine
from moiety.model import checkpoint
from moiety.plan.profile import read_history, write_profile
from moiety.quant.quantize import policy_named, quantize
from moiety.serve.gate import _told
from moiety.serve.options import ServeOptions, is_loopback
from moiety.serve.server import Server
from tests.infer.test_streaming import with_slots
from tests.plan.profiles import made
from tests.serve.conftest import NAME, client_of, eventually, opened, serving

LONG: dict[str, Any] = {"model": NAME, "prompt": "a", "temperature": 0, "extra_body": {"ignore_eos": True}}
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", f"/v1/models/{NAME}")
ROUTES += ("/v1/routing", "/metrics", "/version", "/openapi.json", "/dashboard/events")


def http_of(server: Server, **more: Any) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=30, **more)


# The door


def test_every_route_wants_the_key() -> None:
    with serving(key="sesame") as server, http_of(server) as http:
        assert http.get("/health").status_code == http.get("/dashboard").status_code == 200
        paths = [
            *ROUTES,
            "/",
            "/nothing",
            "/health/",
            "//health",
            "/HEALTH",
            "/health/../v1/models",
            "/v1/models/",
        ]
        for path in paths:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
                for given in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Bearer sesame2"}):
                    answer = http.request(method, path, headers=given)
                    assert answer.status_code == 401, (method, path, given)
        for given in ("sesame", "Basic sesame", "Bearer", "Bearer x", "Bearer s\u00e9same"):
            raw = [(b"authorization", given.encode("latin-1"))]
            assert http.get("/v1/models", headers=raw).status_code == 401, given
        for given in ("Bearer sesame", "bearer sesame"):
            assert http.get("/v1/models", headers={"authorization": given}).status_code == 200
        assert http.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        with client_of(server, api_key="sesame") as client:
            assert client.models.retrieve(NAME).id == NAME
        with client_of(server, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_only_this_machine_without_a_key(server: Server) -> None:
    with pytest.raises(UsageError, match="no key"), serving(host="0.0.0.0"):
        pass
    with http_of(server) as http:
        for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", "[::1]:80", "127.8.8.8"):
            assert http.get("/version", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "10.0.0.1"):
            answer = http.get("/version", headers={"host": host})
            assert answer.status_code in (400, 403), host
    assert server.inner.servers[0].sockets[0].getsockname()[0] == "127.0.0.1"
    assert is_loopback("127.0.0.1") and not is_loopback("0.0.0.0") and not is_loopback("example.org")


def test_options_have_limits() -> None:
    for wrong in ({"port": 70_000}, {"port": -1}, {"host": ""}, {"drain_s": 0}, {"queue_tokens": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ServeOptions(**wrong)  # type: ignore[arg-type]


def test_a_taken_port_is_an_error(server: Server) -> None:
    with pytest.raises(UsageError, match="cannot listen"):
        Server(_on(server.port)).run()


def _on(port: int) -> Any:
    from moiety.infer.options import EngineOptions
    from moiety.serve.server import served_of

    return served_of(opened(), EngineOptions(max_positions=64), ServeOptions(port=port))


def test_nothing_leaves_the_machine() -> None:
    package = Path(__file__).resolve().parents[2] / "moiety" / "serve"
    banned = re.compile(
        r"^\s*(?:import|from) (?:socket|urllib|http|httpx\w*|requests|aiohttp|subprocess|shutil|ftplib)\b|"
        r"\bopen\(|\.read_text\(|\.read_bytes\(|\.write_(?:text|bytes|atomically)\b",
        re.M,
    )
    asking = re.compile(
        r"moiety\.serve\.(client|load)\b"
    )  # for our own commands: the server has no part of it
    sources = {path.name: path.read_text("utf-8") for path in sorted(package.glob("*.py"))}
    assert banned.search(sources.pop("client.py")) and asking.search(sources.pop("load.py"))
    for name, text in sources.items():
        found = [one for one in banned.findall(text) if "opened(" not in one]
        assert not found and not asking.search(text), (name, found)


# What can be looked up


def test_looking_things_up(server: Server) -> None:
    with http_of(server) as http:
        assert http.get("/health").json() == {"status": "ok"} and http.get("/version").json() == {
            "version": "1.2.3"
        }
        (model,) = http.get("/v1/models").json()["data"]
        assert model["id"] == NAME and model["max_model_len"] == 256 and model["object"] == "model"
        assert http.get("/v1/models/other").status_code == 404 and http.get("/nothing").status_code == 404
        for path, method in (("/v1/models", "POST"), ("/v1/completions", "GET"), ("/health", "DELETE")):
            answer = http.request(method, path)
            assert answer.status_code == 405 and "allow" in answer.headers and answer.json()["error"]
        assert "uvicorn" not in str(http.get("/health").headers)


def test_the_description_is_true(server: Server) -> None:
    with http_of(server) as http:
        found = http.get("/openapi.json").json()
        assert (
            set(ROUTES) - {f"/v1/models/{NAME}", "/dashboard/events"} < set(found["paths"])
            and "/health" in found["paths"]
        )
        names = set(re.findall(r'"#/components/schemas/([^"]+)"', http.get("/openapi.json").text))
        assert names <= set(found["components"]["schemas"]) and len(names) > 20
        for path, methods in found["paths"].items():
            for method in methods:
                answer = http.request(method.upper(), path.replace("{model}", NAME), json={})
                assert answer.status_code not in (404, 405), path
                assert str(answer.status_code) in methods[method]["responses"]
        asked = found["components"]["schemas"]["CompletionRequest"]
        assert asked["additionalProperties"] is False and set(asked["required"]) == {"model", "prompt"}
        assert asked["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
        assert "security" not in found
    with serving(key="k") as other, http_of(other, headers={"authorization": "Bearer k"}) as http:
        assert http.get("/openapi.json").json()["security"] == [{"key": []}]


def test_metrics_count(server: Server) -> None:
    def read() -> dict[tuple[str, ...], float]:
        with http_of(server) as http:
            families = text_string_to_metric_families(http.get("/metrics").text)
            return {
                (sample.name, *sample.labels.values()): sample.value
                for family in families
                for sample in family.samples
            }

    before = read()
    with client_of(server) as client:
        client.completions.create(
            model=NAME, prompt=[5] * 9, max_tokens=7, n=2, extra_body={"ignore_eos": True}
        )
    after = read()

    def grew(*key: str) -> float:
        return after[key] - before.get(key, 0)

    assert grew("moiety:generation_tokens_total") == 14 and grew("moiety:prompt_tokens_total") == 18
    assert grew("moiety:request_success_total", "length") == 2
    assert grew("moiety:time_to_first_token_seconds_count") == 2
    assert grew("moiety:inter_token_latency_seconds_count") == 12
    assert grew("moiety:http_requests_total", "/v1/completions", "200") == 1
    computed = grew("moiety:engine_computed_tokens_total")
    pairs = sum(grew("moiety:expert_tokens_total", str(expert), "0") for expert in range(5))
    assert pairs == 2 * computed > 0
    assert after["moiety:num_requests_running",] == 0 and after["moiety:kv_cache_usage_perc",] == 0
    with http_of(server) as http:
        totals = http.get("/v1/routing").json()
    assert [layer["layer"] for layer in totals["layers"]] == [0, 1]
    assert sum(totals["counts"]["1"]) == 2 * after["moiety:engine_computed_tokens_total",]


def test_experts_from_disk_are_counted(tmp_path: Path) -> None:
    what = opened()
    quantize(what.model, policy_named("int4"))
    checkpoint.save(what.model, tmp_path / NAME)
    asked: dict[str, Any] = {"model": NAME, "prompt": "the quick", "max_tokens": 9, "temperature": 0}
    with serving(what) as server, client_of(server) as client:
        whole = client.completions.create(**asked).choices[0].text
    streamed = what._replace(model=with_slots(tmp_path / NAME, 6))
    with serving(streamed) as server, client_of(server) as client, http_of(server) as http:
        answer = client.completions.create(**asked, extra_body={"return_routed_experts": True}).choices[0]
        store = server.served.engine.statistics().experts
        assert store is not None and answer.text == whole
        found = answer.model_dump()["routing"]
        assert found["expert_hits"] + found["expert_misses"] == store.hits + store.misses > 0
        page = http.get("/metrics").text
        assert f"moiety:expert_cache_misses_total {float(store.misses)}" in page and store.read_bytes > 0
        assert f"moiety:expert_cache_slots {float(store.slots)}" in page


# Who waits, who leaves


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_gives_pages_back(stream: bool) -> None:
    with serving(engine={"max_positions": 2000}) as server, client_of(server, timeout=0.4) as client:
        engine = server.served.engine
        if stream:
            answer = client.completions.create(**LONG, stream=True, max_tokens=1990)
            next(iter(answer))
            assert engine.statistics().pages_used > 0 and server.served.gate.live == 1
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**LONG, max_tokens=1990)
        eventually(lambda: engine.statistics().finished["cancelled"] == 1, 1.0)
        assert engine.statistics().pages_used == 0 and server.served.gate.live == 0
        engine.check()


def test_a_storm_of_cancelled_streams_leaves_nothing(server: Server) -> None:
    engine, gate = server.served.engine, server.served.gate
    with client_of(server) as client:
        asked: dict[str, Any] = {"model": NAME, "prompt": "the quick brown", "temperature": 0}
        before = client.completions.create(**asked, max_tokens=9).choices[0].text
        threads = [threading.Thread(target=_leave, args=(server, number)) for number in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: gate.live == 0 and engine.statistics().pages_used == 0, 1.0)
        engine.check()
        assert client.completions.create(**asked, max_tokens=9).choices[0].text == before


def _leave(server: Server, number: int) -> None:
    with client_of(server) as client:
        stream = client.completions.create(**LONG, stream=True, max_tokens=240, n=1 + number % 3)
        for _ in range(number % 7):
            next(iter(stream))
        stream.close()


def test_too_many_are_told_when_to_come_again() -> None:
    engine = {"max_positions": 2000, "max_requests": 1, "max_queue": 1}
    with serving(engine=engine) as server, client_of(server) as client, http_of(server) as http:
        streams = [client.completions.create(**LONG, stream=True, max_tokens=1990) for _ in range(1)]
        next(iter(streams[0]))
        waiting = threading.Thread(target=lambda: _quietly(client))
        waiting.start()
        eventually(lambda: server.served.engine.statistics().waiting == 1)
        answer = http.post("/v1/completions", json={"model": NAME, "prompt": "a"})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=NAME, prompt="a")
        streams[0].close()
        waiting.join(20)
        assert http.post("/v1/completions", json={"model": NAME, "prompt": "a"}).status_code == 200


def _quietly(client: openai.OpenAI) -> None:
    client.completions.create(**LONG, max_tokens=5)


def test_the_queue_has_a_budget_of_tokens() -> None:
    engine = {"max_positions": 400, "max_requests": 1, "step_tokens": 1}
    with (
        serving(engine=engine, queue_tokens=300) as server,
        http_of(server) as http,
        client_of(server) as client,
    ):
        holding = client.completions.create(**LONG, stream=True, max_tokens=390)
        next(iter(holding))
        results: list[int] = []

        def ask(tokens: int) -> None:
            body = {"model": NAME, "prompt": [7] * tokens, "max_tokens": 1}
            results.append(http.post("/v1/completions", json=body).status_code)

        first = threading.Thread(target=ask, args=(200,))
        first.start()
        eventually(lambda: server.served.engine.statistics().waiting == 1)
        ask(101)
        assert results == [429]
        second = threading.Thread(target=ask, args=(100,))
        second.start()
        eventually(lambda: server.served.engine.statistics().waiting == 2)
        holding.close()
        first.join(20)
        second.join(20)
        assert sorted(results) == [200, 200, 429]


def test_a_step_that_fails_ends_its_answers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server, client_of(server) as client, http_of(server) as http:
        engine = server.served.engine
        run = engine.runner.run

        def broken(slices: Any) -> Any:
            raise RuntimeError("/secret/path is broken")

        assert _told("expert 3 of /secret/path is torn\nhint: /secret") == "the answer could not be computed"

        monkeypatch.setattr(engine.runner, "run", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=NAME, prompt="a")
        assert "secret" not in str(caught.value.response.text) and caught.value.status_code == 500
        with pytest.raises(openai.APIError, match="step failed"):
            list(client.completions.create(model=NAME, prompt="a", stream=True))
        events = list(client.responses.create(model=NAME, input="a", stream=True))
        assert events[-1].type == "response.failed" and "step failed" in events[-1].response.error.message
        monkeypatch.setattr(engine.runner, "run", run)
        assert client.completions.create(model=NAME, prompt="a").choices
        assert http.get("/health").status_code == 200
        engine.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server, http_of(server) as http:

        def broken(self: Engine) -> Any:
            raise AssertionError("a bug")

        monkeypatch.setattr(Engine, "_step", broken)
        answer = http.post("/v1/completions", json={"model": NAME, "prompt": "a"})
        assert answer.status_code == 503 and "failed" in answer.json()["error"]["message"]
        assert http.get("/health").status_code == 503
        assert http.post("/v1/completions", json={"model": NAME, "prompt": "a"}).status_code == 503


def test_logits_that_are_not_numbers_are_an_error() -> None:
    what = opened()
    with torch.no_grad():
        what.model.embed.weight[7] = float("nan")
    with serving(what) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError, match="not finite"):
            client.completions.create(model=NAME, prompt=[7, 8], max_tokens=3)
        asked = {"prompt": [8, 9], "max_tokens": 3, "temperature": 0}  # drawn at random, token 7 may come
        assert client.completions.create(model=NAME, **asked).choices[0].finish_reason


def test_readers_that_stall_are_cut_off() -> None:
    with serving(engine={"max_positions": 1500}, stall_s=1) as server, client_of(server) as client:
        body = (
            b'{"model": "tiny-moe", "prompt": "a", "stream": true, "max_tokens": 1400, "n": 8, "ignore_eos": true, '
            b'"logprobs": 20, "temperature": 0}'
        )
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.connect(("127.0.0.1", server.port))
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            eventually(lambda: server.served.gate.live == 8)
            assert client.completions.create(model=NAME, prompt="a", max_tokens=3).choices
            eventually(lambda: server.served.gate.live == 0, 60)
            eventually(lambda: not server.inner.server_state.tasks, 5)


# How it ends


def test_answers_go_on_while_it_drains() -> None:
    with serving(drain_s=5) as server, client_of(server) as client, http_of(server) as http:
        http.get("/health")  # a connection that stays
        stream = client.completions.create(**LONG, stream=True, max_tokens=200)
        next(iter(stream))
        server.stop()
        texts = [chunk.choices[0].finish_reason for chunk in stream]
        assert texts[-1] == "length"


def test_answers_that_take_too_long_end_with_an_error() -> None:
    with serving(engine={"max_positions": 2000}, drain_s=1) as server, client_of(server) as client:
        slow = server.served.engine.runner
        run = slow.run
        slow.run = lambda slices: (time.sleep(0.01), run(slices))[1]  # type: ignore[method-assign]
        stream = client.completions.create(**LONG, stream=True, max_tokens=1990)
        next(iter(stream))
        begun_s = time.monotonic()
        server.stop()
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        assert 0.5 < time.monotonic() - begun_s < 4


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_command(tmp_path: Path, how: signal.Signals) -> None:
    what = opened()
    folder = tmp_path / NAME
    checkpoint.save(what.model, folder, tokenizer=what.tokenizer)
    command = [sys.executable, "-m", "moiety", "serve", str(folder), "--port", "0", "--max-positions", "128"]
    environment = os.environ | {"MOIETY_API_KEY": "sesame", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        line = running.stderr.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert port and "sesame" not in line, line
        base = f"http://127.0.0.1:{port[1]}/v1"
        with openai.OpenAI(base_url=base, api_key="sesame", max_retries=0) as client:
            assert client.completions.create(model=NAME, prompt="the", max_tokens=3).usage
        running.send_signal(how)
        assert running.wait(20) == 0
        assert "Traceback" not in running.stderr.read()


def test_a_plan_is_said_before_and_judged_after(tmp_path: Path) -> None:
    """Everything that serving measured, and that it is kept; a server that was asked nothing says so."""
    what = opened()
    folder, place = tmp_path / NAME, tmp_path / "cache" / "moiety"
    checkpoint.save(what.model, folder, tokenizer=what.tokenizer)
    profile = place / f"profile-{platform.node() or 'here'}.json"
    write_profile(made(), profile)
    command = [sys.executable, "-m", "moiety", "serve", str(folder), "--port", "0", "--plan"]
    command += ["--max-positions", "128", "--max-requests", "4", "--no-prefix-cache"]
    environment = os.environ | {"XDG_CACHE_HOME": str(place.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "500"}
    for asked, how in ((3, signal.SIGTERM), (0, signal.SIGINT)):
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
            assert running.stderr is not None
            said = running.stderr.readline()
            for name in ("decode, batch 1 ", "decode, batch 4 ", "prefill 128 ", "memory "):
                assert f"{name}" in said and said.startswith("the plan: "), said
            port = re.search(r":(\d+)/v1", running.stderr.readline())
            assert port
            base = f"http://127.0.0.1:{port[1]}/v1"
            with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
                for _ in range(asked):
                    made_of = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
                    client.completions.create(
                        model=NAME,
                        prompt=made_of,
                        max_tokens=12,
                        temperature=0,
                        extra_body={"ignore_eos": True},
                    )
            running.send_signal(how)
            said = running.stderr.read()
            assert running.wait(20) == 0 and "Traceback" not in said, said
        assert "against the plan: memory " in said
        verdicts = {one["what"]: one for one in read_history(profile)[-1]["verdicts"]}
        if asked:
            assert set(verdicts) == {"memory", "decode, batch 1", "prefill 10"}
            assert "of 36 steps 36 did one thing: 32 steps drew for 1 at 16 tokens each; prompts" in said, (
                said
            )
            assert all(one["measured"] > 0 for one in verdicts.values())
        else:
            assert set(verdicts) == {"memory"} and "no second prompt of a length" in said
            assert "of 0 steps 0 did one thing: no number of sequences drew alone in 8 steps" in said
    assert len(read_history(profile)) == 2
