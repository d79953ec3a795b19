"""Packed weights inside checkpoints, memory while loading, and files read straight into their places."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moiety import storage
from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.errors import FormatError
from moiety.formats.stored import dequantize_fp8, dequantize_mxfp4, quantize_fp8, quantize_mxfp4
from moiety.formats.tiles import unpack
from moiety.model.checkpoint import load, save
from moiety.model.packed import Packing, weights_of
from moiety.model.tensor_file import open_tensors, read_tensors
from moiety.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=40,
    d_model=48,
    layers=2,
    attention=AttentionConfig(heads=2, kv_heads=1, head_dim=10),
    d_ff=12,
    moe=MoEConfig(experts=3, experts_per_token=2, d_ff=20),
)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


def packed_checkpoint(tmp_path: Path, quantization: dict[str, Any] | None = None) -> Path:
    """A bfloat16 model whose expert matrices are fp8 in blocks, the scales in a shard of their own."""
    save(Transformer(CONFIG), tmp_path / "m", dtype=torch.bfloat16)
    path = tmp_path / "m"
    (path / storage.MANIFEST).unlink()
    plain = load_file(path / "model.safetensors")
    weights, scales = {}, {}
    for name, tensor in plain.items():
        weights[name] = tensor
        if ".experts." in name:
            weights[name], scales[name + "_scale_inv"] = quantize_fp8(tensor, block=(16, 32))
    (path / "model.safetensors").unlink()
    shards = {"b.safetensors": weights, "a.safetensors": scales}
    for file, tensors in shards.items():
        save_file(tensors, path / file)
    where = {name: file for file, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    rewrite(path / "config.json", quantization_config=quantization or FP8)
    return path


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_fp8_experts(tmp_path: Path) -> None:
    path = packed_checkpoint(tmp_path)
    weights, scales = load_file(path / "b.safetensors"), load_file(path / "a.safetensors")
    for dtype in (None, torch.float32, torch.float16):
        model = load(path, dtype=dtype)
        kind = dtype or torch.bfloat16
        for layer in range(2):
            experts = model.blocks[layer].feed_forward.experts
            for expert in range(3):
                begin = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
                wanted = {
                    name: dequantize_fp8(
                        weights[f"{begin}{name}.weight"],
                        scales[f"{begin}{name}.weight_scale_inv"],
                        block=(16, 32),
                        dtype=kind,
                    )
                    for name in ("w1", "w2", "w3")
                }
                assert torch.equal(experts.gate_up[expert, :20], wanted["w1"])
                assert torch.equal(experts.gate_up[expert, 20:], wanted["w3"])
                assert torch.equal(experts.down[expert], wanted["w2"])
        assert model.embed.weight.dtype == kind
        assert model(torch.arange(12)[None]).logits.isfinite().all()


def test_packings_that_are_not_known(tmp_path: Path) -> None:
    path = packed_checkpoint(tmp_path)
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    for said, match in (
        ({**FP8, "fmt": "e5m2"}, "quant_method 'fp8'"),
        ({**FP8, "weight_block_size": None}, "weight_block_size None"),
        ({**FP8, "weight_block_size": [0, 128]}, "weight_block_size"),
        ({**FP8, "weight_block_size": [128, 128]}, r"shape \(2, 2\); by its weight it is \(1, 1\)"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "mxfp4"}, "also has"),
        ("fp8", "quant_method 'fp8'"),
    ):
        rewrite(path / "config.json", quantization_config=said)
        with pytest.raises(FormatError, match=match) as caught:
            load(path)
        assert str(path) in caught.value.message
    rewrite(path / "config.json", quantization_config=None, compression_config={"format": "pack"})
    with pytest.raises(FormatError, match="compression_config"):
        load(path)
    rewrite(path / "config.json", compression_config=None)
    with pytest.raises(FormatError, match=r"also has .*_scale_inv"):
        load(path)

    rewrite(path / "config.json", quantization_config=FP8)
    weights, scales = load_file(path / "b.safetensors"), load_file(path / "a.safetensors")
    for changed, match in (
        ({expert + "_scale_inv": torch.ones(2, 3)}, r"shape \(2, 3\); by its weight it is \(2, 2\)"),
        ({expert + "_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}, "is U8"),
    ):
        save_file({**scales, **changed}, path / "a.safetensors")
        with pytest.raises(FormatError, match=match):
            load(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"][expert + "_scale_inv"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(
        {name: one for name, one in scales.items() if not name.startswith(expert)}, path / "a.safetensors"
    )
    with pytest.raises(FormatError, match=f"{expert} is packed, but there is no {expert}_scale_inv"):
        load(path)
    save_file({**weights, expert: weights[expert].bfloat16()}, path / "b.safetensors")
    load(path)  # modules_to_not_convert: what is stored plain is plain


def test_mxfp4_names_and_shapes(tmp_path: Path) -> None:
    numbers = torch.randn(3, 10, 64)
    blocks, scales = quantize_mxfp4(numbers)
    tensors = {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales, "bias": torch.ones(3)}
    file = tmp_path / "one.safetensors"
    save_file(tensors, file)
    with open_tensors(file) as opened:
        weights = weights_of(dict.fromkeys(opened.places, opened), Packing("mxfp4"))
        assert sorted(weights) == ["bias", "gate_up_proj"]
        weight = weights["gate_up_proj"]
        wanted = dequantize_mxfp4(blocks, scales, dtype=torch.float32).transpose(1, 2)
        assert weight.shape == (3, 64, 10) and weight.dtype == torch.bfloat16
        assert torch.equal(weight.read(), wanted.bfloat16())
        target = torch.empty(3, 10, 64)
        weight.read_into(target.unflatten(1, (2, 5)).transpose(1, 2).movedim(-1, 1))  # gate and up alternate
        assert torch.equal(target[:, :5], wanted[..., 0::2].transpose(1, 2))
        assert torch.equal(target[:, 5:], wanted[..., 1::2].transpose(1, 2))
    for changed, match in (
        ({"gate_up_proj_scales": scales[:2]}, r"gate_up_proj_scales has shape \(2, 10, 2\); by its weight"),
        ({"gate_up_proj_scales": None}, "no gate_up_proj_scales"),
        ({"gate_up_proj_blocks": blocks.float()}, "is F32; allowed is U8"),
        ({"gate_up_proj_blocks": blocks[..., :8].contiguous()}, "allowed is .*16"),
        ({"gate_up_proj": numbers}, "stored as it is and in blocks"),
    ):
        save_file({name: one for name, one in {**tensors, **changed}.items() if one is not None}, file)
        with open_tensors(file) as opened, pytest.raises(FormatError, match=match):
            weights_of(dict.fromkeys(opened.places, opened), Packing("mxfp4"))


def twins(kind: str, path: Path, options: dict[str, Any]) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random model of transformers on disk, and its tensors."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.bfloat16().save_pretrained(path)
    return path, load_file(path / "model.safetensors")


def same_logits(
    path: Path, plain: dict[str, torch.Tensor], packed: dict[str, torch.Tensor], said: Any
) -> None:
    """The packed file must compute what the plain one does that holds the unpacked numbers."""
    tokens = torch.randint(0, 60, (2, 9))
    logits = []
    for tensors, quantization in ((plain, None), (packed, said)):
        save_file({name: one.contiguous() for name, one in tensors.items()}, path / "model.safetensors")
        rewrite(path / "config.json", quantization_config=quantization)
        logits.append(load(path)(tokens).logits)
    assert logits[0].std() > 0.05 and torch.equal(*logits)


@torch.no_grad()
def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    options = {
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    path, plain = twins("gpt_oss", tmp_path / "m", options)
    packed = dict(plain)
    for name, tensor in plain.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = quantize_mxfp4(tensor.transpose(1, 2))
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            del packed[name]
            plain = {**plain, name: dequantize_mxfp4(blocks, scales).transpose(1, 2)}
    assert len(packed) == len(plain) + 4
    assert packed["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (3, 64, 2, 16)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    same_logits(path, plain, packed, said)
    kept, decoded = load(path, packed=True), load(path)
    for layer, block in enumerate(kept.blocks):
        true = decoded.blocks[layer].feed_forward
        for name in ("gate_up", "down"):
            one = block.feed_forward.experts.get_submodule(name)
            assert one.form.name == "mxfp4" and one.interleaved == (name == "gate_up")
            assert torch.equal(unpack(one.weight), getattr(true, name).float())
            assert torch.equal(one.bias, getattr(true.experts, f"{name}_bias"))
    tokens = torch.randint(0, 60, (2, 9))
    pinned = {layer: one.pinned() for layer, one in decoded(tokens).routing.items()}
    true, ours = decoded(tokens).logits.float(), kept(tokens, pinned=pinned).logits.float()
    assert (true - ours).norm() < 0.03 * true.norm()
    save_file(
        {
            name: torch.full_like(one, 255) if name.endswith("_scales") else one
            for name, one in packed.items()
        },
        path / "model.safetensors",
    )
    with pytest.raises(FormatError, match="gate_up_proj_scales has a scale that is not a number"):
        load(path, packed=True)


@torch.no_grad()
def test_deepseek_in_fp8(tmp_path: Path) -> None:
    options = {
        "vocab_size": 60,
        "hidden_size": 48,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    path, plain = twins("deepseek_v3", tmp_path / "m", options)
    packed = dict(plain)
    extra = "model.layers.2."  # the layer for predicting further tokens, quantized too: not part of the model
    for name, tensor in [*plain.items(), (f"{extra}eh_proj.weight", torch.randn(48, 96).bfloat16())]:
        if name.endswith("_proj.weight") or "_proj_with_mqa" in name:
            packed[name], packed[f"{name}_scale_inv"] = quantize_fp8(tensor, block=(16, 32))
            unpacked = dequantize_fp8(packed[name], packed[f"{name}_scale_inv"], block=(16, 32))
            plain = {**plain, name: unpacked} if name in plain else plain
    packed[f"{extra}embed_tokens.weight"] = torch.zeros(60, 48)
    same_logits(path, plain, packed, FP8)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (5, 6), (2, 3, 4), (1, 1, 1)])
def test_reading_into_any_view(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = torch.randn(shape).bfloat16()
    file = tmp_path / "one.safetensors"
    save_file({"before": torch.ones(3), "x": stored, "y": torch.ones(1)}, file)
    with open_tensors(file) as opened:
        assert torch.equal(opened.read("x"), stored)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            plain = torch.empty(shape, dtype=dtype)
            turned = torch.empty(shape[::-1], dtype=dtype).permute(tuple(reversed(range(len(shape)))))
            inside = torch.zeros((4, *shape), dtype=dtype)[2]
            for target in (plain, turned, inside):
                opened.read_into("x", target)
                assert torch.equal(target, stored.to(dtype))
    assert read_tensors(file).keys() == {"before", "x", "y"}


def test_reading_in_many_chunks(tmp_path: Path) -> None:
    stored = torch.randn(2500, 1000).bfloat16()
    save_file({"x": stored}, tmp_path / "one.safetensors")
    with open_tensors(tmp_path / "one.safetensors") as opened:
        for target in (
            torch.empty(2500, 1000),
            torch.empty(1000, 2500).T,
            torch.empty(2500, 1000, 1)[..., 0],
        ):
            opened.read_into("x", target)
            assert torch.equal(target, stored.float())
        with (tmp_path / "one.safetensors").open("r+b") as file:
            file.truncate(1_000_000)
        with pytest.raises(FormatError, match="was cut while tensor x was read"):
            opened.read("x")


PEAK = """
import json, re, sys, torch
from pathlib import Path
from moiety.model.checkpoint import load

def peak_bytes():  # of this program; getrusage would begin with that of the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load(sys.argv[1])  # a small one: everything is imported and warm
begun = peak_bytes()
model = load(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print(json.dumps([peak_bytes() - begun, sum(one.nbytes for one in model.state_dict().values())]))
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path, dtype: str) -> None:
    """Of the memory beyond the model at most one stored tensor (here the embedding, 16 MB) and some small change."""
    large = ModelConfig(
        vocab_size=16_000,
        d_model=512,
        layers=3,
        attention=AttentionConfig(heads=8, kv_heads=2, head_dim=64),
        d_ff=1,
        moe=MoEConfig(experts=16, experts_per_token=2, d_ff=1100),
    )
    with torch.device("meta"):
        model = Transformer(large, initialize=False)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    save(model, tmp_path / "large", max_shard_bytes=60_000_000)
    (tmp_path / "large" / storage.MANIFEST).unlink()
    save(Transformer(CONFIG), tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large", dtype],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, size = json.loads(done.stdout)
    assert size == sum(one.nbytes for one in model.state_dict().values()) * (2 if dtype == "float32" else 1)
    assert size > 150e6
    assert 0.9 * size < grown < size + 16_000 * 512 * 2 + 8e6, f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB"
