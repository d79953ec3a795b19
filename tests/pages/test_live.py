"""The page beside a server and while a run trains: in a real browser, over real connections on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from moiety.observe.watch import Followed
from moiety.serve import dashboard
from moiety.serve.dashboard import EVENTS, MOST_WATCHERS, PAGE, show
from tests.observe import sample_inspection as sample
from tests.pages.conftest import Opens
from tests.serve.conftest import NAME, client_of, eventually, serving

POINTS = "document.querySelectorAll('#health-plot .scatterlayer .point').length"
LIVE = "document.getElementById('live-said').textContent === 'live'"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dashboard.Dashboard.__init__,
        "__kwdefaults__",
        {"plain": None, "title": "moiety serve", "period_s": 0.2},
    )


def test_a_server_is_watched_with_its_key(opens: Opens) -> None:
    with serving(key="sesame") as server, client_of(server, api_key="sesame") as client:
        address = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=address, timeout=10) as http:
            shell = http.get(PAGE)
            assert shell.status_code == 200 and NAME not in shell.text
            policy = shell.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy
            assert "unsafe-inline'; img" in policy and policy.count("unsafe") == 1
            assert http.get(EVENTS).status_code == 401
        look = opens(address + PAGE)
        page = look.page
        page.locator("#key-text").wait_for()
        assert look.complaints == [said for said in look.complaints if "401" in said], (
            "a refusal is all it says"
        )
        look.complaints.clear()
        page.keyboard.type("sesame")  # the field has the focus
        page.keyboard.press("Enter")
        look.until(LIVE)
        assert page.locator("h1").inner_text() == NAME
        client.completions.create(model=NAME, prompt="the quick brown fox", max_tokens=8)
        look.drawn()
        assert {one.get_attribute("id") for one in page.locator("section:visible").all()} >= {
            "load",
            "health",
        }
        shown = "document.getElementById('standfirst').textContent"
        look.until(f"{shown}.startsWith('{server.served.engine.computed_tokens} tokens')")
        before = page.locator("#standfirst").inner_text()
        page.locator("#live-pause").click()
        client.completions.create(model=NAME, prompt="over the lazy dog", max_tokens=8)
        page.wait_for_timeout(600)
        assert page.locator("#standfirst").inner_text() == before, "paused"
        page.locator("#live-pause").click()
        look.until(f"{shown} !== {json.dumps(before)}")
        total = server.served.engine.computed_tokens
        look.until(f"{shown}.startsWith('{total} tokens through 2 layers')")
        assert page.evaluate("data.history.steps.length") >= 2
        look.until(f"{POINTS} === 2 * data.history.steps.length")
        assert not look.faults()
        look.clean()
        assert all(url.startswith(address) for url in look.asked)


def test_watchers_are_bounded_and_let_go() -> None:
    with serving() as server:
        address = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=address, timeout=10) as http:
            streams = [http.stream("GET", EVENTS) for _ in range(MOST_WATCHERS)]
            lines = [stream.__enter__().iter_lines() for stream in streams]
            for line in lines:
                first = json.loads(next(line).removeprefix("data: "))
                assert first["set"]["title"] == NAME
            assert http.get(EVENTS).status_code == 503
            streams[0].__exit__(None, None, None)
            eventually(lambda: _status(http) == 200)
            for host in ("evil.example", "localhost.evil.example:80"):
                assert http.get(PAGE, headers={"host": host}).status_code == 403
        # seven still watch when the server stops: `serving` asserts that it ends
        for stream in streams[1:]:
            stream.__exit__(None, None, None)


def _status(http: httpx.Client) -> int:
    with http.stream("GET", EVENTS) as answer:
        return int(answer.status_code)


def write_steps(file: Path, steps: range, *, mode: str = "a") -> None:
    with file.open(mode, encoding="utf-8") as out:
        for step in steps:
            line: dict[str, Any] = {"step": step, "loss": 2.0}
            for layer in range(4):
                line |= {
                    f"layer_{layer}/max_vio": 1.0 / step + layer / 10,
                    f"layer_{layer}/load_entropy": 0.9,
                    f"layer_{layer}/dead": layer % 2,
                }
            out.write(json.dumps(line) + "\n")


def watched(folder: Path, plain: dict[str, Any] | None) -> tuple[threading.Thread, str, Callable[[], None]]:
    """The page of a run, served in a thread: its address, and what ends it."""
    there = threading.Event()
    told: list[Any] = []

    def ready(address: str, end: Callable[[], None]) -> None:
        told.extend([address, end])
        there.set()

    def run() -> None:
        show(Followed(folder, plain), plain=plain, title=folder.name, port=0, ready=ready)

    thread = threading.Thread(target=run)
    thread.start()
    assert there.wait(20), "it does not listen"
    return thread, told[0], told[1]


@pytest.mark.parametrize("inspected", [False, True])
def test_a_run_is_watched_while_it_trains(inspected: bool, tmp_path: Path, opens: Opens) -> None:
    metrics = tmp_path / "metrics.jsonl"
    write_steps(metrics, range(1, 11))
    thread, address, end = watched(tmp_path, sample.sample(points=0).plain() if inspected else None)
    try:
        look = opens(address)
        page = look.page
        look.until(LIVE)
        look.drawn()
        assert "At step 10," in page.locator("#health-said").inner_text()
        assert page.locator("#load").is_visible() == inspected
        assert page.locator("#routed-text .token").count() == (54 if inspected else 0)
        write_steps(metrics, range(11, 14))
        look.until("document.getElementById('health-said').textContent.includes('At step 13,')")
        look.until(f"{POINTS} === 4 * 11")
        with metrics.open("a") as file:
            file.write('{"step": 14, "layer_0/max')  # being written
        page.wait_for_timeout(500)
        assert "At step 13," in page.locator("#health-said").inner_text()
        write_steps(metrics, range(1, 4), mode="w")  # begun anew
        look.until("document.getElementById('health-said').textContent.includes('At step 3,')")
        assert page.evaluate("data.history.steps") == [1, 2, 3]
        most = page.evaluate("""() => {
            const four = [0, 0, 0, 0];
            const add = (step) => take({ add: { step, max_vio: four, entropy: four, dead: four } });
            let most = 0;
            for (let step = 4; step < 1000; step++) {
                add(step);
                most = Math.max(most, data.history.steps.length, ...data.history.dead.map((row) => row.length));
            }
            return most;
        }""")
        assert most <= 241 and page.evaluate("data.history.steps.at(-1)") == 999
        assert not look.faults()
        look.clean()
        with httpx.Client(timeout=10) as http:
            assert http.get(address, headers={"host": "evil.example"}).status_code == 403
    finally:
        end()
        thread.join(20)
    assert not thread.is_alive()
    look.until("document.getElementById('live').classList.contains('lost')")
