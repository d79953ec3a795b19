"""Routing of any forward pass into a trace file: bounded, sampled where asked, and nearly free while the model runs.

A step costs a list of references. What they refer to is put in order for the file some hundred tokens later, a layer at
a time, so that decoding does not wait for it token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moiety.routing import Routing
from moiety.tracefile import Chunk, TraceHeader, TraceWriter

__all__ = ["Recorder", "Span", "spans_of"]

HELD_BYTES = 16 << 20
STRETCH_TOKENS = 1024


class Span(NamedTuple):
    """Tokens of one sequence that went through the model together.

    Args:
        request: Number of the request or sequence.
        start: Position of the first token in it.
        tokens: Token ids; -1 is padding.
    """

    request: int
    start: int
    tokens: Sequence[int]


def spans_of(tokens_BS: Tensor, first: int = 0, *, valid_BS: Tensor | None = None) -> list[Span]:
    """A batch as spans, each row a sequence of its own from position 0 on.

    Args:
        tokens_BS: Token ids.
        first: Number of the first sequence.
        valid_BS: False for padding.
    """
    if valid_BS is not None:
        tokens_BS = tokens_BS.masked_fill(~valid_BS, -1)
    return [Span(first + row, 0, tokens) for row, tokens in enumerate(tokens_BS.tolist())]


class _Part(NamedTuple):
    """What is kept of one layer in one step."""

    token_N: Tensor
    counts_E: Tensor
    weight_N: Tensor | None
    score_TE: Tensor | None


@final
class Recorder:
    """Takes the routing of steps and appends it to a trace.

    Args:
        writer: Of the file. Its header says the level, the layers, and how much is sampled: of a run, stretches of
            about a thousand tokens are kept whole, so that a replay sees which experts follow each other.
        limit_bytes: Most bytes of arrays in the file; what comes after is dropped and counted.
    """

    def __init__(self, writer: TraceWriter, *, limit_bytes: int) -> None:
        self._writer, self._limit = writer, limit_bytes
        self._level, self._sample = writer.header.level, writer.header.sample
        self._held: list[tuple[Sequence[Span], list[_Part]]] = []
        self._held_bytes = self._stretch = self._owed = 0
        self._full = False
        self.kept_tokens = self.skipped_tokens = self.dropped_tokens = 0
        self.next_request = 0  # one more than any request so far

    def add(self, routing: Mapping[int, Routing], spans: Sequence[Span]) -> None:
        """Take a step.

        Args:
            routing: Of every layer with experts, by the number of its block.
            spans: Its tokens, in the order of the routing's rows; padding among them.
        """
        tokens = sum(len(span.tokens) for span in spans)
        self.next_request = max(self.next_request, 1 + max((span.request for span in spans), default=-1))
        if self._full:
            self.dropped_tokens += tokens
            return
        if self._owed > 0:
            self._owed -= tokens
            self.skipped_tokens += tokens
            return
        self._stretch += tokens
        if self._stretch >= STRETCH_TOKENS:
            self._owed += self._stretch * (self._sample - 1)
            self._stretch = 0
        scores = self._level == "scores"
        parts = [
            _Part(
                one.token_N,
                one.counts_E,
                one.weight_N.detach() if scores else None,
                None if one.score_TE is None or not scores else one.score_TE.detach(),
            )
            for one in routing.values()
        ]
        assert len(parts) == len(self._writer.header.layers), (list(routing), self._writer.header.layers)
        self._held.append((spans, parts))
        pairs, experts = len(parts[0].token_N), len(parts[0].counts_E)
        self._held_bytes += len(parts) * (24 * pairs + 8 * experts + (8 * tokens * experts if scores else 0))
        if self._held_bytes >= HELD_BYTES:
            self._flush()

    def close(self) -> None:
        """Put what is held into the file, and what was left out into its header."""
        self._flush()
        self._writer.header = replace(
            self._writer.header, skipped_tokens=self.skipped_tokens, dropped_tokens=self.dropped_tokens
        )

    @property
    def said(self) -> str:
        """What was recorded, and what was not, in words."""
        lost = [
            f"{count:,} tokens {why}"
            for count, why in (
                (self.skipped_tokens, "skipped by sampling"),
                (self.dropped_tokens, f"dropped at the limit of {self._limit:,} bytes"),
            )
            if count
        ]
        return f"recorded {self.kept_tokens:,} tokens{''.join(', ' + one for one in lost)}"

    def _flush(self) -> None:
        """Order what is held, and let go of it."""
        held, self._held, self._held_bytes = self._held, [], 0
        if not held:
            return
        tokens_S = np.array([sum(len(span.tokens) for span in spans) for spans, _ in held], np.int32)
        tokens, header = int(tokens_S.sum()), self._writer.header
        layers = [[parts[layer] for _, parts in held] for layer in range(len(header.layers))]
        if self._level == "counts":
            chunk = _counts(header, tokens, layers)
        else:
            chunk = _choices(header, tokens_S, [span for spans, _ in held for span in spans], layers)
        size_bytes = sum(array.nbytes for array in chunk.arrays.values())
        if self._writer.size_bytes + size_bytes > self._limit:
            self._full = True
            self.dropped_tokens += tokens
            return
        self._writer.append(chunk)
        self.kept_tokens += tokens


def _counts(header: TraceHeader, tokens: int, layers: Sequence[Sequence[_Part]]) -> Chunk:
    """All steps as one."""
    counts_SLE = np.zeros((1, len(layers), max(header.experts)), np.uint32)
    for counts_E, parts in zip(counts_SLE[0], layers, strict=True):
        total_E = torch.stack([part.counts_E for part in parts]).sum(0)
        counts_E[: len(total_E)] = total_E.cpu().numpy()
    return Chunk(tokens_S=np.array([tokens], np.int32), counts_SLE=counts_SLE)


def _choices(
    header: TraceHeader,
    tokens_S: npt.NDArray[np.int32],
    spans: Sequence[Span],
    layers: Sequence[Sequence[_Part]],
) -> Chunk:
    """Every token's experts, and at level scores what they weigh and what was compared."""
    tokens = int(tokens_S.sum())
    first_S = np.cumsum(tokens_S) - tokens_S
    found = [_Layer.of(parts, first_S, tokens) for parts in layers]
    width = max(1, *(int(layer.place_N.max(initial=-1)) + 1 for layer in found))
    none = np.iinfo(header.expert_dtype).max
    expert_TLK = np.full((tokens, len(found), width), none, header.expert_dtype)
    scores: dict[str, npt.NDArray[Any]] = {}
    if header.level == "scores":
        scores["weight_TLK"] = np.zeros(expert_TLK.shape, np.float16)
        scores["score_TLE"] = np.full((tokens, len(found), max(header.experts)), np.nan, np.float16)
    for number, (layer, parts) in enumerate(zip(found, layers, strict=True)):
        expert_TLK[layer.row_N, number, layer.place_N] = layer.expert_N
        if not scores:
            continue
        weight_N = torch.cat([part.weight_N for part in parts if part.weight_N is not None])
        scores["weight_TLK"][layer.row_N, number, layer.place_N] = _float16(weight_N)[layer.order_N]
        for part, first in zip(parts, first_S.tolist(), strict=True):
            if part.score_TE is not None:
                rows, experts = part.score_TE.shape
                scores["score_TLE"][first : first + rows, number, :experts] = _float16(part.score_TE)
    lengths = [len(span.tokens) for span in spans]
    start_T = np.repeat(np.array([span.start for span in spans], np.int32), lengths)
    before_T = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    return Chunk(
        tokens_S=tokens_S,
        token_T=np.array([token for span in spans for token in span.tokens], np.int32),
        request_T=np.repeat(np.array([span.request for span in spans], np.int32), lengths),
        position_T=(start_T + np.arange(tokens) - before_T).astype(np.int32),
        expert_TLK=expert_TLK,
        **scores,
    )


def _float16(value: Tensor) -> npt.NDArray[Any]:
    return value.float().clamp(-65504, 65504).half().cpu().numpy()


class _Layer(NamedTuple):
    """The pairs of a layer over several steps, by token: its row, its place among its token's pairs, its expert.

    `order_N` is where each was before.
    """

    row_N: npt.NDArray[np.int64]
    place_N: npt.NDArray[np.int64]
    expert_N: npt.NDArray[np.int64]
    order_N: npt.NDArray[np.int64]

    @classmethod
    def of(cls, parts: Sequence[_Part], first_S: npt.NDArray[Any], tokens: int) -> _Layer:
        """Of pairs that are sorted by expert in each step."""
        counts_SE = torch.stack([part.counts_E for part in parts]).cpu().numpy()
        row_N = torch.cat([part.token_N for part in parts]).cpu().numpy()
        row_N = row_N + np.repeat(first_S, counts_SE.sum(1))
        expert_N = np.repeat(np.tile(np.arange(counts_SE.shape[1]), len(parts)), counts_SE.ravel())
        order_N = np.argsort(row_N, kind="stable")
        row_N, pairs_T = row_N[order_N], np.bincount(row_N, minlength=tokens)
        place_N = np.arange(len(row_N)) - np.repeat(np.cumsum(pairs_T) - pairs_T, pairs_T)
        return cls(row_N, place_N, expert_N[order_N], order_N)
