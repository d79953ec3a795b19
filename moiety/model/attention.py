"""Grouped-query attention (arXiv 2305.13245): who looks at whom, and how the scores become weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moiety.backends import causal, cpu_attention
from moiety.backends.cpu_attention import PagedLayer, RaggedStep
from moiety.backends.matmul import batched, widens
from moiety.config import AttentionConfig
from moiety.model.context import ForwardContext, Visible, by_sequence, project
from moiety.model.norm import RMSNorm, unit_length
from moiety.model.paged import PagedStep
from moiety.model.rope import rotate

__all__ = ["Attention", "Layer", "attend", "scaled_queries"]


class Layer:
    """What one layer's place in the model makes of the options: does it rotate, does it have a window.

    Args:
        config: Sizes and options.
        layer: Which block this is.
    """

    def __init__(self, config: AttentionConfig, layer: int) -> None:
        self.number = layer
        self.rotates = config.rope_layers is None or layer in config.rope_layers
        self.windowed = config.window is not None and (
            config.window_layers is None or layer in config.window_layers
        )
        self.interleaved = config.rope_pairs == "interleaved"
        self.query_scale = 0.0 if self.rotates else config.query_scale
        self.query_scale_floor = config.query_scale_floor

    def rotated(self, x_BHSd: Tensor, context: ForwardContext) -> Tensor:
        """Queries or keys turned by their position, in a layer that rotates."""
        if not self.rotates:
            return x_BHSd
        return rotate(x_BHSd, context.rotary, interleaved=self.interleaved)

    def visible(self, context: ForwardContext) -> Visible:
        """Which keys the new tokens see here."""
        return context.window if self.windowed else context.everything

    def query_factor(self, context: ForwardContext, dtype: torch.dtype) -> Tensor:
        """What queries are multiplied by at each position, (S,)."""
        steps_S = ((context.positions_S.to(dtype) + 1) / self.query_scale_floor).floor()
        return 1 + self.query_scale * steps_S.log1p()


def scaled_queries(q_BHSd: Tensor, layer: Layer, context: ForwardContext) -> Tensor:
    """Queries that grow with their position, in layers that do not rotate (arXiv 2501.19399)."""
    if layer.query_scale == 0:
        return q_BHSd
    wide = torch.promote_types(q_BHSd.dtype, torch.float32)
    return (q_BHSd * layer.query_factor(context, wide)[:, None]).to(q_BHSd.dtype)


def attend(
    q_BHSd: Tensor,
    k_BHKd: Tensor,
    v_BHKd: Tensor,
    seen: Visible,
    *,
    scale: float | None = None,
    cap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Weighted values of every query, (B, H, S, width of a value).

    Args:
        q_BHSd: Queries, of the newest positions.
        k_BHKd: Keys of all positions, each serving an equal group of query heads.
        v_BHKd: Values, as many heads as the keys.
        seen: Which keys each query sees.
        scale: Factor on the scores; None is d ** -0.5.
        cap: Scores become cap * tanh(score / cap); 0 is off.
        sinks_H: An extra logit of each query head, which takes its share of the softmax and has no value.
    """
    if seen.first:
        k_BHKd, v_BHKd = k_BHKd[:, :, seen.first :], v_BHKd[:, :, seen.first :]
    k_BHKd, v_BHKd = k_BHKd.to(q_BHSd.dtype), v_BHKd.to(q_BHSd.dtype)
    if cap or sinks_H is not None:
        return _attend_by_hand(q_BHSd, k_BHKd, v_BHKd, seen.mask_SK, scale=scale, cap=cap, sinks_H=sinks_H)
    if seen.mask_SK is None and causal.takes(q_BHSd, k_BHKd, v_BHKd, scale):
        return causal.causal_attention(q_BHSd, k_BHKd, v_BHKd, scale=scale)
    if (
        widens(q_BHSd) and torch.is_grad_enabled() and q_BHSd.requires_grad
    ):  # without a gradient torch has more than loops
        with torch.autocast("cpu", enabled=False):
            y_BHSw = _attend_fused(q_BHSd.float(), k_BHKd.float(), v_BHKd.float(), seen.mask_SK, scale)
        return y_BHSw.to(q_BHSd.dtype)
    return _attend_fused(q_BHSd, k_BHKd, v_BHKd, seen.mask_SK, scale)


def _attend_fused(
    q_BHSd: Tensor, k_BHKd: Tensor, v_BHKd: Tensor, mask_SK: Tensor | None, scale: float | None
) -> Tensor:
    """By torch; without a mask every query sees the keys up to its own."""
    return F.scaled_dot_product_attention(
        q_BHSd,
        k_BHKd,
        v_BHKd,
        attn_mask=mask_SK,
        is_causal=mask_SK is None and q_BHSd.shape[2] > 1,
        scale=scale,
        enable_gqa=q_BHSd.shape[1] != k_BHKd.shape[1],
    )


def _attend_by_hand(
    q_BHSd: Tensor,
    k_BHKd: Tensor,
    v_BHKd: Tensor,
    mask_SK: Tensor | None,
    *,
    scale: float | None,
    cap: float,
    sinks_H: Tensor | None,
) -> Tensor:
    """What torch's fused attention does not have: capped scores and sinks. The softmax is float32 at least."""
    heads, kv_heads, positions = q_BHSd.shape[1], k_BHKd.shape[1], q_BHSd.shape[2]
    group, wide = heads // kv_heads, torch.promote_types(q_BHSd.dtype, torch.float32)
    rows_BGRd = q_BHSd.unflatten(1, (kv_heads, group)).flatten(2, 3)  # a group's queries meet the same keys
    score_BHSK = batched(rows_BGRd, k_BHKd.transpose(-1, -2)).unflatten(2, (group, positions)).flatten(1, 2)
    score_BHSK = score_BHSK.to(wide) * (q_BHSd.shape[-1] ** -0.5 if scale is None else scale)
    if cap:
        score_BHSK = cap * (score_BHSK / cap).tanh()
    if mask_SK is None and positions > 1:
        mask_SK = score_BHSK.new_ones(score_BHSK.shape[-2:], dtype=torch.bool).tril()
    if mask_SK is not None:
        score_BHSK = score_BHSK.masked_fill(~mask_SK, float("-inf"))
    if sinks_H is None:
        share_BHSK = score_BHSK.softmax(-1)
    else:
        sink_BHS1 = sinks_H.to(wide)[:, None, None].expand(len(q_BHSd), -1, positions, 1)
        share_BHSK = torch.cat([score_BHSK, sink_BHS1], dim=-1).softmax(-1)[..., :-1]
    rows_BGRK = share_BHSK.to(v_BHKd.dtype).unflatten(1, (kv_heads, group)).flatten(2, 3)
    y_BHSd: Tensor = batched(rows_BGRK, v_BHKd).unflatten(2, (group, positions)).flatten(1, 2)
    return y_BHSd


class Attention(nn.Module):
    """Queries share key/value heads in equal groups; rotary positions; causal.

    Parameters: `qkv.weight` ((H + 2 KV) * head_dim, D), query rows first; `out.weight` (D, H * head_dim); with
    norms of queries and keys `q_norm.weight` and `k_norm.weight`; with sinks `sinks` (H,).

    Args:
        config: Sizes and options.
        d_model: Width D.
        layer: Which block this is, for the cache and for options of some layers only.
        norm_eps: Epsilon of the query and key norms, where there are any.
    """

    sinks: nn.Parameter | None

    def __init__(self, config: AttentionConfig, d_model: int, layer: int, norm_eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.layer, self.norm, self.norm_eps = Layer(config, layer), config.qk_norm, norm_eps
        self.clip, self.scale, self.cap = config.clip_qkv, config.scale, config.logit_cap
        q_width, k_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = nn.Linear(d_model, q_width + 2 * k_width, bias=config.qkv_bias)
        self.out = nn.Linear(q_width, d_model, bias=config.out_bias)
        if self.norm != "full":
            q_width, k_width = self.head_dim, self.head_dim
        weighted = self.norm in ("head", "full", "head_rotated")
        self.q_norm = RMSNorm(q_width, norm_eps) if weighted else None
        self.k_norm = RMSNorm(k_width, norm_eps) if weighted else None
        self.register_parameter("sinks", nn.Parameter(torch.zeros(self.heads)) if config.sinks else None)

    def _heads(self, x_BSD: Tensor, heads: int, norm: nn.Module | None, context: ForwardContext) -> Tensor:
        """Queries or keys, split into heads, normalised and turned: (B, H, S, head_dim)."""
        if norm is not None and self.norm == "full":
            x_BSD = norm(x_BSD)
        x_BSHd: Tensor = self._clipped(x_BSD).unflatten(-1, (heads, self.head_dim))
        if norm is not None and self.norm == "head":
            x_BSHd = norm(x_BSHd)
        x_BHSd = self.layer.rotated(x_BSHd.transpose(1, 2), context)
        if norm is not None and self.norm == "head_rotated":
            x_BHSd = norm(x_BHSd)
        if self.norm == "l2_rotated" and self.layer.rotates:
            x_BHSd = unit_length(x_BHSd, self.norm_eps)
        return x_BHSd

    def _clipped(self, x: Tensor) -> Tensor:
        return x.clamp(-self.clip, self.clip) if self.clip else x

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """(B, S, D) to (B, S, D); keys and values go to the context's cache when there is one."""
        qkv, paged = project(x_BSD, self.qkv, context), context.paged
        if paged is not None and paged.choice(qkv, self.head_dim).name == "cpu":
            return project(self._paged(qkv, paged, context), self.out, context)
        return project(by_sequence(self._mixed, context, qkv), self.out, context)

    def _weights(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.q_norm is None or self.k_norm is None:
            return None, None, self.sinks
        return self.q_norm.weight, self.k_norm.weight, self.sinks

    def _paged(self, qkv: Tensor, step: PagedStep, context: ForwardContext) -> Tensor:
        """`_mixed` of all sequences at once, by the compiled kernel."""
        return cpu_attention.attention(*self.compiled(step, context), qkv)

    def compiled(self, step: PagedStep, context: ForwardContext) -> tuple[PagedLayer, RaggedStep]:
        """This layer and the step for the compiled kernel; only where `step.choice` names it."""
        layer, pool, weights = self.layer, step.pool, self._weights()
        known, addresses = (
            pool.prepared.get(layer.number),
            tuple(None if w is None else w.data_ptr() for w in weights),
        )
        factor_T = layer.query_factor(context, torch.float32) if layer.query_scale else None
        ragged = step.ragged(context.rotary, factor_T)
        if known is None or known.made_from != addresses:
            unit = self.norm == "l2_rotated" and not layer.rotates
            known = pool.prepared[layer.number] = cpu_attention.PagedLayer(
                pool.keys[layer.number],
                pool.values[layer.number],
                heads=self.heads,
                head_dim=self.head_dim,
                pairs=ragged.pairs if layer.rotates else 0,
                interleaved=layer.interleaved,
                norm="none" if unit else self.norm,
                weights=weights,
                norm_eps=self.norm_eps,
                clip=self.clip,
                scale=self.head_dim**-0.5 if self.scale is None else self.scale,
                cap=self.cap,
                window=context.windows[0] or 0 if layer.windowed else 0,
                chunked=context.windows[1],
                factored=factor_T is not None,
            )
        return known, ragged

    def _mixed(self, context: ForwardContext, qkv: Tensor) -> Tensor:
        """What the heads answer, (B, S, H * head_dim)."""
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = qkv.split((q_width, kv_width, kv_width), dim=-1)
        q_BHSd = self._heads(q, self.heads, self.q_norm, context)
        q_BHSd = scaled_queries(q_BHSd, self.layer, context)
        k_BHSd = self._heads(k, self.kv_heads, self.k_norm, context)
        v_BHSd = self._clipped(v).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        if context.cache is not None:
            k_BHSd, v_BHSd = context.cache.extend(self.layer.number, k_BHSd, v_BHSd)
        seen = self.layer.visible(context)
        y_BHSd = attend(q_BHSd, k_BHSd, v_BHSd, seen, scale=self.scale, cap=self.cap, sinks_H=self.sinks)
        return y_BHSd.transpose(1, 2).flatten(2)
