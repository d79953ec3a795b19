"""Chats, pairs and texts from lines of JSON into tokens, and which of these tokens are to be learnt.

What is learnt of a chat is what the model itself will have to write: after each prompt, as the model's own template
writes it, the words of the assistant up to and with the token that ends the turn. Where a line or a template does not
say exactly which these are, it is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from moiety.errors import DataError, FormatError, UsageError
from moiety.model.sandbox import GENERATION_MARKS
from moiety.model.template import ChatTemplate
from moiety.model.tokenizer import Tokenizer
from moiety.train.finetune_options import TooLong, Turns

__all__ = ["Encoder", "Rendered", "Sample", "answers", "read_lines"]

KINDS: dict[str, frozenset[str]] = {  # what a line may be, by the keys that make it so
    "pair": frozenset({"prompt", "chosen", "rejected"}),
    "completion": frozenset({"prompt", "completion"}),
    "chat": frozenset({"messages"}),
    "text": frozenset({"text"}),
}
ALLOWED = "messages, or prompt and completion, or text, or prompt, chosen and rejected"
TOOLS = "tools"  # may stand beside messages and prompts

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence to train on.

    Args:
        tokens: Of the whole.
        learnt: Of each token whether the model is to learn to write it; never the first.
    """

    tokens: tuple[int, ...]
    learnt: tuple[bool, ...]


class Rendered(NamedTuple):
    """A text and the stretches of it that are the assistant's, in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines with their line numbers; empty lines count and are no objects.

    Raises:
        DataError: it cannot be read, or a line is not an object.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}", hint="give a file of JSON lines") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8: {error.reason}", hint="write it as UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is not JSON: {error}", hint="each line is one object by itself: JSON lines"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{where} is {type(value).__name__}, not an object", hint=f"allowed: {ALLOWED}")
        yield number, value


def answers(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    turns: Turns = "all",
    learnt: Sequence[int] | None = None,
) -> Rendered:
    """The text of a chat and where in it the assistant writes.

    By the template's own `{% generation %}` marks where it has them. Otherwise by rendering prefixes: a turn begins
    where the text of what came before it ends, the words that ask for an answer included, and ends where the text
    with it ends. Both must be how the whole text begins, or the model would be taught after other words than those
    it will see.

    Args:
        template: The model's.
        messages: The chat.
        tools: Functions that the model may call.
        turns: "all" of the assistant's, or the "last" alone, which must then be the last message.
        learnt: Places of the messages to learn; None is every one of the assistant.

    Raises:
        UsageError: the template refuses these messages, or writes earlier turns anew when more follow.
        FormatError: the template fails.
    """
    places = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
    wanted = places if learnt is None else [*learnt]
    if turns == "last":
        if places[-1:] != [len(messages) - 1]:
            raise UsageError("the last message is not the assistant's", hint="leave out what follows it")
        wanted = [place for place in wanted if place == places[-1]]
    if template.marks_answers(with_tools=tools is not None):
        whole = _marked(template, messages, tools)
        if len(whole.spans) != len(places):
            raise FormatError(
                f"the template marks {len(whole.spans)} answers in a chat that has {len(places)}",
                hint="put {% generation %} around every message of the assistant, and nothing else",
            )
        return Rendered(
            whole.text,
            tuple(span for place, span in zip(places, whole.spans, strict=True) if place in wanted),
        )
    return _prefixed(template, messages, tools, wanted)


def _prefixed(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    wanted: Sequence[int],
) -> Rendered:
    """The answers at the wanted places, by rendering what is before each and what ends with it."""
    text = template.render(messages, add_generation_prompt=False, tools=tools)
    spans = []
    for place in wanted:
        if place == 0:
            raise UsageError(
                "the first message is the assistant's, which answers nothing",
                hint='leave it out, or give it "weight": 0',
            )
        before = template.render(messages[:place], add_generation_prompt=True, tools=tools)
        after = text
        if place < len(messages) - 1:
            after = template.render(messages[: place + 1], add_generation_prompt=False, tools=tools)
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            raise UsageError(
                f"the template writes message {place} otherwise when it is not the last, so that no answer but the "
                "last is as the model would have written it",
                hint="--turns each makes a sample of every answer, --turns last learns the last alone",
            )
        spans.append((len(before), len(after)))
    return Rendered(text, tuple(spans))


def _marked(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> Rendered:
    """By `{% generation %}`: rendered once more with marks that are in no message, which are then taken out."""
    text = template.render(messages, add_generation_prompt=False, tools=tools)
    number = 0
    while f"\0{number}" in text:
        number += 1
    begins, ends = f"\0{number}<", f"\0{number}>"
    marks = dict(zip(GENERATION_MARKS, (begins, ends), strict=True))
    marked = template.render(messages, add_generation_prompt=False, tools=tools, **marks)
    plain, spans, opened = "", [], [-1]
    for piece in re.split(f"({begins}|{ends})", marked):
        if piece == begins:
            opened.append(len(plain))
        elif piece == ends:
            spans.append((opened.pop(), len(plain)))
        else:
            plain += piece
    if plain != text or opened != [-1] or any(stop <= start for start, stop in spans):
        raise FormatError(
            "the template changes what stands between {% generation %} and {% endgeneration %}, or it is nothing",
            hint="put the marks where the text is written, not where it is put into a variable",
        )
    return Rendered(text, tuple(spans))


@final
class Encoder:
    """Lines into samples, and an account of what was noticed on the way.

    Args:
        tokenizer: The model's; its chat template is used.
        turns: Which of the assistant's turns are learnt: "all", the "last", or "each" as a sample of its own.
        length: Most tokens of a sample.
        too_long: What becomes of a longer one: "drop", "cut" at the length, or "refuse".
    """

    def __init__(self, tokenizer: Tokenizer, *, turns: Turns, length: int, too_long: TooLong) -> None:
        self._tokenizer, self._turns, self._length, self._too_long = tokenizer, turns, length, too_long
        self._special = frozenset(tokenizer.special_ids().values())
        self._letters = tuple(tokenizer.special_ids())
        body, around = tokenizer.encode("a"), tokenizer.encode_prompt("a")
        first = next(place for place in range(len(around)) if around[place : place + len(body)] == body)
        self._before = tuple(around[:first])
        self.counts: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()

    def units(self, value: Mapping[str, Any]) -> list[tuple[Sample, ...]]:
        """What one line is trained on: samples by themselves, or a pair of the better and the worse answer.

        Nothing where all was too long, which `counts` says.

        Raises:
            UsageError: the line is none of what is allowed, or says nothing that could be learnt.
            FormatError: the template fails.
        """
        kind = next((kind for kind, keys in KINDS.items() if keys <= value.keys()), None)
        if kind is None:
            raise UsageError(f"it has the keys {', '.join(value) or 'none'}", hint=f"allowed: {ALLOWED}")
        others = sorted(value.keys() - KINDS[kind] - {TOOLS})
        self.counts.update(f"lines have a key {key!r}, which is not used" for key in others)
        tools = value.get(TOOLS)
        made: list[tuple[Sample, ...]]
        if kind == "text":
            made = [(self._text(value["text"]),)]
        elif kind == "chat":
            made = [(sample,) for sample in self._chat(value["messages"], tools)]
        else:
            keys = ("completion",) if kind == "completion" else ("chosen", "rejected")
            is_chat = any(isinstance(value[key], list) for key in ("prompt", *keys))
            made = [tuple(self._answered(value["prompt"], value[key], key, tools, is_chat) for key in keys)]
        if kind == "pair" and made[0][0].tokens == made[0][1].tokens:
            raise UsageError(
                "chosen and rejected are the same", hint="a pair has a better and a worse answer"
            )
        self.counts[f"lines are of the kind {kind}"] += 1
        fitting = [self._fitted(unit) for unit in made]
        return [unit for unit in fitting if unit]

    def _fitted(self, unit: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """The unit within the length; nothing if it was dropped."""
        longest = max(len(sample.tokens) for sample in unit)
        if longest > self._length:
            if self._too_long == "refuse":
                raise UsageError(
                    f"it has {longest} tokens; the length is {self._length}",
                    hint="raise --length, or choose --too-long drop or cut",
                )
            cut = tuple(
                Sample(tokens=one.tokens[: self._length], learnt=one.learnt[: self._length]) for one in unit
            )
            if self._too_long == "drop" or not all(any(one.learnt) for one in cut):
                self.counts[f"samples are longer than {self._length} tokens and are dropped"] += 1
                return ()
            self.counts[f"samples are cut at {self._length} tokens"] += 1
            unit = cut
        return tuple(_trimmed(sample) for sample in unit)

    def _text(self, text: Any) -> Sample:
        _require_words(text, "text")
        tokens = (*self._before, *self._tokenizer.encode(text), self._tokenizer.end_id)
        return Sample(tokens=tokens, learnt=(False, *[True] * (len(tokens) - 1)))

    def _chat(self, messages: Any, tools: Any) -> list[Sample]:
        """One sample of a chat, or one of each answer."""
        plain, learnt = _checked(messages)
        if self._turns == "each":
            return [self._rendered(plain[: place + 1], [place], tools, "last") for place in learnt]
        return [self._rendered(plain, learnt, tools, self._turns)]

    def _answered(self, prompt: Any, answer: Any, name: str, tools: Any, is_chat: bool) -> Sample:
        """A prompt and its answer: texts as they stand, or messages through the template."""
        if not isinstance(prompt, str | list) or not isinstance(answer, str | list):
            raise UsageError(
                f"prompt and {name} are no texts and no lists of messages", hint=f"allowed: {ALLOWED}"
            )
        if isinstance(prompt, str) and isinstance(answer, str) and not is_chat:
            _require_words(answer, name)
            sample = self._encoded(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), False)
            ended = (*sample.tokens, self._tokenizer.end_id)
            return Sample(tokens=ended, learnt=(*sample.learnt, True))
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        plain, learnt = _checked([*asked, *said])
        return self._rendered(plain, [place for place in learnt if place >= len(asked)], tools, "all")

    def _rendered(
        self, messages: Sequence[Message], learnt: Sequence[int], tools: Any, turns: Turns
    ) -> Sample:
        template = self._tokenizer.chat_template
        if template is None:
            raise UsageError(
                "it has messages, and this model has no chat template",
                hint="give one with --template FILE; --template plain suits a model that never had one",
            )
        said = json.dumps(messages, ensure_ascii=False)
        if any(letters in said for letters in self._letters):
            self.counts[
                "chats have the letters of a special token in a message, which become that token"
            ] += 1
        rendered = answers(template, messages, tools=tools, turns=turns, learnt=learnt)
        if not rendered.spans:
            raise UsageError("nothing in it is to be learnt", hint="an assistant's message without weight 0")
        return self._encoded(rendered.text, rendered.spans, True)

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]], is_chat: bool) -> Sample:
        """Tokens, and those of the spans as learnt; the tokens before a span are what the model will be given."""
        before = () if is_chat else self._before
        encode = self._tokenizer.encode_with_special if is_chat else self._tokenizer.encode
        tokens, place_of = encode(text), {}
        for border in sorted({border for span in spans for border in span}):
            left = encode(text[:border])
            if tokens[: len(left)] != left:
                return self._pieces(text, spans, is_chat)
            place_of[border] = len(left)
        found = [(place_of[start], place_of[stop]) for start, stop in spans]
        return self._marked(
            [*before, *tokens], [(a + len(before), b + len(before)) for a, b in found], is_chat
        )

    def _pieces(self, text: str, spans: Sequence[tuple[int, int]], is_chat: bool) -> Sample:
        """The same where a border falls inside a token of the whole text: each stretch in tokens of its own.

        The model is given the tokens of a prompt alone and goes on from there, so that this is what it will meet.
        """
        if self._tokenizer.adds_space:
            raise UsageError(
                "an answer begins or ends inside a token, and this vocabulary cannot write a text in pieces",
                hint="let the prompt end before the space, or with a special token",
            )
        self.counts[
            "samples have an answer that begins inside a token of the whole text; it has tokens of its own"
        ] += 1
        encode = self._tokenizer.encode_with_special if is_chat else self._tokenizer.encode
        tokens: list[int] = [] if is_chat else [*self._before]
        found, at = [], 0
        for start, stop in spans:
            tokens += encode(text[at:start])
            first = len(tokens)
            tokens += encode(text[start:stop])
            found.append((first, len(tokens)))
            at = stop
        return self._marked(tokens + encode(text[at:]), found, is_chat)

    def _marked(self, tokens: Sequence[int], spans: Sequence[tuple[int, int]], is_chat: bool) -> Sample:
        """What of the spans is learnt: of a chat up to the token that ends the turn, which must be there."""
        learnt = [False] * len(tokens)
        for start, stop in spans:
            end = self._turn_end(tokens, start, stop) if is_chat else stop
            learnt[start:end] = [True] * (end - start)
        learnt[0] = False
        return Sample(tokens=tuple(tokens), learnt=tuple(learnt))

    def _turn_end(self, tokens: Sequence[int], start: int, stop: int) -> int:
        last = next((at for at in range(stop - 1, start - 1, -1) if tokens[at] in self._special), None)
        if last is None or self._tokenizer.bytes_of(tokens[last + 1 : stop]).strip():
            raise FormatError(
                "the template ends an answer without a special token, so that the model would never learn to stop",
                hint="write {{ eos_token }} after the assistant's words, inside of {% generation %} if there are marks",
            )
        self.ends[tokens[last]] += 1
        return last + 1


def _checked(messages: Any) -> tuple[list[dict[str, Any]], list[int]]:
    """Messages without their weights, and the places of those to be learnt.

    Raises:
        UsageError: not messages, none to be learnt, or an answer that is empty.
    """
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise UsageError(
            "messages is not a list of objects", hint='[{"role": "user", "content": "..."}, ...]'
        )
    plain, learnt = [], []
    for place, message in enumerate(messages):
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise UsageError(f"message {place} has weight {weight!r:.40}", hint="1 is learnt, 0 is not")
        plain.append({key: value for key, value in message.items() if key != "weight"})
        if message.get("role") == "assistant" and weight == 1:
            content = message.get("content")
            is_blank = not content or (isinstance(content, str) and not content.strip())
            if is_blank and not message.get("tool_calls"):
                raise UsageError(
                    f"message {place} is an answer without words",
                    hint="leave the line out, or learn another answer",
                )
            learnt.append(place)
    if not learnt:
        raise UsageError(
            "no message is to be learnt: none is the assistant's, or all have weight 0",
            hint='{"role": "assistant", "content": "..."}',
        )
    return plain, learnt


def _require_words(text: Any, name: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{name} is {text!r:.40}; a text with words is wanted")


def _trimmed(sample: Sample) -> Sample:
    """Without what follows the last learnt token: nothing learnt depends on it."""
    stop = len(sample.learnt) - sample.learnt[::-1].index(True)
    return Sample(tokens=sample.tokens[:stop], learnt=sample.learnt[:stop])
