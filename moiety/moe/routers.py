"""Routers: how a token chooses its experts, and what weight each choice gets.

A router answers three questions, and nothing else about it is known to the rest of the package:

    score(logits_TE)           how good every expert looks; what the balance loss averages
    choose(score_TE, context)  which pairs are made, without gradient
    weigh(score_TE, pairs)     the combine weight of given pairs, with gradient

Choosing and weighing are apart so that a choice can be pinned and weighed again (activation
recompute, replay of a trace). A new router is one class here and one line in `ROUTERS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moiety.config import MoEConfig
from moiety.errors import ConfigError
from moiety.routing import Routing, top_k

__all__ = ["ROUTERS", "Router", "RouterContext", "SigmoidTopK", "Switch", "TopK", "from_config"]


TINY = torch.finfo(torch.float32).tiny  # a pinned choice may have scores that all underflow to 0


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterContext:
    """What a router may look at besides the scores.

    Args:
        valid_T: False for padding, which is never routed.
        bias_E: Selection bias, added when choosing and never when weighing.
        training: True in a training step.
    """

    valid_T: Tensor | None = None
    bias_E: Tensor | None = None
    training: bool = False


class Router(Protocol):
    """The three questions. Implementations are frozen dataclasses; state lives in the layer."""

    @property
    def uses_bias(self) -> bool:
        """True if the layer should keep a selection bias for it."""
        ...

    def check(self, experts: int) -> None:
        """Raise ConfigError if this router cannot serve `experts` experts."""
        ...

    def score(self, logits_TE: Tensor) -> Tensor:
        """Scores from the router's float32 logits, (T, E)."""
        ...

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        """The pairs, each with weight 1."""
        ...

    def weigh(self, score_TE: Tensor, pairs: Routing) -> Tensor:
        """Combine weights of `pairs`, (N,)."""
        ...


def _check_k(k: int, experts: int) -> None:
    if not 1 <= k <= experts:
        raise ConfigError(f"k is {k}, but there are {experts} experts", hint=f"choose k from 1 to {experts}")


def _check_groups(k: int, experts: int, groups: int, kept: int, best: int) -> None:
    if groups == 1:
        return
    if not 1 <= kept <= groups or experts % groups or not 1 <= best <= experts // groups:
        raise ConfigError(
            f"groups={groups}, groups_kept={kept}, group_best={best} do not fit {experts} experts",
            hint="groups must divide the experts; keep 1 to groups of them; judge by no more experts than one holds",
        )
    if k > kept * (experts // groups):
        raise ConfigError(
            f"k is {k}, but {kept} groups hold {kept * (experts // groups)} experts", hint="keep more groups"
        )


@dataclass(frozen=True)
class TopK:
    """Softmax over all experts, then the k best (arXiv 1701.06538 without its noise).

    With `renormalize` the k weights are divided by their sum, which is the same as a softmax over the k
    chosen logits: Mixtral (2401.04088), Qwen3, Granite, gpt-oss. Without it they are plain
    probabilities: OLMoE (2409.02060), DeepSeek-V2 (2405.04434).

    Args:
        k: Experts per token.
        renormalize: Divide the chosen weights by their sum.
        scale: Factor on the weights after that.
        groups: Divide the experts into this many groups.
        groups_kept: Let a token choose from this many groups.
        group_best: Judge a group by the sum of this many best experts; 1 in DeepSeek-V2.
        bias: Keep a selection bias as `SigmoidTopK` does; ERNIE-4.5 has one.
    """

    k: int
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 1
    bias: bool = False

    @property
    def uses_bias(self) -> bool:
        return self.bias

    def check(self, experts: int) -> None:
        _check_k(self.k, experts)
        _check_groups(self.k, experts, self.groups, self.groups_kept, self.group_best)

    def score(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        return _choose(score_TE, context, self.k, self.groups, self.groups_kept, self.group_best)

    def weigh(self, score_TE: Tensor, pairs: Routing) -> Tensor:
        weight_N = pairs.at_pairs(score_TE)
        if self.renormalize:
            weight_N = weight_N / pairs.sum_by_token(weight_N).clamp(min=TINY).index_select(0, pairs.token_N)
        return weight_N * self.scale if self.scale != 1.0 else weight_N


@dataclass(frozen=True)
class Switch:
    """One expert per token, weighted by its softmax probability and not by 1 (arXiv 2101.03961).

    A weight of 1 would cut the router off from the loss.
    """

    @property
    def uses_bias(self) -> bool:
        return False

    def check(self, experts: int) -> None:
        _check_k(1, experts)

    def score(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        return Routing.from_choices(top_k(score_TE, 1), experts=score_TE.shape[1], valid_T=context.valid_T)

    def weigh(self, score_TE: Tensor, pairs: Routing) -> Tensor:
        return pairs.at_pairs(score_TE)


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
    def uses_bias(self) -> bool:
        return self.bias

    def check(self, experts: int) -> None:
        _check_k(self.k, experts)
        _check_groups(self.k, experts, self.groups, self.groups_kept, self.group_best)

    def score(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        return _choose(score_TE, context, self.k, self.groups, self.groups_kept, self.group_best)

    def weigh(self, score_TE: Tensor, pairs: Routing) -> Tensor:
        weight_N = pairs.at_pairs(score_TE)
        if self.renormalize:
            weight_N = weight_N / (pairs.sum_by_token(weight_N) + 1e-20).index_select(0, pairs.token_N)
        return weight_N * self.scale if self.scale != 1.0 else weight_N


def _choose(
    score_TE: Tensor, context: RouterContext, k: int, groups: int, groups_kept: int, group_best: int
) -> Routing:
    """The k best of score plus bias inside the best groups; of equal ones the lower expert."""
    if context.bias_E is not None:
        score_TE = score_TE + context.bias_E
    if groups_kept < groups:
        score_TE = keep_groups(score_TE, groups, groups_kept, group_best)
    expert_TK = top_k(score_TE, k)
    return Routing.from_choices(expert_TK, experts=score_TE.shape[1], valid_T=context.valid_T)


def keep_groups(score_TE: Tensor, groups: int, kept: int, best: int) -> Tensor:
    """Scores with every expert outside the `kept` best groups set to -inf.

    A group's score is the sum of its `best` highest experts: 1 in DeepSeek-V2, 2 in V3. Of equal groups
    the lower one wins.
    """
    tokens, experts = score_TE.shape
    score_TGE = score_TE.view(tokens, groups, experts // groups)
    group_TG = score_TGE.topk(best, dim=-1).values.sum(-1)
    lost_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, top_k(group_TG, kept), False)
    return score_TGE.masked_fill(lost_TG[..., None], float("-inf")).view(tokens, experts)


def _softmax(config: MoEConfig) -> Router:
    return TopK(
        config.experts_per_token,
        renormalize=config.renormalize,
        scale=config.scale,
        groups=config.groups,
        groups_kept=config.groups_kept,
        group_best=2 if config.group_score == "top2" else 1,
        bias=config.selection_bias,
    )


def _switch(config: MoEConfig) -> Router:
    return Switch()


def _sigmoid(config: MoEConfig) -> Router:
    return SigmoidTopK(
        config.experts_per_token,
        renormalize=config.renormalize,
        scale=config.scale,
        groups=config.groups,
        groups_kept=config.groups_kept,
        group_best=2 if config.group_score == "top2" else 1,
        bias=config.selection_bias,
    )


ROUTERS = {"softmax": _softmax, "switch": _switch, "sigmoid": _sigmoid}


def from_config(config: MoEConfig) -> Router:
    """The router that a config names.

    Raises:
        ConfigError: no such router, or it cannot serve this many experts.
    """
    router = ROUTERS[config.router](config)
    router.check(config.experts)
    return router
