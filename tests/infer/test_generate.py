"""Plain generation: what the full forward says, token by token; seeds, ends and errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import moiety
from moiety.errors import ConfigError, MoietyError, UsageError
from moiety.infer.engine import Engine
from moiety.infer.generate import generate
from moiety.infer.options import RequestOptions, SamplingOptions, biases_named
from moiety.infer.sampling import Draw, sample
from tests import tiny

GREEDY = SamplingOptions(temperature=0.0)
PROMPT = (7, 60, 0, 7, 33)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", tiny.CONFIGS)
@torch.no_grad()
def test_greedy_is_the_argmax_of_the_full_forward(name: str, dtype: torch.dtype) -> None:
    model = tiny.model(name, dtype=dtype)
    for prompt in (PROMPT, PROMPT[:1]):
        written = list(prompt)
        for token in generate(model, prompt, max_tokens=12, sampling=GREEDY):
            assert isinstance(token, int)
            assert token == int(model(torch.tensor([written])).logits[0, -1].argmax())
            written.append(token)
        assert len(written) == len(prompt) + 12


@torch.no_grad()
def test_draws_are_from_the_full_forward() -> None:
    model = tiny.model("qwen3_moe", dtype=torch.float64)
    options = SamplingOptions(top_p=0.9, seed=11, presence_penalty=0.5)
    answer: list[int] = []
    for token in generate(model, PROMPT, max_tokens=12, sampling=options):
        logits_1V = model(torch.tensor([[*PROMPT, *answer]])).logits[:, -1]
        assert token == int(sample(logits_1V, [Draw(options=options, prompt=PROMPT, answer=answer)]))
        answer.append(token)
    assert len(set(answer)) > 5


def test_seeds_reproduce() -> None:
    model = tiny.model("mixtral")
    runs = [
        list(generate(model, PROMPT, max_tokens=30, sampling=SamplingOptions(temperature=2.0, seed=seed)))
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert all(0 <= token < 61 for token in runs[2])
    torch.manual_seed(99)
    assert list(generate(model, PROMPT, max_tokens=30)) == list(
        generate(model, PROMPT, max_tokens=30, sampling=SamplingOptions())
    )


def test_stops_after_the_end_token() -> None:
    model = tiny.model("mixtral")
    sampling = SamplingOptions(temperature=3.0)
    whole = list(generate(model, PROMPT, max_tokens=40, sampling=sampling))
    end_id = next(token for token in whole[5:] if token not in whole[:5])
    stopped = list(generate(model, PROMPT, max_tokens=40, sampling=sampling, end_id=end_id))
    assert stopped == whole[: whole.index(end_id) + 1] and 5 < len(stopped) < 40
    other = next(token for token in range(61) if token not in whole)
    assert list(generate(model, PROMPT, max_tokens=40, sampling=sampling, end_id=other)) == whole
    assert list(generate(model, (*PROMPT, end_id), max_tokens=3)), "an end token in the prompt ends nothing"


def test_one_token_and_lists() -> None:
    model = tiny.model("llama")
    assert len(list(generate(model, [1], max_tokens=1))) == 1
    assert list(generate(model, list(PROMPT), max_tokens=4)) == list(generate(model, PROMPT, max_tokens=4))
    assert moiety.generate is generate


def test_tokens_come_as_they_are_drawn_and_gradients_stay_on() -> None:
    model = tiny.model("mixtral")
    stream = generate(model, PROMPT, max_tokens=1_000, sampling=GREEDY)
    first = list(itertools.islice(stream, 3))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model(torch.tensor([PROMPT])).logits.sum().backward()
    assert model.embed.weight.grad is not None
    assert first == list(generate(model, PROMPT, max_tokens=3, sampling=GREEDY))


@pytest.mark.parametrize(
    ("prompt", "more", "message"),
    [
        ((), {}, "the prompt has no token"),
        ((3, 61), {}, "outside 0 to 60"),
        ((3, -1), {}, "outside 0 to 60"),
        ((3,), {"max_tokens": 0}, "max_tokens is 0"),
        ((3,), {"max_tokens": -4}, "max_tokens is -4"),
    ],
)
def test_wrong_calls_fail_at_once(prompt: tuple[int, ...], more: dict[str, Any], message: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(UsageError, match=message):
        generate(model, prompt, **more)  # before the first token is asked for


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_damaged_weights_give_an_error_and_no_token(temperature: float) -> None:
    model = tiny.model("llama_biases")
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    stream = generate(model, PROMPT, sampling=SamplingOptions(temperature=temperature))
    with pytest.raises(MoietyError, match="not finite"):
        next(stream)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.model("sigmoid").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(generate(model, PROMPT, max_tokens=5))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_biases_change_the_logits() -> None:
    net = tiny.model("mixtral").eval()
    greedy = SamplingOptions(temperature=0.0)
    own = list(generate(net, PROMPT, max_tokens=5, sampling=greedy))
    other = (own[0] + 1) % 61
    for bias in ({own[0]: -1000.0}, {other: 1000.0, own[0]: 3.0}):
        found = list(generate(net, PROMPT, max_tokens=5, sampling=greedy, logit_bias=bias))
        asked = RequestOptions(max_tokens=5, sampling=greedy, logit_bias=bias)
        assert found == Engine(net).generate([PROMPT], asked)[0].tokens
        assert found == [other] * 5 if other in bias else own[0] not in found
    with pytest.raises(UsageError, match="logit_bias has tokens outside 0 to 60"):
        generate(net, PROMPT, logit_bias={61: 1.0})


def test_biases_as_words() -> None:
    assert biases_named("17=-5, 42=3.5,") == {17: -5.0, 42: 3.5} and biases_named("") == {}
    for text, said in (("17", "'17'"), ("a=1", "'a=1'"), ("1=b", "'1=b'"), ("1=2,1=3", "token 1 twice")):
        with pytest.raises(ConfigError, match=said):
            biases_named(text)
    for text in ("-1=2", "1=1001", "1=nan"):
        with pytest.raises(ConfigError, match="logit_bias"):
            RequestOptions(logit_bias=biases_named(text))
