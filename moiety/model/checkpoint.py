"""Models on disk, in the Hugging Face layout: `config.json`, safetensors in one file or in shards, the tokenizer.

A model that a public family expresses is written as one of that family, so that any program that knows the
family reads it; any other is written under `model_type` "moiety". Tensors go to disk and come back one at a
time. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moiety import cost, storage
from moiety.config import ModelConfig
from moiety.errors import ConfigError, FormatError, UsageError
from moiety.model.families import Family, FamilyChoice, Piece, family_for, family_of
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer

__all__ = [
    "load",
    "load_config",
    "load_extra",
    "load_weights",
    "read_tensors",
    "save",
    "size_bytes",
    "write_model",
    "write_tensors",
]

SHARD_BYTES = 5_000_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXTRA = "extra.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Fetch = Callable[[], Tensor]


class Entry(NamedTuple):
    """A tensor to write: what it is, and how to get it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Fetch

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save(
    model: Transformer,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> FamilyChoice:
    """Write a model; a checkpoint already at `path` is replaced in one step.

    Args:
        model: What to write.
        path: A folder.
        tokenizer: Written beside the weights.
        extra: JSON values to keep beside the model, such as what it was trained on; see `load_extra`.
        dtype: Of the weights on disk; None keeps each as it is. A selection bias stays float32.
        max_shard_bytes: Largest weight file; a larger model gets several and an index.

    Returns:
        The family it was written as, and why.

    Raises:
        StorageError: the system refused; a checkpoint that was there still is.
        UsageError: the tokenizer does not fit the model, or a dtype that weights cannot have.
    """
    needed_bytes = size_bytes(model, dtype) + (1 << 16)
    with storage.new_folder(path, needed_bytes=needed_bytes) as folder:
        return write_model(
            folder, model, tokenizer=tokenizer, extra=extra, dtype=dtype, max_shard_bytes=max_shard_bytes
        )


def load(path: str | Path, *, backend: str = "auto", dtype: torch.dtype | None = None) -> Transformer:
    """Read a model that `save` or transformers wrote.

    Args:
        path: The folder.
        backend: Who multiplies the experts; see `moiety.backends`.
        dtype: Of the weights in memory; None keeps each as stored. A selection bias is float32.

    Raises:
        FormatError: not a checkpoint, altered since it was written, or tensors missing, left over or misshapen.
        ConfigError: a model that this program does not compute.
        StorageError: the system refused to read.
    """
    folder = _checked_folder(path)
    stored = _Stored.open(folder)
    with torch.device("meta"):  # shapes alone: the weights come from the files
        model = Transformer(stored.config, backend=backend, initialize=False)
    state = model.state_dict()
    filled: dict[str, Tensor] = {}
    for name, tensor in stored.tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, dtype):
        filled[name] = tensor
    model.load_state_dict(filled, assign=True)
    return model


def load_weights(path: str | Path, model: Transformer) -> None:
    """Read weights into a model that exists, bit for bit: the config and every dtype must be the same.

    Raises:
        FormatError, StorageError: as `load`.
        UsageError: the checkpoint is of another model; nothing was changed.
    """
    stored = _Stored.open(_checked_folder(path))
    if stored.config != model.config:
        raise UsageError(
            f"{path} is a checkpoint of another model: {stored.config}, not {model.config}",
            hint="build the model with the config of the checkpoint (`load_config`)",
        )
    state = model.state_dict()
    for name, tensor in stored.tensors({name: tuple(one.shape) for name, one in state.items()}, None):
        if tensor.dtype != state[name].dtype:
            raise UsageError(f"{name} is {tensor.dtype} in {path}, but {state[name].dtype} in the model")
        state[name].copy_(tensor)


def load_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint, without its weights.

    Raises:
        FormatError: no `config.json`, or one that is not understood.
        ConfigError: its values cannot describe a model.
    """
    return _read_config(_folder(path))[1]


def load_extra(path: str | Path) -> dict[str, Any]:
    """What was given to `save` as `extra`; empty when nothing was.

    Raises:
        FormatError: the file is damaged.
    """
    folder = _folder(path)
    return storage.read_json(storage.inside(folder, EXTRA)) if (folder / EXTRA).exists() else {}


def size_bytes(model: Transformer, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights on disk."""
    return sum(
        tensor.numel() * _stored_dtype(name, tensor, dtype).itemsize
        for name, tensor in model.state_dict().items()
    )


def write_model(
    folder: Path,
    model: Transformer,
    *,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> FamilyChoice:
    """Fill a folder from `storage.new_folder`; arguments and errors as for `save`."""
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}",
            hint="save the tokenizer that the model was trained with",
        )
    choice = family_for(model.config)
    entries = _entries(model, choice.family, dtype)
    end_id = None if tokenizer is None else tokenizer.end_id
    special = {"bos_token_id": None, "eos_token_id": end_id, "pad_token_id": end_id}
    kinds = [entry.dtype for entry in entries.values()]
    stored_as = str(max(set(kinds), key=kinds.count)).removeprefix("torch.")
    config = {**choice.family.write(model.config), **special, "dtype": stored_as, "torch_dtype": stored_as}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special)
    if extra is not None:
        _write_json(folder / EXTRA, dict(extra))
    if tokenizer is not None:
        tokenizer.save(folder)
    _write_shards(folder, entries, max_shard_bytes)
    return choice


def write_tensors(file: Path, entries: Mapping[str, Entry]) -> None:
    """Write a safetensors file, fetching one tensor at a time.

    Raises:
        OSError: the system refused.
    """
    # Wide types first, and a header of a multiple of 8: then every tensor is aligned and can be mapped.
    order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        entry = entries[name]
        place = [at, at + entry.size_bytes]
        header[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": place,
        }
        at = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = entries[name].fetch()
            assert tuple(tensor.shape) == entries[name].shape, (name, tensor.shape, entries[name].shape)
            flat = tensor.detach().to("cpu", entries[name].dtype).contiguous().reshape(-1)
            opened.write(flat.view(torch.uint8).numpy().data)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory of their own.

    Raises:
        FormatError: cut, altered, or not such a file.
    """
    with _opened(file) as opened:
        return {name: _fetch(opened, file, name).clone() for name in opened.keys()}  # noqa: SIM118


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is on disk. A selection bias moves in steps that bfloat16 would lose."""
    return tensor.dtype if dtype is None or name.endswith("selection_bias") else dtype


def _entries(model: Transformer, family: Family, dtype: torch.dtype | None) -> dict[str, Entry]:
    if dtype is not None and (dtype not in DTYPE_NAMES or not dtype.is_floating_point):
        raise UsageError(
            f"weights cannot be saved as {dtype}", hint="use torch.float32, bfloat16, float16 or float64"
        )
    state = model.state_dict()
    entries: dict[str, Entry] = {}
    for piece in family.pieces(model.config, {name: tuple(tensor.shape) for name, tensor in state.items()}):
        view = _view(state[piece.ours], piece)
        kind = _stored_dtype(piece.ours, view, dtype)
        assert piece.theirs not in entries, piece
        entries[piece.theirs] = Entry(tuple(view.shape), kind, view.detach)
    return entries


def _view(tensor: Tensor, piece: Piece) -> Tensor:
    """The part of our tensor that a piece is."""
    part = tensor if piece.expert is None else tensor[piece.expert]
    return part[piece.start : piece.stop] if part.dim() else part


def _write_shards(folder: Path, entries: Mapping[str, Entry], max_shard_bytes: int) -> None:
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
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(file: Path, values: Mapping[str, object]) -> None:
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file.name} cannot hold these values: {error}", hint="give JSON values") from error
    with open(file, "x", encoding="utf-8") as opened:
        opened.write(text + "\n")


def _folder(path: str | Path) -> Path:
    folder = storage.existing(path)
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise FormatError(
            f"{path} {kind}",
            hint="give a folder that was saved by this program or by transformers; names of the hub are not known yet",
        )
    return folder


def _checked_folder(path: str | Path) -> Path:
    folder = _folder(path)
    if storage.has_manifest(folder):
        storage.verify(folder)
    return folder


def _read_config(folder: Path) -> tuple[Family, ModelConfig]:
    file = storage.inside(folder, "config.json")
    values = storage.read_json(file)
    try:
        family = family_of(values)
        return family, family.read(values)
    except (FormatError, ConfigError) as error:
        raise type(error)(f"{file}: {error.message}", hint=error.hint) from error


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, its complaints turned into ours."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{file} is not a whole safetensors file: {error}", hint="it was cut or altered: write it again"
        ) from error


def _fetch(opened: Any, file: Path, name: str) -> Tensor:
    """One tensor, mapped to the file and not yet read."""
    try:
        tensor: Tensor = opened.get_tensor(name)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise FormatError(f"{file}: tensor {name} cannot be read: {error}") from error
    return tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stored:
    """The tensors of a checkpoint: which file each is in, its shape and type."""

    folder: Path
    family: Family
    config: ModelConfig
    file_of: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def open(cls, folder: Path) -> _Stored:
        family, config = _read_config(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        file_of: dict[str, Path] = {}
        for file, indexed in _weight_files(folder).items():
            with _opened(file) as opened:
                names = list(opened.keys())
                _check_index(file, names, indexed)
                for name in names:
                    part = opened.get_slice(name)
                    if name in file_of:
                        raise FormatError(f"{name} stands in {file_of[name]} and in {file}")
                    kind = DTYPES.get(part.get_dtype())
                    if kind is None or not kind.is_floating_point:
                        raise FormatError(
                            f"{file}: tensor {name} is {part.get_dtype()}; allowed are floating point weights",
                            hint="quantized weights are not supported yet",
                        )
                    file_of[name], shapes[name], dtypes[name] = file, tuple(part.get_shape()), kind
        _check_sizes(folder, config, shapes)
        return cls(folder=folder, family=family, config=config, file_of=file_of, shapes=shapes, dtypes=dtypes)

    def tensors(
        self, wanted: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Our tensors one after the other, put together from theirs; everything is checked before the first.

        Raises:
            FormatError: tensors missing, left over, misshapen or unreadable.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise UsageError(f"weights cannot be {dtype}", hint="use a floating point dtype")
        pieces: dict[str, list[Piece]] = {name: [] for name in wanted}
        for piece in self.family.pieces(self.config, wanted):
            pieces[piece.ours].append(piece)
        self._check(wanted, [piece for group in pieces.values() for piece in group])
        with contextlib.ExitStack() as stack:
            opened = {file: stack.enter_context(_opened(file)) for file in sorted({*self.file_of.values()})}
            for name, group in pieces.items():
                kind = self.dtypes[group[0].theirs]
                for piece in group:
                    kind = torch.promote_types(kind, self.dtypes[piece.theirs])
                tensor = torch.empty(
                    wanted[name], dtype=_stored_dtype(name, torch.empty(0, dtype=kind), dtype)
                )
                for piece in group:
                    file = self.file_of[piece.theirs]
                    _view(tensor, piece).copy_(_fetch(opened[file], file, piece.theirs))
                yield name, tensor
            self._check_second_head(opened)

    def _check(self, wanted: Mapping[str, tuple[int, ...]], pieces: Sequence[Piece]) -> None:
        needed = {piece.theirs for piece in pieces}
        missing = sorted(needed - self.shapes.keys())
        if missing:
            raise FormatError(
                f"{self.folder} lacks {_some(missing)}",
                hint="a shard is missing or config.json is of another model",
            )
        second_head = {self.family.head} if self.config.tied else set()
        left = sorted(
            name for name in self.shapes.keys() - needed - second_head if not self.family.ignores(name)
        )
        if left:
            raise FormatError(
                f"{self.folder} also has {_some(left)}, which a {self.family.model_type} model of this config has not",
                hint="config.json is of another model, or the weights hold more than a model",
            )
        for piece in pieces:
            whole = wanted[piece.ours][0 if piece.expert is None else 1 :]
            shape = (piece.stop - piece.start, *whole[1:]) if whole else ()
            if self.shapes[piece.theirs] != shape:
                raise FormatError(
                    f"{self.file_of[piece.theirs]}: tensor {piece.theirs} has shape {self.shapes[piece.theirs]}; "
                    f"by config.json it is {shape}"
                )

    def _check_second_head(self, opened: Mapping[Path, Any]) -> None:
        """A tied model may store its head all the same, as long as it is the embedding."""
        head = self.family.head
        if not self.config.tied or head not in self.shapes:
            return
        embedding = next(
            piece.theirs
            for piece in self.family.pieces(self.config, {"embed.weight": (self.config.vocab_size,)})
        )
        found = [_fetch(opened[self.file_of[name]], self.file_of[name], name) for name in (head, embedding)]
        if not torch.equal(found[0], found[1]):
            raise FormatError(
                f"{self.file_of[head]}: config.json says tie_word_embeddings, but {head} is not {embedding}",
                hint="set tie_word_embeddings to false in config.json",
            )


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors that an index says it holds."""
    if (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            raise FormatError(f"{folder} has {SINGLE} and {INDEX}: it is not clear which is meant")
        where = storage.read_json(storage.inside(folder, INDEX)).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise FormatError(f"{folder / INDEX} has no weight_map from tensors to files")
        files = {name: storage.inside(folder, name) for name in sorted(set(where.values()))}
        return {
            file: {tensor for tensor, place in where.items() if place == name} for name, file in files.items()
        }
    if not (folder / SINGLE).exists():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        raise FormatError(
            f"{folder} has neither {SINGLE} nor {INDEX}",
            hint=f"{_some(pickled)} may run code when read: convert to safetensors" if pickled else None,
        )
    return {storage.inside(folder, SINGLE): None}


def _check_index(file: Path, names: Sequence[str], indexed: set[str] | None) -> None:
    if indexed is not None and indexed != set(names):
        missing, extra = sorted(indexed - set(names)), sorted(set(names) - indexed)
        said = [f"lacks {_some(missing)}"] * bool(missing) + [f"also has {_some(extra)}"] * bool(extra)
        raise FormatError(
            f"{file} does not hold what {INDEX} says: it {' and '.join(said)}",
            hint="a shard is of another model",
        )


def _check_sizes(folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config far beyond the weights before anything is built by it."""
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    described = cost.parameters(config).total if config.layers <= len(shapes) else None
    if described is None or described > 16 * stored + (1 << 20):
        raise FormatError(
            f"{folder / 'config.json'} describes {config.layers} layers, but {len(shapes)} tensors with "
            f"{stored:,} parameters are stored",
            hint="config.json is of another model, or shards are missing",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
