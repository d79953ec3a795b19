"""Routing on disk: which experts every token of a run went to, in one file that any numpy opens. No torch.

A trace is an uncompressed zip of .npy arrays, which `numpy.load` opens, and `header.json`. Steps (forward passes)
are gathered into chunks of some MiB, so that neither writing nor reading holds a whole run. A checksum of every
array and the directory at the end of the file tell when it was cut or changed. `docs/traces.md` has every field.

Axes besides those of `moiety.routing`: S steps, L layers with experts. K is the most experts that a token of the
chunk was sent to; where it was sent to fewer, the largest number of the integer type stands at the end of its row.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import struct
import tokenize
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt

from moiety.errors import ConfigError, FormatError, StorageError
from moiety.fields import check_types, from_dict, option, require, to_dict
from moiety.storage import new_file, parse_json

__all__ = [
    "LEVELS",
    "Chunk",
    "Level",
    "RoutingTrace",
    "Step",
    "TraceHeader",
    "TraceWriter",
    "check",
    "parse_array",
    "read",
    "trace_of",
    "write",
    "writing",
]

Level = Literal["counts", "choices", "scores"]
Array = npt.NDArray[Any]
FORMAT, VERSION = "moiety-trace", 2  # 1 where there are no domains, for older readers
CHUNK_BYTES = 4 << 20
HEADER_BYTES_MAX, ARRAY_BYTES_MAX = 4 << 20, 1 << 30
LAYERS_MAX, EXPERTS_MAX, DOMAINS_MAX = 10_000, 65_535, 10_000
DAMAGE = (  # what zipfile and numpy raise on bytes that are none of ours
    zipfile.BadZipFile,
    NotImplementedError,  # a compression that zipfile does not know
    EOFError,
    ValueError,
    struct.error,
    OverflowError,
    RuntimeError,
)
_CHOICES = {
    "tokens_S": "i4",
    "token_T": "i4",
    "request_T": "i4",
    "position_T": "i4",
    "expert_TLK": "",  # the type that the number of experts asks for
}
# The arrays of a chunk at each level, and their types.
LEVELS: dict[Level, dict[str, str]] = {
    "counts": {"tokens_S": "i4", "counts_SLE": "u4"},
    "choices": _CHOICES,
    "scores": {**_CHOICES, "weight_TLK": "f2", "score_TLE": "f2"},
}


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """What a trace is of, and what is not in it."""

    level: Level = option(
        help="counts: pairs of each expert; choices: experts of each token; scores: theirs too"
    )
    layers: tuple[int, ...] = option(help="numbers of the blocks with experts")
    experts: tuple[int, ...] = option(help="experts of each of them, null experts among them")
    null_experts: int = option(0, help="of each layer's experts, the last ones, which multiply nothing")
    k: int = option(0, help="experts that a router chooses for a token; 0 is unknown, or any number")
    vocabulary: int = option(0, help="tokens are below this; 0 is unknown")
    model: str = option("", help="name or path of the model")
    format: str = option("", help="of the experts' weights, int4-g32 for instance")
    source: str = option("", help="what made the trace")
    expert_bytes: tuple[int, ...] = option((), help="bytes of one expert of each layer; none is unknown")
    dense_bytes: int = option(
        0, help="bytes of the weights that every step reads besides experts; 0 is unknown"
    )
    sample: int = option(1, help="one stretch of the run in so many was kept")
    steps: int = option(0, help="forward passes in the trace")
    tokens: int = option(0, help="tokens in the trace")
    skipped_tokens: int = option(0, help="tokens that sampling left out")
    dropped_tokens: int = option(0, help="tokens left out because the file had reached its limit")
    domains: tuple[str, ...] = option((), help="kinds of text; every token, or step of counts, says which")

    def __post_init__(self) -> None:
        check_types(self)
        require(0 < len(self.layers) <= LAYERS_MAX, f"a trace of {len(self.layers)} layers", "1 to 10,000")
        require(
            len(self.experts) == len(self.layers) and len(self.expert_bytes) in (0, len(self.layers)),
            f"{len(self.layers)} layers, {len(self.experts)} numbers of experts, {len(self.expert_bytes)} sizes",
            "one of each for every layer; the sizes may be left out",
        )
        least, most = min(self.experts), max(self.experts)
        require(0 < least <= most <= EXPERTS_MAX, f"layers have {least} to {most} experts", "1 to 65,535")
        numbers = [getattr(self, one.name) for one in fields(self) if one.type == "int"]
        require(min(*numbers, *self.layers, *self.expert_bytes, 0) >= 0, f"a number below 0 in {self}")
        require(self.sample >= 1, f"sample is {self.sample}; it must be positive")
        most, once = DOMAINS_MAX, set(self.domains)
        require(
            len(once) == len(self.domains) <= most and "" not in once,
            f"a trace of {len(self.domains)} domains, {', '.join(self.domains[:5])}",
            f"up to {most} different names",
        )

    @property
    def expert_dtype(self) -> np.dtype[Any]:
        """Of expert numbers: the smallest that has one number to spare, which means none."""
        return np.dtype(np.uint8 if max(self.experts) <= 255 else np.uint16)

    @property
    def arrays(self) -> dict[str, str]:
        """The arrays of a chunk and their types, as in `LEVELS`, and who says the domain."""
        if not self.domains:
            return LEVELS[self.level]
        return {**LEVELS[self.level], "domain_S" if self.level == "counts" else "domain_T": "i2"}

    def dtype(self, array: str) -> np.dtype[Any]:
        """Of an array of a chunk, as stored."""
        return np.dtype(self.arrays[array] or self.expert_dtype).newbyteorder("<")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Some steps, one after the other. Arrays that the trace's level has not are None.

    Args:
        tokens_S: Tokens of each step; at level counts several forward passes may be one step.
        token_T: Token ids; -1 where unknown, and for padding.
        request_T: Number of the request or sequence of each token; -1 where unknown.
        position_T: Its place in the sequence, from 0; -1 where unknown.
        expert_TLK: The experts that each token was sent to, in no order; the largest number of the type is none.
        weight_TLK: Their combine weights; 0 where there is none.
        score_TLE: What the router compared; NaN where it was not kept, and past a layer's experts.
        counts_SLE: Pairs of each expert, at level counts.
        domain_T: Of each token, an index into the header's domains, -1 where unknown; None without domains.
        domain_S: Of each step, at level counts.
    """

    tokens_S: Array
    token_T: Array | None = None
    request_T: Array | None = None
    position_T: Array | None = None
    expert_TLK: Array | None = None
    weight_TLK: Array | None = None
    score_TLE: Array | None = None
    counts_SLE: Array | None = None
    domain_T: Array | None = None
    domain_S: Array | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        """Those that are there, by name."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: array for name, array in found.items() if array is not None}

    def counts(self, header: TraceHeader) -> npt.NDArray[np.int64]:
        """Pairs of each (layer, expert) in this chunk, (L, E), whatever the level; E is the most of any layer."""
        if self.counts_SLE is not None:
            return np.asarray(self.counts_SLE.sum(0, dtype=np.int64))
        assert self.expert_TLK is not None
        width, layers = max(header.experts) + 1, len(header.layers)
        expert_TLK = np.minimum(self.expert_TLK.astype(np.int64), width - 1)  # none counts past the last one
        cell_TLK = expert_TLK + width * np.arange(layers)[:, None]
        counts = np.bincount(cell_TLK.ravel(), minlength=layers * width).reshape(layers, width)
        return counts[:, :-1]


class Step(NamedTuple):
    """A forward pass for a replay: its tokens, its sequences, and the experts that each layer multiplied, ascending."""

    tokens: int
    requests: int
    experts: list[list[int]]


@final
class RoutingTrace:
    """A header and chunks, which are read when they are asked for.

    Args:
        header: What the chunks are of.
        parts: Each gives one chunk.
    """

    def __init__(self, header: TraceHeader, parts: Sequence[Callable[[], Chunk]]) -> None:
        self.header, self._parts = header, parts

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in order, one in memory at a time.

        Raises:
            FormatError: the file was changed, or replaced since it was opened.
            StorageError: the system refused to read.
        """
        for part in self._parts:
            yield part()

    def counts(self) -> npt.NDArray[np.int64]:
        """Pairs of each (layer, expert), (L, E). Raises like `chunks`."""
        total = np.zeros((len(self.header.layers), max(self.header.experts)), np.int64)
        for chunk in self.chunks():
            total += chunk.counts(self.header)
        return total

    def drawn_tokens(self) -> int:
        """Tokens in steps that took one token of each sequence, as drawing does. Raises like `chunks`."""
        return sum(
            int(chunk.tokens_S[_follow_S(chunk) == 0].sum())
            for chunk in self.chunks()
            if chunk.expert_TLK is not None
        )

    def steps(self, *, apart: bool = False) -> Iterator[Step]:
        """The steps in order, or each token as a step of its own.

        Raises:
            FormatError, StorageError: as of `chunks`, and for a trace of counts alone.
        """
        if self.header.level == "counts":
            raise FormatError(
                "this trace holds counts alone: who was used when is not in it", hint="--record-level choices"
            )
        for chunk in self.chunks():
            yield from _steps(self.header, _apart(chunk) if apart else chunk)


def _apart(chunk: Chunk) -> Chunk:
    """A step for every token that was sent anywhere: not for padding."""
    assert chunk.expert_TLK is not None
    none = np.iinfo(chunk.expert_TLK.dtype).max
    sent_T = (chunk.expert_TLK != none).any((1, 2))
    rows = {name: array[sent_T] for name, array in chunk.arrays.items() if name != "tokens_S"}
    return Chunk(tokens_S=np.ones(int(sent_T.sum()), np.int32), **rows)


def _follow_S(chunk: Chunk) -> npt.NDArray[np.int64]:
    """Of each step, the tokens that come right after another one of their sequence in it."""
    request_T, position_T = chunk.request_T, chunk.position_T
    assert request_T is not None and position_T is not None
    follows_T = (np.diff(request_T, prepend=-2) == 0) & (np.diff(position_T, prepend=-2) == 1)
    stop_S = np.cumsum(chunk.tokens_S, dtype=np.int64)
    start_S = stop_S - chunk.tokens_S
    follows_T[start_S[chunk.tokens_S > 0]] = False
    before_T = np.cumsum([0, *follows_T])
    return np.asarray(before_T[stop_S] - before_T[start_S])


def _steps(header: TraceHeader, chunk: Chunk) -> Iterator[Step]:
    expert_TLK = chunk.expert_TLK
    assert expert_TLK is not None
    none = int(np.iinfo(expert_TLK.dtype).max)
    real_L = [experts - header.null_experts for experts in header.experts]
    stop = 0
    for tokens, follow in zip(chunk.tokens_S.tolist(), _follow_S(chunk).tolist(), strict=True):
        start, stop = stop, stop + tokens
        rows_LN = expert_TLK[start:stop].transpose(1, 0, 2).reshape(expert_TLK.shape[1], -1)
        experts = [sorted(set(row) - {none}) for row in rows_LN.tolist()]
        if header.null_experts:
            experts = [[one for one in row if one < real] for row, real in zip(experts, real_L, strict=True)]
        yield Step(tokens, tokens - follow, experts)


def trace_of(header: TraceHeader, chunks: Sequence[Chunk]) -> RoutingTrace:
    """A trace in memory; its header's steps and tokens are counted.

    Raises:
        FormatError: a chunk that the header does not fit.
    """
    for number, chunk in enumerate(chunks):
        check(header, chunk, f"chunk {number}")
    steps = sum(len(chunk.tokens_S) for chunk in chunks)
    tokens = sum(int(chunk.tokens_S.sum()) for chunk in chunks)
    return RoutingTrace(
        replace(header, steps=steps, tokens=tokens), [partial(_same, chunk) for chunk in chunks]
    )


def _same(chunk: Chunk) -> Chunk:
    return chunk


def check(header: TraceHeader, chunk: Chunk, where: str) -> None:
    """Every array that the level has and no other, of the right type and shape, with numbers that can be.

    Raises:
        FormatError: it says what is wrong.
    """
    arrays, wanted = chunk.arrays, header.arrays
    if arrays.keys() != wanted.keys():
        raise FormatError(f"{where} has {', '.join(arrays)}; level {header.level} has {', '.join(wanted)}")
    sizes = {"L": len(header.layers), "E": max(header.experts)}
    for name, array in arrays.items():
        axes = name.rpartition("_")[2]
        if array.dtype != header.dtype(name) or array.ndim != len(axes):
            raise FormatError(
                f"{where}: {name} is {array.dtype} {array.shape}; {header.dtype(name)} ({axes}) is wanted"
            )
        for axis, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise FormatError(
                    f"{where}: {name} has shape {array.shape}; {axis} is {sizes[axis]} elsewhere"
                )
    tokens_S = arrays["tokens_S"]
    if sizes["S"] and (tokens_S.min() < 0 or int(tokens_S.sum()) != sizes.get("T", int(tokens_S.sum()))):
        raise FormatError(
            f"{where}: its steps have {int(tokens_S.sum())} tokens, its arrays {sizes.get('T')}"
        )
    domain = arrays.get("domain_S", arrays.get("domain_T", np.zeros(0)))
    if domain.size and not -1 <= domain.min() <= domain.max() < len(header.domains):
        raise FormatError(f"{where} has domains {domain.min()} to {domain.max()} of {len(header.domains)}")
    if chunk.expert_TLK is None or not chunk.expert_TLK.size:
        return
    expert_TLK, none = chunk.expert_TLK, np.iinfo(header.expert_dtype).max
    experts_L1 = np.array(header.experts)[:, None]
    if ((expert_TLK >= experts_L1) & (expert_TLK != none)).any():
        raise FormatError(f"{where} names an expert that its layer does not have")
    sorted_TLK = np.sort(expert_TLK, axis=-1)
    if ((sorted_TLK[..., 1:] == sorted_TLK[..., :-1]) & (sorted_TLK[..., 1:] != none)).any():
        raise FormatError(f"{where} sends a token to the same expert twice")
    tokens, top = arrays["token_T"], header.vocabulary or 2**31
    if min(arrays[name].min() for name in ("token_T", "request_T", "position_T")) < -1 or tokens.max() >= top:
        raise FormatError(f"{where} has tokens outside the vocabulary, or requests or positions below -1")


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    """One chunk of several; rows of fewer experts are filled up."""
    if len(chunks) == 1:
        return chunks[0]
    found: dict[str, Array] = {}
    for name in chunks[0].arrays:
        parts = [chunk.arrays[name] for chunk in chunks]
        if name.endswith("TLK"):
            widest = max(part.shape[2] for part in parts)
            none = np.iinfo(parts[0].dtype).max if name == "expert_TLK" else 0
            parts = [
                np.pad(part, ((0, 0), (0, 0), (0, widest - part.shape[2])), constant_values=none)
                for part in parts
            ]
        found[name] = np.concatenate(parts)
    return Chunk(**found)


@final
class TraceWriter:
    """What `writing` gives: chunks go in, at most some MiB wait.

    Args:
        archive: Where the arrays go.
        header: Of the trace; what is counted is counted here.
    """

    def __init__(self, archive: zipfile.ZipFile, header: TraceHeader) -> None:
        self.header = header
        self.size_bytes = 0  # of the arrays taken in
        self._zip = archive
        self._waiting: list[Chunk] = []
        self._waiting_bytes = self._written = self._steps = self._tokens = 0

    def append(self, chunk: Chunk) -> None:
        """Take in further steps.

        Raises:
            FormatError: they do not fit the header.
        """
        check(self.header, chunk, "the chunk")
        size_bytes = sum(array.nbytes for array in chunk.arrays.values())
        self._waiting.append(chunk)
        self._waiting_bytes += size_bytes
        self.size_bytes += size_bytes
        self._steps += len(chunk.tokens_S)
        self._tokens += int(chunk.tokens_S.sum())
        if self._waiting_bytes >= CHUNK_BYTES:
            self._write()

    def close(self) -> None:
        """Write what waits, then the header."""
        self._write()
        header = to_dict(replace(self.header, steps=self._steps, tokens=self._tokens))
        version = VERSION if header.get("domains") else 1
        header = {name: value for name, value in header.items() if name != "domains" or value}
        said = {"type": FORMAT, "version": version, "chunks": self._written, **header}
        self._put("header.json", (json.dumps(said, indent=1) + "\n").encode())

    def _write(self) -> None:
        if not self._waiting:
            return
        for name, array in _joined(self._waiting).arrays.items():
            room = io.BytesIO()
            np.lib.format.write_array(room, np.ascontiguousarray(array), allow_pickle=False)
            self._put(f"{self._written:06d}/{name}.npy", room.getvalue())
        self._written += 1
        self._waiting, self._waiting_bytes = [], 0

    def _put(self, name: str, data: bytes) -> None:
        self._zip.writestr(zipfile.ZipInfo(name), data)  # without the time: equal traces are equal files


@contextlib.contextmanager
def writing(path: str | Path, header: TraceHeader) -> Iterator[TraceWriter]:
    """Write a trace chunk by chunk; it takes its name when the block ends well and leaves nothing when it does not.

    Raises:
        StorageError: the system refused.
    """
    with new_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        writer = TraceWriter(archive, header)
        yield writer
        writer.close()


def write(path: str | Path, trace: RoutingTrace) -> None:
    """Write a whole trace. Raises like `writing` and `RoutingTrace.chunks`."""
    with writing(path, trace.header) as writer:
        for chunk in trace.chunks():
            writer.append(chunk)


def read(path: str | Path) -> RoutingTrace:
    """Open a trace. Nothing in it is run or trusted: every size is checked before anything of it is made.

    Raises:
        FormatError: not a trace, or a damaged one.
        StorageError: the system refused to read.
    """
    file = Path(path)
    with _opened(file) as (archive, stamp):
        names = _checked_names(file, archive, stamp.st_size)
        if names.pop("header.json", HEADER_BYTES_MAX + 1) > HEADER_BYTES_MAX:
            raise FormatError(f"{file} has no header.json, or a huge one", hint="is this a trace?")
        values = parse_json(file, archive.read("header.json").decode())
    if (values.pop("type", None), values.pop("version", None)) not in ((FORMAT, 1), (FORMAT, VERSION)):
        raise FormatError(
            f"{file} is not a trace of version 1 or {VERSION}", hint="use a newer version of the program"
        )
    chunks = values.pop("chunks", None)
    try:
        header = from_dict(TraceHeader, values)
    except ConfigError as error:
        raise FormatError(f"{file}: {error.message}", hint=error.hint) from error
    wanted = header.arrays
    if not isinstance(chunks, int) or names.keys() != {
        f"{number:06d}/{name}.npy" for number in range(min(chunks, len(names))) for name in wanted
    }:
        raise FormatError(f"{file} does not hold {chunks} chunks of {', '.join(wanted)} and nothing else")

    def part(number: int) -> Chunk:
        where = f"{file}, chunk {number}"
        with _opened(file) as (archive, now):
            if (now.st_ino, now.st_size, now.st_mtime_ns) != (stamp.st_ino, stamp.st_size, stamp.st_mtime_ns):
                raise FormatError(f"{file} was replaced while it was read", hint="read it again")
            raw = {name: archive.read(f"{number:06d}/{name}.npy") for name in wanted}
        chunk = Chunk(**{name: parse_array(data, f"{where}: {name}") for name, data in raw.items()})
        check(header, chunk, where)
        return chunk

    return RoutingTrace(header, [partial(part, number) for number in range(chunks)])


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[zipfile.ZipFile, os.stat_result]]:
    """The zip in a file; what is wrong with either is our error."""
    if file.exists() and not file.is_file():
        raise FormatError(f"{file} is not a file", hint="give the file that --record wrote")
    try:
        with open(file, "rb") as opened, zipfile.ZipFile(opened) as archive:
            yield archive, os.fstat(opened.fileno())
    except DAMAGE as error:
        raise FormatError(f"{file} is not a whole trace: {error}", hint="it was cut or changed") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place in the file that is none
            raise FormatError(f"{file} is not a whole trace: {error}", hint="it was changed") from error
        raise StorageError(f"cannot read {file}: {error.strerror}", hint="check the path") from error


def _checked_names(file: Path, archive: zipfile.ZipFile, size_bytes: int) -> dict[str, int]:
    """Sizes of the members by name; together they are no larger than the file, so that none can blow up."""
    members = archive.infolist()
    found = {one.filename: one.file_size for one in members}
    plain = all(one.compress_type == zipfile.ZIP_STORED and not one.flag_bits & 1 for one in members)
    if not plain or len(found) < len(members) or any(one.file_size != one.compress_size for one in members):
        raise FormatError(
            f"{file} has a compressed or encrypted member, or one twice", hint="is this a trace?"
        )
    if sum(found.values()) > size_bytes or max(found.values(), default=0) > ARRAY_BYTES_MAX:
        raise FormatError(f"{file} says it holds more than it does, or an array above 1 GiB")
    return found


def parse_array(data: bytes, where: str) -> Array:
    """The array of numbers in the bytes of an .npy file.

    Raises:
        FormatError: not such a file, objects in it, or a size that is not the data's.
    """
    room = io.BytesIO(data)
    try:
        major, _ = np.lib.format.read_magic(room)
        reader = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = reader(room)
    except (*DAMAGE, SyntaxError, tokenize.TokenError, TypeError, KeyError, MemoryError) as error:
        raise FormatError(f"{where} is not an .npy array: {error}") from error
    rest = len(data) - room.tell()
    sizes = all(type(size) is int and size >= 0 for size in shape)
    if not sizes or dtype.kind not in "iuf" or math.prod(shape) * dtype.itemsize != rest:
        raise FormatError(f"{where} says {dtype} {shape}, and {rest} bytes follow")
    array = np.frombuffer(data, dtype, offset=room.tell())
    return array.reshape(shape, order="F" if by_column else "C")
