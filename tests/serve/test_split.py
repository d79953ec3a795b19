"""A server whose experts are on several processes answers as one process does, and none of them outlives another."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

from moiety.cli import main
from moiety.infer.open import open_model
from moiety.model import checkpoint
from moiety.model.adapter_files import save_adapter
from moiety.model.adapters import attach
from tests import tiny
from tests.model.test_adapters import adapters, packed
from tests.parallel import ranks
from tests.serve.conftest import ENGINE, NAME, client_of, eventually, opened, serving

TIMEOUT_S = 5  # for processes to meet as well
SIZES = [word for name, value in ENGINE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
LONG: dict[str, Any] = {"model": NAME, "prompt": "a", "temperature": 0, "extra_body": {"ignore_eos": True}}
PROMPTS = ["the quick", "brown fox jumps", "it was", "lazy dog; the best of times", "a"]


class Split:
    """The command in several processes, and what can be asked of it."""

    def __init__(self, children: list[subprocess.Popen[str]]) -> None:
        self.children, self.said = children, ""
        out = children[0].stdout
        assert out is not None
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", self.said)) is None:
            line = out.readline()
            assert line, self.said
            self.said += line
        self.port = int(found[1])
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def ended(self, within_s: float = 30) -> list[tuple[int | None, str]]:
        """Exit code and last words of each, which all must end by themselves."""
        end_s, found = time.monotonic() + within_s, []
        for child in self.children:
            said = child.communicate(timeout=max(end_s - time.monotonic(), 0.1))[0]
            found.append((child.returncode, said))
        return found


@contextlib.contextmanager
def split(folder: Path, *more: str, fate: tuple[str, ...] = (), count: int = 2) -> Iterator[Split]:
    """`moiety serve` in so many processes; one of them is lost in a forward pass, if its rank and how are given."""
    words = ["serve", str(folder), "--port", "0", "--rank-timeout", str(TIMEOUT_S), *SIZES, *more]
    planted = [*fate, "forward", "0", "--", *words]
    children = ranks.start(*(("tests.parallel.victim", planted) if fate else ("moiety", words)), count)
    try:
        running = Split(children)
        with running.http:
            yield running
    finally:
        ranks.end(children)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four experts, and beside it an adapter of its attention."""
    what, place = opened(moe=tiny.experts(experts=4)), tmp_path_factory.mktemp("split")
    checkpoint.save(what.model, place / NAME, tokenizer=what.tokenizer)
    own = {key: one for key, one in adapters(what.model, 3).items() if "attention" in key[0]}
    attach(what.model, "one", own)
    save_adapter(what.model, place / "one", "one")
    checkpoint.save(
        packed(opened(moe=tiny.experts(experts=4)).model), place / "packed", tokenizer=what.tokenizer
    )
    return place / NAME


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[tuple[Split, tuple[openai.OpenAI, openai.OpenAI]]]:
    """One in two processes that guesses, and clients of it and of one in a single process that does not."""
    adapter = f"one={folder.parent / 'one'}"
    with (
        split(folder, "--draft", "3", "--adapter", adapter) as two,
        serving(open_model(folder, adapters=[adapter])) as one,
        client_of(one) as first,
        client_of(two) as second,  # type: ignore[arg-type]
    ):
        yield two, (first, second)


def texts(client: openai.OpenAI, **given: Any) -> list[str]:
    said = client.completions.create(**{"model": NAME, "prompt": PROMPTS, "max_tokens": 24} | given)
    return [choice.text for choice in said.choices]


def streamed(client: openai.OpenAI, prompt: str) -> str:
    stream = client.completions.create(**LONG | {"prompt": prompt}, stream=True, max_tokens=60)
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_the_same_answers_as_one_process(both: Any) -> None:
    _, clients = both
    for given in (
        {"temperature": 0},
        {"seed": 3, "temperature": 0.8, "n": 2},
        {"temperature": 0, "model": f"{NAME}:one"},
    ):
        first, second = (texts(client, **given) for client in clients)
        assert first == second and len(set(first)) > 1
    own, plain = texts(clients[1], temperature=0, model=f"{NAME}:one"), texts(clients[1], temperature=0)
    assert own != plain


def test_several_at_once_and_one_that_is_left(both: Any) -> None:
    two, (first, second) = both
    left = second.completions.create(**LONG, stream=True, max_tokens=240)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda prompt: streamed(second, prompt), PROMPTS)
        next(iter(left))
        left.close()
        assert [*found] == [streamed(first, prompt) for prompt in PROMPTS]
    assert streamed(first, "so so so so so") == streamed(second, "so so so so so")
    eventually(lambda: "moiety:num_requests_running 0.0" in two.http.get("/metrics").text)
    guessed = re.search(r"draft_tokens_total (\d.*)", two.http.get("/metrics").text)
    assert guessed and float(guessed[1]) > 0


def test_the_routing_is_of_all_experts(both: Any) -> None:
    two, clients = both
    found = []
    for client in clients:
        said = client.completions.create(
            model=NAME,
            prompt="the lazy fox",
            max_tokens=9,
            temperature=0,
            extra_body={"return_routed_experts": True},
        )
        found.append(said.model_dump()["choices"][0]["routed_experts"])
    assert found[0] == found[1] and found[0]
    told = two.http.get("/v1/routing").json()
    for counts in told["counts"].values():
        assert len(counts) == 4 and min(counts) > 0 and sum(counts) == 2 * told["tokens"]


def test_a_rest_that_is_longer_than_the_timeout(both: Any) -> None:
    _, (first, second) = both
    time.sleep(TIMEOUT_S + 2)
    assert texts(first, temperature=0) == texts(second, temperature=0)


@pytest.mark.parametrize(
    ("how", "whom"), [(signal.SIGTERM, (1,)), pytest.param(signal.SIGINT, (0, 1), marks=pytest.mark.slow)]
)
def test_all_end_together(folder: Path, how: signal.Signals, whom: tuple[int, ...]) -> None:
    """However many of them are asked to, and with the answer that was being written."""
    with split(folder) as two, client_of(two) as client:  # type: ignore[arg-type]
        stream = client.completions.create(**LONG, stream=True, max_tokens=200)
        next(iter(stream))
        for rank in whom:
            two.children[rank].send_signal(how)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        (first, said), (second, silence) = two.ended()
        assert (first, second) == (0, 0) and said.strip() == "stopped" and not silence


@pytest.mark.parametrize(
    ("victim", "how", "why"),
    [
        (1, "SIGKILL", "rank 1 of 2 was lost"),
        (1, "SIGSTOP", "rank 1 of 2 was lost"),
        (1, "RAISE", "rank 1 of 2 failed: planted"),
        pytest.param(0, "SIGKILL", "rank 0 of 2 was lost", marks=pytest.mark.slow),
        pytest.param(0, "RAISE", "rank 0 of 2 was lost", marks=pytest.mark.slow),  # and the store with it
    ],
)
def test_one_that_is_lost_in_a_pass_ends_all(folder: Path, victim: int, how: str, why: str) -> None:
    with split(folder, fate=(str(victim), how)) as two, client_of(two) as client:  # type: ignore[arg-type]
        with pytest.raises(openai.APIError):
            client.completions.create(**LONG, max_tokens=100)
        if how == "SIGSTOP":
            two.children[victim].kill()
        found = two.ended()
        assert why in found[1 - victim][1] and all(code for code, _ in found), found


def test_other_weights_in_one_of_them(tmp_path: Path) -> None:
    """Experts of one model would be mixed with those of another."""
    for seed in range(2):
        what = opened(moe=tiny.experts(experts=4))
        for block in what.model.blocks:
            torch.nn.init.normal_(
                block.feed_forward.gate.weight, generator=torch.Generator().manual_seed(seed)
            )
        checkpoint.save(what.model, tmp_path / str(seed), tokenizer=what.tokenizer)
    with split(tmp_path / "RANK", "--name", NAME) as two, client_of(two) as client:  # type: ignore[arg-type]
        with pytest.raises(openai.APIError):
            client.completions.create(**LONG, max_tokens=200)
        (code, said), (other, _) = two.ended()
        assert code == other == 1 and "chose different experts" in said and "Traceback" not in said, said


def test_one_that_is_lost_while_nothing_is_asked(folder: Path) -> None:
    with split(folder) as two:
        two.children[1].kill()
        (code, said), _ = two.ended()
        assert code == 1 and "rank 1 of 2 was lost" in said and "Traceback" not in said, said


@pytest.mark.parametrize("more", [["--replicas", "2"], ["--memory", "1GiB"], ["--plan"]])
def test_what_cannot_be_asked_for(
    folder: Path, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["serve", str(folder), *more]) == 2
    assert f"{more[0]} is for one process, and there are 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "more", "why"),
    [
        ("packed", [], "experts are PackedExperts, which stay in one process"),
        (NAME, ["--port", "TAKEN"], "cannot listen on 127.0.0.1 port"),
    ],
)
def test_what_cannot_be_served(folder: Path, model: str, more: list[str], why: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        more = [one.replace("TAKEN", str(taken.getsockname()[1])) for one in more]
        children = ranks.start("moiety", ["serve", str(folder.with_name(model)), *more], 2)
        try:
            found = [child.communicate(timeout=60)[0] for child in children]
        finally:
            ranks.end(children)
    assert why in found[0] and children[0].returncode == 2 and children[1].returncode == 1, found
    assert not [one for one in found if "Traceback" in one], found
    assert "its own message says why" in found[1], found[1]


def test_torchrun(folder: Path) -> None:
    """Its SIGTERM reaches all, and they end well."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "moiety",
    ]
    command += ["serve", str(folder), "--port", "0", *SIZES]
    running = subprocess.Popen(
        command,
        cwd=ranks.ROOT,
        env=ranks.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        two = Split([running])
        with client_of(two) as client:  # type: ignore[arg-type]
            assert texts(client, temperature=0)
        running.terminate()
        ((_, said),) = two.ended()
        assert "stopped" in said and "was lost" not in said, said
    finally:
        running.kill()
        running.wait()
