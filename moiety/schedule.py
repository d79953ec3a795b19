"""A number that changes with the training step: constant, or a straight line between two steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moiety.errors import ConfigError

__all__ = ["Schedule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`start` until step `begin`, `end` from step `begin + steps` on, a straight line between.

    Args:
        start: Value at first.
        end: Value at last, and outside training.
        begin: Step at which it starts to change.
        steps: How many steps the change takes; 0 is a jump.
    """

    start: float
    end: float
    begin: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ConfigError(f"a schedule from {self.start} to {self.end} is not finite")
        if self.begin < 0 or self.steps < 0:
            raise ConfigError(
                f"a schedule begins at step {self.begin} and takes {self.steps} steps; neither may be negative"
            )

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """The same value at every step."""
        return cls(start=value, end=value)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read `0.01`, `0.05:0.01@1000` (over the first 1000 steps) or `1:0@500-2000` (between two steps).

        Raises:
            ConfigError: the text is none of these.
        """
        values, at, span = text.partition("@")
        start, colon, end = values.partition(":")
        begin, dash, stop = span.partition("-")
        try:
            if not colon and not at:
                return cls.constant(float(start))
            if colon and at:
                first = int(begin) if dash else 0
                return cls(
                    start=float(start),
                    end=float(end),
                    begin=first,
                    steps=int(stop if dash else begin) - first,
                )
        except ValueError:
            pass
        raise ConfigError(
            f"{text!r} is no schedule", hint="write VALUE, START:END@STEPS or START:END@BEGIN-STOP"
        )

    def at(self, step: int | None) -> float:
        """The value at a step, counted from 0; None is outside training and gives `end`."""
        if step is None or step >= self.begin + self.steps:
            return self.end
        if step <= self.begin:
            return self.start
        return self.start + (self.end - self.start) * (step - self.begin) / self.steps

    @property
    def values(self) -> tuple[float, float]:
        """Smallest and largest value it takes."""
        return min(self.start, self.end), max(self.start, self.end)
