"""The Switch Transformer against transformers' own class: every path forward, gradients, and files both ways."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.switch_transformers import modeling_switch_transformers as theirs
from transformers.models.t5 import modeling_t5

from moiety import cost
from moiety.config import EncoderDecoderConfig, MoEConfig, from_dict, to_dict
from moiety.errors import ConfigError, FormatError, UsageError
from moiety.model import switch_files
from moiety.model.switch import SwitchTransformer, generate, position_bucket
from moiety.model.switch_files import load_switch, read_config, save_switch, write_config
from moiety.registry import REGISTRY, lookup
from tests import tiny

Twin = theirs.SwitchTransformersForConditionalGeneration


def hf_config(**changes: Any) -> Any:
    """Sizes that all differ, so that a transposed weight cannot fit; two tokens per expert and sequence."""
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "d_model": 20,
        "d_kv": 6,
        "d_ff": 26,
        "num_layers": 4,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "num_experts": 5,
        "expert_capacity": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 20,
        "decoder_start_token_id": 0,
    }
    return transformers.SwitchTransformersConfig(**{**sizes, **changes})


def drawn_config(seed: int) -> Any:
    draw = random.Random(seed)
    layers, decoder_layers = draw.randint(1, 6), draw.randint(1, 6)
    buckets = draw.choice([4, 5, 8, 11, 32])
    return hf_config(
        vocab_size=draw.randint(11, 90),
        d_model=draw.randint(3, 40),
        d_kv=draw.randint(1, 9),
        d_ff=draw.randint(1, 50),
        num_layers=layers,
        num_decoder_layers=draw.choice([decoder_layers, None]),
        num_heads=draw.randint(1, 5),
        num_experts=draw.randint(1, 9),
        expert_capacity=draw.randint(1, 4),
        num_sparse_encoder_layers=draw.randint(0, layers + 1),
        num_sparse_decoder_layers=draw.randint(0, layers + 1),
        router_bias=draw.random() < 0.5,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=buckets // 2 + draw.randint(1, 30),
        layer_norm_epsilon=draw.choice([1e-6, 1e-3]),
        dense_act_fn=draw.choice(["relu", "silu", "gelu", "gelu_new"]),
        tie_word_embeddings=draw.random() < 0.6,
    )


def twin_of(config: Any) -> Any:
    """A random model of transformers."""
    made = Twin(config)
    tiny.fill(made)
    with torch.no_grad():
        made.shared.weight.normal_()
        if config.tie_word_embeddings:
            made.tie_weights()
    return made.eval()


def both(config: Any, folder: Path) -> tuple[Any, SwitchTransformer]:
    """A random model of transformers, and ours read from its files."""
    twin = twin_of(config)
    twin.save_pretrained(folder)
    return twin, load_switch(folder)


def padding(kind: str, *shape: int) -> Tensor | None:
    """True for real tokens: padding behind, in front, or anywhere; a whole sequence of it at times."""
    sequences, positions = shape
    if kind == "none":
        return None
    if kind == "scattered":
        return torch.rand(shape) > 0.4
    real = torch.randint(0, positions + 1, (sequences, 1))
    place = torch.arange(positions)
    return place < real if kind == "right" else place >= positions - real


@torch.no_grad()
def assert_equal_outputs(twin: Any, ours: SwitchTransformer, kind: str = "none") -> int:
    """The same encoder output, logits and experts; returns how many tokens lost their expert.

    The twin's are in float64: its own float32 is up to 1.5e-5 from that, ours was not.
    """
    vocabulary = ours.config.vocab_size
    tokens, answer = torch.randint(vocabulary, (3, 13)), torch.randint(vocabulary, (3, 11))
    valid, answer_valid = padding(kind, 3, 13), padding(kind, 3, 11)
    given = {"attention_mask": valid, "decoder_attention_mask": answer_valid}
    true = copy.deepcopy(twin).double()(
        input_ids=tokens,
        decoder_input_ids=answer,
        output_router_logits=True,
        **{key: mask.long() for key, mask in given.items() if mask is not None},
    )
    output = ours(tokens, answer, valid_BT=valid, decoder_valid_BS=answer_valid)
    for found, wanted in (
        (output.encoded.hidden, true.encoder_last_hidden_state),
        (output.logits, true.logits),
    ):
        size = max(float(wanted.abs().max()), 1.0)
        torch.testing.assert_close(found / size, (wanted / size).float(), rtol=1e-5, atol=1e-5)
    lost = 0
    for routing, logits in (
        (output.encoded.routing, true.encoder_router_logits),
        (output.routing, true.decoder_router_logits),
    ):
        assert len(routing) == len(logits or ())
        for decided, logits_BSE in zip(routing.values(), logits or (), strict=True):
            chosen = decided if decided.wanted is None else decided.wanted
            expert_T = torch.empty(decided.tokens, dtype=torch.int64)
            expert_T[chosen.token_N] = chosen.expert_N
            assert torch.equal(expert_T, logits_BSE.argmax(-1).flatten())
            lost += decided.dropped
    return lost


@pytest.mark.parametrize("kind", ["none", "right", "left", "scattered"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_logits(step: int, kind: str, tmp_path: Path) -> None:
    config = hf_config(num_layers=6, num_decoder_layers=4, encoder_sparse_step=step, decoder_sparse_step=step)
    twin, ours = both(config, tmp_path)
    assert ours.config.encoder_moe_layers == {1: (0, 1, 2, 3, 4, 5), 2: (1, 3, 5), 3: (1, 4), 4: (1, 5)}[step]
    assert ours.config.decoder_moe_layers == {1: (0, 1, 2, 3), 2: (1, 3), 3: (1,), 4: (1,)}[step]
    assert assert_equal_outputs(twin, ours, kind) > 0, "nothing was dropped: the capacity is not tested"


@pytest.mark.parametrize("seed", range(24))
def test_logits_of_any_config(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    twin, ours = both(drawn_config(seed), tmp_path)
    assert_equal_outputs(twin, ours, ["none", "right", "left", "scattered"][seed % 4])


def test_gradients(tmp_path: Path) -> None:
    """Of every parameter, through what the capacity left."""
    twin, ours = both(hf_config(tie_word_embeddings=False, router_bias=True), tmp_path)
    tokens, answer = torch.randint(61, (2, 12)), torch.randint(61, (2, 9))
    valid = padding("right", 2, 12)
    assert valid is not None
    weight = torch.randn(2, 9, 61)
    true = twin(input_ids=tokens, decoder_input_ids=answer, attention_mask=valid.long()).logits
    (true * weight).sum().backward()
    (ours(tokens, answer, valid_BT=valid).logits * weight).sum().backward()
    named, own = dict(twin.named_parameters()), dict(ours.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    for part in switch_files.parts(ours.config, shapes):
        grad, expected = own[part.ours].grad, named[part.theirs].grad
        assert grad is not None, part
        expected = torch.zeros(part.shape(shapes[part.ours])) if expected is None else expected
        torch.testing.assert_close(part.of(grad), expected, rtol=1e-4, atol=1e-4, msg=str(part))


@pytest.mark.parametrize("kind", ["none", "left", "scattered"])
@torch.no_grad()
def test_cached_decoding(kind: str, tmp_path: Path) -> None:
    """Pieces of 4, 1, 3 and 1 tokens, and the capacity holds for each piece, in transformers as here."""
    twin, ours = both(hf_config(num_sparse_decoder_layers=3), tmp_path)
    tokens, answer = torch.randint(61, (3, 8)), torch.randint(61, (3, 9))
    valid = padding(kind, 3, 8)
    given = {} if valid is None else {"attention_mask": valid.long()}
    encoded = ours.encode(tokens, valid_BT=valid)
    cache = ours.cache(encoded, 9)
    state, past = twin.encoder(input_ids=tokens, **given), None
    for start, stop in ((0, 4), (4, 5), (5, 8), (8, 9)):
        true = twin(
            encoder_outputs=state,
            decoder_input_ids=answer[:, start:stop],
            past_key_values=past,
            use_cache=True,
            **given,
        )
        past = true.past_key_values
        output = ours.decode(answer[:, start:stop], encoded, cache=cache)
        torch.testing.assert_close(output.logits, true.logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="holds 9 positions, 9 are used"):
        ours.decode(answer[:, :1], encoded, cache=cache)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_cached_decoding_equals_one_pass_where_nothing_is_dropped(padded: bool) -> None:
    config = read_config({**write_config(read_config(hf_config().to_dict())), "expert_capacity": 2**31 - 1})
    assert config.expert_capacity is None
    model = SwitchTransformer(config).eval()
    tiny.fill(model)
    encoded = model.encode(torch.randint(61, (3, 7)))
    answer = torch.randint(61, (3, 8))
    valid = padding("left", 3, 8) if padded else None
    whole = model.decode(answer, encoded, valid_BS=valid)
    assert sum(routing.dropped for routing in whole.routing.values()) == 0
    cache = model.cache(encoded, 10)
    pieces = [
        model.decode(
            answer[:, at : at + 1],
            encoded,
            valid_BS=None if valid is None else valid[:, at : at + 1],
            cache=cache,
        ).logits
        for at in range(8)
    ]
    seen = slice(None) if valid is None else valid  # padding in front sees nothing, differently
    torch.testing.assert_close(torch.cat(pieces, 1)[seen], whole.logits[seen], rtol=1e-5, atol=1e-5)


def test_generation_equals_transformers(tmp_path: Path) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        twin, ours = both(hf_config(tie_word_embeddings=False), tmp_path / str(seed))
        tokens = torch.randint(2, 61, (4, 9))
        valid = torch.arange(9) < torch.randint(1, 10, (4, 1))
        true = twin.generate(
            input_ids=tokens, attention_mask=valid.long(), max_new_tokens=12, do_sample=False, num_beams=1
        )
        answers = generate(ours, tokens, valid_BT=valid, max_tokens=12)
        assert len({tuple(answer) for answer in answers}) > 1
        for answer, row in zip(answers, true[:, 1:].tolist(), strict=True):
            assert answer == row[: len(answer)], (answer, row)
            assert set(row[len(answer) :]) <= {0}


def test_generation_ends_and_does_not_depend_on_the_batch() -> None:
    model = SwitchTransformer(read_config(hf_config(tie_word_embeddings=False).to_dict())).eval()
    tokens = torch.randint(61, (3, 6))
    free = generate(model, tokens, max_tokens=9, end_id=None)
    assert [len(answer) for answer in free] == [9, 9, 9]
    assert [generate(model, row[None], max_tokens=9, end_id=None)[0] for row in tokens] == free
    end = free[1][4]
    ended = generate(model, tokens, max_tokens=9, end_id=end)
    for answer, whole in zip(ended, free, strict=True):
        assert answer == (whole[: whole.index(end) + 1] if end in whole else whole)
    with pytest.raises(UsageError, match="max_tokens is 0"):
        generate(model, tokens, max_tokens=0)


def test_position_buckets() -> None:
    offset = torch.arange(-700, 700)
    for buckets, most in ((4, 3), (5, 9), (7, 4), (32, 128), (32, 17), (33, 500), (64, 128)):
        for both_sides in (True, False):
            true = theirs.SwitchTransformersAttention._relative_position_bucket(
                offset, bidirectional=both_sides, num_buckets=buckets, max_distance=most
            )
            ours = position_bucket(offset, buckets=buckets, most=most, both_sides=both_sides)
            assert torch.equal(ours, true), (buckets, most, both_sides)


@torch.no_grad()
def test_jitter_is_for_training_alone(tmp_path: Path) -> None:
    _, ours = both(hf_config(router_jitter_noise=0.3), tmp_path)
    assert ours.config.moe.router_options == ("jitter=0.3",) and not ours.training
    tokens = torch.randint(61, (2, 5))
    assert torch.equal(ours(tokens, tokens).logits, ours(tokens, tokens).logits)
    ours.train()
    assert not torch.equal(ours(tokens, tokens).logits, ours(tokens, tokens).logits)


def gated_twin(config: Any, activation: str) -> Any:
    """transformers has no gated Switch Transformer: its model, with T5's gated feed-forward in every place."""
    twin = Twin(config)

    class Gated(modeling_t5.T5DenseGatedActDense):
        pass

    like = transformers.T5Config(d_model=config.d_model, d_ff=config.d_ff, dropout_rate=0.0)
    like.dense_act_fn = activation
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, theirs.SwitchTransformersDenseActDense):
                if isinstance(module, nn.ModuleDict):
                    module[name] = Gated(like)
                else:
                    setattr(module, name, Gated(like))
    tiny.fill(twin)
    return twin.eval()


@pytest.mark.parametrize(
    ("said", "activation"),
    [
        ({"dense_act_fn": "gated-gelu"}, "gelu_new"),
        ({"dense_act_fn": "gelu_new", "is_gated_act": True}, "gelu_new"),
        ({"dense_act_fn": "silu", "feed_forward_proj": "gated-silu"}, "silu"),
        ({"dense_act_fn": "gelu", "is_gated_act": True}, "gelu"),
    ],
)
def test_gated_feed_forwards(said: dict[str, Any], activation: str, tmp_path: Path) -> None:
    config = hf_config()
    twin = gated_twin(config, activation)
    values = {**config.to_dict(), **said}
    (tmp_path / "config.json").write_text(json.dumps(values))
    state = {
        name: tensor
        for name, tensor in twin.state_dict().items()
        if name not in switch_files.TIED["embed.weight"][1:]
    }
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    ours = load_switch(tmp_path)
    assert ours.config.moe.gated
    assert assert_equal_outputs(twin, ours) > 0
    save_switch(ours, tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    assert load_switch(tmp_path / "again").config == ours.config
    with pytest.raises(KeyError, match="gated"):  # loud: not a model without its gates
        Twin.from_pretrained(tmp_path / "again")


# Files


@pytest.mark.parametrize("seed", range(8))
def test_transformers_reads_what_we_write(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    _, ours = both(drawn_config(100 + seed), tmp_path / "first")
    save_switch(ours, tmp_path / "again", max_shard_bytes=20_000)
    twin, said = Twin.from_pretrained(tmp_path / "again", dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), said
    assert_equal_outputs(twin.eval(), ours, "right")
    once_more = load_switch(tmp_path / "again")
    assert once_more.config == ours.config
    state = ours.state_dict()
    assert once_more.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in once_more.state_dict().items())


def test_our_own_model_survives_both_ways(tmp_path: Path) -> None:
    moe = MoEConfig(experts=3, experts_per_token=1, d_ff=9, router="switch", gated=False, activation="relu")
    config = EncoderDecoderConfig(
        vocab_size=30, d_model=8, layers=5, decoder_layers=2, heads=2, head_dim=4, moe=moe, moe_every=3,
        decoder_moe_every=0, expert_capacity=None, start_token=7,
    )  # fmt: skip
    model = SwitchTransformer(config).eval()
    model.save(tmp_path / "ours")
    twin = Twin.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert_equal_outputs(twin, model)
    assert twin.generation_config.decoder_start_token_id == 7
    found = load_switch(tmp_path / "ours", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert from_dict(EncoderDecoderConfig, to_dict(found.config)) == found.config
    assert found.config.start_token == 7 and found.config.expert_capacity is None
    save_switch(found, tmp_path / "half", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {
        torch.float16
    }


def test_defaults_are_those_of_transformers() -> None:
    plain = transformers.SwitchTransformersConfig()
    for key, value in switch_files.DEFAULTS.items():
        if value is not None:
            assert getattr(plain, key) == value, key
    ours = read_config({"model_type": "switch_transformers"})
    assert ours == read_config(plain.to_dict())
    assert len(ours.encoder_moe_layers) == 3


def test_step_wins_over_number_and_dense_stacks() -> None:
    for changes in (
        {"encoder_sparse_step": 3},
        {"num_sparse_encoder_layers": 0},
        {"num_sparse_encoder_layers": 9},
        {"num_layers": 1, "num_sparse_encoder_layers": 1},
        {"decoder_sparse_step": 0},
    ):
        config = hf_config(**changes)
        twin, ours = Twin(config), read_config(config.to_dict())
        assert ours.encoder_moe_layers == tuple(
            layer for layer, block in enumerate(twin.encoder.block) if block.is_sparse
        )
        assert ours.decoder_moe_layers == tuple(
            layer for layer, block in enumerate(twin.decoder.block) if block.is_sparse
        )


@pytest.mark.parametrize("seed", range(6))
def test_counts(seed: int) -> None:
    config = drawn_config(200 + seed)
    twin, ours = Twin(config), read_config(config.to_dict())
    unread = 0 if config.tie_word_embeddings else twin.shared.weight.numel()
    total = cost.parameters(ours).total
    assert total == sum(parameter.numel() for parameter in twin.parameters()) - unread
    assert total == sum(parameter.numel() for parameter in SwitchTransformer(ours).parameters())


@pytest.mark.parametrize("name", [name for name in REGISTRY if name.startswith("switch-")])
def test_the_registry_describes_models_that_run(name: str) -> None:
    config = lookup(name)
    assert isinstance(config, EncoderDecoderConfig)
    with torch.device("meta"):
        model = SwitchTransformer(config, initialize=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost.parameters(config).total


def rewritten(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    """Change tensors of a saved model; None takes one away."""
    file = folder / "model.safetensors"
    state = {**load_file(file), **tensors}
    save_file(
        {name: one.contiguous() for name, one in state.items() if one is not None}, file, {"format": "pt"}
    )


def test_files_of_other_makes(tmp_path: Path) -> None:
    """Copies of the tied embedding, a table that nothing reads, an embedding under another name: all the same."""
    twin, _ = both(hf_config(), tmp_path)
    shared = twin.shared.weight.detach()
    table = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = {name: shared.clone() for name in switch_files.TIED["embed.weight"]}
    rewritten(tmp_path, {**copies, table: torch.zeros(12, 4)})
    assert_equal_outputs(twin, load_switch(tmp_path))
    rewritten(tmp_path, dict.fromkeys(switch_files.TIED["embed.weight"][:2]))
    assert_equal_outputs(twin, load_switch(tmp_path))
    rewritten(tmp_path, {"lm_head.weight": shared + 1})
    with pytest.raises(FormatError, match=r"lm_head\.weight is not decoder\.embed_tokens\.weight"):
        load_switch(tmp_path)


def test_an_untied_model_with_one_embedding(tmp_path: Path) -> None:
    twin, _ = both(hf_config(tie_word_embeddings=False), tmp_path)
    with torch.no_grad():
        twin.encoder.embed_tokens.weight.copy_(twin.shared.weight)
        twin.decoder.embed_tokens.weight.copy_(twin.shared.weight)
    rewritten(tmp_path, {"encoder.embed_tokens.weight": None, "decoder.embed_tokens.weight": None})
    assert_equal_outputs(twin, load_switch(tmp_path))


EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_4.wo.weight"


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({EXPERT: None}, f"lacks {EXPERT}"),
        ({"shared.weight": None}, "lacks shared.weight"),
        (
            {"encoder.block.0.layer.1.mlp.wi_0.weight": torch.ones(1)},
            "also has encoder.block.0.layer.1.mlp.wi_0",
        ),
        ({"encoder.block.4.layer.0.layer_norm.weight": torch.ones(20)}, "also has encoder.block.4"),
        ({EXPERT: torch.ones(26, 20)}, rf"{EXPERT} has shape \(26, 20\); by config.json it is \(20, 26\)"),
        ({EXPERT: torch.ones(20, 26, dtype=torch.int64)}, "is torch.int64"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Tensor | None], complaint: str, tmp_path: Path) -> None:
    twin_of(hf_config()).save_pretrained(tmp_path)
    rewritten(tmp_path, tensors)
    with pytest.raises(FormatError, match=complaint):
        load_switch(tmp_path)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"hidden_act": "relu"}, "hidden_act, unknown"),
        ({"router_dtype": "bfloat16"}, "router_dtype 'bfloat16'; allowed is 'float32'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        ({"num_selected_experts": 2}, "num_selected_experts 2; allowed is 1"),
        ({"dense_act_fn": "gated-tanh"}, "dense_act_fn 'gated-tanh'; allowed is relu"),
        ({"dense_act_fn": ["relu"]}, "dense_act_fn"),
        ({"hidden_size": 21}, "says d_model twice"),
        ({"encoder_sparse_step": "2"}, "encoder_sparse_step '2'"),
        ({"num_layers": 2.0}, "integers are wanted"),
        ({"num_layers": 10**12}, "describes 1000000000000 and 3 layers"),
        ({"num_decoder_layers": 10**12}, "describes 4 and 1000000000000 layers"),
        ({"d_ff": 10**15}, "parameters are stored"),
        ({"num_experts": 2**62}, "parameters are stored"),
        ({"expert_capacity": 0}, "expert_capacity is 0"),
        ({"relative_attention_num_buckets": 3}, "position_buckets is 3"),
        ({"relative_attention_max_distance": 6}, "position_distance is 6"),
        ({"decoder_start_token_id": 61}, "start_token is 61"),
        ({"router_jitter_noise": 1.5}, "jitter is 1.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"tie_word_embeddings": "yes"}, "tied is 'yes'"),
    ],
)
def test_configs_that_are_refused(values: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    twin_of(hf_config()).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises((FormatError, ConfigError), match=complaint):
        load_switch(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "softmax"},
        {"shared_d_ff": 4},
        {"bias": True},
        {"capacity_factor": 1.0},
        {"eval_capacity_factor": 1.0},
        {"null_experts": 1},
        {"temperature": 2.0},
        {"weigh_input": True},
        {"router_gradient": "dense"},
    ],
    ids=str,
)
def test_what_the_layers_do_not_do_is_refused(changes: dict[str, Any]) -> None:
    moe = MoEConfig(**{"experts": 3, "experts_per_token": 1, "d_ff": 9, "router": "switch", **changes})
    config = EncoderDecoderConfig(vocab_size=9, d_model=8, layers=2, heads=2, head_dim=4, moe=moe)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        SwitchTransformer(config)


def test_wrong_calls() -> None:
    model = SwitchTransformer(read_config(hf_config().to_dict())).eval()
    tokens = torch.randint(61, (2, 5))
    encoded = model.encode(tokens)
    with pytest.raises(UsageError, match="tokens range from 0 to 61"):
        model.encode(torch.tensor([[0, 61]]))
    with pytest.raises(UsageError, match=r"decoder tokens have shape \(5,\)"):
        model.decode(tokens[0], encoded)
    with pytest.raises(UsageError, match=r"\(2, 0\)"):
        model.decode(tokens[:, :0], encoded)
    with pytest.raises(UsageError, match="padding is"):
        model.encode(tokens, valid_BT=torch.ones_like(tokens))
    with pytest.raises(UsageError, match="1 sequences to decode, but 2"):
        model.decode(tokens[:1], encoded)
    with pytest.raises(UsageError, match="the cache is for 1 sequences"):
        model.decode(tokens, encoded, cache=model.cache(model.encode(tokens[:1]), 9))
    with pytest.raises(UsageError, match="max_positions is 0"):
        model.cache(encoded, 0)
    with pytest.raises(UsageError, match="weights cannot be"):
        save_switch(model, "nowhere", dtype=torch.int8)
