"""One decoder for every family, dense or Mixture-of-Experts. No family name appears here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moiety.backends.matmul import linear
from moiety.config import ModelConfig, MoEConfig
from moiety.errors import ConfigError, UsageError
from moiety.model.attention import Attention
from moiety.model.context import ForwardContext, KVCache
from moiety.model.norm import RMSNorm
from moiety.model.rope import rotary_table
from moiety.moe import routers
from moiety.moe.capacity import Capacity
from moiety.moe.experts import FeedForward
from moiety.moe.layer import MoE
from moiety.routing import Routing

__all__ = ["Block", "ModelOutput", "Transformer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelOutput:
    """What a forward pass returns.

    Args:
        hidden: The last block's output after the final norm, (B, S, D).
        head_weight: The output head, (V, D).
        routing: The routing of every MoE layer, by layer index.
    """

    hidden: Tensor
    head_weight: Tensor
    routing: Mapping[int, Routing] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """Scores of every vocabulary entry, (B, S, V); multiplied out on each access."""
        return linear(self.hidden, self.head_weight)


class Block(nn.Module):
    """Norm, attention, add; norm, feed-forward, add."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config.attention, config.d_model, layer, config.norm_eps)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward: MoE | FeedForward
        if config.is_moe(layer):
            assert config.moe is not None
            self.feed_forward = MoE(
                d_model=config.d_model,
                d_ff=config.moe.d_ff,
                experts=config.moe.experts,
                router=routers.from_config(config.moe),
                activation=config.moe.activation,
                gated=config.moe.gated,
                bias=config.moe.bias,
                router_bias=config.moe.router_bias,
                shared_d_ff=config.moe.shared_d_ff,
                shared_gate=config.moe.shared_gate,
                null_experts=config.moe.null_experts,
                null_kind=config.moe.null_kind,
                capacity=_capacity(config.moe),
                backend=backend,
            )
        else:
            self.feed_forward = FeedForward(
                config.d_model, config.d_ff, activation=config.activation, gated=config.gated
            )

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> tuple[Tensor, Routing | None]:
        """(B, S, D) to (B, S, D), and the routing if this block is MoE."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), context)
        normed = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, FeedForward):
            return x_BSD + self.feed_forward(normed), None
        y = self.feed_forward(
            normed,
            valid=context.valid_BS,
            pinned=context.pinned.get(self.layer),
            token_ids=context.tokens_BS,
            cost_E=context.cost.get(self.layer),
            step=context.step,
            seed=context.seed_of(self.layer),
        )
        return x_BSD + y.output, y.routing


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
        _refuse_unknown_structure(config)
        self.config, self.checkpointing = config, checkpointing
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer, backend) for layer in range(config.layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
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
        cache: KVCache | None = None,
        valid_BS: Tensor | None = None,
        pinned: Mapping[int, Routing] | None = None,
        cost: Mapping[int, Tensor] | None = None,
        step: int | None = None,
        seed: int | None = None,
    ) -> ModelOutput:
        """Run the decoder.

        Args:
            tokens_BS: Token ids, int64 (B, S).
            cache: Keys and values of earlier positions; these tokens are added to it.
            valid_BS: Bool (B, S), False for padding, which must stand at the end; padding is never routed.
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
        start, positions = 0 if cache is None else cache.length, tokens_BS.shape[1]
        attention = self.config.attention
        positions_S = torch.arange(start, start + positions, device=tokens_BS.device)
        if seed is None and self.training:
            seed = int(torch.randint(2**31, ()))
        context = ForwardContext(
            rotary=rotary_table(positions_S, attention.rotary_dim, attention.rope_theta),
            cache=cache,
            valid_BS=valid_BS,
            pinned=pinned or {},
            tokens_BS=tokens_BS,
            cost=cost or {},
            step=step,
            seed=seed,
        )
        x_BSD = self.embed(tokens_BS)
        routing: dict[int, Routing] = {}
        for layer, block in enumerate(self.blocks):
            x_BSD, decided = self._run(block, x_BSD, context)
            if decided is not None:
                routing[layer] = decided
        if cache is not None:
            cache.advance(positions)
        head_weight = self.embed.weight if self.head is None else self.head.weight
        return ModelOutput(hidden=self.norm(x_BSD), head_weight=head_weight, routing=routing)

    def _check(
        self, tokens_BS: Tensor, cache: KVCache | None, valid_BS: Tensor | None, pinned: Mapping[int, Routing]
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


def _capacity(moe: MoEConfig) -> Capacity | None:
    if moe.capacity_factor == 0 and moe.eval_capacity_factor == 0:
        return None
    return Capacity(factor=moe.capacity_factor, eval_factor=moe.eval_capacity_factor, policy=moe.overflow)


def _refuse_unknown_structure(config: ModelConfig) -> None:
    """Every option of a config acts or is refused; none is ignored."""
    attention = config.attention
    unknown = {
        "attention.mla": attention.mla is not None,
        "attention.sinks": attention.sinks,
        "attention.window": attention.window is not None,
        "norm": config.norm != "rms",
        "norm_place": config.norm_place != "pre",
        "head_bias": config.head_bias,
    }
    asked = [name for name, is_asked in unknown.items() if is_asked]
    if asked:
        raise ConfigError(
            f"this decoder does not yet have {', '.join(asked)}",
            hint="`moiety.cost` and the registry count such models; running them is not possible yet",
        )
