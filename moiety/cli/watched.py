"""What `moiety inspect RUN --watch` does: the page on this machine's own address, following the run."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from pathlib import Path

from moiety.cli.output import talk
from moiety.errors import UsageError
from moiety.observe.inspection import Inspection
from moiety.packages import need

__all__ = ["watch"]


def watch(folder: Path, inspect: Callable[[], Inspection], *, port: int, opens: bool) -> None:
    """Serve the page until Ctrl-C; the history goes on as the run writes it.

    Args:
        folder: The run.
        inspect: Inspects its newest checkpoint; asked once, and only if there is one.
        port: 0 takes a free one.
        opens: Whether to open a browser.

    Raises:
        UsageError: this is no run, or the port is taken.
        DependencyError: what serves is not installed.
    """
    from moiety.train.run import PLAN

    if not 0 <= port <= 65535:
        raise UsageError(f"port is {port}; allowed is 0 to 65535")
    if not (folder / PLAN).is_file():
        raise UsageError(
            f"{folder} is not a run: it has no {PLAN}", hint="give the --out folder of `moiety train`"
        )
    need("moiety.serve.dashboard", "--watch", "moiety[report,serve]")
    from moiety.observe.watch import Followed
    from moiety.serve.dashboard import show

    say = talk().print
    plain = None
    if any((folder / "checkpoints").glob("step-*/manifest.json")):
        plain = inspect().plain()
    else:
        say("there is no checkpoint yet: the page shows the history alone")

    def ready(address: str, end: Callable[[], None]) -> None:
        say(f"watching {folder} at {address} (Ctrl-C ends)")
        if opens and not webbrowser.open(address):
            say("no browser was found; open the address yourself")

    show(Followed(folder, plain), plain=plain, title=folder.name, port=port, ready=ready)
