"""A plan as one page that opens from a file and asks no network: what memory goes to, and what more sequences bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moiety.errors import DependencyError, UsageError
from moiety.storage import write_atomically

__all__ = ["write_plan_page"]

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
    try:
        from plotly import graph_objects
        from plotly.subplots import make_subplots
    except ImportError:
        raise DependencyError(
            "the page is drawn with plotly, which is not installed", hint="pip install 'moiety[report]'"
        ) from None
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
