"""How a model gets experts or loses some: the options, apart from the work so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moiety.fields import check_types, not_negative, option, require

__all__ = ["SurgeryOptions", "UpcycleOptions"]


@dataclass(frozen=True, kw_only=True)
class SurgeryOptions:
    """How many experts to leave, and what decides which."""

    experts_per_layer: int = option(0, help="so many are left in every layer that has more")
    drop_share: float = option(
        0.0, help="of all experts this part goes, wherever it costs least: layers may differ"
    )
    plan: str = option("", help="a file that says what to do, as --dry-run --json or surgery.json has it")
    by: str = option(
        "", help="prune: reap, weight, load, random; merge: output, router, random; none: the first"
    )
    trace: str = option(
        "", help="a trace of the model (--record) instead of running it on texts; not for all --by"
    )
    seed: int = option(0, help="of --by random")

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "experts_per_layer")
        require(0 <= self.drop_share < 1, f"drop_share is {self.drop_share}; allowed is above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """How experts are made of a dense model (docs/upcycling.md)."""

    experts: int = option(8, help="experts in each layer")
    top_k: int = option(2, help="experts per token")
    method: Literal["copy", "split", "drop"] = option(
        "copy",
        help="copies (2212.05055), slices of copies (2410.07524), or copies partly drawn anew (2502.19261)",
    )
    slices: int = option(0, help="split: slices of a copy; 0 is as many as experts, which makes one copy")
    drop: float = option(0.5, help="drop: share of an expert's inner columns that is drawn anew")
    noise: float = option(
        0.0, help="standard deviation of noise on experts, as a share of the matrix's own; 0 is none"
    )
    layers: str = option(
        "all", help="layers that get experts: all, every:4 (3, 7, ...), or numbers as 0,5,11"
    )
    shared: Literal["none", "plain", "gated"] = option(
        "none", help="keep the dense feed-forward as shared expert; the others begin by answering nothing"
    )
    router: Literal["random", "zeros", "kmeans"] = option(
        "random", help="the router's first weights; kmeans goes by hidden states of the text"
    )
    router_deviation: float = option(0.02, help="standard deviation of router 'random'")
    renormalize: bool = option(True, help="divide the chosen weights by their sum")
    seed: int = option(0, help="seed of everything drawn")

    def __post_init__(self) -> None:
        check_types(self)
        require(self.experts > 1, f"experts is {self.experts}; it must be at least 2")
        require(1 <= self.top_k <= self.experts, f"top_k is {self.top_k}; allowed is 1 to {self.experts}")
        not_negative(self, "slices")
        require(
            self.method == "split" or not self.slices,
            f"slices is {self.slices}, but method {self.method!r} cuts nothing",
            "use method split",
        )
        require(
            self.experts % self.granularity == 0,
            f"slices is {self.slices}, which does not divide the {self.experts} experts",
        )
        require(0 < self.drop <= 1, f"drop is {self.drop}; allowed is above 0 to 1")
        not_negative(self, "noise", "router_deviation", "seed")

    @property
    def granularity(self) -> int:
        """Slices that a copy is cut into."""
        return (self.slices or self.experts) if self.method == "split" else 1

    @property
    def grouped(self) -> bool:
        """True if the slices of a copy have the same router row, so that a token chooses all of them together."""
        return self.top_k % self.granularity == 0

    def moe_layers(self, layers: int) -> tuple[int, ...]:
        """The layers that get experts, of as many as the model has.

        Raises:
            ConfigError: `layers` says none, or others than there are.
        """
        kind, _, number = self.layers.partition(":")
        words = self.layers.split(",")
        if self.layers == "all":
            return tuple(range(layers))
        if kind == "every" and number.isdecimal() and 1 <= int(number) <= layers:
            return tuple(range(int(number) - 1, layers, int(number)))
        known = all(word.strip().isdecimal() and int(word) < layers for word in words)
        require(
            known and len({int(word) for word in words}) == len(words),
            f"layers is {self.layers!r}; the model has layers 0 to {layers - 1}",
            "write all, every:2, or different numbers as 1,3,5",
        )
        return tuple(sorted(int(word) for word in words))
