"""What a model is: frozen dataclasses, valid by construction, no torch.

One `ModelConfig` describes every decoder this toolkit knows, dense or Mixture-of-Experts. A family
(`model/families/`) is only a translation between a `config.json` and this. Help text sits on the
field, each default in exactly one place; nothing here is ever mutated (`dataclasses.replace`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from moiety.errors import ConfigError
from moiety.fields import check_types, from_dict, not_negative, option, positive, require, to_dict

__all__ = [
    "Architecture",
    "AttentionConfig",
    "EncoderDecoderConfig",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "check_types",
    "from_dict",
    "option",
    "require",
    "to_dict",
]

UNEVEN_MAX = 1000  # layers: each is checked when a config is read, whoever wrote it
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention: queries and keys/values through low-rank bottlenecks (arXiv 2405.04434)."""

    q_rank: int = option(0, help="rank of the query bottleneck; 0 means none")
    kv_rank: int = option(help="rank of the shared key/value bottleneck, which is what the cache holds")
    nope_dim: int = option(help="part of each query/key head without rotary position")
    rope_dim: int = option(help="part of each query/key head with rotary position, shared by all heads")
    value_dim: int = option(help="width of each value head")
    norm_eps: float = option(1e-6, help="epsilon of the norms inside the bottlenecks")
    bias: bool = option(
        False, help="add biases to the projections into the bottlenecks and to the output one"
    )

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "norm_eps", "kv_rank", "nope_dim", "rope_dim", "value_dim")
        not_negative(self, "q_rank")
        require(
            self.rope_dim % 2 == 0, f"MLAConfig.rope_dim is {self.rope_dim}; rotary pairs need an even number"
        )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary frequencies stretched to a longer context than the model was first trained for."""

    kind: Literal["linear", "dynamic", "alpha", "yarn", "llama3", "longrope"] = option(
        help="linear (2306.15595), dynamic NTK, NTK of a fixed alpha, yarn (2309.00071), llama3, longrope (2402.13753)"
    )
    factor: float = option(1.0, help="how many times longer; of 'alpha' the alpha")
    original_positions: int = option(0, help="longest sequence before stretching, in tokens")
    beta_fast: float = option(32.0, help="yarn: turns in the original context above which a frequency stays")
    beta_slow: float = option(1.0, help="yarn: turns below which it is divided by the factor")
    truncate: bool = option(True, help="yarn: round the edges between the two to whole dimensions")
    attention_factor: float | None = option(
        None, help="factor on cosines and sines; none: from the kind's own rule"
    )
    mscale: float = option(
        0.0, help="yarn in DeepSeek: sets that factor together with mscale_all_dim; 0 is unset"
    )
    mscale_all_dim: float = option(0.0, help="yarn in DeepSeek: also scales the softmax; 0 is unset")
    low_freq_factor: float = option(
        1.0, help="llama3: wavelengths above original / this are divided by the factor"
    )
    high_freq_factor: float = option(4.0, help="llama3: wavelengths below original / this stay")
    short_factor: tuple[float, ...] = option(
        (), help="longrope: divisor of each frequency up to original_positions"
    )
    long_factor: tuple[float, ...] = option((), help="longrope: divisor of each frequency beyond")
    short_mscale: float = option(
        0.0, help="longrope in Phi: factor on cosines and sines up to original_positions"
    )
    long_mscale: float = option(0.0, help="longrope in Phi: the same beyond")
    always_short: bool = option(
        False, help="longrope as transformers computes it for Phi-3.5: short_factor always"
    )

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "factor")
        needs_original = self.kind in ("yarn", "llama3", "longrope")
        require(
            self.original_positions >= (1 if needs_original else 0),
            f"RopeConfig.original_positions is {self.original_positions}; kind {self.kind!r} needs it",
        )
        require(
            self.kind != "longrope" or bool(self.short_factor and self.long_factor),
            "RopeConfig of kind 'longrope' needs short_factor and long_factor",
        )
        require(
            self.high_freq_factor >= self.low_freq_factor,  # equal in Llama 4 Scout: nothing is between
            f"high_freq_factor {self.high_freq_factor} must not be below low_freq_factor {self.low_freq_factor}",
        )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention (arXiv 2305.13245), or latent attention when `mla` is given."""

    heads: int = option(help="query heads")
    kv_heads: int = option(help="key/value heads; queries share them in equal groups")
    head_dim: int = option(help="width of one head")
    qkv_bias: bool = option(False, help="add a bias to the query, key and value projections")
    out_bias: bool = option(False, help="add a bias to the output projection")
    qk_norm: Literal["none", "head", "full", "head_rotated", "l2_rotated"] = option(
        "none",
        help="norm of queries and keys: per head or over the full width before rotation, per head after it, or to "
        "length 1 after it and without weights, in layers that rotate (Llama 4)",
    )
    clip_qkv: float = option(
        0.0, help="queries, keys and values are clamped to plus and minus this; 0 is off"
    )
    scale: float | None = option(
        None, help="factor on the scores before the softmax; none is head_dim ** -0.5"
    )
    logit_cap: float = option(0.0, help="scores become cap * tanh(score / cap) (Grok); 0 is off")
    sinks: bool = option(False, help="one learnt extra logit per head in the softmax (gpt-oss)")
    window: int | None = option(None, help="sliding window in tokens; none means full attention")
    window_layers: tuple[int, ...] | None = option(
        None, help="layers that use the window; none means all of them when a window is set"
    )
    chunked: bool = option(False, help="the window is a chunk: tokens see their own chunk only (Llama 4)")
    rope_theta: float = option(10_000.0, help="base of the rotary frequencies (arXiv 2104.09864)")
    rope_fraction: float = option(1.0, help="leading part of each head that is rotated")
    rope_pairs: Literal["half", "interleaved"] = option(
        "half", help="which dimensions turn together: i and i + half, or 2 i and 2 i + 1"
    )
    rope_layers: tuple[int, ...] | None = option(None, help="layers that rotate; none means all of them")
    rope: RopeConfig | None = option(None, help="stretched frequencies; none means plain ones")
    query_scale: float = option(
        0.0,
        help="in layers that do not rotate, queries grow by 1 + this * log1p(floor((position + 1) / floor))",
    )
    query_scale_floor: int = option(8192, help="that floor, in tokens (Llama 4)")
    mla: MLAConfig | None = option(None, help="latent attention sizes; none means grouped-query attention")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "heads", "kv_heads", "head_dim")
        require(
            self.heads % self.kv_heads == 0,
            f"heads is {self.heads}, which is not a multiple of kv_heads {self.kv_heads}",
            "every key/value head serves the same number of query heads",
        )
        require(
            self.mla is not None or self.rotary_dim % 2 == 0,
            f"head_dim {self.head_dim} x rope_fraction {self.rope_fraction} rotates {self.rotary_dim} dimensions",
            "rotary position turns pairs: make it even",
        )
        require(0 <= self.rope_fraction <= 1, f"rope_fraction is {self.rope_fraction}; allowed is 0 to 1")
        not_negative(self, "clip_qkv", "logit_cap", "query_scale")
        positive(self, "scale", "query_scale_floor")
        require(not self.chunked or self.window is not None, "chunked needs a window, in tokens")
        positive(self, "rope_theta", "window")
        require(
            self.window is not None or self.window_layers is None,
            f"window_layers is {self.window_layers}, but there is no window",
            "set window, in tokens",
        )
        plain = not (self.qkv_bias or self.out_bias or self.sinks) and self.qk_norm == "none"
        require(
            self.mla is None or plain,
            "latent attention has no qkv_bias, out_bias, qk_norm or sinks: its bottlenecks carry their own norms",
            "leave these at their defaults, or leave mla out",
        )

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_dim * self.rope_fraction)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One Mixture-of-Experts feed-forward: how many experts, who chooses, what keeps them busy."""

    experts: int = option(help="routed experts in each layer (E)")
    experts_per_token: int = option(help="experts that each token is sent to (K)")
    d_ff: int = option(help="inner width of one expert (F)")
    per_layer: tuple[tuple[int, int, int], ...] = option(
        (), help="layers that differ, after pruning: (layer, experts, experts_per_token) each"
    )
    merged: tuple[tuple[int, ...], ...] = option(
        (),
        help="layers whose experts were merged: (layer, which stored expert answers for the first, the second, ...)",
    )
    router: str = option(
        "softmax", help="who chooses: a name that `moiety routers` lists, or module:Class for your own"
    )
    router_options: tuple[str, ...] = option(
        (), help="settings of that router that have no option here, as name=value"
    )
    temperature: float = option(1.0, help="the router's logits are divided by this")
    router_gradient: Literal["own", "straight_through", "dense"] = option(
        "own",
        help="of the combine weights: the router's own, straight-through, or from all experts (DenseMixer)",
    )
    null_experts: int = option(
        0, help="further choices that cost nothing, after the experts proper (LongCat)"
    )
    null_kind: Literal["identity", "zero"] = option(
        "identity", help="what a null expert answers: its input, or nothing"
    )
    capacity_factor: float = option(
        0.0, help="in training an expert takes at most this many times its fair share; 0 drops nothing"
    )
    eval_capacity_factor: float = option(0.0, help="the same outside training")
    overflow: str = option(
        "position",
        help="who gives way: position, priority, random, reroute, dense, or queue for a second pass",
    )
    renormalize: bool = option(
        True, help="divide the chosen weights by their sum (never for router 'switch')"
    )
    scale: float = option(1.0, help="factor on the combine weights after normalisation")
    selection_bias: bool = option(
        False, help="add a learnt-by-balance bias when choosing, never when weighting"
    )
    groups: int = option(1, help="groups the experts are divided into for group-limited choice")
    groups_kept: int = option(1, help="groups a token may choose from")
    group_score: Literal["top2", "max"] = option(
        "top2",
        help="a group's score: sum of its two best experts (DeepSeek-V3), or its best one (DeepSeek-V2)",
    )
    router_bias: bool = option(False, help="add a trained bias to the router logits (gpt-oss)")
    shared_d_ff: int = option(0, help="inner width of the always-active shared expert; 0 means none")
    shared_gate: bool = option(False, help="multiply the shared expert's output by a sigmoid gate (Qwen2)")
    shared_bias: bool = option(False, help="add biases to the shared expert's projections")
    activation: Activation | Literal["clamped_swiglu"] = option(
        "silu",
        help="activation of the experts; clamped_swiglu is gpt-oss': (up + 1) * gate * sigmoid(1.702 gate)",
    )
    activation_limit: float = option(7.0, help="clamp of clamped_swiglu: gate from above, up on both sides")
    weigh_input: bool = option(False, help="put the combine weight on the expert's input (Llama 4)")
    gated: bool = option(True, help="gate x up (SwiGLU, GeGLU) instead of a single up projection")
    bias: bool = option(False, help="add biases to the expert projections")
    balance_loss: float = option(0.01, help="coefficient of the load-balancing loss, whose floor is 1")
    z_loss: float = option(0.001, help="coefficient of the router z-loss (arXiv 2202.08906)")
    bias_rate: float = option(0.001, help="step of the selection-bias update (arXiv 2408.15664)")
    bias_rule: Literal["sign", "proportional", "quantile"] = option(
        "sign", help="how the selection bias moves: by the load's sign or size, or to the score's quantile"
    )

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "experts", "experts_per_token", "d_ff", "groups", "groups_kept")
        require(
            self.experts_per_token <= self.experts,
            f"experts_per_token is {self.experts_per_token}, more than the {self.experts} experts there are",
            f"choose 1 to {self.experts}",
        )
        require(
            self.router != "switch" or self.experts_per_token == 1,
            f"router 'switch' chooses one expert, but experts_per_token is {self.experts_per_token}",
            "use router 'softmax' for more than one",
        )
        not_negative(self, "balance_loss", "z_loss", "bias_rate", "shared_d_ff", "null_experts")
        not_negative(self, "capacity_factor", "eval_capacity_factor")
        for name in ("shared_gate", "shared_bias"):
            require(
                not getattr(self, name) or self.shared_d_ff > 0,
                f"{name} is set but shared_d_ff is 0: there is no shared expert",
            )
        require(
            self.router != "switch" or not (self.selection_bias or self.scale != 1),
            "router 'switch' weighs by the plain probability: it has no selection_bias and no scale",
            "use router 'softmax' with experts_per_token 1",
        )
        positive(self, "scale", "temperature")
        require(
            self.overflow == "position" or self.capacity_factor > 0 or self.eval_capacity_factor > 0,
            f"overflow is {self.overflow!r}, but no capacity_factor is set: nothing can overflow",
            "set capacity_factor, 1.25 for instance",
        )
        require(
            self.bias_rule == "sign" or self.selection_bias,
            f"bias_rule is {self.bias_rule!r}, but there is no selection_bias",
        )
        require(
            self.null_kind == "identity" or self.null_experts > 0,
            f"null_kind is {self.null_kind!r}, but there are no null_experts",
        )
        self._check_groups()
        self._check_layers()

    def at(self, layer: int) -> MoEConfig:
        """The config of one layer, its own number of experts and of experts per token put in."""
        if not self.per_layer and not self.merged:
            return self
        sizes = {number: (experts, k) for number, experts, k in self.per_layer}
        experts, k = sizes.get(layer, (self.experts, self.experts_per_token))
        merged = tuple(one for one in self.merged if one[:1] == (layer,))
        return dataclasses.replace(self, experts=experts, experts_per_token=k, per_layer=(), merged=merged)

    @property
    def answers(self) -> tuple[int, ...]:
        """Of one layer's config (`at`): the stored expert that answers for each expert; () where each is its own."""
        return self.merged[0][1:] if self.merged else ()

    @property
    def stored(self) -> int:
        """Of one layer's config (`at`): experts that have weights, fewer than `experts` where some were merged."""
        return max(self.answers, default=self.experts - 1) + 1

    @property
    def choices(self) -> int:
        """What a router chooses among: the experts, and after them the null experts."""
        return self.experts + self.null_experts

    @property
    def router_matrices(self) -> int:
        """Matrices of D x choices that a router has: none for 'hash', a second one for the noise of 'noisy'."""
        return {"hash": 0, "noisy": 2}.get(self.router, 1)

    @property
    def group_best(self) -> int:
        """How many of a group's best experts are summed to judge it."""
        return 2 if self.group_score == "top2" else 1

    def _check_layers(self) -> None:
        require(all(self.merged), "merged has an entry without a layer")
        for name, rows in (("per_layer", self.per_layer), ("merged", self.merged)):
            layers = [one[0] for one in rows]
            require(
                len(layers) <= UNEVEN_MAX,
                f"{name} names {len(layers)} layers; allowed are {UNEVEN_MAX}",
                "give experts and experts_per_token the numbers that most layers have",
            )
            require(len(set(layers)) == len(layers), f"{name} names a layer twice: {layers}")
            if (len(rows), self.per_layer) == (1, ()):  # as `at` gives it: one layer's own
                self._check_answers()
                continue
            for layer in layers:
                try:
                    self.at(layer)
                except ConfigError as error:
                    raise ConfigError(f"layer {layer} of {name}: {error.message}", hint=error.hint) from error

    def _check_answers(self) -> None:
        answers = self.answers
        require(
            len(answers) == self.experts and sorted(set(answers)) == list(range(max(answers, default=0) + 1)),
            f"merged says who answers for {len(answers)} experts, {str(answers)[:80]}; one for each of "
            f"{self.experts} is wanted, and from 0 on each number used",
        )
        require(
            self.experts_per_token <= self.stored,
            f"experts_per_token is {self.experts_per_token}, but only {self.stored} experts are stored",
            "merge fewer experts",
        )

    def _check_groups(self) -> None:
        require(
            self.experts % self.groups == 0,
            f"groups is {self.groups}, which does not divide the {self.experts} experts evenly",
        )
        require(
            self.groups_kept <= self.groups,
            f"groups_kept is {self.groups_kept}, more than the {self.groups} groups there are",
        )
        reachable = self.groups_kept * (self.experts // self.groups)
        require(
            self.experts_per_token <= reachable,
            f"experts_per_token is {self.experts_per_token}, but {self.groups_kept} groups hold {reachable} experts",
            "keep more groups or choose fewer experts",
        )
        require(
            self.groups == 1 or self.router != "switch",
            f"groups is {self.groups}, but router 'switch' has no group-limited choice",
            "use router 'sigmoid' or 'softmax', or groups 1",
        )
        require(
            self.groups == 1 or self.group_score == "max" or self.experts >= 2 * self.groups,
            f"group_score 'top2' needs two experts in a group; {self.experts} in {self.groups} groups are fewer",
            "use group_score 'max' or fewer groups",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer, dense or Mixture-of-Experts."""

    vocab_size: int = option(help="entries in the vocabulary (V)")
    d_model: int = option(help="width of the residual stream (D)")
    layers: int = option(help="decoder blocks (L)")
    attention: AttentionConfig = option(help="attention of every block")
    d_ff: int = option(help="inner width of the dense feed-forward; unused when every layer is MoE")
    moe: MoEConfig | None = option(None, help="the MoE feed-forward; none means a dense model")
    dense_layers: tuple[int, ...] = option((), help="layers that keep a dense feed-forward in an MoE model")
    activation: Activation = option("silu", help="activation of the dense feed-forward")
    gated: bool = option(True, help="gate x up in the dense feed-forward")
    feed_forward_bias: bool = option(False, help="add biases to the dense feed-forward's projections")
    norm: Literal["rms", "layer"] = option("rms", help="RMSNorm, or LayerNorm (phi, dbrx)")
    norm_place: Literal["pre", "post", "both"] = option(
        "pre", help="norm of each sublayer's input, of its output before the residual sum, or of both (Grok)"
    )
    norm_bias: bool = option(False, help="add a bias to the LayerNorms")
    norm_eps: float = option(1e-5, help="epsilon inside the norms")
    embedding_multiplier: float = option(1.0, help="factor on the token embeddings")
    residual_multiplier: float = option(1.0, help="factor on what a sublayer adds to the residual stream")
    logits_multiplier: float = option(1.0, help="factor on the logits")
    logits_cap: float = option(0.0, help="logits become cap * tanh(logit / cap); 0 is off")
    tied: bool = option(False, help="use the token embedding as output head")
    head_bias: bool = option(False, help="add a bias to the output head")
    max_positions: int = option(2048, help="longest sequence the model is meant for, in tokens")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "vocab_size", "d_model", "layers", "d_ff", "max_positions", "norm_eps")
        not_negative(self, "logits_cap")
        for name, named in (
            ("dense_layers", self.dense_layers),
            ("rope_layers", self.attention.rope_layers or ()),
            ("window_layers", self.attention.window_layers or ()),
        ):
            bad = [layer for layer in named if not 0 <= layer < self.layers]
            require(not bad, f"{name} names layers {bad}; the model has layers 0 to {self.layers - 1}")
            require(len(set(named)) == len(named), f"{name} names a layer twice: {named}")
        require(
            self.moe is not None or not self.dense_layers,
            f"dense_layers is {self.dense_layers}, but there is no moe: every layer is dense already",
            "leave dense_layers empty",
        )
        for name in ("per_layer", "merged") if self.moe is not None else ():
            bad = [one[0] for one in getattr(self.moe, name) if one[0] not in self.moe_layers]
            require(
                not bad,
                f"{name} names layers {bad}, which have no experts",
                f"these have: {self.moe_layers}" if bad else None,
            )
        require(
            not (self.norm_bias and self.norm == "rms"), "norm_bias needs norm='layer'; RMSNorm has no bias"
        )

    def is_moe(self, layer: int) -> bool:
        """True if block `layer` has a Mixture-of-Experts feed-forward."""
        return self.moe is not None and layer not in self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the blocks with a Mixture-of-Experts feed-forward."""
        return tuple(layer for layer in range(self.layers) if self.is_moe(layer))


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """An encoder-decoder with experts, in the layout of T5 (Switch Transformer, arXiv 2101.03961)."""

    vocab_size: int = option(help="entries in the vocabulary (V)")
    d_model: int = option(help="width of the residual stream (D)")
    layers: int = option(help="blocks of the encoder")
    decoder_layers: int | None = option(None, help="blocks of the decoder; none means as many")
    heads: int = option(help="heads of each attention")
    head_dim: int = option(help="width of one head")
    moe: MoEConfig = option(help="the MoE feed-forward; dense layers have its width and activation")
    moe_every: int = option(2, help="of every how many encoder blocks the second is MoE; 1 means all, 0 none")
    decoder_moe_every: int | None = option(None, help="the same in the decoder; none means as the encoder")
    expert_capacity: int | None = option(
        64, help="tokens of one sequence that an expert takes, the first ones; none means any number"
    )
    tied: bool = option(
        True, help="one token embedding for both stacks and the output head, else one for each"
    )
    position_buckets: int = option(32, help="buckets of the relative position bias, one table in each stack")
    position_distance: int = option(128, help="distance in tokens from which on all share the last bucket")
    norm_eps: float = option(1e-6, help="epsilon inside the norms")
    start_token: int = option(0, help="token that the decoder begins with")

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "vocab_size", "d_model", "layers", "heads", "head_dim")
        positive(self, "norm_eps", "decoder_layers", "expert_capacity")
        not_negative(self, "moe_every", "decoder_moe_every")
        require(
            self.position_buckets >= 4,
            f"position_buckets is {self.position_buckets}; it must be at least 4",
            "half of the encoder's buckets are for keys before the query, half for those after it",
        )
        require(
            self.position_distance > self.position_buckets // 2,
            f"position_distance is {self.position_distance}; it must be above half of the "
            f"{self.position_buckets} position_buckets",
        )
        require(
            not self.moe.per_layer and not self.moe.merged,
            "an encoder-decoder has the same experts in every layer: no per_layer and no merged",
        )
        require(
            0 <= self.start_token < self.vocab_size,
            f"start_token is {self.start_token}; the vocabulary is 0 to {self.vocab_size - 1}",
        )

    @property
    def decoder_depth(self) -> int:
        """Blocks of the decoder."""
        return self.layers if self.decoder_layers is None else self.decoder_layers

    @property
    def encoder_moe_layers(self) -> tuple[int, ...]:
        """Encoder blocks with a Mixture-of-Experts feed-forward."""
        return _every(self.layers, self.moe_every)

    @property
    def decoder_moe_layers(self) -> tuple[int, ...]:
        """Decoder blocks with a Mixture-of-Experts feed-forward."""
        every = self.moe_every if self.decoder_moe_every is None else self.decoder_moe_every
        return _every(self.decoder_depth, every)


def _every(layers: int, step: int) -> tuple[int, ...]:
    """Layers 1, 1 + step, ...: all of them for step 1, none for step 0."""
    return tuple(range(0 if step == 1 else 1, layers, step)) if step else ()


Architecture = ModelConfig | EncoderDecoderConfig
