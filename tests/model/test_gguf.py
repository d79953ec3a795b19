"""GGUF files in and out: against transformers, against files that the gguf package writes, and round trips."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from moiety.config import ModelConfig
from moiety.errors import FormatError, StorageError, UsageError
from moiety.model import checkpoint, gguf
from moiety.model.gguf import files, header, names, tensors
from moiety.model.transformer import Transformer
from moiety.quant.quantize import policy_named, quantize
from tests import gguf_models, tiny

Q = package.GGMLQuantizationType
TRAINING = {"balance_loss": 0.01, "z_loss": 0.001}


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("name", gguf_models.MODELS)
def test_float32_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    model = gguf_models.model(name)
    assert gguf.save_gguf(model, tmp_path / "it.gguf", "f32") == name.partition("-")[0]
    back = gguf.load_gguf(tmp_path / "it.gguf")
    tokens = tiny.tokens(model, 2, 19)
    if name in ("llama-interleaved", "olmoe-tied"):  # other pairs; a head of its own
        torch.testing.assert_close(logits(back, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
        return
    assert torch.equal(logits(back, tokens), logits(model, tokens))
    found, wanted = (dataclasses.asdict(one.config) for one in (back, model))
    if wanted["moe"]:
        for option in ("balance_loss", "z_loss", "bias_rate", "group_score"):
            found["moe"].pop(option), wanted["moe"].pop(option)
    assert found == wanted
    assert gguf.load_config(tmp_path / "it.gguf") == back.config


# What its reader passes over is at its defaults here: the width of Qwen3's heads and experts.
READ_BY_TRANSFORMERS = {
    "llama": gguf_models.MODELS["llama-tied"],
    "qwen2": gguf_models.MODELS["qwen2-tied"],
    "qwen3": gguf_models.config(tiny.attention(qk_norm="head", head_dim=128)),
    "qwen3moe": gguf_models.config(tiny.attention(qk_norm="head"), tiny.experts(d_ff=768)),
}


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    """Its reader of GGUF files is not ours: names, order of rows, metadata."""
    model = Transformer(READ_BY_TRANSFORMERS[name]).eval()
    tiny.fill(model)
    assert gguf.save_gguf(model, tmp_path / "it.gguf", "f32") == name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="it.gguf", dtype=torch.float32, **tiny.EAGER
    ).eval()
    tokens = tiny.tokens(model, 2, 19)
    torch.testing.assert_close(logits(theirs, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    model = gguf_models.model("deepseek2-yarn")
    gguf.save_gguf(
        model, tmp_path / "it.gguf", "q8_0", gguf_models.tokenizer(), chat_template="{{ 1 }}", name="N"
    )
    reader = package.GGUFReader(tmp_path / "it.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.name"] == "N" and said["tokenizer.chat_template"] == "{{ 1 }}"
    assert said["deepseek2.attention.kv_lora_rank"] == 24 and said["deepseek2.expert_weights_norm"] is True
    assert said["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.07)
    assert said["general.file_type"] == package.LlamaFileType.MOSTLY_Q8_0
    assert len(said["tokenizer.ggml.tokens"]) == gguf_models.VOCABULARY
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert (
        kinds["blk.1.ffn_gate_inp.weight"]
        == kinds["blk.1.exp_probs_b.bias"]
        == kinds["output_norm.weight"]
        == Q.F32
    )
    known = package.get_tensor_name_map(package.MODEL_ARCH.DEEPSEEK2, 3)
    assert all(known.get_name(name, (".weight", ".bias")) for name in kinds)


# The trap: queries and keys in the wrong order of rows.


def test_rows_of_queries_and_keys_are_reordered_in_each_head() -> None:
    """Written out by hand: in a head of 6, rows 0 and 3 turn together, and stand side by side in the file."""
    ours = torch.arange(12.0)[:, None].expand(12, 2)
    link = names.Link("blk.0.attn_q.weight", "blocks.0.attention.qkv.weight", 0, 12, turned=2)
    theirs = tensors.view(ours, link, None).reshape(12, 2)[:, 0]
    assert theirs.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def their_order(weight: Tensor, heads: int) -> np.ndarray:
    """What llama.cpp's own converter does to the rows of queries and keys."""
    rows = weight.numpy()
    return np.ascontiguousarray(
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def from_transformers(target: Path, model: Any, *, reorder: bool) -> None:
    """A Mixtral or Llama of transformers as the converter of llama.cpp writes it; nothing of ours is asked."""
    config, state = model.config, model.state_dict()
    writer = package.GGUFWriter(target, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    known = package.get_tensor_name_map(package.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if "experts.gate_up_proj" in name:
            block = name.split(".")[2]
            gate, up = tensor.chunk(2, dim=1)
            writer.add_tensor(f"blk.{block}.ffn_gate_exps.weight", gate.contiguous().numpy())
            writer.add_tensor(f"blk.{block}.ffn_up_exps.weight", up.contiguous().numpy())
        elif "experts.down_proj" in name:
            writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", tensor.numpy())
        elif "q_proj" in name and reorder:
            writer.add_tensor(
                known.get_name(name, (".weight",)), their_order(tensor, config.num_attention_heads)
            )
        elif "k_proj" in name and reorder:
            writer.add_tensor(
                known.get_name(name, (".weight",)), their_order(tensor, config.num_key_value_heads)
            )
        elif name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(known.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_files_of_other_hands_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = tiny.twin(name)
    tokens = torch.randint(61, (2, 19))
    from_transformers(tmp_path / "right.gguf", theirs, reorder=True)
    torch.testing.assert_close(
        logits(gguf.load_gguf(tmp_path / "right.gguf"), tokens), logits(theirs, tokens), rtol=1e-5, atol=1e-5
    )
    from_transformers(tmp_path / "wrong.gguf", theirs, reorder=False)
    wrong = logits(gguf.load_gguf(tmp_path / "wrong.gguf"), tokens)
    assert float((wrong - logits(theirs, tokens)).abs().max()) > 0.1  # it loads, and is another model


# Types of tensors.


def stored(data: np.ndarray, kind: Q, shape: tuple[int, ...]) -> header.StoredTensor:
    raw = memoryview(np.ascontiguousarray(data).view(np.uint8).reshape(-1)).toreadonly()
    return header.StoredTensor(Path("f.gguf"), "t", shape, header.TYPES[int(kind)], raw)


@pytest.mark.parametrize("kind", [one for one in header.TYPES if header.TYPES[one].name in tensors.DECODED])
def test_every_type_is_decoded_as_the_gguf_package_does(kind: int) -> None:
    """Random bytes are valid blocks, but for scales that are not numbers; several chunks, so that their edges count."""
    type_ = header.TYPES[kind]
    shape = (70, 9, 256 * 2)
    count = 70 * 9 * 2 * 256 // type_.block * type_.block_bytes
    raw = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8)
    target = torch.full(shape, 7.0, dtype=torch.float64)
    tensors.decode_into(target, stored(raw, Q(kind), shape))
    with np.errstate(all="ignore"):
        if type_.name == "F64":
            true = raw.view(np.float64)
        else:
            true = package.quants.dequantize(raw.reshape(70 * 9, -1), Q(kind)).astype(np.float64)
    np.testing.assert_array_equal(target.numpy().reshape(-1), true.reshape(-1))


@pytest.mark.parametrize("name", ["I8", "I32", "Q8_1", "Q8_K"])
def test_types_without_weights_are_refused(name: str) -> None:
    number, type_ = tensors.type_named(name)
    one = stored(np.zeros(type_.block_bytes, dtype=np.uint8), number, (type_.block,))  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=f"f.gguf: tensor t is {name}"):
        tensors.decode_into(torch.empty(type_.block), one)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_kinds_hold_what_their_quantiser_makes_of_each_matrix(kind: str, tmp_path: Path) -> None:
    config = gguf_models.config(
        tiny.attention(heads=4, kv_heads=2, head_dim=16), tiny.experts(d_ff=32), d_model=64, vocab_size=61
    )
    model = Transformer(config)
    tiny.fill(model)
    gguf.save_gguf(model, tmp_path / "it.gguf", kind)
    back = gguf.load_gguf(tmp_path / "it.gguf", dtype=torch.float32).state_dict()
    wanted = {"f32": Q.F32, "f16": Q.F16, "bf16": Q.BF16, "q8_0": Q.Q8_0, "q4_0": Q.Q4_0}[kind]
    for name, tensor in model.state_dict().items():
        type_ = Q.Q8_0 if kind == "q4_0" and name in ("embed.weight", "head.weight") else wanted
        if name.endswith("norm.weight") or name.endswith("feed_forward.gate.weight"):
            type_ = Q.F32
        rows = tensor.numpy()
        true = package.quants.dequantize(package.quants.quantize(rows, type_), type_).reshape(rows.shape)
        np.testing.assert_array_equal(back[name].numpy(), true, err_msg=name)
    assert all(torch.isfinite(tensor).all() for tensor in back.values())


def test_rows_that_no_block_fits_are_float16(tmp_path: Path) -> None:
    model = gguf_models.model("llama-mixtral")  # rows of 20, 24 and 14
    gguf.save_gguf(model, tmp_path / "it.gguf", "q8_0")
    kinds = {one.type.name for one in header.read_file(tmp_path / "it.gguf").tensors.values()}
    assert kinds == {"F16", "F32"}


@pytest.mark.parametrize(("kind", "stays"), [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")])
def test_without_a_dtype_plain_files_keep_theirs(kind: str, stays: str, tmp_path: Path) -> None:
    model = gguf_models.model("deepseek2-sigmoid")
    gguf.save_gguf(model, tmp_path / "it.gguf", kind)
    back = gguf.load_gguf(tmp_path / "it.gguf")
    found = {name: tensor.dtype for name, tensor in back.state_dict().items()}
    assert found.pop("blocks.2.feed_forward.selection_bias") == torch.float32
    assert set(found.values()) == {getattr(torch, stays)}
    smaller = gguf.load_gguf(tmp_path / "it.gguf", torch.bfloat16)
    assert smaller.embed.weight.dtype == torch.bfloat16
    assert torch.isfinite(logits(smaller, tiny.tokens(smaller, 1, 5)).float()).all()


def test_numbers_beyond_a_kind_are_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    model = gguf_models.model("llama-tied")
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32")
    before = (tmp_path / "it.gguf").read_bytes()
    with torch.no_grad():
        model.embed.weight[3, 3] = 1e6
    with pytest.raises(UsageError, match=r"token_embd.weight holds numbers up to 1e\+06"):
        gguf.save_gguf(model, tmp_path / "it.gguf", "f16")
    assert (tmp_path / "it.gguf").read_bytes() == before
    assert os.listdir(tmp_path) == ["it.gguf"]
    with torch.no_grad():
        model.embed.weight[3, 3] = float("nan")
    wide = Transformer(gguf_models.config(d_model=32, vocab_size=11))
    with torch.no_grad():
        wide.embed.weight[3, 3] = float("nan")
    with pytest.raises(UsageError, match="holds numbers up to nan"):
        gguf.save_gguf(wide, tmp_path / "it.gguf", "q8_0")


# Older layouts.


def test_experts_one_by_one_and_gate_with_up_are_read(tmp_path: Path) -> None:
    model = gguf_models.model("llama-mixtral")
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32")
    tokens = tiny.tokens(model, 1, 9)
    reader = package.GGUFReader(tmp_path / "it.gguf")
    for layout in ("single", "fused"):
        gguf_models.rewritten(tmp_path / "it.gguf", tmp_path / "stack.gguf", {})
        writer = package.GGUFWriter(tmp_path / f"{layout}.gguf", "llama")
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, field.contents(), field.types[0])
        found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        for name, data in found.items():
            if "_exps" not in name or (layout == "fused" and "down" in name):
                writer.add_tensor(name, data)
            elif layout == "single":
                for expert, matrix in enumerate(data):
                    writer.add_tensor(name.replace("_exps", f".{expert}"), np.ascontiguousarray(matrix))
            elif "gate_exps" in name:
                both = np.concatenate([data, found[name.replace("gate", "up")]], axis=1)
                writer.add_tensor(name.replace("gate", "gate_up"), both)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert torch.equal(logits(gguf.load_gguf(tmp_path / f"{layout}.gguf"), tokens), logits(model, tokens))


def test_latent_attention_that_is_not_split_is_read(tmp_path: Path) -> None:
    """Files from before the keys and values of each head were stored apart."""
    model = gguf_models.model("deepseek2-softmax")
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32")
    reader = package.GGUFReader(tmp_path / "it.gguf")
    split = tuple(
        tensor.name for tensor in reader.tensors if "attn_k_b" in tensor.name or "attn_v_b" in tensor.name
    )
    old = {"deepseek2.attention.key_length": 12, "deepseek2.attention.value_length": 10}
    gone = ("deepseek2.attention.key_length_mla", "deepseek2.attention.value_length_mla")
    gguf_models.rewritten(
        tmp_path / "it.gguf", tmp_path / "half.gguf", {**old, "deepseek2.attention.head_count_kv": 4}, gone
    )
    writer = package.GGUFWriter(tmp_path / "old.gguf", "deepseek2")
    reader = package.GGUFReader(tmp_path / "half.gguf")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name not in split:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for layer in range(3):
        both = model.state_dict()[f"blocks.{layer}.attention.kv_b.weight"].numpy()
        writer.add_tensor(f"blk.{layer}.attn_kv_b.weight", both)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = tiny.tokens(model, 1, 9)
    assert torch.equal(logits(gguf.load_gguf(tmp_path / "old.gguf"), tokens), logits(model, tokens))


def split_in_two(source: Path, folder: Path) -> tuple[Path, Path]:
    reader = package.GGUFReader(source)
    paths = (folder / "it-00001-of-00002.gguf", folder / "it-00002-of-00002.gguf")
    half = len(reader.tensors) // 2
    for number, (path, part) in enumerate(
        zip(paths, (reader.tensors[:half], reader.tensors[half:]), strict=True)
    ):
        writer = package.GGUFWriter(path, "llama")
        for key, field in reader.fields.items():
            if number == 0 and not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        for tensor in part:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_split_files_are_read_from_their_first_part(tmp_path: Path) -> None:
    model = gguf_models.model("llama-mixtral")
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32")
    first, second = split_in_two(tmp_path / "it.gguf", tmp_path)
    tokens = tiny.tokens(model, 1, 9)
    assert torch.equal(logits(gguf.load_gguf(first), tokens), logits(model, tokens))
    with pytest.raises(FormatError, match="this is not the first part"):
        gguf.load_gguf(second)
    second.unlink()
    with pytest.raises(FormatError, match=r"00002-of-00002.gguf does not exist"):
        gguf.load_gguf(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match=r"split.no is 0; by its name it is 1"):
        gguf.load_gguf(first)


def test_frequencies_that_no_rule_makes_are_kept(tmp_path: Path) -> None:
    model = gguf_models.model("llama-llama3")
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32")
    gone = tuple(
        f"moiety.rope.{key}"
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_positions")
    )
    gguf_models.rewritten(tmp_path / "it.gguf", tmp_path / "bare.gguf", {}, gone)
    back = gguf.load_gguf(tmp_path / "bare.gguf")
    assert back.config.attention.rope is not None and back.config.attention.rope.kind == "longrope"
    tokens = tiny.tokens(model, 2, 40)
    torch.testing.assert_close(logits(back, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_llama_31_is_recognised_by_its_frequencies(tmp_path: Path) -> None:
    rope = dataclasses.replace(tiny.attention(rope=gguf_models.YARN).rope, kind="llama3", factor=32.0)  # type: ignore[type-var]
    rope = dataclasses.replace(rope, original_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    config = gguf_models.config(tiny.attention(head_dim=64, rope_theta=500000.0, rope=rope))
    gguf.save_gguf(Transformer(config), tmp_path / "it.gguf", "f16")
    gone = tuple(
        f"moiety.rope.{key}"
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_positions")
    )
    gguf_models.rewritten(tmp_path / "it.gguf", tmp_path / "bare.gguf", {}, gone)
    assert gguf.load_config(tmp_path / "bare.gguf").attention.rope == rope


# Refusals.


@pytest.mark.parametrize(
    ("changes", "drop", "said"),
    [
        ({"llama.attention.head_count": 3}, (), "blk.0.attn_q.weight has shape|which is not a multiple"),
        ({"llama.expert_used_count": 9}, (), "experts_per_token is 9"),
        ({"llama.attention.logit_softcapping": 3.0}, (), "logit_softcapping is not known and may change"),
        ({"llama.rope.scaling.type": "longrope"}, (), "rope.scaling.type is 'longrope'"),
        (
            {"llama.rope.dimension_count": 4},
            (),
            "rope.dimension_count is 4; allowed is the width of a head, 6",
        ),
        ({"llama.embedding_length": "wide"}, (), "embedding_length is 'wide'; a whole number is wanted"),
        ({"llama.rope.freq_base": float("nan")}, (), "rope.freq_base is nan; a number is wanted"),
        ({"llama.feed_forward_length": [14, 14, 15]}, (), "feed_forward_length differs between layers"),
        ({"llama.block_count": 2}, (), "blk.2.attn_k.weight, .* is not part of such a model"),
        ({"llama.block_count": 4}, (), "tensor blk.3.attn_k.weight, .* is missing"),
        ({"llama.block_count": 1 << 30}, (), "block_count is 1073741824, but the file has"),
        ({"llama.context_length": 0}, (), "max_positions is 0"),
        ({"llama.embedding_length": 1 << 24}, (), "describes .* parameters, but"),
        ({}, ("llama.block_count",), "llama.block_count is missing"),
        ({}, ("token_embd.weight",), "tensor token_embd.weight is missing"),
        ({}, ("blk.1.ffn_down_exps.weight",), "tensor blk.1.ffn_down_exps.weight is missing"),
    ],
)
def test_metadata_that_lies_is_refused(
    changes: dict[str, Any], drop: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    gguf.save_gguf(gguf_models.model("llama-mixtral"), tmp_path / "it.gguf", "f32")
    gguf_models.rewritten(tmp_path / "it.gguf", tmp_path / "changed.gguf", changes, drop)
    with pytest.raises(Exception, match=said) as caught:
        gguf.load_gguf(tmp_path / "changed.gguf")
    assert type(caught.value).__module__ == "moiety.errors" and "changed.gguf" in str(caught.value)


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "it.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"general.architecture is 'mamba'"):
        gguf.load_gguf(tmp_path / "it.gguf")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (gguf_models.config(moe=tiny.experts(router="sigmoid")), "cannot say"),
        (gguf_models.config(moe=tiny.experts(scale=2.0)), "llama, cannot say moe.scale"),
        (gguf_models.config(tiny.attention(window=8)), "cannot say attention.window"),
        (gguf_models.config(activation="relu"), "cannot say activation"),
        (gguf_models.config(tiny.attention(rope_fraction=0.7)), "attention.rope_fraction"),
        (gguf_models.config(embedding_multiplier=2.0), "embedding_multiplier"),
        (
            gguf_models.config(
                gguf_models.latent(),
                tiny.experts(experts=8, shared_d_ff=14, groups=4, groups_kept=2, group_score="max"),
            ),
            "moe.group_score 'max'",
        ),
        (gguf_models.config(gguf_models.latent(), gguf_models.sigmoid(shared_d_ff=20)), "moe.shared_d_ff"),
        (gguf_models.config(gguf_models.latent(gguf_models.YARN)), "yarn without mscale_all_dim"),
    ],
)
def test_models_that_no_architecture_expresses_are_refused(
    config: ModelConfig, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"no GGUF architecture expresses this model.*{said}"):
        gguf.save_gguf(Transformer(config), tmp_path / "it.gguf")
    assert not os.listdir(tmp_path)


def test_calls_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    model = gguf_models.model("llama-tied")
    with pytest.raises(UsageError, match="kind is 'q9'; allowed are f32, f16"):
        gguf.save_gguf(model, tmp_path / "it.gguf", "q9")
    small = Transformer(gguf_models.config(vocab_size=50))
    with pytest.raises(UsageError, match="the tokenizer has 101 tokens, the model 50"):
        gguf.save_gguf(small, tmp_path / "it.gguf", tokenizer=gguf_models.tokenizer())
    gguf.save_gguf(model, tmp_path / "it.gguf")
    with pytest.raises(UsageError, match=r"weights cannot be torch\.int32"):
        gguf.load_gguf(tmp_path / "it.gguf", torch.int32)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        gguf.save_gguf(model, tmp_path / "folder")
    quantize(model, policy_named("int8-g32"))
    with pytest.raises(UsageError, match="tensors are packed") as caught:
        gguf.save_gguf(model, tmp_path / "packed.gguf")
    assert "--kind" in (caught.value.hint or "") and not (tmp_path / "packed.gguf").exists()


def test_load_takes_a_gguf_file(tmp_path: Path) -> None:
    model = gguf_models.model("qwen3moe-plain")
    gguf.save_gguf(model, tmp_path / "it.gguf", "f32")
    tokens = tiny.tokens(model, 1, 7)
    assert torch.equal(logits(checkpoint.load(tmp_path / "it.gguf"), tokens), logits(model, tokens))


def test_memory_while_writing_is_one_piece(tmp_path: Path) -> None:
    """No tensor is ever whole a second time: pieces are at most a chunk, or one row."""
    sizes = [piece.numel() for piece in tensors._pieces(torch.empty(3, 700, 900))]
    assert sum(sizes) == 3 * 700 * 900 and max(sizes) <= tensors.CHUNK_ELEMENTS
    assert [piece.numel() for piece in tensors._pieces(torch.empty(2, 1 << 20))] == [1 << 20, 1 << 20]
    assert files.KINDS.keys() == {"f32", "f16", "bf16", "q8_0", "q4_0"}
