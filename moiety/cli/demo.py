"""`moiety demo`: a small MoE beside its dense twin on real text, in about two minutes on two cores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moiety.cli.output import command, interruptible, print_table, talk
from moiety.train.model_options import ModelOptions

__all__ = ["app"]

app = command("moiety demo", "Train a small MoE and its dense twin on real text, and compare them.")


@app.default
def demo(
    *,
    out: Annotated[Path, Parameter(help="folder for everything that is written")] = Path("runs/demo"),
    steps: Annotated[int, Parameter(help="optimizer steps of each twin")] = 500,
    seed: Annotated[int, Parameter(help="seed of weights and data order")] = 0,
    bytes_per_domain: Annotated[int, Parameter(help="size of the text, by domain")] = 1_000_000,
    vocab_size: Annotated[int, Parameter(help="entries of the tokenizer that is learnt")] = 2048,
    model: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
) -> int:
    """Train, compare, show the routing, write a checkpoint and report.html."""
    from moiety.cli.progress import TrainingDisplay
    from moiety.observe.demo import DENSE_LEARNING_RATE, closing_lines, demo_options, report_data, table_rows
    from moiety.observe.report import write_report
    from moiety.train.compare import pair, race
    from moiety.train.host import keep_freed_memory
    from moiety.train.run import prepare_text

    options = demo_options(steps, seed)
    console = talk()
    keep_freed_memory()
    console.print("reading text and learning a tokenizer (kept for the next time)")
    text = prepare_text(out, (), vocab_size=vocab_size, bytes_per_domain=bytes_per_domain)
    for note in text.notes:
        console.print(note, style="dim")
    twins = pair(
        model, options, vocab_size=text.tokenizer.vocab_size, dense_learning_rate=DENSE_LEARNING_RATE
    )
    for twin in twins:  # what an earlier demo left here
        shutil.rmtree(out / twin.name / "checkpoints", ignore_errors=True)
    with interruptible(console, "both twins are saved") as stop, TrainingDisplay(twins, console) as display:
        for twin, record in race(twins, text.data, run_folder=out, tokenizer=text.tokenizer, stop=stop):
            display.show(twin, record)
    if stop.is_set():
        console.print(f"stopped and saved under {out}; the comparison needs a whole run")
        return 1
    data = report_data(twins, text, command=f"moiety demo --steps {steps} --seed {seed}")
    write_report(out / "report.html", data)
    print_table("held-out text, lower is better", ["", "MoE", "dense twin"], table_rows(data))
    print("\n".join(closing_lines(data, out, twins[0].records[-1].checkpoint)))
    return 0
