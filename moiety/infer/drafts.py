"""Guessing tokens ahead from repetitions in the text, and when that loses with a Mixture of Experts. No torch.

A guess is verified in the same step that would have drawn one token: the tokens of the guess go through the model as
well, and those that the sampler would have drawn anyway are kept (prompt lookup; arXiv 2304.04487). Output is the same
with and without. A dense model reads the same weights for one token and for five; a Mixture of Experts reads more
experts for every token more, and guessing can make it slower:

    experts read by t tokens    d(t) = E (1 - (1 - K/E)^t)
    what a step of t costs      c(t) = dense * max(1, t / knee) + routed * max(d(t) / E, t K / E / knee)
    tokens of S sequences when one of them guesses k, each right with chance a
                                n(k) = S - 1 + 1 + a + a^2 + ... + a^k
    gain                        g(k) = n(k) / S * c(t) / c(t + k)

`dense` and `routed` are weights, `knee` the tokens from which products and not reading set the pace. The k of the
largest gain is taken, and none where no gain is above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from moiety import cost
from moiety.config import ModelConfig

__all__ = ["Drafter", "NGrams", "gain", "step_cost"]

KNEE_TOKENS = 64
FADING = 0.95  # of what was seen before, at every guess that came out
PRIOR_TRIALS, PRIOR_RIGHT = 4.0, 2.5


def step_cost(config: ModelConfig, tokens: int, *, knee: int = KNEE_TOKENS) -> float:
    """c(t) of the module text, in weights read, or in products of the same duration.

    Args:
        config: The model's.
        tokens: t, in one step.
        knee: Tokens of one matrix from which products set the pace.
    """
    components = cost.parameters(config).components
    dense = sum(components.values()) - components["routed_experts"]
    dense -= 0 if config.tied else components["embedding"]
    reading = dense * max(1.0, tokens / knee)
    if config.moe is None:
        return reading
    share = cost.distinct_experts(config, tokens) / config.moe.experts
    share = max(share, cost.tokens_per_expert(config, tokens) / knee)
    return reading + components["routed_experts"] * share


def gain(
    config: ModelConfig,
    guesses: int,
    right: float,
    *,
    sequences: int = 1,
    tokens: int = 1,
    knee: int = KNEE_TOKENS,
) -> float:
    """g(k) of the module text: how many times more tokens per time with a guess than without.

    Args:
        config: The model's.
        guesses: k.
        right: Chance a of each guess, given that those before it were right.
        sequences: S, that draw a token in this step.
        tokens: t, of this step without the guess.
        knee: As in `step_cost`.
    """
    drawn = sequences - 1 + sum(right**power for power in range(guesses + 1))
    costs = step_cost(config, tokens, knee=knee) / step_cost(config, tokens + guesses, knee=knee)
    return drawn / sequences * costs


@final
class NGrams:
    """What follows the last tokens of a text where they stood before, and how often that came true.

    Args:
        longest: Most last tokens to look for.
        shortest: Fewest.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        assert longest >= shortest >= 1, (longest, shortest)
        self._sizes = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._trials, self._right = PRIOR_TRIALS, PRIOR_RIGHT
        self._expected: tuple[int, int] | None = None

    @property
    def right(self) -> float:
        """Estimated chance that the first token of a guess is right."""
        return self._right / self._trials

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the latest earlier place of the longest end of `tokens` that has one; it may repeat itself.

        Args:
            tokens: Each call's begin with the last call's.
            most: Tokens to guess, at least one.
        """
        self._judge(tokens)
        for end in range(self._indexed + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for size in self._sizes:
            place = self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                written = list(tokens[place : place + most])
                while len(written) < most:  # what follows reaches the end of the text: it goes on as it went
                    written.append(written[len(written) - (len(tokens) - place)])
                self._expected = (len(tokens), written[0])
                return written
        return []

    def _judge(self, tokens: Sequence[int]) -> None:
        """Whether the first token of the last guess came true, verified in a step or not."""
        if self._expected is not None and self._expected[0] < len(tokens):
            place, token = self._expected
            self._trials = FADING * self._trials + 1
            self._right = FADING * self._right + (tokens[place] == token)
            self._expected = None


@final
class Drafter:
    """Decides how many tokens to guess for one sequence of a step.

    Args:
        config: The model's.
        most: Most tokens to guess.
        knee: As in `step_cost`.
    """

    def __init__(self, config: ModelConfig, most: int, *, knee: int = KNEE_TOKENS) -> None:
        self._config, self._most, self._knee = config, most, knee
        self.reason = "nothing in the text has repeated yet"
        self.held_back = 0

    def __call__(
        self, ngrams: NGrams, written: Sequence[int], room: int, sequences: int, tokens: int
    ) -> list[int]:
        """A guess of what comes after `written`, empty where none was found or none is worth it.

        Args:
            ngrams: Of this text.
            written: Prompt and answer so far.
            room: Most tokens that there is room for.
            sequences: Sequences that draw a token in this step.
            tokens: Tokens of this step so far.
        """
        guess = ngrams.guess(written, min(self._most, room))
        if not guess:
            return []
        gains = [
            gain(self._config, k, ngrams.right, sequences=sequences, tokens=tokens, knee=self._knee)
            for k in range(1, len(guess) + 1)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        verdict = f"{gains[best]:.2f} times the tokens per time at {ngrams.right:.0%} right guesses, {tokens} tokens"
        if gains[best] <= 1:
            self.held_back += 1
            self.reason = f"off: even {best + 1} guessed would give {verdict} in a step" + (
                "" if self._config.moe is None else ", because every token more reads more experts"
            )
            return []
        self.reason = f"on: {best + 1} guessed give {verdict} in a step"
        return guess[: best + 1]
