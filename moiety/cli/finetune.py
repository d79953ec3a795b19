"""`moiety finetune`: train a model further on chats, pairs of answers or texts, or go on with such a run."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, interruptible, print_json, print_table, talk
from moiety.cli.own import import_own_routers
from moiety.cli.torch_settings import TORCH_CACHE, keep_few_shapes, use_large_pages
from moiety.errors import UsageError
from moiety.infer.options import RecordOptions
from moiety.model.adapter_options import LoraOptions
from moiety.train.finetune_options import FinetuneOptions

if TYPE_CHECKING:
    from moiety.train.finetune import Finetuning
    from moiety.train.loop import StepRecord

__all__ = ["app"]

app = command("moiety finetune", "Train a model further on chats, pairs of answers or texts.")

Flag = Parameter(negative="")


@app.default
def finetune(
    model: str = "",
    /,
    *,
    data: Annotated[tuple[str, ...], Parameter(help="files of JSON lines, FILE or FILE:domain=NAME")] = (),
    out: Annotated[Path, Parameter(help="the run's folder")] = Path("runs/finetune"),
    resume: Annotated[
        bool, Flag, Parameter(help="go on with the run in --out; other options are read from it")
    ] = False,
    template: Annotated[
        str, Parameter(help="a file with a chat template, or plain; none is the model's")
    ] = "",
    options: Annotated[FinetuneOptions, Parameter(name="*")] = FinetuneOptions(),
    lora: Annotated[LoraOptions, Parameter(help="of the adapter, with --train adapters")] = LoraOptions(),
    record: Annotated[RecordOptions, Parameter(name="*")] = RecordOptions(),
    track: Annotated[tuple[str, ...], Parameter(help="also log to tensorboard, wandb or trackio")] = (),
    dry_run: Annotated[bool, Flag, Parameter(help="show what would be trained and learnt, and stop")] = False,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    json: Annotated[bool, Flag, Parameter(help="print the result as JSON")] = False,
) -> int:
    """Each line of --data has messages, or prompt and completion, or text, or prompt, chosen and rejected.

    Parameters
    ----------
    model
        A checkpoint or run folder, a .gguf file, or owner/name on the hub; none with --resume.
    """
    keep_few_shapes(TORCH_CACHE)
    use_large_pages()
    from moiety.train import finetune as runs
    from moiety.train.track import check_trackers

    check_trackers(track)
    import_own_routers(router)
    given = data or template or (options, lora) != (FinetuneOptions(), LoraOptions())
    if bool(model) == resume or (resume and given):
        raise UsageError(
            "one of a model and --resume is wanted, and a run that is resumed has its own options",
            hint="moiety finetune MODEL --data chats.jsonl --out RUN, then moiety finetune --resume --out RUN",
        )
    run = runs.resume(out) if resume else runs.start(out, model, data, options, lora=lora, template=template)
    _say(run)
    if dry_run:
        for place in range(run.samples.answers):
            talk().print(f"a sample; [[what is learnt]]:\n{runs.shown(run, place)}")
        return 0
    if not resume:
        run.write(out)
    last = _carry_out(run, out, track, record)
    step = run.plan.train.steps if last is None else last.state.step
    is_done = step == run.plan.train.steps
    if not is_done:
        talk().print(f"stopped and saved; go on with: moiety finetune --resume --out {out}")
    if json:
        print_json({"run": str(out), "step": step, **_found(last), "done": is_done})
    elif is_done:
        adapter = f" --adapter {last.checkpoint}/adapter" if last and run.plan.options.adapts else ""
        model = run.plan.parent + adapter if adapter else str(out)
        print(f"done: {out}; try: moiety chat {model}")
    return 0


def _carry_out(
    run: Finetuning, out: Path, track: tuple[str, ...], record: RecordOptions
) -> StepRecord | None:
    """All steps, shown; the last one."""
    from moiety.cli.progress import train_shown
    from moiety.train.compare import Contender
    from moiety.train.host import LARGEST_KEPT, keep_freed_memory
    from moiety.train.state import read_state

    keep_freed_memory(LARGEST_KEPT if run.plan.options.adapts else 0)
    contender = Contender(name=out.name, config=run.model.config, options=run.plan.train)
    before = 0 if run.checkpoint is None else read_state(run.checkpoint).step
    with interruptible(talk(), "the step at hand is finished, then saved") as stop:
        steps = functools.partial(run.steps, out, stop)
        domains = run.samples.domains
        return train_shown(contender, run.model, steps, out, track, record, domains=domains, done=before)


def _say(run: Finetuning) -> None:
    """What was noticed, what will be trained on what, and which parameters learn."""
    from moiety.train.finetune import describe

    console = talk()
    for note in run.notes:
        console.print(note, style="dim")
    console.print(describe(run))
    rows = [
        [one.name, f"{one.parameters:,}", f"{one.learning_rate:g}" if one.learning_rate else "frozen"]
        for one in run.groups
    ]
    print_table("what trains", ("group", "parameters", "learning rate"), rows, console)


def _found(last: StepRecord | None) -> dict[str, Any]:
    """The last step's loss, and what its evaluation said."""
    loss = last.loss if last is not None and math.isfinite(last.loss) else None
    found = None if last is None else last.evaluation
    held_out, preferred = ({}, {}) if found is None else (dict(found.losses), dict(found.preferred))
    return {"loss": loss, "held_out": held_out, "preferred": preferred}
