"""Drawing a token: each filter against its definition in plain Python, and the frequencies of many draws."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety.errors import ConfigError, MoietyError
from moiety.infer.options import SamplingOptions
from moiety.infer.sampling import Draw, best, sample, uniform

LOGITS = [2.0, -1.0, 0.5, 3.0, 1.9, -4.0, 0.5, 2.9, 0.0]
DRAWS = 3_000


def definition(logits: list[float], options: SamplingOptions) -> list[float]:
    """The probability of every token after the filters."""
    if options.temperature == 0:
        best = logits.index(max(logits))
        return [float(token == best) for token in range(len(logits))]
    powers = [math.exp((logit - max(logits)) / options.temperature) for logit in logits]
    probability = [power / sum(powers) for power in powers]
    order = sorted(range(len(logits)), key=lambda token: -probability[token])  # stable: lower tokens first
    kept = set(order[: options.top_k] if options.top_k else order)
    before, whole = 0.0, sum(probability[token] for token in kept)
    for (
        token
    ) in order:  # the smallest set that holds top_p of what is left: a token stays if those before hold less
        if before >= options.top_p * whole:
            kept.discard(token)
        before += probability[token]
    kept = {token for token in kept if probability[token] >= options.min_p * max(probability)}
    left = sum(probability[token] for token in kept)
    return [probability[token] / left if token in kept else 0.0 for token in range(len(logits))]


def draw(logits: Tensor, options: SamplingOptions, seed: int = 0) -> Tensor:
    """Every row is the first token of an answer with a seed of its own."""
    draws = [Draw(options=replace(options, seed=seed * len(logits) + row)) for row in range(len(logits))]
    return sample(logits, draws)


def definition_with_history(logits: list[float], draw: Draw) -> int:
    """One token, in plain Python."""
    options, changed = draw.options, list(logits)
    for token in range(len(logits)):
        if token in draw.prompt or token in draw.answer:
            above = changed[token] > 0
            changed[token] *= 1 / options.repetition_penalty if above else options.repetition_penalty
        times = list(draw.answer).count(token)
        if times:
            changed[token] -= options.presence_penalty + options.frequency_penalty * times
        changed[token] += draw.bias.get(token, 0.0)
        if token in draw.forbidden:
            changed[token] = -math.inf
    chance = uniform(options.seed, len(draw.answer))
    probability = definition(changed, options)
    passed = 0.0
    for token, share in enumerate(probability):
        passed += share
        if share and passed > chance:
            return token
    raise AssertionError((probability, chance))


PENALTIES = st.sampled_from([0.0, 0.0, 1.5, -0.7])


@settings(max_examples=200, deadline=None)
@given(
    options=st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.0, 0.4, 1.0, 2.5]),
        top_k=st.sampled_from([0, 0, 1, 5, 100]),
        top_p=st.sampled_from([1.0, 1.0, 0.3, 0.9]),
        min_p=st.sampled_from([0.0, 0.0, 0.2]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
        presence_penalty=PENALTIES,
        frequency_penalty=PENALTIES,
        seed=st.integers(0, 2**63 - 1),
    ),
    prompt=st.lists(st.integers(0, 12), max_size=6),
    answer=st.lists(st.integers(0, 12), max_size=6),
    bias=st.dictionaries(st.integers(0, 12), st.sampled_from([-50.0, -1.0, 2.0, 50.0]), max_size=3),
    forbidden=st.frozensets(st.integers(0, 12), max_size=3),
    data=st.integers(0, 10_000),
)
def test_every_option_is_its_definition(
    options: SamplingOptions,
    prompt: list[int],
    answer: list[int],
    bias: dict[int, float],
    forbidden: frozenset[int],
    data: int,
) -> None:
    # logits that are whole halves: equal ones are frequent, and sums are exact
    logits = torch.randint(-6, 7, (3, 13), generator=torch.Generator().manual_seed(data)).float() / 2
    draw = Draw(options=options, prompt=prompt, answer=answer, forbidden=forbidden, bias=bias)
    plain = Draw(options=SamplingOptions(temperature=1.0, seed=options.seed))
    before = logits.clone()
    drawn = sample(logits, [plain, draw, plain])
    wanted = [
        definition_with_history(row, one)
        for row, one in zip(logits.tolist(), [plain, draw, plain], strict=True)
    ]
    assert drawn.tolist() == wanted
    assert int(sample(logits[1:2], [draw])) == wanted[1], "what else is in the batch has no say"
    assert torch.equal(logits, before)


def test_a_large_vocabulary_is_not_sorted_whole() -> None:
    """Filters look at the best tokens first; the cut is the same wherever it lies."""
    logits_V = torch.randn(20_000, generator=torch.Generator().manual_seed(5)).mul(2)
    best_first = logits_V.argsort(descending=True)
    for top_k, top_p in ((0, 0.2), (0, 0.97), (3000, 1.0), (18_000, 0.8)):
        options = SamplingOptions(temperature=1.0, top_k=top_k, top_p=top_p)
        kept = best_first[: top_k or len(logits_V)]
        share = logits_V.double().softmax(0)[kept]
        kept = kept[share.cumsum(0) - share < top_p * share.sum()]
        drawn = draw(logits_V.expand(60, -1), options)
        assert bool(torch.isin(drawn, kept).all())
        kept = kept.sort().values
        passed = logits_V.double().softmax(0)[kept].cumsum(0)
        wanted = [int(kept[(passed > uniform(row, 0) * passed[-1]).nonzero()[0]]) for row in range(60)]
        assert sum(int(one) == other for one, other in zip(drawn, wanted, strict=True)) >= 59, (top_k, top_p)


def test_every_token_of_an_answer_has_its_own_number() -> None:
    numbers = [uniform(seed, number) for seed in range(40) for number in range(100)]
    assert len(set(numbers)) == 4000 and min(numbers) >= 0 and max(numbers) < 1
    assert abs(sum(numbers) / 4000 - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    assert uniform(11, 1) != uniform(1, 11) != uniform(1, 1)


def test_best_keeps_the_lower_of_equal_ones() -> None:
    values_V = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0])
    for count in range(1, 9):
        values_C, place_C = best(values_V, count)
        assert place_C.tolist() == [1, 3, 2, 4, 5, 0, 6][:count]
        assert values_C.tolist() == values_V[place_C].tolist()


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


def test_the_least_numbers_take_the_best_token() -> None:
    logits_V, least = torch.randn(50), 5e-324
    for values in (
        {"temperature": least},
        {"top_p": least},
        {"temperature": least, "top_p": least, "top_k": 3},
    ):
        options = SamplingOptions(**{"temperature": 1.0, "top_k": 9} | values)
        for seed in range(9):
            draw = Draw(options=replace(options, seed=seed))
            assert int(sample(logits_V[None], [draw])) == int(logits_V.argmax())
    flat_V = torch.zeros(50)  # the three best have less than half of the whole
    assert int(sample(flat_V[None], [Draw(options=SamplingOptions(top_p=least, top_k=3))])) < 3


def test_nothing_is_cut_off_at_top_p_1() -> None:
    """A sum of many float32 probabilities may pass 1 before the last one."""
    logits = torch.zeros(3_000, 150)
    assert len(draw(logits, SamplingOptions(temperature=1.0)).unique()) == 150


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_and_wide_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([LOGITS], dtype=dtype).expand(DRAWS, -1)
    true = torch.tensor(definition(logits[0].double().tolist(), SamplingOptions(temperature=1.0)))
    share = torch.bincount(draw(logits, SamplingOptions(temperature=1.0)), minlength=9) / DRAWS
    assert (share - true).abs().max() < 0.04


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
        ("repetition_penalty", 0.0),
        ("presence_penalty", 101.0),
        ("frequency_penalty", math.nan),
    ],
)
def test_options_out_of_range(name: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingOptions(**{name: bad})
