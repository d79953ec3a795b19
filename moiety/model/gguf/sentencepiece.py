"""SentencePiece vocabularies in GGUF files (`tokenizer.ggml.model` "llama"): BPE by scores, with bytes to fall back on.

Of all neighbours that together are a token those with the highest score are joined first, of equals the leftmost; a
character that is no token becomes its bytes. `tokenizers` goes by a list of pairs instead: every token's pairs in the
order of its score say the same, but for tokens of equal score, of which the one with the lower number goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers

from moiety.errors import UsageError
from moiety.model.gguf.header import GGUFFile

__all__ = ["BYTE", "SENTENCEPIECE", "build", "metadata"]

SENTENCEPIECE = "llama"  # `tokenizer.ggml.model`
NORMAL, USER_DEFINED, BYTE = 1, 4, 6
SPACE = "▁"
PIECE_MAX = 512  # characters; SentencePiece itself takes 16 unless told otherwise
LOWEST = -1e6  # score of what no pair makes
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def build(file: GGUFFile, vocabulary: Mapping[str, int], kinds: Sequence[int]) -> tokenizers.Tokenizer:
    """The vocabulary of a file; its special tokens are not added yet.

    Args:
        file: Its scores are read, and whether a text begins with a space.
        vocabulary: Number of each token.
        kinds: Kind of each token.

    Raises:
        FormatError: no score for each token, bytes missing, or a token that is too long.
    """
    missing = [piece for piece in BYTES if piece not in vocabulary or kinds[vocabulary[piece]] != BYTE]
    if missing:
        raise file.error(
            "tokenizer.ggml.tokens", f"lacks the byte {missing[0]}", "without bytes not every text has tokens"
        )
    scores = file.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(vocabulary),) or scores.dtype.kind != "f":
        raise file.error(
            "tokenizer.ggml.scores", f"does not have a number for each of {len(vocabulary)} tokens"
        )
    if not np.isfinite(scores).all():
        raise file.error("tokenizer.ggml.scores", "has numbers that are not finite")
    joined = {piece: token for piece, token in vocabulary.items() if kinds[token] in (NORMAL, USER_DEFINED)}
    if max(map(len, joined), default=0) > PIECE_MAX:
        raise file.error("tokenizer.ggml.tokens", f"has a token of more than {PIECE_MAX} characters")
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in sorted(joined, key=lambda piece: (-scores[joined[piece]], joined[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in joined and piece[cut:] in joined
    ]
    inner = tokenizers.Tokenizer(models.BPE(vocab=dict(vocabulary), merges=pairs, byte_fallback=True))
    begins = bool(file.values.get("tokenizer.ggml.add_space_prefix", True))
    first = [normalizers.Prepend(SPACE)] if begins else []
    inner.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if begins else []
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return inner


def metadata(said: Mapping[str, Any], pieces: Sequence[str], kinds: Any, begins: bool) -> dict[str, Any]:
    """What a file says of such a vocabulary besides its special tokens: a token's score is its first pair's place.

    Args:
        said: The tokenizer's JSON.
        pieces: Every token.
        kinds: Kind of each; those of bytes are put in.
        begins: A text is given a space before it.

    Raises:
        UsageError: it changes or splits a text in a way that such files have not.
    """
    steps = [*_steps(said["normalizer"], "normalizers"), *_steps(said["pre_tokenizer"], "pretokenizers")]
    plain = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        {"type": "Prepend", "prepend": SPACE},
    ]
    odd = [
        str(step.get("type"))
        for step in steps
        if step not in plain
        and not (
            step.get("type") == "Metaspace" and step["replacement"] == SPACE and step.get("split") is False
        )
    ]
    if odd:
        raise UsageError(
            f"a GGUF has no way to say how this tokenizer treats text: {', '.join(odd)}",
            hint="write the file without a tokenizer",
        )
    scores = np.full(len(pieces), LOWEST, dtype=np.float32)
    place = {piece: token for token, piece in enumerate(pieces)}
    for number, pair in enumerate(said["model"]["merges"]):
        token = place["".join(pair.split(" ") if isinstance(pair, str) else pair)]
        scores[token] = max(scores[token], -float(number))
    for piece in BYTES:
        kinds[place[piece]] = BYTE
    return {
        "tokenizer.ggml.model": SENTENCEPIECE,
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": begins,
    }


def _steps(said: Mapping[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    return [] if said is None else list(said.get(parts, [said]))
