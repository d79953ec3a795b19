"""One process of a training run for `parallel.py`: for each number on stdin so many steps, and a line about them.

python bench/_parallel_child.py TOKENS SHAPE.json MESH.json, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
Time in communication is from asking for it until it is there, waiting for a slower process included.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moiety.model.transformer import Transformer
from moiety.parallel.mesh import join
from moiety.parallel.options import MeshOptions
from moiety.train.data import open_tokens
from moiety.train.loop import train
from moiety.train.model_options import ModelOptions
from moiety.train.options import TrainOptions

TIMED = (
    "all_to_all_single",
    "all_reduce",
    "all_gather",
    "broadcast",
    "reduce_scatter_tensor",
    "all_gather_into_tensor",
)


class Clock:
    """Seconds in communication, and bytes given to all-to-alls."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which lets this clock run."""

        def run(*given: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            done = function(*given, **named)
            self.seconds += time.perf_counter() - begun
            if function.__name__ == "all_to_all_single":
                self.bytes += given[1].nbytes
            return done if done is None else Waited(done, self)

        return run


class Waited:
    """Work whose waiting is timed."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self.work, self.clock = work, clock

    def wait(self) -> None:
        """Until it is done."""
        begun = time.perf_counter()
        self.work.wait()
        self.clock.seconds += time.perf_counter() - begun


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    clock = Clock()
    with join(MeshOptions(**json.loads(sys.argv[3]))) as world:
        for name in TIMED:
            setattr(dist, name, clock.timed(getattr(dist, name)))
        given = json.loads(sys.argv[2])
        torch.manual_seed(0)
        model = Transformer(
            ModelOptions(**given["model"]).config(given["vocabulary"], given["train"]["length"])
        )
        options = TrainOptions(steps=10**6, evaluate_every=0, save_every=0, **given["train"])
        steps = train(model, open_tokens(sys.argv[1]), options, world=world)
        for line in sys.stdin:
            clock.seconds, clock.bytes, taken = 0.0, 0, []
            for _ in range(int(line)):
                begun = time.perf_counter()
                next(steps)
                taken.append(time.perf_counter() - begun)
            said = {
                "seconds": taken,
                "communication": clock.seconds / sum(taken),
                "bytes": clock.bytes // len(taken),
            }
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
