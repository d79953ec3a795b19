"""The fields of every config: help text, checks by type, and plain JSON values both ways. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

from moiety.errors import ConfigError

__all__ = [
    "check_types",
    "from_dict",
    "not_negative",
    "option",
    "positive",
    "require",
    "size_bytes",
    "to_dict",
]

ConfigType = TypeVar("ConfigType")


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """A dataclass field with its help text; the command line reads the same text.

    Args:
        default: Value when none is given; a field without one must be given.
        help: One line, with the unit.
    """
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str, hint: str | None = None) -> None:
    """Raise ConfigError with `message` and `hint` unless `condition` holds."""
    if not condition:
        raise ConfigError(message, hint=hint)


def positive(config: Any, *names: str) -> None:
    """Raise ConfigError for a field of `names` that is 0 or below; one that is None stands for something else."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{name} is {value}; it must be positive")


def not_negative(config: Any, *names: str) -> None:
    """Raise ConfigError for a field of `names` that is below 0; one that is None stands for something else."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= 0, f"{name} is {value}; it must not be negative")


def size_bytes(text: str, name: str) -> int:
    """Bytes from a text such as 12GiB, 24 GB or 1073741824.

    Raises:
        ConfigError: another form, or nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"{name} is {text!r}; allowed is a positive number with a unit",
            hint="12GiB, 24GB or 500MiB for instance",
        )
    power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    return round(float(found[1]) * math.pow(1024 if found[3] else 1000, power))


def check_types(config: Any) -> None:
    """Refuse a value whose type is not the field's, before any arithmetic on it can go wrong."""
    hints = _hints(config.__class__)
    for item in dataclasses.fields(config):
        value, wanted = getattr(config, item.name), hints[item.name]
        if not _fits(value, wanted):
            shown = getattr(wanted, "__name__", str(wanted))
            require(
                False,
                f"{type(config).__name__}.{item.name} is {value!r}, which is not {shown}",
                item.metadata.get("help"),
            )


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    """Types of fields: evaluated once, because a server makes options for every request."""
    return typing.get_type_hints(kind)


def _fits(value: Any, wanted: Any) -> bool:
    origin = typing.get_origin(wanted)
    if origin is Literal:
        return value in typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(wanted))
    if origin is tuple:
        kinds = typing.get_args(wanted)
        if not isinstance(value, tuple) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
            return False
        return all(_fits(one, kinds[0]) for one in value)
    if origin is Mapping:
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(all(map(_fits, pair, typing.get_args(wanted))) for pair in pairs)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; `from_dict` reads it back equal."""
    return dataclasses.asdict(config)


def from_dict(kind: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """Build a config of `kind` from JSON values.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, or a bad value.
    """
    require(
        isinstance(values, Mapping), f"{kind.__name__} must be an object with named values, not {values!r}"
    )
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{kind.__name__} has no option {key!r}",
                hint=f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}",
            )
    missing = [
        name for name, item in known.items() if item.default is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise ConfigError(
            f"{kind.__name__} needs {', '.join(missing)}", hint=known[missing[0]].metadata.get("help")
        )
    return kind(**{key: _revive(value, hints[key]) for key, value in values.items()})


def _revive(value: Any, wanted: Any) -> Any:
    """JSON has no tuples and no dataclasses: turn lists and objects back into what the field holds."""
    for part in (wanted, *typing.get_args(wanted)):
        if isinstance(value, Mapping) and dataclasses.is_dataclass(part):
            return from_dict(typing.cast(type, part), value)
        if isinstance(value, list) and typing.get_origin(part) is tuple:
            return tuple(_revive(one, typing.get_args(part)[0]) for one in value)
    return value
