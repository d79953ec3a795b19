"""`/v1/completions` through the real client: prompts of every kind, logarithms, echo, streams, seeds."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import openai
import pytest
import torch

from moiety.infer.options import RequestOptions, SamplingOptions
from moiety.serve.server import Server
from tests import gguf_models
from tests.serve.conftest import NAME, client_of, opened, serving

GREEDY = RequestOptions(sampling=SamplingOptions(temperature=0), max_tokens=5)


def ask(client: openai.OpenAI, prompt: Any = "the quick", **more: Any) -> Any:
    given = {"model": NAME, "prompt": prompt, "max_tokens": 6, "temperature": 0} | more
    return client.completions.create(**given)


def pieces(stream: Any) -> tuple[dict[int, str], dict[int, list[str | None]], list[Any]]:
    """Texts and reasons by choice, and the usage of every chunk."""
    texts: dict[int, str] = {}
    reasons: dict[int, list[str | None]] = {}
    usages = []
    for chunk in stream:
        assert chunk.object == "text_completion" and chunk.model == NAME and chunk.id.startswith("cmpl-")
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons.setdefault(choice.index, []).append(choice.finish_reason)
    return texts, reasons, usages


def test_an_answer_has_all_of_its_parts(client: openai.OpenAI) -> None:
    answer = ask(client)
    (choice,) = answer.choices
    assert answer.object == "text_completion" and answer.model == NAME and answer.id.startswith("cmpl-")
    assert answer.created > 1.7e9 and answer.system_fingerprint.startswith("fp_")
    assert choice.index == 0 and choice.finish_reason == "length" and choice.logprobs is None and choice.text
    usage = answer.usage
    assert usage.completion_tokens == 6 and usage.total_tokens == usage.prompt_tokens + 6


def test_text_and_tokens_are_the_same_prompt(client: openai.OpenAI, server: Server) -> None:
    tokenizer = server.served.tokenizer
    texts = ["the quick", "it was"]
    whole = [choice.text for choice in ask(client, texts).choices]
    assert whole == [choice.text for choice in ask(client, [*map(tokenizer.encode, texts)]).choices]
    assert [ask(client, text).choices[0].text for text in texts] == whole
    assert ask(client, tokenizer.encode("it was")).choices[0].text == whole[1]
    assert ask(client, "").usage.prompt_tokens == 1  # the end token stands for nothing


@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 1.0, "seed": 5}, {"stop": ["e", "\n"]}])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, more: dict[str, Any], echo: bool) -> None:
    whole = ask(client, echo=echo, **more)
    stream = ask(client, echo=echo, stream=True, stream_options={"include_usage": True}, **more)
    texts, reasons, usages = pieces(stream)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    for choice in whole.choices:
        assert reasons[choice.index][-1] == choice.finish_reason
        assert set(reasons[choice.index][:-1]) <= {None}
        assert choice.text.startswith("the quick") == echo
    assert usages[-1].completion_tokens == whole.usage.completion_tokens and set(usages[:-1]) == {None}


def test_seeds_repeat_and_differ(client: openai.OpenAI) -> None:
    def drawn(**more: Any) -> list[str]:
        return [choice.text for choice in ask(client, temperature=1.5, max_tokens=12, **more).choices]

    assert drawn(seed=3, n=2) == drawn(seed=3, n=2) and drawn(seed=-1) == drawn(seed=-1)
    assert drawn(seed=4)[0] == drawn(seed=3, n=2)[1] and len({*drawn(seed=3, n=8)}) == 8
    assert drawn() != drawn()


def test_echoed_logarithms_are_the_models(client: openai.OpenAI, server: Server) -> None:
    tokenizer, prompt = server.served.tokenizer, "the quick brown fox"
    ids = tokenizer.encode(prompt)
    answer = ask(client, prompt, max_tokens=0, echo=True, logprobs=3).choices[0]
    logits = server.served.engine.runner.forward(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    found = answer.logprobs
    assert answer.text == prompt and answer.finish_reason == "length"
    assert "".join(found.tokens) == prompt and len(found.tokens) == len(ids)
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    true = [float(logits[place, token]) for place, token in enumerate(ids[1:])]
    assert found.token_logprobs[1:] == pytest.approx(true, abs=1e-4)
    for place, top in enumerate(found.top_logprobs[1:]):
        best = logits[place].topk(3)
        for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            assert top[server.served.piece(token)] == pytest.approx(value, abs=1e-4)
    assert all(prompt[at:].startswith(text) for at, text in zip(found.text_offset, found.tokens, strict=True))
    assert ask(client, prompt, max_tokens=0, echo=True).usage.completion_tokens == 0


def test_drawn_logarithms_follow_the_prompts(client: openai.OpenAI) -> None:
    whole = ask(client, logprobs=2, echo=True).choices[0].logprobs
    drawn = ask(client, logprobs=2).choices[0].logprobs
    assert whole.tokens[-6:] == drawn.tokens and len(drawn.tokens) == 6
    assert whole.token_logprobs[-6:] == pytest.approx(drawn.token_logprobs, abs=1e-4)
    for token, value, top in zip(drawn.tokens, drawn.token_logprobs, drawn.top_logprobs, strict=True):
        assert value == max(top.values()) and top[token] == value  # greedy
    streamed = [choice.logprobs for chunk in ask(client, logprobs=2, stream=True) for choice in chunk.choices]
    assert [token for one in streamed if one for token in one.tokens] == drawn.tokens
    assert [at for one in streamed if one for at in one.text_offset] == drawn.text_offset


def test_biases_penalties_and_stops(client: openai.OpenAI, server: Server) -> None:
    token = server.served.tokenizer.encode(" fox")[0]
    assert ask(client, logit_bias={str(token): 100}).choices[0].text == " fox" * 6
    mixed = ask(client, logit_bias={str(token): 100}, frequency_penalty=2, max_tokens=80).choices[0].text
    assert mixed.startswith(" fox fox") and mixed != " fox" * 80
    stopped = ask(client, logit_bias={str(token): 100}, stop="x f").choices[0]
    assert stopped.text == " fo" and stopped.finish_reason == "stop"
    ended = ask(client, logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]})
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens == 1
    late = ask(
        client, logit_bias={str(token): 100}, stop="x", extra_body={"min_tokens": 4}
    )  # looked for from the fourth token on
    assert late.usage.completion_tokens >= 4


def test_where_tokens_went(client: openai.OpenAI, server: Server) -> None:
    prompt = server.served.tokenizer.encode("the quick brown")
    for stream in (False, True):
        answer = ask(client, prompt, n=2, stream=stream, extra_body={"return_routed_experts": True})
        choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
        told = [choice for choice in choices if choice.finish_reason]
        assert [choice.index for choice in told] == [0, 1] or stream
        for choice in told:
            packed = base64.b64decode(choice.routed_experts)
            experts = np.load(io.BytesIO(packed), allow_pickle=False)
            assert experts.shape == (len(prompt) + 5, 2, 2) and experts.max() < 5
            routing = choice.routing
            assert routing["tokens"] == len(prompt) + 5 and [one["layer"] for one in routing["layers"]] == [
                0,
                1,
            ]
            counts = np.bincount(experts[:, 0].ravel(), minlength=5)
            top = routing["layers"][0]["top"][0]
            assert top["share"] == pytest.approx(counts.max() / counts.sum(), abs=1e-4)
    assert "routing" not in ask(client, prompt).choices[0].model_dump()


def test_a_text_begins_as_its_tokenizer_wants() -> None:
    for frame in ("", "<s> $A"):
        tokenizer = gguf_models.chat_tokenizer(frame)
        with serving(opened(tokenizer=tokenizer)) as server, client_of(server) as client:
            begin = [tokenizer.special_ids()["<s>"]] if frame else []
            ids = [*begin, *tokenizer.encode("the ell")]
            found, true = (ask(client, prompt, echo=True, logprobs=0) for prompt in ("the ell", ids))
            assert found.choices[0].model_dump() == true.choices[0].model_dump()
            assert found.choices[0].text.startswith("the ell") and found.usage.prompt_tokens == len(ids)
            assert list(server.served.engine.stream("the ell", GREEDY)) == list(
                server.served.engine.stream(ids, GREEDY)
            )
            assert ask(client, "").usage.prompt_tokens == 1


def test_the_async_client_and_many_at_once(server: Server) -> None:
    async def run() -> list[str]:
        address = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                asked = {
                    "model": NAME,
                    "prompt": "the quick"[: 3 + number % 5],
                    "max_tokens": 9,
                    "temperature": 0,
                }
                if number % 2:
                    whole = await client.completions.create(**asked)  # type: ignore[call-overload]
                    return str(whole.choices[0].text)
                stream = await client.completions.create(**asked, stream=True)  # type: ignore[call-overload]
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(40)))

    texts = asyncio.run(run())
    assert [texts[number % 5] for number in range(40)] == texts and all(texts)
