"""An embedding that stays on disk: the bits of one in memory, or an error that says which row is not what it was."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moiety.errors import FormatError
from moiety.infer import streaming
from moiety.infer.embedding import StreamedEmbedding
from moiety.infer.engine import Engine
from moiety.infer.measure import weights_of
from moiety.infer.offload import store_of
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions, StreamOptions
from moiety.infer.streaming import load_streamed
from moiety.model import checkpoint
from moiety.model.expert_file import expert_stacks
from moiety.model.tensor_file import open_tensors
from moiety.quant.quantize import policy_named, quantize
from tests import tiny
from tests.infer.test_streaming import with_slots

NAME = "embed.weight"
GREEDY = SamplingOptions(temperature=0.0)


def folder_of(tmp_path: Path, policy: str = "int4", **changes: Any) -> Path:
    """A packed tiny model with experts on disk."""
    model = tiny.model("", moe=tiny.experts(), **changes).eval()
    quantize(model, policy_named(policy))
    model.save(tmp_path / "packed")
    return tmp_path / "packed"


def opened(folder: Path, dtype: torch.dtype | None = None) -> StreamedEmbedding:
    with open_tensors(folder / "model.safetensors") as file:
        return StreamedEmbedding(file, dtype)


def damage(folder: Path, token: int) -> None:
    """Flip a bit of one row, in place."""
    with open_tensors(folder / "model.safetensors") as file:
        place = file.places[NAME]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(place.start + token * place.size_bytes // place.shape[0] + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_rows_are_those_of_an_embedding_in_memory(
    stored: torch.dtype, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, dtype=stored)
    whole = checkpoint.load(folder, dtype=dtype).embed
    found = opened(folder, dtype)
    last = len(whole.weight) - 1
    for tokens in ([[3, 3, 0], [last, 7, 3]], [5], [last] * 40):
        given = torch.tensor(tokens)
        assert found(given).dtype == whole(given).dtype
        assert torch.equal(found(given), whole(given))
    assert (found.weight.shape, found.weight.dtype) == (whole.weight.shape, whole.weight.dtype)
    assert found.weight.isnan().all() and found.weight.untyped_storage().nbytes() < 8
    assert not found.state_dict()


@pytest.mark.parametrize(
    ("tied", "policy", "streamed"),
    [
        (False, "int4", True),
        (False, "experts=int4-g32", True),
        (True, "int4", True),
        (True, "experts=int4-g32", False),
    ],
)
def test_what_the_head_multiplies_with_stays_in_memory(
    tied: bool, policy: str, streamed: bool, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, policy, tied=tied)
    whole, model = checkpoint.load(folder), with_slots(folder, 3)
    tokens = tiny.tokens(whole, 2, 9)
    assert torch.equal(model(tokens).logits, whole(tokens).logits)
    assert isinstance(model.embed, StreamedEmbedding if streamed else nn.Embedding)
    assert (NAME in dict(model.named_parameters())) != streamed
    assert weights_of(model).dense == weights_of(whole).dense, "what a step reads"


def test_where_everything_fits_the_embedding_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    whole, model = checkpoint.load(folder), load_streamed(folder, StreamOptions(memory="64GiB"))
    assert type(model.embed) is nn.Embedding and torch.equal(model.embed.weight, whole.embed.weight)
    assert not any(one.requires_grad for one in model.parameters())
    original, (stack, *_) = streaming._budget, expert_stacks(folder).stacks
    all_bytes = 3 * stack.experts * stack.expert_bytes + whole.embed.weight.nbytes
    for rest_bytes, fits in ((all_bytes, True), (all_bytes - 1, False)):

        def budget(*arguments: Any, rest_bytes: int = rest_bytes) -> streaming.Budget:
            found = original(*arguments)
            return replace(found, total_bytes=found.total_bytes - found.rest_bytes + rest_bytes)

        monkeypatch.setattr(streaming, "_budget", budget)
        model = load_streamed(folder, StreamOptions(memory="64GiB"))
        assert (store_of(model) is None) == (type(model.embed) is nn.Embedding) == fits
        assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, whole(torch.tensor([[1, 2, 3]])).logits)


def test_a_changed_row_ends_its_requests_and_the_engine_lives_on(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    engine = Engine(with_slots(folder, 3), options=EngineOptions(max_positions=60, max_requests=4))
    asked = RequestOptions(max_tokens=1, sampling=GREEDY)
    prompts = [[1, 2, 3], [4, 5, 6]]
    wanted = [result.tokens for result in engine.generate(prompts, asked)]
    damage(folder, 5)
    for prompt, one in zip(prompts, wanted, strict=True):
        (result,) = engine.generate([prompt], asked)
        if 5 in prompt:
            assert result.reason == "error" and "embedding of token 5 is not what it was" in result.error
        else:
            assert result.tokens == one
    damage(folder, 5)
    assert [result.tokens for result in engine.generate(prompts, asked)] == wanted


def test_a_file_that_is_replaced_is_read_on_and_one_that_is_cut_is_an_error(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    file, tokens = folder / "model.safetensors", torch.tensor([0, 9])
    wanted = opened(folder)(tokens)
    with open_tensors(file) as inside:
        file.rename(folder / "old")
        file.write_bytes(b"another one")
        found = StreamedEmbedding(inside)
    assert torch.equal(found(tokens), wanted)
    os.truncate(folder / "old", 100)
    with pytest.raises(FormatError, match=r"was cut while tensor embed[.]weight was read"):
        found(tokens)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="who has files open is not said here")
def test_the_file_is_closed_with_the_embedding(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    found = opened(folder)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del found
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
