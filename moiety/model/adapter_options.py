"""What an adapter is to be, apart from the code so that reading it needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moiety.fields import check_types, not_negative, option, positive, require

__all__ = ["LoraOptions"]


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """An adapter: where it is, and how large. Every weight outside of it is frozen.

    A target is a part of the model, `attention`, `experts` (routed), `shared`, `dense` or `head`; or one projection of
    it, such as `attention.q`, `attention.out`, `experts.gate_up`, `experts.down`, `shared.gate`; or `all`.
    """

    rank: int = option(8, help="rank of the additions")
    alpha: float = option(16.0, help="additions are scaled by this over the rank")
    rslora: bool = option(False, help="scale by alpha over the square root of the rank (arXiv 2312.03732)")
    expert_rank: int = option(0, help="rank in routed experts; 0 is the same as elsewhere")
    targets: tuple[str, ...] = option(("attention", "experts"), help="parts or projections to adapt, or all")
    layers: tuple[int, ...] = option((), help="only these layers; none means all")
    share_a: bool = option(False, help="all experts of a layer have the same A")
    router: bool = option(False, help="train the routers too, whole")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "rank", "alpha")
        not_negative(self, "expert_rank")
        require(
            len(self.targets) > 0, "there is no target", "attention, experts, shared, dense, head, or all"
        )

    def scale(self, rank: int) -> float:
        """Factor on B A of this rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)
