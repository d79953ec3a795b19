"""Which experts the tokens of one request went to: counts by layer, and every token's experts while there is room."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from moiety.routing import Routing

__all__ = ["RoutedExperts", "load_summary"]

LIMIT_BYTES = 4 * 2**20
TOP = 4


@final
class RoutedExperts:
    """A record that a step's routings are added to. The last token of an answer is never computed and has none.

    Args:
        limit_bytes: For the experts of single tokens, two bytes each; tokens beyond it are only counted.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self.hits = self.misses = 0
        self._begin()

    def _begin(self) -> None:
        self.tokens = self.dropped = self._size_bytes = 0
        self.counts: dict[int, Tensor] = {}
        self._steps: list[list[np.ndarray[Any, Any]]] = []  # of each step, of each layer, (T, K)

    def add(self, routing: Mapping[int, Routing], first: int, count: int, *, start: int) -> None:
        """Take some rows of a step.

        Args:
            routing: Of the whole step, by layer.
            first: The request's first row in it.
            count: How many rows are its own.
            start: Where the first stands in the request; 0 begins anew, as after a preemption.
        """
        if start == 0:
            self._begin()
        chosen = [_chosen(one, first, count) for one in routing.values()]
        for layer, (one, expert_TK) in enumerate(zip(routing.values(), chosen, strict=True)):
            number = list(routing)[layer]
            used_N = torch.from_numpy(expert_TK[expert_TK >= 0].astype(np.int64))
            counts_E = torch.bincount(used_N, minlength=one.experts)
            self.counts[number] = counts_E + self.counts.get(number, 0)
        size_bytes = 2 * sum(expert_TK.size for expert_TK in chosen)
        if self.dropped or self._size_bytes + size_bytes > self._limit_bytes:
            self.dropped += count
        else:
            self._size_bytes += size_bytes
            self._steps.append(chosen)
        self.tokens += count

    def read(self, hits: int, misses: int) -> None:
        """Take what a step, all its requests together, found in memory and what came from disk."""
        self.hits += hits
        self.misses += misses

    def experts(self) -> np.ndarray[Any, Any]:
        """Each kept token's experts, the one of most weight first: (T, L, K), over the layers that have experts.

        uint8, or uint16 where there are more than 255 experts; the largest number fills up where a token has fewer
        than K.
        """
        largest = max((len(counts_E) for counts_E in self.counts.values()), default=0)
        kind: type[np.unsignedinteger[Any]] = np.uint8 if largest <= 255 else np.uint16
        width = max((expert_TK.shape[1] for step in self._steps for expert_TK in step), default=0)
        found_TLK = np.full(
            (self.tokens - self.dropped, len(self.counts), width), np.iinfo(kind).max, dtype=kind
        )
        begin = 0
        for step in self._steps:
            for layer, expert_TK in enumerate(step):
                count, k = expert_TK.shape
                place = found_TLK[begin : begin + count, layer, :k]
                place[expert_TK >= 0] = expert_TK[expert_TK >= 0]
            begin += len(step[0]) if step else 0
        return found_TLK

    def summary(self) -> dict[str, Any]:
        """Counts in short: tokens, those whose experts were not kept, `load_summary` of each layer, what was read."""
        layers = [{"layer": layer, **load_summary(counts_E)} for layer, counts_E in self.counts.items()]
        found = {"tokens": self.tokens, "dropped_tokens": self.dropped, "layers": layers}
        streamed = {"expert_hits": self.hits, "expert_misses": self.misses}
        return found | (streamed if self.hits or self.misses else {})


def load_summary(counts_E: Tensor) -> dict[str, Any]:
    """How a layer's pairs are spread.

    Args:
        counts_E: Pairs of each expert.

    Returns:
        `entropy_bits` of the load, at most `uniform_bits`; `imbalance`, the busiest over the mean; how many experts
        were `unused`; and the `top` ones with their share.
    """
    share_E = counts_E.double() / counts_E.sum().clamp(min=1)
    used_C = share_E[share_E > 0]
    top = share_E.sort(descending=True, stable=True).indices[:TOP].tolist()
    return {
        "entropy_bits": round(float(-(used_C * used_C.log2()).sum()) + 0.0, 4),
        "uniform_bits": round(math.log2(len(counts_E)), 4),
        "imbalance": round(float(share_E.max()) * len(counts_E), 4),
        "unused": int((counts_E == 0).sum()),
        "top": [{"expert": expert, "share": round(float(share_E[expert]), 4)} for expert in top],
    }


def _chosen(routing: Routing, first: int, count: int) -> np.ndarray[Any, Any]:
    """Experts of some tokens, most weight first, (T, K); -1 where a token has fewer than another."""
    own_N = (routing.token_N >= first) & (routing.token_N < first + count)
    token_N, expert_N = routing.token_N[own_N] - first, routing.expert_N[own_N]
    order_N = routing.weight_N[own_N].argsort(descending=True, stable=True)
    order_N = order_N[token_N[order_N].argsort(stable=True)]
    token_N, expert_N = token_N[order_N], expert_N[order_N]
    per_token_T = torch.bincount(token_N, minlength=count)
    rank_N = torch.arange(len(token_N)) - (per_token_T.cumsum(0) - per_token_T)[token_N]
    found_TK = torch.full((count, int(per_token_T.max()) if len(token_N) else 0), -1)
    found_TK[token_N, rank_N] = expert_N
    return found_TK.to(torch.int32).numpy()
