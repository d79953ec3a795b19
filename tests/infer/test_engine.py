"""The engine against plain generation, token by token; sharing, guessing, cancelling, failing, threads."""

from __future__ import annotations

import math
import random
import threading
from typing import Any

import pytest
import torch

import moiety
from moiety.errors import BusyError, ConfigError, MoietyError, UsageError
from moiety.infer.engine import Engine, Event
from moiety.infer.generate import generate
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions
from moiety.infer.room import page_count
from moiety.model.paged import PagePool
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.model.transformer import Transformer
from moiety.quant.quantize import policy_named, quantize
from tests import tiny
from tests.model.test_paged import family_config
from tests.model.test_paged import made as made_from

GREEDY = SamplingOptions(temperature=0.0)
PROMPTS = ([7], [7, 60, 0, 7, 33], [*range(30)], [5, 6, 7, 8] * 5, [*range(30), 1, 2], [60, 59])


def made(name: str = "mixtral", dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    return tiny.model(name, dtype=dtype, **changes).eval()


def engine(model: Transformer, tokenizer: Tokenizer | None = None, **options: Any) -> Engine:
    given = {"page_tokens": 4, "step_tokens": 12, "max_requests": 4, "max_positions": 120} | options
    return Engine(model, tokenizer, options=EngineOptions(**given))


def plain(
    model: Transformer, prompt: list[int], options: RequestOptions, end_id: int | None = None
) -> list[int]:
    drawn = generate(model, prompt, max_tokens=options.max_tokens, sampling=options.sampling, end_id=end_id)
    return list(drawn)


def agree(model: Transformer, **options: Any) -> Engine:
    """An engine after it drew what plain generation draws, greedy and not."""
    working = engine(model, **options)
    for sampling in (GREEDY, SamplingOptions(temperature=1.2, top_p=0.95, seed=5, repetition_penalty=1.2)):
        asked = RequestOptions(max_tokens=14, sampling=sampling)
        for prompt, result in zip(PROMPTS, working.generate(PROMPTS, asked), strict=True):
            assert result.tokens == plain(model, prompt, asked) and result.reason == "length"
            assert result.prompt_tokens == len(prompt) and len(result.between_tokens_s) == 13
        working.check()
    assert working.statistics().pages_used == 0
    return working


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_kind_of_model_is_plain_generation(name: str) -> None:
    agree(made(name))


@pytest.mark.parametrize(
    "family", ["deepseek_v2", "deepseek_v3", "gpt_oss", "llama4_text", "phimoe", "minimax_m2", "granitemoe"]
)
def test_families_are_plain_generation(family: str) -> None:
    config = family_config(family, 1)
    model = made_from(config)
    working = engine(model, max_positions=min(60, config.max_positions), draft=2)
    top = config.vocab_size
    prompts = [[one % top for one in prompt] for prompt in PROMPTS]
    asked = RequestOptions(max_tokens=9, sampling=GREEDY)
    for prompt, result in zip(prompts, working.generate(prompts, asked), strict=True):
        assert result.tokens == plain(model, prompt, asked)


@pytest.mark.parametrize(
    "options",
    [
        {"draft": 4},
        {"prefix_cache": False, "draft": 1},
        {"max_requests": 1, "step_tokens": 1},
        {"step_tokens": 500, "page_tokens": 16},
        {"page_tokens": 1, "draft": 3},
    ],
)
def test_every_setting_is_plain_generation(options: dict[str, Any]) -> None:
    agree(made("qwen3_moe"), **options)


def test_guesses_come_true_and_change_nothing() -> None:
    model = made("llama", dtype=torch.float64)  # a tiny greedy model soon repeats itself
    asked = RequestOptions(max_tokens=60, sampling=GREEDY)
    working = engine(model, draft=4)
    (result,) = working.generate([[1, 2, 3]], asked)
    assert result.tokens == plain(model, [1, 2, 3], asked)
    statistics = working.statistics()
    assert statistics.accepted_tokens > 10 and statistics.steps < 50
    assert statistics.drafting.startswith("on: ")


def test_few_pages_preempt_and_change_nothing() -> None:
    model = made()
    per_page = PagePool(model.config, 1, 4).page_bytes
    working = agree(model, kv_bytes=per_page * 12, max_positions=48, step_tokens=40)
    assert working.statistics().preemptions > 0 and working.statistics().pages == 12


@pytest.mark.parametrize("sampling", [GREEDY, SamplingOptions(temperature=1.5, seed=9)])
def test_one_and_32_at_once_are_the_same(sampling: SamplingOptions) -> None:
    model = made("qwen3_moe", dtype=torch.float64)
    asked = [RequestOptions(max_tokens=10, sampling=sampling)] * 32
    prompts = [[(number * 7 + place) % 61 for place in range(1 + number % 9)] for number in range(32)]
    together = engine(model, max_requests=32, step_tokens=64).generate(prompts, asked)
    lonely = engine(model, max_requests=1)
    for prompt, result in zip(prompts, together, strict=True):
        assert result.tokens == lonely.generate([prompt], asked[0])[0].tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["int8-g32", "int4-g32"])
def test_a_packed_model_draws_the_same_at_1_and_32(form: str, dtype: torch.dtype) -> None:
    sizes = tiny.attention(heads=4, kv_heads=2, head_dim=16)
    model = made("", dtype=dtype, d_model=64, d_ff=32, attention=sizes, moe=tiny.experts(d_ff=32))
    quantize(model, policy_named(form))
    asked = RequestOptions(max_tokens=16, sampling=GREEDY)
    prompts = [[(number * 7 + place) % 61 for place in range(1 + number % 9)] for number in range(32)]
    together = engine(model, max_requests=32, step_tokens=64, page_tokens=16).generate(prompts, asked)
    lonely = engine(model, max_requests=1, page_tokens=16)
    for prompt, result in zip(prompts, together, strict=True):
        assert result.tokens == lonely.generate([prompt], asked)[0].tokens
        if dtype is torch.float32:  # plain generation's attention rounds otherwise in bfloat16
            assert result.tokens == plain(model, prompt, asked)


def test_a_known_start_is_not_computed_again() -> None:
    working = engine(made(), step_tokens=100)
    asked = RequestOptions(max_tokens=5, sampling=GREEDY)
    first, other = working.generate([[*range(30)], [*range(30)]], asked)
    assert first.tokens == other.tokens and (first.reused_tokens, other.reused_tokens) == (0, 28)
    before = working.statistics().computed_tokens
    assert before == 30 + 2 + 2 * 4
    (again,) = working.generate([[*range(30), *first.tokens, 3]], asked)
    assert again.reused_tokens == 32 and working.statistics().computed_tokens == before + 4 + 4
    assert again.tokens == plain(made_again(working), [*range(30), *first.tokens, 3], asked)
    (salted,) = working.generate([[*range(30)]], RequestOptions(max_tokens=5, sampling=GREEDY, salt="a"))
    assert salted.reused_tokens == 0 and salted.tokens == first.tokens


def made_again(working: Engine) -> Transformer:
    return working.runner.forward


def test_random_requests_and_cancels_leave_nothing() -> None:
    draw = random.Random(0)
    model = made()
    working = engine(
        model, kv_bytes=PagePool(model.config, 1, 4).page_bytes * 25, max_positions=60, draft=2, max_queue=300
    )
    handles, cancelled = [], set()
    for number in range(200):
        prompt = [draw.randrange(4) for _ in range(draw.randint(1, 30))]
        asked = RequestOptions(
            max_tokens=draw.randint(1, 12),
            stop_ids=(9,) if draw.random() < 0.5 else (),
            sampling=SamplingOptions(temperature=draw.choice([0.0, 1.0]), seed=number),
        )
        handles.append(working.submit(prompt, asked))
        if draw.random() < 0.5:
            working.step()
        if draw.random() < 0.3:
            victim = draw.choice(handles)
            if working.cancel(victim.number):
                cancelled.add(victim.number)
    while working.step():
        working.check()
    while working.wait(0):
        working.step()
    reasons = {handle.number: handle.result().reason for handle in handles}
    assert {number for number, reason in reasons.items() if reason == "cancelled"} == cancelled
    statistics = working.statistics()
    assert 20 < len(cancelled) < 150 and sum(statistics.finished.values()) == 200
    assert statistics.pages_used == statistics.running == statistics.waiting == 0
    for handle in handles:
        request = handle.request
        if reasons[handle.number] == "length":
            assert request.answer == plain(model, list(request.prompt), request.options), handle.number


def test_streams_and_what_ends_them() -> None:
    model = made()
    working = engine(model)
    asked = RequestOptions(max_tokens=20, sampling=GREEDY)
    wanted = plain(model, [3, 4], asked)
    assert list(working.stream([3, 4], asked)) == wanted
    stream = working.stream([3, 4], RequestOptions(max_tokens=90, sampling=GREEDY))
    assert [next(stream) for _ in range(3)] == wanted[:3]
    other = list(working.stream([5], asked))
    assert working.statistics().running == 1 and other == plain(model, [5], asked)
    stream.close()
    assert working.statistics().running == 0 and working.statistics().finished["cancelled"] == 1
    working.check()
    end = wanted[7]
    stopped = RequestOptions(max_tokens=20, sampling=GREEDY, stop_ids=(end,))
    (result,) = working.generate([[3, 4]], stopped)
    assert result.tokens == wanted[: wanted.index(end) + 1] and result.reason == "stop"
    own = Engine(model, ends=frozenset({end}), options=working.options)
    assert list(own.stream([3, 4], asked)) == result.tokens
    ignoring = RequestOptions(max_tokens=20, sampling=GREEDY, ignore_end=True)
    assert list(own.stream([3, 4], ignoring)) == wanted
    longer = RequestOptions(max_tokens=20, sampling=GREEDY, min_tokens=wanted.index(end) + 3)
    drawn = list(own.stream([3, 4], longer))
    assert len(drawn) >= wanted.index(end) + 3 and end not in drawn[: wanted.index(end) + 2]


def test_stop_texts_over_tokens_borders() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat and saw the bird " * 3], 270)
    model = made("", vocab_size=tokenizer.vocab_size, moe=tiny.experts(), d_ff=14, max_positions=200)
    working = engine(model, tokenizer)
    asked = RequestOptions(max_tokens=40, sampling=SamplingOptions(temperature=1.5, seed=2), ignore_end=True)
    pieces = list(working.stream_text("the cat", asked))
    text = "".join(pieces)
    (whole,) = working.generate(["the cat"], asked)
    assert text == whole.text == tokenizer.decode(whole.tokens) and len(pieces) > 10
    for start in (4, 11, 17):
        stop = text[start : start + 3]
        (result,) = working.generate(
            ["the cat"], RequestOptions(**{**vars(asked), "stop": ("never there", stop)})
        )
        assert result.text == text[: text.index(stop)] and result.reason == "stop"
        assert result.tokens == whole.tokens[: len(result.tokens)]
    assert working.generate([""], RequestOptions(max_tokens=1))[0].prompt_tokens == 1
    with pytest.raises(UsageError, match="needs a tokenizer"):
        engine(model).submit("text")
    with pytest.raises(UsageError, match="stop texts need"):
        engine(model).submit([1], RequestOptions(stop=("a",)))


def test_logarithms_are_those_of_the_full_forward() -> None:
    model = made("qwen3_moe", dtype=torch.float64)
    asked = RequestOptions(
        max_tokens=12, logprobs=4, sampling=SamplingOptions(temperature=2.0, seed=1, presence_penalty=1.0)
    )
    (result,) = engine(model, draft=3).generate([[1, 2, 3]], asked)
    for number, event in enumerate(result.drawn):
        written = torch.tensor([[1, 2, 3, *result.tokens[:number]]])
        logprob_V = model(written).logits[0, -1].float().log_softmax(-1).detach()
        assert event.logprob == pytest.approx(float(logprob_V[result.tokens[number]]), abs=1e-5)
        values, tokens = logprob_V.topk(4)
        assert [token for token, _ in event.top] == tokens.tolist()
        assert [value for _, value in event.top] == pytest.approx(values.tolist(), abs=1e-5)
    (bare,) = engine(model).generate([[1, 2, 3]], RequestOptions(max_tokens=2, logprobs=0))
    assert bare.drawn[0].logprob is not None and bare.drawn[0].top == ()


def test_what_is_not_finite_fails_alone() -> None:
    model = made("qwen3_moe")
    with torch.no_grad():
        model.embed.weight[13] = float("nan")
    asked = RequestOptions(max_tokens=8, sampling=GREEDY)
    working = engine(model)
    sound = [[1, 2], [3] * 14, [4]]
    results = working.generate([sound[0], [2] * 9 + [13] + [2] * 9, sound[1], [13], sound[2]], asked)
    assert [result.reason for result in results] == ["length", "error", "length", "error", "length"]
    assert "not finite" in results[1].error and "hint: " in results[1].error and results[3].tokens == []
    for prompt, result in zip(sound, results[::2], strict=True):
        assert result.tokens == plain(model, prompt, asked)
    with pytest.raises(MoietyError, match="not finite"):
        list(working.stream([13], asked))
    assert working.statistics().pages_used == 0
    again = working.generate([[2] * 9 + [1], *sound], asked)  # in the pages that held what was not finite
    assert again[0].tokens == plain(model, [2] * 9 + [1], asked)


def test_a_model_that_breaks_takes_only_its_step_along(monkeypatch: pytest.MonkeyPatch) -> None:
    working = engine(made())
    handle = working.submit([1, 2, 3])
    working.step()
    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "page_tokens", property(lambda pool: 1 / 0), raising=False)
        with pytest.raises(ZeroDivisionError):
            working.step()
    assert handle.result().reason == "error" and "ZeroDivisionError" in handle.result().error
    working.check()
    assert list(working.stream([1], RequestOptions(max_tokens=3)))


def test_threads() -> None:
    model = made()
    working = engine(model, max_requests=8, step_tokens=32)
    asked = RequestOptions(max_tokens=12, sampling=GREEDY)
    wanted = {first: plain(model, [first, 5], asked) for first in range(12)}
    found: dict[int, list[int]] = {}
    stop = threading.Event()
    heard: list[Event] = []

    def serve() -> None:
        while not stop.is_set():
            if working.wait(0.01):
                working.step()

    def ask(first: int) -> None:
        if first % 3 == 0:
            handle = working.submit([first, 5], asked, listener=heard.append)
            list(working.events(handle))
            found[first] = handle.result().tokens
        elif first % 3 == 1:
            found[first] = list(working.stream([first, 5], asked))
        else:
            (result,) = working.generate([[first, 5]], asked)
            found[first] = result.tokens
            working.cancel(working.submit([first]).number)

    threads = [threading.Thread(target=ask, args=(first,)) for first in wanted]
    server = threading.Thread(target=serve)
    for thread in [server, *threads]:
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    server.join(60)
    while working.wait(0):
        working.step()
    assert found == wanted
    assert len(heard) == 4 * 12 and sum(event.reason is not None for event in heard) == 4
    assert working.statistics().pages_used == 0 and working.statistics().running == 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "has no token"),
        ([61], {}, "the prompt has tokens outside 0 to 60"),
        ([-1], {}, "outside 0 to 60"),
        ([1], {"stop_ids": (61,)}, "stop_ids has tokens outside"),
        ([1], {"logit_bias": {99: 1.0}}, "logit_bias has tokens outside"),
        ([1] * 121, {}, "121 tokens; with its answer there is room for 120"),
    ],
)
def test_wrong_requests_are_refused_at_once(prompt: list[int], options: dict[str, Any], message: str) -> None:
    working = engine(made())
    with pytest.raises(UsageError, match=message):
        working.submit(prompt, RequestOptions(**options))
    assert not working.wait(0)


def test_the_longest_sequence_and_the_fullest_queue() -> None:
    model = made()
    working = engine(model, max_positions=20, max_queue=2)
    (result,) = working.generate([[1] * 18], RequestOptions(max_tokens=50, sampling=GREEDY))
    assert len(result.tokens) == 3 and result.reason == "length", "the last token is never computed"
    assert working.generate([[1] * 20], RequestOptions(max_tokens=50))[0].reason == "length"
    handles = [working.submit([1]) for _ in range(2)]
    with pytest.raises(BusyError, match="at most 2 may"):
        working.submit([1])
    working.step()
    working.submit([1])
    assert len(working.generate([[1]] * 30, RequestOptions(max_tokens=2))) == 30
    assert all(handle.is_done for handle in handles)
    with pytest.raises(UsageError, match="2 prompts and 1 options"):
        working.generate([[1], [2]], [RequestOptions()])


def test_memory_is_counted_before_it_is_taken() -> None:
    config = tiny.config(max_positions=100)
    page_bytes = PagePool(config, 1, 4).page_bytes

    def pages(**options: Any) -> tuple[int, int]:
        return page_count(config, EngineOptions(page_tokens=4, **options), torch.float32)

    assert pages() == (25 * 32, 100), "no more than the requests can fill"
    assert pages(kv_bytes=30 * page_bytes + 5) == (30, 100)
    assert pages(kv_bytes=6 * page_bytes, max_positions=23) == (6, 23)
    with pytest.raises(ConfigError, match=rf"one sequence of 100 tokens needs {25 * page_bytes}[\s\S]*to 24"):
        pages(kv_bytes=6 * page_bytes)
    with pytest.raises(ConfigError, match="needs"):
        pages(kv_bytes=1)
    with pytest.raises(ConfigError, match="made for 100"):
        pages(max_positions=101)
    large = tiny.config(max_positions=2**30)
    count, longest = page_count(large, EngineOptions(), torch.bfloat16)
    page_bytes = PagePool(large, 1, 16, dtype=torch.bfloat16).page_bytes
    assert longest == count * 16 and count * page_bytes <= 2**30 < (count + 1) * page_bytes
    asked = page_count(large, EngineOptions(max_positions=2**29), torch.float32)
    assert asked == (2**25, 2**29), "more than 1 GiB where it was asked for"


@pytest.mark.parametrize("name", ["mixtral", "llama"])
@pytest.mark.parametrize("page_tokens", [4, 16])
def test_keys_and_values_may_be_smaller_than_the_weights(name: str, page_tokens: int) -> None:
    model, asked = made(name), RequestOptions(max_tokens=8, sampling=GREEDY, logprobs=0)
    page_bytes = PagePool(model.config, 1, page_tokens).page_bytes
    short = {"kv_bytes": -(-120 // page_tokens) * page_bytes, "page_tokens": page_tokens}
    full, half = engine(model, **short), engine(model, kv_dtype="bf16", **short)
    assert half.statistics().pages == 2 * full.statistics().pages, "as many bytes hold twice as many"
    assert half.runner.pool.dtype is torch.bfloat16
    for one, other in zip(full.generate(PROMPTS, asked), half.generate(PROMPTS, asked), strict=True):
        first, second = (result.drawn[0].logprob for result in (one, other))
        assert first is not None and second is not None and first != second
        assert math.isclose(first, second, abs_tol=0.05)
    wide = engine(made(name, dtype=torch.bfloat16), kv_dtype="fp32")
    assert wide.runner.pool.dtype is torch.float32 and len(wide.generate([[1, 2]], asked)[0].tokens) == 8
    agree(model, kv_dtype="fp32", page_tokens=page_tokens)


def test_models_that_look_at_a_whole_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="experts that choose tokens"):
        Engine(made("", moe=tiny.experts(router="expert_choice"), d_ff=14))
    with pytest.raises(ConfigError, match="capacity in evaluation"):
        Engine(made("", moe=tiny.experts(eval_capacity_factor=1.0), d_ff=14))
    with pytest.raises(UsageError, match=r"training mode[\s\S]*model.eval"):
        moiety.Engine(made().train())


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("kv_bytes", -1),
        ("kv_dtype", "fp16"),
        ("page_tokens", 0),
        ("step_tokens", 3),
        ("max_requests", 0),
        ("max_queue", 0),
        ("draft", -1),
    ],
)
def test_engine_options_out_of_range(name: str, bad: int) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineOptions(**{name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("max_tokens", 0), ("min_tokens", -1), ("min_tokens", 129), ("stop", ("",)), ("stop", ("a",) * 65),
        ("stop", "ab"), ("stop_ids", (-1,)), ("logprobs", -1), ("logit_bias", {-1: 1.0}), ("logit_bias", {3: math.inf}),
        ("logit_bias", {"3": 1.0}), ("logit_bias", dict.fromkeys(range(2000), 1.0)), ("logprobs", 101),
    ],
)  # fmt: skip
def test_request_options_out_of_range(name: str, bad: object) -> None:
    with pytest.raises(ConfigError, match=name if name != "stop" else "stop"):
        RequestOptions(**{name: bad})  # type: ignore[arg-type]


def test_a_token_that_the_tokenizer_does_not_know_ends_its_request_alone() -> None:
    tokenizer = train_tokenizer(["one two three two one"], 300)
    model = tiny.model("", vocab_size=tokenizer.vocab_size + 5).eval()
    engine = Engine(model, tokenizer, options=EngineOptions(max_positions=60))
    unknown = {tokenizer.vocab_size + 2: 100.0}
    options = [
        RequestOptions(max_tokens=4, ignore_end=True, logit_bias=bias) for bias in (unknown, {3: 100.0})
    ]
    first, second = engine.generate([[1, 2], [1, 3]], options)
    assert first.reason == "error" and "is outside the vocabulary" in first.error
    assert second.tokens == [3] * 4 and not second.error
    engine.check()
    assert engine.step() == []
