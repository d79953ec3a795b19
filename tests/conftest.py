"""What every test gets: the same seeds, two threads, no network, and an end after a stated time."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Generator
from types import FrameType

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_COLOR"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import hypothesis
import numpy as np
import pytest
import torch

TIMEOUT_S = 120

torch.set_num_threads(1)
hypothesis.settings.register_profile("moiety", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("moiety")


class TooSlow(Exception):
    """Raised inside a test whose time is over."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed before each test, so that a test alone and the same test in the suite see the same numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Alarm over a whole test, its fixtures included: 120 s, or what its `timeout_s` mark says."""
    mark = item.get_closest_marker("timeout_s")
    seconds = int(mark.args[0]) if mark else TIMEOUT_S

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"{item.nodeid} ran for {seconds} s; mark it `timeout_s(n)` if that is meant")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
