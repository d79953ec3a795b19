"""Answers that must fit a JSON schema: llguidance says after every token which ones may follow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, final

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from moiety.errors import MoietyError
from moiety.model.tokenizer import Tokenizer
from moiety.serve.options import MOST_SCHEMA_BYTES
from moiety.serve.refusal import Refusal

__all__ = ["Grammar", "Grammars", "call_grammar", "schema_grammar"]

# One way to write a space: a weak model could otherwise write spaces until its last token.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of all JSON that fits a schema."""
    return f"start: {_json(schema)}\n"


def call_grammar(functions: Mapping[str, Mapping[str, Any]]) -> str:
    """The grammar of one call, `{"name": ..., "arguments": ...}`, of one of some functions.

    Args:
        functions: By name, the schema of the arguments.
    """
    rules = [f"start: {' | '.join(f'call{number}' for number in range(len(functions)))}"]
    for number, (name, schema) in enumerate(functions.items()):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
        rules.append(f'call{number}: {head} arguments{number} "}}"\narguments{number}: {_json(schema)}')
    return "\n".join(rules) + "\n"


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": SPACING})


@final
class Grammar:
    """A grammar at work on one answer: a `moiety.infer.request.Constraint`.

    Args:
        matcher: Where the answer stands in it.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes:
        """One byte for each token, 0 for those that may not come next.

        Raises:
            MoietyError: the grammar is too much work.
        """
        found: bytes = self._matcher.compute_logit_bias()
        if self._matcher.is_error():
            raise MoietyError("the answer's format is too much work", hint="ask for a simpler schema")
        return found

    def push(self, token: int) -> None:
        """Take a token; an error shows at the next `allowed`."""
        self._matcher.consume_token(token)

    @property
    def is_done(self) -> bool:
        """True once nothing may follow."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())


@final
class _Words:
    """A vocabulary as llguidance reads it: bytes of every token, letters of the special ones."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = {token: letters.encode() for letters, token in tokenizer.special_ids().items()}
        self._tokenizer = tokenizer
        self.eos_token_id, self.special_token_ids = tokenizer.end_id, sorted(special)
        self.tokens = [
            special[token] if token in special else tokenizer.bytes_of((token,))
            for token in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


@final
class Grammars:
    """Makes grammars for one vocabulary.

    Args:
        tokenizer: The model's.
        ends: Tokens that may end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        self._words = LLTokenizer(TokenizerWrapper(_Words(tokenizer)), eos_token=sorted(ends))

    def made(self, grammar: str, count: int, param: str) -> list[Grammar]:
        """One grammar, for each of some answers. This may take tens of milliseconds: not in the event loop.

        Args:
            grammar: Its text.
            count: How many answers.
            param: The request's field that asked for it.

        Raises:
            Refusal: the schema is too large, not a schema, or has parts that cannot be kept to.
        """
        if len(grammar) > MOST_SCHEMA_BYTES:
            raise Refusal(
                400,
                f"{param}: the schema has {len(grammar)} bytes; at most {MOST_SCHEMA_BYTES} are allowed",
                param=param,
                code="schema_too_large",
            )
        matcher = LLMatcher(self._words, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            said = matcher.get_error().splitlines()[0][:300]
            raise Refusal(
                400, f"{param}: this schema cannot be kept to: {said}", param=param, code="bad_schema"
            )
        return [Grammar(matcher.deep_copy()) for _ in range(count)]
