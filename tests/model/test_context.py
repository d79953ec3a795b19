"""The cache of keys and values: what goes in comes back, in order, and no more than fits; who sees whom."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moiety import cost
from moiety.errors import UsageError
from moiety.model.context import KVCache, visible
from tests import tiny

CONFIG = tiny.CONFIGS["sigmoid"]  # 3 layers, 2 key/value heads of 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_size_is_what_cost_says(name: str, dtype: torch.dtype) -> None:
    config = tiny.CONFIGS[name]
    cache = KVCache(config, 3, 11, dtype=dtype)
    attention = dataclasses.replace(config.attention, window=None, window_layers=None, chunked=False)
    unbounded = dataclasses.replace(config, attention=attention)  # layers with a window keep everything too
    assert cache.size_bytes == 3 * cost.kv_bytes(unbounded, 11, dtype.itemsize)
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


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8, 40])
def test_who_sees_whom(window: int | None, chunked: bool) -> None:
    masks = 0
    for start in range(9):
        for positions in range(6):
            first, mask_SK = visible(start, positions, window, chunked)
            stop = start + positions
            assert 0 <= first <= start
            for row, query in enumerate(range(start, stop)):
                for key in range(stop):
                    sees = key <= query
                    if window is not None:
                        sees &= key // window == query // window if chunked else query - key < window
                    if key < first:
                        assert not sees, "what is cut off is seen by nobody"
                    elif mask_SK is not None:
                        assert mask_SK.shape == (positions, stop - first)
                        assert bool(mask_SK[row, key - first]) == sees
                    else:
                        assert sees == (key <= query)
            if mask_SK is None:
                assert positions <= 1 or start == first, "torch's causal mask is of a square"
            masks += mask_SK is not None
    assert masks, "no mask, no proof"
    assert visible(0, 64, None, False).mask_SK is None, "training without a window has no mask"
    assert visible(700, 1, window, chunked).mask_SK is None, "nor has decoding"
