"""Adapters of a model: which matrices may have one, putting them there, taking them away, merging them.

    places(model)                      what can be adapted
    attach(model, "name", {...})       adapters in their places, where they act
    merge(model, "name")               W + scale B A in the place of W, and no adapter any more

An adapter may also have routers of its own, whole ones: they stand in for the model's while it is attached.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moiety.backends.adapted import Lora
from moiety.errors import ConfigError, UsageError
from moiety.formats.policy import kind_of
from moiety.formats.tiles import PackedWeight, pack, unpack
from moiety.model.transformer import Transformer
from moiety.moe.adapted import (
    AdaptedExperts,
    AdaptedFeedForward,
    AdaptedLinear,
    Adapter,
    OneAdapted,
    adapted_layers,
)
from moiety.moe.experts import Experts, FeedForward
from moiety.moe.packed import MixedExperts, PackedExperts, PackedFeedForward, PackedLinear

__all__ = [
    "ACTIVE",
    "Merged",
    "Part",
    "Place",
    "activate",
    "active",
    "attach",
    "detach",
    "merge",
    "names",
    "places",
    "refuse_adapters",
    "routers",
    "selection_biases",
    "unmerge",
]

ACTIVE = "default"  # the name of an adapter that needs none
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Group = Literal["attention", "experts", "shared", "dense", "head"]
Wrapped = nn.Linear | PackedLinear | FeedForward | PackedFeedForward | Experts | PackedExperts | MixedExperts


class Part(NamedTuple):
    """Rows of a matrix that may have an A of their own, and what to call them."""

    name: str
    start: int
    stop: int


class Place(NamedTuple):
    """A matrix, or a stack of them, that may have an adapter.

    Args:
        path: Of the module.
        leaf: Which of its projections: `weight` of a linear; `up` (gate and up) or `down` of a feed-forward or experts.
        parameter: What holds it in a model that is neither packed nor adapted.
        group: What kind of part it is.
        experts: E, 1 for a matrix.
        columns: Of one matrix.
        parts: Its rows.
        packed: Its weights are packed.
    """

    path: str
    leaf: str
    parameter: str
    group: Group
    experts: int
    columns: int
    parts: tuple[Part, ...]
    packed: bool

    @property
    def rows(self) -> int:
        """Of one matrix."""
        return self.parts[-1].stop

    @property
    def layer(self) -> int | None:
        """Number of its block; None for the head."""
        words = self.path.split(".")
        return int(words[1]) if words[0] == "blocks" else None


def places(model: Transformer) -> list[Place]:
    """Every matrix that may have an adapter, in the order of the model; those that have one too.

    Not the embedding, whose weights are looked up, nor the head of a tied model, which is the embedding; nor routers,
    which are trained whole; nor experts that are read from disk.
    """
    found: list[Place] = []
    inside: set[str] = set()
    for path, module in model.named_modules():
        base = module.base if isinstance(module, OneAdapted) else module
        if path in inside or path.rpartition(".")[0] in inside:
            inside.add(path)
        elif isinstance(base, Wrapped) and _is_place(model, path, base):
            inside.add(path)
            found += _places_of(model, path, base)
    return found


def _is_place(model: Transformer, path: str, base: Wrapped) -> bool:
    if isinstance(base, nn.Linear | PackedLinear):
        return kind_of(path) == "attention" or (path == "head" and not model.config.tied)
    return True


def _places_of(model: Transformer, path: str, base: Wrapped) -> Iterator[Place]:
    kind = kind_of(path)
    assert kind in ("attention", "experts", "shared", "dense", "head"), path
    if isinstance(base, nn.Linear | PackedLinear):
        packed = isinstance(base, PackedLinear)
        rows, columns = (base.rows, base.columns) if isinstance(base, PackedLinear) else base.weight.shape
        parts = _linear_parts(model, path, rows)
        yield Place(path, "weight", f"{path}.weight", kind, 1, columns, parts, packed)
        return
    sizes, up_name, experts = _sizes(base)
    packed = not isinstance(base, Experts | FeedForward)
    for leaf, name, (rows, columns) in zip(("up", "down"), (up_name, "down"), sizes, strict=True):
        parts = (Part(name, 0, rows),)
        if name == "gate_up" and kind != "experts":
            parts = (Part("gate", 0, rows // 2), Part("up", rows // 2, rows))
        yield Place(path, leaf, f"{path}.{name}", kind, experts, columns, parts, packed)


def _linear_parts(model: Transformer, path: str, rows: int) -> tuple[Part, ...]:
    name = path.rpartition(".")[2]
    if name != "qkv":
        return (Part(name, 0, rows),)
    attention = model.config.attention
    query, one = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return (Part("q", 0, query), Part("k", query, query + one), Part("v", query + one, rows))


def _sizes(base: nn.Module) -> tuple[list[tuple[int, int]], str, int]:
    """Rows and columns of both projections, the first one's name, and E."""
    if isinstance(base, MixedExperts):
        sizes, up_name, _ = _sizes(base.parts[0])
        return sizes, up_name, base.count
    if isinstance(base, PackedExperts | PackedFeedForward):
        parts = [base.get_submodule(name) for name in (base.up_name, "down")]
        packed = [part for part in parts if isinstance(part, PackedLinear)]
        return [(part.rows, part.columns) for part in packed], base.up_name, base.down.experts
    assert isinstance(base, Experts | FeedForward), type(base)
    shapes = [base.get_parameter(name).shape for name in (base.up_name, "down")]
    return (
        [(shape[-2], shape[-1]) for shape in shapes],
        base.up_name,
        base.count if isinstance(base, Experts) else 1,
    )


def routers(model: Transformer) -> dict[str, nn.Parameter]:
    """Every router's parameters by name, with the gates of shared experts: what an adapter may have of its own."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if {"gate", "gate_noise", "shared_gate"} & set(name.split("."))
    }


def selection_biases(model: Transformer) -> dict[str, Tensor]:
    """By name, of those routers that have one."""
    return {own: one for own, one in model.named_buffers() if own.endswith("feed_forward.selection_bias")}


def names(model: Transformer) -> list[str]:
    """The adapters that are attached, in order."""
    return list(dict.fromkeys(name for _, layer in adapted_layers(model) for name in layer.adapters))


def active(model: Transformer) -> str:
    """The adapter that acts on every row; empty for none."""
    return next((layer.active for _, layer in adapted_layers(model) if layer.active), "")


def refuse_adapters(model: nn.Module, what: str) -> None:
    """Raise UsageError where a model has adapters and something would leave them out."""
    found = sorted({name for _, layer in adapted_layers(model) for name in layer.adapters})
    if found:
        raise UsageError(
            f"the model has {'adapters' if len(found) > 1 else 'the adapter'} {', '.join(found)}; {what}",
            hint="merge it (`moiety adapter merge`), or save the adapter alone (`moiety.model.adapter_files`)",
        )


def attach(model: Transformer, name: str, adapters: Mapping[tuple[str, str], Adapter]) -> None:
    """Put an adapter in its places and let it act.

    Args:
        model: Changed in place; all of its own weights are frozen.
        name: Letters, digits, - and _.
        adapters: By path and leaf of a `Place`.

    Raises:
        ConfigError: the name is taken or is none.
        UsageError: a path and leaf that is no place here, or of another shape.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"an adapter is called {name!r}; allowed are letters, digits, - and _, at most 64")
    if name in names(model):
        raise ConfigError(f"there is an adapter {name!r} already", hint="detach it, or choose another name")
    known = {(place.path, place.leaf): place for place in places(model)}
    for key, adapter in adapters.items():
        _check(key, known.get(key), adapter)
    mine = {id(one) for _, layer in adapted_layers(model) for one in layer.adapters.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in mine)
    by_path: dict[str, dict[str, Adapter]] = {}
    for (path, leaf), adapter in adapters.items():
        by_path.setdefault(path, {})[leaf] = adapter
    for path, leaves in by_path.items():
        _wrapped(model, path).add(name, leaves)
    activate(model, name)


def _check(key: tuple[str, str], place: Place | None, adapter: Adapter) -> None:
    if place is None:
        raise UsageError(
            f"{'.'.join(key)} cannot have an adapter in this model",
            hint="`moiety adapter show MODEL` lists what can; experts that are read from disk cannot",
        )
    wanted, found = (place.experts, place.columns), (len(adapter.b), adapter.a.shape[2])
    if wanted != found or adapter.spans[-1][1] > place.rows:
        raise UsageError(
            f"{'.'.join(key)} is {place.experts} x {place.rows} x {place.columns}; the adapter is for "
            f"{found[0]} experts, {found[1]} columns and rows up to {adapter.spans[-1][1]}",
            hint="it was trained on another model",
        )


def _wrapped(model: Transformer, path: str) -> OneAdapted:
    """The layer at a path with room for adapters."""
    module = model.get_submodule(path)
    if isinstance(module, OneAdapted):
        return module
    made: OneAdapted
    if isinstance(module, nn.Linear | PackedLinear):
        made = AdaptedLinear(module)
    elif isinstance(module, FeedForward | PackedFeedForward):
        made = AdaptedFeedForward(module)
    else:
        assert isinstance(module, Experts | PackedExperts | MixedExperts), (path, type(module))
        made = AdaptedExperts(module)
    _put(model, path, made.train(module.training))
    return made


def _put(model: Transformer, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def activate(model: Transformer, name: str) -> None:
    """Let an adapter act on every row; "" lets none.

    Raises:
        ConfigError: there is none of this name.
    """
    if name and name not in names(model):
        raise ConfigError(
            f"there is no adapter {name!r}", hint=f"there is {', '.join(names(model)) or 'none at all'}"
        )
    for _, layer in adapted_layers(model):
        layer.active = name


def detach(model: Transformer, name: str) -> None:
    """Take an adapter away; a layer without any is as it was before."""
    for path, layer in list(adapted_layers(model)):
        if name in layer.adapters:
            del layer.adapters[name]
        if layer.active == name:
            layer.active = ""
        if not layer.adapters:
            _put(model, path, layer.base)


@dataclass(frozen=True, kw_only=True, eq=False)
class Merged:
    """What merging did.

    Args:
        modules: What stood in each place before, adapter and all, which `unmerge` puts back.
        errors: Of packed weights that were rounded again, by place: root mean square of what rounding lost, over
            that of what the adapter added. At 1 nothing is left of it.
    """

    modules: Mapping[str, OneAdapted]
    errors: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def merge(model: Transformer, name: str, *, requantize: bool = False) -> Merged:
    """Put W + scale B A in the place of W everywhere, without any adapter left.

    Args:
        model: Changed in place; the weights as they were are in what comes back.
        name: Which adapter.
        requantize: Unpack packed weights, add, and round them again to their own format.

    Raises:
        ConfigError: there is none of this name.
        UsageError: there are others too, or packed weights and no `requantize`.
    """
    present = names(model)
    if present != [name]:
        raise (ConfigError if name not in present else UsageError)(
            f"{name!r} is to be merged; the model has {', '.join(present) or 'no adapter'}",
            hint="attach the one that is wanted alone",
        )
    packed = [place.parameter for place in places(model) if place.packed]
    layers = dict(adapted_layers(model))
    mine = [one for one in packed if one.rpartition(".")[0] in layers]
    if mine and not requantize:
        raise UsageError(
            f"{mine[0]} is packed: merging rounds it again, and what the adapter learnt may be lost",
            hint="merge into the model that is not packed, serve the adapter beside it, or allow it (--requantize)",
        )
    errors: dict[str, float] = {}
    for path, layer in layers.items():
        _put(model, path, _merged(path, layer, name, errors).train(layer.training))
    return Merged(modules=layers, errors=errors)


def unmerge(model: Transformer, merged: Merged) -> None:
    """Put back what `merge` took, bit for bit."""
    for path, layer in merged.modules.items():
        _put(model, path, layer)


def _merged(path: str, layer: OneAdapted, name: str, errors: dict[str, float]) -> nn.Module:
    """A layer like `layer.base` with the adapter in its weights."""
    base, leaves = layer.base, layer.leaves(name)
    loras = {leaf: one.lora(one.a.dtype) for leaf, one in leaves.items()}
    if isinstance(base, PackedLinear):
        return _repacked(base, loras["weight"], path, errors)
    if isinstance(base, PackedExperts | PackedFeedForward | MixedExperts):
        return _repacked_pair(base, loras, path, errors)
    if isinstance(base, nn.Linear):
        made: nn.Module = nn.Linear(1, 1, bias=base.bias is not None, device="meta")
        made.weight, made.bias = _added(base.weight, loras["weight"]), base.bias
        return made
    assert isinstance(base, Experts | FeedForward), type(base)
    with torch.device("meta"):
        made = _like(base)
    for own, parameter in base.named_parameters():
        lora = loras.get("down" if own == "down" else "up" if own == base.up_name else "")
        setattr(made, own, parameter if lora is None else _added(parameter, lora))
    return made


def _like(base: Experts | FeedForward) -> nn.Module:
    """An empty layer of the same kind."""
    options: dict[str, Any] = {
        "activation": base.activation,
        "activation_limit": base.activation_limit,
        "gated": base.gated,
    }
    bias = base.down_bias is not None
    if isinstance(base, Experts):
        experts, d_model, d_ff = base.down.shape
        return Experts(d_model, d_ff, experts, bias=bias, backend=base.backend, **options)
    return FeedForward(*base.down.shape, bias=bias, **options)


def _added(weight: Tensor, lora: Lora) -> nn.Parameter:
    """W + scale B A, expert by expert, rounded once to W's dtype."""
    made = torch.empty_like(weight)
    stack, target = (weight, made) if weight.dim() == 3 else (weight[None], made[None])
    for expert in range(len(stack)):
        delta = _one(lora, expert).dense(stack.shape[1])[0]
        target[expert] = (stack[expert].to(torch.promote_types(weight.dtype, delta.dtype)) + delta).to(
            weight.dtype
        )
    return nn.Parameter(made, requires_grad=False)


def _one(lora: Lora, expert: int) -> Lora:
    return lora._replace(a=lora.a_of(expert)[None], b=lora.b[expert : expert + 1])


def _repacked(
    layer: PackedLinear, lora: Lora, path: str, errors: dict[str, float], numbers: Sequence[int] | None = None
) -> PackedLinear:
    """The same format with the additions, one matrix at a time; what rounding lost goes to `errors`."""
    weight = layer.weight
    tiles, lost, added = torch.empty_like(weight.tiles), 0.0, 0.0
    for place in range(weight.experts):
        before = unpack(_only(weight, place))[0]
        delta = _one(lora, place if numbers is None else numbers[place]).dense(weight.rows)[0]
        made = pack(before + delta, weight.form, interleaved=weight.interleaved)
        tiles[place] = made.tiles[0]
        lost += float((unpack(made)[0] - before - delta).square().sum())
        added += float(delta.square().sum())
    errors[path] = max(errors.get(path, 0.0), (lost / added) ** 0.5 if added else 0.0)
    return PackedLinear(_with(weight, tiles), layer.bias)


def _only(weight: PackedWeight, expert: int) -> PackedWeight:
    return _with(weight, weight.tiles[expert : expert + 1])


def _with(weight: PackedWeight, tiles: Tensor) -> PackedWeight:
    return PackedWeight(
        form=weight.form,
        experts=len(tiles),
        rows=weight.rows,
        columns=weight.columns,
        interleaved=weight.interleaved,
        tiles=tiles,
    )


def _repacked_pair(
    base: PackedExperts | PackedFeedForward | MixedExperts,
    loras: Mapping[str, Lora],
    path: str,
    errors: dict[str, float],
    numbers: Sequence[int] | None = None,
) -> nn.Module:
    if isinstance(base, MixedExperts):
        parts = []
        for part, mine in zip(base.parts, base.numbers, strict=True):
            assert isinstance(part, PackedExperts), type(part)
            one = _repacked_pair(part, loras, path, errors, mine)
            assert isinstance(one, PackedExperts), type(one)
            parts.append(one)
        return MixedExperts(parts, base.numbers)
    made = []
    for leaf, name in (("up", base.up_name), ("down", "down")):
        layer = base.get_submodule(name)
        assert isinstance(layer, PackedLinear), type(layer)
        found = loras.get(leaf)
        if found is None:
            made.append(PackedLinear(layer.weight, layer.bias))
        else:
            made.append(_repacked(layer, found, f"{path}.{name}", errors, numbers))
    kind = PackedExperts if isinstance(base, PackedExperts) else PackedFeedForward
    return kind(*made, activation=base.activation, gated=base.gated, activation_limit=base.activation_limit)
