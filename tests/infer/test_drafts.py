"""Guesses from repetitions, and the account that says whether they pay with a Mixture of Experts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from moiety.infer.drafts import Drafter, NGrams, gain, step_cost
from moiety.registry import lookup_decoder
from tests import tiny


def definition(tokens: Sequence[int], most: int) -> list[int]:
    """The longest end of 4 to 2 tokens that stood somewhere earlier, its latest place, and what followed there."""
    for size in (4, 3, 2):
        ending = list(tokens[-size:])
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and list(tokens[end - size : end]) == ending:
                written = list(tokens)
                for step in range(most):
                    written.append(written[end + step])
                return written[len(tokens) :]
    return []


def test_guesses_are_the_definition() -> None:
    found = 0
    for seed in range(40):
        draw = random.Random(seed)
        tokens = [draw.randrange(3 if seed % 2 else 8) for _ in range(60)]
        ngrams = NGrams()
        for end in itertools.accumulate(draw.randint(1, 5) for _ in range(20)):
            some = tokens[: min(end, 60)]
            guess = ngrams.guess(some, 5)
            assert guess == definition(some, 5), (seed, end)
            found += bool(guess)
    assert found > 200


def test_the_chance_follows_what_came_true() -> None:
    ngrams, text = NGrams(), [1, 2, 3, 4, 5] * 40
    first = ngrams.right
    for end in range(10, 150):
        ngrams.guess(text[:end], 3)
    assert first < 0.7 and ngrams.right > 0.95
    wrong = text[:150]
    for step in range(60):
        guess = ngrams.guess(wrong, 1)
        wrong.append(guess[0] + 100 + step if guess else [1, 2][step % 2])
    assert ngrams.right < 0.4


def test_the_account_by_hand() -> None:
    config = tiny.config(moe=tiny.experts(experts=8, experts_per_token=2, d_ff=14))
    routed = 3 * 8 * 3 * 20 * 14
    dense = step_cost(config, 0)
    assert step_cost(config, 1) == pytest.approx(dense + routed * 2 / 8)
    assert step_cost(config, 3) == pytest.approx(dense + routed * (1 - 0.75**3))
    assert step_cost(config, 6400, knee=64) == pytest.approx(100 * dense + routed * 6400 * 2 / 8 / 64)
    costs = step_cost(config, 1) / step_cost(config, 3)
    assert gain(config, 2, 0.5) == pytest.approx((1 + 0.5 + 0.25) * costs)
    batch = step_cost(config, 4) / step_cost(config, 6)
    assert gain(config, 2, 0.5, sequences=4, tokens=4) == pytest.approx((4 + 0.5 + 0.25) / 4 * batch)


def test_a_dense_model_guesses_where_a_mixture_does_not() -> None:
    mixture = lookup_decoder("olmoe-1b-7b")
    dense = tiny.config()
    assert gain(dense, 4, 0.3) > 1 > gain(mixture, 4, 0.3)
    assert gain(mixture, 4, 1.0) > 1, "a guess that is always right pays"
    assert gain(dense, 4, 0.05, sequences=64, tokens=64) < 1, "products set the pace in a large batch"


def test_it_turns_itself_off_and_says_why() -> None:
    text = [1, 2, 3] * 5
    ngrams, drafter = NGrams(), Drafter(lookup_decoder("olmoe-1b-7b"), 4)
    offered = []
    for step in range(30):  # what follows 1, 2 is another token every time
        offered.append(bool(drafter(ngrams, text, 9, 1, 1)))
        text += [50 + step, 1, 2]
    assert any(offered) and not any(offered[10:])
    assert drafter.reason.startswith("off: even ") and "every token more reads more experts" in drafter.reason
    assert drafter.held_back >= 20
    found: list[int] = []
    for _ in range(60):  # held back, guesses are still compared with what came: here they are right again
        for token in (3, 1, 2):
            text.append(token)
            found = drafter(ngrams, text, 9, 1, 1)
    assert found == [3, 1, 2, 3] and drafter.reason.startswith("on: 4 ")
    assert drafter(ngrams, text, 2, 1, 1) == [3, 1], "no more than there is room for"
    assert drafter(NGrams(), [1, 2, 3], 4, 1, 1) == []
