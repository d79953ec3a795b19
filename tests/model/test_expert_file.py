"""Experts in their file: where the headers say, whole as written, and every lie and every flipped bit named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moiety.errors import FormatError
from moiety.formats.tiles import expert_bytes, projections_in
from moiety.model import checkpoint
from moiety.model.expert_file import ExpertFile, ExpertStack, check_expert, expert_stacks
from moiety.model.layout import TILES
from moiety.model.quantized import expert_modules
from moiety.model.tensor_file import TensorFile
from moiety.model.transformer import Transformer
from moiety.quant.quantize import Choice, policy_named, quantize
from tests import tiny


def uneven(name: str, shape: tuple[int, ...]) -> Choice:
    """Everything in four bits, but every third expert in eight."""
    form = policy_named("int4")(name, shape)
    if form is None or ".experts." not in name:
        return form
    return tuple("int8-g32" if expert % 3 == 0 else form for expert in range(shape[0]))


def written(folder: Path, name: str, policy: Any) -> Transformer:
    model = tiny.model(name).eval()
    quantize(model, policy)
    model.save(folder)
    return model


def read(file: ExpertFile, stack: ExpertStack, place: int) -> bytes:
    with file.path.open("rb") as opened:
        return os.pread(opened.fileno(), stack.expert_bytes, stack.offset_of(place))


@pytest.mark.parametrize("policy", [uneven, policy_named("nf4")], ids=["two formats", "one"])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_one_read_is_one_expert(name: str, policy: Any, tmp_path: Path) -> None:
    model = written(tmp_path / "m", name, policy)
    file = expert_stacks(tmp_path / "m")
    assert file.path == tmp_path / "m" / TILES
    modules = expert_modules(model)
    assert [stack.path for stack in file.stacks] == [*modules]
    seen: dict[int, list[int]] = {}
    for stack in file.stacks:
        module = modules[stack.path]
        assert stack.layer == int(stack.path.split(".")[1]) and stack.experts == module.count
        assert (stack.part is None) == (".parts." not in stack.path)
        seen.setdefault(stack.layer, []).extend(stack.numbers)
        assert stack.offset_bytes % 4096 == 0 and stack.expert_bytes == expert_bytes(stack.projections)
        for place, checksum in enumerate(stack.checksums):
            data = read(file, stack, place)
            assert data == module.tiles[place].numpy().tobytes() and len(data) % 4096 == 0
            assert checksum == xxhash.xxh3_64_intdigest(data)
            check_expert(file.path, stack, place, data)
            slab = torch.full((3, stack.expert_bytes), 9, dtype=torch.uint8)
            slab[1] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            check_expert(file.path, stack, place, slab[1])
            up, down = projections_in(slab, stack.projections)
            assert torch.equal(up.tiles[1], module.weights.up.weight.tiles[place])
            assert torch.equal(down.tiles[1], module.weights.down.weight.tiles[place])
    assert seen.keys() == set(model.config.moe_layers)
    for layer, numbers in seen.items():
        assert sorted(numbers) == list(range(model.blocks[layer].feed_forward.experts.count))


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    """It is a safetensors file like any other; its header ends where the first expert begins."""
    model = written(tmp_path / "m", "sigmoid", uneven)
    found = load_file(tmp_path / "m" / TILES)
    state = {name: one for name, one in model.state_dict().items() if name.endswith(".tiles")}
    sums = {f"{path}.checksums": one.count for path, one in expert_modules(model).items()}
    assert found.keys() == state.keys() | sums.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert all(found[name].dtype == torch.int64 and len(found[name]) == count for name, count in sums.items())
    assert sum(int((found[name] < 0).sum()) for name in sums) > 0, "sums of 2**63 and more are there"
    with safe_open(tmp_path / "m" / TILES, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    length = int.from_bytes((tmp_path / "m" / TILES).read_bytes()[:8], "little")
    assert (8 + length) % 4096 == 0
    first = min(expert_stacks(tmp_path / "m").stacks, key=lambda stack: stack.offset_bytes)
    assert first.offset_bytes == 8 + length


def test_a_model_without_experts_has_no_stacks(tmp_path: Path) -> None:
    written(tmp_path / "m", "llama", policy_named("int4"))
    assert expert_stacks(tmp_path / "m").stacks == ()


def test_nothing_but_headers_and_checksums_is_read(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    true = TensorFile.read

    def watched(self: TensorFile, name: str, row: int | None = None) -> torch.Tensor:
        asked.append(name)
        return true(self, name, row)

    monkeypatch.setattr(TensorFile, "read", watched)
    monkeypatch.setattr(TensorFile, "mapped", None)
    stacks = expert_stacks(good).stacks
    assert asked == [f"{stack.path}.checksums" for stack in stacks] and len(stacks) == 6


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("experts") / "m"
    written(folder, "mixtral", uneven)
    (folder / "manifest.json").unlink()
    return folder


def test_a_damaged_expert_is_named(good: Path) -> None:
    file = expert_stacks(good)
    stack = file.stacks[3]  # of the second layer: experts 1, 2 and 4
    assert (stack.layer, stack.part, stack.numbers) == (1, 1, (1, 2, 4))
    data = read(file, stack, 2)
    for place in (0, 700, stack.expert_bytes - 1):
        for bit in (1, 128):
            harmed = bytearray(data)
            harmed[place] ^= bit
            with pytest.raises(FormatError, match="expert 4 of layer 1 is damaged"):
                check_expert(file.path, stack, 2, harmed)
    with pytest.raises(FormatError, match="expert 2 of layer 1 is damaged"):
        check_expert(file.path, stack, 1, data)
    with pytest.raises(FormatError, match="expert 4 of layer 1 is damaged"):
        check_expert(file.path, stack, 2, data[:-1])


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Another header of the same length before the same bytes."""

    def write(folder: Path) -> None:
        raw = (folder / TILES).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        values = json.loads(raw[8 : 8 + length])
        change(values)
        text = json.dumps(values, separators=(",", ":")).encode()
        assert len(text) <= length
        (folder / TILES).write_bytes(raw[:8] + text.ljust(length) + raw[8 + length :])

    return write


def cut(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / TILES, size % (folder / TILES).stat().st_size)


STACK = "blocks.1.feed_forward.experts.parts.1"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut by a byte": (cut(-1), "cut or altered"),
    "cut in an expert": (cut(30_000), "cut or altered"),
    "cut at the header": (cut(4096), "cut or altered"),
    "cut in the header": (cut(100), "cut or altered"),
    "empty": (cut(0), "cut or altered"),
    "bytes behind": (
        lambda folder: (folder / TILES).write_bytes((folder / TILES).read_bytes() + b"\0" * 4096),
        "4,096 bytes behind its last tensor",
    ),
    "written again by another program": (
        lambda folder: save_file(load_file(folder / TILES), folder / TILES),
        "allowed is a multiple of 4096\nhint: another program",
    ),
    "more experts than bytes": (
        header(lambda one: one[f"{STACK}.tiles"].update(shape=[10**9, 4096])),
        "needs 4,096,000,000,000 bytes, but data_offsets gives it 12,288",
    ),
    "two experts of half the size": (
        header(lambda one: one[f"{STACK}.tiles"].update(shape=[6, 2048])),
        r"is U8 \(6, 2048\); allowed is U8 \(3, 4096\)",
    ),
    "experts over each other": (
        header(lambda one: one[f"{STACK}.tiles"].update(data_offsets=[0, 12288])),
        "overlaps",
    ),
    "beyond the file": (
        header(lambda one: one[f"{STACK}.tiles"].update(data_offsets=[10**15, 10**15 + 12288])),
        "data_offsets",
    ),
    "checksums that are tiles": (
        header(lambda one: one[f"{STACK}.checksums"].update(dtype="U8", shape=[24])),
        r"checksums is U8 \(24,\); allowed is I64 \(3,\)",
    ),
    "not packed": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "moiety"}'),
        "holds no packed model\nhint: `moiety quantize`",
    ),
    "packed by others": (
        lambda folder: (folder / "config.json").write_text(
            '{"quantization_config": {"quant_method": "gptq"}}'
        ),
        "holds no packed model",
    ),
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_files_that_lie_are_refused(lie: str, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "m")
    change, message = HOSTILE[lie]
    change(tmp_path / "m")
    with pytest.raises(FormatError, match=message):
        expert_stacks(tmp_path / "m")


def test_saved_again_it_is_the_same_file(good: Path, tmp_path: Path) -> None:
    checkpoint.load(good).save(tmp_path / "again")
    assert (tmp_path / "again" / TILES).read_bytes() == (good / TILES).read_bytes()
