"""How the next token is drawn from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from moiety.errors import MoietyError
from moiety.infer.options import SamplingOptions

__all__ = ["sample"]


def sample(logits_BV: Tensor, options: SamplingOptions, generator: torch.Generator) -> Tensor:
    """One token for every sequence, int64 (B,).

    Args:
        logits_BV: (B, V).
        options: What to draw from.
        generator: Where the randomness comes from; unused at temperature 0.

    Raises:
        MoietyError: a logit is not a number, so nothing can be drawn.
    """
    logits_BV = logits_BV.float()
    if not bool(logits_BV.isfinite().all()):
        raise MoietyError(
            "the model's logits are not finite, so no token can be drawn",
            hint="the weights are damaged or overflow in this dtype; try fp32, or another checkpoint",
        )
    if options.temperature == 0:
        return logits_BV.argmax(dim=-1)
    shifted_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / options.temperature
    probability_BV, order_BV = shifted_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        probability_BV[:, options.top_k :] = 0
    before_BV = probability_BV.cumsum(-1) - probability_BV
    probability_BV[before_BV >= options.top_p * probability_BV.sum(-1, keepdim=True)] = 0
    probability_BV[probability_BV < options.min_p * probability_BV[:, :1]] = 0
    drawn_B = torch.multinomial(probability_BV, 1, generator=generator)
    return order_BV.gather(1, drawn_B)[:, 0]
