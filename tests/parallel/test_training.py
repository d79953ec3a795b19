"""A run in several processes is the run in one: every parameter, loss, norm and count, whatever the mesh."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moiety.parallel.mesh import World
from tests.parallel import child, ranks
from tests.train import tiny

SINGLE, DOUBLE = 1e-6, 1e-12  # a parameter's distance relative to its norm
TRAIN = {"steps": 3, "learning_rate": 1e-3, "down_rate": 1.0, "warmup": 1}
SIGMOID = {
    "router": "sigmoid",
    "selection_bias": True,
    "experts": 8,
    "experts_per_token": 3,
    "bias_rate": 0.01,
}
# What is trained. All cases run under every mesh that has a case in MESHES.
RUNS: dict[str, dict[str, Any]] = {
    "shared": {"model": {"shared_d_ff": 16}, "train": TRAIN},
    "odd": {"model": SIGMOID, "train": {**TRAIN, "batch": 5, "length": 31, "accumulate": 2, "clip": 0.3}},
    "skewed": {"model": {"shared_d_ff": 16}, "train": {**TRAIN, "clip": 0}, "skewed": True, "double": True},
    "exact": {
        "model": {"shared_d_ff": 16, "null_experts": 2, "kv_heads": 2},
        "train": {**TRAIN, "losses": ["group=0.01", "sparsity=0.001"], "balance_groups": 2},
        "double": True,
    },
    "dense": {"model": {"experts": 0}, "train": TRAIN},
}
MESHES: dict[int, dict[str, dict[str, int]]] = {
    2: {
        "expert": {"expert_parallel": 2},
        "data": {},
        "shard": {"shard_parallel": 2},
        "tensor": {"tensor_parallel": 2},
    },
    4: {
        "expert": {"expert_parallel": 4},
        "nodes": {"expert_parallel": 4, "expert_nodes": 2},
        "expert_data": {"expert_parallel": 2},
        "expert_shard": {"expert_parallel": 2, "shard_parallel": 2},
        "expert_tensor": {"expert_parallel": 2, "tensor_parallel": 2},
    },
}
CASES = [
    (processes, mesh, run)
    for processes, meshes in MESHES.items()
    for mesh in meshes
    for run in RUNS
    if not (run == "dense" and mesh in ("expert", "nodes", "expert_data"))
]


def spoken(name: str) -> str:
    return name.replace("_", " x ")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    tiny.text(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tokens: Path) -> dict[str, Any]:
    """Every run in one process, which is the definition."""
    return {name: child.train_case(run, tokens, World()) for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def together(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Every case, all of one number of processes in one go."""
    folders = {}
    for processes, meshes in MESHES.items():
        folders[processes] = tmp_path_factory.mktemp(f"of{processes}")
        cases = {
            f"{mesh}-{run}": {**RUNS[run], "mesh": meshes[mesh]}
            for number, mesh, run in CASES
            if number == processes
        }
        (folders[processes] / "cases.json").write_text(json.dumps(cases))
        arguments = ["train", str(folders[processes] / "cases.json"), str(tokens), str(folders[processes])]
        ranks.finish(ranks.start("tests.parallel.child", arguments, processes))
    return folders


@pytest.mark.timeout_s(600)
@pytest.mark.parametrize(("processes", "mesh", "run"), CASES)
def test_the_same_as_one_process(
    processes: int, mesh: str, run: str, alone: dict[str, Any], together: dict[int, Path]
) -> None:
    bar = DOUBLE if RUNS[run].get("double") else SINGLE
    expected, steps = alone[run]
    found = load_file(together[processes] / f"{mesh}-{run}.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        distance = float((found[name] - value).norm() / value.norm().clamp(min=1e-30))
        assert distance <= bar, (name, distance)
    told = json.loads((together[processes] / f"{mesh}-{run}.json").read_text())
    for here, there in zip(steps, told, strict=True):
        assert here["tokens"] == there["tokens"] > 0
        for name in ("loss", "norm", "held_out"):
            assert here[name] == there[name] or math.isclose(here[name], there[name], rel_tol=1e-6), name
        for name, value in here["losses"].items():
            assert math.isclose(value, there["losses"][name], rel_tol=1e-6), name
        for layer, (counts, count, z) in here["health"].items():
            counts_there, count_there, z_there = there["health"][str(layer)]
            assert (counts, count) == (counts_there, count_there)
            assert math.isclose(z, z_there, rel_tol=1e-5)


def test_the_runs_are_what_they_are_for(alone: dict[str, Any]) -> None:
    """The skewed run leaves half of the experts without a token; biases move; norms are clipped; a batch is odd."""
    for counts, _, _ in alone["skewed"][1][0]["health"].values():
        assert counts[2:] == [0, 0] and counts[0] == counts[1] > 0
    biases = [value for name, value in alone["odd"][0].items() if name.endswith("selection_bias")]
    assert len(biases) == 2 and all(bias_E.abs().max() > 0 for bias_E in biases)
    assert all(step["norm"] > 0.3 for step in alone["odd"][1])
    assert RUNS["odd"]["train"]["batch"] % 2 == 1
