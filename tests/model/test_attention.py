"""Attention against one query at a time in plain loops: heads, norms, positions, windows, sinks, the cache."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.config import AttentionConfig, ModelConfig
from moiety.model.attention import Attention
from moiety.model.context import ForwardContext, KVCache, forward_context
from moiety.model.rope import rotary_table
from tests import tiny

D_MODEL, EPS, LAYER = 20, 1e-3, 2
CASES: dict[str, dict[str, Any]] = {
    "one_for_one": {"kv_heads": 4},
    "grouped": {"kv_heads": 2},
    "one_for_all": {"kv_heads": 1},
    "three_to_one": {"heads": 6, "kv_heads": 2},
    "biases": {"qkv_bias": True, "out_bias": True},
    "norm_per_head": {"qk_norm": "head", "qkv_bias": True},
    "norm_full": {"qk_norm": "full", "out_bias": True},
    "norm_after_turning": {"qk_norm": "head_rotated"},
    "norm_after_no_turning": {"qk_norm": "head_rotated", "rope_layers": (0, 1)},
    "length_1_after_turning": {"qk_norm": "l2_rotated", "rope_layers": (1, LAYER)},
    "length_as_it_is": {"qk_norm": "l2_rotated", "rope_layers": (1,)},
    "partly_turned": {"rope_fraction": 0.7},
    "not_turned": {"rope_fraction": 0.0, "kv_heads": 1},
    "no_layer_turned": {"rope_layers": ()},
    "interleaved": {"rope_pairs": "interleaved"},
    "interleaved_partly": {"rope_pairs": "interleaved", "rope_fraction": 0.7},
    "wide_head": {"heads": 3, "kv_heads": 3, "head_dim": 14},
    "clipped": {"clip_qkv": 0.6, "qkv_bias": True},
    "clipped_after_the_norm": {"clip_qkv": 0.8, "qk_norm": "full"},
    "scaled": {"scale": 0.9},
    "capped": {"logit_cap": 0.5, "heads": 6, "kv_heads": 2},
    "sinks": {"sinks": True},
    "sinks_capped_scaled": {"sinks": True, "logit_cap": 0.7, "scale": 1.3, "kv_heads": 1},
    "window_1": {"window": 1},
    "window_4": {"window": 4, "heads": 6, "kv_heads": 3},
    "window_as_long_as_the_text": {"window": 11},
    "window_elsewhere": {"window": 2, "window_layers": (0, 1)},
    "window_here_with_sinks": {"window": 3, "window_layers": (LAYER,), "sinks": True},
    "chunks_of_4": {"window": 4, "chunked": True},
    "chunks_of_1": {"window": 1, "chunked": True},
    "chunks_capped": {"window": 3, "chunked": True, "logit_cap": 0.4},
    "queries_grow": {"query_scale": 0.4, "query_scale_floor": 3, "rope_layers": (0,)},
    "queries_that_turn_do_not_grow": {"query_scale": 0.4, "query_scale_floor": 1, "rope_layers": (LAYER,)},
}
every_case = pytest.mark.parametrize("name", CASES)


def built(name: str) -> tuple[Attention, ModelConfig]:
    config = tiny.config(attention=tiny.attention(**CASES[name]))
    made = Attention(config.attention, D_MODEL, LAYER, EPS).double()
    tiny.fill(made)
    return made, config


def context(config: ModelConfig, positions: int, cache: KVCache | None = None) -> ForwardContext:
    return forward_context(config, torch.zeros(1, positions, dtype=torch.int64), cache=cache)


def normed(x: Tensor, weight: Tensor | float) -> Tensor:
    return x / (x.square().mean() + EPS).sqrt() * weight


def turned(x_d: Tensor, position: int, config: AttentionConfig) -> Tensor:
    """One head at one position; the angle is a float32, as the table's are."""
    y_d, half = x_d.clone(), config.rotary_dim // 2
    cos, sin = rotary_table(torch.tensor([position]), config.rotary_dim, config.rope_theta)
    for j in range(half):
        one, other = (2 * j, 2 * j + 1) if config.rope_pairs == "interleaved" else (j, j + half)
        c, s = float(cos[0, j]), float(sin[0, j])
        y_d[one], y_d[other] = x_d[one] * c - x_d[other] * s, x_d[other] * c + x_d[one] * s
    return y_d


def sees(config: AttentionConfig, query: int, key: int, layer: int = LAYER) -> bool:
    """Is this key looked at?"""
    if config.window is not None and (config.window_layers is None or layer in config.window_layers):
        if config.chunked:
            return key <= query and key // config.window == query // config.window
        return 0 <= query - key < config.window
    return key <= query


def weighted(
    config: AttentionConfig, score: dict[int, Tensor], value: list[Tensor], sink: Tensor | None
) -> Tensor:
    """Values weighed by the softmax over the scores of the keys that are seen, from its formula."""
    if config.logit_cap:
        score = {at: config.logit_cap * (one / config.logit_cap).tanh() for at, one in score.items()}
    total = sum(one.exp() for one in score.values()) + (0 if sink is None else sink.exp())
    return sum(one.exp() / total * value[at] for at, one in score.items())  # type: ignore[return-value]


def head_of(
    config: AttentionConfig, x_d: Tensor, position: int, weight: Tensor | None, *, query: bool
) -> Tensor:
    """One query or key head, after the projection and a norm of the full width."""
    turns = config.rope_layers is None or LAYER in config.rope_layers
    if weight is not None and config.qk_norm == "head":
        x_d = normed(x_d, weight)
    if turns:
        x_d = turned(x_d, position, config)
    if weight is not None and config.qk_norm == "head_rotated":
        x_d = normed(x_d, weight)
    if turns and config.qk_norm == "l2_rotated":
        x_d = normed(x_d, 1.0)
    if query and not turns:
        x_d = x_d * (1 + config.query_scale * math.log1p((position + 1) // config.query_scale_floor))
    return x_d


def definition(attention: Attention, config: AttentionConfig, x_SD: Tensor) -> Tensor:
    """One sequence: for each position and head a softmax over the keys that it sees."""
    heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
    bounds = [0, heads * width, (heads + kv_heads) * width, (heads + 2 * kv_heads) * width]
    weights = dict(attention.named_parameters())
    bias = weights.get("qkv.bias", x_SD.new_zeros(bounds[-1]))
    out_bias = weights.get("out.bias", x_SD.new_zeros(D_MODEL))
    norm = [weights.get("q_norm.weight"), weights.get("k_norm.weight"), None]
    queries, keys, values = places = ([], [], [])  # type: tuple[list[Any], list[Any], list[Any]]
    for position, x_D in enumerate(x_SD):
        for n, (a, b) in enumerate(itertools.pairwise(bounds)):
            part = attention.qkv.weight[a:b] @ x_D + bias[a:b]
            full = norm[n]
            if full is not None and config.qk_norm == "full":
                part = normed(part, full)
            if config.clip_qkv:
                part = part.clamp(-config.clip_qkv, config.clip_qkv)
            split = list(part.split(width))
            if n < 2:
                split = [head_of(config, head, position, norm[n], query=n == 0) for head in split]
            places[n].append(split)
    scale = 1 / math.sqrt(width) if config.scale is None else config.scale
    rows = []
    for position in range(len(x_SD)):
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            seen = [at for at in range(len(x_SD)) if sees(config, position, at)]
            score = {at: queries[position][head] @ keys[at][shared] * scale for at in seen}
            sink = weights["sinks"][head] if config.sinks else None
            mixed.append(weighted(config, score, [value[shared] for value in values], sink))
        rows.append(attention.out.weight @ torch.cat(mixed) + out_bias)
    return torch.stack(rows)


@every_case
@torch.no_grad()
def test_equals_the_definition(name: str) -> None:
    attention, config = built(name)
    x_BSD = torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    y_BSD = attention(x_BSD, context(config, 11))
    true = torch.stack([definition(attention, config.attention, x_SD) for x_SD in x_BSD])
    tiny.assert_exact(y_BSD, true)


@every_case
@torch.no_grad()
def test_pieces_through_the_cache_equal_the_whole(name: str) -> None:
    attention, config = built(name)
    x_BSD = torch.randn(3, 11, D_MODEL, dtype=torch.float64)
    whole = attention(x_BSD, context(config, 11))
    cache = KVCache(config, 3, 12, dtype=torch.float64)
    cache.buffer.fill_(float("nan"))  # what was never written must not be read
    pieces, start = [], 0
    for positions in (1, 4, 1, 2, 3):
        part = x_BSD[:, start : start + positions]
        pieces.append(attention(part, context(config, positions, cache)))
        cache.advance(positions)
        start += positions
    tiny.assert_exact(torch.cat(pieces, dim=1), whole)
    assert bool(cache.buffer[:, :LAYER].isnan().all()), "only its own layer is written"


@torch.no_grad()
def test_every_option_changes_something() -> None:
    """An option that a case sets and that does nothing would pass every other test here."""
    x_BSD = torch.randn(1, 11, D_MODEL, dtype=torch.float64)
    structure = {"heads", "kv_heads", "head_dim", "qkv_bias", "out_bias"}
    idle = {"window_as_long_as_the_text", "window_elsewhere", "queries_that_turn_do_not_grow"}
    for name, changes in CASES.items():
        if changes.keys() <= structure:
            continue
        attention, config = built(name)
        plain = {key: value for key, value in changes.items() if key in structure}
        plain_config = tiny.config(attention=tiny.attention(**plain))
        other = Attention(plain_config.attention, D_MODEL, LAYER, EPS).double()
        other.load_state_dict(attention.state_dict(), strict=False)
        ours, without = attention(x_BSD, context(config, 11)), other(x_BSD, context(plain_config, 11))
        assert ((ours - without).abs().max() > 1e-4) == (name not in idle), name


@pytest.mark.parametrize(
    "name",
    [
        "grouped",
        "norm_per_head",
        "norm_full",
        "norm_after_turning",
        "length_1_after_turning",
        "interleaved_partly",
        "clipped",
        "sinks_capped_scaled",
        "window_here_with_sinks",
        "chunks_capped",
        "queries_grow",
    ],
)
def test_gradients_reach_every_parameter_and_are_right(name: str) -> None:
    attention, config = built(name)
    x_BSD = torch.randn(1, 5, D_MODEL, dtype=torch.float64, requires_grad=True)
    weights = dict(attention.named_parameters())
    leaves, grad = [x_BSD, *weights.values()], torch.randn(1, 5, D_MODEL, dtype=torch.float64)
    ours = torch.autograd.grad(attention(x_BSD, context(config, 5)), leaves, grad)
    true = torch.autograd.grad(definition(attention, config.attention, x_BSD[0])[None], leaves, grad)
    for leaf, (mine, right) in zip(["x", *weights], zip(ours, true, strict=True), strict=True):
        assert right.abs().max() > 1e-3, f"{leaf}: a gradient of zero proves nothing"
        assert torch.allclose(mine, right, rtol=1e-10, atol=1e-12), leaf


@torch.no_grad()
def test_a_narrow_cache_keeps_the_dtype_of_the_model() -> None:
    for name in ("grouped", "sinks"):
        attention, config = built(name)
        attention = attention.float()
        x_BSD = torch.randn(1, 6, D_MODEL)
        whole = attention(x_BSD, context(config, 6))
        cache = KVCache(config, 1, 6, dtype=torch.bfloat16)
        y_BSD = attention(x_BSD, context(config, 6, cache))
        assert y_BSD.dtype == torch.float32
        error = (y_BSD - whole).norm() / whole.norm()
        assert 1e-5 < error < 1e-2, "as wrong as bfloat16 keys and values, and no more"


@torch.no_grad()
def test_the_softmax_with_sinks_is_float32_in_a_bfloat16_model() -> None:
    """Many equal keys and one sink: shares of 1/600 each must still add up to what is left."""
    attention, config = built("sinks")
    attention = attention.bfloat16()
    attention.qkv.weight.zero_()
    attention.qkv.weight[-12:] = 0.25
    assert attention.sinks is not None
    attention.sinks.fill_(0.0)
    x_BSD = torch.ones(1, 600, D_MODEL, dtype=torch.bfloat16)
    y_BSD = attention(x_BSD, context(config, 600))
    true_D = attention.out.weight.double() @ torch.full((24,), 0.25 * D_MODEL * 600 / 601).double()
    assert (y_BSD[0, -1].double() - true_D).norm() < 0.02 * true_D.norm()
