"""One of several processes: a layer's output and gradients under expert parallelism."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import moiety
from moiety.moe.layer import MoE
from moiety.parallel.expert_parallel import ExpertParallel
from moiety.parallel.mesh import join
from moiety.parallel.options import MeshOptions

EXPERTS, WIDTH = 8, 8
# tokens of each rank; a factor on the router, 0 sends every token to the first experts
CASES = {
    "odd": ((7, 5, 1, 3), 1.0),
    "a rank without tokens": ((9, 0, 4, 0), 1.0),
    "ranks without rows": ((5, 3, 2, 4), 0.0),
    "no token at all": ((0, 0, 0, 0), 1.0),
}


def tokens_of(case: str) -> list[torch.Tensor]:
    """Each rank's tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) for count in CASES[case][0]]


def layer_of(case: str) -> MoE:
    """The whole layer."""
    torch.manual_seed(3)
    layer = MoE(
        d_model=WIDTH,
        d_ff=6,
        experts=EXPERTS,
        router=moiety.TopK(3),
        shared_d_ff=4,
        bias=True,
        dtype=torch.float64,
    )
    assert layer.gate is not None
    layer.gate.weight.data *= CASES[case][1]
    return layer


def run(layer: MoE, x_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient of a loss that sees every number."""
    x_TD = x_TD.clone().requires_grad_()
    made = layer(x_TD)
    slope_D = torch.arange(1.0, WIDTH + 1, dtype=torch.float64)
    ((made.output * slope_D).sum() + made.routing.score_TE.square().sum()).backward()
    gradients = {f"{name}.grad": one.grad for name, one in layer.named_parameters()}
    return {"output": made.output.detach(), "x.grad": x_TD.grad, **gradients}


def main() -> None:
    """`python -m tests.parallel.layers OUT NODES`."""
    out, nodes = Path(sys.argv[1]), int(sys.argv[2])
    with join(
        MeshOptions(expert_parallel=int(os.environ["WORLD_SIZE"]), expert_nodes=nodes, rank_timeout=60)
    ) as world:
        inside = ExpertParallel(world.group_along(("expert",), nodes)) if nodes > 1 else None
        group = world.group_along(("expert",), nodes, across=True) if nodes > 1 else world.groups["expert"]
        for case in CASES:
            layer = layer_of(case)
            here = EXPERTS // world.ranks
            for name, one in [*layer.experts.named_parameters()]:
                part = one.detach()[world.rank * here : (world.rank + 1) * here].clone()
                layer.experts.register_parameter(name, torch.nn.Parameter(part))
            layer.experts.spread = spread = ExpertParallel(group, inside)
            x_TD = tokens_of(case)[world.rank]
            found = run(layer, x_TD)
            sent = spread.send(x_TD, layer.route(x_TD))
            found["rows sent"] = torch.tensor(len(sent.token_M))
            spread.multiply(sent, lambda rows, routing, weights: rows, layer.experts.weights(x_TD.dtype))
            missing = [name for name, one in found.items() if one is None]
            assert not missing, missing
            save_file(
                {name: one.contiguous() for name, one in found.items()},
                out / f"{case}-{world.rank}.safetensors",
            )


if __name__ == "__main__":
    main()
