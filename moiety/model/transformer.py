"""One decoder for every family, dense or Mixture-of-Experts. No family name appears here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moiety.config import ModelConfig, MoEConfig
from moiety.errors import ConfigError, UsageError
from moiety.model.attention import Attention
from moiety.model.context import ForwardContext, KVCache, forward_context
from moiety.model.fused import fused
from moiety.model.loss import IGNORED, SLICE_ELEMENTS, cross_entropy, head_logits
from moiety.model.mla import LatentAttention
from moiety.model.norm import Norm, norm_of
from moiety.model.paged import PagedStep
from moiety.model.rope import check_rope
from moiety.moe import routers
from moiety.moe.adapted import AdaptedFeedForward, AdaptedLinear, AdaptedRows
from moiety.moe.capacity import Capacity
from moiety.moe.experts import FeedForward
from moiety.moe.layer import MoE
from moiety.moe.packed import PackedFeedForward, PackedLinear
from moiety.routing import Routing

__all__ = ["Block", "HeadBias", "ModelOutput", "Transformer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelOutput:
    """What a forward pass returns.

    Args:
        hidden: The last block's output after the final norm, (B, S, D).
        head_weight: The output head, (V, D), or the packed or adapted head with its bias.
        head_bias: Its bias (V,), or None.
        logits_multiplier: Factor on the logits.
        logits_cap: Logits become cap * tanh(logit / cap); 0 is off.
        routing: The routing of every MoE layer, by layer index.
        adapters: Which positions, counted through all sequences, each adapter is for; None: the active one serves all.
    """

    hidden: Tensor
    head_weight: Tensor | PackedLinear | AdaptedLinear
    head_bias: Tensor | None = None
    logits_multiplier: float = 1.0
    logits_cap: float = 0.0
    routing: Mapping[int, Routing] = field(default_factory=dict)
    adapters: AdaptedRows | None = None

    @property
    def logits(self) -> Tensor:
        """Scores of every vocabulary entry, (B, S, V); multiplied out on each access."""
        return self._logits(self.hidden, self.adapters)

    @property
    def last_logits(self) -> Tensor:
        """Scores after the last position alone, (B, V)."""
        assert not self.adapters, "sequences in one row have no last position"
        return self._logits(self.hidden[:, -1], None)

    def at(self, rows_N: Tensor) -> Tensor:
        """Scores after chosen positions alone, counted through all sequences, (N, V)."""
        adapters = self.adapters
        if adapters:
            adapters = {
                name: None if mine is None else torch.isin(rows_N, mine).nonzero()[:, 0]
                for name, mine in adapters.items()
            }
        return self._logits(self.hidden.flatten(0, 1)[rows_N], adapters)

    def _logits(self, hidden: Tensor, adapters: AdaptedRows | None) -> Tensor:
        return head_logits(
            hidden,
            self.head_weight,
            self.head_bias,
            multiplier=self.logits_multiplier,
            cap=self.logits_cap,
            adapters=adapters,
        )

    def cross_entropy(self, target_BS: Tensor, scale_BS: Tensor | None = None) -> Tensor:
        """Sum over scored tokens of -ln p(target) in nats, without the logits ever whole; see `loss.cross_entropy`."""
        return cross_entropy(
            self.hidden,
            self.head_weight,
            target_BS,
            bias_V=self.head_bias,
            scale=scale_BS,
            multiplier=self.logits_multiplier,
            cap=self.logits_cap,
        )

    def divergence(self, wanted: ModelOutput, target_BS: Tensor) -> Tensor:
        """Sum over scored tokens of KL(wanted, self) in nats; the logits, recomputed in backward, are never whole."""
        scored_N = (target_BS != IGNORED).flatten().nonzero()[:, 0]
        total = self.hidden.new_zeros((), dtype=torch.float32)
        for rows in scored_N.split(max(SLICE_ELEMENTS // wanted.at(scored_N[:1]).shape[-1], 1)):
            true = wanted.at(rows).float().log_softmax(dim=-1).detach()
            total = total + checkpoint(self._divergence_at, rows, true, use_reentrant=False)
        return total

    def _divergence_at(self, rows_N: Tensor, true: Tensor) -> Tensor:
        return (true.exp() * (true - self.at(rows_N).float().log_softmax(dim=-1))).sum()


class HeadBias(nn.Module):
    """What an output head has of its own where the embedding is its weight: `bias` (V,)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))


class Block(nn.Module):
    """Attention and a feed-forward, each added to the residual stream, with norms before or after them or both.

    Norms before: `attention_norm`, `feed_forward_norm`; after, before the sum: `attention_post_norm`,
    `feed_forward_post_norm`.
    """

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        super().__init__()
        self.layer, self.multiplier = layer, config.residual_multiplier
        before, after = config.norm_place != "post", config.norm_place != "pre"
        self.attention_norm = norm_of(config) if before else None
        self.attention: Attention | LatentAttention
        if config.attention.mla is None:
            self.attention = Attention(config.attention, config.d_model, layer, config.norm_eps)
        else:
            self.attention = LatentAttention(config.attention, config.d_model, layer)
        self.attention_post_norm = norm_of(config) if after else None
        self.feed_forward_norm = norm_of(config) if before else None
        self.feed_forward: MoE | FeedForward | PackedFeedForward | AdaptedFeedForward
        self.feed_forward = _feed_forward(config, layer, backend)
        self.feed_forward_post_norm = norm_of(config) if after else None

    def attended(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """The residual stream with the attention's answer added, (B, S, D)."""
        normed = x_BSD if self.attention_norm is None else self.attention_norm(x_BSD)
        return self._added(x_BSD, self.attention(normed, context), self.attention_post_norm)

    def feed_forward_input(self, x_BSD: Tensor) -> Tensor:
        """What the feed-forward sees of the residual stream that `attended` gave."""
        return x_BSD if self.feed_forward_norm is None else self.feed_forward_norm(x_BSD)

    def fed(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        """The residual stream with the feed-forward's answer y added."""
        return self._added(x_BSD, y_BSD, self.feed_forward_post_norm)

    def _added(self, x_BSD: Tensor, y_BSD: Tensor, post_norm: Norm | None) -> Tensor:
        if post_norm is not None:
            y_BSD = post_norm(y_BSD)
        return x_BSD + y_BSD if self.multiplier == 1 else x_BSD + self.multiplier * y_BSD

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> tuple[Tensor, Routing | None]:
        """(B, S, D) to (B, S, D), and the routing if this block is MoE."""
        whole = fused(self, x_BSD, context)
        if whole is not None:
            return whole
        x_BSD = self.attended(x_BSD, context)
        normed = self.feed_forward_input(x_BSD)
        if isinstance(self.feed_forward, AdaptedFeedForward):
            return self.fed(x_BSD, self.feed_forward(normed, context.adapters)), None
        if not isinstance(self.feed_forward, MoE):
            return self.fed(x_BSD, self.feed_forward(normed)), None
        y = self.feed_forward(
            normed,
            valid=context.valid_BS,
            pinned=context.pinned.get(self.layer),
            token_ids=context.tokens_BS,
            cost_E=context.cost.get(self.layer),
            step=context.step,
            seed=context.seed_of(self.layer),
            adapters=context.adapters,
        )
        return self.fed(x_BSD, y.output), y.routing


class Transformer(nn.Module):
    """A decoder-only transformer.

    Args:
        config: What to build.
        backend: Who multiplies the experts; see `moiety.backends`.
        checkpointing: Recompute each block in backward instead of keeping its activations. Routing is
            pinned: the second pass repeats the first one's choices.
        initialize: Fill the parameters; False leaves them for a checkpoint to fill.

    Raises:
        ConfigError: the config asks for something this decoder does not do.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "auto",
        checkpointing: bool = False,
        initialize: bool = True,
    ) -> None:
        super().__init__()
        _check_config(config)
        self.config, self.checkpointing = config, checkpointing
        if initialize:
            self.embed = nn.Embedding(config.vocab_size, config.d_model)
        else:  # its own way to fill itself, on the meta device, imports a compiler: seconds
            empty_VD = torch.empty(config.vocab_size, config.d_model)
            self.embed = nn.Embedding.from_pretrained(empty_VD, freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer, backend) for layer in range(config.layers))
        self.norm = norm_of(config)
        self.head: nn.Linear | PackedLinear | AdaptedLinear | HeadBias | None
        self.head = HeadBias(config.vocab_size) if config.head_bias else None
        if not config.tied:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        if initialize:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, deviation: float | None = None) -> None:
        """Normal; projections back into the residual stream smaller by sqrt(2 L) (GPT-2).

        Args:
            deviation: Standard deviation; None is sqrt(2 / (5 D)) (arXiv 1910.05895), which is GPT-2's 0.02 at a
                width of 1000 and learns far faster than it at small widths.
        """
        deviation = (2 / (5 * self.config.d_model)) ** 0.5 if deviation is None else deviation
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "gate_noise.weight")):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(("attention.out.weight", ".down")):
                parameter.normal_(0.0, deviation * (2 * self.config.layers) ** -0.5)
            else:
                parameter.normal_(0.0, deviation)

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        cache: KVCache | PagedStep | None = None,
        valid_BS: Tensor | None = None,
        lengths: Sequence[int] = (),
        pinned: Mapping[int, Routing] | None = None,
        cost: Mapping[int, Tensor] | None = None,
        step: int | None = None,
        seed: int | None = None,
    ) -> ModelOutput:
        """Run the decoder.

        Args:
            tokens_BS: Token ids, int64 (B, S).
            cache: Keys and values of earlier positions; these tokens are added to it. With a `PagedStep` the
                tokens of its sequences follow each other in one row.
            valid_BS: Bool (B, S), False for padding, which must stand at the end; padding is never routed.
            lengths: Tokens of each of several sequences that follow each other in one row, (1, sum of lengths): each
                begins at position 0 and none looks at another.
            pinned: Routings to repeat, by layer.
            cost: What using each expert costs, (E,), by layer; for routers that are `CostAware`.
            step: Of the training run, from 0, for schedules of the routers; None is after their end.
            seed: Of everything random in the routers; None draws one from torch's generator in training.

        Returns:
            `.logits` (B, S, V), `.hidden` (B, S, D) and `.routing` by layer.

        Raises:
            UsageError: tokens, padding, cache or pinned routings that do not fit the model or each other.
        """
        self._check(tokens_BS, cache, valid_BS, pinned or {})
        _check_lengths(tuple(tokens_BS.shape), lengths, alone=cache is None and valid_BS is None)
        if seed is None and self.training:
            seed = int(torch.randint(2**31, ()))
        context = forward_context(
            self.config,
            tokens_BS,
            cache=cache,
            valid_BS=valid_BS,
            lengths=lengths,
            pinned=pinned,
            cost=cost,
            step=step,
            seed=seed,
        )
        x_BSD = self.embedded(tokens_BS)
        routing: dict[int, Routing] = {}
        for layer, block in enumerate(self.blocks):
            x_BSD, decided = self._run(block, x_BSD, context)
            if decided is not None:
                routing[layer] = decided
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        return self.ended(x_BSD, routing, context.adapters)

    def ended(
        self, x_BSD: Tensor, routing: Mapping[int, Routing], adapters: AdaptedRows | None = None
    ) -> ModelOutput:
        """What the last block left, as the model's answer."""
        return ModelOutput(
            hidden=self.norm(x_BSD),
            head_weight=self._head_weight(),
            head_bias=self.head.bias if isinstance(self.head, nn.Linear | HeadBias) else None,
            logits_multiplier=self.config.logits_multiplier,
            logits_cap=self.config.logits_cap,
            routing=routing,
            adapters=adapters,
        )

    def _head_weight(self) -> Tensor | PackedLinear | AdaptedLinear:
        """A packed head multiplies by itself, its bias included; a tied one is a packed copy of the embedding."""
        if isinstance(self.head, PackedLinear | AdaptedLinear):
            return self.head
        return self.head.weight if isinstance(self.head, nn.Linear) else self.embed.weight

    def embedded(self, tokens_BS: Tensor) -> Tensor:
        """What the first block sees, (B, S, D)."""
        x_BSD: Tensor = self.embed(tokens_BS)
        multiplier = self.config.embedding_multiplier
        return x_BSD if multiplier == 1 else multiplier * x_BSD

    def _check(
        self,
        tokens_BS: Tensor,
        cache: KVCache | PagedStep | None,
        valid_BS: Tensor | None,
        pinned: Mapping[int, Routing],
    ) -> None:
        """Refuse what would fail deep inside, or not fail and be wrong."""
        shape, vocabulary = tuple(tokens_BS.shape), self.config.vocab_size
        if len(shape) != 2:
            raise UsageError(
                f"tokens have shape {shape}; (sequences, positions) is wanted",
                hint="for one sequence use tokens[None]",
            )
        if (
            tokens_BS.device.type == "cpu" and tokens_BS.numel()
        ):  # elsewhere looking would wait for the device
            low, high = (int(edge) for edge in tokens_BS.aminmax())
            if not 0 <= low <= high < vocabulary:
                raise UsageError(
                    f"tokens range from {low} to {high}; the vocabulary is 0 to {vocabulary - 1}",
                    hint="is this the model's tokenizer?",
                )
        if valid_BS is not None:
            if valid_BS.dtype != torch.bool or tuple(valid_BS.shape) != shape:
                raise UsageError(
                    f"valid_BS is {valid_BS.dtype} {tuple(valid_BS.shape)}; bool {shape} is wanted"
                )
            if bool((valid_BS[:, 1:] & ~valid_BS[:, :-1]).any()):
                raise UsageError("valid_BS has padding before real tokens", hint="put padding at the end")
        unknown = sorted(pinned.keys() - set(self.config.moe_layers))
        if unknown:
            raise UsageError(
                f"layers {unknown} have no routing to pin", hint=f"it has {self.config.moe_layers}"
            )
        if cache is not None:
            cache.check_room(*shape)
            if valid_BS is not None and isinstance(cache, PagedStep):
                raise UsageError("a paged step has no padding", hint="leave valid_BS out")
            if self.checkpointing and torch.is_grad_enabled():
                raise UsageError("a cache cannot be recomputed", hint="generate under torch.no_grad()")

    def _run(self, block: nn.Module, x_BSD: Tensor, context: ForwardContext) -> tuple[Tensor, Routing | None]:
        """One block, recomputed in backward when asked to; the recomputation repeats the first routing."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            result: tuple[Tensor, Routing | None] = block(x_BSD, context)
            return result
        first: dict[int, Routing] = {}

        def run(x_BSD: Tensor) -> tuple[Tensor, Routing | None]:
            again = replace(context, pinned={**context.pinned, **first})
            x_BSD, decided = block(x_BSD, again)
            if decided is not None and isinstance(block, Block):
                first[block.layer] = decided.pinned()
            return x_BSD, decided

        result = checkpoint(run, x_BSD, use_reentrant=False)
        return result

    def save(self, path: str | Path) -> None:
        """Write the model in Hugging Face layout; see `moiety.model.checkpoint.save`."""
        from moiety.model import checkpoint as files

        files.save(self, path)


def _check_lengths(shape: tuple[int, ...], lengths: Sequence[int], *, alone: bool) -> None:
    """Refuse lengths that are not those of the sequences in a row."""
    if not lengths:
        return
    if shape[0] != 1 or min(lengths) < 1 or sum(lengths) != shape[1]:
        raise UsageError(
            f"lengths are {str([*lengths])[:80]} and tokens have shape {shape}",
            hint="put the sequences one after the other into one row and give the length of each",
        )
    if not alone:
        raise UsageError(
            "a row of several sequences has neither cache nor padding", hint="leave valid_BS out"
        )


def _capacity(moe: MoEConfig) -> Capacity | None:
    if moe.capacity_factor == 0 and moe.eval_capacity_factor == 0:
        return None
    return Capacity(factor=moe.capacity_factor, eval_factor=moe.eval_capacity_factor, policy=moe.overflow)


def _feed_forward(config: ModelConfig, layer: int, backend: str) -> MoE | FeedForward:
    """The dense or Mixture-of-Experts feed-forward of one block."""
    if config.moe is None or not config.is_moe(layer):
        return FeedForward(
            config.d_model,
            config.d_ff,
            activation=config.activation,
            gated=config.gated,
            bias=config.feed_forward_bias,
        )
    moe = config.moe.at(layer)
    return MoE(
        d_model=config.d_model,
        d_ff=moe.d_ff,
        experts=moe.experts,
        router=routers.from_config(moe),
        activation=moe.activation,
        activation_limit=moe.activation_limit,
        gated=moe.gated,
        bias=moe.bias,
        router_bias=moe.router_bias,
        shared_d_ff=moe.shared_d_ff,
        shared_gate=moe.shared_gate,
        shared_bias=moe.shared_bias,
        null_experts=moe.null_experts,
        null_kind=moe.null_kind,
        answers=moe.answers,
        capacity=_capacity(moe),
        weigh_input=moe.weigh_input,
        backend=backend,
    )


def _check_config(config: ModelConfig) -> None:
    """Every option of a config acts or is refused; none is ignored."""
    attention, mla = config.attention, config.attention.mla
    unused = {"clip_qkv": attention.clip_qkv != 0, "rope_fraction": attention.rope_fraction != 1}
    asked = [name for name, is_asked in unused.items() if is_asked]
    if mla is not None and asked:
        raise ConfigError(
            f"latent attention has no {', '.join(asked)}",
            hint="mla.rope_dim says what is rotated; leave these at their defaults",
        )
    rotary_dim = attention.rotary_dim if mla is None else mla.rope_dim
    check_rope(attention.rope, rotary_dim, attention.rope_theta)
