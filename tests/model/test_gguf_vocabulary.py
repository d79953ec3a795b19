"""The vocabulary inside GGUF files: out and in again, known ways of splitting, damaged lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package
import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from moiety.errors import FormatError, UsageError
from moiety.model import gguf
from moiety.model.gguf import vocabulary
from moiety.model.tokenizer import END_OF_TEXT, Tokenizer, train_tokenizer
from moiety.model.transformer import Transformer
from tests import gguf_models

TEXT = "The year 2024 wasn't  like 1999:\n\n\tWE'LL see; naïve café — 漢字かな 한국어 😀!? x=3.14e-10 #don't\r\n  end"


def file_of(tmp_path: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> Path:
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": ["<end>", "a", "b", "ab", "<own>", "<no>"],
        "token_type": [3, 1, 1, 1, 4, 5],
        "merges": ["a b"],
        "eos_token_id": 0,
        **changes,
    }
    writer = package.GGUFWriter(tmp_path / "it.gguf", "llama")
    for key, value in values.items():
        if key in drop:
            continue
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "it.gguf"


def test_our_own_tokenizer_comes_back_equal(tmp_path: Path) -> None:
    ours = train_tokenizer([TEXT * 3], 400)
    model = Transformer(gguf_models.config(vocab_size=ours.vocab_size + 3))
    gguf.save_gguf(model, tmp_path / "it.gguf", tokenizer=ours, chat_template="{{ messages }}")
    back = gguf.read_tokenizer(tmp_path / "it.gguf")
    assert back.encode(TEXT) == ours.encode(TEXT) and back.end_id == ours.end_id
    assert back.encode(f"a{END_OF_TEXT}b") == ours.encode(f"a{END_OF_TEXT}b")
    assert back.vocab_size == model.config.vocab_size
    assert back.byte_counts()[: ours.vocab_size] == ours.byte_counts()
    assert gguf.read_chat_template(tmp_path / "it.gguf") == "{{ messages }}"
    assert gguf.read_special_tokens(tmp_path / "it.gguf") == {
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
    }
    gguf.save_gguf(model, tmp_path / "again.gguf", tokenizer=back)
    assert gguf.read_tokenizer(tmp_path / "again.gguf").fingerprint == back.fingerprint


@pytest.mark.parametrize("name", vocabulary.SPLITS)
def test_every_way_of_splitting_writes_and_reads(name: str, tmp_path: Path) -> None:
    """Read under a name and written again, it is the same tokenizer, under a name that means the same."""
    start = train_tokenizer([TEXT * 3], 400)
    model = Transformer(gguf_models.config(vocab_size=400))
    gguf.save_gguf(model, tmp_path / "start.gguf", tokenizer=start)
    said = {
        field.name.removeprefix("tokenizer.ggml."): field
        for field in package.GGUFReader(tmp_path / "start.gguf").fields.values()
    }
    lists = {key: said[key].contents() for key in ("tokens", "token_type", "merges")}
    first = gguf.read_tokenizer(file_of(tmp_path, {**lists, "pre": name}))
    assert first.decode(first.encode(TEXT)) == TEXT
    gguf.save_gguf(model, tmp_path / "again.gguf", tokenizer=first)
    second = gguf.read_tokenizer(tmp_path / "again.gguf")
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["ab", " 123", " it", "'s", " ", " x"]),
        ("smollm", ["ab", " ", "1", "2", "3", " it", "'s", " ", " x"]),
        ("qwen2", ["ab", " ", "1", "2", "3", " it", "'s", " ", " x"]),
        ("llama-bpe", ["ab", " ", "123", " it", "'s", " ", " x"]),
        ("gpt-4o", ["ab", " ", "123", " it's", " ", " x"]),
        ("deepseek-v3", ["ab", " ", "123", " it", "'s", " ", " x"]),
    ],
)
def test_pieces_of_each_way(name: str, pieces: list[str]) -> None:
    splitter = vocabulary._splitter(vocabulary.SPLITS[name])
    found = [piece.replace("Ġ", " ") for piece, _ in splitter.pre_tokenize_str("ab 123 it's  x")]
    assert found == pieces


def test_kinds_of_tokens(tmp_path: Path) -> None:
    read = gguf.read_tokenizer(file_of(tmp_path, {}))
    assert read.encode("ab<own>b<end>") == [3, 4, 2]  # letters of a special token stay letters, unknown here
    assert read.bytes_of([0, 3, 4, 5]) == b"ab<own>"
    assert read.end_id == 0


def test_a_model_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    gguf.save_gguf(gguf_models.model("llama-tied"), tmp_path / "it.gguf")
    with pytest.raises(FormatError, match=r"it.gguf: tokenizer.ggml.model is 'none'; allowed is 'gpt2'"):
        gguf.read_tokenizer(tmp_path / "it.gguf")
    assert gguf.read_chat_template(tmp_path / "it.gguf") is None


@pytest.mark.parametrize(
    ("changes", "drop", "said"),
    [
        ({"model": "llama"}, (), "tokenizer.ggml.model is 'llama'"),
        ({"pre": "chameleon"}, (), "tokenizer.ggml.pre is 'chameleon'"),
        ({}, ("pre",), "tokenizer.ggml.pre is None"),
        ({}, ("tokens",), "tokenizer.ggml.tokens is no list"),
        ({"tokens": [1, 2]}, (), "tokenizer.ggml.tokens is no list"),
        ({"tokens": ["<end>", "a", "b", "ab", "a", "c"]}, (), "tokenizer.ggml.tokens has 'a' twice"),
        ({"tokens": ["<end>", "a b", "b", "ab", "a", "c"], "merges": ["a b"]}, (), "token 1 is 'a b'"),
        ({"token_type": [3, 1]}, (), "does not have a number for each of 6 tokens"),
        ({"token_type": [3, 1, 1, 1, 9, 1]}, (), "tokenizer.ggml.token_type is 9 for token 4"),
        ({"merges": ["a b", "b b"]}, (), r"tokenizer.ggml.merges\[1\] is 'b b'"),
        ({"merges": ["ab"]}, (), r"tokenizer.ggml.merges\[0\] is 'ab'"),
        ({"merges": "a b"}, (), "tokenizer.ggml.merges is no list"),
        ({"eos_token_id": 6}, (), "eos_token_id is 6; tokens are 0 to 5"),
        ({}, ("eos_token_id",), "eos_token_id is missing"),
    ],
)
def test_damaged_vocabularies_are_refused(
    changes: dict[str, Any], drop: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=f"it.gguf: .*{said}"):
        gguf.read_tokenizer(file_of(tmp_path, changes, drop))


def test_a_split_without_a_name_is_refused(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(gguf_models.tokenizer().to_json())
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("x"), behavior="isolated")
    odd = Tokenizer(inner, end_token=gguf_models.END)
    with pytest.raises(UsageError, match="no name for how this tokenizer splits text: x"):
        gguf.save_gguf(gguf_models.model("llama-tied"), tmp_path / "it.gguf", tokenizer=odd)
    assert not (tmp_path / "it.gguf").exists()
