"""`moiety plan --trace`: how a recorded run would have fared with less memory, as a table, JSON or a page."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from moiety.cli.output import print_json, print_table, talk
from moiety.errors import UsageError
from moiety.fields import size_bytes
from moiety.observe.page import plotly
from moiety.plan.hardware import KINDS, Band, device_named
from moiety.plan.options import PlanOptions
from moiety.plan.plan import here
from moiety.plan.profile import Profile
from moiety.plan.replay import SHARES, Point, Rates, Replay, ReplayOptions, replay
from moiety.plan.speed import Machine
from moiety.plan.weights import Stored
from moiety.storage import write_atomically

__all__ = ["run", "write_page"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by the colour-blind
DASHES = ("solid", "dash")


def run(
    options: ReplayOptions,
    wanted: PlanOptions,
    *,
    profile: Profile | None = None,
    stored: Stored | None = None,
    json: bool = False,
    plot: str = "",
) -> int:
    """Replay a trace file and print what came of it.

    Args:
        options: The file, policies and budgets.
        wanted: The device and its disk.
        profile: Of this machine, if it was measured.
        stored: The model's weights, where a model was named: their sizes count instead of the trace's.
        json: Print JSON.
        plot: A page to write.
    """
    from moiety.tracefile import read

    trace = read(options.trace)
    expert_bytes: Sequence[float] = trace.header.expert_bytes
    dense_bytes: float = trace.header.dense_bytes
    if stored is not None:
        count = sum(trace.header.experts) - trace.header.null_experts * len(trace.header.experts)
        expert_bytes = [stored.expert_bytes / count] * len(trace.header.experts)
        embedding = sum(part.size_bytes for part in stored.parts if part.kind == "embedding")
        dense_bytes = stored.size_bytes - stored.expert_bytes - embedding
    shares, budgets = options.wanted_shares, tuple(size_bytes(one, "budgets") for one in options.wanted_sizes)
    if shares and budgets:
        raise UsageError(
            f"budgets are {options.budgets!r}", hint="all sizes or all shares: 4GiB,8GiB or 25%,50%"
        )
    rates, note = _rates(wanted, profile, max(expert_bytes, default=0.0))
    found = replay(
        trace,
        policies=options.wanted_policies,
        shares=shares or SHARES,
        budgets=budgets,
        rates=rates,
        expert_bytes=expert_bytes,
        dense_bytes=dense_bytes,
    )
    if plot:
        write_page(Path(plot), options.trace, found)
        talk().print(f"{plot} is written")
    if json:
        print_json(
            {"trace": options.trace, "rates": rates._asdict(), "assumed": note, **dataclasses.asdict(found)}
        )
        return 0
    timed = found.points[0].tokens_per_s is not None
    for line in (found.advice, *found.notes, *([note] if timed else [])):
        print(textwrap.fill(line, shutil.get_terminal_size().columns, break_on_hyphens=False))
    _print(found)
    return 0


def _rates(wanted: PlanOptions, profile: Profile | None, piece_bytes: float) -> tuple[Rates, str]:
    """Of the device: the tier below at reads of one expert, and what programs reach of its memory."""
    is_here = wanted.device == "cpu"
    device = here(profile) if is_here else device_named(wanted.device)
    rate = float(size_bytes(wanted.disk_rate, "disk_rate")) if wanted.disk_rate else 0.0
    profile = profile if is_here else None
    machine = Machine(device=device, profile=profile, disk=Band(rate, rate) if rate else None)
    reached = KINDS[device.kind].decode
    memory = (
        (profile.best_read_rate.low, profile.best_read_rate.high)
        if profile
        else (reached.low * device.bandwidth, reached.high * device.bandwidth)
    )
    below = machine.tier_rate(piece_bytes)
    return Rates(
        (below.low, below.high), memory
    ), f"rates: {device.source}; {machine.tier} {_gb(below)}, memory {_gb(memory)}"


def _gb(band: Sequence[float]) -> str:
    return f"{band[0] / 1e9:.3g} to {band[1] / 1e9:.3g} GB/s"


def _print(found: Replay) -> None:
    """A row for each budget, a column for each policy."""
    policies = list(dict.fromkeys(point.policy for point in found.points))
    by_slots = {
        slots: {point.policy: point for point in found.points if point.slots == slots}
        for slots in sorted({point.slots for point in found.points})
    }
    heads = ["experts", *policies]
    columns: list[tuple[str, Callable[[Point], str]]] = [
        ("hits, % of the experts that are wanted again", lambda one: f"{100 * one.hit_rate:.1f}")
    ]
    if found.points[0].tokens_per_s is not None:
        columns.append(("tokens/s", lambda one: " to ".join(f"{end:.3g}" for end in one.tokens_per_s or ())))
    for title, cell in columns:
        rows = []
        for slots, points in by_slots.items():
            one = next(iter(points.values()))
            size = "" if one.size_bytes is None else f", {one.size_bytes / 1e9:.3g} GB"
            cells = [cell(points[name]) if name in points else "-" for name in policies]
            rows.append([f"{slots} ({one.share:.0%}{size})", *cells])
        print_table(title, heads, rows)


def write_page(path: Path, title: str, found: Replay) -> None:
    """The hit curve and the speeds of every policy over the budget, as a page that asks no network.

    Args:
        path: The page to write.
        title: Shown above.
        found: What the replay found.

    Raises:
        DependencyError: plotly is not installed.
    """
    graph_objects, make_subplots = plotly()
    timed = found.points[0].tokens_per_s is not None
    figure = make_subplots(
        rows=1 + timed,
        cols=1,
        subplot_titles=("hit rate, % of experts wanted again", "tokens/s, middle of the band")[: 1 + timed],
    )
    for number, policy in enumerate(dict.fromkeys(point.policy for point in found.points)):
        points = [point for point in found.points if point.policy == policy]
        values = [[100 * point.hit_rate for point in points]]
        values += [[sum(point.tokens_per_s or (0, 0)) / 2 for point in points]] if timed else []
        for row, y in enumerate(values, start=1):
            curve = graph_objects.Scatter(
                x=[100 * point.share for point in points],
                y=y,
                name=policy,
                legendgroup=policy,
                showlegend=row == 1,
                line={
                    "color": COLORS[number % len(COLORS)],
                    "dash": DASHES[number // len(COLORS) % len(DASHES)],
                },
            )
            figure.add_trace(curve, row=row, col=1)
    edge = 100 * found.cycle / max(point.slots for point in found.points)
    figure.add_vline(x=edge, line_dash="dot", annotation_text="one step", row=1, col=1)
    figure.update_xaxes(title_text="experts in memory, %", row=1 + timed, col=1)
    lines = "<br>".join(textwrap.wrap(found.advice, 110))
    figure.update_layout(
        title=f"{title}<br><sub>{lines}</sub>", height=450 * (1 + timed), template="plotly_white"
    )
    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())
