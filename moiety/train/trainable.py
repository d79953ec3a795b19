"""What of a model trains: its parameters by what they are for, each group with a learning rate of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moiety.errors import ConfigError
from moiety.formats.policy import kind_of

__all__ = ["ADAPTERS", "GROUPS", "ROUTER", "Group", "group_of", "train_only"]

ADAPTERS, ROUTER, FULL = "adapters", "router", "full"
GROUPS = ("experts", "shared", "dense", "attention", "norm", "embedding", "head", ROUTER, "other", ADAPTERS)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters of one kind.

    Args:
        name: One of `GROUPS`.
        parameters: How many numbers they hold.
        learning_rate: The highest; None where they stay as they are.
    """

    name: str
    parameters: int
    learning_rate: float | None


def group_of(parameter: str) -> str:
    """The group of a parameter of a `Transformer`, by its name; the gate of a shared expert belongs to that."""
    words = parameter.split(".")
    if "adapters" in words:
        return ADAPTERS
    return "shared" if "shared_gate" in words else kind_of(parameter)


def train_only(
    model: nn.Module, wanted: Sequence[str], learning_rate: float
) -> tuple[list[Group], dict[str, float]]:
    """Make exactly the wanted groups learn, and say what came of it.

    Args:
        model: Its parameters' `requires_grad` is set.
        wanted: `NAME` or `NAME=LEARNING_RATE`; "full" is everything but the routers and adapters.
        learning_rate: Of groups without one.

    Returns:
        All groups that the model has; and of each parameter that learns, its rate as a share of `learning_rate`.

    Raises:
        ConfigError: a group that there is not, that matches nothing, is named twice, or a rate that is none.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        members.setdefault(group_of(name), []).append((name, parameter))
    rates: dict[str, float] = {}
    for text in sorted(
        wanted, key=lambda text: not text.startswith(FULL)
    ):  # a group's own rate comes after full's
        name, mark, value = text.partition("=")
        if name != FULL and name not in GROUPS:
            raise ConfigError(f"train names {name!r}", hint=f"there are {FULL}, {', '.join(GROUPS)}")
        chosen = [one for one in GROUPS if one not in (ROUTER, ADAPTERS)] if name == FULL else [name]
        chosen = [one for one in chosen if one in members]
        if not chosen:
            raise ConfigError(
                f"train names {name!r}, and this model has no such parameters",
                hint=f"it has {', '.join(one for one in GROUPS if one in members)}",
            )
        if sum(text.partition("=")[0] == name for text in wanted) > 1:
            raise ConfigError(f"train names {name!r} twice")
        rates |= dict.fromkeys(chosen, _rate(text, value) if mark else learning_rate)
    factors: dict[str, float] = {}
    for group, parameters in members.items():
        for name, parameter in parameters:
            parameter.requires_grad_(group in rates)
            if group in rates:
                factors[name] = rates[group] / learning_rate
    groups = [
        Group(
            name=name,
            parameters=sum(one.numel() for _, one in members[name]),
            learning_rate=rates.get(name),
        )
        for name in GROUPS
        if name in members
    ]
    return groups, factors


def _rate(text: str, value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(
            f"train says {text!r}: {value!r} is no learning rate", hint="router=1e-6, for instance"
        )
    return rate
