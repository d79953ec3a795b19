"""Attention against one query at a time in plain loops: heads, groups, norms, biases, positions, the cache."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.config import AttentionConfig
from moiety.model.attention import Attention
from moiety.model.context import ForwardContext, KVCache
from moiety.model.rope import rotary_table
from tests import tiny

D_MODEL, EPS, THETA = 20, 1e-3, 500.0
CASES: dict[str, dict[str, Any]] = {
    "one_for_one": {"kv_heads": 4},
    "grouped": {"kv_heads": 2},
    "one_for_all": {"kv_heads": 1},
    "three_to_one": {"heads": 6, "kv_heads": 2},
    "biases": {"qkv_bias": True, "out_bias": True},
    "norm_per_head": {"qk_norm": "head", "qkv_bias": True},
    "norm_full": {"qk_norm": "full", "out_bias": True},
    "partly_turned": {"rope_fraction": 0.7},
    "not_turned": {"rope_fraction": 0.0, "kv_heads": 1},
    "wide_head": {"heads": 3, "kv_heads": 3, "head_dim": 14},
}
every_case = pytest.mark.parametrize("name", CASES)


def built(name: str, layer: int = 0) -> Attention:
    made = Attention(tiny.attention(**CASES[name]), D_MODEL, layer, EPS).double()
    tiny.fill(made)
    return made


def context(
    config: AttentionConfig, start: int, positions: int, cache: KVCache | None = None
) -> ForwardContext:
    table = rotary_table(torch.arange(start, start + positions), config.rotary_dim, THETA)
    return ForwardContext(rotary=table, cache=cache, valid_BS=None, pinned={})


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + EPS).sqrt() * weight


def turned(x_d: Tensor, position: int, rotary_dim: int) -> Tensor:
    """One head at one position; the angle is a float32, as the table's are."""
    y_d, half = x_d.clone(), rotary_dim // 2
    cos, sin = rotary_table(torch.tensor([position]), rotary_dim, THETA)
    for j in range(half):
        c, s = float(cos[0, j]), float(sin[0, j])
        y_d[j], y_d[j + half] = x_d[j] * c - x_d[j + half] * s, x_d[j + half] * c + x_d[j] * s
    return y_d


def definition(attention: Attention, config: AttentionConfig, x_SD: Tensor) -> Tensor:
    """One sequence: for each position and head a softmax over what came before it."""
    heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
    bounds = [0, heads * width, (heads + kv_heads) * width, (heads + 2 * kv_heads) * width]
    weights = dict(attention.named_parameters())
    bias = weights.get("qkv.bias", x_SD.new_zeros(bounds[-1]))
    out_bias = weights.get("out.bias", x_SD.new_zeros(D_MODEL))
    queries: list[list[Tensor]] = []
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    for position, x_D in enumerate(x_SD):
        parts = [attention.qkv.weight[a:b] @ x_D + bias[a:b] for a, b in itertools.pairwise(bounds)]
        for n, norm in enumerate((attention.q_norm, attention.k_norm)):
            if norm is not None and config.qk_norm == "full":
                parts[n] = normed(parts[n], norm.weight)
        split = [list(part.split(width)) for part in parts]
        for n, norm in enumerate((attention.q_norm, attention.k_norm)):
            if norm is not None and config.qk_norm == "head":
                split[n] = [normed(head, norm.weight) for head in split[n]]
            split[n] = [turned(head, position, config.rotary_dim) for head in split[n]]
        for where, what in zip((queries, keys, values), split, strict=True):
            where.append(what)
    rows = []
    for position in range(len(x_SD)):
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = [
                queries[position][head] @ keys[at][shared] / math.sqrt(width) for at in range(position + 1)
            ]
            share = torch.stack(scores).softmax(0)
            mixed.append(sum(share[at] * values[at][shared] for at in range(position + 1)))
        rows.append(attention.out.weight @ torch.cat(mixed) + out_bias)  # type: ignore[arg-type]
    return torch.stack(rows)


@every_case
@torch.no_grad()
def test_equals_the_definition(name: str) -> None:
    attention, config = built(name), tiny.attention(**CASES[name])
    x_BSD = torch.randn(2, 7, D_MODEL, dtype=torch.float64)
    y_BSD = attention(x_BSD, context(config, 0, 7))
    true = torch.stack([definition(attention, config, x_SD) for x_SD in x_BSD])
    tiny.assert_exact(y_BSD, true)


@every_case
@torch.no_grad()
def test_pieces_through_the_cache_equal_the_whole(name: str) -> None:
    config, x_BSD = tiny.attention(**CASES[name]), torch.randn(3, 11, D_MODEL, dtype=torch.float64)
    attention = built(name, layer=2)
    whole = attention(x_BSD, context(config, 0, 11))
    cache = KVCache(tiny.config(attention=config), 3, 12, dtype=torch.float64)
    cache.buffer.fill_(float("nan"))  # what was never written must not be read
    pieces, start = [], 0
    for positions in (1, 4, 1, 2, 3):
        part = x_BSD[:, start : start + positions]
        pieces.append(attention(part, context(config, start, positions, cache)))
        cache.advance(positions)
        start += positions
    tiny.assert_exact(torch.cat(pieces, dim=1), whole)
    assert bool(cache.buffer[:, :2].isnan().all()), "only its own layer is written"


@pytest.mark.parametrize("name", ["grouped", "norm_per_head", "norm_full"])
def test_gradients_reach_every_parameter_and_are_right(name: str) -> None:
    attention, config = built(name), tiny.attention(**CASES[name])
    x_BSD = torch.randn(1, 4, D_MODEL, dtype=torch.float64, requires_grad=True)
    weights = dict(attention.named_parameters())
    leaves, grad = [x_BSD, *weights.values()], torch.randn(1, 4, D_MODEL, dtype=torch.float64)
    ours = torch.autograd.grad(attention(x_BSD, context(config, 0, 4)), leaves, grad)
    true = torch.autograd.grad(definition(attention, config, x_BSD[0])[None], leaves, grad)
    for leaf, (mine, right) in zip(["x", *weights], zip(ours, true, strict=True), strict=True):
        assert right.abs().max() > 1e-3, f"{leaf}: a gradient of zero proves nothing"
        assert torch.allclose(mine, right, rtol=1e-10, atol=1e-12), leaf


@torch.no_grad()
def test_a_narrow_cache_keeps_the_dtype_of_the_model() -> None:
    attention, config = built("grouped").float(), tiny.attention()
    x_BSD = torch.randn(1, 6, D_MODEL)
    whole = attention(x_BSD, context(config, 0, 6))
    cache = KVCache(tiny.config(), 1, 6, dtype=torch.bfloat16)
    y_BSD = attention(x_BSD, context(config, 0, 6, cache))
    assert y_BSD.dtype == torch.float32
    error = (y_BSD - whole).norm() / whole.norm()
    assert 1e-5 < error < 1e-2, "as wrong as bfloat16 keys and values, and no more"
