"""Routing of any forward pass into a trace file: bounded, sampled where asked, and nearly free while the model runs.

A step costs two concatenations of small tensors. They are put in order for the file some thousand tokens later, all at
once, so that decoding does not wait for it token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from moiety.routing import Routing
from moiety.tracefile import Chunk, TraceHeader, TraceWriter

__all__ = ["Recorder", "Span", "chunk_of", "spans_of"]

HELD_BYTES = 16 << 20
STRETCH_TOKENS = 1024
HALF_MAX = 65504.0  # the largest number of 16 bits


class Span(NamedTuple):
    """Tokens of one sequence that went through the model together.

    Args:
        request: Number of the request or sequence.
        start: Position of the first token in it.
        tokens: Token ids; -1 is padding.
        domains: Of each token, an index into the trace's domains; none is unknown.
    """

    request: int
    start: int
    tokens: Sequence[int]
    domains: Sequence[int] = ()


def spans_of(
    tokens_BS: Tensor,
    first: int = 0,
    *,
    valid_BS: Tensor | None = None,
    domain_BS: Tensor | None = None,
    lengths: Sequence[int] = (),
) -> list[Span]:
    """A batch as spans, each row a sequence of its own from position 0 on.

    Args:
        tokens_BS: Token ids.
        first: Number of the first sequence.
        valid_BS: False for padding.
        domain_BS: Domain of each token.
        lengths: Of several sequences in one row.
    """
    if valid_BS is not None:
        tokens_BS = tokens_BS.masked_fill(~valid_BS, -1)
    rows = tokens_BS[0].split([*lengths]) if lengths else tokens_BS
    domains: Sequence[Sequence[int]] = [()] * len(rows)
    if domain_BS is not None:
        domains = [one.tolist() for one in (domain_BS[0].split([*lengths]) if lengths else domain_BS)]
    return [Span(first + row, 0, tokens.tolist(), domains[row]) for row, tokens in enumerate(rows)]


class _Step(NamedTuple):
    """What is kept of a step: few objects, whatever the number of layers, for the garbage collector looks at each.

    Pairs are those of the first layer, then of the second, each sorted by expert.
    """

    spans: Sequence[Span]
    tokens: int
    counts_M: Tensor  # of each expert of each layer, M in all
    token_N: Tensor
    weight_N: Tensor | None
    score_TLE: Tensor | None


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
        self._held: list[_Step] = []
        self._counts_M: Tensor | None = None
        self._domain = -1  # of what is counted
        self._held_bytes = self._counted = self._stretch = self._owed = 0
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
        assert tuple(routing) == self._writer.header.layers, (list(routing), self._writer.header.layers)
        counts_M = torch.cat([one.counts_E for one in routing.values()])
        if self._level == "counts":
            domain = _only_domain(spans) if self._writer.header.domains else -1
            if domain != self._domain:
                self._flush()
                self._domain = domain
            self._counts_M = counts_M if self._counts_M is None else self._counts_M + counts_M
            self._counted += tokens
            if self._counted >= STRETCH_TOKENS:
                self._flush()
            return
        self._held.append(
            _step(list(routing.values()), spans, tokens, counts_M, scores=self._level == "scores")
        )
        self._held_bytes += sum(one.nbytes for one in self._held[-1][2:] if isinstance(one, Tensor))
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
        header = self._writer.header
        if self._counts_M is not None:
            chunk = _counts(header, self._counted, self._counts_M, self._domain)
            tokens = self._counted
        elif self._held:
            chunk, tokens = _choices(header, self._held), sum(step.tokens for step in self._held)
        else:
            return
        self._held, self._held_bytes, self._counts_M, self._counted = [], 0, None, 0
        size_bytes = sum(array.nbytes for array in chunk.arrays.values())
        if self._writer.size_bytes + size_bytes > self._limit:
            self._full = True
            self.dropped_tokens += tokens
            return
        self._writer.append(chunk)
        self.kept_tokens += tokens


def chunk_of(header: TraceHeader, routing: Mapping[int, Routing], spans: Sequence[Span]) -> Chunk:
    """One step as a chunk, at level choices or scores. Arguments are those of `Recorder.add`."""
    routings, tokens = list(routing.values()), sum(len(span.tokens) for span in spans)
    counts_M = torch.cat([one.counts_E for one in routings])
    step = _step(routings, spans, tokens, counts_M, scores=header.level == "scores")
    return _choices(header, [step])


def _step(
    routings: Sequence[Routing], spans: Sequence[Span], tokens: int, counts_M: Tensor, *, scores: bool
) -> _Step:
    """What is kept of a step whose choices are wanted."""
    token_N = torch.cat([one.token_N for one in routings])
    if not scores:
        return _Step(spans, tokens, counts_M, token_N, None, None)
    experts = max(one.experts for one in routings)
    score_TLE = torch.stack([_score(one, experts) for one in routings], dim=1)
    score_TLE = score_TLE.clamp(-HALF_MAX, HALF_MAX).half()
    weight_N = torch.cat([one.weight_N.detach() for one in routings])
    return _Step(spans, tokens, counts_M, token_N, weight_N, score_TLE)


def _score(routing: Routing, experts: int) -> Tensor:
    """What the router compared, (T, E) with NaN where nothing is known."""
    if routing.score_TE is None:
        return routing.counts_E.new_full((routing.tokens, experts), torch.nan, dtype=torch.float32)
    score_TE = routing.score_TE.detach()
    missing = experts - routing.experts
    return pad(score_TE, (0, missing), value=torch.nan) if missing else score_TE


def _only_domain(spans: Sequence[Span]) -> int:
    """The domain of all tokens; -1 when there are several."""
    found = set().union(*(span.domains or (-1,) for span in spans))
    return found.pop() if len(found) == 1 else -1


def _counts(header: TraceHeader, tokens: int, counts_M: Tensor, domain: int) -> Chunk:
    """All that was counted, as one step."""
    counts_SLE = np.zeros((1, len(header.layers), max(header.experts)), np.uint32)
    layers = np.split(counts_M.cpu().numpy(), np.cumsum(header.experts)[:-1])
    for counts_E, found_E in zip(counts_SLE[0], layers, strict=True):
        counts_E[: len(found_E)] = found_E
    domain_S = np.array([domain], np.int16) if header.domains else None
    return Chunk(tokens_S=np.array([tokens], np.int32), counts_SLE=counts_SLE, domain_S=domain_S)


def _choices(header: TraceHeader, steps: Sequence[_Step]) -> Chunk:
    """Every token's experts, and at level scores what they weigh and what was compared."""
    tokens_S = np.array([step.tokens for step in steps], np.int32)
    tokens, layers, first_S = int(tokens_S.sum()), len(header.layers), np.cumsum(tokens_S) - tokens_S
    layer_M = np.repeat(np.arange(layers), header.experts)
    expert_M = np.concatenate([np.arange(experts) for experts in header.experts])
    counts_SM = torch.stack([step.counts_M for step in steps]).cpu().numpy()
    row_N = torch.cat([step.token_N for step in steps]).cpu().numpy() + np.repeat(first_S, counts_SM.sum(1))
    each_N = np.repeat(np.tile(np.arange(len(layer_M)), len(steps)), counts_SM.ravel())
    cell_N = row_N * layers + layer_M[each_N]  # of a token in a layer
    order_N = np.argsort(cell_N, kind="stable")
    cell_N, pairs = cell_N[order_N], np.bincount(cell_N, minlength=tokens * layers)
    place_N = np.arange(len(cell_N)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    none = np.iinfo(header.expert_dtype).max
    expert_TLK = np.full((tokens, layers, max(1, int(pairs.max(initial=0)))), none, header.expert_dtype)
    expert_TLK.reshape(tokens * layers, -1)[cell_N, place_N] = expert_M[each_N[order_N]]
    scores: dict[str, npt.NDArray[Any]] = {}
    if header.level == "scores":
        weight_N = torch.cat([step.weight_N for step in steps if step.weight_N is not None])
        weight_N = weight_N.float().clamp(-HALF_MAX, HALF_MAX).half()
        scores["weight_TLK"] = np.zeros(expert_TLK.shape, np.float16)
        scores["weight_TLK"].reshape(tokens * layers, -1)[cell_N, place_N] = weight_N.cpu().numpy()[order_N]
        score_TLE = torch.cat([step.score_TLE for step in steps if step.score_TLE is not None])
        scores["score_TLE"] = score_TLE.cpu().numpy()
    spans = [span for step in steps for span in step.spans]
    lengths = [len(span.tokens) for span in spans]
    before_T = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths) if spans else np.zeros(0, np.int64)
    start_T = np.repeat(np.array([span.start for span in spans], np.int64), lengths)
    if header.domains:
        known = [span.domains or [-1] * len(span.tokens) for span in spans]
        scores["domain_T"] = np.array([one for domains in known for one in domains], np.int16)
    return Chunk(
        tokens_S=tokens_S,
        token_T=np.array([token for span in spans for token in span.tokens], np.int32),
        request_T=np.repeat(np.array([span.request for span in spans], np.int32), lengths),
        position_T=(start_T + np.arange(tokens) - before_T).astype(np.int32),
        expert_TLK=expert_TLK,
        **scores,
    )
