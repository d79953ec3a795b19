"""Keys and values of many sequences in pages of one pool, and one ragged forward step over some of them.

Sequences may share pages: who owns which page is not known here. Every new token is written into a page before any is
looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moiety.backends import Choice
from moiety.backends.cpu_attention import BLOCK, PagedLayer, RaggedStep, choose
from moiety.backends.cpu_block import PackedBlock
from moiety.config import ModelConfig
from moiety.errors import UsageError

__all__ = ["PagePool", "PagedSequence", "PagedStep"]


class PagePool:
    """Memory for keys and values, or the latents of latent attention, of every layer.

    Args:
        config: The model's.
        pages: How many there are; one holds its tokens in all layers.
        page_tokens: Tokens of a page.
        dtype: Of the memory.
    """

    def __init__(
        self, config: ModelConfig, pages: int, page_tokens: int = 16, *, dtype: torch.dtype = torch.float32
    ) -> None:
        assert pages > 0 and page_tokens > 0, (pages, page_tokens)
        attention = config.attention
        self.pages, self.page_tokens, self.dtype = pages, page_tokens, dtype
        self.layers, self.latent = config.layers, attention.mla is not None
        self.parts: tuple[Tensor, ...]  # each (layers, pages, heads, page_tokens, width)
        if attention.mla is not None:
            width = attention.mla.kv_rank + attention.mla.rope_dim
            self.parts = (torch.empty(config.layers, pages, 1, page_tokens, width, dtype=dtype),)
        else:
            # a dimension of all keys of a page lies together: scores of a page are sums of vectors
            place, dims = (config.layers, pages, attention.kv_heads), attention.head_dim
            self.keys = torch.empty(*place, dims, page_tokens, dtype=dtype)
            self.values = torch.empty(*place, page_tokens, -(-dims // BLOCK) * BLOCK, dtype=dtype)
            self.parts = (self.keys.transpose(-1, -2), self.values[..., :dims])
        self.prepared: dict[int, PagedLayer] = {}
        self.blocks: dict[int, tuple[object, PackedBlock]] = {}  # what each was made from, and it

    @property
    def size_bytes(self) -> int:
        """Bytes the pages take."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.size_bytes // self.pages


class PagedSequence:
    """One sequence of a step; a cache to the attention, like `KVCache` for one sequence.

    Args:
        pool: Its memory.
        table: Its pages, in order.
        start: Tokens it has already.
        rows: Its new tokens' rows in the step.
        adapter: Who adds to them; empty for nobody.
    """

    def __init__(
        self, pool: PagePool, table: Sequence[int], start: int, rows: slice, adapter: str = ""
    ) -> None:
        self.pool, self.start, self.rows, self.adapter = pool, start, rows, adapter
        self.count = rows.stop - rows.start
        self.pages = list(table[: -(-(start + self.count) // pool.page_tokens)])

    def extend(self, layer: int, *new_1HSd: Tensor) -> tuple[Tensor, ...]:
        """Write new keys and values (or latents) into the pages; all come back, (1, H, start + S, d)."""
        assert len(new_1HSd) == len(self.pool.parts), (len(new_1HSd), len(self.pool.parts))
        stop = self.start + self.count
        position_S = torch.arange(self.start, stop)
        pages = torch.tensor(self.pages)
        page_S, place_S = pages[position_S // self.pool.page_tokens], position_S % self.pool.page_tokens
        found = []
        for part, new in zip(self.pool.parts, new_1HSd, strict=True):
            part[layer][page_S, :, place_S] = new[0].transpose(0, 1).to(part.dtype)
            found.append(part[layer][pages].transpose(0, 1).flatten(1, 2)[None, :, :stop])
        return tuple(found)


class PagedStep:
    """One forward pass over new tokens of several sequences, which come one after the other in a single row.

    Args:
        pool: The memory that holds what the sequences have.
        tables: The pages of each sequence in order, enough for its old and new tokens.
        starts: Tokens that each has in the pool.
        counts: New tokens of each, at least one.
        adapters: Of each the adapter, empty for none; None lets the active one serve all.
    """

    def __init__(
        self,
        pool: PagePool,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        adapters: Sequence[str] | None = None,
    ) -> None:
        assert len(tables) == len(starts) == len(counts) > 0, (len(tables), len(starts), len(counts))
        self.pool, self.has_adapters = pool, adapters is not None
        names = [""] * len(tables) if adapters is None else adapters
        sequences, first = [], 0
        written: set[int] = set()
        for table, start, count, name in zip(tables, starts, counts, names, strict=True):
            assert start >= 0 and count > 0, (start, count)
            room = len(table) * pool.page_tokens
            assert start + count <= room, (start, count, room)
            assert min(table) >= 0 and max(table) < pool.pages, (table, pool.pages)
            own = set(table[start // pool.page_tokens : (start + count - 1) // pool.page_tokens + 1])
            assert not own & written, (own & written, "two sequences would write the same page")
            written |= own
            sequences.append(PagedSequence(pool, table, start, slice(first, first + count), name))
            first += count
        self.sequences, self.tokens = tuple(sequences), first
        self._ragged: RaggedStep | None = None

    def check_room(self, sequences: int, positions: int) -> None:
        """Raise UsageError unless the tokens come as one row of as many as the step is for."""
        if (sequences, positions) != (1, self.tokens):
            raise UsageError(
                f"the step is for {self.tokens} tokens in one row and ({sequences}, {positions}) were given"
            )

    def advance(self, positions: int) -> None:
        """Like `KVCache.advance`; who keeps the sequences counts their tokens."""

    def positions(self) -> Tensor:
        """Where every token stands in its sequence, (T,)."""
        spans = [torch.arange(one.start, one.start + one.count) for one in self.sequences]
        return torch.cat(spans)

    def choice(self, x: Tensor, head_dim: int) -> Choice:
        """Who computes attention over the pages for activations like x, and why."""
        pool = self.pool
        return choose(
            x.dtype,
            x.device.type,
            pool.dtype,
            pool.page_tokens,
            head_dim,
            pool.latent,
            torch.is_grad_enabled(),
        )

    def ragged(self, rotary: tuple[Tensor, Tensor], query_factor_T: Tensor | None) -> RaggedStep:
        """The step as the compiled kernel takes it; made once, and again when a layer wants factors that it lacks."""
        if self._ragged is None or (query_factor_T is not None and not self._ragged.factored):
            starts, counts = [one.start for one in self.sequences], [one.count for one in self.sequences]
            tables = [one.pages for one in self.sequences]
            self._ragged = RaggedStep(tables, starts, counts, rotary, query_factor_T)
        return self._ragged
