"""Capacity: at most C pairs per expert, what happens to those over it, and what it costs.

    C = ceil(factor * pairs / experts)

A policy is one function `(pairs, score_TE, limit, generator) -> Routing` and one line in `POLICIES`: pairs
without weights and the scores they were chosen by go in, other pairs come out, weighed afterwards. What came
in is kept as `Routing.wanted`. Policy "queue" is not among them: it changes no pair but multiplies them in
several `passes`. No policy loops over tokens or pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from moiety.errors import ConfigError
from moiety.routing import Routing

__all__ = ["POLICIES", "Capacity", "Overflow", "Policy", "accounting", "buffer_bytes", "passes"]

Policy = Callable[[Routing, Tensor, int, torch.Generator | None], Routing]
QUEUE = "queue"


def _place_in_expert(expert_N: Tensor, order_N: Tensor, experts: int) -> Tensor:
    """How many pairs of the same expert come before each one, (N,).

    Args:
        expert_N: Expert of each pair, in any order.
        order_N: All pair numbers, those to serve first in front.
        experts: Number of experts E.
    """
    counts_E = torch.bincount(expert_N, minlength=experts)
    start_E = counts_E.cumsum(0) - counts_E
    order_N = order_N[expert_N[order_N].argsort(stable=True)]
    ahead_N = torch.arange(len(order_N), device=order_N.device) - start_E[expert_N[order_N]]
    return torch.empty_like(order_N).scatter_(0, order_N, ahead_N)


def _fits(pairs: Routing, order_N: Tensor, limit: int) -> Tensor:
    """True for the first `limit` pairs of each expert in the given order, bool (N,)."""
    return _place_in_expert(pairs.expert_N, order_N, pairs.experts) < limit


def _best_fit(pairs: Routing, score_TE: Tensor, limit: int) -> Tensor:
    """True for the `limit` best scored pairs of each expert; of equal scores the lower token, bool (N,)."""
    return _fits(pairs, pairs.at_pairs(score_TE).argsort(descending=True, stable=True), limit)


def _position(pairs: Routing, score_TE: Tensor, limit: int, generator: torch.Generator | None) -> Routing:
    """First come, first served, in token order (Switch, arXiv 2101.03961).

    Where `rank_N` is known every token's first choice is served before any second one (GShard, 2006.16668).
    """
    return pairs.keep(_fits(pairs, _by_rank(pairs), limit))


def _by_rank(pairs: Routing) -> Tensor:
    """All pair numbers, first choices in front where ranks are known, else in the order they stand in."""
    if pairs.rank_N is None:
        return torch.arange(pairs.pairs, device=pairs.token_N.device)
    return pairs.rank_N.argsort(stable=True)


def _position_in_sequence(pairs: Routing, sequences: int, limit: int) -> Routing:
    """`_position` with the limit for each sequence by itself; `pairs` itself if every expert has room."""
    assert sequences > 0 and pairs.tokens % sequences == 0, (pairs.tokens, sequences)
    length = max(pairs.tokens // sequences, 1)
    cell_N = pairs.expert_N * sequences + pairs.token_N.div(length, rounding_mode="floor")
    fits_N = _place_in_expert(cell_N, _by_rank(pairs), pairs.experts * sequences) < limit
    return pairs if bool(fits_N.all()) else pairs.keep(fits_N)


def _priority(pairs: Routing, score_TE: Tensor, limit: int, generator: torch.Generator | None) -> Routing:
    """The best scored are served (batch-priority routing of V-MoE, arXiv 2106.05974); ties: the lower token."""
    return pairs.keep(_best_fit(pairs, score_TE, limit))


def _random(pairs: Routing, score_TE: Tensor, limit: int, generator: torch.Generator | None) -> Routing:
    """Every set of `limit` pairs of an expert is as likely as any other."""
    order_N = torch.randperm(pairs.pairs, generator=generator, device=pairs.token_N.device)
    return pairs.keep(_fits(pairs, order_N, limit))


def _changed(pairs: Routing, mask_TE: Tensor) -> Routing:
    """The pairs of `mask_TE` in place of `pairs`, which are remembered; the order of choice means nothing now."""
    new, before_TE = Routing.from_mask(mask_TE, valid_T=pairs.valid_T), pairs.mask_TE
    return dataclasses.replace(
        new,
        wanted=pairs if pairs.kept_N is None else pairs.wanted,
        dropped=pairs.dropped + int((before_TE & ~mask_TE).sum()),
        moved=pairs.moved + int((mask_TE & ~before_TE).sum()),
    )


def _reroute(pairs: Routing, score_TE: Tensor, limit: int, generator: torch.Generator | None) -> Routing:
    """Pairs that `priority` drops go to the next best expert (No-Token-Left-Behind, arXiv 2101.03961 appendix).

    It goes in rounds. In each, every token that still lacks a pair asks the best scored expert that it does
    not use and that has room; an expert accepts in order of score, then token. A score of -inf is no offer.
    """
    kept_N = _best_fit(pairs, score_TE, limit)
    kept = pairs.keep(kept_N)
    used_TE, room_E = kept.mask_TE, limit - kept.counts_E
    lacking_T = torch.bincount(pairs.token_N[~kept_N], minlength=pairs.tokens)
    moved = False
    while True:
        token_M = lacking_T.nonzero().squeeze(1)
        closed_ME = used_TE[token_M] | (room_E == 0)
        best_M, expert_M = score_TE[token_M].masked_fill(closed_ME, float("-inf")).max(dim=1)
        asks_M = best_M > float("-inf")
        token_M, expert_M, best_M = token_M[asks_M], expert_M[asks_M], best_M[asks_M]
        if len(token_M) == 0:
            break
        order_M = best_M.argsort(descending=True, stable=True)
        accepted_M = _place_in_expert(expert_M, order_M, pairs.experts) < room_E[expert_M]
        token_M, expert_M = token_M[accepted_M], expert_M[accepted_M]
        assert len(token_M) > 0, (room_E, limit)  # else the rounds would never end
        used_TE[token_M, expert_M] = True
        room_E = room_E - torch.bincount(expert_M, minlength=pairs.experts)
        lacking_T[token_M] -= 1
        moved = True
    return _changed(pairs, used_TE) if moved else dataclasses.replace(kept, rank_N=None)


def _dense(pairs: Routing, score_TE: Tensor, limit: int, generator: torch.Generator | None) -> Routing:
    """A token that `priority` would take a pair from goes to all experts instead, over the limit.

    Nothing is lost, so `dropped` is 0 and `moved` counts the added pairs. The rows of these tokens are beyond
    the limit: an expert may get as many as there are tokens.
    """
    mask_TE = pairs.mask_TE
    mask_TE[pairs.token_N[~_best_fit(pairs, score_TE, limit)]] = True
    everywhere = _changed(pairs, mask_TE)
    return everywhere if everywhere.moved > pairs.moved else pairs


POLICIES: dict[str, Policy] = {
    "position": _position,
    "priority": _priority,
    "random": _random,
    "reroute": _reroute,
    "dense": _dense,
}


def _rows_per_expert(factor: float, pairs: int, experts: int) -> int:
    """ceil(factor * pairs / experts) of the factor as it is written: 1.1 is eleven tenths, not a bit more."""
    return math.ceil(Fraction(str(float(factor))) * pairs / experts)


@dataclass(frozen=True)
class Capacity:
    """How many rows an expert takes, and what becomes of the others.

    ST-MoE (arXiv 2202.08906) trains with a factor of 1.25 and evaluates with 2.0. Models of today are dropless.

    Args:
        factor: Rows per expert over the mean, while training; 0 is dropless.
        eval_factor: The same outside training.
        policy: position, priority, random, reroute, dense, or queue.
        sequence_rows: Instead of the factors, a fixed number of rows of each sequence, in training and outside;
            0 is off. What a sequence gets then does not depend on the others of its batch.

    Raises:
        ConfigError: a factor is negative or not finite, or there is no such policy.
    """

    factor: float = 1.25
    eval_factor: float = 0.0
    policy: str = "position"
    sequence_rows: int = 0

    def __post_init__(self) -> None:
        factors: dict[str, object] = {"factor": self.factor, "eval_factor": self.eval_factor}
        for name, factor in factors.items():
            number = factor if isinstance(factor, (int, float)) and not isinstance(factor, bool) else math.nan
            if not 0 <= number < math.inf:
                raise ConfigError(
                    f"capacity {name} is {factor!r}; it must be 0 or a positive number",
                    hint="1.25 leaves an expert a quarter more rows than the mean; 0 drops nothing",
                )
        if self.policy not in (*POLICIES, QUEUE):
            raise ConfigError(
                f"there is no overflow policy {self.policy!r}",
                hint=f"there are {', '.join((*POLICIES, QUEUE))}",
            )
        if self.sequence_rows < 0 or (self.sequence_rows and self.policy != "position"):
            raise ConfigError(
                f"sequence_rows is {self.sequence_rows} with overflow policy {self.policy!r}; "
                "allowed is 0, or a positive number with policy 'position'"
            )

    @property
    def queues(self) -> bool:
        """True if pairs over the limit wait for another of the `passes`, instead of being changed."""
        return self.policy == QUEUE

    def limit(self, routing: Routing, training: bool, sequences: int = 1) -> int | None:
        """Rows per expert C for what this routing wanted; None is dropless. At least 1 where there is any pair."""
        if self.sequence_rows:
            return self.sequence_rows * sequences
        factor = self.factor if training else self.eval_factor
        if factor == 0:
            return None
        wanted = routing if routing.wanted is None else routing.wanted
        return _rows_per_expert(factor, wanted.pairs, routing.experts)

    def fit(
        self,
        pairs: Routing,
        score_TE: Tensor,
        *,
        training: bool,
        generator: torch.Generator | None = None,
        sequences: int = 1,
    ) -> Routing:
        """Apply the policy to pairs that are not weighed yet; `pairs` itself if every expert has room.

        Args:
            pairs: The router's choice.
            score_TE: What it was made by, (T, E).
            training: Which factor holds.
            generator: For policy random; None takes torch's own. On the device of the pairs.
            sequences: How many of equal length the tokens are, for `sequence_rows`.
        """
        assert score_TE.shape == (pairs.tokens, pairs.experts), (score_TE.shape, pairs.tokens, pairs.experts)
        if self.sequence_rows:
            return _position_in_sequence(pairs, sequences, self.sequence_rows)
        limit = self.limit(pairs, training)
        if limit is None or self.queues or int(pairs.counts_E.max()) <= limit:
            return pairs
        return POLICIES[self.policy](pairs, score_TE.detach(), limit, generator)


def passes(routing: Routing, limit: int) -> list[Routing]:
    """The queue: a weighted routing cut into parts of at most `limit` pairs per expert, in token order.

    The outputs of the parts add up to the output of the whole; gradients flow to its weights.

    Args:
        routing: With its weights.
        limit: Rows per expert in one pass, at least 1 if there is any pair.
    """
    most = int(routing.counts_E.max())
    if most <= limit:
        return [routing]
    assert limit > 0, (limit, most)
    first_N = (routing.ends_E - routing.counts_E)[routing.expert_N]
    place_N = torch.arange(routing.pairs, device=first_N.device) - first_N
    part_N = place_N.div(limit, rounding_mode="floor")
    sizes = torch.bincount(part_N).tolist()
    return [
        Routing(
            token_N=routing.token_N.index_select(0, pair_N),
            weight_N=routing.weight_N.index_select(0, pair_N),
            counts_E=(routing.counts_E - number * limit).clamp(0, limit),
            tokens=routing.tokens,
            valid_T=routing.valid_T,
        )
        for number, pair_N in enumerate(torch.split(part_N.argsort(stable=True), sizes))
    ]


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """What a capacity did to one routing.

    Args:
        wanted: Pairs the router asked for.
        dropped: Of these, how many were taken away.
        moved: Pairs that nobody asked for and that were added.
        tokens_hit: Tokens that did not get just the experts they wanted: they lost one, or were sent to all.
        tokens_lost: Tokens that got no expert they wanted; GShard calls only these overflowed.
        weight_lost: Share of the wanted combine weight that was taken away, 0 to 1; None if the weights are unknown.
        buffer_rows: Rows of a buffer of fixed size, E * C; without a limit, the pairs there are.
        padding_rows: Of these, how many stay empty. Rows beyond the limit are in no buffer.
    """

    wanted: int
    dropped: int
    moved: int
    tokens_hit: int
    tokens_lost: int
    weight_lost: float | None
    buffer_rows: int
    padding_rows: int


def accounting(routing: Routing, limit: int | None, wanted_weight_N: Tensor | None = None) -> Overflow:
    """Count what was lost, moved and left empty.

    Args:
        routing: After the policy.
        limit: Rows per expert C; None is dropless.
        wanted_weight_N: Combine weights of the pairs of `routing.wanted`, for `weight_lost`.
    """
    wanted = routing if routing.wanted is None else routing.wanted
    lost_N = ~wanted.at_pairs(routing.mask_TE)
    added_N = ~routing.at_pairs(wanted.mask_TE)
    lost_T = torch.bincount(wanted.token_N[lost_N], minlength=routing.tokens)
    added_T = torch.bincount(routing.token_N[added_N], minlength=routing.tokens)
    wanted_T = torch.bincount(wanted.token_N, minlength=routing.tokens)
    weight_lost = None if bool(lost_N.any()) else 0.0
    if wanted_weight_N is not None:
        assert wanted_weight_N.shape == lost_N.shape, (wanted_weight_N.shape, lost_N.shape)
        weight_N = wanted_weight_N.detach().double()
        total = float(weight_N.sum())
        weight_lost = float(weight_N[lost_N].sum()) / total if total > 0 else 0.0
    buffer_rows = routing.pairs if limit is None else routing.experts * limit
    filled_rows = routing.pairs if limit is None else int(routing.counts_E.clamp(max=limit).sum())
    return Overflow(
        wanted=wanted.pairs,
        dropped=int(lost_N.sum()),
        moved=int(added_N.sum()),
        tokens_hit=int(((lost_T > 0) | (added_T > 0)).sum()),
        tokens_lost=int(((lost_T == wanted_T) & (wanted_T > 0)).sum()),
        weight_lost=weight_lost,
        buffer_rows=buffer_rows,
        padding_rows=buffer_rows - filled_rows,
    )


def buffer_bytes(factor: float, pairs: int, experts: int, d_model: int, itemsize: int) -> int:
    """Bytes of the (E, C, D) buffer that a factor asks for; there is one for the inputs and one for the outputs.

    Args:
        factor: Capacity factor; 0 is dropless and holds the pairs alone.
        pairs: N of one layer.
        experts: E.
        d_model: Width D.
        itemsize: Bytes of one number.
    """
    rows = pairs if factor == 0 else experts * _rows_per_expert(factor, pairs, experts)
    return rows * d_model * itemsize
