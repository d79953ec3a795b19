"""Attention over pages in C: as near to float64 as torch is, and the same bits in any company."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety.backends import cpu, cpu_attention
from moiety.config import AttentionConfig, ModelConfig, RopeConfig
from moiety.model.attention import Attention
from moiety.model.context import KVCache, forward_context
from moiety.model.paged import PagedStep, PagePool
from tests import tiny

EPS = 1e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"heads": 3, "kv_heads": 3, "head_dim": 64},
    "pairs": {"heads": 4, "kv_heads": 2, "head_dim": 80, "qk_norm": "head"},
    "threes": {"heads": 6, "kv_heads": 2, "head_dim": 96, "qk_norm": "full", "rope_pairs": "interleaved"},
    "wide": {"heads": 4, "kv_heads": 1, "head_dim": 128, "qk_norm": "full", "clip_qkv": 1.1},
    "odd": {"heads": 5, "kv_heads": 1, "head_dim": 40, "sinks": True, "window": 70},
    "six": {"heads": 12, "kv_heads": 2, "head_dim": 20, "logit_cap": 3.0, "scale": 0.4, "rope_fraction": 0.5},
    "seven": {
        "heads": 7,
        "kv_heads": 1,
        "head_dim": 6,
        "window": 50,
        "chunked": True,
        "qk_norm": "l2_rotated",
    },
    "eight": {"heads": 8, "kv_heads": 1, "head_dim": 64, "sinks": True, "logit_cap": 20.0, "window": 5},
    "factored": {"heads": 2, "kv_heads": 1, "head_dim": 16, "rope_layers": (), "query_scale": 0.3},
    "after": {"heads": 2, "kv_heads": 2, "head_dim": 256, "qk_norm": "head_rotated"},
    "many": {"heads": 71, "kv_heads": 1, "head_dim": 32},
}


class Bench:
    """One attention layer with random weights, and projections of several sequences to run through it."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        attention = AttentionConfig(**{"query_scale_floor": 9, **OPTIONS[name]})
        self.config = ModelConfig(vocab_size=9, d_model=8, layers=1, d_ff=4, attention=attention)
        self.layer = Attention(attention, 8, 0, EPS)
        tiny.fill(self.layer)
        width = (attention.heads + 2 * attention.kv_heads) * attention.head_dim
        self.qkv = [torch.randn(length, width) * 1.5 for length in lengths]

    @torch.no_grad()
    def defined(self, qkv: Tensor, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
        """By torch, in one piece."""
        cache = KVCache(self.config, 1, len(qkv), dtype=stored)
        context = forward_context(self.config, torch.zeros(1, len(qkv), dtype=torch.int64), cache=cache)
        y = self.layer.to(dtype)._mixed(context, qkv[None].to(dtype))[0]
        self.layer.float()
        return y

    @torch.no_grad()
    def paged(self, steps: list[list[int]], dtype: torch.dtype, seed: int, page: int = 16) -> list[Tensor]:
        """By the kernel: in each step so many tokens of each sequence, in random pages."""
        rng = random.Random(seed)
        pool = PagePool(self.config, 120, page, dtype=dtype)
        for part in pool.parts:
            part.fill_(float("nan"))
        free = rng.sample(range(120), 120)
        tables = [[free.pop() for _ in range(-(-len(row) // page))] for row in self.qkv]
        starts, found = [0] * len(self.qkv), [[] for _ in self.qkv]  # type: ignore[var-annotated]
        for counts in steps:
            order = [one for one in range(len(counts)) if counts[one]]
            rng.shuffle(order)
            taken = [counts[one] for one in order]
            step = PagedStep(pool, [tables[one] for one in order], [starts[one] for one in order], taken)
            row = torch.cat([self.qkv[one][starts[one] : starts[one] + counts[one]] for one in order])
            context = forward_context(self.config, torch.zeros(1, len(row), dtype=torch.int64), cache=step)
            for one, y in zip(
                order, self.layer._paged(row[None], step, context)[0].split(taken), strict=True
            ):
                found[one].append(y)
                starts[one] += counts[one]
        assert starts == [len(row) for row in self.qkv]
        return [torch.cat(pieces) for pieces in found]


def error(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).square().mean().sqrt() / true.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_as_near_to_the_truth_as_torch(name: str, dtype: torch.dtype, level: str) -> None:
    bench = Bench(name, [150, 1, 67])
    found = bench.paged([[150, 1, 67]], dtype, 0, page=32 if name == "plain" else 16)
    for qkv, y in zip(bench.qkv, found, strict=True):
        true = bench.defined(qkv, dtype if dtype == torch.bfloat16 else torch.float64, torch.float64)
        torchs = error(bench.defined(qkv, dtype, torch.float32), true)
        # a key on the edge between two bfloat16 numbers goes either way, and moves a score by 2 ** -9 of a product
        noise = 2e-7 if dtype == torch.float32 else 3e-5
        assert error(y, true) < 2 * torchs + noise, (error(y, true), torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_bits_in_any_company(name: str, dtype: torch.dtype, level: str) -> None:
    """One token at a time, in one piece, in random pieces, beside others or alone, with one thread or two."""
    lengths = [93, 20, 70]
    bench = Bench(name, lengths)
    whole = bench.paged([lengths], dtype, 0)
    rng = random.Random(3)
    left, steps = list(lengths), []
    while any(left):
        steps.append([min(have, rng.choice([0, 1, 1, 2, 5, 33])) for have in left])
        left = [have - taken for have, taken in zip(left, steps[-1], strict=True)]
    singly = [[int(position < length) for length in lengths] for position in range(93)]
    apart = [[length if one == number else 0 for one, length in enumerate(lengths)] for number in range(3)]
    try:
        for number, schedule in enumerate([[step for step in steps if any(step)], singly, apart]):
            torch.set_num_threads(1 + number % 2)
            for one, (y, wanted) in enumerate(
                zip(bench.paged(schedule, dtype, 7 + number), whole, strict=True)
            ):
                assert torch.equal(y, wanted), (number, one, (y - wanted).abs().max())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("sinks", [False, True])
def test_what_is_not_a_number_stays_visible(sinks: bool, level: str) -> None:
    bench = Bench("odd" if sinks else "plain", [40, 20])
    bench.qkv[0][25, 3] = float("nan")  # a query
    y, other = bench.paged([[40, 20]], torch.float32, 0)
    assert y[25].isnan().any() and not y[:25].isnan().any() and not other.isnan().any()


@pytest.mark.parametrize("shape", [(1, 5), (3, 16), (7, 2048), (40, 2051)])
def test_norm_of_rows(shape: tuple[int, int], level: str) -> None:
    x, add, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    true = torch.nn.functional.rms_norm((x + add).double(), shape[1:], weight.double(), EPS)
    both = x + add
    torchs = error(torch.nn.functional.rms_norm(both, shape[1:], weight, EPS), true)
    y = cpu_attention.rms_norm(x, weight, EPS, add_TD=add)
    assert torch.equal(x, both) and error(y, true) < 2 * torchs + 1e-7
    assert torch.equal(cpu_attention.rms_norm(both, weight, EPS), y) and torch.equal(both, x)
    assert torch.equal(cpu_attention.rms_norm(both[:1].clone(), weight, EPS), y[:1])


def test_the_reason_is_said() -> None:
    usual: tuple[Any, ...] = (torch.float32, "cpu", torch.bfloat16, 16, 64, False, False)
    assert cpu_attention.choose(*usual).name == ("cpu" if cpu.levels() else "torch")
    for place, value, reason in [
        (0, torch.float16, "activations are torch.float16"),
        (2, torch.float16, "pages are in torch.float16"),
        (3, 24, "24 tokens"),
        (4, 1024, "head_dim is 1024"),
        (5, True, "latent"),
        (6, True, "gradients"),
    ]:
        choice = cpu_attention.choose(*usual[:place], value, *usual[place + 1 :])
        assert choice.name == "torch" and reason in choice.reason, choice


def test_stretched_positions_follow_each_sequence() -> None:
    """Positions beyond the original context in one sequence do not stretch its neighbour's."""
    bench = Bench("plain", [60, 10])
    rope = RopeConfig(kind="dynamic", factor=4.0, original_positions=20)
    attention = AttentionConfig(**{**OPTIONS["plain"], "rope": rope})
    bench.config = ModelConfig(vocab_size=9, d_model=8, layers=1, d_ff=4, attention=attention)
    for qkv, y in zip(bench.qkv, bench.paged([[60, 10]], torch.float32, 0), strict=True):
        assert error(y, bench.defined(qkv, torch.float64, torch.float64)) < 1e-6
