"""What a forward pass knows besides its tokens: where they stand, what came before, what to repeat.

Passed by hand down the model; nothing is set around a call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moiety.backends import matmul
from moiety.config import ModelConfig
from moiety.errors import UsageError
from moiety.model.paged import PagedSequence, PagedStep
from moiety.model.rope import depends_on_length, rotary_table
from moiety.moe.adapted import AdaptedLinear, AdaptedRows
from moiety.routing import Routing

__all__ = ["ForwardContext", "KVCache", "Visible", "by_sequence", "forward_context", "project", "visible"]


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
        paged: Tokens of several sequences in one row instead; then `everything` and `window` are in `parts`.
        lengths: Tokens of each of several sequences in one row, each from position 0, or none; then likewise.
        windows: The window in tokens and whether it is a chunk, for `parts`.
        valid_BS: False for padding, which must stand at the end of a sequence; None when all tokens are real.
        pinned: For some layers the routing to repeat.
        tokens_BS: The token ids, which some routers look at.
        cost: For some layers what using each expert costs, (E,).
        step: Of the training run, for schedules of the routers; None outside of one.
        seed: Of everything random in the routers; each layer adds its own number.
        adapters: Which rows each adapter is for; None lets the active one serve all.
    """

    positions_S: Tensor
    rotary: tuple[Tensor, Tensor]
    everything: Visible
    window: Visible
    cache: KVCache | PagedSequence | None
    valid_BS: Tensor | None
    pinned: Mapping[int, Routing]
    paged: PagedStep | None = None
    lengths: tuple[int, ...] = ()
    windows: tuple[int | None, bool] = (None, False)
    tokens_BS: Tensor | None = None
    cost: Mapping[int, Tensor] = field(default_factory=dict)
    step: int | None = None
    seed: int | None = None
    adapters: AdaptedRows | None = None

    def seed_of(self, layer: int) -> int | None:
        """The seed of one layer."""
        return None if self.seed is None else self.seed + 7919 * layer

    @functools.cached_property
    def parts(self) -> tuple[tuple[slice, ForwardContext], ...]:
        """Rows of each sequence of a row that holds several, and what its tokens know."""
        device = self.positions_S.device
        stops = list(itertools.accumulate(self.lengths))
        found: list[tuple[slice, int, PagedSequence | None]] = [
            (slice(stop - count, stop), 0, None) for stop, count in zip(stops, self.lengths, strict=True)
        ]
        if self.paged is not None:
            found = [(one.rows, one.start, one) for one in self.paged.sequences]
        return tuple(
            (
                rows,
                replace(
                    self,
                    positions_S=self.positions_S[rows],
                    rotary=(self.rotary[0][rows], self.rotary[1][rows]),
                    everything=visible(start, rows.stop - rows.start, None, False, device),
                    window=visible(start, rows.stop - rows.start, *self.windows, device),
                    cache=cache,
                    paged=None,
                    lengths=(),
                    adapters=adapters_of((cache.adapter,)) if self.adapters is not None and cache else None,
                ),
            )
            for rows, start, cache in found
        )


def project(x: Tensor, layer: nn.Module, context: ForwardContext) -> Tensor:
    """`matmul.project`, with what adapters add to their own rows."""
    if isinstance(layer, AdaptedLinear):
        y: Tensor = layer(x, context.adapters)
        return y
    return matmul.project(x, layer)


def adapters_of(names: Sequence[str], counts: Sequence[int] | None = None) -> dict[str, Tensor | None]:
    """Which rows each adapter is for, of sequences one after the other; without counts there is one, which has all."""
    if counts is None:
        assert len(names) == 1, names
        return {names[0]: None} if names[0] else {}
    found: dict[str, list[Tensor]] = {}
    first = 0
    for name, count in zip(names, counts, strict=True):
        if name:
            found.setdefault(name, []).append(torch.arange(first, first + count))
        first += count
    return {name: torch.cat(rows) for name, rows in found.items()}


def by_sequence(compute: Callable[..., Tensor], context: ForwardContext, *x: Tensor) -> Tensor:
    """What `compute(context, *x)` makes of tensors (B, S, ...): at once, or of a row's several sequences one by one."""
    if context.paged is None and not context.lengths:
        return compute(context, *x)
    return torch.cat([compute(part, *(one[:, rows] for one in x)) for rows, part in context.parts], dim=1)


def _rotary(
    config: ModelConfig, positions_S: Tensor, lengths: list[int], counts: list[int]
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions of one sequence after the other, each stretched as its own length asks."""
    attention = config.attention
    rotary_dim = attention.rotary_dim if attention.mla is None else attention.mla.rope_dim
    if not depends_on_length(attention.rope):
        lengths, counts = [0], [len(positions_S)]
    tables = [
        rotary_table(
            part_S,
            rotary_dim,
            attention.rope_theta,
            attention.rope,
            length=length,
            max_positions=config.max_positions,
        )
        for part_S, length in zip(positions_S.split(counts), lengths, strict=True)
    ]
    cos, sin = zip(*tables, strict=True)
    return tables[0] if len(tables) == 1 else (torch.cat(cos), torch.cat(sin))


def forward_context(
    config: ModelConfig,
    tokens_BS: Tensor,
    *,
    cache: KVCache | PagedStep | None = None,
    valid_BS: Tensor | None = None,
    lengths: Sequence[int] = (),
    pinned: Mapping[int, Routing] | None = None,
    cost: Mapping[int, Tensor] | None = None,
    step: int | None = None,
    seed: int | None = None,
) -> ForwardContext:
    """What the blocks of a model of this config need to know about these tokens; see `Transformer.forward`."""
    attention, device = config.attention, tokens_BS.device
    paged = cache if isinstance(cache, PagedStep) else None
    earlier = cache if isinstance(cache, KVCache) else None
    start, positions = 0 if earlier is None else earlier.length, tokens_BS.shape[1]
    everything = windowed = Visible(0, None)
    adapters: AdaptedRows | None = None
    if paged is not None:
        positions_S = paged.positions()
        reach = [one.start + one.count for one in paged.sequences]
        counts = [one.count for one in paged.sequences]
        if paged.has_adapters:
            adapters = adapters_of([one.adapter for one in paged.sequences], counts)
    elif lengths:
        positions_S = torch.cat([torch.arange(count, device=device) for count in lengths])
        reach, counts = [*lengths], [*lengths]
    else:
        positions_S = torch.arange(start, start + positions, device=device)
        reach, counts = [start + positions], [positions]
        everything = windowed = visible(start, positions, None, False, device)
        if attention.window is not None:
            windowed = visible(start, positions, attention.window, attention.chunked, device)
    return ForwardContext(
        positions_S=positions_S,
        rotary=_rotary(config, positions_S, reach, counts),
        everything=everything,
        window=windowed,
        cache=earlier,
        paged=paged,
        windows=(attention.window, attention.chunked),
        lengths=tuple(lengths),
        valid_BS=valid_BS,
        pinned=pinned or {},
        tokens_BS=tokens_BS,
        cost=cost or {},
        step=step,
        seed=seed,
        adapters=adapters,
    )
