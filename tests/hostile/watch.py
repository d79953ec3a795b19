"""Loads hostile models one after the other and writes down what that did: run as a program of its own.

    python tests/hostile/watch.py FOLDER GOOD... < names

Prints one JSON line per name, and at the end one about the whole: the peak of its memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from moiety import config
from moiety.errors import MoietyError
from moiety.model.checkpoint import load

ROOM_BYTES = 512 << 20  # of address space above what the imports took
SECONDS = 8  # a model that hangs is cut off here, far above what is allowed
RUNNING = (
    "compile",
    "ctypes.dlopen",
    "exec",
    "import",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
)
WRITING = (
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
)


class TooSlow(Exception):
    """A model took longer than anything may."""


class Watch:
    """An audit hook: what was run, and what was opened elsewhere or to be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = f"{os.path.realpath(folder)}/"
        self.events: list[str] = []
        self.armed = False
        # Checking an option's type evaluates the annotation that our own source gives it.
        annotations = {
            str(item.type)
            for one in vars(config).values()
            if isinstance(one, type) and dataclasses.is_dataclass(one)
            for item in dataclasses.fields(one)
        }
        self.sources = annotations | {one.encode() for one in annotations}
        self.codes = {compile(one, "<string>", "eval", dont_inherit=True) for one in annotations}

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by the interpreter for every event."""
        if not self.armed:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            flags = arguments[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes or not f"{place}/".startswith(self.folder):
                self.events.append(f"open {place}")
        elif event in RUNNING or event in WRITING or event.startswith("socket."):
            if event == "compile" and arguments[0] in self.sources:
                return
            if event == "exec" and isinstance(arguments[0], CodeType) and arguments[0] in self.codes:
                return
            self.events.append(f"{event} {arguments!r:.200}")


def memory_bytes(name: str) -> int:
    """A row of this program's status, in bytes."""
    match = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match, name
    return 1024 * int(match[1])


def attempt(path: Path, watch: Watch) -> dict[str, Any]:
    """Load one model, watched."""
    watch.events.clear()
    watch.folder = f"{os.path.realpath(path)}/"
    said: dict[str, Any] = {"kind": "", "message": ""}
    signal.alarm(SECONDS)
    watch.armed = True
    begun = time.perf_counter()
    try:
        load(path)
    except MoietyError as error:
        said = {"kind": type(error).__name__, "message": str(error)}
    except Exception as error:  # noqa: BLE001
        said = {"kind": f"!{type(error).__name__}", "message": str(error)[:500]}
    finally:
        seconds = time.perf_counter() - begun
        watch.armed = False
        signal.alarm(0)
    return {**said, "seconds": seconds, "events": list(watch.events)}


def stop(number: int, frame: FrameType | None) -> None:
    """The alarm."""
    raise TooSlow


def main() -> int:
    """Load every model whose name comes in."""
    folder, good = Path(sys.argv[1]), [Path(one) for one in sys.argv[2:]]
    signal.signal(signal.SIGALRM, stop)
    watch = Watch(folder)
    sys.addaudithook(watch)
    for path in good:  # everything is imported, and a good model does nothing either
        for _ in range(2):
            said = attempt(path, watch)
        print(json.dumps({"name": path.name, **said}))
    names = json.load(sys.stdin)
    for name in names[:1]:
        attempt(folder / name, watch)  # an error's own imports
    limit = memory_bytes("VmSize") + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        said = attempt(folder / name, watch)
        if said["seconds"] > 0.5:
            said["seconds"] = min(said["seconds"], attempt(folder / name, watch)["seconds"])
        print(json.dumps({"name": name, **said}))
    print(json.dumps({"peak_bytes": memory_bytes("VmHWM")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
