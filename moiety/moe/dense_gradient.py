"""The gradient that experts would have given their score had they been chosen, at the price of one forward pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moiety import backends
from moiety.backends.weights import ExpertWeights
from moiety.moe.experts import Experts
from moiety.moe.routers.base import TINY
from moiety.routing import Routing

__all__ = ["dense_gradient"]


def dense_gradient(y_TD: Tensor, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """`y_TD` as it is; backward also gives the score of every pair not chosen its straight-through gradient.

    That is <dL/dy, expert(x)> times the token's weight over score, both summed over its chosen experts: what the
    pair would weigh per score if it were chosen beside them. The experts get nothing from it, and x only what
    comes back through its scores. A null expert that was not chosen gets none.

    Args:
        y_TD: The routed experts' output.
        x_TD: Their input.
        routing: With scores that carry a gradient.
        experts: The experts.
    """
    score_TE = routing.score_TE
    assert score_TE is not None
    chosen_TE = routing.mask_TE[:, : experts.count]
    others = Routing.from_mask(~chosen_TE, valid_T=routing.valid_T)
    if not others.pairs or not score_TE.requires_grad:
        return y_TD
    scale_T = routing.sum_by_token(routing.weight_N.detach())
    scale_T = scale_T / routing.sum_by_token(routing.at_pairs(score_TE.detach())).clamp(min=TINY)
    would_N = others.at_pairs(score_TE[:, : experts.count]) * scale_T[others.token_N]
    result: Tensor = _Unchosen.apply(y_TD, would_N, x_TD.detach(), others, experts)
    return result


class _Unchosen(torch.autograd.Function):
    """Passes y on, and multiplies the pairs not chosen in backward only; nothing is stored for it but x."""

    @staticmethod
    def forward(
        ctx: Any, y_TD: Tensor, would_N: Tensor, x_TD: Tensor, others: Routing, experts: Experts
    ) -> Tensor:
        ctx.save_for_backward(x_TD)
        ctx.others, ctx.experts, ctx.dtype = others, experts, would_N.dtype
        return y_TD.view_as(y_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD,) = ctx.saved_tensors
        others: Routing = ctx.others
        name = backends.choose(ctx.experts.backend, x_TD.device, x_TD.dtype).name
        weights = _frozen(ctx.experts.weights(x_TD.dtype))
        with torch.enable_grad():
            weight_N = torch.zeros_like(others.weight_N, dtype=ctx.dtype).requires_grad_()
            y_TD = backends.get(name).expert_mlp(x_TD, others.with_weights(weight_N), weights)
            (grad_N,) = torch.autograd.grad(y_TD, weight_N, grad_TD)
        return grad_TD, grad_N, None, None, None


def _frozen(weights: ExpertWeights) -> ExpertWeights:
    return replace(
        weights,
        up=weights.up.detach(),
        down=weights.down.detach(),
        up_bias=None if weights.up_bias is None else weights.up_bias.detach(),
        down_bias=None if weights.down_bias is None else weights.down_bias.detach(),
    )
