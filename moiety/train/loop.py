"""The training loop: one, on one page, for pretraining, fine-tuning and upcycling alike.

`train` is a generator: every step yields what happened, and the caller draws, compares or stops. There
are no callbacks. A step whose loss or gradient is not finite changes nothing and is counted; what is
not finite is never written.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from moiety.config import to_dict
from moiety.errors import TrainingError
from moiety.model.loss import cross_entropy
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import ModelOutput, Transformer
from moiety.moe import balance
from moiety.moe.layer import MoE
from moiety.observe.stats import RoutingHealth, health
from moiety.observe.stats import add as add_health
from moiety.routing import Routing
from moiety.train.data import Batch, TokenData
from moiety.train.evaluate import Evaluation, autocast, evaluate
from moiety.train.optim import build_optimizer, learning_rate, set_learning_rate
from moiety.train.options import TrainOptions
from moiety.train.state import RunState, load_state, save_checkpoint

__all__ = ["StepRecord", "Stop", "check_router_gradient", "moe_layers", "train"]


class Stop(Protocol):
    """Asked after every step whether to save and end; `threading.Event` is one."""

    def is_set(self) -> bool:
        """True to stop."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRecord:
    """What one step did.

    Args:
        state: Counters after the step.
        loss: Cross entropy, nats per token.
        balance_loss: Mean over MoE layers, its floor 1; None for a dense model.
        z_loss: Mean over MoE layers; None for a dense model.
        gradient_norm: Before clipping.
        learning_rate: Of this step.
        skipped: True if something was not finite and nothing was changed.
        health: Of every MoE layer, over the whole step.
        step_seconds: Wall time of the step, without evaluation and saving.
        evaluation: When one was due.
        checkpoint: When one was written.
    """

    state: RunState
    loss: float
    balance_loss: float | None
    z_loss: float | None
    gradient_norm: float
    learning_rate: float
    skipped: bool
    health: Mapping[int, RoutingHealth]
    step_seconds: float
    evaluation: Evaluation | None = None
    checkpoint: Path | None = None


def moe_layers(model: nn.Module) -> dict[int, MoE]:
    """The MoE layers of a model, by block."""
    return {
        int(name.split(".")[1]): module
        for name, module in model.named_modules()
        if isinstance(module, MoE) and name.startswith("blocks.")
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Losses:
    """Sums over the micro-batches of a step; `total` is what backward runs on."""

    total: Tensor
    nats: float
    balance: float
    z: float


def _micro_losses(
    model: Transformer, output: ModelOutput, batch: Batch, share: float, tokens: int, options: TrainOptions,
    loads: Mapping[int, Tensor],
) -> _Losses:  # fmt: skip
    """The losses of one micro-batch, weighted so that a step's micro-batches add up to the step's loss.

    Args:
        share: This micro-batch's share of the step's tokens.
        tokens: Scored tokens in the whole step.
        loads: Load of each MoE layer over the step, where the balance loss is to use it.
    """
    nats = cross_entropy(output.hidden, output.head_weight, batch.targets_BS.to(output.hidden.device))
    total = nats / tokens
    balance_sum, z_sum = 0.0, 0.0
    moe = model.config.moe
    for layer, routing in output.routing.items():
        assert moe is not None, layer
        weight = share / len(output.routing)
        if options.balance_scope == "sequence":
            even = balance.sequence_balance_loss(routing, len(batch.tokens_BS))
        else:
            even = balance.load_balance_loss(routing, loads.get(layer))
        small = balance.z_loss(routing)
        total = total + weight * (moe.balance_loss * even + moe.z_loss * small)
        balance_sum += weight * even.item()
        z_sum += weight * small.item()
    return _Losses(total=total, nats=nats.item(), balance=balance_sum, z=z_sum)


@torch.no_grad()
def _step_loads(model: Transformer, batches: Sequence[Batch], options: TrainOptions) -> dict[int, Tensor]:
    """Pairs of every expert over all micro-batches of a step, from a forward pass of its own."""
    loads: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    for batch in batches:
        with autocast(options.dtype, device):
            output = model(batch.tokens_BS.to(device))
        for layer, routing in output.routing.items():
            loads[layer] = loads.get(layer, torch.zeros_like(routing.counts_E)) + routing.counts_E
    return loads


def check_router_gradient(model: Transformer, batch: Batch, options: TrainOptions) -> None:
    """Prove on one batch that the balance loss reaches every router, before a run relies on it.

    Raises:
        TrainingError: a router gets no gradient, or one that is zero or not finite.
    """
    layers = moe_layers(model)
    if not layers or model.config.moe is None or model.config.moe.balance_loss == 0:
        return
    device = next(model.parameters()).device
    with autocast(options.dtype, device):
        output = model(batch.tokens_BS.to(device))
    for layer, moe in layers.items():
        routing = output.routing[layer]
        if routing.experts == 1 or not moe.gate.weight.requires_grad:
            continue  # nothing to balance, or frozen on purpose
        # an uneven load of our own: with a perfectly even one the true gradient is zero
        probe_E = torch.arange(1, routing.experts + 1, device=device)
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


def train(
    model: Transformer,
    data: TokenData,
    options: TrainOptions,
    *,
    run_folder: Path | None = None,
    tokenizer: Tokenizer | None = None,
    resume: Path | None = None,
    stop: Stop | None = None,
) -> Iterator[StepRecord]:
    """Train, yielding a record after every step.

    Args:
        model: Trained in place.
        data: Text to train and evaluate on.
        options: How.
        run_folder: Where checkpoints go; None writes none.
        tokenizer: Saved beside the weights.
        resume: Go on from this checkpoint, bit for bit as if never stopped.
        stop: When set, the run saves after the step at hand and ends.

    Raises:
        TrainingError: the balance loss cannot reach a router, or too many non-finite steps in a row.
    """
    optimizer = build_optimizer(
        model,
        weight_decay=options.weight_decay,
        betas=(options.beta1, options.beta2),
        router_scale=options.router_rate,
    )
    state, saved = RunState(run=to_dict(options)), resume
    if resume is not None:
        state = load_state(resume, model, optimizer)
    model.train()
    check_router_gradient(model, next(data.batches(B=1, S=options.length, seed=options.seed)), options)
    stream = data.batches(B=options.batch, S=options.length, seed=options.seed, start=state.sequences_seen)

    while state.step < options.steps:
        batches = list(itertools.islice(stream, options.accumulate))
        step = _step(model, optimizer, batches, state.step, options)
        state = _count(state, step, batches)
        gave_up = state.consecutive_skips >= options.most_skips
        ending = state.step == options.steps or (stop is not None and stop.is_set())

        evaluation = written = None
        if not gave_up and (state.step == options.steps or _due(state.step, options.evaluate_every)):
            limit = options.evaluate_sequences or None
            evaluation = evaluate(
                model, data, batch=options.batch, length=options.length, limit=limit, dtype=options.dtype
            )
        if run_folder is not None and not gave_up and (ending or _due(state.step, options.save_every)):
            _require_finite(model, saved)
            written = saved = save_checkpoint(
                run_folder, model, optimizer, state, tokenizer=tokenizer, keep_last=options.keep
            )
        yield replace(step, state=state, evaluation=evaluation, checkpoint=written)
        if gave_up:
            raise _not_finite(state.consecutive_skips, saved)
        if ending:
            return


def _step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    number: int,
    options: TrainOptions,
) -> StepRecord:
    """Forward, backward and, if everything is finite, one update. The record's `state` is still to be counted."""
    begun = time.perf_counter()
    device = next(model.parameters()).device
    layers = moe_layers(model)
    tokens = sum(batch.targets_BS.numel() for batch in batches)
    rate = learning_rate(
        number,
        schedule=options.schedule,
        peak=options.learning_rate,
        steps=options.steps,
        warmup=options.warmup,
        final=options.final_rate,
        decay=options.decay,
    )
    set_learning_rate(optimizer, rate)
    whole_step = options.balance_scope == "step" and options.accumulate > 1
    loads = _step_loads(model, batches, options) if layers and whole_step else {}

    nats, even, small = 0.0, 0.0, 0.0
    routed: dict[int, RoutingHealth] = {}
    for batch in batches:
        with autocast(options.dtype, device):
            output = model(batch.tokens_BS.to(device))
            share = batch.targets_BS.numel() / tokens
            losses = _micro_losses(model, output, batch, share, tokens, options, loads)
        losses.total.backward()
        nats, even, small = nats + losses.nats, even + losses.balance, small + losses.z
        routed = _add_health(routed, output.routing, layers)

    norm = _clip(model, options.clip)
    finite = math.isfinite(norm) and math.isfinite(nats + even + small)
    if finite:
        optimizer.step()
        _update_biases(model, layers, routed)
    optimizer.zero_grad(set_to_none=True)
    return StepRecord(
        state=RunState(),
        loss=nats / tokens,
        balance_loss=even if layers else None,
        z_loss=small if layers else None,
        gradient_norm=norm,
        learning_rate=rate,
        skipped=not finite,
        health=routed,
        step_seconds=time.perf_counter() - begun,
    )


def _count(state: RunState, step: StepRecord, batches: Sequence[Batch]) -> RunState:
    """The run's counters after a step."""
    return replace(
        state,
        step=state.step + 1,
        sequences_seen=batches[-1].sequences_seen,
        tokens_seen=state.tokens_seen + sum(batch.targets_BS.numel() for batch in batches),
        skipped_steps=state.skipped_steps + step.skipped,
        consecutive_skips=state.consecutive_skips + 1 if step.skipped else 0,
        seconds=state.seconds + step.step_seconds,
    )


def _update_biases(
    model: Transformer, layers: Mapping[int, MoE], routed: Mapping[int, RoutingHealth]
) -> None:
    """Move every selection bias by the load of the whole step."""
    for layer, moe in layers.items():
        if moe.selection_bias is not None and model.config.moe is not None:
            load_E = torch.from_numpy(routed[layer].counts_E).to(moe.selection_bias.device)
            balance.update_bias(moe.selection_bias, load_E, model.config.moe.bias_rate)


def _require_finite(model: nn.Module, saved: Path | None) -> None:
    """An update may overflow although its gradient did not; such weights are never written."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise TrainingError(
                f"{name} is no longer finite, so no checkpoint was written",
                hint=f"lower the learning rate; the last good checkpoint is {saved or 'none'}",
            )


def _not_finite(steps: int, saved: Path | None) -> TrainingError:
    found = f"the last good checkpoint is {saved}" if saved else "no checkpoint had been written yet"
    return TrainingError(
        f"{steps} steps in a row had a loss or gradient that is not finite",
        hint=f"{found}; lower the learning rate or look at the data",
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _add_health(
    routed: Mapping[int, RoutingHealth], routing: Mapping[int, Routing], layers: Mapping[int, MoE]
) -> dict[int, RoutingHealth]:
    """The health of a micro-batch added to that of the step so far."""
    now = {layer: health(one, bias_E=layers[layer].selection_bias) for layer, one in routing.items()}
    return {layer: add_health(routed[layer], one) if layer in routed else one for layer, one in now.items()}


def _clip(model: nn.Module, largest: float) -> float:
    """Norm of the whole gradient, which is scaled down to `largest` when that is positive."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if largest > 0:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)
