"""How the next token is drawn from logits.

The n-th token of an answer depends on its logits, its options, its seed and n alone, and not on what else is in the
batch: one uniform number follows from (seed, n), and the token is where the cumulative probability, in the order of the
vocabulary, passes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moiety.errors import MoietyError
from moiety.infer.options import SamplingOptions

__all__ = ["Draw", "adjust", "best", "not_finite", "sample", "uniform"]

BEST_FIRST = (
    1024  # so many best tokens nearly always hold top_p, and are found much faster than by sorting all
)
COLDEST = 1e-30  # what divides float32 must not be 0 there


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one token is drawn with.

    Args:
        options: What to draw from.
        prompt: Tokens before the answer.
        answer: Tokens of it so far; how many there are is n.
        forbidden: Tokens that cannot be drawn.
        bias: Added to the logits of these tokens.
        allowed: One byte for each token, 0 for those that cannot be drawn; tokens past its end cannot either.
    """

    options: SamplingOptions
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    forbidden: frozenset[int] = frozenset()
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: bytes | None = None


def not_finite() -> MoietyError:
    """What is wrong when a logit is not a number."""
    return MoietyError(
        "the model's logits are not finite, so no token can be drawn",
        hint="the weights are damaged or overflow in this dtype; try fp32, or another checkpoint",
    )


def uniform(seed: int, number: int) -> float:
    """The random number of the `number`-th token, from 0 to below 1."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) / 2**52


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
        raise not_finite()
    logits_BV = logits_BV.to("cpu", torch.float32, copy=any(map(_changes, draws)))
    for row_V, draw in zip(logits_BV, draws, strict=True):
        if _changes(draw):
            adjust(row_V, draw)
    drawn_B = logits_BV.argmax(dim=-1)
    for row, draw in enumerate(draws):
        if draw.options.temperature > 0:
            drawn_B[row] = _drawn(logits_BV[row], draw)
    return drawn_B


def _changes(draw: Draw) -> bool:
    """True if logits are not drawn from as they are."""
    options = draw.options
    penalties = (options.repetition_penalty - 1, options.presence_penalty, options.frequency_penalty)
    return any(penalties) or bool(draw.bias) or bool(draw.forbidden) or draw.allowed is not None


def adjust(logits_V: Tensor, draw: Draw) -> None:
    """Penalties, biases and what is forbidden, in place; float32."""
    options = draw.options
    if options.repetition_penalty != 1:
        seen = torch.tensor(sorted({*draw.prompt, *draw.answer}), dtype=torch.int64)
        logit = logits_V[seen]
        factor = options.repetition_penalty
        logits_V[seen] = torch.where(logit > 0, logit / factor, logit * factor)
    if draw.answer and (options.presence_penalty or options.frequency_penalty):
        seen, times = torch.tensor(draw.answer).unique(return_counts=True)
        logits_V[seen] -= options.presence_penalty + options.frequency_penalty * times
    if draw.bias:
        logits_V[list(draw.bias)] += torch.tensor(list(draw.bias.values()))
    if draw.forbidden:
        logits_V[list(draw.forbidden)] = float("-inf")
    if draw.allowed is not None:
        refused_V = torch.frombuffer(bytearray(draw.allowed), dtype=torch.uint8)[: len(logits_V)] == 0
        logits_V[: len(refused_V)].masked_fill_(refused_V, float("-inf"))
        logits_V[len(refused_V) :] = float("-inf")


def _drawn(logits_V: Tensor, draw: Draw) -> Tensor:
    """The token at a temperature, after the filters: an integer."""
    options = draw.options
    probability_C = ((logits_V - logits_V.amax()) / max(options.temperature, COLDEST)).softmax(-1)
    token_C = None
    if options.top_k or options.top_p < 1:
        token_C = _kept(probability_C, options.top_k, options.top_p).sort().values
        probability_C = probability_C[token_C]
    if options.min_p:
        probability_C[probability_C < options.min_p * probability_C.amax()] = 0
    passed_C = probability_C.cumsum(-1, dtype=torch.float64)
    chance = uniform(options.seed, len(draw.answer)) * passed_C[-1]
    place = torch.searchsorted(
        passed_C, chance, right=True
    )  # right: a token of probability 0 is never the first
    return place if token_C is None else token_C[place]


def _kept(probability_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """The tokens that top-k, then top-p keep; of equal ones the lower is kept."""
    size = len(probability_V)
    count = top_k or BEST_FIRST
    while True:
        best_C, token_C = best(probability_V, count)
        share_C = best_C.double()
        total = share_C.sum() if top_k else probability_V.sum(dtype=torch.float64)
        kept_C = share_C.cumsum(0) - share_C < top_p * total
        kept_C[0] = True  # the least top_p times a total may be 0
        if top_k or count >= size or not bool(kept_C[-1]):
            return token_C[kept_C]
        count *= 16


def best(values_V: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values in order and where they stand; of equal ones the lower place comes first."""
    values_C, place_C = values_V.topk(min(count, len(values_V)))  # of equal ones topk takes any, in any order
    above = int((values_C > values_C[-1]).sum())
    equal_C = (values_V == values_C[-1]).nonzero()[: len(values_C) - above, 0]
    place_C = torch.cat([place_C[:above].sort().values, equal_C])
    values_C, order_C = values_V[place_C].sort(descending=True, stable=True)
    return values_C, place_C[order_C]
