"""Low-rank adapters for training (LoRA, arXiv 2106.09685; on packed weights QLoRA, arXiv 2305.14314).

`adapt` freezes a model and puts adapters where the options say, on plain and packed weights alike. Nothing that was
asked for is left out in silence: a target that is nowhere in the model is an error, and `check` names what misses.
"""

from __future__ import annotations

from typing import Any

from moiety.errors import ConfigError, TrainingError
from moiety.formats.policy import kind_of
from moiety.model.adapter_options import LoraOptions
from moiety.model.adapters import ACTIVE, Place, attach, places, routers
from moiety.model.transformer import Transformer
from moiety.moe.adapted import Adapter, OneAdapted
from moiety.moe.packed import PackedLinear

__all__ = ["LoraOptions", "adapt", "check", "table"]


def adapt(model: Transformer, options: LoraOptions, name: str = ACTIVE) -> list[dict[str, Any]]:
    """Freeze a model and give it an adapter that learns; it answers as before until the first step.

    Args:
        model: Changed in place, plain or packed.
        options: Where, and of which rank.
        name: Of the adapter.

    Returns:
        `table` of what learns now.

    Raises:
        ConfigError: a target or layer that the model has not, or a name that is taken.
    """
    chosen = _chosen(model, options)
    made = {}
    for place, spans in chosen:
        rank = options.expert_rank if place.group == "experts" and options.expert_rank else options.rank
        made[place.path, place.leaf] = Adapter(
            place.experts,
            place.columns,
            spans,
            rank,
            options.scale(rank),
            shares_a=options.share_a and place.group == "experts",
        )
    attach(model, name, made)
    if options.router:
        found = routers(model)
        if not found:
            raise ConfigError("the routers are to be trained, and this model has none that learns")
        for parameter in found.values():
            parameter.requires_grad_()
    check(model, options, name)
    return table(model)


def _chosen(model: Transformer, options: LoraOptions) -> list[tuple[Place, list[tuple[int, int]]]]:
    """Places and the rows of each part that gets an A of its own.

    Raises:
        ConfigError: a target or a layer that matches nothing.
    """
    known = places(model)
    groups = {f"{place.group}.{part.name}" for place in known for part in place.parts}
    for target in options.targets:
        if not any(_matches(target, *word.split(".")) for word in groups):
            raise ConfigError(
                f"target {target!r} is nowhere in this model",
                hint=f"it has {', '.join(sorted({place.group for place in known} | groups))}",
            )
    layers = {place.layer for place in known}
    unknown = [layer for layer in options.layers if layer not in layers]
    if unknown:
        raise ConfigError(
            f"layers {unknown} are not in this model", hint=f"it has 0 to {model.config.layers - 1}"
        )
    found = []
    for place in known:
        if options.layers and place.layer not in (None, *options.layers):
            continue
        spans = [
            (part.start, part.stop)
            for part in place.parts
            if any(_matches(target, place.group, part.name) for target in options.targets)
        ]
        if spans:
            found.append((place, spans))
    for target in options.targets:
        if not any(_matches(target, place.group, part.name) for place, _ in found for part in place.parts):
            raise ConfigError(f"target {target!r} is in none of the layers {list(options.layers)}")
    return found


def _matches(target: str, group: str, part: str) -> bool:
    return target in ("all", group, f"{group}.{part}")


def check(model: Transformer, options: LoraOptions, name: str = ACTIVE) -> None:
    """Raise unless every matrix that the options name has its adapter, of all its experts, and learns.

    Raises:
        TrainingError: one has not; it is named.
        ConfigError: as `adapt`.
    """
    for place, spans in _chosen(model, options):
        layer, where = model.get_submodule(place.path), place.parameter
        adapter = layer.leaves(name).get(place.leaf) if isinstance(layer, OneAdapted) else None
        if adapter is None:
            raise TrainingError(f"{where} was to be adapted, and has no adapter {name!r}")
        if list(adapter.spans) != spans or len(adapter.b) != place.experts:
            raise TrainingError(
                f"{where} has an adapter for {len(adapter.b)} of {place.experts} experts and rows "
                f"{list(adapter.spans)}; wanted are rows {spans}"
            )
        still = [kind for kind, one in (("a", adapter.a), ("b", adapter.b)) if not one.requires_grad]
        if still:
            raise TrainingError(f"{where} has an adapter whose {' and '.join(still)} will not learn")
    for router, parameter in routers(model).items():
        if parameter.requires_grad != options.router:
            raise TrainingError(
                f"{router} is {'frozen' if options.router else 'trained'}, against the options"
            )


def table(model: Transformer) -> list[dict[str, Any]]:
    """What learns: for each part of the model its parameters, and those of them and beside them that are trained."""
    sizes: dict[str, list[int]] = {}
    counted: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            frozen = module.experts * module.rows * module.columns
            bias = module.bias
            _count(sizes, path, frozen + (0 if bias is None else bias.numel()), 0)
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                learns, adds = parameter.requires_grad, isinstance(module, Adapter)
                size = parameter.numel()
                _count(sizes, f"{path}.{own}", 0 if adds else size, size if learns else 0)
    total = sum(frozen for frozen, _ in sizes.values())
    trained = sum(learning for _, learning in sizes.values())
    rows = [_row(group, *sizes[group]) for group in sorted(sizes, key=_order)]
    return [*rows, _row("all", total, trained)]


def _count(sizes: dict[str, list[int]], path: str, frozen: int, learning: int) -> None:
    words = [word for word in path.split(".") if word not in ("base", "adapters")]
    kind = kind_of(".".join(words))
    have = sizes.setdefault(kind, [0, 0])
    have[0] += frozen
    have[1] += learning


ORDER = ("embedding", "attention", "router", "experts", "shared", "dense", "norm", "head", "other")


def _order(group: str) -> int:
    return ORDER.index(group)


def _row(group: str, parameters: int, trained: int) -> dict[str, Any]:
    share = trained / parameters if parameters else 0.0
    return {"group": group, "parameters": parameters, "trained": trained, "share": share}
