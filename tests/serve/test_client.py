"""Our client against our server, and against servers that refuse, lie, break off and say nothing."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moiety.cli import main
from moiety.errors import ConfigError, ServerError, UsageError
from moiety.infer.options import BenchOptions, SamplingOptions
from moiety.serve.client import Client, RemoteConversation, RemoteOptions, reach, text_of
from moiety.serve.load import run
from moiety.serve.server import Server
from tests.serve.conftest import NAME, client_of, serving

Reply = Callable[[http.server.BaseHTTPRequestHandler], None]
GREEDY = SamplingOptions(temperature=0.0)


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@contextlib.contextmanager
def pretending(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers everything with `reply`; its address, and the bodies that it got."""
    bodies: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            bodies[-1]["key"] = self.headers.get("authorization")
            reply(self)

        def do_GET(self) -> None:
            reply(self)

        def log_message(self, *given: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def answering(status: int, body: bytes, kind: str = "application/json", **headers: str) -> Reply:
    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-type", kind)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def stream(*events: str) -> Reply:
    body = "".join(f"{event}\r\n\r\n" for event in events).encode()
    return answering(200, body, "text/event-stream; charset=utf-8")


def texts(at: str, route: str = "/completions", **body: Any) -> list[str]:
    return [text_of(piece) for piece in Client(RemoteOptions(url=at)).stream(route, body)]


def test_a_conversation_is_that_of_the_real_client(server: Server) -> None:
    client, model = reach(RemoteOptions(url=url(server)))
    assert model == NAME
    conversation = RemoteConversation(client, model, system="be", max_tokens=12, sampling=GREEDY)
    answers = ["".join(conversation.answer(line)) for line in ("the fox", "and then")]
    with client_of(server) as real:
        messages: list[Any] = [{"role": "system", "content": "be"}]
        for line, mine in zip(("the fox", "and then"), answers, strict=True):
            messages.append({"role": "user", "content": line})
            true = real.chat.completions.create(
                model=NAME, messages=messages, temperature=0, max_tokens=12, seed=0
            )
            assert mine == (true.choices[0].message.content or "")
            messages.append({"role": "assistant", "content": mine})


def test_the_oldest_is_forgotten_when_there_is_no_room(server: Server) -> None:
    client, model = reach(RemoteOptions(url=url(server) + "/v1/"))
    conversation = RemoteConversation(client, model, system="", max_tokens=20, sampling=GREEDY)
    line = "it was the best of times; the quick brown fox jumps over the lazy dog " * 2
    for _ in range(6):
        list(conversation.answer(line))
    assert 0 < len(conversation._turns) < 12
    with pytest.raises(ServerError, match="tokens") as refused:
        list(conversation.answer(line * 20))
    assert refused.value.code == "context_length_exceeded" and conversation._turns == []


def test_what_openai_does_not_know_is_sent_where_it_matters() -> None:
    answer = 'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}'
    with pretending(stream(answer, "data: [DONE]")) as (at, bodies):
        client = Client(RemoteOptions(url=at), "secret")
        for sampling in (SamplingOptions(), SamplingOptions(top_k=3, min_p=0.1)):
            conversation = RemoteConversation(client, "m", system="", max_tokens=5, sampling=sampling)
            assert list(conversation.answer("x")) == ["a"]
    assert bodies[0]["key"] == "Bearer secret" and bodies[0]["stream"] is True
    assert not {"top_k", "min_p", "repetition_penalty"} & bodies[0].keys() and bodies[0]["temperature"] == 0.8
    assert bodies[1]["top_k"] == 3 and bodies[1]["min_p"] == 0.1 and "repetition_penalty" not in bodies[1]


def test_a_key_is_asked_for_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(key="sesame") as guarded:
        with pytest.raises(ServerError) as refused:
            reach(RemoteOptions(url=url(guarded)))
        assert refused.value.kind == "401" and "MOIETY_API_KEY" in (refused.value.hint or "")
        assert reach(RemoteOptions(url=url(guarded), api_key="sesame"))[1] == NAME
        monkeypatch.setenv("MOIETY_API_KEY", "sesame")
        assert reach(RemoteOptions(url=url(guarded)))[1] == NAME


@pytest.mark.parametrize(
    ("reply", "kind", "said", "hint"),
    [
        (answering(429, b'{"error": {"message": "full"}}', retry_after="7"), "429", "full", "again in 7 s"),
        (answering(503, b"<html>"), "503", "Service Unavailable", "come again later"),
        (answering(404, b"{}"), "404", "404", "OpenAI's routes"),
        (answering(422, b'{"detail": "no \\u001b[31m"}'), "422", "no  [31m", ""),
        (answering(500, b'{"error": "boom"}'), "500", "boom", ""),
        (answering(307, b"", location="http://127.0.0.1:1/"), "307", "307", "not followed"),
        (answering(302, b"", location="http://127.0.0.1:1/"), "302", "302", "not followed"),
        (answering(200, b"{}"), "broken", "application/json", ""),
        (stream("data: {"), "broken", "not a JSON object", ""),
        (stream("data: [1]"), "broken", "not a JSON object", ""),
        (stream(": a comment", 'data: {"choices": [{"text": "a"}]}'), "broken", "before its end", ""),
        (stream('data: {"error": {"message": "lost"}}'), "broken", "lost", ""),
        (stream(), "broken", "before its end", ""),
    ],
)
def test_what_a_server_may_do_instead(reply: Reply, kind: str, said: str, hint: str) -> None:
    with pretending(reply) as (at, _), pytest.raises(ServerError) as refused:
        texts(at)
    assert refused.value.kind == kind and said in refused.value.message
    assert hint in (refused.value.hint or "")


def test_streams_of_every_shape() -> None:
    events = ['data:{"choices":[{"text":"ä"}]}', ": ping", "event: x", 'data: {"choices": []}']
    last = 'data: {"choices": [{"text": "b", "finish_reason": "stop"}], "usage": null}'
    for end in ((last, "data: [DONE]"), (last,), ("data:[DONE]",)):
        with pretending(stream(*events, *end)) as (at, _):
            assert texts(at) == ["ä", "", *(["b"] if last in end else [])]
    assert text_of({"choices": [{"delta": {"content": None}}, {"text": 3}, "x"]}) == ""
    assert text_of({"choices": None}) == ""


def test_nobody_there_and_nothing_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"said nothing for 0\.2 s") as refused:
            Client(RemoteOptions(url=at, timeout_s=0.2)).models()
        assert refused.value.kind == "timeout"
    with pytest.raises(ServerError, match="refused") as refused:
        Client(RemoteOptions(url=at)).models()
    assert refused.value.kind == "connection" and refused.value.hint == "is the server running?"
    for body in (b"{}", b'{"data": []}', b'{"data": [3]}', b"[]"):
        with pretending(answering(200, body)) as (at, _), pytest.raises(ServerError):
            Client(RemoteOptions(url=at)).models()


@pytest.mark.parametrize(
    "wrong",
    [
        "127.0.0.1:8000",
        "ftp://a",
        "http://",
        "http://a:x",
        "http://u:p@a",
        "http://a/?b",
        "http://a\n",
        "[",
        "http://[",
    ],
)
def test_addresses_that_are_none(wrong: str) -> None:
    with pytest.raises(UsageError, match="url is"):
        Client(RemoteOptions(url=wrong))


def test_keys_and_options_that_are_none() -> None:
    with pytest.raises(UsageError, match="characters that no key has"):
        Client(RemoteOptions(url="http://a"), "x\r\nhost: b")
    with pytest.raises(ConfigError, match="timeout_s"):
        RemoteOptions(url="http://a", timeout_s=0.0)
    with pytest.raises(ConfigError, match="are for a server"):
        RemoteOptions(model="a")


def test_load_counts_what_the_server_counts(server: Server) -> None:
    client, model = reach(RemoteOptions(url=url(server)))
    before = server.served.engine.statistics().drawn_tokens
    said: list[str] = []
    options = BenchOptions(batches="1,3", prompt=5, tokens=6, requests=5)
    rows = run(client, model, options, said.append)
    drawn = server.served.engine.statistics().drawn_tokens - before
    assert [row.concurrency for row in rows] == [1, 3] and drawn == (1 + 2 * 5) * 6
    for row in rows:
        assert row.answered == 5 and row.errors == {} and row.prompt_tokens is not None
        assert row.tokens_per_s is not None and row.tokens_per_s > 0
        assert row.first_token_p50_s is not None and row.first_token_p99_s is not None
        assert 0 < row.first_token_p50_s <= row.first_token_p99_s
        assert row.between_p50_s is not None and row.between_p99_s is not None
        assert 0 <= row.between_p50_s <= row.between_p99_s
    assert said == ["1 at a time, 5 requests", "3 at a time, 5 requests"]


def test_load_counts_errors_by_kind() -> None:
    """One in three is refused, one in three breaks off; a field that OpenAI does not know is left out."""
    seen = iter(range(100))
    whole = stream('data: {"choices": [{"text": "a b", "finish_reason": "length"}]}', "data: [DONE]")
    replies = [whole, answering(429, b"{}"), stream('data: {"choices": [{"text": "a"}]}')]
    first = [answering(400, b'{"error": {"message": "ignore_eos"}}'), whole]

    def reply(handler: http.server.BaseHTTPRequestHandler) -> None:
        number = next(seen)
        (first[number] if number < 2 else replies[number % 3])(handler)

    with pretending(reply) as (at, bodies):
        said: list[str] = []
        options = BenchOptions(batches="2", tokens=2, requests=12)
        (row,) = run(Client(RemoteOptions(url=at)), "m", options, said.append)
    assert row.answered == 4 and row.errors == {"429": 4, "broken": 4}
    assert row.prompt_tokens is None and row.between_p50_s is None and row.first_token_p50_s is not None
    assert "ignore_eos" in bodies[0] and not any("ignore_eos" in body for body in bodies[1:])
    assert said[0].startswith("the server does not know ignore_eos")
    assert len({body["prompt"] for body in bodies[2:]}) == 12, "no cache has seen a prompt"


def test_the_commands(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n"))
    words = ["chat", "--url", url(server), "--temperature", "0", "--max-tokens", "6"]
    assert main(words) == 0 and capsys.readouterr().out.endswith("\n")
    words = ["bench", "--url", url(server), "--batches", "2", "--requests", "3", "--tokens", "4"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == NAME and found["load"][0]["answered"] == 3
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*words, "--model", "absent"]) == 1 and "absent" in capsys.readouterr().err
    assert main(words) == 0
    said = capsys.readouterr()
    assert "2 at once" in said.out and "first token" in said.out and "3 requests" in said.err


@pytest.mark.parametrize(
    "words",
    [
        ["chat"],
        ["chat", "folder", "--url", "http://127.0.0.1:9"],
        ["chat", "--url", "http://127.0.0.1:9", "--plain"],
        ["chat", "--url", "http://127.0.0.1:9", "--draft", "2"],
        ["chat", "--url", "http://127.0.0.1:9", "--memory", "1GiB"],
        ["chat", "--url", "http://127.0.0.1:9", "--record", "here.trace"],
        ["bench"],
        ["bench", "folder", "--url", "http://127.0.0.1:9"],
        ["bench", "--url", "http://127.0.0.1:9", "--prefill", "5"],
        ["bench", "--url", "http://127.0.0.1:9", "--memory", "1GiB"],
        ["bench", "--url", "http://127.0.0.1:9", "--record", "here.trace"],
        ["bench", "--url", "http://127.0.0.1:9", "--plan"],
        ["bench", "folder", "--requests", "5"],
        ["chat", "folder", "--model", "m"],
    ],
)
def test_a_server_and_a_model_here_are_two_things(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2 and "server" in capsys.readouterr().err


def test_errors_of_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reply = answering(429, b'{"error": {"message": "full"}}', retry_after="3")
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    with pretending(reply) as (at, _):
        for name in ("chat", "bench"):
            assert main([name, "--url", at, "--model", "m"]) == 1
            said = capsys.readouterr().err
            assert "the server refuses (429): full" in said and "hint: come again in 3 s" in said
