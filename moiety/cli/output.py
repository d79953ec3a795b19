"""What commands share: talk on stderr, results on stdout, a stop that finishes the step at hand."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cyclopts import App
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["command", "interruptible", "print_json", "print_table", "short", "talk"]


def command(name: str, help: str) -> App:
    """A command's parser; `--version` is the program's alone, and Ctrl-C reaches `main`."""
    return App(name=name, help=help, version_flags=[], suppress_keyboard_interrupt=False)


def talk(*, quiet: bool = False) -> Console:
    """The console for everything that is not a result; colour only on a terminal and never with NO_COLOR."""
    return Console(stderr=True, highlight=False, markup=False, quiet=quiet)


def print_json(value: Any) -> None:
    """A result as one JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    print()


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """A table on stdout; the first column is text, the others are numbers. On a narrow terminal, one block per row."""
    console = console or Console(highlight=False, markup=False)
    if console.width < 60:
        console.print(Text(title), style="bold")
        for row in rows:
            console.print(Text(row[0]), style="bold")
            for name, cell in zip(columns[1:], row[1:], strict=True):
                console.print(Text(f"  {name}: {cell}"))
        return
    table = Table(title=Text(title), title_justify="left", title_style="bold", header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # plain text: a bracket in a cell is a bracket
    console.print(table)


def short(number: float) -> str:
    """A number in four or five characters: 950, 12.3k, 4.56M, 1.2B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


@contextmanager
def interruptible(console: Console, then: str) -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts at once.

    Args:
        console: Where to say so.
        then: What happens after the step at hand.
    """
    event = threading.Event()

    def set_once(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        console.print(f"\nstopping: {then} (Ctrl-C again to drop it)")

    before = signal.signal(signal.SIGINT, set_once)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def parameter_rows(components: Mapping[str, int], active: Mapping[str, int]) -> list[list[str]]:
    """Rows of a component table: name, parameters, share, active."""
    total = sum(components.values())
    return [
        [name, f"{count:,}", f"{100 * count / total:.2f} %", f"{active.get(name, 0):,}"]
        for name, count in components.items()
        if count
    ]
