"""Block by block, a model answers as it does in one piece."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moiety.model import checkpoint
from moiety.model.parts import run
from tests import tiny


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_plain", "llama_biases", "sigmoid", "all_biases"])
def test_the_bits_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    made = tiny.model(name).bfloat16().eval()
    made.save(tmp_path / "model")
    whole = checkpoint.load(tmp_path / "model")
    batches = [
        (tiny.tokens(made, 2, 9), None),
        (tiny.tokens(made, 3, 5), torch.arange(5) < torch.tensor([[5], [3], [1]])),
    ]
    seen: dict[int, list[tuple[int, bool]]] = {}
    asked: list[str] = []
    with checkpoint.open_parts(tmp_path / "model") as parts:

        def noted(tensor: str) -> Tensor:
            asked.append(tensor)
            return parts.read(tensor)

        found = run(
            replace(parts, read=noted),
            batches,
            lambda layer, module, x, routing: seen.setdefault(layer, []).append((len(x), routing is None)),
        )
        assert parts.dtypes == {name: one.dtype for name, one in whole.state_dict().items()}
    for (tokens_BS, valid_BS), one in zip(batches, found, strict=True):
        # As the parts run: with a gradient attention in 16 bits may be another function.
        with torch.no_grad():
            true = whole(tokens_BS, valid_BS=valid_BS)
        assert torch.equal(one.hidden, true.hidden) and torch.equal(one.logits, true.logits)
    assert seen == {
        layer: [(rows, not whole.config.is_moe(layer)) for rows in (18, 15)]
        for layer in range(whole.config.layers)
    }
    twice = ["embed.weight"] if whole.config.tied else []
    assert sorted(asked) == sorted([*whole.state_dict(), *twice])


def test_in_another_dtype_and_rounded_first(tmp_path: Path) -> None:
    made = tiny.model("sigmoid").eval()
    made.save(tmp_path / "model")
    tokens_BS = tiny.tokens(made, 2, 9)
    with checkpoint.open_parts(tmp_path / "model") as parts:
        found = run(parts, [(tokens_BS, None)], dtype=torch.float64, stored_as=torch.bfloat16)[0].logits
    checkpoint.save(made, tmp_path / "rounded", dtype=torch.bfloat16)
    true = checkpoint.load(tmp_path / "rounded", dtype=torch.float64)(tokens_BS).logits
    assert found.dtype == torch.float64 and torch.equal(found, true)
