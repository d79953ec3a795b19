"""Packed models in folders: what `config.json` says of them, and tiles that are mapped instead of read.

`docs/quantization.md` describes the layout. Writing is `checkpoint.write_model`'s.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moiety import cost, storage
from moiety.config import ModelConfig
from moiety.errors import ConfigError, FormatError
from moiety.formats import Format, format_named
from moiety.model import layout
from moiety.model.families import OWN
from moiety.model.slots import Slot, install, packed_matrices, room, slots
from moiety.model.tensor_file import DTYPE_NAMES, TensorFile, open_tensors, shown
from moiety.model.transformer import Transformer
from moiety.moe.packed import MixedExperts, PackedExperts

__all__ = [
    "METHOD",
    "VERSION",
    "OpenModel",
    "checksums_name",
    "description",
    "expert_modules",
    "load_quantized",
    "open_quantized",
    "plain_state",
]

METHOD = "moiety"
VERSION = 2


def description(model: Transformer) -> dict[str, Any]:
    """The `quantization_config` of a packed model as an entry of `config.json`; empty where nothing is packed."""
    matrices = packed_matrices(model)
    if not matrices:
        return {}
    mixed = {path: one for path, one in model.named_modules() if isinstance(one, MixedExperts)}
    return {
        "quantization_config": {
            "quant_method": METHOD,
            "version": VERSION,
            "tensors": {path: _said(one.experts, *one.projection) for path, one in matrices.items()},
            "numbers": {path: [list(part) for part in one.numbers] for path, one in mixed.items()},
        }
    }


def _said(experts: int, form: Format, rows: int, columns: int, interleaved: bool) -> dict[str, Any]:
    sizes = {"experts": experts, "rows": rows, "columns": columns}
    return {"format": form.name, **sizes, "interleaved": interleaved}


def expert_modules(model: Transformer) -> dict[str, PackedExperts]:
    """The stacks of packed experts in a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedExperts)}


def checksums_name(path: str) -> str:
    """The tensor beside a stack's tiles: XXH3-64 of each expert's bytes, int64 (E,)."""
    return f"{path}.checksums"


class OpenModel(NamedTuple):
    """A packed model that is not in memory yet: everything that is said of it has been compared.

    Args:
        model: On the meta device; nothing of it has content.
        plain: The open file of what is not packed.
        tiles: The open file of tiles and checksums.
    """

    model: Transformer
    plain: TensorFile
    tiles: TensorFile


@contextlib.contextmanager
def open_quantized(folder: Path, *, backend: str = "auto") -> Iterator[OpenModel]:
    """Open a packed model by its headers alone.

    Raises:
        FormatError: a file is missing or damaged, or says something else than the others.
        ConfigError: a model that this program does not compute.
        StorageError: the system refused to read.
    """
    file = storage.inside(folder, "config.json")
    values = storage.read_json(file)
    said = values.pop("quantization_config", None)
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        raise FormatError(f"{folder} holds no packed model", hint="`moiety quantize` makes one")
    version = said.get("version")
    if version != VERSION:
        old = version == 1
        raise FormatError(
            f"{file} has version {reprlib.repr(version)} of packed weights; allowed is {VERSION}",
            hint="pack the original again with `moiety quantize`" if old else "a newer program wrote it",
        )
    config = OWN.read(values)
    tensors, numbers = (_objects(file, said, key) for key in ("tensors", "numbers"))
    with (
        open_tensors(storage.inside(folder, layout.SINGLE)) as plain,
        open_tensors(storage.inside(folder, layout.TILES)) as tiles,
    ):
        _check_size(file, config, [plain, tiles])
        with torch.device("meta"):
            model = Transformer(config, backend=backend, initialize=False)
            _install(file, model, tensors, numbers)
        _check(model, plain, tiles)
        yield OpenModel(model, plain, tiles)


def load_quantized(folder: Path, *, backend: str = "auto", dtype: torch.dtype | None = None) -> Transformer:
    """Map a packed model, in evaluation mode and without gradients; `dtype` is of what is not packed.

    The file of tiles must not be changed while the model is in use; replacing the folder is no change. Errors as of
    `open_quantized`, and a StorageError where the system refused to map.
    """
    with open_quantized(folder, backend=backend) as opened:
        model, _, tiles = opened
        mapped = {name: one for name, one in tiles.mapped().items() if name.endswith(".tiles")}
        model.load_state_dict({**plain_state(opened, dtype), **mapped}, assign=True)
    return model.requires_grad_(False).eval()


def plain_state(
    opened: OpenModel, dtype: torch.dtype | None, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """What is not packed, read into memory, as it is or in a dtype."""
    plain = opened.plain
    return {name: _as(plain.read(name), name, dtype) for name in plain.places if name not in without}


def _objects(file: Path, said: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = said.get(key)
    if not isinstance(value, dict):
        raise FormatError(
            f"{file} has {key} {reprlib.repr(value)} in quantization_config; allowed is an object"
        )
    return value


def _as(tensor: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or name.endswith("selection_bias") else tensor.to(dtype)


def _check_size(file: Path, config: ModelConfig, files: Sequence[TensorFile]) -> None:
    """Refuse a config far beyond the weights before anything is built by it."""
    count = sum(len(one.places) for one in files)
    stored = sum(place.size_bytes for one in files for place in one.places.values())
    described = cost.parameters(config).total if config.layers <= count else None
    if described is None or described > 16 * stored + (1 << 20):
        raise FormatError(
            f"{file} describes {config.layers} layers, but {count} tensors with {stored:,} bytes are stored",
            hint="config.json is of another model",
        )


def _install(file: Path, model: Transformer, tensors: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    """Put packed layers without content where `config.json` says that they are."""
    left, unread = set(tensors), set(numbers)
    for path, group in slots(model).items():
        parts = _numbers(file, path, numbers[path], group[0].experts) if path in numbers else None
        unread.discard(path)
        made = []
        for place, members in enumerate(parts or [None]):
            inside = path if members is None else f"{path}.parts.{place}"
            keys = {slot: f"{inside}.{slot.leaf}" if slot.leaf else inside for slot in group}
            if parts is None and not any(key in tensors for key in keys.values()):
                break
            forms = [_form(file, slot, key, tensors.get(key), members) for slot, key in keys.items()]
            left -= set(keys.values())
            made.append(room(group, forms, members))
        if made:
            install(model, path, made)
    if left or unread:
        raise FormatError(
            f"{file} says that {layout.listed(sorted(left | unread))} is packed, which such a model has not"
        )


def _numbers(file: Path, path: str, said: Any, experts: int) -> list[tuple[int, ...]]:
    """Which experts are in which stack."""
    lists = isinstance(said, list) and len(said) > 1 and all(isinstance(part, list) and part for part in said)
    flat = [number for part in said for number in part] if lists else []
    whole = all(type(number) is int for number in flat) and sorted(flat) == list(range(experts))
    if not whole or any(part != sorted(part) for part in said):
        raise FormatError(
            f"{file} has numbers {reprlib.repr(said)} for {path}; allowed is two or more ascending lists that hold 0 "
            f"to {experts - 1} once each"
        )
    return [tuple(part) for part in said]


def _form(file: Path, slot: Slot, key: str, said: Any, members: tuple[int, ...] | None) -> Format:
    """The format of one matrix or stack, if what is said of it is what the model has there."""
    name = said.get("format") if isinstance(said, dict) else None
    try:
        form = format_named(name if isinstance(name, str) else "")
    except ConfigError as error:
        raise FormatError(f"{file}: {shown(key)} is {reprlib.repr(said)}: {error.message}") from error
    experts = slot.experts if members is None else len(members)
    wanted = _said(experts, form, slot.rows, slot.columns, slot.interleaved)
    if said != wanted:
        raise FormatError(f"{file}: {shown(key)} is {reprlib.repr(said)}; by the model it is {wanted}")
    return form


def _check(model: Transformer, plain: TensorFile, tiles: TensorFile) -> None:
    """Both files hold exactly the model's tensors, and the checksums of its experts."""
    state = model.state_dict()
    packed = {name: tensor for name, tensor in state.items() if name.endswith(".tiles")}
    kept = {name: tensor for name, tensor in state.items() if name not in packed}
    for path, one in expert_modules(model).items():
        packed[checksums_name(path)] = torch.empty(one.count, dtype=torch.int64, device="meta")
    for file, wanted in ((plain, kept), (tiles, packed)):
        names, there = wanted.keys(), file.places.keys()
        for said, some in (("lacks", names - there), ("also has", there - names)):
            if some:
                raise FormatError(
                    f"{file.path} {said} {layout.listed(sorted(some))}",
                    hint="config.json is of another model",
                )
        for name, tensor in wanted.items():
            place, shape = file.places[name], tuple(tensor.shape)
            floating = wanted is kept and place.dtype.is_floating_point and place.dtype.itemsize > 1
            if place.shape != shape or not (floating or (wanted is packed and place.dtype == tensor.dtype)):
                kind = "a floating point type" if wanted is kept else DTYPE_NAMES[tensor.dtype]
                raise FormatError(
                    f"{file.path}: tensor {shown(name)} is {DTYPE_NAMES[place.dtype]} {place.shape}; allowed is "
                    f"{kind} {shape}"
                )
