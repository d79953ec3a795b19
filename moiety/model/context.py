"""What a forward pass knows besides its tokens: where they stand, what came before, what to repeat.

Passed by hand down the model; nothing is set around a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from moiety.config import ModelConfig
from moiety.errors import UsageError
from moiety.model.rope import rotary_table
from moiety.routing import Routing

__all__ = ["ForwardContext", "KVCache", "Visible", "forward_context", "visible"]


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of a fixed length.

    Latent attention keeps one vector of kv_rank + rope_dim for each token: the latent, then the turned key that
    all heads share. Layers with a window keep all positions like the others.

    Args:
        config: The model's.
        sequences: B.
        max_positions: Longest sequence the buffers hold, in tokens.
        dtype: Of the buffers.
        device: Of the buffers.
    """

    def __init__(
        self,
        config: ModelConfig,
        sequences: int,
        max_positions: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        attention = config.attention
        parts, heads, width = 2, attention.kv_heads, attention.head_dim
        if attention.mla is not None:
            parts, heads, width = 1, 1, attention.mla.kv_rank + attention.mla.rope_dim
        shape = (parts, config.layers, sequences, heads, max_positions, width)
        self.buffer = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def size_bytes(self) -> int:
        """Bytes the buffers take."""
        return self.buffer.numel() * self.buffer.itemsize

    def extend(self, layer: int, *new_BHSd: Tensor) -> tuple[Tensor, ...]:
        """Write new keys and values (or latents) after the old ones; all of them come back, (B, H, length + S, d).

        `length` itself moves once per forward pass, by `advance`.
        """
        assert len(new_BHSd) == len(self.buffer), (len(new_BHSd), len(self.buffer))
        stop = self.length + new_BHSd[0].shape[2]
        for part, new in enumerate(new_BHSd):
            self.buffer[part, layer, :, :, self.length : stop] = new
        return tuple(self.buffer[part, layer, :, :, :stop] for part in range(len(self.buffer)))

    def check_room(self, sequences: int, positions: int) -> None:
        """Raise UsageError unless `positions` more tokens of `sequences` sequences fit."""
        made_for, room = self.buffer.shape[2], self.buffer.shape[4]
        if sequences != made_for:
            raise UsageError(f"the cache is for {made_for} sequences and {sequences} were given")
        if self.length + positions > room:
            raise UsageError(
                f"the cache holds {room} positions, {self.length} are used and {positions} more were given",
                hint="make the cache with a larger max_positions, or stop generating earlier",
            )

    def advance(self, positions: int) -> None:
        """Count `positions` more tokens as seen."""
        self.length += positions


class Visible(NamedTuple):
    """Which keys the new tokens may look at.

    Args:
        first: The first key that any of them sees, counted from the start of the sequence.
        mask_SK: Bool (S, keys from `first` on), True where a token sees a key; None means each sees all up to itself.
    """

    first: int
    mask_SK: Tensor | None


def visible(
    start: int, positions: int, window: int | None, chunked: bool, device: torch.device | str = "cpu"
) -> Visible:
    """What `positions` new tokens after `start` old ones see of all of them.

    Args:
        start: Tokens before the new ones.
        positions: New tokens, S.
        window: Keys 0 to window - 1 steps back are seen; None is all of them.
        chunked: Instead those of the same chunk of `window` tokens.
        device: Of the mask.
    """
    stop, first = start + positions, 0
    if window is not None:
        first = start // window * window if chunked else max(0, start - window + 1)
    if (window is None or stop - first <= window) and (positions <= 1 or start == first):
        return Visible(first, None)
    query_S1 = torch.arange(start, stop, device=device)[:, None]
    key_K = torch.arange(first, stop, device=device)
    mask_SK = key_K <= query_S1
    if window is not None:
        mask_SK &= key_K // window == query_S1 // window if chunked else query_S1 - key_K < window
    return Visible(first, mask_SK)


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardContext:
    """One forward pass.

    Args:
        positions_S: Where the S tokens stand, from 0.
        rotary: Cosines and sines of the S positions.
        everything: Which keys they see in layers without a window.
        window: Which keys they see in layers with one.
        cache: Earlier keys and values, or None.
        valid_BS: False for padding, which must stand at the end of a sequence; None when all tokens are real.
        pinned: For some layers the routing to repeat.
        tokens_BS: The token ids, which some routers look at.
        cost: For some layers what using each expert costs, (E,).
        step: Of the training run, for schedules of the routers; None outside of one.
        seed: Of everything random in the routers; each layer adds its own number.
    """

    positions_S: Tensor
    rotary: tuple[Tensor, Tensor]
    everything: Visible
    window: Visible
    cache: KVCache | None
    valid_BS: Tensor | None
    pinned: Mapping[int, Routing]
    tokens_BS: Tensor | None = None
    cost: Mapping[int, Tensor] = field(default_factory=dict)
    step: int | None = None
    seed: int | None = None

    def seed_of(self, layer: int) -> int | None:
        """The seed of one layer."""
        return None if self.seed is None else self.seed + 7919 * layer


def forward_context(
    config: ModelConfig,
    tokens_BS: Tensor,
    *,
    cache: KVCache | None = None,
    valid_BS: Tensor | None = None,
    pinned: Mapping[int, Routing] | None = None,
    cost: Mapping[int, Tensor] | None = None,
    step: int | None = None,
    seed: int | None = None,
) -> ForwardContext:
    """What the blocks of a model of this config need to know about these tokens; see `Transformer.forward`."""
    attention, device = config.attention, tokens_BS.device
    start, positions = 0 if cache is None else cache.length, tokens_BS.shape[1]
    positions_S = torch.arange(start, start + positions, device=device)
    everything = visible(start, positions, None, False, device)
    windowed = everything
    if attention.window is not None:
        windowed = visible(start, positions, attention.window, attention.chunked, device)
    return ForwardContext(
        positions_S=positions_S,
        rotary=rotary_table(
            positions_S,
            attention.rotary_dim if attention.mla is None else attention.mla.rope_dim,
            attention.rope_theta,
            attention.rope,
            length=start + positions,
            max_positions=config.max_positions,
        ),
        everything=everything,
        window=windowed,
        cache=cache,
        valid_BS=valid_BS,
        pinned=pinned or {},
        tokens_BS=tokens_BS,
        cost=cost or {},
        step=step,
        seed=seed,
    )
