"""The vocabulary inside GGUF files: out and in again, known ways of splitting, damaged lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf as package
import pytest
import tokenizers
import transformers
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
        ({"model": "bert"}, (), "tokenizer.ggml.model is 'bert'"),
        ({"model": "llama"}, (), "tokenizer.ggml.tokens lacks the byte <0x00>"),
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


@pytest.mark.parametrize(
    ("frame", "begins", "ends"),
    [
        ("<s> $A", True, False),
        (f"<s> $A {gguf_models.END}", True, True),
        ("", False, False),
        ("$A", False, False),
    ],
)
def test_special_tokens_are_written(frame: str, begins: bool, ends: bool, tmp_path: Path) -> None:
    ours = gguf_models.chat_tokenizer(frame)
    model = Transformer(gguf_models.config(vocab_size=ours.vocab_size + 2))
    gguf.save_gguf(
        model, tmp_path / "it.gguf", tokenizer=ours, chat_template="{{ bos_token }}", ends=(104, 0, 105)
    )
    fields = package.GGUFReader(tmp_path / "it.gguf").fields
    found = {key.removeprefix("tokenizer."): one.contents() for key, one in fields.items()}
    pieces, kinds = found["ggml.tokens"], found["ggml.token_type"]
    named = {"bos": "<s>", "eos": gguf_models.END, "unknown": "<unk>", "padding": "<fill>"}
    assert {name: pieces[found[f"ggml.{name}_token_id"]] for name in named} == named
    assert (found["ggml.eot_token_id"], found["ggml.eom_token_id"]) == (104, 105)
    assert (found["ggml.add_bos_token"], found["ggml.add_eos_token"]) == (begins, ends)
    assert found["chat_template"] == "{{ bos_token }}"
    control = [token for token, kind in enumerate(kinds) if kind == package.TokenType.CONTROL]
    assert [pieces[token] for token in control] == [
        gguf_models.END,
        "<s>",
        "<unk>",
        "<fill>",
        "<im>",
        "<call>",
    ]
    assert kinds[pieces.index("<own>")] == package.TokenType.USER_DEFINED
    assert (
        kinds[-2:] == [package.TokenType.UNUSED] * 2
        and kinds.count(package.TokenType.NORMAL) == len(kinds) - 9
    )
    back = gguf.read_tokenizer(tmp_path / "it.gguf")
    assert back.special_tokens == {**ours.special_tokens, "eos_token": gguf_models.END}
    assert back.around[:1] == ((found["ggml.bos_token_id"],) if begins else ())
    assert gguf.read_ends(tmp_path / "it.gguf") == (104, 105)


def test_ends_that_have_no_place_are_refused(tmp_path: Path) -> None:
    ours, model = gguf_models.chat_tokenizer(), Transformer(gguf_models.config(vocab_size=120))
    for ends, said in (
        ((3, 4, 5), r"2 more that end an answer; here are 3 more"),
        ((3, 120), r"tokens \[120\]"),
    ):
        with pytest.raises(UsageError, match=said):
            gguf.save_gguf(model, tmp_path / "it.gguf", tokenizer=ours, ends=ends)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("frame", ["", "<s> $A"])
def test_tokenizer_config_says_whether_a_text_begins(frame: str, said: bool | None, tmp_path: Path) -> None:
    ours = gguf_models.chat_tokenizer(frame)
    ours.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    more = {} if said is None else {"add_bos_token": said}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    begins = bool(frame) if said is None else said
    read = Tokenizer.load(tmp_path)
    bos = json.loads(ours.to_json())["added_tokens"][1]
    assert bos["content"] == "<s>" and read.around == ((bos["id"],) if begins else ())
    assert read.encode("the ell") == ours.encode("the ell")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if said is None:  # transformers reads add_bos_token for some classes alone
        for text in ("the ell", "", " the"):
            assert read.encode_prompt(text) == (theirs(text).input_ids or [read.end_id])
    assert read.encode_prompt("the") == [*read.around, *read.encode("the")]
