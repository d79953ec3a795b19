"""Which library multiplies float32 faster on this processor, by rows: why `backends/matmul.py` chooses as it does."""

from __future__ import annotations

import sys

import torch
from _harness import arguments, compare, finish, time_in_turn

from moiety.backends.matmul import prefers_onednn

SHAPES = ((256, 256), (1024, 256), (2048, 2048))
ROWS = (8, 16, 32, 64, 256, 1024)


def main() -> int:
    """x W^T and g^T x for every size; the bar is set only where this processor is one that prefers oneDNN."""
    options = arguments(__doc__ or "")
    if options.device != "cpu":
        print("this compares CPU libraries", file=sys.stderr)
        return finish("matmul", [])
    multiply = torch.ops.mkldnn._linear_pointwise
    result = []
    for width_out, width_in in SHAPES[:2] if options.quick else SHAPES:
        for rows in ROWS:
            x, weight = torch.randn(rows, width_in), torch.randn(width_out, width_in)
            grad = torch.randn(rows, width_out)
            forward = {
                "onednn": lambda x=x, weight=weight: multiply(x, weight, None, "none", [], ""),
                "blas": lambda x=x, weight=weight: x @ weight.t(),
            }
            gradient = {
                "onednn": lambda x=x, grad=grad: multiply(grad.t(), x.t(), None, "none", [], ""),
                "blas": lambda x=x, grad=grad: grad.t() @ x,
            }
            bar = 1.0 if prefers_onednn() else None
            for name, methods, least in (("x W^T", forward, 32), ("g^T x", gradient, 256)):
                times = time_in_turn(methods, seconds=0.4, least=20, most=400)
                label = f"{name}: {rows} rows, {width_in} to {width_out}"
                result.append(
                    compare(label, times, ours="onednn", peers=["blas"], bar=bar if rows >= least else None)
                )
    return finish("matmul", result)


if __name__ == "__main__":
    sys.exit(main())
