"""Softmax, cross entropy and its gradient over rows of logits, by C kernels that need no room of their own.

torch takes six passes over the logits and four copies of them. What is meant is in `moiety.model.loss`.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from moiety.backends import cpu
from moiety.errors import UsageError

__all__ = ["cross_entropy_rows", "takes"]


class _CLoss(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "target", "scale", "nats")),
        *((name, ctypes.c_int64) for name in ("vocabulary", "stride")),
        *((name, ctypes.c_int32) for name in ("bfloat16", "gradient")),
        *((name, ctypes.c_float) for name in ("multiplier", "cap")),
    ]


@functools.cache
def _kernel() -> Any:
    kernels = cpu.library()
    assert kernels is not None, "takes() says when there are no kernels"
    kernels.moiety_cross_entropy.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    kernels.moiety_cross_entropy.restype = None
    return kernels.moiety_cross_entropy


def takes(logits: Tensor) -> bool:
    """True where the kernels can do it: float32 or bfloat16 on the CPU, and they are compiled."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and logits.stride(-1) == 1
        and bool(cpu.level())
    )


def cross_entropy_rows(
    logits_RV: Tensor,
    target_R: Tensor,
    scale_R: Tensor | None = None,
    *,
    multiplier: float = 1.0,
    cap: float = 0.0,
    gradient: bool,
) -> Tensor:
    """Sum over rows of scale * -ln p(target), in nats and float64.

    p is the softmax of cap * tanh(multiplier * logit / cap).

    Args:
        logits_RV: (R, V); `takes` them. With `gradient`, the sum's gradient with respect to them is written over them.
        target_R: Columns, below V; (R,).
        scale_R: Factors, (R,), or None.
        multiplier: Factor on the logits.
        cap: Bound of the scores; 0 is none.
        gradient: Whether it is wanted.

    Raises:
        UsageError: a target is no column.
    """
    rows, vocabulary = logits_RV.shape
    assert takes(logits_RV) and target_R.shape == (rows,), (logits_RV.dtype, target_R.shape)
    target = target_R.contiguous()
    assert target.dtype == torch.int64, target.dtype
    lowest, highest = (int(one) for one in target.aminmax()) if rows else (0, 0)
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise UsageError(
            f"token {wrong} is to be predicted, and the vocabulary has {vocabulary:,}",
            hint=f"allowed are 0 to {vocabulary - 1}: was the text made with another tokenizer?",
        )
    scale = None if scale_R is None else scale_R.float().contiguous()
    nats_R = torch.empty(rows, dtype=torch.float64)
    given = _CLoss(
        logits_RV.data_ptr(), target.data_ptr(), None if scale is None else scale.data_ptr(), nats_R.data_ptr(),
        vocabulary, logits_RV.stride(0), logits_RV.dtype == torch.bfloat16, gradient, multiplier, cap,
    )  # fmt: skip
    _kernel()(ctypes.addressof(given), rows, cpu.crew())
    return nats_R.sum()
