"""`moiety.load`: any model from a folder, a GGUF file or the hub, whichever kind it is."""

from __future__ import annotations

from pathlib import Path

import torch

from moiety import storage
from moiety.model import checkpoint, hub, switch_files
from moiety.model.families import Match
from moiety.model.switch import SwitchTransformer
from moiety.model.transformer import Transformer

__all__ = ["is_switch", "load"]


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    match: Match = "original",
    packed: bool = False,
) -> Transformer | SwitchTransformer:
    """Read a model, in evaluation mode: a decoder of any known family, or the encoder-decoder Switch Transformer.

    Args and errors are those of `moiety.model.checkpoint.load`.
    """
    place = hub.resolve(path, revision=revision)
    if is_switch(place):
        return switch_files.load_switch(place, backend=backend, dtype=dtype)
    return checkpoint.load(place, backend=backend, dtype=dtype, match=match, packed=packed)


def is_switch(place: Path) -> bool:
    """True for the folder of a Switch Transformer, by its `config.json`."""
    if checkpoint.is_gguf(place) or not (place / "config.json").is_file():
        return False
    values = storage.read_json(storage.inside(place, "config.json"))
    return values.get("model_type") == switch_files.MODEL_TYPE
