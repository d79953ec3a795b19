"""Feed-forwards, stacked and dense: shapes, start values, what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moiety.backends.weights import ExpertWeights
from moiety.errors import ConfigError
from moiety.moe.experts import Experts, FeedForward, expert_seconds
from moiety.routing import Routing
from tests import oracle

KINDS = pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
GATED = pytest.mark.parametrize("gated", [False, True])


@GATED
@pytest.mark.parametrize("bias", [False, True])
def test_names_and_shapes(gated: bool, bias: bool) -> None:
    experts = Experts(6, 5, 4, gated=gated, bias=bias)
    up, rows = ("gate_up", 10) if gated else ("up", 5)
    expected = {up: (4, rows, 6), "down": (4, 6, 5)}
    if bias:
        expected |= {f"{up}_bias": (4, rows), "down_bias": (4, 6)}
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == expected
    weights = experts.weights(torch.bfloat16)
    assert weights.up.dtype == weights.down.dtype == torch.bfloat16
    assert weights.d_ff == 5 and weights.gated == gated and (weights.up_bias is not None) == bias


@GATED
def test_start_values(gated: bool) -> None:
    experts = Experts(64, 32, 4, gated=gated, bias=True)
    feed_forward = FeedForward(64, 32, gated=gated)
    named = [*experts.named_parameters(), *feed_forward.named_parameters()]
    assert len(named) == 6
    for name, parameter in named:
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            bound = parameter.shape[-1] ** -0.5
            assert 0.98 * bound < parameter.abs().max() <= bound and abs(parameter.mean()) < bound / 20
    before = feed_forward.down.clone()
    feed_forward.reset_parameters()
    assert not torch.equal(before, feed_forward.down)


def test_refusals() -> None:
    for build in (
        lambda: Experts(4, 4, 2, activation="swish"),
        lambda: FeedForward(4, 4, activation="swish"),
        lambda: Experts(4, 4, 2, backend="fast"),
    ):
        with pytest.raises(ConfigError, match=r"swish|fast") as caught:
            build()
        assert "there are" in str(caught.value)


@KINDS
@GATED
def test_feed_forward_is_one_expert(activation: str, gated: bool) -> None:
    """Dense, by formula, in every dtype; values and gradients; 1, 2 and 3 dimensions."""
    module = FeedForward(12, 10, activation=activation, gated=gated, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    for shape in ((12,), (0, 12), (5, 12), (2, 20, 12)):
        x = torch.randn(shape).bfloat16().double()
        grad = torch.randn(shape).bfloat16().double()

        def formula(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
            like = ExpertWeights(up=up, down=down, activation=activation, gated=gated)
            return oracle.one_expert(x, up, down, like, None, None)

        def solve(
            dtype: torch.dtype, fast: bool, x: Tensor = x, grad: Tensor = grad
        ) -> dict[str, Tensor | None]:
            here = FeedForward(12, 10, activation=activation, gated=gated, dtype=dtype)
            here.load_state_dict(module.state_dict())
            up, down = here.get_parameter(here.up_name), here.down
            leaf = x.to(dtype, copy=True).requires_grad_()
            y = here(leaf) if fast else formula(leaf, up, down)
            assert y.shape == x.shape and y.dtype == dtype
            y.backward(grad.to(dtype))
            return {"output": y.detach(), "x": leaf.grad, "up": up.grad, "down": down.grad}

        truth = solve(torch.float64, False)
        zero = () if x.numel() else tuple(truth)
        for dtype in oracle.DTYPES:
            oracle.assert_all_close_enough(solve(dtype, True), solve(dtype, False), truth, zero, dtype)


def test_stacked_experts_cast_to_the_dtype_of_the_tokens_and_train_the_parameters() -> None:
    experts = Experts(8, 6, 3)
    routing = Routing.from_choices(torch.tensor([[0, 1], [1, 2], [0, 2]]), experts=3)
    y_TD = experts(torch.randn(3, 8, dtype=torch.bfloat16), routing)
    assert y_TD.dtype == torch.bfloat16
    y_TD.sum().backward()
    assert experts.down.grad is not None and experts.down.grad.dtype == torch.float32
    assert bool(experts.down.grad.any())


def test_weights_of_one_dtype_are_not_copied() -> None:
    experts = Experts(8, 6, 3)
    assert experts.weights(torch.float32).up.data_ptr() == experts.get_parameter("gate_up").data_ptr()


def test_every_expert_is_timed() -> None:
    layer = Experts(16, 8, 3)
    seconds_E = expert_seconds(layer, rows=4, repeats=3)
    assert seconds_E.shape == (3,) and bool((seconds_E > 0).all()) and bool((seconds_E < 1).all())
