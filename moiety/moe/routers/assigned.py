"""Routers that divide a batch among the experts as a whole: balanced by construction, for training only or not causal.

Who is chosen depends on the other tokens of the batch, so what a token gets may depend on tokens that come
after it. Where that matters the docstring says so, and outside training Sinkhorn and Base fall back to each
token's own best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moiety.errors import ConfigError
from moiety.moe.routers.base import Needs, RouterContext, check_k, choose_top_k, divided
from moiety.routing import Routing, top_k

__all__ = ["Base", "ExpertChoice", "Sinkhorn"]

MOST_BIDS = 2000  # rounds of an auction before what is left is handed out as it comes


@dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes its best tokens, T * k / E of them (arXiv 2202.09368): perfect balance, no loss needed.

    A token gets as many experts as want it, none included. NOT CAUSAL: whether an expert has room for a
    token depends on later tokens, so a language model trained this way reads the future, and its loss looks better than
    it can be when generating (arXiv 2408.15664 section 4.2 bounds the leak). For encoders, images, and comparison.

    Args:
        k: Experts per token on average.
    """

    k: int

    @property
    def needs(self) -> Needs:
        return Needs()

    def check(self, experts: int) -> None:
        check_k(self.k, experts)

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        tokens, experts = score_TE.shape
        real = tokens
        if context.valid_T is not None:
            score_TE = score_TE.masked_fill(~context.valid_T[:, None], float("-inf"))
            real = int(context.valid_T.sum())
        taken = -(-real * self.k // experts)
        if not taken:
            return Routing.from_mask(torch.zeros_like(score_TE, dtype=torch.bool), valid_T=context.valid_T)
        here_E = score_TE.amax(dim=0) > float("-inf")  # an expert that is away takes nothing
        token_EC = top_k(score_TE.t()[here_E], taken)
        return Routing(
            token_N=token_EC.reshape(-1),
            weight_N=torch.ones(token_EC.numel(), dtype=torch.float32, device=score_TE.device),
            counts_E=here_E * taken,
            tokens=tokens,
            valid_T=context.valid_T,
        )

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        return pairs.at_pairs(score_TE)


@dataclass(frozen=True)
class Sinkhorn:
    """The k best after scaling the batch's scores to even rows and columns (S-BASE, arXiv 2202.01169).

    Training is near balance without a loss; weights are plain sigmoids of the logits, untouched by the scaling.
    Outside training each token takes its k best, so watch the balance there. Costs `rounds` passes over (T, E).

    Args:
        k: Experts per token.
        rounds: Scalings of rows and columns.
    """

    k: int = 1
    rounds: int = 8

    @property
    def needs(self) -> Needs:
        return Needs(compares=False)

    def check(self, experts: int) -> None:
        check_k(self.k, experts)
        if self.rounds < 1:
            raise ConfigError(
                f"rounds is {self.rounds}; it must be at least 1", hint="8 is near balance, more is nearer"
            )

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.sigmoid()

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        if not context.training or not len(score_TE):
            return choose_top_k(score_TE, context, self.k)
        plan_TE = context.logits_TE.detach()
        if context.valid_T is not None:  # padding must not pull the columns
            plan_TE = plan_TE.masked_fill(~context.valid_T[:, None], float("-inf"))
        for _ in range(self.rounds):
            column_1E = plan_TE.logsumexp(dim=0, keepdim=True)
            plan_TE = plan_TE - torch.where(column_1E.isfinite(), column_1E, 0.0)
            row_T1 = plan_TE.logsumexp(dim=1, keepdim=True)
            plan_TE = plan_TE - torch.where(row_T1.isfinite(), row_T1, 0.0)
        return choose_top_k(plan_TE, context, self.k)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        weight_N = pairs.at_pairs(score_TE)
        return divided(weight_N, pairs) if self.k > 1 else weight_N


@dataclass(frozen=True)
class Base:
    """One expert per token, every expert equally many, best sum of logits (BASE, arXiv 2103.16716).

    Training solves the assignment by an auction, exact to `slack` per token; testing takes each token's best.
    The weight is sigmoid(logit). The dearest choice here: a hundred passes over the tokens, more when they agree.

    Args:
        slack: How far below the best sum the assignment may be, per token, as a share of the logits' spread.
    """

    slack: float = 0.05

    @property
    def needs(self) -> Needs:
        return Needs(compares=False)

    def check(self, experts: int) -> None:
        check_k(1, experts)
        if not 0 < self.slack < math.inf:
            raise ConfigError(
                f"slack is {self.slack}; it must be a positive number",
                hint="smaller is nearer the best and slower",
            )

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.sigmoid()

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        if not context.training:
            return choose_top_k(score_TE, context, 1)
        value_TE, valid_T = context.logits_TE.detach(), context.valid_T
        if valid_T is not None:
            value_TE = value_TE[valid_T]
        experts = value_TE.shape[1]
        here_H = (value_TE > float("-inf")).any(dim=0).nonzero().squeeze(1)  # those away have no share
        if len(here_H) < experts and len(value_TE):
            expert_T = here_H[balanced_assignment(value_TE[:, here_H], self.slack)]
        else:
            expert_T = balanced_assignment(value_TE, self.slack)
        if valid_T is not None:
            expert_T = expert_T.new_zeros(len(valid_T)).masked_scatter(valid_T, expert_T)
        return Routing.from_choices(expert_T[:, None], experts=experts, valid_T=valid_T)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        return pairs.at_pairs(score_TE)


def balanced_assignment(value_TE: Tensor, slack: float) -> Tensor:
    """One expert per token, int64 (T,), no expert more than one token above another, near the largest sum of values.

    An auction: every token without an expert bids for the one with the best value less price, by as much as that
    beats its second best; an expert keeps its highest bids and asks the lowest of them as its price (Bertsekas
    1992). T not divisible by E leaves the first T mod E experts one token more.

    Args:
        value_TE: What each token is worth at each expert, (T, E).
        slack: Smallest raise of a bid, as a share of the values' spread; the sum is at most T times that below
            the best.
    """
    tokens, experts = value_TE.shape
    expert_T = torch.zeros(tokens, dtype=torch.int64, device=value_TE.device)
    if experts == 1 or tokens == 0:
        return expert_T
    room_E = torch.full((experts,), tokens // experts, device=value_TE.device)
    room_E[: tokens % experts] += 1
    raise_by = slack * float(value_TE.max() - value_TE.min()) + 1e-9
    value_TE = value_TE - value_TE.amax(dim=1, keepdim=True)  # a large value would swallow a small raise
    price_E = torch.where(room_E > 0, 0.0, float("inf")).to(value_TE.dtype)
    expert_T.fill_(-1)
    bid_T = torch.full((tokens,), float("-inf"), dtype=value_TE.dtype, device=value_TE.device)
    for _ in range(MOST_BIDS):
        free = (expert_T < 0).nonzero().squeeze(1)
        if not len(free):
            return expert_T
        best_F2, wanted_F2 = (value_TE[free] - price_E).topk(2, dim=1)
        beats_F = torch.nan_to_num(best_F2[:, 0] - best_F2[:, 1], posinf=0.0)
        wanted_F = wanted_F2[:, 0]
        expert_T[free] = wanted_F
        bid_T[free] = price_E[wanted_F] + beats_F + raise_by
        place_T = _place_among_bids(expert_T, bid_T, experts)
        expert_T[place_T >= room_E[expert_T.clamp(min=0)]] = -1
        full_E = torch.bincount(expert_T[expert_T >= 0], minlength=experts) >= room_E
        lowest_E = torch.full_like(price_E, float("inf")).scatter_reduce(
            0, expert_T.clamp(min=0), torch.where(expert_T >= 0, bid_T, float("inf")), "amin"
        )
        price_E = torch.where(full_E & (room_E > 0), lowest_E, price_E)
    return _hand_out(expert_T, value_TE, room_E)


def _place_among_bids(expert_T: Tensor, bid_T: Tensor, experts: int) -> Tensor:
    """Place of each token among its expert's bids, 0 the highest, of equal ones the earlier token, (T,)."""
    by_bid = bid_T.argsort(descending=True, stable=True)
    holder = torch.where(expert_T < 0, experts, expert_T)[by_bid]
    order = by_bid[holder.argsort(stable=True)]
    counts = torch.bincount(holder, minlength=experts + 1)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    place_T = torch.empty_like(order)
    place_T[order] = torch.arange(len(order), device=order.device) - first
    return place_T


def _hand_out(expert_T: Tensor, value_TE: Tensor, room_E: Tensor) -> Tensor:
    """Give every token that is still without an expert, in order, the best one that has room."""
    left = (room_E - torch.bincount(expert_T[expert_T >= 0], minlength=len(room_E))).tolist()
    for token in (expert_T < 0).nonzero().squeeze(1).tolist():
        best = max((e for e, room in enumerate(left) if room), key=lambda e: float(value_TE[token, e]))
        expert_T[token] = best
        left[best] -= 1
    return expert_T
