"""Packed models in folders: the same bits back, mapped, and every lie refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moiety
from moiety import storage
from moiety.errors import FormatError, StorageError, UsageError
from moiety.infer.options import SamplingOptions
from moiety.model import checkpoint
from moiety.model.tokenizer import train_tokenizer
from moiety.model.transformer import Transformer
from moiety.quant.quantize import Choice, Policy, policy_named, quantize
from tests import gguf_models, tiny

GREEDY = SamplingOptions(temperature=0.0)


def uneven(name: str, shape: tuple[int, ...]) -> Choice:
    """Everything in four bits, but every third expert in eight."""
    form = policy_named("int4")(name, shape)
    if form is None or ".experts." not in name:
        return form
    return tuple("int8-g32" if expert % 3 == 0 else form for expert in range(shape[0]))


def packed(name: str, policy: Any = uneven) -> Transformer:
    model = tiny.model(name).eval()
    quantize(model, policy)
    return model


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_same_bits_come_back(name: str, tmp_path: Path) -> None:
    for policy in (
        uneven,
        policy_named("nf4"),
        Policy(experts="mxfp4", attention="", head="", shared="fp8", dense="bf16"),
    ):
        model = packed(name, policy)
        model.save(tmp_path / "m")
        again = moiety.load(tmp_path / "m")
        assert isinstance(again, Transformer) and not again.training and again.config == model.config
        assert not any(parameter.requires_grad for parameter in again.parameters())
        first, second = model.state_dict(), again.state_dict()
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]), key
        tokens = tiny.tokens(model, 2, 9)
        assert torch.equal(model(tokens).logits, again(tokens).logits)
        prompt = tokens[0].tolist()
        written = [
            list(moiety.generate(one, prompt, max_tokens=8, sampling=GREEDY)) for one in (model, again)
        ]
        assert written[0] == written[1]


def test_latent_attention_and_biases(tmp_path: Path) -> None:
    model = Transformer(
        gguf_models.config(gguf_models.latent(), moe=gguf_models.sigmoid(), dense_layers=(0,))
    ).eval()
    tiny.fill(model)
    receipt = quantize(model, policy_named("int8-g32"))
    kept = {line.name: line.reason for line in receipt.lines if line.format is None}
    assert "halves apart" in kept["blocks.1.attention.kv_b.weight"]
    model.save(tmp_path / "m")
    tokens = tiny.tokens(model, 1, 9)
    assert torch.equal(checkpoint.load(tmp_path / "m")(tokens).logits, model(tokens).logits)


def test_tiles_are_mapped_and_changes_stay_in_memory(tmp_path: Path) -> None:
    model = packed("mixtral")
    model.save(tmp_path / "m")
    file = tmp_path / "m" / "tiles.safetensors"
    before = file.read_bytes()
    again = checkpoint.load(tmp_path / "m")
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(file) in maps
    tiles = again.blocks[0].attention.qkv.tiles
    assert tiles.data_ptr() % 16 == 0
    tiles.zero_()
    assert file.read_bytes() == before
    packed("olmoe").save(tmp_path / "m")  # the folder is replaced, what is mapped is not
    tokens = tiny.tokens(model, 1, 5)
    again.blocks[0].attention.qkv.load_state_dict(model.blocks[0].attention.qkv.state_dict())
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_loading_imports_no_compiler(good: Path) -> None:
    """torch fills an embedding on the meta device through its compiler, whose import takes seconds."""
    code = "import sys, moiety; moiety.load(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, good], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == "False", done.stdout + done.stderr


def test_beside_the_weights(tmp_path: Path) -> None:
    model = tiny.model("", vocab_size=300).eval()
    tokenizer = train_tokenizer(["some text to learn from"] * 9, 290)
    quantize(model, policy_named("int8"))
    choice = checkpoint.save(model, tmp_path / "m", tokenizer=tokenizer, extra={"a": 1}, dtype=torch.bfloat16)
    assert choice.family.model_type == "moiety" and checkpoint.load_extra(tmp_path / "m") == {"a": 1}
    again = checkpoint.load(tmp_path / "m")
    assert again.embed.weight.dtype == torch.bfloat16 and again.head is not None
    assert checkpoint.load(tmp_path / "m", dtype=torch.float32).embed.weight.dtype == torch.float32
    assert moiety.Tokenizer.load(tmp_path / "m").vocab_size == tokenizer.vocab_size
    with pytest.raises(UsageError, match="are packed"):
        checkpoint.load_weights(tmp_path / "m", tiny.model("", vocab_size=300))
    assert (tmp_path / "m" / "manifest.json").is_file()
    storage.verify(tmp_path / "m")


def said(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization_config."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values["quantization_config"])
    file.write_text(json.dumps(values))


def tensors(file: str, **changes: Any) -> Callable[[Path], None]:
    """Change tensors of a file; None takes one out."""

    def change(folder: Path) -> None:
        found = {
            **load_file(folder / file),
            **{name.replace("__", "."): one for name, one in changes.items()},
        }
        save_file({name: one for name, one in found.items() if one is not None}, folder / file)

    return change


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: said(folder, change)


def edit(key: str, **changes: Any) -> Callable[[Path], None]:
    return config(lambda one: one["tensors"][key].update(changes))


def renumber(path: str, numbers: Any) -> Callable[[Path], None]:
    return config(lambda one: one["numbers"].update({path: numbers}))


def plain(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    return tensors("model.safetensors", **{name: tensor})


NUMBERS = ([[0, 1, 2, 3, 4]], [[0, 3], [1, 2]], [[3, 0], [1, 2, 4]], [[0, 3], [1, 2, True]], "01", [0], [[]])
EXPERTS = "blocks.0.feed_forward.experts"
QKV = "blocks.0.attention.qkv"
STACK, CHECKSUMS = (f"{EXPERTS}.parts.0.{leaf}" for leaf in ("tiles", "checksums"))
LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "version": (config(lambda one: one.update(version=3)), "version 3 of packed weights.*\n?.*newer program"),
    "the version before": (
        config(lambda one: one.update(version=1)),
        "version 1 of packed weights.*\n.*again with `moiety quantize`",
    ),
    "no tensors": (config(lambda one: one.pop("tensors")), "has tensors None"),
    "tensors is a list": (config(lambda one: one.update(tensors=[])), r"has tensors \[\]"),
    "no numbers": (config(lambda one: one.pop("numbers")), "has numbers None"),
    "entry is text": (config(lambda one: one["tensors"].update({QKV: "int4"})), "attention.qkv is 'int4'"),
    "unknown format": (edit(QKV, format="int3"), "no weight format 'int3'"),
    "format is a number": (edit(QKV, format=4), "no weight format ''"),
    "an alias": (edit(QKV, format="int4"), "by the model it is"),
    "rows": (edit(QKV, rows=10**12), "attention.qkv is .*by the model it is"),
    "experts": (edit(QKV, experts=2), "by the model it is"),
    "true for one": (edit(QKV, interleaved=True), "by the model it is"),
    "another key": (edit(QKV, zero=8), "by the model it is"),
    "other format": (edit(QKV, format="int8-g32"), "tensor blocks.0.attention.qkv.tiles is U8"),
    "left out": (config(lambda one: one["tensors"].pop(QKV)), "lacks blocks.0.attention.qkv.weight"),
    "unknown place": (
        config(lambda one: one["tensors"].update({"blocks.9.x": {}})),
        "says that blocks.9.x is packed",
    ),
    "a router": (
        config(lambda one: one["tensors"].update({"blocks.0.feed_forward.gate": one["tensors"][QKV]})),
        "says that blocks.0.feed_forward.gate is packed",
    ),
    "half a pair": (
        config(lambda one: one["tensors"].pop(f"{EXPERTS}.parts.0.down")),
        "parts.0.down is None",
    ),
    "numbers of no experts": (renumber(QKV, [[0], [1]]), f"has numbers .* for {QKV}"),
    "numbers nowhere": (renumber("x", [[0], [1]]), "says that x is packed"),
    **{f"numbers {numbers}": (renumber(EXPERTS, numbers), "allowed is two or more") for numbers in NUMBERS},
    "numbers swapped": (renumber(EXPERTS, [[1, 2, 4], [0, 3]]), "by the model it is"),
    "no file of tiles": (lambda folder: (folder / "tiles.safetensors").unlink(), "tiles.safetensors"),
    "no other file": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "tiles cut": (
        lambda folder: (folder / "tiles.safetensors").write_bytes(
            (folder / "tiles.safetensors").read_bytes()[:-1]
        ),
        "tiles.safetensors",
    ),
    "tiles empty": (lambda folder: (folder / "tiles.safetensors").write_bytes(b""), "tiles.safetensors"),
    "tiles missing": (
        tensors("tiles.safetensors", blocks__0__attention__qkv__tiles=None),
        "lacks .*qkv.tiles",
    ),
    "tiles too many": (
        tensors("tiles.safetensors", more__tiles=torch.zeros(3, dtype=torch.uint8)),
        "also has more",
    ),
    "tiles of another type": (
        tensors(
            "tiles.safetensors", blocks__0__attention__qkv__tiles=torch.zeros(1, 3, 1, 288, dtype=torch.int8)
        ),
        "is I8",
    ),
    "checksums missing": (
        tensors("tiles.safetensors", **{CHECKSUMS: None}),
        "lacks .*experts.parts.0.checksums",
    ),
    "checksums too few": (
        tensors("tiles.safetensors", **{CHECKSUMS: torch.zeros(1, dtype=torch.int64)}),
        r"parts.0.checksums is I64 \(1,\); allowed is I64 \(2,\)",
    ),
    "checksums of another type": (
        tensors("tiles.safetensors", **{CHECKSUMS: torch.zeros(2)}),
        "parts.0.checksums is F32",
    ),
    "experts of another size": (
        tensors("tiles.safetensors", **{STACK: torch.zeros(2, 8192, dtype=torch.uint8)}),
        r"parts.0.tiles is U8 \(2, 8192\)",
    ),
    "a norm of bytes": (plain("norm.weight", torch.zeros(20, dtype=torch.uint8)), "norm.weight is U8"),
    "a norm of another size": (plain("norm.weight", torch.zeros(21)), r"norm.weight is F32 \(21,\)"),
    "an embedding too few": (plain("embed.weight", None), "lacks embed.weight"),
    "linked out": (
        lambda folder: (
            (folder / "tiles.safetensors").rename(folder.parent / "away"),
            (folder / "tiles.safetensors").symlink_to(folder.parent / "away"),
        ),
        "tiles.safetensors",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quantized") / "m"
    packed("mixtral").save(folder)
    (folder / storage.MANIFEST).unlink()
    checkpoint.load(folder)
    return folder


@pytest.mark.parametrize("lie", LIES)
def test_folders_that_lie_are_refused(lie: str, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "m")
    change, message = LIES[lie]
    change(tmp_path / "m")
    with pytest.raises((FormatError, StorageError), match=message):
        checkpoint.load(tmp_path / "m")


def test_a_config_far_beyond_the_weights(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "m")
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    for key, number in (("layers", 10**9), ("vocab_size", 10**12)):
        changed = {**values, "model": {**values["model"], key: number}}
        (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(FormatError, match="describes"):
            checkpoint.load(tmp_path / "m")


def test_altered_files_are_noticed_where_a_manifest_is(tmp_path: Path) -> None:
    packed("mixtral").save(tmp_path / "m")
    with (tmp_path / "m" / "tiles.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match="bytes, but"):
        checkpoint.load(tmp_path / "m")
    packed("mixtral").save(tmp_path / "n")
    raw = bytearray((tmp_path / "n" / "tiles.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "n" / "tiles.safetensors").write_bytes(raw)
    checkpoint.load(tmp_path / "n")  # tiles are mapped, not read
    with pytest.raises(FormatError, match="sha256"):
        storage.verify(tmp_path / "n")
