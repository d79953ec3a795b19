"""Cross entropy straight from hidden states: no (tokens x vocabulary) matrix is ever whole in memory.

The gradient is worked out in the forward pass, a slice of tokens at a time, where the slice's
probabilities are still at hand; backward only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moiety.backends.matmul import multiply_into, multiply_rows, multiply_rows_back

__all__ = ["IGNORED", "cross_entropy"]

IGNORED = -100
SLICE_ELEMENTS = 1 << 21  # logits of one slice: 8 MiB in float32, which stays in cache


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        rows = max(SLICE_ELEMENTS // len(weight_VD), 1)
        grad_TD = torch.empty_like(hidden_TD) if needs_grad else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_grad else None
        part_VD = torch.empty_like(weight_VD) if needs_grad else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        for start in range(0, len(hidden_TD), rows):
            piece = slice(start, start + rows)
            hidden, target = hidden_TD[piece], target_T[piece]
            logits = multiply_rows(hidden, weight_VD).to(wide)
            log_probability = torch.log_softmax(logits, dim=-1)
            scored = target != IGNORED
            chosen = target.where(scored, 0)[:, None]
            total -= log_probability.gather(1, chosen)[:, 0].where(scored, 0).sum(dtype=torch.float64)
            if grad_TD is None or grad_VD is None or part_VD is None:
                continue
            grad_logits = log_probability.exp_()
            grad_logits.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=wide))
            if not bool(scored.all()):
                grad_logits.mul_(scored[:, None])
            grad_logits = grad_logits.to(hidden_TD.dtype)
            grad_TD[piece] = multiply_rows_back(grad_logits, weight_VD)
            multiply_into(part_VD, grad_logits, hidden)
            grad_VD += part_VD
        ctx.save_for_backward(grad_TD, grad_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_TD, grad_VD = ctx.saved_tensors
        return grad_TD * grad.to(grad_TD.dtype), (grad_VD * grad).to(ctx.weight_dtype), None


def cross_entropy(hidden: Tensor, weight_VD: Tensor, target: Tensor) -> Tensor:
    """Sum over scored tokens of -ln p(target), in nats; a scalar with gradients.

    Under autocast the products run in autocast's dtype, the softmax in float32.

    Args:
        hidden: Final hidden states, (..., D).
        weight_VD: Output head, (V, D).
        target: Token ids, (...); `IGNORED` (-100) is not scored.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight_VD = hidden.to(dtype), weight_VD.to(dtype)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _CrossEntropy.apply(
            hidden.reshape(-1, hidden.shape[-1]), weight_VD, target.reshape(-1)
        )
    return loss
