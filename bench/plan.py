"""Plans against runs: this machine is measured, models are planned by that alone, each then runs in its own process.

Nothing is fitted to a configuration. Bars: memory within 5 %, decoding and prompts inside the band, in 9 of 10 figures.
`python tools/plan_accuracy.py` writes docs/plan-accuracy.md from bench/results/plan.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from _harness import Row, arguments, finish
from _plan_child import TOKENS, config_of

from moiety.infer import limits
from moiety.plan import estimate, speed, verdict
from moiety.plan.hardware import Band
from moiety.plan.plan import here
from moiety.plan.profile import Profile
from moiety.plan.speed import Machine, Setting
from moiety.plan.weights import PLAIN, stored_as
from moiety.quant.pretend import packed_model

# Shape, layers (0: all), format.
CASES = (
    ("small", 0, "fp32"),
    ("small", 0, "int4-g32"),
    ("small", 24, "int8-g32"),
    ("granite-3.0-1b-a400m", 0, "int4-g32"),
    ("granite-3.0-1b-a400m", 12, "int8-g32"),
    ("granite-3.0-1b-a400m", 6, "fp32"),
    ("olmoe-1b-7b", 4, "int4-g32"),
    ("olmoe-1b-7b", 2, "int8-g32"),
    ("olmoe-1b-7b", 2, "nf4-g64"),
    ("qwen3-30b-a3b", 2, "int4-g32"),
    ("qwen3-30b-a3b", 2, "mxfp4"),
    ("mixtral-8x7b", 1, "int4-g32"),
    ("mistral-7b", 3, "int4-g32"),
)
QUICK = (CASES[1], CASES[4])
BATCHES, PROMPT, CHILD_PROMPT = (1, 8), 512, 16
NINE_OF_TEN = 0.9


def planned(profile: Profile, shape: str, layers: int, form: str) -> dict[str, tuple[Band, str]]:
    """What the plan says of a case, before it runs."""
    config = config_of(shape, layers)
    machine = Machine(device=here(profile), profile=profile)
    stored = stored_as(config, form, kept=form if form in PLAIN else "fp32")
    dtype = "bf16" if form == "bf16" else "fp32"
    sizes = [
        estimate.memory(
            config,
            stored,
            machine.device,
            context=context,
            batch=batch,
            kv_dtype=dtype,
            ours=True,
            profile=profile,
        ).total
        for context, batch in ((CHILD_PROMPT + TOKENS, BATCHES[-1]), (PROMPT, 1))
    ]
    share = verdict.MEMORY_BAND
    found = {"memory": (Band((1 - share) * max(sizes), (1 + share) * max(sizes)), "bytes")}
    for batch in BATCHES:
        setting = Setting(batch=batch, context=CHILD_PROMPT + TOKENS // 2, kv_dtype=dtype)
        found[f"decode, batch {batch}"] = (
            speed.decode(config, stored, machine, setting).tokens_per_s,
            "tokens/s",
        )
    prompt = speed.prefill(config, stored, machine, Setting(kv_dtype=dtype), PROMPT)
    found[f"prefill {PROMPT}"] = (prompt.tokens_per_s, "tokens/s")
    return found


def measured(shape: str, layers: int, form: str) -> dict[str, float]:
    """What came of it."""
    words = [shape, str(layers), form, ",".join(map(str, BATCHES)), str(PROMPT)]
    script = str(Path(__file__).with_name("_plan_child.py"))
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    decoded = {f"decode, batch {batch}": rate for batch, rate in found["decode"].items()}
    return {"memory": found["memory"], **decoded, f"prefill {PROMPT}": found["prefill"]}


def rows_of(case: tuple[str, int, str], verdicts: list[verdict.Verdict]) -> list[Row]:
    """Each figure: ours is the middle of the band, the peer is the machine."""
    shape, layers, form = case
    label = f"{shape}{f', {layers} layers' if layers else ''}, {form}"
    return [
        Row(
            case=f"{label}: {one.what}",
            ours=round(one.planned.middle, 3),
            peer=round(one.measured, 3),
            peer_name="measured",
            unit=one.unit,
            ratio=round(one.planned.middle / one.measured, 3),
            bar=None,
            met=one.inside,
            note=f"{one.planned.low:.6g} to {one.planned.high:.6g}",
        )
        for one in verdicts
    ]


def main() -> int:
    """Measure the machine, then every case."""
    options = arguments(__doc__ or "")
    if options.device != "cpu":
        print("this plans for CPUs", file=sys.stderr)
        return finish("plan", [])
    with tempfile.TemporaryDirectory(prefix="moiety-") as folder:
        say = lambda text: print(f"measuring {text}", file=sys.stderr)  # noqa: E731
        profile = limits.measure(packed_model, Path(folder), say, quick=options.quick)
    rows, entries = [], []
    for case in QUICK if options.quick else CASES:
        verdicts = verdict.judge(planned(profile, *case), measured(*case))
        print(f"{case}: {verdict.sentence(verdicts)}", file=sys.stderr)
        rows += rows_of(case, verdicts)
        shape, layers, form = case
        entries.append(
            verdict.entry({"shape": shape, "layers": layers, "format": form}, verdicts, profile.measured)
        )
    inside, total = verdict.share_inside(entries)
    rows.append(
        Row(
            case="figures inside the plan",
            ours=inside,
            peer=total,
            peer_name="all figures",
            unit="",
            ratio=round(inside / total, 3),
            bar=NINE_OF_TEN,
            met=inside >= NINE_OF_TEN * total,
        )
    )
    return finish("plan", rows, entries=entries, profile=asdict(profile))


if __name__ == "__main__":
    sys.exit(main())
