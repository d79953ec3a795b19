"""A model from one format into another, with its tokenizer, its end tokens and its chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch

from moiety import storage
from moiety.errors import FormatError
from moiety.model import checkpoint, gguf, hub
from moiety.model.families import FamilyChoice
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer

__all__ = ["convert", "read_tokenizer", "save_beside"]

# What stands beside the weights in the layout of transformers, and is taken over as it is.
BESIDE = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
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
        with_tokenizer: From folder to folder its files are copied; into or out of a GGUF it must be byte-level BPE.

    Returns:
        What it was written as, in words.

    Raises:
        FormatError, ConfigError, StorageError, UsageError, DependencyError: as of the loader and of the writer.
    """
    place = hub.resolve(source, revision=revision)
    model = checkpoint.load(place, match=match)
    if form == "gguf":
        tokenizer = read_tokenizer(place) if with_tokenizer else None
        template = (
            None if tokenizer is None or tokenizer.chat_template is None else tokenizer.chat_template.text
        )
        name = gguf.save_gguf(model, target, kind=kind, tokenizer=tokenizer, chat_template=template)
        return f"{name} in {kind}"
    choice = save_beside(model, place, target, dtype=dtype, with_tokenizer=with_tokenizer)
    return f"{choice.family.model_type} ({choice.reason})"


def save_beside(
    model: Transformer,
    source: Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    with_tokenizer: bool = True,
) -> FamilyChoice:
    """Write a model to a folder, with the tokenizer and the end tokens of the folder or GGUF that it came from.

    Raises:
        FormatError, StorageError, UsageError: as of `checkpoint.save`.
    """
    copies = source.is_dir()
    tokenizer = read_tokenizer(source) if with_tokenizer and not copies else None
    with storage.new_folder(target, needed_bytes=checkpoint.size_bytes(model, dtype) + (1 << 24)) as folder:
        choice = checkpoint.write_model(folder, model, tokenizer=tokenizer, dtype=dtype)
        if copies:
            _keep_beside(source, folder, BESIDE if with_tokenizer else ("generation_config.json",))
    return choice


def read_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder or of a GGUF file, with its chat template.

    Raises:
        FormatError: there is none, it is damaged, or it is not byte-level BPE.
    """
    if place.is_dir():
        return Tokenizer.load(place)
    tokenizer = gguf.read_tokenizer(place)
    tokenizer.special_tokens = gguf.read_special_tokens(place)
    text = gguf.read_chat_template(place)
    if text is not None:
        tokenizer.chat_template = ChatTemplate(
            text, special_tokens=tokenizer.special_tokens, origin=f"{place}: tokenizer.chat_template"
        )
    return tokenizer


def _keep_beside(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Files beside the weights, and the end tokens, of one checkpoint folder into another that is being filled."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(storage.inside(source, name), folder / name)
    theirs = storage.read_json(storage.inside(source, "config.json"))
    ours = storage.read_json(folder / "config.json")
    ids = {key: theirs[key] for key in IDS if key in theirs}
    try:
        text = json.dumps({**ours, **ids}, indent=2, allow_nan=False)
    except ValueError as error:
        raise FormatError(f"{source / 'config.json'} has token ids that are none: {ids}") from error
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
