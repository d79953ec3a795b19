"""Cross entropy straight from hidden states: no (tokens x vocabulary) matrix is ever whole in memory.

The gradient is worked out in the forward pass, a slice of tokens at a time, where the slice's
probabilities are still at hand; backward only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moiety.backends.matmul import linear, multiply_into, multiply_rows, multiply_rows_back
from moiety.moe.packed import PackedLinear

__all__ = ["IGNORED", "cross_entropy", "head_logits"]

IGNORED = -100
SLICE_ELEMENTS = 1 << 21  # logits of one slice: 8 MiB in float32, which stays in cache


def head_logits(
    hidden: Tensor,
    weight_VD: Tensor | PackedLinear,
    bias_V: Tensor | None = None,
    *,
    multiplier: float = 1.0,
    cap: float = 0.0,
) -> Tensor:
    """Scores of every vocabulary entry, (..., V): multiplier * (hidden W^T + bias), then cap * tanh(score / cap).

    Args:
        hidden: Final hidden states, (..., D).
        weight_VD: Output head, (V, D), or a packed one with its bias.
        bias_V: Its bias, or None.
        multiplier: Factor on the scores.
        cap: Bound of the scores; 0 is none.
    """
    if isinstance(weight_VD, PackedLinear):
        assert bias_V is None, "a packed head has its bias inside"
        logits: Tensor = weight_VD(hidden)
    else:
        logits = linear(hidden, weight_VD, bias_V)
    if multiplier != 1:
        logits = logits * multiplier
    return cap * (logits / cap).tanh() if cap else logits


def _capped(logits: Tensor, multiplier: float, cap: float) -> tuple[Tensor, Tensor | None]:
    """Logits times the multiplier and capped, in place, and what a gradient meets on the way back, if anything."""
    if multiplier != 1:
        logits.mul_(multiplier)
    if not cap:
        return logits, None
    logits.div_(cap).tanh_()
    slope = logits.square().neg_().add_(1)
    return logits.mul_(cap), slope


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_T: Tensor,
        multiplier: float,
        cap: float,
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        rows = max(SLICE_ELEMENTS // len(weight_VD), 1)
        grad_TD = torch.empty_like(hidden_TD) if needs_grad else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_grad else None
        grad_V = torch.zeros_like(bias_V, dtype=wide) if needs_grad and bias_V is not None else None
        part_VD = torch.empty_like(weight_VD) if needs_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        for start in range(0, len(hidden_TD), rows):
            piece = slice(start, start + rows)
            hidden, target = hidden_TD[piece], target_T[piece]
            logits, slope = _capped(multiply_rows(hidden, weight_VD, bias_V).to(wide), multiplier, cap)
            log_probability = torch.log_softmax(logits, dim=-1)
            scored = target != IGNORED
            chosen = target.where(scored, 0)[:, None]
            total += _nats(log_probability, target)
            if grad_TD is None or grad_VD is None or part_VD is None:
                continue
            grad_logits = log_probability.exp_()
            grad_logits.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=wide))
            if not bool(scored.all()):
                grad_logits.mul_(scored[:, None])
            if slope is not None:
                grad_logits.mul_(slope)
            if multiplier != 1:
                grad_logits.mul_(multiplier)
            if grad_V is not None:
                grad_V += grad_logits.sum(0)
            grad_logits = grad_logits.to(hidden_TD.dtype)
            grad_TD[piece] = multiply_rows_back(grad_logits, weight_VD)
            multiply_into(part_VD, grad_logits, hidden)
            grad_VD += part_VD
        ctx.save_for_backward(grad_TD, grad_VD, grad_V)
        ctx.weight_dtype = weight_VD.dtype
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, grad_VD, grad_V = ctx.saved_tensors
        weight_dtype = ctx.weight_dtype
        of_bias = None if grad_V is None else (grad_V * grad).to(weight_dtype)
        return grad_TD * grad.to(grad_TD.dtype), (grad_VD * grad).to(weight_dtype), of_bias, None, None, None


def _nats(log_probability_TV: Tensor, target_T: Tensor) -> Tensor:
    """Summed -ln p of the targets that are scored, in float64."""
    scored = target_T != IGNORED
    chosen = target_T.where(scored, 0)[:, None]
    return -log_probability_TV.gather(1, chosen)[:, 0].where(scored, 0).sum(dtype=torch.float64)


def _packed_cross_entropy(
    hidden: Tensor, head: PackedLinear, target: Tensor, multiplier: float, cap: float
) -> Tensor:
    hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = max(SLICE_ELEMENTS // head.rows, 1)
    total = torch.zeros((), dtype=torch.float64)
    for part_TD, target_P in zip(hidden_TD.split(rows), target_T.split(rows), strict=True):
        logits, _ = _capped(head(part_TD).to(wide), multiplier, cap)
        total += _nats(torch.log_softmax(logits, dim=-1), target_P)
    return total.to(wide)


def cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor | PackedLinear,
    target: Tensor,
    *,
    bias_V: Tensor | None = None,
    multiplier: float = 1.0,
    cap: float = 0.0,
) -> Tensor:
    """Sum over scored tokens of -ln p(target), in nats; a scalar with gradients.

    Under autocast the products run in autocast's dtype, the softmax in float32. A model's own head may have more
    than a weight: `ModelOutput.cross_entropy` passes all of it.

    Args:
        hidden: Final hidden states, (..., D).
        weight_VD: Output head, (V, D); a packed one, its bias inside, gives no gradients.
        target: Token ids, (...); `IGNORED` (-100) is not scored.
        bias_V: Bias of the head, or None.
        multiplier: Factor on the logits, see `head_logits`.
        cap: Bound of the logits; 0 is none.
    """
    if isinstance(weight_VD, PackedLinear):
        return _packed_cross_entropy(hidden, weight_VD, target, multiplier, cap)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight_VD = hidden.to(dtype), weight_VD.to(dtype)
    if bias_V is not None:
        bias_V = bias_V.to(weight_VD.dtype)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _CrossEntropy.apply(
            hidden.reshape(-1, hidden.shape[-1]), weight_VD, bias_V, target.reshape(-1), multiplier, cap
        )
    return loss
