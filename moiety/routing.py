"""Routing: which token goes to which expert, with what weight. The noun of this package.

A router's decision is a sparse tokens x experts matrix. `Routing` holds its N chosen (token, expert)
pairs sorted by expert, and within an expert by token, so that the rows of one expert are one slice.
Token-choice top-k makes N = T*K pairs, expert choice E*C; dropping is fewer pairs, expert parallelism
and replicas are other expert numbers. Nothing below cares which: zero tokens and experts without a
token are ordinary cases.

Axes, here and everywhere: T tokens, E experts, K chosen per token, N pairs, D model width, F expert
width, H heads, L layers, B sequences, S positions, V vocabulary. `x_TD` has axes T and D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Noise", "Routing", "top_k"]


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """The `k` best experts of every token, in ascending expert order; of equal scores the lower expert wins.

    torch.topk leaves ties open, so a tie at the edge of the choice is settled by a stable sort.

    Args:
        score_TE: Scores to compare, (T, E).
        k: Experts per token, 1 to E.

    Returns:
        expert_TK, int64 (T, K).
    """
    experts = score_TE.shape[-1]
    assert 1 <= k <= experts, (k, experts)
    if k == experts:
        return torch.arange(experts, device=score_TE.device).expand(score_TE.shape[0], experts)
    if score_TE.device.type == "cpu":
        best_TK, expert_TK = score_TE.topk(k + 1, dim=-1)
        tied_T = best_TK[:, k - 1] == best_TK[:, k]
        expert_TK = expert_TK[:, :k]
        if bool(tied_T.any()):
            settled_TE = score_TE[tied_T].sort(dim=-1, descending=True, stable=True).indices
            expert_TK = expert_TK.masked_scatter(tied_T[:, None], settled_TE[:, :k])
    else:  # asking whether there are ties would wait for the device
        expert_TK = score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return expert_TK.sort(dim=-1).values


class Noise(NamedTuple):
    """What a noisy router added to its logits: logits = clean + deviation * N(0, 1), each (T, E)."""

    clean_TE: Tensor
    deviation_TE: Tensor


OF_THE_PAIRS = ("expert_N", "ends_E", "slices", "pairs_of_token_N", "first_pair_T", "valid_tokens")


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """N (token, expert) pairs sorted by expert, then by token.

    Args:
        token_N: Row of x of each pair, int64 (N,).
        weight_N: Combine weight of each pair, floating (N,); gradients flow through it to the router.
        counts_E: Pairs of each expert, int64 (E,); the pairs of expert e are one slice.
        tokens: Number of tokens T, those without any pair included.
        logits_TE: The router's raw outputs (T, E) while training or inspecting, else None.
        score_TE: What the router compared and weighted by (T, E): softmax or sigmoid of the logits.
        valid_T: False for padding, which is never routed; None when every token is real.
        noise: Noise in the logits, where the router adds some.
        rank_N: Which choice of its token a pair was, 0 the first, int64 (N,); None where the order means nothing.
        wanted: The pairs before a capacity policy changed them; None when nothing was changed.
        kept_N: Which pairs of `wanted` these are, bool; None when some went to other experts instead.
        dropped: Pairs that a capacity policy took away.
        moved: Pairs that it added: a reroute is one dropped and one moved.
    """

    token_N: Tensor
    weight_N: Tensor
    counts_E: Tensor
    tokens: int
    logits_TE: Tensor | None = None
    score_TE: Tensor | None = None
    valid_T: Tensor | None = None
    noise: Noise | None = None
    rank_N: Tensor | None = None
    wanted: Routing | None = None
    kept_N: Tensor | None = None
    dropped: int = 0
    moved: int = 0

    @classmethod
    def from_pairs(
        cls, token_N: Tensor, expert_N: Tensor, weight_N: Tensor, *, tokens: int, experts: int
    ) -> Routing:
        """Sort any pairs into a `Routing`. Each (token, expert) pair may appear once."""
        assert token_N.shape == expert_N.shape == weight_N.shape, (
            token_N.shape,
            expert_N.shape,
            weight_N.shape,
        )
        order_N = (expert_N * tokens + token_N).argsort()
        counts_E = torch.bincount(expert_N, minlength=experts)
        assert len(counts_E) == experts, (len(counts_E), experts)
        return cls(token_N=token_N[order_N], weight_N=weight_N[order_N], counts_E=counts_E, tokens=tokens)

    @classmethod
    def from_choices(
        cls,
        expert_TK: Tensor,
        weight_TK: Tensor | None = None,
        *,
        experts: int,
        valid_T: Tensor | None = None,
        ranked: bool = False,
    ) -> Routing:
        """Token choice: each token names K different experts.

        Args:
            expert_TK: Chosen experts, int64 (T, K).
            weight_TK: Their combine weights (T, K); None weighs all the same, 1.
            experts: Number of experts E.
            valid_T: Bool (T,); tokens marked False are padding and get no pairs.
            ranked: The K stand in order of choice; keep it as `rank_N`.
        """
        tokens, k = expert_TK.shape
        expert_N = expert_TK.reshape(-1)
        if valid_T is not None:  # padding goes to an expert past the last one, which is then cut off
            expert_N = torch.where(valid_T.repeat_interleave(k), expert_N, experts)
        expert_N, order_N = expert_N.sort(stable=True)
        counts_E = torch.bincount(expert_N, minlength=experts + 1)[:experts]
        if valid_T is not None:
            order_N = order_N[: int(counts_E.sum())]
        if weight_TK is None:
            weight_N = torch.ones(len(order_N), dtype=torch.float32, device=expert_TK.device)
        else:
            weight_N = weight_TK.reshape(-1).index_select(0, order_N)
        routing = cls(
            token_N=order_N.div(k, rounding_mode="floor"),
            weight_N=weight_N,
            counts_E=counts_E,
            tokens=tokens,
            valid_T=valid_T,
            rank_N=order_N.remainder(k) if ranked else None,
        )
        routing.__dict__["expert_N"] = expert_N[: len(order_N)]  # known already
        return routing

    @classmethod
    def from_lists(cls, token_E: Sequence[Tensor], weight_E: Sequence[Tensor], *, tokens: int) -> Routing:
        """Expert choice: each expert names its tokens.

        Args:
            token_E: For each expert the tokens it takes, int64 (C_e,).
            weight_E: Their combine weights, (C_e,).
            tokens: Number of tokens T.
        """
        assert len(token_E) == len(weight_E), (len(token_E), len(weight_E))
        counts_E = torch.tensor([len(token_C) for token_C in token_E], device=token_E[0].device)
        expert_N = torch.arange(len(token_E), device=counts_E.device).repeat_interleave(counts_E)
        return cls.from_pairs(
            torch.cat(list(token_E)), expert_N, torch.cat(list(weight_E)), tokens=tokens, experts=len(token_E)
        )

    @classmethod
    def from_mask(cls, mask_TE: Tensor, *, valid_T: Tensor | None = None) -> Routing:
        """Any number of experts per token: a pair wherever `mask_TE` (bool (T, E)) is True, padding left out."""
        if valid_T is not None:
            mask_TE = mask_TE & valid_T[:, None]
        expert_N, token_N = mask_TE.t().nonzero(as_tuple=True)
        weight_N = torch.ones(len(token_N), dtype=torch.float32, device=mask_TE.device)
        routing = cls(
            token_N=token_N,
            weight_N=weight_N,
            counts_E=mask_TE.sum(0),
            tokens=len(mask_TE),
            valid_T=valid_T,
        )
        routing.__dict__["expert_N"] = expert_N  # known already
        return routing

    @classmethod
    def to_one(cls, tokens: int, device: torch.device | str = "cpu") -> Routing:
        """Every token to the one expert there is, with weight 1."""
        return cls(
            token_N=torch.arange(tokens, device=device),
            weight_N=torch.ones(tokens, device=device),
            counts_E=torch.tensor([tokens], device=device),
            tokens=tokens,
        )

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return len(self.counts_E)

    @property
    def pairs(self) -> int:
        """Number of pairs N."""
        return len(self.token_N)

    @cached_property
    def expert_N(self) -> Tensor:
        """Expert of each pair, int64 (N,), ascending."""
        return torch.arange(self.experts, device=self.counts_E.device).repeat_interleave(
            self.counts_E, output_size=self.pairs
        )

    @cached_property
    def ends_E(self) -> Tensor:
        """Where the slice of each expert ends, int64 (E,)."""
        return self.counts_E.cumsum(0)

    @cached_property
    def slices(self) -> list[tuple[int, int, int]]:
        """(expert, start, stop) of every expert that has a pair; waits for the device once."""
        ends = self.ends_E.tolist()
        starts = [0, *ends[:-1]]
        return [
            (e, start, stop) for e, (start, stop) in enumerate(zip(starts, ends, strict=True)) if stop > start
        ]

    @cached_property
    def pairs_of_token_N(self) -> Tensor:
        """Pair numbers in token order, int64 (N,): what `weight_N` and expert outputs are gathered by to combine."""
        return self.token_N.argsort(stable=True)

    @cached_property
    def first_pair_T(self) -> Tensor:
        """Where each token's part of `pairs_of_token_N` starts, int64 (T,)."""
        per_token_T = torch.bincount(self.token_N, minlength=self.tokens)
        return per_token_T.cumsum(0) - per_token_T

    @cached_property
    def valid_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.tokens if self.valid_T is None else int(self.valid_T.sum())

    def at_pairs(self, value_TE: Tensor) -> Tensor:
        """The entries of a dense (T, E) matrix at the chosen pairs, (N,); differentiable."""
        return value_TE.reshape(-1).index_select(0, self.token_N * self.experts + self.expert_N)

    def sum_by_token(self, value_N: Tensor) -> Tensor:
        """Sum of each token's pairs, (T,); 0 for a token without one. Differentiable."""
        return value_N.new_zeros(self.tokens).index_add(0, self.token_N, value_N)

    def gather(self, x_TD: Tensor) -> Tensor:
        """The input row of every pair, (N, D), expert after expert."""
        return x_TD.index_select(0, self.token_N)

    def combine(self, y_ND: Tensor) -> Tensor:
        """Weighted sum of each token's expert outputs, (T, D): the other end of `gather`. Differentiable."""
        weighted_ND = y_ND * self.weight_N[:, None].to(y_ND.dtype)
        return y_ND.new_zeros(self.tokens, y_ND.shape[1]).index_add(0, self.token_N, weighted_ND)

    def dense(self) -> Tensor:
        """The routing as a dense matrix of combine weights, (T, E), zero where not chosen. Differentiable."""
        flat = self.weight_N.new_zeros(self.tokens * self.experts)
        flat = flat.index_add(0, self.token_N * self.experts + self.expert_N, self.weight_N)
        return flat.view(self.tokens, self.experts)

    @property
    def mask_TE(self) -> Tensor:
        """True where a token chose an expert, bool (T, E)."""
        flat = torch.zeros(self.tokens * self.experts, dtype=torch.bool, device=self.token_N.device)
        flat[self.token_N * self.experts + self.expert_N] = True
        return flat.view(self.tokens, self.experts)

    def with_weights(
        self,
        weight_N: Tensor,
        *,
        logits_TE: Tensor | None = None,
        score_TE: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Routing:
        """The same pairs with other combine weights, and the logits, scores and noise these came from."""
        assert weight_N.shape == self.token_N.shape, (weight_N.shape, self.token_N.shape)
        same = dataclasses.replace(
            self, weight_N=weight_N, logits_TE=logits_TE, score_TE=score_TE, noise=noise
        )
        same.__dict__.update({name: self.__dict__[name] for name in OF_THE_PAIRS if name in self.__dict__})
        return same

    def pinned(self) -> Routing:
        """The bare choice: pairs without weights, logits or gradients.

        Handing it to a layer repeats this choice and computes new weights for it. Recomputing an
        activation must do so, or a near-tie may fall the other way the second time.
        """
        return dataclasses.replace(
            self,
            weight_N=torch.ones_like(self.token_N, dtype=torch.float32),
            logits_TE=None,
            score_TE=None,
            noise=None,
            wanted=None if self.wanted is None else self.wanted.pinned(),
        )

    def keep(self, keep_N: Tensor) -> Routing:
        """Drop the pairs where `keep_N` (bool, (N,)) is False: they are counted in `dropped`, kept in `wanted`.

        A weight that was divided by the sum over a token's pairs stays divided by the sum over all of them.
        """
        wanted = self if self.kept_N is None else self.wanted
        kept_N = keep_N
        if self.kept_N is not None:
            kept_N = self.kept_N.clone()
            kept_N[self.kept_N] = keep_N
        token_N = self.token_N[keep_N]
        return dataclasses.replace(
            self,
            token_N=token_N,
            weight_N=self.weight_N[keep_N],
            counts_E=torch.bincount(self.expert_N[keep_N], minlength=self.experts),
            rank_N=None if self.rank_N is None else self.rank_N[keep_N],
            wanted=wanted,
            kept_N=kept_N,
            dropped=self.dropped + self.pairs - len(token_N),
        )

    def first(self, experts: int) -> Routing:
        """The pairs of the first `experts` experts alone: what is multiplied when those behind are null experts."""
        pairs = int(self.counts_E[:experts].sum())
        return Routing(
            token_N=self.token_N[:pairs],
            weight_N=self.weight_N[:pairs],
            counts_E=self.counts_E[:experts],
            tokens=self.tokens,
            valid_T=self.valid_T,
        )

    def merged(self, number_E: Sequence[int]) -> Routing:
        """Give every expert e the new number `number_E[e]`; pairs that become one add up their weights.

        What is multiplied where one stored expert answers for several. Differentiable in the weights.
        """
        number_N = torch.tensor(number_E, device=self.token_N.device)[self.expert_N]
        experts, tokens = max(number_E) + 1, max(self.tokens, 1)
        cell_M, place_N = (number_N * tokens + self.token_N).unique(return_inverse=True)
        return Routing(
            token_N=cell_M % tokens,
            weight_N=self.weight_N.new_zeros(len(cell_M)).index_add(0, place_N, self.weight_N),
            counts_E=torch.bincount(cell_M // tokens, minlength=experts),
            tokens=self.tokens,
            valid_T=self.valid_T,
        )

    def renumber(self, number_E: Tensor, experts: int) -> Routing:
        """Give every expert e the new number `number_E[e]` among `experts`; logits and scores are left behind.

        Two old experts must not share a new number. Placement, replicas and caches are renumberings.
        """
        routing = Routing.from_pairs(
            self.token_N, number_E[self.expert_N], self.weight_N, tokens=self.tokens, experts=experts
        )
        return dataclasses.replace(routing, valid_T=self.valid_T, dropped=self.dropped)
