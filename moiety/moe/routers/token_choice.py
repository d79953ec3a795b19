"""Routers in which every token chooses its own experts: the common case, and causal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moiety.backends.cpu_routing import Best
from moiety.errors import ConfigError
from moiety.moe.routers.base import (
    TINY,
    Needs,
    RouterContext,
    check_groups,
    check_k,
    choose_top_k,
    divided,
)
from moiety.routing import Routing, top_k

__all__ = [
    "GShard",
    "Hash",
    "NoisyTopK",
    "ReLU",
    "SigmoidTopK",
    "SparseMixer",
    "Switch",
    "TopK",
    "TopP",
    "compiled",
]


@dataclass(frozen=True)
class TopK:
    """Softmax over all experts, then the k best (arXiv 1701.06538 without its noise).

    With `renormalize` the k weights are divided by their sum, which is the same as a softmax over the k
    chosen logits: Mixtral (2401.04088), Qwen3, Granite, gpt-oss. Without it they are plain
    probabilities: OLMoE (2409.02060), DeepSeek-V2 (2405.04434). The default, and what to compare others with.

    Args:
        k: Experts per token.
        renormalize: Divide the chosen weights by their sum.
        scale: Factor on the weights after that.
        groups: Divide the experts into this many groups.
        groups_kept: Let a token choose from this many groups.
        group_best: Judge a group by the sum of this many best experts; 1 in DeepSeek-V2.
        bias: Keep a selection bias as `SigmoidTopK` does; ERNIE-4.5 has one.
        cap: Logits become cap * tanh(logit / cap) before the softmax (Grok-2); 0 is off.
    """

    k: int
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 1
    bias: bool = False
    cap: float = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(bias=self.bias)

    def check(self, experts: int) -> None:
        if not 0 <= self.cap < math.inf:
            raise ConfigError(f"cap is {self.cap}; it must be 0 (off) or a positive number")
        check_k(self.k, experts)
        check_groups(self.k, experts, self.groups, self.groups_kept, self.group_best)

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        if self.cap:
            logits_TE = self.cap * (logits_TE / self.cap).tanh()
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        limits = {"groups": self.groups, "groups_kept": self.groups_kept, "group_best": self.group_best}
        return choose_top_k(score_TE, context, self.k, **limits)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        weight_N = pairs.at_pairs(score_TE)
        if self.renormalize:
            weight_N = divided(weight_N, pairs)
        return weight_N * self.scale if self.scale != 1.0 else weight_N


@dataclass(frozen=True)
class SigmoidTopK:
    """Sigmoid scores, a selection bias, and a choice limited to the best groups (DeepSeek-V3, arXiv 2412.19437).

    The bias decides who is chosen and never what the choice weighs: weights come from the plain scores.

    Args:
        k: Experts per token.
        renormalize: Divide the chosen scores by their sum (plus 1e-20).
        scale: Factor on the weights after that; 2.5 in DeepSeek-V3.
        groups: Divide the experts into this many groups.
        groups_kept: Let a token choose from this many groups.
        group_best: Judge a group by the sum of this many best experts; 2 in DeepSeek-V3.
        bias: Keep a selection bias, moved by `balance.update_bias` and not by gradients (arXiv 2408.15664).
    """

    k: int
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 2
    bias: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(bias=self.bias)

    def check(self, experts: int) -> None:
        check_k(self.k, experts)
        check_groups(self.k, experts, self.groups, self.groups_kept, self.group_best)

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.sigmoid()

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        limits = {"groups": self.groups, "groups_kept": self.groups_kept, "group_best": self.group_best}
        return choose_top_k(score_TE, context, self.k, **limits)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        weight_N = pairs.at_pairs(score_TE)
        if self.renormalize:
            weight_N = weight_N / (pairs.sum_by_token(weight_N) + 1e-20).index_select(0, pairs.token_N)
        return weight_N * self.scale if self.scale != 1.0 else weight_N


@dataclass(frozen=True)
class Switch:
    """One expert per token, weighted by its softmax probability and not by 1 (arXiv 2101.03961).

    A weight of 1 would cut the router off from the loss. The cheapest choice there is: one expert's work per
    token. Trained with input jitter and a capacity in the paper.

    Args:
        jitter: Multiply the router's input by U(1 - jitter, 1 + jitter) while training; 0.01 in the paper.
    """

    jitter: float = 0.0

    @property
    def needs(self) -> Needs:
        return Needs(jitter=self.jitter, random=self.jitter > 0)

    def check(self, experts: int) -> None:
        check_k(1, experts)
        if not 0 <= self.jitter < 1:
            raise ConfigError(
                f"jitter is {self.jitter}; allowed is 0 to below 1", hint="0 for none, 0.01 in the paper"
            )

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        return choose_top_k(score_TE, context, 1)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        return pairs.at_pairs(score_TE)


@dataclass(frozen=True)
class NoisyTopK:
    """The k best of logits plus learnt noise (arXiv 1701.06538): the first sparse router, exploring by itself.

    While training, each logit gets N(0, 1) * softplus(x W_noise); weights are a softmax over the chosen noisy
    logits. The noise makes the expected load differentiable (`balance.smooth_load_loss`). Costs a second
    projection in training and nothing afterwards.

    Args:
        k: Experts per token.
    """

    k: int

    @property
    def needs(self) -> Needs:
        return Needs(noise=True, random=True)

    def check(self, experts: int) -> None:
        check_k(self.k, experts)

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        return choose_top_k(score_TE, context, self.k)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        return divided(pairs.at_pairs(score_TE), pairs)


@dataclass(frozen=True)
class GShard:
    """The best expert always, the second with probability 2 g2 (arXiv 2006.16668): saves work where it is unsure.

    g1 and g2 are divided by their sum before the draw, so a dropped second leaves its share unused. Outside
    training the second is always kept.
    """

    @property
    def needs(self) -> Needs:
        return Needs(random=True, ranked=True)

    def check(self, experts: int) -> None:
        if experts < 2:
            raise ConfigError(f"GShard chooses two experts, but there are {experts}", hint="use Switch")

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        first_TK, both_TK = top_k(score_TE, 1), top_k(score_TE, 2)
        second_TK = both_TK.sum(1, keepdim=True) - first_TK
        expert_TK = torch.cat([first_TK, second_TK], dim=1)
        pairs = Routing.from_choices(
            expert_TK, experts=score_TE.shape[1], valid_T=context.valid_T, ranked=True
        )
        if not context.training or pairs.rank_N is None:
            return pairs
        best_TK = score_TE.gather(1, expert_TK).clamp(min=0)
        share_T = best_TK[:, 1] / best_TK.sum(1).clamp(min=TINY)
        drawn_T = torch.rand(len(score_TE), generator=context.generator(1), device=score_TE.device)
        keep_T = 2 * share_T > drawn_T
        drawn = pairs.keep((pairs.rank_N == 0) | keep_T[pairs.token_N])
        return replace(drawn, dropped=0)  # these were not drawn; `dropped` is what a capacity takes away

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        return divided(pairs.at_pairs(score_TE), pairs)


@dataclass(frozen=True)
class TopP:
    """As many experts as it takes to reach probability p (arXiv 2403.07652): easy tokens use fewer.

    Add `balance.entropy_loss` with a small coefficient, or the router learns to spread out and use them all.

    Args:
        p: Probability to reach, above 0 and at most 1.
        most: Most experts per token; 0 means no limit.
        renormalize: Divide the chosen weights by their sum; the paper does not.
    """

    p: float = 0.4
    most: int = 0
    renormalize: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(compares=False)

    def check(self, experts: int) -> None:
        if not 0 < self.p <= 1:
            raise ConfigError(f"p is {self.p}; allowed is above 0 to 1", hint="a higher p uses more experts")
        if not 0 <= self.most <= experts:
            raise ConfigError(
                f"most is {self.most}, but there are {experts} experts", hint="0 means no limit"
            )

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        best_TE, expert_TE = score_TE.sort(dim=-1, descending=True, stable=True)
        wanted_TE = best_TE.cumsum(dim=-1) - best_TE < self.p  # reached before this expert? then no more
        wanted_TE[:, 0] = True
        if self.most:
            wanted_TE[:, self.most :] = False
        if context.valid_T is not None:
            wanted_TE &= context.valid_T[:, None]
        token_N, expert_N = wanted_TE.nonzero()[:, 0], expert_TE[wanted_TE]
        weight_N = torch.ones(len(token_N), dtype=torch.float32, device=score_TE.device)
        tokens, experts = score_TE.shape
        pairs = Routing.from_pairs(token_N, expert_N, weight_N, tokens=tokens, experts=experts)
        return replace(pairs, valid_T=context.valid_T)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        weight_N = pairs.at_pairs(score_TE)
        return divided(weight_N, pairs) if self.renormalize else weight_N


@dataclass(frozen=True)
class ReLU:
    """Every expert with a positive logit, weighted by it (ReMoE, arXiv 2412.14711): no top-k, differentiable.

    How many experts a token uses is steered from outside, by `losses.sparsity_loss` whose coefficient
    `balance.update_sparsity` raises and lowers. Training starts nearly dense, so its first steps cost more; a
    token may end with no expert at all.
    """

    @property
    def needs(self) -> Needs:
        return Needs(compares=False)

    def check(self, experts: int) -> None:
        check_k(1, experts)

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.relu()

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        return Routing.from_mask(score_TE > 0, valid_T=context.valid_T)

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        return pairs.at_pairs(score_TE)


@dataclass(frozen=True)
class Hash:
    """A token's experts follow from its id (arXiv 2106.04426): no router to train, and none to go wrong.

    Balanced over the vocabulary, hence not over a text, whose frequent tokens all go one way. A strong
    baseline: a learnt router that does not beat it has learnt nothing.

    Args:
        k: Experts per token, different ones.
        salt: Another salt is another assignment.
    """

    k: int = 1
    salt: int = 0

    @property
    def needs(self) -> Needs:
        return Needs(gate=False, token_ids=True, compares=False)

    def check(self, experts: int) -> None:
        check_k(self.k, experts)

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return torch.full_like(logits_TE, 1 / logits_TE.shape[1])

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        assert context.token_id_T is not None
        experts = score_TE.shape[1]
        first_T = _scrambled(context.token_id_T, self.salt).remainder(experts)
        step_T = _scrambled(context.token_id_T, self.salt + 1).remainder(max(experts - 1, 1))
        others = torch.arange(self.k - 1, device=first_T.device)
        # the k-th choice is one of the experts not chosen yet: an offset of 1 to E - 1, no two of a token alike
        offset_TK = 1 + (step_T[:, None] + others).remainder(max(experts - 1, 1))
        rest_TK = (first_T[:, None] + offset_TK).remainder(experts)
        return Routing.from_choices(
            torch.cat([first_T[:, None], rest_TK], dim=1), experts=experts, valid_T=context.valid_T
        )

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        return torch.full_like(pairs.weight_N, 1 / self.k)


def _scrambled(id_T: Tensor, salt: int) -> Tensor:
    """A fixed 32-bit mixing of ids, so that neighbours in the vocabulary part."""
    mask = 2**32 - 1
    h_T = (id_T * 0x9E3779B1 + salt * 0x85EBCA6B + 0x165667B1) & mask
    for shift in (15, 13):
        h_T = ((h_T ^ (h_T >> shift)) * 0x2C1B3C6D) & mask
    return h_T ^ (h_T >> 16)


@dataclass(frozen=True)
class SparseMixer:
    """Draw each expert, and estimate the gradient of having drawn it (SparseMixer-v2, arXiv 2409.12136).

    Experts within a relative distance 2 * `jitter` of the best logit compete in a softmax; training draws
    from it and takes a third of the weight unless the best was drawn or a coin of 1 in 4 says so, which makes
    the gradient a third-order estimate. Each further expert is drawn anew without the earlier ones. Outside
    training the best win and weights are plain softmax values, which do not sum to 1 (Phi-3.5-MoE).

    Args:
        k: Experts per token.
        jitter: Half of the relative distance; also used outside training.
    """

    k: int = 2
    jitter: float = 0.01

    @property
    def needs(self) -> Needs:
        return Needs(random=True, ranked=True, compares=False)

    def check(self, experts: int) -> None:
        check_k(self.k, experts)
        if not 0 <= self.jitter < math.inf:
            raise ConfigError(
                f"jitter is {self.jitter}; it must be 0 or a positive number",
                hint="0.01 in the paper",
            )

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        logits_TE = context.logits_TE.detach()
        generator = context.generator(2)
        gone_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        chosen = []
        for _ in range(self.k):
            racing_TE = self._racing(logits_TE, gone_TE)
            if context.training:  # the Gumbel maximum is a draw from the softmax
                noise_TE = torch.empty_like(racing_TE).exponential_(generator=generator).log()
                racing_TE = racing_TE - noise_TE
            expert_T1 = top_k(racing_TE, 1)
            gone_TE = gone_TE.scatter(1, expert_T1, True)
            chosen.append(expert_T1)
        expert_TK = torch.cat(chosen, dim=1)
        return Routing.from_choices(
            expert_TK, experts=logits_TE.shape[1], valid_T=context.valid_T, ranked=True
        )

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        assert pairs.rank_N is not None
        logits_TE, experts = context.logits_TE, pairs.experts
        place_N = pairs.token_N * experts + pairs.expert_N
        rank_TE = torch.full((pairs.tokens * experts,), self.k, device=logits_TE.device)
        rank_TE = rank_TE.scatter(0, place_N, pairs.rank_N).view(pairs.tokens, experts)
        coin_TK = torch.rand(pairs.tokens, self.k, generator=context.generator(3), device=logits_TE.device)
        weight_N = torch.zeros_like(pairs.weight_N)
        for rank in range(self.k):
            share_TE = self._racing(logits_TE, rank_TE < rank).softmax(dim=-1)
            weight_here_N = pairs.at_pairs(share_TE)
            if context.training:
                whole_N = weight_here_N >= share_TE.amax(dim=-1)[pairs.token_N]
                whole_N = whole_N | (coin_TK[:, rank] > 0.75)[pairs.token_N]
                # the value shrinks and the gradient does not
                weight_here_N = weight_here_N - weight_here_N.detach().masked_fill(whole_N, 0.0) * (2 / 3)
            weight_N = torch.where(pairs.rank_N == rank, weight_here_N, weight_N)
        return weight_N

    def _racing(self, logits_TE: Tensor, gone_TE: Tensor) -> Tensor:
        """Logits with -inf for experts that are gone or too far from the best one left."""
        with torch.no_grad():
            best_T1 = logits_TE.masked_fill(gone_TE, float("-inf")).amax(dim=-1, keepdim=True)
            far_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1) > 2 * self.jitter
        return logits_TE.masked_fill(far_TE | gone_TE, float("-inf"))


def compiled(router: object) -> Best | None:
    """The same decision for the compiled kernel; None for routers that it does not know, and inside of others."""
    if type(router) not in (TopK, SigmoidTopK):
        return None
    assert isinstance(router, TopK | SigmoidTopK)
    if isinstance(router, TopK) and router.cap:
        return None
    sigmoid = isinstance(router, SigmoidTopK)
    return Best(
        k=router.k,
        sigmoid=sigmoid,
        renormalize=router.renormalize,
        tiny=1e-20 if sigmoid else TINY,
        scale=router.scale,
        groups=router.groups,
        groups_kept=router.groups_kept,
        group_best=router.group_best,
    )
