"""Layers with adapters: they stand where a linear, a feed-forward or experts stood, and wrap what stood there.

The wrapped layer is frozen, plain or packed. Of several adapters one is active, or each row of a batch says which is
its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from moiety.backends import adapted
from moiety.backends.adapted import AdaptedWeights, Lora, add_delta
from moiety.backends.grouped import activation_forward
from moiety.backends.matmul import multiply_rows, project
from moiety.backends.unpacked import Unpacked
from moiety.backends.weights import Matrices
from moiety.moe.experts import Experts, FeedForward
from moiety.moe.packed import (
    MixedExperts,
    PackedExperts,
    PackedFeedForward,
    PackedLinear,
    autocast,
    passes_gradient,
)
from moiety.routing import Routing

__all__ = [
    "AdaptedExperts",
    "AdaptedFeedForward",
    "AdaptedLinear",
    "AdaptedRows",
    "Adapter",
    "OneAdapted",
    "adapted_layers",
]

AdaptedRows = Mapping[
    str, Tensor | None
]  # rows of a batch that an adapter is for, int64; None is all of them
Pair = Experts | FeedForward | PackedExperts | PackedFeedForward | MixedExperts


@final
class Adapter(nn.Module):
    """What one adapter adds to a matrix or a stack of E: scale B A (arXiv 2106.09685). It adds nothing at first.

    Parameters: `a` (E, P R, columns), or (1, P R, columns) where all experts have the same; `b` (E, rows of all
    parts, R).

    Args:
        experts: E.
        columns: Of the matrix.
        spans: First row and one after the last of each of the P parts that have an A of their own.
        rank: R.
        scale: Factor on B A.
        shares_a: All experts have the same A.
    """

    def __init__(
        self,
        experts: int,
        columns: int,
        spans: Sequence[tuple[int, int]],
        rank: int,
        scale: float,
        *,
        shares_a: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.spans = rank, scale, tuple(spans)
        rows = sum(stop - start for start, stop in spans)
        self.a = nn.Parameter(torch.empty(1 if shares_a else experts, len(spans) * rank, columns))
        self.b = nn.Parameter(torch.empty(experts, rows, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform within 1/sqrt(columns), as torch's linear; B zero."""
        bound = 1 / math.sqrt(max(self.a.shape[2], 1))
        self.a.uniform_(-bound, bound)
        self.b.zero_()

    def lora(self, dtype: torch.dtype) -> Lora:
        """As backends take it; gradients flow back to the parameters."""
        return Lora(self.a, self.b, self.scale, self.spans).to(dtype)


class OneAdapted(nn.Module):
    """What layers with adapters have in common: `base` as it was, and `adapters` by name and projection.

    Args:
        base: Is frozen.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active = ""  # who adds to every row when nothing else is said

    def add(self, name: str, leaves: Mapping[str, Adapter]) -> None:
        """Take an adapter in, for the projections that it names."""
        assert name not in self.adapters, name
        self.adapters[name] = nn.ModuleDict(dict(leaves))

    def leaves(self, name: str) -> dict[str, Adapter]:
        """An adapter's additions by projection; none where it has nothing to do with this layer."""
        found = self.adapters[name] if name in self.adapters else nn.ModuleDict()
        assert isinstance(found, nn.ModuleDict), type(found)
        return {leaf: one for leaf, one in found.items() if isinstance(one, Adapter)}

    def present(self, rows: AdaptedRows | None) -> dict[str, Tensor | None]:
        """Of those adapters that are wanted the ones that this layer has."""
        if rows is None:
            rows = {self.active: None} if self.active else {}
        return {name: which for name, which in rows.items() if name in self.adapters}


@final
class AdaptedLinear(OneAdapted):
    """`nn.Linear` or `PackedLinear` with adapters; their projection is called `weight`."""

    @property
    def rows(self) -> int:
        """Of the matrix."""
        base = self.base
        assert isinstance(base, nn.Linear | PackedLinear), type(base)
        return base.out_features if isinstance(base, nn.Linear) else base.rows

    def lora(self, name: str, dtype: torch.dtype) -> Lora:
        """What an adapter adds."""
        return self.leaves(name)["weight"].lora(dtype)

    def forward(self, x: Tensor, rows: AdaptedRows | None = None) -> Tensor:
        """(..., D) to (..., F); `rows` counts through all leading axes."""
        present = self.present(rows)
        if len(present) == 1 and (name := next(iter(present))) and present[name] is None:
            packed = isinstance(self.base, PackedLinear)
            if not packed or passes_gradient(self.training, x, *self.adapters[name].parameters()):
                x = autocast(x)
                return adapted.linear(x, *self._frozen(name, x.dtype))
        y: Tensor = project(x, self.base)
        if present:
            assert not passes_gradient(False, x), "several adapters are not trained at once"
            with torch.no_grad():
                self._add(y.reshape(-1, self.rows), x.reshape(-1, x.shape[-1]).to(y.dtype), present)
        return y

    def _frozen(self, name: str, dtype: torch.dtype) -> tuple[Matrices, Lora, Tensor | None]:
        """The matrix, what an adapter adds to it, and the bias."""
        base = self.base
        assert isinstance(base, nn.Linear | PackedLinear), type(base)
        bias = None if base.bias is None else base.bias.to(dtype)
        if isinstance(base, nn.Linear):
            return base.weight[None].to(dtype), self.lora(name, dtype), bias
        return Unpacked(base.matrix, dtype), self.lora(name, dtype), bias

    def _add(self, y_NF: Tensor, x_ND: Tensor, present: AdaptedRows) -> None:
        """y += what adapters say about their rows."""
        for name, which in present.items():
            lora = self.lora(name, y_NF.dtype)
            if which is None:
                add_delta(y_NF, x_ND, lora, 0)
            elif len(which):
                part = y_NF[which]
                add_delta(part, x_ND[which], lora, 0)
                y_NF[which] = part

    def weight(self, rows: AdaptedRows | None = None) -> Tensor:
        """W + scale B A of a plain base, for whoever multiplies with it in another way; one adapter for all rows."""
        base = self.base
        assert isinstance(base, nn.Linear), type(base)
        merged: Tensor = base.weight
        for name, which in self.present(rows).items():
            assert which is None, "one matrix serves one adapter"
            merged = merged + self.lora(name, merged.dtype).dense(self.rows)[0].to(merged.dtype)
        return merged


class _AdaptedPair(OneAdapted):
    """Two projections around an activation, `gate_up` or `up` and `down`, of E experts."""

    @property
    def pair(self) -> Pair:
        """What is wrapped."""
        base = self.base
        assert isinstance(base, Pair), type(base)
        return base

    def weights(self, dtype: torch.dtype, name: str = "") -> AdaptedWeights:
        """The frozen matrices, with what an adapter adds to them."""
        frozen, leaves = _frozen(self.pair, dtype), self.leaves(name)
        up, down = leaves.get("up"), leaves.get("down")
        return replace(
            frozen,
            up_lora=None if up is None else up.lora(dtype),
            down_lora=None if down is None else down.lora(dtype),
        )

    def _run(self, x_TD: Tensor, routing: Routing, rows: AdaptedRows | None) -> Tensor:
        present = self.present(rows)
        if len(present) == 1 and (name := next(iter(present))) and present[name] is None:
            kernels = isinstance(self.base, PackedExperts | PackedFeedForward)
            own = self.adapters[name].parameters()
            if not kernels or passes_gradient(self.training, x_TD, routing.weight_N, *own):
                return adapted.expert_mlp(x_TD, routing, self.weights(x_TD.dtype, name))
        return self._several(x_TD, routing, present)

    def _several(self, x_TD: Tensor, routing: Routing, present: AdaptedRows) -> Tensor:
        """Any adapters for any rows: both projections once for all rows, additions for their own. No gradient."""
        assert not passes_gradient(False, x_TD, routing.weight_N), "several adapters are not trained at once"
        frozen, x_ND = self.weights(x_TD.dtype), routing.gather(x_TD)
        mine = {name: _pairs(routing, rows) for name, rows in present.items()}
        pre_NF = self._project("up", frozen.up, frozen.up_bias, x_ND, routing)
        for name, pairs in mine.items():
            self._add(pre_NF, x_ND, name, "up", pairs)
        hidden_NF = activation_forward(frozen, pre_NF)
        y_ND = self._project("down", frozen.down, frozen.down_bias, hidden_NF, routing)
        for name, pairs in mine.items():
            self._add(y_ND, hidden_NF, name, "down", pairs)
        return routing.combine(y_ND)

    def _add(
        self, y_NF: Tensor, x_ND: Tensor, name: str, leaf: str, pairs: Sequence[tuple[int, Tensor | slice]]
    ) -> None:
        """y += what an adapter says about its pairs."""
        one = self.leaves(name).get(leaf)
        if one is None:
            return
        lora = one.lora(x_ND.dtype)
        for expert, which in pairs:
            if isinstance(which, slice):
                add_delta(y_NF[which], x_ND[which], lora, expert)
            else:
                part = y_NF[which]
                add_delta(part, x_ND[which], lora, expert)
                y_NF[which] = part

    def _project(
        self, leaf: str, matrices: Matrices, bias_EF: Tensor | None, x_ND: Tensor, routing: Routing
    ) -> Tensor:
        """One projection of rows sorted by expert, (N, F): by the kernels where the weights are packed."""
        base = self.base
        if isinstance(base, PackedExperts | PackedFeedForward):
            part = base.get_submodule(base.up_name if leaf == "up" else "down")
            assert isinstance(part, PackedLinear), type(part)
            y_NF = part.rows_of(x_ND, routing.counts_E)
        else:
            y_NF = x_ND.new_empty(len(x_ND), matrices.shape[1])
            for expert, start, stop in routing.slices:
                y_NF[start:stop] = multiply_rows(x_ND[start:stop], matrices[expert])
        return y_NF if bias_EF is None else y_NF + bias_EF[routing.expert_N]


@final
class AdaptedExperts(_AdaptedPair):
    """`Experts`, `PackedExperts` or `MixedExperts` with adapters; their projections are called `up` and `down`."""

    @property
    def count(self) -> int:
        """Number of experts E."""
        pair = self.pair
        assert not isinstance(pair, FeedForward | PackedFeedForward), type(pair)
        return pair.count

    @property
    def d_model(self) -> int:
        """Width D."""
        pair = self.pair
        assert not isinstance(pair, FeedForward | PackedFeedForward), type(pair)
        return pair.d_model

    def forward(self, x_TD: Tensor, routing: Routing, rows: AdaptedRows | None = None) -> Tensor:
        """y[token] = sum of weight * expert(x[token]), (T, D), in x's dtype; `rows` are of tokens."""
        if not self.present(rows):
            y_TD: Tensor = self.base(x_TD, routing)
            return y_TD
        return self._run(x_TD, routing, rows)


@final
class AdaptedFeedForward(_AdaptedPair):
    """`FeedForward` or `PackedFeedForward` with adapters; their projections are called `up` and `down`."""

    def forward(self, x: Tensor, rows: AdaptedRows | None = None) -> Tensor:
        """(..., D) to (..., D); `rows` counts through all leading axes."""
        if not self.present(rows):
            y: Tensor = self.base(x)
            return y
        x_TD = autocast(x.reshape(-1, x.shape[-1]))
        return self._run(x_TD, Routing.to_one(len(x_TD), x.device), rows).view(x.shape)


def _pairs(routing: Routing, rows: Tensor | None) -> list[tuple[int, Tensor | slice]]:
    """Of each expert the pairs that some tokens have with it; None means all tokens."""
    if rows is None:
        return [(expert, slice(start, stop)) for expert, start, stop in routing.slices]
    mine_T = torch.zeros(routing.tokens, dtype=torch.bool, device=rows.device)
    mine_T[rows] = True
    mine_N = mine_T[routing.token_N]
    found: list[tuple[int, Tensor | slice]] = []
    for expert, start, stop in routing.slices:
        which = mine_N[start:stop].nonzero()[:, 0] + start
        if len(which):
            found.append((expert, which))
    return found


def _frozen(pair: Pair, dtype: torch.dtype) -> AdaptedWeights:
    """Matrices of any pair of projections, in the dtype of the tokens."""
    if not isinstance(pair, Experts | FeedForward):
        return pair.frozen(dtype)

    def of(parameter: Tensor) -> Tensor:
        return (parameter if isinstance(pair, Experts) else parameter[None]).to(dtype)

    up_bias, down_bias = pair._parameters[f"{pair.up_name}_bias"], pair.down_bias
    return AdaptedWeights(
        up=of(pair.get_parameter(pair.up_name)),
        down=of(pair.down),
        up_bias=None if up_bias is None else of(up_bias),
        down_bias=None if down_bias is None else of(down_bias),
        activation=pair.activation,
        gated=pair.gated,
        activation_limit=pair.activation_limit,
    )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, OneAdapted]]:
    """Every layer with adapters, by path."""
    for path, module in model.named_modules():
        if isinstance(module, OneAdapted):
            yield path, module
