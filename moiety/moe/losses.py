"""More losses that keep experts busy, and a table of all that a layer can be trained with, by name.

Each says its formula, its floor, and what the gradient flows through; counts never carry one. As in `balance`,
means are over real tokens, no token at all costs 0, and counts are of the pairs that were wanted. Those with
`load_E` (or with no count at all) add up over micro-batches weighed by their tokens; the others are of one
micro-batch, and its size is part of what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moiety.errors import UsageError
from moiety.moe.balance import intended, load_balance_loss, sequence_balance_loss, shares, z_loss
from moiety.routing import Routing

__all__ = [
    "LOSSES",
    "LossContext",
    "communication_loss",
    "entropy_loss",
    "group_balance_loss",
    "gshard_balance_loss",
    "importance_loss",
    "pooled_balance_loss",
    "smooth_load_loss",
    "sparsity_loss",
    "squared_variation",
]


def squared_variation(load_E: Tensor) -> Tensor:
    """CV^2 = variance / mean^2 with the population variance: 0 when all are equal, E - 1 when one has all."""
    mean = load_E.mean()
    return (load_E - mean).square().mean() / mean.square().clamp(min=torch.finfo(load_E.dtype).tiny)


def _real_scores(routing: Routing) -> Tensor:
    """The scores themselves, (T, E); zero for padding."""
    assert routing.score_TE is not None, "this routing was made without scores"
    if routing.valid_T is None:
        return routing.score_TE
    return routing.score_TE.masked_fill(~routing.valid_T[:, None], 0.0)


def gshard_balance_loss(routing: Routing) -> Tensor:
    """1/E * sum_e (c_e / S) m_e: c first choices, S tokens, m mean probability (GShard, arXiv 2006.16668 alg. 1).

    At perfect balance it is 1/E^2, so its coefficient is E^2 times Switch's; like that one's, the value is no
    lower bound. Gradients flow through m alone. The first choice of a token is its pair of rank 0, or its
    best scored one (of equal scores the lower expert) where ranks are not known.
    """
    wanted, share_TE = intended(routing), shares(routing)
    if wanted.rank_N is None:
        assert routing.score_TE is not None, "this routing was made without scores"
        chosen_TE = wanted.mask_TE
        first_TE = routing.score_TE.detach().masked_fill(~chosen_TE, float("-inf"))
        first_T = first_TE.argmax(dim=1)[chosen_TE.any(dim=1)]
    else:
        first_T = wanted.expert_N[wanted.rank_N == 0]
    count_E = torch.bincount(first_T, minlength=routing.experts).to(share_TE.dtype)
    tokens = max(routing.valid_tokens, 1)
    return (count_E / tokens * (share_TE.sum(0) / tokens)).sum() / routing.experts


def pooled_balance_loss(routings: Sequence[Routing]) -> Tensor:
    """E * sum_i f_i P_i over the tokens of all layers as one pool: transformers' `load_balancing_loss_func`.

    f_i is pairs of expert i per token and so sums to k: at perfect balance the loss is k. Two layers that each
    have a favourite may look even together; `load_balance_loss` of each layer sees them. Gradients flow through
    P alone. transformers takes the softmax of the logits whatever the router does; here P is of its scores.

    Args:
        routings: One per layer, with equal numbers of experts.
    """
    assert routings and len({routing.experts for routing in routings}) == 1, [r.experts for r in routings]
    tokens = max(sum(routing.valid_tokens for routing in routings), 1)
    probability_E = torch.stack([shares(routing).sum(0) for routing in routings]).sum(0) / tokens
    load_E = torch.stack([intended(routing).counts_E for routing in routings]).sum(0)
    return routings[0].experts * (load_E.to(probability_E.dtype) / tokens * probability_E).sum()


def importance_loss(routing: Routing) -> Tensor:
    """CV^2 of the experts' importance, the sum of the combine weights given to each (arXiv 1701.06538 eq. 6-7).

    The floor is 0, and a true one. Gradients flow through the combine weights, of chosen pairs only.
    """
    weight_N = routing.weight_N
    return squared_variation(weight_N.new_zeros(routing.experts).index_add(0, routing.expert_N, weight_N))


def smooth_load_loss(routing: Routing, k: int) -> Tensor:
    """CV^2 of a smooth estimate of the load (arXiv 1701.06538 appendix A).

    Load_i = sum_t P(t, i), the chance that expert i stays among token t's k best if its noise alone is drawn
    again: Phi((clean_ti - edge_ti) / deviation_ti), edge the k-th largest of the other experts' noisy logits.
    The floor is 0, and a true one. Gradients flow through the clean logits, the deviation and the edge.

    Args:
        routing: Of a router with noise; its logits are the noisy ones.
        k: Experts per token; if that is all of them, the load is even and the loss 0.

    Raises:
        UsageError: the router adds no noise.
    """
    if routing.noise is None or routing.logits_TE is None:
        raise UsageError(
            "the smooth load loss needs a router with noise, in training",
            hint="use router 'noisy', or loss 'load'",
        )
    noisy_TE, (clean_TE, deviation_TE) = routing.logits_TE, routing.noise
    if k >= routing.experts:
        return (clean_TE * 0).sum()
    if routing.valid_T is not None:
        padding_T1 = ~routing.valid_T[:, None]
        noisy_TE, clean_TE = noisy_TE.masked_fill(padding_T1, 0.0), clean_TE.masked_fill(padding_T1, 0.0)
        deviation_TE = deviation_TE.masked_fill(padding_T1, 1.0)
    best_TK = noisy_TE.topk(k + 1, dim=1).values
    last_T1, next_T1 = best_TK[:, k - 1 : k], best_TK[:, k:]
    edge_TE = torch.where(noisy_TE > next_T1, next_T1, last_T1)
    deviation_TE = deviation_TE.clamp(min=torch.finfo(deviation_TE.dtype).eps)
    chance_TE = torch.special.ndtr((clean_TE - edge_TE) / deviation_TE)
    if routing.valid_T is not None:
        chance_TE = chance_TE * routing.valid_T[:, None]
    return squared_variation(chance_TE.sum(0))


def _by_group(value_E: Tensor, groups: int) -> Tensor:
    assert groups > 0 and len(value_E) % groups == 0, (len(value_E), groups)
    return value_E.view(groups, -1)


def group_balance_loss(routing: Routing, groups: int, load_E: Tensor | None = None) -> Tensor:
    """sum_j f'_j P'_j over groups of experts, one group a device: L_DevBal of DeepSeekMoE (arXiv 2401.06066 eq. 15).

    f' is the mean over a group of f_i = E * share of pairs, P' the sum over it of the mean probabilities. At
    perfect balance it is 1; like Switch's loss this is no lower bound. Gradients flow through P' alone.

    Args:
        routing: Of one layer, with scores.
        groups: Groups of equal size, of consecutive experts.
        load_E: Wanted pairs of each expert in the whole step; None takes this routing's own.
    """
    probability_E = shares(routing).sum(0) / max(routing.valid_tokens, 1)
    load_E = (intended(routing).counts_E if load_E is None else load_E).to(probability_E.dtype)
    fraction_E = routing.experts * load_E / load_E.sum().clamp(min=1)
    return (_by_group(fraction_E, groups).mean(1) * _by_group(probability_E, groups).sum(1)).sum()


def communication_loss(routing: Routing, groups: int, most_groups: int) -> Tensor:
    """sum_j f''_j P''_j: L_CommBal of DeepSeek-V2 (arXiv 2405.04434), what each device receives.

    f''_j = D / (M T) * number of tokens sent to group j, with D groups and at most M of them per token; P''_j
    the sum over the group of the mean probabilities. Evenly spread it is 1 if every token is sent to M groups,
    and 1/M if each is sent to one; neither is a lower bound. Gradients flow through P'' alone.

    Args:
        routing: Of one layer, with scores.
        groups: D, groups of equal size, of consecutive experts.
        most_groups: M.
    """
    assert 1 <= most_groups <= groups, (most_groups, groups)
    tokens = max(routing.valid_tokens, 1)
    probability_E = shares(routing).sum(0) / tokens
    group_G = _by_group(probability_E, groups).sum(1)
    mask_TE = intended(routing).mask_TE
    sent_G = mask_TE.view(len(mask_TE), groups, routing.experts // groups).any(dim=2).sum(0)
    return groups / (most_groups * tokens) * (sent_G.to(group_G.dtype) * group_G).sum()


def entropy_loss(routing: Routing) -> Tensor:
    """Mean over tokens of -sum_e p_e ln p_e, p the scores scaled to sum to 1 (top-p routing, arXiv 2403.07652).

    It keeps a router that takes experts until their sum is p from spreading over all of them. The floor is 0,
    and a true one, where each token is sure of one expert; the most is ln E. Gradients flow through p.
    """
    share_TE = shares(routing)
    log_TE = share_TE.clamp(min=torch.finfo(share_TE.dtype).tiny).log()
    return -(share_TE * log_TE).sum() / max(routing.valid_tokens, 1)


def sparsity_loss(routing: Routing, load_E: Tensor | None = None) -> Tensor:
    """Mean over tokens of sum_e f_e s_te, f_e = E * share of pairs: ReMoE's L1 of its scores (arXiv 2412.14711).

    The scores of a ReLU router are 0 for most experts; a busy expert's are pressed down harder, which balances
    them too. ReMoE divides the load by its target k T / E, here by what it is; at the target both are the same.
    The floor is 0, and a true one for scores that are not negative. Gradients flow through the scores.

    Args:
        routing: Of one layer, with scores.
        load_E: Wanted pairs of each expert in the whole step; None takes this routing's own.
    """
    score_TE = _real_scores(routing)
    load_E = (intended(routing).counts_E if load_E is None else load_E).to(score_TE.dtype)
    fraction_E = routing.experts * load_E / load_E.sum().clamp(min=1)
    return (fraction_E * score_TE.sum(0)).sum() / max(routing.valid_tokens, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LossContext:
    """What a loss may look at besides the routing.

    Args:
        k: Experts per token.
        load_E: Wanted pairs of each expert in the whole step; None takes the routing's own.
        sequences: Sequences of equal length in the routing.
        groups: Groups of experts, one a device.
        groups_kept: Groups a token may be sent to.
    """

    k: int
    load_E: Tensor | None = None
    sequences: int = 1
    groups: int = 1
    groups_kept: int = 1


LOSSES: dict[str, Callable[[Routing, LossContext], Tensor]] = {
    "load": lambda routing, context: load_balance_loss(routing, context.load_E),
    "sequence": lambda routing, context: sequence_balance_loss(routing, context.sequences),
    "gshard": lambda routing, context: gshard_balance_loss(routing),
    "importance": lambda routing, context: importance_loss(routing),
    "smooth_load": lambda routing, context: smooth_load_loss(routing, context.k),
    "group": lambda routing, context: group_balance_loss(routing, context.groups, context.load_E),
    "communication": lambda routing, context: communication_loss(
        routing, context.groups, context.groups_kept
    ),
    "entropy": lambda routing, context: entropy_loss(routing),
    "sparsity": lambda routing, context: sparsity_loss(routing, context.load_E),
    "z": lambda routing, context: z_loss(routing),
}
