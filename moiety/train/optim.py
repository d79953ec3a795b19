"""AdamW with named groups, and schedules that are functions of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from moiety.errors import ConfigError
from moiety.train.options import SCHEDULES, ScheduleName

__all__ = ["build_optimizer", "learning_rate", "set_learning_rate"]


def build_optimizer(
    model: nn.Module,
    *,
    weight_decay: float,
    betas: tuple[float, float],
    router_scale: float,
    down_scale: float = 1.0,
    down_scales: Mapping[int, float] | None = None,
    factors: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over four groups: matrices with decay, norms and biases without, routers, down.

    Each group has `names`, the parameters' names in order, and `scale`, its factor on the learning rate.

    Args:
        model: Its parameters that require a gradient are optimized.
        weight_decay: On matrices only; routers and vectors have none.
        betas: Decay of the two moments.
        router_scale: Factor on the learning rate of routers (`gate.weight`, `gate.bias`).
        down_scale: Factor on that of the down projections of feed-forwards and routed experts, which decay too.
        down_scales: The same in layers where it is another one.
        factors: A further one of single parameters, by name; their groups are split by it.
    """
    layers = {f"down {layer}": (weight_decay, scale) for layer, scale in (down_scales or {}).items()}
    settings = {
        "matrices": (weight_decay, 1.0),
        "vectors": (0.0, 1.0),
        "routers": (0.0, router_scale),
        "down": (weight_decay, down_scale),
        **layers,
    }
    groups: dict[tuple[str, float], list[tuple[str, nn.Parameter]]] = {(group, 1.0): [] for group in settings}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _group(name, parameter)
            own = f"{group} {name.split('.')[1]}" if group == "down" else group
            key = own if own in settings else group, (factors or {}).get(name, 1.0)
            groups.setdefault(key, []).append((name, parameter))
    return torch.optim.AdamW(
        [
            {
                "params": [parameter for _, parameter in members],
                "names": [name for name, _ in members],
                "group": group if factor == 1 else f"{group} x{factor:.6g}",
                "weight_decay": settings[group][0],
                "scale": settings[group][1] * factor,
            }
            for (group, factor), members in groups.items()
            if members
        ],
        lr=0.0,
        betas=betas,
        fused=True,
    )


def _group(name: str, parameter: nn.Parameter) -> str:
    if ".gate." in f".{name}" or ".gate_noise." in f".{name}":
        return "routers"
    if parameter.dim() == 1 or name.endswith("bias"):
        return "vectors"
    return "down" if name.endswith(("feed_forward.down", "feed_forward.experts.down")) else "matrices"


def learning_rate(
    step: int, *, schedule: ScheduleName, peak: float, steps: int, warmup: int, final: float, decay: float
) -> float:
    """The learning rate of one step, counted from 0.

    Args:
        step: Which step.
        schedule: "cosine" (arXiv 1608.03983) falls from the end of the warm-up on; "wsd" (arXiv 2404.06395)
            stays at the peak and falls linearly over the last `decay` of the run.
        peak: Highest rate.
        steps: Steps of the whole run.
        warmup: Steps of linear rise from 0.
        final: Rate at the end, as a share of the peak.
        decay: Share of the run that "wsd" spends falling.

    Raises:
        ConfigError: no such schedule.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(steps - warmup, 1)
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    if schedule == "wsd":
        falling = max(round(steps * decay), 1)
        progress = (step - (steps - falling)) / falling
        return peak * (1 - (1 - final) * min(max(progress, 0.0), 1.0))
    raise ConfigError(f"there is no schedule {schedule!r}", hint=f"there are {', '.join(SCHEDULES)}")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
