"""Latent attention against one query at a time in plain loops, absorbed against expanded, and through the cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety import cost
from moiety.config import AttentionConfig, MLAConfig, ModelConfig, RopeConfig
from moiety.errors import ConfigError
from moiety.model.context import ForwardContext, KVCache, forward_context
from moiety.model.mla import LatentAttention
from moiety.model.rope import rotary_table
from moiety.model.transformer import Transformer
from tests import tiny

D_MODEL, HEADS, NOPE, ROPE, VALUE, RANK = 20, 3, 6, 4, 9, 7
YARN = RopeConfig(kind="yarn", factor=4.0, original_positions=8, mscale=0.7, mscale_all_dim=0.8)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "query_bottleneck": {"q_rank": 5},
    "interleaved": {"rope_pairs": "interleaved", "q_rank": 5},
    "yarn": {"rope": YARN, "rope_pairs": "interleaved"},
    "scaled": {"scale": 0.6, "rope": YARN},
    "window": {"window": 4},
    "capped": {"logit_cap": 0.6},
    "not_turned_queries_grow": {"rope_layers": (0,), "query_scale": 0.5, "query_scale_floor": 3},
}
every_case = pytest.mark.parametrize("name", CASES)


def config_of(name: str) -> ModelConfig:
    changes = dict(CASES[name])
    sizes = {"nope_dim": NOPE, "rope_dim": ROPE, "value_dim": VALUE, "kv_rank": RANK, "norm_eps": 1e-3}
    mla = MLAConfig(q_rank=changes.pop("q_rank", 0), **sizes)  # type: ignore[arg-type]
    return tiny.config(attention=tiny.attention(heads=HEADS, kv_heads=HEADS, mla=mla, **changes))


def built(name: str) -> tuple[LatentAttention, ModelConfig]:
    config = config_of(name)
    made = LatentAttention(config.attention, D_MODEL, 1).double()
    tiny.fill(made)
    return made, config


def context(config: ModelConfig, positions: int, cache: KVCache | None = None) -> ForwardContext:
    return forward_context(config, torch.zeros(1, positions, dtype=torch.int64), cache=cache)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-3).sqrt() * weight


def turned(x_d: Tensor, position: int, config: AttentionConfig) -> Tensor:
    if config.rope_layers is not None and 1 not in config.rope_layers:
        return x_d
    cos, sin = rotary_table(torch.tensor([position]), ROPE, config.rope_theta, config.rope)
    y_d = x_d.clone()
    for j in range(ROPE // 2):
        one, other = (2 * j, 2 * j + 1) if config.rope_pairs == "interleaved" else (j, j + ROPE // 2)
        c, s = float(cos[0, j]), float(sin[0, j])
        y_d[one], y_d[other] = x_d[one] * c - x_d[other] * s, x_d[other] * c + x_d[one] * s
    return y_d


def definition(attention: LatentAttention, config: AttentionConfig, x_SD: Tensor) -> Tensor:
    """One sequence, one head, one query at a time."""
    weight = dict(attention.named_parameters())
    scale = 1 / math.sqrt(NOPE + ROPE)
    if config.rope is not None:
        scale *= (0.1 * config.rope.mscale_all_dim * math.log(config.rope.factor) + 1) ** 2
    scale = scale if config.scale is None else config.scale
    queries, keys, values = [], [], []
    for position, x_D in enumerate(x_SD):
        if "q.weight" in weight:
            q = weight["q.weight"] @ x_D
        else:
            q = weight["q_b.weight"] @ normed(weight["q_a.weight"] @ x_D, weight["q_a_norm.weight"])
        down = weight["kv_a.weight"] @ x_D
        both = weight["kv_b.weight"] @ normed(down[:RANK], weight["kv_a_norm.weight"])
        shared = turned(down[RANK:], position, config)
        heads = [
            torch.cat([one[:NOPE], turned(one[NOPE:], position, config)]) for one in q.split(NOPE + ROPE)
        ]
        if config.query_scale:
            growth = 1 + config.query_scale * math.log1p((position + 1) // config.query_scale_floor)
            heads = [one * growth for one in heads]
        queries.append(heads)
        keys.append([torch.cat([one[:NOPE], shared]) for one in both.split(NOPE + VALUE)])
        values.append([one[NOPE:] for one in both.split(NOPE + VALUE)])
    rows = []
    for position in range(len(x_SD)):
        mixed = []
        for head in range(HEADS):
            first = 0 if config.window is None else max(0, position - config.window + 1)
            score = torch.stack(
                [queries[position][head] @ keys[at][head] * scale for at in range(first, position + 1)]
            )
            if config.logit_cap:
                score = config.logit_cap * (score / config.logit_cap).tanh()
            share = score.softmax(0)
            mixed.append(sum(share[at - first] * values[at][head] for at in range(first, position + 1)))
        rows.append(weight["out.weight"] @ torch.cat(mixed))  # type: ignore[arg-type]
    return torch.stack(rows)


@every_case
@torch.no_grad()
def test_equals_the_definition(name: str) -> None:
    attention, config = built(name)
    x_BSD = torch.randn(2, 11, D_MODEL, dtype=torch.float64)
    true = torch.stack([definition(attention, config.attention, x_SD) for x_SD in x_BSD])
    tiny.assert_exact(attention(x_BSD, context(config, 11)), true)


@every_case
@pytest.mark.parametrize("absorbs", [False, True, None])
@torch.no_grad()
def test_pieces_through_the_cache_equal_the_whole(
    name: str, absorbs: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, config = built(name)
    if absorbs is not None:
        monkeypatch.setattr(LatentAttention, "_absorbing_is_less_work", lambda *_: absorbs)
    x_BSD = torch.randn(3, 11, D_MODEL, dtype=torch.float64)
    whole = attention(x_BSD, context(config, 11))
    cache = KVCache(config, 3, 12, dtype=torch.float64)
    cache.buffer.fill_(float("nan"))
    pieces, start = [], 0
    for positions in (3, 1, 1, 4, 2):
        pieces.append(attention(x_BSD[:, start : start + positions], context(config, positions, cache)))
        cache.advance(positions)
        start += positions
    tiny.assert_exact(torch.cat(pieces, dim=1), whole)
    assert bool(cache.buffer[:, 0].isnan().all()), "only its own layer is written"


@pytest.mark.parametrize("name", ["plain", "query_bottleneck", "yarn", "capped"])
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


def test_decoding_absorbs_and_a_prompt_does_not() -> None:
    config = tiny.attention(
        heads=4, kv_heads=4, mla=MLAConfig(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    )
    attention = LatentAttention(config, 8, 0)
    assert attention._absorbing_is_less_work(1, 2), "from the second token on"
    assert attention._absorbing_is_less_work(100, 4000)
    assert not attention._absorbing_is_less_work(4000, 4000)


def test_the_cache_holds_latents_and_costs_what_is_said() -> None:
    config = config_of("plain")
    cache = KVCache(config, 2, 5, dtype=torch.bfloat16)
    assert tuple(cache.buffer.shape) == (1, config.layers, 2, 1, 5, RANK + ROPE)
    assert cache.size_bytes == 2 * cost.kv_bytes(config, 5, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"clip_qkv": 1.0}, "no clip_qkv"),
        ({"rope_fraction": 0.5}, "no rope_fraction"),
        ({"clip_qkv": 1.0, "rope_fraction": 0.5}, "no clip_qkv, rope_fraction"),
    ],
)
def test_what_it_does_not_have_is_refused(changes: dict[str, Any], named: str) -> None:
    mla = MLAConfig(nope_dim=NOPE, rope_dim=ROPE, value_dim=VALUE, kv_rank=RANK)
    with pytest.raises(ConfigError, match=rf"latent attention has {named}\n"):
        Transformer(tiny.config(attention=tiny.attention(mla=mla, **changes)))
