"""What more experts cost at the same work: a layer's training step with 8 to 256 experts.

4,096 tokens, 8 experts per token, expert width and everything else fixed, so the arithmetic is the same for
every number of experts; what grows is the weights to read and the gradients to write.
"""

from __future__ import annotations

import sys

import torch
from _harness import arguments, compare, finish, time_in_turn
from layer import Shape, build_ours, planted_tokens, steps

import moiety

TOKENS, K, D_MODEL, D_FF = 4096, 8, 256, 128
EXPERTS = (8, 32, 64, 128, 256)


def main() -> int:
    """Both dtypes."""
    options = arguments(__doc__ or "")
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        methods = {}
        for experts in EXPERTS:
            shape = Shape("", experts, K, D_MODEL, D_FF)
            x_TD = planted_tokens(shape, TOKENS, 0.0, dtype, options.device).requires_grad_()
            grad_TD = torch.randn(TOKENS, D_MODEL).to(dtype).to(options.device)
            layer: moiety.MoE = build_ours(shape, dtype, options.device)
            methods[str(experts)] = steps(layer, x_TD, grad_TD, backward=True)
        times = time_in_turn(
            methods, seconds=8.0 if options.quick else 40.0, least=5, cuda=options.device == "cuda"
        )
        kind = str(dtype).removeprefix("torch.")
        for experts in EXPERTS[1:]:
            bar = 1 / 1.15 if experts == EXPERTS[-1] else None
            label = f"{experts} experts against 8, {TOKENS} tokens, K{K} D{D_MODEL} F{D_FF}, {kind}, fwd+bwd"
            rows.append(compare(label, times, ours=str(experts), peers=["8"], bar=bar))
    return finish("experts", rows)


if __name__ == "__main__":
    sys.exit(main())
