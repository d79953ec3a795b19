"""A checkpoint is the same bits however many processes wrote it, and any number of them goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moiety import storage
from moiety.errors import FormatError
from moiety.model import checkpoint
from moiety.train.data import open_tokens
from moiety.train.loop import train
from tests.parallel import child, ranks
from tests.train import tiny

CHAIN = [
    (2, {"expert_parallel": 2}),
    (4, {"expert_parallel": 4}),
    (2, {"shard_parallel": 2}),
    (4, {"expert_parallel": 2, "shard_parallel": 2}),
    (2, {"tensor_parallel": 2}),
    (4, {"expert_parallel": 2}),
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The checkpoint of a short run, and what each mesh in turn made of the one before."""
    folder = tmp_path_factory.mktemp("chain")
    tiny.text(folder / "tokens")
    net = tiny.model(child.VOCABULARY, experts=4, shared_d_ff=16)
    (*_, last) = train(net, open_tokens(folder / "tokens"), tiny.options(steps=2), run_folder=folder / "0")
    assert last.checkpoint is not None
    made = [last.checkpoint]
    for number, (processes, mesh) in enumerate(CHAIN, start=1):
        arguments = ["reload", str(made[-1]), str(folder / str(number)), json.dumps(mesh)]
        ranks.finish(ranks.start("tests.parallel.child", arguments, processes))
        made.append(folder / str(number) / "checkpoints" / "step-00000002")
    return made


@pytest.mark.timeout_s(600)
def test_every_mesh_keeps_every_bit(chain: list[Path]) -> None:
    weights = load_file(chain[0] / "model.safetensors")
    net = tiny.model(child.VOCABULARY, experts=4, shared_d_ff=16, seed=4)
    moments = tiny.moments(chain[0], net, tiny.options())
    assert any(key.endswith("experts.down:exp_avg_sq") for key in moments)
    for folder in chain[1:]:
        storage.verify(folder)
        tiny.assert_same_bits(load_file(folder / "model.safetensors"), weights)
        tiny.assert_same_bits(tiny.moments(folder, net, tiny.options()), moments)
        assert (folder / "state" / "rng.json").read_bytes() == (chain[0] / "state" / "rng.json").read_bytes()


@pytest.mark.timeout_s(600)
def test_moments_lie_in_the_parts_of_their_processes(chain: list[Path]) -> None:
    shards = sorted((chain[2] / "state" / "moments").iterdir())
    held = [load_file(shard)["blocks.0.feed_forward.experts.down:exp_avg"].shape[0] for shard in shards]
    assert held == [1, 1, 1, 1]  # EP 4 of four experts
    assert checkpoint.load(chain[2]).config == checkpoint.load(chain[0]).config


@pytest.mark.timeout_s(600)
def test_a_missing_shard_is_an_error(chain: list[Path], tmp_path: Path) -> None:
    net, how = tiny.model(child.VOCABULARY, experts=4, shared_d_ff=16), tiny.options()
    tiny.moments(chain[1], net, how)
    shard = sorted((chain[1] / "state" / "moments").iterdir())[-1]
    hidden = shard.rename(tmp_path / shard.name)
    try:
        with pytest.raises(FormatError):
            tiny.moments(chain[1], net, how)
    finally:
        hidden.rename(shard)
