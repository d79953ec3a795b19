"""What commands share: tables that fit, numbers that are short, a stop that waits for the step at hand."""

from __future__ import annotations

import io
import json
import os
import signal

import pytest
from rich.console import Console

from moiety.cli import output
from moiety.cli.output import interruptible, print_json, print_table

ROWS = [
    ["parameters, total", "1,234,567", "234,567"],
    ["domain größer", "1.234", "2.345"],
    ["a name that is much longer than a terminal of forty columns is wide", "0", "9" * 30],
]


def _table(width: int, rows: list[list[str]] = ROWS, **given: object) -> str:
    stream = io.StringIO()
    print_table("a title", ["", "MoE", "dense twin"], rows, Console(file=stream, width=width, **given))  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 59, 60, 80, 120])
def test_a_table_fits_and_holds_everything(width: int) -> None:
    said = _table(width)
    assert max(map(len, said.splitlines())) <= width
    assert said.count("9") == 30, "a cell that is too long is folded, not cut"
    for word in ("parameters,", "1,234,567", "234,567", "größer", "1.234", "2.345", "columns"):
        assert word in said or width == 20, (word, said)


def test_what_looks_like_markup_is_text() -> None:
    """Domains and file names are the user's: brackets in them are brackets."""
    for width in (40, 100):
        assert "[bold]domain[/bold] [/x]" in _table(width, [["[bold]domain[/bold] [/x]", "1", "2"]])


def test_json_is_one_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "größer\n", "number": 1.5, "none": None})
    assert json.loads(capsys.readouterr().out) == {"text": "größer\n", "number": 1.5, "none": None}


def test_no_colour_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in _table(100, force_terminal=True)
    assert output.talk().no_color and output.talk().stderr


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0"), (950, "950"), (12345, "12.3k"), (4_560_000, "4.56M"), (1.2e12, "1.2T")]
)
def test_short(number: float, said: str) -> None:
    short = getattr(output, "short", None)
    if short is None:
        from moiety.observe.findings import short_number as short
    assert callable(short) and short(number).replace(" ", "").startswith(said[:3])


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    stream = io.StringIO()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with interruptible(Console(file=stream, width=100), "all is saved [now]") as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_set() and "all is saved" in stream.getvalue()
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with interruptible(Console(file=stream, width=100), "all is saved") as stop:
        pass
    assert not stop.is_set() and signal.getsignal(signal.SIGINT) is before
