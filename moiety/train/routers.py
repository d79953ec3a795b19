"""How a run steers its routers: what goes around them, what they add to the loss, what moves their biases."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moiety.config import MoEConfig
from moiety.errors import ConfigError, TrainingError
from moiety.model.transformer import ModelOutput, Transformer
from moiety.moe import balance
from moiety.moe.layer import MoE
from moiety.moe.losses import LOSSES, LossContext
from moiety.moe.routers import ROUTERS, ExpertDropout, Explore, Router, SoftToSparse, Tempered
from moiety.observe.alarm import HISTORY, Alarm, collapse
from moiety.observe.stats import RoutingHealth
from moiety.routing import Routing
from moiety.schedule import Schedule
from moiety.train.data import Batch
from moiety.train.evaluate import autocast
from moiety.train.options import TrainOptions

__all__ = [
    "AlarmWatch",
    "RouterLosses",
    "check_router_gradient",
    "coefficients",
    "down_scale",
    "down_scales",
    "forward",
    "loads_of",
    "loss_terms",
    "moe_layers",
    "next_sparsity",
    "router_losses",
    "steered",
    "step_loads",
    "update_biases",
]

REPORTED = ("load", "z")  # computed in every step, for the record, also when they cost nothing


def moe_layers(model: nn.Module) -> dict[int, MoE]:
    """The MoE layers of a model, by block."""
    return {
        int(name.split(".")[1]): module
        for name, module in model.named_modules()
        if isinstance(module, MoE) and name.startswith("blocks.")
    }


def down_scale(config: MoEConfig | None, options: TrainOptions) -> float:
    """Factor on the learning rate of down projections.

    A token's K experts weigh about 1/K each, so that the same step of their matrices moves the output K times less
    than in a dense feed-forward; by default the rate makes up for it.
    """
    return options.down_rate or (1.0 if config is None else float(config.experts_per_token))


def down_scales(config: MoEConfig | None, options: TrainOptions) -> dict[int, float]:
    """That factor in the layers where it is another one."""
    return (
        {}
        if config is None
        else {layer: down_scale(config.at(layer), options) for layer, _, _ in config.per_layer}
    )


def forward(model: Transformer, batch: Batch, options: TrainOptions, *, step: int, place: int) -> ModelOutput:
    """One micro-batch through the model; what is random in its routers follows from the run's seed and place.

    Raises:
        ConfigError: a balance loss of each sequence, and several sequences in one row.
    """
    if batch.lengths and (options.balance_scope == "sequence" or _has(options, "sequence")):
        raise ConfigError(
            "the balance loss of each sequence needs a row for each", hint="pad the samples: --no-pack"
        )
    valid_BS = batch.valid_BS
    device = next(model.parameters()).device
    with autocast(options.dtype, device):
        seed = (options.seed * 1_000_003 + step) * 4099 + place
        output: ModelOutput = model(
            batch.tokens_BS.to(device),
            valid_BS=None if valid_BS is None else valid_BS.to(device),
            lengths=batch.lengths,
            step=step,
            seed=seed,
        )
        return output


def _has(options: TrainOptions, loss: str) -> bool:
    return any(text.partition("=")[0] == loss for text in options.losses)


def wrapped(router: Router, options: TrainOptions, config: MoEConfig) -> Router:
    """The router as it is while training: annealed, thinned out, exploring."""
    if options.soft_steps:
        thinning = Schedule(start=config.experts, end=config.experts_per_token, steps=options.soft_steps)
        router = SoftToSparse(router, thinning)
    if options.router_temperature != "1":
        router = Tempered(router, Schedule.parse(options.router_temperature))
    if options.expert_dropout:
        router = ExpertDropout(router, options.expert_dropout)
    if options.explore != "0":
        router = Explore(router, Schedule.parse(options.explore))
    if options.router_warmup:
        router = Explore(router, Schedule(start=1.0, end=0.0, begin=options.router_warmup))
    return router


@contextlib.contextmanager
def steered(model: Transformer, options: TrainOptions) -> Iterator[None]:
    """While inside, every router has around it what the options ask for, or is frozen; afterwards it is as before.

    Raises:
        ConfigError: a router that cannot be wrapped so.
    """
    moe = model.config.moe
    layers = moe_layers(model)
    before = {layer: one.router for layer, one in layers.items()}
    frozen: list[nn.Parameter] = []
    try:
        for layer, one in layers.items():
            assert moe is not None
            router = wrapped(one.router, options, moe.at(layer))
            router.check(one.choices)
            one.router = router
            if options.freeze_router:
                gates = [gate for gate in (one.gate, one.gate_noise) if gate is not None]
                frozen += [p for gate in gates for p in gate.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for layer, router in before.items():
            layers[layer].router = router
        for parameter in frozen:
            parameter.requires_grad_(True)


def loss_terms(config: MoEConfig, options: TrainOptions) -> dict[str, Schedule]:
    """What the routers add to the loss: name in `LOSSES` -> coefficient over the steps.

    Raises:
        ConfigError: no such loss, one that this router cannot have, or one that needs groups.
    """
    terms = {
        "load": Schedule.constant(config.balance_loss),
        "z": Schedule.constant(config.z_loss),
    }
    for text in options.losses:
        name, _, value = text.partition("=")
        if name not in LOSSES:
            raise ConfigError(f"there is no loss {name!r}", hint=f"there are {', '.join(LOSSES)}")
        terms[name] = Schedule.parse(value)
        if config.router == "hash":
            raise ConfigError(
                f"the loss {name!r} needs a router that learns; router 'hash' has nothing to learn"
            )
        if name == "smooth_load" and config.router != "noisy":
            raise ConfigError("smooth_load measures the noise of router 'noisy'; no other router has any")
        if name in ("group", "communication") and _groups(config, options) < 2:
            raise ConfigError(f"the loss {name!r} is over groups of experts", hint="set balance_groups")
    return terms


def coefficients(
    terms: Mapping[str, Schedule], config: MoEConfig, step: int, sparsity: float
) -> dict[str, float]:
    """The coefficients of one step; a router whose sparsity is steered pays `sparsity` for what it uses."""
    now = {name: schedule.at(step) for name, schedule in terms.items()}
    if _is_steered(config) and "sparsity" not in terms:
        now["sparsity"] = sparsity
    return now


def next_sparsity(config: MoEConfig, sparsity: float, loads: Mapping[int, Tensor], tokens: int) -> float:
    """The coefficient of the sparsity loss after a step over `tokens` tokens (arXiv 2412.14711)."""
    if not _is_steered(config) or not loads:
        return sparsity
    pairs = sum(int(load_E.sum()) for load_E in loads.values()) / len(loads)
    sizes = [config.at(layer) for layer in loads]
    wanted = statistics.fmean(one.experts_per_token for one in sizes)
    return balance.update_sparsity(sparsity, pairs / tokens, wanted, max(one.experts for one in sizes))


def _is_steered(config: MoEConfig) -> bool:
    return config.router in ROUTERS and ROUTERS[config.router].steered


def _groups(config: MoEConfig, options: TrainOptions) -> int:
    return options.balance_groups or config.groups


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterLosses:
    """What the routers of one micro-batch add to its loss.

    Args:
        total: Weighted sum, for backward.
        values: Each loss by name, mean over layers, times the micro-batch's share of the step.
    """

    total: Tensor
    values: dict[str, float] = field(default_factory=dict)


def router_losses(
    config: MoEConfig | None,
    routings: Mapping[int, Routing],
    options: TrainOptions,
    now: Mapping[str, float],
    *,
    share: float,
    sequences: int,
    loads: Mapping[int, Tensor],
) -> RouterLosses:
    """The losses of one micro-batch, weighted so that a step's micro-batches add up to the step's loss.

    Args:
        config: Of the MoE layers.
        routings: By layer; those made without scores add nothing.
        options: Of the run.
        now: Coefficient of each loss in this step.
        share: This micro-batch's share of the step's tokens.
        sequences: In this micro-batch.
        loads: Load of each MoE layer over the step, where the balance loss is to use it.
    """
    scored = {layer: one for layer, one in routings.items() if one.score_TE is not None}
    total = torch.zeros(())
    values: dict[str, float] = {}
    for layer, routing in scored.items():
        assert config is not None, layer
        total = total.to(routing.weight_N.device)
        context = LossContext(
            k=config.at(layer).experts_per_token,
            load_E=loads.get(layer),
            sequences=sequences,
            groups=_groups(config, options),
            groups_kept=config.groups_kept,
        )
        weight = share / len(scored)
        for name, coefficient in now.items():
            if coefficient == 0 and name not in REPORTED:
                continue
            by = "sequence" if name == "load" and options.balance_scope == "sequence" else name
            loss = LOSSES[by](routing, context)
            if coefficient:
                total = total + weight * coefficient * loss
            values[name] = values.get(name, 0.0) + weight * loss.item()
    return RouterLosses(total=total, values=values)


@torch.no_grad()
def step_loads(
    model: Transformer, batches: Sequence[Batch], options: TrainOptions, step: int
) -> dict[int, Tensor]:
    """Wanted pairs of every expert over all micro-batches of a step, from a forward pass of its own."""
    loads: dict[int, Tensor] = {}
    for place, batch in enumerate(batches):
        output = forward(model, batch, options, step=step, place=place)
        for layer, load_E in loads_of(output.routing).items():
            loads[layer] = loads[layer] + load_E if layer in loads else load_E
    return loads


class AlarmWatch:
    """Looks at every step of a run and says what is wrong with a router and was not at the step before."""

    def __init__(self, config: MoEConfig | None) -> None:
        self.config = config
        self.history: deque[tuple[int, Mapping[int, RoutingHealth]]] = deque(maxlen=HISTORY)
        self.known: set[tuple[int, str]] = set()

    def see(self, step: int, health: Mapping[int, RoutingHealth]) -> tuple[Alarm, ...]:
        """What is new at this step."""
        if self.config is None:
            return ()
        self.history.append((step, health))
        sparse = _is_steered(self.config)
        alarms = collapse(tuple(self.history), null_experts=self.config.null_experts, sparse_scores=sparse)
        fresh = tuple(one for one in alarms if (one.layer, one.kind) not in self.known)
        self.known = {(one.layer, one.kind) for one in alarms}
        return fresh


def loads_of(routings: Mapping[int, Routing]) -> dict[int, Tensor]:
    """The pairs that each expert was wanted for, (E,) by layer."""
    return {layer: balance.intended(routing).counts_E for layer, routing in routings.items()}


def check_router_gradient(model: Transformer, batch: Batch, options: TrainOptions) -> None:
    """Prove on one batch that the balance loss reaches every router, before a run relies on it.

    Raises:
        TrainingError: a router gets no gradient, or one that is zero or not finite.
    """
    layers = moe_layers(model)
    if not layers or model.config.moe is None:
        return
    if loss_terms(model.config.moe, options)["load"].values == (0, 0):
        return
    output = forward(model, batch, options, step=0, place=0)
    for layer, moe in layers.items():
        routing = output.routing[layer]
        if routing.experts == 1 or moe.gate is None or not moe.gate.weight.requires_grad:
            continue  # nothing to balance, nothing to learn, or frozen on purpose
        # an uneven load of our own: with a perfectly even one the true gradient is zero
        probe_E = torch.arange(1, routing.experts + 1, device=routing.counts_E.device)
        loss = balance.load_balance_loss(routing, probe_E)
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, moe.gate.weight, retain_graph=True, allow_unused=True)
        norm = 0.0 if gradient is None else gradient.norm().item()
        if not (math.isfinite(norm) and norm > 0):
            raise TrainingError(
                f"the balance loss of layer {layer} gives its router a gradient of norm {norm}",
                hint="a router or layer of your own may detach its scores; set balance_loss to 0 to train without",
            )


@torch.no_grad()
def update_biases(
    model: Transformer, loads: Mapping[int, Tensor], scores: Mapping[int, Sequence[Tensor]]
) -> None:
    """Move every selection bias by the load of the whole step, or to the quantile of its scores; no frozen router's.

    Args:
        model: Its biases change.
        loads: Wanted pairs of every expert over the step, by layer.
        scores: The step's scores, (T, E) of each micro-batch, by layer, for the rule "quantile".
    """
    config = model.config.moe
    for layer, moe in moe_layers(model).items():
        bias_E = moe.selection_bias
        if bias_E is None or config is None or (moe.gate is not None and not moe.gate.weight.requires_grad):
            continue
        if config.bias_rule == "quantile":
            balance.quantile_bias(torch.cat(list(scores[layer])), bias_E, config.at(layer).experts_per_token)
        else:
            balance.update_bias(bias_E, loads[layer].to(bias_E.device), config.bias_rate, config.bias_rule)
