"""Answers of a model whose experts are on several processes: all make the same steps, each multiplies its own experts.

Every process has every token, so nothing is sent to experts: the pairs of a process's own experts are one slice of the
routing, and what all of them make is added up, once in each layer. Sums come out with the same bits everywhere, so that
all processes draw the same tokens. `moiety.parallel.expert_parallel` is for training, where each has tokens of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moiety.backends import ExpertWeights
from moiety.errors import UsageError
from moiety.moe.experts import Experts, Multiply
from moiety.moe.layer import MoE
from moiety.parallel.divide import expert_layouts, keep_own
from moiety.parallel.mesh import World, join
from moiety.parallel.options import MeshOptions
from moiety.routing import Routing

__all__ = ["ExpertShare", "in_turn", "joined", "share"]

Opened = TypeVar("Opened")


class ExpertShare:
    """Experts of one layer, in equal parts on processes that all have the same tokens; without gradients.

    Args:
        group: The processes, in the order of their experts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks, self._rank = group, dist.get_world_size(group), dist.get_rank(group)

    def send(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """The tokens, and the pairs with the experts here; nothing is sent."""
        here = routing.experts // self.ranks
        counts_RE = routing.counts_E.view(self.ranks, here)
        ends_R = counts_RE.sum(1).cumsum(0).tolist()
        first, last = ends_R[self._rank - 1] if self._rank else 0, ends_R[self._rank]
        own = Routing(
            token_N=routing.token_N[first:last],
            weight_N=routing.weight_N[first:last],
            counts_E=counts_RE[self._rank].clone(),
            tokens=routing.tokens,
        )
        return x_TD, own

    def multiply(self, sent: tuple[Tensor, Routing], multiply: Multiply, weights: ExpertWeights) -> Tensor:
        """What all experts make of the tokens, (T, D).

        Args:
            sent: By `send`.
            multiply: A backend's `expert_mlp`.
            weights: Of the experts here.
        """
        x_TD, routing = sent
        assert not torch.is_grad_enabled(), "a sum over processes has no gradient here"
        y_TD = multiply(x_TD, routing, weights).contiguous()
        dist.all_reduce(y_TD, group=self.group)
        return y_TD


def share(model: nn.Module, world: World) -> None:
    """Keep this process's part of the experts of a model that all processes run together.

    Raises:
        ConfigError: something in the model cannot be divided so; nothing was changed.
    """
    if world.ranks == 1:
        return
    keep_own(model, expert_layouts(model, world.ranks), world)
    for module in model.modules():
        if isinstance(module, MoE):
            assert isinstance(module.experts, Experts), type(module.experts)
            module.experts.spread = ExpertShare(world.groups["expert"])


def in_turn(world: World, load: Callable[[], Opened], model_of: Callable[[Opened], nn.Module]) -> Opened:
    """Load a model in one process after the other and share it, so that it is whole in one of them at a time alone.

    Raises:
        TrainingError: another process could not.
        MoietyError: as `load` and `share`.
    """
    found: list[Opened] = []
    for turn in range(world.ranks):
        with world.together():
            if turn == world.rank:
                found.append(load())
                share(model_of(found[0]), world)
    return found[0]


@contextlib.contextmanager
def joined(unable: Mapping[str, object], timeout_s: float = 600.0) -> Iterator[World]:
    """The processes that torchrun started, to share experts.

    Args:
        unable: What was asked for and cannot be had with several, by name.
        timeout_s: After which a silent process ends all.

    Raises:
        UsageError: some of these.
        ConfigError: as `join`.
        TrainingError: a process was lost; it is named.
    """
    processes = int(os.environ["WORLD_SIZE"])
    for name, given in unable.items():
        if given:
            raise UsageError(
                f"--{name} is for one process, and there are {processes}", hint="leave torchrun out"
            )
    with join(MeshOptions(expert_parallel=processes, rank_timeout=timeout_s)) as world:
        yield world
