"""The text of an answer as its tokens come, cut before the first stop text wherever the tokens' borders lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

__all__ = ["AnswerText", "StopTexts"]


class _Stream(Protocol):
    """`moiety.model.tokenizer.TextStream`: tokens in, whole characters out."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@final
class StopTexts:
    """Passes text on until it contains a stop text, and holds back only what may become the start of one.

    The first moment, character by character, at which the text ends with a stop text counts; it is cut before the
    longest that ends there. How the text was divided into pieces makes no difference.

    Args:
        stops: None of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What may be shown after this piece."""
        if self.found:
            return ""
        text = self._held + piece
        places = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if places:
            end, minus_length = min(places)
            self.found, self._held = True, ""
            return text[: end + minus_length]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back and became nothing."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    return next(
        (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0
    )


@final
class AnswerText:
    """Tokens in, text out: whole characters, nothing of a stop text or after it.

    Args:
        stream: Turns tokens into text.
        stops: Texts that end the answer.
    """

    def __init__(self, stream: _Stream, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = stream, StopTexts(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop text was there."""
        return self._stops.found

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that this token lets out; without `may_stop` no stop text is looked for so far."""
        piece = self._stream.push(token)
        return self._stops.push(piece) if may_stop else self._stops.finish() + piece

    def finish(self) -> str:
        """The rest, when the answer ended without a stop text."""
        return self._stops.push(self._stream.finish()) + self._stops.finish()
