"""How the next token is drawn from logits.

The n-th token of an answer depends on its logits, its options, its seed and n alone, and not on what else is in the
batch: one uniform number follows from (seed, n), and the token is where the cumulative probability, in the order of the
vocabulary, passes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moiety.errors import MoietyError
from moiety.infer.options import SamplingOptions

__all__ = ["Draw", "NOT_FINITE", "adjusted", "best", "sample", "uniform"]

BEST_FIRST = 1024  # so many best tokens nearly always hold top_p, and are found much faster than by sorting all
NOT_FINITE = MoietyError(
    "the model's logits are not finite, so no token can be drawn",
    hint="the weights are damaged or overflow in this dtype; try fp32, or another checkpoint",
)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one token is drawn with.

    Args:
        options: What to draw from.
        prompt: Tokens before the answer.
        answer: Tokens of it so far; how many there are is n.
        forbidden: Tokens that cannot be drawn.
    """

    options: SamplingOptions
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    forbidden: frozenset[int] = frozenset()


def uniform(seed: int, number: int) -> float:
    """The random number of the `number`-th token, from 0 to below 1."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token for every row, int64 (B,).

    Args:
        logits_BV: (B, V).
        draws: What to draw with, for each row.

    Raises:
        MoietyError: a logit is not a number, so nothing can be drawn.
    """
    assert len(logits_BV) == len(draws), (logits_BV.shape, len(draws))
    if not bool(logits_BV.isfinite().all()):
        raise NOT_FINITE
    logits_BV = torch.stack([adjusted(row_V, draw) for row_V, draw in zip(logits_BV, draws, strict=True)])
    drawn_B = logits_BV.argmax(dim=-1)
    rows = [row for row, draw in enumerate(draws) if draw.options.temperature > 0]
    if rows:
        some = [draws[row] for row in rows]
        drawn_B[rows] = _drawn(logits_BV[rows], some)
    return drawn_B


def adjusted(logits_V: Tensor, draw: Draw) -> Tensor:
    """The logits after penalties, biases and what is forbidden, float32."""
    options = draw.options
    logits_V = logits_V.to(torch.float32, copy=True)
    if options.repetition_penalty != 1:
        seen = torch.tensor(sorted({*draw.prompt, *draw.answer}), dtype=torch.int64)
        logit = logits_V[seen]
        factor = options.repetition_penalty
        logits_V[seen] = torch.where(logit > 0, logit / factor, logit * factor)
    if draw.answer and (options.presence_penalty or options.frequency_penalty):
        seen, times = torch.tensor(draw.answer).unique(return_counts=True)
        logits_V[seen] -= options.presence_penalty + options.frequency_penalty * times
    if options.logit_bias:
        logits_V[list(options.logit_bias)] += torch.tensor(list(options.logit_bias.values()))
    if draw.forbidden:
        logits_V[list(draw.forbidden)] = float("-inf")
    return logits_V


def _drawn(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """A token of each row at its temperature, after the filters, (B,)."""
    temperature_B1 = torch.tensor([[draw.options.temperature] for draw in draws])
    shifted_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B1
    probability_BV = shifted_BV.softmax(-1)
    for row, draw in enumerate(draws):
        if draw.options.top_k or draw.options.top_p < 1:
            _keep_best(probability_BV[row], draw.options.top_k, draw.options.top_p)
    least_B1 = torch.tensor([[draw.options.min_p] for draw in draws])
    probability_BV[probability_BV < least_B1 * probability_BV.amax(-1, keepdim=True)] = 0
    passed_BV = probability_BV.double().cumsum(-1)
    chance_B1 = torch.tensor(
        [[uniform(draw.options.seed, len(draw.answer))] for draw in draws], dtype=torch.float64
    )
    # right: a token of probability 0 never is the first that passes
    return torch.searchsorted(passed_BV, chance_B1 * passed_BV[:, -1:], right=True)[:, 0]


def _keep_best(probability_V: Tensor, top_k: int, top_p: float) -> None:
    """Set all probabilities to 0 but those that top-k, then top-p keep; of equal ones the lower token is kept."""
    size = len(probability_V)
    for count in (min(BEST_FIRST, size), size):
        best_C, token_C = best(probability_V, min(count, top_k or size))
        share_C = best_C.double()
        total = share_C.sum() if top_k else probability_V.sum(dtype=torch.float64)
        kept_C = share_C.cumsum(0) - share_C < top_p * total
        if len(best_C) == (top_k or size) or not bool(kept_C[-1]):
            break
    probability_V.zero_()
    probability_V[token_C[kept_C]] = best_C[kept_C]


def best(values_V: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values in order and where they stand; of equal ones the lower place comes first."""
    values_C, place_C = values_V.topk(min(count + 1, len(values_V)))
    if len(values_C) > 1 and bool((values_C[1:] == values_C[:-1]).any()):  # topk takes any of equal ones
        values_C, place_C = values_V.sort(descending=True, stable=True)
    return values_C[:count], place_C[:count]
