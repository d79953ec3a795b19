"""`moiety convert`: the same model on the other side, its tokenizer with it, and wrong words refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from moiety.model import checkpoint
from moiety.model.gguf import load_gguf
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from tests import tiny
from tests.cli.conftest import Call

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tokenizer, template, and end tokens in two places."""
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    model = tiny.model("", vocab_size=300, d_model=32, attention=tiny.attention(head_dim=8), d_ff=32,
                       moe=tiny.experts(d_ff=32))  # fmt: skip
    tokenizer = train_tokenizer(["some text to learn from"] * 9, 290)
    tokenizer.chat_template = ChatTemplate(TEMPLATE)
    checkpoint.save(model, folder, tokenizer=tokenizer)
    (folder / "manifest.json").unlink()  # as it comes from the hub
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "eos_token_id": [5, 6]}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.6}')
    return folder


def _same(first: Path, second: Path, tolerance: float) -> None:
    ours, theirs = checkpoint.load(first), checkpoint.load(second)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = ours.float()(tokens).logits
        torch.testing.assert_close(theirs.float()(tokens).logits, expected, rtol=0, atol=tolerance)


def test_from_folder_to_folder(call: Call, mixtral: Path, tmp_path: Path) -> None:
    said = call("convert", mixtral, tmp_path / "out", "--dtype", "bf16")
    assert said.code == 0 and "mixtral" in said.out and said.err == ""
    assert checkpoint.load(tmp_path / "out").embed.weight.dtype == torch.bfloat16
    _same(mixtral, tmp_path / "out", 0.05)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (mixtral / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [5, 6]
    again = call("convert", mixtral, tmp_path / "out", "--json")
    assert again.json["format"] == "hf" and again.json["bytes"] > 1000
    assert checkpoint.load(tmp_path / "out").embed.weight.dtype == torch.float32


def test_through_gguf_and_back(call: Call, mixtral: Path, tmp_path: Path) -> None:
    file, back = tmp_path / "small.gguf", tmp_path / "back"
    assert call("convert", mixtral, file, "--kind", "f32").code == 0
    assert call("convert", file, back).code == 0
    end = Tokenizer.load(mixtral).end_id
    for name in ("config.json", "generation_config.json"):
        assert json.loads((back / name).read_text())["eos_token_id"] == [end, 5, 6]
    _same(mixtral, file, 1e-6)
    _same(mixtral, back, 1e-6)
    ours, theirs = Tokenizer.load(mixtral), Tokenizer.load(back)
    text = "some text, and 123 more"
    assert theirs.encode(text) == ours.encode(text) and theirs.end_token == ours.end_token
    assert theirs.chat_template is not None
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.chat_template.render(messages) == f"<user>hi{ours.end_token}"


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.01), ("q8_0", 0.2), ("q4_0", 2.0)])
def test_kinds_of_gguf(kind: str, tolerance: float, call: Call, mixtral: Path, tmp_path: Path) -> None:
    said = call("convert", mixtral, tmp_path / "small.gguf", "--kind", kind, "--no-tokenizer", "--json")
    assert said.code == 0 and said.json["written_as"].endswith(kind) and said.json["format"] == "gguf"
    _same(mixtral, tmp_path / "small.gguf", tolerance)
    assert load_gguf(tmp_path / "small.gguf").config.moe is not None


def test_a_gguf_cannot_take_every_tokenizer(call: Call, mixtral: Path, tmp_path: Path) -> None:
    """A model without one says how to go on."""
    bare = tmp_path / "bare"
    checkpoint.save(tiny.model("mixtral"), bare)
    call("convert", bare, tmp_path / "x.gguf").assert_refused(1, "tokenizer.json")
    assert not (tmp_path / "x.gguf").exists()
    assert call("convert", bare, tmp_path / "x.gguf", "--no-tokenizer").code == 0
    assert call("convert", bare, tmp_path / "other").code == 0
    assert call("convert", mixtral, tmp_path / "third", "--no-tokenizer").code == 0
    assert not (tmp_path / "third" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["{in}", "out", "--to", "gguf"], ".gguf"),
        (["{in}", "out", "--kind", "q8_0"], "--kind"),
        (["{in}", "out.gguf", "--dtype", "bf16"], "--dtype"),
        (["{in}", "{in}"], "source and target"),
        (["{in}", "out.gguf", "--kind", "q5"], "q5"),
        (["{in}", "out", "--dtype", "int8"], "int8"),
        (["{in}", "out", "--match", "vllm"], "vllm"),
        (["{in}", "out", "--to", "onnx"], "onnx"),
        (["{in}", "out", "--revision", "main"], "revision"),
        (["{in}"], "TARGET"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_wrong_words(
    words: list[str], named: str, call: Call, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call("convert", *(word.replace("{in}", str(mixtral)) for word in words)).assert_refused(2, named)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(call: Call, mixtral: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    call("convert", mixtral, folder).assert_refused(1, "mine")
    assert (folder / "thesis.txt").read_text() == "years of work"
    call("convert", tmp_path / "absent", tmp_path / "out").assert_refused(1, "absent")


@pytest.mark.parametrize("tied", [True, False])
def test_a_switch_transformer_to_another_dtype(tied: bool, call: Call, tmp_path: Path) -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=29, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, num_experts=5,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, tie_word_embeddings=tied, decoder_start_token_id=3,
    )  # fmt: skip
    twin = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    twin.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "spiece.model").write_bytes(b"pieces")
    said = call("convert", tmp_path / "in", tmp_path / "out", "--dtype", "bf16")
    assert said.code == 0 and "switch_transformers" in said.out and said.err == ""
    assert (tmp_path / "out" / "spiece.model").read_bytes() == b"pieces"
    back, told = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(told.values()) and back.config.decoder_start_token_id == 3
    expected = twin.to(torch.bfloat16).state_dict()
    if not tied:  # their class keeps a third embedding, which nothing reads
        expected["shared.weight"] = expected["encoder.embed_tokens.weight"]
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in back.state_dict().items())
    call("convert", tmp_path / "in", tmp_path / "out.gguf").assert_refused(2, "encoder-decoder with experts")
    assert not (tmp_path / "out.gguf").exists()
