"""A model and its tokenizer from one path: a checkpoint folder, or a run folder's newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moiety.errors import UsageError
from moiety.model.checkpoint import load
from moiety.model.tokenizer import Tokenizer
from moiety.model.transformer import Transformer

__all__ = ["Opened", "find_checkpoint", "open_model"]


class Opened(NamedTuple):
    """What can be generated from."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a path means.

    Raises:
        UsageError: there is neither a checkpoint nor a run with one.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    steps = sorted((folder / "checkpoints").glob("step-*")) if (folder / "checkpoints").is_dir() else []
    whole = [step for step in steps if (step / "manifest.json").is_file()]
    if not whole:
        raise UsageError(
            f"{folder} is neither a checkpoint (no config.json) nor a run with one (no checkpoints/step-*)",
            hint="give the folder that training wrote, such as runs/demo/moe; `make demo` makes one",
        )
    return whole[-1]


def open_model(path: str | Path, *, backend: str = "auto") -> Opened:
    """Load a model and the tokenizer beside it, ready to generate.

    Raises:
        UsageError: nothing to load there.
        FormatError: a file is missing, damaged or of an unknown layout.
    """
    folder = find_checkpoint(path)
    model = load(folder, backend=backend)
    return Opened(model.eval(), Tokenizer.load(folder), folder)
