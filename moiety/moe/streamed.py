"""Packed experts that are not all in memory: a layer that asks for those that it needs, and works with what is there.

What comes out has the bits of `PackedExperts` and `MixedExperts`: experts multiply in any order, a token's answers are
added up in one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moiety.backends import cpu
from moiety.errors import UsageError
from moiety.formats.tiles import projections_in
from moiety.moe.packed import MixedExperts, PackedExperts, only, refuse_gradient
from moiety.routing import Routing

__all__ = ["ExpertSource", "Foresight", "Source", "StreamedExperts", "foresee", "refuse_saving"]

FEW_TOKENS = 4  # of a step whose next experts are worth a guess


class Source(Protocol):
    """Where experts come from; `infer.hosting.HostStore` is one.

    Attributes:
        slots_SB: The slots, uint8 (slots, bytes of each).
    """

    slots_SB: Tensor

    def waves(self, layer: int, experts: Sequence[int]) -> Generator[Mapping[int, int], None, None]:
        """The experts of a call in groups as they are there, each with its slot, valid until the next group."""

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """These may be wanted by the next call, the likeliest first."""


class ExpertSource(Source, Protocol):
    """One that also says what is there and counts; `infer.offload.ExpertStore` is one.

    Attributes:
        skipped_pairs: Pairs that were left out because their experts are not there.
        changed_pairs: Pairs that went to another expert because it is there.
        pairs: All pairs of layers that count them.
    """

    skipped_pairs: int
    changed_pairs: int
    pairs: int

    def lacks(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those that are not there."""


class Foresight(NamedTuple):
    """How the next layer's experts are foreseen: its router on this layer's input (arXiv 2312.17238).

    Args:
        moe: The next layer, which has `route`.
        layer: Its number in the source.
        ratio_D: Its norm's weight over this one's: their inputs are the same residual stream, one block apart.
    """

    moe: Any
    layer: int
    ratio_D: Tensor | None


def _stacks_of(module: PackedExperts | MixedExperts) -> list[tuple[PackedExperts, Sequence[int]]]:
    if isinstance(module, PackedExperts):
        return [(module, range(module.count))]
    parts = [part for part in module.parts if isinstance(part, PackedExperts)]
    return list(zip(parts, module.numbers, strict=True))


class _Stack:
    """The experts of a layer that are packed alike, wherever their slots are."""

    def __init__(self, module: PackedExperts, numbers: Sequence[int], slots_SB: Tensor) -> None:
        up, down = projections_in(slots_SB, module.projections)
        self.number_G, self.slot_bytes = torch.tensor(numbers), slots_SB.shape[1]
        self.place_of = {number: place for place, number in enumerate(numbers)}
        self.bytes = module.tiles.shape[1]
        place_G = torch.full((len(numbers),), -1, dtype=torch.int64)
        self.mask_G = torch.zeros(len(numbers), dtype=torch.uint8)
        self._place, self._mask = place_G.numpy(), self.mask_G.numpy()
        first, second = module.pair
        self.weights = cpu.PackedExpertWeights(
            up=cpu.Matrix(up, first.bias, place=place_G),
            down=cpu.Matrix(down, second.bias, place=place_G),
            activation=module.activation,
            gated=module.gated,
            activation_limit=module.activation_limit,
        )

    def put(self, slot_of: Mapping[int, int]) -> bool:
        """Take note of where the experts of a group are; False if none of them is of this stack."""
        self._place.fill(-1)
        self._mask.fill(0)
        is_any = False
        for number, slot in slot_of.items():
            place = self.place_of.get(number)
            if place is not None:
                self._place[place], self._mask[place], is_any = slot * self.slot_bytes, 1, True
        return is_any


class StreamedExperts(nn.Module):
    """Stands where `PackedExperts` or `MixedExperts` stood, and holds none of their weights.

    Args:
        module: What stood there, whose tiles are not looked at; its biases are taken over.
        source: Where its experts come from.
        layer: Its number there.
        prefer: How much score an expert that is not there is set back by; 0 chooses as the router does.
        skip_below: Pairs of a lighter weight are left out where their expert is not there; a token keeps its best one.
    """

    def __init__(
        self,
        module: PackedExperts | MixedExperts,
        source: ExpertSource,
        layer: int,
        *,
        prefer: float = 0.0,
        skip_below: float = 0.0,
    ) -> None:
        super().__init__()
        self.count, self.d_model = module.count, module.d_model
        self.source, self.layer, self.prefer, self.skip_below = source, layer, prefer, skip_below
        self.foresight: Foresight | None = None
        self._stacks = [_Stack(part, numbers, source.slots_SB) for part, numbers in _stacks_of(module)]
        self.expert_bytes = {number: one.bytes for one in self._stacks for number in one.place_of}
        self.register_state_dict_pre_hook(refuse_saving)

    def forward(self, x_TD: Tensor, routing: Routing, foreseen: Routing | None = None) -> Tensor:
        """y[token] = sum of weight * expert(x[token]), (T, D), in x's dtype.

        Args:
            x_TD: Tokens, (T, D).
            routing: Who gets which.
            foreseen: What the next layer's router says of them, if it was asked already.

        Raises:
            FormatError, StorageError: an expert could not be had.
        """
        refuse_gradient(x_TD, routing.weight_N)
        if self.skip_below or self.prefer:
            self.source.pairs += routing.pairs
        if self.skip_below:
            routing = self._thinned(routing)
        wanted = [expert for expert, _, _ in routing.slices]
        alone = len(self._stacks) == 1
        parts = [routing] if alone else [only(routing, one.number_G) for one in self._stacks]
        answers: list[Tensor] = []
        with contextlib.closing(self.source.waves(self.layer, wanted)) as waves:
            for slot_of in waves:
                if self.foresight is not None and len(x_TD) <= FEW_TOKENS and not answers:
                    foresee(self.source, x_TD, self.foresight, foreseen)
                if alone and len(slot_of) == len(wanted):
                    self._stacks[0].put(slot_of)
                    return cpu.expert_mlp(x_TD, routing, self._stacks[0].weights)
                answers = answers or [torch.empty(one.pairs, self.d_model) for one in parts]
                for stack, part, answers_ND in zip(self._stacks, parts, answers, strict=True):
                    if stack.put(slot_of):
                        cpu.expert_rows(x_TD, part, stack.weights, stack.mask_G, answers_ND)
        if alone and wanted:
            return cpu.combine(answers[0], routing).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for part, answers_ND in zip(parts, answers, strict=False):
            if part.pairs:
                y_TD += cpu.combine(answers_ND, part).to(x_TD.dtype)
        return y_TD

    def cost_of(self, choices: int, answers: Sequence[int] = ()) -> Tensor | None:
        """What `prefer` makes an expert cost, (choices,), with mean 1; null experts come after the others.

        `answers` are the experts that answer for others, see `MoE`.
        """
        if not self.prefer:
            return None
        lacking_E = torch.zeros(max(choices, self.count))
        lacking_E[self.source.lacks(self.layer, range(self.count))] = 1
        if answers:
            lacking_E = torch.cat([lacking_E[list(answers)], torch.zeros(choices - len(answers))])
        return 1 + lacking_E - lacking_E.mean()

    def note(self, chosen: Routing, plain: Routing) -> None:
        """Count the pairs that `prefer` changed."""
        self.source.changed_pairs += int((chosen.mask_TE & ~plain.mask_TE).sum())

    def _thinned(self, routing: Routing) -> Routing:
        lacking = self.source.lacks(self.layer, [expert for expert, _, _ in routing.slices])
        if not lacking:
            return routing
        lacking_E = torch.zeros(routing.experts, dtype=torch.bool)
        lacking_E[lacking] = True
        weight_N, token_N = routing.weight_N, routing.token_N
        best_T = weight_N.new_zeros(routing.tokens).scatter_reduce(0, token_N, weight_N, "amax")
        goes_N = lacking_E[routing.expert_N] & (weight_N < self.skip_below) & (weight_N < best_T[token_N])
        skipped = int(goes_N.sum())
        self.source.skipped_pairs += skipped
        return routing.keep(~goes_N) if skipped else routing


def foresee(source: Source, x_TD: Tensor, foresight: Foresight, foreseen: Routing | None = None) -> None:
    """Let a source guess what the next layer will want of these tokens; its router is asked if it was not yet."""
    moe, layer, ratio_D = foresight
    if foreseen is None:
        foreseen = moe.route(x_TD if ratio_D is None else x_TD * ratio_D)
    routing = moe.multiplied(foreseen)
    weights = routing.weight_N.tolist()
    weight_of = {expert: sum(weights[start:stop]) for expert, start, stop in routing.slices}
    best = sorted(weight_of, key=weight_of.__getitem__, reverse=True)
    source.guess(layer, best)


def refuse_saving(*_: object) -> None:
    """Before a model's weights are gathered.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        "the experts of this model are on disk or on the host, so it cannot be saved or moved",
        hint="copy its folder, or load it without a memory budget",
    )
