"""Grouped-query attention (arXiv 2305.13245) on torch's scaled dot product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moiety.backends.matmul import linear
from moiety.config import AttentionConfig
from moiety.model.context import ForwardContext
from moiety.model.norm import RMSNorm
from moiety.model.rope import rotate

__all__ = ["Attention"]


class Attention(nn.Module):
    """Queries share key/value heads in equal groups; rotary positions; causal.

    Parameters: `qkv.weight` ((H + 2 KV) * head_dim, D), query rows first; `out.weight` (D, H * head_dim).

    Args:
        config: Sizes and options.
        d_model: Width D.
        layer: Which block this is, for the cache.
        norm_eps: Epsilon of the query and key norms, where there are any.
    """

    def __init__(self, config: AttentionConfig, d_model: int, layer: int, norm_eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.layer, self.norm_per_head = layer, config.qk_norm == "head"
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(d_model, width, bias=config.qkv_bias)
        self.out = nn.Linear(self.heads * self.head_dim, d_model, bias=config.out_bias)
        q_width, k_width = self.head_dim, self.head_dim
        if not self.norm_per_head:
            q_width, k_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        normed = config.qk_norm != "none"
        self.q_norm = RMSNorm(q_width, norm_eps) if normed else None
        self.k_norm = RMSNorm(k_width, norm_eps) if normed else None

    def _heads(self, x_BSD: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
        """Split into heads, normalised before or after the split: (B, H, S, head_dim)."""
        if norm is not None and not self.norm_per_head:
            x_BSD = norm(x_BSD)
        x_BSHd: Tensor = x_BSD.unflatten(-1, (heads, self.head_dim))
        if norm is not None and self.norm_per_head:
            x_BSHd = norm(x_BSHd)
        return x_BSHd.transpose(1, 2)

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """(B, S, D) to (B, S, D); keys and values go to `context.cache` when there is one."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = linear(x_BSD, self.qkv.weight, self.qkv.bias).split((q_width, kv_width, kv_width), dim=-1)
        q_BHSd = rotate(self._heads(q, self.heads, self.q_norm), context.rotary)
        k_BHSd = rotate(self._heads(k, self.kv_heads, self.k_norm), context.rotary)
        v_BHSd = self._heads(v, self.kv_heads, None)
        positions = q_BHSd.shape[2]
        mask = None
        if context.cache is not None:
            k_BHSd, v_BHSd = context.cache.extend(self.layer, k_BHSd, v_BHSd)
            if 1 < positions < k_BHSd.shape[2]:  # several new tokens after old ones: "causal" must start late
                shape = (positions, k_BHSd.shape[2])
                mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - positions)
        y_BHSd = F.scaled_dot_product_attention(
            q_BHSd,
            k_BHSd.to(q_BHSd.dtype),
            v_BHSd.to(q_BHSd.dtype),
            attn_mask=mask,
            is_causal=mask is None and positions > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        return linear(y_BHSd.transpose(1, 2).flatten(2), self.out.weight, self.out.bias)
