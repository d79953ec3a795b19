"""Experts whose matrices are frozen, plain or packed, and have low-rank additions that learn (arXiv 2106.09685).

What expert e multiplies with is W_e + scale B_e A_e. W_e is one matrix at a time: of packed experts no other is ever
unpacked, and none has a gradient. Kept for backward are x and the pre-activation, as in `grouped`; A x is computed
again. The definition is `reference` with `merged` matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moiety.backends.grouped import Plan, activation_backward, activation_forward, sum_pairs
from moiety.backends.matmul import add_rows, add_rows_back, multiply_across, multiply_rows, multiply_rows_back
from moiety.backends.weights import ExpertWeights, Matrices, emptied
from moiety.routing import Routing

__all__ = ["AdaptedWeights", "Gradients", "Lora", "add_delta", "expert_mlp", "linear", "merged"]


class Lora(NamedTuple):
    """Low-rank additions to a stack of matrices.

    The rows of a matrix may be of several parts, each with an A of its own (query, key and value in one matrix); rows
    that no part names get nothing.

    Args:
        a: (E, P R, D), or (1, P R, D) when all experts have the same.
        b: (E, rows of all parts, R), part after part.
        scale: Factor on B A.
        spans: Of each of the P parts its first row and one after its last.
    """

    a: Tensor
    b: Tensor
    scale: float
    spans: tuple[tuple[int, int], ...]

    @property
    def rank(self) -> int:
        """R."""
        return self.b.shape[2]

    def parts(self, expert: int) -> list[tuple[slice, slice, Tensor]]:
        """Of each part its rows, its columns of A x, and its B."""
        found, at = [], 0
        for number, (start, stop) in enumerate(self.spans):
            b_FR = self.b[expert, at : at + stop - start]
            found.append((slice(start, stop), slice(number * self.rank, (number + 1) * self.rank), b_FR))
            at += stop - start
        return found

    def a_of(self, expert: int) -> Tensor:
        """(P R, D)."""
        return self.a[expert if len(self.a) > 1 else 0]

    def to(self, dtype: torch.dtype) -> Lora:
        """In another dtype; gradients flow back."""
        return self._replace(a=self.a.to(dtype), b=self.b.to(dtype))

    def shapes(self) -> Lora:
        """The same without memory."""
        return self._replace(a=emptied(self.a), b=emptied(self.b))

    def dense(self, rows: int) -> Tensor:
        """scale B A as whole matrices, (E, rows, D), in float32 at least."""
        wide = torch.promote_types(self.b.dtype, torch.float32)
        parts = []
        for expert in range(len(self.b)):
            delta_FD = self.a.new_zeros(rows, self.a.shape[2], dtype=wide)
            a = self.a_of(expert).to(wide)
            for span, low, b_FR in self.parts(expert):
                delta_FD[span] = self.scale * (b_FR.to(wide) @ a[low])
            parts.append(delta_FD)
        return torch.stack(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdaptedWeights:
    """The experts of one layer: frozen matrices, and what is added to them.

    Args:
        up: As in `ExpertWeights`; a tensor, or one matrix at a time in the dtype of the tokens.
        down: The same.
        up_bias: (E, 2F) or (E, F), or None.
        down_bias: (E, D), or None.
        activation: As in `ExpertWeights`.
        gated: The same.
        activation_limit: The same.
        up_lora: Added to `up`, or None.
        down_lora: Added to `down`, or None.
    """

    up: Matrices
    down: Matrices
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    gated: bool = True
    activation_limit: float = 7.0
    up_lora: Lora | None = None
    down_lora: Lora | None = None

    @property
    def d_ff(self) -> int:
        """Inner width F of one expert."""
        return self.down.shape[2]

    @property
    def tensors(self) -> list[Tensor | None]:
        """Those that are large, or were made for this call, for `filled`; packed matrices are in neither."""
        stacks = [one if isinstance(one, Tensor) else None for one in (self.up, self.down)]
        factors = [(None, None) if one is None else one[:2] for one in (self.up_lora, self.down_lora)]
        return [*stacks, *factors[0], *factors[1]]

    def shapes(self) -> AdaptedWeights:
        """The same without the memory of `tensors`: a node of a graph must not keep alive what autograd lets go."""
        up, down = (emptied(one) if isinstance(one, Tensor) else one for one in (self.up, self.down))
        up_lora, down_lora = (None if one is None else one.shapes() for one in (self.up_lora, self.down_lora))
        return replace(self, up=up, down=down, up_lora=up_lora, down_lora=down_lora)

    def filled(self, tensors: Sequence[Tensor | None]) -> AdaptedWeights:
        """What `shapes` was made of."""
        up, down, *factors = tensors
        return replace(
            self,
            up=self.up if up is None else up,
            down=self.down if down is None else down,
            up_lora=_with(self.up_lora, *factors[:2]),
            down_lora=_with(self.down_lora, *factors[2:]),
        )


def _with(lora: Lora | None, a: Tensor | None, b: Tensor | None) -> Lora | None:
    return None if lora is None or a is None or b is None else lora._replace(a=a, b=b)


def merged(weights: AdaptedWeights, dtype: torch.dtype | None = None) -> ExpertWeights:
    """The same experts with the additions in their matrices: the definition, and what merging writes.

    Args:
        weights: Frozen matrices and additions.
        dtype: Of the matrices that come; None is theirs.
    """

    def whole(matrices: Matrices, lora: Lora | None) -> Tensor:
        first = matrices[0]
        stack = first.new_empty(tuple(matrices.shape))
        for expert in range(len(stack)):  # an unpacked one is gone when the next comes
            stack[expert] = matrices[expert]
        if lora is not None:
            delta = lora.dense(stack.shape[1])
            stack = (stack.to(delta.dtype) + delta).to(dtype or stack.dtype)
        return stack if dtype is None else stack.to(dtype)

    return ExpertWeights(
        up=whole(weights.up, weights.up_lora),
        down=whole(weights.down, weights.down_lora),
        up_bias=weights.up_bias,
        down_bias=weights.down_bias,
        activation=weights.activation,
        gated=weights.gated,
        activation_limit=weights.activation_limit,
    )


def add_delta(y_NF: Tensor, x_ND: Tensor, lora: Lora, expert: int) -> None:
    """y += scale B_e A_e x for rows of one expert. No gradient."""
    low = multiply_rows(x_ND, lora.a_of(expert))
    for span, columns, b_FR in lora.parts(expert):
        add_rows(y_NF[:, span], low[:, columns], b_FR, lora.scale)


class Gradients:
    """Gradients of one `Lora`, in float32 at least because experts may share A."""

    def __init__(self, lora: Lora) -> None:
        wide = torch.promote_types(lora.a.dtype, torch.float32)
        self.lora = lora
        self.a, self.b = torch.zeros_like(lora.a, dtype=wide), torch.zeros_like(lora.b, dtype=wide)

    def back(self, grad_NF: Tensor, expert: int) -> Tensor:
        """The gradient of A x, (N, P R)."""
        lora, low = self.lora, []
        for span, _, b_FR in lora.parts(expert):
            low.append(multiply_rows_back(grad_NF[:, span], b_FR))
        return (low[0] if len(low) == 1 else torch.cat(low, dim=1)).mul_(lora.scale)

    def add(
        self, grad_NF: Tensor, grad_low: Tensor, x_ND: Tensor, expert: int, weight: Tensor | None = None
    ) -> None:
        """Take the rows of one expert: the gradients of y and of A x, and x; `weight` (N, 1) is still to be in both."""
        lora, at = self.lora, 0
        low = multiply_rows(x_ND, lora.a_of(expert))
        if weight is not None:  # R numbers a row are fewer than those of the gradient
            low, grad_low = low * weight, grad_low * weight
        for span, columns, b_FR in lora.parts(expert):
            rows = slice(at, at + len(b_FR))
            # the other way round the product has R columns, and takes ten times as long
            self.b[expert, rows].add_(
                multiply_across(low[:, columns], grad_NF[:, span]).t(), alpha=lora.scale
            )
            at += len(b_FR)
        self.a[expert if len(self.a) > 1 else 0] += multiply_across(grad_low, x_ND)

    def take(self, grad_NF: Tensor, x_ND: Tensor, expert: int) -> Tensor:
        """Add some rows to those before them; what x gets of it, (N, D)."""
        grad_low = self.back(grad_NF, expert)
        self.add(grad_NF, grad_low, x_ND, expert)
        return multiply_rows_back(grad_low, self.lora.a_of(expert))


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, a: Tensor, b: Tensor, weight: Matrices, bias_F: Tensor | None, lora: Lora
    ) -> Tensor:
        plain = weight if isinstance(weight, Tensor) else None
        ctx.save_for_backward(x_ND, a, b, plain)
        ctx.weight, ctx.lora = weight if plain is None else None, lora.shapes()
        y_NF = multiply_rows(x_ND, weight[0], bias_F)
        add_delta(y_NF, x_ND, lora, 0)
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, a, b, plain = ctx.saved_tensors
        weight: Matrices = ctx.weight if plain is None else plain
        lora: Lora = ctx.lora._replace(a=a, b=b)
        grad_NF, added, grad_x = grad_NF.contiguous(), Gradients(lora), None
        grad_low = added.back(grad_NF, 0)
        added.add(grad_NF, grad_low, x_ND, 0)
        if ctx.needs_input_grad[0]:
            grad_x = multiply_rows_back(grad_NF, weight[0])
            add_rows_back(grad_x, grad_low, lora.a_of(0))
        return grad_x, *_of(added), None, None, None


def linear(x: Tensor, weight: Matrices, lora: Lora, bias_F: Tensor | None = None) -> Tensor:
    """(W + scale B A) x + bias of a single frozen matrix, (..., D) to (..., F), with gradients for x, A and B.

    Args:
        x: (..., D).
        weight: One matrix, (1, F, D), in x's dtype.
        lora: Its additions, in x's dtype.
        bias_F: In x's dtype, or None.
    """
    flat: Tensor = _AdaptedLinear.apply(x.reshape(-1, x.shape[-1]), lora.a, lora.b, weight, bias_F, lora)
    return flat.view(*x.shape[:-1], weight.shape[1])


class _AdaptedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        up_a: Tensor | None,
        up_b: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        routing: Routing,
        weights: AdaptedWeights,
    ) -> Tensor:
        plan = Plan(x_TD, routing, weights, alone=True)
        pre_NF = x_TD.new_empty(plan.rows, weights.up.shape[1])
        y_ND = x_TD.new_empty(plan.rows, weights.down.shape[1])
        for chunk in plan.chunks:
            expert, rows = chunk.expert, slice(chunk.row, chunk.reach)
            x_ND = x_TD.index_select(0, plan.token_N[rows])
            pre = multiply_rows(x_ND, weights.up[expert])
            if weights.up_bias is not None:
                pre += weights.up_bias[expert]
            if weights.up_lora is not None:
                add_delta(pre, x_ND, weights.up_lora, expert)
            hidden = activation_forward(weights, pre)
            y = multiply_rows(hidden, weights.down[expert])
            if weights.down_bias is not None:
                y += weights.down_bias[expert]
            if weights.down_lora is not None:
                add_delta(y, hidden, weights.down_lora, expert)
            pre_NF[rows], y_ND[rows] = pre, y
        ctx.save_for_backward(x_TD, weight_N, pre_NF, *weights.tensors)
        ctx.plan, ctx.weights = plan, weights.shapes()
        return sum_pairs(y_ND, weight_N, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, pre_NF, *tensors = ctx.saved_tensors
        plan: Plan = ctx.plan
        weights: AdaptedWeights = ctx.weights.filled(tensors)
        need_x = ctx.needs_input_grad[0]
        up, down = (
            Gradients(lora) if lora is not None else None for lora in (weights.up_lora, weights.down_lora)
        )
        padded_N = F.pad(weight_N, (0, plan.rows - plan.pairs))
        grad_weight_N = torch.empty_like(padded_N)
        grad_x_ND = x_TD.new_empty(plan.rows if need_x else 0, x_TD.shape[1])
        for chunk in plan.chunks:
            expert, rows = chunk.expert, slice(chunk.row, chunk.reach)
            token, weight = plan.token_N[rows], padded_N[rows, None].to(x_TD.dtype)
            grad_y = grad_TD.index_select(0, token)
            grad_y[chunk.row_stop - chunk.row :].zero_()  # rows of the next expert must not count
            grad_hidden = multiply_rows_back(grad_y, weights.down[expert])
            grad_low = None if down is None else down.back(grad_y, expert)
            if down is not None and grad_low is not None:
                add_rows_back(grad_hidden, grad_low, down.lora.a_of(expert))
            hidden, grad_pre = activation_backward(weights, pre_NF[rows], grad_hidden, weight)
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            grad_weight_N[rows] = (hidden * grad_hidden).sum(-1, dtype=wide)
            if weights.down_bias is not None:
                grad_weight_N[rows] += (grad_y * weights.down_bias[expert]).sum(-1)
            if down is not None and grad_low is not None:
                down.add(grad_y, grad_low, hidden, expert, weight)
            grad_low = None if up is None else up.back(grad_pre, expert)
            if up is not None and grad_low is not None:
                up.add(grad_pre, grad_low, x_TD.index_select(0, token), expert)
            if need_x:
                grad_x = multiply_rows_back(grad_pre, weights.up[expert])
                if up is not None and grad_low is not None:
                    add_rows_back(grad_x, grad_low, up.lora.a_of(expert))
                grad_x_ND[rows] = grad_x
        grad_x_TD = sum_pairs(grad_x_ND, None, plan.routing) if need_x else None
        of_weights = grad_weight_N[: plan.pairs] if ctx.needs_input_grad[1] else None
        return grad_x_TD, of_weights, *_of(up), *_of(down), None, None


def _of(gradients: Gradients | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of A and B."""
    if gradients is None:
        return None, None
    return gradients.a.to(gradients.lora.a.dtype), gradients.b.to(gradients.lora.b.dtype)


def expert_mlp(x_TD: Tensor, routing: Routing, weights: AdaptedWeights) -> Tensor:
    """y[token] += weight * expert(x[token]), with gradients for x, the combine weights, and A and B.

    Args:
        x_TD: Tokens, (T, D).
        routing: Who goes where.
        weights: In x's dtype; nothing but the additions learns.
    """
    factors = [
        factor
        for lora in (weights.up_lora, weights.down_lora)
        for factor in ((None, None) if lora is None else lora[:2])
    ]
    y_TD: Tensor = _AdaptedMLP.apply(x_TD, routing.weight_N, *factors, routing, weights)
    return y_TD
