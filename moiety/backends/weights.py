"""What a backend multiplies with: the stacked weights of all experts, and the activation between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moiety.errors import ConfigError

__all__ = ["ACTIVATIONS", "Activation", "ExpertWeights", "activation"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """The experts of one layer, stacked.

    Args:
        up: (E, 2F, D) when gated, gate rows first; else (E, F, D).
        down: (E, D, F).
        up_bias: (E, 2F) or (E, F), or None.
        down_bias: (E, D), or None.
        activation: A name in `ACTIVATIONS`.
        gated: True for act(gate) * up, False for act(up).
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    gated: bool = True

    @property
    def d_ff(self) -> int:
        """Inner width F of one expert."""
        return self.down.shape[2]


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
