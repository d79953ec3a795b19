"""Where a model may hold packed weights, and how they get there."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moiety.formats import FORMATS, Format
from moiety.formats.policy import Kind, kind_of
from moiety.formats.tiles import PackedWeight, Projection, expert_bytes, pack, projections_in
from moiety.model.transformer import HeadBias, Transformer
from moiety.moe.experts import Experts, FeedForward
from moiety.moe.packed import MixedExperts, PackedExperts, PackedFeedForward, PackedLinear

__all__ = [
    "Group",
    "Kind",
    "Slot",
    "install",
    "install_stored",
    "kind_of",
    "packed_matrices",
    "pair_of",
    "room",
    "slots",
    "source_of",
]


class Slot(NamedTuple):
    """A matrix, or a stack of them, that may be packed.

    Args:
        path: The module that is replaced.
        leaf: Which of its projections: `gate_up`, `up` or `down`; empty for an `nn.Linear`.
        experts: E, 1 for a matrix.
        rows: Of one matrix.
        columns: Of one matrix.
        interleaved: Gate and up rows alternate in tiles.
    """

    path: str
    leaf: str
    experts: int
    rows: int
    columns: int
    interleaved: bool

    @property
    def parameter(self) -> str:
        """The parameter that holds it while it is not packed."""
        return f"{self.path}.{self.leaf or 'weight'}"


class Group(NamedTuple):
    """Packed weights of a module.

    Args:
        weights: By leaf.
        numbers: The experts they are of; None means all.
        tiles: Of routed experts the buffer that all weights are views of; None where they are not yet.
    """

    weights: Mapping[str, PackedWeight]
    numbers: tuple[int, ...] | None = None
    tiles: Tensor | None = None


def slots(model: Transformer) -> dict[str, tuple[Slot, ...]]:
    """What can be packed and is not, by the path of the module that goes as a whole.

    Routers stay out, and so does `kv_b` of latent attention: its halves are multiplied apart from each other.
    The head of a tied model is one too, though it has no parameter of its own.
    """
    found: dict[str, tuple[Slot, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts | FeedForward):
            leaves = (module.up_name, "down")
            weights = [module.get_parameter(leaf) for leaf in leaves]
            found[path] = tuple(
                Slot(path, leaf, *_stack(weight), interleaved=leaf == "gate_up")
                for leaf, weight in zip(leaves, weights, strict=True)
            )
        elif isinstance(module, nn.Linear) and kind_of(path) == "attention" and not path.endswith(".kv_b"):
            found[path] = (Slot(path, "", *_stack(module.weight), interleaved=False),)
    if not isinstance(model.head, PackedLinear):
        found["head"] = (Slot("head", "", *_stack(source_of(model, "head.weight")), interleaved=False),)
    return found


def _stack(weight: Tensor) -> tuple[int, int, int]:
    rows, columns = weight.shape[-2:]
    return (weight.shape[0] if weight.dim() == 3 else 1), rows, columns


def source_of(model: Transformer, parameter: str) -> Tensor:
    """The weights of a slot; a tied head's are the embedding's."""
    if parameter == "head.weight" and not isinstance(model.head, nn.Linear):
        return model.embed.weight
    return model.get_parameter(parameter)


def room(group: Sequence[Slot], forms: Sequence[Format], numbers: tuple[int, ...] | None = None) -> Group:
    """Place for what a module's matrices are packed in, all of its experts or some: tiles without meaning."""
    parts = [
        Projection(form, slot.rows, slot.columns, slot.interleaved)
        for slot, form in zip(group, forms, strict=True)
    ]
    leaves, experts = [slot.leaf for slot in group], len(numbers) if numbers else group[0].experts
    if kind_of(group[0].path) == "experts":
        tiles = torch.zeros(experts, expert_bytes(parts), dtype=torch.uint8)
        return Group(dict(zip(leaves, projections_in(tiles, parts), strict=True)), numbers, tiles)
    weights = {}
    for leaf, part in zip(leaves, parts, strict=True):
        alone = torch.empty(part.shape(experts), dtype=torch.uint8)
        weights[leaf] = PackedWeight(**part._asdict(), experts=experts, tiles=alone)
    return Group(weights, numbers)


def install(model: Transformer, path: str, groups: Sequence[Group]) -> None:
    """Put packed weights in the place of a module, whose biases and mode they take over; it is dropped."""
    if path == "head":
        bias = model.head.bias if isinstance(model.head, nn.Linear | HeadBias) else None
        model.head = PackedLinear(groups[0].weights[""], bias).train(model.training)
        return
    module = model.get_submodule(path)
    made: nn.Module
    if isinstance(module, nn.Linear):
        made = PackedLinear(groups[0].weights[""], module.bias)
    else:
        assert isinstance(module, Experts | FeedForward), (path, type(module))
        parts = [pair_of(module, group) for group in groups]
        made = parts[0]
        if groups[0].numbers is not None:
            experts = [part for part in parts if isinstance(part, PackedExperts)]
            made = MixedExperts(experts, [group.numbers or () for group in groups])
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, made.train(module.training))


def pair_of(module: Experts | FeedForward, group: Group) -> PackedExperts | PackedFeedForward:
    """What stands for some experts, or for a dense feed-forward: their packed weights, with the biases."""
    made: list[PackedLinear] = []
    for leaf in (module.up_name, "down"):
        bias = getattr(module, f"{leaf}_bias", None)
        if bias is not None and group.numbers is not None:
            bias = bias[list(group.numbers)]
        made.append(PackedLinear(group.weights[leaf], bias))
    options: dict[str, Any] = {
        "activation": module.activation,
        "gated": module.gated,
        "activation_limit": module.activation_limit,
    }
    if isinstance(module, Experts):
        return PackedExperts(*made, tiles=group.tiles, **options)
    return PackedFeedForward(*made, **options)


def install_stored(model: Transformer, stored: MutableMapping[str, PackedWeight]) -> None:
    """Put weights that were stored in blocks where they belong, by parameter; each is taken out of `stored`.

    Where only one of a feed-forward's projections was, the other one is packed as the float32 numbers that it is.
    """
    for path, group in slots(model).items():
        if any(slot.parameter in stored for slot in group):
            weights = {}
            for slot in group:
                if slot.parameter in stored:
                    weights[slot.leaf] = stored.pop(slot.parameter)
                    continue
                source = source_of(model, slot.parameter).detach()
                weights[slot.leaf] = pack(source, FORMATS["f32"], interleaved=slot.interleaved)
            install(model, path, [Group(weights)])
    model.requires_grad_(False)


def packed_matrices(model: Transformer) -> dict[str, PackedLinear]:
    """Everything packed in a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
