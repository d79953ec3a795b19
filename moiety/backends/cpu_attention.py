"""Attention over paged keys and values, and norms of rows, by the C kernels in `native/attention.c`.

For inference, in float32, over pages in float32 or bfloat16. A token's answer is the same bits whatever else is in the
batch, whatever pieces its prompt came in and whichever pages it has. The definition is `moiety.model.attention`.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from moiety.backends import Choice, cpu

__all__ = [
    "BLOCK",
    "MOST_HEAD_DIM",
    "NORMS",
    "PagedLayer",
    "RaggedStep",
    "attention",
    "choose",
    "norms",
    "rms_norm",
]

NORMS = ("none", "head", "full", "head_rotated", "l2_rotated")  # in the order of `enum norm`
BLOCK = 16
MOST_HEAD_DIM = 512


class _CLayer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "sinks", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "value_width")),
        *((name, ctypes.c_int64) for name in ("page_tokens", "pairs", "window")),
        *((name, ctypes.c_int32) for name in ("chunked", "interleaved", "norm", "bfloat16", "factored")),
        *((name, ctypes.c_float) for name in ("norm_eps", "clip", "scale", "cap")),
    ]


class _CStep(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sequences", "tokens")),
        *((name, ctypes.c_void_p) for name in ("pages", "first_page", "first_token", "start", "sequence")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "query_factor", "first_task")),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpu.library()
    assert library is not None, "choose() says when there are no kernels"
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    library.moiety_attention.argtypes = [pointer] * 5
    library.moiety_rms_norm.argtypes = [
        pointer,
        pointer,
        pointer,
        ctypes.c_float,
        pointer,
        wide,
        wide,
        pointer,
    ]
    library.moiety_attention.restype = library.moiety_rms_norm.restype = None
    return library


@functools.cache
def choose(
    dtype: torch.dtype,
    device: str,
    stored: torch.dtype,
    page_tokens: int,
    head_dim: int,
    latent: bool,
    grad: bool,
) -> Choice:
    """Who computes attention over pages, "cpu" or "torch", and why; logged once.

    Args:
        dtype: Of the activations.
        device: Its type.
        stored: What the pages hold.
        page_tokens: Tokens of a page.
        head_dim: Of keys and values.
        latent: Latent attention.
        grad: Gradients are recorded.
    """
    obstacles = {
        "latent attention has no kernel": latent,
        "gradients are recorded": grad,
        f"activations are {dtype} on {device}": dtype not in (torch.float32, torch.bfloat16)
        or device != "cpu",
        f"pages are in {stored}": stored not in (torch.float32, torch.bfloat16),
        f"a page of {page_tokens} tokens is no multiple of {BLOCK}": page_tokens % BLOCK != 0,
        f"head_dim is {head_dim}, above {MOST_HEAD_DIM}": head_dim > MOST_HEAD_DIM,
        "the package was built without a compiler": not cpu.level(),
    }
    found = [reason for reason, stands in obstacles.items() if stands]
    choice = Choice("torch", "; ".join(found)) if found else Choice("cpu", f"compiled kernels, {cpu.level()}")
    logging.getLogger("moiety").info("paged attention runs on %s: %s", choice.name, choice.reason)
    return choice


def _float32(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class PagedLayer:
    """One layer's options and memory, ready for the kernel.

    Args:
        keys: (pages, kv_heads, head_dim, page_tokens), float32 or bfloat16.
        values: (pages, kv_heads, page_tokens, width), width head_dim rounded up to a multiple of 16.
        heads: Query heads.
        head_dim: Of queries, keys and values.
        pairs: Half of the leading dimensions that are turned; 0 turns none.
        interleaved: Dimensions 2 i and 2 i + 1 turn together, instead of i and i + pairs.
        norm: Of queries and keys, one of `NORMS`.
        weights: Of the norms of queries and of keys, and the sinks (heads,); each may be None.
        norm_eps: Epsilon of the norms.
        clip: Queries, keys and values are clamped to plus and minus this; 0 is off.
        scale: Factor on the scores.
        cap: Scores become cap * tanh(score / cap); 0 is off.
        window: Keys 0 to window - 1 steps back are seen; 0 is all of them.
        chunked: Instead those of the same chunk of `window` tokens.
        factored: Queries are multiplied by the step's `query_factor_T`.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        heads: int,
        head_dim: int,
        pairs: int = 0,
        interleaved: bool = False,
        norm: str = "none",
        weights: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
        norm_eps: float = 0.0,
        clip: float = 0.0,
        scale: float,
        cap: float = 0.0,
        window: int = 0,
        chunked: bool = False,
        factored: bool = False,
    ) -> None:
        assert keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype
        _, kv_heads, dims, page_tokens = keys.shape
        width = values.shape[3]
        assert values.shape[:3] == (*keys.shape[:2], page_tokens), (keys.shape, values.shape)
        assert dims == head_dim <= MOST_HEAD_DIM and width == -(-head_dim // BLOCK) * BLOCK, (dims, width)
        assert page_tokens % BLOCK == 0 and heads % kv_heads == 0, (page_tokens, heads, kv_heads)
        self.made_from = tuple(map(_address, weights))
        self._kept = (keys, values, *map(_float32, weights))
        q_norm, k_norm, sinks = map(_address, self._kept[2:])
        assert (norm in ("none", "l2_rotated")) == (q_norm is None), norm
        self.width, self.out_width = (heads + 2 * kv_heads) * head_dim, heads * head_dim
        self._as_c = _CLayer(
            q_norm, k_norm, sinks, keys.data_ptr(), values.data_ptr(), heads, kv_heads, head_dim, width,
            page_tokens, pairs, window, chunked, interleaved, NORMS.index(norm), keys.dtype == torch.bfloat16,
            factored, norm_eps, clip, scale, cap,
        )  # fmt: skip
        self.address = ctypes.addressof(self._as_c)


class RaggedStep:
    """New tokens of several sequences, one after the other, ready for the kernel.

    Args:
        tables: The pages of each sequence, enough for its old and new tokens.
        starts: Tokens that each has in them.
        counts: New tokens of each.
        rotary: Cosines and sines, each float32 (T, pairs).
        query_factor_T: For layers that ask for it.
    """

    def __init__(
        self,
        tables: list[list[int]],
        starts: list[int],
        counts: list[int],
        rotary: tuple[Tensor, Tensor],
        query_factor_T: Tensor | None = None,
    ) -> None:
        sequences, tokens = len(counts), sum(counts)
        first_page, first_token, pages, sequence = [0], [0], [], []
        for number, (table, count) in enumerate(zip(tables, counts, strict=True)):
            pages += table
            first_page.append(len(pages))
            first_token.append(first_token[-1] + count)
            sequence += [number] * count
        numbers = [first_page, first_token, starts, sequence, [0] * (sequences + 1), pages]
        flat = torch.tensor([number for row in numbers for number in row])
        places, at = [], flat.data_ptr()
        for row in numbers:
            places.append(at)
            at += 8 * len(row)
        cos, sin = (part.contiguous() for part in rotary)
        assert cos.dtype == sin.dtype == torch.float32 and len(cos) == tokens, (cos.dtype, cos.shape)
        factor = _float32(query_factor_T)
        self._kept = (flat, cos, sin, factor)
        self.tokens, self.pairs, self.factored = tokens, cos.shape[1], factor is not None
        self._as_c = _CStep(
            sequences, tokens, places[5], places[0], places[1], places[2], places[3], cos.data_ptr(),
            sin.data_ptr(), _address(factor), places[4],
        )  # fmt: skip
        self.address = ctypes.addressof(self._as_c)


def attention(layer: PagedLayer, step: RaggedStep, qkv_1TW: Tensor) -> Tensor:
    """Write the new keys and values into their pages, and answer every new query: (1, T, heads * head_dim).

    Args:
        layer: Options and memory.
        step: Whose tokens they are.
        qkv_1TW: What the projection of queries, keys and values gave, (1, T, (heads + 2 kv_heads) * head_dim).
    """
    assert qkv_1TW.shape == (1, step.tokens, layer.width), qkv_1TW.shape
    rows_1TW = qkv_1TW.float().contiguous()
    y_1TW = torch.empty(1, step.tokens, layer.out_width)
    address = cpu.crew()
    _library().moiety_attention(layer.address, step.address, rows_1TW.data_ptr(), y_1TW.data_ptr(), address)
    return y_1TW.to(qkv_1TW.dtype)


def norms(x: Tensor, weight_D: Tensor) -> bool:
    """True where `rms_norm` can take these and no gradient is wanted."""
    return (
        x.dtype == weight_D.dtype == torch.float32
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.is_contiguous()
        and bool(cpu.level())
    )


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, *, add_TD: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight of every row; all are float32 and contiguous.

    Args:
        x_TD: Rows.
        weight_D: Weights.
        eps: Added to the mean square.
        add_TD: Added to x first, in place.
    """
    y_TD, width = torch.empty_like(x_TD), x_TD.shape[-1]
    for one in (x_TD, weight_D, *(() if add_TD is None else (add_TD,))):
        assert one.dtype == torch.float32 and one.is_contiguous(), (one.dtype, one.shape)
    rows, crew = x_TD.numel() // width, cpu.crew()
    added, weight = _address(add_TD), weight_D.data_ptr()
    _library().moiety_rms_norm(x_TD.data_ptr(), added, weight, eps, y_TD.data_ptr(), rows, width, crew)
    return y_TD
