#!/usr/bin/env python3
"""Print docs/parallel-plan.md: training runs of published clusters as `moiety plan` foretells them, and as they were.

python tools/parallel_plan.py > docs/parallel-plan.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiety import cost, registry
from moiety.plan.hardware import Band, device_named
from moiety.plan.links import LATENCY_BETWEEN, REACHED_BETWEEN, REACHED_INSIDE, Cluster, Once
from moiety.plan.speed import TRAINING_SHARE, Machine, training

__all__ = ["RUNS", "Run", "foretold", "main", "page"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "alltoall.json"
CONTEXT = 4096


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run.

    Args:
        who: Published it.
        model: A name of the registry.
        device: A name of the table.
        devices: How many.
        ranks: Over which experts are spread.
        nodes: That these are on.
        stages: Of the pipeline.
        step: Sequences of a step; 0 is four a device, where none was published.
        rate: Tokens per second and device as published; 0 where `tera` was.
        tera: TFLOP/s of a device as published.
        once: How often its all-to-all sends a row.
        row_bytes: Of a number on its way, the mean of out and back.
        note: What was assumed.
        source: Where the figures are from.
    """

    who: str
    model: str
    device: str
    devices: int
    ranks: int
    nodes: int = 1
    stages: int = 1
    step: int = 0
    rate: float = 0.0
    tera: float = 0.0
    once: Once = "pair"
    row_bytes: float = 2.0
    note: str = ""
    source: str


HOURS, TOKENS = 2.664e6, 14.8e12  # of DeepSeek-V3's pre-training
V3 = "arXiv 2412.19437, table 1 and section 3"
BRIDGE = "Megatron Bridge, performance summary, 25.11 container"
RECIPE = "Megatron-LM pull request 5728; layout of Megatron Bridge's recipe for so many H100"
TITAN = "pytorch.org, 'Enabling up to 41% faster pre-training', 2026-03"
RUNS = (
    Run(who="DeepSeek", model="deepseek-v3", device="h800", devices=2048, ranks=64, nodes=8, stages=16, step=15_360,
        rate=TOKENS / HOURS / 3600, once="node", row_bytes=1.5, note="products in 8 bits", source=V3),
    Run(who="Megatron", model="qwen3-30b-a3b", device="h100", devices=16, ranks=16, nodes=2, tera=240.5,
        note="step assumed", source=RECIPE),
    Run(who="Megatron", model="qwen3-235b-a22b", device="h100", devices=256, ranks=32, nodes=4, stages=8, tera=302,
        note="step assumed, tensor parallelism of 2 left out", source=RECIPE),
    Run(who="Megatron Bridge", model="gpt-oss-120b", device="h100", devices=64, ranks=8, stages=4, step=512, rate=5630,
        source=BRIDGE),
    Run(who="Megatron Bridge", model="qwen3-30b-a3b", device="h100", devices=16, ranks=8, stages=2, step=512,
        rate=5275, note="products in 8 bits", source=BRIDGE),
    Run(who="Megatron Bridge", model="gpt-oss-120b", device="b200", devices=64, ranks=8, step=512, rate=8213,
        source=BRIDGE),
    Run(who="torchtitan", model="deepseek-v3", device="b200", devices=256, ranks=64, nodes=8, rate=651,
        note="layout and step assumed", source=TITAN),
    Run(who="torchtitan, DeepEP", model="deepseek-v3", device="b200", devices=256, ranks=64, nodes=8, rate=859,
        once="node", note="layout and step assumed", source=TITAN),
)  # fmt: skip


def foretold(run: Run) -> tuple[float, Band, float, Mapping[str, Band]]:
    """Tokens per second and device: as published, foretold, and foretold at the middle; and the parts of a step."""
    config, device = registry.lookup_decoder(run.model), device_named(run.device)
    machine = Machine(device=device, count=run.devices)
    cluster = Cluster(device=device, ranks=run.ranks, nodes=run.nodes)
    step = CONTEXT * (run.step or 4 * run.devices)
    parts = training(
        config,
        machine,
        step,
        CONTEXT,
        cluster=cluster,
        step_tokens=step,
        row_bytes=run.row_bytes,
        once=run.once,
        stages=run.stages,
    )
    seconds, each = parts["step_seconds"], step / run.devices
    flops = cost.training_flops_per_token(config, (CONTEXT + 1) // 2).total
    published = run.rate or 1e12 * run.tera / flops
    return published, Band(each / seconds.high, each / seconds.low), each / seconds.middle, parts


def _row(run: Run) -> str:
    published, band, middle, _ = foretold(run)
    layout = f"{run.devices} {run.device}, experts over {run.ranks}"
    layout += f" on {run.nodes} hosts" * (run.nodes > 1) + f", {run.stages} stages" * (run.stages > 1)
    inside = "yes" if band.low <= published <= band.high else "**no**"
    return (
        f"| {run.who} | {run.model} | {layout} | {published:,.0f} | {band.low:,.0f} to {band.high:,.0f} | "
        f"{middle / published - 1:+.0%} | {inside} | {run.note} |"
    )


def page(found: Mapping[str, Any] | None = None) -> str:
    """The page; of what `bench/alltoall.py` printed too, if it is there."""
    published, band, middle, parts = foretold(RUNS[0])
    days = [TOKENS / RUNS[0].devices / rate / 86_400 for rate in (published, band.high, band.low, middle)]
    errors = sorted(abs(one[2] / one[0] - 1) for one in map(foretold, RUNS))
    inside = sum(one[1].low <= one[0] <= one[1].high for one in map(foretold, RUNS))
    wait = {name: _seconds(parts[f"{name}_seconds"]) for name in ("computing", "exchange", "gradient")}
    lines = [
        *_head(),
        *map(_row, RUNS),
        "",
        f"{inside} of {len(RUNS)} are inside; the error is {errors[len(errors) // 2]:.0%} in the middle and",
        f"{errors[-1]:.0%} at most. A band this wide says whether a run takes weeks or months, not which week.",
        "",
        f"DeepSeek-V3's {TOKENS / 1e12:.1f}T tokens took {HOURS / 1e6:.3f}M device hours, {days[0]:.1f} days on 2,048",
        f"H800; foretold are {days[1]:.0f} to {days[2]:.0f} days, {days[3]:.0f} at the middle. Of a step, computing is",
        f"{wait['computing']} s, all-to-alls {wait['exchange']} s, gradients {wait['gradient']} s.",
        "",
        "Sources:",
        "",
        *(
            f"- {source}"
            for source in dict.fromkeys(f"{run.who.split(',')[0]}: {run.source}" for run in RUNS)
        ),
    ]
    return "\n".join(lines + _measured(found))


def _head() -> list[str]:
    """What is assumed, and the table's head."""
    inside, between, late = REACHED_INSIDE, REACHED_BETWEEN, LATENCY_BETWEEN
    return [
        "# Clusters: foretold and published",
        "",
        "Written by `tools/parallel_plan.py`. A step is computing, all-to-alls of experts and sums of gradients, side",
        "by side (the fast end) or one after the other (the slow end): `training` in `moiety/plan/speed.py`, which is",
        "what `moiety plan --train-tokens --ranks --nodes` prints. Nothing is fitted to these runs. Assumed are",
        "",
        f"- {TRAINING_SHARE.low:.0%} to {TRAINING_SHARE.high:.0%} of dense bfloat16 arithmetic: OLMoE on H100 without",
        "  expert parallelism (arXiv 2409.02060) and Llama 3 405B, dense (arXiv 2407.21783, table 4);",
        f"- of a link's published rate {inside.low:.0%} to {inside.high:.0%} inside a host and {between.low:.0%} to "
        f"{between.high:.0%} between hosts,",
        f"  {1e6 * late.low:.0f} to {1e6 * late.high:.0f} us for an all-to-all between hosts. Upper rates and latency",
        "  are of kernels alone (DeepEP, docs/legacy.md, on H800), lower rates are assumed;",
        "- nothing is computed twice, pipelines have no bubbles, routing is balanced, there is no tensor parallelism,",
        "  products take the rate of bfloat16, sequences have 4,096 tokens. Real runs differ in each.",
        "",
        "Tokens per second and device; the error is that of the middle of the band's times against what was published.",
        "",
        "| who | model | layout | published | foretold | error | inside | note |",
        "|---|---|---|---|---|---|---|---|",
    ]


def _seconds(band: Band) -> str:
    return f"{band.low:.3g} to {band.high:.3g}"


def _measured(found: Mapping[str, Any] | None) -> list[str]:
    """What the same formula does between processes."""
    if found is None:
        return []
    lines = [
        "",
        "## Between processes of one machine",
        "",
        f"`bench/alltoall.py` on {found['host']}: gloo, 4 KiB to 16 MiB a rank. The link is fitted to every other",
        "size; what it says of the others, and of another number of ranks, stands apart.",
        "",
        "| what | sizes | mean error | largest |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {one['sizes']} | {one['mean']:.0%} | {one['largest']:.0%} |"
        for name, one in found["errors"].items()
    ]
    fits = [
        f"{ranks} ranks {1e6 * one['latency_s']:.0f} us a message and {one['bytes_per_s'] / 1e9:.2f} GB/s"
        for ranks, one in found["links"].items()
    ]
    return [*lines, "", f"Fitted: {', '.join(fits)}, of all ranks together."]


def main(path: Path = RESULTS) -> int:
    """Print the page."""
    print(page(json.loads(path.read_text().splitlines()[-1]) if path.is_file() else None))
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
