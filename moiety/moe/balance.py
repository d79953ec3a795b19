"""What keeps experts busy: the common losses, and the updates that work without one, each a function of `Routing`.

All losses are means over real tokens: padding is in no count, no mean and no gradient. A step made of several
micro-batches weighs each by its share of the step's tokens and, for the load-balancing loss, hands in
the load of the whole step; the result is then the same however the step was cut. Where a capacity took pairs
away, a loss counts the pairs that were wanted: those left look more even than the router is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moiety.errors import ConfigError
from moiety.routing import Routing

__all__ = [
    "intended",
    "load_balance_loss",
    "quantile_bias",
    "sequence_balance_loss",
    "shares",
    "update_bias",
    "update_sparsity",
    "z_loss",
]


def intended(routing: Routing) -> Routing:
    """The pairs that the router asked for, before a capacity policy changed them."""
    return routing if routing.wanted is None else routing.wanted


def shares(routing: Routing) -> Tensor:
    """Scores scaled to sum to 1 per token, (T, E); zero for padding, whatever stands there."""
    assert routing.score_TE is not None, "this routing was made without scores"
    score_TE = routing.score_TE
    if routing.valid_T is not None:
        score_TE = score_TE.masked_fill(~routing.valid_T[:, None], 0.0)
    return score_TE / score_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(score_TE.dtype).tiny)


def _mean_probability(routing: Routing) -> Tensor:
    """Mean over real tokens of the scores, scaled to sum to 1 per token, (E,)."""
    return shares(routing).sum(0) / max(routing.valid_tokens, 1)


def load_balance_loss(routing: Routing, load_E: Tensor | None = None) -> Tensor:
    """E * sum_i f_i P_i: f the share of pairs that expert i gets, P its mean probability.

    The convention is Switch's (arXiv 2101.03961 eq. 4) with f summing to 1 for any k: the floor is 1 at perfect
    balance, whatever k, E or the number of layers. transformers' variant sums f to k and pools all
    layers, so its floor is k. Gradients flow through P alone.

    Args:
        routing: Of one layer, with scores.
        load_E: Wanted pairs of each expert in the whole step or over all ranks (E,); None takes this routing's own.

    Returns:
        A scalar; 0 when there is no pair at all.
    """
    probability_E = _mean_probability(routing)
    load_E = (intended(routing).counts_E if load_E is None else load_E).to(probability_E.dtype)
    fraction_E = load_E / load_E.sum().clamp(min=1)
    return routing.experts * (fraction_E * probability_E).sum()


def sequence_balance_loss(routing: Routing, sequences: int) -> Tensor:
    """The load-balancing loss of each sequence by itself, averaged (DeepSeek-V3, arXiv 2412.19437 eq. 17).

    Args:
        routing: Of `sequences` sequences of equal length, one after the other; padding inside is allowed.
        sequences: How many.
    """
    assert sequences > 0 and routing.tokens % sequences == 0, (routing.tokens, sequences)
    length, experts = routing.tokens // sequences, routing.experts
    share_TE = shares(routing)
    valid_T = (
        torch.ones_like(share_TE[:, 0]) if routing.valid_T is None else routing.valid_T.to(share_TE.dtype)
    )
    tokens_B = valid_T.view(sequences, length).sum(1)
    probability_BE = share_TE.view(sequences, length, experts).sum(1) / tokens_B[:, None].clamp(min=1)
    wanted = intended(routing)
    cell_N = wanted.token_N.div(max(length, 1), rounding_mode="floor") * experts + wanted.expert_N
    counts_BE = torch.bincount(cell_N, minlength=sequences * experts).view(sequences, experts)
    fraction_BE = counts_BE / counts_BE.sum(1, keepdim=True).clamp(min=1)
    loss_B = routing.experts * (fraction_BE * probability_BE).sum(1)
    return (loss_B * tokens_B).sum() / tokens_B.sum().clamp(min=1)


def z_loss(routing: Routing) -> Tensor:
    """Mean over real tokens of logsumexp(logits)^2, which keeps logits small (arXiv 2202.08906 eq. 5)."""
    assert routing.logits_TE is not None, "this routing was made without logits"
    logits_TE = routing.logits_TE
    if routing.valid_T is not None:
        logits_TE = logits_TE.masked_fill(~routing.valid_T[:, None], 0.0)
    squared_T = logits_TE.logsumexp(dim=-1).square()
    if routing.valid_T is not None:
        squared_T = squared_T * routing.valid_T
    return squared_T.sum() / max(routing.valid_tokens, 1)


@torch.no_grad()
def update_bias(
    bias_E: Tensor, load_E: Tensor, rate: float, rule: Literal["sign", "proportional"] = "sign"
) -> None:
    """b_i += rate * sign(mean load - load_i), in place: balance without a loss (arXiv 2408.15664 alg. 1).

    Rule "proportional" steps by the error instead of its sign (table 3 there). The error is divided by the
    mean load, so that a rate means the same for any batch; an idle expert moves by `rate`, as with "sign".

    Args:
        bias_E: Selection bias, float32 (E,).
        load_E: Pairs of each expert in the whole step: every micro-batch, every rank.
        rate: Step size; 0.001 in the paper.
        rule: sign or proportional.

    Raises:
        ConfigError: no such rule.
    """
    assert bias_E.dtype == torch.float32, bias_E.dtype
    load_E = load_E.to(torch.float64)
    mean = load_E.mean()
    if rule == "sign":
        step_E = (mean - load_E).sign()
    elif rule == "proportional":
        step_E = (mean - load_E) / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    else:
        raise ConfigError(f"there is no bias rule {rule!r}", hint="there are sign, proportional")
    bias_E.add_(step_E.to(bias_E.dtype), alpha=rate)


@torch.no_grad()
def quantile_bias(
    score_TE: Tensor, bias_E: Tensor, k: int, valid_T: Tensor | None = None, rounds: int = 1
) -> None:
    """Set the selection bias, in place, so that top-k of score + bias is even on these very tokens.

    The even choice with the greatest sum of chosen scores, k per token and kT/E per expert, is an assignment
    problem. Its dual has a price per token and a bias per expert, and each has a best value given the
    others: a_t is midway between the k-th and (k+1)-th largest of s_te + b_e, and -b_e midway between the
    n-th and (n+1)-th largest of s_te - a_t, n = kT/E rounded. A round sets all a, then all b, and centres b.

    Args:
        score_TE: Scores of many tokens, (T, E).
        bias_E: Selection bias, float32 (E,), the start of the first round; unchanged for fewer than two tokens.
        k: Experts per token.
        valid_T: False for padding.
        rounds: How often.
    """
    assert bias_E.dtype == torch.float32, bias_E.dtype
    if valid_T is not None:
        score_TE = score_TE[valid_T]
    tokens, experts = score_TE.shape
    assert 1 <= k <= experts, (k, experts)
    if tokens < 2 or k == experts:
        return
    per_expert = min(max(round(k * tokens / experts), 1), tokens - 1)
    for _ in range(rounds):
        edge_TK = (score_TE + bias_E).topk(k + 1, dim=1).values[:, k - 1 :]
        margin_TE = score_TE - edge_TK.mean(dim=1, keepdim=True)
        edge_KE = margin_TE.topk(per_expert + 1, dim=0).values[per_expert - 1 :]
        bias_E.copy_(-edge_KE.mean(dim=0))
        bias_E.sub_(bias_E.mean())


def update_sparsity(
    coefficient: float, pairs_per_token: float, target_k: float, experts: int, rate: float = 1.2
) -> float:
    """The next coefficient of the sparsity loss: lambda * rate^sign((1 - k/E) - sparsity) (ReMoE, arXiv 2412.14711).

    The measured sparsity is 1 - pairs per token / E: too many pairs raise the coefficient, too few lower it.

    Args:
        coefficient: The present one, above 0; the paper starts at 1e-8.
        pairs_per_token: Mean over the step.
        target_k: What it should be, at most `experts`.
        experts: E.
        rate: Factor of one update, above 1.
    """
    assert coefficient > 0 and rate > 1 and 0 < target_k <= experts, (coefficient, rate, target_k, experts)
    error = pairs_per_token - target_k  # E times the paper's, so exactly 0 at the target
    return coefficient * rate ** ((error > 0) - (error < 0))
