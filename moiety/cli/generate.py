"""`moiety generate`: continue one prompt or several."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moiety.cli import judged
from moiety.cli.output import command, print_json, talk
from moiety.cli.own import import_own_routers
from moiety.errors import UsageError
from moiety.infer.options import (
    EngineOptions,
    RecordOptions,
    RequestOptions,
    SamplingOptions,
    StreamOptions,
    biases_named,
)

if TYPE_CHECKING:
    from moiety.infer.open import Opened
    from moiety.observe.record import Recorder

__all__ = ["app"]

app = command("moiety generate", "Continue prompts with a trained model.")


@app.default
def generate(
    path: str,
    /,
    *prompts: str,
    n: Annotated[int, Parameter(help="answers to each prompt, with seeds one apart")] = 1,
    max_tokens: Annotated[int, Parameter(help="most tokens to generate")] = 128,
    stop: Annotated[tuple[str, ...], Parameter(help="texts that end an answer and are not part of it")] = (),
    logit_bias: Annotated[str, Parameter(help="added to logits of tokens, 17=-5,42=3 for instance")] = "",
    sampling: Annotated[SamplingOptions, Parameter(name="*")] = SamplingOptions(),
    backend: Annotated[str, Parameter(help="who multiplies the experts")] = "auto",
    experts_per_token: Annotated[int, Parameter(help="use this many; 0 is the model's own number")] = 0,
    engine: Annotated[EngineOptions, Parameter(name="*")] = EngineOptions(),
    stream: Annotated[StreamOptions, Parameter(name="*")] = StreamOptions(),
    record: Annotated[RecordOptions, Parameter(name="*")] = RecordOptions(),
    plain: Annotated[bool, Parameter(negative="", help="token after token, without the engine")] = False,
    adapter: Annotated[str, Parameter(help="folder of an adapter to put on the model")] = "",
    plan: Annotated[bool, Parameter(negative="", help="say what was planned beside it")] = False,
    router: Annotated[str, Parameter(help="import this module:Class, which the model's config names")] = "",
    json: Annotated[bool, Parameter(negative="", help="print JSON")] = False,
) -> int:
    """Print the continuation as it is drawn; of several, each when all are done.

    Under torchrun the processes share the experts of a plain model among them.

    Parameters
    ----------
    path
        A checkpoint folder, or a run folder, whose newest checkpoint is taken.
    prompts
        The texts to continue; none starts from nothing.
    """
    from moiety.infer.recording import recording

    asked = [prompt for prompt in prompts or ("",) for _ in range(n)]
    _check(n, len(asked), plain=plain, by_engine=bool(stop) or engine != EngineOptions())
    judged.begin(plan, allowed=len(asked) == 1 and not plain)
    request = RequestOptions(
        sampling=sampling, max_tokens=max_tokens, stop=stop, logit_bias=biases_named(logit_bias)
    )
    import_own_routers(router)
    with contextlib.ExitStack() as stack:
        unable = {"plan": plan, "record": record.record, "memory": stream.memory, "draft": engine.draft}
        loading: dict[str, Any] = {"stream": stream, "engine": engine, "experts_per_token": experts_per_token}
        loading |= {"adapters": [adapter] if adapter else [], "backend": backend}
        leads, opened = _open(stack, unable, path, loading)
        say = talk(quiet=not leads).print
        kept = recording(opened.model, record, name=path, source="moiety generate", say=say)
        recorder, watch = stack.enter_context(kept), judged.Watch(opened.model)
        if len(asked) == 1:
            how = (opened, asked[0], request, recorder)
            silent, pieces = json or not leads, _plain(*how) if plain else _streamed(*how, engine)
            answers = [_shown(asked[0], pieces, silent=silent, watch=watch)]
        else:
            answers = _several(opened, asked, n, request, engine, recorder)
        seconds = time.perf_counter() - watch.begun
    if leads:
        say(_tell(answers, seconds, json=json) + _streaming(opened))
    if plan:
        judged.judge_answer(opened, len(opened.tokenizer.encode_prompt(asked[0])), watch, engine.kv_dtype)
    return 0


def _open(
    stack: contextlib.ExitStack, unable: dict[str, object], path: str, loading: dict[str, Any]
) -> tuple[bool, Opened]:
    """Whether this process speaks, and the model: under torchrun all load it, in turn, and share its experts."""
    from moiety.infer.open import open_model

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True, open_model(path, say=talk().print, **loading)
    from moiety.parallel.share import in_turn, joined

    world = stack.enter_context(joined(unable))
    say = talk(quiet=not world.leads).print
    opened = in_turn(world, lambda: open_model(path, say=say, **loading), lambda one: one.model)
    return world.leads, opened


def _tell(answers: list[dict[str, Any]], seconds: float, *, json: bool) -> str:
    """Print what was not printed as it was drawn; how fast it was."""
    drawn = sum(answer["tokens"] for answer in answers)
    if json:
        print_json(answers[0] | {"tokens_per_second": drawn / seconds} if len(answers) == 1 else answers)
    elif len(answers) > 1:
        print("\n".join(f"[{number}] {answer['text']}" for number, answer in enumerate(answers, start=1)))
    return f"{drawn} tokens, {drawn / seconds:.1f} tokens/s"


def _check(n: int, answers: int, *, plain: bool, by_engine: bool) -> None:
    if n < 1 or (plain and (answers > 1 or by_engine)):
        raise UsageError(
            f"n is {n}, there are {answers} answers to give" + (", and --plain gives one" if plain else ""),
            hint="n is at least 1; --plain takes one prompt, no --stop and no option of the engine",
        )


def _streaming(opened: Opened) -> str:
    """What became of experts that were read from disk, to be said last."""
    from moiety.infer.offload import store_of

    store = store_of(opened.model)
    return "" if store is None else f"; {store.statistics().words}"


def _plain(
    opened: Opened, prompt: str, request: RequestOptions, recorder: Recorder | None
) -> Iterator[tuple[int, str]]:
    """Tokens drawn so far and the text that came with the last, by the definition."""
    from moiety.infer.generate import generate as tokens_of
    from moiety.model.tokenizer import TextStream

    text, drawn = TextStream(opened.tokenizer), 0
    stream = tokens_of(
        opened.model,
        opened.tokenizer.encode_prompt(prompt),
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        logit_bias=request.logit_bias,
        recorder=recorder,
    )
    for drawn, token in enumerate(stream, start=1):
        yield drawn, text.push(token)
        if token in opened.ends:
            break
    yield drawn, text.finish()


def _streamed(
    opened: Opened, prompt: str, request: RequestOptions, recorder: Recorder | None, options: EngineOptions
) -> Iterator[tuple[int, str]]:
    """The same by the engine."""
    from moiety.infer.engine import Engine

    one = dataclasses.replace(options, max_requests=1)
    engine = Engine(opened.model, opened.tokenizer, ends=opened.ends, options=one, recorder=recorder)
    for drawn, event in enumerate(engine.events(engine.submit(prompt, request)), start=1):
        yield drawn, event.text


def _shown(
    prompt: str, pieces: Iterator[tuple[int, str]], *, silent: bool, watch: judged.Watch
) -> dict[str, Any]:
    """What was answered, written out as it came."""
    text, tokens = "", 0
    for drawn, piece in pieces:
        if drawn > tokens:
            watch.token()
        text, tokens = text + piece, drawn
        if not silent:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not silent:
        print()
    return {"prompt": prompt, "text": text, "tokens": tokens}


def _several(
    opened: Opened,
    prompts: list[str],
    n: int,
    request: RequestOptions,
    engine_options: EngineOptions,
    recorder: Recorder | None,
) -> list[dict[str, Any]]:
    """All answers, worked on together."""
    from moiety.infer.engine import Engine

    engine = Engine(
        opened.model, opened.tokenizer, ends=opened.ends, options=engine_options, recorder=recorder
    )
    seeds = [request.sampling.seed + number % n for number in range(len(prompts))]
    options = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))
        for seed in seeds
    ]
    results = engine.generate(prompts, options)
    for result in results:
        if result.reason == "error":
            raise UsageError(result.error)
    return [
        {"prompt": prompt, "text": result.text, "tokens": len(result.tokens), "reason": result.reason}
        for prompt, result in zip(prompts, results, strict=True)
    ]
