"""Samples: packed, padded and alone they are the same, in every loss and gradient; the order follows from a seed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.config import ModelConfig
from moiety.errors import ConfigError, DataError, FormatError, UsageError
from moiety.model.transformer import Transformer
from moiety.moe.balance import load_balance_loss, z_loss
from moiety.observe.stats import health
from moiety.train.data import IGNORED, Batch
from moiety.train.finetune_options import FinetuneOptions
from moiety.train.options import TrainOptions
from moiety.train.preference import Objective, answer_nats, objective, preference_loss
from moiety.train.routers import forward
from moiety.train.samples import Prepared, Samples, prepare
from tests.tiny import CONFIGS
from tests.train.chatting import chat, lines, tokenizer

ANSWERS = ("uno", "due", "tre quattro", "the cat sat on the mat", "x", "zwei eins")


def prepared(folder: Path, count: int = 23, *, length: int = 100, **options: Any) -> Prepared:
    """Chats of uneven length from two files."""
    values = [
        {"messages": chat("one " * (n % 5 + 1) + str(n), ANSWERS[n % 6], *(["two", "due"] * (n % 3 == 0)))}
        for n in range(count)
    ]
    half = count // 2
    sources = [
        lines(folder / "a.jsonl", values[:half]),
        lines(folder / "b.jsonl", values[half:]) + ":domain=other",
    ]
    settings = FinetuneOptions(**{"held_out": 0.0, **options})
    return prepare(sources, tokenizer(), settings, length)


def pairs(folder: Path, count: int = 7, **options: Any) -> Samples:
    values = [
        {"prompt": f"the {n}", "chosen": f" cat {n}", "rejected": " " + ANSWERS[n % 6]} for n in range(count)
    ]
    settings = FinetuneOptions(**{"held_out": 0.0, **options})
    return prepare([lines(folder / "p.jsonl", values)], tokenizer(), settings, 60).samples


def everything(samples: Samples, *, room: int = 10_000) -> Batch:
    """One batch of all units, in their order."""
    (batch,) = samples.batches(B=1, S=room, seed=0) if samples.most_units else [_first(samples, room)]
    return batch


def _first(samples: Samples, room: int) -> Batch:
    batch = next(samples.batches(B=1, S=room, seed=0))
    assert batch.sequences_seen == samples.units
    return batch


def net_of(config: ModelConfig, vocabulary: int) -> Transformer:
    torch.manual_seed(1)
    return Transformer(replace(config, vocab_size=vocabulary)).double()


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def alone(model: Transformer, batch: Batch) -> tuple[Tensor, list[Tensor], list[Any]]:
    """The slow definition: each sample through the model by itself. Loss, logits, routings."""
    total, logits, routings = torch.zeros((), dtype=torch.float64), [], []
    for tokens, targets in zip(
        batch.tokens_BS.split(batch.lengths, 1), batch.targets_BS.split(batch.lengths, 1), strict=True
    ):
        output = model(tokens, seed=3)
        log_p = output.logits.log_softmax(-1)[0]
        for place, target in enumerate(targets[0].tolist()):
            if target != IGNORED:
                total = total - log_p[place, target]
        logits.append(output.logits[0])
        routings.append(output.routing)
    return total, logits, routings


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_padded_and_alone_are_the_same(name: str, tmp_path: Path) -> None:
    samples = prepared(tmp_path, 9).samples
    packed = everything(samples)
    samples.pack = False
    padded = everything(samples)
    assert packed.tokens == padded.tokens < padded.tokens_BS.numel() and packed.scored == padded.scored
    model = net_of(CONFIGS[name], tokenizer().vocab_size)
    slow, logits, _ = alone(model, packed)
    true = gradients(model, slow)
    for batch in (packed, padded):
        output = model(batch.tokens_BS, lengths=batch.lengths, valid_BS=batch.valid_BS, seed=3)
        found = output.logits[0] if batch.valid_BS is None else output.logits[batch.valid_BS]
        torch.testing.assert_close(found, torch.cat(logits), rtol=1e-9, atol=1e-9)
        loss = output.cross_entropy(batch.targets_BS)
        torch.testing.assert_close(loss, slow, rtol=1e-10, atol=1e-10)
        mine = gradients(model, loss)
        assert mine.keys() == true.keys()
        for parameter, gradient in true.items():
            torch.testing.assert_close(mine[parameter], gradient, rtol=1e-8, atol=1e-9, msg=parameter)


@pytest.mark.parametrize(
    "changes", [{"window": 4}, {"window": 4, "chunked": True}, {"sinks": True}, {"logit_cap": 5.0}]
)
def test_windows_and_sinks_do_not_see_other_samples(changes: dict[str, Any], tmp_path: Path) -> None:
    config = CONFIGS["mixtral"]
    config = replace(config, attention=replace(config.attention, **changes))
    batch = everything(prepared(tmp_path, 6).samples)
    model = net_of(config, tokenizer().vocab_size)
    output = model(batch.tokens_BS, lengths=batch.lengths, seed=3)
    torch.testing.assert_close(output.logits[0], torch.cat(alone(model, batch)[1]), rtol=1e-9, atol=1e-9)


def test_another_sample_changes_nothing(tmp_path: Path) -> None:
    batch = everything(prepared(tmp_path, 5).samples)
    model = net_of(CONFIGS["mixtral"], tokenizer().vocab_size)
    before = model(batch.tokens_BS, lengths=batch.lengths).logits
    changed = batch.tokens_BS.clone()
    first = batch.lengths[0]
    changed[0, :first] = (changed[0, :first] + 7) % tokenizer().vocab_size
    after = model(changed, lengths=batch.lengths).logits
    torch.testing.assert_close(after[0, first:], before[0, first:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[0, :first], before[0, :first])
    leaking = model(batch.tokens_BS).logits  # without lengths the samples do see each other
    assert not torch.allclose(leaking[0, first:], before[0, first:])


def test_balance_statistics_ignore_padding(tmp_path: Path) -> None:
    samples = prepared(tmp_path, 9).samples
    packed = everything(samples)
    samples.pack = False
    padded = everything(samples)
    model = net_of(CONFIGS["mixtral"], tokenizer().vocab_size)
    found = []
    for batch in (packed, padded):
        output = model(batch.tokens_BS, lengths=batch.lengths, valid_BS=batch.valid_BS, seed=3)
        model.zero_grad(set_to_none=True)
        losses = [
            function(one) for one in output.routing.values() for function in (load_balance_loss, z_loss)
        ]
        torch.stack(losses).sum().backward()
        gates = [
            one.grad for name, one in model.named_parameters() if ".gate." in name and one.grad is not None
        ]
        counts = torch.cat([one.counts_E for one in output.routing.values()])
        numbers = [health(one).numbers() for one in output.routing.values()]
        found.append((torch.stack(losses), torch.cat(gates), counts, numbers))
    (losses, gates, counts, numbers), (other_losses, other_gates, other_counts, other_numbers) = found
    torch.testing.assert_close(losses, other_losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gates, other_gates, rtol=1e-8, atol=1e-12)
    assert torch.equal(counts, other_counts) and gates.abs().max() > 0
    for one, other in zip(numbers, other_numbers, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_refused_lengths() -> None:
    model = net_of(CONFIGS["mixtral"], 61)
    tokens = torch.zeros(1, 6, dtype=torch.long)
    for lengths in ((3, 2), (6, 0), (7,)):
        with pytest.raises(UsageError, match="lengths are"):
            model(tokens, lengths=lengths)
    with pytest.raises(UsageError, match="lengths are"):
        model(tokens.view(2, 3), lengths=(3, 3))
    with pytest.raises(UsageError, match="neither cache nor padding"):
        model(tokens, lengths=(3, 3), valid_BS=torch.ones(1, 6, dtype=torch.bool))


def test_a_loss_of_each_sequence_wants_rows(tmp_path: Path) -> None:
    samples = prepared(tmp_path, 4).samples
    model = net_of(CONFIGS["mixtral"], tokenizer().vocab_size)
    for options in (TrainOptions(balance_scope="sequence"), TrainOptions(losses=("sequence=0.1",))):
        with pytest.raises(ConfigError, match="needs a row for each"):
            forward(model, everything(samples), options, step=0, place=0)
    samples.pack = False
    assert forward(
        model, everything(samples), TrainOptions(balance_scope="sequence"), step=0, place=0
    ).routing


@pytest.mark.parametrize("pack", [True, False])
def test_order_epochs_and_going_on(pack: bool, tmp_path: Path) -> None:
    samples = prepared(tmp_path, pack=pack).samples
    stream = list(itertools.islice(samples.batches(B=2, S=50, seed=4), 40))
    seen: list[tuple[int, ...]] = []
    for batch in stream:
        assert batch.tokens_BS.numel() <= 100
        rows = (
            batch.tokens_BS.split(batch.lengths, 1)
            if pack
            else [
                row[:count][None]
                for row, count in zip(batch.tokens_BS, batch.valid_BS.sum(1), strict=True)  # type: ignore[union-attr]
            ]
        )
        seen += [tuple(row[0].tolist()) for row in rows]
        assert batch.sequences_seen == len(seen)
    units = samples.units
    first, second = seen[:units], seen[units : 2 * units]
    assert sorted(first) == sorted(second) and first != second and len({*first}) == units
    for at in (3, 11, 20):
        again = next(samples.batches(B=2, S=50, seed=4, start=stream[at].sequences_seen))
        assert torch.equal(again.tokens_BS, stream[at + 1].tokens_BS)
        assert torch.equal(again.targets_BS, stream[at + 1].targets_BS)
        assert (again.sequences_seen, again.epoch) == (stream[at + 1].sequences_seen, stream[at + 1].epoch)
    other = next(samples.batches(B=2, S=50, seed=5))
    assert not torch.equal(other.tokens_BS.flatten()[:70], stream[0].tokens_BS.flatten()[:70])


def test_an_end(tmp_path: Path) -> None:
    samples = prepared(tmp_path).samples
    samples.most_units = 2 * samples.units + 5
    batches = list(samples.batches(B=2, S=50, seed=4))
    assert batches[-1].sequences_seen == samples.most_units
    assert samples.micro_batches(room=100, seed=4, units=samples.most_units) == len(batches)


def test_a_sample_larger_than_the_room_is_a_batch(tmp_path: Path) -> None:
    samples = prepared(tmp_path).samples
    for batch in itertools.islice(samples.batches(B=1, S=1, seed=0), 5):
        assert len(batch.lengths) == 1


def test_held_out_by_content(tmp_path: Path) -> None:
    values = [{"text": f"the cat sat {n % 40}"} for n in range(80)]
    found = prepare([lines(tmp_path / "a.jsonl", values)], tokenizer(), FinetuneOptions(held_out=0.3), 60)
    samples = found.samples
    sizes, held = samples.sizes()["a"], samples.sizes("held_out")["a"]
    assert sizes["documents"] + held["documents"] == 80 and 6 <= held["documents"] <= 44
    rows = {tuple(row.tolist()) for batch in samples.evaluation("a", B=4, S=50) for row in batch.tokens_BS}
    trained = {
        tuple(row[0].tolist())
        for batch in itertools.islice(samples.batches(B=4, S=50, seed=0), 20)
        for row in batch.tokens_BS.split(batch.lengths, 1)
    }
    assert rows and not rows & trained
    assert "40 samples are repeated" in found.notes


def test_files_and_refusals(tmp_path: Path) -> None:
    samples = prepared(tmp_path).samples
    samples.save(tmp_path / "s")
    again = Samples.load(
        tmp_path / "s", samples.domains, pack=True, beta=0.1, fingerprint=samples.fingerprint
    )
    assert again.domains == ("a", "other") and again.sizes() == samples.sizes()
    with pytest.raises(FormatError, match="not what the run was started with"):
        Samples.load(tmp_path / "s", samples.domains, pack=True, beta=0.1, fingerprint="x")
    with pytest.raises(FormatError, match="cannot read"):
        Samples.load(tmp_path / "none", samples.domains, pack=True, beta=0.1, fingerprint="x")
    with pytest.raises(UsageError, match="must be positive"):
        samples.batches(B=0, S=1, seed=0)
    bad = lines(tmp_path / "bad.jsonl", [{"text": "fine"}, {"messages": chat("one", "")}])
    with pytest.raises(DataError, match=r"bad.jsonl, line 2: message 1 is an answer without words"):
        prepare([bad], tokenizer(), FinetuneOptions(), 60)
    both = lines(tmp_path / "both.jsonl", [{"text": "fine"}, {"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="line 2: pairs and single answers"):
        prepare([both], tokenizer(), FinetuneOptions(), 60)
    with pytest.raises(DataError, match="no sample to train on"):
        prepare([lines(tmp_path / "long.jsonl", [{"text": "x " * 99}])], tokenizer(), FinetuneOptions(), 60)
    with pytest.raises(DataError, match="all 1 samples would be held out"):
        prepare(
            [lines(tmp_path / "one.jsonl", [{"text": "x"}])], tokenizer(), FinetuneOptions(held_out=0.999), 60
        )


@pytest.mark.parametrize("pack", [True, False])
def test_preference_against_its_definition(pack: bool, tmp_path: Path) -> None:
    """Value and gradient of DPO (arXiv 2305.18290 eq. 7), by automatic differentiation of whole log-probabilities."""
    samples = pairs(tmp_path)
    generator = torch.Generator().manual_seed(3)
    reference_N = -20 * torch.rand(2 * samples.units, dtype=torch.float64, generator=generator)
    samples = samples.with_reference(reference_N)
    samples.beta = 0.3
    packed = everything(samples)
    samples.pack = pack
    batch = everything(samples)
    assert batch.preference is not None and batch.scored == 7
    model = net_of(CONFIGS["mixtral"], tokenizer().vocab_size)
    log_p = []
    for tokens, targets in zip(
        packed.tokens_BS.split(packed.lengths, 1), packed.targets_BS.split(packed.lengths, 1), strict=True
    ):
        one = model(tokens, seed=3).logits.log_softmax(-1)[0]
        log_p.append(
            torch.stack([one[at, t] for at, t in enumerate(targets[0].tolist()) if t != IGNORED]).sum()
        )
    slow, right = torch.zeros((), dtype=torch.float64), 0
    for pair in range(7):
        better, worse = 2 * pair, 2 * pair + 1
        reference = batch.preference.reference_N
        margin = 0.3 * ((log_p[better] - reference[better]) - (log_p[worse] - reference[worse]))
        slow, right = slow - (1 / (1 + (-margin).exp())).log(), right + int(margin > 0)
    true = gradients(model, slow)
    output = model(batch.tokens_BS, lengths=batch.lengths, valid_BS=batch.valid_BS, seed=3)
    found: Objective = objective(output, batch)
    assert found.value == pytest.approx(slow.item(), rel=1e-9) and found.preferred == right and 0 < right < 7
    mine = gradients(model, found.loss)
    assert mine.keys() == true.keys()
    for name, gradient in true.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-7, atol=1e-9, msg=name)
    torch.testing.assert_close(answer_nats(output, batch), -torch.stack(log_p).detach(), rtol=1e-9, atol=1e-9)


def test_without_change_the_preference_is_even() -> None:
    nats_N = torch.tensor([3.0, 5.0, 2.0, 2.5], dtype=torch.float64)
    assert preference_loss(nats_N, -nats_N, 0.7).item() == pytest.approx(2 * 0.6931471805599453, rel=1e-12)
    better = nats_N - torch.tensor([1.0, 0.0, 0.0, -2.0])
    assert preference_loss(better, -nats_N, 0.7).item() < 1.0
