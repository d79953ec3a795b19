"""Adapters as PEFT has them: what we write acts the same in transformers, and what PEFT writes acts the same here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from moiety.errors import UsageError
from moiety.model import checkpoint
from moiety.model.adapter_files import WEIGHTS, family_at, load_adapter, save_adapter
from moiety.model.adapters import attach, detach, merge, places, routers
from moiety.model.transformer import Transformer
from tests.families import FAMILY_SETTINGS, random_settings
from tests.model.test_adapters import adapters
from tests.model.test_parity import MATCH, POSITIONS, their_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*alpha_pattern keys did not match:RuntimeWarning"),
]
FOLDED = ("dbrx",)  # experts are one matrix there


@pytest.fixture(params=FAMILY_SETTINGS)
def twins(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Transformer, Path]:
    """A family, its model in transformers, the same one here, and its folder."""
    name = request.param
    torch.manual_seed(7)
    settings = {**random_settings(name, 1), "tie_word_embeddings": False}
    theirs = their_model(name, settings)
    theirs.save_pretrained(tmp_path / "base")
    ours = checkpoint.load(tmp_path / "base", match=MATCH.get(name, "original"))  # type: ignore[arg-type]
    return name, theirs, ours, tmp_path


def assert_same(ours: Transformer, theirs: nn.Module, before: Tensor, tokens: Tensor) -> None:
    with torch.no_grad():
        found, true = ours(tokens).logits, theirs(tokens).logits
    assert (true - before).abs().max() > 0.03, "the adapter does nothing there"
    scale = max(1.0, float(true.abs().max()))
    assert (found - true).abs().max() <= 1e-5 * scale, float((found - true).abs().max() / scale)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
        return found


def test_what_we_write_acts_in_transformers(twins: tuple[str, Any, Transformer, Path]) -> None:
    name, theirs, ours, folder = twins
    tokens = torch.randint(ours.config.vocab_size, (2, POSITIONS))
    before, family = logits_of(theirs, tokens), family_at(folder / "base")
    nothing, plain = adapters(ours), logits_of(ours, tokens)
    for one in nothing.values():
        one.b.data.zero_()
    attach(ours, "nothing", nothing)
    assert (logits_of(ours, tokens) - plain).abs().max() <= 1e-6 * max(1.0, float(plain.abs().max()))
    detach(ours, "nothing")
    made = adapters(ours)
    if name in FOLDED:
        attach(ours, "all", made)
        with pytest.raises(UsageError, match="PEFT has no layout"):
            save_adapter(ours, folder / "refused", "all", family=family)
        detach(ours, "all")
        made = {key: one for key, one in made.items() if not key[0].endswith("experts")}
    attach(ours, "one", made)
    save_adapter(ours, folder / "adapter", "one", family=family)
    adapted = peft.PeftModel.from_pretrained(theirs, str(folder / "adapter"))
    assert_same(ours, adapted, before, tokens)
    adapted.save_pretrained(str(folder / "back"))
    again = checkpoint.load(folder / "base", match=MATCH.get(name, "original"))  # type: ignore[arg-type]
    read = load_adapter(again, folder / "back", "one", family=family)
    assert read.adapters.keys() == made.keys()
    for place in places(again):  # what PEFT writes of what we wrote has the same bits
        one, true = read.adapters.get((place.path, place.leaf)), made.get((place.path, place.leaf))
        if one is None or true is None:
            assert one is true and name in FOLDED and place.group == "experts", place
        elif one.spans == true.spans:
            assert one.scale == true.scale and torch.equal(one.a, true.a) and torch.equal(one.b, true.b), (
                place
            )
        else:  # there query, key and value are one linear
            assert name in FOLDED and place.path.endswith("qkv"), place
            both = [adapter.lora(torch.float32).dense(place.rows) for adapter in (one, true)]
            torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_of(again, tokens), logits_of(ours, tokens), rtol=1e-5, atol=1e-5)
    merge(again, "one")
    true = logits_of(ours, tokens)
    assert (logits_of(again, tokens) - true).abs().max() <= 1e-5 * max(1.0, float(true.abs().max()))


def test_what_peft_writes_acts_here(twins: tuple[str, Any, Transformer, Path]) -> None:
    name, theirs, ours, folder = twins
    tokens = torch.randint(ours.config.vocab_size, (2, POSITIONS))
    before = logits_of(theirs, tokens)
    stacks = sorted(
        {own for own, one in theirs.named_parameters() if one.dim() == 3 and not own.endswith("bias")}
    )
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        exclude_modules=["router"] if name in ("phimoe", "llama4_text") else None,  # PEFT breaks them
        target_parameters=stacks or None,
        use_rslora=name < "m",
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(theirs, config)
    generator = torch.Generator().manual_seed(3)
    for own, one in adapted.named_parameters():
        if "lora_" in own:
            one.data = torch.randn(one.shape, generator=generator) * 0.2
    adapted.save_pretrained(str(folder / "adapter"))
    read = load_adapter(ours, folder / "adapter", "theirs", family=family_at(folder / "base"))
    assert read.adapters
    assert_same(ours, adapted, before, tokens)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_experts_one_by_one_act_in_transformers(name: str, tmp_path: Path) -> None:
    """The layout of adapters from before experts were stacked, which PEFT turns into stacks when it reads them."""
    torch.manual_seed(7)
    theirs = their_model(name, {**random_settings(name, 1), "tie_word_embeddings": False})
    theirs.save_pretrained(tmp_path / "base")
    ours = checkpoint.load(tmp_path / "base")
    tokens = torch.randint(ours.config.vocab_size, (2, POSITIONS))
    before, family = logits_of(theirs, tokens), family_at(tmp_path / "base")
    chosen = ("attention", "experts")
    groups = {(place.path, place.leaf): place.group for place in places(ours)}
    attach(ours, "one", {key: one for key, one in adapters(ours).items() if groups[key] in chosen})
    save_adapter(ours, tmp_path / "adapter", "one", family=family, experts="linears")
    assert any(".experts.0." in key for key in checkpoint.read_tensors(tmp_path / "adapter" / WEIGHTS))
    assert_same(ours, peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")), before, tokens)
    again = checkpoint.load(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter", "two", family=family)
    torch.testing.assert_close(logits_of(again, tokens), logits_of(ours, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_trained_routers_travel_both_ways(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    theirs = their_model(name, {**random_settings(name, 1), "tie_word_embeddings": False})
    theirs.save_pretrained(tmp_path / "base")
    ours, family = checkpoint.load(tmp_path / "base"), family_at(tmp_path / "base")
    tokens = torch.randint(ours.config.vocab_size, (2, POSITIONS))
    before = logits_of(theirs, tokens)
    attach(ours, "one", adapters(ours))
    for parameter in routers(ours).values():
        parameter.requires_grad_().data.mul_(-1.5)
    save_adapter(ours, tmp_path / "adapter", "one", family=family)
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert_same(ours, adapted, before, tokens)
    adapted.save_pretrained(str(tmp_path / "back"))
    again = checkpoint.load(tmp_path / "base")
    read = load_adapter(again, tmp_path / "back", "two", family=family)
    assert read.routers
    torch.testing.assert_close(logits_of(again, tokens), logits_of(ours, tokens), rtol=1e-5, atol=1e-5)


def test_a_lora_of_a_router_is_put_into_it(tmp_path: Path) -> None:
    torch.manual_seed(7)
    theirs = their_model("mixtral", {**random_settings("mixtral", 1), "tie_word_embeddings": False})
    theirs.save_pretrained(tmp_path / "base")
    ours = checkpoint.load(tmp_path / "base")
    tokens = torch.randint(ours.config.vocab_size, (2, POSITIONS))
    before = logits_of(theirs, tokens)
    wanted = {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=2, init_lora_weights=False, **wanted))  # type: ignore[arg-type]
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert load_adapter(ours, tmp_path / "adapter", family=family_at(tmp_path / "base")).routers
    assert_same(ours, adapted, before, tokens)
