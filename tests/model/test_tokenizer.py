"""The tokenizer: exact on every text, the same every time, and readable by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from moiety.errors import ConfigError, DataError, FormatError
from moiety.model.tokenizer import END_OF_TEXT, TextStream, Tokenizer, train_tokenizer

TEXTS = [
    "The cat sat on the mat, and the mat was where the cat sat.\n" * 20,
    "def add(first, second):\n    return first + second\n" * 20,
    "Größe, naïve, 日本語のテキスト, سلام, 🙂🏽 и кот.\n" * 20,
]
TOKENIZER = train_tokenizer(TEXTS, 340)


def test_end_token_is_first_and_size_is_as_asked() -> None:
    assert (TOKENIZER.end_id, TOKENIZER.vocab_size, TOKENIZER.end_token) == (0, 340, END_OF_TEXT)
    assert train_tokenizer(["ab"], 10_000).vocab_size < 300
    assert train_tokenizer(TEXTS, 257).vocab_size == 257


def test_same_texts_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, 340).fingerprint == TOKENIZER.fingerprint
    assert train_tokenizer(TEXTS, 341).fingerprint != TOKENIZER.fingerprint


def test_learns_from_a_share_of_every_text() -> None:
    sampled = train_tokenizer(TEXTS, 300, sample_characters=sum(map(len, TEXTS)) // 10)
    for text in TEXTS:
        assert len(sampled.encode(text)) < len(text.encode())


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip_and_bytes_are_exact(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    counts = TOKENIZER.byte_counts()
    assert TOKENIZER.decode(tokens) == text
    assert TOKENIZER.bytes_of(tokens) == text.encode()
    assert sum(counts[token] for token in tokens) == len(text.encode())
    assert "".join(TOKENIZER.stream(tokens)) == text
    assert TOKENIZER.end_id not in tokens


def test_every_byte_has_a_token_and_end_writes_none() -> None:
    singles = {TOKENIZER.bytes_of([token]) for token in range(TOKENIZER.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= singles
    assert TOKENIZER.bytes_of([0]) == b"" and TOKENIZER.byte_counts()[0] == 0


def test_the_letters_of_the_end_token_stay_letters() -> None:
    text = f"before {END_OF_TEXT} after"
    tokens = TOKENIZER.encode(text)
    assert 0 not in tokens and TOKENIZER.decode(tokens) == text


def test_digits_are_tokens_of_their_own() -> None:
    learnt = train_tokenizer(["2024 1999 2024 1999 " * 50], 400)
    assert learnt.encode("19992024") == [learnt.encode(digit)[0] for digit in "19992024"]


def test_batch_equals_one_by_one() -> None:
    texts = [*TEXTS, "", "x"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_stream_never_emits_half_a_character() -> None:
    single = train_tokenizer(["ab"], 257)  # every token is one byte
    stream = TextStream(single)
    assert [stream.push(token) for token in single.encode("a🙂é")] == ["a", "", "", "", "🙂", "", "é"]
    assert stream.finish() == ""
    cut = single.encode("🙂")[:2]
    assert list(single.stream(cut)) == ["\ufffd"] and single.decode(cut) == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
def test_stream_equals_decode_for_any_tokens(tokens: list[int]) -> None:
    assert "".join(TOKENIZER.stream(tokens)) == TOKENIZER.decode(tokens)


@pytest.mark.parametrize("token", [-1, 340])
def test_token_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(DataError, match="outside the vocabulary of 340"):
        TOKENIZER.decode([token])


def test_saved_is_loaded_equal(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "deep" / "folder")
    for path in (tmp_path / "deep" / "folder", tmp_path / "deep" / "folder" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == TOKENIZER.fingerprint
        assert loaded.encode(TEXTS[2] + END_OF_TEXT) == TOKENIZER.encode(TEXTS[2] + END_OF_TEXT)
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_transformers_reads_it(tmp_path: Path) -> None:
    import transformers

    TOKENIZER.save(tmp_path)
    twin = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, " leading", "tabs\t\t 12345", "a , b .", "don't"):
        assert twin(text)["input_ids"] == TOKENIZER.encode(text)
        assert twin.decode(TOKENIZER.encode(text)) == text
    assert (twin.eos_token_id, twin.pad_token_id, len(twin)) == (0, 0, 340)


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_cut_file_is_an_error(tmp_path: Path, keep: int) -> None:
    TOKENIZER.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"not whole JSON") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds list"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{}", "does not hold a BPE"),
        (b'{"model": {"type": "Unigram", "vocab": []}}', "does not hold a BPE"),
        (b'{"model": {"type": "BPE", "vocab": 3}}', "is not a tokenizer"),
    ],
)
def test_file_of_another_kind_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        Tokenizer.load(tmp_path)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist"):
        Tokenizer.load(tmp_path)


def test_end_token_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    assert Tokenizer.load(tmp_path).end_id == 0
    for named in ("</s>", None, 3):
        config.write_text(json.dumps({"eos_token": named}))
        with pytest.raises(FormatError, match="end token"):
            Tokenizer.load(tmp_path)


def test_vocabulary_not_of_bytes_is_an_error(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.BPE(vocab={"▁the": 0, END_OF_TEXT: 1}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError, match="byte-level"):
        Tokenizer.load(tmp_path)


def test_bad_training_arguments() -> None:
    with pytest.raises(ConfigError, match="257"):
        train_tokenizer(TEXTS, 256)
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(texts, 300)
