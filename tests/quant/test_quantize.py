"""Packing a model: what the policy says happens, nothing is missed, and the receipt is true."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moiety.errors import CheckFailed, ConfigError
from moiety.formats import FORMATS
from moiety.formats.numbers import dequantize
from moiety.formats.numbers import quantize as codes_for
from moiety.formats.tiles import Projection, pack, projections_in, unpack
from moiety.model.slots import packed_matrices, slots
from moiety.model.transformer import Transformer
from moiety.quant import quantize as work
from moiety.quant.quantize import Choice, Policy, pack_stack, policy_named, quantize
from tests import gguf_models, tiny


def parameters(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_receipt_lists_every_tensor_truly(name: str) -> None:
    model = tiny.model(name)
    before = parameters(model)
    receipt = quantize(model, policy_named("int4-mixed"))
    lines = {line.name: line for line in receipt.lines}
    own_head = set() if "head.weight" in before else {"head.weight"}
    assert lines.keys() == before.keys() | own_head and len(lines) == len(receipt.lines)
    after = model.state_dict()
    assert receipt.bytes_before == sum(one.nbytes for one in before.values())
    assert receipt.bytes_after == sum(one.nbytes for one in after.values())
    matrices = packed_matrices(model)
    for key, line in lines.items():
        weight = before.get(key, before["embed.weight"])
        assert line.shape == tuple(weight.shape)
        if line.format is None:
            assert line.reason and line.bytes_after == line.bytes_before == weight.nbytes
            renamed = re.sub(r"\.(gate_up|up|down)_bias$", r".\1.bias", key)
            assert torch.equal(after[renamed], weight), "what is kept is untouched"
            continue
        one = matrices[key.removesuffix(".weight")]
        form = FORMATS[line.format]
        filled = line.bytes_after - one.tiles.nbytes
        assert one.form is form and 0 <= filled < 4096 * one.experts, "filled up to whole pages"
        assert filled == 0 or (".experts." in key and key.endswith(".down"))
        true = dequantize(codes_for(weight, form), form)
        assert torch.equal(unpack(one.weight).view(weight.shape), true)
        assert line.relative_error == pytest.approx(float((true - weight).norm() / weight.norm()), rel=1e-4)
    assert {line.format for key, line in lines.items() if ".experts." in key and "bias" not in key} <= {
        "int4-g32"
    }
    assert lines["head.weight"].format == "int8-g32"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for key, line in lines.items():
        if any(word in key for word in ("gate.weight", "norm", "bias", "embed", "sinks")):
            assert line.format is None, key


def test_each_part_by_choice() -> None:
    parts = {
        "experts": "mxfp4",
        "shared": "int8-g64",
        "dense": "nf4-g32",
        "attention": "int4-g128",
        "head": "fp8",
    }
    kinds = {"experts": "experts", "shared": "shared", "attention": "attention", "head": "head"}
    original = tiny.model("sigmoid")
    for left_out in ("", *parts):
        model = copy.deepcopy(original)
        receipt = quantize(model, Policy(**{**parts, **({left_out: ""} if left_out else {})}))
        found = {part: set() for part in parts}
        for line in receipt.lines:
            words = line.name.split(".")
            part = next(
                (kinds[word] for word in words if word in kinds), "dense" if "feed_forward" in words else ""
            )
            if part and len(line.shape) > 1 and not any(word in line.name for word in ("gate.", "bias")):
                found[part].add(line.format)
        wanted = {part: {None if part == left_out else form} for part, form in parts.items()}
        if left_out == "head":
            wanted["head"] = set()  # tied: the embedding stays what it is
        assert found == wanted


def test_named_policies() -> None:
    assert policy_named("int8-g32") == Policy(**dict.fromkeys(work.PARTS, "int8-g32"))
    assert policy_named("int4") == Policy()
    assert policy_named("experts=nf4+head=int8") == Policy(
        experts="nf4", head="int8", shared="", dense="", attention=""
    )
    for text, message in (
        ("int5", "no weight format 'int5'"),
        ("experts=int5", "no weight format 'int5'"),
        ("router=int8", "names router"),
    ):
        with pytest.raises(ConfigError, match=message):
            policy_named(text)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.feed_forward.gate.weight",
        "blocks.0.feed_forward_norm.weight",
        "embed.weight",
        "blocks.0.feed_forward.shared_gate.weight",
        "blocks.0.attention.qkv.bias",
    ],
)
def test_what_must_keep_its_precision(name: str) -> None:
    model = tiny.model("shared")
    before = parameters(model)
    with pytest.raises(ConfigError, match=re.escape(name)):
        quantize(model, lambda one, shape: "int8" if one == name else None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_half_a_feed_forward_is_refused() -> None:
    model = tiny.model("mixtral")
    with pytest.raises(ConfigError, match=r"blocks\.1\.feed_forward\.experts but not .*gate_up"):
        quantize(model, lambda name, shape: "int8" if name.endswith("1.feed_forward.experts.down") else None)
    with pytest.raises(ConfigError, match="gives 2 formats to the 5"):
        quantize(model, lambda name, shape: ("int8", "bf16") if ".experts." in name else None)


def test_formats_that_differ_between_experts() -> None:
    original = tiny.model("qwen3_moe").eval()
    formats = ("int8-g32", "f32", "int8-g32", "f32", "f32", "int8-g32", "int8-g32")

    def policy(name: str, shape: tuple[int, ...]) -> Choice:
        return formats if ".experts." in name else None

    model = copy.deepcopy(original)
    receipt = quantize(model, policy)
    assert {line.format for line in receipt.lines} == {None, "int8-g32 x 4, f32 x 3"}
    experts = model.blocks[0].feed_forward.experts
    assert experts.numbers == ((0, 2, 5, 6), (1, 3, 4)) and experts.count == 7
    gate_up = original.blocks[0].feed_forward.gate_up.detach()
    for part, numbers in zip(experts.parts, experts.numbers, strict=True):
        form = part.gate_up.form
        true = pack(gate_up[list(numbers)], form, interleaved=True)
        assert torch.equal(part.gate_up.tiles, true.tiles)
    tokens = tiny.tokens(model, 2, 9)
    with torch.no_grad():
        true_logits = original(tokens)
        pinned = {layer: one.pinned() for layer, one in true_logits.routing.items()}
        assert (
            model(tokens, pinned=pinned).logits - true_logits.logits
        ).norm() < 0.02 * true_logits.logits.norm()


def test_a_planted_miss_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    missed = "blocks.1.attention.out"

    def forgetful(model: Transformer) -> dict[str, tuple[object, ...]]:
        return {path: group for path, group in slots(model).items() if path != missed}

    monkeypatch.setattr(work, "slots", forgetful)
    with pytest.raises((CheckFailed, ConfigError), match=re.escape(missed)):
        quantize(tiny.model("mixtral"), policy_named("int8"))
    monkeypatch.undo()

    def dropping(model: Transformer, path: str, groups: object) -> None:
        if path != missed:
            install(model, path, groups)  # type: ignore[arg-type]

    install = work.install
    monkeypatch.setattr(work, "install", dropping)
    with pytest.raises(CheckFailed, match=re.escape(missed)):
        quantize(tiny.model("mixtral"), policy_named("int8"))


def test_packing_again_leaves_what_is_packed() -> None:
    model = tiny.model("relu")
    quantize(model, Policy(experts="int8-g32", attention="", shared="", dense="", head=""))
    first = {path: one.tiles.data_ptr() for path, one in packed_matrices(model).items()}
    stacks = {path.rpartition(".")[0] for path in first}
    receipt = quantize(model, policy_named("int4"))
    second = packed_matrices(model)
    assert len(second) > len(first) and all(
        second[path].tiles.data_ptr() == place for path, place in first.items()
    )
    again = [line for line in receipt.lines if line.reason == "packed before"]
    assert {line.name.removesuffix(".tiles") for line in again} == stacks and stacks
    assert {line.format for line in again} == {"int8-g32"}


def test_what_is_not_finite_is_refused() -> None:
    model = tiny.model("mixtral")
    model.blocks[2].feed_forward.down.data[1, 2, 3] = float("nan")
    with pytest.raises(Exception, match="not finite"):
        quantize(model, policy_named("int4"))


@pytest.mark.parametrize("shape", [(3, 70, 40), (1, 16, 32), (2, 2000, 700)])
@pytest.mark.parametrize("form", ["int8", "nf4-g32", "int4-g128-asym"])
def test_a_few_rows_at_a_time_or_all_at_once(shape: tuple[int, ...], form: str) -> None:
    weight = torch.randn(shape)
    for interleaved in (False, True):
        chosen = list(range(0, shape[0], 2))
        whole = pack(weight[chosen], FORMATS[form], interleaved=interleaved)
        apart = torch.full((len(chosen), whole.tiles[0].numel() + 32), 7, dtype=torch.uint8)
        packed = projections_in(apart, [Projection(FORMATS[form], *shape[1:], interleaved)])[0]
        change, size = pack_stack(weight, chosen, packed)
        assert torch.equal(packed.tiles, whole.tiles) and bool((apart[:, -32:] == 7).all())
        assert change == pytest.approx(float((unpack(whole) - weight[chosen]).square().sum()), rel=1e-4)
        assert size == pytest.approx(float(weight[chosen].square().sum()), rel=1e-4)


def test_latent_attention_keeps_one_matrix() -> None:
    model = Transformer(gguf_models.config(gguf_models.latent()))
    receipt = quantize(model, policy_named("int8"))
    kept = [line.name for line in receipt.lines if line.format is None and len(line.shape) > 1]
    assert kept == ["embed.weight", *(f"blocks.{layer}.attention.kv_b.weight" for layer in range(3))]


PEAK = """
import json, re, torch
from pathlib import Path
from moiety.config import AttentionConfig, ModelConfig, MoEConfig
from moiety.model.transformer import Transformer
from moiety.quant.quantize import policy_named, quantize
from moiety.train.host import keep_freed_memory

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def model(layers, d_ff):
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=64)
    moe = MoEConfig(experts=8, experts_per_token=2, d_ff=d_ff)
    return Transformer(ModelConfig(vocab_size=500, d_model=256, layers=layers, d_ff=8, attention=attention, moe=moe))

quantize(model(1, 64), policy_named("nf4"))
large = model(12, 1024)
size = sum(one.nbytes for one in large.state_dict().values())
begun = peak_bytes()
receipt = quantize(large, policy_named("nf4"))
print(json.dumps([size, peak_bytes() - begun, receipt.bytes_after]))
"""


def test_peak_memory_is_the_model_and_one_layer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    size, grown, after = json.loads(done.stdout)
    assert size > 300e6 and after < 0.16 * size
    # one layer's tiles, and what rounding a million weights to a table takes; all tiles together are 44 MB
    assert grown < after / 12 + 200e6, f"{grown / 1e6:.0f} MB"
