"""What we write, llama.cpp computes as we do: every architecture, every kind of file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moiety.model import gguf
from moiety.model.gguf import vocabulary
from moiety.model.template import render
from moiety.model.tokenizer import END_OF_TEXT, Tokenizer
from moiety.model.transformer import Transformer
from tests import gguf_models, interop, tiny

ENGINE = (
    f"xllamacpp {importlib.metadata.version('xllamacpp')}" if importlib.util.find_spec("xllamacpp") else ""
)
CHILD = Path(__file__).parents[1] / "llama_cpp_child.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the wheel xllamacpp"),
]


def in_llama_cpp(jobs: list[tuple[Any, ...]]) -> list[Any]:
    asked = json.dumps([(str(file), *rest) for file, *rest in jobs])
    ran = subprocess.run(
        [sys.executable, CHILD], input=asked, capture_output=True, text=True, check=False, timeout=100
    )
    found = [
        json.loads(line.removeprefix("answer "))
        for line in ran.stdout.splitlines()
        if line.startswith("answer ")
    ]
    assert len(found) == len(jobs), ran.stdout[-2000:] + ran.stderr[-2000:]
    return found


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_float32_files_give_the_same_probabilities_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    model = gguf_models.model(name)
    assert (
        gguf.save_gguf(model, tmp_path / "it.gguf", "f32", gguf_models.tokenizer()) == name.partition("-")[0]
    )
    prompt = torch.randint(1, 100, (17,)).tolist()
    ((tokens, probabilities),) = in_llama_cpp([(tmp_path / "it.gguf", prompt, 8, None)])
    assert 1 <= len(tokens) <= 8
    interop.compare(model, prompt, tokens, probabilities, 1e-4).show(ENGINE, name)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_smaller_kinds_give_nearly_the_probabilities_of_what_they_hold(kind: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations too, so the bar is coarse: the same file read the wrong way is off by far more."""
    torch.manual_seed(1)
    config = gguf_models.config(
        tiny.attention(heads=4, kv_heads=2, head_dim=16),
        tiny.experts(d_ff=32),
        d_model=64,
    )
    model = Transformer(config).eval()
    tiny.fill(model)
    gguf.save_gguf(model, tmp_path / "it.gguf", kind, gguf_models.tokenizer())
    held = gguf.load_gguf(tmp_path / "it.gguf", dtype=torch.float32)
    prompt = torch.randint(1, 100, (17,)).tolist()
    ((_, probabilities),) = in_llama_cpp([(tmp_path / "it.gguf", prompt, 1, None)])
    with torch.no_grad():
        ours = held(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    worst = max(abs(float(ours[int(other)]) - value) for other, value in probabilities[0].items())
    assert worst < {"f16": 0.02, "bf16": 0.1, "q8_0": 0.2, "q4_0": 0.3}[kind]


TEXT = (
    "The year 2024 wasn't  like 1999:\n\n\tWE'LL see; naïve café — 漢字かな 한국어 😀!? x=3.14159e-10 #don't\r\n  end "
    "AbCd's EFg123456 (a/b) 'tis   \n  \n$1,000.00 日本語123 l'été\tÜBER_x "
)


def eager_tokenizer(split: str) -> Tokenizer:
    """Merges that cross every edge, so that where a text is split shows in its tokens."""
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=split in vocabulary.WHOLE_WORDS))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT[start:] for start in range(0, 60, 7)], trainer)
    inner.pre_tokenizer = vocabulary._splitter(vocabulary.SPLITS[split])
    inner.decoder = decoders.ByteLevel()
    if split in vocabulary.COMPOSED:
        inner.normalizer = normalizers.NFC()
    return Tokenizer(inner, end_token=END_OF_TEXT)


@pytest.mark.parametrize("name", vocabulary.SPLITS)
def test_texts_become_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Under every way of splitting, a text and our tokens of it are followed by the same probabilities."""
    tokenizer = eager_tokenizer(name)
    model = Transformer(gguf_models.config(vocab_size=tokenizer.vocab_size)).eval()
    tiny.fill(model)
    gguf.save_gguf(model, tmp_path / "as.gguf", "f32", tokenizer)
    gguf_models.rewritten(tmp_path / "as.gguf", tmp_path / "it.gguf", {"tokenizer.ggml.pre": name})
    tokens = gguf.read_tokenizer(tmp_path / "it.gguf").encode(TEXT)
    assert tokens == tokenizer.encode(TEXT)
    (shown,) = tokenizer.encode("!")
    prompts: list[list[int] | str] = [TEXT, tokens, tokens[:-3] + tokens[-2:]]
    of_text, of_tokens, of_others = in_llama_cpp(
        [(tmp_path / "it.gguf", prompt, 1, shown) for prompt in prompts]
    )
    assert of_text == of_tokens
    assert of_text != of_others


def test_answers_begin_and_end_where_the_file_says(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}<im>{{ m.role }} {{ m.content }}{% endfor %}<im>"
    ours, messages = gguf_models.chat_tokenizer(), [{"role": "user", "content": "the ell"}]
    model = Transformer(gguf_models.config(vocab_size=ours.vocab_size)).eval()
    tiny.fill(model)
    other, marker = (ours.encode_with_special(piece)[0] for piece in ("<call>", "<im>"))
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32", ours, chat_template=template, ends=(other,))
    chat = len(ours.encode_with_special(render(template, messages, bos_token="<s>")))
    text = 1 + len(ours.encode("the ell"))
    ends = {ours.end_id: "stop", other: "stop", marker: "length", ours.encode("A")[0]: "length"}
    jobs = [(tmp_path / "it.gguf", prompt, token) for token in ends for prompt in ("the ell", messages)]
    found = in_llama_cpp(jobs)
    assert found == [[reason, count] for reason in ends.values() for count in (text, chat)]
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32", gguf_models.chat_tokenizer(""), chat_template=template)
    bare = in_llama_cpp([(tmp_path / "it.gguf", "the ell", token) for token in (ours.end_id, other)])
    assert bare == [["stop", text - 1], ["length", text - 1]]


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_texts_become_the_same_tokens(space: bool, tmp_path: Path) -> None:
    tokenizer, rows = gguf_models.sentencepiece(space)
    model = Transformer(gguf_models.config(vocab_size=len(rows))).eval()
    tiny.fill(model)
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32", tokenizer)
    read = gguf.read_tokenizer(tmp_path / "it.gguf")
    texts = (TEXT, " the  theatre", "anaanaana\n\n", "bananas</s>the end", "aaaaaaaaaaa 12345")
    (shown,) = [token for token, row in enumerate(rows) if row[0] == "a"]
    for text in texts:
        tokens = [1, *read.encode_with_special(text)]
        prompts: list[list[int] | str] = [text, tokens, tokens[:-2] + tokens[-1:]]
        of_text, of_tokens, of_others = in_llama_cpp(
            [(tmp_path / "it.gguf", prompt, 1, shown) for prompt in prompts]
        )
        assert of_text == of_tokens, text
        assert of_text != of_others
