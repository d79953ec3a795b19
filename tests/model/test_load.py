"""`moiety.load` knows a decoder, a GGUF and a Switch Transformer apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import moiety
from moiety.errors import MoietyError
from moiety.model.gguf import save_gguf
from moiety.model.switch import SwitchTransformer
from moiety.model.transformer import Transformer
from tests import tiny


def test_each_kind_of_model_is_itself(tmp_path: Path) -> None:
    decoder = tiny.model("mixtral")
    decoder.save(tmp_path / "decoder")
    save_gguf(decoder, tmp_path / "decoder.gguf", kind="f32")
    tokens = tiny.tokens(decoder, 1, 5)
    for path in (tmp_path / "decoder", tmp_path / "decoder.gguf"):
        found = moiety.load(path)
        assert isinstance(found, Transformer) and not found.training
        torch.testing.assert_close(found(tokens).logits, decoder.eval()(tokens).logits, rtol=1e-5, atol=1e-6)
    theirs = transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            vocab_size=32,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_heads=4,
            num_layers=2,
            num_experts=3,
            expert_capacity=8,
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "switch")
    switch = moiety.load(tmp_path / "switch")
    assert isinstance(switch, SwitchTransformer) and not switch.training


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for name in ("nothing", "nothing.gguf"):
        with pytest.raises(MoietyError, match="nothing"):
            moiety.load(tmp_path / name)
