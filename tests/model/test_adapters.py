"""Adapters in a model: where they may be, that they add what they say, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from moiety.errors import ConfigError, UsageError
from moiety.formats.policy import policy_named
from moiety.model.adapters import activate, attach, detach, merge, names, places, unmerge
from moiety.model.context import KVCache
from moiety.model.paged import PagedStep, PagePool
from moiety.model.transformer import Transformer
from moiety.moe.adapted import AdaptedExperts, Adapter, adapted_layers
from moiety.quant.quantize import quantize
from moiety.routing import Routing
from tests import tiny

ALL = tuple(tiny.CONFIGS)


def adapters(
    model: Transformer, seed: int = 0, rank: int = 2, **options: bool
) -> dict[tuple[str, str], Adapter]:
    """One in every place that there is, which adds something."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for place in places(model):
        spans = [(part.start, part.stop) for part in place.parts]
        one = Adapter(place.experts, place.columns, spans, rank, 0.5, **options)
        for parameter in one.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        made[place.path, place.leaf] = one
    return made


def packed(model: Transformer, form: str = "nf4-g64") -> Transformer:
    """A copy whose matrices are packed, and the original with the weights that those mean."""
    made = copy.deepcopy(model)
    quantize(made, policy_named(form))
    return made


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_is_a_place_but_routers_and_embedding(name: str) -> None:
    model = tiny.model(name)
    found = {place.parameter for place in places(model)}
    matrices = {
        own
        for own, parameter in model.named_parameters()
        if parameter.dim() > 1 and not own.endswith("bias") and "gate." not in own and own != "embed.weight"
    }
    assert found == matrices
    before = places(model)
    attach(model, "one", adapters(model))
    assert places(model) == before and names(model) == ["one"]
    assert {place.parameter for place in places(packed(tiny.model(name)))} == found


@pytest.mark.parametrize("shares_a", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_merged_equals_adapted_and_unmerged_the_model(name: str, shares_a: bool) -> None:
    model = tiny.model(name).eval()
    tokens, state = tiny.tokens(model, 2, 11), copy.deepcopy(model.state_dict())
    before = logits(model, tokens)
    attach(model, "one", adapters(model, shares_a=shares_a))
    changed = logits(model, tokens)
    assert (changed - before).abs().max() > 0.05
    activate(model, "")
    assert torch.equal(logits(model, tokens), before)
    activate(model, "one")
    receipt = merge(model, "one")
    assert not names(model) and receipt.errors == {}
    torch.testing.assert_close(logits(model, tokens), changed, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == state.keys()
    unmerge(model, receipt)
    assert torch.equal(logits(model, tokens), changed)
    detach(model, "one")
    assert not list(adapted_layers(model))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("name", ALL)
def test_an_adapter_of_zeros_changes_no_bit(name: str) -> None:
    model = tiny.model(name).eval()
    tokens = tiny.tokens(model, 2, 40)
    before = logits(model, tokens)
    made = adapters(model)
    for one in made.values():
        one.b.data.zero_()
    attach(model, "nothing", made)
    after = logits(model, tokens)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)  # products may be cut in other pieces


@pytest.mark.parametrize("form", ["nf4-g64", "int4-g32", "bf16"])
@pytest.mark.parametrize("name", ["mixtral", "all_biases", "shared", "llama_biases", "relu"])
def test_on_packed_weights(name: str, form: str) -> None:
    """In training exactly what the dense twin answers, gradients included; otherwise by kernels, near it."""
    torch.manual_seed(1)
    model = tiny.model(name)
    small = packed(model, form)
    twin = tiny.model(name)
    twin.load_state_dict(model.state_dict())
    unpack_into(twin, small)
    tokens, answers = tiny.tokens(model, 2, 13), []
    for one in (small, twin):
        one.requires_grad_(False)
        attach(one, "one", adapters(one))
        one.train()
        loss = one(tokens).cross_entropy(tokens.roll(-1, 1))
        loss.backward()
        found = {own: p.grad for own, p in one.named_parameters() if p.grad is not None}
        answers.append((loss.detach(), found))
    (loss, ours), (true_loss, true) = answers
    torch.testing.assert_close(loss, true_loss, rtol=1e-5, atol=1e-5)
    assert ours.keys() == true.keys() and len(ours) == 2 * len(places(model))
    for own, gradient in ours.items():
        assert gradient.abs().sum() > 0, own
        torch.testing.assert_close(gradient, true[own], rtol=1e-3, atol=1e-4)
    near, exact = logits(small.eval(), tokens), logits(twin.eval(), tokens)
    assert (near - exact).norm() < (1e-4 if form == "bf16" else 0.05) * exact.norm()


@pytest.mark.parametrize("form", ["nf4-g64", "int4-g32"])
def test_outside_training_packed_experts_give_their_adapter_its_gradient(form: str) -> None:
    """The first layer's tokens want none, and what is packed is in the mode of what it replaced."""
    model = tiny.model("mixtral").eval()
    small, twin = packed(model, form), tiny.model("mixtral").eval()
    twin.load_state_dict(model.state_dict())
    unpack_into(twin, small)
    path, found = "blocks.0.feed_forward.experts", []
    assert not small.get_submodule(path).training
    for one in (small, twin):
        attach(one, "one", {key: lora for key, lora in adapters(one).items() if key[0] == path})
        layer = one.get_submodule(path)
        assert isinstance(layer, AdaptedExperts)
        routing = Routing(
            token_N=torch.arange(6),
            weight_N=torch.linspace(0.5, 1, 6),
            counts_E=torch.tensor([2, 0, 3, 0, 1]),
            tokens=6,
        )
        layer(torch.linspace(-1, 1, 6 * layer.d_model).view(6, -1), routing).square().sum().backward()
        found.append([p.grad for p in layer.parameters() if p.requires_grad])
    assert len(found[0]) == len(found[1]) == 4
    for ours, true in zip(*found, strict=True):
        assert ours is not None and true is not None and true.abs().sum() > 0
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)


def unpack_into(twin: Transformer, small: Transformer) -> None:
    """Give a plain model the weights that another one's tiles mean."""
    from moiety.formats.tiles import unpack
    from moiety.moe.packed import PackedLinear

    for path, module in small.named_modules():
        if isinstance(module, PackedLinear):
            known = dict(twin.named_parameters())
            target = known.get(path, known.get(f"{path}.weight"))
            assert target is not None, path
            target.data.copy_(unpack(module.weight).view(target.shape))


def test_merging_packed_weights_is_refused_or_its_loss_said() -> None:
    model = packed(tiny.model("shared"), "int8-g32").eval()
    tokens = tiny.tokens(model, 2, 9)
    attach(model, "one", adapters(model))
    changed = logits(model, tokens)
    with pytest.raises(UsageError, match="is packed: merging"):
        merge(model, "one")
    receipt = merge(model, "one", requantize=True)
    assert len(receipt.errors) == len(places(model)) and 0 < max(receipt.errors.values()) < 0.2
    assert (logits(model, tokens) - changed).norm() < 0.05 * changed.norm()
    unmerge(model, receipt)
    assert torch.equal(logits(model, tokens), changed)


@pytest.mark.parametrize("form", ["", "bf16", "int4-g32"])
@pytest.mark.parametrize("name", ["mixtral", "shared", "qwen3_moe", "llama_biases"])
def test_rows_of_several_adapters_in_one_step(name: str, form: str) -> None:
    torch.manual_seed(4)
    model = tiny.model(name).requires_grad_(False)
    model = (packed(model, form) if form else model).eval()
    for seed, one in enumerate(("one", "two")):
        attach(model, one, adapters(model, seed))
    pool = PagePool(model.config, 12, 4)
    wanted = ("two", "", "one", "two")
    prompts = [tiny.tokens(model, 1, length) for length in (7, 5, 3, 1)]
    with torch.no_grad():
        alone = []
        for adapter, prompt in zip(wanted, prompts, strict=True):
            activate(model, adapter)
            alone.append(model(prompt, cache=KVCache(model.config, 1, 12)).logits[0])
        activate(model, "one")  # who is active does not matter where rows say their own
        tables = [[0, 1], [2, 3], [4], [5]]
        step = PagedStep(pool, tables, [0] * 4, [prompt.shape[1] for prompt in prompts], wanted)
        output = model(torch.cat(prompts, dim=1), cache=step)
        together, rows = output.logits[0], torch.tensor([2, 7, 13, 15])
    tolerance = 0.02 if form == "int4-g32" else 1e-4
    torch.testing.assert_close(together, torch.cat(alone), rtol=tolerance, atol=tolerance * 3)
    torch.testing.assert_close(output.at(rows), together[rows], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_attached_is_refused_by_name() -> None:
    model = tiny.model("mixtral")
    made = adapters(model)
    with pytest.raises(ConfigError, match="called 'a"):
        attach(model, "a.b", made)
    key = ("blocks.0.attention.qkv", "weight")
    with pytest.raises(UsageError, match=r"blocks\.0\.attention\.qkv\.weight is 1 x .* another|trained on"):
        attach(model, "one", {key: made["blocks.0.attention.out", "weight"]})
    with pytest.raises(UsageError, match=r"blocks\.9\.attention\.qkv\.weight cannot have"):
        attach(model, "one", {("blocks.9.attention.qkv", "weight"): made[key]})
    assert not names(model)
    attach(model, "one", made)
    with pytest.raises(ConfigError, match="there is an adapter 'one' already"):
        attach(model, "one", adapters(model))
    with pytest.raises(ConfigError, match="there is no adapter 'two'"):
        activate(model, "two")
    with pytest.raises(ConfigError, match="'two' is to be merged"):
        merge(model, "two")
