"""A machine made of round numbers, so that a plan for it can be worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from moiety.plan.profile import ROWS, VERSION, Profile

WEIGHT_S = {"fp32": 1e-10, "bf16": 0.8e-10, "int4-g32": 2e-11, "int8-g32": 4e-11}  # at one row


def spread(value: float) -> tuple[float, float, float]:
    """Half as wide as it is large."""
    return (value, 0.75 * value, 1.25 * value)


def made(**changes: Any) -> Profile:
    """Kernels that take as long for eight rows as for one, and then in proportion."""
    rows = dict(zip(ROWS, (1, 1, 8, 64), strict=True))
    table = {
        form: {str(count): spread(seconds * factor) for count, factor in rows.items()}
        for form, seconds in WEIGHT_S.items()
    }
    cost = {"step": 1e-4, "layer": 1e-5, "sequence": 2e-5, "vocabulary": 1e-10, "token": 3e-7, "width": 1e-10}
    overhead = {name: spread(seconds) for name, seconds in cost.items()}
    profile = Profile(
        version=VERSION,
        machine={"processor": "made up"},
        measured="2026-01-02 03:04",
        threads=2,
        memory_bytes=32 * 10**9,
        process_bytes={"packed": 250 * 10**6, "plain": 300 * 10**6},
        read_rate={"1": spread(20e9), "2": spread(30e9)},
        disk={"1048576": spread(1e9), "8388608": spread(2e9)},
        disk_note="nowhere",
        experts=table,
        linear=table,
        overhead={"packed": overhead, "plain": {name: spread(2 * cost[name]) for name in cost}},
        attention={"fp32": spread(4e-10), "bf16": spread(2e-10), "operation": spread(1e-11)},
    )
    return dataclasses.replace(profile, **changes)
