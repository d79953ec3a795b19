"""Processor time of what a thread was asked to do: without the garbage collection that fell into it."""

from __future__ import annotations

import gc
import threading
import time
from typing import final

__all__ = ["own_time"]


@final
class _Collected(threading.local):
    """Seconds of processor time that garbage collection has taken in this thread.

    A collection walks the objects of the whole process: where there are millions, it takes a second, in whichever
    thread happened to start it.
    """

    spent = 0.0
    begun = 0.0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self.begun = time.thread_time()
        else:
            self.spent += time.thread_time() - self.begun


_collected = _Collected()
gc.callbacks.append(_collected)


def own_time() -> float:
    """Seconds of processor time of this thread, without garbage collection."""
    return time.thread_time() - _collected.spent
