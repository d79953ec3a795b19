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

__all__ = ["MOST_EXPERTS", "Best", "CompiledRouter", "Rooms", "route"]

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


class _CRouting(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("logits", "scores", "chosen", "weight", "token_of", "weight_of", "counts")
    ]


def _float32(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()


@functools.cache
def _kernel() -> Any:
    kernels = cpu.library()
    assert kernels is not None, "without kernels the router decides by itself"
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    kernels.moiety_route.argtypes = [pointer, pointer, wide, wide, pointer, pointer]
    kernels.moiety_route.restype = None
    return kernels.moiety_route


class CompiledRouter:
    """A router, ready for the kernel.

    Args:
        gate_ED: Its weights.
        best: Who is chosen, and what it weighs.
        gate_bias_E: Added to the logits.
        bias_E: Added to the scores where they are compared.
    """

    def __init__(
        self, gate_ED: Tensor, best: Best, *, gate_bias_E: Tensor | None = None, bias_E: Tensor | None = None
    ) -> None:
        self.best, (self.experts, self.width) = best, gate_ED.shape
        assert self.experts <= MOST_EXPERTS, (self.experts, MOST_EXPERTS)
        given = (gate_ED, gate_bias_E, bias_E)
        self._kept = tuple(map(_float32, given))
        addresses = [None if one is None else one.data_ptr() for one in self._kept]
        self.made_from = (best, *(None if one is None else one.data_ptr() for one in given))
        self.shares_memory = [*self.made_from[1:]] == addresses  # a change of the weights is seen at once
        self._as_c = _CRouter(
            self.experts, self.width, best.k, best.groups, best.groups_kept, best.group_best, best.sigmoid,
            best.renormalize, best.scale, best.tiny, *addresses,
        )  # fmt: skip
        self.address = ctypes.addressof(self._as_c)


class Rooms:
    """Memory for a kernel to write the routing of some tokens to."""

    def __init__(self, router: CompiledRouter, tokens: int) -> None:
        self.tokens, self.experts = tokens, router.experts
        pairs, scores = tokens * router.best.k, tokens * router.experts
        self.floats = torch.empty(2 * scores + 2 * pairs)
        self.numbers = torch.empty(2 * pairs + router.experts, dtype=torch.int64)
        floats, numbers = self.floats.data_ptr(), self.numbers.data_ptr()
        self.pairs, self.scores = pairs, scores
        self._as_c = _CRouting(
            floats, floats + 4 * scores, numbers, floats + 8 * scores, numbers + 8 * pairs,
            floats + 8 * scores + 4 * pairs, numbers + 16 * pairs,
        )  # fmt: skip
        self.address = ctypes.addressof(self._as_c)

    def routing(self) -> Routing:
        """What was written."""
        pairs, scores, shape = self.pairs, self.scores, (self.tokens, self.experts)
        return Routing(
            token_N=self.numbers[pairs : 2 * pairs],
            weight_N=self.floats[2 * scores + pairs :],
            counts_E=self.numbers[2 * pairs :],
            tokens=self.tokens,
            logits_TE=self.floats[:scores].view(shape),
            score_TE=self.floats[scores : 2 * scores].view(shape),
        )


def route(x_TD: Tensor, router: CompiledRouter) -> Routing:
    """Logits in float32, scores, choice and weights of tokens on the CPU. The kernels must be here (`cpu.level()`)."""
    rows_TD = x_TD.float()
    rows_TD = rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()
    assert rows_TD.shape[1] == router.width, (rows_TD.shape, router.width)
    rooms = Rooms(router, len(rows_TD))
    _kernel()(router.address, rows_TD.data_ptr(), rooms.tokens, rows_TD.stride(0), rooms.address, cpu.crew())
    return rooms.routing()
