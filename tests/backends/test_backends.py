"""Every backend, every dtype: output and all gradients against the definition, at the sizes that break kernels."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety import backends
from moiety.backends import grouped, matmul, reference
from moiety.backends.weights import ACTIVATIONS, CLAMPED, ExpertWeights
from moiety.errors import ConfigError
from moiety.moe.experts import Experts
from moiety.routing import Routing
from tests import oracle
from tests.oracle import DTYPES, Multiply, Problem, choose_at_random, routing_of

BACKENDS = tuple(backends.BACKENDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def by(backend: str) -> Multiply:
    """A backend as the oracle calls one."""

    def multiply(x_TD: Tensor, chosen_TE: Tensor, weight_TE: Tensor, weights: ExpertWeights) -> Tensor:
        return backends.get(backend).expert_mlp(x_TD, routing_of(chosen_TE, weight_TE), weights)

    return multiply


def only(tokens: int, experts: int, *used: int) -> Tensor:
    """Every token to exactly these experts."""
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    chosen_TE[:, list(used)] = True
    return chosen_TE


@dataclass(frozen=True)
class Case:
    """A shape and how it is routed."""

    tokens: int
    experts: int
    k: int
    d_model: int = 12
    d_ff: int = 10
    zipf: float = 0.0
    used: tuple[int, ...] = ()
    zero: tuple[str, ...] = ()

    def chosen(self) -> Tensor:
        if self.used:
            return only(self.tokens, self.experts, *self.used)
        return choose_at_random(self.tokens, self.experts, self.k, zipf=self.zipf)


NOTHING = ("output", "x", "weight", "up", "down")
CASES = {
    "odd": Case(29, 7, 3, d_model=13, d_ff=9),
    "aligned": Case(32, 8, 2, d_model=16, d_ff=24),
    "width_1": Case(11, 3, 2, d_model=1, d_ff=1),
    "idle_expert": Case(17, 5, 2, used=(0, 3)),
    "one_token": Case(1, 6, 3, d_model=48, d_ff=40),
    "no_tokens": Case(0, 4, 2, zero=NOTHING),
    "no_pairs": Case(5, 4, 0, zero=NOTHING),
    "one_expert_of_many": Case(23, 6, 1, used=(4,)),
    "last_expert": Case(23, 6, 1, used=(5,)),
    "square_gate_up": Case(21, 5, 2, d_model=16, d_ff=8),
    "square_down": Case(21, 5, 2, d_model=16, d_ff=16),
    "all_experts": Case(19, 6, 6),
    "one_expert": Case(19, 1, 1),
    "skewed": Case(120, 11, 2, d_model=16, d_ff=8, zipf=1.5),
    "many_rows": Case(540, 2, 1, d_model=16, d_ff=8),
    "many_rows_odd": Case(300, 2, 2, d_model=15, d_ff=7),
    "many_experts": Case(60, 48, 2, d_model=16, d_ff=8),
    "mixed": Case(420, 24, 2, d_model=16, d_ff=8, zipf=1.5),
}


@functools.cache
def problem_of(case: Case) -> Problem:
    """The same numbers for every backend and dtype, so that the definition runs once."""
    torch.manual_seed(0)
    return Problem(case.chosen(), d_model=case.d_model, d_ff=case.d_ff)


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
@every_dtype
@every_backend
def test_output_and_every_gradient(backend: str, dtype: torch.dtype, case: Case) -> None:
    problem_of(case).compare(by(backend), dtype, zero=case.zero)


@pytest.mark.parametrize("k", range(1, 6))
def test_every_k(k: int) -> None:
    problem = Problem(choose_at_random(24, 5, k), d_model=16, d_ff=8, bias=True)
    for dtype, backend in itertools.product(DTYPES, BACKENDS):
        problem.compare(by(backend), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("d_model, d_ff", [(16, 8), (10, 7)], ids=["grouped_products", "single_products"])
def test_every_kind_of_expert(d_model: int, d_ff: int, activation: str, gated: bool, bias: bool) -> None:
    chosen_TE = choose_at_random(24, 6, 2)
    chosen_TE[:, 2] = False
    problem = Problem(chosen_TE, d_model=d_model, d_ff=d_ff, activation=activation, gated=gated, bias=bias)
    for dtype, backend in itertools.product(DTYPES, BACKENDS):
        problem.compare(by(backend), dtype)


@pytest.mark.parametrize("limit", [0.75, 7.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d_model, d_ff", [(16, 8), (10, 7)], ids=["grouped_products", "single_products"])
def test_gate_and_up_clamped_together(d_model: int, d_ff: int, bias: bool, limit: float) -> None:
    chosen_TE = choose_at_random(40, 6, 2)
    chosen_TE[:, 2] = False
    problem = Problem(
        chosen_TE, d_model=d_model, d_ff=d_ff, activation=CLAMPED, bias=bias, activation_limit=limit
    )
    pre = problem.values["x"] @ problem.values["up"].transpose(1, 2)
    gate, up = pre.chunk(2, dim=-1)
    beyond = [bool((part > limit).any()) for part in (gate, -gate, up, -up)]
    assert beyond == [limit < 1] * 4, "the small limit must be met on every side"
    for dtype, backend in itertools.product(DTYPES, BACKENDS):
        problem.compare(by(backend), dtype)


def test_clamping_needs_a_gate() -> None:
    with pytest.raises(ConfigError, match=r"clamped_swiglu is of gate and up together[\s\S]*hint: set gated"):
        Experts(4, 6, 2, activation=CLAMPED, gated=False)
    with pytest.raises(ConfigError, match="no activation 'clamped'"):
        Experts(4, 6, 2, activation="clamped")


def test_the_oracle_knows_every_activation() -> None:
    assert set(ACTIVATIONS) == set(oracle.ACTIVATIONS)


@pytest.mark.parametrize(
    "frozen",
    [
        ("up", "down", "up_bias", "down_bias"),
        ("x",),
        ("weight",),
        ("x", "weight"),
        ("up",),
        ("down",),
        ("up_bias", "weight"),
        ("x", "weight", "up", "down", "up_bias"),
    ],
    ids="-".join,
)
def test_frozen_parts_get_no_gradient_and_the_rest_the_right_one(frozen: tuple[str, ...]) -> None:
    problem = Problem(choose_at_random(21, 5, 2), d_model=16, d_ff=8, bias=True)
    for dtype, backend in itertools.product(DTYPES, BACKENDS):
        problem.compare(by(backend), dtype, frozen)


@every_backend
def test_no_gradient_wanted(backend: str) -> None:
    problem = Problem(choose_at_random(9, 3, 2))
    leaf = problem.values
    y_TD = by(backend)(leaf["x"], problem.chosen_TE, leaf["weight"], problem.weights(leaf))
    assert not y_TD.requires_grad
    oracle.assert_close_enough(
        y_TD, y_TD, oracle.definition(leaf["x"], problem.chosen_TE, leaf["weight"], problem.weights(leaf))
    )


@every_backend
def test_strided_inputs_and_strided_incoming_gradient(backend: str) -> None:
    def strided(x_TD: Tensor, chosen_TE: Tensor, weight_TE: Tensor, weights: ExpertWeights) -> Tensor:
        wide_TD = torch.cat([x_TD, torch.full_like(x_TD, 7.0)], dim=1)
        views = (
            x_TD.t().contiguous().t(),
            wide_TD[:, : x_TD.shape[1]],
            x_TD.repeat_interleave(2, dim=0)[::2],
        )
        assert not any(view.is_contiguous() for view in views)
        ys = [by(backend)(view, chosen_TE, weight_TE, weights) for view in views]
        # the transposes hand back a transposed gradient
        return sum((y.t().contiguous().t() for y in ys[1:]), ys[0].t().contiguous().t()) / 3

    problem = Problem(choose_at_random(30, 5, 2), d_model=16, d_ff=8, bias=True)
    for dtype in DTYPES:
        problem.compare(strided, dtype)


@every_backend
def test_transposed_weights(backend: str) -> None:
    def strided(x_TD: Tensor, chosen_TE: Tensor, weight_TE: Tensor, weights: ExpertWeights) -> Tensor:
        turned = ExpertWeights(
            up=weights.up.transpose(1, 2).contiguous().transpose(1, 2),
            down=weights.down.transpose(1, 2).contiguous().transpose(1, 2),
        )
        return by(backend)(x_TD, chosen_TE, weight_TE, turned)

    for case in (CASES["aligned"], CASES["many_rows"]):
        for dtype in DTYPES:
            problem_of(case).compare(strided, dtype)


@every_backend
def test_one_gradient_for_all_rows(backend: str) -> None:
    """The gradient of a sum is an expanded scalar: stride 0."""
    problem = Problem(choose_at_random(30, 5, 2), d_model=16, d_ff=8)
    problem.grad_TD = torch.ones((), dtype=torch.float64).expand(30, 16)
    problem.compare(by(backend), torch.float64)


@given(data=st.data(), tokens=st.integers(0, 40), experts=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=30)
@every_backend
def test_any_shape(backend: str, data: Any, tokens: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, experts))
    problem = Problem(
        choose_at_random(tokens, experts, k, zipf=data.draw(st.sampled_from([0.0, 2.0]))),
        d_model=data.draw(st.integers(1, 9)),
        d_ff=data.draw(st.integers(1, 9)),
        activation=data.draw(st.sampled_from(["silu", "gelu"])),
        gated=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )
    problem.compare(
        by(backend), torch.float64, zero=problem.solve(oracle.plain, torch.float64) if not tokens else ()
    )


@given(data=st.data(), tokens=st.integers(1, 30), experts=st.integers(1, 7))
@settings(max_examples=20)
@every_backend
def test_any_choice(backend: str, data: Any, tokens: int, experts: int) -> None:
    """Not k per token but any pairs at all: dropped, expert choice, top-p."""
    row = st.lists(st.booleans(), min_size=experts, max_size=experts)
    chosen_TE = torch.tensor(data.draw(st.lists(row, min_size=tokens, max_size=tokens)))
    torch.manual_seed(tokens)
    problem = Problem(chosen_TE, d_model=8, d_ff=4, bias=True)
    nothing = () if chosen_TE.any() else tuple(problem.solve(oracle.plain, torch.float64))
    problem.compare(by(backend), torch.float64, zero=nothing)


@pytest.mark.parametrize("gated", [False, True])
@every_backend
def test_gradcheck(backend: str, gated: bool) -> None:
    problem = Problem(choose_at_random(4, 3, 2), d_model=3, d_ff=2, gated=gated, bias=True)
    names = list(problem.values)

    def run(*values: Tensor) -> Tensor:
        leaf = dict(zip(names, values, strict=True))
        return by(backend)(leaf["x"], problem.chosen_TE, leaf["weight"], problem.weights(leaf))

    inputs = [value.clone().requires_grad_() for value in problem.values.values()]
    assert torch.autograd.gradcheck(run, inputs)


@every_dtype
@every_backend
def test_same_bits_every_time(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(choose_at_random(200, 9, 3, zipf=1.0), d_model=16, d_ff=8, bias=True)
    once, again = problem.solve(by(backend), dtype), problem.solve(by(backend), dtype)
    assert all(torch.equal(once[name], again[name]) for name in once)  # type: ignore[arg-type]


# What the grouped backend does inside


def chunks_of(case: Case, dtype: torch.dtype) -> list[grouped.Chunk]:
    chosen_TE = problem_of(case).chosen_TE
    routing = routing_of(chosen_TE, chosen_TE.float())
    return grouped._chunks(routing.slices, dtype, (2 * case.d_ff, case.d_model, case.d_ff), False)


@pytest.mark.parametrize("onednn", [False, True])
def test_the_cases_above_take_every_path(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    monkeypatch.setattr(grouped, "prefers_onednn", lambda: onednn)
    monkeypatch.setattr(grouped, "has_products", lambda dtype: True)

    def experts_per_chunk(name: str, dtype: torch.dtype) -> list[int]:
        return [chunk.expert_stop - chunk.expert for chunk in chunks_of(CASES[name], dtype)]

    assert experts_per_chunk("many_rows", torch.float32) == [1, 1]
    assert experts_per_chunk("many_rows_odd", torch.bfloat16) == [1, 1]
    assert experts_per_chunk("odd", torch.float32) == [1] * 7
    assert experts_per_chunk("aligned", torch.float64) == [1] * 8
    assert max(experts_per_chunk("many_experts", torch.float32)) > 40
    assert experts_per_chunk("aligned", torch.bfloat16) == [8]
    mixed = experts_per_chunk("mixed", torch.float32)
    assert 1 in mixed and max(mixed) > 1, mixed


@every_case
@every_dtype
def test_chunks_cover_every_row_once(case: Case, dtype: torch.dtype) -> None:
    chunks = chunks_of(case, dtype)
    row = expert = 0
    for chunk in chunks:
        assert chunk.row == row < chunk.row_stop and expert <= chunk.expert < chunk.expert_stop
        row, expert = chunk.row_stop, chunk.expert_stop
    assert row == int(problem_of(case).chosen_TE.sum())


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("name", ["many_rows", "many_rows_odd", "mixed", "many_experts"])
def test_on_either_kind_of_processor(monkeypatch: pytest.MonkeyPatch, name: str, onednn: bool) -> None:
    if onednn:
        assert torch.backends.mkldnn.is_available()
    monkeypatch.setattr(grouped, "prefers_onednn", lambda: onednn)
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: onednn)
    problem_of(CASES[name]).compare(by("grouped"), torch.float32)


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 1 << 30])
def test_result_does_not_depend_on_the_size_of_chunks(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(grouped, "CHUNK_BYTES", chunk_bytes)
    for dtype in (torch.float32, torch.bfloat16):
        problem_of(CASES["many_experts"]).compare(by("grouped"), dtype)


@every_dtype
@pytest.mark.parametrize("gated", [False, True])
def test_grouped_keeps_only_x_and_the_pre_activation(dtype: torch.dtype, gated: bool) -> None:
    chosen_TE = choose_at_random(64, 6, 2)
    problem = Problem(chosen_TE, d_model=32, d_ff=24, gated=gated)
    leaf = {name: value.to(dtype).requires_grad_() for name, value in problem.values.items()}
    weight_N = torch.rand(128).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    routing = routing_of(chosen_TE, chosen_TE.float()).with_weights(weight_N)
    weights = problem.weights(leaf)

    def run() -> Tensor:
        return backends.get("grouped").expert_mlp(leaf["x"], routing, weights)

    pre_activation = 128 * (48 if gated else 24) * dtype.itemsize
    kept = oracle.saved_bytes(run, [leaf["x"], leaf["up"], leaf["down"], weight_N])
    assert kept == pre_activation, (kept, pre_activation)


# grouped_linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "counts", [(3, 0, 5, 1), (0, 0, 0), (300, 2, 0), (7,), (0, 0, 40), (64, 32, 33)], ids=str
)
@every_dtype
@every_backend
def test_grouped_linear(backend: str, dtype: torch.dtype, counts: tuple[int, ...], bias: bool) -> None:
    rows, experts, d_in, d_out = sum(counts), len(counts), 12, 7
    counts_E = torch.tensor(counts)
    grad_NF = torch.randn(rows, d_out).bfloat16().double()
    values = {
        "x": torch.randn(rows, d_in).bfloat16().double(),
        "weight": torch.randn(experts, d_out, d_in).bfloat16().double(),
    }
    if bias:
        values["bias"] = torch.randn(experts, d_out).bfloat16().double()

    def row_by_row(
        x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor, bias_EF: Tensor | None = None
    ) -> Tensor:
        if not len(x_ND):
            return x_ND @ weight_EFD[0].T
        pairs = zip(x_ND, [e for e, count in enumerate(counts) for _ in range(count)], strict=True)
        return torch.stack([weight_EFD[e] @ x + (0 if bias_EF is None else bias_EF[e]) for x, e in pairs])

    def plain(x_ND: Tensor, weight_EFD: Tensor, counts_E: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        parts = [x @ weight_EFD[e].T for e, x in enumerate(x_ND.split(list(counts)))]
        if bias_EF is not None:
            parts = [part + bias_EF[e] for e, part in enumerate(parts)]
        return torch.cat(parts)

    def solve(multiply: Any, kind: torch.dtype) -> dict[str, Tensor | None]:
        leaf = {name: value.to(kind, copy=True).requires_grad_() for name, value in values.items()}
        y_NF = multiply(leaf["x"], leaf["weight"], counts_E, leaf.get("bias"))
        y_NF.backward(grad_NF.to(kind))
        zeros = {name: torch.zeros_like(value) for name, value in leaf.items()}
        return {"output": y_NF.detach()} | {
            n: zeros[n] if v.grad is None else v.grad for n, v in leaf.items()
        }

    oracle.assert_all_close_enough(
        solve(backends.get(backend).grouped_linear, dtype),
        solve(plain, dtype),
        solve(row_by_row, torch.float64),
        zero=() if rows else ("output", *values),
    )


@every_backend
def test_grouped_linear_gradcheck(backend: str) -> None:
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (4, 2, 3), (4, 2))
    ]
    counts_E = torch.tensor([2, 0, 1, 2])

    def run(x_ND: Tensor, weight_EFD: Tensor, bias_EF: Tensor) -> Tensor:
        return backends.get(backend).grouped_linear(x_ND, weight_EFD, counts_E, bias_EF)

    assert torch.autograd.gradcheck(run, inputs)


@every_backend
def test_grouped_linear_refuses_counts_that_do_not_fit(backend: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        backends.get(backend).grouped_linear(torch.randn(5, 3), torch.randn(2, 4, 3), torch.tensor([2, 2]))


# Choosing


def test_choose_says_why(caplog: pytest.LogCaptureFixture) -> None:
    backends.choose.cache_clear()
    cpu = torch.device("cpu")
    with caplog.at_level("INFO", logger="moiety"):
        for _ in range(3):
            assert backends.choose("auto", cpu, torch.bfloat16).name in backends.BACKENDS
    assert len(caplog.records) == 1 and "bfloat16" in caplog.text
    assert backends.choose("reference", cpu, torch.float32).name == "reference"
    assert backends.get("reference") is reference
    assert "float64" in backends.choose("auto", cpu, torch.float64).reason
    for call in (lambda: backends.get("cuda"), lambda: backends.choose("fast", cpu, torch.float32)):
        with pytest.raises(ConfigError, match="reference"):
            call()


# The bar itself


def test_the_bar_fails_what_it_should() -> None:
    truth = torch.randn(50, dtype=torch.float64)
    for dtype in DTYPES:
        plain = truth.to(dtype)
        oracle.assert_close_enough(plain, plain, truth)
        for wrong in (
            torch.zeros_like(plain),
            -plain,
            plain * (1 + 8 * torch.finfo(dtype).eps + 1e-11),
            plain.flip(0),
        ):
            with pytest.raises(AssertionError, match="error"):
                oracle.assert_close_enough(wrong, plain, truth)
        with pytest.raises(AssertionError, match="not finite"):
            oracle.assert_close_enough(plain / 0, plain, truth)
        with pytest.raises(AssertionError, match="proves nothing"):
            oracle.assert_close_enough(plain * 0, plain * 0, truth * 0)
        with pytest.raises(AssertionError, match="said to be zero"):
            oracle.assert_close_enough(plain, plain, truth, zero=True)
    with pytest.raises(AssertionError, match="plain torch is"):
        oracle.assert_close_enough(truth, truth * 0, truth)
    with pytest.raises(AssertionError, match="frozen"):
        oracle.assert_all_close_enough({"a": truth}, {"a": None}, {"a": None})
    with pytest.raises(AssertionError, match="no gradient"):
        oracle.assert_all_close_enough({"a": None}, {"a": truth}, {"a": truth})


def test_a_backend_of_zeros_fails() -> None:
    problem = Problem(choose_at_random(9, 3, 2))
    with pytest.raises(AssertionError, match="error"):
        problem.compare(lambda x, c, w, weights: oracle.plain(x, c, w, weights) * 0, torch.float32)


def test_routing_of_matches_from_choices() -> None:
    chosen_TE = choose_at_random(12, 5, 2)
    ours = routing_of(chosen_TE, chosen_TE.float())
    theirs = Routing.from_choices(chosen_TE.nonzero()[:, 1].view(12, 2), experts=5)
    assert torch.equal(ours.token_N, theirs.token_N) and torch.equal(ours.counts_E, theirs.counts_E)


@pytest.mark.parametrize("counts", [(300, 1), (300, 2, 1), (70, 301, 1), (1, 300), (300,)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_large_expert_reaches_past_the_small_ones_behind_it(counts: tuple[int, ...], bias: bool) -> None:
    """Rounded up, its rows end behind the last pair: what it writes there must be nobody's."""
    expert_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expert_T = expert_T[torch.randperm(len(expert_T))]
    chosen_TE = torch.nn.functional.one_hot(expert_T, len(counts)).bool()
    for dtype in (torch.float32, torch.bfloat16):
        Problem(chosen_TE, d_model=16, d_ff=24, bias=bias).compare(by("grouped"), dtype)
    slices = routing_of(chosen_TE, chosen_TE.double()).slices
    chunks = grouped._chunks(slices, torch.float64, (16, 24), False)
    assert any(chunk.reach > sum(counts) for chunk in chunks[:-1]) == (counts[-1] < 10 and len(counts) > 1)
