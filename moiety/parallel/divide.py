"""Which parameters of a model are cut into parts for several processes, and cutting them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from moiety.errors import ConfigError
from moiety.moe.experts import Experts
from moiety.moe.layer import MoE
from moiety.parallel.mesh import Layout, World

__all__ = ["expert_layouts", "keep_own", "modules"]


def modules(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, Any]]:
    """Every module of a kind, with its name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def expert_layouts(model: nn.Module, ranks: int) -> dict[str, Layout]:
    """Of every parameter of routed experts, which go to so many processes in equal numbers.

    Raises:
        ConfigError: some cannot be divided so.
    """
    found: dict[str, Layout] = {}
    for name, moe in modules(model, MoE):
        found |= _layouts_of(f"{name}.experts", moe, ranks)
    return found


def _layouts_of(name: str, moe: MoE, ranks: int) -> dict[str, Layout]:
    experts = moe.experts
    if not isinstance(experts, Experts):
        raise ConfigError(
            f"{name} are {type(experts).__name__}, which stay in one process",
            hint="expert_parallel is for plain experts",
        )
    if experts.count % ranks:
        raise ConfigError(
            f"{name} are {experts.count}, which {ranks} processes cannot share evenly",
            hint="choose an expert_parallel that divides the number of experts",
        )
    if moe.capacity is not None and moe.capacity.queues:
        raise ConfigError(
            "overflow policy 'queue' takes other numbers of turns in every process",
            hint="use another policy, or expert_parallel 1",
        )
    if moe.router.needs.dense_gradient:
        raise ConfigError(
            f"{type(moe.router).__name__} multiplies experts that a token did not choose",
            hint="use the router's own gradient, or expert_parallel 1",
        )
    return {f"{name}.{one}": Layout("expert") for one, _ in experts.named_parameters()}


def keep_own(model: nn.Module, layouts: Mapping[str, Layout], world: World) -> None:
    """Cut these parameters to the parts of this process, and let the world know."""
    world.layouts.update(layouts)
    for name in layouts:
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        whole = owner.get_parameter(last)
        part = nn.Parameter(world.cut(name, whole.detach()).clone(), requires_grad=whole.requires_grad)
        owner.register_parameter(last, part)
