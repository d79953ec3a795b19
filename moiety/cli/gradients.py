"""`moiety gradients`: does every router and expert of a model learn anything?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table
from moiety.cli.own import import_own_routers
from moiety.errors import CheckFailed, DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from moiety.infer.open import Opened

__all__ = ["app"]

app = command("moiety gradients", "Check that every router and expert of a model gets a gradient.")


@app.default
def gradients(
    path: str,
    /,
    *,
    text: Annotated[Path | None, Parameter(help="learn this file")] = None,
    prompt: Annotated[str, Parameter(help="learn this text")] = "",
    length: Annotated[int, Parameter(help="tokens in a sequence")] = 128,
    sequences: Annotated[int, Parameter(help="most sequences")] = 8,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    json: Annotated[bool, Parameter(negative="", help="print JSON")] = False,
) -> int:
    """One training step that changes nothing. Without a text it learns random tokens.

    Parameters
    ----------
    path
        A checkpoint folder, or a run folder, whose newest checkpoint is taken.
    """
    from moiety.infer.open import open_model
    from moiety.observe.gradients import gradient_report

    if text is not None and prompt:
        raise UsageError("both --text and --prompt were given", hint="give one of them")
    for name, number, least in (("length", length, 2), ("sequences", sequences, 1)):
        if number < least:
            raise UsageError(f"{name} is {number}; it must be at least {least}")
    import_own_routers(router)
    opened = open_model(path)
    tokens_BS = _tokens(opened, _read(text) if text is not None else prompt, length, sequences)
    report = gradient_report(opened.model, tokens_BS)
    if json:
        print_json(report.plain())
    else:
        rows = [
            [
                f"layer {one.layer}",
                *map(_number, (one.router_norm, one.balance_norm)),
                f"{one.experts_reached} of {one.experts}",
                *map(_number, (one.expert_norm_max, one.expert_norm_median)),
            ]
            for one in report.layers
        ]
        columns = ["", "router, text", "router, balance", "experts", "largest", "median"]
        print_table(f"norms of gradients, {report.tokens} tokens", columns, rows)
        print("\n".join(one.verdict for one in report.layers))
    if not report.ok:
        bad = ", ".join(str(one.layer) for one in report.layers if not one.ok)
        raise CheckFailed(f"in layers {bad} something that should learn does not")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _tokens(opened: Opened, text: str, length: int, sequences: int) -> Tensor:
    """As many whole sequences as the text fills; a short text is one shorter sequence."""
    import torch

    if not text:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(opened.tokenizer.vocab_size, (sequences, length), generator=generator)
    ids = opened.tokenizer.encode(text)[: length * sequences]
    rows = max(len(ids) // length, 1)
    return torch.tensor([ids[: rows * length]]).view(rows, -1)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2e}"
