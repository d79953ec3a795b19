"""The experts of a packed model in their file: where each one is, how it is read, and whether it is whole.

`tiles.safetensors` begins with the stacks of experts, each expert at a multiple of 4096 bytes, and ends with a
checksum of each (XXH3-64, https://github.com/Cyan4973/xxHash). So one aligned read brings an expert, and proves it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from moiety.errors import FormatError
from moiety.formats.tiles import EXPERT_MULTIPLE, Projection
from moiety.model.quantized import OpenModel, checksums_name, expert_modules, open_quantized
from moiety.model.tensor_file import Entry, shown
from moiety.model.transformer import Transformer
from moiety.moe.packed import MixedExperts

__all__ = [
    "ExpertFile",
    "ExpertStack",
    "check_expert",
    "compare_checksum",
    "entries_in_order",
    "expert_stacks",
    "stacks_in",
]


class ExpertStack(NamedTuple):
    """The experts of one layer that are packed alike.

    Args:
        path: Of the module that holds them.
        layer: Number of the block.
        part: Which of the layer's stacks, where its experts have several formats; else None.
        numbers: Which of the layer's experts they are, ascending.
        expert_bytes: Of one expert, a multiple of 4096.
        offset_bytes: From the file's first byte to the first expert's, a multiple of 4096.
        projections: Gate and up, and down, in the order of an expert's bytes.
        checksums: XXH3-64 of each expert's bytes, below 2**64.
    """

    path: str
    layer: int
    part: int | None
    numbers: tuple[int, ...]
    expert_bytes: int
    offset_bytes: int
    projections: tuple[Projection, Projection]
    checksums: tuple[int, ...]

    @property
    def experts(self) -> int:
        """How many."""
        return len(self.numbers)

    def offset_of(self, place: int) -> int:
        """From the file's first byte to that of the expert at this place of the stack."""
        return self.offset_bytes + place * self.expert_bytes


class ExpertFile(NamedTuple):
    """The file that holds a model's experts, and where they are in it, by layer and part."""

    path: Path
    stacks: tuple[ExpertStack, ...]


def expert_stacks(folder: Path) -> ExpertFile:
    """Where the experts of a packed model are, by its headers and checksums alone.

    Raises:
        FormatError: a file is missing, cut or damaged, says something else than the others, or was not laid out for
            reading one expert at a time.
        ConfigError: a model that this program does not compute.
        StorageError: the system refused to read.
    """
    with open_quantized(folder) as opened:
        return stacks_in(opened)


def stacks_in(opened: OpenModel) -> ExpertFile:
    """The same of a model that is open; its errors are those about the layout."""
    model, tiles = opened.model, opened.tiles
    stacks = []
    for path, module in expert_modules(model).items():
        place, (up, down) = tiles.places[f"{path}.tiles"], module.projections
        if place.start % EXPERT_MULTIPLE:
            raise FormatError(
                f"{tiles.path}: the experts of {shown(path)} begin at byte {place.start:,}; allowed is a multiple of "
                f"{EXPERT_MULTIPLE}",
                hint="another program wrote the file again: pack the original with `moiety quantize`",
            )
        found = re.fullmatch(r"(blocks\.(\d+)\..+?)(?:\.parts\.(\d+))?", path)
        assert found is not None, path
        part, numbers = None, tuple(range(module.count))
        if found[3]:
            owner, part = model.get_submodule(found[1]), int(found[3])
            assert isinstance(owner, MixedExperts), path
            numbers = owner.numbers[part]
        sums = tiles.read(checksums_name(path)).tolist()
        stacks.append(
            ExpertStack(
                path=path,
                layer=int(found[2]),
                part=part,
                numbers=numbers,
                expert_bytes=module.tiles.shape[1],
                offset_bytes=place.start,
                projections=(up, down),
                checksums=tuple(one % (1 << 64) for one in sums),
            )
        )
    return ExpertFile(tiles.path, tuple(stacks))


def check_expert(file: Path, stack: ExpertStack, place: int, data: Tensor | memoryview | bytes) -> None:
    """Compare what was read of an expert with its checksum.

    Args:
        file: Where it was read, for the message.
        stack: Its stack.
        place: Its place there.
        data: Its bytes, `stack.expert_bytes` of them.

    Raises:
        FormatError: they are others than were written.
    """
    raw = data.numpy().data if isinstance(data, Tensor) else data
    compare_checksum(file, stack, place, xxhash.xxh3_64_intdigest(raw))


def compare_checksum(file: Path, stack: ExpertStack, place: int, found: int) -> None:
    """The same for who has the checksum (XXH3, 64 bits) of what was read; raises as `check_expert`."""
    wanted = stack.checksums[place]
    if found != wanted:
        raise FormatError(
            f"{file}: expert {stack.numbers[place]} of layer {stack.layer} is damaged: its checksum is {found:016x}, "
            f"and was {wanted:016x} when it was written",
            hint="the file was changed or the disk fails: pack the original again with `moiety quantize`",
        )


def entries_in_order(model: Transformer, tiles: Mapping[str, Entry]) -> dict[str, Entry]:
    """What the file of tiles holds: experts, other tiles, and checksums, which are taken while experts are written."""
    first: dict[str, Entry] = {}
    sums: dict[str, Entry] = {}
    for path, module in expert_modules(model).items():
        name, sum_E = f"{path}.tiles", torch.zeros(module.count, dtype=torch.int64)
        first[name] = tiles[name]._replace(fetch=partial(_fetched, tiles[name].fetch, sum_E))
        sums[checksums_name(path)] = Entry((module.count,), torch.int64, sum_E.detach)
    return {**first, **{name: one for name, one in tiles.items() if name not in first}, **sums}


def _fetched(fetch: Callable[[], Tensor], sum_E: Tensor) -> Tensor:
    """A stack that is about to be written; its checksums are noted."""
    tiles = fetch()
    for expert, row in enumerate(tiles):
        signed = xxhash.xxh3_64_intdigest(row.numpy().data)
        sum_E[expert] = signed - (signed >> 63 << 64)
    return tiles
