"""What a person sees while a model trains: bars on a terminal, a few lines in a log."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from moiety.cli.progress import TrainingDisplay
from moiety.observe.stats import RoutingHealth
from moiety.train.compare import Contender
from moiety.train.loop import StepRecord
from moiety.train.state import RunState
from tests.train import tiny

import numpy as np  # isort: skip


def _record(step: int, **changes: object) -> StepRecord:
    health = RoutingHealth(counts_E=np.array([90, 10, 0, 0]), tokens=50)
    record = StepRecord(
        state=RunState(step=step),
        loss=1.2345,
        tokens=256,
        router_losses={"load": 1.0, "z": 1.0},
        gradient_norm=1.0,
        learning_rate=1e-3,
        skipped=False,
        health={0: health},
        step_seconds=0.5,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def _shown(width: int, terminal: bool, steps: int = 100, name: str = "moe", **changes: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, no_color=True, highlight=False)
    one = Contender(
        name=name, config=tiny.shape().config(300, 32), options=tiny.options(steps=steps, batch=8)
    )
    with TrainingDisplay([one], console) as display:
        for step in range(1, steps + 1):
            display.show(one, _record(step, **(changes if step == 3 else {})))
    return stream.getvalue()


def test_a_log_has_a_few_lines() -> None:
    lines = _shown(100, terminal=False).splitlines()
    assert 10 <= len(lines) <= 30 and "\x1b" not in "".join(lines)
    assert "step 100" in lines[-1] and "1.234" in lines[-1] and "512 tok/s" in lines[-1]
    assert "MaxVio 2.60" in lines[-1] and "2 dead" in lines[-1]


def test_a_skipped_step_is_said_at_once() -> None:
    said = _shown(100, terminal=False, skipped=True, loss=float("nan"))
    assert "step 3" in said and "not finite" in said


@pytest.mark.parametrize("width", [40, 79, 80, 120])
def test_bars_fit_the_terminal(width: int) -> None:
    said = _shown(width, terminal=True, steps=12)
    assert ("12/12" in said and "1.234" in said) or width < 60
    assert said.count("\n") < 60


def test_brackets_in_a_name_are_brackets() -> None:
    for terminal in (False, True):
        assert "[/run]" in _shown(100, terminal, steps=3, name="[/run]")
