#!/usr/bin/env python3
"""Print docs/cli.md: what each command says for `--help`, so that the page cannot drift from the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["help_text", "main"]

ROOT = Path(__file__).resolve().parents[1]
RUN = "import sys; from moiety.cli import main; sys.argv[0] = 'moiety'; sys.exit(main())"


def help_text(command: str | None) -> str:
    """The help of one command, or of the whole program for none, 100 columns wide without colour."""
    words = [command, "--help"] if command else ["--help"]
    environment = {
        **os.environ,
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "100",
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def main() -> None:
    """Print the page."""
    from moiety.cli import COMMANDS

    print("# Commands\n\nWritten by `make docs` from the commands' own help.")
    for title, command in [("moiety", None), *((f"moiety {name}", name) for name in sorted(COMMANDS))]:
        print(f"\n## {title}\n\n```text\n{help_text(command)}\n```")


if __name__ == "__main__":
    main()
