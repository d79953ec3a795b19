"""The layer: route, multiply, combine. A drop-in for a transformer's feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moiety.errors import ConfigError
from moiety.moe.experts import Experts, FeedForward
from moiety.moe.routers import Router, RouterContext
from moiety.routing import Routing

__all__ = ["MoE", "MoEOutput"]


class MoEOutput(NamedTuple):
    """What a layer returns: `output` of x's shape, and the `routing` that made it."""

    output: Tensor
    routing: Routing


class _RouterLogits(torch.autograd.Function):
    """x W^T + b in float32 that keeps x as it came, not a float32 copy of it."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.has_bias = bias_E is not None
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(wide), weight_ED.to(wide), None if bias_E is None else bias_E.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        with torch.autocast(x_TD.device.type, enabled=False):
            grad_x = (grad_TE @ weight_ED.to(grad_TE.dtype)).to(x_TD.dtype) if need_x else None
            grad_weight = (grad_TE.t() @ x_TD.to(grad_TE.dtype)).to(weight_ED.dtype) if need_weight else None
        return grad_x, grad_weight, grad_TE.sum(0) if need_bias else None


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward.

    The router runs in float32 whatever the model's dtype (arXiv 2101.03961, section 2.4). Under autocast, x
    and the experts are cast to autocast's dtype once.

    Parameters: `gate.weight` (E, D); `experts.gate_up` (E, 2F, D), gate rows first, and `experts.down`
    (E, D, F), also reachable as `gate_up` and `down`; with a shared expert `shared` and `shared_gate`.

    Args:
        d_model: Width D.
        d_ff: Inner width F of one expert.
        experts: E.
        router: `TopK(k)`, `Switch()`, `SigmoidTopK(k)` or anything with the same three methods.
        activation: silu, gelu, gelu_tanh or relu.
        gated: SwiGLU-like when True, a single up projection when False.
        bias: Add biases to the experts.
        router_bias: Add a trained bias to the router's logits.
        shared_d_ff: Inner width of an expert that every token uses (arXiv 2401.06066); 0 for none.
        shared_gate: Multiply the shared expert by sigmoid(x w) (Qwen2-MoE).
        backend: Who multiplies; see `moiety.backends`.

    Raises:
        ConfigError: a size that is not positive, or a router that cannot serve this many experts.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        experts: int,
        router: Router,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        router_bias: bool = False,
        shared_d_ff: int = 0,
        shared_gate: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (
            ("d_model", d_model, 1), ("d_ff", d_ff, 1), ("experts", experts, 1), ("shared_d_ff", shared_d_ff, 0)
        ):  # fmt: skip
            if size < least:
                raise ConfigError(f"{name} is {size}; it must be at least {least}")
        if shared_gate and shared_d_ff < 1:
            raise ConfigError("shared_gate is set, but shared_d_ff is 0: there is no shared expert to gate")
        router.check(experts)
        self.router = router
        self.gate = nn.Linear(d_model, experts, bias=router_bias, device=device, dtype=dtype)
        self.experts = Experts(
            d_model,
            d_ff,
            experts,
            activation=activation,
            gated=gated,
            bias=bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        shape = {"activation": activation, "gated": gated, "device": device, "dtype": dtype}
        self.shared = FeedForward(d_model, shared_d_ff, **shape) if shared_d_ff else None  # type: ignore[arg-type]
        self.shared_gate = (
            nn.Linear(d_model, 1, bias=False, device=device, dtype=dtype) if shared_gate else None
        )
        bias_E = torch.zeros(experts, dtype=torch.float32, device=device) if router.uses_bias else None
        self.register_buffer("selection_bias", bias_E)

    @property
    def gate_up(self) -> Tensor:
        """The experts' gate and up projections, (E, 2F, D), gate rows first."""
        return self.experts.get_parameter(self.experts.up_name)

    @property
    def down(self) -> Tensor:
        """The experts' down projections, (E, D, F)."""
        return self.experts.down

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """Move the selection bias with the layer but keep it float32: its steps are lost in bfloat16."""
        bias_E = self.selection_bias
        super()._apply(fn, recurse)
        if bias_E is not None and self.selection_bias is not None:
            source_E = self.selection_bias if bias_E.is_meta else bias_E
            self.selection_bias = source_E.to(self.selection_bias.device, torch.float32)
        return self

    def route(self, x_TD: Tensor, *, valid_T: Tensor | None = None, pinned: Routing | None = None) -> Routing:
        """Decide, without multiplying.

        Args:
            x_TD: Tokens, (T, D).
            valid_T: Bool (T,), False for padding.
            pinned: Make exactly these pairs and only weigh them anew; its own padding holds, not `valid_T`.

        Raises:
            ConfigError: `pinned` is of other tokens or experts.
        """
        experts = self.gate.out_features
        if pinned is not None and (pinned.tokens, pinned.experts) != (len(x_TD), experts):
            raise ConfigError(
                f"the pinned routing is of {pinned.tokens} tokens and {pinned.experts} experts, "
                f"this layer has {len(x_TD)} and {experts}",
                hint="pin a routing that this layer made, for the same tokens",
            )
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE: Tensor = _RouterLogits.apply(x_TD, self.gate.weight, self.gate.bias)
            score_TE = self.router.score(logits_TE)
            if pinned is None:
                context = RouterContext(valid_T=valid_T, bias_E=self.selection_bias, training=self.training)
                pairs = self.router.choose(score_TE.detach(), context)
            else:
                pairs = pinned
            weight_N = self.router.weigh(score_TE, pairs)
        return pairs.with_weights(weight_N, logits_TE=logits_TE, score_TE=score_TE)

    def forward(self, x: Tensor, *, valid: Tensor | None = None, pinned: Routing | None = None) -> MoEOutput:
        """Route every token and add up its experts' answers.

        Args:
            x: (..., D).
            valid: Bool of x's leading shape, False for padding; padding gets zeros from the routed experts.
            pinned: A routing whose pairs to repeat, see `Routing.pinned`.

        Returns:
            `.output` of x's shape and `.routing` over the flattened tokens.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.route(x_TD, valid_T=None if valid is None else valid.reshape(-1), pinned=pinned)
        y_TD = self.experts(x_TD, routing)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = self.shared_gate(x_TD).sigmoid() * shared_TD
            y_TD = y_TD + shared_TD
        return MoEOutput(y_TD.view(x.shape), routing)
