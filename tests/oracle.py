"""The slow definition that everything fast is proved against, and the bar of the proof.

One token at a time, in plain loops over float64: scores, chosen experts (of equal scores the lower number), weights,
sum of expert outputs. Autograd through it gives every gradient. Nothing here calls the package: `ExpertWeights`
and the router classes are read as descriptions only. `plain` is ordinary torch at the tested dtype; its
distance from the definition is the noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moiety.backends.weights import ExpertWeights
from moiety.moe.layer import MoE
from moiety.routing import Routing
from tests.router_oracle import NO_LUCK, Decision, Luck, choose, mask_of, weigh

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
Multiply = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]


def assert_close_enough(
    fast: Tensor,
    plain: Tensor,
    truth: Tensor,
    name: str = "",
    *,
    dtype: torch.dtype | None = None,
    zero: bool = False,
) -> None:
    """Fail unless `fast` is at most twice as far from `truth` as `plain` is, give or take one last place.

    Args:
        fast: What is tested.
        plain: Ordinary torch in the same dtype.
        truth: The definition in float64.
        name: For the message.
        dtype: What was multiplied in, if not fast's own dtype.
        zero: The truth is zero (a frozen choice, no token), which otherwise fails as a vacuous test.
    """
    assert fast.shape == truth.shape and fast.dtype == plain.dtype, (
        name,
        fast.shape,
        fast.dtype,
        truth.shape,
    )
    assert bool(fast.isfinite().all()), f"{name}: not finite"
    floor = 1e-12 if fast.dtype == torch.float64 else torch.finfo(dtype or fast.dtype).eps
    size = truth.double().norm()
    if zero or truth.numel() == 0:
        assert size < 1e-9, f"{name}: said to be zero, but its norm is {size:.3g}"
        assert fast.double().norm() < 100 * floor, f"{name}: zero, but computed with norm {fast.norm():.3g}"
        return
    assert size > 1e-7, f"{name}: the truth is zero, the test proves nothing"
    error, noise = (fast.double() - truth).norm(), (plain.double() - truth).norm()
    assert noise < 0.2 * size, f"{name}: plain torch is {noise / size:.3g} away from the definition"
    assert error <= 2 * noise + floor * size, (
        f"{name}: error {error / size:.3g}, plain torch {noise / size:.3g}"
    )


def assert_all_close_enough(
    fast: Mapping[str, Tensor | None],
    plain: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    zero: Collection[str] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """`assert_close_enough` on every entry; a gradient that should be None must be None."""
    assert fast.keys() == plain.keys() == truth.keys(), (fast.keys(), plain.keys(), truth.keys())
    for name, true in truth.items():
        ours, theirs = fast[name], plain[name]
        if true is None:
            assert ours is None, f"{name} is frozen but got a gradient"
        else:
            assert ours is not None and theirs is not None, f"{name} got no gradient"
            assert_close_enough(ours, theirs, true, name, dtype=dtype, zero=name in zero)


def activate(name: str, x: Tensor) -> Tensor:
    """The activations, from their formulas."""
    if name == "silu":
        return x / (1 + (-x).exp())
    if name == "gelu":
        return 0.5 * x * (1 + (x / math.sqrt(2)).erf())
    if name == "gelu_tanh":
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
    assert name == "relu", name
    return x * (x > 0)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """(up + 1) * gate / (1 + exp(-1.702 gate)), what is beyond the limit replaced by the limit."""
    gate = torch.where(gate > limit, limit, gate)
    up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    return (up + 1) * gate / (1 + (-1.702 * gate).exp())


def one_expert(
    x: Tensor, up: Tensor, down: Tensor, like: ExpertWeights, up_b: object, down_b: object
) -> Tensor:
    """Rows or one row through one expert."""
    hidden = x @ up.T
    if isinstance(up_b, Tensor):
        hidden = hidden + up_b
    if like.activation == "clamped_swiglu":
        gate, up_part = hidden.chunk(2, dim=-1)
        hidden = clamped_swiglu(gate, up_part, like.activation_limit)
    elif like.gated:
        gate, hidden = hidden.chunk(2, dim=-1)
        hidden = activate(like.activation, gate) * hidden
    else:
        hidden = activate(like.activation, hidden)
    y = hidden @ down.T
    return y + down_b if isinstance(down_b, Tensor) else y


def _per_expert(stack: Tensor | None, experts: int) -> tuple[object, ...]:
    return (None,) * experts if stack is None else stack.unbind(0)


def definition(x_TD: Tensor, chosen_TE: Tensor, weight_TE: Tensor, weights: ExpertWeights) -> Tensor:
    """y[token] = sum over its chosen experts, ascending, of weight * expert(x[token]); one token at a time."""
    experts = len(weights.down)
    up, down = weights.up.unbind(0), weights.down.unbind(0)
    up_b, down_b = _per_expert(weights.up_bias, experts), _per_expert(weights.down_bias, experts)
    rows = []
    for x_D, chosen_E, weight_E in zip(x_TD, chosen_TE.tolist(), weight_TE, strict=True):
        y_D = torch.zeros_like(x_D)
        for e, weight in enumerate(weight_E.unbind(0)):
            if chosen_E[e]:
                y_D = y_D + weight * one_expert(x_D, up[e], down[e], weights, up_b[e], down_b[e])
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD * 1


def plain(x_TD: Tensor, chosen_TE: Tensor, weight_TE: Tensor, weights: ExpertWeights) -> Tensor:
    """The same, one expert at a time, as anyone would write it in torch."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(weights.down)):
        rows = chosen_TE[:, e].nonzero().squeeze(1)
        up_b = None if weights.up_bias is None else weights.up_bias[e]
        down_b = None if weights.down_bias is None else weights.down_bias[e]
        y = one_expert(x_TD[rows], weights.up[e], weights.down[e], weights, up_b, down_b)
        y_TD = y_TD.index_add(0, rows, y * weight_TE[rows, e, None].to(y.dtype))
    return y_TD


def routing_of(chosen_TE: Tensor, weight_TE: Tensor) -> Routing:
    """A `Routing` with the chosen entries of a dense weight matrix, differentiable in the weights."""
    expert_N, token_N = chosen_TE.T.nonzero(as_tuple=True)
    tokens, experts = chosen_TE.shape
    return Routing.from_pairs(token_N, expert_N, weight_TE[token_N, expert_N], tokens=tokens, experts=experts)


def choose_at_random(tokens: int, experts: int, k: int, *, zipf: float = 0.0) -> Tensor:
    """k different experts per token, bool (T, E); `zipf` skews the choice to low numbers."""
    popularity_E = -zipf * torch.arange(1, experts + 1).double().log()
    gumbel_TE = -(-torch.rand(tokens, experts, dtype=torch.float64).clamp(1e-12).log()).log()
    expert_TK = (popularity_E + gumbel_TE).sort(dim=1, descending=True).indices[:, :k]
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, expert_TK, True)


def gradients(leaf: Mapping[str, Tensor], *, zeros: bool) -> dict[str, Tensor | None]:
    """The gradient of every leaf; with `zeros`, a leaf that nothing reached has a gradient of zeros and not None."""
    reached = {name: value.grad for name, value in leaf.items()}
    if zeros:
        for name, value in leaf.items():
            if value.requires_grad and value.grad is None:
                reached[name] = torch.zeros_like(value)
    return reached


@dataclass
class Problem:
    """Tokens, a choice with weights, experts, and a gradient that comes back; float64 until `solve` casts."""

    chosen_TE: Tensor
    d_model: int = 12
    d_ff: int = 10
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    activation_limit: float = 7.0
    values: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, experts = self.chosen_TE.shape
        rows = 2 * self.d_ff if self.gated else self.d_ff

        def normal(
            *shape: int, scale: float = 1.0
        ) -> Tensor:  # exact in bfloat16, so that every dtype sees the same
            return (torch.randn(shape, dtype=torch.float64) * scale).bfloat16().double()

        self.values = {
            "x": normal(tokens, self.d_model),
            "weight": torch.rand(tokens, experts).bfloat16().double() + 0.125,
            "up": normal(experts, rows, self.d_model, scale=self.d_model**-0.5),
            "down": normal(experts, self.d_model, self.d_ff, scale=self.d_ff**-0.5),
        }
        if self.bias:
            self.values |= {"up_bias": normal(experts, rows), "down_bias": normal(experts, self.d_model)}
        self.grad_TD = normal(tokens, self.d_model)

    def weights(self, leaf: Mapping[str, Tensor]) -> ExpertWeights:
        return ExpertWeights(
            up=leaf["up"],
            down=leaf["down"],
            up_bias=leaf.get("up_bias"),
            down_bias=leaf.get("down_bias"),
            activation=self.activation,
            gated=self.gated,
            activation_limit=self.activation_limit,
        )

    def solve(
        self, multiply: Multiply, dtype: torch.dtype, frozen: Collection[str] = ()
    ) -> dict[str, Tensor | None]:
        """Output and gradient of every input, by `multiply` in `dtype`; combine weights are never below float32."""
        wide = torch.promote_types(dtype, torch.float32)
        leaf = {
            name: value.to(wide if name == "weight" else dtype, copy=True).requires_grad_(name not in frozen)
            for name, value in self.values.items()
        }
        y_TD = multiply(leaf["x"], self.chosen_TE, leaf["weight"], self.weights(leaf))
        if y_TD.requires_grad:  # else no pair reached any input
            y_TD.backward(self.grad_TD.to(dtype))
        return {"output": y_TD.detach()} | gradients(leaf, zeros=multiply in (definition, plain))

    @cached_property
    def truth(self) -> dict[str, Tensor | None]:
        return self.solve(definition, torch.float64)

    def compare(
        self, multiply: Multiply, dtype: torch.dtype, frozen: Collection[str] = (), zero: Collection[str] = ()
    ) -> None:
        """Prove `multiply` in `dtype`."""
        truth = {name: None if name in frozen else value for name, value in self.truth.items()}
        fast, noisy = self.solve(multiply, dtype, frozen), self.solve(plain, dtype, frozen)
        assert_all_close_enough(fast, noisy, truth, zero, dtype)


# The layer


def _feed_forward(x: Tensor, value: Mapping[str, Tensor], like: ExpertWeights) -> Tensor:
    name = "shared.gate_up" if like.gated else "shared.up"
    biases = value.get(f"{name}_bias"), value.get("shared.down_bias")
    y = one_expert(x, value[name], value["shared.down"], like, *biases)
    gate = value.get("shared_gate.weight")
    return y if gate is None else y / (1 + (-(x @ gate.T)).exp())


def solve_layer(
    layer: MoE, x_TD: Tensor, grad_TD: Tensor, valid_T: Tensor | None = None, **more: Any
) -> dict[str, Tensor | None]:
    """What the layer itself gives: output, gradient of x, of the combine weights (T, E) and of every parameter."""
    layer.zero_grad(set_to_none=True)
    x_TD = x_TD.detach().clone().requires_grad_()
    y_TD, routing = layer(x_TD, valid=valid_T, **more)
    if routing.weight_N.requires_grad:
        routing.weight_N.retain_grad()
    y_TD.backward(grad_TD.to(y_TD.dtype))
    combine = torch.zeros(routing.tokens, routing.experts, dtype=routing.weight_N.dtype)
    if routing.weight_N.grad is not None:
        combine[routing.token_N, routing.expert_N] = routing.weight_N.grad
    got = {"output": y_TD.detach(), "x": x_TD.grad, "combine": combine}
    return got | {name: parameter.grad for name, parameter in layer.named_parameters()}


def define_logits(
    layer: MoE, x_TD: Tensor, leaf: Mapping[str, Tensor], luck: Luck, wide: torch.dtype
) -> Tensor:
    """x W^T + b, with what a layer in training adds to it."""
    x_TD = x_TD.to(wide)
    if "gate.weight" not in leaf:
        return torch.zeros(len(x_TD), layer.choices, dtype=wide)
    if layer.training and luck.factor_TD is not None:
        x_TD = x_TD * luck.factor_TD.to(wide)
    logits_TE = x_TD @ leaf["gate.weight"].to(wide).T
    if "gate.bias" in leaf:
        logits_TE = logits_TE + leaf["gate.bias"].to(wide)
    if layer.training and luck.normal_TE is not None:
        deviation_TE = (1 + (x_TD @ leaf["gate_noise.weight"].to(wide).T).exp()).log()
        logits_TE = logits_TE + luck.normal_TE.to(wide) * deviation_TE
    return logits_TE


def define_layer(
    layer: MoE,
    x_TD: Tensor,
    grad_TD: Tensor,
    valid_T: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    luck: Luck = NO_LUCK,
    decision: Decision | None = None,
) -> dict[str, Tensor | None]:
    """The same by the definition in float64, or, with a `dtype`, by plain torch in it.

    Args:
        layer: Read, never called.
        x_TD: Tokens.
        grad_TD: Gradient of the output.
        valid_T: False for padding.
        dtype: None is the definition.
        luck: What the layer draws.
        decision: The choice, where it is not to be defined.
    """
    slow, kind = dtype is None, dtype or torch.float64
    wide = torch.promote_types(kind, torch.float32)
    leaf = {n: p.detach().to(kind, copy=True).requires_grad_() for n, p in layer.named_parameters()}
    x_TD = x_TD.detach().to(kind, copy=True).requires_grad_()
    logits_TE = define_logits(layer, x_TD, leaf, luck, wide)
    bias_E = None if layer.selection_bias is None else layer.selection_bias.double()
    if decision is None:
        decision = choose(layer.router, logits_TE, bias_E, valid_T, luck, layer.training)
    chosen_TE = mask_of(decision.chosen, layer.choices)
    weight_TE = weigh(layer.router, logits_TE, decision, luck, layer.training)
    if weight_TE.requires_grad:
        weight_TE.retain_grad()
    name = layer.experts.up_name
    weights = replace(
        layer.experts.weights(kind),
        up=leaf[f"experts.{name}"],
        down=leaf["experts.down"],
        up_bias=leaf.get(f"experts.{name}_bias"),
        down_bias=leaf.get("experts.down_bias"),
    )
    real = len(weights.down)
    y_TD = (definition if slow else plain)(x_TD, chosen_TE[:, :real], weight_TE[:, :real], weights)
    for e in range(real, layer.choices):  # null experts
        if layer.null_kind == "identity":
            y_TD = y_TD + (weight_TE[:, e, None] * chosen_TE[:, e, None]).to(kind) * x_TD
    if layer.shared is not None:
        y_TD = y_TD + _feed_forward(x_TD, leaf, weights)
    if y_TD.requires_grad:  # else no pair reached any input
        y_TD.backward(grad_TD.to(kind))
    combine = torch.zeros_like(weight_TE) if weight_TE.grad is None else weight_TE.grad * chosen_TE
    got = {"output": y_TD.detach(), "combine": combine}
    return got | gradients({"x": x_TD} | leaf, zeros=True)


def compare_layer(
    layer: MoE, x_TD: Tensor, valid_T: Tensor | None = None, zero: Collection[str] = ()
) -> None:
    """Prove one layer on these tokens: output and all gradients, in x's dtype."""
    grad_TD = torch.randn(x_TD.shape).to(torch.bfloat16).to(x_TD.dtype)
    assert_all_close_enough(
        solve_layer(layer, x_TD, grad_TD, valid_T),
        define_layer(layer, x_TD, grad_TD, valid_T, x_TD.dtype),
        define_layer(layer, x_TD, grad_TD, valid_T),
        zero,
        x_TD.dtype,
    )


def saved_bytes(run: Callable[[], object], known: Collection[Tensor]) -> int:
    """Bytes of the distinct storages that `run` keeps for backward, those of `known` tensors left out."""
    storages: dict[int, int] = {}
    ours = {tensor.untyped_storage().data_ptr() for tensor in known}
    alive: list[Tensor] = []  # a freed address could be counted as one storage with the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(run())  # type: ignore[arg-type]
    return sum(storages.values())
