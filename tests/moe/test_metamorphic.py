"""What must not matter, and what must be equal: relations between runs of one layer, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moiety import backends
from moiety.moe.experts import FeedForward
from moiety.moe.layer import MoE
from moiety.moe.routers import Router, SigmoidTopK, Switch, TopK

EXACT = {"rtol": 1e-11, "atol": 1e-12}
ROUTERS: dict[str, Router] = {
    "topk": TopK(2),
    "plain": TopK(3, renormalize=False),
    "switch": Switch(),
    "sigmoid": SigmoidTopK(2, groups=3, groups_kept=2),
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
every_backend = pytest.mark.parametrize("backend", tuple(backends.BACKENDS))


def build(
    backend: str, router: Router, experts: int = 6, dtype: torch.dtype = torch.float64, **more: Any
) -> MoE:
    sizes = {"d_model": 16, "d_ff": 8} | more
    layer = MoE(experts=experts, router=router, backend=backend, dtype=dtype, **sizes)
    with torch.no_grad():
        layer.gate.weight.normal_()
        if layer.selection_bias is not None:
            layer.selection_bias.normal_(std=0.2)
    return layer


def twin(layer: MoE, state: dict[str, Tensor], backend: str, router: Router) -> MoE:
    """A layer with as many experts as `state` has."""
    other = build(backend, router, experts=len(state["gate.weight"]), dtype=layer.gate.weight.dtype)
    other.load_state_dict(state)
    return other


@every_router
@every_backend
def test_permuting_tokens_permutes_the_output(backend: str, router: Router) -> None:
    layer, x_TD, order_T = (
        build(backend, router),
        torch.randn(40, 16, dtype=torch.float64),
        torch.randperm(40),
    )
    output, routing = layer(x_TD)
    permuted, permuted_routing = layer(x_TD[order_T])
    torch.testing.assert_close(permuted, output[order_T], **EXACT)
    torch.testing.assert_close(permuted_routing.dense(), routing.dense()[order_T], **EXACT)
    assert not torch.allclose(permuted, output)


@pytest.mark.parametrize("router", [ROUTERS[name] for name in ("topk", "plain", "switch")], ids=str)
@every_backend
def test_permuting_experts_changes_nothing(backend: str, router: Router) -> None:
    layer, x_TD, order_E = build(backend, router), torch.randn(40, 16, dtype=torch.float64), torch.randperm(6)
    assert order_E.tolist() != list(range(6))
    other = twin(layer, {name: value[order_E] for name, value in layer.state_dict().items()}, backend, router)
    output, routing = layer(x_TD)
    permuted, permuted_routing = other(x_TD)
    torch.testing.assert_close(permuted, output, **EXACT)
    torch.testing.assert_close(permuted_routing.dense(), routing.dense()[:, order_E], **EXACT)
    gate_only = {n: v[order_E] if n == "gate.weight" else v for n, v in layer.state_dict().items()}
    assert not torch.allclose(twin(layer, gate_only, backend, router)(x_TD).output, output)


@every_backend
def test_permuting_whole_groups_changes_nothing(backend: str) -> None:
    router = ROUTERS["sigmoid"]
    layer, x_TD = build(backend, router), torch.randn(40, 16, dtype=torch.float64)
    order_E = torch.tensor([4, 5, 1, 0, 2, 3])
    other = twin(layer, {name: value[order_E] for name, value in layer.state_dict().items()}, backend, router)
    torch.testing.assert_close(other(x_TD).output, layer(x_TD).output, **EXACT)


@every_backend
def test_a_duplicated_expert_shares_its_work(backend: str) -> None:
    """With every expert used, expert 2 twice weighs like a gate logit raised by ln 2.

    Softmax over E+1 logits, two of them equal: the pair together has the weight of one expert whose
    probability was doubled before normalizing, which is what adding ln 2 to its logit does.
    """
    layer = build(backend, TopK(6), router_bias=True)
    state = layer.state_dict()
    doubled = {name: torch.cat([value, value[2:3]]) for name, value in state.items()}
    other = build(backend, TopK(7), experts=7, router_bias=True)
    other.load_state_dict(doubled)
    x_TD = torch.randn(30, 16, dtype=torch.float64)
    plain = layer(x_TD).output
    with torch.no_grad():
        layer.gate.bias[2] += torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(other(x_TD).output, layer(x_TD).output, **EXACT)
    assert not torch.allclose(other(x_TD).output, plain)


@every_backend
def test_two_copies_chosen_together_are_one_expert(backend: str) -> None:
    """Renormalized top-2 where the two best are copies: each weighs one half, the output is that expert's."""
    layer = build(backend, TopK(1), experts=5)
    state = {name: torch.cat([value, value]) for name, value in layer.state_dict().items()}
    x_TD = torch.randn(30, 16, dtype=torch.float64)
    output, routing = twin(layer, state, backend, TopK(2))(x_TD)
    torch.testing.assert_close(output, layer(x_TD).output, **EXACT)
    torch.testing.assert_close(routing.weight_N, torch.full_like(routing.weight_N, 0.5), **EXACT)


@pytest.mark.parametrize(
    "router", [TopK(1), Switch(), TopK(1, renormalize=False), SigmoidTopK(1, group_best=1)], ids=str
)
@every_backend
def test_one_expert_is_the_dense_feed_forward(backend: str, router: Router) -> None:
    layer = build(backend, router, experts=1)
    dense = FeedForward(16, 8, dtype=torch.float64)
    dense.load_state_dict({"gate_up": layer.gate_up[0], "down": layer.down[0]})
    x = torch.randn(2, 25, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x).output, dense(x), **EXACT)


@pytest.mark.parametrize("renormalize", [False, True])
@every_backend
def test_all_experts_are_the_dense_mixture(backend: str, renormalize: bool) -> None:
    layer, x_TD = build(backend, TopK(6, renormalize=renormalize)), torch.randn(30, 16, dtype=torch.float64)
    up_TEF = torch.einsum("td,efd->tef", x_TD, layer.gate_up)
    hidden_TEF = torch.nn.functional.silu(up_TEF[..., :8]) * up_TEF[..., 8:]
    weight_TE = (x_TD @ layer.gate.weight.T).softmax(1)
    expected_TD = torch.einsum("te,tef,edf->td", weight_TE, hidden_TEF, layer.down)
    torch.testing.assert_close(layer(x_TD).output, expected_TD, **EXACT)


@pytest.mark.parametrize(
    "cuts", [[20, 20], [1, 39], [0, 13, 27], [1] * 40], ids=["half", "one", "none", "single"]
)
@every_router
@every_backend
def test_micro_batches(backend: str, router: Router, cuts: list[int]) -> None:
    """Outputs, and the sum of the parameter gradients, do not depend on how the batch is cut."""
    layer, x_TD = build(backend, router), torch.randn(40, 16, dtype=torch.float64)
    grad_TD = torch.randn_like(x_TD)
    parameters = list(layer.parameters())
    whole = layer(x_TD).output
    whole_grads = torch.autograd.grad(whole, parameters, grad_TD)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    parts = []
    for x, grad in zip(x_TD.split(cuts), grad_TD.split(cuts), strict=True):
        parts.append(layer(x).output)
        for total, part in zip(sums, torch.autograd.grad(parts[-1], parameters, grad), strict=True):
            total.add_(part)
    torch.testing.assert_close(torch.cat(parts), whole, **EXACT)
    for total, expected in zip(sums, whole_grads, strict=True):
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_backend
def test_a_token_does_not_depend_on_its_batch(backend: str, dtype: torch.dtype) -> None:
    """Up to rounding: product sizes differ, so bits may."""
    layer, x_TD = build(backend, TopK(2), dtype=dtype), torch.randn(300, 16).to(dtype)
    whole = layer(x_TD)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 40), slice(0, 299)):
        part = layer(x_TD[rows])
        assert torch.equal(part.routing.dense() > 0, whole.routing.dense()[rows] > 0)
        error = (part.output.double() - whole.output[rows].double()).norm() / whole.output[
            rows
        ].double().norm()
        assert error < 4 * torch.finfo(dtype).eps, error


@every_router
@every_backend
def test_padding_does_not_touch_real_tokens(backend: str, router: Router) -> None:
    layer, valid = build(backend, router), torch.rand(4, 10) > 0.3
    x = torch.randn(4, 10, 16, dtype=torch.float64)
    output, routing = layer(x, valid=valid)
    torch.testing.assert_close(output[valid], layer(x[valid]).output, **EXACT)
    assert not output[~valid].any() and routing.pairs == layer(x[valid]).routing.pairs
    wild = torch.where(valid[..., None], x, 1e6 * torch.randn_like(x))
    torch.testing.assert_close(layer(wild, valid=valid).output[valid], output[valid], **EXACT)


@every_backend
def test_garbage_in_padding_stays_there(backend: str) -> None:
    """Attention over an all-masked row can be NaN; neither real outputs nor the experts' gradients may be."""
    layer, valid = build(backend, TopK(2)), torch.tensor([True, True, False, True])
    x = torch.randn(4, 16, dtype=torch.float64)
    x[2] = float("nan")
    output = layer(x, valid=valid).output
    torch.testing.assert_close(output[valid], layer(x[valid]).output, **EXACT)
    output[valid].sum().backward()
    for parameter in layer.experts.parameters():
        assert (
            parameter.grad is not None
            and bool(parameter.grad.isfinite().all())
            and bool(parameter.grad.any())
        )


@pytest.mark.parametrize("gate", [False, True])
@every_backend
def test_a_shared_expert_is_added(backend: str, gate: bool) -> None:
    layer = build(backend, TopK(2), shared_d_ff=12, shared_gate=gate)
    x_TD = torch.randn(30, 16, dtype=torch.float64)
    assert layer.shared is not None
    shared_TD = layer.shared(x_TD)
    if gate:
        assert layer.shared_gate is not None
        shared_TD = shared_TD / (1 + (-(x_TD @ layer.shared_gate.weight.T)).exp())
    routed = {name: value for name, value in layer.state_dict().items() if not name.startswith("shared")}
    routed_TD = twin(layer, routed, backend, TopK(2))(x_TD).output
    torch.testing.assert_close(layer(x_TD).output, routed_TD + shared_TD, **EXACT)
    assert shared_TD.norm() > 0.01 * routed_TD.norm()


@every_router
@every_backend
def test_a_pinned_routing_repeats_bit_for_bit(backend: str, router: Router) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, x_TD = build(backend, router, dtype=dtype), torch.randn(50, 16).to(dtype)
        output, routing = layer(x_TD)
        again, routing_again = layer(x_TD, pinned=routing.pinned())
        assert torch.equal(again, output) and torch.equal(routing_again.weight_N, routing.weight_N)


@every_router
@every_backend
def test_a_pinned_choice_survives_near_ties(backend: str, router: Router) -> None:
    """All experts nearly tie; a perturbation flips free choices, pinned ones stay and their weights hardly move."""
    layer, x_TD = build(backend, router, dtype=torch.float32), torch.randn(60, 16)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.randn(16).expand(6, 16) + 1e-6 * torch.randn(6, 16))
        if layer.selection_bias is not None:
            layer.selection_bias.zero_()
    first = layer(x_TD)
    with torch.no_grad():
        layer.gate.weight += 1e-5 * torch.randn(6, 16)
    free, pinned = layer(x_TD), layer(x_TD, pinned=first.routing.pinned())
    assert not torch.equal(free.routing.dense() > 0, first.routing.dense() > 0)
    assert torch.equal(pinned.routing.token_N, first.routing.token_N)
    assert torch.equal(pinned.routing.counts_E, first.routing.counts_E)
    torch.testing.assert_close(pinned.routing.weight_N, first.routing.weight_N, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(pinned.output, first.output, rtol=5e-3, atol=1e-3)
    (grad,) = torch.autograd.grad(pinned.output.square().sum(), layer.gate.weight)
    assert bool(grad.any())


@every_backend
def test_pinned_keeps_padding(backend: str) -> None:
    layer, x_TD = build(backend, TopK(2)), torch.randn(9, 16, dtype=torch.float64)
    valid_T = torch.arange(9) % 3 != 0
    first = layer(x_TD, valid=valid_T)
    again = layer(x_TD, pinned=first.routing.pinned())
    assert torch.equal(first.output, again.output)
    assert again.routing.valid_T is not None and torch.equal(again.routing.valid_T, valid_T)


def test_backends_agree() -> None:
    """Bit for bit they need not; to rounding they must, over a whole layer and its gradients."""
    layers = [build(backend, TopK(2)) for backend in backends.BACKENDS]
    x_TD = torch.randn(60, 16, dtype=torch.float64)
    results = []
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        output = layer(x_TD).output
        results.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    for result in results[1:]:
        for ours, theirs in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
