"""Rules that several families share: what takes more than one key to say.

Each function makes the `Rule` of one family from what differs between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moiety.config import ModelConfig
from moiety.errors import FormatError
from moiety.model.families.base import Match, Rule
from moiety.model.families.values import Values, number, whole

__all__ = [
    "biases",
    "dense_layers_between",
    "dense_layers_first",
    "dense_layers_named",
    "even_heads",
    "groups",
    "inverse",
    "late",
    "latent_attention",
    "moe_layers_named",
    "norm_or_none",
    "number_or_zero",
    "shared_experts",
    "windows",
]

Layers = Callable[[Values, int], list[int]]


def windows(
    *,
    key: str = "sliding_window",
    switch: str = "",
    default: Layers = lambda values, layers: list(range(layers)),
    typed: bool = False,
    word: str = "sliding_attention",
    unused: int | None = None,
    more_keys: tuple[str, ...] = (),
) -> Rule:
    """The attention window, and the layers that have one.

    Args:
        key: Its size.
        switch: A key that must be true for it to act.
        default: Layers that have it where the file does not list them.
        typed: The file may list the kind of every layer in `layer_types`.
        word: What `layer_types` calls a layer with a window.
        unused: The size to write where no layer has one; None is null.
        more_keys: What else `default` reads.
    """
    keys = (key, *((switch,) if switch else ()), *(("layer_types",) if typed else ()), *more_keys)
    chunked = word == "chunked_attention"

    def read(values: Values, match: Match) -> dict[str, Any]:
        none: dict[str, Any] = {"attention.window": None}
        layers = values.layers()
        size = values.get(key)
        chosen = default(values, layers)
        if typed and "layer_types" in values:
            chosen = _typed(values["layer_types"], word, layers)
        on = values.flag(switch) if switch else True
        if not (on and size and chosen):
            return none
        named = None if len(chosen) == layers else tuple(chosen)
        window = whole(size, key)
        return {
            "attention.window": window, "attention.window_layers": named, "attention.chunked": chunked
        }  # fmt: skip

    def write(config: ModelConfig) -> dict[str, Any]:
        attention, layers = config.attention, range(config.layers)
        chosen: set[int] = set()
        if attention.window is not None:
            chosen = set(layers if attention.window_layers is None else attention.window_layers)
        written: dict[str, Any] = {key: attention.window if chosen else unused}
        if switch:
            written[switch] = bool(chosen)
        if typed:
            written["layer_types"] = [word if layer in chosen else "full_attention" for layer in layers]
        if "max_window_layers" in more_keys:
            written["max_window_layers"] = min(chosen, default=config.layers)
        return written

    return Rule(keys=keys, read=read, write=write)


def late(values: Values, layers: int) -> list[int]:
    """The layers from `max_window_layers` on."""
    return list(range(min(values.whole("max_window_layers"), layers), layers))


def _typed(types: Any, word: str, layers: int) -> list[int]:
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {word, "full_attention"}:
        raise FormatError(
            f"config.json has layer_types {types!r}; one of {word!r} and 'full_attention' for each of "
            f"{layers} layers is wanted"
        )
    return [layer for layer, kind in enumerate(types) if kind == word]


def _dense(
    read: Callable[[Values], Any], write: Callable[[ModelConfig], Mapping[str, Any]], *keys: str
) -> Rule:
    """A rule for `dense_layers`, from which layers have experts."""

    def read_dense(values: Values, match: Match) -> dict[str, Any]:
        has_experts = read(values)
        return {"dense_layers": tuple(layer for layer in range(values.layers()) if not has_experts(layer))}

    return Rule(keys=keys, read=read_dense, write=write)


def dense_layers_first() -> Rule:
    """The first `first_k_dense_replace` layers are dense."""

    def read(values: Values) -> Callable[[int], bool]:
        first = values.whole("first_k_dense_replace")
        return lambda layer: layer >= first

    return _dense(
        read, lambda config: {"first_k_dense_replace": len(config.dense_layers)}, "first_k_dense_replace"
    )


def dense_layers_named() -> Rule:
    """Layers named in `mlp_only_layers` are dense, and all but every `decoder_sparse_step`-th."""

    def read(values: Values) -> Callable[[int], bool]:
        named, step = set(values.wholes("mlp_only_layers")), values.whole("decoder_sparse_step")
        if not step:
            raise FormatError("config.json has decoder_sparse_step 0; at least 1 is wanted")
        return lambda layer: layer not in named and (layer + 1) % step == 0

    def write(config: ModelConfig) -> dict[str, Any]:
        return {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1}

    return _dense(read, write, "mlp_only_layers", "decoder_sparse_step")


def dense_layers_between() -> Rule:
    """Experts are in every `moe_layer_interval`-th layer from `moe_layer_start_index` to `moe_layer_end_index`."""

    def read(values: Values) -> Callable[[int], bool]:
        first, step = values.whole("moe_layer_start_index"), values.whole("moe_layer_interval")
        last = values["moe_layer_end_index"]
        last = values.layers() - 1 if last == -1 else whole(last, "moe_layer_end_index")
        if not step:
            raise FormatError("config.json has moe_layer_interval 0; at least 1 is wanted")
        return lambda layer: first <= layer <= last and (layer + 1) % step == 0

    def write(config: ModelConfig) -> dict[str, Any]:
        having = config.moe_layers or (config.layers,)
        step = having[1] - having[0] if len(having) > 1 else 1
        names = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
        return dict(zip(names, (having[0], having[-1], step), strict=True))

    return _dense(read, write, "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")


def moe_layers_named() -> Rule:
    """Experts are in `moe_layers`, or in every `interleave_moe_layer_step`-th layer."""

    def read(values: Values) -> Callable[[int], bool]:
        if values.get("moe_layers") is not None:
            named = set(values.wholes("moe_layers"))
            return lambda layer: layer in named
        step = values.whole("interleave_moe_layer_step")
        if not step:
            raise FormatError("config.json has interleave_moe_layer_step 0; at least 1 is wanted")
        return lambda layer: (layer + 1) % step == 0

    def write(config: ModelConfig) -> dict[str, Any]:
        having = config.moe_layers
        step = having[0] + 1 if having else config.layers + 1
        if having != tuple(range(step - 1, config.layers, step)):
            step = 1
        return {"moe_layers": list(having), "interleave_moe_layer_step": step}

    return _dense(read, write, "moe_layers", "interleave_moe_layer_step")


def shared_experts(key: str = "n_shared_experts") -> Rule:
    """So many shared experts of the routed ones' width are one of a multiple width."""

    def read(values: Values, match: Match) -> dict[str, Any]:
        count = whole(values.get(key, values[key] or 0), key)
        return {"moe.shared_d_ff": count * values.whole("moe_intermediate_size")}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        return {key: config.moe.shared_d_ff // config.moe.d_ff}

    return Rule(keys=(key,), read=read, write=write)


def biases(key: str, shared: str, *paths: str) -> Rule:
    """One key for the biases of dense feed-forwards and shared experts, never of routed ones.

    Args:
        key: That key.
        shared: The key of the number of shared experts.
        paths: Our options that it switches too.
    """

    def read(values: Values, match: Match) -> dict[str, Any]:
        biased = values.flag(key)
        has_shared = whole(values.get(shared, values[shared] or 0), shared) > 0
        return {
            "feed_forward_bias": biased,
            "moe.shared_bias": biased and has_shared,
            **dict.fromkeys(paths, biased),
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        return {key: config.feed_forward_bias or config.moe.shared_bias}

    return Rule(keys=(key,), read=read, write=write)


def groups() -> Rule:
    """Groups of experts: `n_group` of them, of which a token may use `topk_group`."""

    def read(values: Values, match: Match) -> dict[str, Any]:
        count = whole(values.get("n_group", 1), "n_group")
        kept = whole(values.get("topk_group", 1), "topk_group")
        if "topk_method" in values and values["topk_method"] == "greedy":
            count, kept = 1, 1
        return {"moe.groups": count, "moe.groups_kept": kept}

    def write(config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        return {"n_group": config.moe.groups, "topk_group": config.moe.groups_kept}

    return Rule(keys=("n_group", "topk_group"), read=read, write=write)


def latent_attention(*, pairs: str = "") -> Rule:
    """The sizes of latent attention (arXiv 2405.04434).

    Args:
        pairs: The key that is false where dimensions i and i + half turn together; else they never do.
    """
    sizes = {
        "kv_lora_rank": "kv_rank",
        "q_lora_rank": "q_rank",
        "qk_nope_head_dim": "nope_dim",
        "qk_rope_head_dim": "rope_dim",
        "v_head_dim": "value_dim",
    }

    def read(values: Values, match: Match) -> dict[str, Any]:
        heads = values.whole("num_attention_heads")
        if values.get("num_key_value_heads", heads) != heads:
            raise FormatError(
                f"config.json has num_key_value_heads {values['num_key_value_heads']!r}; latent attention has "
                f"as many as num_attention_heads, {heads}"
            )
        options: dict[str, Any] = {"attention.kv_heads": heads}
        for key, name in sizes.items():
            optional = key == "q_lora_rank"
            options[f"attention.mla.{name}"] = (
                whole(values.get(key, 0), key) if optional else values.whole(key)
            )
        nope, rope = values.whole("qk_nope_head_dim"), values.whole("qk_rope_head_dim")
        interleaved = values.flag(pairs) if pairs else True
        options["attention.rope_pairs"] = "interleaved" if interleaved else "half"
        return {
            **options,
            "attention.head_dim": nope + rope,
            "attention.mla.bias": values.flag("attention_bias"),
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        mla = config.attention.mla
        assert mla is not None
        written: dict[str, Any] = {key: getattr(mla, name) for key, name in sizes.items()}
        written |= {"q_lora_rank": mla.q_rank or None, "num_key_value_heads": config.attention.heads}
        written["attention_bias"] = mla.bias
        return {**written, **({pairs: config.attention.rope_pairs == "interleaved"} if pairs else {})}

    keys = (*sizes, "num_key_value_heads", "attention_bias", *((pairs,) if pairs else ()))
    return Rule(keys=keys, read=read, write=write)


def even_heads() -> Rule:
    """The heads divide the width; a file may say so, but nothing else."""

    def read(values: Values, match: Match) -> dict[str, Any]:
        heads, width = values.whole("num_attention_heads"), values.whole("hidden_size")
        said = values.get("head_dim")
        if said is not None and whole(said, "head_dim") * heads != width:
            raise FormatError(
                f"config.json has head_dim {said!r}, but {heads} heads divide hidden_size {width} in this family"
            )
        return {}

    return Rule(keys=("head_dim",), read=read, write=lambda config: {})


def inverse(key: str, path: str) -> Rule:
    """Our factor is one over theirs."""

    def read(values: Values, match: Match) -> dict[str, Any]:
        divisor = values.number(key)
        if divisor == 0:
            raise FormatError(f"config.json has {key} 0; a number to divide by is wanted")
        return {path: 1.0 / divisor}

    def write(config: ModelConfig) -> dict[str, Any]:
        factor: float = getattr(config, path)
        divisor = 1.0 / factor if factor else 0.0
        for digits in range(16):  # 1 / (1 / 6.0) is not always 6.0: take the short number that reads back
            short = round(divisor, digits)
            if short and 1.0 / short == factor:
                return {key: short}
        return {key: divisor}

    return Rule(keys=(key,), read=read, write=write)


def number_or_zero(key: str, path: str) -> Rule:
    """A number that is null where ours is 0: a clamp."""
    section, _, name = path.partition(".")

    def read(values: Values, match: Match) -> dict[str, Any]:
        return {path: number(values.get(key, 0.0), key)}

    def write(config: ModelConfig) -> dict[str, Any]:
        return {key: getattr(getattr(config, section), name) or None}

    return Rule(keys=(key,), read=read, write=write)


def norm_or_none(key: str, kind: str) -> Rule:
    """Queries and keys are normalised in one way, or not."""

    def read(values: Values, match: Match) -> dict[str, Any]:
        return {"attention.qk_norm": kind if values.flag(key) else "none"}

    return Rule(keys=(key,), read=read, write=lambda config: {key: config.attention.qk_norm == kind})
