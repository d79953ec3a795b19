"""What is stored: every matrix of every known model, and sizes that are those of models and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiety import cost, registry
from moiety.config import ModelConfig
from moiety.errors import ConfigError, FormatError
from moiety.formats import FORMATS
from moiety.formats.policy import policy_named
from moiety.model import checkpoint
from moiety.model.gguf import save_gguf
from moiety.model.transformer import Transformer
from moiety.plan.weights import gigabytes, matrices, read_stored, stored_as
from moiety.quant.pretend import packed_model
from moiety.quant.quantize import quantize
from tests import tiny

DECODERS = {
    name: config for name in registry.REGISTRY if isinstance(config := registry.lookup(name), ModelConfig)
}
UNEVEN = tiny.config(
    layers=4,
    moe=tiny.experts(per_layer=((0, 3, 1), (2, 7, 4)), shared_d_ff=18, shared_gate=True),
    dense_layers=(1,),
    attention=tiny.attention(qkv_bias=True),
)


@pytest.mark.parametrize("name", DECODERS)
def test_matrices_are_all_parameters_but_vectors(name: str) -> None:
    config = DECODERS[name]
    counts = cost.parameters(config)
    by_part: dict[str, int] = {}
    for one in matrices(config):
        by_part[one.part] = by_part.get(one.part, 0) + one.numbers
    total = sum(by_part.values()) - (by_part["head"] if config.tied else 0)
    assert 0 <= counts.total - total < 4e-4 * counts.total
    assert by_part["embedding"] == counts.components["embedding"]
    for part, component in (("dense", "dense_feed_forward"), ("shared", "shared_experts")):
        assert by_part.get(part, 0) == counts.components[component]
    difference = counts.components["routed_experts"] - by_part.get("experts", 0)
    assert 0 <= difference <= 4e-4 * counts.total  # biases


def test_sizes_that_everybody_quotes() -> None:
    sizes = gigabytes(registry.lookup("deepseek-v3"))
    assert [round(sizes[form], 1) for form in ("bf16", "8bit", "4bit")] == [1342.1, 671.0, 335.5]
    assert sizes["int4-g32"] == pytest.approx(335.51 * 4.5 / 4, abs=0.1)
    assert {"fp8", "int8", "mxfp4", "nf4-g64", "int4-g128-asym"} <= sizes.keys()
    assert round(gigabytes(registry.lookup("mixtral-8x7b"))["bf16"], 2) == 93.41
    assert round(gigabytes(registry.lookup("switch-c-2048"))["bf16"], 2) == 3142.62
    for name, config in DECODERS.items():
        assert stored_as(config, "bf16").size_bytes == pytest.approx(
            2 * cost.parameters(config).total, rel=1e-9
        ), name


@pytest.mark.parametrize(
    "form", ["int4-g32", "int8", "mxfp4", "nf4-g64", "int4-mixed", "experts=int4-g64+head=fp8"]
)
@pytest.mark.parametrize("config", [UNEVEN, tiny.CONFIGS["qwen3_moe_plain"], tiny.CONFIGS["all_biases"]])
def test_a_packed_model_has_the_planned_bytes(form: str, config: ModelConfig) -> None:
    model = packed_model(config, form)
    tiles = sum(one.nbytes for name, one in model.state_dict().items() if name.endswith("tiles"))
    stored = stored_as(config, form, kept="fp32")
    policy = policy_named(form)
    packed = {part for part in ("experts", "shared", "dense", "attention", "head") if getattr(policy, part)}
    planned = sum(one.size_bytes for one in stored.parts if one.kind in packed)
    kept = len(packed) < 5  # `packed_model` packs what a policy keeps, as float32
    padding = 4096 * sum(config.moe.at(layer).experts for layer in config.moe_layers) if config.moe else 0
    assert planned <= tiles and (kept or tiles <= planned + padding), (planned, tiles)


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_a_plain_model_has_the_planned_bytes(form: str) -> None:
    for config in (*tiny.CONFIGS.values(), UNEVEN):
        count = sum(one.numel() for one in Transformer(config).parameters())
        biases = sum(
            one.numel()
            for name, one in Transformer(config).named_buffers()
            if name.endswith("selection_bias")
        )
        stored = stored_as(config, form)
        assert stored.size_bytes == (count + biases) * (4 if form == "fp32" else 2) and stored.is_plain
        assert stored.bits_per_weight <= 32


def test_a_packed_folder_is_read_by_sizes_alone(tmp_path: Path) -> None:
    model = Transformer(
        tiny.config(d_model=64, layers=3, moe=tiny.experts(d_ff=64), dense_layers=(0,), d_ff=64)
    )
    quantize(model.eval(), policy_named("experts=int4-g32+attention=int8-g32"))
    checkpoint.save(model, tmp_path / "packed")
    stored = read_stored(tmp_path / "packed", model.config)
    total = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert stored.size_bytes == total and not stored.is_plain
    forms = {(one.kind, one.form) for one in stored.parts}
    assert {
        ("experts", "int4-g32"),
        ("attention", "int8-g32"),
        ("embedding", "fp32"),
        ("head", "fp32"),
    } <= forms
    assert {"dense", "router"} <= {one.kind for one in stored.parts}
    assert sum(one.numbers for one in stored.parts) == sum(one.numbers for one in matrices(model.config))
    said = json.loads((tmp_path / "packed" / "config.json").read_text())
    name = next(iter(said["quantization_config"]["tensors"]))
    for wrong in ({"format": "int5"}, {"format": "int4-g32", "experts": "many"}, None):
        said["quantization_config"]["tensors"][name] = wrong
        (tmp_path / "packed" / "config.json").write_text(json.dumps(said))
        with pytest.raises(FormatError, match=r"config\.json"):
            read_stored(tmp_path / "packed", model.config)


def test_other_folders_and_files(tmp_path: Path) -> None:
    model = tiny.model("mixtral")
    checkpoint.save(model, tmp_path / "plain")
    stored = read_stored(tmp_path / "plain", model.config)
    assert {one.form for one in stored.parts} == {"fp32"} and stored.form == "as stored"
    assert stored.size_bytes == sum(
        file.stat().st_size for file in (tmp_path / "plain").glob("*.safetensors")
    )
    save_gguf(model, tmp_path / "m.gguf")
    assert read_stored(tmp_path / "m.gguf", model.config).size_bytes == (tmp_path / "m.gguf").stat().st_size
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="no weights"):
        read_stored(tmp_path / "empty", model.config)


def test_a_tied_head_is_stored_once_and_packed_apart() -> None:
    config = tiny.config(tied=True, moe=tiny.experts())
    for form, extra in (("bf16", 0), ("int8-g32", 1)):
        head = next(one for one in stored_as(config, form).parts if one.kind == "head")
        assert head.numbers == 61 * 20 and bool(head.size_bytes) == bool(extra)


def test_formats_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="int5") as failed:
        stored_as(UNEVEN, "int5")
    assert "fp16" in (failed.value.hint or "") and "int4-g32" in (failed.value.hint or "")
    with pytest.raises(ConfigError, match="kept is 'int8'"):
        stored_as(UNEVEN, "int4", kept="int8")
    for form in FORMATS:
        assert stored_as(UNEVEN, form).size_bytes > 0
