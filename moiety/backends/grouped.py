"""The fast path on torch alone: expert-sorted slices, few temporaries, its own backward.

Kept for backward are x and the pre-activation, nothing else of that size: the activation is computed
again and the gradient of a combine weight comes from <h, dh>, so no expert output is stored
(arXiv 2512.14080). Experts are worked through in chunks of consecutive experts whose rows fit the
cache; a chunk of several is one `grouped_mm`, a chunk of one is a plain product. On a GPU everything is
one chunk and nothing waits for the device. Sums over a token's experts run in ascending expert order,
whatever the chunks.

On a CPU a product of a new shape first compiles its kernel, and every step routes other row counts. So a
chunk of one expert reaches up to 1/16 into the rows of the next and its count is one of few; what it
writes there the next chunk overwrites, and the last chunk's reach is spare room at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moiety.backends.matmul import (
    has_products,
    multiply_into,
    multiply_rows,
    multiply_rows_back,
    multiply_rows_into,
    prefers_onednn,
)
from moiety.backends.weights import (
    CLAMPED,
    ExpertWeights,
    Shaped,
    activation,
    clamped_swiglu,
    clamped_swiglu_backward,
)
from moiety.routing import Routing

__all__ = [
    "Plan",
    "activation_backward",
    "activation_forward",
    "combine",
    "expert_mlp",
    "grouped_linear",
    "sum_pairs",
]

CHUNK_BYTES = 8 << 20  # temporaries of one chunk, about what the last-level cache of two cores holds
OWN_CHUNK_ROWS = 256  # an expert with this many rows fills the cores by itself
SMALLEST_REACH = 64  # rows from which a chunk of one expert is rounded up
FEWEST_STEP = 8  # of rows of experts that multiply alone
OWN_CHUNK_ROWS_ONEDNN = 32  # where float32 products go to oneDNN, which has no grouped form


class Chunk(NamedTuple):
    """Consecutive experts, their rows, and how far past them a product may reach, as half-open ranges."""

    expert: int
    expert_stop: int
    row: int
    row_stop: int
    reach: int


def _whole(x: Tensor, shape: Sequence[int]) -> bool:
    """On a GPU with aligned rows all experts are one chunk."""
    return x.is_cuda and _groupable(x.dtype, shape[1], shape[2])


def _groupable(dtype: torch.dtype, *widths: int) -> bool:
    """torch's grouped product wants 16-byte rows and has no float64."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        w * dtype.itemsize % 16 == 0 for w in widths
    )


def _chunks(
    slices: list[tuple[int, int, int]], dtype: torch.dtype, widths: tuple[int, ...], alone: bool
) -> list[Chunk]:
    """Cut the experts into chunks; an expert without rows only ever sits inside a chunk."""
    most_rows = max(CHUNK_BYTES // (sum(widths) * dtype.itemsize), 1)
    own = OWN_CHUNK_ROWS_ONEDNN if dtype == torch.float32 and prefers_onednn() else OWN_CHUNK_ROWS
    groupable = not alone and has_products(dtype) and _groupable(dtype, *widths)
    chunks: list[Chunk] = []
    for expert, start, stop in slices:
        last = chunks[-1] if chunks else None
        joins = (
            last is not None
            and groupable
            and stop - start < own
            and last.row_stop - last.row < most_rows
            and (last.expert_stop - last.expert > 1 or last.row_stop - last.row < own)
        )
        if joins and last is not None:
            chunks[-1] = Chunk(last.expert, expert + 1, last.row, stop, stop)
        else:
            chunks.append(Chunk(expert, expert + 1, start, stop, start + _few_counts(stop - start, alone)))
    return chunks


def _few_counts(rows: int, alone: bool) -> int:
    """`rows` or up to 1/16 more, so that an octave has 16 different counts; small ones stay as they are.

    Where experts multiply alone, whatever their rows, and an adapter's factors besides, up to 1/8 or 7 more.
    """
    if alone:
        step = max(1 << max(rows.bit_length() - 4, 0), FEWEST_STEP)
    elif rows < SMALLEST_REACH:
        return rows
    else:
        step = 1 << (rows.bit_length() - 5)
    return -(-rows // step) * step


class _Rows:
    """Products of one chunk's rows with its experts' matrices."""

    def __init__(self, chunk: Chunk, ends_E: Tensor) -> None:
        self.experts = slice(chunk.expert, chunk.expert_stop)
        self.one = chunk.expert_stop - chunk.expert == 1
        self.ends = None if self.one else (ends_E[self.experts] - chunk.row).to(torch.int32)

    def forward(self, x_ND: Tensor, weight_EFD: Tensor, out_NF: Tensor | None) -> Tensor:
        if not self.one:
            y_NF = F.grouped_mm(x_ND, weight_EFD[self.experts].transpose(1, 2), offs=self.ends)
            return y_NF if out_NF is None else out_NF.copy_(y_NF)
        weight_FD = weight_EFD[self.experts.start]
        if out_NF is None:
            return multiply_rows(x_ND, weight_FD)
        multiply_rows_into(out_NF, x_ND, weight_FD)
        return out_NF

    def backward(self, grad_NF: Tensor, weight_EFD: Tensor) -> Tensor:
        if self.one:
            return multiply_rows_back(grad_NF, weight_EFD[self.experts.start])
        return F.grouped_mm(grad_NF, weight_EFD[self.experts], offs=self.ends)


class Plan:
    """How one call is cut: chunks, and how pairs are summed back into tokens.

    Args:
        x_TD: Tokens.
        routing: Who goes where.
        weights: Of the experts' shapes.
        alone: Every expert is a chunk of its own.
    """

    def __init__(self, x_TD: Tensor, routing: Routing, weights: Shaped, *, alone: bool = False) -> None:
        self.tokens, self.pairs = routing.tokens, routing.pairs
        self.ends_E = routing.ends_E
        self.routing = routing
        self.whole = not alone and _whole(x_TD, weights.up.shape)
        if self.whole:
            self.slices: list[tuple[int, int, int]] = []
            everything = Chunk(0, routing.experts, 0, routing.pairs, routing.pairs)
            self.chunks = [everything] if routing.pairs else []
        else:
            self.slices = routing.slices
            widths = (weights.up.shape[1], *weights.down.shape[1:])
            self.chunks = _chunks(self.slices, x_TD.dtype, widths, alone)
            if len(self.chunks) == 1:  # its count hardly varies, and the product is kept as it is
                self.chunks = [self.chunks[0]._replace(reach=self.chunks[0].row_stop)]
        self.rows = max((chunk.reach for chunk in self.chunks), default=0)  # with the spare room at the end
        self.token_N = F.pad(routing.token_N, (0, self.rows - routing.pairs))

    def weight_gradient(self, out_EFD: Tensor, grad_NF: Tensor, x_ND: Tensor, chunk: Chunk) -> None:
        """out[e] = g_e^T x_e for the chunk's experts. Experts without a row get zeros from the caller.

        Rows past the chunk's own must not count: they are set to zero in `grad_NF`.
        """
        if self.whole:
            out_EFD.copy_(F.grouped_mm(grad_NF.t(), x_ND, offs=self.ends_E.to(torch.int32)))
            return
        if chunk.expert_stop - chunk.expert == 1:
            grad_NF[chunk.row_stop - chunk.row :].zero_()
            multiply_into(out_EFD[chunk.expert], grad_NF, x_ND)
            return
        for expert, rows in self._rows_of(chunk):
            multiply_into(out_EFD[expert], grad_NF[rows], x_ND[rows])

    def bias_gradient(self, out_EF: Tensor, grad_NF: Tensor, chunk: Chunk) -> None:
        """out[e] = sum of the expert's rows of g. Experts without a row keep what the caller put there."""
        if self.whole:
            counts_E = self.ends_E.diff(prepend=self.ends_E.new_zeros(1))
            out_EF.copy_(torch.segment_reduce(grad_NF.float(), "sum", lengths=counts_E, axis=0))
            return
        for expert, rows in self._rows_of(chunk):
            torch.sum(grad_NF[rows], 0, out=out_EF[expert])

    def _rows_of(self, chunk: Chunk) -> list[tuple[int, slice]]:
        """The chunk's experts that have rows, each with its rows counted from the chunk's first."""
        inside = [item for item in self.slices if chunk.expert <= item[0] < chunk.expert_stop]
        return [(expert, slice(start - chunk.row, stop - chunk.row)) for expert, start, stop in inside]

    def empty_gradient(self, like: Tensor) -> Tensor:
        """Room for a gradient of stacked weights, zero where no row will write."""
        gradient = torch.empty_like(like)
        if self.whole or len(self.slices) == len(like):
            return gradient if self.pairs else gradient.zero_()
        idle = set(range(len(like))) - {expert for expert, _, _ in self.slices}
        for expert in idle:
            gradient[expert].zero_()
        return gradient


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        routing: Routing,
        weights: ExpertWeights,
    ) -> Tensor:
        plan = Plan(x_TD, routing, weights)
        single = len(plan.chunks) == 1  # then the products themselves are the whole
        pre_NF = x_TD.new_empty(0 if single else plan.pairs, up.shape[1])
        y_ND = x_TD.new_empty(0 if single else plan.rows, down.shape[1])
        expert_N = None
        if up_bias is not None or down_bias is not None:
            expert_N = F.pad(routing.expert_N, (0, plan.rows - routing.pairs))
        for chunk in plan.chunks:
            rows, multiply = slice(chunk.row, chunk.reach), _Rows(chunk, plan.ends_E)
            x_ND = x_TD.index_select(0, plan.token_N[rows])
            direct = not single and chunk.reach <= plan.pairs  # what is kept has no spare room
            pre = multiply.forward(x_ND, up, pre_NF[rows] if direct else None)
            if up_bias is not None and expert_N is not None:
                pre += up_bias.index_select(0, expert_N[rows])
            hidden = activation_forward(weights, pre)
            y = multiply.forward(hidden, down, None if single else y_ND[rows])
            if down_bias is not None and expert_N is not None:
                y += down_bias.index_select(0, expert_N[rows])
            if single:
                pre_NF, y_ND = pre, y
            elif not direct:
                pre_NF[chunk.row : chunk.row_stop] = pre[: chunk.row_stop - chunk.row]
        ctx.save_for_backward(x_TD, weight_N, up, down, pre_NF, up_bias, down_bias)
        ctx.plan, ctx.weights, ctx.expert_N = plan, weights.shapes(), expert_N
        return sum_pairs(y_ND, weight_N, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, up, down, pre_NF, up_bias, down_bias = ctx.saved_tensors
        need_x, need_weight, need_up, need_down, need_up_bias, need_down_bias, _, _ = ctx.needs_input_grad
        plan: Plan = ctx.plan
        grad_TD = grad_TD.contiguous()
        padded_N = F.pad(weight_N, (0, plan.rows - plan.pairs))
        grad_weight_N = torch.empty_like(padded_N)
        grad_up = plan.empty_gradient(up) if need_up else None
        grad_down = plan.empty_gradient(down) if need_down else None
        grad_up_bias = torch.zeros_like(up_bias) if need_up_bias else None
        grad_down_bias = torch.zeros_like(down_bias) if need_down_bias else None
        grad_x_ND = (
            x_TD.new_empty(plan.rows if len(plan.chunks) != 1 else 0, x_TD.shape[1]) if need_x else None
        )
        for chunk in plan.chunks:
            rows, multiply = slice(chunk.row, chunk.reach), _Rows(chunk, plan.ends_E)
            token, weight = plan.token_N[rows], padded_N[rows, None].to(x_TD.dtype)
            pre = F.pad(pre_NF[rows], (0, 0, 0, max(chunk.reach - plan.pairs, 0)))
            grad_y = grad_TD.index_select(0, token)
            grad_hidden = multiply.backward(grad_y, down)
            hidden, grad_pre = activation_backward(ctx.weights, pre, grad_hidden, weight)
            grad_weight_N[rows] = (hidden * grad_hidden).sum(
                -1, dtype=torch.promote_types(x_TD.dtype, torch.float32)
            )
            if down_bias is not None:
                bias_ND = down_bias.index_select(0, ctx.expert_N[rows])
                grad_weight_N[rows] += (grad_y * bias_ND).sum(-1).to(weight_N.dtype)
            if grad_down_bias is not None:
                plan.bias_gradient(grad_down_bias, grad_y * weight, chunk)
            if grad_down is not None:
                plan.weight_gradient(grad_down, grad_y, hidden.mul_(weight), chunk)
            if grad_up_bias is not None:
                plan.bias_gradient(grad_up_bias, grad_pre, chunk)
            if grad_up is not None:
                plan.weight_gradient(grad_up, grad_pre, x_TD.index_select(0, token), chunk)
            if grad_x_ND is not None and len(plan.chunks) == 1:
                grad_x_ND = multiply.backward(grad_pre, up)
            elif grad_x_ND is not None:
                grad_x_ND[rows] = multiply.backward(grad_pre, up)
        grad_x = sum_pairs(grad_x_ND, None, plan.routing) if grad_x_ND is not None else None
        grad_weight = grad_weight_N[: plan.pairs] if need_weight else None
        return grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias, None, None


def sum_pairs(y_ND: Tensor, weight_N: Tensor | None, routing: Routing) -> Tensor:
    """y[token] = sum of weight * row, in ascending expert order; rows past the pairs are not looked at. No gradient."""
    if routing.pairs == 0:
        return y_ND.new_zeros(routing.tokens, y_ND.shape[1])
    order_N = routing.pairs_of_token_N
    weights = None if weight_N is None else weight_N.to(y_ND.dtype)[order_N]
    return torch.embedding_bag(y_ND, order_N, routing.first_pair_T, False, 0, False, weights)[0]


def combine(y_ND: Tensor, routing: Routing) -> Tensor:
    """Add up what the experts of each token made of it, (N, D) to (T, D). No gradient."""
    return sum_pairs(y_ND, routing.weight_N, routing)


def activation_forward(weights: Shaped, pre: Tensor) -> Tensor:
    """The hidden rows of a pre-activation."""
    if weights.activation == CLAMPED:
        return clamped_swiglu(pre[:, : weights.d_ff], pre[:, weights.d_ff :], weights.activation_limit)
    act = activation(weights.activation)
    if weights.gated:
        return act.forward(pre[:, : weights.d_ff]).mul_(pre[:, weights.d_ff :])
    return act.forward(pre)


def activation_backward(
    weights: Shaped, pre: Tensor, grad_hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The hidden rows again, and the gradient of the pre-activation (`grad_hidden` is still unweighted)."""
    grad_pre = torch.empty_like(pre)
    weighted = grad_hidden * weight
    if weights.activation == CLAMPED:
        (gate, up), (to_gate, to_up) = pre.chunk(2, dim=-1), grad_pre.chunk(2, dim=-1)
        return clamped_swiglu_backward(weighted, gate, up, weights.activation_limit, to_gate, to_up), grad_pre
    act = activation(weights.activation)
    if not weights.gated:
        act.backward(weighted, pre, grad_pre)
        return act.forward(pre), grad_pre
    gate, up = pre[:, : weights.d_ff], pre[:, weights.d_ff :]
    activated = act.forward(gate)
    torch.mul(weighted, activated, out=grad_pre[:, weights.d_ff :])
    act.backward(weighted.mul_(up), gate, grad_pre[:, : weights.d_ff])
    return activated.mul_(up), grad_pre


def expert_mlp(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """y[token] += weight * expert(x[token]); see `reference.expert_mlp`, which defines it."""
    y_TD: Tensor = _ExpertMLP.apply(
        x_TD, routing.weight_N, weights.up, weights.down, weights.up_bias, weights.down_bias, routing, weights
    )
    return y_TD


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_EFD: Tensor, slices: list[tuple[int, int, int]]) -> Tensor:
        y_NF = x_ND.new_empty(x_ND.shape[0], weight_EFD.shape[1])
        for expert, start, stop in slices:
            multiply_rows_into(y_NF[start:stop], x_ND[start:stop], weight_EFD[expert])
        ctx.save_for_backward(x_ND, weight_EFD)
        ctx.slices = slices
        return y_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_EFD = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        grad_x = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_EFD) if ctx.needs_input_grad[1] else None
        for expert, start, stop in ctx.slices:
            if grad_x is not None:
                grad_x[start:stop] = multiply_rows_back(grad_NF[start:stop], weight_EFD[expert])
            if grad_weight is not None:
                multiply_into(grad_weight[expert], grad_NF[start:stop], x_ND[start:stop])
        return grad_x, grad_weight, None


def grouped_linear(
    x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor, bias_EF: Tensor | None = None
) -> Tensor:
    """y = x W_e^T + b_e for rows sorted by expert; see `reference.grouped_linear`, which defines it."""
    ends = counts_E.cumsum(0).tolist()
    assert ends[-1:] == [len(x_ND)], (ends[-1:], x_ND.shape)
    starts = [0, *ends[:-1]]
    slices = [(e, a, b) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]
    y_NF: Tensor = _GroupedLinear.apply(x_ND, weight_EFD, slices)
    if bias_EF is not None:
        y_NF = y_NF + bias_EF.repeat_interleave(counts_E, dim=0, output_size=len(x_ND))
    return y_NF
