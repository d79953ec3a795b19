"""The description of a mesh, and the world of one process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moiety.errors import ConfigError
from moiety.parallel.mesh import Layout, World, join
from moiety.parallel.options import MeshOptions


def test_copies_are_what_is_left() -> None:
    assert MeshOptions().copies(1) == 1
    assert MeshOptions(expert_parallel=2).copies(8) == 4
    assert MeshOptions(data_parallel=2, expert_parallel=2, tensor_parallel=2).copies(8) == 2


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        (MeshOptions(expert_parallel=2), 1),
        (MeshOptions(expert_parallel=2), 3),
        (MeshOptions(data_parallel=2), 4),
        (MeshOptions(shard_parallel=4), 2),
    ],
)
def test_a_mesh_of_another_number_of_processes_is_refused(options: MeshOptions, processes: int) -> None:
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node") as refused:
        options.copies(processes)
    assert f"there are {processes}" in refused.value.message


@pytest.mark.parametrize(
    "values",
    [
        {"expert_parallel": 0},
        {"data_parallel": -1},
        {"rank_timeout": 0.0},
        {"expert_parallel": 4, "expert_nodes": 3},
    ],
)
def test_bad_meshes_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        MeshOptions(**values)  # type: ignore[arg-type]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(MeshOptions()) as world:
        assert (world.ranks, world.rank, world.leads, world.parts) == (1, 0, True, 1)
        assert not torch.distributed.is_initialized()
    with pytest.raises(ConfigError, match="there are 1"), join(MeshOptions(expert_parallel=2)):
        raise AssertionError("joined")


def test_the_rows_of_a_batch_are_divided_without_rest() -> None:
    world = World()
    assert world.rows(3) == slice(0, 3)
    world.sizes.update(data=2, expert=2)
    with pytest.raises(ConfigError, match="3 sequences, and 4 processes"):
        world.rows(3)
    seen = []
    for data in range(2):
        for expert in range(2):
            world.place.update(data=data, expert=expert)
            part = world.rows(7)
            seen += range(part.start, part.stop)
    assert seen == [*range(7)]


@pytest.mark.parametrize(("blocks", "axis"), [((), 0), ((4, 2, 2), 0), ((), 1), ((2, 4, 6), 1)])
def test_cut_and_joined_is_whole(blocks: tuple[int, ...], axis: int) -> None:
    shape = [4, 4]
    shape[axis] = sum(blocks) or 6
    whole, layout = torch.randn(shape), Layout("tensor", axis, blocks)
    parts = [layout.cut(whole, rank, 2) for rank in range(2)]
    assert parts[0].shape == parts[1].shape and parts[0].shape[axis] == shape[axis] // 2
    assert torch.equal(layout.joined(parts), whole)
    if blocks:  # every part has its share of every block
        assert torch.equal(
            parts[1].narrow(axis, 0, blocks[0] // 2), whole.narrow(axis, blocks[0] // 2, blocks[0] // 2)
        )


def test_one_process_does_not_import_what_divides_a_model() -> None:
    """It takes 40 MiB that a memory budget would have to count."""
    script = (
        "import sys, moiety.train.loop, moiety.train.state, moiety.train.evaluate\n"
        "heavy = ('torch.distributed.fsdp', 'torch.distributed.tensor', 'torch.distributed.checkpoint')\n"
        "print([one for one in heavy if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
