"""The layer: route, multiply, combine. A drop-in for a transformer's feed-forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moiety.backends import cpu, cpu_routing
from moiety.backends.matmul import multiply_into, multiply_rows, multiply_rows_back, project
from moiety.errors import ConfigError, UsageError
from moiety.moe.adapted import AdaptedExperts, AdaptedFeedForward, AdaptedRows
from moiety.moe.capacity import Capacity, passes
from moiety.moe.dense_gradient import dense_gradient
from moiety.moe.experts import Experts, FeedForward
from moiety.moe.hosted import HostedExperts
from moiety.moe.packed import MixedExperts, PackedExperts, PackedFeedForward
from moiety.moe.routers import Router, RouterContext, compiled
from moiety.moe.streamed import StreamedExperts
from moiety.routing import Noise, Routing

__all__ = ["MoE", "MoEOutput", "contributions"]


class MoEOutput(NamedTuple):
    """What a layer returns: `output` of x's shape, and the `routing` that made it."""

    output: Tensor
    routing: Routing


class _RouterLogits(torch.autograd.Function):
    """x W^T + b in float32 that keeps x as it came, not a float32 copy of it."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.has_bias = bias_E is not None
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return multiply_rows(x_TD.to(wide), weight_ED.to(wide), None if bias_E is None else bias_E.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        with torch.autocast(x_TD.device.type, enabled=False):
            grad_x = grad_weight = None
            if need_x:
                grad_x = multiply_rows_back(grad_TE, weight_ED.to(grad_TE.dtype)).to(x_TD.dtype)
            if need_weight:
                grad_weight = grad_TE.new_empty(weight_ED.shape)
                multiply_into(grad_weight, grad_TE, x_TD.to(grad_TE.dtype))
                grad_weight = grad_weight.to(weight_ED.dtype)
        return grad_x, grad_weight, grad_TE.sum(0) if need_bias else None


def _check_sizes(
    sizes: dict[str, int],
    shared_d_ff: int,
    shared_gate: bool,
    shared_bias: bool,
    null_experts: int,
    null_kind: str,
) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}; it must be at least 1")
    for name, size in (("shared_d_ff", shared_d_ff), ("null_experts", null_experts)):
        if size < 0:
            raise ConfigError(f"{name} is {size}; it must be at least 0")
    for name, given in (("shared_gate", shared_gate), ("shared_bias", shared_bias)):
        if given and shared_d_ff < 1:
            raise ConfigError(f"{name} is set, but shared_d_ff is 0: there is no shared expert")
    if null_kind not in ("identity", "zero"):
        raise ConfigError(f"null_kind is {null_kind!r}; allowed are 'identity' and 'zero'")


def _check_company(
    router: Router, capacity: Capacity | None, weigh_input: bool, null_experts: int, merged: bool
) -> None:
    """Refuse what each is fine alone and would be ignored or wrong together."""
    if merged and (capacity is not None or weigh_input or router.needs.dense_gradient):
        raise ConfigError(
            "the weights of merged experts are added up: they go with no capacity, weigh_input or dense gradient"
        )
    if null_experts and (capacity is not None or weigh_input):
        raise ConfigError(
            "null experts take any number of tokens; they go with no capacity and no weigh_input"
        )
    if weigh_input and router.needs.dense_gradient:
        raise ConfigError(
            "a dense gradient is that of weighed outputs; it does not go with weigh_input",
            hint="use the router's own gradient",
        )
    by_rank = router.needs.ranked and not router.needs.compares
    if by_rank and capacity is not None and capacity.policy in ("reroute", "dense"):
        raise ConfigError(
            f"{type(router).__name__} weighs by the order of its choices, which overflow policy "
            f"{capacity.policy!r} does not keep",
            hint="use policy position, priority, random or queue",
        )


def _check_lengths(
    tokens: int, experts: int, valid_T: Tensor | None, token_id_T: Tensor | None, cost_E: Tensor | None
) -> None:
    """Refuse what would be broadcast, or fail far from here."""
    for name, given, wanted, what in (
        ("valid", valid_T, tokens, "token"),
        ("token_ids", token_id_T, tokens, "token"),
        ("cost_E", cost_E, experts, "expert"),
    ):
        if given is not None and tuple(given.shape) != (wanted,):
            raise UsageError(
                f"{name} has shape {tuple(given.shape)}; one for each of {wanted} {what}s is wanted"
            )


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward.

    The router runs in float32 whatever the model's dtype (arXiv 2101.03961, section 2.4). Under autocast, x
    and the experts are cast to autocast's dtype once.

    Parameters: `gate.weight` (E, D), unless the router wants none; `experts.gate_up` (E, 2F, D), gate rows
    first, and `experts.down` (E, D, F), also reachable as `gate_up` and `down`; with a shared expert `shared`
    and `shared_gate`.

    Args:
        d_model: Width D.
        d_ff: Inner width F of one expert.
        experts: E.
        router: `TopK(k)`, `Switch()`, `SigmoidTopK(k)` or anything else that answers the three questions of
            `moiety.moe.routers`.
        activation: silu, gelu, gelu_tanh or relu, or clamped_swiglu (gpt-oss).
        activation_limit: Clamp of clamped_swiglu, see `Experts`.
        gated: SwiGLU-like when True, a single up projection when False.
        bias: Add biases to the experts.
        router_bias: Add a trained bias to the router's logits.
        shared_d_ff: Inner width of an expert that every token uses (arXiv 2401.06066); 0 for none.
        shared_gate: Multiply the shared expert by sigmoid(x w) (Qwen2-MoE).
        shared_bias: Add biases to the shared expert.
        null_experts: Further choices, numbered after the experts, that multiply nothing (arXiv 2509.01322).
        answers: Which stored expert answers for each of the router's, where some were merged; () when each is its own.
        null_kind: "identity" (a null expert answers x) or "zero".
        capacity: What happens when an expert is wanted too much; None drops nothing.
        weigh_input: Put the combine weight on the expert's input instead of its output (Llama 4).
        backend: Who multiplies; see `moiety.backends`.

    Raises:
        ConfigError: a size that is not positive, or a router that cannot serve this many experts.
    """

    selection_bias: Tensor | None
    gate: nn.Linear | None

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        experts: int,
        router: Router,
        activation: str = "silu",
        activation_limit: float = 7.0,
        gated: bool = True,
        bias: bool = False,
        router_bias: bool = False,
        shared_d_ff: int = 0,
        shared_gate: bool = False,
        shared_bias: bool = False,
        null_experts: int = 0,
        null_kind: str = "identity",
        answers: Sequence[int] = (),
        capacity: Capacity | None = None,
        weigh_input: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_ff": d_ff, "experts": experts}
        _check_sizes(sizes, shared_d_ff, shared_gate, shared_bias, null_experts, null_kind)
        _check_company(router, capacity, weigh_input, null_experts, bool(answers))
        self.router, self.capacity, self.weigh_input = router, capacity, weigh_input
        self.null_kind, self.choices = null_kind, experts + null_experts
        self.null_experts, self.answers = null_experts, tuple(answers)
        router.check(self.choices)
        if router_bias and not router.needs.gate:
            raise ConfigError("router_bias is set, but this router computes no logits")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = nn.Linear(d_model, self.choices, bias=router_bias, **like) if router.needs.gate else None
        self.gate_noise = nn.Linear(d_model, self.choices, bias=False, **like) if router.needs.noise else None
        if self.gate_noise is not None:
            nn.init.zeros_(self.gate_noise.weight)
        shape: dict[str, Any] = {
            "activation": activation,
            "activation_limit": activation_limit,
            "gated": gated,
            **like,
        }
        self.experts: (
            Experts | PackedExperts | MixedExperts | StreamedExperts | HostedExperts | AdaptedExperts
        )
        stored = max(answers, default=experts - 1) + 1
        self.experts = Experts(d_model, d_ff, stored, bias=bias, backend=backend, **shape)
        self.shared: FeedForward | PackedFeedForward | AdaptedFeedForward | None
        self.shared = FeedForward(d_model, shared_d_ff, bias=shared_bias, **shape) if shared_d_ff else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False, **like) if shared_gate else None
        bias_E = None
        if router.needs.bias:
            bias_E = torch.zeros(self.choices, dtype=torch.float32, device=device)
        self.register_buffer("selection_bias", bias_E)

    @property
    def gate_up(self) -> Tensor:
        """The experts' gate and up projections, (E, 2F, D), gate rows first."""
        experts = self._unpacked()
        return experts.get_parameter(experts.up_name)

    @property
    def down(self) -> Tensor:
        """The experts' down projections, (E, D, F)."""
        return self._unpacked().down

    def _unpacked(self) -> Experts:
        if isinstance(self.experts, AdaptedExperts):
            raise UsageError(
                "the experts of this layer have adapters, which their weights alone leave out",
                hint="merge or remove the adapters first (`moiety.model.adapters`)",
            )
        if not isinstance(self.experts, Experts):
            raise UsageError(
                "the experts of this layer are packed or elsewhere: it has no weights of theirs",
                hint="`formats.tiles.unpack` gives the weights that tiles mean",
            )
        return self.experts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """Move the selection bias with the layer but keep it float32: its steps are lost in bfloat16."""
        bias_E = self.selection_bias
        super()._apply(fn, recurse)
        if bias_E is not None and self.selection_bias is not None:
            source_E = self.selection_bias if bias_E.is_meta else bias_E
            self.selection_bias = source_E.to(self.selection_bias.device, torch.float32)
        return self

    def route(
        self,
        x_TD: Tensor,
        *,
        valid_T: Tensor | None = None,
        pinned: Routing | None = None,
        token_id_T: Tensor | None = None,
        cost_E: Tensor | None = None,
        step: int | None = None,
        seed: int | None = None,
        sequences: int = 1,
    ) -> Routing:
        """Decide, without multiplying.

        Args:
            x_TD: Tokens, (T, D).
            valid_T: Bool (T,), False for padding.
            pinned: Make exactly these pairs and only weigh them anew; its own padding holds, not `valid_T`.
            token_id_T: Token ids, int64 (T,); only a router like `Hash` looks at them.
            cost_E: What using each expert costs, for `CostAware`.
            step: Of the training run, for schedules; None is after their end.
            seed: Of everything random; None draws one from torch's generator when the router needs it.
            sequences: How many of equal length the tokens are, for a capacity of each sequence.

        Raises:
            ConfigError: `pinned` is of other tokens or experts.
            UsageError: the router needs token ids and got none, or something is not one for each token or expert.
        """
        self._check_pinned(pinned, len(x_TD))
        _check_lengths(len(x_TD), self.choices, valid_T, token_id_T, cost_E)
        router = self.compiled(x_TD) if pinned is None and valid_T is None else None
        if router is not None:
            return cpu_routing.route(x_TD, router)
        needs = self.router.needs
        if needs.token_ids and token_id_T is None:
            raise UsageError("this router chooses by token id", hint="pass token_ids, one for each token")
        random = self.training and (needs.random or self.capacity is not None)
        if seed is None:
            seed = int(torch.randint(2**31, ())) if random else 0
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE, noise = self._logits(x_TD, seed)
            context = RouterContext(
                logits_TE=logits_TE,
                valid_T=valid_T,
                bias_E=self.selection_bias,
                cost_E=cost_E,
                token_id_T=token_id_T,
                training=self.training,
                step=step,
                seed=seed,
            )
            score_TE = self.router.score(logits_TE, context)
            pairs = pinned
            if pairs is None:
                pairs = self._choose(score_TE.detach(), context, sequences)
            weight_N = self._weigh(score_TE, pairs, context)
        if self.gate is None:
            return pairs.with_weights(weight_N)
        return pairs.with_weights(weight_N, logits_TE=logits_TE, score_TE=score_TE, noise=noise)

    def compiled(self, x_TD: Tensor) -> cpu_routing.CompiledRouter | None:
        """The router for the compiled kernel, beside packed experts; None where it would decide otherwise."""
        packed = bool(cpu.level()) and isinstance(
            self.experts, PackedExperts | MixedExperts | StreamedExperts
        )
        if not packed or self.training or torch.is_grad_enabled() or self.capacity is not None:
            return None
        if x_TD.device.type != "cpu" or self.choices > cpu_routing.MOST_EXPERTS:
            return None
        best, gate = compiled(self.router), self.gate
        if best is None or gate is None or self.gate_noise is not None:
            return None
        return cpu_routing.CompiledRouter(
            gate.weight, best, gate_bias_E=gate.bias, bias_E=self.selection_bias
        )

    def _choose(self, score_TE: Tensor, context: RouterContext, sequences: int) -> Routing:
        """The router's pairs, after what the capacity makes of them; experts on disk may cost something."""
        pairs = self.router.choose(score_TE, context)
        if context.cost_E is None and isinstance(self.experts, StreamedExperts):
            cost_E = self.experts.cost_of(self.choices, self.answers)
            if cost_E is not None:
                plain, pairs = (
                    pairs,
                    self.router.choose(score_TE, dataclasses.replace(context, cost_E=cost_E)),
                )
                self.experts.note(pairs, plain)
        if self.capacity is None:
            return pairs
        generator = context.generator(6)
        return self.capacity.fit(
            pairs, score_TE, training=self.training, generator=generator, sequences=sequences
        )

    def _check_pinned(self, pinned: Routing | None, tokens: int) -> None:
        if pinned is not None and (pinned.tokens, pinned.experts) != (tokens, self.choices):
            raise ConfigError(
                f"the pinned routing is of {pinned.tokens} tokens and {pinned.experts} experts, "
                f"this layer has {tokens} and {self.choices}",
                hint="pin a routing that this layer made, for the same tokens",
            )

    def _logits(self, x_TD: Tensor, seed: int) -> tuple[Tensor, Noise | None]:
        """Float32 logits (T, E), with jitter and noise while training, and what the noise was."""
        if self.gate is None:
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            return x_TD.new_zeros(len(x_TD), self.choices, dtype=wide), None
        generator = torch.Generator(x_TD.device).manual_seed((seed * 0x9E3779B1 + 0x27D4EB2F) % 2**32)
        jitter = self.router.needs.jitter
        if self.training and jitter:
            # bfloat16 has four numbers from 0.99 to 1.01
            factor_TD = torch.empty_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
            x_TD = x_TD * factor_TD.uniform_(1 - jitter, 1 + jitter, generator=generator)
        if self.gate_noise is None or not self.training:
            return _RouterLogits.apply(x_TD, self.gate.weight, self.gate.bias), None
        # both projections as one product: x is made wide once
        both = torch.cat([self.gate.weight, self.gate_noise.weight])
        clean_TE, noise_TE = _RouterLogits.apply(x_TD, both, None).chunk(2, dim=-1)
        if self.gate.bias is not None:
            clean_TE = clean_TE + self.gate.bias
        deviation_TE = F.softplus(noise_TE)
        normal_TE = torch.empty_like(clean_TE).normal_(generator=generator)
        return clean_TE + normal_TE * deviation_TE, Noise(clean_TE, deviation_TE)

    def _weigh(self, score_TE: Tensor, pairs: Routing, context: RouterContext) -> Tensor:
        """Weights of the pairs; where a capacity dropped some, what they weighed among all that were wanted."""
        if pairs.kept_N is None:
            return self.router.weigh(score_TE, pairs, context)
        assert pairs.wanted is not None
        return self.router.weigh(score_TE, pairs.wanted, context)[pairs.kept_N]

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        pinned: Routing | None = None,
        token_ids: Tensor | None = None,
        cost_E: Tensor | None = None,
        step: int | None = None,
        seed: int | None = None,
        adapters: AdaptedRows | None = None,
    ) -> MoEOutput:
        """Route every token and add up its experts' answers.

        Args:
            x: (..., D); the first of three axes is that of sequences.
            valid: Bool of x's leading shape, False for padding; padding gets zeros from the routed experts.
            pinned: A routing whose pairs to repeat, see `Routing.pinned`.
            token_ids: Of x's leading shape, for routers that need them.
            cost_E: What using each expert costs, for `CostAware`.
            step: Of the training run, for schedules; None is after their end.
            seed: Of everything random; None draws one when needed.
            adapters: Which tokens each adapter is for; None lets the active one serve all.

        Returns:
            `.output` of x's shape and `.routing` over the flattened tokens.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.route(
            x_TD,
            valid_T=None if valid is None else valid.reshape(-1),
            pinned=pinned,
            token_id_T=None if token_ids is None else token_ids.reshape(-1),
            cost_E=cost_E,
            step=step,
            seed=seed,
            sequences=max(x.shape[0], 1) if x.dim() == 3 else 1,
        )
        sent = self._sent(x_TD, routing)  # on their way while the shared expert multiplies
        shared_TD = None if sent is None else self._shared(x_TD, adapters)
        y_TD = self._multiply(x_TD, routing, adapters, sent)
        if sent is None:
            shared_TD = self._shared(x_TD, adapters)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return MoEOutput(y_TD.view(x.shape), routing)

    def _sent(self, x_TD: Tensor, routing: Routing) -> Any:
        """Tokens on their way to experts in other processes; None where there are none, or they set out later."""
        experts = self.experts
        if not isinstance(experts, Experts) or experts.spread is None or self.weigh_input:
            return None
        return experts.spread.send(x_TD, self.multiplied(routing))

    def _shared(self, x_TD: Tensor, adapters: AdaptedRows | None) -> Tensor | None:
        """What the shared expert answers, (T, D); None without one."""
        if self.shared is None:
            return None
        adapted = isinstance(self.shared, AdaptedFeedForward)
        shared_TD: Tensor = self.shared(x_TD, adapters) if adapted else self.shared(x_TD)
        return (
            shared_TD if self.shared_gate is None else project(x_TD, self.shared_gate).sigmoid() * shared_TD
        )

    def multiplied(self, routing: Routing) -> Routing:
        """The pairs of stored experts that a routing of this layer means: null experts left out, merged ones as one."""
        real = routing if not self.null_experts else routing.first(self.choices - self.null_experts)
        return real.merged(self.answers) if self.answers else real

    def _experts(
        self, x_TD: Tensor, routing: Routing, adapters: AdaptedRows | None, sent: Any = None
    ) -> Tensor:
        if isinstance(self.experts, AdaptedExperts):
            y_TD: Tensor = self.experts(x_TD, routing, adapters)
        elif sent is not None:
            y_TD = self.experts(x_TD, routing, sent)
        else:
            y_TD = self.experts(x_TD, routing)
        return y_TD

    def _multiply(
        self, x_TD: Tensor, routing: Routing, adapters: AdaptedRows | None, sent: Any = None
    ) -> Tensor:
        """The routed experts' weighted sum, (T, D)."""
        if self.weigh_input:
            return self._multiply_weighed_input(x_TD, routing, adapters)
        real = self.multiplied(routing)
        limit = None
        if self.capacity is not None and self.capacity.queues:
            limit = self.capacity.limit(routing, self.training)
        if limit is None:
            y_TD = self._experts(x_TD, real, adapters, sent)
        else:
            y_TD = torch.stack([self._experts(x_TD, part, adapters) for part in passes(real, limit)]).sum(0)
        if self.null_experts and self.null_kind == "identity":
            null = slice(int(routing.counts_E[: -self.null_experts].sum()), None)
            null_N = routing.weight_N[null]
            null_T = null_N.new_zeros(routing.tokens).index_add(0, routing.token_N[null], null_N)
            y_TD = y_TD + null_T[:, None].to(x_TD.dtype) * x_TD
        if self.training and self.router.needs.dense_gradient and torch.is_grad_enabled():
            y_TD = dense_gradient(y_TD, x_TD, routing, self._unpacked())
        return y_TD

    def _multiply_weighed_input(self, x_TD: Tensor, routing: Routing, adapters: AdaptedRows | None) -> Tensor:
        """Every pair is a token of its own, scaled before its expert and added up plainly."""
        x_ND = routing.gather(x_TD) * routing.weight_N[:, None].to(x_TD.dtype)
        alone = Routing(
            token_N=torch.arange(routing.pairs, device=x_TD.device),
            weight_N=torch.ones_like(routing.weight_N),
            counts_E=routing.counts_E,
            tokens=routing.pairs,
        )
        if adapters is not None:  # tokens are pairs here
            adapters = {
                name: None if rows is None else torch.isin(routing.token_N, rows).nonzero()[:, 0]
                for name, rows in adapters.items()
            }
        y_ND = self._experts(x_ND, alone, adapters)
        return x_TD.new_zeros(x_TD.shape).index_add(0, routing.token_N, y_ND)


@torch.no_grad()
def contributions(moe: MoE, x_TD: Tensor, routing: Routing) -> Tensor:
    """What each pair adds to its token's output, weight included, (N, D); their sum over a token is its output.

    Args:
        moe: A layer; its shared expert is not in the result.
        x_TD: Its input.
        routing: Its routing of that input.
    """
    real = routing.first(moe.choices - moe.null_experts)
    number_N = torch.tensor(moe.answers)[real.expert_N.cpu()] if moe.answers else real.expert_N
    order_N = number_N.to(x_TD.device).argsort(stable=True)
    weight_N, x_ND = real.weight_N[order_N], x_TD[real.token_N[order_N]]
    alone = Routing(
        token_N=torch.arange(real.pairs, device=x_TD.device),
        weight_N=torch.ones_like(weight_N) if moe.weigh_input else weight_N,
        counts_E=torch.bincount(number_N, minlength=moe.experts.count).to(x_TD.device),
        tokens=real.pairs,
    )
    y_ND: Tensor = moe.experts(x_ND * weight_N[:, None].to(x_TD.dtype) if moe.weigh_input else x_ND, alone)
    null_ND = x_TD[routing.token_N[real.pairs :]] * routing.weight_N[real.pairs :, None].to(x_TD.dtype)
    by_pair_ND = torch.empty_like(y_ND).index_copy(0, order_N, y_ND)
    return torch.cat([by_pair_ND, null_ND if moe.null_kind == "identity" else torch.zeros_like(null_ND)])
