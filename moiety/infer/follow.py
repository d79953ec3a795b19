"""An engine whose model is on several processes: the first schedules and draws, the others make its forward passes too.

Before a pass the first says which tokens go where; all make it, each with keys and values in pages of its own under the
same numbers, and what comes out is the first one's alone. Each word of it is a sum over all processes, to which the
others add whether they were asked to end, and which experts they chose in the last pass. With nothing to do it says so
every second, so that who is lost is missed.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from moiety.errors import MoietyError, TrainingError
from moiety.infer.runner import Runner
from moiety.model.paged import PagedStep
from moiety.model.transformer import ModelOutput
from moiety.parallel.mesh import World

__all__ = ["Leader", "follow"]

NOTHING, STEP, END, FAILURE = range(4)
MOST_SECONDS = 1.0  # between two words


@final
class Leader:
    """Stands before a model, and lets the others make every pass that it makes.

    Args:
        world: The processes.
        runner: Whose model it is.
        stop: Called, from any thread, when it should end: another process was asked to, or a pass failed.
    """

    def __init__(self, world: World, runner: Runner, stop: Callable[[], None]) -> None:
        self._model, runner.forward = runner.forward, self
        self._names, self._stop = ("", *runner.adapters), stop
        self._others, self._choices = world.ranks - 1, 0
        self._every_s = min(MOST_SECONDS, world.options.rank_timeout / 10)
        self._speaking = threading.Lock()  # from a word to the end of what it is about; guards the next
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def __call__(self, tokens_BS: Tensor, *, cache: PagedStep) -> ModelOutput:
        """One forward pass, here and everywhere.

        Raises:
            TrainingError: an earlier one failed.
        """
        ones = cache.sequences
        parts: list[Sequence[int]] = [
            tokens_BS[0].tolist(),
            [one.start for one in ones],
            [one.count for one in ones],
            [self._names.index(one.adapter) for one in ones],
            [len(one.pages) for one in ones],
            [page for one in ones for page in one.pages],
        ]
        with self._together():
            self._say(STEP, len(parts[0]), len(ones), len(parts[-1]))
            dist.broadcast(torch.tensor([*itertools.chain(*parts)]), 0)
            output = self._model(tokens_BS, cache=cache)
            self._choices = _choices(output)
        return output

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """While inside, the others follow; at the end they are told, and what failed in a pass is raised."""
        beating = threading.Thread(target=self._beat, name="beat", daemon=True)
        beating.start()
        word = FAILURE
        try:
            yield
            word = END
        finally:
            self._ended.set()
            beating.join()
            with self._speaking:
                error, self._error = self._error, TrainingError("the server has ended")
                if error is None:
                    self._say(word)
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What all processes do; where it fails in one of them, they are at different places and can do no more."""
        with self._speaking:
            if self._error is not None:
                raise TrainingError("the model's processes have lost one another") from self._error
            try:
                yield
            except BaseException as error:
                self._error = error
                self._stop()
                raise

    def _say(self, word: int, tokens: int = 0, sequences: int = 0, pages: int = 0) -> None:
        said = torch.tensor([word, 0, self._others * self._choices, tokens, sequences, pages])
        dist.all_reduce(said)
        if said[1]:
            self._stop()
        if said[2]:
            raise TrainingError(
                "the processes chose different experts for the same tokens",
                hint="all need the same weights, on machines of one kind",
            )

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError, MoietyError):  # `leading` raises it
            while not self._ended.wait(self._every_s):
                with self._together():
                    self._say(NOTHING)


def _choices(output: ModelOutput) -> int:
    """A number that tells a pass from one with other pairs of tokens and experts."""
    counts = [routing.counts_E for routing in output.routing.values()]
    counts_N = torch.cat([torch.zeros(1, dtype=torch.int64), *counts])
    return int((counts_N * torch.arange(len(counts_N)).square()).sum())


@torch.inference_mode()
def follow(runner: Runner) -> None:
    """Make the passes of the first process, until it says that it ends.

    SIGTERM and Ctrl-C do not end this one: they ask the first to.

    Args:
        runner: Of an engine with the same options.

    Raises:
        TrainingError: the first one failed, and its own message says why.
        RuntimeError: a process was lost.
    """
    asked, names = threading.Event(), ("", *runner.adapters)
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda number, frame: asked.set())
    choices = 0
    while True:
        said = torch.tensor([0, int(asked.is_set()), -choices, 0, 0, 0])
        dist.all_reduce(said)
        word, _, _, tokens, sequences, pages = said.tolist()
        if word == END:
            return
        if word == FAILURE:
            raise TrainingError("rank 0 could not go on", hint="its own message says why")
        if word == STEP:
            sizes = [tokens, *[sequences] * 4, pages]
            flat = torch.empty(sum(sizes), dtype=torch.int64)
            dist.broadcast(flat, 0)
            tokens_T, *rest, page_P = flat.split(sizes)
            starts, counts, adapters, lengths = (one.tolist() for one in rest)
            tables = [table.tolist() for table in page_P.split(lengths)]
            named = [names[one] for one in adapters] if runner.adapters else None
            step = PagedStep(runner.pool, tables, starts, counts, named)
            choices = _choices(runner.forward(tokens_T[None], cache=step))
