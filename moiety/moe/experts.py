"""Feed-forwards: the stacked experts of one layer, and the dense one that shared experts and dense blocks use."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moiety import backends
from moiety.backends.matmul import linear
from moiety.backends.weights import CLAMPED, ExpertWeights, activation, clamped_swiglu
from moiety.moe.packed import MixedExperts, PackedExperts
from moiety.routing import Routing

__all__ = ["Experts", "FeedForward", "Multiply", "Spread", "expert_seconds"]

Multiply = Callable[[Tensor, Routing, ExpertWeights], Tensor]


class Spread(Protocol):
    """Brings tokens to experts that are in other processes: `moiety.parallel.expert_parallel`."""

    @property
    def ranks(self) -> int:
        """In how many parts the experts are."""
        ...

    def send(self, x_TD: Tensor, routing: Routing) -> Any:
        """Begin to send; what `multiply` takes."""
        ...

    def multiply(self, sent: Any, multiply: Multiply, weights: ExpertWeights) -> Tensor:
        """What all experts make of it, (T, D)."""
        ...


def _parameter(*shape: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))


class Experts(nn.Module):
    """E feed-forwards of equal shape, stacked so that one call multiplies all of them.

    Parameters: `gate_up` (E, 2F, D) with the gate rows first, or `up` (E, F, D) when not gated; `down`
    (E, D, F); with `bias` also `gate_up_bias` (E, 2F) or `up_bias` (E, F), and `down_bias` (E, D).

    Args:
        d_model: Width D.
        d_ff: Inner width F of one expert.
        experts: E.
        activation: silu, gelu, gelu_tanh or relu, or clamped_swiglu: (up + 1) * gate * sigmoid(1.702 gate).
        activation_limit: Of clamped_swiglu: gate is clamped to at most this, up to plus and minus this.
        gated: act(gate) * up (SwiGLU, GeGLU; arXiv 2002.05202) instead of act(up).
        bias: Add biases.
        backend: Who multiplies; "auto" lets `backends.choose` decide.

    With `spread` set, these are this process's part of the experts and the routing is over all of them.

    Raises:
        ConfigError: no such activation or backend.
    """

    spread: Spread | None = None

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        experts: int,
        *,
        activation: str = "silu",
        activation_limit: float = 7.0,
        gated: bool = True,
        bias: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        backends.check_activation(activation, gated)
        if backend != "auto":
            backends.get(backend)
        self.activation, self.gated, self.backend = activation, gated, backend
        self.activation_limit = activation_limit
        rows = 2 * d_ff if gated else d_ff
        self.up_name = "gate_up" if gated else "up"
        self.register_parameter(self.up_name, _parameter(experts, rows, d_model, device=device, dtype=dtype))
        self.down = _parameter(experts, d_model, d_ff, device=device, dtype=dtype)
        up_bias = _parameter(experts, rows, device=device, dtype=dtype) if bias else None
        self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.down_bias = _parameter(experts, d_model, device=device, dtype=dtype) if bias else None
        self.reset_parameters()

    @property
    def count(self) -> int:
        """Number of experts E."""
        return len(self.down)

    @property
    def d_model(self) -> int:
        """Width D."""
        return self.down.shape[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(fan-in), as torch's linear; biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 3:
                parameter.uniform_(-(parameter.shape[2] ** -0.5), parameter.shape[2] ** -0.5)
            else:
                assert name.endswith("bias"), name
                parameter.zero_()

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """The parameters in `dtype`, as backends take them; gradients flow back to the parameters."""
        up: Tensor = self.get_parameter(self.up_name)
        up_bias: Tensor | None = self._parameters[f"{self.up_name}_bias"]
        return ExpertWeights(
            up=up.to(dtype),
            down=self.down.to(dtype),
            up_bias=None if up_bias is None else up_bias.to(dtype),
            down_bias=None if self.down_bias is None else self.down_bias.to(dtype),
            activation=self.activation,
            gated=self.gated,
            activation_limit=self.activation_limit,
        )

    def forward(self, x_TD: Tensor, routing: Routing, sent: Any = None) -> Tensor:
        """y[token] = sum of weight * expert(x[token]), (T, D), in x's dtype; `sent` is what `spread` sent before."""
        name = backends.choose(self.backend, x_TD.device, x_TD.dtype).name
        multiply, weights = backends.get(name).expert_mlp, self.weights(x_TD.dtype)
        if self.spread is None:
            return multiply(x_TD, routing, weights)
        sent = self.spread.send(x_TD, routing) if sent is None else sent
        return self.spread.multiply(sent, multiply, weights)


@torch.no_grad()
def expert_seconds(
    experts: Experts | PackedExperts | MixedExperts, rows: int = 64, repeats: int = 5
) -> Tensor:
    """Median seconds that each expert takes for `rows` tokens here and now, (E,): a cost for `CostAware`.

    Experts that sit in slow memory, or on a slow device, show. Each is first run once unmeasured.
    """
    like = next(experts.parameters(), torch.empty(0))  # packed ones have none
    x_ND = torch.randn(rows, experts.d_model, dtype=like.dtype, device=like.device)
    count = experts.count
    seconds = torch.empty(count, repeats)
    for expert in range(count):
        counts_E = torch.zeros(count, dtype=torch.int64, device=x_ND.device)
        counts_E[expert] = rows
        routing = Routing(
            token_N=torch.arange(rows, device=x_ND.device),
            weight_N=torch.ones(rows, device=x_ND.device),
            counts_E=counts_E,
            tokens=rows,
        )
        for repeat in range(-1, repeats):
            begun = time.perf_counter()
            experts(x_ND, routing).sum().item()  # waits for the device
            if repeat >= 0:
                seconds[expert, repeat] = time.perf_counter() - begun
    return seconds.median(dim=1).values


class FeedForward(nn.Module):
    """One dense feed-forward: down(act(gate) * up), or down(act(up)).

    Parameters: `gate_up` (2F, D) with the gate rows first, or `up` (F, D) when not gated; `down` (D, F); with
    `bias` also `gate_up_bias` (2F,) or `up_bias` (F,), and `down_bias` (D,).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "silu",
        activation_limit: float = 7.0,
        gated: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        backends.check_activation(activation, gated)
        self.activation, self.gated, self.activation_limit = activation, gated, activation_limit
        self.up_name = "gate_up" if gated else "up"
        rows = 2 * d_ff if gated else d_ff
        self.register_parameter(self.up_name, _parameter(rows, d_model, device=device, dtype=dtype))
        self.down = _parameter(d_model, d_ff, device=device, dtype=dtype)
        up_bias = _parameter(rows, device=device, dtype=dtype) if bias else None
        self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.down_bias = _parameter(d_model, device=device, dtype=dtype) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(fan-in), as torch's linear; biases zero."""
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
            else:
                parameter.uniform_(-(parameter.shape[1] ** -0.5), parameter.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        hidden = linear(x, self.get_parameter(self.up_name), self._parameters[f"{self.up_name}_bias"])
        if self.activation == CLAMPED:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = clamped_swiglu(gate, up, self.activation_limit)
        elif self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activation(self.activation).forward(gate) * up
        else:
            hidden = activation(self.activation).forward(hidden)
        return linear(hidden, self.down, self.down_bias)
