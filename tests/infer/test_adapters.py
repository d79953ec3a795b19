"""Several adapters in one engine: every request is answered as by the model with its own adapter alone."""

from __future__ import annotations

import pytest
import torch

from moiety.errors import UsageError
from moiety.formats.policy import policy_named
from moiety.infer.engine import Engine
from moiety.infer.generate import generate
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions, adapters_named
from moiety.model.adapters import activate, attach
from moiety.model.transformer import Transformer
from moiety.quant.quantize import quantize
from tests import tiny
from tests.model.test_adapters import adapters
from tests.model.test_paged import family_config

PROMPTS = ([7, 60, 0, 7, 33], [*range(30)], [5, 6, 7, 8] * 5, [60, 59], [*range(30), 1, 2])
SAMPLED = SamplingOptions(temperature=1.1, top_p=0.95, seed=5)


def served(model: Transformer, form: str = "") -> Transformer:
    """A model with two adapters, none of which acts unasked."""
    model = model.eval().requires_grad_(False)
    if form:
        quantize(model, policy_named(form))
    for seed, name in enumerate(("one", "two")):
        attach(model, name, adapters(model, seed))
    activate(model, "")
    return model.eval()


def options(adapter: str, **given: object) -> RequestOptions:
    return RequestOptions(max_tokens=12, sampling=SAMPLED, adapter=adapter, **given)  # type: ignore[arg-type]


def engine(model: Transformer, **given: object) -> Engine:
    sizes: dict[str, object] = {"page_tokens": 4, "step_tokens": 12, "max_requests": 5, "max_positions": 120}
    return Engine(model, options=EngineOptions(**sizes | given))  # type: ignore[arg-type]


def alone(model: Transformer, prompt: list[int], adapter: str) -> list[int]:
    activate(model, adapter)
    drawn = list(generate(model, prompt, max_tokens=12, sampling=SAMPLED))
    activate(model, "")
    return drawn


@pytest.mark.parametrize("form", ["", "bf16", "int4-g32"])
@pytest.mark.parametrize("name", ["mixtral", "shared", "qwen3_moe", "olmoe", "llama_biases"])
def test_answers_are_those_of_each_adapter_alone(name: str, form: str) -> None:
    torch.manual_seed(11)
    model = served(tiny.model(name), form)
    wanted = ["two", "", "one", "two", "one"]
    working = engine(model)
    found = working.generate(PROMPTS, [options(adapter) for adapter in wanted])
    working.check()
    if form != "int4-g32":
        true = [alone(model, prompt, one) for prompt, one in zip(PROMPTS, wanted, strict=True)]
    else:  # eight-bit rows answer near, not equal; each alone in the engine is equal
        true = [
            engine(model).generate([p], options(one))[0].tokens
            for p, one in zip(PROMPTS, wanted, strict=True)
        ]
    assert [result.tokens for result in found] == true
    every = [engine(model).generate(PROMPTS[:1], options(one))[0].tokens for one in ("", "one", "two")]
    assert len({tuple(tokens) for tokens in every}) == 3, "the adapters answer alike: this proves nothing"


def test_latent_attention_too() -> None:
    torch.manual_seed(2)
    model = Transformer(family_config("deepseek_v3", 1))
    tiny.fill(model)
    model = served(model)
    prompts = [[token % model.config.vocab_size for token in prompt] for prompt in PROMPTS]
    wanted = ["two", "", "one", "two", "one"]
    found = engine(model, max_positions=60).generate(prompts, [options(adapter) for adapter in wanted])
    assert [result.tokens for result in found] == [
        alone(model, prompt, one) for prompt, one in zip(prompts, wanted, strict=True)
    ]


def test_pages_are_shared_within_an_adapter_and_never_across() -> None:
    model = served(tiny.model("mixtral"))
    working, prompt = engine(model), PROMPTS[1]
    first = working.generate([prompt], options("one"))[0]
    assert first.reused_tokens == 0
    for adapter, salt in (("two", ""), ("", ""), ("", "one/"), ("", "one"), ("two", "one")):
        other = working.generate([prompt], options(adapter, salt=salt))[0]
        assert other.reused_tokens == 0 and other.tokens == alone(model, prompt, adapter), (adapter, salt)
    again = working.generate([prompt], options("one"))[0]
    assert again.reused_tokens == 28 and again.tokens == first.tokens == alone(model, prompt, "one")


def test_the_active_adapter_answers_who_names_none() -> None:
    model = served(tiny.model("mixtral"))
    activate(model, "two")
    working = engine(model)
    found = working.generate(PROMPTS[:2], options(""))
    assert [one.tokens for one in found] == [alone(model, prompt, "two") for prompt in PROMPTS[:2]]
    with pytest.raises(UsageError, match="there is no adapter 'three'"):
        working.submit(PROMPTS[0], options("three"))
    with pytest.raises(UsageError, match="there is no adapter 'one'"):
        engine(tiny.model("mixtral").eval()).submit(PROMPTS[0], options("one"))


def test_names_of_folders() -> None:
    assert adapters_named(("a=runs/x", "runs/y=z")) == {"a": "runs/x", "default": "runs/y=z"}
