"""`moiety ls`: the models that are on this machine, in the hub's cache and among the runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from moiety import cost, storage
from moiety.cli.named import config_named
from moiety.cli.output import command, print_json, print_table, short, talk
from moiety.errors import MoietyError

__all__ = ["app"]

app = command("moiety ls", "List the models on this machine: in the hub's cache, and under a folder of runs.")


@app.default
def ls(
    folder: str = "runs", /, *, json: Annotated[bool, Parameter(negative="", help="print JSON")] = False
) -> int:
    """List them with family, parameters, size and date; no weights are read.

    Parameters
    ----------
    folder
        Where runs, checkpoints and .gguf files are looked for.
    """
    rows = [_row(name, place) for name, place in (*_cached(), *_below(Path(folder)))]
    if json:
        print_json(rows)
    elif rows:
        cells = [
            [row["name"], row["family"], _count(row), f"{short(row['bytes'])}B", row["date"]] for row in rows
        ]
        print_table(
            f"{len(rows)} model{'s' * (len(rows) != 1)}",
            ["path", "family", "parameters", "size", "date"],
            cells,
        )
    else:
        talk().print(f"no model is here, neither in the hub's cache nor under {folder}")
    for row in rows:
        if row["problem"] and not json:
            talk().print(f"{row['name']}: {row['problem']}")
    return 0


def _cached() -> Iterator[tuple[str, Path]]:
    """Models of the hub, by name and snapshot; none when the hub's client is not installed."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return
    for place in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")):
        owner_name = place.parents[2].name.removeprefix("models--").replace("--", "/")
        yield f"{owner_name}@{place.parent.name[:8]}", place.parent


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Checkpoints, of a run the newest whole one, and GGUF files."""
    seen: set[Path] = set()
    for run in sorted(one.parent for one in folder.glob("**/checkpoints")):
        steps = sorted(run.glob("checkpoints/step-*/manifest.json"))
        seen.add(run / "checkpoints")
        if steps:
            yield str(run), steps[-1].parent
    for config in sorted(folder.glob("**/config.json")):
        if not seen & set(config.parents):
            yield str(config.parent), config.parent
    for file in sorted(folder.glob("**/*.gguf")):
        yield str(file), file


def _row(name: str, place: Path) -> dict[str, Any]:
    files = [place] if place.is_file() else [one for one in place.rglob("*") if one.is_file()]
    row: dict[str, Any] = {
        "name": name,
        "path": str(place),
        "family": "gguf" if place.is_file() else "?",
        "parameters": None,
        "active": None,
        "bytes": sum(one.stat().st_size for one in files),
        "date": time.strftime("%Y-%m-%d", time.localtime(max(one.stat().st_mtime for one in files))),
        "problem": "",
    }
    try:
        if place.is_dir():
            row["family"] = str(storage.read_json(storage.inside(place, "config.json")).get("model_type"))
        counts = cost.parameters(config_named(str(place)))
        row |= {"parameters": counts.total, "active": counts.active}
    except MoietyError as error:  # a model that is damaged or unknown is listed, with the reason
        row["problem"] = error.message
    return row


def _count(row: dict[str, Any]) -> str:
    if row["parameters"] is None:
        return "?"
    active = f", {short(row['active'])} active" if row["active"] < row["parameters"] else ""
    return f"{short(row['parameters'])}{active}"
