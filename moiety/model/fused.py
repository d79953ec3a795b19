"""Which blocks the compiled kernels run as a whole: packed, pre-norm, few tokens, nothing asked beyond the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moiety.backends import cpu_block
from moiety.backends.cpu_attention import RaggedStep
from moiety.backends.cpu_block import PackedBlock
from moiety.model.attention import Attention
from moiety.model.norm import RMSNorm
from moiety.moe.layer import MoE
from moiety.moe.packed import PackedExperts, PackedLinear
from moiety.moe.streamed import FEW_TOKENS, StreamedExperts
from moiety.routing import Routing

if TYPE_CHECKING:
    from moiety.model.context import ForwardContext
    from moiety.model.transformer import Block

__all__ = ["fused"]


class _Parts(NamedTuple):
    """What a block that can be run as a whole is made of."""

    norms: tuple[RMSNorm, RMSNorm]
    attention: Attention
    qkv: PackedLinear
    out: PackedLinear
    moe: MoE
    experts: PackedExperts | StreamedExperts


def fused(block: Block, x_BSD: Tensor, context: ForwardContext) -> tuple[Tensor, Routing] | None:
    """`Block.forward` by one call of the kernels, or by two around a wait for the disk; None where it takes more."""
    step, number = context.paged, block.layer
    if step is None or step.tokens > cpu_block.MOST_TOKENS or x_BSD.dtype != torch.float32:
        return None
    if context.valid_BS is not None or number in context.pinned or number in context.cost:
        return None
    parts = _parts(block)
    if parts is None or step.choice(x_BSD, parts.attention.head_dim).name != "cpu":
        return None
    router = parts.moe.compiled(x_BSD)
    if router is None or not router.shares_memory:
        return None
    layer, ragged = parts.attention.compiled(step, context)
    weights = parts.experts.weights if isinstance(parts.experts, PackedExperts) else None
    norms = tuple(norm.weight for norm in parts.norms)
    addresses = [norm_D.data_ptr() for norm_D in norms]
    tiles = None if weights is None else (weights.up, weights.down)
    made_from = (layer, parts.qkv.matrix, parts.out.matrix, tiles, router.made_from, addresses)
    known = step.pool.blocks.get(number)
    if known is None or known[0] != made_from:
        made = PackedBlock(
            (norms[0], norms[1]),
            parts.norms[0].eps,
            qkv=parts.qkv.matrix,
            out=parts.out.matrix,
            attention=layer,
            router=router,
            experts=weights,
        )
        known = step.pool.blocks[number] = (made_from, made)
    if isinstance(parts.experts, PackedExperts):
        return cpu_block.block(known[1], ragged, x_BSD)
    return _streamed(known[1], parts.experts, ragged, x_BSD)


def _streamed(
    packed: PackedBlock, experts: StreamedExperts, ragged: RaggedStep, x_BSD: Tensor
) -> tuple[Tensor, Routing]:
    """One call decides, and foresees the next layer; then experts are asked for."""
    foresight, following = experts.foresight if ragged.tokens <= FEW_TOKENS else None, None
    if foresight is not None:
        following = foresight.moe.compiled(x_BSD)
    ratio_D = None if following is None or foresight is None else foresight.ratio_D
    found = cpu_block.front(packed, ragged, x_BSD, following, ratio_D)
    y_TD = experts(found.normed_TD, found.routing, found.foreseen)
    return found.x_1TD.add_(y_TD), found.routing


def _parts(block: Block) -> _Parts | None:
    before, between, attention, moe = (
        block.attention_norm,
        block.feed_forward_norm,
        block.attention,
        block.feed_forward,
    )
    if not (isinstance(before, RMSNorm) and isinstance(between, RMSNorm) and before.eps == between.eps):
        return None
    if block.attention_post_norm or block.feed_forward_post_norm or block.multiplier != 1:
        return None
    if not isinstance(attention, Attention) or not isinstance(moe, MoE):
        return None
    qkv, out, experts = attention.qkv, attention.out, moe.experts
    if not (isinstance(qkv, PackedLinear) and isinstance(out, PackedLinear)):
        return None
    if not isinstance(experts, PackedExperts | StreamedExperts) or moe.shared is not None or moe.weigh_input:
        return None
    if moe.choices != experts.count or {before.weight.dtype, between.weight.dtype} != {torch.float32}:
        return None
    modules = (before, between, attention, qkv, out, moe, experts)
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return None  # somebody wants to be called in between
    return _Parts((before, between), attention, qkv, out, moe, experts)
