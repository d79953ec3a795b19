"""`moiety convert`: a model from one format into another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from moiety.cli.output import command, print_json, short
from moiety.errors import UsageError

__all__ = ["app"]

app = command("moiety convert", "Write a model in another format, or with another dtype.")


@app.default
def convert(
    source: str,
    target: str,
    /,
    *,
    to: Annotated[
        Literal["", "hf", "gguf"],
        Parameter(help="format; empty goes by the target's name: .gguf or a folder"),
    ] = "",
    kind: Annotated[
        Literal["", "f32", "f16", "bf16", "q8_0", "q4_0"],
        Parameter(help="gguf: of the matrices; empty is f16"),
    ] = "",
    dtype: Annotated[
        Literal["", "fp32", "bf16", "fp16"], Parameter(help="hf: of the weights; empty keeps each as it is")
    ] = "",
    match: Annotated[
        Literal["original", "hf"],
        Parameter(help="where transformers departs from the authors' code: read as they, or as hf"),
    ] = "original",
    revision: Annotated[str, Parameter(help="of a model of the hub: branch, tag or commit")] = "",
    tokenizer: Annotated[bool, Parameter(help="with the tokenizer; GGUF takes BPE only")] = True,
    json: Annotated[bool, Parameter(negative="", help="print JSON")] = False,
) -> int:
    """Read SOURCE whole, then write TARGET in one step.

    Parameters
    ----------
    source
        A checkpoint folder, a .gguf file, or owner/name on the hub.
    target
        A folder that is new or was written by this program, or a .gguf file.
    """
    form: Literal["hf", "gguf"] = to or ("gguf" if target.endswith(".gguf") else "hf")
    _check(source, target, form, kind, dtype)
    import torch

    from moiety.model import convert as work

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    done = work.convert(
        source,
        target,
        form=form,
        kind=kind or "f16",
        dtype=dtypes.get(dtype),
        match=match,
        revision=revision or None,
        with_tokenizer=tokenizer,
    )
    size = sum(file.stat().st_size for file in [Path(target), *Path(target).rglob("*")] if file.is_file())
    if json:
        print_json({"path": target, "format": form, "written_as": done, "bytes": size})
    else:
        print(f"{target}: {done}, {short(size)}B")
    return 0


def _check(source: str, target: str, form: str, kind: str, dtype: str) -> None:
    """Refuse words that contradict each other, before anything is read."""
    if form == "gguf" and not target.endswith(".gguf"):
        raise UsageError(f"{target!r} does not end with .gguf", hint="programs know GGUF files by their name")
    if (kind and form == "hf") or (dtype and form == "gguf"):
        given, belongs = ("--kind", "gguf") if kind else ("--dtype", "hf")
        raise UsageError(f"{given} is for {belongs}, but {target!r} is written as {form}")
    if os.path.realpath(source) == os.path.realpath(target):
        raise UsageError(
            f"{source} is source and target", hint="write somewhere else, then replace it yourself"
        )
