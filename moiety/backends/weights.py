"""What a backend multiplies with: the stacked weights of all experts, and the activation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.errors import ConfigError

__all__ = [
    "ACTIVATIONS",
    "CLAMPED",
    "Activation",
    "ExpertWeights",
    "Matrices",
    "Shaped",
    "activation",
    "check_activation",
    "clamped_swiglu",
    "clamped_swiglu_backward",
    "emptied",
]

CLAMPED = "clamped_swiglu"  # of gate and up together, so not among ACTIVATIONS
STEEPNESS = 1.702  # of its sigmoid, which makes x * sigmoid(1.702 x) nearly gelu


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """The experts of one layer, stacked.

    Args:
        up: (E, 2F, D) when gated, gate rows first; else (E, F, D).
        down: (E, D, F).
        up_bias: (E, 2F) or (E, F), or None.
        down_bias: (E, D), or None.
        activation: A name in `ACTIVATIONS`, or `CLAMPED`, which is always gated.
        gated: True for act(gate) * up, False for act(up).
        activation_limit: Of `CLAMPED`: gate is clamped from above to it, up on both sides.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    gated: bool = True
    activation_limit: float = 7.0

    @property
    def d_ff(self) -> int:
        """Inner width F of one expert."""
        return self.down.shape[2]

    def shapes(self) -> ExpertWeights:
        """The same without memory, for a node of a graph that must not keep alive what autograd lets go."""
        return replace(self, up=emptied(self.up), down=emptied(self.down), up_bias=None, down_bias=None)


def emptied(tensor: Tensor) -> Tensor:
    """Shape and dtype alone."""
    return torch.empty_like(tensor, device="meta")


class Matrices(Protocol):
    """One matrix for each expert, (E, F, D): a tensor, or what makes one of them at a time."""

    @property
    def shape(self) -> Sequence[int]:
        """(E, F, D)."""
        ...

    def __getitem__(self, expert: int) -> Tensor:
        """One matrix, (F, D)."""
        ...


class Shaped(Protocol):
    """Experts as those see them who do not multiply with them: shapes, and the activation."""

    @property
    def up(self) -> Matrices:
        """(E, 2F, D) or (E, F, D)."""
        ...

    @property
    def down(self) -> Matrices:
        """(E, D, F)."""
        ...

    @property
    def d_ff(self) -> int:
        """F."""
        ...

    @property
    def activation(self) -> str:
        """Its name."""
        ...

    @property
    def gated(self) -> bool:
        """Whether up has gate rows first."""
        ...

    @property
    def activation_limit(self) -> float:
        """Of `CLAMPED`."""
        ...


class Activation(NamedTuple):
    """A function, and its derivative times an incoming gradient written to `out`: `backward(grad, input, out)`."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], object]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)


def _gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out)


def _gelu_tanh_backward(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_backward),
    "gelu": Activation(F.gelu, _gelu_backward),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_backward),
    "relu": Activation(F.relu, _relu_backward),
}


def activation(name: str) -> Activation:
    """The activation called `name`.

    Raises:
        ConfigError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"there is no activation {name!r}", hint=f"there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_activation(name: str, gated: bool) -> None:
    """Refuse an activation that there is not.

    Raises:
        ConfigError: no such activation, or `CLAMPED` without a gate.
    """
    if name != CLAMPED:
        activation(name)
    elif not gated:
        raise ConfigError(f"{CLAMPED} is of gate and up together, but gated is false", hint="set gated")


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(1.702 gate), gate clamped to at most `limit` and up to plus and minus it (gpt-oss)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(STEEPNESS * gate))


def clamped_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, limit: float, out_gate: Tensor, out_up: Tensor
) -> Tensor:
    """The activation again, and its derivatives times `grad`, written to `out_gate` and `out_up`. No gradient."""
    inside_gate, inside_up = gate <= limit, up.abs() <= limit
    gate, up1 = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1)
    sigmoid = torch.sigmoid(STEEPNESS * gate)
    swish = gate * sigmoid
    slope = (swish * STEEPNESS).mul_(1 - sigmoid).add_(sigmoid)
    torch.mul(grad, swish, out=out_up).mul_(inside_up)
    torch.mul(grad, slope, out=out_gate).mul_(up1).mul_(inside_gate)
    return swish.mul_(up1)
