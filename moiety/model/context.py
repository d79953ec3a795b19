"""What a forward pass knows besides its tokens: where they stand, what came before, what to repeat.

Passed by hand down the model; nothing is set around a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moiety.config import ModelConfig
from moiety.errors import UsageError
from moiety.routing import Routing

__all__ = ["ForwardContext", "KVCache"]


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of a fixed length.

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
        heads, head_dim = config.attention.kv_heads, config.attention.head_dim
        shape = (2, config.layers, sequences, heads, max_positions, head_dim)
        self.buffer = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def size_bytes(self) -> int:
        """Bytes the buffers take."""
        return self.buffer.numel() * self.buffer.itemsize

    def extend(self, layer: int, key_BHSd: Tensor, value_BHSd: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values after the old ones; all of them come back, (B, H, length + S, head_dim).

        `length` itself moves once per forward pass, by `advance`.
        """
        stop = self.length + key_BHSd.shape[2]
        keys, values = self.buffer[0, layer], self.buffer[1, layer]
        keys[:, :, self.length : stop] = key_BHSd
        values[:, :, self.length : stop] = value_BHSd
        return keys[:, :, :stop], values[:, :, :stop]

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


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardContext:
    """One forward pass.

    Args:
        rotary: Cosines and sines of the S positions.
        cache: Earlier keys and values, or None.
        valid_BS: False for padding, which must stand at the end of a sequence; None when all tokens are real.
        pinned: For some layers the routing to repeat.
        tokens_BS: The token ids, which some routers look at.
        cost: For some layers what using each expert costs, (E,).
        step: Of the training run, for schedules of the routers; None outside of one.
        seed: Of everything random in the routers; each layer adds its own number.
    """

    rotary: tuple[Tensor, Tensor]
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
