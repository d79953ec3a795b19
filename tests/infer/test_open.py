"""Finding what to generate from: a checkpoint, a run, or an error that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moiety.errors import ConfigError, FormatError, UsageError
from moiety.infer.generate import generate
from moiety.infer.open import find_checkpoint, open_model, set_experts_per_token
from moiety.model import checkpoint, gguf
from moiety.model.tokenizer import train_tokenizer
from moiety.model.transformer import Transformer
from moiety.moe.experts import Experts
from tests import gguf_models, tiny


def checkpoint_at(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_a_checkpoint_is_itself(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path / "model", "config.json")
    assert find_checkpoint(folder) == find_checkpoint(str(folder)) == folder


def test_a_run_means_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    steps = tmp_path / "run" / "checkpoints"
    for step in (9, 100, 20):
        checkpoint_at(steps / f"step-{step:08}", "config.json", "manifest.json")
    checkpoint_at(steps / "step-00000300", "config.json")  # cut before its manifest was written
    checkpoint_at(steps / "other-00000400", "config.json", "manifest.json")
    assert find_checkpoint(tmp_path / "run") == steps / "step-00000100"


def test_neither_checkpoint_nor_run(tmp_path: Path) -> None:
    empty, halves = tmp_path / "empty", tmp_path / "halves"
    checkpoint_at(empty)
    checkpoint_at(halves / "checkpoints" / "step-00000001", "config.json")
    file = tmp_path / "file"
    file.write_text("text")
    for path in (empty, halves, tmp_path / "missing", file):
        with pytest.raises(UsageError, match=r"is neither a checkpoint[\s\S]*hint: ") as raised:
            find_checkpoint(path)
        assert str(path) in raised.value.message


def test_open_gives_the_model_and_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two three two one"], 257)
    model = tiny.model("", moe=tiny.experts(), vocab_size=260)
    folder = tmp_path / "model"
    checkpoint.save(model, folder, tokenizer=tokenizer)
    opened = open_model(folder, backend="reference")
    assert opened.path == folder and opened.tokenizer.fingerprint == tokenizer.fingerprint
    assert not opened.model.training
    chosen = [module.backend for module in opened.model.modules() if isinstance(module, Experts)]
    assert chosen == ["reference"] * 3
    tokens = torch.tensor([tokenizer.encode("three")])
    torch.testing.assert_close(opened.model(tokens).logits, model(tokens).logits)
    assert len(list(generate(opened.model, tokenizer.encode("one"), max_tokens=4))) <= 4


def test_a_model_without_tokenizer_or_with_damaged_weights(tmp_path: Path) -> None:
    model = tiny.model("", moe=tiny.experts(), vocab_size=260)
    checkpoint.save(model, tmp_path / "bare")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        open_model(tmp_path / "bare")
    checkpoint.save(model, tmp_path / "cut", tokenizer=train_tokenizer(["one"], 257))
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(FormatError):
        open_model(tmp_path / "cut")


def test_a_gguf_names_several_tokens_that_end_an_answer(tmp_path: Path) -> None:
    tokenizer = gguf_models.chat_tokenizer()
    model = Transformer(gguf_models.config(vocab_size=120))
    gguf.save_gguf(model, tmp_path / "it.gguf", tokenizer=tokenizer, ends=(104, 0, 105))
    assert open_model(tmp_path / "it.gguf").ends == {
        gguf.read_tokenizer(tmp_path / "it.gguf").end_id,
        104,
        105,
    }


def test_uneven_layers_change_together_or_not_at_all() -> None:
    model = tiny.model("", moe=tiny.experts(per_layer=((2, 3, 1),))).eval()  # 5, 5 and 3 experts
    tokens = torch.arange(7)[None]
    before = [routing.pairs for routing in model(tokens).routing.values()]
    with pytest.raises(ConfigError, match="k is 4"):
        set_experts_per_token(model, 4)
    assert [routing.pairs for routing in model(tokens).routing.values()] == before == [14, 14, 7]
    set_experts_per_token(model, 3)
    assert [routing.pairs for routing in model(tokens).routing.values()] == [21] * 3
