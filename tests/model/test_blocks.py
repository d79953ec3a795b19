"""Blocks of GGUF and mxfp4 files that are multiplied with as they are: the same numbers, bit for bit."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from torch import Tensor

from moiety.errors import FormatError
from moiety.formats.tiles import unpack
from moiety.model import checkpoint
from moiety.model.gguf import load_gguf, save_gguf
from moiety.model.quantized import description
from moiety.model.slots import packed_matrices
from moiety.model.transformer import Transformer
from tests import gguf_models, tiny

SIZES = {"d_model": 64, "layers": 2}
MODELS = {
    "llama": gguf_models.config(tiny.attention(heads=4, kv_heads=2, head_dim=32), d_ff=96, **SIZES),
    "tied": gguf_models.config(tiny.attention(heads=2, kv_heads=1, head_dim=32), d_ff=32, tied=True, **SIZES),
    "mixtral": gguf_models.config(
        tiny.attention(heads=2, kv_heads=1, head_dim=32), moe=tiny.experts(d_ff=96), **SIZES
    ),
    "shared": gguf_models.config(
        tiny.attention(heads=2, kv_heads=2, head_dim=32, qkv_bias=True),
        moe=tiny.experts(d_ff=32, shared_d_ff=64, shared_gate=True, renormalize=False),
        **SIZES,
    ),
    "latent": gguf_models.config(
        gguf_models.latent(), moe=gguf_models.sigmoid(d_ff=32, shared_d_ff=32), dense_layers=(0,), **SIZES
    ),
}


def unpacked(model: Transformer) -> dict[str, Tensor]:
    """What packed matrices mean, by the parameter that they stand for."""
    found = {}
    for path, one in packed_matrices(model).items():
        pair = path.endswith((".gate_up", ".up", ".down"))
        weight = unpack(one.weight)
        found[path if pair else f"{path}.weight"] = weight if ".experts." in path else weight[0]
    return found


def q4_1(source: Path, target: Path) -> None:
    """The float32 matrices of a file as Q4_1, by the gguf package; `gguf_models.rewritten` keeps the rest."""
    reader = package.GGUFReader(source)
    writer = package.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            part = field.types[-1] if kind == package.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, part)
    kind = package.GGMLQuantizationType.Q4_1
    for tensor in reader.tensors:
        if len(tensor.shape) > 1 and "inp" not in tensor.name and tensor.shape[0] % 32 == 0:
            writer.add_tensor(
                tensor.name, package.quants.quantize(np.array(tensor.data), kind), raw_dtype=kind
            )
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_gguf_blocks_are_kept(name: str, kind: str, tmp_path: Path) -> None:
    model = Transformer(MODELS[name])
    tiny.fill(model)
    file = tmp_path / "model.gguf"
    if kind == "q4_1":
        save_gguf(model, tmp_path / "plain.gguf", kind="f32")
        q4_1(tmp_path / "plain.gguf", file)
    else:
        save_gguf(model, file, kind=kind)
    decoded, kept = load_gguf(file), checkpoint.load(file, packed=True)
    state, numbers = decoded.state_dict(), unpacked(kept)
    numbers_of = {**state, "head.weight": state.get("head.weight", state["embed.weight"])}
    assert len(numbers) >= 4 * model.config.layers and "head.weight" in numbers
    for parameter, weight in numbers.items():
        assert torch.equal(weight, numbers_of[parameter]), parameter
    forms = {one.form.name for one in packed_matrices(kept).values()}
    said = {"q4_0": "int4-g32", "q4_1": "int4-g32-asym", "q8_0": "int8-g32"}[kind]
    assert said in forms and (forms <= {said, "int8-g32"} or name == "latent"), forms
    for parameter, weight in kept.state_dict().items():
        if parameter in state:
            assert torch.equal(weight, state[parameter]), parameter
    tokens = tiny.tokens(model, 2, 7)
    with torch.no_grad():
        true = decoded(tokens)
        ours = kept(tokens, pinned={layer: one.pinned() for layer, one in true.routing.items()})
    assert 0 < (ours.logits - true.logits).norm() / true.logits.norm() < 0.05  # activations in eight bits


def test_one_projection_in_blocks_takes_the_other_along(tmp_path: Path) -> None:
    model = Transformer(MODELS["llama"])
    save_gguf(model, tmp_path / "a.gguf", kind="q4_0")
    reader = package.GGUFReader(tmp_path / "a.gguf")
    down = {one.name: one for one in reader.tensors}["blk.0.ffn_down.weight"]
    raw = bytearray((tmp_path / "a.gguf").read_bytes())
    raw[down.data_offset : down.data_offset + 2] = struct.pack("<e", float("nan"))
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_down\.weight has a scale that is not finite"):
        load_gguf(tmp_path / "bad.gguf", packed=True)
    thin = Transformer(gguf_models.config(tiny.attention(heads=2, kv_heads=1, head_dim=32), d_ff=40, **SIZES))
    save_gguf(thin, tmp_path / "b.gguf", kind="q8_0")  # rows of `down` are no multiple of 32: float16
    kept, decoded = load_gguf(tmp_path / "b.gguf", packed=True), load_gguf(tmp_path / "b.gguf")
    forms = {path.rpartition(".")[2]: one.form.name for path, one in packed_matrices(kept).items()}
    assert forms == {
        "qkv": "int8-g32",
        "out": "int8-g32",
        "gate_up": "int8-g32",
        "down": "f32",
        "head": "int8-g32",
    }
    assert torch.equal(unpacked(kept)["blocks.1.feed_forward.down"], decoded.blocks[1].feed_forward.down)
    kept.save(tmp_path / "folder")
    tokens = tiny.tokens(thin, 1, 5)
    assert torch.equal(checkpoint.load(tmp_path / "folder")(tokens).logits, kept(tokens).logits)


def test_plain_files_have_nothing_to_keep(tmp_path: Path) -> None:
    model = tiny.model("mixtral")
    model.save(tmp_path / "m")
    same = checkpoint.load(tmp_path / "m", packed=True)
    assert description(same) == {} and same.state_dict().keys() == model.state_dict().keys()
