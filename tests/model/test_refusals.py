"""What a caller can get wrong in a forward pass is refused by name, not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moiety.errors import UsageError
from moiety.model.context import KVCache
from moiety.model.transformer import Transformer
from tests import tiny


def cases(model: Transformer, tokens: torch.Tensor) -> dict[str, tuple[Callable[[], Any], str]]:
    """Wrong calls, and what the refusal must say."""
    real = torch.ones(tokens.shape, dtype=torch.bool)
    late = real.clone()
    late[0, 0] = False
    routing = model(tokens).routing
    recomputing = tiny.clone(model, checkpointing=True)
    return {
        "token past the vocabulary": (
            lambda: model(tokens + model.config.vocab_size),
            "the vocabulary is 0 to",
        ),
        "negative token": (lambda: model(tokens - model.config.vocab_size), "tokens range from -"),
        "mask of another shape": (lambda: model(tokens, valid_BS=real.T), "bool \\(2, 4\\) is wanted"),
        "mask of numbers": (lambda: model(tokens, valid_BS=real.long()), "torch.int64"),
        "padding in front": (lambda: model(tokens, valid_BS=late), "padding before real tokens"),
        "pin for no layer": (lambda: model(tokens, pinned={7: routing[0]}), "layers \\[7\\] have no routing"),
        "cache of other sequences": (
            lambda: model(tokens, cache=KVCache(model.config, 3, 8)),
            "for 3 sequences",
        ),
        "cache too short": (lambda: model(tokens, cache=KVCache(model.config, 2, 3)), "holds 3 positions"),
        "recomputed cache": (
            lambda: recomputing(tokens, cache=KVCache(model.config, 2, 8)),
            "a cache cannot be recomputed",
        ),
    }


def test_every_wrong_call_is_refused() -> None:
    model = tiny.model("mixtral")
    tokens = tiny.tokens(model, 2, 4)
    for name, (call, message) in cases(model, tokens).items():
        with pytest.raises(UsageError, match=message):
            call()
            pytest.fail(f"{name} was accepted")
