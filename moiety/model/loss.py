"""Cross entropy straight from hidden states: no (tokens x vocabulary) matrix is ever whole in memory.

The gradient is worked out in the forward pass, a slice of tokens at a time, where the slice's
probabilities are still at hand; backward only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moiety.backends import cpu_loss
from moiety.backends.adapted import Gradients, Lora, add_delta
from moiety.backends.matmul import linear, multiply_into, multiply_rows, multiply_rows_back
from moiety.backends.unpacked import UnpackedRows
from moiety.moe.adapted import AdaptedLinear, AdaptedRows
from moiety.moe.packed import PackedLinear, autocast, passes_gradient

__all__ = ["IGNORED", "SLICE_ELEMENTS", "cross_entropy", "head_logits"]

IGNORED = -100
SLICE_ELEMENTS = 1 << 21  # logits of one slice: 8 MiB in float32, which stays in cache
# Of one slice, however many logits they have: the whole head is read for each, and packed anew.
FEWEST_ROWS = 256
UNPACKED_ELEMENTS = 1 << 25  # logits of one slice where the head is packed


def head_logits(
    hidden: Tensor,
    weight_VD: Tensor | PackedLinear | AdaptedLinear,
    bias_V: Tensor | None = None,
    *,
    multiplier: float = 1.0,
    cap: float = 0.0,
    adapters: AdaptedRows | None = None,
) -> Tensor:
    """Scores of every vocabulary entry, (..., V): multiplier * (hidden W^T + bias), then cap * tanh(score / cap).

    Args:
        hidden: Final hidden states, (..., D).
        weight_VD: Output head, (V, D), or a packed or adapted one with its bias.
        bias_V: Its bias, or None.
        multiplier: Factor on the scores.
        cap: Bound of the scores; 0 is none.
        adapters: Which rows each adapter of the head is for; None lets the active one serve all.
    """
    if isinstance(weight_VD, PackedLinear | AdaptedLinear):
        assert bias_V is None, "such a head has its bias inside"
        adapted = isinstance(weight_VD, AdaptedLinear)
        logits: Tensor = weight_VD(hidden, adapters) if adapted else weight_VD(hidden)
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
        weight_VD: Tensor | UnpackedRows,
        bias_V: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        target_T: Tensor,
        scale_T: Tensor | None,
        multiplier: float,
        cap: float,
        lora: Lora | None,
    ) -> Tensor:
        needs_grad, needs_weight = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        rows = _rows_of_slice(len(hidden_TD), weight_VD)
        grad_TD = torch.empty_like(hidden_TD) if needs_grad else None
        learnt_VD = weight_VD if needs_weight and isinstance(weight_VD, Tensor) else None
        grad_VD = None if learnt_VD is None else torch.zeros_like(learnt_VD, dtype=wide)
        grad_V = torch.zeros_like(bias_V, dtype=wide) if needs_grad and bias_V is not None else None
        part_VD = None if learnt_VD is None else torch.empty_like(learnt_VD)
        added = None if lora is None else Gradients(lora)
        total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
        for start in range(0, len(hidden_TD), rows):
            piece = slice(start, start + rows)
            hidden, target = hidden_TD[piece], target_T[piece]
            raw = _logits(hidden, weight_VD, bias_V)
            if lora is not None:
                add_delta(raw, hidden, lora, 0)
            nats, grad_logits = _of_logits(
                raw, target, None if scale_T is None else scale_T[piece], multiplier, cap, needs_grad
            )
            total += nats
            if grad_TD is None or grad_logits is None:
                continue
            if grad_V is not None:
                grad_V += grad_logits.sum(0, dtype=wide)
            grad_TD[piece] = _back(grad_logits, weight_VD)
            if added is not None:
                grad_TD[piece] += added.take(grad_logits, hidden, 0)
            if grad_VD is not None and part_VD is not None:
                multiply_into(part_VD, grad_logits, hidden)
                grad_VD += part_VD
        ctx.save_for_backward(
            grad_TD, grad_VD, grad_V, *((None, None) if added is None else (added.a, added.b))
        )
        ctx.weight_dtype = weight_VD.dtype
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, *others = ctx.saved_tensors
        found = [None if one is None else (one * grad).to(ctx.weight_dtype) for one in others]
        return grad_TD * grad.to(grad_TD.dtype), *found, None, None, None, None, None


def _rows_of_slice(tokens: int, weight_VD: Tensor | UnpackedRows) -> int:
    """Slices of a packed head are few, because it is unpacked twice for each, and equal."""
    if isinstance(weight_VD, Tensor):
        return max(SLICE_ELEMENTS // len(weight_VD), FEWEST_ROWS)
    most = max(UNPACKED_ELEMENTS // len(weight_VD), FEWEST_ROWS)
    return max(-(-tokens // -(-tokens // most)), 1) if tokens else 1


def _logits(hidden_RD: Tensor, weight_VD: Tensor | UnpackedRows, bias_V: Tensor | None) -> Tensor:
    if isinstance(weight_VD, UnpackedRows):
        return weight_VD.multiply(hidden_RD, bias_V)
    return multiply_rows(hidden_RD, weight_VD, bias_V)


def _back(grad_RV: Tensor, weight_VD: Tensor | UnpackedRows) -> Tensor:
    if isinstance(weight_VD, UnpackedRows):
        return weight_VD.multiply_back(grad_RV)
    return multiply_rows_back(grad_RV, weight_VD)


def _of_logits(
    raw_RV: Tensor, target_R: Tensor, scale_R: Tensor | None, multiplier: float, cap: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Nats of some rows, and the gradient of `raw_RV`, in whose place it may come; by the kernels where they can."""
    if cpu_loss.takes(raw_RV):
        nats = cpu_loss.cross_entropy_rows(
            raw_RV, target_R, scale_R, multiplier=multiplier, cap=cap, gradient=gradient
        )
        return nats, raw_RV if gradient else None
    return _by_torch(raw_RV, target_R, scale_R, multiplier, cap, gradient)


def _by_torch(
    raw_RV: Tensor, target_R: Tensor, scale_R: Tensor | None, multiplier: float, cap: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The definition."""
    wide = torch.promote_types(raw_RV.dtype, torch.float32)
    logits, slope = _capped(raw_RV.to(wide), multiplier, cap)
    log_probability, chosen = torch.log_softmax(logits, dim=-1), target_R[:, None]
    nats_R = -log_probability.gather(1, chosen)[:, 0]
    nats = (nats_R if scale_R is None else nats_R * scale_R).sum(dtype=torch.float64)
    if not gradient:
        return nats, None
    grad = log_probability.exp_()
    grad.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=wide))
    if scale_R is not None:
        grad.mul_(scale_R[:, None])
    if slope is not None:
        grad.mul_(slope)
    return nats, grad.mul_(multiplier).to(raw_RV.dtype)


def _no_gradient(
    hidden_TD: Tensor,
    head: PackedLinear | AdaptedLinear,
    target_T: Tensor,
    scale_T: Tensor | None,
    multiplier: float,
    cap: float,
) -> Tensor:
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    rows = max(SLICE_ELEMENTS // head.rows, FEWEST_ROWS)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(hidden_TD), rows):
        piece = slice(start, start + rows)
        scale = None if scale_T is None else scale_T[piece]
        total = total + _of_logits(head(hidden_TD[piece]), target_T[piece], scale, multiplier, cap, False)[0]
    return total.to(wide)


def _frozen_head(
    head: PackedLinear | AdaptedLinear, dtype: torch.dtype
) -> tuple[Tensor | UnpackedRows, Tensor | None, Lora | None]:
    """Weight, bias and additions of a head in training; of a packed one some rows at a time are unpacked."""
    lora = None
    if isinstance(head, AdaptedLinear):
        lora = head.lora(head.active, dtype) if head.present(None) else None
        base = head.base
        if isinstance(base, nn.Linear):
            return base.weight.to(dtype), base.bias, lora
        assert isinstance(base, PackedLinear), type(base)
        head = base
    return UnpackedRows(head.matrix, dtype), head.bias, lora


def cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor | PackedLinear | AdaptedLinear,
    target: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: Tensor | None = None,
    multiplier: float = 1.0,
    cap: float = 0.0,
) -> Tensor:
    """Sum over scored tokens of -ln p(target), in nats; a scalar with gradients.

    Under autocast the products run in autocast's dtype, the softmax in float32. A model's own head may have more
    than a weight: `ModelOutput.cross_entropy` passes all of it.

    Args:
        hidden: Final hidden states, (..., D).
        weight_VD: Output head, (V, D); of a packed or adapted one, its bias inside, only the adapter learns.
        target: Token ids, (...); `IGNORED` (-100) is not scored.
        bias_V: Bias of the head, or None.
        scale: What each token's -ln p is multiplied by, (...), without gradient; None is 1.
        multiplier: Factor on the logits, see `head_logits`.
        cap: Bound of the logits; 0 is none.
    """
    hidden_TD, target_T = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    scale_T, lora = None if scale is None else scale.reshape(-1), None
    scored_T = target_T != IGNORED
    if not bool(scored_T.all()):  # what is not scored needs no logits either
        hidden_TD, target_T = hidden_TD[scored_T], target_T[scored_T]
        scale_T = None if scale_T is None else scale_T[scored_T]
    if isinstance(weight_VD, PackedLinear | AdaptedLinear):
        if not passes_gradient(weight_VD.training, hidden, *weight_VD.parameters()):
            return _no_gradient(hidden_TD, weight_VD, target_T, scale_T, multiplier, cap)
        head, bias_V, lora = _frozen_head(weight_VD, autocast(hidden_TD).dtype)
    else:
        head = weight_VD
    device, hidden_TD = hidden.device.type, autocast(hidden_TD)
    if torch.is_autocast_enabled(device) and isinstance(head, Tensor):
        head = head.to(hidden_TD.dtype)
    if bias_V is not None:
        bias_V = bias_V.to(head.dtype)
    factors = (None, None) if lora is None else lora[:2]
    with torch.autocast(device, enabled=False):
        loss: Tensor = _CrossEntropy.apply(
            hidden_TD, head, bias_V, *factors, target_T, scale_T, multiplier, cap, lora
        )
    return loss
