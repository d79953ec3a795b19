"""Every built-in router in a layer, on every backend: no router has a slow path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moiety import backends
from moiety.errors import ConfigError
from moiety.moe.capacity import QUEUE, Capacity
from moiety.moe.layer import MoE
from moiety.moe.routers import (
    Base,
    NoisyTopK,
    Router,
    SigmoidTopK,
    Switch,
    TopK,
)
from moiety.routing import Routing
from tests import oracle, router_oracle
from tests.moe.zoo import EXPERTS, OVERFLOWS, SEED, WIDTH, ZOO, decision_of, layer_of, refuses, tokens_of
from tests.router_oracle import Luck, luck_of

every_router = pytest.mark.parametrize("name", ZOO)
both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
every_backend = pytest.mark.parametrize("backend", tuple(backends.BACKENDS))

# Noise and jitter, which the layer adds


def test_noise_is_softplus_of_a_second_projection_times_a_normal() -> None:
    layer, x_TD = layer_of(NoisyTopK(2)), tokens_of(30, WIDTH)
    assert layer.gate is not None and layer.gate_noise is not None
    luck = luck_of(layer.router, 30, EXPERTS, seed=4)
    assert luck.normal_TE is not None
    routing = layer.route(x_TD, seed=4)
    clean_TE = x_TD @ layer.gate.weight.T
    deviation_TE = (1 + (x_TD @ layer.gate_noise.weight.T).exp()).log()
    assert routing.noise is not None and routing.logits_TE is not None
    torch.testing.assert_close(routing.noise.clean_TE, clean_TE)
    torch.testing.assert_close(routing.noise.deviation_TE, deviation_TE)
    torch.testing.assert_close(routing.logits_TE, clean_TE + luck.normal_TE * deviation_TE)
    assert layer.eval().route(x_TD).noise is None
    torch.testing.assert_close(layer.route(x_TD).logits_TE, clean_TE)
    fresh = MoE(d_model=4, d_ff=4, experts=3, router=NoisyTopK(1))
    assert fresh.gate_noise is not None and not bool(fresh.gate_noise.weight.any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_jitter_multiplies_the_input_by_numbers_near_one(dtype: torch.dtype) -> None:
    """Of one-hot tokens through a gate of ones the logits are the factors, in float32 even below it."""
    layer = MoE(d_model=64, d_ff=4, experts=2, router=Switch(jitter=0.01), dtype=dtype)
    assert layer.gate is not None
    torch.nn.init.ones_(layer.gate.weight)
    logits_TE = layer.route(torch.eye(64, dtype=dtype)).logits_TE
    assert logits_TE is not None and logits_TE.dtype == torch.promote_types(dtype, torch.float32)
    factor_T = logits_TE[:, 0].detach()
    assert 0.99 <= float(factor_T.min()) < 0.993 and 1.007 < float(factor_T.max()) <= 1.01
    assert len(factor_T.unique()) == 64
    assert bool((layer.eval().route(torch.eye(64, dtype=dtype)).logits_TE == 1).all())


@pytest.mark.parametrize("policy", OVERFLOWS)
@every_router
def test_pinned_with_every_overflow_policy(name: str, policy: str) -> None:
    router = ZOO[name]
    if refuses(router, policy):
        with pytest.raises(ConfigError, match=f"SparseMixer.*{policy}.*\nhint"):
            layer_of(router, capacity=Capacity(policy=policy))
        return
    layer = layer_of(router, capacity=Capacity(factor=0.7, policy=policy), dtype=torch.float32)
    x_TD, token_id_T = tokens_of(50, WIDTH, dtype=torch.float32), torch.randint(99, (50,))
    routing = layer.route(x_TD, token_id_T=token_id_T, seed=8)
    again = layer.route(x_TD, pinned=routing.pinned(), token_id_T=token_id_T, seed=8)
    assert torch.equal(routing.dense(), again.dense()) and torch.equal(routing.token_N, again.token_N)
    changed = int(routing.counts_E.max()) <= capacity_limit(layer, routing) or policy in (QUEUE, "dense")
    assert changed and routing.pairs > 0


def capacity_limit(layer: MoE, routing: Routing) -> int:
    assert layer.capacity is not None
    limit = layer.capacity.limit(routing, layer.training)
    assert limit is not None
    return limit


# The whole layer, on every backend: no router has a slow path

NO_GRADIENT = {"hash": ("combine",)}
SETUPS = {"float64": torch.float64, "float32": torch.float32, "autocast": torch.bfloat16}


def solve(
    layer: MoE, x_TD: Tensor, grad_TD: Tensor, luck: Luck, valid_T: Tensor | None, autocast: bool
) -> dict[str, Tensor | None]:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return oracle.solve_layer(layer, x_TD, grad_TD, valid_T, token_ids=luck.token_id_T, seed=SEED)


@pytest.mark.parametrize("setup", SETUPS)
@every_backend
@both_modes
@every_router
def test_output_and_every_gradient(name: str, training: bool, backend: str, setup: str) -> None:
    router, dtype, tokens = ZOO[name], SETUPS[setup], 37
    own = torch.float32 if setup == "autocast" else dtype
    layer = layer_of(router, backend=backend, dtype=own).train(training)
    if layer.gate_noise is not None:
        layer.gate_noise.requires_grad_(training)
    x_TD, grad_TD = tokens_of(tokens, WIDTH, dtype=own), tokens_of(tokens, WIDTH, dtype=own)
    valid_T, token_id_T = torch.rand(tokens) > 0.2, torch.randint(99, (tokens,))
    luck = luck_of(router, tokens, EXPERTS, seed=SEED, dtype=own, width=WIDTH, token_id_T=token_id_T)
    fast = solve(layer, x_TD, grad_TD, luck, valid_T, setup == "autocast")
    decision = None
    if isinstance(router, Base) and training:
        decision = decision_of(layer.route(x_TD, valid_T=valid_T))
    plain = oracle.define_layer(layer, x_TD, grad_TD, valid_T, dtype, luck=luck, decision=decision)
    truth = oracle.define_layer(layer, x_TD, grad_TD, valid_T, luck=luck, decision=decision)
    if layer.gate_noise is not None and not training:
        truth["gate_noise.weight"] = None
    plain = {
        key: value if value is None or fast[key] is None else value.to(fast[key].dtype)
        for key, value in plain.items()
    }
    oracle.assert_all_close_enough(fast, plain, truth, NO_GRADIENT.get(name, ()), dtype)


@every_backend
@pytest.mark.parametrize("kind", ["identity", "zero"])
@pytest.mark.parametrize("router", [TopK(3), SigmoidTopK(3)], ids=["softmax", "sigmoid"])
def test_null_experts(router: Router, kind: str, backend: str) -> None:
    """Three choices beyond the seven experts multiply nothing and answer x, or nothing."""
    layer = layer_of(router, experts=7, null_experts=3, null_kind=kind, backend=backend)
    assert layer.down.shape[0] == 7 and layer.gate is not None and layer.gate.weight.shape[0] == EXPERTS
    x_TD, valid_T = tokens_of(40, WIDTH), torch.rand(40) > 0.2
    assert int(layer.route(x_TD).counts_E[7:].sum()) > 10
    oracle.compare_layer(layer, x_TD, valid_T)
    other = layer_of(router, experts=7, null_experts=3, null_kind="zero", backend=backend)
    other.load_state_dict(layer.state_dict())
    difference = (layer(x_TD).output - other(x_TD).output).detach()
    assert bool(difference.any()) == (kind == "identity")


@every_backend
def test_all_null_is_x_or_nothing(backend: str) -> None:
    layer = layer_of(TopK(2, bias=True), experts=4, null_experts=2, backend=backend)
    assert layer.selection_bias is not None
    layer.selection_bias.copy_(torch.tensor([0.0] * 4 + [9.0] * 2))
    x_TD = tokens_of(11, WIDTH)
    torch.testing.assert_close(layer(x_TD).output, x_TD)
    layer.null_kind = "zero"
    assert not bool(layer(x_TD).output.any())


@every_backend
@pytest.mark.parametrize("router", [SigmoidTopK(1, renormalize=False, bias=False), TopK(3)], ids=str)
def test_weighed_input(router: Router, backend: str) -> None:
    """y = sum of expert(weight * x), as in Llama 4; the router learns through the expert."""
    layer = layer_of(router, weigh_input=True, backend=backend, bias=True)
    x_TD, grad_TD = tokens_of(25, WIDTH), tokens_of(25, WIDTH)
    got = oracle.solve_layer(layer, x_TD, grad_TD)
    leaf = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    x_TD = x_TD.clone().requires_grad_()
    chosen_TE, weight_TE = router_oracle.route(router, x_TD @ leaf["gate.weight"].T)
    weight_TE.retain_grad()
    names = ("experts.gate_up", "experts.down", "experts.gate_up_bias", "experts.down_bias")
    like = layer.experts.weights(torch.float64)
    rows = []
    for t, row in enumerate(chosen_TE.tolist()):
        parts = [torch.zeros(WIDTH, dtype=torch.float64)]
        for e in (e for e, chosen in enumerate(row) if chosen):
            up, down, up_b, down_b = (leaf[name][e] for name in names)
            parts.append(oracle.one_expert(weight_TE[t, e] * x_TD[t], up, down, like, up_b, down_b))
        rows.append(torch.stack(parts).sum(0))
    y_TD = torch.stack(rows)
    y_TD.backward(grad_TD)
    assert weight_TE.grad is not None
    truth = {"output": y_TD.detach(), "x": x_TD.grad, "combine": weight_TE.grad * chosen_TE}
    truth |= {name: value.grad for name, value in leaf.items()}
    oracle.assert_all_close_enough(got, truth, truth)


@every_backend
@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_a_queue_is_dropless(factor: float, backend: str) -> None:
    queued = layer_of(TopK(2), capacity=Capacity(factor=factor, policy=QUEUE), backend=backend)
    plain = layer_of(TopK(2), backend=backend)
    plain.load_state_dict(queued.state_dict())
    x_TD, grad_TD = tokens_of(50, WIDTH), tokens_of(50, WIDTH)
    routing = queued.route(x_TD)
    assert int(routing.counts_E.max()) > capacity_limit(queued, routing) and routing.pairs == 100
    ours, theirs = (oracle.solve_layer(layer, x_TD, grad_TD) for layer in (queued, plain))
    oracle.assert_all_close_enough(ours, theirs, theirs)
