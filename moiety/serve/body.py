"""A request's body: read under limits, parsed strictly, checked against its model, with the field's name in errors."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from moiety.serve.options import MOST_DEPTH
from moiety.serve.refusal import Refusal

__all__ = ["parsed", "read_body", "validated"]

Model = TypeVar("Model", bound=BaseModel)
# Possessive and without need of a closing quote: one pass, whatever the bytes are.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
INFINITE = re.compile(rb"NaN|Infinity|[0-9][eE]\+?[0-9]{3}|[0-9]{308}")  # where such a number may be
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
LARGEST_EXACT = 2**53
LARGE_BYTES = 64 * 1024  # parsed beside the event loop


async def read_body(request: Request, most_bytes: int, patience_s: float) -> bytes:
    """The whole body.

    Raises:
        Refusal: it is too large, comes too slowly, or is not said to be JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"content-type is {kind[:80]!r}; allowed is application/json", closes=True)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "the body is compressed; send it as it is", closes=True)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(patience_s):
            async for chunk in request.stream():
                size += len(chunk)
                if (
                    size > 4 * most_bytes
                ):  # what comes a little too large is read, so that its sender can listen
                    break
                chunks.append(chunk if size <= most_bytes else b"")
    except TimeoutError:
        raise Refusal(408, f"the body was not there after {patience_s:.0f} s", closes=True) from None
    except ClientDisconnect:
        raise Refusal(400, "the body was cut off", closes=True) from None
    if size > most_bytes:
        message = f"the body has more than {most_bytes} bytes, the most that is allowed"
        raise Refusal(413, message, code="body_too_large", closes=True)
    return b"".join(chunks)


async def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        Refusal: another thing, or JSON that programs read differently.
    """
    return await asyncio.to_thread(_parsed, body) if len(body) > LARGE_BYTES else _parsed(body)


def _parsed(body: bytes) -> dict[str, Any]:
    if _depth(body) > MOST_DEPTH:
        raise Refusal(400, f"the body is nested more than {MOST_DEPTH} deep", code="too_deep")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_float=_number)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        said = "half a character" if isinstance(error, UnicodeEncodeError) else str(error)
        raise Refusal(400, f"the body is not JSON that can be read: {said[:200]}", code="bad_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body is JSON, but not an object", code="bad_json")
    if INFINITE.search(body) and (place := _infinite(value)):
        said = "is NaN, Infinity or a number too large for JSON"
        raise Refusal(400, f"{'.'.join(place)} {said}", param=".".join(place), code="bad_json")
    return value


def _infinite(value: Any) -> tuple[str, ...]:
    """Where a number is that is none in JSON; empty if there is none."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in pairs:
        if isinstance(one, float) and not math.isfinite(one):
            return (str(key)[:100],)
        if place := _infinite(one):
            return (str(key)[:100], *place)
    return ()


def _depth(body: bytes) -> int:
    """How deep brackets are nested, counted to one more than what is allowed."""
    depth = deepest = 0
    for bracket in STRING.sub(b"", body).translate(None, NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > MOST_DEPTH:
            break
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in an object")
    return found


def _number(text: str) -> float:
    """A number with a point or an exponent; 1.0 is an integer to JSON schemas, and here."""
    value = float(text)
    return int(value) if abs(value) < LARGEST_EXACT and value.is_integer() else value


def validated(kind: type[Model], value: Mapping[str, Any], refused: Mapping[str, str]) -> Model:
    """A request's model from its JSON.

    Args:
        kind: The model.
        value: The parsed body.
        refused: Fields of the protocol that are not served here, and why.

    Raises:
        Refusal: with the first field that is at fault.
    """
    for name, why in refused.items():
        if name not in kind.model_fields and value.get(name) not in (None, [], False):
            raise Refusal(400, f"{name} is not served here: {why}", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        places = [_place(one["loc"], value, is_missing=one["type"] == "missing") for one in found]
        deepest = max(range(len(found)), key=lambda number: (len(places[number]), -number))
        field = ".".join(places[deepest])
        here = [one for one, place in zip(found, places, strict=True) if place == places[deepest]]
        said = "; or: ".join(dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in here))
        code = "unknown_parameter" if here[0]["type"] == "extra_forbidden" else None
        message = f"{field}: {said}" if field else said
        raise Refusal(400, message, param=field or None, code=code) from None


def _place(parts: tuple[int | str, ...], value: Any, *, is_missing: bool) -> tuple[str, ...]:
    """Where an error is, without the names of alternatives that pydantic puts between."""
    found: list[str] = []
    here: Any = value
    for number, part in enumerate(parts):
        there = (
            part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        )
        if there:
            here = here[part]
        elif not (is_missing and number == len(parts) - 1):
            continue
        found.append(str(part)[:100])
    return tuple(found)
