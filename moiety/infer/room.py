"""How much room requests have: pages of keys and values, and the longest sequence."""

from __future__ import annotations

import torch

from moiety.config import ModelConfig, require
from moiety.infer.options import EngineOptions
from moiety.model.paged import PagePool

__all__ = ["AUTOMATIC_BYTES", "page_count"]

AUTOMATIC_BYTES = 2**30


def page_count(
    config: ModelConfig, options: EngineOptions, dtype: torch.dtype, automatic_bytes: int = AUTOMATIC_BYTES
) -> tuple[int, int]:
    """How many pages there will be, and the longest sequence in tokens.

    Args:
        config: The model's.
        options: Bytes, page size and longest sequence.
        dtype: Of keys and values.
        automatic_bytes: Taken where the options name no bytes.

    Raises:
        ConfigError: sequences longer than the model's, or too few bytes for one of them.
    """
    size, seen = options.page_tokens, config.max_positions
    asked = options.max_positions
    require(asked <= seen, f"max_positions is {asked}; the model was made for {seen}")
    longest = asked or seen
    page_bytes = PagePool(config, 1, size, dtype=dtype).page_bytes
    fitting, needed = (options.kv_bytes or automatic_bytes) // page_bytes, -(-longest // size)
    if options.kv_bytes == 0 and asked == 0:
        needed = min(needed, max(fitting, 1))
        longest = min(longest, needed * size)
    elif options.kv_bytes == 0:
        fitting = max(fitting, needed)
    require(
        fitting >= needed,
        f"kv_bytes is {options.kv_bytes}; one sequence of {longest} tokens needs {needed * page_bytes}",
        f"give that much, or set max_positions to {fitting * size}" if fitting else "give that much",
    )
    return max(needed, min(fitting, needed * options.max_requests)), longest
