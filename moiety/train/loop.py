"""The training loop: one, on one page, for pretraining, fine-tuning and upcycling alike.

`train` is a generator: every step yields what happened, and the caller draws, compares or stops. There
are no callbacks. A step whose loss or gradient is not finite changes nothing and is counted; what is
not finite is never written.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from moiety.config import to_dict
from moiety.errors import TrainingError
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer
from moiety.moe.layer import MoE
from moiety.observe.alarm import Alarm
from moiety.observe.record import Recorder, Span, spans_of
from moiety.observe.stats import RoutingHealth, health
from moiety.observe.stats import add as add_health
from moiety.parallel.mesh import World, local
from moiety.routing import Routing
from moiety.train.data import Batch, Source
from moiety.train.evaluate import Evaluation, evaluate
from moiety.train.optim import build_optimizer, learning_rate, set_learning_rate
from moiety.train.options import TrainOptions
from moiety.train.preference import objective
from moiety.train.routers import (
    AlarmWatch,
    RouterLosses,
    check_router_gradient,
    coefficients,
    down_scale,
    down_scales,
    forward,
    loads_of,
    loss_terms,
    moe_layers,
    next_sparsity,
    router_losses,
    steered,
    step_loads,
    update_biases,
)
from moiety.train.spread import settle, spread
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
        loss: Cross entropy, nats per scored token; of pairs the preference loss of one.
        tokens: Trained on, those whose next one is not scored too.
        router_losses: Each loss of the routers by name, mean over MoE layers; empty for a dense model.
        gradient_norm: Before clipping.
        learning_rate: Of this step.
        skipped: True if something was not finite and nothing was changed.
        health: Of every MoE layer, over the whole step.
        step_seconds: Wall time of the step, without evaluation and saving.
        alarms: What is wrong with a router and was not before: each layer and kind comes once, until it is over.
        evaluation: When one was due.
        checkpoint: When one was written.
    """

    state: RunState
    loss: float
    tokens: int
    router_losses: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    skipped: bool
    health: Mapping[int, RoutingHealth]
    step_seconds: float
    alarms: tuple[Alarm, ...] = ()
    evaluation: Evaluation | None = None
    checkpoint: Path | None = None

    @property
    def balance_loss(self) -> float | None:
        """The load-balancing loss, its floor 1; None without a router that learns."""
        return self.router_losses.get("load")

    @property
    def z_loss(self) -> float | None:
        """The router z-loss; None without a router that learns."""
        return self.router_losses.get("z")


def train(
    model: Transformer,
    data: Source,
    options: TrainOptions,
    *,
    run_folder: Path | None = None,
    tokenizer: Tokenizer | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    resume: Path | None = None,
    stop: Stop | None = None,
    recorder: Recorder | None = None,
    teacher: Transformer | None = None,
    world: World | None = None,
) -> Iterator[StepRecord]:
    """Train, yielding a record after every step.

    Args:
        model: Trained in place.
        data: Text to train and evaluate on.
        options: How.
        run_folder: Where checkpoints go; None writes none.
        tokenizer: Saved beside the weights.
        optimizer: Of what trains, its groups as `build_optimizer` makes them; None is all that requires a gradient.
        resume: Go on from this checkpoint, bit for bit as if never stopped.
        stop: When set, the run saves after the step at hand and ends.
        recorder: Takes the routing of every micro-batch.
        teacher: Learn its probabilities instead of the text's tokens; a record's loss is the divergence from them.
        world: The processes of the run, the same in all of them: `model` is whole and equal in each, and afterwards
            each has its part. A batch is that of all of them, and so are a record's numbers. None is one process.

    Raises:
        ConfigError: the model or a batch cannot be divided among the processes.
        TrainingError: the balance loss cannot reach a router, or too many non-finite steps in a row.
    """
    world, saved, watch = world or World(), resume, AlarmWatch(model.config.moe)
    batches_of = functools.partial(data.batches, S=options.length, seed=options.seed)
    save = functools.partial(save_checkpoint, tokenizer=tokenizer, keep_last=options.keep, world=world)
    _begin(model, next(batches_of(B=1)), options, world)
    optimizer = optimizer or _optimizer(model, options)
    state = RunState(run=to_dict(options)) if resume is None else load_state(resume, model, optimizer, world)
    with steered(model, options):
        stream = batches_of(B=options.batch, start=state.sequences_seen)
        while state.step < options.steps:
            batches = list(itertools.islice(stream, options.accumulate))
            step = _step(model, optimizer, batches, state, options, recorder, teacher, world)
            state = _count(step.state, step, batches)
            gave_up = state.consecutive_skips >= options.most_skips
            ending = state.step == options.steps or (stop is not None and world.any(stop.is_set()))
            evaluation = written = None
            if not gave_up and (state.step == options.steps or _due(state.step, options.evaluate_every)):
                evaluation = _evaluate(model, data, options)
            if run_folder is not None and not gave_up and (ending or _due(state.step, options.save_every)):
                _require_finite(model, saved, world)
                written = saved = save(run_folder, model, optimizer, state)
            alarms = watch.see(state.step, step.health)
            yield replace(step, state=state, evaluation=evaluation, checkpoint=written, alarms=alarms)
            if gave_up:
                raise _not_finite(state.consecutive_skips, saved)
            if ending:
                return


def _begin(model: Transformer, batch: Batch, options: TrainOptions, world: World) -> None:
    """Prove the balance loss on a whole model, then keep this process's part of it."""
    model.train()
    with steered(model, options):
        check_router_gradient(model, batch, options)
    spread(model, world)


def _optimizer(model: Transformer, options: TrainOptions) -> torch.optim.AdamW:
    return build_optimizer(
        model,
        weight_decay=options.weight_decay,
        betas=(options.beta1, options.beta2),
        router_scale=options.router_rate,
        down_scale=down_scale(model.config.moe, options),
        down_scales=down_scales(model.config.moe, options),
    )


def _step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    state: RunState,
    options: TrainOptions,
    recorder: Recorder | None,
    teacher: Transformer | None,
    world: World,
) -> StepRecord:
    """Forward, backward and, if everything is finite, one update. The record's `state` is still to be counted."""
    begun = time.perf_counter()
    number, moe, layers = state.step, model.config.moe, moe_layers(model)
    tokens, scored = sum(batch.tokens for batch in batches), sum(batch.scored for batch in batches)
    rate = _rate(number, options)
    set_learning_rate(optimizer, rate)
    by_scores = moe is not None and moe.bias_rule == "quantile"
    now = {} if moe is None else coefficients(loss_terms(moe, options), moe, number, state.sparsity)
    batches = [batch.rows(world.rows(len(batch.tokens_BS))) for batch in batches]
    whole_step = options.balance_scope == "step" and len(batches) > 1 and layers
    known = world.summed(step_loads(model, batches, options, number)) if whole_step else {}
    sums = _Sums(losses=dict.fromkeys(now, 0.0))
    for place, batch in enumerate(batches):
        output = forward(model, batch, options, step=number, place=place)
        if recorder is not None:
            recorder.add(output.routing, _spans(batch, recorder.next_request))
        asked, share = objective(output, batch, teacher), batch.tokens / tokens
        loads = known or world.summed(loads_of(output.routing))
        added = router_losses(
            moe, output.routing, options, now, share=share, sequences=len(batch.tokens_BS), loads=loads
        )
        (asked.loss / scored + added.total).backward()
        sums.add(asked.value, added, output.routing, layers, keep_scores=by_scores)

    norm = _clip(model, options.clip, world)
    sums.add_up(world)
    finite = math.isfinite(norm) and math.isfinite(sums.value + sum(sums.losses.values()))
    if finite:
        optimizer.step()
        update_biases(model, sums.loads, sums.scores)
        if moe is not None:
            state = replace(state, sparsity=next_sparsity(moe, state.sparsity, sums.loads, tokens))
    optimizer.zero_grad(set_to_none=True)
    return StepRecord(
        state=state,
        loss=sums.value / scored,
        tokens=tokens,
        router_losses=sums.losses,
        gradient_norm=norm,
        learning_rate=rate,
        skipped=not finite,
        health=sums.health,
        step_seconds=time.perf_counter() - begun,
    )


def _rate(step: int, options: TrainOptions) -> float:
    return learning_rate(
        step,
        schedule=options.schedule,
        peak=options.learning_rate,
        steps=options.steps,
        warmup=options.warmup,
        final=options.final_rate,
        decay=options.decay,
    )


def _spans(batch: Batch, first: int) -> list[Span]:
    """The sequences of a batch for a recorder."""
    return spans_of(
        batch.tokens_BS, first, valid_BS=batch.valid_BS, domain_BS=batch.domain_BS, lengths=batch.lengths
    )


def _evaluate(model: Transformer, data: Source, options: TrainOptions) -> Evaluation:
    return evaluate(
        model,
        data,
        batch=options.batch,
        length=options.length,
        limit=options.evaluate_sequences or None,
        dtype=options.dtype,
    )


@dataclass(kw_only=True)
class _Sums:
    """What the micro-batches of a step add up to."""

    losses: dict[str, float]
    value: float = 0.0
    loads: dict[int, Tensor] = field(default_factory=dict)
    health: dict[int, RoutingHealth] = field(default_factory=dict)
    scores: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(
        self,
        value: float,
        added: RouterLosses,
        routings: Mapping[int, Routing],
        layers: Mapping[int, MoE],
        *,
        keep_scores: bool,
    ) -> None:
        """One micro-batch more."""
        self.value += value
        for name, loss in added.values.items():
            self.losses[name] += loss
        for layer, load_E in loads_of(routings).items():
            self.loads[layer] = self.loads[layer] + load_E if layer in self.loads else load_E
        for layer, routing in routings.items():
            now = health(routing, bias_E=layers[layer].selection_bias)
            self.health[layer] = add_health(self.health[layer], now) if layer in self.health else now
            if keep_scores and routing.score_TE is not None:
                score_TE, valid_T = routing.score_TE.detach(), routing.valid_T
                self.scores.setdefault(layer, []).append(score_TE if valid_T is None else score_TE[valid_T])

    def add_up(self, world: World) -> None:
        """Make these the sums over all processes."""
        if world.parts == 1:
            return
        numbers = torch.tensor([self.value, *self.losses.values()], dtype=torch.float64)
        packed = [torch.from_numpy(one.sums()) for one in self.health.values()]
        totals = world.total([numbers, *packed, *self.loads.values()])
        self.value, *losses = totals[0].tolist()
        self.losses = dict(zip(self.losses, losses, strict=True))
        for place, layer in enumerate(self.health, start=1):
            self.health[layer] = self.health[layer].of_sums(totals[place].cpu().numpy())
        self.loads = {
            layer: total_E.to(torch.int64)
            for layer, total_E in zip(self.loads, totals[1 + len(packed) :], strict=True)
        }


def _count(state: RunState, step: StepRecord, batches: Sequence[Batch]) -> RunState:
    """The run's counters after a step."""
    return replace(
        state,
        step=state.step + 1,
        sequences_seen=batches[-1].sequences_seen,
        tokens_seen=state.tokens_seen + step.tokens,
        skipped_steps=state.skipped_steps + step.skipped,
        consecutive_skips=state.consecutive_skips + 1 if step.skipped else 0,
        seconds=state.seconds + step.step_seconds,
    )


def _require_finite(model: nn.Module, saved: Path | None, world: World) -> None:
    """An update may overflow although its gradient did not; such weights are never written."""
    settle(model)
    with world.together():
        for name, parameter in model.named_parameters():
            if not bool(local(parameter).isfinite().all()):
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


def _clip(model: nn.Module, largest: float, world: World) -> float:
    """Norm of the whole gradient of all processes, which is scaled down to `largest` when that is positive."""
    world.sum_gradients(model)
    named = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    norm = world.norm(named)
    if largest > 0:
        torch._foreach_mul_([local(one) for one in named.values()], (largest / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
