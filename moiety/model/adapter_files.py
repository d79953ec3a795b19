"""Adapters on disk, as PEFT (0.21) writes and reads them: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of transformers' modules. A linear has `lora_A.weight` (R, D) and `lora_B.weight` (F, R). A stack of
experts in one parameter (`target_parameters`) has them under its module, (E R, D) expert after expert and (F, R E) with
the experts side by side within each rank; where several parameters of a module have one, all but the last lie under
further `base_layer`s. Older files have experts one by one, as linears. Routers that were trained lie there whole.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moiety import storage
from moiety.backends.adapted import Lora
from moiety.errors import ConfigError, FormatError, UsageError
from moiety.model import layout
from moiety.model.adapters import ACTIVE, Place, attach, names, places, routers, selection_biases
from moiety.model.families import FAMILIES, OWN, Family, Piece, family_for
from moiety.model.tensor_file import Entry, read_tensors, write_tensors
from moiety.model.transformer import Transformer
from moiety.moe.adapted import Adapter, OneAdapted

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Layout",
    "Read",
    "apply",
    "family_at",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Layout = Literal["fused", "linears"]
# Stacks that transformers keeps with inputs before outputs, and PEFT takes for the other way round: A is B and B is A.
SWAPPED = ("llama4_text",)
# Linears by whose names PEFT means experts, as transformers called them before; it takes others as parameters.
RENAMED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# What PEFT may ask for beyond plain LoRA, with the values that mean nothing is asked.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """An adapter that was read.

    Args:
        adapters: By path and leaf of their places.
        routers: Parameters of routers that it brings, by our names.
        config: What its file says.
    """

    adapters: Mapping[tuple[str, str], Adapter]
    routers: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


class _Slot(NamedTuple):
    """Where a piece of a place's matrices lies: `key` without `.lora_A.weight`, `target` as PEFT's config names it."""

    key: str
    target: str
    piece: Piece
    place: Place

    @property
    def is_stack(self) -> bool:
        """All experts in one parameter."""
        return len(self.piece.shape) == 3

    @property
    def is_parameter(self) -> bool:
        """One of the config's `target_parameters`."""
        return self.target == self.piece.theirs


def family_at(path: str | Path) -> Family | None:
    """The family that the `config.json` of a folder names; None where it names none that is known, or there is none."""
    file = Path(path) / "config.json"
    return FAMILIES.get(str(storage.read_json(file).get("model_type"))) if file.is_file() else None


# Names


def _pieces(family: Family, model: Transformer, place: Place, way: Layout) -> list[Piece]:
    stack = place.parameter.rpartition(".")[0].endswith("experts")
    shape = (place.experts, place.rows, place.columns) if stack else (place.rows, place.columns)
    found = [*family.pieces(model.config, {place.parameter: shape}, in_memory=way == "fused")]
    if family.whole:  # there a piece is all of a tensor, along its first axis
        found = [one._replace(start=0, stop=place.rows) for one in found]
    return found


def _slots(family: Family, model: Transformer, chosen: Sequence[Place], way: Layout) -> list[_Slot]:
    """Where the pieces of these places lie; of several stacks in a module the first lies deepest."""
    found: list[tuple[Place, Piece]] = []
    for place in chosen:
        for piece in _pieces(family, model, place, way):
            if place.group == "experts" and piece.expert is None and len(piece.shape) != 3:
                raise UsageError(
                    f"experts of {family.model_type} are one matrix in transformers, for which PEFT has no layout",
                    hint="merge the adapter into the model (`moiety adapter merge`)",
                )
            found.append((place, piece))
    stacks: dict[str, list[str]] = {}
    for _, piece in found:
        if len(piece.shape) == 3:
            stacks.setdefault(piece.theirs.rpartition(".")[0], []).append(piece.theirs)
    slots = []
    for place, piece in found:
        if len(piece.shape) == 3:
            module = piece.theirs.rpartition(".")[0]
            deeper = len(stacks[module]) - 1 - stacks[module].index(piece.theirs)
            slots.append(_Slot(module + ".base_layer" * deeper, piece.theirs, piece, place))
        else:
            name = piece.theirs.removesuffix(".weight")
            renamed = (
                model.config.moe is not None and name.rpartition(".")[2] in RENAMED and piece.expert is None
            )
            slots.append(_Slot(name, piece.theirs if renamed else name, piece, place))
    return slots


def _short(wanted: Sequence[str], others: Sequence[str]) -> list[str]:
    """Names as PEFT matches them, by their ends: the last words where those mean these and no others, else all."""

    def leaf(name: str) -> str:
        return ".".join(name.split(".")[-2 if name.endswith(".weight") else -1 :])

    spoiled = {leaf(name) for name in others}
    return sorted({name if leaf(name) in spoiled else leaf(name) for name in wanted})


# Writing


def _factors(lora: Lora, expert: int, piece: Piece) -> tuple[Tensor, Tensor] | None:
    """A (r, D) and B (rows, r) of the rows of a piece; parts with an A of their own are put beside each other."""
    a_parts, b_parts = [], []
    for span, columns, b_FR in lora.parts(expert):
        start, stop = max(span.start, piece.start), min(span.stop, piece.stop)
        if start < stop:
            b = b_FR.new_zeros(piece.stop - piece.start, lora.rank)
            b[start - piece.start : stop - piece.start] = b_FR[start - span.start : stop - span.start]
            a_parts.append(lora.a_of(expert)[columns])
            b_parts.append(b)
    if not a_parts:
        return None
    b = torch.cat(b_parts, dim=1)
    if piece.interleaved:
        b = b.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    return torch.cat(a_parts), b


def _stored(lora: Lora, slot: _Slot, swapped: bool) -> tuple[Tensor, Tensor] | None:
    """`lora_A` and `lora_B` of a slot."""
    piece = slot.piece
    if not slot.is_stack:
        return _factors(lora, piece.expert or 0, piece)
    found = [_factors(lora, expert, piece) for expert in range(slot.place.experts)]
    both = [one for one in found if one is not None]
    if not both:
        return None
    a_ERD, b_EFR = torch.stack([a for a, _ in both]), torch.stack([b for _, b in both])
    if swapped:
        a_ERD, b_EFR = b_EFR.transpose(1, 2), a_ERD.transpose(1, 2)
    return a_ERD.flatten(0, 1), b_EFR.permute(1, 2, 0).flatten(1)


@torch.no_grad()
def save_adapter(
    model: Transformer,
    path: str | Path,
    name: str = ACTIVE,
    *,
    family: Family | None = None,
    experts: Layout = "fused",
    base: str = "",
) -> None:
    """Write an adapter, and the routers that are trained; an adapter already at `path` is replaced in one step.

    Args:
        model: With the adapter.
        path: A folder.
        name: Which adapter.
        family: Whose names; None is the one that the model would be saved as.
        experts: Stacks as one parameter, or one expert after the other, as linears.
        base: What the adapter belongs to, for `base_model_name_or_path`.

    Raises:
        ConfigError: there is no adapter of this name.
        UsageError: PEFT has no layout for it.
        StorageError: the system refused.
    """
    if name not in names(model):
        raise ConfigError(
            f"there is no adapter {name!r}", hint=f"there is {', '.join(names(model)) or 'none'}"
        )
    family = family or family_for(model.config).family
    adapters: dict[tuple[str, str], Adapter] = {}
    known = {place.parameter: place for place in places(model)}
    for place in known.values():
        layer = model.get_submodule(place.path)
        leaves = layer.leaves(name) if isinstance(layer, OneAdapted) else {}
        if place.leaf in leaves:
            adapters[place.path, place.leaf] = leaves[place.leaf]
    mine = [place for place in known.values() if (place.path, place.leaf) in adapters]
    tensors: dict[str, Tensor] = {}
    written: list[tuple[_Slot, int, float]] = []
    for slot in _slots(family, model, mine, experts):
        adapter = adapters[slot.place.path, slot.place.leaf]
        lora = adapter.lora(adapter.a.dtype)
        swapped = slot.is_stack and family.model_type in SWAPPED
        both = _stored(lora, slot, swapped)
        if both is not None:
            for kind, one in zip("AB", both, strict=True):
                tensors[f"{PREFIX}{slot.key}.lora_{kind}.weight"] = one.contiguous()
            rank = len(both[0]) // (slot.place.experts if slot.is_stack else 1)
            written.append((slot, rank, lora.scale))
    saved: dict[str, Tensor] = {own: one for own, one in routers(model).items() if one.requires_grad}
    if saved:  # PEFT wants all that a router's module has
        saved |= selection_biases(model)
    modules = _router_names(family, model, saved, tensors)
    config = _config(family, model, written, experts, modules, base)
    entries = {key: Entry(tuple(one.shape), one.dtype, one.detach) for key, one in tensors.items()}
    with storage.new_folder(
        path, needed_bytes=sum(one.size_bytes for one in entries.values()) + (1 << 16)
    ) as folder:
        layout.write_json(folder / CONFIG, config)
        write_tensors(folder / WEIGHTS, entries)


def _router_names(
    family: Family, model: Transformer, saved: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> list[str]:
    """Put routers among the tensors; the modules that PEFT must know as saved whole."""
    modules = set()
    shapes = {own: tuple(one.shape) for own, one in saved.items()}
    for piece in family.pieces(model.config, shapes, in_memory=True):
        tensors[PREFIX + piece.theirs] = saved[piece.ours].detach().clone()
        modules.add(re.sub(r"^.*\.layers\.\d+\.|^blocks\.\d+\.", "", piece.theirs.rpartition(".")[0]))
    return sorted(modules)


def _config(
    family: Family,
    model: Transformer,
    written: Sequence[tuple[_Slot, int, float]],
    experts: Layout,
    routers_of: Sequence[str],
    base: str,
) -> dict[str, Any]:
    """What `adapter_config.json` says; ranks and scales that are not those of most are named one by one."""
    every = _slots(family, model, _sayable(family, model, experts), experts)
    targets = {slot.target for slot, _, _ in written}
    others = [slot for slot in every if slot.target not in targets]
    kinds = [(rank, scale) for _, rank, scale in written]
    rank, scale = max(set(kinds), key=kinds.count)
    odd = [
        (slot.target, *kind) for (slot, *_), kind in zip(written, kinds, strict=True) if kind != (rank, scale)
    ]
    linears = [slot.target for slot, _, _ in written if not slot.is_parameter]
    modules = [slot.piece.theirs.removesuffix(".weight") for slot in every if slot.target not in linears]
    parameters = [slot.target for slot, _, _ in written if slot.is_parameter]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank * scale,
        "use_rslora": False,
        "rank_pattern": {re.escape(target): one for target, one, _ in odd},
        "alpha_pattern": {re.escape(target): one * factor for target, one, factor in odd},
        "target_modules": _short(linears, modules),
        "target_parameters": _short(parameters, [slot.target for slot in others if slot.is_parameter])
        or None,
        "modules_to_save": list(routers_of) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _sayable(family: Family, model: Transformer, experts: Layout) -> list[Place]:
    """Places that PEFT has a layout for."""
    found = []
    for place in places(model):
        pieces = _pieces(family, model, place, experts)
        if place.group != "experts" or all(one.expert is not None or len(one.shape) == 3 for one in pieces):
            found.append(place)
    return found


# Reading


def read_adapter(model: Transformer, path: str | Path, *, family: Family | None = None) -> Read:
    """Read an adapter that `save_adapter` or PEFT wrote for this model; nothing of it may be left over or missing.

    Args:
        model: Which it is for.
        path: A folder.
        family: Whose names; None is the one that the model would be saved as.

    Raises:
        FormatError: not an adapter, or one that lacks something, has more than this model, or other shapes.
        ConfigError: something that this program does not do; it is named.
        StorageError: the system refused.
    """
    folder = layout.checked_folder(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FormatError(f"{folder} is not an adapter: it has no {CONFIG} or no {WEIGHTS}")
    config = storage.read_json(storage.inside(folder, CONFIG))
    _check_plain(folder, config)
    tensors = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in read_tensors(storage.inside(folder, WEIGHTS)).items()
    }
    known = (family, family_for(model.config).family, OWN)
    for one in [
        one for one in known if one is not None
    ]:  # a packed model is in our layout, its adapter need not be
        reader = _Reader(model, folder, one, config, dict(tensors))
        if reader.holds_something:
            return reader.read()
    raise FormatError(f"{folder} has nothing for this model; it has {layout.listed(sorted(tensors))}")


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    for key, may in PLAIN.items():
        if key in config and config[key] not in may:
            raise ConfigError(
                f"{folder / CONFIG} has {key} {config[key]!r}, which is not done here; allowed is {may[0]!r}"
            )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise FormatError(f"{folder / CONFIG} has {key} {value!r}; a positive number is wanted")


class _Reader:
    """An open adapter: tensors are taken out as they are used."""

    def __init__(
        self,
        model: Transformer,
        folder: Path,
        family: Family,
        config: Mapping[str, Any],
        tensors: dict[str, Tensor],
    ) -> None:
        self.model, self.folder, self.family, self.config, self.tensors = (
            model,
            folder,
            family,
            config,
            tensors,
        )
        self.modules = {key.rpartition(".lora_")[0] for key in tensors if ".lora_" in key}

    def read(self) -> Read:
        """Everything that is there."""
        chosen: dict[Layout, list[Place]] = {"fused": [], "linears": []}
        for place in places(self.model):
            way = self._way(place)
            if way is not None:
                chosen[way].append(place)
        made: dict[tuple[str, str], Adapter] = {}
        for way, some in chosen.items():
            by_place: dict[tuple[str, str], list[_Slot]] = {}
            for slot in _slots(self.family, self.model, some, way):
                by_place.setdefault((slot.place.path, slot.place.leaf), []).append(slot)
            made |= {key: self._adapter(slots) for key, slots in by_place.items()}
        brought = self._routers()
        self._drop_base()
        if self.tensors:
            raise FormatError(
                f"{self.folder} has {layout.listed(sorted(self.tensors))}, which is nowhere in this model",
                hint="it was trained on another model, or adapts what cannot be adapted here",
            )
        self._check_targets(made)
        return Read(adapters=made, routers=brought, config=self.config)

    @property
    def holds_something(self) -> bool:
        """False where no name is one of this family's."""
        return any(self._way(place) is not None for place in places(self.model))

    def _way(self, place: Place) -> Layout | None:
        """How the file holds a place, if it does."""
        ways: tuple[Layout, ...] = ("fused", "linears")
        for way in ways:
            for piece in _pieces(self.family, self.model, place, way):
                if len(piece.shape) == 3:
                    module, targets = piece.theirs.rpartition(".")[0], self.config.get("target_parameters")
                    held = {module, f"{module}.base_layer"} & self.modules
                    if held and _named(piece.theirs, targets or ()):
                        return way
                elif piece.theirs.removesuffix(".weight") in self.modules:
                    return way
        return None

    def _adapter(self, slots: Sequence[_Slot]) -> Adapter:
        """One place's adapter out of all of its pieces."""
        place = slots[0].place
        parts: dict[tuple[int, int], dict[int, tuple[Tensor, Tensor, float]]] = {}
        for slot in slots:
            both = [self.tensors.pop(f"{slot.key}.lora_{kind}.weight", None) for kind in "AB"]
            a, b = both
            if a is None and b is None:
                continue
            if a is None or b is None or a.dim() != 2 or b.dim() != 2:
                raise FormatError(
                    f"{self.folder}: {slot.key} has lora_A without lora_B, or one that is no matrix"
                )
            span = (slot.piece.start, slot.piece.stop)
            parts.setdefault(span, {}).update(self._read_piece(slot, a, b))
        for span, experts in parts.items():
            lacking = sorted(set(range(place.experts)) - experts.keys())
            if lacking:
                raise FormatError(
                    f"{self.folder} lacks experts {lacking} of {place.parameter}, rows {span[0]} to {span[1]}",
                    hint="the adapter was cut, or was trained on a model with fewer experts",
                )
        return self._joined(place, parts)

    def _read_piece(self, slot: _Slot, a: Tensor, b: Tensor) -> dict[int, tuple[Tensor, Tensor, float]]:
        """A (r, D), B (rows, r) and scale of each expert in a slot."""
        place, piece, experts = slot.place, slot.piece, slot.place.experts
        rows = piece.stop - piece.start
        swapped = slot.is_stack and self.family.model_type in SWAPPED
        count = experts if slot.is_stack else 1
        wanted = (rows, place.columns) if swapped else (place.columns, rows)
        rank = len(a) // count
        if (a.shape[1], len(b)) != wanted or len(a) != b.shape[1] or rank * count != len(a) or not rank:
            raise FormatError(
                f"{self.folder}: {slot.key} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; wanted are "
                f"({count} r, {wanted[0]}) and ({wanted[1]}, {count} r)"
            )
        scale = self._scale(slot.target, rank)
        a_ERD = a.unflatten(0, (count, rank))
        b_EFR = b.unflatten(1, (rank, count)).permute(2, 0, 1)
        if swapped:
            a_ERD, b_EFR = b_EFR.transpose(1, 2), a_ERD.transpose(1, 2)
        if piece.interleaved:
            b_EFR = b_EFR.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        first = piece.expert or 0
        return {first + e: (a_ERD[e], b_EFR[e], scale) for e in range(count)}

    def _scale(self, target: str, rank: int) -> float:
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", target):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _joined(
        self, place: Place, parts: Mapping[tuple[int, int], Mapping[int, tuple[Tensor, Tensor, float]]]
    ) -> Adapter:
        """One adapter; a part of smaller rank is filled up with zeros, one of another scale takes it into B."""
        spans = sorted(parts)
        every = [one for experts in parts.values() for one in experts.values()]
        rank, scale = max(len(a) for a, _, _ in every), every[0][2]
        adapter = Adapter(place.experts, place.columns, spans, rank, scale)
        dtype = functools.reduce(torch.promote_types, (a.dtype for a, _, _ in every), torch.float32)
        adapter.to(dtype)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.zero_()
            at = 0
            for number, span in enumerate(spans):
                for expert, (a, b, own) in parts[span].items():
                    adapter.a[expert, number * rank : number * rank + len(a)] = a
                    adapter.b[expert, at : at + len(b), : len(a)] = b if own == scale else b * (own / scale)
                at += span[1] - span[0]
        return adapter

    def _routers(self) -> dict[str, Tensor]:
        """Routers that are there whole, or with an addition, which they then have in them."""
        found: dict[str, Tensor] = {}
        shapes = {own: tuple(one.shape) for own, one in self._router_state().items()}
        for piece in self.family.pieces(self.model.config, shapes, in_memory=True):
            own = self._router_state()[piece.ours].detach()
            module = piece.theirs.rpartition(".")[0]
            a, b = (self.tensors.pop(f"{module}.lora_{kind}.weight", None) for kind in "AB")
            whole = self.tensors.pop(piece.theirs, None)
            if whole is None and a is not None and b is not None and own.dim() == 2:
                whole = own + self._scale(piece.theirs, len(a)) * (b @ a).to(own.dtype)
            if whole is not None:
                if whole.numel() != own.numel():
                    raise FormatError(
                        f"{self.folder}: {piece.theirs} has shape {tuple(whole.shape)}; here it is {tuple(own.shape)}"
                    )
                found[piece.ours] = whole.reshape(own.shape)
        return found

    def _drop_base(self) -> None:
        """PEFT writes the weights of a head beside its adapter; here they must be the model's."""
        head = self.model.head.base if isinstance(self.model.head, OneAdapted) else self.model.head
        for name in [name for name in self.tensors if name.startswith("lm_head.") and ".lora_" not in name]:
            if isinstance(head, torch.nn.Linear) and torch.equal(self.tensors[name], head.weight):
                del self.tensors[name]

    def _router_state(self) -> dict[str, Tensor]:
        return {**routers(self.model), **selection_biases(self.model)}

    def _check_targets(self, made: Mapping[tuple[str, str], Adapter]) -> None:
        """Whatever the config's targets name must have been there."""
        targets, stacks = self.config.get("target_modules"), self.config.get("target_parameters") or ()
        layers = self.config.get("layers_to_transform")
        allowed = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        for slot in _slots(self.family, self.model, _sayable(self.family, self.model, "fused"), "fused"):
            if allowed is not None and slot.place.layer not in allowed:
                continue
            adapter = made.get((slot.place.path, slot.place.leaf))
            spans = () if adapter is None else adapter.spans
            is_there = any(start < slot.piece.stop and stop > slot.piece.start for start, stop in spans)
            name = slot.piece.theirs.removesuffix(".weight")
            wanted = _named(slot.piece.theirs, stacks) or (not slot.is_stack and _matched(name, targets))
            if wanted and not is_there and not _matched(name, self.config.get("exclude_modules")):
                raise FormatError(
                    f"{self.folder / CONFIG} names {slot.target} as adapted, and {WEIGHTS} has nothing for it",
                    hint="the file was cut, or it was trained on another model",
                )


def _named(target: str, ends: Sequence[str]) -> bool:
    return any(target == one or target.endswith(f".{one}") for one in ends)


def _matched(target: str, targets: str | Sequence[str] | None) -> bool:
    """As PEFT matches modules."""
    if not isinstance(targets, str):
        return _named(target, targets or ())
    if targets == "all-linear":
        return "lm_head" not in target
    return re.fullmatch(targets, target) is not None


# Use


@torch.no_grad()
def apply(model: Transformer, read: Read, name: str = ACTIVE) -> None:
    """Attach an adapter that was read; routers that it brings take the place of the model's.

    Raises:
        UsageError: it brings routers, and there is another adapter, which had the model's.
    """
    if read.routers and names(model):
        raise UsageError(
            f"adapter {name!r} has routers of its own, and {', '.join(names(model))} shares the model's",
            hint="merge it into a model of its own (`moiety adapter merge`)",
        )
    attach(model, name, read.adapters)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for own, tensor in read.routers.items():
        state[own].copy_(tensor)


def load_adapter(
    model: Transformer, path: str | Path, name: str = ACTIVE, *, family: Family | None = None
) -> Read:
    """Read an adapter and attach it; arguments and errors as of `read_adapter` and `apply`."""
    read = read_adapter(model, path, family=family)
    apply(model, read, name)
    return read
