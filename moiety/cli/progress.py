"""A live line per model while training: step, loss, tokens per second, time left, router balance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from moiety.cli.output import talk
from moiety.infer.options import RecordOptions
from moiety.infer.recording import recording
from moiety.model.transformer import Transformer
from moiety.train.compare import Contender
from moiety.train.evaluate import Evaluation
from moiety.train.loop import StepRecord
from moiety.train.track import open_trackers, values_of

__all__ = ["TrainingDisplay", "train_shown"]

PLAIN_EVERY = 20  # lines of a log that is not a terminal: about this many per run


class TrainingDisplay:
    """Shows races and single runs; on a terminal as bars, otherwise as a few plain lines."""

    def __init__(self, contenders: Sequence[Contender], console: Console) -> None:
        self.console = console
        narrow = console.width < 80
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=8 if narrow else 24),
            TextColumn("{task.completed}/{task.total}", markup=False),
            TextColumn("{task.fields[loss]}", markup=False),
            *(
                []
                if narrow
                else [
                    TextColumn("{task.fields[speed]}", markup=False),
                    TextColumn("{task.fields[router]}", markup=False),
                ]
            ),
            TimeRemainingColumn(compact=narrow),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {
            contender.name: self.progress.add_task(
                contender.name, total=contender.options.steps, loss="", speed="", router=""
            )
            for contender in contenders
        }

    def __enter__(self) -> TrainingDisplay:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def show(self, contender: Contender, record: StepRecord) -> None:
        """Draw one step."""
        loss, speed = f"loss {record.loss:.3f}", f"{record.tokens / record.step_seconds:,.0f} tok/s"
        router = ""
        if record.health:
            worst = max(health.max_vio for health in record.health.values())
            dead = sum(health.dead for health in record.health.values())
            router = f"MaxVio {worst:.2f}" + (f", {dead} dead" if dead else "")
        step = record.state.step
        self.progress.update(
            self.tasks[contender.name], completed=step, loss=loss, speed=speed, router=router
        )
        if record.skipped:
            self.console.print(Text(f"{contender.name}: step {step} was not finite and changed nothing"))
        for alarm in record.alarms:
            self.console.print(Text(f"{contender.name}: {alarm.message}", style="bold red"))
            self.console.print(Text(f"  try: {alarm.advice}"))
        if record.evaluation is not None:
            self.console.print(Text(f"{contender.name}: step {step}, {_found(record.evaluation)}"))
        if not self.console.is_terminal and step % max(contender.options.steps // PLAIN_EVERY, 1) == 0:
            self.console.print(Text(f"{contender.name}: step {step}, {loss}, {speed} {router}".rstrip()))


def train_shown(
    contender: Contender,
    model: Transformer,
    steps: Callable[..., Iterator[StepRecord]],
    out: Path,
    trackers: tuple[str, ...],
    record: RecordOptions,
    *,
    domains: Sequence[str],
    done: int,
    leads: bool = True,
) -> StepRecord | None:
    """All steps, shown and tracked; the last record, or None when there was nothing left to do.

    Args:
        contender: Its name and options are shown.
        model: What trains.
        steps: `loop.train` with everything but a recorder.
        out: The run's folder.
        trackers: Where numbers go besides.
        record: Whether and where the routing is recorded.
        domains: Names of the data's domains.
        done: Steps of the run that were done before.
        leads: False in a process that neither writes nor speaks.
    """
    console = talk(quiet=not leads)
    open_now = open_trackers(trackers, out, after_step=done) if leads else []
    last = None
    kept = recording(model, record, name=str(out), source="training", domains=domains, say=console.print)
    try:
        with TrainingDisplay([contender], console) as display, kept as recorder:
            for last in steps(recorder=recorder):
                display.show(contender, last)
                for tracker in open_now:
                    tracker.log(last.state.step, values_of(last))
    finally:
        for tracker in open_now:
            tracker.close()
    return last


def _found(evaluation: Evaluation) -> str:
    """What an evaluation says, in a line."""
    if not evaluation.losses:
        return "nothing is held out to evaluate on"
    if evaluation.preferred:
        share = sum(evaluation.preferred.values()) / len(evaluation.preferred)
        return (
            f"preference loss {evaluation.mean_loss:.3f}, {share:.0%} of held-out pairs the right way round"
        )
    return f"{evaluation.mean_bits_per_byte:.3f} bits/byte, {evaluation.mean_loss:.3f} nats a token on held-out text"
