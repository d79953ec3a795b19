"""Any mixture of the decoder's options: in pieces as the whole, recomputed as kept, scored as its own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moiety import cost
from moiety.config import MLAConfig, ModelConfig, RopeConfig
from moiety.infer.generate import generate
from moiety.infer.options import SamplingOptions
from moiety.model.context import KVCache
from moiety.model.norm import LayerNorm
from moiety.model.transformer import Block, ModelOutput, Transformer
from tests import tiny

LAYERS = 3
SHORT, LONG = (1.0, 1.5, 2.0), (2.0, 3.0, 5.0)
ROPES = (
    None,
    RopeConfig(kind="linear", factor=3.0),
    RopeConfig(kind="alpha", factor=50.0),
    RopeConfig(kind="yarn", factor=4.0, original_positions=8, mscale=1.0, mscale_all_dim=0.7),
    RopeConfig(kind="llama3", factor=8.0, original_positions=16),
    RopeConfig(kind="longrope", factor=4.0, original_positions=64, short_factor=SHORT, long_factor=LONG),
    RopeConfig(kind="dynamic", factor=4.0, original_positions=64),
)
some_layers = st.none() | st.sets(st.integers(0, LAYERS - 1)).map(lambda chosen: tuple(sorted(chosen)))


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    """Options that any attention has, and those of one of the two kinds."""
    said: dict[str, Any] = {
        "rope": draw(st.sampled_from(ROPES)),
        "rope_pairs": draw(st.sampled_from(["half", "interleaved"])),
        "rope_layers": draw(some_layers),
        "scale": draw(st.sampled_from([None, 0.3])),
        "logit_cap": draw(st.sampled_from([0.0, 1.5])),
        "query_scale": draw(st.sampled_from([0.0, 0.3])),
        "query_scale_floor": draw(st.sampled_from([1, 4])),
        "window": draw(st.sampled_from([None, 1, 3, 8])),
    }
    if said["window"] is not None:
        said["window_layers"], said["chunked"] = draw(some_layers), draw(st.booleans())
    if draw(st.integers(0, 3)) == 0:
        q_rank = draw(st.sampled_from([0, 5]))
        said["mla"] = MLAConfig(q_rank=q_rank, kv_rank=7, nope_dim=4, rope_dim=6, value_dim=5)
        return said
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]))
    return said | {
        "heads": heads,
        "kv_heads": kv_heads,
        "qkv_bias": draw(st.booleans()),
        "out_bias": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "clip_qkv": draw(st.sampled_from([0.0, 0.7])),
        "qk_norm": draw(st.sampled_from(["none", "head", "full", "head_rotated", "l2_rotated"])),
    }


@st.composite
def experts(draw: st.DrawFn) -> dict[str, Any]:
    """A feed-forward with experts: what they compute, and where their weight goes."""
    said: dict[str, Any] = {"bias": draw(st.booleans()), "shared_d_ff": draw(st.sampled_from([0, 6]))}
    said["activation"] = draw(st.sampled_from(["silu", "clamped_swiglu"]))
    said["activation_limit"] = draw(st.sampled_from([0.5, 7.0]))
    said["weigh_input"] = draw(st.booleans())
    said["router"] = draw(st.sampled_from(["softmax", "sigmoid"]))
    return said


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    said: dict[str, Any] = {
        "norm": draw(st.sampled_from(["rms", "layer"])),
        "norm_place": draw(st.sampled_from(["pre", "post", "both"])),
        "embedding_multiplier": draw(st.sampled_from([1.0, 1.7])),
        "residual_multiplier": draw(st.sampled_from([1.0, 0.6])),
        "logits_multiplier": draw(st.sampled_from([1.0, 0.4])),
        "logits_cap": draw(st.sampled_from([0.0, 2.0])),
        "tied": draw(st.booleans()),
        "head_bias": draw(st.booleans()),
    }
    said["norm_bias"] = said["norm"] == "layer" and draw(st.booleans())
    if draw(st.booleans()):
        said["moe"] = tiny.experts(**draw(experts()))
        said["dense_layers"] = draw(st.sampled_from([(), (0,), (0, 2)]))
    return tiny.config(layers=LAYERS, attention=tiny.attention(**draw(attentions())), **said)


def built(config: ModelConfig, *, seed: int = 0, checkpointing: bool = False) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config, checkpointing=checkpointing)
    tiny.fill(model)
    return model.double()


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.timeout_s(240)
@given(config=configs(), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5))
@settings(max_examples=150)
@torch.no_grad()
def test_pieces_through_the_cache_equal_the_whole(config: ModelConfig, cuts: list[int]) -> None:
    model = built(config)
    assert cost.parameters(config).total == sum(p.numel() for p in model.parameters())
    total = sum(cuts) + 2
    tokens, cache = tiny.tokens(model, 2, total), KVCache(config, 2, total, dtype=torch.float64)
    cache.buffer.fill_(float("nan"))
    whole, parts, start = model(tokens), [], 0
    for positions in (*cuts, 1, 1):
        parts.append(model(tokens[:, start : start + positions], cache=cache))
        start += positions
    logits = torch.cat([part.logits for part in parts], dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts[-1].last_logits, whole.logits[:, -1], rtol=1e-10, atol=1e-10)
    for layer, routing in whole.routing.items():
        assert torch.equal(sum(part.routing[layer].counts_E for part in parts), routing.counts_E)


@given(config=configs(), lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=60)
@torch.no_grad()
def test_neither_padding_nor_later_tokens_change_anything(
    config: ModelConfig, lengths: tuple[int, int]
) -> None:
    model = built(config)
    tokens = tiny.tokens(model, 2, 9)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    output = model(tokens, valid_BS=valid)
    for sequence, length in enumerate(lengths):
        alone = model(tokens[sequence : sequence + 1, :length]).logits[0]
        torch.testing.assert_close(output.logits[sequence, :length], alone, rtol=1e-10, atol=1e-10)


@given(config=configs())
@settings(max_examples=60)
def test_recomputed_and_scored_as_its_own_logits(config: ModelConfig) -> None:
    """Gradients: of the sliced loss as of plain torch on the logits, and of recomputed blocks bit for bit."""
    model, again = built(config), built(config, checkpointing=True)
    tokens, target = tiny.tokens(model, 2, 7), tiny.tokens(model, 2, 7)
    target[0, 2:4] = -100
    ours = gradients(model, model(tokens).cross_entropy(target))
    logits = model(tokens).logits.flatten(0, 1)
    plain = gradients(model, F.cross_entropy(logits, target.flatten(), reduction="sum", ignore_index=-100))
    recomputed = gradients(again, again(tokens).cross_entropy(target))
    reached = 0
    for name, right in plain.items():
        mine, other = ours[name], recomputed[name]
        if right is None:  # the score of a router that weighs by 1, an idle expert
            assert mine is None and other is None, name
            continue
        assert mine is not None and other is not None, name
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(mine, other), name
        reached += bool(right.any())
    assert reached > 0.5 * len(plain), "a window of 1 leaves queries without a gradient, and little else does"


@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("latent", [False, True])
def test_one_token_and_none(latent: bool, shape: tuple[int, int]) -> None:
    """Where attention is not torch's own."""
    said: dict[str, Any] = {"window": 2, "logit_cap": 1.0, "sinks": not latent}
    if latent:
        said["mla"] = MLAConfig(kv_rank=7, nope_dim=4, rope_dim=6, value_dim=5)
    model = built(tiny.config(attention=tiny.attention(**said)))
    output = model(torch.zeros(shape, dtype=torch.int64), cache=KVCache(model.config, shape[0], 4))
    assert output.logits.shape == (*shape, 61) and bool(output.logits.isfinite().all())


class TestBlocks:
    """What a block adds up, by its formula."""

    @pytest.mark.parametrize("place", ["pre", "post", "both"])
    @torch.no_grad()
    def test_norms_stand_where_they_are_said_to(self, place: str) -> None:
        config = tiny.config(
            norm="layer", norm_bias=True, norm_place=place, residual_multiplier=0.3, embedding_multiplier=2.5
        )
        model = built(config)
        tokens = tiny.tokens(model, 1, 6)
        seen: dict[str, Tensor] = {}
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            for name in ("attention", "feed_forward"):
                part = getattr(block, name)
                part.register_forward_hook(
                    lambda _, given, answer, key=f"{layer}.{name}": seen.update(
                        {key + ".in": given[0], key: answer}
                    )
                )
        hidden = model(tokens).hidden
        x_BSD = 2.5 * model.embed.weight[tokens]
        for layer, block in enumerate(model.blocks):
            for name in ("attention", "feed_forward"):
                before, after = getattr(block, f"{name}_norm"), getattr(block, f"{name}_post_norm")
                assert (before is None) == (place == "post") and (after is None) == (place == "pre")
                wanted = x_BSD if before is None else before(x_BSD)
                tiny.assert_exact(seen[f"{layer}.{name}.in"], wanted)
                answer = seen[f"{layer}.{name}"]
                x_BSD = x_BSD + 0.3 * (answer if after is None else after(answer))
        assert isinstance(model.norm, LayerNorm)
        tiny.assert_exact(hidden, model.norm(x_BSD))

    @pytest.mark.parametrize("tied", [False, True])
    @torch.no_grad()
    def test_the_head(self, tied: bool) -> None:
        model = built(
            tiny.config(tied=tied, head_bias=True, logits_multiplier=0.5, logits_cap=1.5, vocab_size=23)
        )
        names = {name for name in model.state_dict() if name.startswith("head")}
        assert names == ({"head.bias"} if tied else {"head.weight", "head.bias"})
        output = model(tiny.tokens(model, 2, 5))
        weight = model.embed.weight if tied else model.get_parameter("head.weight")
        raw = 0.5 * (output.hidden @ weight.T + model.get_parameter("head.bias"))
        tiny.assert_exact(output.logits, 1.5 * (raw / 1.5).tanh())
        tiny.assert_exact(output.last_logits, output.logits[:, -1])
        assert (output.logits - raw).abs().max() > 0.01, "the cap is felt"

    def test_first_weights_of_the_new_parts(self) -> None:
        config = tiny.config(
            norm="layer",
            norm_bias=True,
            norm_place="both",
            head_bias=True,
            attention=tiny.attention(sinks=True),
        )
        for name, parameter in Transformer(config).named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif name.endswith("norm.weight"):
                assert bool((parameter == 1).all()), name
            else:
                assert 0 < float(parameter.detach().abs().max()) < 5 * (2 / (5 * config.d_model)) ** 0.5, name


@torch.no_grad()
def test_generation_draws_from_the_logits_of_the_head() -> None:
    """Greedy, so a multiplier cannot change it; the bias of one token can."""
    model = built(tiny.config(head_bias=True, logits_multiplier=0.5))
    model.get_parameter("head.bias")[7] = 1e3
    assert list(generate(model, [1, 2], max_tokens=3, sampling=SamplingOptions(temperature=0))) == [7, 7, 7]


def test_the_loss_of_an_output_knows_its_head() -> None:
    hidden, weight_VD, bias_V = torch.randn(2, 3, 4), torch.randn(9, 4), torch.randn(9)
    output = ModelOutput(
        hidden=hidden, head_weight=weight_VD, head_bias=bias_V, logits_multiplier=0.7, logits_cap=1.1
    )
    target = torch.randint(9, (2, 3))
    true = F.cross_entropy(output.logits.flatten(0, 1), target.flatten(), reduction="sum")
    torch.testing.assert_close(output.cross_entropy(target), true)
    bare = ModelOutput(hidden=hidden, head_weight=weight_VD)
    assert (bare.logits - output.logits).abs().max() > 0.1
