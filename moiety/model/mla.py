"""Multi-head latent attention (arXiv 2405.04434): keys and values of all heads come from one small vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moiety.backends.matmul import batched
from moiety.config import AttentionConfig
from moiety.model.attention import Layer, attend, scaled_queries
from moiety.model.context import ForwardContext, by_sequence, project
from moiety.model.norm import RMSNorm
from moiety.model.rope import softmax_factor
from moiety.moe.adapted import AdaptedLinear

__all__ = ["LatentAttention"]


class LatentAttention(nn.Module):
    """Queries and keys have a part without position and a rotary one; the rotary key is one for all heads.

    Parameters: `q_a.weight` (q_rank, D), `q_a_norm.weight` and `q_b.weight` (H * (nope + rope), q_rank), or without
    a query bottleneck `q.weight` (H * (nope + rope), D); `kv_a.weight` (kv_rank + rope, D), `kv_a_norm.weight`;
    `kv_b.weight` (H * (nope + value), kv_rank), a head's key rows before its value rows; `out.weight` (D, H * value).
    With `bias`, `q_a`, `kv_a` and `out` have one.

    Scores are scaled by (nope + rope) ** -0.5 and, where stretched frequencies ask for it, by `softmax_factor`; a
    `scale` in the config stands for both.

    Args:
        config: Sizes and options; its `mla` is there.
        d_model: Width D.
        layer: Which block this is.
    """

    def __init__(self, config: AttentionConfig, d_model: int, layer: int) -> None:
        super().__init__()
        mla = config.mla
        assert mla is not None
        self.heads, self.layer = config.heads, Layer(config, layer)
        self.nope, self.rope, self.value, self.rank = mla.nope_dim, mla.rope_dim, mla.value_dim, mla.kv_rank
        self.cap = config.logit_cap
        self.scale = config.scale or (self.nope + self.rope) ** -0.5 * softmax_factor(config.rope)
        width = self.heads * (self.nope + self.rope)
        self.q = None if mla.q_rank else nn.Linear(d_model, width, bias=False)
        self.q_a = nn.Linear(d_model, mla.q_rank, bias=mla.bias) if mla.q_rank else None
        self.q_a_norm = RMSNorm(mla.q_rank, mla.norm_eps) if mla.q_rank else None
        self.q_b = nn.Linear(mla.q_rank, width, bias=False) if mla.q_rank else None
        self.kv_a = nn.Linear(d_model, self.rank + self.rope, bias=mla.bias)
        self.kv_a_norm = RMSNorm(self.rank, mla.norm_eps)
        self.kv_b = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.out = nn.Linear(self.heads * self.value, d_model, bias=mla.bias)

    def _queries(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """(B, S, H * (nope + rope)), through the bottleneck where there is one."""
        if self.q is not None:
            return project(x_BSD, self.q, context)
        assert self.q_a is not None and self.q_a_norm is not None and self.q_b is not None
        return project(self.q_a_norm(project(x_BSD, self.q_a, context)), self.q_b, context)

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """(B, S, D) to (B, S, D); latents and rotary keys go to the context's cache when there is one."""
        if context.paged is not None:
            context.paged.choice(x_BSD, self.rank)  # says that torch does it
        kept = project(x_BSD, self.kv_a, context)
        y_BSD = by_sequence(self._mixed, context, self._queries(x_BSD, context), kept)
        return project(y_BSD, self.out, context)

    def _mixed(self, context: ForwardContext, q: Tensor, kept: Tensor) -> Tensor:
        """What the heads answer to queries, latents and rotary keys, (B, S, H * value)."""
        latent_BSR, k_rope = kept.split((self.rank, self.rope), dim=-1)
        q_BHSd = q.unflatten(-1, (self.heads, self.nope + self.rope)).transpose(1, 2)
        q_nope, q_rope = q_BHSd.split((self.nope, self.rope), dim=-1)
        q_rope = self.layer.rotated(q_rope, context)
        k_rope = self.layer.rotated(k_rope[:, None], context)
        kept_B1Kd = torch.cat([self.kv_a_norm(latent_BSR)[:, None], k_rope], dim=-1)
        absorbs = False
        if context.cache is not None:
            (kept_B1Kd,) = context.cache.extend(self.layer.number, kept_B1Kd)
            kept_B1Kd = kept_B1Kd.to(q.dtype)
            absorbs = self._absorbing_is_less_work(q.shape[1], kept_B1Kd.shape[2])
        compute = self._absorbed if absorbs else self._expanded
        return compute(q_nope, q_rope, kept_B1Kd, context).transpose(1, 2).flatten(2)

    def _absorbing_is_less_work(self, positions: int, keys: int) -> bool:
        """Multiply-adds of one head and sequence, either way."""
        through = self.rank * (self.nope + self.value)
        absorbed = positions * (through + keys * (2 * self.rank + self.rope))
        return absorbed < keys * through + positions * keys * (self.nope + self.rope + self.value)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, kept_B1Kd: Tensor, context: ForwardContext) -> Tensor:
        """Keys and values of every head multiplied out, as in training."""
        seen = self.layer.visible(context)
        kept_B1Kd = kept_B1Kd[:, :, seen.first :]
        latent_BKR, k_rope = kept_B1Kd[:, 0, :, : self.rank], kept_B1Kd[..., self.rank :]
        both = project(latent_BKR, self.kv_b, context).unflatten(-1, (self.heads, self.nope + self.value))
        k_nope, v_BHKd = both.transpose(1, 2).split((self.nope, self.value), dim=-1)
        k_BHKd = torch.cat([k_nope, k_rope.expand(-1, self.heads, -1, -1)], dim=-1)
        q_BHSd = scaled_queries(torch.cat([q_nope, q_rope], dim=-1), self.layer, context)
        seen = seen._replace(first=0)
        return attend(q_BHSd, k_BHKd, v_BHKd, seen, scale=self.scale, cap=self.cap)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, kept_B1Kd: Tensor, context: ForwardContext) -> Tensor:
        """Queries go into the latent space and weighted latents out of it; the cache is read as it is."""
        kv_b: nn.Module = self.kv_b
        whole = kv_b.weight(context.adapters) if isinstance(kv_b, AdaptedLinear) else self.kv_b.weight
        weight = whole.to(q_nope.dtype).unflatten(0, (self.heads, self.nope + self.value))
        key_HnR, value_HvR = weight.split((self.nope, self.value), dim=1)
        q_BHSd = scaled_queries(torch.cat([batched(q_nope, key_HnR), q_rope], dim=-1), self.layer, context)
        seen, latent_B1KR = self.layer.visible(context), kept_B1Kd[..., : self.rank]
        y_BHSR = attend(q_BHSd, kept_B1Kd, latent_B1KR, seen, scale=self.scale, cap=self.cap)
        return batched(y_BHSR, value_HvR.transpose(1, 2))
