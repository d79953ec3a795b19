"""Packed layers against the layers whose place they take, with the weights that their tiles mean."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from moiety.backends import cpu
from moiety.backends.weights import CLAMPED
from moiety.errors import UsageError
from moiety.formats import FORMATS
from moiety.formats.tiles import pack, unpack
from moiety.moe.capacity import Capacity
from moiety.moe.experts import Experts, FeedForward, expert_seconds
from moiety.moe.layer import MoE
from moiety.moe.packed import MixedExperts, PackedExperts, PackedFeedForward, PackedLinear
from moiety.moe.routers import TopK
from moiety.observe.trace import contributions
from moiety.routing import Routing

D, F, E = 40, 24, 5
# Formats whose activations stay float32 are exact up to the order of sums; the others round rows to eight bits.
NEAR = {
    "f32": 1e-5,
    "bf16": 1e-5,
    "nf4-g64": 1e-5,
    "fp8": 1e-5,
    "int8-g32": 0.02,
    "int4-g32": 0.02,
    "mxfp4": 0.02,
}
KINDS = [("silu", True, False), ("gelu_tanh", True, True), ("relu", False, True), (CLAMPED, True, True)]


def experts(activation: str, gated: bool, bias: bool) -> Experts:
    made = Experts(D, F, E, activation=activation, gated=gated, bias=bias)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return made.requires_grad_(False)


def packed_from(
    plain: Experts | FeedForward, form: str, chosen: list[int] | None = None
) -> list[PackedLinear]:
    """Both projections, of all experts or of some; the plain layer gets the weights that the tiles mean."""
    made = []
    for name in (plain.up_name, "down"):
        parameter = plain.get_parameter(name)
        part = parameter.data if chosen is None else parameter.data[chosen]
        packed = pack(part, FORMATS[form], interleaved=name == "gate_up")
        part = unpack(packed).view(part.shape)
        if chosen is None:
            parameter.data.copy_(part)
        else:
            parameter.data[chosen] = part
        bias = getattr(plain, f"{name}_bias", None)
        made.append(PackedLinear(packed, bias if bias is None or chosen is None else bias[chosen]))
    return made


def routing(tokens: int, k: int = 2, choices: int = E) -> Routing:
    expert_TK = torch.rand(tokens, choices).topk(k).indices
    return Routing.from_choices(expert_TK, torch.rand(tokens, k), experts=choices)


def assert_near(found: Tensor, wanted: Tensor, form: str) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if wanted.numel():
        assert wanted.norm() > 0 and (found - wanted).norm() <= NEAR[form] * wanted.norm(), form


@pytest.mark.parametrize("form", NEAR)
def test_linear(form: str) -> None:
    weight, bias = torch.randn(37, 70), torch.randn(37)
    packed = pack(weight, FORMATS[form])
    true = nn.Linear(70, 37)
    true.weight.data, true.bias.data = unpack(packed)[0], bias
    layer = PackedLinear(packed, bias)
    for shape in ((70,), (0, 70), (1, 70), (3, 5, 70)):
        x = torch.randn(shape)
        assert_near(layer(x), true(x).detach(), form)
    assert layer(torch.randn(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", NEAR)
@pytest.mark.parametrize(("activation", "gated", "bias"), KINDS)
def test_experts(activation: str, gated: bool, bias: bool, form: str) -> None:
    plain = experts(activation, gated, bias)
    layer = PackedExperts(*packed_from(plain, form), activation=activation, gated=gated)
    assert (layer.count, layer.d_model) == (E, D) == (plain.count, plain.d_model)
    for tokens in (0, 1, 33):
        x_TD, chosen = torch.randn(tokens, D), routing(tokens)
        assert_near(layer(x_TD, chosen), plain(x_TD, chosen), form)


@pytest.mark.parametrize("form", ["f32", "int4-g32"])
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("relu", False)])
def test_feed_forward(activation: str, gated: bool, form: str) -> None:
    plain = FeedForward(D, F, activation=activation, gated=gated).requires_grad_(False)
    layer = PackedFeedForward(*packed_from(plain, form), activation=activation, gated=gated)
    for shape in ((D,), (0, D), (2, 7, D)):
        x = torch.randn(shape)
        assert_near(layer(x), plain(x), form)


@pytest.mark.parametrize("bias", [False, True])
def test_two_formats_in_one_layer(bias: bool) -> None:
    plain, numbers = experts("silu", True, bias), ((1, 4), (0, 2, 3))
    parts = [
        PackedExperts(*packed_from(plain, form, list(part)))
        for form, part in zip(("bf16", "f32"), numbers, strict=True)
    ]
    layer = MixedExperts(parts, numbers)
    assert (layer.count, layer.d_model) == (E, D)
    for tokens in (0, 1, 2, 50):
        x_TD, chosen = torch.randn(tokens, D), routing(tokens)
        assert_near(layer(x_TD, chosen), plain(x_TD, chosen), "f32")
    alone = Routing.from_choices(torch.full((6, 1), 4), experts=E)  # a stack without a token
    x_TD = torch.randn(6, D)
    assert_near(layer(x_TD, alone), plain(x_TD, alone), "f32")
    together = layer(
        torch.cat([x_TD, torch.randn(9, D)]), Routing.from_choices(torch.full((15, 1), 4), experts=E)
    )
    assert torch.equal(together[:6], layer(x_TD, alone)), "what else is in the batch does not matter"


def moe(**options: object) -> tuple[MoE, MoE]:
    """A layer, and the same one with packed experts."""
    layer = MoE(d_model=D, d_ff=F, experts=E, router=TopK(2), **options).eval()  # type: ignore[arg-type]
    layer.requires_grad_(False)
    other = copy.deepcopy(layer)
    assert isinstance(layer.experts, Experts)
    other.experts = PackedExperts(*packed_from(layer.experts, "f32"), activation="silu", gated=True)
    return layer, other


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"null_experts": 2},
        {"weigh_input": True},
        {"capacity": Capacity(factor=1.0, eval_factor=1.0, policy="queue")},
        {"shared_d_ff": 16, "shared_gate": True},
    ],
    ids=str,
)
def test_every_way_through_a_layer(options: dict[str, object]) -> None:
    plain, packed = moe(**options)
    x = torch.randn(3, 11, D)
    first, second = plain(x), packed(x)
    assert torch.equal(first.routing.counts_E, second.routing.counts_E)
    assert_near(second.output, first.output, "f32")
    x_TD = x.reshape(-1, D)
    parts = contributions(packed, x_TD, second.routing)
    assert_near(parts, contributions(plain, x_TD, first.routing), "f32")
    assert isinstance(packed.experts, PackedExperts)
    assert expert_seconds(packed.experts, rows=3, repeats=1).shape == (E,)
    for name in ("gate_up", "down"):
        with pytest.raises(UsageError, match="experts of this layer are packed"):
            getattr(packed, name)


def gradients(layer: nn.Module, chosen: Routing | None) -> list[Tensor]:
    """Output, and gradients of the rows and of the combine weights."""
    x_TD = torch.linspace(-2, 2, 30 * D).view(30, D).sin().requires_grad_()
    leaves, given = [x_TD], [x_TD]
    if chosen is not None:
        leaves.append(chosen.weight_N.clone().requires_grad_())
        given.append(chosen.with_weights(leaves[1]))  # type: ignore[arg-type]
    y = layer(*given)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("form", ["int8-g32", "int4-g32", "nf4-g64", "bf16"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_pass_through_as_through_the_weights_that_tiles_mean(form: str, training: bool) -> None:
    torch.manual_seed(2)
    plain, again = experts("silu", True, True), experts("silu", True, True)
    numbers = ((0, 2), (1, 3, 4))
    parts = [PackedExperts(*packed_from(again, form, list(part))) for part in numbers]
    wide, linear = FeedForward(D, F).requires_grad_(False), nn.Linear(D, 8).requires_grad_(False)
    packed = pack(linear.weight, FORMATS[form])
    linear.weight.data.copy_(unpack(packed)[0])
    layers: list[tuple[nn.Module, nn.Module]] = [
        (PackedExperts(*packed_from(plain, form)), plain),
        (MixedExperts(parts, numbers), again),
        (PackedFeedForward(*packed_from(wide, form)), wide),
        (PackedLinear(packed, linear.bias), linear),
    ]
    for of_tiles, of_weights in layers:
        chosen = routing(30) if isinstance(of_weights, Experts) else None
        ours, true = gradients(of_tiles.train(training), chosen), gradients(of_weights, chosen)
        assert len(ours) == len(true) == (2 if chosen is None else 3)
        for one, other in zip(ours, true, strict=True):
            assert other.abs().sum() > 1
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["int8-g32", "int4-g32", "bf16"])
def test_stacks_of_a_layer_multiply_as_one(form: str) -> None:
    torch.manual_seed(4)
    plain, numbers = experts("silu", True, True), ((0, 2), (1, 3, 4))
    parts = [PackedExperts(*packed_from(plain, form, list(part))) for part in numbers]
    x_TD, chosen = torch.randn(30, D), routing(30)
    assert len(set(chosen.counts_E.tolist())) > 2, "as many tokens for every expert would hide an exchange"
    with torch.no_grad():
        assert_near(MixedExperts(parts, numbers)(x_TD, chosen), plain(x_TD, chosen), form)


def test_a_layer_in_training_gives_its_router_a_gradient() -> None:
    plain, layer = moe()
    for one in (plain, layer):
        assert one.gate is not None
        one.train().gate.requires_grad_()  # type: ignore[union-attr]
        one(torch.linspace(-1, 1, 6 * D).view(6, D)).output.square().sum().backward()
    assert plain.gate is not None and layer.gate is not None and layer.gate.weight.grad is not None
    torch.testing.assert_close(layer.gate.weight.grad, plain.gate.weight.grad, rtol=1e-4, atol=1e-5)


def test_state_copies_and_dtypes() -> None:
    weight = pack(torch.randn(20, D), FORMATS["int4-g32"])
    layer, x = PackedLinear(weight, torch.randn(20)), torch.randn(3, D)
    before = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), before) and other.tiles.data_ptr() != layer.tiles.data_ptr()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(state) == {"tiles", "bias"} and state["tiles"].dtype == torch.uint8
    layer.to(torch.bfloat16)
    assert layer.tiles.dtype == torch.uint8 and layer.bias is not None and layer.bias.dtype == torch.bfloat16
    rounded = layer(x)
    assert not torch.equal(rounded, before) and (rounded - before).norm() < 0.01 * before.norm()
    layer.load_state_dict({**state, "bias": torch.zeros(20)})
    assert (layer(x) - (before - state["bias"])).norm() < 1e-5 * before.norm(), "the new bias is used"
    layer.load_state_dict({"tiles": torch.zeros_like(weight.tiles), "bias": torch.ones(20)}, assign=True)
    assert torch.equal(layer(x), torch.ones(3, 20))
    with pytest.raises(UsageError, match="are on meta"):
        layer.to("meta")(x)


@pytest.mark.parametrize(("activation", "gated", "bias"), KINDS[1:3])
def test_an_expert_is_one_run_of_bytes(activation: str, gated: bool, bias: bool) -> None:
    plain = experts(activation, gated, bias)
    up, down = packed_from(plain, "int4-g32")
    alone = [up.tiles.clone(), down.tiles.clone()]
    layer = PackedExperts(up, down, activation=activation, gated=gated)
    assert layer.tiles.shape == (E, 4096) and layer.tiles.is_contiguous()
    for number, expert in enumerate(layer.tiles):
        start = 0
        for tiles in alone:
            assert torch.equal(expert[start : start + tiles[number].numel()], tiles[number].flatten())
            start += tiles[number].numel()
        assert not expert[start:].any() and 0 < start < 4096
    assert [one.tiles.data_ptr() - layer.tiles.data_ptr() for one in (up, down)] == [0, alone[0][0].numel()]
    leaf = "gate_up" if gated else "up"
    assert set(layer.state_dict()) == {"tiles"} | ({f"{leaf}.bias", "down.bias"} if bias else set())
    adopted = PackedExperts(
        *(PackedLinear(one.weight, one.bias) for one in (up, down)),
        tiles=layer.tiles,
        activation=activation,
        gated=gated,
    )
    x_TD, chosen = torch.randn(7, D), routing(7)
    assert adopted.tiles is layer.tiles and torch.equal(adopted(x_TD, chosen), layer(x_TD, chosen))


def test_experts_follow_their_bytes() -> None:
    """Copies, moves and loaded states: both projections are of the tiles that there are now."""
    x_TD, chosen = torch.randn(9, D), routing(9)
    layers = [
        PackedExperts(*packed_from(experts("silu", True, True), form)) for form in ("int8-g32", "int8-g32")
    ]
    first, second = (layer(x_TD, chosen) for layer in layers)
    state = copy.deepcopy(layers[1].state_dict())
    others = [copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))]
    for other in others:
        assert torch.equal(other(x_TD, chosen), first)
        assert other.gate_up.tiles.untyped_storage().data_ptr() == other.tiles.untyped_storage().data_ptr()
        assert other.tiles.data_ptr() != layers[0].tiles.data_ptr()
    others[0].load_state_dict(state)
    others[1].load_state_dict(state, assign=True)
    for other in others:
        assert torch.equal(other(x_TD, chosen), second) and not torch.equal(second, first)
        other.tiles.zero_()
        assert not unpack(other.down.weight).any()
    assert torch.equal(layers[0](x_TD, chosen), first)
    away = layers[0].to("meta")
    assert away.down.tiles.is_meta and away.gate_up.tiles.is_meta
    with pytest.raises(UsageError, match="are on meta"):
        away(x_TD, chosen)


def test_without_kernels_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = experts("silu", True, True)
    layer = PackedExperts(*packed_from(plain, "int4-g32"))
    x_TD, chosen = torch.randn(9, D), routing(9)
    monkeypatch.setattr(cpu, "level", lambda: "")
    torch.testing.assert_close(layer(x_TD, chosen), plain(x_TD, chosen))
