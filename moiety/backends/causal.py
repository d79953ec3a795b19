"""Causal attention of whole sequences on a CPU, with gradients: library products, and a softmax by the C kernels.

A head and some queries at a time, as in FlashAttention-2 (arXiv 2307.08691): a block of scores stays in cache, nothing
of (positions x positions) is kept, and shares are computed again on the way back. Scores are float32 whatever comes
in; products with shares are in the dtype of the values. Queries of a block meet no key after the last of them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moiety.backends import cpu
from moiety.backends.matmul import multiply_into, multiply_rows, multiply_rows_back

__all__ = ["causal_attention", "takes"]

FEWEST_POSITIONS = 384  # up to 256 torch's own is as fast
BLOCK_ROWS = 256  # queries of all heads that share their keys
LANES = 16  # of a vector; the kernels want rows of whole ones


class _CCausal(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("score", "share", "grad", "log_sum")),
        *((name, ctypes.c_int64) for name in ("rows", "stride", "first", "positions")),
        ("bfloat16", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


@functools.cache
def _kernels() -> ctypes.CDLL:
    library = cpu.library()
    assert library is not None, "takes() says when there are no kernels"
    for operation in (library.moiety_causal, library.moiety_causal_back):
        operation.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        operation.restype = None
    return library


def takes(q_BHSd: Tensor, k_BHKd: Tensor, v_BHKw: Tensor, scale: float | None) -> bool:
    """True where this is the faster way: whole sequences of some length, on a CPU with the kernels."""
    return (
        q_BHSd.device.type == "cpu"
        and q_BHSd.dtype in (torch.float32, torch.bfloat16)
        and q_BHSd.dtype == k_BHKd.dtype == v_BHKw.dtype
        and q_BHSd.shape[2] == k_BHKd.shape[2] >= FEWEST_POSITIONS
        and (scale is None or scale > 0)
        and bool(cpu.level())
    )


class _Blocks:
    """How queries are cut: N pairs of a sequence and a key head, each with the G query heads that share its keys."""

    def __init__(self, q_BHSd: Tensor, k_BHSd: Tensor, scale: float) -> None:
        self.kv_heads, self.group = k_BHSd.shape[1], q_BHSd.shape[1] // k_BHSd.shape[1]
        self.scale, self.positions = scale, q_BHSd.shape[2]
        self.padded = -(-self.positions // LANES) * LANES
        self.block = max(BLOCK_ROWS // self.group // LANES * LANES, LANES)

    def queries(self, x_BHSd: Tensor) -> Tensor:
        """(N, G, P, d): positions up to a multiple of 16, the last ones zero."""
        x = x_BHSd.unflatten(1, (self.kv_heads, self.group)).flatten(0, 1)
        return F.pad(x, (0, 0, 0, self.padded - self.positions)).contiguous()

    def keys(self, x_BHSd: Tensor) -> Tensor:
        """(N, P, d); nobody sees the zeros after the last."""
        return F.pad(x_BHSd.flatten(0, 1), (0, 0, 0, self.padded - self.positions)).contiguous()

    def sequences(self, x: Tensor) -> Tensor:
        """Back to (B, H, S, d)."""
        heads = self.kv_heads * (self.group if x.dim() == 4 else 1)
        return x.view(-1, heads, *x.shape[-2:])[:, :, : self.positions]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First position of each block, and one after its last."""
        return iter((at, min(at + self.block, self.padded)) for at in range(0, self.padded, self.block))

    def run(
        self, score_RK: Tensor, share_RK: Tensor, log_sum_R: Tensor, first: int, grad_RK: Tensor | None
    ) -> None:
        """Shares and sums of a block; given the gradient of shares, in its place that of scores. Scores are lost."""
        rows, keys = score_RK.shape
        given = _CCausal(
            score_RK.data_ptr(), share_RK.data_ptr(), None if grad_RK is None else grad_RK.data_ptr(),
            log_sum_R.data_ptr(), rows, keys, first, rows // self.group, share_RK.dtype == torch.bfloat16, self.scale,
        )  # fmt: skip
        kernels = _kernels()
        operation = kernels.moiety_causal if grad_RK is None else kernels.moiety_causal_back
        operation(ctypes.addressof(given), cpu.crew())


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHSd: Tensor, k_BHSd: Tensor, v_BHSw: Tensor, scale: float) -> Tensor:
        blocks = _Blocks(q_BHSd, k_BHSd, scale)
        q, k, v = blocks.queries(q_BHSd), blocks.keys(k_BHSd), blocks.keys(v_BHSw)
        y = torch.empty(*q.shape[:3], v.shape[2], dtype=q.dtype)
        log_sum = torch.empty(len(q), blocks.group * blocks.padded)
        for n in range(len(q)):
            k_Pd = k[n].float()
            for start, stop in blocks:
                q_Rd = q[n, :, start:stop].reshape(-1, q.shape[3])
                score_RK = multiply_rows(q_Rd.float(), k_Pd[:stop])
                share_RK = score_RK if v.dtype == torch.float32 else torch.empty_like(score_RK, dtype=v.dtype)
                sums = log_sum[n, blocks.group * start : blocks.group * stop]
                blocks.run(score_RK, share_RK, sums, start, None)
                y[n, :, start:stop] = multiply_rows_back(share_RK, v[n, :stop]).view(
                    blocks.group, -1, v.shape[2]
                )
        ctx.save_for_backward(q, k, v, log_sum)
        ctx.blocks = blocks
        return blocks.sequences(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSw: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sum = ctx.saved_tensors
        blocks: _Blocks = ctx.blocks
        grad_y, grad_q = blocks.queries(grad_BHSw), torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for n in range(len(q)):
            k_Pd = k[n].float()
            for start, stop in blocks:
                q_Rd = q[n, :, start:stop].reshape(-1, q.shape[3])
                grad_Rw = grad_y[n, :, start:stop].reshape(-1, v.shape[2])
                score_RK = multiply_rows(q_Rd.float(), k_Pd[:stop])
                grad_RK = multiply_rows(grad_Rw, v[n, :stop])
                share_RK = torch.empty_like(grad_RK)
                sums = log_sum[n, blocks.group * start : blocks.group * stop]
                blocks.run(score_RK, share_RK, sums, start, grad_RK)
                grad_q[n, :, start:stop] = multiply_rows_back(grad_RK, k[n, :stop]).view(
                    blocks.group, -1, q.shape[3]
                )
                grad_k[n, :stop] += _transposed(grad_RK, q_Rd)
                grad_v[n, :stop] += _transposed(share_RK, grad_Rw)
        return (
            blocks.sequences(grad_q), blocks.sequences(grad_k.to(k.dtype)), blocks.sequences(grad_v.to(v.dtype)), None
        )  # fmt: skip


def _transposed(left_RK: Tensor, right_Rd: Tensor) -> Tensor:
    """left^T right, (K, d)."""
    product = right_Rd.new_empty(left_RK.shape[1], right_Rd.shape[1])
    multiply_into(product, left_RK, right_Rd)
    return product


def causal_attention(q_BHSd: Tensor, k_BHSd: Tensor, v_BHSw: Tensor, *, scale: float | None = None) -> Tensor:
    """Weighted values of every query, (B, H, S, w): those of the keys up to its own position.

    Args:
        q_BHSd: Queries; `takes` says whether it can be done.
        k_BHSd: Keys, each head serving an equal group of query heads.
        v_BHSw: Values, as many heads.
        scale: Factor on the scores, above 0; None is d ** -0.5.
    """
    factor = q_BHSd.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        y_BHSw: Tensor = _Causal.apply(q_BHSd, k_BHSd, v_BHSw, factor)
    return y_BHSw
