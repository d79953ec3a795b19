"""Packing a model's weights: a policy says which tensor gets which format, a receipt says what became of each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moiety.errors import CheckFailed, ConfigError
from moiety.formats import format_named
from moiety.formats.numbers import dequantize
from moiety.formats.numbers import quantize as codes_for
from moiety.formats.policy import Policy, kind_of, policy_named
from moiety.formats.tiles import ROWS, PackedWeight, pack_codes
from moiety.model.adapters import refuse_adapters
from moiety.model.slots import Group, Slot, install, packed_matrices, room, slots, source_of
from moiety.model.transformer import Transformer
from moiety.moe.packed import PackedLinear

__all__ = ["Choice", "Line", "Policy", "PolicyFunction", "Receipt", "pack_stack", "policy_named", "quantize"]

# A format, None to keep a tensor as it is, or for a stack of experts one format each.
Choice = str | None | tuple[str, ...]
PolicyFunction = Callable[[str, tuple[int, ...]], Choice]
CHUNK_NUMBERS = 1 << 20  # weights that are rounded at once: candidates for a code are a few times as many
UNPACKABLE = ".kv_b.weight"


class Line(NamedTuple):
    """What became of one tensor.

    Args:
        name: Of the parameter.
        shape: Of the parameter.
        format: What it is packed in, with counts where experts differ; None where it is kept.
        bytes_before: As a parameter; 0 for the head of a tied model, which had none.
        bytes_after: With scales and padding.
        relative_error: Norm of the change over the norm of the weights.
        reason: Why it is kept, or what is special about it.
    """

    name: str
    shape: tuple[int, ...]
    format: str | None
    bytes_before: int
    bytes_after: int
    relative_error: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Every tensor of a model, and what became of it."""

    lines: tuple[Line, ...]

    @property
    def bytes_before(self) -> int:
        """Of the whole model."""
        return sum(line.bytes_before for line in self.lines)

    @property
    def bytes_after(self) -> int:
        """Of the whole model."""
        return sum(line.bytes_after for line in self.lines)

    def by_kind(self) -> dict[tuple[str, str], list[Line]]:
        """Lines by part of the model and by format or reason."""
        found: dict[tuple[str, str], list[Line]] = {}
        for line in self.lines:
            found.setdefault((kind_of(line.name), line.format or f"kept: {line.reason}"), []).append(line)
        return found


@torch.no_grad()
def quantize(model: Transformer, policy: PolicyFunction) -> Receipt:
    """Pack a model in place, one module after the other; each original is dropped when its tiles are made.

    Nothing of the model has a gradient afterwards. What is packed already stays.

    Args:
        model: On the CPU.
        policy: Asked with each parameter's name and shape; a tied head is "head.weight".

    Raises:
        ConfigError: a router, a norm or an embedding is given a format, one half of a feed-forward alone, or there is
            no such format.
        UsageError: the model has an adapter.
        CheckFailed: a tensor was to be packed and is not.
    """
    refuse_adapters(model, "pack the model without it")
    before = {name: (tuple(one.shape), one.nbytes) for name, one in model.state_dict().items()}
    places = slots(model)
    names = {name: shape for name, (shape, _) in before.items()}
    names.update({slot.parameter: (slot.rows, slot.columns) for slot in places.get("head", ())})
    wanted = {name: policy(name, shape) for name, shape in names.items()}
    if names.keys() - before.keys() and wanted["head.weight"] is None:
        del names["head.weight"], wanted["head.weight"]  # it is the embedding, and stays that
    packed_already = packed_matrices(model)
    lines: dict[str, Line] = {}
    for group in places.values():
        if group[0].parameter in wanted and _together(group, wanted):
            lines.update(_pack_module(model, group, wanted, before))
    model.requires_grad_(False)
    packable = {slot.parameter for group in places.values() for slot in group}
    for name, (shape, size_bytes) in before.items():
        if name not in lines:
            form = _packed_in(packed_already, name)
            reason = "packed before" if form else _why_kept(name, shape, wanted[name], name in packable)
            lines[name] = Line(name, shape, form, size_bytes, size_bytes, reason=reason)
    order = {name: place for place, name in enumerate(names)}
    receipt = Receipt(lines=tuple(sorted(lines.values(), key=lambda line: order[line.name])))
    _check(model, receipt, wanted)
    return receipt


def _packed_in(packed: Mapping[str, PackedLinear], name: str) -> str | None:
    """The format, or the formats, of a tensor of tiles; None for any other tensor."""
    owner = name.removesuffix(".tiles")
    inside = [one.form.name for path, one in packed.items() if path == owner or path.startswith(f"{owner}.")]
    return ", ".join(dict.fromkeys(inside)) if name != owner else None


def _why_kept(name: str, shape: tuple[int, ...], wanted: Choice, packable: bool) -> str:
    kind = kind_of(name)
    if len(shape) < 2 or name.endswith("bias"):
        reason = "no matrix"
    elif packable:
        return "by the policy"
    elif kind == "router":
        reason = "it decides where tokens go"
    elif kind == "embedding":
        reason = "its rows are looked up"
    elif name.endswith(UNPACKABLE):
        return "latent attention multiplies its halves apart"
    else:
        return "not known here"
    if wanted is not None:
        raise ConfigError(
            f"the policy packs {name} in {wanted}, but {reason}: it stays as it is",
            hint="give None for routers, norms, biases and the embedding",
        )
    return reason


def _together(group: tuple[Slot, ...], wanted: Mapping[str, Choice]) -> bool:
    """True where all of a module's matrices get a format; some but not all is an error."""
    given = [wanted[slot.parameter] is not None for slot in group]
    if any(given) and not all(given):
        lacking = group[given.index(False)].parameter
        raise ConfigError(
            f"the policy packs a part of {group[0].path} but not {lacking}",
            hint="give it a format too: f32 and bf16 are formats",
        )
    return any(given)


def _pack_module(
    model: Transformer,
    group: tuple[Slot, ...],
    wanted: Mapping[str, Choice],
    before: Mapping[str, tuple[tuple[int, ...], int]],
) -> dict[str, Line]:
    """Pack a module and say what became of its matrices."""
    each = [_for_each_expert(slot, wanted[slot.parameter]) for slot in group]
    members: dict[tuple[str, ...], list[int]] = {}
    for expert, together in enumerate(zip(*each, strict=True)):
        members.setdefault(together, []).append(expert)
    mixed = len(members) > 1
    made = {
        names: room(group, [format_named(name) for name in names], tuple(numbers) if mixed else None)
        for names, numbers in members.items()
    }
    lines: dict[str, Line] = {}
    for place, slot in enumerate(group):
        weight = source_of(model, slot.parameter).detach()
        stack = weight if weight.dim() == 3 else weight[None]
        change = size = 0.0
        for names, numbers in members.items():
            errors = pack_stack(stack, numbers, made[names].weights[slot.leaf])
            change, size = change + errors[0], size + errors[1]
        said = [f"{names[place]} x {len(numbers)}" for names, numbers in members.items()]
        lines[slot.parameter] = Line(
            slot.parameter,
            tuple(weight.shape),
            ", ".join(said) if len(said) > 1 else next(iter(members))[place],
            before[slot.parameter][1] if slot.parameter in before else 0,
            sum(_size_bytes(one, slot.leaf) for one in made.values()),
            math.sqrt(change / size) if size else 0.0,
            "" if slot.parameter in before else "a copy of the embedding",
        )
    install(model, group[0].path, [*made.values()])
    if (
        group[0].leaf and f"{group[0].path}.down_bias" in before
    ):  # the layers that are packed name them otherwise
        for name in (f"{slot.parameter}_bias" for slot in group):
            lines[name] = Line(
                name, before[name][0], None, before[name][1], before[name][1], reason="no matrix"
            )
    return lines


def _for_each_expert(slot: Slot, choice: Choice) -> list[str]:
    names = [choice] * slot.experts if isinstance(choice, str) else list(choice or ())
    if len(names) != slot.experts:
        raise ConfigError(f"the policy gives {len(names)} formats to the {slot.experts} of {slot.parameter}")
    return [format_named(name).name for name in names]


def _size_bytes(group: Group, leaf: str) -> int:
    """Of one projection; what experts are filled up with counts for `down`, the last."""
    own = group.weights[leaf].size_bytes
    if group.tiles is None or leaf != "down":
        return own
    return group.tiles.nbytes - sum(one.size_bytes for one in group.weights.values()) + own


def pack_stack(weight_ERC: Tensor, numbers: Sequence[int], into: PackedWeight) -> tuple[float, float]:
    """Pack some matrices of a stack, a few rows at a time.

    Args:
        weight_ERC: The stack.
        numbers: Which of its matrices.
        into: Whose tiles are filled.

    Returns:
        The sums of squares of their change and of themselves.
    """
    rows, columns = weight_ERC.shape[1:]
    assert (into.experts, into.rows, into.columns) == (len(numbers), rows, columns), weight_ERC.shape
    halves = 2 if into.interleaved else 1
    step = max(CHUNK_NUMBERS // max(columns * halves, 1) // ROWS, 1) * ROWS
    change = size = 0.0
    for place, number in enumerate(numbers):
        by_half = weight_ERC[number].unflatten(0, (halves, -1))
        for start in range(0, rows // halves, step):
            part_RC = by_half[:, start : start + step].flatten(0, 1).float()
            codes = codes_for(part_RC, into.form)
            change += float((dequantize(codes, into.form) - part_RC).square().sum())
            size += float(part_RC.square().sum())
            made = pack_codes(codes, into.form, interleaved=into.interleaved).tiles[0]
            at = start // ROWS * halves
            into.tiles[place, at : at + len(made)] = made
    return change, size


def _check(model: Transformer, receipt: Receipt, wanted: Mapping[str, Choice]) -> None:
    """The model as it is now against the receipt, and the receipt against the policy: nothing is missed or unsaid."""
    now: dict[str, set[str]] = {}
    for path, module in packed_matrices(model).items():
        name = re.sub(r"\.parts\.\d+\.", ".", path)
        name = name if name.endswith((".gate_up", ".up", ".down")) else f"{name}.weight"
        now.setdefault(name, set()).add(module.form.name)
    lines = {line.name: line for line in receipt.lines}
    for name, choice in wanted.items():
        line = lines.get(name)
        if line is None or (line.format is None and choice is not None and not name.endswith(UNPACKABLE)):
            raise CheckFailed(
                f"{name} was to be packed in {choice} and is not",
                hint="this part of the model cannot be packed: let the policy keep it",
            )
        said = {word.partition(" ")[0] for word in (line.format or "").split(", ") if word}
        if said != now.get(name, set()) and not name.endswith(".tiles"):
            raise CheckFailed(f"{name} is in {now.get(name)}, but the receipt says {line.format}")
