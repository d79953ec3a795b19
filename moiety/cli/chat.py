"""`moiety chat`: a conversation as plain text, for models that were never taught a chat format."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from moiety.cli.output import command, talk
from moiety.cli.own import import_own_routers
from moiety.infer.options import SamplingOptions

__all__ = ["app"]

app = command("moiety chat", "Talk to a trained model, line by line; an empty line or Ctrl-D ends.")


@app.default
def chat(
    path: str,
    /,
    *,
    max_tokens: Annotated[int, Parameter(help="most tokens in an answer")] = 80,
    sampling: Annotated[SamplingOptions, Parameter(name="*")] = SamplingOptions(),
    backend: Annotated[str, Parameter(help="who multiplies the experts")] = "auto",
    experts_per_token: Annotated[int, Parameter(help="use this many; 0 is the model's own number")] = 0,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
) -> int:
    """Each line you type is continued; an answer ends with its line.

    Parameters
    ----------
    path
        A checkpoint folder, or a run folder, whose newest checkpoint is taken.
    """
    from moiety.infer.generate import generate
    from moiety.infer.open import open_model

    import_own_routers(router)
    opened = open_model(path, backend=backend, experts_per_token=experts_per_token)
    console, tokenizer = talk(), opened.tokenizer
    console.print("an empty line ends; the model continues text, it was not taught to answer")
    transcript = ""
    while line := _ask(console.is_terminal):
        transcript += line + "\n"
        room = max(opened.model.config.max_positions - max_tokens, 1)
        ids = tokenizer.encode(transcript)[-room:]
        answer = ""
        stream = generate(
            opened.model, ids, max_tokens=max_tokens, sampling=sampling, end_id=tokenizer.end_id
        )
        for piece in tokenizer.stream(stream):
            line_end = piece.find("\n") if answer.strip() or piece.strip() else -1
            sys.stdout.write(piece if line_end < 0 else piece[:line_end])
            sys.stdout.flush()
            answer += piece
            if line_end >= 0:
                break
        print()
        transcript += answer.rstrip("\n") + "\n"
    return 0


def _ask(prompting: bool) -> str:
    """One line of input; empty at the end of it."""
    try:
        return input("> " if prompting else "").strip()
    except EOFError:
        return ""
