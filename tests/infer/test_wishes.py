"""What a request may want besides tokens: its prompt scored, its routing kept, its answer under a constraint."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moiety.errors import ConfigError, MoietyError
from moiety.infer.engine import Engine
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions
from moiety.infer.routed import RoutedExperts, load_summary
from moiety.model.paged import PagePool
from moiety.routing import Routing
from tests import tiny

GREEDY = SamplingOptions(temperature=0.0)
PROMPT = [5, 17, 60, 0, 7, 33, 17, 17, 2, 9, 11]


def engine(name: str = "mixtral", **options: object) -> Engine:
    given = {"page_tokens": 4, "step_tokens": 6, "max_requests": 4, "max_positions": 60} | options
    return Engine(tiny.model(name).eval(), options=EngineOptions(**given))  # type: ignore[arg-type]


def finish(working: Engine, *handles: object) -> None:
    while not all(handle.is_done for handle in handles):  # type: ignore[attr-defined]
        working.step()
    working.check()


@pytest.mark.parametrize("prompt", [PROMPT, [3], [3, 4]])
def test_a_scored_prompt_has_the_models_logarithms(prompt: list[int]) -> None:
    working = engine()
    asked = RequestOptions(max_tokens=3, prompt_logprobs=4, sampling=GREEDY)
    working.generate([prompt], RequestOptions(max_tokens=1, sampling=GREEDY))  # its pages could be found
    handle = working.submit(prompt, asked)
    other = working.submit([9, 9, 8], RequestOptions(max_tokens=9, sampling=GREEDY))
    finish(working, handle, other)
    scored = handle.request.scored
    assert [one.token for one in scored] == prompt[1:] and handle.request.reused == 0
    logits = working.runner.forward(torch.tensor([prompt])).logits[0].detach().log_softmax(-1)
    for place, one in enumerate(scored):
        assert one.logprob == pytest.approx(float(logits[place, one.token]), abs=1e-4)
        values, tokens = logits[place].topk(4)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("first", [1, 2, 5, 9, 10, 11, 40])
def test_the_end_of_a_prompt_is_scored_and_its_start_is_found(first: int) -> None:
    working = engine()
    whole = working.submit(PROMPT, RequestOptions(max_tokens=1, prompt_logprobs=2, sampling=GREEDY))
    finish(working, whole)
    asked = RequestOptions(max_tokens=1, prompt_logprobs=2, scored_from=first, sampling=GREEDY)
    handles = [working.submit(PROMPT, asked) for _ in range(2)]
    finish(working, *handles)
    expected = whole.request.scored[first - 1 :]
    for handle in handles:
        assert [one.token for one in handle.request.scored] == [one.token for one in expected]
        assert [one.logprob for one in handle.request.scored] == pytest.approx(
            [one.logprob for one in expected], abs=1e-5
        )
        assert handle.request.reused == min((first - 1) // 4 * 4, 8)
    with pytest.raises(ConfigError, match="scored_from is 0"):
        RequestOptions(prompt_logprobs=0, scored_from=0)


def test_preempted_requests_are_scored_and_recorded_once() -> None:
    model = tiny.model("mixtral").eval()
    room = PagePool(model.config, 1, 4).page_bytes * 12
    options = EngineOptions(
        page_tokens=4, step_tokens=40, max_requests=4, max_positions=48, kv_bytes=room, prefix_cache=False
    )
    working = Engine(model, options=options)
    asked = RequestOptions(max_tokens=25, prompt_logprobs=1, record_routing=True, sampling=GREEDY)
    ends = RequestOptions(max_tokens=25, prompt_logprobs=1, scored_from=7, sampling=GREEDY)
    handles = [working.submit(PROMPT, asked) for _ in range(3)]
    late = working.submit(PROMPT, ends)
    finish(working, *handles, late)
    assert working.statistics().preemptions > 0
    assert late.request.preemptions > 0 and [one.token for one in late.request.scored] == PROMPT[7:]
    for handle in handles:
        record = handle.request.routed
        assert isinstance(record, RoutedExperts) and record.tokens == len(PROMPT) + 24
        assert len(handle.request.scored) == len(PROMPT) - 1
        assert np.array_equal(record.experts(), handles[0].request.routed.experts())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "sigmoid", "llama"])
def test_recorded_experts_are_the_models(name: str) -> None:
    working = engine(name)
    other = working.submit([1, 2, 3], RequestOptions(max_tokens=12, sampling=GREEDY))
    handle = working.submit(PROMPT, RequestOptions(max_tokens=5, record_routing=True, sampling=GREEDY))
    finish(working, other, handle)
    record = handle.request.routed
    assert isinstance(record, RoutedExperts)
    written = [*PROMPT, *handle.request.answer[:-1]]
    routing = working.runner.forward(torch.tensor([written])).routing
    found_TLK = record.experts()
    assert found_TLK.dtype == np.uint8 and found_TLK.shape[:2] == (len(written), len(routing))
    for layer, (number, true) in enumerate(routing.items()):
        assert torch.equal(record.counts[number], true.counts_E)
        for token in range(len(written)):
            own_N = true.token_N == token
            order = true.weight_N[own_N].argsort(descending=True)
            assert found_TLK[token, layer].tolist() == true.expert_N[own_N][order].tolist()
    assert record.summary()["tokens"] == len(written) and record.summary()["dropped_tokens"] == 0


def test_a_record_is_bounded_and_says_what_it_dropped() -> None:
    routing = {2: Routing.from_choices(torch.tensor([[0, 3], [1, 2], [3, 1]]), experts=4)}
    record = RoutedExperts(limit_bytes=2 * 2 * 3)
    for start in (0, 3, 6):
        record.add(routing, 0, 3, start=start)
    assert record.experts().shape == (3, 1, 2) and record.dropped == 6 and record.tokens == 9
    assert record.counts[2].tolist() == [3, 6, 3, 6]
    record.add(routing, 1, 1, start=0)  # preempted: from the start again
    assert record.experts().tolist() == [[[1, 2]]] and record.dropped == 0


def test_tokens_with_fewer_experts_are_filled_up() -> None:
    true = Routing.from_pairs(
        torch.tensor([0, 2, 2]),
        torch.tensor([1, 0, 299]),
        torch.tensor([1.0, 0.2, 0.8]),
        tokens=3,
        experts=300,
    )
    record = RoutedExperts()
    record.add({0: true}, 0, 3, start=0)
    assert record.experts().dtype == np.uint16
    assert record.experts()[:, 0].tolist() == [[1, 65535], [65535, 65535], [299, 0]]


def test_the_summary_of_a_load() -> None:
    found = load_summary(torch.tensor([6, 0, 2, 0]))
    assert found["entropy_bits"] == pytest.approx(
        -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)), abs=1e-4
    )
    assert (found["uniform_bits"], found["imbalance"], found["unused"]) == (2.0, 3.0, 2)
    assert found["top"][0] == {"expert": 0, "share": 0.75}
    assert load_summary(torch.zeros(3, dtype=torch.int64))["entropy_bits"] == 0


class Even:
    """Allows even tokens, and ends after four."""

    def __init__(self, fails_after: int = 99) -> None:
        self.taken: list[int] = []
        self._fails_after = fails_after

    def allowed(self) -> bytes:
        if len(self.taken) >= self._fails_after:
            raise MoietyError("too much work")
        return bytes(token % 2 == 0 for token in range(40))

    def push(self, token: int) -> None:
        self.taken.append(token)

    @property
    def is_done(self) -> bool:
        return len(self.taken) == 4


@pytest.mark.parametrize("sampling", [GREEDY, SamplingOptions(temperature=1.5, seed=3, top_p=0.9)])
def test_a_constraint_is_kept_to_and_ends_the_answer(sampling: SamplingOptions) -> None:
    working = engine(draft=3)
    rule = Even()
    asked = RequestOptions(max_tokens=20, sampling=sampling, logit_bias={41: 50.0, 3: 50.0})
    handle = working.submit([7] * 12, asked, constraint=rule)
    free = working.submit([7] * 12, RequestOptions(max_tokens=20, sampling=GREEDY))
    finish(working, handle, free)
    assert handle.request.answer == rule.taken and len(rule.taken) == 4
    assert all(token % 2 == 0 and token < 40 for token in rule.taken)
    assert handle.result().reason == "stop" and len(free.request.answer) == 20
    alone = engine().generate([[7] * 12], RequestOptions(max_tokens=20, sampling=GREEDY))
    assert alone[0].reason == "length"


def test_a_constraint_that_fails_ends_its_request_alone() -> None:
    working = engine()
    handle = working.submit([7, 8], RequestOptions(max_tokens=9, sampling=GREEDY), constraint=Even(2))
    free = working.submit([7, 8], RequestOptions(max_tokens=9, sampling=GREEDY))
    finish(working, handle, free)
    assert handle.result().reason == "error" and "too much work" in handle.result().error
    assert free.result().reason == "length" and working.statistics().pages_used == 0
