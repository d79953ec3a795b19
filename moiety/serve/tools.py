"""Functions that a model calls: found in what it wrote, by the forms that models were taught.

`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, with text before; or an answer that is
nothing but such an object or a list of them (`parameters` is another word for the arguments).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from typing import Any, final

from moiety.serve.replies import Call

__all__ = ["CallsInText", "call", "calls_in"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BLOCK = re.compile(f"{OPEN}(.*?)(?:{CLOSE}|$)", re.DOTALL)
MOST_CALLS = 128


def call(name: str, arguments: Any) -> Call:
    """A call with an id of its own."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": text},
    }


def calls_in(text: str, names: Collection[str]) -> tuple[str, list[Call]]:
    """What an answer says, and what it calls.

    Args:
        text: The whole answer.
        names: Functions that there are; another one is no call.
    """
    if OPEN in text:
        found = [_called(block[1], names) for block in BLOCK.finditer(text)]
        content = text.partition(OPEN)[0].strip()
    else:
        found, content = [_called(text, names)], ""
    calls = [one for some in found for one in some][:MOST_CALLS]
    return (content, calls) if calls and all(found) else (text, [])


def _called(text: str, names: Collection[str]) -> list[Call]:
    """The calls in a piece of JSON; none if it is another thing."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for one in value if isinstance(value, list) else [value]:
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or name not in names:
            return []
        arguments = one.get("arguments", one.get("parameters", {}))
        if not isinstance(arguments, dict):
            return []
        calls.append(call(name, arguments))
    return calls


@final
class CallsInText:
    """Passes a stream's text on as long as it cannot be the start of a call, and keeps the rest for the end.

    Args:
        names: Functions that there are.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held, self._said = names, "", False

    def push(self, piece: str) -> str:
        """What may be shown now."""
        self._held += piece
        start = self._held.lstrip()
        if not self._said and (not start or start[0] in "{["):
            return ""
        place = self._held.find(OPEN)
        if place < 0:
            place = next(
                (
                    len(self._held) - size
                    for size in range(min(len(OPEN) - 1, len(self._held)), 0, -1)
                    if self._held.endswith(OPEN[:size])
                ),
                len(self._held),
            )
        shown, self._held = self._held[:place], self._held[place:]
        self._said = self._said or bool(shown.strip())
        return shown

    def finish(self) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls."""
        held, self._held = self._held, ""
        return calls_in(held, self._names) if held else ("", [])
