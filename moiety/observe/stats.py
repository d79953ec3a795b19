"""What a `Routing` says about its router: health of a layer, who takes what, and whether that is chance.

Everything is a function from routings or counts to numbers; nothing is kept between calls. Counts add up
over steps by `+` or `add`. Axes beyond those of `routing.py`: G groups of tokens (domains, sequences or
token ids), D domains, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moiety.errors import UsageError
from moiety.routing import Routing

__all__ = [
    "Baseline",
    "RoutingHealth",
    "Specialization",
    "TokenShare",
    "add",
    "coactivation",
    "counts_by_group",
    "displacement",
    "health",
    "preference",
    "shares",
    "specialization_of_counts",
    "specialization_of_sequences",
    "top_tokens",
]

NEAR_TIE = 1e-3
PREFERS = 1.5  # an expert prefers a domain that gives it this many times what the average domain does
LITTLE = 0.05  # a displacement below this is called little, however certain it is

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


@torch.no_grad()
def counts_by_group(routing: Routing, group_T: Tensor, groups: int) -> Integers:
    """Pairs of each (group, expert), int64 (G, E).

    A group is whatever `group_T` numbers: the domain of each token, its sequence, or its token id (then
    the result is V x E). Padding has no pairs, so its group number does not matter.

    Args:
        routing: Of one layer.
        group_T: Group of each token, int64 (T,), from 0 to `groups` - 1.
        groups: Number of groups G.
    """
    assert group_T.shape == (routing.tokens,), (tuple(group_T.shape), routing.tokens)
    group_N = group_T.to(routing.token_N.device).index_select(0, routing.token_N)
    cell_N = group_N * routing.experts + routing.expert_N
    counts = torch.bincount(cell_N, minlength=groups * routing.experts)
    assert len(counts) == groups * routing.experts, (len(counts), groups, routing.experts)
    counts_GE: Integers = counts.view(groups, routing.experts).cpu().numpy()
    return counts_GE


@torch.no_grad()
def coactivation(routing: Routing) -> Integers:
    """Tokens that experts i and j share, int64 (E, E); the diagonal is the pairs of each expert.

    Row i over its diagonal entry is how often j is there when i is (OLMoE eq. 6, arXiv 2409.02060).
    """
    chosen_TE = torch.zeros(routing.tokens, routing.experts, device=routing.token_N.device)
    chosen_TE[routing.token_N, routing.expert_N] = 1.0
    together_EE: Integers = (chosen_TE.T @ chosen_TE).round().long().cpu().numpy()
    return together_EE


def top_tokens(
    counts_VE: Integers, seen_V: Integers, *, best: int = 10, at_least: int = 10
) -> tuple[tuple[TokenShare, ...], ...]:
    """For each expert the token ids it gets most, relative to how often they occur (OLMoE eq. 8, arXiv 2409.02060).

    Args:
        counts_VE: Pairs of each (token id, expert), from `counts_by_group`, summed over batches.
        seen_V: Occurrences of each token id in the same batches.
        best: How many per expert, at most.
        at_least: Leave out tokens seen less often: one occurrence is always taken entirely by somebody.
    """
    assert counts_VE.ndim == 2 and seen_V.shape == counts_VE.shape[:1], (counts_VE.shape, seen_V.shape)
    common = np.flatnonzero(seen_V >= max(at_least, 1))
    pairs = counts_VE[common]
    share = pairs / seen_V[common, None]
    found = []
    for expert in range(counts_VE.shape[1]):
        order = np.lexsort((common, -pairs[:, expert], -share[:, expert]))[:best]
        found.append(
            tuple(
                TokenShare(
                    token_id=int(common[i]),
                    share=float(share[i, expert]),
                    occurrences=int(seen_V[common[i]]),
                )
                for i in order
                if pairs[i, expert] > 0
            )
        )
    return tuple(found)


def shares(counts_LDE: npt.NDArray[Any]) -> Floats:
    """Share of a domain's pairs that each expert gets, (L, D, E): N_iD / N_D (OLMoE eq. 7, arXiv 2409.02060).

    A domain without pairs has a row of zeros, otherwise a row sums to 1.
    """
    counts = np.asarray(counts_LDE, np.float64)
    result: Floats = counts / np.maximum(counts.sum(-1, keepdims=True), 1.0)
    return result


def preference(counts_LDE: npt.NDArray[Any]) -> Floats:
    """Share of a domain's pairs over the share of the average domain, (L, D, E); 1 where nothing is known.

    The average weighs domains alike, so a large domain does not set the standard for the others.
    """
    share_LDE = shares(counts_LDE)
    seen_LD1 = share_LDE.sum(-1, keepdims=True) > 0
    mean_L1E = _average_domain(share_LDE)
    known_LDE = seen_LD1 & (mean_L1E > 0)
    result: Floats = np.where(known_LDE, share_LDE / np.where(mean_L1E > 0, mean_L1E, 1.0), 1.0)
    return result


def displacement(counts_LDE: npt.NDArray[Any]) -> Floats:
    """Score of specialisation of each layer, (L,): the share of choices that sets domains apart.

    score_l = mean over domains of 1/2 sum_e |p(e | domain) - mean over domains of p(e | domain)|,
    the total-variation distance from the average domain: this share of a domain's pairs would have to
    go to other experts for the domain to be routed like the average. 0 when all domains are routed
    alike, 1 - 1/D when no two of D domains share an expert. Few pairs alone make it larger than 0,
    so compare it with a `Baseline`. Domains without pairs are left out.
    """
    share_LDE = shares(counts_LDE)
    seen_LD = share_LDE.sum(-1) > 0
    away_LD = 0.5 * np.abs(share_LDE - _average_domain(share_LDE)).sum(-1)
    result: Floats = (away_LD * seen_LD).sum(-1) / np.maximum(seen_LD.sum(-1), 1)
    return result


def _average_domain(share_LDE: Floats) -> Floats:
    seen_LD1 = (share_LDE.sum(-1, keepdims=True) > 0).sum(-2, keepdims=True)
    result: Floats = share_LDE.sum(-2, keepdims=True) / np.maximum(seen_LD1, 1)
    return result


def specialization_of_sequences(
    counts_SLE: Integers,
    domain_S: Integers,
    domains: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    experts_L: Sequence[int] | None = None,
    shuffles: int = 200,
    seed: int = 0,
) -> Specialization:
    """Which expert takes which domain, against a domain-blind router and against shuffled labels.

    Shuffling the domain labels of whole sequences keeps what makes chance look like specialisation: few
    sequences, tokens of a sequence that are alike, uneven experts. It is the baseline to beat.

    Args:
        counts_SLE: Pairs of each (sequence, layer, expert).
        domain_S: Domain of each sequence, an index into `domains`.
        domains: Names.
        layers: Number of each layer in its model; None counts from 0.
        experts_L: Experts of each layer where they differ; further columns are 0. None means all columns.
        shuffles: Random draws for each baseline.
        seed: Of the draws.

    Raises:
        UsageError: fewer than two domains, or fewer than 20 draws.
    """
    _check(domains, shuffles)
    assert counts_SLE.ndim == 3 and domain_S.shape == counts_SLE.shape[:1], (counts_SLE.shape, domain_S.shape)
    sequences, depth, experts = counts_SLE.shape
    flat_SX = counts_SLE.reshape(sequences, depth * experts).astype(np.float64)

    def by_domain(label_S: Integers) -> Floats:
        member_DS = (label_S == np.arange(len(domains))[:, None]).astype(np.float64)
        together: Floats = (member_DS @ flat_SX).reshape(len(domains), depth, experts).transpose(1, 0, 2)
        return together

    generator = np.random.default_rng(seed)
    shuffled = _baseline(lambda: by_domain(generator.permutation(domain_S)), shuffles)
    uniform = _blind(by_domain(domain_S), shuffles, seed)
    return _judge(by_domain(domain_S), domains, layers, uniform, shuffled, experts_L)


def specialization_of_counts(
    counts_LDE: Integers,
    domains: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    shuffles: int = 200,
    seed: int = 0,
) -> Specialization:
    """As `specialization_of_sequences`, where only sums per domain are known: no shuffled baseline.

    Args:
        counts_LDE: Pairs of each (layer, domain, expert).
        domains: Names.
        layers: Number of each layer in its model; None counts from 0.
        shuffles: Random draws for the baseline.
        seed: Of the draws.

    Raises:
        UsageError: fewer than two domains, or fewer than 20 draws.
    """
    _check(domains, shuffles)
    return _judge(counts_LDE, domains, layers, _blind(counts_LDE, shuffles, seed), None)


def _check(domains: Sequence[str], shuffles: int) -> None:
    if len(domains) < 2:
        raise UsageError(
            f"specialisation compares domains, and {len(domains)} was given; at least 2 are needed",
            hint="measure on texts of two or more kinds",
        )
    if shuffles < 20:
        raise UsageError(f"shuffles is {shuffles}; a 95 % interval needs at least 20", hint="use 200")


def _baseline(draw: Callable[[], npt.NDArray[Any]], draws: int) -> Baseline:
    score_RL = np.stack([displacement(draw()) for _ in range(draws)])
    low_L, high_L = np.asarray(np.quantile(score_RL, (0.025, 0.975), axis=0), np.float64)
    overall_R = score_RL.mean(axis=1)
    return Baseline(
        mean_L=score_RL.mean(axis=0, dtype=np.float64),
        low_L=low_L,
        high_L=high_L,
        overall=float(overall_R.mean()),
        overall_high=float(np.quantile(overall_R, 0.975)),
    )


def _blind(counts_LDE: npt.NDArray[Any], draws: int, seed: int) -> Baseline:
    """Scores of a router that draws each pair of every domain from the average domain's shares."""
    generator = np.random.default_rng([seed, 1])
    mean_L1E = _average_domain(shares(counts_LDE))
    total_L11 = mean_L1E.sum(-1, keepdims=True)
    mean_L1E = np.where(
        total_L11 > 0, mean_L1E / np.where(total_L11 > 0, total_L11, 1.0), 1 / mean_L1E.shape[2]
    )
    pairs_LD = counts_LDE.sum(-1).astype(np.int64)
    return _baseline(lambda: generator.multinomial(pairs_LD, mean_L1E), draws)


def _judge(
    counts_LDE: npt.NDArray[Any],
    domains: Sequence[str],
    layers: Sequence[int] | None,
    uniform: Baseline,
    shuffled: Baseline | None,
    experts_L: Sequence[int] | None = None,
) -> Specialization:
    assert counts_LDE.ndim == 3 and counts_LDE.shape[1] == len(domains), (counts_LDE.shape, len(domains))
    names = tuple(range(len(counts_LDE)) if layers is None else layers)
    assert len(names) == len(counts_LDE), (names, counts_LDE.shape)
    return Specialization(
        domains=tuple(domains),
        layers=names,
        counts_LDE=counts_LDE.astype(np.int64),
        experts_L=tuple(experts_L or [counts_LDE.shape[2]] * len(names)),
        score_L=displacement(counts_LDE),
        uniform=uniform,
        shuffled=shuffled,
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


@dataclass(frozen=True, kw_only=True)
class TokenShare:
    """One token id of one expert: `share` of its `occurrences` went there."""

    token_id: int
    share: float
    occurrences: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """Scores that chance alone makes: mean and 95 % interval of each layer, and of the mean over layers."""

    mean_L: Floats
    low_L: Floats
    high_L: Floats
    overall: float
    overall_high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Specialization:
    """Which expert takes which domain, and how much of that is chance.

    Args:
        domains: Names, D of them.
        layers: Number of each layer in its model, L of them.
        counts_LDE: Pairs of each (layer, domain, expert).
        experts_L: Experts of each layer; where one has fewer than others, its further columns are 0.
        score_L: `displacement` of each layer.
        uniform: Scores of a router that sends each pair of every domain as the average domain would.
        shuffled: Scores when the domain labels of whole sequences are shuffled; None if sequences are unknown.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    counts_LDE: Integers
    experts_L: tuple[int, ...]
    score_L: Floats
    uniform: Baseline
    shuffled: Baseline | None

    @property
    def score(self) -> float:
        """Mean of the layers' scores."""
        return float(self.score_L.mean())

    @property
    def chance(self) -> Baseline:
        """The strictest baseline there is."""
        return self.uniform if self.shuffled is None else self.shuffled

    @property
    def beyond_chance(self) -> bool:
        """True if the mean score lies above the 95 % interval of `chance`: one test, not one per layer."""
        return self.score > self.chance.overall_high

    @property
    def verdict(self) -> str:
        """What the numbers allow to say, in a few sentences."""
        name = "domain-blind" if self.shuffled is None else "shuffled-label"
        chance = self.chance
        against = (
            f"{self.score:.1%} of a domain's expert choices differ from the average domain's; "
            f"the {name} baseline gives {chance.overall:.1%} (95% of draws below {chance.overall_high:.1%})"
        )
        if not self.beyond_chance:
            return f"No specialisation by domain beyond chance: {against}."
        if self.score < LITTLE:
            return f"Hardly any specialisation by domain, though more than chance: {against}."
        ratio = self.score / chance.overall if chance.overall > 0 else math.inf
        times = f", {ratio:.1f}× as much as chance" if math.isfinite(ratio) else ""
        return f"Experts specialise by domain: {against}{times}. {self._strongest()}"

    def favourites(self, layer: int) -> tuple[str, tuple[tuple[int, float], ...]]:
        """The domain with the most partial expert of the layer at place `layer`, and up to 3 experts that prefer it.

        Each comes with its preference, which is at least 1.5. An expert with less than half an equal part
        of the domain is passed over: few pairs make any ratio.
        """
        preference_DE = preference(self.counts_LDE)[layer]
        enough = shares(self.counts_LDE)[layer] * self.experts_L[layer] >= 0.5
        preference_DE = np.where(enough, preference_DE, 0.0)
        liked = int(preference_DE.max(-1).argmax())
        found = [(int(e), float(preference_DE[liked, e])) for e in np.argsort(-preference_DE[liked])]
        return self.domains[liked], tuple(one for one in found[:3] if one[1] >= PREFERS)

    def _strongest(self) -> str:
        place = int((self.score_L - self.chance.mean_L).argmax())
        domain, found = self.favourites(place)
        if not found:
            return f"It is strongest in layer {self.layers[place]}, spread over many experts."
        names = [str(expert) for expert, _ in found]
        times = ", ".join(f"{preference:.1f}×" for _, preference in found)
        many = f"experts {', '.join(names[:-1])} and {names[-1]} prefer"
        who = many if len(names) > 1 else f"expert {names[0]} prefers"
        return (
            f"It is strongest in layer {self.layers[place]}, where {who} {domain} "
            f"({times} what the average domain gives {'them' if len(names) > 1 else 'it'})."
        )
