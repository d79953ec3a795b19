"""`moiety` with one process that is lost: python -m tests.parallel.victim RANK SIGNAL PHASE STEP -- ARGUMENTS.

In that rank the signal comes in the given step and phase: forward, backward, optimizer, between (two steps), save,
write (its first tensor) or moments (the model is written); RAISE is an error in its place. In a run that torchrun
started anew nothing comes. For a signal there may be a path: the process makes that file and goes on when somebody has
removed it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from moiety.cli import main
from moiety.moe.layer import MoE
from moiety.parallel import mesh
from moiety.train import sharded


class Fate:
    """When it comes."""

    def __init__(self, what: str, phase: str, step: int) -> None:
        self.what, self.phase, self.step, self.done = what, phase, step, 0

    def meet(self, phase: str) -> None:
        """It comes now if this is the place."""
        if (phase, self.done) != (self.phase, self.step):
            return
        if self.what == "RAISE":
            raise RuntimeError("planted")
        if not self.what.startswith("/"):
            os.kill(os.getpid(), signal.Signals[self.what])
            return
        self.phase = ""  # once
        Path(self.what).touch()
        while Path(self.what).exists():
            time.sleep(0.01)


def plant(fate: Fate) -> None:
    """Hooks in every phase of a step."""

    def forward(module: nn.Module, given: Any, output: Any) -> None:
        if isinstance(module, MoE):
            fate.meet("forward")
        if isinstance(module, nn.Embedding) and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: fate.meet("backward"))

    def after(optimizer: torch.optim.Optimizer, given: Any, named: Any) -> None:
        fate.done += 1
        fate.meet("between")

    register_module_forward_hook(forward)
    register_optimizer_step_pre_hook(lambda optimizer, given, named: fate.meet("optimizer"))
    register_optimizer_step_post_hook(after)

    def hurt(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def hurting(*given: Any) -> Any:
            fate.meet(phase)
            return method(*given)

        return hurting

    mesh.World.told = hurt("save", mesh.World.told)  # type: ignore[method-assign]
    mesh.World.whole = hurt("write", mesh.World.whole)  # type: ignore[method-assign]
    sharded._write_moments = hurt("moments", sharded._write_moments)


if __name__ == "__main__":
    rank, what, phase, step = sys.argv[1:5]
    if os.environ["RANK"] == rank and not mesh.restarted():
        plant(Fate(what, phase, int(step)))
    sys.argv = ["moiety", *sys.argv[6:]]
    sys.exit(main())
