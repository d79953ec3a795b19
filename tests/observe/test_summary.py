"""From a race to the report's numbers: nothing is thinned away that matters, and padding is no text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from moiety import cost
from moiety.model.tokenizer import Tokenizer
from moiety.observe import summary
from moiety.train.compare import Contender, pair, race
from moiety.train.data import TokenData
from tests.train import tiny
from tests.train.tiny import LENGTH

Race = tuple[TokenData, Tokenizer, tuple[Contender, Contender]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Race:
    torch.set_num_threads(1)
    data, tokenizer = tiny.text(tmp_path_factory.mktemp("tokens"))
    how = tiny.options(steps=45, batch=4, evaluate_every=20)
    twins = pair(tiny.shape(d_ff=16), how, vocab_size=tokenizer.vocab_size)
    tiny.poison_loss(twins[0].build(), poison := tiny.Poison(frozenset({30})))
    for twin, record in race(twins, data):
        if twin.name == "moe":
            poison.step = record.state.step
    torch.set_num_threads(2)
    return data, tokenizer, twins


def test_the_corpus_is_what_is_trained_on(finished: Race) -> None:
    found = {one.name: (one.size_bytes, one.documents) for one in summary.corpus_of(finished[0])}
    sizes = finished[0].sizes()
    assert found == {
        name: (sizes[name]["size_bytes"], sizes[name]["documents"]) for name in ("animals", "code")
    }


def test_a_run(finished: Race) -> None:
    for twin, kind in zip(finished[2], ("moe", "dense"), strict=True):
        run = summary.run_of(twin)
        assert (run.name, run.kind) == (kind, kind)
        assert (
            run.parameters_total == twin.parameters.total == sum(p.numel() for p in twin.build().parameters())
        )
        assert run.parameters_active == cost.parameters(twin.config).active
        assert run.flops_per_token == cost.flops_per_token(twin.config, LENGTH // 2).total
        assert run.train_tokens_per_s == twin.tokens_per_second and run.decode_tokens_per_s > 0
        assert run.final_bits_per_byte == twin.evaluation.bits_per_byte
        assert {(point.step, point.domain) for point in run.evaluation} == {
            (step, domain) for step in (20, 40, 45) for domain in ("animals", "code")
        }
        steps = [point.step for point in run.training]
        skipped = {31} if kind == "moe" else set()
        assert steps == [step for step in range(1, 46) if step not in skipped]
        assert all(np.isfinite(point.loss) for point in run.training)
        assert [point.tokens for point in run.training] == [4 * LENGTH * step for step in steps]
        seconds = [point.seconds for point in run.training]
        assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_long_curve_keeps_its_ends_and_a_bounded_number_of_points(finished: Race) -> None:
    moe = finished[2][0]
    like = moe.records[0]
    records = [
        dataclasses.replace(like, state=dataclasses.replace(like.state, step=step)) for step in range(1, 1236)
    ]
    records.append(moe.records[-1])
    long = dataclasses.replace(moe, records=records)
    points = summary.run_of(long).training
    assert 150 <= len(points) <= 420
    assert points[0].step == 1 and points[-1].step == moe.records[-1].state.step
    health = summary.health_of(long)
    assert len(health) <= 2 * 2 * 40 + 4 and health[0].step == 1
    assert health[-1].step == moe.records[-1].state.step, "the last word on the router is of the last step"


def test_health_is_that_of_the_records(finished: Race) -> None:
    moe, dense = finished[2]
    found = summary.health_of(moe)
    assert summary.health_of(dense) == ()
    assert {point.layer for point in found} == {0, 1} and len(found) <= 100
    by_step = {record.state.step: record.health for record in moe.records}
    for point in found:
        health = by_step[point.step][point.layer]
        assert point.load_E == tuple(health.load_E) and sum(point.load_E) == pytest.approx(4)
        assert (point.max_vio, point.load_entropy, point.dead) == (
            health.max_vio,
            health.load_entropy,
            health.dead,
        )


def test_specialization_is_of_the_evaluation(finished: Race) -> None:
    moe = finished[2][0]
    found = summary.specialization_of(moe.evaluation, finished[0], moe.config.moe_layers)
    assert found.domains == ("animals", "code") and tuple(found.layers) == (0, 1)
    assert 0 <= found.score <= 1 and found.verdict


def _unpadded_counts(data: TokenData, vocabulary: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """How often each token stands in the held-out text, its last sequence cut at the last document's end."""
    counts = np.zeros(vocabulary, np.int64)
    for domain in data.domains:
        for batch in data.evaluation(domain, B=1, S=LENGTH, limit=summary.SEQUENCES_PER_DOMAIN):
            last = int((batch.targets_BS[0] != -100).nonzero().max())
            counts += np.bincount(batch.tokens_BS[0, : last + 1].numpy(), minlength=vocabulary)
    return counts


def test_favourite_tokens_leave_padding_out(finished: Race) -> None:
    data, tokenizer, (moe, _) = finished
    seen_V = _unpadded_counts(data, tokenizer.vocab_size)
    favourites = summary.favourite_tokens(moe.build(), data, tokenizer)
    assert [(one.layer, one.expert) for one in favourites] == [(l, e) for l in (0, 1) for e in range(4)]  # noqa: E741
    checked = 0
    for expert in favourites:
        shares = [share for _, share, _ in expert.tokens]
        assert all(0 < share <= 1 for share in shares)
        for said, _, occurrences in expert.tokens:
            alike = [v for v in range(tokenizer.vocab_size) if tokenizer.decode([v]) == said]
            assert occurrences in [int(seen_V[v]) for v in alike], (said, occurrences)
            checked += 1
    assert checked > 10


def test_a_routed_text_is_the_text(finished: Race) -> None:
    _, tokenizer, (moe, _) = finished
    text = "the cat 3 sat on x = 4\n"
    found = summary.route_text(moe.build(), tokenizer, text)
    assert found.layers == (0, 1) and "".join(token.text for token in found.tokens) == text
    for token in found.tokens:
        assert len(token.choices_L) == 2
        for choices in token.choices_L:
            assert len(choices) == 2 and len({expert for expert, _ in choices}) == 2
            assert sum(weight for _, weight in choices) == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        routing = moe.build()(torch.tensor([tokenizer.encode(text)])).routing[1]
    place = len(found.tokens) // 2
    dense_E = routing.dense()[place]
    for expert, weight in found.tokens[place].choices_L[1]:
        assert float(dense_E[expert]) == pytest.approx(weight)


def test_a_text_longer_than_the_model_is_cut(finished: Race) -> None:
    found = summary.route_text(finished[2][0].build(), finished[1], "the cat sat. " * 100)
    assert len(found.tokens) == LENGTH


def test_generations_are_each_contenders_own(finished: Race) -> None:
    _, tokenizer, twins = finished
    found = summary.generations(twins, tokenizer, ("the cat", "x ="), tokens=12)
    assert [(one.prompt, one.run) for one in found] == [
        (prompt, name) for prompt in ("the cat", "x =") for name in ("moe", "dense")
    ]
    assert all(one.text for one in found)
    alone = summary.generations(twins[1:], tokenizer, ("x =",), tokens=12)
    assert alone[0] == found[3]


def test_training_mode_and_weights_are_left_alone(finished: Race) -> None:
    data, tokenizer, (moe, _) = finished
    net = moe.build()
    before, training = tiny.values(net), net.training
    summary.favourite_tokens(net, data, tokenizer)
    summary.route_text(net, tokenizer, "the cat")
    summary.run_of(moe)
    tiny.assert_same_bits(before, tiny.values(net))
    assert net.training is training and not any(p.grad is not None for p in net.parameters())


def test_decode_speed_is_of_what_was_timed(finished: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr("moiety.observe.summary.perf_counter", lambda: next(clock))
    assert summary.decode_speed(finished[2][0].build(), tokens=16) == pytest.approx(14 / 2.0)
