"""A layer whose experts are in several processes is the layer: output and every gradient, to float64's noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel import layers, ranks

KINDS = [(2, 1), (4, 1), (4, 2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    folders = {}
    for processes, nodes in KINDS:
        folders[processes, nodes] = tmp_path_factory.mktemp("layers")
        ranks.finish(
            ranks.start("tests.parallel.layers", [str(folders[processes, nodes]), str(nodes)], processes)
        )
    return folders


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize("case", layers.CASES)
@pytest.mark.parametrize(("processes", "nodes"), KINDS)
def test_output_and_gradients(
    case: str, processes: int, nodes: int, found: dict[tuple[int, int], Path]
) -> None:
    parts = [load_file(found[processes, nodes] / f"{case}-{rank}.safetensors") for rank in range(processes)]
    tokens = layers.tokens_of(case)[:processes]
    whole = layers.run(layers.layer_of(case), torch.cat(tokens))
    for name in ("output", "x.grad"):
        assert close(torch.cat([part[name] for part in parts]), whole[name]), name
    for name, expected in whole.items():
        if name.startswith("experts."):
            assert close(torch.cat([part[name] for part in parts]), expected), name
        elif name.endswith(".grad") and name != "x.grad":  # what every process has is summed over them
            assert close(torch.stack([part[name] for part in parts]).sum(0), expected), name
    if case != "no token at all":
        assert whole["experts.down.grad"].abs().sum() > 0 and whole["gate.weight.grad"].abs().sum() > 0


@pytest.mark.timeout_s(300)
@pytest.mark.parametrize(("processes", "nodes"), KINDS)
def test_a_token_is_sent_once_to_a_rank_or_node(
    processes: int, nodes: int, found: dict[tuple[int, int], Path]
) -> None:
    groups = processes if nodes == 1 else nodes
    layer, fewer = layers.layer_of("odd"), False
    for rank in range(processes):
        routing = layer.route(layers.tokens_of("odd")[rank])
        reached_TG = routing.mask_TE.view(routing.tokens, groups, -1).any(-1)
        sent = int(load_file(found[processes, nodes] / f"odd-{rank}.safetensors")["rows sent"])
        assert sent == int(reached_TG.sum()) <= routing.pairs
        fewer |= sent < routing.pairs
    assert fewer
