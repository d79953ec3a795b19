"""A machine's own figures, as `moiety plan --measure` wrote them, and the history of plans against runs there.

The profile is one JSON object in the user's cache folder, beside it `*.history.jsonl`, one verdict on each line. Every
figure has a middle, a low and a high: the spread of the measurement.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moiety import storage
from moiety.errors import ConfigError, FormatError, StorageError
from moiety.fields import check_types, from_dict, require, to_dict

__all__ = [
    "ATTENTION",
    "OVERHEADS",
    "ROWS",
    "VERSION",
    "Figure",
    "Profile",
    "append_history",
    "default_path",
    "read_history",
    "read_profile",
    "write_profile",
]

VERSION = 1
ROWS = (1, 8, 64, 512)  # for each expert, at which kernels are timed
OVERHEADS = ("step", "layer", "sequence", "vocabulary", "width")
ATTENTION = ("fp32", "bf16", "operation")


class Figure(NamedTuple):
    """One measurement: its middle and its spread."""

    middle: float
    low: float
    high: float

    def times(self, factor: float) -> Figure:
        """All three, so many times."""
        return Figure(self.middle * factor, self.low * factor, self.high * factor)

    def plus(self, other: Figure) -> Figure:
        """Both, one after the other."""
        return Figure(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one machine can do. Rates are per second, times in seconds.

    Args:
        version: Of this layout.
        machine: Processor, cores, instruction set, operating system.
        measured: Day and hour, in UTC.
        threads: With which kernels were timed.
        memory_bytes: Of the machine.
        process_bytes: Resident in a process that has run a tiny model, by whether its weights are packed or plain.
        read_rate: Bytes of memory per second, by threads.
        disk: Bytes of a file per second past the page cache, by bytes of one read.
        disk_note: Where, and how.
        experts: Seconds for each weight of experts, by format and by rows for each expert.
        linear: The same for single matrices.
        overhead: By whether weights are packed or plain, seconds of a step, of a layer in a step, of a
            sequence that draws, of each entry of its vocabulary, of each number of a token's row in a layer.
        attention: Seconds of each value of the cache that decoding reads, fp32 and bf16, and of a prompt's operation.
    """

    version: int
    machine: Mapping[str, str]
    measured: str
    threads: int
    memory_bytes: int
    process_bytes: Mapping[str, int]
    read_rate: Mapping[str, tuple[float, ...]]
    disk: Mapping[str, tuple[float, ...]]
    disk_note: str
    experts: Mapping[str, Mapping[str, tuple[float, ...]]]
    linear: Mapping[str, Mapping[str, tuple[float, ...]]]
    overhead: Mapping[str, Mapping[str, tuple[float, ...]]]
    attention: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        check_types(self)
        figures = [
            *self.read_rate.values(),
            *self.disk.values(),
            *self.attention.values(),
        ]
        tables = (*self.experts.values(), *self.linear.values(), *self.overhead.values())
        figures += [one for table in tables for one in table.values()]
        wrong = [one for one in figures if len(one) != 3 or not 0 <= one[1] <= one[0] <= one[2]]
        require(not wrong, f"figures are {wrong[:3]}; each is a middle, a low and a high")
        there = [set(self.overhead) == {"packed", "plain"}, set(self.attention) == set(ATTENTION)]
        there += [set(one) == set(OVERHEADS) for one in self.overhead.values()]
        there += [set(self.process_bytes) == {"packed", "plain"}]
        require(all(there), f"overhead is {list(self.overhead)}, attention is {list(self.attention)}")
        for name in ("experts", "linear"):
            rows = [set(table) for table in getattr(self, name).values()]
            require(
                bool(rows) and all(one == set(map(str, ROWS)) for one in rows),
                f"{name} is not of rows {ROWS}",
            )
        require(any(min(one) > 0 for one in self.read_rate.values()), f"read_rate is {self.read_rate}")

    @property
    def best_read_rate(self) -> Figure:
        """With the threads that read fastest."""
        return max((Figure(*one) for one in self.read_rate.values()), key=lambda one: one.middle)

    def disk_rate(self, size_bytes: float) -> Figure | None:
        """Reading pieces of this size: that of the nearest size that was measured; None where none was."""
        if not self.disk:
            return None
        return Figure(*self.disk[min(self.disk, key=lambda size: abs(int(size) - size_bytes))])


def default_path() -> Path:
    """Where this machine's profile is: `~/.cache/moiety/`, or below XDG_CACHE_HOME."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "moiety" / f"profile-{platform.node() or 'here'}.json"


def write_profile(profile: Profile, path: Path) -> None:
    """Write it whole or not at all.

    Raises:
        StorageError: the system refused.
    """
    storage.write_atomically(path, json.dumps(to_dict(profile), indent=1, allow_nan=False).encode())


def read_profile(path: Path) -> Profile:
    """A profile from a file.

    Raises:
        FormatError: it is none, or of another version.
        StorageError: it cannot be read.
    """
    values = storage.read_json(path)
    again = "`moiety plan --measure` writes a new one"
    if values.get("version") != VERSION:
        raise FormatError(f"{path} has version {values.get('version')!r}; allowed is {VERSION}", hint=again)
    try:
        return from_dict(Profile, {key: _tuples(value) for key, value in values.items()})
    except (ConfigError, TypeError) as error:
        raise FormatError(f"{path} is no profile: {error}", hint=again) from error


def _tuples(value: Any) -> Any:
    """Lists inside objects as tuples: JSON has none."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(value) if isinstance(value, list) else value


def append_history(entry: Mapping[str, Any], path: Path) -> None:
    """Add a verdict to a profile's history: one line, in one write, so that two processes do not mix theirs.

    Raises:
        StorageError: the system refused.
    """
    file = path.with_suffix(".history.jsonl")
    line = (json.dumps(entry, allow_nan=False) + "\n").encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror}") from error


def read_history(path: Path) -> list[dict[str, Any]]:
    """The verdicts of a profile's history, the oldest first; none where there is no file.

    Raises:
        FormatError: a line that is no verdict.
    """
    file = path.with_suffix(".history.jsonl")
    if not file.is_file():
        return []
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    return [storage.parse_json(file, line) for line in lines]
