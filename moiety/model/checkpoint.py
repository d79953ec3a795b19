"""Models on disk, in the Hugging Face layout: `config.json`, safetensors in one file or in shards, the tokenizer.

A model that a public family expresses is written as one of that family, so that any program that knows the
family reads it; any other is written under `model_type` "moiety". Tensors go to disk and come back one at a
time. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moiety import cost, storage
from moiety.config import ModelConfig
from moiety.errors import ConfigError, FormatError, UsageError
from moiety.formats import FORMATS
from moiety.formats.numbers import Codes
from moiety.formats.tiles import EXPERT_MULTIPLE, PackedWeight, pack_codes
from moiety.model import expert_file, hub, layout, quantized, slots
from moiety.model.adapters import refuse_adapters
from moiety.model.families import OWN, Family, FamilyChoice, Match, Piece, family_for, family_of
from moiety.model.packed import WEIGHT_DTYPES, Packing, Weight, packing_of
from moiety.model.parts import Parts, hollow, shapes_of
from moiety.model.tensor_file import (
    DTYPE_NAMES,
    Entry,
    read_tensors,
    write_tensors,
)
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer

__all__ = [
    "Entry",
    "Stored",
    "is_gguf",
    "is_packed",
    "load",
    "load_config",
    "load_extra",
    "load_weights",
    "open_parts",
    "read_tensors",
    "save",
    "size_bytes",
    "write_model",
    "write_tensors",
]

Fetch = Callable[[str, int | None], Tensor]


def save(
    model: Transformer,
    path: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = layout.SHARD_BYTES,
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


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    match: Match = "original",
    packed: bool = False,
) -> Transformer:
    """Read a model that `save` or transformers wrote, or a GGUF; it comes in evaluation mode.

    What is in memory at once is the model and the one stored tensor that is being read.

    Args:
        path: A folder, a `.gguf` file, or `owner/name` on the hub (see `moiety.model.hub`).
        backend: Who multiplies the experts; see `moiety.backends`.
        dtype: Of the weights in memory; None keeps each as stored, and packed ones as bfloat16. A selection
            bias is float32.
        revision: Branch, tag or commit on the hub.
        match: Where transformers computes otherwise than the model's authors: as they do, or as `hf` does.
        packed: Keep blocks that can be multiplied with as they are stored (Q4_0, Q4_1, Q8_0 of a GGUF, mxfp4).

    Raises:
        FormatError: not a checkpoint, altered since it was written, or tensors missing, left over or misshapen.
        ConfigError: a model that this program does not compute.
        StorageError: the system or the hub refused to read.
        UsageError: the hub has no such model, or a dtype that weights cannot have.
    """
    layout.check_dtype(dtype)
    place = hub.resolve(path, revision=revision)
    if is_gguf(place):
        from moiety.model import gguf

        return gguf.load_gguf(place, dtype=dtype, backend=backend, packed=packed)
    folder = layout.checked_folder(place)
    if is_packed(folder):
        return quantized.load_quantized(folder, backend=backend, dtype=dtype)
    with _opened(folder, match) as stored:
        with torch.device("meta"):  # shapes alone: the weights come from the files
            model = Transformer(stored.config, backend=backend, initialize=False)
        shapes = shapes_of(model)
        blocks = dict(stored.blocks(model, shapes)) if packed else {}
        model.load_state_dict(dict(stored.tensors(shapes, dtype, blocks)), assign=True, strict=not blocks)
    if packed:
        slots.install_stored(model, blocks)
    return model.eval()


@contextlib.contextmanager
def open_parts(
    path: str | Path, *, revision: str | None = None, match: Match = "original"
) -> Iterator[Parts]:
    """Open a model without reading its weights; arguments and errors as of `load`."""
    place = hub.resolve(path, revision=revision)
    if is_gguf(place):
        from moiety.model import gguf

        yield gguf.open_gguf(place)
        return
    with _opened(layout.checked_folder(place), match) as stored:
        yield stored.parts(shapes_of(hollow(stored.config)))


def load_weights(
    path: str | Path, model: Transformer, put: Callable[[str, Tensor, Tensor], None] | None = None
) -> None:
    """Read weights into a model that exists, bit for bit: the config and every dtype must be the same.

    With `put` the model has parts of its tensors alone: `put(name, tensor, whole)` writes one from what is stored.

    Raises:
        FormatError, StorageError: as `load`.
        UsageError: the checkpoint is of another model; nothing was changed.
    """
    with _opened(layout.checked_folder(path)) as stored:
        if stored.config != model.config:
            raise UsageError(
                f"{path} is a checkpoint of another model: {stored.config}, not {model.config}",
                hint="build the model with the config of the checkpoint (`load_config`)",
            )
        state = model.state_dict()
        for name, tensor in stored.tensors(shapes_of(model if put is None else hollow(model.config)), None):
            if tensor.dtype != state[name].dtype:
                raise UsageError(f"{name} is {tensor.dtype} in {path}, but {state[name].dtype} in the model")
            if put is None:
                state[name].copy_(tensor)
            else:
                put(name, state[name], tensor)


def load_config(path: str | Path, *, revision: str | None = None, match: Match = "original") -> ModelConfig:
    """The config of a checkpoint, without its weights; `path`, `revision` and `match` as for `load`.

    Raises:
        FormatError: no `config.json`, or one that is not understood.
        ConfigError: its values cannot describe a model.
    """
    place = hub.resolve(path, revision=revision, weights=False)
    if is_gguf(place):
        from moiety.model import gguf

        return gguf.load_config(place)
    return _read_config(layout.existing_folder(place), match).config


def load_extra(path: str | Path) -> dict[str, Any]:
    """What was given to `save` as `extra`; empty when nothing was.

    Raises:
        FormatError: the file is damaged.
    """
    folder = layout.existing_folder(path)
    return storage.read_json(storage.inside(folder, layout.EXTRA)) if (folder / layout.EXTRA).exists() else {}


def is_gguf(path: Path) -> bool:
    """True for what can only be a GGUF: a `.gguf` that is no folder."""
    return path.suffix == ".gguf" and not path.is_dir()


def is_packed(folder: Path) -> bool:
    """True for a folder that `quantized` wrote; whether `config.json` is sound is for whoever reads it."""
    values = storage.read_json(storage.inside(folder, "config.json"))
    said = values.get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == "moiety"


def size_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights on disk."""
    return sum(
        tensor.numel() * _stored_dtype(name, tensor.dtype, dtype).itemsize
        for name, tensor in model.state_dict().items()
    )


def write_model(
    folder: Path,
    model: Transformer,
    *,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, object] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = layout.SHARD_BYTES,
    fetch: Fetch | None = None,
) -> FamilyChoice:
    """Fill a folder from `storage.new_folder`; arguments and errors as for `save`.

    With `fetch` the model has shapes and dtypes alone (`parts.hollow`): `fetch(name, expert)` gives one of its tensors,
    or one matrix of a stack, when its turn comes.
    """
    refuse_adapters(model, "a checkpoint has none")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}",
            hint="save the tokenizer that the model was trained with",
        )
    packed = quantized.description(model)
    choice = FamilyChoice(OWN, "packed weights have our own layout") if packed else family_for(model.config)
    entries = _entries(model, choice.family, dtype, fetch)
    tiles = {name: entries.pop(name) for name in [*entries] if name.endswith(".tiles")}
    end_id = None if tokenizer is None else tokenizer.end_id
    ends = [] if tokenizer is None else [*dict.fromkeys((tokenizer.end_id, *tokenizer.answer_ends))]
    special = {
        "bos_token_id": None,
        "eos_token_id": ends if len(ends) > 1 else end_id,
        "pad_token_id": end_id,
    }
    kinds = [entry.dtype for entry in entries.values()]
    stored_as = str(max(set(kinds), key=kinds.count)).removeprefix("torch.")
    config = {**choice.family.write(model.config), **special, "dtype": stored_as, "torch_dtype": stored_as}
    layout.write_json(folder / "config.json", {**config, **packed})
    layout.write_json(folder / "generation_config.json", special)
    if extra is not None:
        layout.write_json(folder / layout.EXTRA, dict(extra))
    if tokenizer is not None:
        tokenizer.save(folder)
    layout.write_shards(folder, entries, max_shard_bytes)
    if tiles:
        ordered = expert_file.entries_in_order(model, tiles)
        write_tensors(folder / layout.TILES, ordered, multiple=EXPERT_MULTIPLE)
    return choice


def _stored_dtype(name: str, own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is on disk. A selection bias moves in steps that bfloat16 would lose; tiles are bytes."""
    return own if dtype is None or name.endswith(("selection_bias", ".tiles")) else dtype


def _entries(
    model: Transformer, family: Family, dtype: torch.dtype | None, fetch: Fetch | None = None
) -> dict[str, Entry]:
    layout.check_dtype(dtype)
    state = model.state_dict()
    entries: dict[str, Entry] = {}
    for piece in family.pieces(model.config, {name: tuple(tensor.shape) for name, tensor in state.items()}):
        kind = _stored_dtype(piece.ours, state[piece.ours].dtype, dtype)
        assert piece.theirs not in entries, piece
        get = functools.partial(_fetched, fetch or functools.partial(_part, state), piece)
        entries[piece.theirs] = Entry(piece.shape, kind, get)
    return entries


def _part(state: Mapping[str, Tensor], name: str, expert: int | None) -> Tensor:
    return state[name] if expert is None else state[name][expert]


def _fetched(fetch: Fetch, piece: Piece) -> Tensor:
    return _view(fetch(piece.ours, piece.expert), piece._replace(expert=None)).detach().reshape(piece.shape)


def _view(tensor: Tensor, piece: Piece) -> Tensor:
    """The part of our tensor that a piece is, its elements in the order of theirs."""
    part = tensor if piece.expert is None else tensor[piece.expert]
    if not part.dim():
        return part
    part = part.narrow(piece.axis, piece.start, piece.stop - piece.start)
    if piece.interleaved:
        part = part.unflatten(piece.axis, (2, -1)).transpose(piece.axis, piece.axis + 1)
    return part.movedim(-1, piece.axis) if piece.transposed else part


class _Read(NamedTuple):
    """What a `config.json` says."""

    family: Family
    config: ModelConfig
    packing: Packing | None


def _read_config(folder: Path, match: Match) -> _Read:
    file = storage.inside(folder, "config.json")
    values = storage.read_json(file)
    try:
        packing = packing_of(values)
        plain = {key: value for key, value in values.items() if key != "quantization_config"}
        family = family_of(plain)
        return _Read(family, family.read(plain, match=match), packing)
    except (FormatError, ConfigError) as error:
        raise type(error)(f"{file}: {error.message}", hint=error.hint) from error


@contextlib.contextmanager
def _opened(folder: Path, match: Match = "original") -> Iterator[Stored]:
    """A checkpoint, every header checked and every file open."""
    read = _read_config(folder, match)
    if read.packing is not None and read.packing.method == "moiety":
        raise UsageError(
            f"the weights of {folder} are packed", hint="give the checkpoint that it was packed from"
        )
    with layout.open_weights(folder, read.packing) as weights:
        _check_sizes(folder, read.config, weights)
        yield Stored(folder=folder, family=read.family, config=read.config, weights=weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """An open checkpoint: what it is, and its weights by the family's names."""

    folder: Path
    family: Family
    config: ModelConfig
    weights: Mapping[str, Weight]

    def tensors(
        self,
        wanted: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype | None,
        leave: Container[str] = (),
    ) -> Iterator[tuple[str, Tensor]]:
        """Our tensors one after the other, put together from theirs; everything is checked before the first.

        Those in `leave` are checked, and not read.

        Raises:
            FormatError: tensors missing, left over, misshapen or unreadable.
        """
        parts = self.parts(wanted, dtype)
        for name in wanted:
            if name not in leave:
                yield name, parts.read(name)

    def parts(self, wanted: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = None) -> Parts:
        """Our tensors by name, each put together from theirs when it is asked for. Raises like `tensors`."""
        pieces: dict[str, list[Piece]] = {name: [] for name in wanted}
        for piece in self.family.pieces(self.config, wanted, self.weights.keys()):
            pieces[piece.ours].append(piece)
        self._check([piece for group in pieces.values() for piece in group])
        self._check_second_head()
        dtypes = {
            name: _stored_dtype(name, self._dtype(name, group), dtype) for name, group in pieces.items()
        }

        def read(name: str) -> Tensor:
            tensor = torch.empty(wanted[name], dtype=dtypes[name])
            for piece in pieces[name]:
                self.weights[piece.theirs].read_into(_view(tensor, piece))
            return tensor

        return Parts(config=self.config, dtypes=dtypes, read=read)

    def _dtype(self, name: str, pieces: Sequence[Piece]) -> torch.dtype:
        kinds = (self.weights[piece.theirs].dtype for piece in pieces)
        return (
            torch.float32 if name.endswith("selection_bias") else functools.reduce(torch.promote_types, kinds)
        )

    def blocks(
        self, model: Transformer, wanted: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, PackedWeight]]:
        """What is stored as mxfp4, by our parameter: the same codes and scales in tiles."""
        form = FORMATS["mxfp4"]
        packable = {slot.parameter: slot for group in slots.slots(model).values() for slot in group}
        pieces = list(self.family.pieces(self.config, wanted, self.weights.keys()))
        self._check(pieces)
        for name, slot in packable.items():
            mine = [piece._replace(transposed=False) for piece in pieces if piece.ours == name]
            if not mine or not all(self.weights[piece.theirs].is_mxfp4 for piece in mine):
                continue
            shape = wanted[name]
            whole = Codes(
                torch.empty(shape, dtype=torch.uint8),
                torch.empty((*shape[:-1], shape[-1] // form.group), dtype=torch.uint8),
            )
            for piece in mine:
                for target, part in zip(whole, self.weights[piece.theirs].codes(), strict=True):
                    if target is not None and part is not None:
                        view = _view(target, piece)
                        view.copy_(part.reshape(view.shape))
            yield name, pack_codes(whole, form, interleaved=slot.interleaved)

    def _check(self, pieces: Sequence[Piece]) -> None:
        needed = {piece.theirs for piece in pieces}
        missing = sorted(needed - self.weights.keys())
        if missing:
            raise FormatError(
                f"{self.folder} lacks {layout.listed(missing)}",
                hint="a shard is missing or config.json is of another model",
            )
        left = self.weights.keys() - needed - ({self.family.head} if self.config.tied else set())
        left -= self.family.ignored_names(left, self.config)
        if left:
            raise FormatError(
                f"{self.folder} also has {layout.listed(sorted(left))}, which a {self.family.model_type} model of this "
                "config has not",
                hint="config.json is of another model, or the weights hold more than a model",
            )
        for piece in pieces:
            weight = self.weights[piece.theirs]
            if weight.shape != piece.shape:
                raise FormatError(
                    f"{weight.path}: tensor {piece.theirs} has shape {weight.shape}; by config.json it is {piece.shape}"
                )
            if weight.dtype not in WEIGHT_DTYPES:
                raise FormatError(
                    f"{weight.path}: tensor {piece.theirs} is {DTYPE_NAMES[weight.dtype]}; allowed are "
                    f"{', '.join(DTYPE_NAMES[one] for one in WEIGHT_DTYPES)}",
                    hint="quantized weights are read where config.json has a quantization_config of fp8 or mxfp4",
                )

    def _check_second_head(self) -> None:
        """A tied model may store its head all the same, as long as it is the embedding."""
        head = self.family.head
        if not self.config.tied or head not in self.weights:
            return
        embedding = next(
            piece.theirs
            for piece in self.family.pieces(self.config, {"embed.weight": (self.config.vocab_size,)})
        )
        if not torch.equal(self.weights[head].read(), self.weights[embedding].read()):
            raise FormatError(
                f"{self.weights[head].path}: config.json says tie_word_embeddings, but {head} is not {embedding}",
                hint="set tie_word_embeddings to false in config.json",
            )


def _check_sizes(folder: Path, config: ModelConfig, weights: Mapping[str, Weight]) -> None:
    """Refuse a config far beyond the weights before anything is built by it."""
    stored = sum(math.prod(weight.shape) for weight in weights.values())
    described = cost.parameters(config).total if config.layers <= len(weights) else None
    if described is None or described > 16 * stored + (1 << 20):
        raise FormatError(
            f"{folder / 'config.json'} describes {config.layers} layers, but {len(weights)} tensors with "
            f"{stored:,} parameters are stored",
            hint="config.json is of another model, or shards are missing",
        )
