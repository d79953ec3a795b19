"""Which process was lost: each says in the store that it lives, and a failing one asks who has stopped saying so."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, cast

from torch._C._distributed_c10d import Store

from moiety.errors import TrainingError

__all__ = ["Watch"]

MOST_SECONDS = 1.0  # between two signs of life
ANSWER_SECONDS = 5.0  # that the store may take to answer


class Watch:
    """Signs of life of this process, from a thread of its own, and a look at those of the others.

    Args:
        store: Where they are; of it a connection of its own is made.
        rank: This process.
        ranks: How many there are.
        timeout_s: After how long a process counts as lost.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout_s: float) -> None:
        self.store, self.rank, self.ranks = cast(Any, store).clone(), rank, ranks
        self.every_s, self._closed = min(MOST_SECONDS, timeout_s / 10), threading.Event()
        self.store.add(f"life/{rank}", 1)
        self._thread = threading.Thread(target=self._beat, name="life", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and so is the run
            while not self._closed.wait(self.every_s):
                self.store.add(f"life/{self.rank}", 1)

    def close(self) -> None:
        """No more signs."""
        self._closed.set()
        self._thread.join(timeout=MOST_SECONDS)  # a store that is cut off keeps it until the process ends

    def explained(self, error: RuntimeError) -> Exception:
        """The error with the process named that was lost, or that failed first; the error itself where this one did."""
        self._closed.set()
        reason, found = str(error).splitlines()[0][:200], list[tuple[list[int], str]]()
        asking = threading.Thread(target=self._ask, args=(reason, found), daemon=True)
        asking.start()
        asking.join(
            ANSWER_SECONDS + 3 * self.every_s
        )  # a store whose process was stopped keeps everybody waiting
        if not found:
            said = f"rank 0 of {self.ranks} was lost, or what started it: the run's store no longer answers ({reason})"
        else:
            silent, (first, _, why) = found[0][0], found[0][1].partition(" ")
            if not silent and first == str(self.rank):
                return error
            who = ", ".join(map(str, silent)) or first
            said = f"rank {who} of {self.ranks} " + (
                f"was lost: no sign of life ({reason})" if silent else f"failed: {why}"
            )
        return TrainingError(
            said, hint="torchrun --max-restarts N starts all anew, training from its last checkpoint"
        )

    def _ask(self, reason: str, found: list[tuple[list[int], str]]) -> None:
        """Who has stopped giving signs and did not say that it failed; who was the first to say so, and why."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"failed/{self.rank}", reason)
            first = self.store.compare_set("failed", "", f"{self.rank} {reason}").decode()
            before = self._signs()
            time.sleep(3 * self.every_s)
            silent = [rank for rank, sign in enumerate(self._signs()) if sign == before[rank]]
            found.append(([rank for rank in silent if not self.store.check([f"failed/{rank}"])], first))

    def _signs(self) -> list[int]:
        return [self.store.add(f"life/{rank}", 0) for rank in range(self.ranks)]
