"""One request: a prompt, how to answer it, and how far the answer is. No torch."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, final

from moiety.infer.drafts import NGrams
from moiety.infer.options import RequestOptions
from moiety.infer.pages import Table
from moiety.infer.stops import AnswerText

__all__ = ["Constraint", "Drawn", "Reason", "Request", "State"]

Reason = Literal["stop", "length", "cancelled", "error"]


class Drawn(NamedTuple):
    """A token, and where the request asked for it ln p of it and of the best ones, by the logits as they came."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Constraint(Protocol):
    """What an answer may be, token by token; it belongs to one request."""

    def allowed(self) -> bytes:
        """One byte for each token, 0 for those that may not come next; a MoietyError if it cannot say."""
        ...

    def push(self, token: int) -> None:
        """Take the token that was drawn."""
        ...

    @property
    def is_done(self) -> bool:
        """True once the answer is whole and nothing may follow."""
        ...


class State(enum.Enum):
    """Where a request is. A preempted one waits again, and keeps its tokens."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@final
class Request:
    """Everything that is known about one request; the scheduler moves it, nothing else does.

    Args:
        number: Its name and its age: the older has the lower number.
        prompt: Token ids, at least one.
        options: How to answer.
        ends: The model's own end tokens.
        longest: Most tokens of prompt and answer together, less the last, which is never computed.
        text: Turns the answer into text; None where nobody asked for text.
        constraint: What the answer may be; None allows everything.
        routed: Takes which experts the tokens went to; None where nobody asked.
    """

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        options: RequestOptions,
        *,
        ends: frozenset[int] = frozenset(),
        longest: int,
        text: AnswerText | None = None,
        constraint: Constraint | None = None,
        routed: object | None = None,
    ) -> None:
        assert 0 < len(prompt) <= longest, (len(prompt), longest)
        self.number, self.prompt, self.options, self.text = number, tuple(prompt), options, text
        self.ends = frozenset(options.stop_ids) | (frozenset() if options.ignore_end else ends)
        self.most = min(options.max_tokens, longest - len(prompt) + 1)
        self.tokens = list(prompt)
        self.computed = 0  # tokens whose keys and values are in `table`
        self.table = Table(f"{options.adapter}/{options.salt}")  # names of adapters have no stroke
        self.state = State.WAITING
        self.reason: Reason | None = None
        self.error = ""
        self.reused = 0  # tokens of the prompt that were found in pages
        self.preemptions = self.drafted = self.accepted = 0
        self.ngrams: NGrams | None = None
        self.constraint, self.routed = constraint, routed
        self.scored: list[Drawn] = []  # tokens of the prompt, where asked for
        self.submitted_s = 0.0
        self.times_s: list[float] = []  # when each token came

    @property
    def drawn(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def answer(self) -> list[int]:
        """The answer so far; a token that ended it is its last."""
        return self.tokens[len(self.prompt) :]

    @property
    def reusable(self) -> int:
        """Tokens from the first on whose work pages may hold, and one that must go through the model."""
        if self.routed is not None:
            return 0
        scored = self.options.prompt_logprobs is not None
        return min(self.options.scored_from, len(self.tokens)) if scored else len(self.tokens)

    @property
    def guesses(self) -> bool:
        """False if its tokens must come one after the other."""
        return self.constraint is None and self.routed is None

    @property
    def longest(self) -> int:
        """Most tokens that will be in pages at a time."""
        return len(self.prompt) + self.most - 1

    def append(self, token: int, time_s: float = 0.0) -> str:
        """Take the next token of the answer, which may end it (`reason` says so); the text it lets out."""
        assert self.reason is None, (self.number, self.reason)
        self.tokens.append(token)
        self.times_s.append(time_s)
        may_stop = self.drawn >= self.options.min_tokens
        piece = ""
        if token in self.ends:
            self.reason = "stop"
        elif self.text is not None:
            piece = self.text.push(token, may_stop=may_stop)
            self.reason = "stop" if self.text.stopped else None
        if self.constraint is not None and self.reason is None:
            self.constraint.push(token)
            self.reason = "stop" if self.constraint.is_done else None
        if self.reason is None and self.drawn >= self.most:
            self.reason = "length"
        if self.reason is not None and self.text is not None:
            piece += self.text.finish()
        return piece
