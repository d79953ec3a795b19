"""Byte-level BPE: trained in seconds, exact on every text, loadable by transformers. SentencePiece's BPE is read too.

Every token is a string of bytes, so the number of UTF-8 bytes behind any tokens is known exactly and
bits per byte needs no estimate. Digits are tokens of their own, because arithmetic on arbitrary
number pieces is needlessly hard to learn.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moiety.errors import ConfigError, DataError, FormatError, StorageError
from moiety.model.template import ChatTemplate, special_tokens
from moiety.storage import write_atomically

__all__ = ["END_OF_TEXT", "TextStream", "Tokenizer", "put_before", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
SPACE, ONE_BYTE = "▁", re.compile(r"<0x([0-9A-F]{2})>")  # of SentencePiece: a space, and a byte by itself


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, *, sample_characters: int = 8_000_000
) -> Tokenizer:
    """Learn a byte-level BPE vocabulary; the same texts give the same vocabulary.

    Args:
        texts: What to learn from; from a larger total, every text gives an equal share of its start.
        vocab_size: Entries wanted, the 256 bytes and the end token included; little text may give fewer.
        sample_characters: How many to learn from at most, which bounds the time.

    Raises:
        ConfigError: a vocabulary too small for the bytes.
        DataError: no text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size is {vocab_size}; 256 bytes and the end token need {SMALLEST_VOCABULARY}",
            hint="4096 suits a small model",
        )
    total = sum(len(text) for text in texts)
    if not total:
        raise DataError("there is no text to train a tokenizer on", hint="give at least one text")
    share = min(1.0, sample_characters / total)
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(_bytes_of_characters()),
        max_token_length=24,
        show_progress=False,
    )
    inner.train_from_iterator((text[: math.ceil(len(text) * share)] for text in texts), trainer)
    return Tokenizer(inner, end_token=END_OF_TEXT)


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (the map of GPT-2).

    Bytes that print stand for themselves; the others take the characters from 256 on, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _token_bytes(inner: tokenizers.Tokenizer) -> tuple[bytes, ...]:
    """What each token writes: its bytes; for a special token nothing.

    Raises:
        FormatError: the vocabulary is neither byte-level nor SentencePiece's.
    """
    byte_of, pieces = _bytes_of_characters(), inner.model.byte_fallback
    vocabulary = inner.get_vocab(with_added_tokens=True)
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if pieces and missing:
        raise FormatError(
            f"the vocabulary falls back on bytes, but lacks {missing[0]}",
            hint="without all 256 not every text has tokens",
        )
    written = [b""] * (max(vocabulary.values(), default=-1) + 1)
    added = inner.get_added_tokens_decoder()
    for piece, token in vocabulary.items():
        if token in added:
            plain = piece.replace(SPACE, " ") if pieces else piece
            written[token] = b"" if added[token].special else plain.encode()
        elif pieces:
            byte = ONE_BYTE.fullmatch(piece)
            written[token] = bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()
        elif all(character in byte_of for character in piece):
            written[token] = bytes(byte_of[character] for character in piece)
        else:
            raise FormatError(
                f"token {token} is {piece!r}, which is not made of bytes; allowed is byte-level BPE",
                hint="or a BPE vocabulary of SentencePiece with byte_fallback",
            )
    return tuple(written)


def put_before(inner: tokenizers.Tokenizer, token: str | None) -> None:
    """Note in a vocabulary which token programs put before a text; None notes that they put nothing around it."""
    added = [] if token is None else [(token, inner.token_to_id(token))]
    inner.post_processor = processors.TemplateProcessing(
        single=[*(name for name, _ in added), "$A"], pair=None, special_tokens=added
    )


def _read_json(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FormatError(f"{path} does not exist", hint="give the folder that holds it") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} is not whole JSON: {error}", hint="it was cut or changed: write it again"
        ) from error
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds {type(loaded).__name__}, not an object")
    return text, loaded


def _end_token(folder: Path, vocabulary: dict[str, int]) -> str:
    """The end token by `tokenizer_config.json`, else ours."""
    config_path = folder / "tokenizer_config.json"
    named = _read_json(config_path)[1].get("eos_token") if config_path.exists() else END_OF_TEXT
    content = named.get("content") if isinstance(named, dict) else named
    if not isinstance(content, str) or content not in vocabulary:
        raise FormatError(
            f"the end token of {folder} is {content!r}, which its vocabulary does not have",
            hint="name it as eos_token in tokenizer_config.json",
        )
    return content


@final
class Tokenizer:
    """A byte-level BPE vocabulary with an end token, or one of SentencePiece with bytes to fall back on.

    `encode` never yields the end token: the letters of `<|endoftext|>` in a text stay letters.

    Args:
        inner: The vocabulary.
        end_token: The special token that ends a text.
        chat_template: How messages are written, when the model was taught to chat.
        special_tokens: Further special tokens by name (`bos_token`), kept for whoever reads the tokenizer next.

    `answer_ends` are the tokens that end an answer besides the end token; they are written beside a model's weights.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        end_token: str,
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        inner.encode_special_tokens = True
        self._inner = inner
        self._token_bytes = _token_bytes(inner)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.answer_ends: tuple[int, ...] = ()
        named = sorted(self.special_ids(), key=len, reverse=True)  # the longest first: one may begin another
        self._special = re.compile(f"({'|'.join(map(re.escape, named))})" if named else r"(?!)()")
        self.end_token = end_token
        end_id = inner.token_to_id(end_token)
        assert end_id is not None, (end_token, inner.get_vocab_size())
        self.end_id: int = end_id

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, ours or that of any byte-level checkpoint.

        Args:
            path: The file, or the folder that holds it and perhaps `tokenizer_config.json`.

        Raises:
            FormatError: missing, cut, not a tokenizer, not byte-level, or without an end token.
            StorageError: the system refused to read.
        """
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        text, loaded = _read_json(file)
        if not isinstance(loaded.get("model"), dict) or loaded["model"].get("type", "BPE") != "BPE":
            raise FormatError(f"{file} does not hold a BPE tokenizer", hint="byte-level BPE is supported")
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises the bare class, never a subclass
            raise FormatError(f"{file} is not a tokenizer: {error}", hint="write it again") from error
        config_path = file.parent / "tokenizer_config.json"
        config = _read_json(config_path)[1] if config_path.exists() else {}
        named, begin = special_tokens(config), config.get("add_bos_token")
        bos = inner.token_to_id(named.get("bos_token", ""))
        if isinstance(begin, bool) and bos is not None and begin != (inner.encode("").ids[:1] == [bos]):
            put_before(inner, named["bos_token"] if begin else None)
        return cls(
            inner,
            end_token=_end_token(file.parent, inner.get_vocab(with_added_tokens=True)),
            chat_template=ChatTemplate.load(file.parent),
            special_tokens=named,
        )

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary (V): one more than the largest token."""
        return len(self._token_bytes)

    @property
    def fingerprint(self) -> str:
        """sha256 of the whole tokenizer: equal means equal tokens for every text."""
        return hashlib.sha256(f"{self.end_token}\n{self._inner.to_str()}".encode()).hexdigest()

    @property
    def adds_space(self) -> bool:
        """True where the tokens of a text begin with a space that is not in it, as SentencePiece has them.

        `decode` and `stream` keep that space: they cannot know whether tokens begin a text or go on with one.
        """
        return self.bytes_of(self.encode("a")) == b" a"

    @property
    def around(self) -> tuple[int, ...]:
        """Tokens that `tokenizer.json` wants around a text, mostly one before it or none; `encode_prompt` adds them."""
        return tuple(self._inner.encode("", add_special_tokens=True).ids)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; nothing is added before or after."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a text to be continued: what `tokenizer.json` wants around it is there, as in transformers.

        Of a text without tokens it is the end token, after which a new text begins.
        """
        return list(self._inner.encode(text, add_special_tokens=True).ids) or [self.end_id]

    def encode_with_special(self, text: str) -> list[int]:
        """Tokens of a text in which the letters of a special token are that token: what a chat template writes."""
        ids = self.special_ids()
        tokens: list[int] = []
        for number, piece in enumerate(self._special.split(text)):
            if number % 2:
                tokens.append(ids[piece])
            elif piece:
                tokens += self.encode(piece)
        return tokens

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, worked out in parallel."""
        return [list(one.ids) for one in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def bytes_of(self, tokens: Iterable[int]) -> bytes:
        """The bytes that tokens write; special tokens write none.

        Raises:
            DataError: a token outside the vocabulary.
        """
        return b"".join(self._one(token) for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: a token outside the vocabulary.
        """
        return self.bytes_of(tokens).decode("utf-8", "replace")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as the tokens come, never half a character; together it is `decode(tokens)`."""
        stream = TextStream(self)
        for token in tokens:
            if piece := stream.push(token):
                yield piece
        if rest := stream.finish():
            yield rest

    def byte_counts(self) -> list[int]:
        """Bytes that each token writes, by token: the sum over a text's tokens is its size in UTF-8.

        Where the vocabulary `adds_space`, it is one more for each text.
        """
        return [len(written) for written in self._token_bytes]

    def to_json(self) -> str:
        """The whole tokenizer as the text of `tokenizer.json`."""
        text: str = self._inner.to_str()
        return text

    def save(self, folder: str | Path) -> None:
        """Write what transformers' AutoTokenizer reads: `tokenizer.json`, `tokenizer_config.json`, the chat template.

        Raises:
            StorageError: the system refused.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "pad_token": self.end_token,
            **self.special_tokens,
            "eos_token": self.end_token,
            "clean_up_tokenization_spaces": False,
        }
        write_atomically(Path(folder) / "tokenizer.json", self._inner.to_str(pretty=True).encode())
        if self.chat_template is not None:
            self.chat_template.save(folder)
        write_atomically(
            Path(folder) / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode()
        )

    def special_ids(self) -> dict[str, int]:
        """The token of each special token's letters."""
        added = self._inner.get_added_tokens_decoder()
        return {one.content: token for token, one in added.items() if one.special}

    def _one(self, token: int) -> bytes:
        if not 0 <= token < len(self._token_bytes):
            raise DataError(f"token {token} is outside the vocabulary of {len(self._token_bytes)}")
        return self._token_bytes[token]


@final
class TextStream:
    """Turns tokens into text one at a time, holding back the bytes of an unfinished character.

    Args:
        tokenizer: Of the tokens.
        shown: Special tokens whose letters belong to the text; the others write nothing.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._shown = {token: letters.encode() for token, letters in (shown or {}).items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._decoder.decode(self._shown.get(token) or self._tokenizer.bytes_of((token,)))

    def finish(self) -> str:
        """What was held back; U+FFFD if it never became a character."""
        return self._decoder.decode(b"", final=True)
