"""`moiety quantize`: what it writes and prints is what the functions say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moiety.infer.open import open_model
from moiety.model import checkpoint
from moiety.model.gguf import save_gguf
from moiety.model.quantized import description
from moiety.model.slots import packed_matrices
from moiety.model.transformer import Transformer
from moiety.quant.quantize import policy_named, quantize
from tests import gguf_models, tiny
from tests.cli.conftest import Call
from tests.test_storage import ROOT, small_disk


def forms(path: Path) -> dict[str, str]:
    return {name: one.form.name for name, one in packed_matrices(checkpoint.load(path)).items()}


def test_a_packed_model_generates_what_its_python_twin_does(
    call: Call, trained: Path, tmp_path: Path
) -> None:
    said = call("quantize", trained, tmp_path / "out", "--format", "int8-g32", "--head", "none")
    assert said.code == 0 and said.err == "" and "experts, int8-g32" in said.out and "written: " in said.out
    opened = open_model(trained)
    quantize(opened.model, policy_named("experts=int8-g32+attention=int8-g32+shared=int8-g32+dense=int8-g32"))
    again = open_model(tmp_path / "out")
    assert description(again.model) == description(opened.model)
    tokens = torch.arange(9)[None]
    assert torch.equal(again.model(tokens).logits, opened.model(tokens).logits)
    assert again.tokenizer.encode("the cat") == opened.tokenizer.encode("the cat")
    words = ("the cat", "--max-tokens", 8, "--temperature", 0, "--json")
    assert call("generate", tmp_path / "out", *words).json["text"]
    assert call("params", tmp_path / "out", "--json").json["total"] > 0


def test_receipt_as_json_and_nothing_written(call: Call, trained: Path, tmp_path: Path) -> None:
    said = call("quantize", trained, tmp_path / "out", "--experts", "mxfp4", "--dry-run", "--json")
    assert said.code == 0 and said.json["path"] is None and not (tmp_path / "out").exists()
    lines = {line["name"]: line for line in said.json["tensors"]}
    assert lines["blocks.0.feed_forward.experts.down"]["format"] == "mxfp4"
    assert lines["blocks.0.attention.qkv.weight"]["format"] == "int4-g32"
    assert lines["blocks.0.feed_forward.gate.weight"]["reason"]
    for key in ("bytes_before", "bytes_after"):
        assert said.json[key] == sum(line[key] for line in lines.values())
    assert "nothing was written" in call("quantize", trained, tmp_path / "out", "--dry-run").out


def test_bits_of_experts_by_measurement(call: Call, trained: Path, texts: list[str], tmp_path: Path) -> None:
    said = call("quantize", trained, tmp_path / "out", *texts, "--expert-bits", 6.5, "--json")
    assert said.code == 0 and "measuring experts" in said.err
    found = {line["format"] for line in said.json["tensors"] if ".experts." in line["name"]}
    assert found & {"int4-g32 x 2, int8-g32 x 2", "int8-g32 x 2, int4-g32 x 2"} or any(
        form and "," in form for form in found
    )
    assert any(".parts.1." in path for path in forms(tmp_path / "out"))
    call("quantize", trained, tmp_path / "o", *texts, "--expert-bits", 2).assert_refused(
        2, "2 bits are too few"
    )


def test_blocks_of_a_gguf_are_kept_unless_said(call: Call, tmp_path: Path) -> None:
    attention = tiny.attention(heads=2, kv_heads=1, head_dim=32)
    model = Transformer(gguf_models.config(attention, d_model=64, d_ff=96, layers=2))
    save_gguf(model, tmp_path / "m.gguf", kind="q4_0", tokenizer=gguf_models.tokenizer())
    assert call("quantize", tmp_path / "m.gguf", tmp_path / "kept", "--format", "mxfp4").code == 0
    assert set(forms(tmp_path / "kept").values()) == {"int4-g32", "int8-g32"}
    words = ("--format", "mxfp4", "--no-keep-blocks")
    assert call("quantize", tmp_path / "m.gguf", tmp_path / "anew", *words).code == 0
    assert set(forms(tmp_path / "anew").values()) == {"mxfp4", "int8-g32"}
    ids = gguf_models.tokenizer().encode("hello the")
    assert open_model(tmp_path / "kept").tokenizer.encode("hello the") == ids


@pytest.mark.parametrize(
    ("words", "named"),
    [(("--format", "int3"), "int3"), (("--head", "int3"), "int3"), (("--format", "router=int8"), "router")],
)
def test_words_that_mean_nothing(
    words: tuple[str, ...], named: str, call: Call, trained: Path, tmp_path: Path
) -> None:
    call("quantize", trained, tmp_path / "out", *words).assert_refused(2, named)


def test_source_is_not_target(call: Call, trained: Path) -> None:
    folder = open_model(trained).path
    call("quantize", folder, folder).assert_refused(2, "source and target")


def test_a_full_disk_leaves_nothing_half_written(trained: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    small = small_disk(disk)  # refused before a byte is written; files that may not grow fail in the middle
    script = '"$1" -m moiety quantize "$2" "$3/out"; echo "$?"; ls -A "$3"'
    for limit in ([small] if small else []) + [["prlimit", f"--fsize={size}"] for size in (500, 20_000)]:
        done = subprocess.run(
            [*limit, "sh", "-c", script, "sh", sys.executable, trained, disk],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "1\n", (done.stdout, done.stderr)
        assert "cannot write" in done.stderr and "Traceback" not in done.stderr
        assert ("No space left" if limit is small else "File too large") in done.stderr
