"""Families as data: `config.json` to `ModelConfig` and back, and where each of their tensors lies in ours.

A family is one `Family` in `FAMILIES`: which key of its `config.json` is which of our options, which options
it fixes, and for each of our tensors the names of theirs that make it up. Theirs are blocks of rows of
ours: query, key and value of our `qkv`; gate and up of our `gate_up`; one expert's matrix of a stack. `{l}`
stands for the layer and `{e}` for the expert. No torch here: this is names and numbers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moiety.config import AttentionConfig, ModelConfig, MoEConfig, from_dict, to_dict
from moiety.errors import ConfigError, FormatError

__all__ = ["FAMILIES", "OWN", "Family", "FamilyChoice", "Piece", "family_for", "family_of"]

Shapes = Mapping[str, Sequence[int]]

# Keys of any config.json that say nothing about what the model computes.
WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "model_type",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
    | {"bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "pretraining_tp"}
    | {"attention_dropout", "initializer_range"}
)
# Their activation to ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
# What only training reads, whatever the model.
TRAINING = frozenset({"moe.balance_loss", "moe.z_loss", "moe.bias_rate"})


class FamilyChoice(NamedTuple):
    """The family that a model is written as, and why."""

    family: Family
    reason: str


class Piece(NamedTuple):
    """A tensor of theirs: rows `start` to `stop` of our tensor, or of its matrix number `expert`."""

    theirs: str
    ours: str
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One family.

    Args:
        model_type: Its name in `config.json`.
        architecture: Its class in transformers; a model server picks its code by it.
        keys: Key of `config.json` to our option, or to several options that it sets together.
        aliases: Other spellings of keys, to the one in `keys`.
        defaults: Values of keys that files leave out; every other key of `keys` must be there.
        fixed: Our options that this family fixes at something else than their default.
        allowed: Keys with which the family would be another one: the values that may be read.
        ignored: Further keys without effect.
        tensors: Our tensor to the names of theirs that make it up, in the order of rows.
        ignored_tensors: Theirs that hold nothing learnt.
        whole_heads: Its class in transformers refuses a width that the heads do not divide.
        whole: The one key that holds all our options as they are; tensors have our names then.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, str | tuple[str, ...]]
    tensors: Mapping[str, tuple[str, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    ignored_tensors: tuple[str, ...] = ()
    whole: str = ""
    whole_heads: bool = False

    def read(self, values: Mapping[str, Any]) -> ModelConfig:
        """The `ModelConfig` that a `config.json` of this family describes.

        Raises:
            FormatError: a key is missing, unknown, or asks for what this program does not do.
            ConfigError: the values cannot describe a model.
        """
        if self.whole:
            if not isinstance(values.get(self.whole), dict):
                raise FormatError(f"config.json lacks {self.whole}, the options of the model")
            return from_dict(ModelConfig, values[self.whole])
        renamed = self._renamed(values)
        noted = renamed.pop("moiety", None) or {}
        options: dict[str, Any] = dict(self.fixed)
        for key, paths in self.keys.items():
            value = self._value(key, renamed)
            for path in (paths,) if isinstance(paths, str) else paths:
                options[path] = value
        options["attention.rope_theta"] = self._rope_theta(renamed)
        if options.get("attention.head_dim") is None:
            options["attention.head_dim"] = self._head_dim(options)
        config = _build(options)
        wrong = sorted(noted.keys() - _inert(config)) if isinstance(noted, dict) else ["moiety"]
        if wrong:
            raise FormatError(f"config.json notes {wrong} for moiety, which its own keys decide")
        return _build({**_flatten(config), **noted})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The `config.json` of a model; only exact where `family_for` says so."""
        written: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        if self.whole:
            return {**written, self.whole: to_dict(config)}
        flat = _flatten(config)
        for key, paths in self.keys.items():
            value = flat.get(paths if isinstance(paths, str) else paths[0])
            if key == "hidden_act":
                value = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[value or "silu"]
            written[key] = list(value) if isinstance(value, tuple) else value
        theta = flat["attention.rope_theta"]
        written["rope_theta"] = theta
        written["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
        noted = self._differences(config, written)
        return {**written, "moiety": noted} if noted else written

    def cannot_say(self, config: ModelConfig) -> list[str]:
        """Options of `config` that this family's `config.json` cannot express; empty if it is exact."""
        if self.whole:
            return []
        if (config.moe is not None) != ("moe.experts" in self._paths()):
            return ["moe"]
        if self.whole_heads and config.d_model % config.attention.heads:
            return ["d_model that is no multiple of heads"]
        try:
            return sorted(self._differences(config, self.write(config)).keys() - _inert(config))
        except (ConfigError, FormatError):
            return ["a value out of this family's range"]

    def pieces(self, config: ModelConfig, shapes: Shapes) -> Iterator[Piece]:
        """Where the family's tensors lie in ours, tensor by tensor in the order of `shapes`.

        Args:
            config: The model's.
            shapes: Our tensors' names and shapes.
        """
        for ours, shape in shapes.items():
            layer = re.search(r"(?<=blocks\.)\d+", ours)
            pattern = re.sub(r"(?<=blocks\.)\d+", "{l}", ours)
            names = self.tensors.get(pattern, (ours,) if self.whole else ())
            assert names, (self.model_type, ours)
            has_experts = "{e}" in names[0]
            bounds = _rows(config, shape[1] if has_experts else shape[0], len(names)) if shape else [0, 1]
            for expert in range(shape[0]) if has_experts else (None,):
                for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
                    theirs = name.replace("{l}", layer[0] if layer else "").replace("{e}", str(expert))
                    yield Piece(theirs, ours, expert, start, stop)

    def ignores(self, name: str) -> bool:
        """True for a tensor of theirs that holds nothing learnt."""
        return re.sub(r"(?<=layers\.)\d+", "{l}", name) in self.ignored_tensors

    @property
    def head(self) -> str:
        """Their name of the output head."""
        return self.tensors.get("head.weight", ("head.weight",))[0]

    def _paths(self) -> set[str]:
        return {
            path for paths in self.keys.values() for path in ((paths,) if isinstance(paths, str) else paths)
        }

    def _renamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same values under the spellings of `keys`, every one of them known."""
        renamed: dict[str, Any] = {}
        for spelling, value in values.items():
            key = self.aliases.get(spelling, spelling)
            if key in renamed and renamed[key] != value:
                raise FormatError(f"config.json says {key} twice: {renamed[key]!r} and {value!r}")
            renamed[key] = value
        known = {*self.keys, *self.allowed, *self.ignored, *ROPE_KEYS, *WITHOUT_EFFECT, "moiety"}
        unknown = sorted(key for key in renamed if key not in known and renamed[key] is not None)
        if unknown:
            raise FormatError(
                f"config.json has {', '.join(unknown)}, unknown for model_type {self.model_type!r}",
                hint="it may change what the model computes; where it surely does not, remove it from the file",
            )
        for key, values_allowed in self.allowed.items():
            if renamed.get(key) is not None and renamed[key] not in values_allowed:
                raise FormatError(
                    f"config.json has {key} {renamed[key]!r}; allowed is {', '.join(map(repr, values_allowed))}",
                    hint="this program does not compute such a model",
                )
        return renamed

    def _value(self, key: str, values: Mapping[str, Any]) -> Any:
        """One value as our option; what is missing or null takes the family's default."""
        value = values.get(key)
        if value is None:
            if key not in self.defaults:
                raise FormatError(f"config.json lacks {key}, which {self.model_type!r} needs")
            value = self.defaults[key]
            return values.get(value[1:]) if isinstance(value, str) and value.startswith("=") else value
        if key == "hidden_act":
            if not isinstance(value, str) or value not in ACTIVATIONS:
                raise FormatError(
                    f"config.json has hidden_act {value!r}; allowed is {', '.join(ACTIVATIONS)}"
                )
            return ACTIVATIONS[value]
        return tuple(value) if isinstance(value, list) else value

    def _rope_theta(self, values: Mapping[str, Any]) -> Any:
        """The rotary base in either spelling: `rope_theta` (old), `rope_parameters` (new), or both alike."""
        rope = values.get("rope_parameters") or {}
        scaling = values.get("rope_scaling") or {}
        for key, found in (("rope_parameters", rope), ("rope_scaling", scaling)):
            known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
            plain = isinstance(found, dict) and not set(found) - known
            if not plain or any(found.get(key) not in (None, "default") for key in ("rope_type", "type")):
                raise FormatError(
                    f"config.json has {key} {found!r}; only plain rotary positions are known",
                    hint="scaled rotary positions (linear, dynamic, yarn, llama3, longrope) are not supported yet",
                )
        for part in (values, rope, scaling):
            if part.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise FormatError(f"config.json has partial_rotary_factor {part['partial_rotary_factor']!r}")
        parts = (values, rope, scaling)
        bases = [part["rope_theta"] for part in parts if part.get("rope_theta") is not None]
        if any(base != bases[0] for base in bases):
            raise FormatError(f"config.json has several values of rope_theta: {bases}")
        return bases[0] if bases else self.defaults["rope_theta"]

    def _head_dim(self, options: Mapping[str, Any]) -> int:
        width, heads = options.get("d_model"), options.get("attention.heads")
        if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
            raise FormatError(
                f"config.json lacks head_dim, and {width!r} is not a multiple of {heads!r} heads"
            )
        return width // heads

    def _differences(self, config: ModelConfig, written: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `config` that reading `written` would not give back."""
        wanted, found = _flatten(config), _flatten(self.read({**written, "moiety": None}))
        return {path: wanted[path] for path in wanted if found.get(path) != wanted[path]}


def family_of(values: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names.

    Raises:
        FormatError: an unknown one.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise FormatError(
            f"config.json has model_type {model_type!r}", hint=f"known are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def family_for(config: ModelConfig) -> FamilyChoice:
    """The public family that expresses a config exactly, or our own layout where none does."""
    lacks = {name: family.cannot_say(config) for name, family in FAMILIES.items() if not family.whole}
    for name, missing in lacks.items():
        if not missing:
            return FamilyChoice(FAMILIES[name], f"{name} expresses this model exactly")
    closest = min(lacks, key=lambda name: (lacks[name] == ["moe"], len(lacks[name])))
    return FamilyChoice(
        OWN,
        f"no public family expresses this model; the closest, {closest}, cannot say {', '.join(lacks[closest])}",
    )


def _rows(config: ModelConfig, rows: int, parts: int) -> list[int]:
    """Where the parts of a tensor begin and end: one; gate and up; query, key and value."""
    if parts == 3:
        attention = config.attention
        query, one = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        assert rows == query + 2 * one, (rows, query, one)
        return [0, query, query + one, rows]
    assert rows % parts == 0, (rows, parts)
    return [rows // parts * number for number in range(parts + 1)]


def _inert(config: ModelConfig) -> frozenset[str]:
    """Options that do not change what this model computes."""
    if config.moe is None:
        return frozenset()
    inert = set(TRAINING)
    if not config.dense_layers:
        inert |= {"d_ff", "activation", "gated"}
    if config.moe.groups == 1:
        inert.add("moe.group_score")
    return frozenset(inert)


def _flatten(config: ModelConfig) -> dict[str, Any]:
    """Options by dotted path."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, (AttentionConfig, MoEConfig)):
            flat |= {
                f"{item.name}.{part.name}": getattr(value, part.name) for part in dataclasses.fields(value)
            }
        else:
            flat[item.name] = value
    return flat


def _build(flat: Mapping[str, Any]) -> ModelConfig:
    """The opposite of `_flatten`; options left out take their defaults."""
    parts: dict[str, dict[str, Any]] = {"": {}, "attention": {}, "moe": {}}
    for path, value in flat.items():
        head, _, name = path.rpartition(".")
        parts[head][name] = value
    top = {**parts[""], "attention": from_dict(AttentionConfig, parts["attention"])}
    if parts["moe"]:
        top["moe"] = from_dict(MoEConfig, parts["moe"])
    top.setdefault("d_ff", parts["moe"].get("d_ff"))  # unused where every layer has experts
    return from_dict(ModelConfig, top)


# Tables

_COMMON_KEYS: Mapping[str, str | tuple[str, ...]] = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention.heads",
    "num_key_value_heads": "attention.kv_heads",
    "head_dim": "attention.head_dim",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}
# A value that begins with "=" is that of another key.
_COMMON_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": "=num_attention_heads",
    "head_dim": None,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": (),
}
_BIASES = ("attention.qkv_bias", "attention.out_bias")
_LAYER = "model.layers.{l}."
_COMMON_TENSORS: Mapping[str, tuple[str, ...]] = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "blocks.{l}.attention_norm.weight": (_LAYER + "input_layernorm.weight",),
    "blocks.{l}.feed_forward_norm.weight": (_LAYER + "post_attention_layernorm.weight",),
    "blocks.{l}.attention.out.weight": (_LAYER + "self_attn.o_proj.weight",),
    "blocks.{l}.attention.out.bias": (_LAYER + "self_attn.o_proj.bias",),
    "blocks.{l}.attention.q_norm.weight": (_LAYER + "self_attn.q_norm.weight",),
    "blocks.{l}.attention.k_norm.weight": (_LAYER + "self_attn.k_norm.weight",),
    **{
        f"blocks.{{l}}.attention.qkv.{leaf}": tuple(f"{_LAYER}self_attn.{part}_proj.{leaf}" for part in "qkv")
        for leaf in ("weight", "bias")
    },
}
_DENSE_TENSORS: Mapping[str, tuple[str, ...]] = {
    "blocks.{l}.feed_forward.gate_up": (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    "blocks.{l}.feed_forward.down": (_LAYER + "mlp.down_proj.weight",),
}
_FREQUENCIES = (_LAYER + "self_attn.rotary_emb.inv_freq",)


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    """Tensors of experts stored one by one in `block`, and their router."""
    expert = f"{_LAYER}{block}.experts.{{e}}."
    return {
        "blocks.{l}.feed_forward.gate.weight": (f"{_LAYER}{block}.gate.weight",),
        "blocks.{l}.feed_forward.experts.gate_up": (f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        "blocks.{l}.feed_forward.experts.down": (f"{expert}{down}.weight",),
    }


OWN = Family(model_type="moiety", architecture="Transformer", keys={}, tensors={}, whole="model")

_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    whole_heads=True,
    keys={
        **_COMMON_KEYS,
        "intermediate_size": "d_ff",
        "hidden_act": "activation",
        "attention_bias": _BIASES,
    },
    defaults=_COMMON_DEFAULTS,
    allowed={"mlp_bias": (False,)},
    tensors={**_COMMON_TENSORS, **_DENSE_TENSORS},
    ignored_tensors=_FREQUENCIES,
)
_MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys={
        **_COMMON_KEYS,
        "intermediate_size": "moe.d_ff",
        "hidden_act": "moe.activation",
        "num_local_experts": "moe.experts",
        "num_experts_per_tok": "moe.experts_per_token",
        "sliding_window": "attention.window",
        "router_aux_loss_coef": "moe.balance_loss",
    },
    aliases={"num_experts": "num_local_experts"},
    defaults={**_COMMON_DEFAULTS, "rope_theta": 1_000_000.0, "sliding_window": None},
    ignored=frozenset({"router_jitter_noise"}),  # noise of training only
    tensors={**_COMMON_TENSORS, **_experts("block_sparse_moe", "w1", "w3", "w2")},
    ignored_tensors=_FREQUENCIES,
)
_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys={
        **_COMMON_KEYS,
        "intermediate_size": "d_ff",
        "moe_intermediate_size": "moe.d_ff",
        "hidden_act": ("moe.activation", "activation"),
        "num_experts": "moe.experts",
        "num_experts_per_tok": "moe.experts_per_token",
        "norm_topk_prob": "moe.renormalize",
        "mlp_only_layers": "dense_layers",
        "attention_bias": _BIASES,
        "router_aux_loss_coef": "moe.balance_loss",
    },
    aliases={"num_local_experts": "num_experts"},
    defaults=_COMMON_DEFAULTS,
    fixed={"attention.qk_norm": "head"},
    allowed={"use_sliding_window": (False,), "decoder_sparse_step": (1,)},
    ignored=frozenset({"sliding_window", "max_window_layers"}),  # without use_sliding_window
    tensors={
        **_COMMON_TENSORS,
        **_DENSE_TENSORS,
        **_experts("mlp", "gate_proj", "up_proj", "down_proj"),
    },
)
_OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys={
        **{key: path for key, path in _COMMON_KEYS.items() if key != "head_dim"},
        "intermediate_size": "moe.d_ff",
        "hidden_act": "moe.activation",
        "num_experts": "moe.experts",
        "num_experts_per_tok": "moe.experts_per_token",
        "norm_topk_prob": "moe.renormalize",
        "attention_bias": _BIASES,
        "router_aux_loss_coef": "moe.balance_loss",
    },
    aliases={"num_local_experts": "num_experts"},
    defaults={**_COMMON_DEFAULTS, "router_aux_loss_coef": 0.01},
    fixed={"attention.qk_norm": "full"},
    allowed={"clip_qkv": ()},
    tensors={**_COMMON_TENSORS, **_experts("mlp", "gate_proj", "up_proj", "down_proj")},
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (_LLAMA, _MIXTRAL, _QWEN3_MOE, _OLMOE, OWN)
}
