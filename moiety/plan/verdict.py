"""A plan's bands against what was then measured, as plain values. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moiety.plan.hardware import Band

__all__ = ["MEMORY_BAND", "Verdict", "entry", "judge", "sentence", "share_inside"]

MEMORY_BAND = 0.05  # memory is planned as one figure, and held to be right within this share of it


class Verdict(NamedTuple):
    """One figure.

    Args:
        what: memory, decode, prefill, hit rate or disk.
        unit: Of the three.
        planned: As a band.
        measured: What it was.
    """

    what: str
    unit: str
    planned: Band
    measured: float

    @property
    def inside(self) -> bool:
        """The band held it."""
        return self.planned.low <= self.measured <= self.planned.high


def judge(planned: Mapping[str, tuple[Band, str]], measured: Mapping[str, float]) -> list[Verdict]:
    """One verdict for each figure that was measured.

    Args:
        planned: Bands and units by name.
        measured: Figures by name; each must have been planned.
    """
    unplanned = measured.keys() - planned.keys()
    assert not unplanned, unplanned
    return [Verdict(name, planned[name][1], planned[name][0], value) for name, value in measured.items()]


def sentence(verdicts: Sequence[Verdict]) -> str:
    """All verdicts in one line."""
    if not verdicts:
        return "nothing was measured"
    parts = [
        f"{one.what} {_shown(one.measured)} {one.unit} ({'inside' if one.inside else 'OUTSIDE'} "
        f"{_shown(one.planned.low)} to {_shown(one.planned.high)})"
        for one in verdicts
    ]
    return f"against the plan: {', '.join(parts)}"


def _shown(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def entry(case: Mapping[str, Any], verdicts: Sequence[Verdict], when: str) -> dict[str, Any]:
    """What a profile's history keeps.

    Args:
        case: What ran: model, format, batch and so on.
        verdicts: Of it.
        when: Day and hour, in UTC.
    """
    return {
        "when": when,
        "case": dict(case),
        "verdicts": [
            {
                "what": one.what,
                "unit": one.unit,
                "low": one.planned.low,
                "high": one.planned.high,
                "measured": one.measured,
                "inside": one.inside,
            }
            for one in verdicts
        ],
    }


def share_inside(history: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Of all figures of a history: how many a band held, and how many there are."""
    inside = [bool(one["inside"]) for line in history for one in line["verdicts"]]
    return sum(inside), len(inside)
