"""Predictions of two models side by side, against the same sums written plainly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moiety.model.loss import IGNORED
from moiety.model.transformer import Transformer
from moiety.quant.quantize import policy_named, quantize
from moiety.train import quality
from moiety.train.data import Batch
from moiety.train.evaluate import evaluate
from moiety.train.quality import Quality, compare
from tests import tiny as models
from tests.train import tiny


def batches(model: Transformer, count: int = 3) -> Iterator[Batch]:
    for number in range(count):
        tokens = models.tokens(model, 2, 9)
        targets = tokens.roll(-1, 1)
        targets[:, -1 - number :] = IGNORED
        yield Batch(
            tokens_BS=tokens,
            targets_BS=targets,
            domain_BS=torch.zeros_like(tokens),
            target_bytes=40,
            sequences_seen=0,
            epoch=0,
        )


@torch.no_grad()
def test_sums_are_those_of_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "SLICE_ELEMENTS", 200)  # a few positions at a time
    first, second = models.model("mixtral").eval(), models.model("mixtral").eval()
    text = list(batches(first))
    found = compare(first, {"other": second, "same": first}, text)["other"]
    place = 0
    for batch in text:
        ours, theirs = (one(batch.tokens_BS).logits.double() for one in (second, first))
        for sequence in range(2):
            nats = reference = kl = agree = tokens = 0.0
            for position, target in enumerate(batch.targets_BS[sequence].tolist()):
                if target == IGNORED:
                    continue
                q, p = (one[sequence, position].softmax(0) for one in (ours, theirs))
                nats, reference = nats - math.log(q[target]), reference - math.log(p[target])
                kl += float((p * (p / q).log()).sum())
                agree, tokens = agree + float(q.argmax() == p.argmax()), tokens + 1
            assert [found.nats_S[place], found.reference_nats_S[place], found.kl_S[place]] == pytest.approx(
                [nats, reference, kl], rel=1e-5
            )
            assert (found.agree_S[place], found.tokens_S[place]) == (agree, tokens)
            place += 1
    assert place == len(found.nats_S) and found.size_bytes == 120 and found.kl.value > 0.1


def test_a_model_equals_itself() -> None:
    model = models.model("llama").eval()
    found = compare(model, {"same": model}, batches(model))["same"]
    assert found.kl == found.loss_in_bits_per_byte == (0, 0, 0) and found.agreement == (1, 1, 1)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high


def test_figures_follow_from_the_sums() -> None:
    nats = np.array([8.0, 9.0, 30.0])
    one = Quality(
        nats_S=nats,
        reference_nats_S=nats - 1,
        kl_S=np.array([0.1, 0.2, 0.6]),
        agree_S=np.array([4.0, 5.0, 9.0]),
        tokens_S=np.array([5.0, 5.0, 10.0]),
        size_bytes=60,
    )
    assert one.perplexity.value == pytest.approx(math.exp(47 / 20))
    assert one.bits_per_byte.value == pytest.approx(47 / math.log(2) / 60)
    assert one.loss_in_bits_per_byte.value == pytest.approx(3 / math.log(2) / 60)
    assert one.kl.value == pytest.approx(0.9 / 20) and one.agreement.value == pytest.approx(18 / 20)
    for interval in (one.kl, one.perplexity, one.agreement):
        assert interval.low <= interval.value <= interval.high and interval.low < interval.high


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draw, hits = np.random.default_rng(1), 0
    for _ in range(100):
        kl = draw.exponential(2.0, size=60)
        ones = np.ones(60)
        found = Quality(
            nats_S=ones, reference_nats_S=ones, kl_S=kl, agree_S=ones, tokens_S=ones, size_bytes=60
        ).kl
        hits += found.low <= 2.0 <= found.high
    assert 85 <= hits <= 99


def test_it_agrees_with_evaluation(tmp_path: Path) -> None:
    data, tokenizer = tiny.text(tmp_path)
    model = tiny.model(tokenizer.vocab_size).eval()
    text = [piece for domain in data.domains for piece in data.evaluation(domain, B=4, S=tiny.LENGTH)]
    packed = Transformer(model.config).eval()
    packed.load_state_dict(model.state_dict())
    quantize(packed, policy_named("int4"))
    found = compare(model, {"full": model, "packed": packed}, text)
    for name, one in (("full", model), ("packed", packed)):
        true = evaluate(one, data, batch=4, length=tiny.LENGTH)
        total = sum(true.nats.values()) / math.log(2) / sum(true.size_bytes.values())
        assert found[name].bits_per_byte.value == pytest.approx(total, rel=1e-5)
    assert found["packed"].kl.low > 0 and found["packed"].agreement.value < 1
