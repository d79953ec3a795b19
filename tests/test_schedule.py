"""Schedules: what they read, what they say at each step, and what they refuse."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiety.errors import ConfigError
from moiety.schedule import Schedule

finite = st.floats(-1e6, 1e6)


def test_a_constant_is_the_same_always() -> None:
    schedule = Schedule.constant(0.3)
    assert [schedule.at(step) for step in (0, 1, 10**9, None)] == [0.3] * 4
    assert schedule.values == (0.3, 0.3)


@pytest.mark.parametrize(
    "text, schedule",
    [
        ("0.01", Schedule(start=0.01, end=0.01)),
        ("-2", Schedule(start=-2.0, end=-2.0)),
        ("1e-3", Schedule(start=0.001, end=0.001)),
        ("0.05:0.01@1000", Schedule(start=0.05, end=0.01, steps=1000)),
        ("1:0@500-2000", Schedule(start=1.0, end=0.0, begin=500, steps=1500)),
        ("1:0@500-500", Schedule(start=1.0, end=0.0, begin=500, steps=0)),
        ("8:2@0", Schedule(start=8.0, end=2.0)),
    ],
)
def test_texts(text: str, schedule: Schedule) -> None:
    assert Schedule.parse(text) == schedule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "1:0",
        "1@5",
        "1:0@",
        "1:0@x",
        "1:0@5-",
        "1:0@-5",
        "1:0@3.5",
        ":@",
        "1:@5",
        "1:0:2@5",
        "1,0",
    ],
)
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule.parse(text)
    assert repr(text) in str(caught.value) and "hint: write VALUE" in str(caught.value)


@pytest.mark.parametrize("text", ["nan", "inf", "1:inf@5", "nan:1@5", "1:0@9-5"])
def test_what_makes_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not finite|neither may be negative"):
        Schedule.parse(text)


def test_what_is_refused() -> None:
    for values in ({"begin": -1}, {"steps": -1}, {"start": math.nan}, {"end": -math.inf}):
        with pytest.raises(ConfigError):
            Schedule(**{"start": 1.0, "end": 0.0} | values)


def test_a_straight_line_between_two_steps() -> None:
    schedule = Schedule(start=1.0, end=0.0, begin=10, steps=4)
    assert [schedule.at(step) for step in (0, 9, 10, 11, 12, 13, 14, 15, 99)] == [
        1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert schedule.at(None) == 0.0 and schedule.values == (0.0, 1.0)


def test_a_jump() -> None:
    schedule = Schedule(start=1.0, end=0.0, begin=5)
    assert [schedule.at(step) for step in (0, 4, 5, 6)] == [1.0, 1.0, 0.0, 0.0]


@given(finite, finite, st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 3000))
def test_never_outside_of_its_values(start: float, end: float, begin: int, steps: int, step: int) -> None:
    schedule = Schedule(start=start, end=end, begin=begin, steps=steps)
    low, high = schedule.values
    margin = 1e-9 * max(abs(low), abs(high))
    assert low - margin <= schedule.at(step) <= high + margin
    assert schedule.at(begin + steps) == end
    assert steps == 0 or schedule.at(begin) == start
    assert Schedule.parse(f"{start!r}:{end!r}@{begin}-{begin + steps}") == schedule
