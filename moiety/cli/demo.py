"""`moiety demo`: a small MoE beside its dense twin on real text, in about two minutes on two cores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from moiety.cli.output import interruptible, print_table, short, talk
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions

if TYPE_CHECKING:
    from moiety.observe.report import ReportData
    from moiety.train.compare import Contender
    from moiety.train.run import Text

__all__ = ["DENSE_LEARNING_RATE", "app", "demo_options"]

app = App(name="moiety demo", version_flags=[], help="Train a small MoE and its dense twin on real text, and compare them.")

DENSE_LEARNING_RATE = 3e-3  # each twin's best of a sweep; LOG.md has it
PROMPTS = ("def ", "The ", "Compute 47 + 38")
ROUTED_TEXT = (
    "def area(width, height):\n    return width * height\n\n"
    "A list is a sequence of values in square brackets.\n\n"
    "Compute 356 + 478. 6 + 8 = 14, write 4 and carry 1.\n\n"
    "Hello, how are you today?"
)
CAVEATS = (
    "Equal active parameters and equal tokens: the twins do the same work per token, and the MoE holds more weights.",
    "One seed. `recipes/compare.py` repeats this over several and gives the spread.",
    "Two minutes of training teach spelling and layout, not facts; the texts below show that.",
)


def demo_options(steps: int, seed: int) -> TrainOptions:
    """How both twins are trained."""
    return TrainOptions(
        steps=steps,
        batch=16,
        length=256,
        learning_rate=3e-3,
        warmup=min(20, steps),
        dtype="bf16",
        seed=seed,
        evaluate_every=max(steps // 6, 1),
        evaluate_sequences=12,
        save_every=0,
        keep=1,
    )


@app.default
def demo(
    *,
    out: Annotated[Path, Parameter(help="folder for everything that is written")] = Path("runs/demo"),
    steps: Annotated[int, Parameter(help="optimizer steps of each twin")] = 250,
    seed: Annotated[int, Parameter(help="seed of weights and data order")] = 0,
    bytes_per_domain: Annotated[int, Parameter(help="size of the text, by domain")] = 1_500_000,
    vocab_size: Annotated[int, Parameter(help="entries of the tokenizer that is learnt")] = 4096,
    model: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
) -> int:
    """Train, compare, show the routing, write a checkpoint and report.html."""
    from moiety.cli.progress import TrainingDisplay
    from moiety.observe.report import write_report
    from moiety.train.compare import pair, race
    from moiety.train.host import keep_freed_memory
    from moiety.train.run import prepare_text

    console = talk()
    keep_freed_memory()
    console.print("reading text and learning a tokenizer (kept for the next time)")
    text = prepare_text(out, (), vocab_size=vocab_size, bytes_per_domain=bytes_per_domain)
    for note in text.notes:
        console.print(note, style="dim")
    options = demo_options(steps, seed)
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
    data = _report_data(twins, text, command=f"moiety demo --steps {steps} --seed {seed}")
    write_report(out / "report.html", data)
    _show(twins, data, out)
    return 0


def _report_data(twins: tuple[Contender, Contender], text: Text, command: str) -> ReportData:
    from moiety.observe import summary
    from moiety.observe.report import ReportData
    from moiety.train.host import host_line

    moe = twins[0]
    return ReportData(
        title="moiety demo",
        host=host_line(),
        command=command,
        runs=tuple(summary.run_of(twin) for twin in twins),
        corpus=summary.corpus_of(text.data),
        health=summary.health_of(moe),
        specialization=summary.specialization_of(moe.evaluation, text.data, moe.config.moe_layers),
        top_tokens=summary.favourite_tokens(moe.build(), text.data, text.tokenizer),
        routed_text=summary.route_text(moe.build(), text.tokenizer, ROUTED_TEXT),
        generations=summary.generations(twins, text.tokenizer, PROMPTS),
        notes=(*CAVEATS, *text.notes),
    )


def _show(twins: tuple[Contender, Contender], data: ReportData, out: Path) -> None:
    """The terminal's summary: the table, the router, a text, and where to go next."""
    from moiety.observe.report import headline
    from moiety.train.host import peak_memory_bytes

    moe, dense = data.runs
    rows = [
        ["parameters, total", f"{moe.parameters_total:,}", f"{dense.parameters_total:,}"],
        ["parameters, active", f"{moe.parameters_active:,}", f"{dense.parameters_active:,}"],
        ["FLOPs per token", short(moe.flops_per_token), short(dense.flops_per_token)],
        ["training, tokens/s", f"{moe.train_tokens_per_s:,.0f}", f"{dense.train_tokens_per_s:,.0f}"],
        ["generation, tokens/s", f"{moe.decode_tokens_per_s:,.0f}", f"{dense.decode_tokens_per_s:,.0f}"],
        ["weights, MB", f"{moe.parameters_total * 4 / 1e6:.1f}", f"{dense.parameters_total * 4 / 1e6:.1f}"],
        ["bits/byte, mean", *(f"{twin.evaluation.mean_bits_per_byte:.3f}" for twin in twins)],
    ]
    for domain in moe.final_bits_per_byte:
        rows.append([f"  {domain}", *(f"{run.final_bits_per_byte[domain]:.3f}" for run in (moe, dense))])
    print_table("held-out text, lower is better", ["", "MoE", "dense twin"], rows)
    print(headline(data))
    last = max(point.step for point in data.health)
    worst = max((point for point in data.health if point.step == last), key=lambda point: point.max_vio)
    dead = sum(point.dead for point in data.health if point.step == last)
    print(
        f"router: busiest expert {1 + worst.max_vio:.2f}x its share (layer {worst.layer}), {dead} dead experts"
    )
    if data.specialization is not None:
        print(data.specialization.verdict)
    for sample in data.generations[: 2 * len(PROMPTS) : 2]:
        print(f"\n{sample.prompt!r} continues: {sample.text!r}")
    print(f"\npeak memory of the whole demo: {peak_memory_bytes() / 1e9:.1f} GB on {data.host}")
    print(
        f"report: {out / 'report.html'}\ncheckpoint, Hugging Face layout: {twins[0].records[-1].checkpoint}"
    )
    print(f"next: moiety generate {out}/moe 'import '  ·  moiety chat {out}/moe  ·  moiety train --help")
