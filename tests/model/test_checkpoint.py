"""Checkpoints against transformers in both directions, and against every way a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moiety import storage
from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.errors import ConfigError, FormatError, StorageError, UsageError
from moiety.model.checkpoint import load, load_config, load_extra, load_weights, read_tensors, save
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.model.transformer import Transformer

transformers.utils.logging.disable_progress_bar()
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 40,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2}
TWINS = [
    ("mixtral", {"num_local_experts": 4}),
    (
        "mixtral",
        {"num_local_experts": 5, "head_dim": 12, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    ("mixtral", {"num_local_experts": 2, "num_key_value_heads": 4, "num_experts_per_tok": 1}),
    ("llama", {"attention_bias": True, "num_key_value_heads": 1}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 20, "rope_theta": 500.0}),
    ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 24, "head_dim": 6, "norm_topk_prob": True}),
    ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 9, "mlp_only_layers": [1], "norm_topk_prob": False}),
    ("olmoe", EXPERTS),
]
OURS = ModelConfig(
    vocab_size=19,
    d_model=8,
    layers=2,
    attention=AttentionConfig(heads=2, kv_heads=1, head_dim=6),
    d_ff=12,
    moe=MoEConfig(experts=3, experts_per_token=2, d_ff=5),
)
assert OURS.moe is not None
SPECIAL = dataclasses.replace(
    OURS,
    dense_layers=(0,),
    tied=True,
    moe=dataclasses.replace(
        OURS.moe, router="sigmoid", selection_bias=True, shared_d_ff=4, shared_gate=True, bias=True
    ),
)


def their_model(kind: str, options: dict[str, Any]) -> Any:
    """A random model of transformers with wide logits, evaluated one expert at a time."""
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    return model


def same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name


def written(tmp_path: Path, config: ModelConfig = OURS, **options: Any) -> tuple[Transformer, Path]:
    model = Transformer(config)
    save(model, tmp_path / "m", **options)
    return model, tmp_path / "m"


@pytest.mark.parametrize(("kind", "options"), TWINS)
@torch.no_grad()
def test_as_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    theirs = their_model(kind, options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    tokens = torch.randint(0, 61, (3, 17))
    wanted = theirs(tokens, output_router_logits=True) if "num_experts_per_tok" in options else theirs(tokens)
    found = ours(tokens)
    assert wanted.logits.std() > 0.3
    assert (found.logits - wanted.logits).abs().max() < 1e-5
    if "num_experts_per_tok" in options:
        for layer, logits in zip(found.routing, wanted.router_logits, strict=True):
            chosen = logits.topk(options["num_experts_per_tok"], dim=-1).indices
            pairs = {(int(t), int(e)) for t in range(len(chosen)) for e in chosen[t]}
            routing = found.routing[layer]
            assert pairs == set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))

    assert save(ours, tmp_path / "ours").family.model_type == kind
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    same(theirs, again)
    assert (again(tokens).logits - wanted.logits).abs().max() < 1e-5
    back = load(tmp_path / "ours")
    same(ours, back)
    assert back.config == ours.config == load_config(tmp_path / "ours")


@pytest.mark.parametrize("config", [OURS, SPECIAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(tmp_path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    model = Transformer(config).to(dtype)
    for name, buffer in model.named_buffers():
        assert name.endswith("selection_bias") and buffer.dtype == torch.float32
        buffer.normal_()
    for shard_bytes in (10**9, 700, 1):
        choice = save(model, tmp_path / "m", max_shard_bytes=shard_bytes)
        assert choice.family.model_type == ("moiety" if config is SPECIAL else "mixtral")
        back = load(tmp_path / "m")
        same(model, back)
        assert back.config == config and all(one.requires_grad for one in back.parameters())
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 20
    other = Transformer(config).to(dtype)
    load_weights(tmp_path / "m", other)
    same(model, other)


def test_dtype_of_file_and_memory(tmp_path: Path) -> None:
    model, path = written(tmp_path, SPECIAL, dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in load(path).state_dict().items()}
    assert {kind for name, kind in kinds.items() if not name.endswith("selection_bias")} == {torch.bfloat16}
    assert kinds["blocks.1.feed_forward.selection_bias"] == torch.float32
    assert all(one.dtype == torch.float64 for one in load(path, dtype=torch.float64).parameters())
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UsageError, match="bfloat16"):
        load_weights(path, model)
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(UsageError, match="weights cannot be"):
            save(model, tmp_path / "x", dtype=dtype)
        with pytest.raises(UsageError, match="weights cannot be"):
            load(path, dtype=dtype)
    assert not (tmp_path / "x").exists()


def test_tokenizer_and_extra(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["how much wood would a woodchuck chuck"], 270)
    config = dataclasses.replace(OURS, vocab_size=300)
    _, path = written(tmp_path, config, tokenizer=tokenizer, extra={"text": "a b"})
    assert AutoTokenizer.from_pretrained(path)("a woodchuck").input_ids == tokenizer.encode("a woodchuck")
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    assert AutoModelForCausalLM.from_pretrained(path).generation_config.eos_token_id == tokenizer.end_id
    assert load_extra(path) == {"text": "a b"}
    with pytest.raises(UsageError, match="the tokenizer has"):
        save(Transformer(OURS), path, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="JSON"):
        save(Transformer(OURS), path, extra={"a": math.nan})
    assert load_extra(path) == {"text": "a b"} and load(path).config == config
    Transformer(OURS).save(path)
    assert load_extra(path) == {} and load(path).config == OURS


def test_values_that_are_not_finite_are_values(tmp_path: Path) -> None:
    model = Transformer(OURS)
    with torch.no_grad():
        model.embed.weight[3] = math.nan
    save(model, tmp_path / "m")
    assert torch.isnan(load(tmp_path / "m").embed.weight).sum() == OURS.d_model


def change(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Rewrite the weights of a checkpoint without a manifest."""
    (path / storage.MANIFEST).unlink(missing_ok=True)
    tensors: dict[str, Any] = {**load_file(path / "model.safetensors"), **changes}
    save_file({name: one for name, one in tensors.items() if one is not None}, path / "model.safetensors")


def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    whole = load_file(path / "model.safetensors")[expert]
    for bad, said in (
        (None, f"lacks {expert}"),
        (whole.T.contiguous(), rf"{expert} has shape \(8, 5\); by config.json it is \(5, 8\)"),
        (whole[0], "has shape"),
        (whole.to(torch.int32), "I32"),
    ):
        change(path, {expert: bad})
        with pytest.raises(FormatError, match=said):
            load(path)
    change(path, {expert: whole.half()})
    assert load(path).blocks[1].feed_forward.gate_up.dtype == torch.float32
    change(path, {expert: whole, "lm_head.bias": torch.zeros(19)})
    with pytest.raises(FormatError, match=r"also has lm_head\.bias"):
        load(path)
    change(path, {"lm_head.bias": None, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    load(path)


def test_a_tied_model_may_store_its_head(tmp_path: Path) -> None:
    model, path = written(tmp_path, dataclasses.replace(OURS, tied=True))
    change(path, {"lm_head.weight": model.embed.weight.detach().clone()})
    same(load(path), model)
    change(path, {"lm_head.weight": model.embed.weight.detach() + 1})
    with pytest.raises(FormatError, match="tie_word_embeddings"):
        load(path)


@pytest.mark.parametrize("shard_bytes", [10**9, 900])
def test_damaged_files_without_a_manifest(tmp_path: Path, shard_bytes: int) -> None:
    model, path = written(tmp_path, max_shard_bytes=shard_bytes)
    (path / storage.MANIFEST).unlink()
    same(load(path), model)
    for file in sorted(path.iterdir()):
        if file.name == "generation_config.json":
            continue
        whole = file.read_bytes()
        for size in {0, 4, len(whole) // 2, len(whole) - 2}:
            file.write_bytes(whole[:size])
            with pytest.raises(FormatError, match=file.name):
                load(path)
        if file.suffix == ".safetensors":
            for header in (b"\xff" * 8, (1 << 40).to_bytes(8, "little"), bytes(8)):
                file.write_bytes(header + whole[8:])
                with pytest.raises(FormatError, match=file.name):
                    load(path)
        file.unlink()
        with pytest.raises(FormatError):
            load(path)
        file.write_bytes(whole)
    same(load(path), model)


def test_every_alteration_under_a_manifest_is_found(tmp_path: Path) -> None:
    model, path = written(tmp_path, max_shard_bytes=900)
    files = [file for file in path.iterdir() if file.stat().st_size]
    for _ in range(200):
        file = random.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(FormatError, match=file.name):
            load(path)
        file.write_bytes(whole)
    save(Transformer(OURS), tmp_path / "other", max_shard_bytes=900)
    shard = sorted(file.name for file in path.glob("*.safetensors"))[1]
    assert (path / shard).stat().st_size == (tmp_path / "other" / shard).stat().st_size
    kept = (path / shard).read_bytes()
    shutil.copy(tmp_path / "other" / shard, path / shard)
    with pytest.raises(FormatError, match=shard):
        load(path)
    (path / shard).write_bytes(kept)
    same(load(path), model)


def test_a_lying_index(tmp_path: Path) -> None:
    _, path = written(tmp_path, max_shard_bytes=900)
    (path / storage.MANIFEST).unlink()
    index = path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    names = list(whole["weight_map"])
    shutil.copytree(path, tmp_path / "copy")
    first, *_, last = sorted(set(whole["weight_map"].values()))
    (path / "link.safetensors").symlink_to(tmp_path / "copy" / first)
    for place, said in (
        (f"../copy/{first}", "inside"),
        (str(tmp_path / "copy" / first), "inside"),
        ("link.safetensors", "symbolic link"),
        ("gone.safetensors", "missing"),
        (last, "does not hold"),
        (3, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], names[0]: place}}))
        with pytest.raises(FormatError, match=said):
            load(path)
    index.write_text(json.dumps(whole))
    load(path)
    shutil.copy(path / last, path / "model.safetensors")
    with pytest.raises(FormatError, match="not clear"):
        load(path)


def test_a_config_of_another_model(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    (path / storage.MANIFEST).unlink()
    file = path / "config.json"
    whole = json.loads(file.read_text())
    for name, value in (
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 10**9),
        ("num_local_experts", 10**9),
        ("vocab_size", 10**30),
        ("hidden_size", 16),
        ("head_dim", 4),
        ("model_type", "gpt2"),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "yarn"}),
    ):
        file.write_text(json.dumps({**whole, name: value}))
        with pytest.raises(FormatError):
            load(path)
    file.write_text(json.dumps({**whole, "num_key_value_heads": 3}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(path)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", "nowhere", tmp_path / "nowhere.gguf"):
        with pytest.raises(FormatError, match=r"does not exist\nhint: .*hub"):
            load(place)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="not a folder"):
        load(tmp_path / "file")
    _, path = written(tmp_path)
    (path / storage.MANIFEST).unlink()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"neither .*\nhint: pytorch_model.bin may run code"):
        load(path)
    with pytest.raises(StorageError, match="no manifest"):
        save(Transformer(OURS), path)
    assert sorted(os.listdir(path)) == ["config.json", "generation_config.json", "pytorch_model.bin"]


def test_tensor_files_are_those_of_safetensors(tmp_path: Path) -> None:
    _, path = written(tmp_path, SPECIAL, dtype=torch.float16)
    ours, theirs = read_tensors(path / "model.safetensors"), load_file(path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
