"""Health of one layer's router: how evenly experts are used, how sure it is, how often its choice is a near-tie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moiety.routing import Routing

__all__ = ["NEAR_TIE", "RoutingHealth", "add", "health"]

NEAR_TIE = 1e-3

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@torch.no_grad()
def health(routing: Routing, *, bias_E: Tensor | None = None) -> RoutingHealth:
    """Numbers about one layer's routing of one batch; one transfer from the device, no loop over tokens.

    Args:
        routing: Of one layer. Without logits there is no `router_z`; without scores no `router_entropy`
            and no `near_tie_rate`.
        bias_E: The selection bias that was added to the scores for the choice, if there was one, (E,).
    """
    device = routing.counts_E.device
    real_T = routing.valid_T
    if real_T is None:
        real_T = torch.ones(routing.tokens, dtype=torch.bool, device=device)
    sums = [real_T.sum()]
    if routing.logits_TE is not None:
        squared_T = routing.logits_TE.float().logsumexp(dim=-1).square()
        sums.append(squared_T.masked_fill(~real_T, 0.0).sum())
    if routing.score_TE is not None:
        score_TE = routing.score_TE.float()
        share_TE = score_TE / score_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        sums.append(torch.special.entr(share_TE).sum(dim=-1).masked_fill(~real_T, 0.0).sum())
        sums += _near_ties(routing, score_TE, bias_E)
    # float32 counts are exact up to 2^24 of one batch, and some devices have no float64
    counts = torch.cat([routing.counts_E.float(), torch.stack([one.float() for one in sums])]).tolist()
    numbers = iter(counts[routing.experts :])
    tokens = int(next(numbers))
    router_z = next(numbers) / max(tokens, 1) if routing.logits_TE is not None else None
    entropy = near_tie_rate = None
    if routing.score_TE is not None:
        entropy = next(numbers) / max(tokens, 1) / math.log(max(routing.experts, 2))
        near, judged = next(numbers), next(numbers)
        near_tie_rate = near / max(judged, 1)
    return RoutingHealth(
        counts_E=np.array(counts[: routing.experts], np.int64),
        tokens=tokens,
        dropped=max(routing.dropped - routing.moved, 0),
        router_z=router_z,
        router_entropy=entropy,
        near_tie_rate=near_tie_rate,
    )


def _near_ties(routing: Routing, score_TE: Tensor, bias_E: Tensor | None) -> list[Tensor]:
    """Tokens whose choice was a near-tie, and tokens that had a choice: some expert taken and some not."""
    compared_TE = score_TE if bias_E is None else score_TE + bias_E
    chosen_TE = torch.zeros_like(compared_TE, dtype=torch.bool).view(-1)
    chosen_TE[routing.token_N * routing.experts + routing.expert_N] = True
    chosen_TE = chosen_TE.view(compared_TE.shape)
    worst_T = compared_TE.masked_fill(~chosen_TE, math.inf).amin(dim=-1)
    best_T = compared_TE.masked_fill(chosen_TE, -math.inf).amax(dim=-1)
    judged_T = worst_T.isfinite() & best_T.isfinite()
    scale_T = compared_TE.abs().amax(dim=-1)
    near_T = judged_T & ((worst_T - best_T).abs() <= NEAR_TIE * scale_T)
    return [near_T.sum(), judged_T.sum()]


def add(first: RoutingHealth, second: RoutingHealth) -> RoutingHealth:
    """The health over both batches: counts add up, means are weighted by tokens."""
    assert len(first.counts_E) == len(second.counts_E), (len(first.counts_E), len(second.counts_E))
    tokens = first.tokens + second.tokens

    def mean(name: str) -> float | None:
        one, two = getattr(first, name), getattr(second, name)
        if one is None or two is None:
            return None
        return float((one * first.tokens + two * second.tokens) / max(tokens, 1))

    return RoutingHealth(
        counts_E=first.counts_E + second.counts_E,
        tokens=tokens,
        dropped=first.dropped + second.dropped,
        router_z=mean("router_z"),
        router_entropy=mean("router_entropy"),
        near_tie_rate=mean("near_tie_rate"),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingHealth:
    """One layer's routing over one or more batches. With no pairs, loads are 0 and nothing is uneven.

    Args:
        counts_E: Pairs of each expert, int64 (E,).
        tokens: Tokens that were real, not padding.
        dropped: Pairs that a capacity policy took away.
        router_z: Mean over tokens of logsumexp(logits)^2 (arXiv 2202.08906); None without logits.
        router_entropy: Mean over tokens of the entropy of a token's scores, scaled to sum to 1, over
            ln E: 0 for a router that is certain, 1 for one that has no opinion; None without scores.
        near_tie_rate: Share of tokens for which the worst chosen and the best unchosen expert differ by
            at most 1e-3 of the token's largest absolute score (selection bias included). Rounding may
            route them otherwise elsewhere. Tokens with no expert chosen or none left are not counted;
            None without scores. For token-choice routers only.
    """

    counts_E: Integers
    tokens: int
    dropped: int = 0
    router_z: float | None = None
    router_entropy: float | None = None
    near_tie_rate: float | None = None

    def sums(self) -> Floats:
        """Everything as numbers that add up over batches."""
        means = [0.0 if mean is None else mean * self.tokens for mean in self._means]
        return np.concatenate([self.counts_E, [self.tokens, self.dropped, *means]]).astype(np.float64)

    def of_sums(self, values: Floats) -> RoutingHealth:
        """The health that such numbers mean, with the statistics that this one has."""
        tokens, dropped, *sums = values[len(self.counts_E) :].tolist()
        means = [
            None if mean is None else one / max(tokens, 1)
            for mean, one in zip(self._means, sums, strict=True)
        ]
        counts_E = values[: len(self.counts_E)].astype(np.int64)
        return RoutingHealth(
            counts_E=counts_E,
            tokens=int(tokens),
            dropped=int(dropped),
            router_z=means[0],
            router_entropy=means[1],
            near_tie_rate=means[2],
        )

    @property
    def _means(self) -> tuple[float | None, float | None, float | None]:
        return self.router_z, self.router_entropy, self.near_tie_rate

    @property
    def pairs(self) -> int:
        """Number of pairs N."""
        return int(self.counts_E.sum())

    @property
    def load_E(self) -> Floats:
        """Pairs of each expert over the ideal N / E, (E,): 1 is perfect balance."""
        return np.asarray(self.counts_E * (len(self.counts_E) / max(self.pairs, 1)), np.float64)

    @property
    def max_vio(self) -> float:
        """(largest load - mean) / mean: 0 is perfect, E - 1 is all on one expert (arXiv 2408.15664)."""
        return float(self.load_E.max()) - 1.0 if self.pairs else 0.0

    @property
    def min_load(self) -> float:
        """Smallest load over ideal."""
        return float(self.load_E.min())

    @property
    def variation(self) -> float:
        """Coefficient of variation of the load: standard deviation over mean (arXiv 1701.06538)."""
        return float(self.load_E.std())

    @property
    def load_entropy(self) -> float:
        """Entropy of the load over ln E: 1 is perfect balance, 0 is all on one expert."""
        if self.pairs == 0 or len(self.counts_E) == 1:
            return 1.0
        share_E = self.counts_E[self.counts_E > 0] / self.pairs
        return float(-(share_E * np.log(share_E)).sum() / math.log(len(self.counts_E)))

    @property
    def dead(self) -> int:
        """Experts that got no pair."""
        return int((self.counts_E == 0).sum())

    @property
    def drop_rate(self) -> float:
        """Dropped pairs over all that the router wanted."""
        return self.dropped / max(self.dropped + self.pairs, 1)

    @property
    def experts_per_token(self) -> float:
        """Pairs over real tokens."""
        return self.pairs / max(self.tokens, 1)

    def numbers(self) -> dict[str, float | int | None]:
        """What fits in one line of a log, by name."""
        return {
            "tokens": self.tokens,
            "max_vio": self.max_vio,
            "min_load": self.min_load,
            "variation": self.variation,
            "load_entropy": self.load_entropy,
            "dead": self.dead,
            "drop_rate": self.drop_rate,
            "experts_per_token": self.experts_per_token,
            "router_z": self.router_z,
            "router_entropy": self.router_entropy,
            "near_tie_rate": self.near_tie_rate,
        }
