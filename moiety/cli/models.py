"""`moiety models`: the well-known models, with exact counts; of closed ones what was said in public, and by whom."""

from __future__ import annotations

import shutil
import textwrap
from typing import Annotated, Any

from cyclopts import Parameter

from moiety import cost, registry
from moiety.cli.output import command, print_json, print_table

__all__ = ["app"]

app = command(
    "moiety models", "List the well-known models: exact counts of open ones, reports about closed ones."
)


@app.default
def models(*, json: Annotated[bool, Parameter(negative="", help="print JSON")] = False) -> int:
    """List the registry; `moiety params NAME` says more about one."""
    rows = [*_open(), *_hybrid(), *_undisclosed()]
    if json:
        print_json(rows)
        return 0
    counted = [row for row in rows if row["total"] is not None]
    columns = ["name", "total", "active", "experts"]
    cells = [[row["name"], f"{row['total']:,}", f"{row['active']:,}", row["experts"]] for row in counted]
    if shutil.get_terminal_size().columns >= 140:
        columns.append("where")
        cells = [[*cell, row["source"]] for cell, row in zip(cells, counted, strict=True)]
    print_table(f"{len(counted)} open models; parameters as they are stored", columns, cells)
    for row in counted:
        if row.get("unknown"):
            _wrapped(f"{row['name']}: unknown here: {row['unknown']}")
    for row in rows:
        if row["status"] == "counted only":
            _wrapped(f"{row['name']}: counted, not run yet: {row['why']}")
    print("\nclosed models: sizes undisclosed")
    for row in rows:
        if row["status"] == "undisclosed":
            said = "; ".join(f"{one['said']} ({one['by']}, {one['date']})" for one in row["reports"])
            _wrapped(f"{row['name']}: {said}")
    return 0


def _open() -> list[dict[str, Any]]:
    rows = []
    for name, entry in registry.REGISTRY.items():
        config = entry.build()
        counts = cost.parameters(config)
        moe = config.moe
        rows.append(
            {
                "name": name,
                "status": "open",
                "source": entry.source,
                "unknown": entry.unknown if isinstance(entry, registry.Decoder) else "",
                "total": counts.total,
                "active": counts.active,
                "active_without_input_embedding": counts.active_without_input_embedding,
                "active_without_embeddings": counts.active_without_embeddings,
                "experts": "dense" if moe is None else f"{moe.experts_per_token} of {moe.experts}",
            }
        )
    return rows


def _hybrid() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "status": "counted only",
            "source": entry.source,
            "total": entry.total,
            "active": entry.active,
            "experts": "hybrid",
            "why": entry.reason,
        }
        for name, entry in registry.NOT_YET.items()
    ]


def _undisclosed() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "status": "undisclosed",
            "total": None,
            "active": None,
            "reports": [{"said": one.said, "by": one.by, "date": one.date} for one in reports],
        }
        for name, reports in registry.UNDISCLOSED.items()
    ]


def _wrapped(line: str) -> None:
    print(textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent="  "))
