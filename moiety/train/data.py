"""Tokens on disk, and batches whose place in the data is one integer.

A split is one file of tokens: an end token, then each document followed by its end token, domain
after domain. Sequences of S tokens are cut from it side by side, so a sequence may hold the end of one
document and the start of the next, and attention crosses that border. Each epoch takes every sequence
once, in an order that depends on (seed, epoch) alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import numpy as np
import numpy.typing as npt
import torch

from moiety.errors import ConfigError, DataError, FormatError, StorageError, UsageError
from moiety.model.tokenizer import Tokenizer, train_tokenizer
from moiety.storage import write_atomically
from moiety.train.corpus import Document, Split

__all__ = [
    "IGNORED",
    "Batch",
    "Preference",
    "Source",
    "TokenData",
    "build",
    "epoch_order",
    "open_tokens",
    "prepare_tokenizer",
]

IGNORED = -100
LAYOUT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]


def prepare_tokenizer(split: Split, vocab_size: int, folder: str | Path) -> Tokenizer:
    """The tokenizer learnt from the training texts, kept in `folder` for the next call.

    Args:
        split: Only its training documents are used.
        vocab_size: As for `train_tokenizer`.
        folder: Where it is kept, with the fingerprint of what it was learnt from.

    Raises:
        ConfigError, DataError: as `train_tokenizer`.
        StorageError: the system refused.
    """
    place = Path(folder)
    texts = [document.text for document in split.train]
    wanted = {"texts": _fingerprint([("", text) for text in texts]), "vocab_size": vocab_size}
    record = place / "learnt_from.json"
    if record.exists():
        try:
            kept = Tokenizer.load(place)
            if json.loads(record.read_bytes()) == {**wanted, "tokenizer": kept.fingerprint}:
                return kept
        except (FormatError, ValueError):
            pass  # a damaged copy is worth nothing: the same texts give the same tokenizer again
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save(place)
    write_atomically(record, json.dumps({**wanted, "tokenizer": tokenizer.fingerprint}).encode())
    return tokenizer


def build(split: Split, tokenizer: Tokenizer, folder: str | Path) -> TokenData:
    """Turn a split into token files, or reuse those in `folder` when they are of the same content.

    A reused folder is verified in full (size and sha256 of each file). One that is damaged or of other
    content is built again, and `TokenData.notes` says so.

    Args:
        split: Texts to train on and texts held out.
        tokenizer: Its vocabulary decides uint16 or uint32.
        folder: Where the files go; one set per folder.

    Raises:
        DataError: nothing to train on.
        StorageError: the system refused.
    """
    if not split.train:
        raise DataError("the split has no training documents", hint="give more text or hold out less")
    place = Path(folder)
    fingerprint = _split_fingerprint(split, tokenizer)
    notes = list(split.notes)
    if (place / MANIFEST).exists():
        try:
            found = open_tokens(place)
        except FormatError as error:
            notes.append(f"the tokens kept in {place} were damaged and are built again: {error.message}")
        else:
            if found.fingerprint == fingerprint:
                return found
            notes.append(f"the tokens kept in {place} were of other texts or options and are built again")
    domains = sorted({document.domain for document in (*split.train, *split.held_out)})
    files: dict[str, Any] = {}
    for name, documents in zip(SPLITS, (split.train, split.held_out), strict=True):
        files |= _write_split(place, name, documents, tokenizer, domains)
    files["token_bytes.npy"] = _write_array(
        place / "token_bytes.npy", np.array(tokenizer.byte_counts(), np.int64)
    )
    manifest: dict[str, Any] = {
        "layout": LAYOUT,
        "fingerprint": fingerprint,
        "dtype": _dtype(tokenizer).str,
        "domains": domains,
        "notes": list(split.notes),
        "files": files,
    }
    manifest["seal"] = _seal(manifest)
    write_atomically(place / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return TokenData(place, manifest, tuple(notes))


def open_tokens(folder: str | Path) -> TokenData:
    """Open token files that `build` wrote, after verifying each file's size and sha256.

    Raises:
        FormatError: a file is missing, cut or changed, or the manifest is not one of ours.
        StorageError: the system refused to read.
    """
    place = Path(folder)
    again = "build the tokens again"
    try:
        manifest = json.loads((place / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise FormatError(f"{place} has no {MANIFEST}", hint=again) from error
    except ValueError as error:
        raise FormatError(f"{place / MANIFEST} is not whole JSON: {error}", hint=again) from error
    except OSError as error:
        raise StorageError(f"cannot read {place}: {error.strerror}", hint="check its permissions") from error
    if not isinstance(manifest, dict) or manifest.get("layout") != LAYOUT:
        raise FormatError(f"{place / MANIFEST} is not of layout {LAYOUT}", hint=again)
    if manifest.get("seal") != _seal(manifest):
        raise FormatError(f"{place / MANIFEST} was changed: its seal does not match", hint=again)
    for name, expected in manifest["files"].items():
        found = _measure(place / name)
        if found != expected:
            raise FormatError(f"{place / name} is {found}, but the manifest says {expected}", hint=again)
    return TokenData(place, manifest, tuple(manifest["notes"]))


def _seal(manifest: dict[str, Any]) -> str:
    """sha256 of all that a manifest says, so that a changed manifest is as detectable as a changed file."""
    said = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")


def _fingerprint(parts: Sequence[tuple[str, str]]) -> str:
    """sha256 over lengths and contents, so that no two lists of parts run together."""
    digest = hashlib.sha256()
    for pair in parts:
        for item in pair:
            content = item.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _split_fingerprint(split: Split, tokenizer: Tokenizer) -> str:
    parts = [(f"layout {LAYOUT}", tokenizer.fingerprint)]
    for name, documents in zip(SPLITS, (split.train, split.held_out), strict=True):
        parts.append((name, str(len(documents))))
        parts += [(document.domain, document.text) for document in documents]
    return _fingerprint(parts)


def _measure(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, in the form that the manifest keeps."""
    try:
        with path.open("rb") as file:
            return {
                "size_bytes": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    except FileNotFoundError as error:
        raise FormatError(f"{path} does not exist", hint="build the tokens again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error


def _write_array(path: Path, array: npt.NDArray[Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
    return _measure(path)


def _write_split(
    folder: Path, name: str, documents: Sequence[Document], tokenizer: Tokenizer, domains: Sequence[str]
) -> dict[str, Any]:
    """Write one split's tokens and index; rows of the index are (first token, domain, bytes)."""
    ordered = sorted(documents, key=lambda document: document.domain)
    index = np.zeros((len(ordered), 3), np.int64)
    dtype = _dtype(tokenizer)
    path = folder / f"{name}.tokens.bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(np.array([tokenizer.end_id], dtype).tobytes())
                at, row = 1, 0
                for start in range(0, len(ordered), 256):
                    chunk = ordered[start : start + 256]
                    for document, ids in zip(
                        chunk, tokenizer.encode_batch([one.text for one in chunk]), strict=True
                    ):
                        index[row] = at, domains.index(document.domain), document.size_bytes
                        file.write(np.array([*ids, tokenizer.end_id], dtype).tobytes())
                        at, row = at + len(ids) + 1, row + 1
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}", hint="check space and permissions"
        ) from error
    index_path = folder / f"{name}.documents.npy"
    return {path.name: _measure(path), index_path.name: _write_array(index_path, index)}


def epoch_order(sequences: int, seed: int, epoch: int) -> Integers:
    """The order of an epoch: ranks of raw Philox bits, which numpy promises never to change."""
    bits = np.random.Philox(key=seed + (epoch << 64))
    return np.argsort(bits.random_raw(sequences), kind="stable")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B sequences of S tokens and what follows each token.

    `domain_BS` is the domain of each input token as an index into `TokenData.domains`; an end token
    belongs to the document that it ends. `targets_BS` is -100 where nothing is to be scored.
    `target_bytes` is the UTF-8 size of the scored targets. `sequences_seen` is the place after this
    batch: give it to `TokenData.batches(start=...)` to go on from here. `epoch` is that of the first
    sequence.

    With `lengths` one row holds several sequences behind each other, of so many tokens each. `valid_BS` is False for
    padding. With a `preference` the sequences come in pairs, and `sequences_seen` counts pairs.
    """

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    domain_BS: torch.Tensor
    target_bytes: int
    sequences_seen: int
    epoch: int
    lengths: tuple[int, ...] = ()
    valid_BS: torch.Tensor | None = None
    preference: Preference | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return self.tokens_BS.numel() if self.valid_BS is None else int(self.valid_BS.sum())

    def rows(self, part: slice) -> Batch:
        """Some of the rows; everything else is that of the whole batch.

        Raises:
            ConfigError: sequences that are no rows of their own, or that belong together, and not all are asked for.
        """
        if part == slice(0, len(self.tokens_BS)):
            return self
        if self.lengths or self.preference is not None:
            raise ConfigError(
                "several sequences in one row, and pairs of answers, are not divided among processes",
                hint="run it in one process",
            )
        return replace(
            self,
            tokens_BS=self.tokens_BS[part],
            targets_BS=self.targets_BS[part],
            domain_BS=self.domain_BS[part],
            valid_BS=None if self.valid_BS is None else self.valid_BS[part],
        )

    @property
    def scored(self) -> int:
        """What the loss is a mean over: scored targets, or pairs."""
        if self.preference is not None:
            return len(self.preference.reference_N) // 2
        return int((self.targets_BS != IGNORED).sum())


class Preference(NamedTuple):
    """Of N answers, a better and a worse one to each of N / 2 prompts in turn: what the model thought of them at first.

    Args:
        reference_N: Logarithm of each answer's probability, float64.
        beta: How much the difference of their odds counts.
    """

    reference_N: torch.Tensor
    beta: float


class Source(Protocol):
    """What can be trained on and evaluated: texts, or samples that are a sequence each."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of what is evaluated apart."""
        ...

    def sizes(self, split: str = "train") -> dict[str, dict[str, int]]:
        """By domain `documents`, `tokens` and `size_bytes` of `train` or `held_out`."""
        ...

    def batches(self, *, B: int, S: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Training batches, the same from any `start` on as in one go."""
        ...

    def evaluation(self, domain: str, *, B: int, S: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out part of a domain, in order."""
        ...


@final
class TokenData:
    """Verified token files of one split corpus. Made by `build` or `open_tokens`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], notes: tuple[str, ...]) -> None:
        self.folder = folder
        self.notes = notes
        self.fingerprint: str = manifest["fingerprint"]
        self.domains: tuple[str, ...] = tuple(manifest["domains"])
        dtype = np.dtype(manifest["dtype"])
        self._tokens = {
            name: np.memmap(folder / f"{name}.tokens.bin", dtype=dtype, mode="r") for name in SPLITS
        }
        self._documents: dict[str, Integers] = {
            name: np.load(folder / f"{name}.documents.npy", allow_pickle=False) for name in SPLITS
        }
        self._token_bytes: Integers = np.load(folder / "token_bytes.npy", allow_pickle=False)

    @property
    def train_tokens(self) -> int:
        """Tokens to train on, end tokens included."""
        return len(self._tokens["train"])

    def sizes(self, split: str = "train") -> dict[str, dict[str, int]]:
        """Documents, tokens and UTF-8 bytes of each domain, of `train` or `held_out`."""
        if split not in SPLITS:
            raise UsageError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
        index = self._documents[split]
        ends = np.append(index[1:, 0], len(self._tokens[split])) if len(index) else index[:, 0]
        return {
            domain: {
                "documents": int(rows.sum()),
                "tokens": int((ends - index[:, 0])[rows].sum()),
                "size_bytes": int(index[rows, 2].sum()),
            }
            for number, domain in enumerate(self.domains)
            for rows in (index[:, 1] == number,)
        }

    def sequences(self, S: int) -> int:
        """Training sequences of S tokens in one epoch; the last few tokens that fill none are unused.

        Raises:
            DataError: not enough text for one.
        """
        if S < 1:
            raise UsageError(f"the sequence length is {S}; it must be positive")
        count = (self.train_tokens - 1) // S
        if count < 1:
            raise DataError(
                f"the training text has {self.train_tokens} tokens; one sequence of {S} needs {S + 1}",
                hint="give more text or a shorter sequence",
            )
        return count

    def batches(self, *, B: int, S: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Training batches without end, the same from any `start` on as in one go.

        Args:
            B: Sequences in a batch; a batch may reach into the next epoch.
            S: Tokens in a sequence.
            seed: Of the order, 0 to 2**64 - 1.
            start: Sequences already seen, `Batch.sequences_seen` of the last one used.

        Raises:
            DataError: not enough text for one sequence.
            UsageError: a number out of range.
        """
        if B < 1 or start < 0 or not 0 <= seed < 1 << 64:
            raise UsageError(
                f"batches(B={B}, seed={seed}, start={start}): B must be positive, start not negative, "
                "seed 0 to 2**64 - 1"
            )
        return self._training(B, S, seed, start, self.sequences(S))

    def evaluation(self, domain: str, *, B: int, S: int, limit: int | None = None) -> Iterator[Batch]:
        """The held-out text of one domain, in order, each byte scored exactly once.

        End tokens carry no text and are not scored; the rest of the last sequence is padding. The sum of
        the losses over the sum of `target_bytes` is exact nats per byte.

        Args:
            domain: One of `domains`.
            B: Sequences in a batch; the last batch may have fewer.
            S: Tokens in a sequence.
            limit: Most sequences in all; none means the whole held-out text.

        Raises:
            UsageError: an unknown domain, or a number out of range.
            DataError: nothing of this domain was held out.
        """
        if domain not in self.domains:
            raise UsageError(
                f"domain {domain!r} is not in this data", hint=f"it has {', '.join(self.domains)}"
            )
        if B < 1 or S < 1 or (limit is not None and limit < 1):
            raise UsageError(f"evaluation(B={B}, S={S}, limit={limit}): each must be positive")
        number = self.domains.index(domain)
        index = self._documents["held_out"]
        rows = np.flatnonzero(index[:, 1] == number)
        if not len(rows):
            raise DataError(f"nothing of domain {domain!r} was held out", hint="give it more documents")
        last = int(rows[-1]) + 1
        stop = int(index[last, 0]) if last < len(index) else len(self._tokens["held_out"])
        return self._held_out(int(index[rows[0], 0]) - 1, stop, number, B, S, limit)

    def _training(self, B: int, S: int, seed: int, start: int, per_epoch: int) -> Iterator[Batch]:
        tokens, starts = self._tokens["train"], self._documents["train"][:, 0]
        domain_of = self._documents["train"][:, 1]
        order_epoch = -1
        order: Integers = np.empty(0, np.int64)
        while True:
            window_BS = np.empty((B, S + 1), np.int64)
            domain_BS = np.empty((B, S), np.int32)
            for row in range(B):
                epoch, place = divmod(start + row, per_epoch)
                if epoch != order_epoch:
                    order_epoch, order = epoch, epoch_order(per_epoch, seed, epoch)
                at = int(order[place]) * S
                window_BS[row] = tokens[at : at + S + 1]
                document_S = np.searchsorted(starts, np.arange(at, at + S), side="right") - 1
                domain_BS[row] = domain_of[np.maximum(document_S, 0)]
            yield self._batch(window_BS[:, :-1], window_BS[:, 1:], domain_BS, start + B, start // per_epoch)
            start += B

    def _held_out(
        self, first: int, stop: int, number: int, B: int, S: int, limit: int | None
    ) -> Iterator[Batch]:
        tokens = self._tokens["held_out"]
        end = int(tokens[0])
        count = -(-(stop - 1 - first) // S)
        count = count if limit is None else min(count, limit)
        for start in range(0, count, B):
            rows = min(B, count - start)
            at, reach = first + start * S, rows * S
            flat = np.full(reach + 1, end, np.int64)
            piece = tokens[at : min(at + reach + 1, stop)]
            flat[: len(piece)] = piece
            targets = np.where(flat[1:] == end, IGNORED, flat[1:])
            yield self._batch(
                flat[:-1].reshape(rows, S),
                targets.reshape(rows, S),
                np.full((rows, S), number, np.int32),
                start + rows,
                0,
            )

    def _batch(
        self,
        tokens_BS: Integers,
        targets_BS: Integers,
        domain_BS: npt.NDArray[np.int32],
        seen: int,
        epoch: int,
    ) -> Batch:
        return Batch(
            tokens_BS=torch.from_numpy(np.ascontiguousarray(tokens_BS)),
            targets_BS=torch.from_numpy(np.ascontiguousarray(targets_BS)),
            domain_BS=torch.from_numpy(domain_BS),
            target_bytes=int(self._token_bytes[targets_BS[targets_BS != IGNORED]].sum()),
            sequences_seen=seen,
            epoch=epoch,
        )
