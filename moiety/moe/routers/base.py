"""What a router is asked, what it may look at, and what it may ask its layer for.

    score(logits_TE, context)           how good every expert looks; what the balance loss averages
    choose(score_TE, context)           which pairs are made, without gradient
    weigh(score_TE, pairs, context)     the combine weight of given pairs, with gradient

Choosing and weighing are apart so that a choice can be pinned and weighed again (activation
recompute, replay of a trace). A router keeps nothing: what it learns or draws lives in the layer, and every
random number comes from a seed in the context, so a step can be repeated exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moiety.errors import ConfigError
from moiety.routing import Routing, top_k

__all__ = [
    "Needs",
    "Router",
    "RouterContext",
    "check_groups",
    "check_k",
    "choose_top_k",
    "divided",
    "keep_groups",
]

TINY = torch.finfo(torch.float32).tiny  # a pinned choice may have scores that all underflow to 0


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a router wants from the layer that holds it.

    Args:
        bias: A selection bias per expert, moved by `balance.update_bias` and not by gradients.
        noise: A second projection `gate_noise`, zero at first, that says how noisy each logit is while training.
        jitter: Multiply the router's input by U(1 - jitter, 1 + jitter) while training.
        gate: A trained projection to logits; without it logits are zeros.
        token_ids: The token ids of the text.
        random: A seed in every training step.
        compares: Not a wish: its choice compares scores, so a constant per expert added to them sways it.
        ranked: Not a wish either: its pairs carry `rank_N`.
        dense_gradient: Scores of experts that were not chosen get a gradient too, from their would-be outputs.
    """

    bias: bool = False
    noise: bool = False
    jitter: float = 0.0
    gate: bool = True
    token_ids: bool = False
    random: bool = False
    compares: bool = True
    ranked: bool = False
    dense_gradient: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterContext:
    """What a router may look at besides the scores.

    Args:
        logits_TE: The router's raw outputs, with gradient, noise included.
        valid_T: False for padding, which is never routed.
        bias_E: Selection bias, added when choosing and never when weighing.
        cost_E: What using each expert costs, in any unit; None when nobody measured.
        token_id_T: Token ids, int64 (T,), where the router needs them.
        training: True in a training step.
        step: Of the training run, from 0; None outside of one, where schedules have ended.
        seed: Of everything random in this call.
    """

    logits_TE: Tensor
    valid_T: Tensor | None = None
    bias_E: Tensor | None = None
    cost_E: Tensor | None = None
    token_id_T: Tensor | None = None
    training: bool = False
    step: int | None = None
    seed: int = 0

    def generator(self, purpose: int) -> torch.Generator:
        """Random numbers of this call; each purpose has its own, so that one draw more does not move another."""
        mixed = (
            self.seed * 0x9E3779B1 + purpose * 0x85EBCA6B + 1
        ) % 2**32  # torch's CPU generator takes 32 bits
        return torch.Generator(self.logits_TE.device).manual_seed(mixed)


class Router(Protocol):
    """The three questions. Implementations are frozen dataclasses."""

    @property
    def needs(self) -> Needs:
        """What the layer must provide."""
        ...

    def check(self, experts: int) -> None:
        """Raise ConfigError if this router cannot serve `experts` experts."""
        ...

    def score(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        """Scores from the router's float32 logits, (T, E), not negative."""
        ...

    def choose(self, score_TE: Tensor, context: RouterContext) -> Routing:
        """The pairs, each with weight 1."""
        ...

    def weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        """Combine weights of `pairs`, (N,)."""
        ...


def check_k(k: int, experts: int) -> None:
    """Raise ConfigError unless k of `experts` can be chosen."""
    if not 1 <= k <= experts:
        raise ConfigError(f"k is {k}, but there are {experts} experts", hint=f"choose k from 1 to {experts}")


def check_groups(k: int, experts: int, groups: int, kept: int, best: int) -> None:
    """Raise ConfigError unless the groups divide the experts and the kept ones hold k."""
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


def choose_top_k(
    score_TE: Tensor,
    context: RouterContext,
    k: int,
    *,
    groups: int = 1,
    groups_kept: int = 1,
    group_best: int = 1,
) -> Routing:
    """The k best of score plus bias inside the best groups; of equal ones the lower expert."""
    if context.bias_E is not None:
        score_TE = score_TE + context.bias_E
    if groups_kept < groups:
        score_TE = keep_groups(score_TE, groups, groups_kept, group_best)
    return Routing.from_choices(top_k(score_TE, k), experts=score_TE.shape[1], valid_T=context.valid_T)


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


def divided(weight_N: Tensor, pairs: Routing) -> Tensor:
    """Weights divided by their token's sum."""
    return weight_N / pairs.sum_by_token(weight_N).clamp(min=TINY).index_select(0, pairs.token_N)
