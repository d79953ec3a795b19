"""Matrix products that write where they are told and use the whole processor.

torch multiplies float32 on a CPU through MKL, which leaves AVX-512 unused on processors that are not
Intel's: 0.20 against 0.44 TFLOP/s on two Zen 5 cores (bench/matmul.py). oneDNN, in the same torch
build, has no such preference, so on those processors float32 products go there. bfloat16 goes to
oneDNN everywhere already. The choice depends on the processor alone, so results repeat bit for bit.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "linear",
    "multiply_into",
    "multiply_rows",
    "multiply_rows_back",
    "multiply_rows_into",
    "prefers_onednn",
    "project",
]

FEWEST_ROWS = 32  # below this many rows MKL's small-matrix path is as fast (bench/matmul.py)
FEWEST_ROWS_STRIDED = (
    256  # oneDNN repacks transposed operands; below this many rows that costs more than it gains
)


@functools.cache
def prefers_onednn() -> bool:
    """True where oneDNN beats torch's own float32 product: AVX-512 on a processor that is not Intel's."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "GenuineIntel" not in cpuinfo.read_text()


def _onednn(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    if not (weight_FD.is_contiguous() or weight_FD.t().is_contiguous()):
        weight_FD = weight_FD.contiguous()  # for rows or columns cut out of more it has only loops
    y_NF: Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_FD, bias_F, "none", [], "")
    return y_NF


def _use_onednn(x_ND: Tensor, fewest: int) -> bool:
    return (
        x_ND.dtype == torch.float32 and x_ND.device.type == "cpu" and len(x_ND) >= fewest and prefers_onednn()
    )


def multiply_rows(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b, (N, F). No gradient."""
    if _use_onednn(x_ND, FEWEST_ROWS):
        return _onednn(x_ND, weight_FD, bias_F)
    return F.linear(x_ND, weight_FD, bias_F)


def multiply_rows_into(out_NF: Tensor, x_ND: Tensor, weight_FD: Tensor) -> None:
    """out = x W^T, (N, F), written in place. No gradient."""
    if _use_onednn(x_ND, FEWEST_ROWS):
        out_NF.copy_(_onednn(x_ND, weight_FD))
    else:
        torch.mm(x_ND, weight_FD.t(), out=out_NF)


def multiply_rows_back(grad_NF: Tensor, weight_FD: Tensor) -> Tensor:
    """g W, (N, D): the gradient with respect to the rows. No gradient."""
    if _use_onednn(grad_NF, FEWEST_ROWS):
        return _onednn(grad_NF, weight_FD.t())
    return grad_NF @ weight_FD


def multiply_into(out_FD: Tensor, grad_NF: Tensor, x_ND: Tensor) -> None:
    """out = g^T x, (F, D): the gradient with respect to the weight, written in place. No gradient."""
    if _use_onednn(grad_NF, FEWEST_ROWS_STRIDED):
        out_FD.copy_(_onednn(grad_NF.t(), x_ND.t()))
    else:
        torch.mm(grad_NF.t(), x_ND, out=out_FD)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, weight_FD)
        return multiply_rows(x_ND, weight_FD, bias_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_ND, weight_FD = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = multiply_rows_back(grad_NF, weight_FD) if need_x else None
        grad_weight = None
        if need_weight:
            grad_weight = torch.empty_like(weight_FD)
            multiply_into(grad_weight, grad_NF, x_ND)
        return grad_x, grad_weight, grad_NF.sum(0) if need_bias else None


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b with gradients: torch's `linear`, on the faster library where there is one.

    Args:
        x: (..., D).
        weight_FD: (F, D).
        bias_F: (F,) or None.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    fast = x.dtype == weight_FD.dtype == torch.float32 and x.device.type == "cpu" and rows >= FEWEST_ROWS
    if not fast or torch.is_autocast_enabled("cpu") or not prefers_onednn():
        return F.linear(x, weight_FD, bias_F)
    y_NF: Tensor = _Linear.apply(x.reshape(rows, x.shape[-1]), weight_FD, bias_F)
    return y_NF.view(*x.shape[:-1], weight_FD.shape[0])


def project(x: Tensor, layer: nn.Module) -> Tensor:
    """What a projection makes of x, (..., D) to (..., F): `linear` with its weights, or a layer's own answer.

    Args:
        x: (..., D).
        layer: An `nn.Linear`, or what stands in its place: a packed one, one with an adapter.
    """
    if isinstance(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y
