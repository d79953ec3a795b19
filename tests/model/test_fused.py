"""A block in one call of the kernels is the block, to the last bit; whatever it cannot express goes the long way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moiety.backends import cpu, cpu_block
from moiety.config import ModelConfig
from moiety.model.paged import PagedStep, PagePool
from moiety.model.transformer import Block, ModelOutput, Transformer
from moiety.quant.quantize import policy_named, quantize
from tests import tiny
from tests.families import FAMILY_SETTINGS
from tests.model.test_paged import family_config

TABLES, STARTS = ([0, 1], [2, 3]), (0, 0)
Step = tuple[list[int], list[int]]
STEPS: tuple[Step, ...] = (([0, 0], [7, 3]), ([7, 3], [1, 1]), ([8, 4], [1, 6]))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every call of the kernel."""
    seen: list[int] = []
    kernel = cpu_block.block

    def counted(packed: Any, step: Any, x: Tensor) -> Any:
        seen.append(step.tokens)
        return kernel(packed, step, x)

    monkeypatch.setattr(cpu_block, "block", counted)
    return seen


@torch.inference_mode()
def run(model: Transformer) -> list[ModelOutput]:
    """Two sequences through three steps, in fresh pages."""
    pool, random = PagePool(model.config, 4), torch.Generator().manual_seed(2)
    outputs = []
    for starts, counts in STEPS:
        tokens = torch.randint(model.config.vocab_size, (1, sum(counts)), generator=random)
        outputs.append(model(tokens, cache=PagedStep(pool, TABLES, starts, counts)))
    return outputs


def packed(config: ModelConfig, policy: str = "int4-g32") -> Transformer:
    torch.manual_seed(3)
    model = Transformer(config)
    tiny.fill(model)
    quantize(model.eval(), policy_named(policy))
    return model


def the_long_way(model: Transformer) -> None:
    """Somebody watches each layer's attention, so that no block is one call."""
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.register_forward_hook(lambda *_: None)


def same(one: list[ModelOutput], other: list[ModelOutput]) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.hidden.isfinite().all() and torch.equal(left.hidden, right.hidden)
        assert left.routing.keys() == right.routing.keys()
        for layer, routing in left.routing.items():
            for name in ("token_N", "weight_N", "counts_E", "logits_TE", "score_TE"):
                assert torch.equal(getattr(routing, name), getattr(right.routing[layer], name)), (layer, name)
            assert routing.tokens == right.routing[layer].tokens


@pytest.mark.skipif(not cpu.level(), reason="the kernels are not compiled here")
@pytest.mark.parametrize("policy", ["int4-g32", "int8-g32", "mxfp4", "f32"])
def test_one_call_is_the_block(policy: str, calls: list[int]) -> None:
    model = packed(tiny.CONFIGS["qwen3_moe"], policy)
    whole = run(model)
    layers = len(model.config.moe_layers)
    assert calls == [10] * layers + [2] * layers + [7] * layers
    the_long_way(model)
    same(whole, run(model))
    assert len(calls) == 3 * layers


@pytest.mark.skipif(not cpu.level(), reason="the kernels are not compiled here")
@pytest.mark.parametrize("name", sorted(FAMILY_SETTINGS))
def test_every_family_is_itself(name: str, calls: list[int]) -> None:
    model = packed(family_config(name, seed=4))
    whole = run(model)
    the_long_way(model)
    before = len(calls)
    same(whole, run(model))
    assert len(calls) == before


@pytest.mark.skipif(not cpu.level(), reason="the kernels are not compiled here")
def test_new_weights_are_used(calls: list[int]) -> None:
    """Changing weights in place or putting others there is seen by the next step of the same pages."""
    config = tiny.CONFIGS["qwen3_moe"]
    model, pool = packed(config), PagePool(config, 2)
    tokens = torch.tensor([[5, 6, 7]])

    @torch.inference_mode()
    def hidden() -> Tensor:
        output: ModelOutput = model(tokens, cache=PagedStep(pool, [[0]], [0], [3]))
        return output.hidden.clone()

    block = model.blocks[0]
    assert isinstance(block, Block) and block.attention_norm is not None
    gate = block.feed_forward.get_submodule("gate")
    assert isinstance(gate, nn.Linear)
    changes: list[Callable[[], object]] = [
        gate.weight.data.neg_,
        lambda: setattr(gate, "weight", nn.Parameter(gate.weight.flip(0).clone())),
        lambda: setattr(block.attention_norm, "weight", nn.Parameter(torch.full((config.d_model,), 0.3))),
        lambda: setattr(block.attention, "qkv", packed(config).blocks[-1].get_submodule("attention.qkv")),
    ]
    seen = hidden()
    for change in changes:
        with torch.no_grad():
            change()
        now = hidden()
        assert not torch.equal(seen, now)
        known = pool.blocks.copy()
        pool.blocks.clear()  # made anew from the weights of this moment
        assert torch.equal(now, hidden()) and known
        seen = now
    assert calls


@pytest.mark.skipif(not cpu.level(), reason="the kernels are not compiled here")
@pytest.mark.parametrize(
    "changes",
    [{"residual_multiplier": 0.5}, {"norm_place": "both"}, {"norm": "layer"}],
)
def test_what_it_cannot_express_goes_the_long_way(changes: dict[str, Any], calls: list[int]) -> None:
    run(packed(dataclasses.replace(tiny.CONFIGS["qwen3_moe"], **changes)))
    assert not calls


@pytest.mark.skipif(not cpu.level(), reason="the kernels are not compiled here")
def test_many_tokens_go_the_long_way(calls: list[int]) -> None:
    config = tiny.CONFIGS["qwen3_moe"]
    model, most = packed(config), cpu_block.MOST_TOKENS
    with torch.inference_mode():
        for count in (most, most + 1):
            pool = PagePool(config, 4)
            model(torch.ones(1, count, dtype=torch.int64), cache=PagedStep(pool, [[0, 1, 2]], [0], [count]))
    assert calls == [most] * len(config.moe_layers)
