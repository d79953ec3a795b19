"""A whole routing decision in one call of the C kernels: for inference, where many small calls take too long.

For routers that compare softmax or sigmoid scores and take the best. What they mean is in `moiety.moe.routers`.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moiety.backends import cpu
from moiety.routing import Routing

__all__ = ["MOST_EXPERTS", "Best", "route"]

MOST_EXPERTS = 1024  # of routing.c


class _CRouter(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("experts", "width", "k", "groups", "groups_kept", "group_best")
        ),
        *((name, ctypes.c_int32) for name in ("sigmoid", "renormalize")),
        *((name, ctypes.c_float) for name in ("scale", "tiny")),
        *((name, ctypes.c_void_p) for name in ("gate", "gate_bias", "bias")),
    ]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The k best experts of every token.

    Args:
        k: Experts per token.
        sigmoid: Scores are sigmoids of the logits; else a softmax.
        renormalize: Divide the chosen scores by their sum.
        tiny: Least sum to divide by; of sigmoid scores what is added to the sum.
        scale: Factor on the weights after that.
        groups: Of experts, equal ones.
        groups_kept: From which a token may choose.
        group_best: Best experts whose sum judges a group.
    """

    k: int
    sigmoid: bool
    renormalize: bool
    tiny: float
    scale: float
    groups: int
    groups_kept: int
    group_best: int


def _float32(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()


@functools.cache
def _kernel() -> Any:
    kernels = cpu.library()
    assert kernels is not None, "without kernels the router decides by itself"
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    kernels.moiety_route.argtypes = [pointer, pointer, wide, wide, *[pointer] * 8]
    kernels.moiety_route.restype = None
    return kernels.moiety_route


def route(
    x_TD: Tensor, gate_ED: Tensor, best: Best, *, gate_bias_E: Tensor | None, bias_E: Tensor | None
) -> Routing:
    """Logits in float32, scores, choice and weights. The compiled kernels must be here (`cpu.level()`).

    Args:
        x_TD: Tokens, on the CPU.
        gate_ED: The router's weights.
        best: Who is chosen, and what it weighs.
        gate_bias_E: Added to the logits.
        bias_E: Added to the scores where they are compared.
    """
    rows_TD, gate, gate_bias, bias = x_TD.float(), _float32(gate_ED), _float32(gate_bias_E), _float32(bias_E)
    (tokens, width), experts = rows_TD.shape, len(gate_ED)
    assert gate is not None and experts <= MOST_EXPERTS, (experts, MOST_EXPERTS)
    rows_TD = rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()
    addresses: list[Any] = [None if one is None else one.data_ptr() for one in (gate, gate_bias, bias)]
    router = _CRouter(
        experts, width, best.k, best.groups, best.groups_kept, best.group_best, best.sigmoid, best.renormalize,
        best.scale, best.tiny, *addresses,
    )  # fmt: skip
    pairs = tokens * best.k
    floats = torch.empty(2 * tokens * experts + 2 * pairs)
    numbers = torch.empty(2 * pairs + experts, dtype=torch.int64)
    logits, scores, weight, weight_N = floats.split([tokens * experts, tokens * experts, pairs, pairs])
    chosen, token_N, counts_E = numbers.split([pairs, pairs, experts])
    rooms = (one.data_ptr() for one in (logits, scores, chosen, weight, token_N, weight_N, counts_E))
    _kernel()(ctypes.addressof(router), rows_TD.data_ptr(), tokens, rows_TD.stride(0), *rooms, cpu.crew())
    return Routing(
        token_N=token_N,
        weight_N=weight_N,
        counts_E=counts_E,
        tokens=tokens,
        logits_TE=logits.view(tokens, experts),
        score_TE=scores.view(tokens, experts),
    )
