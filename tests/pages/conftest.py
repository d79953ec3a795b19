"""A real Chromium, without a network: every request that a page makes is seen, and every complaint of its console."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
# what the charts are drawn in; those that are hidden have none
DRAWN = """(() => { const plots = [...document.querySelectorAll(".plot")].filter((one) => !one.closest("[hidden]"));
    return plots.length > 0 && plots.every((one) => one.querySelector(".main-svg")); })()"""


@dataclass
class Look:
    """A page that is open."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def drawn(self) -> None:
        """Wait until every chart is there."""
        self.until(DRAWN)

    def until(self, holds: str, within_s: float = 30.0) -> None:
        """Wait for an expression to be true; playwright's own way needs `eval`, which the page's policy forbids."""
        end_s = time.monotonic() + within_s
        while not self.page.evaluate(holds):
            assert time.monotonic() < end_s, f"it never was: {holds}"
            self.page.wait_for_timeout(30)

    def clean(self) -> None:
        """Nothing was complained of, and nothing was asked of other machines."""
        assert not self.complaints, self.complaints
        away = [
            url for url in self.asked if not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))
        ]
        assert not away, away

    def faults(self) -> list[str]:
        """What axe-core finds wrong for people who cannot see, or use no mouse."""
        self.page.evaluate(
            (importlib.resources.files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
        )
        found: Any = self.page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
        assert len(found["passes"]) > 10, "axe looked at nothing"
        return [
            f"{one['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
            for one in found["violations"]
            for node in one["nodes"]
        ]


Opens = Callable[..., Look]


@pytest.fixture(scope="module")  # its event loop must end with it: other tests have loops of their own
def chromium() -> Iterator[Browser]:
    path = os.environ.get("MOIETY_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        assert not os.environ.get("CI"), "CI must look at the pages: `make browser` installs Chromium"
        pytest.skip(
            "no Chromium on this machine: `make browser` installs it, MOIETY_CHROMIUM names another one"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opening(chromium: Browser) -> Iterator[Opens]:
    """Opens a file or an address, apart from all others; ends what was opened."""
    contexts = []

    def made(where: Path | str, *, width: int = 1200, dark: bool = False) -> Look:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        )
        contexts.append(context)
        look = Look(context.new_page())
        look.page.set_default_timeout(15_000)
        look.page.on("pageerror", lambda error: look.complaints.append(str(error)))
        look.page.on("request", lambda request: look.asked.append(request.url))
        look.page.on(
            "console",
            lambda said: look.complaints.append(said.text) if said.type in ("error", "warning") else None,
        )
        look.page.goto(where.resolve().as_uri() if isinstance(where, Path) else where)
        return look

    yield made
    for context in contexts:
        context.close()


@pytest.fixture
def opens(chromium: Browser) -> Iterator[Opens]:
    """Opens a file or an address for one test."""
    with opening(chromium) as made:
        yield made
