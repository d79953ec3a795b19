"""SentencePiece vocabularies in GGUF files, against the algorithm in plain Python and against llama.cpp."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf as package
import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from moiety.errors import FormatError, UsageError
from moiety.model import gguf
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from tests import gguf_models

TEXT = (
    "The cat's theme: theatre  of\tnaïve aaaaaaa bananas 😀 — 漢字, anaanaana 1234567\r\n <s>end</s> <0x41> "
)
Rows = tuple[tuple[str, float, int], ...]


def by_scores(rows: Rows, text: str, space: bool) -> list[int]:
    """The definition: join the two neighbours whose token scores best, the leftmost of equals, until none can be."""
    number = {piece: token for token, (piece, _, kind) in enumerate(rows) if kind == 1}
    score = [one[1] for one in rows]
    symbols = list((" " * space + text).replace(" ", "▁")) if text else []
    while True:
        joins = [(i, number.get(symbols[i] + symbols[i + 1])) for i in range(len(symbols) - 1)]
        found = [(-score[token], i) for i, token in joins if token is not None]
        if not found:
            break
        i = min(found)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    tokens = []
    for symbol in symbols:
        tokens += [number[symbol]] if symbol in number else [3 + byte for byte in symbol.encode()]
    return tokens


def file_of(
    folder: Path, rows: Rows, changes: dict[str, Any] | None = None, drop: tuple[str, ...] = ()
) -> Path:
    values: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [row[0] for row in rows],
        "scores": [row[1] for row in rows],
        "token_type": [row[2] for row in rows],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **(changes or {}),
    }
    writer = package.GGUFWriter(folder / "it.gguf", "llama")
    for key, value in values.items():
        if key in drop:
            continue
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "it.gguf"


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("shuffled", [False, True])
def test_tokens_are_those_of_the_algorithm(space: bool, shuffled: bool, tmp_path: Path) -> None:
    """Also when the scores are others than those it was made with, which pairs of one token must follow."""
    _, rows = gguf_models.sentencepiece(space)
    draw = random.Random(7)
    if shuffled:
        places = draw.sample(range(len(rows)), len(rows))
        rows = tuple(
            (piece, -float(place), kind) for (piece, _, kind), place in zip(rows, places, strict=True)
        )
    read = gguf.read_tokenizer(file_of(tmp_path, rows, {} if space else {"add_space_prefix": False}))
    letters = sorted({letter for piece, _, kind in rows if kind == 1 for letter in piece} - {"▁"}) + list(
        "  \n€"
    )
    texts = [
        TEXT,
        "",
        " ",
        "a",
        "  the",
        *("".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(200)),
    ]
    longest = 0
    for text in texts:
        tokens = read.encode(text)
        assert tokens == by_scores(rows, text, space), text
        assert read.bytes_of(tokens) == (b" " if space and text else b"") + text.encode()
        longest = max(longest, *(len(rows[token][0]) for token in tokens), 0)
    assert longest > 3 and read.adds_space == space
    assert (read.end_token, read.around, read.vocab_size) == ("</s>", (1,), len(rows))
    assert read.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("space", [True, False])
def test_out_and_in_again_is_the_same(space: bool, tmp_path: Path) -> None:
    ours, rows = gguf_models.sentencepiece(space)
    model = Transformer(gguf_models.config(vocab_size=len(rows) + 2))
    gguf.save_gguf(model, tmp_path / "it.gguf", tokenizer=ours)
    fields = package.GGUFReader(tmp_path / "it.gguf").fields
    found = {key.removeprefix("tokenizer.ggml."): one.contents() for key, one in fields.items()}
    assert found["model"] == "llama" and found["add_space_prefix"] == space and found["add_bos_token"] is True
    assert found["tokens"][: len(rows)] == [row[0] for row in rows]
    assert found["token_type"] == [row[2] for row in rows] + [5, 5]
    assert found["scores"][259 : len(rows)] == [row[1] for row in rows[259:]]
    back = gguf.read_tokenizer(tmp_path / "it.gguf")
    assert back.encode(TEXT) == ours.encode(TEXT) == by_scores(rows, TEXT, space)
    assert back.encode_with_special("<s>the</s>the") == [1, *ours.encode("the"), 2, *ours.encode("the")]
    gguf.save_gguf(model, tmp_path / "again.gguf", tokenizer=back)
    assert gguf.read_tokenizer(tmp_path / "again.gguf").fingerprint == back.fingerprint


def test_transformers_reads_the_tokenizer_of_such_a_file(tmp_path: Path) -> None:
    _, rows = gguf_models.sentencepiece()
    read = gguf.read_tokenizer(file_of(tmp_path, rows))
    read.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.replace("<s>", "").replace("</s>", "")
    assert theirs(text).input_ids == [1, *read.encode(text)]
    assert theirs.decode(read.encode(text)) == text
    assert Tokenizer.load(tmp_path).encode(text) == read.encode(text)


@pytest.mark.parametrize(
    ("changes", "drop", "said"),
    [
        ({}, ("scores",), "tokenizer.ggml.scores does not have a number for each"),
        ({"scores": [0.0, 1.0]}, (), "tokenizer.ggml.scores does not have a number for each"),
        ({"scores": "nan"}, (), "tokenizer.ggml.scores has numbers that are not finite"),
        ({"token_type": "normal"}, (), "tokenizer.ggml.tokens lacks the byte <0x00>"),
        ({"token_type": "high"}, (), "tokenizer.ggml.token_type is 7 for token 5; allowed is 1 to 6"),
        ({"tokens": "long"}, (), "has a token of more than 512 characters"),
        ({"tokens": "twice"}, (), "tokenizer.ggml.tokens has '<s>' twice"),
        ({"model": "t5"}, (), "tokenizer.ggml.model is 't5'"),
        ({}, ("eos_token_id",), "eos_token_id is missing"),
    ],
)
def test_damaged_vocabularies_are_refused(
    changes: dict[str, Any], drop: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    _, rows = gguf_models.sentencepiece()
    tokens, scores, kinds = ([row[part] for row in rows] for part in range(3))
    wrong = {
        "nan": [*scores[:-1], float("nan")],
        "normal": [1] * len(rows),
        "high": [*kinds[:5], 7, *kinds[6:]],
        "long": [*tokens[:-1], "x" * 600],
        "twice": [*tokens[:-1], "<s>"],
    }
    given = {
        key: wrong.get(value, value) if isinstance(value, str) else value for key, value in changes.items()
    }
    with pytest.raises(FormatError, match=f"it.gguf: .*{said}"):
        gguf.read_tokenizer(file_of(tmp_path, rows, given, drop))


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    ours, rows = gguf_models.sentencepiece()
    inner = tokenizers.Tokenizer.from_str(ours.to_json())
    inner.pre_tokenizer = pre_tokenizers.Digits()
    model = Transformer(gguf_models.config(vocab_size=len(rows)))
    with pytest.raises(UsageError, match="no way to say how this tokenizer treats text: Digits"):
        gguf.save_gguf(model, tmp_path / "it.gguf", tokenizer=Tokenizer(inner, end_token="</s>"))
    assert not (tmp_path / "it.gguf").exists()
    said = ours.to_json().replace("<0x07>", "<seven>")
    with pytest.raises(FormatError, match="lacks <0x07>"):
        Tokenizer(tokenizers.Tokenizer.from_str(said), end_token="</s>")
