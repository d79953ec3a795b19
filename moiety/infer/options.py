"""How to generate: the options, apart from the code so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moiety.config import check_types, option, require

__all__ = ["SamplingOptions"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What to draw from. Temperature, then top-k, top-p and min-p, each on what the one before left."""

    temperature: float = option(0.8, help="divides the logits; 0 takes the best token every time")
    top_k: int = option(0, help="keep this many best tokens; 0 keeps all")
    top_p: float = option(1.0, help="keep the smallest set of best tokens with this much probability")
    min_p: float = option(0.0, help="keep tokens with at least this share of the best one's probability")
    seed: int = option(0, help="seed of the draw")

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; allowed is 0 to 2**63 - 1")
        require(self.temperature >= 0, f"temperature is {self.temperature}; it must not be negative")
        require(self.top_k >= 0, f"top_k is {self.top_k}; it must not be negative")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; allowed is above 0 to 1")
        require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; allowed is 0 to 1")
