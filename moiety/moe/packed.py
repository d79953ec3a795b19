"""Layers whose weights are packed: they stand where `nn.Linear`, `Experts` and `FeedForward` stood.

Their tiles (`moiety/formats/tiles.py`) are buffers of bytes, so a change of dtype leaves them alone. Both projections
of a routed expert lie together, in a buffer of the layer. They are multiplied with on a CPU and never learn. A gradient
passes through them to what comes before: then, and in training, one matrix at a time is unpacked and multiplied with in
the dtype of the tokens. Otherwise the kernels multiply, which round tokens to eight bits where weights are integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moiety.backends import adapted, cpu
from moiety.backends.adapted import AdaptedWeights
from moiety.backends.matmul import multiply_rows, multiply_rows_back
from moiety.backends.unpacked import Unpacked
from moiety.backends.weights import Matrices
from moiety.errors import UsageError
from moiety.formats.tiles import ROWS, PackedWeight, Projection, expert_bytes, projections_in
from moiety.routing import Routing

__all__ = [
    "MixedExperts",
    "PackedExperts",
    "PackedFeedForward",
    "PackedLinear",
    "autocast",
    "only",
    "passes_gradient",
    "refuse_gradient",
]


def refuse_gradient(*inputs: Tensor) -> None:
    """Raise UsageError where experts that come and go would have to pass a gradient on."""
    if passes_gradient(False, *inputs):
        raise UsageError(
            "streamed experts have no gradients, and pass none on",
            hint="run under torch.no_grad(), or load the whole model",
        )


def passes_gradient(training: bool, *inputs: Tensor) -> bool:
    """True where a product with packed weights is one of training: exact, with a gradient for its rows."""
    return torch.is_grad_enabled() and (training or any(one.requires_grad for one in inputs))


def autocast(x: Tensor) -> Tensor:
    """x in the dtype of products here and now."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Through(torch.autograd.Function):
    """x W^T with a W that is unpacked, once on the way forth and once on the way back; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight: Unpacked) -> Tensor:
        ctx.weight = weight
        return multiply_rows(x_ND, weight[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, None]:
        return multiply_rows_back(grad_NF, ctx.weight[0]), None


def _forget(module: nn.Module, keys: Any) -> None:
    """After a state dict was loaded: what was made of the old tensors is made again."""
    assert isinstance(module, PackedLinear | PackedExperts), type(module)
    module.forget()


class PackedLinear(nn.Module):
    """x W^T + b with a packed W, or a stack of such matrices for the layers below.

    Buffers: `tiles`, uint8 (E, row blocks, groups, bytes of a tile), unless they are borrowed; `bias` (F,) or (E, F),
    or None.

    Args:
        weight: Packed.
        bias: Added to the product.
    """

    tiles: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.form, self.experts, self.interleaved = weight.form, weight.experts, weight.interleaved
        self.rows, self.columns = weight.rows, weight.columns
        self.register_buffer("tiles", weight.tiles)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_load_state_dict_post_hook(_forget)
        self._matrix: cpu.Matrix | None = None
        self._flat: cpu.Matrix | None = None

    @property
    def projection(self) -> Projection:
        """What one matrix is."""
        return Projection(self.form, self.rows, self.columns, self.interleaved)

    @property
    def weight(self) -> PackedWeight:
        """The weights, without the bias."""
        return PackedWeight(**self.projection._asdict(), experts=self.experts, tiles=self.tiles)

    def borrow(self, tiles: Tensor) -> None:
        """Use tiles that another module keeps; they are no part of this one's state any more."""
        if "tiles" in self._buffers:
            del self.tiles
        self.tiles = tiles
        self.forget()

    @property
    def matrix(self) -> cpu.Matrix:
        """The weights as the kernels take them."""
        if self._matrix is None:
            if self.tiles.device.type != "cpu":
                raise UsageError(
                    f"packed weights are on {self.tiles.device}, but are multiplied with on a CPU",
                    hint="move the model to the CPU, or load the one that is not packed",
                )
            self._matrix = cpu.Matrix(self.weight, self.bias)
        return self._matrix

    def rows_of(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """x W_e^T for rows sorted by expert, without the bias and whatever alternates in tiles, (N, F). No gradient."""
        if self._flat is None:
            half = self.rows // 2 if self.interleaved else self.rows
            padded = -(-half // ROWS) * ROWS * 2 if self.interleaved else self.rows
            self._flat = cpu.Matrix(replace(self.weight, rows=padded, interleaved=False))
        y_NF = cpu.grouped_linear(x_ND, self._flat, counts_E)
        if not self.interleaved:
            return y_NF
        halves = y_NF.unflatten(1, (-1, 2, ROWS)).transpose(1, 2).flatten(2)
        both: Tensor = halves[:, :, : self.rows // 2].flatten(1)
        return both

    def forget(self) -> None:
        """Drop what was made of tiles and bias: they are others now."""
        self._matrix = self._flat = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., F), in x's dtype."""
        assert self.experts == 1, self.experts
        if not passes_gradient(self.training, x):
            return cpu.linear(x, self.matrix)
        x = autocast(x)
        y_NF: Tensor = _Through.apply(x.reshape(-1, x.shape[-1]), Unpacked(self.matrix, x.dtype))
        y: Tensor = y_NF.view(*x.shape[:-1], self.rows)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own matrix: addresses are not copied."""
        return {**self.__dict__, "_matrix": None, "_flat": None}


class _PackedPair(nn.Module):
    """The two packed projections around an activation: `gate_up` or `up`, and `down`."""

    def __init__(
        self,
        up: PackedLinear,
        down: PackedLinear,
        *,
        activation: str = "silu",
        gated: bool = True,
        activation_limit: float = 7.0,
    ) -> None:
        super().__init__()
        self.activation, self.gated, self.activation_limit = activation, gated, activation_limit
        self.up_name = "gate_up" if gated else "up"
        self.add_module(self.up_name, up)
        self.down = down

    @property
    def weights(self) -> cpu.PackedExpertWeights:
        """Both, as `cpu.expert_mlp` takes them."""
        up = self.get_submodule(self.up_name)
        assert isinstance(up, PackedLinear), type(up)
        return cpu.PackedExpertWeights(
            up=up.matrix,
            down=self.down.matrix,
            activation=self.activation,
            gated=self.gated,
            activation_limit=self.activation_limit,
        )

    def frozen(self, dtype: torch.dtype) -> AdaptedWeights:
        """Both, as `adapted.expert_mlp` takes them: a matrix at a time."""
        packed = self.weights

        def of(bias: Tensor | None) -> Tensor | None:
            return None if bias is None else bias.to(dtype)

        return AdaptedWeights(
            up=Unpacked(packed.up, dtype),
            down=Unpacked(packed.down, dtype),
            up_bias=of(packed.up.bias),
            down_bias=of(packed.down.bias),
            activation=self.activation,
            gated=self.gated,
            activation_limit=self.activation_limit,
        )


class PackedExperts(_PackedPair):
    """`Experts` with packed weights; arguments as of `PackedFeedForward`, but stacks of E matrices.

    Buffer: `tiles`, uint8 (E, `expert_bytes`), of which the tiles of both projections are views.

    Args:
        tiles: The buffer where they are views of it already; None copies them into one.
    """

    tiles: Tensor

    def __init__(
        self, up: PackedLinear, down: PackedLinear, *, tiles: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(up, down, **options)
        if tiles is None:
            size = expert_bytes([up.projection, down.projection])
            tiles = torch.zeros(up.experts, size, dtype=torch.uint8, device=up.tiles.device)
            for part, view in zip((up, down), projections_in(tiles, self.projections), strict=True):
                view.tiles.copy_(part.tiles)
        self.register_buffer("tiles", tiles)
        self.register_load_state_dict_post_hook(_forget)
        self.forget()

    @property
    def projections(self) -> list[Projection]:
        """What each expert is, in the order of its bytes."""
        return [part.projection for part in self.pair]

    @property
    def pair(self) -> list[PackedLinear]:
        """Gate and up, and down."""
        parts = [self.get_submodule(self.up_name), self.down]
        return [part for part in parts if isinstance(part, PackedLinear)]

    def forget(self) -> None:
        """Let both projections be views of the tiles that there are now."""
        for part, view in zip(self.pair, projections_in(self.tiles, self.projections), strict=True):
            part.borrow(view.tiles)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        super()._apply(fn, recurse)
        self.forget()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget()

    @property
    def count(self) -> int:
        """Number of experts E."""
        return self.down.experts

    @property
    def d_model(self) -> int:
        """Width D."""
        return self.down.rows

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """y[token] = sum of weight * expert(x[token]), (T, D), in x's dtype."""
        if passes_gradient(self.training, x_TD, routing.weight_N):
            return adapted.expert_mlp(x_TD, routing, self.frozen(x_TD.dtype))
        return cpu.expert_mlp(x_TD, routing, self.weights)


class PackedFeedForward(_PackedPair):
    """`FeedForward` with packed weights: an expert that every token uses.

    Args:
        up: (2F, D), its halves interleaved, when gated; else (F, D).
        down: (D, F).
        activation: A name in `backends.weights.ACTIVATIONS`, or `CLAMPED`.
        gated: act(gate) * up.
        activation_limit: Of `CLAMPED`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        everyone = Routing.to_one(len(x_TD), x.device)
        if passes_gradient(self.training, x):
            x_TD = autocast(x_TD)
            return adapted.expert_mlp(x_TD, everyone, self.frozen(x_TD.dtype)).view(x.shape)
        return cpu.expert_mlp(x_TD, everyone, self.weights).view(x.shape)


class _Several:
    """Matrices of several stacks under one numbering."""

    def __init__(self, stacks: Sequence[Matrices], order: Sequence[tuple[int, int]]) -> None:
        self._stacks, self._order = stacks, order
        self.shape = (len(order), *stacks[0].shape[1:])

    def __getitem__(self, expert: int) -> Tensor:
        stack, place = self._order[expert]
        return self._stacks[stack][place]


class MixedExperts(nn.Module):
    """Experts of which some are packed in one format and others in another: each format is a stack of its own.

    Args:
        parts: The stacks.
        numbers: Of each stack, the numbers of its experts in ascending order; together they are 0 .. E - 1.
    """

    def __init__(self, parts: Sequence[PackedExperts], numbers: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.numbers = tuple(tuple(part) for part in numbers)
        assert [part.count for part in parts] == [len(part) for part in self.numbers], self.numbers
        assert all(list(part) == sorted(part) for part in self.numbers), self.numbers
        assert sorted(sum(self.numbers, ())) == list(range(self.count)), self.numbers

    @property
    def count(self) -> int:
        """Number of experts E, of all stacks."""
        return sum(map(len, self.numbers))

    @property
    def d_model(self) -> int:
        """Width D."""
        first = self.parts[0]
        assert isinstance(first, PackedExperts), type(first)
        return first.d_model

    def frozen(self, dtype: torch.dtype) -> AdaptedWeights:
        """All experts, as `adapted.expert_mlp` takes them."""
        stacks = [part.frozen(dtype) for part in self.parts if isinstance(part, PackedExperts)]
        places = {e: (one, at) for one, part in enumerate(self.numbers) for at, e in enumerate(part)}
        order = [places[expert] for expert in range(self.count)]

        def biases(of: list[Tensor | None]) -> Tensor | None:
            found = [one for one in of if one is not None]
            assert len(found) in (0, len(of)), "all stacks have biases, or none"
            return torch.stack([found[one][at] for one, at in order]) if found else None

        return replace(
            stacks[0],
            up=_Several([one.up for one in stacks], order),
            down=_Several([one.down for one in stacks], order),
            up_bias=biases([one.up_bias for one in stacks]),
            down_bias=biases([one.down_bias for one in stacks]),
        )

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """As `PackedExperts`; a token's answers are added up stack by stack."""
        if passes_gradient(self.training, x_TD, routing.weight_N):
            return adapted.expert_mlp(x_TD, routing, self.frozen(x_TD.dtype))
        y_TD = torch.zeros_like(x_TD)
        for part, numbers in zip(self.parts, self.numbers, strict=True):
            mine = only(routing, torch.tensor(numbers))
            if mine.pairs:
                y_TD += part(x_TD, mine)
        return y_TD


def only(routing: Routing, number_G: Tensor) -> Routing:
    """The pairs of some experts alone, who are numbered from 0 in their order."""
    chosen_E = torch.zeros(routing.experts, dtype=torch.bool)
    chosen_E[number_G] = True
    keep_N = chosen_E[routing.expert_N]
    return Routing(
        token_N=routing.token_N[keep_N],
        weight_N=routing.weight_N[keep_N],
        counts_E=routing.counts_E[number_G],
        tokens=routing.tokens,
    )
