"""The Switch Transformer (arXiv 2101.03961): an encoder-decoder in the layout of T5 (arXiv 1910.10683) with MoE.

Pre-norm without biases, scores that are not scaled, relative positions as a bias that all layers of a stack
share, feed-forwards of which every few are the MoE layer of `moiety.moe`. An expert takes a fixed number of
tokens of a sequence, the first that want it; the others keep their residual alone. As in transformers that
holds for the tokens of one call, padding counts, and so one token after the other loses nothing.
`switch_files` reads and writes such models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moiety.backends.matmul import linear
from moiety.config import EncoderDecoderConfig, MoEConfig
from moiety.errors import ConfigError, UsageError
from moiety.model.norm import RMSNorm
from moiety.moe import routers
from moiety.moe.capacity import Capacity
from moiety.moe.experts import FeedForward
from moiety.moe.layer import MoE
from moiety.routing import Routing

__all__ = ["DecoderCache", "Encoded", "SwitchOutput", "SwitchTransformer", "generate", "position_bucket"]

KeysValues = tuple[Tensor, Tensor]
# What a MoEConfig may say here; `renormalize` says nothing about one expert weighted by its probability.
MOE_OPTIONS = frozenset(
    {"experts", "d_ff", "router_options", "router_bias", "activation", "gated", "renormalize"}
    | {"balance_loss", "z_loss", "bias_rate"}
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """What the decoder looks at.

    Args:
        hidden: The encoder's output, (B, T, D).
        valid_BT: False for padding, which the decoder does not look at; None when every token is real.
        routing: The routing of the encoder's MoE layers, by layer.
    """

    hidden: Tensor
    valid_BT: Tensor | None
    routing: Mapping[int, Routing]


@dataclass(frozen=True, kw_only=True, eq=False)
class SwitchOutput:
    """What a forward pass returns.

    Args:
        hidden: What the head multiplies, (B, S, D): the decoder's output, scaled where the head is tied.
        head_weight: The output head, (V, D).
        encoded: The encoder's output.
        routing: The routing of the decoder's MoE layers, by layer.
    """

    hidden: Tensor
    head_weight: Tensor
    encoded: Encoded
    routing: Mapping[int, Routing]

    @property
    def logits(self) -> Tensor:
        """Scores of every vocabulary entry, (B, S, V); multiplied out on each access."""
        return linear(self.hidden, self.head_weight)


def position_bucket(offset: Tensor, *, buckets: int, most: int, both_sides: bool) -> Tensor:
    """The bucket of each key by its position minus the query's (arXiv 1910.10683, section 2.1).

    Near offsets have a bucket each, farther ones share buckets that grow with the logarithm of the distance.

    Args:
        offset: Position of the key minus that of the query, integers of any shape.
        buckets: How many there are.
        most: Distance from which on all share the last bucket.
        both_sides: Keys after the query have the upper half of the buckets; False gives them bucket 0.
    """
    first = torch.zeros_like(offset)
    if both_sides:
        buckets //= 2
        first = (offset > 0).long() * buckets
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    near = buckets // 2
    # The order of these float32 operations decides the bucket at its edges: weights are trained with it.
    growth = torch.log(distance.clamp(min=1).float() / near) / math.log(most / near) * (buckets - near)
    far = (near + growth.long()).clamp(max=buckets - 1)
    return first + torch.where(distance < near, distance, far)


class RelativePositions(nn.Module):
    """A bias on the scores of each head by the distance of query and key. Parameter: `weight` (buckets, H)."""

    def __init__(self, config: EncoderDecoderConfig, both_sides: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.position_buckets, config.heads))
        self.most, self.both_sides = config.position_distance, both_sides

    def forward(self, start: int, queries: int, keys: int) -> Tensor:
        """(1, H, S, T) for queries from position `start` on and keys from 0 on."""
        device = self.weight.device
        query_S = torch.arange(start, start + queries, device=device)
        offset_ST = torch.arange(keys, device=device) - query_S[:, None]
        bucket_ST = position_bucket(
            offset_ST, buckets=len(self.weight), most=self.most, both_sides=self.both_sides
        )
        return F.embedding(bucket_ST, self.weight).permute(2, 0, 1)[None]


class CrossAttention(nn.Module):
    """Attention to given keys and values, its own or another stack's.

    Parameters: `query.weight` (H * head_dim, D); `key_value.weight` (2 H * head_dim, D), key rows first;
    `out.weight` (D, H * head_dim).
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.heads, width = config.heads, config.heads * config.head_dim
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.key_value = nn.Linear(config.d_model, 2 * width, bias=False)
        self.out = nn.Linear(width, config.d_model, bias=False)

    def _heads(self, x_BSI: Tensor) -> Tensor:
        return x_BSI.view(*x_BSI.shape[:2], self.heads, -1).transpose(1, 2)

    def keys_values(self, x_BTD: Tensor) -> KeysValues:
        """Keys and values of what is looked at, each (B, H, T, head_dim)."""
        key, value = linear(x_BTD, self.key_value.weight).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def forward(self, x_BSD: Tensor, seen: KeysValues, mask: Tensor | None) -> Tensor:
        """(B, S, D) to (B, S, D). `mask` is added to the scores, of a shape that broadcasts to (B, H, S, T)."""
        query_BHSd = self._heads(linear(x_BSD, self.query.weight))
        key_BHTd, value_BHTd = (one.to(query_BHSd.dtype) for one in seen)
        y_BHSd = F.scaled_dot_product_attention(query_BHSd, key_BHTd, value_BHTd, attn_mask=mask, scale=1.0)
        return linear(y_BHSd.transpose(1, 2).flatten(2), self.out.weight)


class DecoderCache:
    """What decoding one token after the other need not compute again: made by `SwitchTransformer.cache`.

    Args:
        cross: Keys and values of the encoder's output in every decoder layer.
        max_positions: Longest sequence that fits, in tokens.
    """

    def __init__(self, cross: Sequence[KeysValues], max_positions: int) -> None:
        self.cross, self.length = cross, 0
        sequences, heads, _, head_dim = cross[0][0].shape
        shape = (2, len(cross), sequences, heads, max_positions, head_dim)
        self.buffer = cross[0][0].new_empty(shape)
        self.valid_BP = self.buffer.new_ones((sequences, max_positions), dtype=torch.bool)

    def extend(self, layer: int, fresh: KeysValues) -> KeysValues:
        """Write new keys and values after the old ones; all come back. `length` moves once per pass."""
        stop = self.length + fresh[0].shape[2]
        for buffer, values in zip(self.buffer[:, layer], fresh, strict=True):
            buffer[:, :, self.length : stop] = values
        return self.buffer[0, layer, :, :, :stop], self.buffer[1, layer, :, :, :stop]

    def check_room(self, sequences: int, positions: int) -> None:
        """Raise UsageError unless `positions` more tokens of `sequences` sequences fit."""
        made_for, room = self.valid_BP.shape
        if sequences != made_for:
            raise UsageError(f"the cache is for {made_for} sequences and {sequences} were given")
        if self.length + positions > room:
            raise UsageError(
                f"the cache holds {room} positions, {self.length} are used and {positions} more were given",
                hint="make the cache with a larger max_positions, or stop generating earlier",
            )


class Block(nn.Module):
    """Norm, attention, add; in the decoder norm, attention to the encoder, add; norm, feed-forward, add."""

    def __init__(
        self, config: EncoderDecoderConfig, layer: int, *, is_moe: bool, is_decoder: bool, backend: str
    ) -> None:
        super().__init__()
        self.layer, width, eps = layer, config.d_model, config.norm_eps
        self.attention_norm, self.attention = RMSNorm(width, eps), CrossAttention(config)
        self.cross_norm = RMSNorm(width, eps) if is_decoder else None
        self.cross_attention = CrossAttention(config) if is_decoder else None
        self.feed_forward_norm = RMSNorm(width, eps)
        self.feed_forward: MoE | FeedForward
        moe = config.moe
        if not is_moe:
            self.feed_forward = FeedForward(width, moe.d_ff, activation=moe.activation, gated=moe.gated)
            return
        rows = config.expert_capacity
        self.feed_forward = MoE(
            d_model=width,
            d_ff=moe.d_ff,
            experts=moe.experts,
            router=routers.from_config(moe),
            activation=moe.activation,
            gated=moe.gated,
            router_bias=moe.router_bias,
            capacity=None if rows is None else Capacity(factor=0.0, sequence_rows=rows),
            backend=backend,
        )

    def forward(
        self,
        x_BSD: Tensor,
        mask: Tensor,
        cross: KeysValues | None = None,
        cross_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """(B, S, D) to (B, S, D), and the routing if this block is MoE; `cross` is what a decoder looks at."""
        normed = self.attention_norm(x_BSD)
        seen = self.attention.keys_values(normed)
        if cache is not None:
            seen = cache.extend(self.layer, seen)
        x_BSD = x_BSD + self.attention(normed, seen, mask)
        if self.cross_attention is not None:
            assert self.cross_norm is not None and cross is not None, self.layer
            x_BSD = x_BSD + self.cross_attention(self.cross_norm(x_BSD), cross, cross_mask)
        normed = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, FeedForward):
            return x_BSD + self.feed_forward(normed), None
        y = self.feed_forward(normed)  # padding too: transformers routes it, and it takes an expert's room
        return x_BSD + y.output, y.routing


class Stack(nn.Module):
    """Blocks and a final norm, with one table of relative positions for all of them."""

    def __init__(self, config: EncoderDecoderConfig, *, is_decoder: bool, backend: str) -> None:
        super().__init__()
        layers = config.decoder_depth if is_decoder else config.layers
        sparse = config.decoder_moe_layers if is_decoder else config.encoder_moe_layers
        self.positions = RelativePositions(config, both_sides=not is_decoder)
        self.blocks = nn.ModuleList(
            Block(config, layer, is_moe=layer in sparse, is_decoder=is_decoder, backend=backend)
            for layer in range(layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class SwitchTransformer(nn.Module):
    """An encoder-decoder with MoE feed-forwards.

    Parameters: `embed.weight` (V, D), and where nothing is tied `decoder_embed.weight` and `head.weight` of the
    same shape; those of the stacks `encoder` and `decoder`.

    Args:
        config: What to build.
        backend: Who multiplies the experts; see `moiety.backends`.
        initialize: Fill the parameters; False leaves them for a checkpoint to fill.

    Raises:
        ConfigError: `config.moe` asks for something that these layers do not do.
    """

    def __init__(
        self, config: EncoderDecoderConfig, *, backend: str = "auto", initialize: bool = True
    ) -> None:
        super().__init__()
        _check_moe(config.moe)
        self.config = config
        shape = (config.vocab_size, config.d_model)
        self.embed = nn.Embedding(*shape)
        self.decoder_embed = None if config.tied else nn.Embedding(*shape)
        self.encoder = Stack(config, is_decoder=False, backend=backend)
        self.decoder = Stack(config, is_decoder=True, backend=backend)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        if initialize:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal with 1/sqrt(fan-in), queries smaller by sqrt(head_dim) as scores are not scaled; embeddings with 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("positions.weight"):
                parameter.normal_(0.0, self.config.d_model**-0.5)
            elif name.endswith("embed.weight"):
                parameter.normal_()
            else:
                shrink = self.config.head_dim if name.endswith("query.weight") else 1
                parameter.normal_(0.0, (parameter.shape[-1] * shrink) ** -0.5)

    def encode(self, tokens_BT: Tensor, *, valid_BT: Tensor | None = None) -> Encoded:
        """Run the encoder.

        Args:
            tokens_BT: Token ids, int64 (B, T).
            valid_BT: Bool (B, T), False for padding, wherever it stands. It is routed like a token.

        Raises:
            UsageError: tokens outside the vocabulary, or shapes that do not fit.
        """
        _check_tokens("tokens", tokens_BT, self.config.vocab_size, valid_BT)
        length = tokens_BT.shape[1]
        mask = self.encoder.positions(0, length, length)
        if valid_BT is not None:
            mask = _hidden(mask, valid_BT[:, None, None])
        x_BTD = self.embed(tokens_BT)
        routing: dict[int, Routing] = {}
        for layer, block in enumerate(self.encoder.blocks):
            x_BTD, decided = block(x_BTD, mask)
            if decided is not None:
                routing[layer] = decided
        return Encoded(hidden=self.encoder.norm(x_BTD), valid_BT=valid_BT, routing=routing)

    def cache(self, encoded: Encoded, max_positions: int) -> DecoderCache:
        """A cache to decode up to `max_positions` tokens that look at `encoded`."""
        if max_positions < 1:
            raise UsageError(f"max_positions is {max_positions}; it must be positive")
        return DecoderCache(self._cross(encoded), max_positions)

    def _cross(self, encoded: Encoded) -> list[KeysValues]:
        attentions = (block.get_submodule("cross_attention") for block in self.decoder.blocks)
        return [one.keys_values(encoded.hidden) for one in attentions if isinstance(one, CrossAttention)]

    def decode(
        self,
        tokens_BS: Tensor,
        encoded: Encoded,
        *,
        valid_BS: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> SwitchOutput:
        """Run the decoder on tokens, or on further tokens after those in `cache`, to which they are added.

        Args:
            tokens_BS: Token ids, int64 (B, S); the first one of a sequence is `config.start_token`.
            encoded: What they look at.
            valid_BS: Bool (B, S), False for padding.
            cache: Made by `cache` for the same `encoded`.

        Raises:
            UsageError: tokens, padding, cache or encoder output that do not fit the model or each other.
        """
        _check_tokens("decoder tokens", tokens_BS, self.config.vocab_size, valid_BS)
        (sequences, positions), start = tokens_BS.shape, 0
        if sequences != len(encoded.hidden):
            raise UsageError(f"{sequences} sequences to decode, but {len(encoded.hidden)} were encoded")
        if cache is not None:
            cache.check_room(sequences, positions)
            start = cache.length
            if valid_BS is not None:
                cache.valid_BP[:, start : start + positions] = valid_BS
            valid_BS = cache.valid_BP[:, : start + positions]
        cross_mask = None
        if encoded.valid_BT is not None:
            zeros = torch.zeros((), dtype=encoded.hidden.dtype, device=encoded.hidden.device)
            cross_mask = _hidden(zeros, encoded.valid_BT[:, None, None])
        mask = self._causal(start, positions, valid_BS)
        cross = self._cross(encoded) if cache is None else cache.cross
        x_BSD = (self.embed if self.decoder_embed is None else self.decoder_embed)(tokens_BS)
        routing: dict[int, Routing] = {}
        for layer, block in enumerate(self.decoder.blocks):
            x_BSD, decided = block(x_BSD, mask, cross[layer], cross_mask, cache)
            if decided is not None:
                routing[layer] = decided
        if cache is not None:
            cache.length += positions
        return self._output(self.decoder.norm(x_BSD), encoded, routing)

    def _causal(self, start: int, positions: int, valid_BT: Tensor | None) -> Tensor:
        """The decoder's position bias, with what a query must not see hidden."""
        keys = start + positions
        bias = self.decoder.positions(start, positions, keys)
        seen = torch.ones((positions, keys), dtype=torch.bool, device=bias.device).tril(start)
        if valid_BT is not None and not bool(valid_BT.all()):
            seen = seen & valid_BT[:, None, None]
        return _hidden(bias, seen)

    def _output(self, hidden: Tensor, encoded: Encoded, routing: Mapping[int, Routing]) -> SwitchOutput:
        if self.head is None:
            hidden, weight = hidden * self.config.d_model**-0.5, self.embed.weight
        else:
            weight = self.head.weight
        return SwitchOutput(hidden=hidden, head_weight=weight, encoded=encoded, routing=routing)

    def forward(
        self,
        tokens_BT: Tensor,
        decoder_tokens_BS: Tensor,
        *,
        valid_BT: Tensor | None = None,
        decoder_valid_BS: Tensor | None = None,
    ) -> SwitchOutput:
        """Encode, then decode; arguments and errors as for these two."""
        encoded = self.encode(tokens_BT, valid_BT=valid_BT)
        return self.decode(decoder_tokens_BS, encoded, valid_BS=decoder_valid_BS)

    def save(self, path: str | Path) -> None:
        """Write the model in Hugging Face layout; see `moiety.model.switch_files.save_switch`."""
        from moiety.model import switch_files

        switch_files.save_switch(self, path)


def generate(
    model: SwitchTransformer,
    tokens_BT: Tensor,
    *,
    valid_BT: Tensor | None = None,
    max_tokens: int = 128,
    end_id: int | None = 1,
) -> list[list[int]]:
    """The most likely token after the other, for every sequence.

    Args:
        model: Any.
        tokens_BT: What to answer, int64 (B, T).
        valid_BT: False for its padding.
        max_tokens: Most tokens of an answer.
        end_id: An answer ends with this token, 1 in T5's vocabulary; None goes on to `max_tokens`.

    Returns:
        The answers, without the start token.

    Raises:
        UsageError: as `SwitchTransformer.encode`, or max_tokens below 1.
    """
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}; it must be positive")
    with torch.inference_mode():
        encoded = model.encode(tokens_BT, valid_BT=valid_BT)
        cache = model.cache(encoded, max_tokens)
        fresh_BS = tokens_BT.new_full((len(tokens_BT), 1), model.config.start_token)
        answers: list[list[int]] = [[] for _ in tokens_BT]
        for _ in range(max_tokens):
            output = model.decode(fresh_BS, encoded, cache=cache)
            fresh_BS = output.logits.argmax(-1)
            for answer, token in zip(answers, fresh_BS[:, 0].tolist(), strict=True):
                if not answer or answer[-1] != end_id:
                    answer.append(token)
            if all(answer[-1] == end_id for answer in answers):
                break
    return answers


def _hidden(bias: Tensor, seen: Tensor) -> Tensor:
    """`bias` where `seen`, else a number so low that the softmax leaves nothing of it.

    It is not -inf: a query that sees nothing at all, padding before the first token, stays a number.
    """
    return torch.where(seen, bias, torch.finfo(bias.dtype).min)


def _check_tokens(name: str, tokens_BS: Tensor, vocabulary: int, valid_BS: Tensor | None) -> None:
    """Refuse what would fail deep inside, or not fail and be wrong."""
    shape = tuple(tokens_BS.shape)
    if len(shape) != 2 or 0 in shape:
        raise UsageError(
            f"{name} have shape {shape}; (sequences, positions) is wanted, at least one of each",
            hint="for one sequence use tokens[None]",
        )
    if tokens_BS.device.type == "cpu":  # elsewhere looking would wait for the device
        low, high = (int(edge) for edge in tokens_BS.aminmax())
        if not 0 <= low <= high < vocabulary:
            raise UsageError(
                f"{name} range from {low} to {high}; the vocabulary is 0 to {vocabulary - 1}",
                hint="is this the model's tokenizer?",
            )
    if valid_BS is not None and (valid_BS.dtype != torch.bool or tuple(valid_BS.shape) != shape):
        raise UsageError(f"padding is {valid_BS.dtype} {tuple(valid_BS.shape)}; bool {shape} is wanted")


def _check_moe(moe: MoEConfig) -> None:
    """Every option of a config acts or is refused; none is ignored."""
    if moe.router != "switch":
        raise ConfigError(
            f"moe.router is {moe.router!r}; allowed in an encoder-decoder is 'switch'",
            hint="one expert per token, weighted by its probability",
        )
    plain = MoEConfig(experts=moe.experts, experts_per_token=1, d_ff=moe.d_ff, router="switch")
    names = {item.name for item in fields(MoEConfig)} - MOE_OPTIONS
    asked = sorted(name for name in names if getattr(moe, name) != getattr(plain, name))
    if asked:
        raise ConfigError(
            f"an encoder-decoder does not have {', '.join(f'moe.{name}' for name in asked)}",
            hint="its capacity is expert_capacity, a number of tokens of a sequence",
        )
