"""One of two processes that share the experts of a model; see test_share.py."""

from __future__ import annotations

import json

import torch

from moiety.model.transformer import Transformer
from moiety.parallel.mesh import join
from moiety.parallel.options import MeshOptions
from moiety.parallel.share import share
from tests import tiny


def logits_of(model: Transformer) -> list[torch.Tensor]:
    tokens = torch.arange(60).view(2, 30) % model.config.vocab_size
    found = [model(tokens).logits, model(tokens[:, :1]).logits]
    for block in model.blocks:
        with torch.no_grad():
            block.feed_forward.gate.weight.zero_()  # of equal scores the lower experts win: all of one process
    return [*found, model(tokens).logits]


def main() -> None:
    torch.manual_seed(0)
    model = tiny.model("", layers=2, moe=tiny.experts(experts=4), vocab_size=99).eval()
    gates = [block.feed_forward.gate.weight.clone() for block in model.blocks]
    with torch.no_grad(), join(MeshOptions(expert_parallel=2)) as world:
        whole = logits_of(model)
        for block, gate in zip(model.blocks, gates, strict=True):
            block.feed_forward.gate.weight.copy_(gate)
        share(model, world)
        parts = logits_of(model)
    error = max(float((one - other).abs().max()) for one, other in zip(whole, parts, strict=True))
    found = {
        "experts": [len(block.feed_forward.experts.down) for block in model.blocks],
        "error": error,
        "size": float(whole[0].abs().mean()),
        "logits": parts[0][0, -1].tolist(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
