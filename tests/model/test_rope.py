"""Rotary positions against complex numbers, and every stretching of frequencies against transformers'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moiety.config import RopeConfig
from moiety.errors import ConfigError
from moiety.model.context import KVCache
from moiety.model.rope import check_rope, frequencies, rotary_table, rotate, softmax_factor
from moiety.model.transformer import Transformer
from tests import tiny

THETA = 500.0


def by_complex_numbers(x_BHSd: Tensor, positions_S: Tensor, rotary_dim: int, *, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, times exp(i position theta^(-2j / rotary_dim)), in float64."""
    turning, rest = x_BHSd.double().split((rotary_dim, x_BHSd.shape[-1] - rotary_dim), dim=-1)
    if interleaved:  # dimensions 2j and 2j + 1
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:  # dimensions j and j + half
        first, second = turning[..., : rotary_dim // 2], turning[..., rotary_dim // 2 :]
    frequency = torch.tensor([THETA ** (-2 * j / rotary_dim) for j in range(rotary_dim // 2)]).double()
    angle = positions_S.double()[:, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        return torch.cat([torch.stack([turned.real, turned.imag], dim=-1).flatten(-2), rest], dim=-1)
    return torch.cat([turned.real, turned.imag, rest], dim=-1)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(6, 6), (10, 10), (2, 2), (10, 4), (7, 6), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_complex_multiplication(
    head_dim: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    x_BHSd, positions_S = torch.randn(2, 3, 40, head_dim, dtype=dtype), torch.arange(7, 47)
    y = rotate(x_BHSd, rotary_table(positions_S, rotary_dim, THETA), interleaved=interleaved)
    assert y.dtype == dtype and y.shape == x_BHSd.shape
    true = by_complex_numbers(x_BHSd, positions_S, rotary_dim, interleaved=interleaved)
    torch.testing.assert_close(y.double(), true, rtol=0, atol=2e-5)  # angles are float32
    assert torch.equal(y[..., rotary_dim:], x_BHSd[..., rotary_dim:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_two_pairings_are_not_alike(interleaved: bool) -> None:
    x_BHSd, positions_S = torch.randn(1, 2, 9, 8), torch.arange(9)
    y = rotate(x_BHSd, rotary_table(positions_S, 8, THETA), interleaved=interleaved).double()
    other = by_complex_numbers(x_BHSd, positions_S, 8, interleaved=not interleaved)
    assert (y - other)[:, :, 1:].abs().amax(-1).min() > 0.05, "every turned position must tell them apart"
    assert torch.equal(y[:, :, 0], x_BHSd[:, :, 0].double()), "position 0 does not turn"


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(1, 1, 1, 12), torch.randn(1, 1, 1, 12)

    def score(query_at: int, key_at: int) -> float:
        tables = [rotary_table(torch.tensor([at]), 12, THETA) for at in (query_at, key_at)]
        return float((rotate(query, tables[0]) * rotate(key, tables[1])).sum())

    assert score(3, 1) == pytest.approx(score(43, 41), abs=1e-4)
    assert abs(score(3, 1) - score(1, 3)) > 1e-2, "the way round matters"


def test_turning_keeps_the_length_and_the_gradient() -> None:
    x_BHSd = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.arange(5), 4, THETA)
    torch.testing.assert_close(rotate(x_BHSd, table).norm(dim=-1), x_BHSd.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x_BHSd,))
    longer = rotary_table(
        torch.arange(5), 4, THETA, RopeConfig(kind="linear", factor=2, attention_factor=1.7)
    )
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x, i=interleaved: rotate(x, longer, interleaved=i), (x_BHSd,))


def test_a_table_is_float32_whatever_the_dtype_and_no_positions_are_fine() -> None:
    cos, sin = rotary_table(torch.arange(0), 6, THETA)
    assert cos.shape == sin.shape == (0, 3) and cos.dtype == sin.dtype == torch.float32
    assert rotate(torch.randn(1, 2, 0, 6), (cos, sin)).shape == (1, 2, 0, 6)
    x = torch.randn(1, 1, 3000, 6).bfloat16()
    y = rotate(x, rotary_table(torch.arange(3000), 6, THETA))
    true = by_complex_numbers(x, torch.arange(3000), 6, interleaved=False)
    assert y.dtype == torch.bfloat16
    assert (y.double() - true).abs().max() < 0.04, "angles of thousands must not be rounded to bfloat16"


POSITIONS = 64  # of the model, where a kind asks for it
factors = st.floats(1.0, 40.0)


@st.composite
def stretched(draw: st.DrawFn, rotary_dim: int) -> tuple[RopeConfig, dict[str, Any]]:
    """A stretching in our words and in those of transformers."""
    kind = draw(st.sampled_from(["linear", "dynamic", "yarn", "llama3", "longrope"]))
    factor, original = draw(factors), draw(st.integers(4, 200))
    ours: dict[str, Any] = {"kind": kind, "factor": factor}
    theirs: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind not in ("linear", "dynamic"):
        ours["original_positions"] = theirs["original_max_position_embeddings"] = original
    if kind in ("yarn", "longrope") and draw(st.booleans()):
        ours["attention_factor"] = theirs["attention_factor"] = draw(st.floats(0.1, 3.0))
    if kind == "yarn":
        edges = {"beta_fast": draw(st.floats(2, 64)), "beta_slow": draw(st.floats(0.1, 2))}
        edges["truncate"] = draw(st.booleans())
        edges["mscale"], edges["mscale_all_dim"] = draw(
            st.sampled_from([(0.0, 0.0), (1.0, 1.0), (0.7, 1.3), (0.7, 0.0), (0.0, 1.0)])
        )
        ours, theirs = ours | edges, theirs | edges
    if kind == "llama3":
        low = draw(st.floats(0.5, 4))
        edges = {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.1, 8))}
        ours, theirs = ours | edges, theirs | edges
    if kind == "longrope":
        several = st.lists(factors, min_size=rotary_dim // 2, max_size=rotary_dim // 2)
        short, long = draw(several), draw(several)
        ours |= {"short_factor": tuple(short), "long_factor": tuple(long)}
        theirs |= {"short_factor": short, "long_factor": long}
    return RopeConfig(**ours), theirs


@given(
    data=st.data(),
    head_dim=st.sampled_from([8, 10, 24, 64, 128]),
    fraction=st.sampled_from([1.0, 0.5, 0.75]),
    theta=st.sampled_from([500.0, 10_000.0, 5e5, 1e7]),
    length=st.integers(1, 300),
)
@settings(max_examples=150)
def test_frequencies_are_those_of_transformers(
    data: st.DataObject, head_dim: int, fraction: float, theta: float, length: int
) -> None:
    rotary_dim = int(head_dim * fraction) // 2 * 2
    rope, theirs = data.draw(stretched(rotary_dim))
    config = transformers.LlamaConfig(
        hidden_size=4 * rotary_dim,
        num_attention_heads=4,
        head_dim=rotary_dim,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_theta": theta, **theirs},
    )
    true, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, None, seq_len=length)
    ours, our_factor = frequencies(rotary_dim, theta, rope, length=length, max_positions=POSITIONS)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, true, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)
    cos, sin = rotary_table(torch.arange(9), rotary_dim, theta, rope, length=length, max_positions=POSITIONS)
    angle = torch.arange(9)[:, None] * true
    torch.testing.assert_close(cos, angle.cos() * factor, rtol=0, atol=1e-5)
    torch.testing.assert_close(sin, angle.sin() * factor, rtol=0, atol=1e-5)


def test_a_fixed_alpha_is_that_of_hunyuan() -> None:
    from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1RotaryEmbedding

    config = transformers.HunYuanMoEV1Config(
        head_dim=24,
        rope_parameters={"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 1e4, "factor": 1.0},
    )
    true = HunYuanMoEV1RotaryEmbedding(config).inv_freq
    rope = RopeConfig(kind="alpha", factor=1000.0)
    for length in (1, 10**6):
        ours, factor = frequencies(24, 1e4, rope, length=length, max_positions=POSITIONS)
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=0)
        assert factor == 1


@pytest.mark.parametrize("length", [3, 8, 9, 50])
def test_longrope_of_phi(length: int) -> None:
    """Its own factors on cosines and sines, by length; short divisors always, as transformers has it, or by length."""
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    short, long = [1.0, 1.5, 2.0], [4.0, 8.0, 16.0]
    said = {"short_mscale": 1.1, "long_mscale": 1.4, "factor": 4.0}
    config = transformers.PhimoeConfig(
        hidden_size=24,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 8,
            "short_factor": short,
            "long_factor": long,
            **said,
        },
    )
    cos, sin = PhimoeRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    rope = RopeConfig(
        kind="longrope",
        original_positions=8,
        short_factor=tuple(short),
        long_factor=tuple(long),
        always_short=True,
        **said,
    )
    ours = rotary_table(torch.arange(length), 6, 1e4, rope, length=length)
    for mine, true in zip(ours, (cos, sin), strict=True):
        torch.testing.assert_close(mine, true[0, :, :3], rtol=0, atol=1e-6)
    by_length = RopeConfig(**{**vars(rope), "always_short": False})
    frequency, factor = frequencies(6, 1e4, by_length, length=length)
    divisor = torch.tensor(long if length > 8 else short)
    torch.testing.assert_close(frequency, 1 / (divisor * 1e4 ** (torch.arange(3) / 3)))
    assert factor == (1.4 if length > 8 else 1.1)


def test_the_factor_of_deepseek_on_the_softmax() -> None:
    rope = RopeConfig(kind="yarn", factor=40.0, original_positions=4096, mscale=1.0, mscale_all_dim=1.0)
    assert softmax_factor(rope) == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert softmax_factor(None) == softmax_factor(RopeConfig(kind="linear", factor=4.0)) == 1


THETA_OF_LLAMA = 1e4
IN_A_MODEL: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.2, 1.4],
        "long_factor": [2.0, 3.0, 5.0],
    },
}


def copied(kind: str) -> tuple[Transformer, Any]:
    """A model of ours and one of transformers with the same weights."""
    said = IN_A_MODEL[kind]
    keys = {"original_max_position_embeddings": "original_positions"}
    rope = RopeConfig(
        kind=kind,  # type: ignore[arg-type]
        **{keys.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in said.items()},
    )
    config = tiny.config(
        layers=2, attention=tiny.attention(rope=rope, rope_theta=THETA_OF_LLAMA), max_positions=16
    )
    made = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=16,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_theta": THETA_OF_LLAMA, "rope_type": kind, **said},
        attn_implementation="eager",
    )
    twin = transformers.LlamaForCausalLM(made).eval()
    model = Transformer(config)
    tiny.fill(model)
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.get_parameter("head.weight"),
    }
    for layer in range(2):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        q, k, v = model.get_parameter(ours + "attention.qkv.weight").split((24, 12, 12))
        gate, up = model.get_parameter(ours + "feed_forward.gate_up").chunk(2)
        state |= {
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": model.get_parameter(ours + "attention.out.weight"),
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": model.get_parameter(ours + "feed_forward.down"),
            theirs + "input_layernorm.weight": model.get_parameter(ours + "attention_norm.weight"),
            theirs + "post_attention_layernorm.weight": model.get_parameter(
                ours + "feed_forward_norm.weight"
            ),
        }
    twin.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()})
    return model, twin


@pytest.mark.parametrize("kind", IN_A_MODEL)
@torch.no_grad()
def test_a_model_decodes_past_its_original_length_as_transformers_does(kind: str) -> None:
    """Keys are kept as they were turned: where the length changes the frequencies, old ones do not turn again."""
    model, twin = copied(kind)
    tokens, cache, kept = tiny.tokens(model, 2, 30), KVCache(model.config, 2, 30), None
    whole = twin(tokens)
    assert (model(tokens).logits - whole.logits).abs().max() < 2e-5
    twin = copied_anew(twin)
    start = 0
    for positions in (6, 1, 1, 1, 4, 1, 6, 1, 1, 8):
        part = tokens[:, start : start + positions]
        theirs = twin(part, past_key_values=kept, use_cache=True)
        kept = theirs.past_key_values
        assert (model(part, cache=cache).logits - theirs.logits).abs().max() < 2e-5, start
        start += positions
    assert start == 30


def copied_anew(twin: Any) -> Any:
    """The same weights without what a longer text left behind in the frequencies of `dynamic`."""
    fresh = transformers.LlamaForCausalLM(twin.config).eval()
    fresh.load_state_dict(twin.state_dict())
    return fresh


@pytest.mark.parametrize(
    ("values", "rotary_dim", "theta", "message"),
    [
        ({"kind": "dynamic", "factor": 2.0}, 2, 1e4, "rotary_dim is 2"),
        ({"kind": "alpha", "factor": 2.0}, 2, 1e4, "rotary_dim is 2"),
        ({"kind": "yarn", "original_positions": 8}, 6, 1.0, "theta 1.0"),
        ({"kind": "yarn", "original_positions": 8, "beta_slow": 0.0}, 6, 1e4, "beta_slow 0.0"),
        (
            {"kind": "longrope", "original_positions": 8, "short_factor": (1.0,), "long_factor": (1.0,) * 3},
            6,
            1e4,
            "short_factor has 1 numbers",
        ),
        (
            {
                "kind": "longrope",
                "original_positions": 8,
                "short_factor": (1.0,) * 3,
                "long_factor": (0.0,) * 3,
            },
            6,
            1e4,
            "long_factor has 3 numbers, the smallest 0.0",
        ),
        (
            {
                "kind": "longrope",
                "factor": 2.0,
                "original_positions": 1,
                "short_factor": (1.0,) * 3,
                "long_factor": (1.0,) * 3,
            },
            6,
            1e4,
            "which is 0 for 1",
        ),
    ],
)
def test_a_stretching_without_a_value_is_refused(
    values: dict[str, Any], rotary_dim: int, theta: float, message: str
) -> None:
    rope = RopeConfig(**values)
    with pytest.raises(ConfigError, match=message):
        check_rope(rope, rotary_dim, theta)
    check_rope(None, rotary_dim, theta)
    with pytest.raises(ConfigError, match=message):
        Transformer(tiny.config(attention=tiny.attention(head_dim=rotary_dim, rope_theta=theta, rope=rope)))
