"""`moiety routers`: what can choose the experts, what can go around it, and the losses that keep it even."""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, print_json
from moiety.errors import UsageError

__all__ = ["app"]

app = command("moiety routers", "List the routers there are, or explain one.")

TITLES = {"router": "routers", "around": "around a router", "layer": "layers of their own"}


@app.default
def routers(
    name: str = "", /, *, json: Annotated[bool, Parameter(negative="", help="print JSON")] = False
) -> int:
    """List all in a line each; with a name, its description and its options.

    Parameters
    ----------
    name
        One of them, or `losses` for the losses a router can be trained with.
    """
    from moiety.observe.catalog import loss_entries, router_entries

    entries = loss_entries() if name == "losses" else router_entries()
    if name and name != "losses":
        known = {str(entry["name"]): entry for entry in entries}
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "losses"], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`moiety routers` lists them"
            raise UsageError(f"there is no router {name!r}", hint=hint)
        entries = [known[name]]
    if json:
        print_json([{key: value for key, value in entry.items() if key != "text"} for entry in entries])
    elif name and name != "losses":
        _print_one(entries[0])
    else:
        _print_all(entries)
    return 0


def _print_all(entries: Sequence[dict[str, Any]]) -> None:
    width = max(len(entry["name"]) for entry in entries)
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        print(TITLES.get(kind, f"{kind}es"))
        for entry in entries:
            if entry["kind"] == kind:
                _wrapped(f"  {entry['name']:<{width}}  {entry['summary']}", " " * (width + 4))


def _print_one(entry: dict[str, Any]) -> None:
    """The class's own words: what it is, then a line for each argument."""
    paper = f", {entry['paper']}" if entry["paper"] else ""
    words, _, arguments = entry["text"].partition("\n\nArgs:\n")
    print(f"{entry['name']} ({entry['kind']}{paper})")
    for paragraph in words.split("\n\n"):
        print()
        _wrapped(" ".join(paragraph.split()), "")
    print()
    for argument in re.split(r"\n(?=    \w)", arguments.partition("\n\n")[0]) if arguments else ():
        _wrapped("  " + " ".join(argument.split()), "      ")
    causal = "" if entry["causal"] else "; what a token gets may depend on later ones"
    _wrapped(f"experts per token: {entry['experts_per_token']}{causal}", "  ")
    if entry["config"]:
        _wrapped(f"options of the model: {', '.join(entry['config'])}", "  ")
    if entry["options"] and entry["kind"] == "router":
        given = ", ".join(f"{name}={value}" for name, value in entry["options"].items())
        _wrapped(f"router_options: {given}", "  ")
    if entry["flags"]:
        _wrapped(f"moiety train: {entry['flags']}", "  ")


def _wrapped(line: str, indent: str) -> None:
    print(textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent=indent))
