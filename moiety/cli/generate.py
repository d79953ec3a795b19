"""`moiety generate`: continue a prompt."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Annotated

from cyclopts import Parameter

from moiety.cli.output import command, print_json, talk
from moiety.cli.own import import_own_routers
from moiety.infer.options import SamplingOptions

__all__ = ["app"]

app = command("moiety generate", "Continue a prompt with a trained model.")


@app.default
def generate(
    path: str,
    prompt: str = "",
    /,
    *,
    max_tokens: Annotated[int, Parameter(help="most tokens to generate")] = 128,
    sampling: Annotated[SamplingOptions, Parameter(name="*")] = SamplingOptions(),
    backend: Annotated[str, Parameter(help="who multiplies the experts")] = "auto",
    experts_per_token: Annotated[int, Parameter(help="use this many; 0 is the model's own number")] = 0,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    json: Annotated[bool, Parameter(negative="", help="print JSON")] = False,
) -> int:
    """Print the prompt's continuation as it is drawn.

    Parameters
    ----------
    path
        A checkpoint folder, or a run folder, whose newest checkpoint is taken.
    prompt
        The text to continue; empty starts from nothing.
    """
    from moiety.infer.generate import generate as tokens_of
    from moiety.infer.open import open_model

    import_own_routers(router)
    opened = open_model(path, backend=backend, experts_per_token=experts_per_token)
    ids = opened.tokenizer.encode(prompt) or [opened.tokenizer.end_id]
    begun = time.perf_counter()
    stream = tokens_of(
        opened.model, ids, max_tokens=max_tokens, sampling=sampling, end_id=opened.tokenizer.end_id
    )
    drawn: list[int] = []
    for piece in opened.tokenizer.stream(_noted(stream, drawn)):
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    seconds = time.perf_counter() - begun
    text = opened.tokenizer.decode(drawn)
    if json:
        print_json(
            {"prompt": prompt, "text": text, "tokens": len(drawn), "tokens_per_second": len(drawn) / seconds}
        )
    else:
        print()
    talk().print(f"{len(drawn)} tokens, {len(drawn) / seconds:.1f} tokens/s")
    return 0


def _noted(stream: Iterable[int], drawn: list[int]) -> Iterator[int]:
    """The stream itself, each token also put into `drawn`."""
    for token in stream:
        drawn.append(token)
        yield token
