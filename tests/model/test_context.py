"""The cache of keys and values: what goes in comes back, in order, and no more than fits."""

from __future__ import annotations

import pytest
import torch

from moiety import cost
from moiety.errors import UsageError
from moiety.model.context import KVCache
from tests import tiny

CONFIG = tiny.CONFIGS["sigmoid"]  # 3 layers, 2 key/value heads of 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_size_is_what_cost_says(name: str, dtype: torch.dtype) -> None:
    cache = KVCache(tiny.CONFIGS[name], 3, 11, dtype=dtype)
    assert cache.size_bytes == 3 * cost.kv_bytes(tiny.CONFIGS[name], 11, dtype.itemsize)
    assert cache.buffer.dtype == dtype and cache.length == 0


def test_pieces_come_back_whole_and_layers_do_not_mix() -> None:
    cache = KVCache(CONFIG, 2, 9)
    keys, values = torch.randn(2, 3, 2, 2, 9, 6)
    stop = 0
    for positions in (4, 1, 3, 1):
        cache.check_room(2, positions)
        start, stop = stop, stop + positions
        for layer in range(3):
            new = keys[layer, :, :, start:stop], values[layer, :, :, start:stop]
            found = cache.extend(layer, *new)
            assert torch.equal(found[0], keys[layer, :, :, :stop]), (layer, stop)
            assert torch.equal(found[1], values[layer, :, :, :stop]), (layer, stop)
        assert cache.length == start, "extend alone does not move the length"
        cache.advance(positions)
    assert cache.length == 9


def test_room_is_stated() -> None:
    cache = KVCache(CONFIG, 1, 5)
    cache.check_room(1, 5)
    cache.advance(3)
    cache.check_room(1, 2)
    with pytest.raises(UsageError, match=r"holds 5 positions, 3 are used and 3 more were given[\s\S]*hint: "):
        cache.check_room(1, 3)
    assert cache.length == 3


def test_a_cache_is_for_its_number_of_sequences() -> None:
    with pytest.raises(UsageError, match="for 3 sequences and 1 were given"):
        KVCache(CONFIG, 3, 5).check_room(1, 2)
