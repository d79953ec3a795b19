"""A whole decoder block in one call of the C kernels, for a few tokens, where calls take as long as products.

It is the operations of `cpu`, `cpu_attention` and `cpu_routing` one after the other: the same bits as calling them.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from moiety.backends import cpu
from moiety.backends.cpu_attention import PagedLayer, RaggedStep
from moiety.backends.cpu_routing import CompiledRouter, Rooms
from moiety.routing import Routing

__all__ = ["MOST_TOKENS", "PackedBlock", "block"]

MOST_TOKENS = 32


class _CBlock(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "attention_norm",
                "feed_forward_norm",
                "qkv",
                "out",
                "up",
                "down",
                "attention",
                "router",
            )
        ),
        ("width", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("activation", "gated")),
        *((name, ctypes.c_float) for name in ("limit", "norm_eps")),
    ]


@functools.cache
def _kernel() -> Any:
    kernels = cpu.library()
    assert kernels is not None, "a packed block needs the compiled kernels"
    kernels.moiety_block.argtypes = [ctypes.c_void_p] * 6
    kernels.moiety_block.restype = ctypes.c_int32
    return kernels.moiety_block


class PackedBlock:
    """x + attention(norm(x)), then x + experts(norm(x)), ready for the kernel.

    Args:
        norms: Weights of the norms before attention and before the experts, float32 (D,) each.
        norm_eps: Epsilon of both.
        qkv: The projection to queries, keys and values.
        out: The projection back.
        attention: Options and memory of the layer.
        router: Who decides.
        experts: Who is chosen from.
    """

    def __init__(
        self,
        norms: tuple[Tensor, Tensor],
        norm_eps: float,
        *,
        qkv: cpu.Matrix,
        out: cpu.Matrix,
        attention: PagedLayer,
        router: CompiledRouter,
        experts: cpu.PackedExpertWeights,
    ) -> None:
        for norm_D in norms:
            assert norm_D.dtype == torch.float32 and norm_D.is_contiguous(), norm_D.dtype
        self.router, self.width = router, len(norms[0])
        self._kept = (norms, qkv, out, attention, experts)
        self._as_c = _CBlock(
            norms[0].data_ptr(), norms[1].data_ptr(), qkv.address, out.address, experts.up.address,
            experts.down.address, attention.address, router.address, self.width,
            cpu.ACTIVATIONS[experts.activation], experts.gated, experts.activation_limit, norm_eps,
        )  # fmt: skip
        self.address = ctypes.addressof(self._as_c)


def block(packed: PackedBlock, step: RaggedStep, x_1TD: Tensor) -> tuple[Tensor, Routing]:
    """What follows x in the residual stream, (1, T, D), and its routing; new keys and values go to the pages."""
    tokens = step.tokens
    assert x_1TD.shape == (1, tokens, packed.width) and x_1TD.dtype == torch.float32, x_1TD.shape
    rows_1TD, y_1TD, rooms = x_1TD.contiguous(), torch.empty_like(x_1TD), Rooms(packed.router, tokens)
    addresses = packed.address, step.address, rows_1TD.data_ptr(), y_1TD.data_ptr(), rooms.address, cpu.crew()
    cpu.check(_kernel()(*addresses))
    return y_1TD, rooms.routing()
