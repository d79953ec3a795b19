"""A conversation: what was said so far, in the model's own format or, with a model that has none, as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import final

from moiety.errors import UsageError
from moiety.infer.engine import Engine
from moiety.infer.generate import generate
from moiety.infer.open import Opened
from moiety.infer.options import EngineOptions, RequestOptions, SamplingOptions
from moiety.observe.record import Recorder

__all__ = ["Conversation"]


@final
class Conversation:
    """Lines in, answers out. With a chat template the turns go through it and an answer ends where the model ends it;
    without one the text is continued, and an answer ends with its line.

    When there is no room for all that was said, the oldest is forgotten.

    Args:
        opened: The model and its tokenizer.
        system: What the model is told first; needs a chat template.
        max_tokens: Most tokens in an answer.
        sampling: What to draw from.
        plain: Generate one token after the other, without the engine.
        options: Of the engine, which works on one request at a time.
        recorder: Takes the routing of every step.

    Raises:
        ConfigError: a model that only plain generation can run.
        UsageError: `system` for a model without a chat template.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        system: str = "",
        max_tokens: int = 80,
        sampling: SamplingOptions | None = None,
        plain: bool = False,
        options: EngineOptions | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._opened, self._max_tokens = opened, max_tokens
        self._sampling = SamplingOptions() if sampling is None else sampling
        one = replace(options or EngineOptions(), max_requests=1)
        self._engine = (
            None if plain else Engine(opened.model, ends=opened.ends, options=one, recorder=recorder)
        )
        self._recorder = recorder
        self._template = opened.tokenizer.chat_template
        if system and self._template is None:
            raise UsageError("this model has no chat template: there is no place for a system message")
        self._head = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        self._text = ""
        self._room = max(opened.model.config.max_positions - max_tokens, 1)

    @property
    def has_format(self) -> bool:
        """True if the model was taught to chat."""
        return self._template is not None

    def answer(self, line: str) -> Iterator[str]:
        """The answer to a line, in pieces as they are drawn; it is remembered once it was taken whole.

        Raises:
            UsageError: the line alone leaves no room for an answer, or the template refuses these turns.
            FormatError: the template is not one.
        """
        self._turns.append({"role": "user", "content": line})
        self._text += line + "\n"
        ids = self._ids()
        pieces = self._opened.tokenizer.stream(_until(self._stream(ids), self._opened.ends))
        said = ""
        for piece in pieces if self.has_format else _first_line(pieces):
            said += piece
            yield piece
        self._turns.append({"role": "assistant", "content": said})
        self._text += said + "\n"

    def _stream(self, ids: Sequence[int]) -> Iterator[int]:
        """Tokens after these; pages keep what was computed, so a turn costs its own tokens only."""
        if self._engine is None:
            return generate(
                self._opened.model,
                ids,
                max_tokens=self._max_tokens,
                sampling=self._sampling,
                recorder=self._recorder,
            )
        return self._engine.stream(ids, RequestOptions(max_tokens=self._max_tokens, sampling=self._sampling))

    def _ids(self) -> list[int]:
        """Tokens of what was said so far, as many as there is room for."""
        tokenizer = self._opened.tokenizer
        if self._template is None:
            return tokenizer.encode(self._text)[-self._room :]
        while True:
            ids = tokenizer.encode_with_special(self._template.render([*self._head, *self._turns]))
            if len(ids) <= self._room:
                return ids
            if len(self._turns) == 1:
                raise UsageError(
                    f"these are {len(ids)} tokens; with an answer the model has room for {self._room}",
                    hint="write less, or let the answer be shorter",
                )
            del self._turns[:2]


def _until(stream: Iterable[int], ends: frozenset[int]) -> Iterator[int]:
    """The tokens before the first that ends an answer."""
    for token in stream:
        if token in ends:
            return
        yield token


def _first_line(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces up to the end of the first line that has something on it."""
    begun = False
    for piece in pieces:
        begun = begun or bool(piece.strip())
        head, line_end, _ = piece.partition("\n") if begun else (piece, "", "")
        yield head
        if line_end:
            return
