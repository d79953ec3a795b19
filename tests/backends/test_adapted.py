"""Low-rank additions to frozen experts against dense matrices that hold them: output and every gradient."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moiety.backends import adapted, cpu, grouped, reference
from moiety.backends.adapted import AdaptedWeights, Lora, merged
from moiety.backends.matmul import multiply_into, multiply_rows
from moiety.backends.unpacked import Unpacked
from moiety.backends.weights import CLAMPED, ExpertWeights, Matrices
from moiety.formats import FORMATS
from moiety.formats.tiles import pack, unpack
from moiety.routing import Routing
from tests.oracle import assert_all_close_enough

D, F, R = 12, 10, 3
Tensors = dict[str, Tensor | None]


def lora(experts: int, rows: int, columns: int, spans: tuple[tuple[int, int], ...], shared: bool) -> Lora:
    covered = sum(stop - start for start, stop in spans)
    return Lora(
        torch.randn(1 if shared else experts, len(spans) * R, columns, dtype=torch.float64),
        torch.randn(experts, covered, R, dtype=torch.float64) * 0.3,
        0.7,
        spans,
    )


def problem(experts: int, **options: Any) -> AdaptedWeights:
    gated = options.get("gated", True)
    rows = 2 * F if gated else F
    spans = options.pop("spans", ((0, rows),))
    shared = options.pop("shared", False)
    biases = options.pop("biases", False)
    return AdaptedWeights(
        up=torch.randn(experts, rows, D, dtype=torch.float64) * D**-0.5,
        down=torch.randn(experts, D, F, dtype=torch.float64) * F**-0.5,
        up_bias=torch.randn(experts, rows, dtype=torch.float64) if biases else None,
        down_bias=torch.randn(experts, D, dtype=torch.float64) if biases else None,
        up_lora=lora(experts, rows, D, spans, shared),
        down_lora=lora(experts, D, F, ((0, D),), shared),
        **options,
    )


def routed(tokens: int, experts: int, k: int, used: list[int] | None = None) -> Routing:
    scores = torch.rand(tokens, experts)
    if used is not None:
        scores[:, used] += 2
    chosen = scores.topk(k, dim=1).indices.sort(dim=1).values if k else torch.empty(tokens, 0).long()
    return Routing.from_choices(chosen, torch.rand(tokens, k, dtype=torch.float64), experts=experts)


def run(weights: AdaptedWeights, routing: Routing, x_TD: Tensor, dtype: torch.dtype, by: str) -> Tensors:
    """Output and gradients; `by` is "adapted", or "dense": additions put into the matrices, then `reference`."""

    def leaf(one: Tensor) -> Tensor:
        return one.detach().to(dtype).requires_grad_()

    def cast(one: Matrices | Tensor | None) -> Any:
        return one.to(dtype) if isinstance(one, Tensor) else one

    def factors(one: Lora | None) -> Lora | None:
        return None if one is None else one._replace(a=leaf(one.a), b=leaf(one.b))

    up, down = factors(weights.up_lora), factors(weights.down_lora)
    mine = replace(
        weights,
        up=cast(weights.up),
        down=cast(weights.down),
        up_bias=cast(weights.up_bias),
        down_bias=cast(weights.down_bias),
        up_lora=up,
        down_lora=down,
    )
    x, weight_N = leaf(x_TD), leaf(routing.weight_N)
    pairs = routing.with_weights(weight_N)
    if by == "adapted":
        y = adapted.expert_mlp(x, pairs, mine)
    else:
        y = reference.expert_mlp(x, pairs, merged(mine, dtype))
    leaves = {"x": x, "weight": weight_N}
    for name, one in (("up", up), ("down", down)):
        leaves |= {} if one is None else {f"{name}_a": one.a, f"{name}_b": one.b}
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)).sum().backward()
    return {"output": y.detach(), **{name: one.grad for name, one in leaves.items()}}


CASES: dict[str, tuple[tuple[int, int, int, list[int] | None], dict[str, Any]]] = {
    "odd": ((29, 7, 3, None), {}),
    "idle_experts": ((17, 5, 2, [0, 3]), {}),
    "one_token": ((1, 6, 3, None), {}),
    "one_expert_of_many": ((150, 6, 1, [4]), {}),
    "all_experts": ((19, 6, 6, None), {}),
    "one_expert": ((80, 1, 1, None), {}),
    "shared_a": ((29, 7, 3, None), {"shared": True}),
    "gate_and_up_apart": ((29, 7, 3, None), {"spans": ((0, F), (F, 2 * F))}),
    "up_rows_alone": ((29, 7, 2, None), {"spans": ((F, 2 * F),)}),
    "biases": ((29, 7, 3, None), {"biases": True}),
    "clamped": ((29, 5, 2, None), {"biases": True, "activation": CLAMPED}),
    "ungated": ((29, 5, 2, None), {"gated": False, "activation": "relu"}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_dense_matrices(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    sizes, options = CASES[case]
    weights, routing = problem(sizes[1], **options), routed(*sizes)
    x_TD = torch.randn(sizes[0], D, dtype=torch.float64)
    truth = run(weights, routing, x_TD, torch.float64, "dense")
    plain = run(weights, routing, x_TD, dtype, "dense")
    fast = run(weights, routing, x_TD, dtype, "adapted")
    assert_all_close_enough(fast, plain, truth, dtype=dtype)


@pytest.mark.parametrize("width", [D // 2, D])
def test_widths_at_which_a_transposed_matrix_fits(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.backends.test_adapted.F", width)
    torch.manual_seed(width)
    weights, routing, x_TD = problem(5), routed(23, 5, 2), torch.randn(23, D, dtype=torch.float64)
    assert weights.d_ff == width and weights.up.shape[1] == 2 * width
    found, truth = (run(weights, routing, x_TD, torch.float64, by) for by in ("adapted", "dense"))
    for name, true in truth.items():
        torch.testing.assert_close(found[name], true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("k", range(1, 6))
def test_any_number_of_experts_for_a_token(k: int) -> None:
    torch.manual_seed(k)
    weights, routing, x_TD = problem(5), routed(9, 5, k), torch.randn(9, D, dtype=torch.float64)
    found, truth = (run(weights, routing, x_TD, torch.float64, by) for by in ("adapted", "dense"))
    for name, true in truth.items():
        torch.testing.assert_close(found[name], true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spans", [((0, 15),), ((0, 4), (9, 15)), ((0, 5), (5, 9), (9, 15)), ((3, 8),)])
@pytest.mark.parametrize("rows", [0, 1, 37, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_linear_with_its_adapter(dtype: torch.dtype, rows: int, spans: tuple[tuple[int, int], ...]) -> None:
    """Against one matrix W + scale B A: output, and gradients of x, A and B, from a gradient cut out of more."""
    torch.manual_seed(1)
    added, weight_FD = lora(1, 15, D, spans, shared=False), torch.randn(15, D, dtype=torch.float64)
    bias_F, x_ND = torch.randn(15, dtype=torch.float64), torch.randn(rows, D, dtype=torch.float64)
    grad_NF = torch.randn(rows, 40, dtype=torch.float64)[:, 7:22]

    def found(dtype: torch.dtype, dense: bool) -> Tensors:
        x, a, b = (one.to(dtype).requires_grad_() for one in (x_ND.clone(), added.a.clone(), added.b.clone()))
        mine, weight, bias = added._replace(a=a, b=b), weight_FD.to(dtype), bias_F.to(dtype)
        if dense:
            y = torch.nn.functional.linear(x, (weight + mine.dense(15)[0]).to(dtype), bias)
        else:
            y = adapted.linear(x, weight[None], mine, bias)
        y.backward(grad_NF.to(dtype))
        return {"output": y.detach(), "x": x.grad, "a": a.grad, "b": b.grad}

    truth, plain, fast = found(torch.float64, True), found(dtype, True), found(dtype, False)
    zero = ("output", "x", "a", "b") if not rows else ()
    assert_all_close_enough(fast, plain, truth, zero, dtype=dtype)


def test_products_with_columns_cut_out_of_more() -> None:
    """As attention's parts of one projection give them; rows enough for every library."""
    torch.manual_seed(0)
    whole_NF, low_NR = torch.randn(300, 96), torch.randn(300, 24)
    grad_NF, x_NR, weight_FD = whole_NF[:, 32:64], low_NR[:, 8:16], torch.randn(64, 48)[:, 16:48]
    out_FR = torch.empty(32, 8)
    multiply_into(out_FR, grad_NF, x_NR)
    torch.testing.assert_close(out_FR.double(), grad_NF.double().t() @ x_NR.double(), rtol=1e-5, atol=1e-4)
    y_NF = multiply_rows(grad_NF, weight_FD)
    torch.testing.assert_close(y_NF.double(), grad_NF.double() @ weight_FD.double().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 4])
def test_without_pairs_everything_is_zero(tokens: int) -> None:
    weights, x_TD = problem(4), torch.randn(tokens, D, dtype=torch.float64)
    for name, value in run(weights, routed(tokens, 4, 0), x_TD, torch.float64, "adapted").items():
        assert value is not None and not value.any(), name


@pytest.mark.parametrize(
    "form", ["int4-g32", "int4-g32-asym", "int8-g32", "int8", "nf4-g64", "mxfp4", "fp8", "bf16"]
)
@pytest.mark.parametrize("adapts", [True, False])
def test_packed_matrices_are_those_that_their_tiles_mean(form: str, adapts: bool) -> None:
    torch.manual_seed(5)
    plain = problem(5, biases=True)
    assert isinstance(plain.up, Tensor) and isinstance(plain.down, Tensor)
    up, down = pack(plain.up, FORMATS[form], interleaved=True), pack(plain.down, FORMATS[form])
    none = {} if adapts else {"up_lora": None, "down_lora": None}
    meant: Any = replace(plain, up=unpack(up).double(), down=unpack(down).double(), **none)
    packed: Any = replace(
        meant,
        up=Unpacked(cpu.Matrix(up), torch.float64),
        down=Unpacked(cpu.Matrix(down), torch.float64),
    )
    routing, x_TD = routed(40, 5, 2), torch.randn(40, D, dtype=torch.float64)
    truth = run(meant, routing, x_TD, torch.float64, "dense")
    for name, value in run(packed, routing, x_TD, torch.float64, "adapted").items():
        torch.testing.assert_close(value, truth[name], rtol=1e-6, atol=1e-6)


def test_a_planted_bug_is_seen() -> None:
    """What the comparison would say if the scale were forgotten in a gradient, or B were transposed."""
    torch.manual_seed(3)
    weights, routing = problem(5), routed(29, 5, 2)
    x_TD = torch.randn(29, D, dtype=torch.float64)
    truth, found = (run(weights, routing, x_TD, torch.float64, by) for by in ("dense", "adapted"))
    for name in ("x", "up_a", "up_b", "down_a", "down_b", "weight"):
        one = found[name]
        assert one is not None
        with pytest.raises(AssertionError):
            assert_all_close_enough({name: one * 1.001}, {name: truth[name]}, {name: truth[name]})


@pytest.mark.parametrize("kind", ["experts", "packed experts", "a linear", "plain experts"])
def test_a_recomputed_block_keeps_nothing_that_was_made_for_the_call(kind: str) -> None:
    """What is cast for a step, factors and matrices, is gone after it; a node of the graph must not hold it."""
    torch.manual_seed(0)
    weights, routing = problem(4), routed(9, 4, 2)
    x_TD = torch.randn(9, D, requires_grad=True)
    assert weights.up_lora is not None and weights.down_lora is not None
    factors = (*weights.up_lora[:2], *weights.down_lora[:2])
    masters = [one.float().requires_grad_() for one in factors]
    stacks = [torch.randn(one.shape) for one in (weights.up, weights.down)]
    packed = [cpu.Matrix(pack(one, FORMATS["int8-g32"])) for one in stacks]
    made: list[weakref.ref[Tensor]] = []

    def cast(one: Tensor) -> Tensor:
        made.append(weakref.ref(narrow := one.to(torch.bfloat16)))
        return narrow

    def call(x_TD: Tensor) -> Tensor:
        x_TD, factors = x_TD.to(torch.bfloat16), [cast(one) for one in masters]
        loras = Lora(*factors[:2], 0.7, ((0, 2 * F),)), Lora(*factors[2:], 0.7, ((0, D),))
        if kind == "a linear":
            one = Lora(loras[0].a[:1], loras[0].b[:1], 0.7, ((0, 2 * F),))
            return adapted.linear(x_TD, cast(stacks[0])[:1], one)
        if kind == "packed experts":
            up, down = (Unpacked(one, torch.bfloat16) for one in packed)
            return adapted.expert_mlp(
                x_TD, routing, AdaptedWeights(up=up, down=down, up_lora=loras[0], down_lora=loras[1])
            )
        up, down = (cast(one) for one in stacks)
        if kind == "plain experts":
            return grouped.expert_mlp(x_TD, routing, ExpertWeights(up=up, down=down))
        return adapted.expert_mlp(
            x_TD, routing, AdaptedWeights(up=up, down=down, up_lora=loras[0], down_lora=loras[1])
        )

    def gradients(y_TD: Tensor) -> list[Tensor]:
        trained = {"plain experts": 0, "a linear": 2}.get(kind, 4)
        leaves = [x_TD, *masters[:trained]]
        found = torch.autograd.grad(y_TD.float().square().sum(), leaves)
        return list(found)

    expected = gradients(call(x_TD))
    made.clear()
    y_TD = checkpoint(call, x_TD, use_reentrant=False)
    assert made and all(one() is None for one in made)
    for ours, true in zip(gradients(y_TD), expected, strict=True):
        assert torch.equal(ours, true)
