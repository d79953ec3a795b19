"""How fast a server is while many ask at once, as its clients see it."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from moiety.errors import ServerError
from moiety.infer.measure import percentile
from moiety.infer.options import BenchOptions
from moiety.serve.client import Client, text_of

__all__ = ["Load", "run"]

WORDS = "time year people way day man thing woman life child world school state family student group"
EACH = 4  # requests of every client, where no number is given


@dataclass(frozen=True, kw_only=True)
class Load:
    """Some clients that ask again as soon as they are answered.

    Args:
        concurrency: How many.
        answered: Requests that were answered whole; the figures are of these.
        errors: The others, by kind: an HTTP status, connection, timeout or broken.
        tokens_per_s: Of all answers together, prompts not counted; None without an answer, as all below.
        prompt_tokens: Of the median prompt; None where the server does not say.
        first_token_p50_s: From a request to the first text of its answer.
        first_token_p99_s: The same.
        between_p50_s: From a piece of text to the next, over all answers; a server may put several tokens into one.
        between_p99_s: The same.
    """

    concurrency: int
    answered: int
    errors: Mapping[str, int]
    tokens_per_s: float | None
    prompt_tokens: int | None
    first_token_p50_s: float | None
    first_token_p99_s: float | None
    between_p50_s: float | None
    between_p99_s: float | None


class Answer(NamedTuple):
    """When its pieces came after the request, and tokens as the server counts them, else pieces."""

    times_s: list[float]
    tokens: int
    prompt_tokens: int | None


def run(client: Client, model: str, options: BenchOptions, say: Callable[[str], object]) -> list[Load]:
    """Measure a server with one number of clients after the other; one request before all is not counted.

    Args:
        client: The server.
        model: A name that it knows.
        options: How many clients, requests, words of a prompt and tokens of an answer.
        say: Called with a line before each.

    Raises:
        ServerError: that first request is not answered.
    """
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": options.tokens,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    draw = random.Random(0)
    try:
        _asked(client, {**body, "ignore_eos": True}, draw, options.prompt)
        body["ignore_eos"] = True
    except ServerError as error:
        if error.kind not in ("400", "422"):
            raise
        _asked(client, body, draw, options.prompt)
        say("the server does not know ignore_eos: answers may be shorter than asked for")
    rows = []
    for size in options.sizes:
        count = options.requests or EACH * size
        say(f"{size} at a time, {count} requests")
        rows.append(_load(client, body, draw, options.prompt, size, count))
    return rows


def _asked(client: Client, body: Mapping[str, Any], draw: random.Random, words: int) -> Answer:
    """One request with a prompt that no cache has seen."""
    prompt = " ".join(draw.choices(WORDS.split(), k=words))
    times: list[float] = []
    usage: Mapping[str, Any] = {}
    begun = time.perf_counter()
    for piece in client.stream("/completions", {**body, "prompt": prompt}):
        if text_of(piece):
            times.append(time.perf_counter() - begun)
        usage = piece.get("usage") or usage
    counts = [usage.get(name) for name in ("completion_tokens", "prompt_tokens")]
    drawn, given = (one if isinstance(one, int) else None for one in counts)
    return Answer(times, len(times) if drawn is None else drawn, given)


def _load(
    client: Client, body: Mapping[str, Any], draw: random.Random, words: int, size: int, count: int
) -> Load:
    def one(seed: int) -> Answer | str:
        try:
            return _asked(client, body, random.Random(seed), words)
        except ServerError as error:
            return error.kind

    pool, begun = ThreadPoolExecutor(size), time.perf_counter()
    try:
        found = list(pool.map(one, [draw.getrandbits(64) for _ in range(count)]))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    seconds = time.perf_counter() - begun
    answers = [one for one in found if isinstance(one, Answer)]
    firsts = [one.times_s[0] for one in answers if one.times_s]
    gaps = [late - early for one in answers for early, late in itertools.pairwise(one.times_s)]
    prompts = [one.prompt_tokens for one in answers if one.prompt_tokens is not None]
    return Load(
        concurrency=size,
        answered=len(answers),
        errors=dict(Counter(one for one in found if isinstance(one, str))),
        tokens_per_s=sum(one.tokens for one in answers) / seconds if answers else None,
        prompt_tokens=int(percentile(prompts, 0.5)) if prompts else None,
        first_token_p50_s=percentile(firsts, 0.5) if firsts else None,
        first_token_p99_s=percentile(firsts, 0.99) if firsts else None,
        between_p50_s=percentile(gaps, 0.5) if gaps else None,
        between_p99_s=percentile(gaps, 0.99) if gaps else None,
    )
