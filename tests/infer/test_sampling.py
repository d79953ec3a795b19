"""Drawing a token: each filter against its definition in plain Python, and the frequencies of many draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.errors import ConfigError, MoietyError
from moiety.infer.options import SamplingOptions
from moiety.infer.sampling import sample

LOGITS = [2.0, -1.0, 0.5, 3.0, 1.9, -4.0, 0.5, 2.9, 0.0]
DRAWS = 20_000


def definition(logits: list[float], options: SamplingOptions) -> list[float]:
    """The probability of every token after the filters."""
    if options.temperature == 0:
        best = logits.index(max(logits))
        return [float(token == best) for token in range(len(logits))]
    powers = [math.exp((logit - max(logits)) / options.temperature) for logit in logits]
    probability = [power / sum(powers) for power in powers]
    order = sorted(range(len(logits)), key=lambda token: -probability[token])  # stable: lower tokens first
    kept = set(order[: options.top_k] if options.top_k else order)
    before = 0.0
    for token in order:  # the smallest set that holds top_p: a token stays if those before it hold less
        if before >= options.top_p:
            kept.discard(token)
        before += probability[token]
    kept = {token for token in kept if probability[token] >= options.min_p * max(probability)}
    left = sum(probability[token] for token in kept)
    return [probability[token] / left if token in kept else 0.0 for token in range(len(logits))]


def draw(logits: Tensor, options: SamplingOptions, seed: int = 0) -> Tensor:
    return sample(logits, options, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 8},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.2},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 0.99},
        {"temperature": 2.0, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.5, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.5, "top_k": 6, "min_p": 0.2},
        {"temperature": 1.5, "top_p": 0.9, "min_p": 0.2},
        {"temperature": 0.0},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5},
    ],
    ids=lambda values: "-".join(f"{name}={value}" for name, value in values.items()),
)
def test_frequencies_are_those_of_the_definition(values: dict[str, Any]) -> None:
    options = SamplingOptions(**values)
    drawn = draw(torch.tensor(LOGITS).expand(DRAWS, -1), options)
    assert drawn.shape == (DRAWS,) and drawn.dtype == torch.int64
    found = torch.bincount(drawn, minlength=len(LOGITS))
    for token, probability in enumerate(definition(LOGITS, options)):
        spread = math.sqrt(DRAWS * probability * (1 - probability))
        count = int(found[token])
        assert count > 0 if DRAWS * probability > 20 else probability > 0 or not count, (token, count)
        assert abs(count - DRAWS * probability) <= 4.5 * spread, (token, count, DRAWS * probability)


def test_rows_have_their_own_logits_and_filters() -> None:
    logits = torch.randn(7, 30) * 3
    drawn = draw(logits, SamplingOptions(temperature=1.0, top_k=1))
    assert torch.equal(drawn, logits.argmax(-1))
    assert torch.equal(draw(logits, SamplingOptions(temperature=0.0)), logits.argmax(-1))
    for seed in range(20):
        drawn = draw(logits, SamplingOptions(temperature=2.0, top_k=4), seed)
        assert bool((drawn[:, None] == logits.topk(4).indices).any(-1).all())


def test_of_equal_tokens_the_lower_one_is_kept() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 5.0, 1.0]])
    for values in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}):
        assert draw(logits, SamplingOptions(**values)).tolist() == [1], values
    assert {int(draw(logits, SamplingOptions(top_k=2), seed)) for seed in range(40)} == {1, 2}


def test_seeds_repeat_and_differ() -> None:
    logits = torch.zeros(50, 40)
    options = SamplingOptions(temperature=1.0)
    assert torch.equal(draw(logits, options, 3), draw(logits, options, 3))
    assert not torch.equal(draw(logits, options, 3), draw(logits, options, 4))
    torch.manual_seed(1)
    first = draw(logits, options, 3)
    torch.manual_seed(2)
    assert torch.equal(first, draw(logits, options, 3)), "the global generator has no say"


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.tensor([LOGITS])
    draw(logits, SamplingOptions(top_k=2, top_p=0.5, min_p=0.5))
    assert logits.tolist() == torch.tensor([LOGITS]).tolist()


def test_nothing_is_cut_off_at_top_p_1() -> None:
    """A sum of many float32 probabilities may pass 1 before the last one."""
    logits = torch.zeros(10_000, 500)
    assert len(draw(logits, SamplingOptions(temperature=1.0)).unique()) == 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_and_wide_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([LOGITS], dtype=dtype).expand(DRAWS, -1)
    true = torch.tensor(definition(logits[0].double().tolist(), SamplingOptions(temperature=1.0)))
    share = torch.bincount(draw(logits, SamplingOptions(temperature=1.0)), minlength=9) / DRAWS
    assert (share - true).abs().max() < 0.02


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = torch.tensor([LOGITS, LOGITS])
    logits[1, 4] = bad
    with pytest.raises(MoietyError, match=r"not finite[\s\S]*hint: "):
        draw(logits, SamplingOptions(temperature=temperature))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", "a"),
    ],
)
def test_options_out_of_range(name: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingOptions(**{name: bad})
