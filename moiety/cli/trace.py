"""`moiety trace`: which experts each token of a prompt went to, layer by layer, and why."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, print_json, print_table
from moiety.cli.own import import_own_routers
from moiety.errors import UsageError

if TYPE_CHECKING:
    from moiety.observe.trace import Trace

__all__ = ["app"]

NARROW = 60  # where `print_table` changes to blocks

app = command("moiety trace", "Show which experts each token of a prompt went to, and why.")


@app.default
def trace(
    path: str,
    prompt: str,
    /,
    *,
    layer: Annotated[int | None, Parameter(help="only this layer")] = None,
    token: Annotated[int | None, Parameter(help="only this token, counted from 0")] = None,
    top: Annotated[int, Parameter(help="most experts shown of a token")] = 2,
    explain: Annotated[bool, Parameter(negative="", help="in words; the last token unless --token")] = False,
    teach: Annotated[bool, Parameter(negative="", help="--explain, and what the words mean")] = False,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    json: Annotated[bool, Parameter(negative="", help="print JSON, with every score")] = False,
) -> int:
    """Run the prompt once and tabulate: each expert with its share of the token's combine weight.

    Parameters
    ----------
    path
        A checkpoint folder, or a run folder, whose newest checkpoint is taken.
    prompt
        The text to trace.
    """
    from moiety.infer.open import open_model
    from moiety.observe import trace as tracing

    if top < 1:
        raise UsageError(f"top is {top}; it must be positive")
    import_own_routers(router)
    opened = open_model(path)
    ids = opened.tokenizer.encode_prompt(prompt) if prompt else []
    texts = [opened.tokenizer.decode([one]) for one in ids]
    traced = tracing.trace(opened.model, ids, texts=texts)
    if layer is not None:
        traced = dataclasses.replace(traced, layers=(traced.layer(layer),))
    if token is not None and not 0 <= token < len(ids):
        raise UsageError(f"there is no token {token}", hint=f"the prompt has tokens 0 to {len(ids) - 1}")
    shown = range(len(ids)) if token is None else (token,)
    explained = traced.layers if explain or teach else ()
    words = [tracing.explain(traced, shown[-1], one.layer) for one in explained]
    if json:
        print_json({"prompt": prompt, **_as_json(traced, shown), "explanations": words})
        return 0
    _print(traced, shown, top)
    for line in [*words, *(("", *tracing.glossary()) if teach else ())]:
        print(line)
    return 0


def _as_json(traced: Trace, shown: Sequence[int]) -> dict[str, Any]:
    tokens = [{"token": i, "id": traced.token_ids[i], "text": traced.texts[i]} for i in shown]
    layers = [dataclasses.asdict(one) for one in traced.layers]
    for one in layers:
        one["tokens"] = [{"token": i, **one["tokens"][i]} for i in shown]
    return {"tokens": tokens, "layers": layers}


def _print(traced: Trace, shown: Sequence[int], top: int) -> None:
    """As many layers side by side as fit, the rest below; on a narrow terminal a block for each token."""
    from moiety.observe.trace import in_short

    rows = [
        [f"{i} {traced.texts[i]!r}", *(in_short(one.tokens[i], top) for one in traced.layers)] for i in shown
    ]
    names = ["token", *(f"layer {one.layer}" for one in traced.layers)]
    widths = [max(map(len, column)) + 3 for column in zip(names, *rows, strict=True)]
    columns = shutil.get_terminal_size().columns
    fit = max((columns - widths[0] - 1) // max(widths[1:]), 1) if columns >= NARROW else len(names)
    for start in range(1, len(names), fit):
        part = slice(start, start + fit)
        title = "experts, and their share of the weight" if start == 1 else "further layers"
        print_table(title, ["token", *names[part]], [[row[0], *row[part]] for row in rows])
