"""Bits per byte against a sum by hand, and counts that leave padding out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.train.data import IGNORED, TokenData
from moiety.train.evaluate import Evaluation, evaluate
from tests.train import tiny
from tests.train.tiny import LENGTH


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenData, Tokenizer]:
    return tiny.text(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def data(text: tuple[TokenData, Tokenizer]) -> TokenData:
    return text[0]


@pytest.fixture(scope="module")
def net(text: tuple[TokenData, Tokenizer]) -> Transformer:
    """Trained a little, so that no two tokens look the same to it."""
    net = tiny.model(text[1].vocab_size, router="sigmoid", selection_bias=True)
    tiny.run(net, text[0], tiny.options(steps=5))
    return net


def _held_out(data: TokenData, length: int) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Each domain's held-out sequences without their padding: tokens and targets."""
    found: dict[str, list[tuple[list[int], list[int]]]] = {}
    for domain in data.domains:
        found[domain] = []
        for batch in data.evaluation(domain, B=1, S=length):
            targets = batch.targets_BS[0]
            last = int((targets != IGNORED).nonzero().max())
            found[domain].append((batch.tokens_BS[0, : last + 1].tolist(), targets[: last + 1].tolist()))
    return found


@torch.no_grad()
def _by_hand(net: Transformer, sequences: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """Summed nats in float64 over whole logits, one sequence at a time, and the number of scored tokens."""
    nats, scored = 0.0, 0
    for tokens, targets in sequences:
        logits_SV = net(torch.tensor([tokens])).logits[0].double()
        surprise_SV = logits_SV.logsumexp(-1, keepdim=True) - logits_SV
        for place, target in enumerate(targets):
            if target != IGNORED:
                nats += float(surprise_SV[place, target])
                scored += 1
    return nats, scored


@pytest.mark.parametrize("length", [LENGTH, 27])
def test_bits_per_byte_by_hand(
    length: int, net: Transformer, data: TokenData, text: tuple[TokenData, Tokenizer]
) -> None:
    found = evaluate(net, data, batch=3, length=length)
    held_out = _held_out(data, length)
    assert list(found.bits_per_byte) == list(data.domains)
    for domain, sequences in held_out.items():
        nats, scored = _by_hand(net, sequences)
        size_bytes = data.sizes("held_out")[domain]["size_bytes"]
        assert scored < len(sequences) * length, "some of it is padding"
        said = b"".join(
            text[1].decode([target for target in targets if target != IGNORED]).encode()
            for _, targets in sequences
        )
        assert size_bytes == len(said) == found.size_bytes[domain]
        assert found.nats[domain] == pytest.approx(nats, rel=1e-5)
        assert found.bits_per_byte[domain] == pytest.approx(nats / math.log(2) / size_bytes, rel=1e-5)
    assert found.mean_bits_per_byte == pytest.approx(sum(found.bits_per_byte.values()) / 2)


def test_the_batch_size_changes_nothing(net: Transformer, data: TokenData) -> None:
    first, second = (evaluate(net, data, batch=batch, length=LENGTH) for batch in (1, 7))
    assert first.nats == pytest.approx(second.nats, rel=1e-5)
    assert first.counts_SLE is not None and second.counts_SLE is not None
    np.testing.assert_array_equal(first.counts_SLE, second.counts_SLE)
    np.testing.assert_array_equal(first.domain_S, second.domain_S)


def test_counts_leave_padding_out(net: Transformer, data: TokenData) -> None:
    found = evaluate(net, data, batch=3, length=LENGTH)
    lengths = {
        domain: [len(tokens) for tokens, _ in rows] for domain, rows in _held_out(data, LENGTH).items()
    }
    assert any(length < LENGTH for rows in lengths.values() for length in rows)
    flat = [length for domain in data.domains for length in lengths[domain]]
    assert found.counts_SLE is not None and found.counts_DLE is not None
    assert found.counts_SLE.shape == (len(flat), 2, 4) and found.counts_SLE.dtype == np.int64
    np.testing.assert_array_equal(found.counts_SLE.sum(-1), 2 * np.array(flat)[:, None].repeat(2, 1))
    numbers = [number for number, domain in enumerate(data.domains) for _ in lengths[domain]]
    np.testing.assert_array_equal(found.domain_S, numbers)
    for number, domain in enumerate(data.domains):
        np.testing.assert_array_equal(
            found.counts_DLE[number], found.counts_SLE[np.array(numbers) == number].sum(0)
        )
        assert found.counts_DLE[number].sum() == 2 * 2 * sum(lengths[domain])


def test_counts_are_of_the_layer_and_expert_they_say(net: Transformer, data: TokenData) -> None:
    found = evaluate(net, data, batch=4, length=LENGTH)
    tokens, _ = _held_out(data, LENGTH)[data.domains[1]][0]
    first = int(np.flatnonzero(found.domain_S == 1)[0])
    with torch.no_grad():
        routing = net(torch.tensor([tokens])).routing
    assert found.counts_SLE is not None
    for layer in (0, 1):
        np.testing.assert_array_equal(found.counts_SLE[first, layer], routing[layer].counts_E.numpy())


def test_limit(net: Transformer, data: TokenData) -> None:
    found = evaluate(net, data, batch=3, length=LENGTH, limit=2)
    assert found.domain_S.tolist() == [0, 0, 1, 1]
    nats, _ = _by_hand(net, _held_out(data, LENGTH)["code"][:2])
    assert found.nats["code"] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, net: Transformer, data: TokenData) -> None:
    before = tiny.values(net)
    net.train(training)
    found = evaluate(net, data, batch=4, length=LENGTH, limit=1)
    assert net.training is training and found.seconds > 0
    assert all(parameter.grad is None for parameter in net.parameters())
    tiny.assert_same_bits(before, tiny.values(net))


def test_bf16_is_close_and_not_the_same(net: Transformer, data: TokenData) -> None:
    exact, rounded = (evaluate(net, data, batch=4, length=LENGTH, dtype=dtype) for dtype in ("fp32", "bf16"))
    assert exact.nats != rounded.nats
    assert exact.mean_bits_per_byte == pytest.approx(rounded.mean_bits_per_byte, rel=0.01)


def test_dense_has_no_counts(text: tuple[TokenData, Tokenizer]) -> None:
    found = evaluate(tiny.model(text[1].vocab_size, experts=0), text[0], batch=4, length=LENGTH)
    assert found.counts_DLE is None and found.counts_SLE is None and len(found.domain_S) > 2
    uniform = math.log2(text[1].vocab_size)
    tokens = sum(size["tokens"] - size["documents"] for size in text[0].sizes("held_out").values())
    size_bytes = sum(found.size_bytes.values())
    assert sum(found.nats.values()) / math.log(2) / size_bytes == pytest.approx(
        uniform * tokens / size_bytes, rel=0.05
    )


def test_the_mean_weighs_domains_alike() -> None:
    nothing = np.zeros(0, np.int64)
    one = Evaluation(
        bits_per_byte={"a": 1.0, "b": 4.0},
        nats={},
        size_bytes={"a": 10**6, "b": 1},
        counts_DLE=None,
        counts_SLE=None,
        domain_S=nothing,
        seconds=0.0,
    )
    assert one.mean_bits_per_byte == 2.5


def test_a_domain_with_nothing_held_out_does_not_stop_an_evaluation(tmp_path: Path) -> None:
    """A one-word domain can be trained on but not scored: the others still are."""
    from moiety.train.corpus import Document, split_held_out
    from moiety.train.data import build

    split = split_held_out([*tiny.documents(), Document("note", "x")])
    _, tokenizer = tiny.text(tmp_path / "first")
    data = build(split, tokenizer, tmp_path / "second")
    assert data.sizes("held_out")["note"]["documents"] == 0
    found = evaluate(tiny.model(tokenizer.vocab_size), data, batch=4, length=LENGTH)
    assert set(found.bits_per_byte) == {"animals", "code"} and len(data.domains) == 3
    assert found.counts_DLE is not None and found.counts_DLE.shape == (3, 2, 4)
    assert found.counts_DLE[data.domains.index("note")].sum() == 0
