"""A model from one format into another, with its tokenizer, its end tokens and its chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from moiety import storage
from moiety.errors import FormatError, UsageError
from moiety.model import checkpoint, gguf, hub
from moiety.model.load import is_switch, load
from moiety.model.switch import SwitchTransformer
from moiety.model.switch_files import MODEL_TYPE, write_switch
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer

__all__ = ["convert", "end_tokens", "read_tokenizer", "save_beside", "write_beside"]

# What stands beside the weights in the layout of transformers, and is taken over as it is.
BESIDE = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    form: Literal["hf", "gguf"] = "hf",
    kind: str = "f16",
    dtype: torch.dtype | None = None,
    match: Literal["original", "hf"] = "original",
    revision: str | None = None,
    with_tokenizer: bool = True,
) -> str:
    """Read a model whole and write it; what was at `target` stays until the new one is whole.

    Args:
        source: A checkpoint folder, a `.gguf` file, or `owner/name` on the hub.
        target: A folder, or for "gguf" a file.
        form: "hf" for the layout of transformers, or "gguf".
        kind: Of the matrices in a GGUF.
        dtype: Of the weights in "hf"; None keeps each as it is.
        match: As of `checkpoint.load`.
        revision: On the hub.
        with_tokenizer: From folder to folder its files are copied; into or out of a GGUF it must be a BPE one.

    Returns:
        What it was written as, in words.

    Raises:
        FormatError, ConfigError, StorageError, UsageError, DependencyError: as of the loader and of the writer.
    """
    place = hub.resolve(source, revision=revision)
    if form == "gguf" and is_switch(place):
        raise UsageError(
            f"{source} is a Switch Transformer, and GGUF has no architecture for an encoder-decoder with experts",
            hint="convert it to another dtype with --to hf --dtype bf16",
        )
    model = load(place, match=match)
    if form == "gguf":
        assert isinstance(model, Transformer), type(model)
        tokenizer = read_tokenizer(place) if with_tokenizer else None
        template = (
            None if tokenizer is None or tokenizer.chat_template is None else tokenizer.chat_template.text
        )
        ends = () if tokenizer is None else end_tokens(place)
        name = gguf.save_gguf(
            model, target, kind=kind, tokenizer=tokenizer, chat_template=template, ends=ends
        )
        return f"{name} in {kind}"
    return save_beside(model, place, target, dtype=dtype, with_tokenizer=with_tokenizer)


def save_beside(
    model: Transformer | SwitchTransformer,
    source: Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    with_tokenizer: bool = True,
) -> str:
    """Write a model to a folder, with the tokenizer and the end tokens of the folder or GGUF that it came from.

    Raises:
        FormatError, StorageError, UsageError: as of `checkpoint.save`.
    """
    with storage.new_folder(target, needed_bytes=checkpoint.size_bytes(model, dtype) + (1 << 24)) as folder:
        return write_beside(folder, model, source, dtype=dtype, with_tokenizer=with_tokenizer)


def write_beside(
    folder: Path,
    model: Transformer | SwitchTransformer,
    source: Path,
    *,
    dtype: torch.dtype | None = None,
    with_tokenizer: bool = True,
    **options: Any,
) -> str:
    """`save_beside` into a folder from `storage.new_folder`; `options` are further ones of `checkpoint.write_model`."""
    copies = source.is_dir()
    tokenizer = read_tokenizer(source) if with_tokenizer and not copies else None
    if isinstance(model, SwitchTransformer):
        write_switch(folder, model, dtype=dtype)
        done = MODEL_TYPE
    else:
        choice = checkpoint.write_model(folder, model, tokenizer=tokenizer, dtype=dtype, **options)
        done = f"{choice.family.model_type} ({choice.reason})"
    if copies:
        _keep_beside(source, folder, BESIDE if with_tokenizer else ("generation_config.json",))
    elif tokenizer is not None:
        _note_ends(folder, [tokenizer.end_id, *end_tokens(source)])
    return done


def read_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder or of a GGUF file, with its chat template.

    Raises:
        FormatError: there is none, it is damaged, or it is not BPE.
    """
    if place.is_dir():
        return Tokenizer.load(place)
    tokenizer = gguf.read_tokenizer(place)
    text = gguf.read_chat_template(place)
    if text is not None:
        tokenizer.chat_template = ChatTemplate(
            text, special_tokens=tokenizer.special_tokens, origin=f"{place}: tokenizer.chat_template"
        )
    return tokenizer


def end_tokens(place: Path) -> tuple[int, ...]:
    """The tokens that end an answer by `generation_config.json`, or in a GGUF besides its end token.

    Raises:
        FormatError: they are no tokens.
    """
    if not place.is_dir():
        return gguf.read_ends(place)
    if not (place / "generation_config.json").is_file():
        return ()
    file = storage.inside(place, "generation_config.json")
    named = storage.read_json(file).get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in named):
        raise FormatError(f"{file} has eos_token_id {named!r:.80}; allowed is a token or a list of them")
    return tuple(named)


def _note_ends(folder: Path, ends: Sequence[int]) -> None:
    """Put several end tokens into a folder that is being filled."""
    for name in ("config.json", "generation_config.json") if len(ends) > 1 else ():
        _note(folder / name, {"eos_token_id": list(ends)})


def _keep_beside(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Files beside the weights, and the end tokens, of one checkpoint folder into another that is being filled."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(storage.inside(source, name), folder / name)
    theirs = storage.read_json(storage.inside(source, "config.json"))
    _note(folder / "config.json", {key: theirs[key] for key in IDS if key in theirs})


def _note(file: Path, ids: Mapping[str, object]) -> None:
    """Put token ids into a file of a folder that is being filled."""
    try:
        text = json.dumps({**storage.read_json(file), **ids}, indent=2, allow_nan=False)
    except ValueError as error:
        raise FormatError(f"{file.name} has token ids that are none: {ids}") from error
    file.write_text(text + "\n", encoding="utf-8")
