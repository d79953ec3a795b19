"""Scheduler and pages without a model: nothing leaks, nobody starves, and every answer is the one it had alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.errors import BusyError, UsageError
from moiety.infer.drafts import NGrams
from moiety.infer.options import RequestOptions
from moiety.infer.request import Request, State
from tests.infer.fake import VOCABULARY, Fake, alone, fake

TOKENS = st.integers(0, 2)
PROMPTS = st.lists(TOKENS, min_size=1, max_size=25)


def always(ngrams: NGrams, written: Sequence[int], room: int, sequences: int, tokens: int) -> list[int]:
    """Guesses whenever it can."""
    return ngrams.guess(written, min(3, room))


def run(driven: Fake, step_tokens: int, steps: int = 2000) -> None:
    for _ in range(steps):
        if not driven.step(step_tokens):
            break
    assert all(request.state is State.FINISHED for request in driven.requests)
    assert driven.pages.available == driven.pages.count


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    page_tokens=st.integers(1, 5),
    count=st.integers(7, 20),
    max_requests=st.integers(1, 6),
    more=st.integers(0, 12),
    prefix_cache=st.booleans(),
    drafts=st.booleans(),
)
def test_every_answer_is_the_one_it_had_alone(
    data: st.DataObject,
    page_tokens: int,
    count: int,
    max_requests: int,
    more: int,
    prefix_cache: bool,
    drafts: bool,
) -> None:
    """Requests come, are cancelled and end at random; few pages, so that many are preempted."""
    step_tokens = max_requests + more
    driven = fake(
        count,
        page_tokens,
        prefix_cache=prefix_cache,
        step_tokens=step_tokens,
        max_requests=max_requests,
        draft=always if drafts else None,
    )
    heads = [data.draw(st.lists(TOKENS, max_size=12)) for _ in range(2)]
    cancelled = set()
    for _ in range(data.draw(st.integers(1, 12))):
        prompt = [*data.draw(st.sampled_from(heads)), *data.draw(PROMPTS)][: driven.longest]
        try:
            driven.submit(
                prompt,
                max_tokens=data.draw(st.integers(1, 20)),
                stop_ids=(5,) if data.draw(st.booleans()) else (),
                salt=data.draw(st.sampled_from(["", "", "other"])),
            )
        except UsageError as error:
            assert "pages" in str(error) and driven.pages.needed(len(prompt)) > 0
        for _ in range(data.draw(st.integers(0, 4))):
            driven.step(step_tokens)
        if driven.requests and data.draw(st.integers(0, 4)) == 0:
            victim = data.draw(st.sampled_from(driven.requests))
            if victim.state is not State.FINISHED:
                cancelled.add(victim.number)
            driven.scheduler.finish(victim, "cancelled")
            driven.scheduler.check()
    run(driven, step_tokens)
    for request in driven.requests:
        wanted = alone(request.prompt, request.options, driven.longest)
        if request.number in cancelled:
            assert request.reason == "cancelled" and request.answer == wanted[: request.drawn]
        else:
            assert request.reason in ("stop", "length") and request.answer == wanted, request.preemptions


def test_preemption_takes_the_youngest_and_changes_no_token() -> None:
    driven = fake(6, 4, max_requests=3, step_tokens=30, prefix_cache=False)
    for start in range(3):
        driven.submit([start] * 5, max_tokens=11)
    driven.step(30)
    assert [len(request.table.pages) for request in driven.requests] == [2, 2, 0], (
        "one page for each that runs"
    )
    run(driven, 30)
    assert driven.requests[0].preemptions == 0 < driven.requests[1].preemptions
    for request in driven.requests:
        assert request.answer == alone(request.prompt, request.options, driven.longest)


def test_preempted_work_is_found_again() -> None:
    driven = fake(6, 4, max_requests=2, step_tokens=30)
    for start in range(2):
        driven.submit([start] * 5, max_tokens=15)
    run(driven, 30)
    victim = driven.requests[1]
    assert victim.preemptions > 0 and victim.answer == alone(victim.prompt, victim.options, driven.longest)


def test_drawing_comes_first_and_prompts_come_in_pieces() -> None:
    driven = fake(40, 4, max_requests=4, step_tokens=6, prefix_cache=False)
    driven.submit([1, 2], max_tokens=30)
    driven.step(6)
    driven.submit([0] * 14, max_tokens=3)
    driven.submit([1] * 9, max_tokens=3)
    shape = [[(piece.request.number, piece.size) for piece in driven.step(6)] for _ in range(6)]
    assert shape[:3] == [[(0, 1), (1, 5)], [(0, 1), (1, 5)], [(0, 1), (1, 4), (2, 1)]]
    assert shape[3] == [(0, 1), (1, 1), (2, 4)] and shape[4] == [(0, 1), (1, 1), (2, 4)]


def test_equal_prompts_are_computed_once() -> None:
    driven = fake(40, 4, max_requests=8, step_tokens=40)
    prompt = [1, 2, 0] * 7  # 21 tokens: five full pages and one token
    for _ in range(6):
        driven.submit(prompt, max_tokens=4)
    run(driven, 40)
    assert [request.reused for request in driven.requests] == [0, 20, 20, 20, 20, 20]
    assert driven.computed == 21 + 5 + 6 * 3
    again = driven.submit(prompt, max_tokens=4)
    other = driven.submit(prompt, max_tokens=4, salt="someone else")
    run(driven, 40)
    assert (again.reused, other.reused) == (20, 0) and again.answer == other.answer


@pytest.mark.parametrize("guessing", [False, True])
def test_guesses_change_no_token(guessing: bool) -> None:
    driven = fake(40, 4, step_tokens=16, max_requests=2, draft=always if guessing else None)
    first = driven.submit([3], max_tokens=100)
    second = driven.submit([0, 1, 0, 1, 0], max_tokens=60)
    run(driven, 16)
    for request in (first, second):
        assert request.answer == alone(request.prompt, request.options, driven.longest)
    assert (first.accepted > 3) == guessing and first.drafted >= first.accepted
    assert max(first.answer) < VOCABULARY


def test_a_full_queue_and_what_can_never_fit_are_refused() -> None:
    driven = fake(5, 4, max_queue=2)
    driven.submit([1], max_tokens=20)
    with pytest.raises(
        UsageError, match="4 tokens of prompt and 20 to draw need 6 pages of 4 tokens, and there are 5"
    ):
        driven.scheduler.submit(Request(9, [1] * 4, RequestOptions(max_tokens=20), longest=99))
    driven.submit([2], max_tokens=2)
    with pytest.raises(BusyError, match="2 requests are waiting, and at most 2 may") as refused:
        driven.submit([1], max_tokens=2)
    assert refused.value.hint
    driven.step(8)
    driven.submit([1], max_tokens=2)
    run(driven, 8)


def test_cancelled_in_every_state() -> None:
    driven = fake(6, 4, max_requests=3, step_tokens=4, prefix_cache=False)
    waiting = driven.submit([1] * 3, max_tokens=4)
    driven.scheduler.finish(waiting, "cancelled")
    half, young = driven.submit([0] * 10, max_tokens=12), driven.submit([2] * 3, max_tokens=12)
    driven.step(4)
    assert half.state is State.RUNNING and 0 < half.computed < 10, "in the middle of its prompt"
    driven.scheduler.finish(half, "cancelled")
    old = driven.submit([2] * 2, max_tokens=20)
    while young.state is not State.PREEMPTED and old.state is not State.PREEMPTED:
        assert driven.step(4)
    preempted = old if old.state is State.PREEMPTED else young
    driven.scheduler.finish(preempted, "cancelled")
    driven.scheduler.finish(preempted, "error")
    assert preempted.reason == "cancelled" and preempted.drawn > 0, "the first end counts"
    run(driven, 4)


def test_the_checks_see_a_leak() -> None:
    driven = fake(6, 4)
    request = driven.submit([1] * 6, max_tokens=4)
    driven.step(8)
    request.table.pages.append(request.table.pages[0])
    with pytest.raises(AssertionError):
        driven.scheduler.check()
