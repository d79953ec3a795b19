"""The layer: every router on every backend in every dtype, with all gradients; memory, autocast, padding, bad input."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from moiety import backends
from moiety.errors import ConfigError
from moiety.moe.layer import MoE, MoEOutput
from moiety.moe.routers import SigmoidTopK, Switch, TopK
from tests import oracle
from tests.oracle import DTYPES, compare_layer

EXPERTS = 8
LAYERS: dict[str, dict[str, Any]] = {
    "topk": {"router": TopK(2)},
    "topk_1": {"router": TopK(1)},
    "topk_all": {"router": TopK(EXPERTS)},
    "topk_plain": {"router": TopK(3, renormalize=False)},
    "topk_groups": {"router": TopK(3, renormalize=False, groups=4, groups_kept=2, scale=4.0)},
    "switch": {"router": Switch()},
    "sigmoid": {"router": SigmoidTopK(2)},
    "sigmoid_groups": {"router": SigmoidTopK(3, groups=4, groups_kept=2, scale=2.5)},
    "biases": {"router": TopK(2), "bias": True, "router_bias": True},
    "gelu": {"router": TopK(2), "gated": False, "activation": "gelu", "bias": True},
    "shared": {"router": TopK(2), "shared_d_ff": 12},
    "shared_relu": {"router": TopK(2), "shared_d_ff": 12, "gated": False, "activation": "relu"},
    "shared_bias": {"router": TopK(2), "shared_d_ff": 12, "shared_gate": True, "shared_bias": True},
    "shared_bias_gelu": {
        "router": TopK(2),
        "shared_d_ff": 12,
        "shared_bias": True,
        "gated": False,
        "activation": "gelu",
    },
    "shared_gated": {"router": TopK(2), "shared_d_ff": 20, "shared_gate": True},
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_backend = pytest.mark.parametrize("backend", tuple(backends.BACKENDS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
NO_GRADIENT = {"topk_1": ("gate.weight",)}  # one weight divided by itself


def build(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> MoE:
    """A layer whose numbers are exact in bfloat16, biases and selection bias not zero."""
    layer = MoE(**{"d_model": 16, "d_ff": 8, "experts": EXPERTS} | LAYERS[name] | changes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.4).bfloat16())
        if layer.selection_bias is not None:
            layer.selection_bias.normal_(std=0.2)
    return layer.to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).bfloat16().to(dtype)


@functools.cache
def case(
    name: str, d_model: int, d_ff: int, rows: int
) -> tuple[MoE, Tensor, Tensor, dict[str, Tensor | None]]:
    """A layer, tokens and a gradient in float64, and the truth about them."""
    torch.manual_seed(0)
    layer = build(name, d_model=d_model, d_ff=d_ff, dtype=torch.float64)
    x_TD, grad_TD = (tokens(rows, d_model, dtype=torch.float64) for _ in range(2))
    return layer, x_TD, grad_TD, oracle.define_layer(layer, x_TD, grad_TD)


@pytest.mark.parametrize("shape", [(16, 8, 45), (13, 9, 31)], ids=["aligned", "odd"])
@every_layer
@every_dtype
@every_backend
def test_output_and_every_gradient(
    backend: str, dtype: torch.dtype, name: str, shape: tuple[int, int, int]
) -> None:
    source, x_TD, grad_TD, truth = case(name, *shape)
    layer = build(name, d_model=shape[0], d_ff=shape[1], backend=backend, dtype=dtype)
    layer.load_state_dict(source.state_dict())
    x_TD, grad_TD = x_TD.to(dtype), grad_TD.to(dtype)
    fast = oracle.solve_layer(layer, x_TD, grad_TD)
    plain = oracle.define_layer(layer, x_TD, grad_TD, dtype=dtype)
    oracle.assert_all_close_enough(fast, plain, truth, NO_GRADIENT.get(name, ()), dtype)


@every_layer
@every_backend
def test_padding_in_the_definition(backend: str, name: str) -> None:
    for dtype in DTYPES:
        layer = build(name, backend=backend, dtype=dtype)
        compare_layer(layer, tokens(20, 16, dtype=dtype), torch.rand(20) > 0.4, NO_GRADIENT.get(name, ()))


@pytest.mark.parametrize("rows", [0, 1, 2])
@every_layer
@every_backend
def test_few_tokens(backend: str, name: str, rows: int) -> None:
    layer = build(name, backend=backend, dtype=torch.float64)
    zero = NO_GRADIENT.get(name, ())
    if not rows:
        zero = ("output", "x", "combine", *dict(layer.named_parameters()))
    compare_layer(layer, tokens(rows, 16, dtype=torch.float64), zero=zero)


@every_backend
def test_padding_only(backend: str) -> None:
    layer = build("biases", backend=backend)
    x_TD = tokens(5, 16)
    got = oracle.solve_layer(layer, x_TD, torch.ones(5, 16), torch.zeros(5, dtype=torch.bool))
    assert all(value is not None and not value.any() for value in got.values()), got.keys()


@pytest.mark.parametrize("frozen", ["experts", "gate", "x"])
@every_backend
def test_frozen_parts(backend: str, frozen: str) -> None:
    layer, twin = build("biases", backend=backend), build("biases", backend=backend)
    twin.load_state_dict(layer.state_dict())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x_TD = tokens(30, 16).requires_grad_(frozen != "x")
    x_twin_TD = x_TD.detach().clone().requires_grad_()
    layer(x_TD).output.square().sum().backward()
    twin(x_twin_TD).output.square().sum().backward()
    pairs = [("x", x_TD.grad, x_twin_TD.grad)]
    pairs += [
        (n, p.grad, q.grad) for (n, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True)
    ]
    for name, ours, theirs in pairs:
        assert theirs is not None and bool(theirs.any())
        if name.startswith(frozen):
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["topk", "sigmoid", "switch"])
def test_memory_kept_for_backward(name: str, dtype: torch.dtype) -> None:
    """x, the pre-activation, and what is of the routing's size: a few (T, E) and a few (N,)."""
    rows, d_model, d_ff = 64, 128, 96
    layer = build(name, d_model=d_model, d_ff=d_ff, backend="grouped", dtype=dtype)
    x_TD = tokens(rows, d_model, dtype=dtype).requires_grad_()
    kept = oracle.saved_bytes(lambda: layer(x_TD), [x_TD, *layer.parameters()])
    pairs = rows * (1 if name == "switch" else 2)
    pre_activation = pairs * 2 * d_ff * dtype.itemsize
    routing_sized = 3 * rows * EXPERTS * 4 + 10 * pairs * 8 + 4 * EXPERTS * 8
    assert pre_activation < kept <= pre_activation + routing_sized, (kept, pre_activation, routing_sized)


def test_memory_kept_under_autocast_is_that_of_bfloat16() -> None:
    layer, x_TD = build("topk", d_model=128, d_ff=96, backend="grouped"), tokens(64, 128).requires_grad_()

    def run() -> MoEOutput:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output: MoEOutput = layer(x_TD)
        return output

    kept = oracle.saved_bytes(run, [x_TD, *layer.parameters()])
    weights = 2 * sum(p.numel() for p in layer.experts.parameters())
    x_and_pre = 2 * (64 * 128 + 128 * 2 * 96)
    assert kept <= weights + x_and_pre + 3 * 64 * EXPERTS * 4 + 128 * 80 + 256, (kept, weights, x_and_pre)


# Autocast


@every_layer
@every_backend
def test_autocast_gives_bfloat16_near_float32(backend: str, name: str) -> None:
    layer = build(name, backend=backend)
    x = tokens(3, 11, 16).requires_grad_()
    exact = layer(x)
    grad = torch.randn_like(x)
    exact_grads = torch.autograd.grad(exact.output, [x, *layer.parameters()], grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, routing = layer(x)
    grads = torch.autograd.grad(output, [x, *layer.parameters()], grad.bfloat16())
    assert output.dtype == torch.bfloat16 and routing.weight_N.dtype == torch.float32
    assert routing.logits_TE is not None and exact.routing.logits_TE is not None
    torch.testing.assert_close(routing.logits_TE, exact.routing.logits_TE, rtol=1e-5, atol=1e-5)
    assert torch.equal(routing.token_N, exact.routing.token_N)

    def distance(ours: Tensor, true: Tensor) -> float:
        return float((ours.detach().float() - true.detach()).norm() / true.detach().norm().clamp(min=1e-6))

    assert distance(output, exact.output) < 0.02
    for (parameter, _), ours, true in zip(
        [("x", x), *layer.named_parameters()], grads, exact_grads, strict=True
    ):
        if parameter in NO_GRADIENT.get(name, ()):
            assert ours.norm() < 1e-3 * exact_grads[0].norm()
        else:
            assert ours.dtype == torch.float32 and distance(ours, true) < 0.06, (
                parameter,
                distance(ours, true),
            )


def test_backward_inside_autocast_is_the_same() -> None:
    layer, x = build("biases"), tokens(33, 16)

    def grads(inside: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cost = layer(x).output.float().square().sum()
            if inside:
                return list(torch.autograd.grad(cost, list(layer.parameters())))
        return list(torch.autograd.grad(cost, list(layer.parameters())))

    for ours, true in zip(grads(True), grads(False), strict=True):
        assert torch.equal(ours, true), (ours - true).norm() / true.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_is_float32_in_a_layer_of_less(dtype: torch.dtype) -> None:
    layer, x_TD = build("topk", dtype=dtype), tokens(50, 16, dtype=dtype)
    routing = layer.route(x_TD)
    assert routing.logits_TE is not None and routing.logits_TE.dtype == torch.float32
    torch.testing.assert_close(
        routing.logits_TE, x_TD.float() @ layer.gate.weight.float().T, rtol=1e-6, atol=1e-6
    )
    assert layer(x_TD).output.dtype == dtype


# The interface


def test_a_drop_in_for_a_feed_forward() -> None:
    layer = MoE(d_model=16, d_ff=8, experts=4, router=TopK(2))
    for shape in ((16,), (3, 16), (2, 5, 16), (2, 3, 4, 16), (0, 16), (2, 0, 16)):
        output, routing = layer(torch.randn(shape))
        assert output.shape == shape and routing.experts == 4
        assert routing.pairs == 2 * routing.tokens == 2 * torch.Size(shape[:-1]).numel()
    assert layer.gate_up.shape == (4, 16, 16) and layer.down.shape == (4, 16, 8)
    assert layer.gate_up is layer.experts.gate_up and layer.down is layer.experts.down
    expected = {"gate.weight", "experts.gate_up", "experts.down"}
    assert set(dict(layer.named_parameters())) == expected == set(layer.state_dict())


def test_strided_tokens() -> None:
    layer = build("topk", backend="grouped")
    wide = tokens(4, 6, 32)
    for view in (wide[..., :16], wide[:, ::2, 16:], tokens(16, 6, 4).permute(2, 1, 0)):
        assert not view.is_contiguous()
        assert torch.equal(layer(view).output, layer(view.contiguous()).output)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"d_model": 0}, "d_model is 0"),
        ({"d_ff": -1}, "d_ff is -1"),
        ({"experts": 0}, "experts is 0"),
        ({"router": TopK(9)}, "k is 9"),
        ({"shared_gate": True}, "shared_gate"),
        ({"activation": "swish"}, "swish"),
        ({"backend": "fast"}, "fast"),
        ({"shared_d_ff": -3}, "shared_d_ff"),
    ],
    ids=str,
)
def test_bad_sizes_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build("topk", **changes)


@pytest.mark.parametrize("shape", [(5, 15), (5, 17), (16, 5)], ids=str)
def test_tokens_of_another_width_fail(shape: tuple[int, int]) -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        build("topk")(torch.randn(shape))


@pytest.mark.parametrize("rows, experts", [(7, 8), (5, 8), (6, 4), (6, 9)], ids=str)
def test_a_pinned_routing_of_another_batch_or_layer_fails(rows: int, experts: int) -> None:
    pinned = build("topk", experts=experts).route(tokens(rows, 16)).pinned()
    with pytest.raises((AssertionError, ConfigError)):
        build("topk")(tokens(6, 16), pinned=pinned)


def test_saved_state_gives_the_same_layer() -> None:
    layer, twin = build("sigmoid_groups"), build("sigmoid_groups")
    x = tokens(2, 9, 16)
    assert not torch.equal(layer(x).output, twin(x).output)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x).output, twin(x).output)
