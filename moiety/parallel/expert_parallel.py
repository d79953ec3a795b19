"""Experts on several processes: rows go to where their experts are, are multiplied there, and come back.

`Routing` in, `Routing` out: rank r of R holds the experts r E/R to (r+1) E/R - 1. A token is sent to a rank once,
however many of its experts are there, with its pairs; the rank multiplies by any backend under a routing of its own and
sends each row's weighted sum back, where a token's sums are added up. Gradients go the same ways backwards, and
those of experts are then sums over the tokens of all ranks: nothing is left to be reduced between ranks with other
experts. What it must equal is the layer in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moiety.backends import ExpertWeights
from moiety.moe.experts import Multiply
from moiety.routing import Routing

__all__ = ["ExpertParallel", "Sent"]


class _Splits(NamedTuple):
    """How many rows, or pairs, go to each rank and come from each."""

    sent: list[int]
    received: list[int]


def _exchange(
    value: Tensor, splits: _Splits, group: dist.ProcessGroup, *, wait: bool = True
) -> tuple[Tensor, dist.Work | None]:
    """Parts of `value` to every rank, theirs in return; without `wait` the answer is not there yet."""
    received = value.new_empty(sum(splits.received), *value.shape[1:])
    work = dist.all_to_all_single(
        received, value.contiguous(), splits.received, splits.sent, group=group, async_op=not wait
    )
    return received, work


@dataclass(eq=False)
class _Trip:
    """Rows and weights on their way: what is needed to wait for them, and to send gradients back."""

    group: dist.ProcessGroup
    rows: _Splits
    pairs: _Splits
    works: tuple[dist.Work | None, ...] = ()
    gradients: tuple[Tensor, Tensor] | None = None

    def start(self, rows: Tensor, weight: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
        """Begin to send both; their buffers, to be filled until `wait`."""
        turned = [
            splits._replace(sent=splits[back], received=splits[not back])
            for splits in (self.rows, self.pairs)
        ]
        (rows, first), (weight, second) = (
            _exchange(value, splits, self.group, wait=False)
            for value, splits in zip((rows, weight), turned, strict=True)
        )
        self.works = (first, second)
        return rows, weight

    def wait(self) -> None:
        """Until both are there."""
        for work in self.works:
            if work is not None:
                work.wait()
        self.works = ()


class _Start(torch.autograd.Function):
    """Send rows and weights off; in backward, take in the gradients that `_Arrive` sent off.

    Between the two calls lies whatever else there is to do, in backward too: autograd runs what came later first.
    """

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_N: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        return trip.start(x_MD, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor, grad_N: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.trip.wait()
        gradients, ctx.trip.gradients = ctx.trip.gradients, None
        return *gradients, None


class _Arrive(torch.autograd.Function):
    """Wait for what `_Start` sent; in backward, send the gradients off."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_N: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        trip.wait()
        return x_MD.view_as(x_MD), weight_N.view_as(weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor, grad_N: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.trip.gradients = ctx.trip.start(grad_MD, grad_N, back=True)
        return grad_MD, grad_N, None  # for their shapes alone: `_Start` hands on what comes back


class _Return(torch.autograd.Function):
    """Rows back to where they came from."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return _exchange(y_MD, _Splits(trip.rows.received, trip.rows.sent), trip.group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        return _exchange(grad_MD, ctx.trip.rows, ctx.trip.group)[0], None


@dataclass(frozen=True, eq=False)
class Sent:
    """Rows that are on their way to their experts.

    Args:
        rows_MD: Buffer of those that come here.
        weight_N: Buffer of the weights of their pairs.
        row_N: Row of each pair, known already.
        expert_N: Its expert among those here.
        token_M: Which token each row is that was sent from here.
        tokens: T here.
        experts: Here.
        trip: To wait for.
    """

    rows_MD: Tensor
    weight_N: Tensor
    row_N: Tensor
    expert_N: Tensor
    token_M: Tensor
    tokens: int
    experts: int
    trip: _Trip


class ExpertParallel:
    """Experts of one layer, in equal parts on the ranks of a group, multiplied by any backend.

    Args:
        group: The ranks, in the order of their experts.
        inside: Of ranks that share this rank's part among them, where one rank of `group` stands for a node.
    """

    def __init__(self, group: dist.ProcessGroup, inside: ExpertParallel | None = None) -> None:
        self.group, self.inside, self.ranks = group, inside, dist.get_world_size(group)

    def send(self, x_TD: Tensor, routing: Routing) -> Sent:
        """Begin to send each token to the ranks of its experts; the one wait is for the counts.

        Args:
            x_TD: Tokens here.
            routing: Their pairs with all experts of the group.
        """
        ranks, tokens, here = self.ranks, routing.tokens, routing.experts // self.ranks
        assert here * ranks == routing.experts, (routing.experts, ranks)
        cell_N = routing.expert_N.div(here, rounding_mode="floor") * tokens + routing.token_N
        wanted_C = torch.zeros(ranks * tokens, dtype=torch.bool, device=x_TD.device)
        wanted_C[cell_N] = True
        rows_R, counts_RE = wanted_C.view(ranks, tokens).sum(1), routing.counts_E.view(ranks, here)
        said_RC = torch.cat([rows_R[:, None], counts_RE], dim=1)
        heard_RC = torch.empty_like(said_RC)
        dist.all_to_all_single(heard_RC, said_RC, group=self.group)
        both = torch.stack([said_RC[:, 0], heard_RC[:, 0], counts_RE.sum(1), heard_RC[:, 1:].sum(1)]).tolist()
        trip = _Trip(self.group, _Splits(both[0], both[1]), _Splits(both[2], both[3]))

        token_M = wanted_C.nonzero(as_tuple=True)[0].remainder(max(tokens, 1))
        first_R = rows_R.cumsum(0) - rows_R
        row_N = (wanted_C.cumsum(0) - 1)[cell_N] - first_R.repeat_interleave(counts_RE.sum(1))
        row_N, _ = _exchange(row_N.to(torch.int32), trip.pairs, self.group)
        first_R = heard_RC[:, 0].cumsum(0) - heard_RC[:, 0]
        from_R = heard_RC[:, 1:].sum(1)
        expert_N = (
            torch.arange(here, device=x_TD.device).repeat(ranks).repeat_interleave(heard_RC[:, 1:].flatten())
        )
        rows_MD, weight_N = _Start.apply(x_TD.index_select(0, token_M), routing.weight_N, trip)
        return Sent(
            rows_MD=rows_MD,
            weight_N=weight_N,
            row_N=row_N.to(torch.int64) + first_R.repeat_interleave(from_R),
            expert_N=expert_N,
            token_M=token_M,
            tokens=tokens,
            experts=here,
            trip=trip,
        )

    def multiply(self, sent: Sent, multiply: Multiply, weights: ExpertWeights) -> Tensor:
        """What all experts make of the tokens that `send` sent from here, (T, D).

        Args:
            sent: By `send`.
            multiply: A backend's `expert_mlp`.
            weights: Of the experts here.
        """
        rows_MD, weight_N = _Arrive.apply(sent.rows_MD, sent.weight_N, sent.trip)
        routing = Routing.from_pairs(
            sent.row_N, sent.expert_N, weight_N, tokens=len(rows_MD), experts=sent.experts
        )
        if self.inside is None:
            y_MD = multiply(rows_MD, routing, weights)
        else:
            y_MD = self.inside.multiply(self.inside.send(rows_MD, routing), multiply, weights)
        y_MD = _Return.apply(y_MD, sent.trip)
        y_TD: Tensor = y_MD.new_zeros(sent.tokens, y_MD.shape[1]).index_add(0, sent.token_M, y_MD)
        return y_TD
