"""One of several processes of a test: trains the cases it is given, or takes a checkpoint through other meshes.

python -m tests.parallel.child train CASES.json TOKENS OUT     each case's weights, and what its steps said
python -m tests.parallel.child reload FROM TO MESH.json        load a checkpoint, save it again
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moiety.model.transformer import Transformer
from moiety.parallel.mesh import World, join, meet
from moiety.parallel.options import MeshOptions
from moiety.train.data import open_tokens
from moiety.train.loop import StepRecord, moe_layers, train
from moiety.train.optim import build_optimizer
from moiety.train.spread import settle, spread
from moiety.train.state import load_state, save_checkpoint
from tests.train import tiny

VOCABULARY = 300


def case_model(case: dict[str, Any]) -> Transformer:
    """The model of a case, the same in every process."""
    net = tiny.model(VOCABULARY, **case["model"])
    if case.get("skewed"):  # of equal scores the lower experts win, so the higher ones get nothing
        for moe in moe_layers(net).values():
            torch.nn.init.zeros_(moe.gate.weight)
    return net.double() if case.get("double") else net


def said(step: StepRecord) -> dict[str, Any]:
    """What of a step must be the same in any number of processes."""
    health = {layer: [one.counts_E.tolist(), one.tokens, one.router_z] for layer, one in step.health.items()}
    return {
        "loss": step.loss,
        "losses": dict(step.router_losses),
        "norm": step.gradient_norm,
        "tokens": step.tokens,
        "health": health,
        "held_out": None if step.evaluation is None else step.evaluation.mean_loss,
    }


def whole_state(net: Transformer, world: World) -> dict[str, torch.Tensor]:
    """Every tensor put together."""
    settle(net)
    return {name: world.whole(name, one).contiguous() for name, one in net.state_dict().items()}


def train_case(case: dict[str, Any], tokens: Path, world: World) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Its weights after all steps, and what these said."""
    net = case_model(case)
    options = {**case["train"], "losses": tuple(case["train"].get("losses", ()))}
    records = train(net, open_tokens(tokens), tiny.options(**options), world=world)
    steps = [said(step) for step in records]
    return whole_state(net, world), steps


def reload(source: Path, target: Path, options: MeshOptions) -> None:
    """Load a checkpoint of a run and save it again, in the parts of this mesh."""
    world, net = meet(options), tiny.model(VOCABULARY, experts=4, shared_d_ff=16, seed=9)
    spread(net, world)
    optimizer = build_optimizer(net, weight_decay=0.1, betas=(0.9, 0.95), router_scale=1.0, down_scale=2.0)
    state = load_state(source, net, optimizer, world)
    save_checkpoint(target, net, optimizer, state, world=world)


def main() -> None:
    """See above."""
    with join(MeshOptions(rank_timeout=60)) as world:
        if sys.argv[1] == "reload":
            reload(Path(sys.argv[2]), Path(sys.argv[3]), MeshOptions(**json.loads(sys.argv[4])))
            return
        out = Path(sys.argv[4])
        for name, case in json.loads(Path(sys.argv[2]).read_text()).items():
            state, steps = train_case(case, Path(sys.argv[3]), meet(MeshOptions(**case["mesh"])))
            if world.leads:
                save_file(state, out / f"{name}.safetensors")
                (out / f"{name}.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
