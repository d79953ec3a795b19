"""Matrix products that write where they are told and use the whole processor.

torch multiplies float32 on a CPU through MKL, which leaves AVX-512 unused on processors that are not
Intel's: 0.20 against 0.44 TFLOP/s on two Zen 5 cores (bench/matmul.py). oneDNN, in the same torch
build, has no such preference, so on those processors float32 products go there.

bfloat16 and float16 go to oneDNN where it has such products. Elsewhere, as with AVX2 and nothing more, torch has
loops for them, 350 times slower than float32 on the way back; there both sides become float32, some rows of a weight
at a time, and the product is rounded once. The choice depends on the processor alone, so results repeat bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "add_rows",
    "add_rows_back",
    "batched",
    "has_products",
    "linear",
    "multiply_across",
    "multiply_into",
    "multiply_rows",
    "multiply_rows_back",
    "multiply_rows_into",
    "prefers_onednn",
    "project",
    "widens",
]

FEWEST_ROWS = 32  # below this many rows MKL's small-matrix path is as fast (bench/matmul.py)
FEWEST_ROWS_STRIDED = (
    256  # oneDNN repacks transposed operands; below this many rows that costs more than it gains
)
FEWEST_ROWS_WIDE = 16  # below this many, reading a weight as it is takes less than making it float32
WIDE_BYTES = 32 << 20  # of a weight that is float32 at a time


@functools.cache
def prefers_onednn() -> bool:
    """True where oneDNN beats torch's own float32 product: AVX-512 on a processor that is not Intel's."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "GenuineIntel" not in cpuinfo.read_text()


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """True where this processor's library multiplies numbers of this dtype as fast as float32 or faster."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def widens(x: Tensor) -> bool:
    """True where products with x are to be those of float32: 16 bits on a CPU that has no products of them."""
    return x.device.type == "cpu" and not has_products(x.dtype)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    """x's dtype, or autocast's where it is on."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _onednn(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    if not (weight_FD.is_contiguous() or weight_FD.t().is_contiguous()):
        weight_FD = weight_FD.contiguous()  # for rows or columns cut out of more it has only loops
    y_NF: Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_FD, bias_F, "none", [], "")
    return y_NF


def _use_onednn(x_ND: Tensor, fewest: int) -> bool:
    return (
        x_ND.dtype == torch.float32 and x_ND.device.type == "cpu" and len(x_ND) >= fewest and prefers_onednn()
    )


def _wants_wide(x_ND: Tensor, weight_FD: Tensor) -> bool:
    """True where x W^T is to be one of float32; W may be that already."""
    return widens(x_ND) and (len(x_ND) >= FEWEST_ROWS_WIDE or weight_FD.dtype != x_ND.dtype)


def _wide(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, with gradients."""
    with torch.autocast("cpu", enabled=False):  # which would make them narrow again
        return left.float() @ right.float()


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix, so many at a time that a float32 copy of them is small."""
    most = max(WIDE_BYTES // (4 * max(columns, 1)), 1)
    return (slice(at, at + most) for at in range(0, rows, most))


def multiply_rows(x_ND: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x W^T + b, (N, F). No gradient."""
    if _use_onednn(x_ND, FEWEST_ROWS):
        return _onednn(x_ND, weight_FD, bias_F)
    if _wants_wide(x_ND, weight_FD):
        y_NF = x_ND.new_empty(len(x_ND), len(weight_FD))
        multiply_rows_into(y_NF, x_ND, weight_FD)
        return y_NF if bias_F is None else y_NF.add_(bias_F)
    return F.linear(x_ND, weight_FD, bias_F)


def multiply_rows_into(out_NF: Tensor, x_ND: Tensor, weight_FD: Tensor) -> None:
    """out = x W^T, (N, F), written in place. No gradient."""
    if _use_onednn(x_ND, FEWEST_ROWS):
        out_NF.copy_(_onednn(x_ND, weight_FD))
    elif _wants_wide(x_ND, weight_FD):
        wide_ND = x_ND.float()
        for rows in _parts(*weight_FD.shape):
            out_NF[:, rows] = _wide(wide_ND, weight_FD[rows].t())
    else:
        torch.mm(x_ND, weight_FD.t(), out=out_NF)


def multiply_rows_back(grad_NF: Tensor, weight_FD: Tensor) -> Tensor:
    """g W, (N, D): the gradient with respect to the rows. No gradient."""
    if _use_onednn(grad_NF, FEWEST_ROWS):
        return _onednn(grad_NF, weight_FD.t())
    if widens(grad_NF):
        sum_ND = grad_NF.new_zeros(len(grad_NF), weight_FD.shape[1], dtype=torch.float32)
        for rows in _parts(*weight_FD.shape):
            sum_ND.addmm_(grad_NF[:, rows].float(), weight_FD[rows].float())
        return sum_ND.to(grad_NF.dtype)
    return grad_NF @ weight_FD


def multiply_into(out_FD: Tensor, grad_NF: Tensor, x_ND: Tensor) -> None:
    """out = g^T x, (F, D): the gradient with respect to the weight, written in place. No gradient."""
    if _use_onednn(grad_NF, FEWEST_ROWS_STRIDED):
        out_FD.copy_(_onednn(grad_NF.t(), x_ND.t()))
    elif widens(grad_NF):
        wide_ND = x_ND.float()
        for rows in _parts(*out_FD.shape):
            out_FD[rows] = _wide(grad_NF[:, rows].t(), wide_ND)
    else:
        torch.mm(grad_NF.t(), x_ND, out=out_FD)


def multiply_across(left_NR: Tensor, right_NF: Tensor) -> Tensor:
    """l^T r, (R, F), of a few columns on the left; in float32 where `widens`. No gradient."""
    if widens(left_NR):
        return _wide(left_NR.t(), right_NF)
    return left_NR.t() @ right_NF


def add_rows(out_NF: Tensor, x_NR: Tensor, weight_FR: Tensor, scale: float = 1.0) -> None:
    """out += scale x W^T, of a small W. No gradient."""
    if widens(x_NR):
        out_NF.add_(_wide(x_NR, weight_FR.t()), alpha=scale)
    else:
        out_NF.addmm_(x_NR, weight_FR.t(), alpha=scale)


def add_rows_back(out_ND: Tensor, grad_NR: Tensor, weight_RD: Tensor) -> None:
    """out += g W, of a small W. No gradient."""
    if widens(grad_NR):
        out_ND.add_(_wide(grad_NR, weight_RD))
    else:
        out_ND.addmm_(grad_NR, weight_RD)


def batched(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with gradients, for stacks of matrices, (..., N, K) and (..., K, M), or one on the right."""
    dtype = _dtype_of_products(left)
    if left.device.type != "cpu" or has_products(dtype):
        return left @ right
    return _wide(left.to(dtype), right.to(dtype)).to(dtype)


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
    rows, dtype = x.numel() // max(x.shape[-1], 1), _dtype_of_products(x)
    ours = not has_products(dtype) or (
        dtype == torch.float32 and rows >= FEWEST_ROWS and prefers_onednn() and x.dtype == weight_FD.dtype
    )
    if (
        x.device.type != "cpu"
        or not ours
        or (x.dtype != weight_FD.dtype and not torch.is_autocast_enabled("cpu"))
    ):
        return F.linear(x, weight_FD, bias_F)
    with torch.autocast("cpu", enabled=False):
        bias_F = None if bias_F is None else bias_F.to(dtype)
        y_NF: Tensor = _Linear.apply(x.to(dtype).reshape(rows, x.shape[-1]), weight_FD.to(dtype), bias_F)
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
