"""A whole decoder block in one call of the C kernels, for a few tokens, where calls take as long as products.

It is the operations of `cpu`, `cpu_attention` and `cpu_routing` one after the other: the same bits as calling them.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moiety.backends import cpu
from moiety.backends.cpu_attention import PagedLayer, RaggedStep
from moiety.backends.cpu_routing import CompiledRouter, Rooms
from moiety.routing import Routing

__all__ = ["MOST_TOKENS", "Front", "PackedBlock", "block", "front"]

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
def _kernels() -> Any:
    kernels = cpu.library()
    assert kernels is not None, "a packed block needs the compiled kernels"
    for kernel, arguments in ((kernels.moiety_block, 6), (kernels.moiety_block_front, 10)):
        kernel.argtypes, kernel.restype = [ctypes.c_void_p] * arguments, ctypes.c_int32
    return kernels


class PackedBlock:
    """x + attention(norm(x)), then x + experts(norm(x)), ready for the kernel.

    Args:
        norms: Weights of the norms before attention and before the experts, float32 (D,) each.
        norm_eps: Epsilon of both.
        qkv: The projection to queries, keys and values.
        out: The projection back.
        attention: Options and memory of the layer.
        router: Who decides.
        experts: Who is chosen from; None where only `front` is called.
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
        experts: cpu.PackedExpertWeights | None,
    ) -> None:
        for norm_D in norms:
            assert norm_D.dtype == torch.float32 and norm_D.is_contiguous(), norm_D.dtype
        self.router, self.width = router, len(norms[0])
        self._kept = (norms, qkv, out, attention, experts)
        up, down, act = None, None, (0, False, 0.0)
        if experts is not None:
            up, down = experts.up.address, experts.down.address
            act = cpu.ACTIVATIONS[experts.activation], experts.gated, experts.activation_limit
        self._as_c = _CBlock(
            norms[0].data_ptr(), norms[1].data_ptr(), qkv.address, out.address, up, down, attention.address,
            router.address, self.width, *act, norm_eps,
        )  # fmt: skip
        self.address = ctypes.addressof(self._as_c)


def block(packed: PackedBlock, step: RaggedStep, x_1TD: Tensor) -> tuple[Tensor, Routing]:
    """What follows x in the residual stream, (1, T, D), and its routing; new keys and values go to the pages."""
    tokens = step.tokens
    assert x_1TD.shape == (1, tokens, packed.width) and x_1TD.dtype == torch.float32, x_1TD.shape
    rows_1TD, y_1TD, rooms = x_1TD.contiguous(), torch.empty_like(x_1TD), Rooms(packed.router, tokens)
    addresses = packed.address, step.address, rows_1TD.data_ptr(), y_1TD.data_ptr(), rooms.address, cpu.crew()
    cpu.check(_kernels().moiety_block(*addresses))
    return y_1TD, rooms.routing()


class Front(NamedTuple):
    """A block up to where its experts are needed.

    Args:
        x_1TD: The residual stream after attention, (1, T, D).
        normed_TD: What experts get, (T, D).
        routing: Who gets which row.
        foreseen: Whom the next layer's router would give these rows, if that was asked for.
    """

    x_1TD: Tensor
    normed_TD: Tensor
    routing: Routing
    foreseen: Routing | None


def front(
    packed: PackedBlock,
    step: RaggedStep,
    x_1TD: Tensor,
    following: CompiledRouter | None = None,
    ratio_D: Tensor | None = None,
) -> Front:
    """The block without its experts, for whoever has to get them first.

    Args:
        packed: The block.
        step: Which tokens of which sequences.
        x_1TD: The residual stream, float32 (1, T, D).
        following: Another layer's router, to be asked about the same rows.
        ratio_D: By which they are multiplied for it, float32 (D,).
    """
    tokens = step.tokens
    assert x_1TD.shape == (1, tokens, packed.width) and x_1TD.dtype == torch.float32, x_1TD.shape
    assert ratio_D is None or (ratio_D.dtype == torch.float32 and ratio_D.is_contiguous()), ratio_D.dtype
    rows_1TD, y_1TD, normed_TD = x_1TD.contiguous(), torch.empty_like(x_1TD), torch.empty_like(x_1TD[0])
    rooms, then = (Rooms(packed.router, tokens), None if following is None else Rooms(following, tokens))
    cpu.check(
        _kernels().moiety_block_front(
            packed.address, step.address, rows_1TD.data_ptr(), y_1TD.data_ptr(), normed_TD.data_ptr(), rooms.address,
            None if following is None else following.address, None if ratio_D is None else ratio_D.data_ptr(),
            None if then is None else then.address, cpu.crew(),
        )
    )  # fmt: skip
    return Front(y_1TD, normed_TD, rooms.routing(), None if then is None else then.routing())
