"""What keeps experts busy: losses and updates, each a function of `Routing`.

All are means over real tokens: padding is in no count, no mean and no gradient. A step made of several
micro-batches weighs each by its share of the step's tokens and, for the load-balancing loss, hands in
the load of the whole step; the result is then the same however the step was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moiety.routing import Routing

__all__ = ["load_balance_loss", "sequence_balance_loss", "update_bias", "z_loss"]


def _shares(routing: Routing) -> Tensor:
    """Scores scaled to sum to 1 per token, (T, E); zero for padding, whatever stands there."""
    assert routing.score_TE is not None, "this routing was made without scores"
    score_TE = routing.score_TE
    if routing.valid_T is not None:
        score_TE = score_TE.masked_fill(~routing.valid_T[:, None], 0.0)
    return score_TE / score_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(score_TE.dtype).tiny)


def _mean_probability(routing: Routing) -> Tensor:
    """Mean over real tokens of the scores, scaled to sum to 1 per token, (E,)."""
    return _shares(routing).sum(0) / max(routing.valid_tokens, 1)


def load_balance_loss(routing: Routing, load_E: Tensor | None = None) -> Tensor:
    """E * sum_i f_i P_i: f the share of pairs that expert i gets, P its mean probability.

    The convention is Switch's (arXiv 2101.03961 eq. 4) with f summing to 1 for any k: the floor is 1 at perfect
    balance, whatever k, E or the number of layers. transformers' variant sums f to k and pools all
    layers, so its floor is k. Gradients flow through P alone.

    Args:
        routing: Of one layer, with scores.
        load_E: Pairs of each expert in the whole step or over all ranks (E,); None takes this routing's own.

    Returns:
        A scalar; 0 when there is no pair at all.
    """
    probability_E = _mean_probability(routing)
    load_E = (routing.counts_E if load_E is None else load_E).to(probability_E.dtype)
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
    share_TE = _shares(routing)
    valid_T = (
        torch.ones_like(share_TE[:, 0]) if routing.valid_T is None else routing.valid_T.to(share_TE.dtype)
    )
    tokens_B = valid_T.view(sequences, length).sum(1)
    probability_BE = share_TE.view(sequences, length, experts).sum(1) / tokens_B[:, None].clamp(min=1)
    cell_N = routing.token_N.div(max(length, 1), rounding_mode="floor") * experts + routing.expert_N
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
def update_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> None:
    """b_i += rate * sign(mean load - load_i), in place: balance without a loss (arXiv 2408.15664 alg. 1).

    Args:
        bias_E: Selection bias, float32 (E,).
        load_E: Pairs of each expert in the whole step: every micro-batch, every rank.
        rate: Step size; 0.001 in the paper.
    """
    assert bias_E.dtype == torch.float32, bias_E.dtype
    load_E = load_E.to(torch.float64)
    bias_E.add_((load_E.mean() - load_E).sign().to(bias_E.dtype), alpha=rate)
