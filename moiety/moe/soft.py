"""Soft MoE: no choice at all. Every expert works on mixtures of tokens, every token takes a mixture of answers.

    D = softmax over a sequence's tokens of (x . phi)      X~ = D^T X: what each slot sees
    C = softmax over all slots of (x . phi)                Y = C Y~: what each token gets

Fully differentiable and always balanced (arXiv 2308.00951). Not causal: a slot mixes a whole sequence, so this
is for encoders, not for language models that generate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moiety.backends.matmul import batched
from moiety.errors import ConfigError
from moiety.moe.experts import Experts
from moiety.routing import Routing

__all__ = ["SoftMoE", "SoftMoEOutput"]


class SoftMoEOutput(NamedTuple):
    """`output` (B, S, D), and how: `dispatch` sums to 1 over S, `combine` over the slots, both (B, S, E * slots)."""

    output: Tensor
    dispatch: Tensor
    combine: Tensor


class SoftMoE(nn.Module):
    """A drop-in for an encoder's feed-forward; its experts run on the same kernels as every other layer's.

    Parameters: `phi` (D, E * slots), `scale` (), and the experts' own. x and phi are scaled to length 1 before their
    product and `scale` is learnt, as section 2.3 of the paper found necessary for wide models.

    Args:
        d_model: Width D.
        d_ff: Inner width F of one expert.
        experts: E.
        slots: Mixtures each expert works on; E * slots is the work, whatever the number of tokens.
        activation: silu, gelu, gelu_tanh or relu.
        gated: SwiGLU-like when True.
        bias: Add biases to the experts.
        backend: Who multiplies.

    Raises:
        ConfigError: a size that is not positive.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        experts: int,
        slots: int = 1,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_ff", d_ff), ("experts", experts), ("slots", slots)):
            if size < 1:
                raise ConfigError(f"{name} is {size}; it must be at least 1")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.slots = slots
        self.phi = nn.Parameter(torch.randn(d_model, experts * slots, **like) * d_model**-0.5)
        self.scale = nn.Parameter(torch.ones((), **like))
        self.experts = Experts(
            d_model, d_ff, experts, activation=activation, gated=gated, bias=bias, backend=backend, **like
        )

    def forward(self, x_BSD: Tensor, *, valid_BS: Tensor | None = None) -> SoftMoEOutput:
        """Mix, multiply, mix back.

        Args:
            x_BSD: (B, S, D).
            valid_BS: Bool (B, S); padding is in no mixture and gets zeros.
        """
        device = x_BSD.device.type
        if torch.is_autocast_enabled(device):
            x_BSD = x_BSD.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            logits_BSP = self._logits(x_BSD)
            combine_BSP = logits_BSP.softmax(dim=-1)
            if valid_BS is not None:
                logits_BSP = logits_BSP.masked_fill(~valid_BS[..., None], float("-inf"))
                combine_BSP = combine_BSP * valid_BS[..., None]
            dispatch_BSP = logits_BSP.softmax(dim=1).nan_to_num()  # a sequence of padding alone mixes nothing
        mixed_BPD = batched(dispatch_BSP.to(x_BSD.dtype).transpose(1, 2), x_BSD)
        answer_BPD = self._answers(mixed_BPD)
        output_BSD = batched(combine_BSP.to(x_BSD.dtype), answer_BPD)
        return SoftMoEOutput(output_BSD, dispatch_BSP, combine_BSP)

    def _logits(self, x_BSD: Tensor) -> Tensor:
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        direction_DP = F.normalize(self.phi.to(wide), dim=0)
        return F.normalize(x_BSD.to(wide), dim=-1) @ (self.scale.to(wide) * direction_DP)

    def _answers(self, mixed_BPD: Tensor) -> Tensor:
        """Every expert on its slots of all sequences: a routing in which each slot has one expert and weight 1."""
        sequences, all_slots, width = mixed_BPD.shape
        experts = all_slots // self.slots
        rows_ND = mixed_BPD.reshape(sequences, experts, self.slots, width).transpose(0, 1).reshape(-1, width)
        each = sequences * self.slots
        routing = Routing(
            token_N=torch.arange(len(rows_ND), device=rows_ND.device),
            weight_N=torch.ones(len(rows_ND), device=rows_ND.device),
            counts_E=torch.full((experts,), each, device=rows_ND.device),
            tokens=len(rows_ND),
        )
        answers: Tensor = self.experts(rows_ND, routing)
        return answers.view(experts, sequences, self.slots, width).transpose(0, 1).reshape(mixed_BPD.shape)
