"""The folder of a checkpoint: which files hold the weights, and how they get there.

Hugging Face's layout: `model.safetensors`, or `model-00001-of-0000N.safetensors` and an index that says which tensor
is in which file. The files come from anybody, so an index is believed in nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from moiety import storage
from moiety.errors import FormatError, UsageError
from moiety.model.packed import WEIGHT_DTYPES, Packing, Weight, weights_of
from moiety.model.tensor_file import Entry, TensorFile, open_tensors, shown, write_tensors

__all__ = [
    "EXTRA",
    "SHARD_BYTES",
    "SINGLE",
    "TILES",
    "check_dtype",
    "checked_folder",
    "existing_folder",
    "listed",
    "open_weights",
    "write_json",
    "write_shards",
]

SHARD_BYTES = 5_000_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXTRA = "extra.json"
TILES = "tiles.safetensors"


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise UsageError for a dtype that weights cannot have."""
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise UsageError(
            f"weights cannot be {dtype}", hint=f"allowed is {', '.join(str(one) for one in WEIGHT_DTYPES)}"
        )


def existing_folder(path: str | Path) -> Path:
    """The folder that a path means.

    Raises:
        FormatError: there is none.
    """
    folder = storage.existing(path)
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise FormatError(
            f"{path} {kind}",
            hint="give a folder that was saved by this program or by transformers",
        )
    return folder


def checked_folder(path: str | Path) -> Path:
    """The same, every file in it as its manifest says where it has one; tiles, which are mapped, by their size.

    Raises:
        FormatError: no folder, or altered since it was written.
    """
    folder = existing_folder(path)
    if storage.has_manifest(folder):
        storage.verify(folder, sizes_only=(TILES,))
    return folder


@contextlib.contextmanager
def open_weights(folder: Path, packing: Packing | None) -> Iterator[dict[str, Weight]]:
    """Every weight of a checkpoint by its name, all files open and all headers checked.

    Raises:
        FormatError: a file is missing or damaged, an index lies, or two files have the same tensor.
        StorageError: the system refused to read.
    """
    with contextlib.ExitStack() as stack:
        stored: dict[str, TensorFile] = {}
        for path, indexed in _weight_files(folder).items():
            file = stack.enter_context(open_tensors(path))
            _check_index(path, file.places.keys(), indexed)
            for name in file.places:
                if name in stored:
                    raise FormatError(f"tensor {shown(name)} stands in {stored[name].path} and in {path}")
                stored[name] = file
        yield weights_of(stored, packing)


def write_shards(folder: Path, entries: Mapping[str, Entry], max_shard_bytes: int) -> None:
    """One file when everything fits, else `model-00001-of-0000N.safetensors` and an index."""
    shards: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.size_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.size_bytes
    if len(shards) == 1:
        write_tensors(folder / SINGLE, shards[0])
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard)
        where |= dict.fromkeys(shard, file)
    total = sum(entry.size_bytes for entry in entries.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_json(file: Path, values: Mapping[str, object]) -> None:
    """A new JSON file; UsageError where the values are none."""
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file.name} cannot hold these values: {error}", hint="give JSON values") from error
    with open(file, "x", encoding="utf-8") as opened:
        opened.write(text + "\n")


def listed(names: Sequence[str]) -> str:
    """Names as an error says them: five, and how many more."""
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors that an index says it holds."""
    if (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            raise FormatError(f"{folder} has {SINGLE} and {INDEX}: it is not clear which is meant")
        where = storage.read_json(storage.inside(folder, INDEX)).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise FormatError(f"{folder / INDEX} has no weight_map from tensors to files")
        held: dict[str, set[str]] = {}
        for tensor, name in where.items():
            held.setdefault(name, set()).add(tensor)
        return {storage.inside(folder, name): held[name] for name in sorted(held)}
    if not (folder / SINGLE).exists():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        raise FormatError(
            f"{folder} has neither {SINGLE} nor {INDEX}",
            hint=f"{listed(pickled)} may run code when read: convert to safetensors" if pickled else None,
        )
    return {storage.inside(folder, SINGLE): None}


def _check_index(file: Path, names: Collection[str], indexed: set[str] | None) -> None:
    if indexed is not None and indexed != set(names):
        missing, extra = sorted(indexed - set(names)), sorted(set(names) - indexed)
        said = [f"lacks {listed(missing)}"] * bool(missing) + [f"also has {listed(extra)}"] * bool(extra)
        raise FormatError(
            f"{file} does not hold what {INDEX} says: it {' and '.join(said)}",
            hint="a shard is of another model",
        )
