"""Tiny models of every GGUF architecture, and a vocabulary whose every token is printable."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from moiety.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from tests import tiny

END = "<|end|>"
VOCABULARY = 107
YARN = RopeConfig(kind="yarn", factor=4.0, original_positions=16)
DEEPSEEK_YARN = RopeConfig(kind="yarn", factor=4.0, original_positions=16, mscale=0.7, mscale_all_dim=0.7)


def config(
    attention: AttentionConfig | None = None, moe: MoEConfig | None = None, **changes: object
) -> ModelConfig:
    return tiny.config(
        **{
            "vocab_size": VOCABULARY,
            "attention": attention or tiny.attention(),
            "moe": moe,
            "d_ff": 26 if moe is None else moe.d_ff,
            **changes,
        }
    )


def latent(rope: RopeConfig | None = None, q_rank: int = 16) -> AttentionConfig:
    mla = MLAConfig(q_rank=q_rank, kv_rank=24, nope_dim=8, rope_dim=4, value_dim=10, norm_eps=1e-5)
    return tiny.attention(kv_heads=4, head_dim=12, rope_pairs="interleaved", mla=mla, rope=rope)


def sigmoid(**changes: object) -> MoEConfig:
    common = {"experts": 8, "experts_per_token": 3, "router": "sigmoid", "selection_bias": True, "scale": 2.5}
    return tiny.experts(**{**common, "shared_d_ff": 14, **changes})


# By what they are; the name before "-" is the architecture they are written as.
MODELS: Mapping[str, ModelConfig] = {
    "llama-tied": config(tiny.attention(heads=5, kv_heads=1), tied=True),
    "llama-biases": config(tiny.attention(qkv_bias=True, out_bias=True, kv_heads=4), norm_eps=1e-4),
    "llama-all-biases": config(tiny.attention(qkv_bias=True, out_bias=True), feed_forward_bias=True),
    "llama-interleaved": config(tiny.attention(rope_pairs="interleaved")),
    "llama-linear": config(tiny.attention(rope=RopeConfig(kind="linear", factor=2.5))),
    "llama-yarn": config(tiny.attention(rope=YARN)),
    "llama-llama3": config(tiny.attention(rope=RopeConfig(kind="llama3", factor=8.0, original_positions=16))),
    "llama-mixtral": config(moe=tiny.experts()),
    "qwen2-tied": config(tiny.attention(qkv_bias=True), d_model=24, tied=True),
    "qwen3-one": config(tiny.attention(qk_norm="head", kv_heads=1)),
    "qwen2moe-shared": config(
        tiny.attention(qkv_bias=True),
        tiny.experts(renormalize=False, shared_d_ff=18, shared_gate=True),
        d_model=24,
    ),
    "qwen3moe-plain": config(
        tiny.attention(qk_norm="head"), tiny.experts(experts=7, experts_per_token=3), norm_eps=1e-3
    ),
    "olmoe-tied": config(
        tiny.attention(qk_norm="full", kv_heads=4),
        tiny.experts(experts_per_token=3, renormalize=False),
        d_model=24,
        tied=True,
    ),
    "deepseek2-softmax": config(
        latent(),
        tiny.experts(experts=8, renormalize=False, shared_d_ff=28, scale=1.5),
        dense_layers=(0,),
        d_ff=26,
    ),
    "deepseek2-lite": config(
        latent(q_rank=0), tiny.experts(experts=8, renormalize=False, shared_d_ff=28), tied=True
    ),
    "deepseek2-dense": config(latent(DEEPSEEK_YARN)),
    "deepseek2-sigmoid": config(latent(), sigmoid(groups=4, groups_kept=2), dense_layers=(0, 1), d_ff=26),
    "deepseek2-yarn": config(latent(DEEPSEEK_YARN), sigmoid(), dense_layers=(0,), d_ff=26),
}


def model(name: str) -> Transformer:
    """One of `MODELS` with random weights, which the seed of the test decides."""
    made = Transformer(MODELS[name]).eval()
    tiny.fill(made)
    return made


def tokenizer() -> Tokenizer:
    """Byte-level BPE on printable ASCII and a few words: no token is half a character."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t"), ("Ġt", "he")]
    pieces = [
        END,
        *(chr(code) for code in range(33, 127)),
        "Ġ",
        *(first + second for first, second in merges),
    ]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    return Tokenizer(inner, end_token=END)


def chat_tokenizer(frame: str = "<s> $A") -> Tokenizer:
    """Words of one letter, and a token for every role that a special one can have."""
    inner = tokenizers.Tokenizer.from_str(tokenizer().to_json())
    inner.add_special_tokens(["<s>", "<unk>", "<fill>", "<im>", "<call>"])
    inner.add_tokens(["<own>"])
    if frame:
        ids = [(one, inner.token_to_id(one)) for one in ("<s>", END)]
        inner.post_processor = TemplateProcessing(single=frame, special_tokens=ids)
    named = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<fill>"}
    return Tokenizer(inner, end_token=END, special_tokens=named)


@functools.cache
def sentencepiece(
    space: bool = True, size: int = 420
) -> tuple[Tokenizer, tuple[tuple[str, float, int], ...]]:
    """A vocabulary like Llama 2's, and its tokens with score and kind; merges cross words, some letters are bytes."""
    first = [normalizers.Prepend("▁")] if space else []
    normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizer
    text = [
        "The cat's theme: the theatre, aaaa banana  bandana 123 1234 naïve",
        "other  others   anaanaa\n\tin the end",
    ]
    trained.train_from_iterator(text * 3, trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    made = {"".join(pair): -float(place) for place, pair in reversed(list(enumerate(model["merges"])))}
    letters = [(piece, made.get(piece, -1e6), 1) for piece in model["vocab"]]
    rows = (*special, *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)), *letters)
    vocab = {piece: token for token, (piece, _, _) in enumerate(rows)}
    merges = [tuple(pair) for pair in model["merges"]]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    inner.normalizer = normalizer
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    return Tokenizer(inner, end_token="</s>", special_tokens=named), rows


def rewritten(source: Path, target: Path, changes: Mapping[str, Any], drop: tuple[str, ...] = ()) -> None:
    """A file with other values of some keys, written by the gguf package; a dropped name is a key or a tensor."""
    reader = package.GGUFReader(source)
    writer = package.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in drop or key in changes or key == "general.architecture":
            continue
        kind = field.types[0]
        part = field.types[-1] if kind == package.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, part)
    for key, value in changes.items():
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, package.GGUFValueType[kinds[type(value)]])
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
