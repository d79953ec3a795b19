"""`moiety chat`: a conversation in the model's own format; as plain text with one that was never taught any."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moiety.cli.output import command, talk
from moiety.cli.own import import_own_routers
from moiety.errors import UsageError
from moiety.infer.options import (
    EngineOptions,
    RecordOptions,
    SamplingOptions,
    StreamOptions,
)
from moiety.serve.client import RemoteConversation, RemoteOptions, reach

if TYPE_CHECKING:
    from moiety.infer.conversation import Conversation

__all__ = ["app"]

CONTROLS = (*range(9), *range(11, 32), *range(127, 160))  # what could move a terminal's cursor
app = command("moiety chat", "Talk to a model, line by line; an empty line or Ctrl-D ends.")


@app.default
def chat(
    path: str = "",
    /,
    *,
    remote: Annotated[RemoteOptions, Parameter(name="*")] = RemoteOptions(),
    system: Annotated[str, Parameter(help="what the model is told first, if it was taught to chat")] = "",
    max_tokens: Annotated[int, Parameter(help="most tokens in an answer")] = 80,
    sampling: Annotated[SamplingOptions, Parameter(name="*")] = SamplingOptions(),
    backend: Annotated[str, Parameter(help="who multiplies the experts")] = "auto",
    experts_per_token: Annotated[int, Parameter(help="use this many; 0 is the model's own number")] = 0,
    engine: Annotated[EngineOptions, Parameter(name="*")] = EngineOptions(),
    stream: Annotated[StreamOptions, Parameter(name="*")] = StreamOptions(),
    record: Annotated[RecordOptions, Parameter(name="*")] = RecordOptions(),
    adapter: Annotated[str, Parameter(help="folder of an adapter to put on the model")] = "",
    plain: Annotated[
        bool, Parameter(negative="", help="one token after the other, without the engine")
    ] = False,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
) -> int:
    """Each line you type is answered; a model without a chat template continues it to the line's end.

    Parameters
    ----------
    path
        A checkpoint or run folder, a .gguf file, or owner/name on the hub; none with --url.
    """
    here = (path, backend, experts_per_token, engine, stream, record, plain, router, adapter)
    none = ("", "auto", 0, EngineOptions(), StreamOptions(), RecordOptions(), False, "", "")
    if bool(path) == bool(remote.url) or (remote.url and here != none):
        raise UsageError(
            "one of a path and --url is wanted, and a server has options of its own",
            hint="moiety chat --url http://127.0.0.1:8000",
        )
    if plain and engine != EngineOptions():
        raise UsageError("--plain has no engine", hint="leave out the engine's options")
    how: dict[str, Any] = {"system": system, "max_tokens": max_tokens, "sampling": sampling}
    if remote.url:
        _talk(RemoteConversation(*reach(remote), **how))
        return 0
    from moiety.infer.conversation import Conversation
    from moiety.infer.offload import store_of
    from moiety.infer.open import open_model
    from moiety.infer.recording import recording

    import_own_routers(router)
    say = talk().print
    loading: dict[str, Any] = {"backend": backend, "experts_per_token": experts_per_token}
    loading["adapters"] = [adapter] if adapter else []
    opened = open_model(path, stream=stream, engine=engine, say=say, **loading)
    with recording(opened.model, record, name=path, source="moiety chat", say=say) as recorder:
        _talk(Conversation(opened, plain=plain, options=engine, recorder=recorder, **how))
    store = store_of(opened.model)
    if store is not None:
        say(store.statistics().words)
    return 0


def _talk(conversation: Conversation | RemoteConversation) -> None:
    console = talk()
    about = "" if conversation.has_format else "; the model continues text, it was not taught to answer"
    console.print(f"an empty line ends{about}")
    while line := _ask(console.is_terminal):
        for piece in conversation.answer(line):
            sys.stdout.write(piece.translate(dict.fromkeys(CONTROLS)))
            sys.stdout.flush()
        print()


def _ask(prompting: bool) -> str:
    """One line of input; empty at the end of it."""
    try:
        return input("> " if prompting else "").strip()
    except EOFError:
        return ""
