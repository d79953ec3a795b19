"""Packed products in C: as near to float64 as torch is, integers exact, and the same bits in any company."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moiety.backends import cpu, reference
from moiety.backends.weights import ACTIVATIONS, CLAMPED, ExpertWeights
from moiety.errors import DependencyError
from moiety.formats import FORMATS, Format
from moiety.formats.numbers import Codes
from moiety.formats.tiles import codes_of, pack
from moiety.routing import Routing
from tests import oracle
from tests.backends.builds import tried

ROOT = Path(__file__).resolve().parents[2]
FLOATS = ("f32", "bf16", "fp8", "nf4-g32", "nf4-g64", "nf4-g128")
INTEGERS = tuple(name for name in FORMATS if name not in FLOATS)
# (columns, rows of a matrix, rows of x for each expert): every way in which kernels cut rows, row blocks and columns
SHAPES: tuple[tuple[int, int, list[int]], ...] = (
    (1, 1, [4]),
    (40, 33, [257]),
    (128, 16, [1]),
    (300, 50, [0, 130, 9]),
    (70, 17, [1, 2, 3, 5, 6, 7, 0]),
    (1500, 40, [17, 4]),
    (260, 100, [0, 0]),
    (33, 20, [number % 5 * (number % 3) for number in range(70)]),
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


class Grouped:
    """Rows of several experts, their matrices in one format, and the truth."""

    def __init__(self, name: str, columns: int, rows: int, counts: list[int], *, bias: bool) -> None:
        weight = torch.randn(len(counts), rows, columns) * 0.2
        weight[:, :, ::7] *= 8  # scales of neighbouring groups and rows differ
        self.form = FORMATS[name]
        self.counts = torch.tensor(counts)
        self.x = torch.randn(sum(counts), columns) * torch.rand(sum(counts), 1).mul(4).exp()
        self.bias = torch.randn(len(counts), rows) if bias else None
        self.matrix = cpu.Matrix(pack(weight, self.form), self.bias)

    def multiply(self) -> Tensor:
        return cpu.grouped_linear(self.x, self.matrix, self.counts)

    def defined(self, dtype: torch.dtype) -> Tensor:
        """By torch, with the weights that are meant."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return reference.grouped_linear(self.x.to(dtype), self.matrix.unpacked().to(dtype), self.counts, bias)

    def emulated(self, level: str) -> Tensor:
        """What the integer kernels mean, in float64."""
        return emulated(self.x, codes_of(self.matrix.weight), self.form, self.counts, self.bias, level)


def emulated(
    x: Tensor, codes: Codes, form: Format, counts: Tensor, bias: Tensor | None, level: str
) -> Tensor:
    """Rows rounded to eight bits by group, whole products of codes, then scales: everything exact or in float64."""

    def cut(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % form.group))
        return padded.unflatten(-1, (-1, form.group))

    x_NGc = cut(x)
    largest = x_NGc.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 2.0**-120, 127 / largest, 0.0)
    # with a fused multiply-add the product of two float32 numbers is rounded once, to a whole number
    fused = level != "portable" or platform.machine() != "x86_64"
    code_NGc = ((x_NGc.double() * inverse.double()) if fused else (x_NGc * inverse).double()).round()
    scale_NG = (largest / 127)[..., 0].double()
    if form.kind == "table":
        weight = torch.tensor(form.values, dtype=torch.float64)[codes.code.int()]
    else:
        weight = codes.code.double() - form.zero
    assert codes.scale is not None
    if form.scale_bits == 8:
        scale_EFG = 2.0 ** (codes.scale.double() - 127)
    else:
        scale_EFG = codes.scale.double()
    found = []
    for e, rows in enumerate(code_NGc.split(counts.tolist())):
        scales = scale_NG.split(counts.tolist())[e]
        dots_NFG = torch.einsum("ngc,fgc->nfg", rows, cut(weight[e]))
        y_NF = torch.einsum("nfg,fg,ng->nf", dots_NFG, scale_EFG[e], scales)
        if codes.minimum is not None:
            y_NF += torch.einsum("fg,ng,ng->nf", codes.minimum[e].double(), scales, rows.sum(-1))
        found.append(y_NF if bias is None else y_NF + bias[e].double())
    return torch.cat(found)


def difference(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.double().norm()) if true.numel() else 0.0


@shapes
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_as_near_to_the_truth_as_torch(
    name: str, shape: tuple[int, int, list[int]], level: str
) -> None:
    case = Grouped(name, *shape, bias=shape[0] % 3 == 0)
    y = case.multiply()
    oracle.assert_close_enough(y, case.defined(torch.float32), case.defined(torch.float64))


@shapes
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_exact(name: str, shape: tuple[int, int, list[int]], level: str) -> None:
    """All but the sum over groups, which is in float32."""
    case = Grouped(name, *shape, bias=shape[0] % 3 == 0)
    y = case.multiply()
    assert y.shape == (len(case.x), shape[1])
    assert difference(y, case.emulated(level)) < 2e-6
    loose = difference(y, case.defined(torch.float64))
    assert loose < 0.02 and (loose > 1e-5 or len(y) < 5), loose  # x is rounded, and how much that costs


@pytest.mark.parametrize("signs", ["++", "+-", "-+", "--", "+±", "±+"])
@pytest.mark.parametrize("name", INTEGERS)
def test_the_largest_sums_there_can_be(name: str, signs: str, level: str) -> None:
    """Every weight and every number has the largest size that its format has: where sums are narrow they are full."""

    def of(sign: str, rows: int) -> Tensor:
        one = torch.ones(rows, 256)
        return one if sign == "+" else -one if sign == "-" else one * torch.tensor([1.0, -1.0]).repeat(128)

    case = Grouped(name, 256, 48, [1, 7, 9], bias=False)
    case.x = of(signs[1], 17)
    weight = of(signs[0], 3 * 48).reshape(3, 48, 256)
    weight[:, :, ::32] *= (
        1.125  # a minimum and a maximum, so that codes of formats with a minimum are not all 0
    )
    case.matrix = cpu.Matrix(pack(weight, case.form), None)
    torch.testing.assert_close(case.multiply().double(), case.emulated(level), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_levels_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same roundings everywhere, so all that differs is the order in which four products are summed."""
    case, found = Grouped(name, 300, 50, [0, 130, 9, 2], bias=True), {}
    for level in tried():
        monkeypatch.setenv(cpu.LEVEL_VARIABLE, level)
        cpu.level.cache_clear()
        found[level] = case.multiply()
        assert level in cpu.LEVELS and cpu.level() == level
    cpu.level.cache_clear()
    for level, y in found.items():
        # without a fused multiply-add a row's number may round to the neighbouring code
        bar = 2e-3 if level == "portable" and name in INTEGERS else 1e-6
        assert difference(y, found[tried()[-1]]) < bar, level
    if "amx" in found and name in INTEGERS:
        assert torch.equal(found["amx"], found["avx512"])


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bits_in_any_company(name: str, level: str) -> None:
    """A row alone, in another place, beside fewer or more, with one thread or two."""
    case = Grouped(name, 900, 40, [3, 150, 21], bias=True)
    whole = case.multiply()
    expert = torch.repeat_interleave(torch.arange(3), case.counts)
    pieces = [torch.tensor([row]) for row in (0, 3, 131, 152, 173)]
    for most in (2, 7, 30, 174):
        order = torch.randperm(174)
        pieces += [part.sort().values for part in order.split(most)[:6]]
    try:
        for number, rows in enumerate(pieces):
            torch.set_num_threads(1 + number % 2)
            mixed = rows[torch.randperm(len(rows))]
            mixed = mixed[expert[mixed].sort(stable=True).indices]
            counts = torch.bincount(expert[mixed], minlength=3)
            y = cpu.grouped_linear(case.x[mixed], case.matrix, counts)
            assert torch.equal(y, whole[mixed]), (number, counts.tolist())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_visible(name: str, bad: float, level: str) -> None:
    case = Grouped(name, 150, 20, [1, 40], bias=True)
    clean = case.multiply()
    case.x[7, 149] = case.x[0, 3] = case.x[33, 0] = bad
    y, harmed = case.multiply(), [0, 7, 33]
    assert not bool(y[harmed].isfinite().any())
    kept = [row for row in range(41) if row not in harmed]
    assert torch.equal(y[kept], clean[kept])


@pytest.mark.parametrize("name", ["f32", "int4-g32", "int8"])
def test_numbers_at_the_edges(name: str, level: str) -> None:
    """Nothing, subnormal numbers, and the largest."""
    case = Grouped(name, 130, 20, [6], bias=False)
    case.x[0], case.x[1] = 0.0, 1e-41
    case.x[2] *= 1e-38 / case.x[2].abs().max()
    case.x[3] *= 1e36 / case.x[3].abs().max()
    y, true = case.multiply(), case.defined(torch.float64)
    assert not y[0].any() and float(y[1:3].abs().max()) < 1e-36
    assert difference(y[3:], true[3:]) < 0.02


def mlp_weights(
    name: str, experts: int, d_model: int, d_ff: int, activation: str, gated: bool, bias: bool
) -> cpu.PackedExpertWeights:
    halves = 1 + gated
    up = torch.randn(experts, halves * d_ff, d_model) * d_model**-0.5 * 2
    down = torch.randn(experts, d_model, d_ff) * d_ff**-0.5
    up_bias = torch.randn(experts, halves * d_ff) if bias else None
    down_bias = torch.randn(experts, d_model) if bias else None
    form = FORMATS[name]
    return cpu.PackedExpertWeights(
        up=cpu.Matrix(pack(up, form, interleaved=gated), up_bias),
        down=cpu.Matrix(pack(down, form), down_bias),
        activation=activation,
        gated=gated,
        activation_limit=1.5,
    )


def route(tokens: int, experts: int, k: int) -> Routing:
    chosen = oracle.choose_at_random(tokens, experts, k, zipf=0.7)
    return oracle.routing_of(chosen, torch.rand(tokens, experts) + 0.1)


def wide(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    parts = {
        name: None if (part := getattr(weights, name)) is None else part.to(dtype)
        for name in ("up", "down", "up_bias", "down_bias")
    }
    return ExpertWeights(
        **parts,
        activation=weights.activation,
        gated=weights.gated,
        activation_limit=weights.activation_limit,
    )


KINDS = [(name, gated) for name in ACTIVATIONS for gated in (True, False)] + [(CLAMPED, True)]
# tokens, experts, experts per token, d_model, d_ff
LAYERS = ((0, 3, 2, 20, 20), (1, 1, 1, 33, 17), (9, 70, 5, 40, 33), (150, 3, 2, 37, 50))


@pytest.mark.parametrize(("activation", "gated"), KINDS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_experts_with_every_activation(
    activation: str, gated: bool, layer: tuple[int, int, int, int, int], level: str
) -> None:
    tokens, experts, k, d_model, d_ff = layer
    weights = mlp_weights("f32", experts, d_model, d_ff, activation, gated, bias=tokens != 150)
    x, routing = torch.randn(tokens, d_model) * 3, route(tokens, experts, k)
    truth = reference.expert_mlp(
        x.double(),
        routing.with_weights(routing.weight_N.double()),
        wide(weights.unpacked(), torch.float64),
    )
    plain = reference.expert_mlp(x, routing, weights.unpacked())
    oracle.assert_close_enough(cpu.expert_mlp(x, routing, weights), plain, truth)


@pytest.mark.parametrize("name", FORMATS)
def test_experts_in_every_format(name: str, level: str) -> None:
    """Gated, with biases; integers against the two products apart, rounded in between as the kernel does."""
    weights = mlp_weights(name, 6, 150, 70, "silu", gated=True, bias=True)
    x, routing = torch.randn(60, 150), route(60, 6, 3)
    y = cpu.expert_mlp(x, routing, weights)
    dense = wide(weights.unpacked(), torch.float64)
    doubled = routing.with_weights(routing.weight_N.double())
    if name in FLOATS:
        plain = reference.expert_mlp(x, routing, weights.unpacked())
        oracle.assert_close_enough(y, plain, reference.expert_mlp(x.double(), doubled, dense))
        return
    form, counts = FORMATS[name], routing.counts_E
    gate, up = emulated(
        routing.gather(x), codes_of(weights.up.weight), form, counts, weights.up.bias, level
    ).chunk(2, dim=1)
    hidden = (torch.nn.functional.silu(gate) * up).float()
    down = emulated(hidden, codes_of(weights.down.weight), form, counts, weights.down.bias, level)
    # a hidden number on the edge between two codes goes either way
    assert difference(y, doubled.combine(down)) < 5e-4
    assert difference(y, reference.expert_mlp(x.double(), doubled, dense)) < 0.02


@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g32-asym", "mxfp4"])
def test_a_token_s_experts_do_not_see_other_tokens(name: str, level: str) -> None:
    weights = mlp_weights(name, 5, 90, 48, "silu", gated=True, bias=True)
    chosen = oracle.choose_at_random(140, 5, 2, zipf=1.0)
    weight, x = torch.rand(140, 5), torch.randn(140, 90)
    whole = cpu.expert_mlp(x, oracle.routing_of(chosen, weight), weights)
    try:
        for number, rows in enumerate([*torch.randperm(140).split(23), *torch.arange(3)[:, None]]):
            torch.set_num_threads(2 - number % 2)
            y = cpu.expert_mlp(x[rows], oracle.routing_of(chosen[rows], weight[rows]), weights)
            assert torch.equal(y, whole[rows]), number
    finally:
        torch.set_num_threads(1)


def slots_of(weights: cpu.PackedExpertWeights, place_E: Tensor) -> cpu.PackedExpertWeights:
    """The same experts in slots with both projections of one each, and bytes of something else between and behind."""
    up, down = weights.up.weight, weights.down.weight
    sizes = [one.tiles[0].numel() for one in (up, down)]
    slab = torch.full(
        (len(place_E) + 2, sum(sizes) + 48), 0xFF, dtype=torch.uint8
    )  # not finite in any format
    slot_E = torch.randperm(len(slab))[: len(place_E)]
    for expert in range(len(place_E)):
        slab[slot_E[expert], : sizes[0]] = up.tiles[expert].flatten()
        slab[slot_E[expert], sizes[0] : sum(sizes)] = down.tiles[expert].flatten()
    place_E.copy_(slot_E * slab.stride(0))
    made = []
    for one, part, start in zip((weights.up, weights.down), (up, down), (0, sizes[0]), strict=True):
        tiles = slab[:, start : start + part.tiles[0].numel()].view(len(slab), *part.tiles.shape[1:])
        packed = dataclasses.replace(part, experts=len(slab), tiles=tiles)
        made.append(cpu.Matrix(packed, one.bias, place=place_E))
    return dataclasses.replace(weights, up=made[0], down=made[1])


# tokens, experts, experts per token, d_model, d_ff; the second has experts without rows
WAVES = ((0, 3, 2, 20, 20), (5, 70, 3, 40, 33), (150, 5, 2, 37, 50))


@pytest.mark.parametrize("waves", WAVES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_waves_in_any_order_have_the_bits_of_one_call(
    name: str, waves: tuple[int, int, int, int, int], level: str
) -> None:
    """Experts in slots that come and go; at any time only those of a wave are there."""
    tokens, experts, k, d_model, d_ff = waves
    gated = d_ff != 33
    weights = mlp_weights(name, experts, d_model, d_ff, "silu", gated=gated, bias=gated)
    x, routing = torch.randn(tokens, d_model), route(tokens, experts, k)
    whole = cpu.expert_mlp(x, routing, weights)
    place_E = torch.empty(experts, dtype=torch.int64)
    slots = slots_of(weights, place_E)
    torch.testing.assert_close(slots.up.unpacked(), weights.up.unpacked(), rtol=0, atol=0)
    assert torch.equal(cpu.expert_mlp(x, routing, slots), whole)
    everywhere_E = place_E.clone()
    for size in (1, 3, experts):
        answers_ND = torch.full((routing.pairs, d_model), torch.nan)
        for number, wave in enumerate(torch.randperm(experts).split(size)):
            place_E.fill_(-1)
            place_E[wave] = everywhere_E[wave]
            mask_E = torch.zeros(experts, dtype=torch.uint8 if number % 2 else torch.bool)
            mask_E[wave] = 1
            before_ND = answers_ND.clone()
            cpu.expert_rows(x, routing, slots, mask_E, answers_ND)
            others_N = ~mask_E.bool()[routing.expert_N]
            assert before_ND[others_N].view(torch.int32).equal(answers_ND[others_N].view(torch.int32))
        assert torch.equal(cpu.combine(answers_ND, routing), whole), size


def test_one_projection_may_lie_in_slots(level: str) -> None:
    case = Grouped("int4-g32", 70, 17, [1, 0, 9], bias=True)
    tiles = case.matrix.weight.tiles.flip(0).contiguous()
    place_E = torch.tensor([2, -1, 0]) * tiles.stride(0)
    slots = cpu.Matrix(dataclasses.replace(case.matrix.weight, tiles=tiles), case.bias, place=place_E)
    assert torch.equal(cpu.grouped_linear(case.x, slots, case.counts), case.multiply())
    assert bool(slots.unpacked()[1].isnan().all()) and torch.equal(
        slots.unpacked()[::2], case.matrix.unpacked()[::2]
    )


def test_an_expert_that_is_not_there_is_never_read(level: str) -> None:
    """It may be missing without rows or without a place in the mask; with both it is an error."""
    weights = mlp_weights("int8-g32", 4, 40, 33, "silu", gated=True, bias=True)
    place_E = torch.empty(4, dtype=torch.int64)
    slots = slots_of(weights, place_E)
    place_E[2] = -1
    routing = oracle.routing_of(torch.tensor([[True, True, False, True]] * 6), torch.rand(6, 4))
    x, answers_ND = torch.randn(6, 40), torch.zeros(18, 40)
    assert torch.equal(cpu.expert_mlp(x, routing, slots), cpu.expert_mlp(x, routing, weights))
    cpu.expert_rows(x, routing, slots, torch.ones(4, dtype=torch.bool), answers_ND)
    assert torch.equal(cpu.combine(answers_ND, routing), cpu.expert_mlp(x, routing, weights))
    routing = oracle.routing_of(torch.ones(6, 4).bool(), torch.rand(6, 4))
    answers_ND = torch.zeros(24, 40)
    cpu.expert_rows(x, routing, slots, torch.tensor([True, True, False, True]), answers_ND)
    for run in (
        lambda: cpu.expert_mlp(x, routing, slots),
        lambda: cpu.expert_rows(x, routing, slots, torch.ones(4, dtype=torch.bool), answers_ND),
        lambda: cpu.grouped_linear(torch.randn(6, 33), slots.down, torch.tensor([0, 0, 6, 0])),
    ):
        with pytest.raises(AssertionError, match="not in memory"):
            run()


def test_nan_passes_every_activation(level: str) -> None:
    for activation, gated in KINDS:
        weights = mlp_weights("f32", 2, 20, 18, activation, gated, bias=False)
        x = torch.randn(6, 20)
        x[4, 2] = float("nan")
        y = cpu.expert_mlp(x, oracle.routing_of(torch.ones(6, 2).bool(), torch.rand(6, 2)), weights)
        assert bool(y[4].isnan().all()) and bool(y[[0, 1, 2, 3, 5]].isfinite().all()), activation


@pytest.mark.parametrize("name", ["f32", "int4-g32"])
def test_rows_of_any_stride_and_type(name: str, level: str) -> None:
    matrix = cpu.Matrix(pack(torch.randn(30, 40), FORMATS[name]))
    table = torch.randn(12, 100)
    for x in (table[:, 7:47], table[::3, :40], table[:, 10:90:2], table[:40, :12].T.contiguous()[:, :0]):
        if x.shape[1] == 40:
            assert torch.equal(cpu.grouped_linear(x, matrix), cpu.grouped_linear(x.contiguous(), matrix))
    stacked = table[:, :80].reshape(2, 3, 4, 40)
    y = cpu.linear(stacked, matrix)
    assert torch.equal(y, cpu.grouped_linear(stacked.reshape(24, 40), matrix).view(2, 3, 4, 30))
    assert cpu.linear(torch.empty(2, 0, 40), matrix).shape == (2, 0, 30)
    half = cpu.linear(stacked.bfloat16(), matrix)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, cpu.linear(stacked.bfloat16().float(), matrix).bfloat16())


@pytest.mark.parametrize("name", FORMATS)
def test_without_the_kernels_torch_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Grouped(name, 70, 17, [1, 0, 9], bias=True)
    weights, routing = mlp_weights(name, 3, 40, 33, "gelu", gated=True, bias=True), route(9, 3, 2)
    x = torch.randn(9, 40)

    def in_waves() -> Tensor:
        answers_ND = torch.full((routing.pairs, 40), torch.nan)
        for expert in (2, 0, 1):
            cpu.expert_rows(x, routing, weights, torch.arange(3) == expert, answers_ND)
        return cpu.combine(answers_ND, routing)

    with_kernels = case.multiply(), cpu.expert_mlp(x, routing, weights), in_waves()
    monkeypatch.setattr(cpu, "library", lambda: None)
    cpu.level.cache_clear()
    try:
        assert cpu.level() == "" and cpu.levels() == ()
        without = case.multiply(), cpu.expert_mlp(x, routing, weights), in_waves()
        assert cpu.linear(case.x[:3].bfloat16(), cpu.Matrix(pack(torch.ones(4, 70), case.form))).shape == (
            3,
            4,
        )
        monkeypatch.setenv(cpu.LEVEL_VARIABLE, "portable")
        cpu.level.cache_clear()
        with pytest.raises(DependencyError, match="none"):
            cpu.level()
    finally:
        monkeypatch.undo()
        cpu.level.cache_clear()
    assert difference(without[0], case.defined(torch.float64)) < 1e-6
    bar = 2e-6 if name in FLOATS else 0.03
    assert all(difference(one, other) < bar for one, other in zip(with_kernels, without, strict=True))


@pytest.mark.parametrize("asked", ["sse9", "AVX2", "amx,avx2", *set(cpu.LEVELS) - set(cpu.levels())])
def test_a_level_that_is_not_here(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, asked)
    cpu.level.cache_clear()
    with pytest.raises(DependencyError) as error:
        cpu.level()
    assert repr(asked) in str(error.value) and ", ".join(cpu.levels()) in str(error.value)
    assert asked != "amx" or (cpu.no_amx() and cpu.no_amx() in str(error.value))
    monkeypatch.undo()
    cpu.level.cache_clear()
    assert cpu.level() in ("", *cpu.levels())


def test_the_variable_is_read_at_the_start() -> None:
    """In a process of its own, where nothing is cached yet."""
    code = "from moiety.backends import cpu; print(cpu.level(), cpu.levels()[-1:])"
    for asked in tried():
        environment = {**os.environ, cpu.LEVEL_VARIABLE: asked, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split()[0] == asked


KEEPING = """
import ctypes, resource, torch
from moiety.backends import cpu
from moiety.formats import FORMATS
from moiety.formats.tiles import pack

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # small pages alone
matrix = cpu.Matrix(pack(torch.ones(1, 16, 1024), FORMATS["f32"]))

def pages(x):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cpu.grouped_linear(x, matrix, torch.tensor([len(x)]))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()

few, more, many = (torch.ones(rows, 1024) for rows in (2048, 4096, 16384))
print(*(pages(x) >> 20 for x in (more, more, few, more, many, many, few)))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="how freed memory is given back is set for glibc"
)
def test_an_operations_memory_is_kept_for_the_next_unless_it_is_large() -> None:
    """Counted in pages that the system had to make, where malloc gives all that is freed back to it."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", KEEPING], env=environment, capture_output=True, text=True, check=True
    )
    first, again, fewer, back, large, once_more, after = (int(size) for size in done.stdout.split())
    assert first >= 16 and large >= 64 and once_more >= 64, done.stdout  # MiB of rows in float32
    assert max(again, fewer, back) == 0 and after >= 8, done.stdout
