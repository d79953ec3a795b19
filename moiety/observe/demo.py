"""The demo's text, training and summary: one comparison, told as a page and as a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moiety.observe import summary
from moiety.observe.findings import ReportData, headline, mean_bits, short_number
from moiety.train.compare import Contender
from moiety.train.host import host_line, peak_memory_bytes
from moiety.train.options import TrainOptions
from moiety.train.run import Text

__all__ = ["DENSE_LEARNING_RATE", "STEPS", "closing_lines", "demo_options", "report_data", "table_rows"]

STEPS = 500
DENSE_LEARNING_RATE = 2.8e-3  # each twin's best of a sweep; LOG.md has it
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
        batch=8,
        length=256,
        learning_rate=2.8e-3,
        warmup=min(25, steps),
        dtype="bf16",
        seed=seed,
        evaluate_every=max(steps // 6, 1),
        evaluate_sequences=32,
        save_every=0,
        keep=1,
    )


def report_data(twins: Sequence[Contender], text: Text, command: str) -> ReportData:
    """Everything the page shows, measured from two finished twins, the MoE first."""
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


def table_rows(data: ReportData) -> list[list[str]]:
    """The comparison as rows: what, the MoE's figure, its twin's."""
    moe, dense = data.runs
    rows = [
        ["parameters, total", f"{moe.parameters_total:,}", f"{dense.parameters_total:,}"],
        ["parameters, active", f"{moe.parameters_active:,}", f"{dense.parameters_active:,}"],
        ["FLOPs per token", short_number(moe.flops_per_token), short_number(dense.flops_per_token)],
        ["training, tokens/s", f"{moe.train_tokens_per_s:,.0f}", f"{dense.train_tokens_per_s:,.0f}"],
        ["generation, tokens/s", f"{moe.decode_tokens_per_s:,.0f}", f"{dense.decode_tokens_per_s:,.0f}"],
        ["weights, MB", f"{moe.parameters_total * 4 / 1e6:.1f}", f"{dense.parameters_total * 4 / 1e6:.1f}"],
        ["bits/byte, mean", *(f"{mean_bits(run):.3f}" for run in data.runs)],
    ]
    for domain in moe.final_bits_per_byte:
        rows.append([f"  {domain}", *(f"{run.final_bits_per_byte[domain]:.3f}" for run in (moe, dense))])
    return rows


def closing_lines(data: ReportData, out: Path, checkpoint: Path | None) -> list[str]:
    """What the terminal says below the table: the outcome, the router, some text, where to go next."""
    lines = [headline(data)]
    last = max(point.step for point in data.health)
    worst = max((point for point in data.health if point.step == last), key=lambda point: point.max_vio)
    dead = sum(point.dead for point in data.health if point.step == last)
    lines.append(
        f"router: busiest expert {1 + worst.max_vio:.2f}x its share (layer {worst.layer}), {dead} dead experts"
    )
    if data.specialization is not None:
        lines.append(data.specialization.verdict)
    for sample in data.generations[: 2 * len(PROMPTS) : 2]:
        lines.append(f"\n{sample.prompt!r} continues: {sample.text!r}")
    lines.append(f"\npeak memory of the whole demo: {peak_memory_bytes() / 1e9:.1f} GB on {data.host}")
    lines.append(f"report: {out / 'report.html'}\ncheckpoint, Hugging Face layout: {checkpoint}")
    lines.append(
        f"next: moiety generate {out}/moe 'import '  ·  moiety chat {out}/moe  ·  moiety train --help"
    )
    return lines
