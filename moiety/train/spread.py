"""A model that every process has whole becomes one of which each has its part."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moiety.errors import ConfigError
from moiety.model.adapters import names
from moiety.model.attention import Attention
from moiety.model.transformer import Block, Transformer
from moiety.moe.experts import Experts, FeedForward
from moiety.moe.layer import MoE
from moiety.parallel.divide import expert_layouts, keep_own, modules
from moiety.parallel.expert_parallel import ExpertParallel
from moiety.parallel.mesh import Layout, World

__all__ = ["settle", "spread"]


def spread(model: Transformer, world: World) -> None:
    """Keep this process's part of every parameter; all processes must hold the same whole ones.

    Raises:
        ConfigError: something in the model cannot be divided so; nothing was changed.
    """
    if world.mesh is None:
        return
    layouts: dict[str, Layout] = {}
    _check(model, world)
    if world.sizes["expert"] > 1:
        layouts |= expert_layouts(model, world.sizes["expert"])
    if world.sizes["tensor"] > 1:
        for name, block in modules(model, Block):
            layouts |= _tensor_layouts(name, block, world.sizes["tensor"])
    keep_own(model, layouts, world)
    if world.sizes["expert"] > 1:
        groups = _expert_groups(world)
        for _, moe in modules(model, MoE):
            assert isinstance(moe.experts, Experts), type(moe.experts)
            moe.experts.spread = functools.reduce(
                lambda inside, group: ExpertParallel(group, inside), groups, None
            )
    if world.sizes["tensor"] > 1:
        for _, block in modules(model, Block):
            _share(block, world.groups["tensor"])
    if world.sizes["shard"] > 1:
        _shard(model, world)


def _check(model: Transformer, world: World) -> None:
    moe = model.config.moe
    if names(model):
        raise ConfigError("adapters are trained in one process", hint="leave torchrun out")
    if moe is not None and moe.bias_rule == "quantile" and world.parts > 1:
        raise ConfigError(
            "bias rule 'quantile' looks at every score of a step, which no process has",
            hint="use bias rule 'sign'",
        )
    if world.sizes["tensor"] > 1 and world.sizes["shard"] > 1:
        raise ConfigError(
            "tensor_parallel and shard_parallel do not go together",
            hint="use one of the two, with expert_parallel or data_parallel",
        )


def settle(model: nn.Module) -> None:
    """Let every module hold its shards again, and no whole parameter, as between two steps."""
    if "torch.distributed.fsdp" not in sys.modules:
        return  # nothing was sharded
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _expert_groups(world: World) -> list[dist.ProcessGroup]:
    """From the inside: the ranks of a node, then those that stand for nodes; one group when there is one node."""
    nodes = world.options.expert_nodes
    if nodes in (1, world.sizes["expert"]):
        return [world.groups["expert"]]
    return [world.group_along(("expert",), nodes), world.group_along(("expert",), nodes, across=True)]


def _tensor_layouts(name: str, block: Block, ranks: int) -> dict[str, Layout]:
    """Attention by heads, dense feed-forwards by columns of their inner width; shared experts stay whole."""
    attention, dense = block.attention, block.feed_forward
    if not isinstance(attention, Attention):
        raise ConfigError("latent attention is not divided among processes", hint="use tensor_parallel 1")
    if attention.heads % ranks or attention.kv_heads % ranks:
        raise ConfigError(
            f"{attention.heads} heads and {attention.kv_heads} key/value heads cannot be shared by {ranks} processes",
            hint="choose a tensor_parallel that divides both",
        )
    if attention.norm == "full":
        raise ConfigError("a norm over all heads needs all of them", hint="use tensor_parallel 1")
    layouts = {}
    q_width, k_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    blocks = (q_width, k_width, k_width)
    layouts[f"{name}.attention.qkv.weight"] = Layout("tensor", 0, blocks)
    layouts[f"{name}.attention.out.weight"] = Layout("tensor", 1)
    if attention.qkv.bias is not None:
        layouts[f"{name}.attention.qkv.bias"] = Layout("tensor", 0, blocks)
    if attention.sinks is not None:
        layouts[f"{name}.attention.sinks"] = Layout("tensor")
    if isinstance(dense, FeedForward):
        d_ff = dense.down.shape[1]
        if d_ff % ranks:
            raise ConfigError(
                f"an inner width of {d_ff} cannot be shared by {ranks} processes",
                hint="choose a tensor_parallel that divides it",
            )
        up = f"{name}.feed_forward.{dense.up_name}"
        inner = (d_ff, d_ff) if dense.gated else ()
        layouts |= {up: Layout("tensor", 0, inner), f"{name}.feed_forward.down": Layout("tensor", 1)}
        if dense.down_bias is not None:
            layouts[f"{up}_bias"] = Layout("tensor", 0, inner)
    return layouts


class _Copied(torch.autograd.Function):
    """x for every process's part of a layer; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    """The sum of what every process's part answers; each gets its gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _share(block: Block, group: dist.ProcessGroup) -> None:
    """Attention and a dense feed-forward with their parts already cut: copy what goes in, add up what comes out."""
    attention, dense = block.attention, block.feed_forward
    assert isinstance(attention, Attention), type(attention)
    ranks = dist.get_world_size(group)
    attention.heads, attention.kv_heads = attention.heads // ranks, attention.kv_heads // ranks
    biases: dict[nn.Module, Tensor | None] = {attention: attention.out.bias}
    if isinstance(dense, FeedForward):
        biases[dense] = dense.down_bias

    def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return _Copied.apply(given[0], group), *given[1:]

    def after(bias: Tensor | None, module: nn.Module, given: Any, y: Tensor) -> Tensor:
        without = y if bias is None else y - bias.to(y.dtype)
        total: Tensor = _Summed.apply(without, group)
        return total if bias is None else total + bias.to(y.dtype)

    for module, bias in biases.items():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(functools.partial(after, bias))


def _shard(model: Transformer, world: World) -> None:
    """FSDP2 over every block and the rest; sums, not means, as everywhere here."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    assert world.mesh is not None
    mesh = world.mesh["shard"]
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    for module in (*model.blocks, model):
        assert isinstance(module, FSDPModule), type(module)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
