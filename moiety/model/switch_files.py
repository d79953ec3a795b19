"""Switch Transformers on disk, in the Hugging Face layout of `model_type` "switch_transformers".

Which key of `config.json` is which of our options, where each of our tensors is found among theirs, and the two
doors `load_switch` and `save_switch`. What a file leaves out is what transformers takes then. A gated
feed-forward (Switch-XXL) has the names of T5's, `wi_0` and `wi_1`; transformers has no class that runs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moiety import cost, storage
from moiety.config import EncoderDecoderConfig, MoEConfig
from moiety.errors import ConfigError, FormatError, UsageError
from moiety.model import layout
from moiety.model.families.values import WITHOUT_EFFECT
from moiety.model.packed import WEIGHT_DTYPES, Packing, Weight, packing_of
from moiety.model.switch import SwitchTransformer
from moiety.model.tensor_file import Entry
from moiety.model.tokenizer import Tokenizer

__all__ = [
    "MODEL_TYPE",
    "Part",
    "load_switch",
    "parts",
    "read_config",
    "save_switch",
    "write_config",
    "write_switch",
]

MODEL_TYPE = "switch_transformers"
ANY_NUMBER = 2**31 - 1  # as expert_capacity: more than any sequence has

# Keys that decide what the model computes, and what transformers takes where a file leaves them out.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "expert_capacity": 64,
    "num_layers": 12,
    "num_sparse_encoder_layers": 3,
    "num_decoder_layers": 12,
    "num_sparse_decoder_layers": 3,
    "num_heads": 12,
    "num_experts": 8,
    "router_bias": False,
    "router_jitter_noise": 0.01,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "router_z_loss_coef": 0.001,
    "router_aux_loss_coef": 0.001,
    "dense_act_fn": "relu",
    "tie_word_embeddings": True,
    "encoder_sparse_step": None,
    "decoder_sparse_step": None,
    "decoder_start_token_id": None,
    "pad_token_id": 0,
    "is_gated_act": None,
    "feed_forward_proj": None,
}
ALIASES = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
# Keys with which it would be another model: the values that may be read.
ALLOWED: Mapping[str, tuple[object, ...]] = {
    "router_dtype": ("float32",),
    "router_type": ("tokens_masked", "tokens_scatter"),  # two ways to compute the same
    "num_selected_experts": (1,),
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "batch_prioritized_routing": (False,),
}
# Only training reads them, or nothing does: transformers routes padding whatever `router_ignore_padding_tokens`.
IGNORED = WITHOUT_EFFECT | frozenset(
    {"dropout_rate", "initializer_factor", "add_router_probs", "router_ignore_padding_tokens", "n_positions"}
    | {"num_partitions", "output_past", "gradient_checkpointing"}
)
ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
GATED = {  # T5 calls the approximate one gelu here
    "gated-relu": "relu",
    "gated-silu": "silu",
    "gated-gelu": "gelu_tanh",
    "gated-gelu_new": "gelu_tanh",
    "gated-gelu_python": "gelu",
}

SHARED, ENCODER, DECODER = "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
HEAD = "lm_head.weight"
# Where an embedding may stand: what is there first counts. Tied ones may stand there several times.
TIED = {"embed.weight": (SHARED, ENCODER, DECODER, HEAD)}
UNTIED = {
    "embed.weight": (ENCODER, SHARED),
    "decoder_embed.weight": (DECODER, SHARED),
    "head.weight": (HEAD,),
}
# Old files hold it; nothing ever used it.
UNUSED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}
# Ours in a stack to theirs, of a block to theirs in that block: {e} is the expert, {f} the feed-forward's number there.
TENSORS: Mapping[str, tuple[str, ...]] = {
    "positions.weight": ("block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
    "norm.weight": ("final_layer_norm.weight",),
    "blocks.{l}.attention_norm.weight": ("layer.0.layer_norm.weight",),
    "blocks.{l}.attention.query.weight": ("layer.0.SelfAttention.q.weight",),
    "blocks.{l}.attention.key_value.weight": (
        "layer.0.SelfAttention.k.weight",
        "layer.0.SelfAttention.v.weight",
    ),
    "blocks.{l}.attention.out.weight": ("layer.0.SelfAttention.o.weight",),
    "blocks.{l}.cross_norm.weight": ("layer.1.layer_norm.weight",),
    "blocks.{l}.cross_attention.query.weight": ("layer.1.EncDecAttention.q.weight",),
    "blocks.{l}.cross_attention.key_value.weight": (
        "layer.1.EncDecAttention.k.weight",
        "layer.1.EncDecAttention.v.weight",
    ),
    "blocks.{l}.cross_attention.out.weight": ("layer.1.EncDecAttention.o.weight",),
    "blocks.{l}.feed_forward_norm.weight": ("layer.{f}.layer_norm.weight",),
    "blocks.{l}.feed_forward.up": ("layer.{f}.mlp.wi.weight",),
    "blocks.{l}.feed_forward.gate_up": (
        "layer.{f}.mlp.wi_0.weight",
        "layer.{f}.mlp.wi_1.weight",
    ),
    "blocks.{l}.feed_forward.down": ("layer.{f}.mlp.wo.weight",),
    "blocks.{l}.feed_forward.gate.weight": ("layer.{f}.mlp.router.classifier.weight",),
    "blocks.{l}.feed_forward.gate.bias": ("layer.{f}.mlp.router.classifier.bias",),
    "blocks.{l}.feed_forward.experts.up": ("layer.{f}.mlp.experts.expert_{e}.wi.weight",),
    "blocks.{l}.feed_forward.experts.gate_up": (
        "layer.{f}.mlp.experts.expert_{e}.wi_0.weight",
        "layer.{f}.mlp.experts.expert_{e}.wi_1.weight",
    ),
    "blocks.{l}.feed_forward.experts.down": ("layer.{f}.mlp.experts.expert_{e}.wo.weight",),
}


# The config


def read_config(values: Mapping[str, Any]) -> EncoderDecoderConfig:
    """The model that a `config.json` describes.

    Raises:
        FormatError: unknown keys, or values that this program does not compute.
        ConfigError: values that cannot describe a model.
    """
    said = _known(values)
    layers, decoder_layers = said["num_layers"], said["num_decoder_layers"]
    decoder_layers = layers if decoder_layers is None else decoder_layers
    every = _step(said, "encoder", layers)
    decoder_every = _step(said, "decoder", decoder_layers)
    start = said["decoder_start_token_id"]
    activation, gated = _activation(said)
    jitter, rows = said["router_jitter_noise"], said["expert_capacity"]
    return EncoderDecoderConfig(
        vocab_size=said["vocab_size"],
        d_model=said["d_model"],
        layers=layers,
        decoder_layers=None if decoder_layers == layers else decoder_layers,
        heads=said["num_heads"],
        head_dim=said["d_kv"],
        moe=MoEConfig(
            experts=said["num_experts"],
            experts_per_token=1,
            d_ff=said["d_ff"],
            router="switch",
            router_options=(f"jitter={jitter}",) if jitter else (),
            renormalize=False,
            router_bias=said["router_bias"],
            activation=activation,  # type: ignore[arg-type]
            gated=gated,
            balance_loss=said["router_aux_loss_coef"],
            z_loss=said["router_z_loss_coef"],
        ),
        moe_every=every,
        decoder_moe_every=None if decoder_every == every else decoder_every,
        expert_capacity=None if rows == ANY_NUMBER else rows,
        tied=said["tie_word_embeddings"],
        position_buckets=said["relative_attention_num_buckets"],
        position_distance=said["relative_attention_max_distance"],
        norm_eps=said["layer_norm_epsilon"],
        start_token=next((token for token in (start, said["pad_token_id"]) if token is not None), 0),
    )


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of `DEFAULTS`, as said or by default; a number of decoder layers may be said to be null."""
    said: dict[str, Any] = {}
    for spelling, value in values.items():
        key = ALIASES.get(spelling, spelling)
        if key in said and said[key] != value:
            raise FormatError(f"config.json says {key} twice: {said[key]!r} and {value!r}")
        said[key] = value
    known = {*DEFAULTS, *ALLOWED, *IGNORED}
    unknown = sorted(key for key, value in said.items() if key not in known and value is not None)
    if unknown:
        raise FormatError(
            f"config.json has {', '.join(unknown)}, unknown for model_type {MODEL_TYPE!r}",
            hint="it may change what the model computes; where it surely does not, remove it from the file",
        )
    for key, allowed in ALLOWED.items():
        if said.get(key) is not None and said[key] not in allowed:
            raise FormatError(
                f"config.json has {key} {said[key]!r}; allowed is {', '.join(map(repr, allowed))}",
                hint="this program does not compute such a model",
            )
    null_counts = {"num_decoder_layers", "pad_token_id"}
    return {
        key: said[key] if key in said and (said[key] is not None or key in null_counts) else default
        for key, default in DEFAULTS.items()
    }


def _step(said: Mapping[str, Any], stack: str, layers: Any) -> int:
    """Every how many layers one is sparse, in words of transformers: layer i if i % step == 1, all for step 1."""
    for key in (f"{stack}_sparse_step", f"num_sparse_{stack}_layers"):
        value = said[key]
        if value is None and key.endswith("step"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not isinstance(layers, int):
            raise FormatError(f"config.json has {key} {value!r} for {layers!r} layers; integers are wanted")
        if key.endswith("step"):
            return max(value, 0)
        return layers // value if value > 0 else layers
    raise AssertionError(stack)


def _activation(said: Mapping[str, Any]) -> tuple[str, bool]:
    """The activation, and whether it is gated: `dense_act_fn` says the first, three keys the second."""
    name, projection = said["dense_act_fn"], said["feed_forward_proj"]
    for key, value in (("dense_act_fn", name), ("feed_forward_proj", projection)):
        if value is not None and (not isinstance(value, str) or value not in {*ACTIVATIONS, *GATED}):
            raise FormatError(
                f"config.json has {key} {value!r}; allowed is {', '.join((*ACTIVATIONS, *GATED))}"
            )
    if name in GATED:
        return GATED[name], True
    gated = said["is_gated_act"] is True or projection in GATED
    return ACTIVATIONS[name], gated


def write_config(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model; `read_config` gives the model back."""
    moe, every = config.moe, config.moe_every
    decoder_every = every if config.decoder_moe_every is None else config.decoder_moe_every
    table = GATED if moe.gated else ACTIVATIONS
    jitter = next((text.partition("=")[2] for text in moe.router_options), "0")
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.head_dim,
        "d_ff": moe.d_ff,
        "expert_capacity": ANY_NUMBER if config.expert_capacity is None else config.expert_capacity,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_depth,
        "num_sparse_encoder_layers": _sparse_layers(config.layers, every),
        "num_sparse_decoder_layers": _sparse_layers(config.decoder_depth, decoder_every),
        "encoder_sparse_step": every,
        "decoder_sparse_step": decoder_every,
        "num_heads": config.heads,
        "num_experts": moe.experts,
        "router_bias": moe.router_bias,
        "router_dtype": "float32",
        "router_jitter_noise": float(jitter),
        "router_z_loss_coef": moe.z_loss,
        "router_aux_loss_coef": moe.balance_loss,
        "relative_attention_num_buckets": config.position_buckets,
        "relative_attention_max_distance": config.position_distance,
        "layer_norm_epsilon": config.norm_eps,
        "dense_act_fn": next(theirs for theirs, ours in table.items() if ours == moe.activation),
        "tie_word_embeddings": config.tied,
        "decoder_start_token_id": config.start_token,
    }


def _sparse_layers(layers: int, step: int) -> int:
    """The number that transformers divides `layers` by to get `step`, as near as there is one."""
    return layers // step if step else layers + 1


# The tensors


class Part(NamedTuple):
    """A tensor of theirs: rows `start` to `stop` of our tensor, or of its matrix number `expert`."""

    theirs: str
    ours: str
    expert: int | None
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view of our tensor that it is."""
        return (tensor if self.expert is None else tensor[self.expert])[self.start : self.stop]

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, from that of our tensor."""
        return (self.stop - self.start, *ours[1 if self.expert is None else 2 :])


def parts(
    config: EncoderDecoderConfig, shapes: Mapping[str, tuple[int, ...]], stored: Container[str] | None = None
) -> Iterator[Part]:
    """Where their tensors lie in ours.

    Args:
        config: The model's.
        shapes: Our tensors' names and shapes.
        stored: What a file has, to look for an embedding in several places; None for the names that we write.
    """
    embeddings = TIED if config.tied else UNTIED
    for ours, shape in shapes.items():
        if ours in embeddings:
            places = embeddings[ours]
            theirs = next((name for name in places if stored is not None and name in stored), places[0])
            yield Part(theirs, ours, None, 0, shape[0])
            continue
        stack, _, rest = ours.partition(".")
        layer = re.search(r"(?<=^blocks\.)\d+", rest)
        begin = f"{stack}.block.{layer[0]}." if layer else f"{stack}."
        names = TENSORS[re.sub(r"(?<=^blocks\.)\d+", "{l}", rest)]
        has_experts = "{e}" in names[0]
        rows = shape[1] if has_experts else shape[0]
        assert rows % len(names) == 0, (ours, shape)
        each = rows // len(names)
        for expert in range(shape[0]) if has_experts else (None,):
            for number, name in enumerate(names):
                name = name.replace("{f}", "1" if stack == "encoder" else "2")  # noqa: PLW2901
                theirs = begin + name.replace("{e}", str(expert))
                yield Part(theirs, ours, expert, number * each, (number + 1) * each)


# The doors


def load_switch(
    path: str | Path, *, backend: str = "auto", dtype: torch.dtype | None = None
) -> SwitchTransformer:
    """Read a model that `save_switch` or transformers wrote; it comes back in eval mode, as theirs do.

    Args:
        path: The folder.
        backend: Who multiplies the experts; see `moiety.backends`.
        dtype: Of the weights in memory; None keeps each as stored.

    Raises:
        FormatError: not such a checkpoint, altered since it was written, or tensors missing, left over or misshapen.
        ConfigError: a model that this program does not compute.
        StorageError: the system refused to read.
        UsageError: a dtype that weights cannot have.
    """
    layout.check_dtype(dtype)
    folder = layout.checked_folder(path)
    config, packing = _config_of(folder)
    with layout.open_weights(folder, packing) as weights:
        _check_sizes(folder, config, weights)
        with torch.device("meta"):  # shapes alone: the weights come from the files
            model = SwitchTransformer(config, backend=backend, initialize=False)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = list(parts(config, shapes, weights))
        _check(folder, config, shapes, found, weights)
        _check_copies(config, found, weights)
        kinds: dict[str, torch.dtype] = {}
        for part in found:
            kind = weights[part.theirs].dtype if dtype is None else dtype
            kinds[part.ours] = torch.promote_types(kinds.get(part.ours, kind), kind)
        filled = {name: torch.empty(shape, dtype=kinds[name]) for name, shape in shapes.items()}
        for part in found:
            weights[part.theirs].read_into(part.of(filled[part.ours]))
    model.load_state_dict(filled, assign=True)
    return model.eval()


def _config_of(folder: Path) -> tuple[EncoderDecoderConfig, Packing | None]:
    file = storage.inside(folder, "config.json")
    values = storage.read_json(file)
    try:
        packing = packing_of(values)
        plain = {key: value for key, value in values.items() if key != "quantization_config"}
        return read_config(plain), packing
    except (FormatError, ConfigError) as error:
        raise type(error)(f"{file}: {error.message}", hint=error.hint) from error


def _check_sizes(folder: Path, config: EncoderDecoderConfig, weights: Mapping[str, Weight]) -> None:
    """Refuse a config far beyond the weights before anything is built by it."""
    stored, layers = sum(math.prod(weight.shape) for weight in weights.values()), config.layers
    fits = layers + config.decoder_depth <= len(weights)
    if not fits or cost.parameters(config).total > 16 * stored + (1 << 20):
        raise FormatError(
            f"{folder / 'config.json'} describes {layers} and {config.decoder_depth} layers, but "
            f"{len(weights)} tensors with {stored:,} parameters are stored",
            hint="config.json is of another model, or shards are missing",
        )


def _check(
    folder: Path,
    config: EncoderDecoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    found: list[Part],
    weights: Mapping[str, Weight],
) -> None:
    needed = {part.theirs for part in found}
    missing = sorted(needed - weights.keys())
    if missing:
        raise FormatError(
            f"{folder} lacks {layout.listed(missing)}",
            hint="a shard is missing or config.json is of another model",
        )
    again = set(TIED["embed.weight"]) if config.tied else {SHARED}  # of an untied model nobody reads it
    left = sorted(weights.keys() - needed - again - UNUSED)
    if left:
        raise FormatError(
            f"{folder} also has {layout.listed(left)}, which a {MODEL_TYPE} model of this config has not",
            hint="config.json is of another model, or the weights hold more than a model",
        )
    for part in found:
        weight, shape = weights[part.theirs], part.shape(shapes[part.ours])
        if weight.shape != shape:
            raise FormatError(
                f"{weight.path}: tensor {part.theirs} has shape {weight.shape}; by config.json it is {shape}"
            )
        if weight.dtype not in WEIGHT_DTYPES:
            raise FormatError(
                f"{weight.path}: tensor {part.theirs} is {weight.dtype}; allowed are "
                f"{', '.join(str(one) for one in WEIGHT_DTYPES)}"
            )


def _check_copies(config: EncoderDecoderConfig, found: list[Part], weights: Mapping[str, Weight]) -> None:
    """A tied model may store its embedding under every name that it has, as long as it is one."""
    if not config.tied:
        return
    first = next(part.theirs for part in found if part.ours == "embed.weight")
    copies = sorted((set(TIED["embed.weight"]) - {first}) & weights.keys())
    embedding = weights[first].read() if copies else None
    for name in copies:
        copy = weights[name].read()
        if embedding is None or not torch.equal(copy, embedding):
            raise FormatError(
                f"{weights[name].path}: config.json says tie_word_embeddings, but {name} is not {first}",
                hint="set tie_word_embeddings to false in config.json",
            )


def save_switch(
    model: SwitchTransformer,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = layout.SHARD_BYTES,
) -> None:
    """Write a model as transformers writes one; a checkpoint already at `path` is replaced in one step.

    Args:
        model: What to write.
        path: A folder.
        tokenizer: Written beside the weights.
        extra: JSON values to keep beside the model.
        dtype: Of the weights on disk; None keeps each as it is.
        max_shard_bytes: Largest weight file; a larger model gets several and an index.

    Raises:
        StorageError: the system refused; a checkpoint that was there still is.
        UsageError: the tokenizer does not fit the model, or a dtype that weights cannot have.
    """
    needed_bytes = sum(entry.size_bytes for entry in _entries(model, dtype).values()) + (1 << 16)
    with storage.new_folder(path, needed_bytes=needed_bytes) as folder:
        write_switch(
            folder, model, tokenizer=tokenizer, extra=extra, dtype=dtype, max_shard_bytes=max_shard_bytes
        )


def write_switch(
    folder: Path,
    model: SwitchTransformer,
    *,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = layout.SHARD_BYTES,
) -> None:
    """Fill a folder from `storage.new_folder`; arguments and errors as for `save_switch`."""
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}",
            hint="save the tokenizer that the model was trained with",
        )
    entries = _entries(model, dtype)
    start, end = model.config.start_token, 1 if tokenizer is None else tokenizer.end_id
    special = {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": start}
    kinds = [entry.dtype for entry in entries.values()]
    stored_as = str(max(set(kinds), key=kinds.count)).removeprefix("torch.")
    config = {**write_config(model.config), **special, "dtype": stored_as, "torch_dtype": stored_as}
    layout.write_json(folder / "config.json", config)
    layout.write_json(folder / "generation_config.json", special)
    if extra is not None:
        layout.write_json(folder / layout.EXTRA, dict(extra))
    if tokenizer is not None:
        tokenizer.save(folder)
    layout.write_shards(folder, entries, max_shard_bytes)


def _entries(model: SwitchTransformer, dtype: torch.dtype | None) -> dict[str, Entry]:
    layout.check_dtype(dtype)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    entries: dict[str, Entry] = {}
    for part in parts(model.config, shapes):
        view = part.of(state[part.ours])
        assert part.theirs not in entries, part
        entries[part.theirs] = Entry(tuple(view.shape), dtype or view.dtype, view.detach)
    if not model.config.tied:  # transformers' class has a third one that it does not read
        entries[SHARED] = entries[ENCODER]
    return entries
