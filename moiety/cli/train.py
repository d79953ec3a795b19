"""`moiety train`: train a model on text, or go on with a run."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from moiety.cli.output import command, interruptible, print_json, talk
from moiety.cli.own import import_own_routers
from moiety.errors import UsageError
from moiety.infer.options import RecordOptions
from moiety.parallel.options import MeshOptions
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions

if TYPE_CHECKING:
    from moiety.parallel.mesh import World
    from moiety.train.loop import StepRecord
    from moiety.train.run import Opened, RunPlan

__all__ = ["app"]

app = command("moiety train", "Train a model on your text, or resume a run.")

Flag = Parameter(negative="")


def _check_record(record: RecordOptions, plan: RunPlan, processes: int) -> None:
    if record.record and not plan.model.moe_layers:
        raise UsageError("a dense model has no routing to record", hint="leave --record out")
    if record.record and processes > 1:
        raise UsageError("routing is recorded in one process", hint="leave --record or torchrun out")


def _run(
    opened: Opened, out: Path, track: tuple[str, ...], record: RecordOptions, world: World
) -> StepRecord | None:
    """All steps; the last record, or None when there was nothing left to do."""
    from moiety.cli.progress import train_shown
    from moiety.train import run
    from moiety.train.compare import Contender
    from moiety.train.host import keep_freed_memory
    from moiety.train.state import read_state

    if world.leads:
        run.write_plan(out, opened.plan)
    keep_freed_memory()
    console = talk(quiet=not world.leads)
    with interruptible(console, "the step at hand is finished, then saved") as stop:
        plan, text, checkpoint, _ = opened
        contender = Contender(name=out.name, config=plan.model, options=plan.train)
        net, domains = contender.build(), text.data.domains
        steps = functools.partial(opened.steps, out, net, stop, world=world)
        before = 0 if checkpoint is None else read_state(checkpoint).step
        return train_shown(
            contender, net, steps, out, track, record, domains=domains, done=before, leads=world.leads
        )


@app.default
def train(
    *sources: str,
    out: Annotated[Path, Parameter(help="the run's folder")] = Path("runs/train"),
    resume: Annotated[
        bool, Flag, Parameter(help="go on with the run in --out; other options are read from it")
    ] = False,
    vocab_size: Annotated[int, Parameter(help="entries of the tokenizer that is learnt")] = 2048,
    bytes_per_domain: Annotated[int, Parameter(help="size of the default corpus")] = 1_000_000,
    model: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
    options: Annotated[TrainOptions, Parameter(name="*")] = TrainOptions(),
    record: Annotated[RecordOptions, Parameter(name="*")] = RecordOptions(),
    mesh: Annotated[MeshOptions, Parameter(name="*")] = MeshOptions(),
    track: Annotated[tuple[str, ...], Parameter(help="also log to tensorboard, wandb or trackio")] = (),
    dry_run: Annotated[bool, Flag, Parameter(help="say what would be trained, and stop")] = False,
    json: Annotated[bool, Flag, Parameter(help="print the result as JSON")] = False,
) -> int:
    """Train from scratch on texts: files, folders, FILE:domain=NAME or hf:ID; none means the default corpus.

    Under torchrun several processes train one model together; `--resume` may be with another number of them.
    """
    from moiety.parallel.mesh import join, restarted
    from moiety.train import run
    from moiety.train.track import check_trackers

    check_trackers(track)
    import_own_routers(model.router)
    start = functools.partial(run.start, out, sources, model, options)
    with join(mesh) as world:
        console = talk(quiet=not world.leads)
        with world.leader_first():
            again = resume or (restarted() and (out / run.PLAN).exists())
            opened = (
                run.resume(out) if again else start(vocab_size=vocab_size, bytes_per_domain=bytes_per_domain)
            )
        _check_record(record, opened.plan, world.ranks)
        for note in opened.notes:
            console.print(note, style="dim")
        console.print(run.describe(opened.plan, opened.text.data.train_tokens))
        if dry_run:
            return 0
        last = _run(opened, out, track, record, world)
    if not world.leads:
        return 0
    step = opened.plan.train.steps if last is None else last.state.step
    done = step == opened.plan.train.steps
    if not done:
        console.print(f"stopped and saved; go on with: moiety train --resume --out {out}")
    if json:
        loss = last.loss if last is not None and math.isfinite(last.loss) else None
        seconds = None if last is None else last.state.seconds
        print_json({"run": str(out), "step": step, "loss": loss, "seconds": seconds, "done": done})
    elif done:
        print(f"done: {out}; try: moiety generate {out} 'def '")
    return 0
