"""Which part of a model gets which format: the parts, by the names of parameters, and a policy in a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moiety.config import option
from moiety.errors import ConfigError
from moiety.formats import format_named

__all__ = ["PARTS", "Kind", "Policy", "kind_of", "policy_named"]

Kind = Literal["experts", "shared", "dense", "attention", "head", "embedding", "router", "norm", "other"]
ROUTER = ("gate", "gate_noise", "shared_gate", "selection_bias")
PARTS = ("experts", "shared", "dense", "attention", "head")
HEAD = "int8-g32"  # beside formats of four bits: every token passes through the head


def kind_of(name: str) -> Kind:
    """What part of a model a parameter belongs to, by its name."""
    parts = name.split(".")
    if parts[0] in ("embed", "head"):
        return "embedding" if parts[0] == "embed" else "head"
    if any(part in ROUTER for part in parts):
        return "router"
    if any(part.endswith("norm") for part in parts):
        return "norm"
    if "experts" in parts:
        return "experts"
    if "shared" in parts:
        return "shared"
    if "attention" in parts:
        return "attention"
    return "dense" if "feed_forward" in parts else "other"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A format for each part of a model; an empty name keeps a part as it is.

    Routers, norms, biases and the embedding are always kept.
    """

    experts: str = option("int4-g32", help="routed experts")
    shared: str = option("int4-g32", help="experts that every token uses")
    dense: str = option("int4-g32", help="feed-forwards of dense blocks")
    attention: str = option("int4-g32", help="projections of attention")
    head: str = option(HEAD, help="the output head")

    def __post_init__(self) -> None:
        for part in PARTS:
            if getattr(self, part):
                format_named(getattr(self, part))

    def __call__(self, name: str, shape: tuple[int, ...]) -> str | None:
        """What a tensor of this name is packed in."""
        kind = kind_of(name)
        is_matrix = len(shape) > 1 and not name.endswith("bias")
        return (getattr(self, kind) or None) if kind in PARTS and is_matrix else None


def policy_named(text: str) -> Policy:
    """A policy in a word.

    Args:
        text: A format, for everything (the head of four-bit ones is int8-g32); "int4-mixed": experts in int4-g32, the
            rest in int8-g32; or parts with their formats, "experts=int4-g32+head=int8-g32", the others kept.

    Raises:
        ConfigError: no such format or part.
    """
    if text == "int4-mixed":
        return Policy(shared="int8-g32", dense="int8-g32", attention="int8-g32")
    if "=" not in text:
        form = format_named(text)
        return Policy(**{**dict.fromkeys(PARTS, form.name), "head": form.name if form.bits > 4 else HEAD})
    given = dict(word.partition("=")[::2] for word in text.split("+"))
    unknown = sorted(given.keys() - set(PARTS))
    if unknown:
        raise ConfigError(f"{text!r} names {', '.join(unknown)}", hint=f"parts are {', '.join(PARTS)}")
    return Policy(**{**dict.fromkeys(PARTS, ""), **given})
