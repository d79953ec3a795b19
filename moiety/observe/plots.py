"""Plots of a comparison, as one page that opens from a file and asks no network."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from moiety.observe.page import plotly
from moiety.storage import write_atomically
from moiety.train.compare import Contender

__all__ = ["write_learning_curves"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999933")
DASHES = ("solid", "dash", "dot", "dashdot")


def write_learning_curves(path: Path, title: str, finished: Sequence[Sequence[Contender]]) -> None:
    """Held-out bits per byte and MaxVio over the steps: mean of the seeds as a line, their range as bars.

    Args:
        path: The page to write.
        title: Shown above.
        finished: For each seed the contenders after their race, in the same order.

    Raises:
        DependencyError: plotly is not installed.
    """
    graph_objects, make_subplots = plotly()
    figure = make_subplots(
        rows=2, cols=1, subplot_titles=("held-out bits per byte", "MaxVio, mean of layers")
    )
    for number, same in enumerate(zip(*finished, strict=True)):
        for row, curve in ((1, [_bits(one) for one in same]), (2, [_max_vio(one) for one in same])):
            steps = sorted(set.intersection(*(set(one) for one in curve)))
            means = [statistics.fmean(one[step] for one in curve) for step in steps]
            above = [max(one[step] for one in curve) - mean for step, mean in zip(steps, means, strict=True)]
            below = [mean - min(one[step] for one in curve) for step, mean in zip(steps, means, strict=True)]
            figure.add_trace(
                graph_objects.Scatter(
                    x=steps,
                    y=means,
                    error_y={"array": above, "arrayminus": below, "thickness": 1} if len(same) > 1 else None,
                    name=same[0].name,
                    legendgroup=same[0].name,
                    showlegend=row == 1,
                    line={
                        "color": COLORS[number % len(COLORS)],
                        "dash": DASHES[number // len(COLORS) % len(DASHES)],
                    },
                ),
                row=row,
                col=1,
            )
    figure.update_xaxes(title_text="step", row=2, col=1)
    figure.update_layout(title=title, height=900, template="plotly_white")
    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())


def _bits(contender: Contender) -> dict[int, float]:
    return {
        record.state.step: record.evaluation.mean_bits_per_byte
        for record in contender.records
        if record.evaluation is not None
    }


def _max_vio(contender: Contender) -> dict[int, float]:
    """MaxVio of about fifty steps of a run."""
    every = max(len(contender.records) // 50, 1)
    return {
        record.state.step: statistics.fmean(one.max_vio for one in record.health.values())
        for record in contender.records[::every]
        if record.health
    }
