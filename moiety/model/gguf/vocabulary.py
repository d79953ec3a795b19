"""The vocabulary inside a GGUF file to our tokenizer and back, special tokens, the chat template.

Byte-level BPE is here, SentencePiece in `sentencepiece.py`.
A file names its way of splitting text before merging (`tokenizer.ggml.pre`) and leaves the expressions to the program
that reads it. Here they stand once, in the form that the models' own tokenizers have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from moiety.errors import FormatError, UsageError
from moiety.model.gguf import sentencepiece
from moiety.model.gguf.header import GGUFFile
from moiety.model.tokenizer import Tokenizer, put_before

__all__ = ["SPLITS", "chat_template", "ends", "metadata", "read", "special_tokens"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
GPT2 = "gpt2"  # `tokenizer.ggml.model` of byte-level BPE
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")  # end an answer as eos does
VOCABULARY_MAX = 1 << 20

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"|\p{N}" + _REST
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{tail}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{tail}"
    r"|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# "digits" splits every digit off, "bytes" applies the expression of GPT-2; anything else is an expression itself.
SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": ("bytes",),
    "smollm": ("digits", "bytes"),
    "starcoder": ("digits", "bytes"),
    "refact": ("digits", "bytes"),
    "command-r": ("digits", "bytes"),
    "olmo": ("bytes",),
    "exaone4": ("bytes",),
    "gigachat": ("bytes",),
    "qwen2": (_QWEN2,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "glm4": (_LLAMA3,),
    "chatglm-bpe": (_LLAMA3,),
    "deepseek-v3": _DEEPSEEK3,
    "deepseek-r1-qwen": (_QWEN2,),
    "gpt-4o": (_CASED.replace("{tail}", _CONTRACTIONS + "?").replace("{digits}", "{1,3}"),),
    "llama4": (_CASED.replace("{tail}", _CONTRACTIONS + "?").replace("{digits}", "{1,3}"),),
    "tekken": (_CASED.replace("{tail}", "").replace("{digits}", ""),),
}
# Those that look a whole word up before they merge.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
COMPOSED = frozenset({"qwen2", "deepseek-r1-qwen"})  # those that compose characters first (Unicode NFC)


def read(file: GGUFFile) -> Tokenizer:
    """The vocabulary of a file as our tokenizer.

    Raises:
        FormatError: missing, damaged, or neither byte-level BPE with a known way of splitting nor SentencePiece's
            BPE with bytes to fall back on.
    """
    pieces, kinds = _tokens(file)
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        twice = next(piece for token, piece in enumerate(pieces) if vocabulary[piece] != token)
        raise file.error("tokenizer.ggml.tokens", f"has {twice!r} twice")
    if file.values["tokenizer.ggml.model"] == sentencepiece.SENTENCEPIECE:
        inner, begins = sentencepiece.build(file, vocabulary, kinds), True
    else:
        inner = _byte_level(file, vocabulary)
        begins = file.values["tokenizer.ggml.pre"] in WHOLE_WORDS
    added = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind in (UNKNOWN, CONTROL, UNUSED)]
    inner.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in added])
    own = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED]
    inner.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in own])
    named = special_tokens(file)
    if "eos_token" not in named:
        raise file.error("tokenizer.ggml.eos_token_id", "is missing", "an end token is needed")
    begins = file.values.get(
        "tokenizer.ggml.add_bos_token", begins
    )  # what llama.cpp takes where none is said
    if begins and "bos_token" in named:
        put_before(inner, named["bos_token"])
    try:
        return Tokenizer(inner, end_token=named["eos_token"], special_tokens=named)
    except FormatError as error:
        raise file.error("tokenizer.ggml.tokens:", error.message, error.hint) from error


def _byte_level(file: GGUFFile, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    name = file.values.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in SPLITS:
        raise file.error("tokenizer.ggml.pre", f"is {name!r}", f"known are {', '.join(SPLITS)}")
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(file, vocabulary), ignore_merges=name in WHOLE_WORDS)
    )
    inner.pre_tokenizer = _splitter(SPLITS[name])
    inner.decoder = decoders.ByteLevel()
    if name in COMPOSED:
        inner.normalizer = normalizers.NFC()
    return inner


def chat_template(file: GGUFFile) -> str | None:
    """The chat template of a file as text, or None."""
    text = file.values.get("tokenizer.chat_template")
    if text is not None and not isinstance(text, str):
        raise file.error("tokenizer.chat_template", f"is {type(text).__name__}; text is wanted")
    return text


def special_tokens(file: GGUFFile) -> dict[str, str]:
    """The special tokens that a file names: `bos_token`, `eos_token`, `unk_token`, `pad_token`."""
    pieces, _ = _tokens(file)
    ids = {ours: _named(file, f"tokenizer.ggml.{key}_token_id", len(pieces)) for ours, key in SPECIAL.items()}
    return {ours: pieces[token] for ours, token in ids.items() if token is not None}


def ends(file: GGUFFile) -> tuple[int, ...]:
    """The tokens besides `eos_token` that end an answer."""
    pieces, _ = _tokens(file)
    return tuple(token for key in ENDS if (token := _named(file, key, len(pieces))) is not None)


def _named(file: GGUFFile, key: str, vocab_size: int) -> int | None:
    token = file.values.get(key)
    if token is None or (isinstance(token, int) and 0 <= token < vocab_size):
        return token
    raise file.error(key, f"is {token!r}; tokens are 0 to {vocab_size - 1}")


def metadata(tokenizer: Tokenizer | None, vocab_size: int, ends: Sequence[int] = ()) -> dict[str, Any]:
    """What a file says of a vocabulary; tokens that only the model has are filled in as unused.

    Args:
        tokenizer: What to write; None notes that there is none.
        vocab_size: Of the model.
        ends: Tokens that end an answer as the end token does.

    Raises:
        UsageError: the tokenizer is larger than the model's vocabulary, GGUF has no name for how it splits text,
            or more ends than it has places for.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if tokenizer.vocab_size > vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}",
            hint="save the tokenizer that the model was trained with",
        )
    said = json.loads(tokenizer.to_json())
    model, added = said["model"], {one["id"]: one for one in said["added_tokens"]}
    pieces = [f"[PAD{token}]" for token in range(vocab_size)]
    kinds = np.full(vocab_size, UNUSED, dtype=np.int32)
    for piece, token in model["vocab"].items():
        pieces[token], kinds[token] = piece, NORMAL
    for token, one in added.items():
        pieces[token], kinds[token] = one["content"], CONTROL if one["special"] else USER_DEFINED
    special = _special_metadata(tokenizer, {piece: token for token, piece in enumerate(pieces)}, ends)
    if model.get("byte_fallback"):
        unknown = special.get("tokenizer.ggml.unknown_token_id")
        if unknown is not None:
            kinds[unknown] = UNKNOWN
        return {**sentencepiece.metadata(said, pieces, kinds, tokenizer.adds_space), **special}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "tokenizer.ggml.model": GPT2,
        **special,
        "tokenizer.ggml.pre": _name_of_split(said),
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _special_metadata(
    tokenizer: Tokenizer, vocabulary: Mapping[str, int], ends: Sequence[int]
) -> dict[str, Any]:
    """Which tokens begin, end and fill, and which a program puts around a text."""
    around, end_id = tokenizer.around, tokenizer.end_id
    named = {
        ours: vocabulary[piece] for ours, piece in tokenizer.special_tokens.items() if piece in vocabulary
    }
    if around and around[0] != end_id:
        named.setdefault("bos_token", around[0])
    named = {"pad_token": end_id, **named, "eos_token": end_id}
    more = [token for token in dict.fromkeys(ends) if token != end_id]
    if len(more) > len(ENDS):
        raise UsageError(
            f"a GGUF names the end token and {len(ENDS)} more that end an answer; here are {len(more)} more: {more}",
            hint="leave some out of eos_token_id in generation_config.json",
        )
    beyond = [token for token in more if not 0 <= token < len(vocabulary)]
    if beyond:
        raise UsageError(
            f"tokens {beyond} are to end an answer; the vocabulary is 0 to {len(vocabulary) - 1}"
        )
    begins = around[:1] == (named.get("bos_token"),)
    return {
        **{f"tokenizer.ggml.{key}_token_id": named[ours] for ours, key in SPECIAL.items() if ours in named},
        **dict(zip(ENDS, more, strict=False)),
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": around[int(begins) :] == (end_id,),
    }


def _tokens(file: GGUFFile) -> tuple[list[str], list[int]]:
    model = file.values.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in (GPT2, sentencepiece.SENTENCEPIECE):
        raise file.error(
            "tokenizer.ggml.model",
            f"is {model!r}; allowed is {GPT2!r}, byte-level BPE, and {sentencepiece.SENTENCEPIECE!r}, SentencePiece's",
            "other vocabularies are not supported; the model itself loads without",
        )
    pieces = file.values.get("tokenizer.ggml.tokens")
    if not isinstance(pieces, list) or not 1 <= len(pieces) <= VOCABULARY_MAX:
        raise file.error("tokenizer.ggml.tokens", f"is no list of 1 to {VOCABULARY_MAX} tokens")
    kinds = file.values.get("tokenizer.ggml.token_type")
    if kinds is None:
        return pieces, [NORMAL] * len(pieces)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(pieces) or kinds.dtype.kind not in "iu":
        raise file.error(
            "tokenizer.ggml.token_type", f"does not have a number for each of {len(pieces)} tokens"
        )
    listed: list[int] = kinds.tolist()
    most = UNUSED if model == GPT2 else sentencepiece.BYTE
    wrong = next((token for token, kind in enumerate(listed) if not NORMAL <= kind <= most), None)
    if wrong is not None:
        raise file.error(
            "tokenizer.ggml.token_type", f"is {listed[wrong]} for token {wrong}; allowed is 1 to {most}"
        )
    return pieces, listed


def _merges(file: GGUFFile, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges as pairs, each of known tokens that make a known token."""
    found = file.values.get("tokenizer.ggml.merges")
    if not isinstance(found, list):
        raise file.error("tokenizer.ggml.merges", "is no list")
    pairs = []
    for number, text in enumerate(found):
        first, _, second = text.partition(" ")
        if not (first in vocabulary and second in vocabulary and first + second in vocabulary):
            raise file.error(
                f"tokenizer.ggml.merges[{number}]", f"is {text!r}, which does not join two tokens"
            )
        pairs.append((first, second))
    return pairs


def _splitter(steps: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    made: list[pre_tokenizers.PreTokenizer] = []
    for step in steps:
        if step == "digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != "bytes":
            made.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=steps[-1] == "bytes"))
    return pre_tokenizers.Sequence(made)


def _name_of_split(said: Mapping[str, Any]) -> str:
    """The name of how a tokenizer splits text, from its JSON.

    Raises:
        UsageError: there is none.
    """
    splitter = said["pre_tokenizer"] or {}
    steps: list[str] = []
    for step in splitter.get("pretokenizers", [splitter]):
        kind = step.get("type")
        if kind == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif (
            kind == "Split"
            and step["behavior"] == "Isolated"
            and not step["invert"]
            and "Regex" in step["pattern"]
        ):
            steps.append(step["pattern"]["Regex"])
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            steps += ["bytes"] if step["use_regex"] else []
        else:
            steps.append(str(kind))
    composed = (said["normalizer"] or {}).get("type")
    whole = bool(said["model"].get("ignore_merges", False))
    for name, known in SPLITS.items():
        fits = list(known) == steps and (name in WHOLE_WORDS) == whole
        if fits and composed == ("NFC" if name in COMPOSED else None):
            return name
    raise UsageError(
        f"GGUF has no name for how this tokenizer splits text: {', '.join(steps) or 'not at all'}",
        hint="write the file without a tokenizer, or use one that splits as one of these: "
        + ", ".join(SPLITS),
    )
