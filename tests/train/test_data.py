"""Tokens on disk: exact bytes, right domains, each sequence once an epoch, resume without a seam."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.errors import DataError, FormatError, MoietyError, StorageError, UsageError
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.train.corpus import Document, Split, arithmetic, split_held_out
from moiety.train.data import IGNORED, Batch, TokenData, build, open_tokens, prepare_tokenizer

WORDS = Document("words", "Ein Wort, ein Satz, ein Tag: größer wird das Ganze nie. 🙂\n" * 40)
NOTES = [Document("notes", f"Note {i} says that {i * i} is the square of {i}.\n" * 3) for i in range(60)]
SPLIT = split_held_out([*NOTES, *arithmetic(20_000), WORDS])
TOKENIZER = train_tokenizer([document.text for document in SPLIT.train], 400)
FILES = (
    "held_out.documents.npy",
    "held_out.tokens.bin",
    "manifest.json",
    "token_bytes.npy",
    "train.documents.npy",
    "train.tokens.bin",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return build(SPLIT, TOKENIZER, tmp_path_factory.mktemp("tokens"))


def _stream(documents: tuple[Document, ...]) -> tuple[list[int], list[str]]:
    """The file's tokens and their domains, worked out the slow way."""
    tokens, domains = [TOKENIZER.end_id], []
    for document in sorted(documents, key=lambda one: one.domain):
        ids = [*TOKENIZER.encode(document.text), TOKENIZER.end_id]
        domains += [document.domain] * (len(ids) + (not domains))
        tokens += ids
    return tokens, domains


def _rows(batches: list[Batch]) -> list[tuple[bytes, bytes, bytes]]:
    return [
        (tokens.numpy().tobytes(), targets.numpy().tobytes(), domain.numpy().tobytes())
        for batch in batches
        for tokens, targets, domain in zip(batch.tokens_BS, batch.targets_BS, batch.domain_BS, strict=True)
    ]


def test_sizes_are_those_of_the_texts(data: TokenData) -> None:
    assert data.domains == ("arithmetic", "notes", "words")
    for name, documents in (("train", SPLIT.train), ("held_out", SPLIT.held_out)):
        for domain, found in data.sizes(name).items():
            members = [document for document in documents if document.domain == domain]
            assert found == {
                "documents": len(members),
                "tokens": sum(len(TOKENIZER.encode(one.text)) + 1 for one in members),
                "size_bytes": sum(one.size_bytes for one in members),
            }
    assert data.train_tokens == 1 + sum(sizes["tokens"] for sizes in data.sizes().values())


def test_types_and_shapes(data: TokenData) -> None:
    batch = next(data.batches(B=3, S=17, seed=0))
    for tensor, dtype in (
        (batch.tokens_BS, torch.int64),
        (batch.targets_BS, torch.int64),
        (batch.domain_BS, torch.int32),
    ):
        assert (tensor.shape, tensor.dtype) == ((3, 17), dtype)
        assert tensor.is_contiguous()
    assert torch.equal(batch.tokens_BS[:, 1:], batch.targets_BS[:, :-1])


@pytest.mark.parametrize("S", [1, 16, 129])
def test_each_sequence_once_an_epoch_with_its_domains(data: TokenData, S: int) -> None:
    tokens, domains = _stream(SPLIT.train)
    index = {name: number for number, name in enumerate(data.domains)}
    expected = sorted(
        (
            np.array(tokens[at : at + S], np.int64).tobytes(),
            np.array(tokens[at + 1 : at + S + 1], np.int64).tobytes(),
            np.array([index[name] for name in domains[at : at + S]], np.int32).tobytes(),
        )
        for at in range(0, len(tokens) - S, S)
    )
    count = data.sequences(S)
    assert count == len(expected)
    for epoch in range(2):
        (batch,) = islice(data.batches(B=count, S=S, seed=5, start=epoch * count), 1)
        assert sorted(_rows([batch])) == expected
        assert (batch.epoch, batch.sequences_seen) == (epoch, (epoch + 1) * count)
        assert batch.target_bytes == len(TOKENIZER.bytes_of(batch.targets_BS.flatten().tolist()))


def test_order_changes_with_seed_and_epoch(data: TokenData) -> None:
    count = data.sequences(32)
    first = _rows(list(islice(data.batches(B=1, S=32, seed=1), 2 * count)))
    assert first[:count] != first[count:]
    assert _rows(list(islice(data.batches(B=1, S=32, seed=2), count))) != first[:count]
    assert _rows(list(islice(data.batches(B=1, S=32, seed=1), 2 * count))) == first


def test_order_is_fixed_for_good(data: TokenData) -> None:
    """A later version must resume the runs of an earlier one: raw Philox bits, ranked."""
    tokens, _ = _stream(SPLIT.train)
    count = data.sequences(32)
    place = np.argsort(np.random.Philox(key=7 + (3 << 64)).random_raw(count), kind="stable")
    (batch,) = islice(data.batches(B=1, S=32, seed=7, start=3 * count + 4), 1)
    assert batch.tokens_BS[0].tolist() == tokens[place[4] * 32 : place[4] * 32 + 32]


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 9),
    S=st.sampled_from([7, 64, 500]),
    seed=st.integers(0, 2**64 - 1),
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=6),
)
def test_any_chain_of_resumes_is_the_one_stream(
    data: TokenData, B: int, S: int, seed: int, pieces: list[int]
) -> None:
    whole = _rows(list(islice(data.batches(B=B, S=S, seed=seed), sum(pieces))))
    resumed: list[tuple[bytes, bytes, bytes]] = []
    seen = 0
    for piece in pieces:
        part = list(islice(data.batches(B=B, S=S, seed=seed, start=seen), piece))
        seen = part[-1].sequences_seen
        resumed += _rows(part)
    assert resumed == whole
    assert seen == B * sum(pieces)


def test_resume_across_epochs_and_with_another_batch_size(data: TokenData) -> None:
    count = data.sequences(256)
    whole = _rows(list(islice(data.batches(B=1, S=256, seed=3), 4 * count + 1)))
    for start in (0, 1, count - 1, count, count + 1, 3 * count - 2):
        for B in (1, 2, count, count + 3):
            (batch,) = islice(data.batches(B=B, S=256, seed=3, start=start), 1)
            assert _rows([batch]) == whole[start : start + B]
            assert batch.epoch == start // count


@pytest.mark.parametrize("S", [1, 13, 128, 100_000])
@pytest.mark.parametrize("B", [1, 4])
def test_evaluation_scores_each_held_out_byte_once(data: TokenData, B: int, S: int) -> None:
    for number, domain in enumerate(data.domains):
        texts = [one for one in SPLIT.held_out if one.domain == domain]
        batches = list(data.evaluation(domain, B=B, S=S))
        scored = torch.cat([batch.targets_BS.flatten() for batch in batches])
        scored = scored[scored != IGNORED]
        assert TOKENIZER.bytes_of(scored.tolist()) == "".join(one.text for one in texts).encode()
        assert sum(batch.target_bytes for batch in batches) == sum(one.size_bytes for one in texts) > 0
        assert all((batch.domain_BS == number).all() for batch in batches)
        inputs = torch.cat([batch.tokens_BS.flatten() for batch in batches])
        targets = torch.cat([batch.targets_BS.flatten() for batch in batches])
        follows = targets[:-1] != IGNORED
        assert torch.equal(inputs[1:][follows], targets[:-1][follows])
        assert inputs[0] == TOKENIZER.end_id
        assert batches[-1].sequences_seen == sum(len(batch.tokens_BS) for batch in batches)


def test_evaluation_limit(data: TokenData) -> None:
    whole = list(data.evaluation("arithmetic", B=1, S=20))
    assert len(whole) > 6
    some = list(data.evaluation("arithmetic", B=4, S=20, limit=6))
    assert [len(batch.tokens_BS) for batch in some] == [4, 2]
    assert _rows(some) == _rows(whole[:6])
    assert sum(one.target_bytes for one in some) == sum(one.target_bytes for one in whole[:6])


def test_second_build_reuses_the_files(tmp_path: Path) -> None:
    first = build(SPLIT, TOKENIZER, tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(stamps) == list(FILES)
    second = build(SPLIT, TOKENIZER, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    assert (second.fingerprint, second.notes) == (first.fingerprint, first.notes)
    assert _rows([next(second.batches(B=9, S=9, seed=9))]) == _rows([next(first.batches(B=9, S=9, seed=9))])


def test_other_content_is_built_again_and_said(tmp_path: Path) -> None:
    first = build(SPLIT, TOKENIZER, tmp_path)
    moved = Split(SPLIT.train[1:], SPLIT.held_out, 0, ())
    renamed = Split((Document("other", SPLIT.train[0].text), *SPLIT.train[1:]), SPLIT.held_out, 0, ())
    coarser = train_tokenizer([document.text for document in SPLIT.train], 300)
    seen = {first.fingerprint}
    for split, tokenizer in ((moved, TOKENIZER), (renamed, TOKENIZER), (SPLIT, coarser)):
        again = build(split, tokenizer, tmp_path)
        assert "other texts or options" in again.notes[-1]
        seen.add(again.fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_mended(tmp_path: Path, name: str, damage: str) -> None:
    split = Split(tuple(NOTES[:4]), tuple(NOTES[4:5]), 0, ())
    build(split, TOKENIZER, tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-3])
    with pytest.raises(FormatError) as caught:
        open_tokens(tmp_path)
    assert caught.value.hint and name in str(caught.value)
    mended = build(split, TOKENIZER, tmp_path)
    assert any("damaged" in note for note in mended.notes) or (name, damage) == ("manifest.json", "remove")
    assert open_tokens(tmp_path).fingerprint == mended.fingerprint


def test_manifest_of_another_layout(tmp_path: Path) -> None:
    build(SPLIT, TOKENIZER, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for changed in ([], {}, {**manifest, "layout": 2}, {**manifest, "dtype": "<u4"}):
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(FormatError, match=r"manifest\.json"):
            open_tokens(tmp_path)


def test_wide_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(TOKENIZER._inner.to_str())
    inner.add_tokens([f"<{number}>" for number in range(70_000)])
    wide = Tokenizer(inner, end_token=TOKENIZER.end_token)
    text = "<69999> and <0>\n" * 9
    data = build(Split((Document("a", text),), (), 0, ()), wide, tmp_path)
    batch = next(data.batches(B=1, S=20, seed=0))
    assert int(batch.tokens_BS.max()) > 1 << 16
    assert data.sizes()["a"]["size_bytes"] == len(text)


def test_too_little_text_says_how_much(tmp_path: Path) -> None:
    data = build(Split((Document("a", "xyz"),), (), 0, ()), train_tokenizer(["q"], 257), tmp_path)
    assert next(data.batches(B=1, S=4, seed=0)).tokens_BS.shape == (1, 4)
    with pytest.raises(DataError, match="has 5 tokens; one sequence of 5 needs 6") as caught:
        data.batches(B=1, S=5, seed=0)
    assert caught.value.hint
    with pytest.raises(DataError, match="nothing of domain 'a'"):
        data.evaluation("a", B=1, S=4)


def test_bad_calls(data: TokenData, tmp_path: Path) -> None:
    for B, S, seed, start in ((0, 4, 0, 0), (1, 0, 0, 0), (1, 4, -1, 0), (1, 4, 1 << 64, 0), (1, 4, 0, -1)):
        with pytest.raises(UsageError):
            data.batches(B=B, S=S, seed=seed, start=start)
    for domain, B, S, limit in (
        ("nobody", 1, 4, 1),
        ("notes", 0, 4, 1),
        ("notes", 1, 0, 1),
        ("notes", 1, 4, 0),
    ):
        with pytest.raises(UsageError):
            data.evaluation(domain, B=B, S=S, limit=limit)
    with pytest.raises(UsageError):
        data.sizes("test")
    with pytest.raises(DataError, match="no training"):
        build(Split((), (), 0, ()), TOKENIZER, tmp_path)
    with pytest.raises(FormatError, match=r"no manifest\.json"):
        open_tokens(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        build(SPLIT, TOKENIZER, tmp_path / "file")


def test_tokenizer_is_kept_until_the_texts_change(tmp_path: Path) -> None:
    first = prepare_tokenizer(SPLIT, 300, tmp_path)
    stamp = (tmp_path / "tokenizer.json").stat().st_mtime_ns
    assert prepare_tokenizer(SPLIT, 300, tmp_path).fingerprint == first.fingerprint
    assert (tmp_path / "tokenizer.json").stat().st_mtime_ns == stamp
    content = (tmp_path / "tokenizer.json").read_bytes()
    for damaged in (content[:100], content.replace(b'"Ein', b'"Eln'), b"{}"):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        assert prepare_tokenizer(SPLIT, 300, tmp_path).fingerprint == first.fingerprint
    assert (tmp_path / "tokenizer.json").read_bytes() == content
    fewer = Split(SPLIT.train[:20], (), 0, ())
    prints = [
        first.fingerprint,
        prepare_tokenizer(SPLIT, 280, tmp_path).fingerprint,
        prepare_tokenizer(fewer, 280, tmp_path).fingerprint,
    ]
    assert all(one != other for one, other in pairwise(prints))
    with pytest.raises(MoietyError):
        prepare_tokenizer(SPLIT, 10, tmp_path)
