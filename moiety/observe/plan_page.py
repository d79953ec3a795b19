"""A plan as one page that opens from a file and asks no network: what memory goes to, and what more sequences bring."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moiety.errors import UsageError
from moiety.observe.page import plotly
from moiety.storage import write_atomically

if TYPE_CHECKING:
    from moiety.parallel.worth import Comparison

__all__ = ["write_placement_page", "write_plan_page"]

USES = ("weights", "kv", "activations", "runtime")


def write_plan_page(path: Path, found: Mapping[str, Any]) -> None:
    """Memory by use of each layout against the budget, and tokens per second over the batch, as a band.

    Args:
        path: The page to write.
        found: Of `plan.make_plan`.

    Raises:
        DependencyError: plotly is not installed.
        UsageError: a plan without layouts, of an encoder-decoder.
    """
    if "layouts" not in found:
        raise UsageError(f"there is nothing to plot: {found['advice']}")
    graph_objects, make_subplots = plotly()
    figure = make_subplots(
        rows=2, cols=1, subplot_titles=("memory, GiB", "tokens per second of all sequences")
    )
    names = [f"{one['format']}, {100 * one['resident']:.0f} % resident" for one in found["layouts"]]
    for use in USES:
        sizes = [one["memory"][use] / 2**30 for one in found["layouts"]]
        figure.add_trace(graph_objects.Bar(x=names, y=sizes, name=use), row=1, col=1)
    figure.add_hline(
        y=found["memory_budget_bytes"] / 2**30, line_dash="dash", annotation_text="budget", row=1, col=1
    )
    batches = [one["batch"] for one in found["batches"]]
    for end, fill in (("low", None), ("high", "tonexty")):
        speeds = [one["tokens_per_s"][end] for one in found["batches"]]
        reasons = [one["limit"] for one in found["batches"]]
        figure.add_trace(
            graph_objects.Scatter(x=batches, y=speeds, name=f"tokens/s, {end}", fill=fill, text=reasons),
            row=2,
            col=1,
        )
    figure.update_xaxes(title_text="sequences at a time", type="log", row=2, col=1)
    figure.update_layout(
        title=f"{found['name']}: {found['advice']}", barmode="stack", height=900, template="plotly_white"
    )
    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())


def write_placement_page(path: Path, name: str, found: Comparison) -> None:
    """Of each way to hold experts the busiest rank of every layer, and what a token sends in a node and between nodes.

    Args:
        path: The page to write.
        name: Of the model.
        found: Of `parallel.worth.compare`.

    Raises:
        DependencyError: plotly is not installed.
    """
    graph_objects, make_subplots = plotly()
    titles = ("busiest rank over the mean, by layer", "KiB on links for a token, out and back")
    figure = make_subplots(rows=2, cols=1, subplot_titles=titles)
    for way in found.ways:
        curve = graph_objects.Scatter(
            x=list(found.layers), y=list(way.layer_imbalance), name=way.name, mode="lines+markers"
        )
        figure.add_trace(curve, row=1, col=1)
    names = [f"{way.name}, once per {once}" for way in found.ways for once in way.token_bytes]
    for kind, words in (("inside", "inside a node"), ("between", "between nodes")):
        sizes = [getattr(size, kind) / 1024 for way in found.ways for size in way.token_bytes.values()]
        figure.add_trace(graph_objects.Bar(x=names, y=sizes, name=words), row=2, col=1)
    figure.update_xaxes(title_text="layer", row=1, col=1)
    advice = "<br>".join(textwrap.wrap(found.advice, 110))
    title = {
        "text": f"{html.escape(name)}<br><sub>{advice}</sub>",
        "yref": "container",
        "y": 0.98,
        "yanchor": "top",
    }
    figure.update_layout(
        title=title, barmode="stack", height=1100, margin={"t": 220}, template="plotly_white"
    )
    write_atomically(path, figure.to_html(include_plotlyjs=True).encode())
