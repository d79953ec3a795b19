"""`moiety train`: train a model on text, or go on with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from moiety.cli.output import interruptible, print_json, talk
from moiety.errors import UsageError
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions

__all__ = ["app"]

app = App(name="moiety train", version_flags=[], help="Train a model on your text, or resume a run.")

Flag = Parameter(negative="")


@app.default
def train(
    *sources: str,
    out: Annotated[Path, Parameter(help="the run's folder")] = Path("runs/train"),
    resume: Annotated[
        bool, Flag, Parameter(help="go on with the run in --out; other options are read from it")
    ] = False,
    vocab_size: Annotated[int, Parameter(help="entries of the tokenizer that is learnt")] = 4096,
    bytes_per_domain: Annotated[int, Parameter(help="size of the default corpus")] = 1_500_000,
    model: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
    options: Annotated[TrainOptions, Parameter(name="*")] = TrainOptions(),
    track: Annotated[tuple[str, ...], Parameter(help="also log to tensorboard, wandb or trackio")] = (),
    dry_run: Annotated[bool, Flag, Parameter(help="say what would be trained, and stop")] = False,
    json: Annotated[bool, Flag, Parameter(help="print the result as JSON")] = False,
) -> int:
    """Train from scratch on texts: files, folders, FILE:domain=NAME or hf:ID; none means the default corpus."""
    from moiety.cli.progress import train_shown
    from moiety.train.host import keep_freed_memory
    from moiety.train.run import RunPlan, describe, prepare_text, read_plan, write_plan
    from moiety.train.state import latest_checkpoint

    console = talk()
    if not resume and (out / "run.json").exists() and not dry_run:
        raise UsageError(
            f"{out} already holds a run", hint="--resume goes on with it; --out names another folder"
        )
    plan = read_plan(out) if resume else None
    if plan is not None:
        sources, vocab_size, bytes_per_domain = plan.sources, plan.vocab_size, plan.bytes_per_domain
    text = prepare_text(out, sources, vocab_size=vocab_size, bytes_per_domain=bytes_per_domain)
    for note in text.notes:
        console.print(note, style="dim")
    checkpoint = None
    if plan is not None:
        if plan.fingerprint != text.data.fingerprint:
            raise UsageError(
                "the texts are not those the run was started with",
                hint="start a new run in another --out folder",
            )
        found = latest_checkpoint(out)
        for line in found.damaged:
            console.print(line)
        checkpoint = found.path
    plan = plan or RunPlan(
        model=model.config(text.tokenizer.vocab_size, options.length),
        train=options,
        sources=tuple(sources),
        bytes_per_domain=bytes_per_domain,
        vocab_size=vocab_size,
        fingerprint=text.data.fingerprint,
    )
    console.print(describe(plan, text.data.train_tokens))
    if dry_run:
        return 0
    write_plan(out, plan)
    keep_freed_memory()
    with interruptible(console, "the step at hand is finished, then saved") as stop:
        last = train_shown(plan, text, out, checkpoint, stop, track)
    done = last is None or last.state.step == plan.train.steps
    if not done:
        console.print(f"stopped and saved; go on with: moiety train --resume --out {out}")
    if json and last is not None:
        print_json(
            {"run": str(out), "step": last.state.step, "loss": last.loss, "seconds": last.state.seconds}
        )
    elif done:
        print(f"done: {out}; try: moiety generate {out} 'def '")
    return 0
