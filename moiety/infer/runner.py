"""A scheduled step as tensors: tokens and pages in, drawn tokens out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from moiety.errors import MoietyError, UsageError
from moiety.infer.request import Drawn
from moiety.infer.routed import RoutedExperts
from moiety.infer.sampling import Draw, best, not_finite, sample
from moiety.infer.scheduler import Slice
from moiety.model.adapters import active, names
from moiety.model.paged import PagedStep, PagePool
from moiety.model.transformer import ModelOutput, Transformer
from moiety.observe.record import Recorder, Span

__all__ = ["Outcome", "Runner", "imbalance"]

SCORED_AT_ONCE = 32  # rows of logits: a prompt's all together would be tokens x vocabulary


class Outcome(NamedTuple):
    """What came of a slice: tokens, none in the middle of a prompt; why the next one could not be drawn; the prompt's
    tokens that it foresaw, where asked for."""

    drawn: list[Drawn]
    error: str = ""
    scored: Sequence[Drawn] = ()


@final
class Runner:
    """A model and its pages.

    Args:
        model: In evaluation mode.
        pages: How many pages its memory has.
        page_tokens: Tokens of each.
        kv_dtype: Of keys and values.
        recorder: Takes the routing of every step.

    Attributes:
        forward: The model; or who stands before it, called as it is.
    """

    def __init__(
        self,
        model: Transformer,
        pages: int,
        page_tokens: int,
        kv_dtype: torch.dtype,
        recorder: Recorder | None = None,
    ) -> None:
        self.forward: Callable[..., ModelOutput] = model
        self.adapters, self._active = tuple(names(model)), active(model)
        self.pool = PagePool(model.config, pages, page_tokens, dtype=kv_dtype)
        self._recorder = recorder
        self._first_request = 0 if recorder is None else recorder.next_request
        self.counts: Mapping[int, Tensor] = {}  # pairs of each expert in the last step, by layer
        self.totals: dict[int, Tensor] = {}  # and in all steps

    def adapter(self, wanted: str) -> str:
        """Who answers a request that wants this adapter: the one that was active at first, where it wants none.

        Raises:
            UsageError: the model has none of this name.
        """
        if wanted and wanted not in self.adapters:
            raise UsageError(
                f"there is no adapter {wanted!r}", hint=f"there is {', '.join(self.adapters) or 'none'}"
            )
        return wanted or self._active

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice]) -> list[Outcome]:
        """One forward pass; then tokens after each slice that draws, to the first that its guesses did not foresee."""
        tokens = [piece.tokens for piece in slices]
        step = PagedStep(
            self.pool,
            [piece.request.table.pages for piece in slices],
            [piece.start for piece in slices],
            [len(some) for some in tokens],
            [piece.request.options.adapter for piece in slices] if self.adapters else None,
        )
        output = self.forward(torch.tensor([[token for some in tokens for token in some]]), cache=step)
        self.counts = {layer: routing.counts_E for layer, routing in output.routing.items()}
        for layer, counts_E in self.counts.items():
            self.totals[layer] = counts_E + self.totals.get(layer, 0)
        if self._recorder is not None:
            numbers = [self._first_request + piece.request.number for piece in slices]
            spans = [
                Span(*one) for one in zip(numbers, [piece.start for piece in slices], tokens, strict=True)
            ]
            self._recorder.add(output.routing, spans)
        finite_T = output.hidden[0].isfinite().all(-1).tolist()
        rows: list[int] = []
        firsts, first = [], 0
        for piece, some in zip(slices, tokens, strict=True):
            firsts.append((first, len(rows)))
            if piece.draws:
                rows += range(first + piece.size - 1, first + len(some))
            first += len(some)
        logits_NV = output.at(torch.tensor(rows, dtype=torch.int64))
        outcomes = []
        for piece, (first, row) in zip(slices, firsts, strict=True):
            outcome = _outcome(piece, logits_NV[row:], all(finite_T[first : first + piece.size]))
            if piece.request.options.prompt_logprobs is not None and not outcome.error:
                outcome = outcome._replace(scored=_scored(piece, output, first))
            if isinstance(piece.request.routed, RoutedExperts):
                piece.request.routed.add(output.routing, first, piece.size, start=piece.start)
            outcomes.append(outcome)
        return outcomes


def _outcome(piece: Slice, logits_NV: Tensor, is_sound: bool) -> Outcome:
    """What is drawn after one slice, whose logits come first in `logits_NV`."""
    if not is_sound:
        return Outcome([], str(not_finite()))
    drawn: list[Drawn] = []
    if not piece.draws:
        return Outcome(drawn)
    request, answer = piece.request, piece.request.answer
    for row in range(1 + len(piece.drafts)):
        short = request.drawn + row < request.options.min_tokens
        draw = Draw(
            options=request.options.sampling,
            prompt=request.prompt,
            answer=[*answer, *piece.drafts[:row]],
            forbidden=request.ends if short else frozenset(),
            bias=request.options.logit_bias,
        )
        try:
            if request.constraint is not None:
                draw = dataclasses.replace(draw, allowed=request.constraint.allowed())
            token = int(sample(logits_NV[row : row + 1], [draw]))
        except MoietyError as error:
            return Outcome(drawn, str(error))
        drawn.append(_described(token, logits_NV[row], request.options.logprobs))
        if row == len(piece.drafts) or token != piece.drafts[row]:
            break
    return Outcome(drawn)


def _scored(piece: Slice, output: ModelOutput, first: int) -> list[Drawn]:
    """What the model thought of the prompt's tokens that follow those of a slice."""
    request, found = piece.request, []
    count = min(piece.size, len(request.prompt) - 1 - piece.start)
    skipped = max(request.options.scored_from - 1 - piece.start, 0)
    for begin in range(skipped, count, SCORED_AT_ONCE):
        rows = range(begin, min(begin + SCORED_AT_ONCE, count))
        logits_NV = output.at(torch.tensor(rows) + first)
        for row, logits_V in zip(rows, logits_NV, strict=True):
            token = request.prompt[piece.start + row + 1]
            found.append(_described(token, logits_V, request.options.prompt_logprobs))
    return found


def _described(token: int, logits_V: Tensor, wanted: int | None) -> Drawn:
    """The token with the logarithms that were asked for."""
    if wanted is None:
        return Drawn(token, None, ())
    logprob_V = logits_V.float().log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if wanted:
        values_C, token_C = best(logprob_V, wanted)
        top = tuple(zip(token_C.tolist(), values_C.tolist(), strict=True))
    return Drawn(token, float(logprob_V[token]), top)


def imbalance(counts: Sequence[Tensor]) -> float:
    """Pairs of a layer's busiest expert over the mean of its experts, the mean over layers; 0 without any pair."""
    found = [float(counts_E.max() / counts_E.float().mean()) for counts_E in counts if bool(counts_E.any())]
    return sum(found) / len(found) if found else 0.0
