"""Experts that stay on disk: slots of memory, threads that read into them, and who is where (`moiety/residency.py`).

The slots are one stretch of memory that is never given back. Bytes are read with O_DIRECT from a file that is open all
the time, so neither the system's cache nor a file of the same name that comes later matters, and nothing is mapped:
what the disk refuses is an error, never a signal. Every expert is compared with its checksum before it is used.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import torch
import xxhash
from torch import Tensor, nn

from moiety.backends.cpu_memory import huge_slab
from moiety.errors import FormatError, MoietyError, StorageError
from moiety.formats.tiles import EXPERT_MULTIPLE
from moiety.model.expert_file import ExpertFile, ExpertStack, compare_checksum
from moiety.moe.streamed import StreamedExperts
from moiety.residency import Key, Residency

__all__ = ["ExpertStore", "StoreStatistics", "silent", "slot_bytes", "store_of"]

PART_BYTES = 2 << 20  # of one read: large enough for full speed, small enough to divide an expert
THREADS = 4
PATIENCE_S = 2.0
# guesses to judge by, share to be right, and one call in so many else
ENOUGH_GUESSES, TRUSTED, SELDOM = 64, 0.6, 16


def silent(line: str) -> None:
    """Say nothing."""


class _Piece(NamedTuple):
    """An expert in the file: its stack, its place there."""

    stack: ExpertStack
    place: int

    @property
    def offset_bytes(self) -> int:
        return self.stack.offset_of(self.place)

    @property
    def size_bytes(self) -> int:
        return self.stack.expert_bytes

    @property
    def words(self) -> str:
        return f"expert {self.stack.numbers[self.place]} of layer {self.stack.layer}"


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """What a store has done.

    Args:
        slots: Experts that have room.
        slab_bytes: Of all slots.
        hits: Experts that were in memory when a call wanted them.
        misses: Experts that were not.
        read_bytes: From disk.
        waited_s: How long calls waited for the disk.
        guesses: Experts that were read before a call wanted them.
        right: Of these, the ones that the next call did want.
        skipped_pairs: Pairs of a token and a missing expert that were left out (`skip_misses_below`).
        changed_pairs: Pairs that went to an expert because it was in memory (`resident_bias`).
        pairs: All pairs, where one of these two is on.
    """

    slots: int
    slab_bytes: int
    hits: int
    misses: int
    read_bytes: int
    waited_s: float
    guesses: int
    right: int
    skipped_pairs: int
    changed_pairs: int
    pairs: int

    @property
    def hit_rate(self) -> float:
        """Share of the wanted experts that were in memory; 0 before the first."""
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else 0.0

    @property
    def words(self) -> str:
        """One line for people."""
        guessed = f", {self.right} of {self.guesses} guesses right" if self.guesses else ""
        skipped = ""
        if self.pairs:
            shares = (100 * count / self.pairs for count in (self.changed_pairs, self.skipped_pairs))
            skipped = ", {:.2f} % of pairs changed, {:.2f} % left out".format(*shares)
        return (
            f"experts: {100 * self.hit_rate:.1f} % in memory, {self.read_bytes / 1e9:.2f} GB read, "
            f"{self.waited_s:.1f} s waited for the disk{guessed}{skipped}"
        )


@final
class _Load:
    """An expert on its way; the reader's lock guards what changes."""

    def __init__(self, key: Key, slot: int, piece: _Piece, is_guess: bool) -> None:
        self.key, self.slot, self.piece, self.is_guess = key, slot, piece, is_guess
        self.is_begun = self.is_done = False
        self.error: MoietyError | None = None
        parts = -(-piece.size_bytes // PART_BYTES)
        step = -(-piece.size_bytes // parts // EXPERT_MULTIPLE) * EXPERT_MULTIPLE
        self.parts = deque(
            (at, min(step, piece.size_bytes - at)) for at in range(0, piece.size_bytes, step)
        )  # first byte and number of bytes of what nobody reads yet
        self.left = len(self.parts)
        self.digest, self.digested_bytes, self.is_digesting = xxhash.xxh3_64(), 0, False
        # first byte and number of bytes of what is read and not yet in the digest
        self.arrived: dict[int, int] = {}


@final
class _Reader:
    """Threads that read experts into slots: first those that are waited for, then those that are guessed."""

    def __init__(self, path: Path, memory: memoryview, slot_bytes: int, say: Callable[[str], None]) -> None:
        self.path, self._memory, self._slot_bytes = path, memory, slot_bytes
        self._descriptor, self._is_direct = _opened(path)
        if not self._is_direct:
            say(f"{path} cannot be read around the system's cache: pages are dropped after they were read")
        self.changed = threading.Condition()
        self._queue: deque[_Load] = deque()
        self._guesses: deque[_Load] = deque()
        self._wanted_parts = self._guessed_parts = 0  # that are being read now
        self._is_closed = False
        self.read_bytes = 0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def submit(self, load: _Load) -> None:
        """Have an expert read."""
        with self.changed:
            if self._is_closed:
                raise StorageError(f"{self.path} was closed", hint="load the model again")
            (self._guesses if load.is_guess else self._queue).append(load)
            self.changed.notify_all()

    def want(self, load: _Load) -> None:
        """A guess is waited for now."""
        with self.changed:
            load.is_guess = False
            if load in self._guesses:
                self._guesses.remove(load)
                self._queue.append(load)
                self.changed.notify_all()

    def cancel(self, load: _Load) -> None:
        """Read no more of it than is being read; it ends with an error if that is not the whole."""
        with self.changed:
            if load.parts:
                load.left -= len(load.parts)
                load.parts.clear()
                load.error = StorageError("reading was given up")
                for queue in (self._queue, self._guesses):
                    if load in queue:
                        queue.remove(load)
                load.is_done = load.left == 0

    def close(self) -> None:
        """End the threads and close the file; once more does nothing."""
        with self.changed:
            is_first, self._is_closed = not self._is_closed, True
            for load in [*self._queue, *self._guesses]:
                self.cancel(load)
            self.changed.notify_all()
        for thread in self._threads:
            thread.join()
        if is_first:
            os.close(self._descriptor)

    def _next(self) -> tuple[_Load, int, int] | None:
        """The next part to read; of a guess one at a time, while nothing that is waited for is being read."""
        queue = self._queue
        if not queue and not self._wanted_parts and not self._guessed_parts:
            queue = self._guesses
        if not queue:
            return None
        load = queue[0]
        at, size = load.parts.popleft()
        if not load.parts:
            queue.popleft()
        load.is_begun = True
        return load, at, size

    def _work(self) -> None:
        while True:
            with self.changed:
                while (job := self._next()) is None:
                    if self._is_closed:
                        return
                    self.changed.wait()
                load, at, size = job
                is_wanted = not load.is_guess
                self._wanted_parts += is_wanted
                self._guessed_parts += not is_wanted
            error = self._read(load, at, size)
            with self.changed:
                self._wanted_parts -= is_wanted
                self._guessed_parts -= not is_wanted
                self.read_bytes += size
                load.error = load.error or error
                load.left -= 1
                load.arrived[at] = size
                if not self._wanted_parts and self._guesses:
                    self.changed.notify_all()
            self._digest(load)

    def _read(self, load: _Load, at: int, size: int) -> MoietyError | None:
        """Read one part; what went wrong, in words that name the expert."""
        first, place = load.slot * self._slot_bytes + at, load.piece.offset_bytes + at
        done = 0
        try:
            while done < size:
                count = os.preadv(self._descriptor, [self._memory[first + done : first + size]], place + done)
                done += count - count % EXPERT_MULTIPLE if self._is_direct else count
                if count == 0 or (self._is_direct and count < EXPERT_MULTIPLE):
                    return FormatError(
                        f"{self.path} ends at byte {os.fstat(self._descriptor).st_size:,}, but {load.piece.words} lies "
                        f"at {load.piece.offset_bytes:,} to {load.piece.offset_bytes + load.piece.size_bytes:,}",
                        hint="it was cut while in use: put it back, or pack the model again",
                    )
            if not self._is_direct and sys.platform == "linux":
                os.posix_fadvise(self._descriptor, place, size, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            return StorageError(
                f"cannot read {load.piece.words} from {self.path}: {error.strerror}", hint="check the disk"
            )
        return None

    def _digest(self, load: _Load) -> None:
        """Bring a checksum up to what has arrived in order, one thread at a time; after the last part compare it.

        So most of it is done while the disk is at the parts that follow.
        """
        while True:
            with self.changed:
                size = 0 if load.is_digesting or load.error else load.arrived.pop(load.digested_bytes, 0)
                if not size:
                    if load.left == 0 and not load.is_digesting and not load.is_done:
                        load.error, load.is_done = load.error or self._compared(load), True
                        self.changed.notify_all()
                    return
                load.is_digesting = True
            first = load.slot * self._slot_bytes + load.digested_bytes
            load.digest.update(self._memory[first : first + size])
            with self.changed:
                load.digested_bytes += size
                load.is_digesting = False

    def _compared(self, load: _Load) -> MoietyError | None:
        try:
            compare_checksum(self.path, *load.piece, load.digest.intdigest())
        except FormatError as error:
            return error
        return None


def _opened(path: Path) -> tuple[int, bool]:
    """The file, and whether it is read around the system's cache."""
    direct = getattr(os, "O_DIRECT", 0)  # there is none outside of Linux
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        if direct:
            try:
                descriptor = os.open(path, flags | direct)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                try:
                    with mmap.mmap(-1, EXPERT_MULTIPLE) as probe:
                        os.preadv(descriptor, [probe], 0)
                    return descriptor, True
                except OSError:
                    os.close(descriptor)
        return os.open(path, flags), False
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error


def _pieces_of(file: ExpertFile) -> list[dict[int, _Piece]]:
    """Every expert by its number, for each layer that has some."""
    found: dict[int, dict[int, _Piece]] = {}
    for stack in file.stacks:
        mine = found.setdefault(stack.layer, {})
        mine |= {number: _Piece(stack, place) for place, number in enumerate(stack.numbers)}
    return [found[layer] for layer in sorted(found)]


def slot_bytes(file: ExpertFile) -> int:
    """Of a slot that can hold any expert of the file."""
    return max(stack.expert_bytes for stack in file.stacks)


def store_of(model: nn.Module) -> ExpertStore | None:
    """Where a model's experts come from; None where they are all in memory."""
    for module in model.modules():
        if isinstance(module, StreamedExperts):
            assert isinstance(module.source, ExpertStore), type(module.source)
            return module.source
    return None


@final
class ExpertStore:
    """Experts of all layers in a file, some of them in slots of memory.

    One call at a time goes through it, from any thread. It is closed at the latest when nobody knows it any more.

    Args:
        file: Where the experts are.
        residency: Who is in which slot; its layers are the file's layers with experts, in order.
        say: Told, in a sentence, what a person should know; such as that the disk is slow.

    Raises:
        StorageError: the system refused to open the file, or to give the memory.
    """

    def __init__(
        self,
        file: ExpertFile,
        residency: Residency,
        *,
        say: Callable[[str], None] = silent,
    ) -> None:
        self.residency, self._pieces = residency, _pieces_of(file)
        assert len(self._pieces) == residency.layers, (len(self._pieces), residency.layers)
        self.experts = sum(map(len, self._pieces))  # of all layers
        self.slot_bytes = slot_bytes(file)
        self.slab_bytes = residency.slots * self.slot_bytes
        try:
            memory = huge_slab(self.slab_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise StorageError(f"the system gives no {self.slab_bytes:,} bytes of memory: {error}") from error
        self.slots_SB: Tensor = torch.frombuffer(memory, dtype=torch.uint8).view(residency.slots, -1)
        self._say = say
        self._reader = _Reader(file.path, memoryview(memory), self.slot_bytes, say)
        self._close = weakref.finalize(self, self._reader.close)
        self._flying: dict[Key, _Load] = {}
        self._calling = threading.RLock()  # a guess comes in the middle of a call
        self._waited_s = 0.0
        self._offered = 0
        self.kv_bytes = 0  # what whoever made the budget set aside for keys and values
        self.skipped_pairs = self.changed_pairs = self.pairs = 0

    def lacks(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Those that are neither in memory nor on their way."""
        return [expert for expert in experts if (layer, expert) not in self.residency]

    def waves(self, layer: int, experts: Sequence[int]) -> Generator[Mapping[int, int]]:
        """The experts of one call in groups, as they are in memory: each with its slot, valid until the next is asked.

        The first group is what is there already; while it is worked with, the disk reads the others.

        Raises:
            FormatError: an expert is not what was written, or the file ends before it.
            StorageError: the disk failed.
        """
        with self._calling:
            self._land()
            hits, missing = self.residency.begin(layer, experts)
            pending: dict[int, _Load] = {}
            ready: dict[int, int] = {}
            for expert, slot in hits.items():
                load = self._flying.pop((layer, expert), None)
                if load is None:
                    ready[expert] = slot
                else:
                    self._reader.want(load)
                    pending[expert] = load
            self._forget()
            missing.reverse()
            try:
                while ready or pending or missing:
                    self._submit(layer, missing, pending)
                    if not ready:
                        ready = self._arrived(pending)
                    if not missing and len(experts) == len(self._pieces[layer]):
                        self._look_ahead(layer + 1, len(pending))
                    yield ready
                    self.residency.release([(layer, expert) for expert in ready])
                    ready = {}
            finally:  # also where the caller gave up, or Ctrl-C came while waiting
                for load in pending.values():
                    self._give_up(load)
                self.residency.release([(layer, expert) for expert in experts])

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """These may be wanted next: have them read into spare slots while the disk has nothing else to do.

        Where too few guesses came true, only now and then: they make the disk late for what is wanted (LOG.md).
        """
        with self._calling:
            self._land()
            self._offered += 1
            guesses, right = self.residency.guesses, self.residency.right
            if guesses >= ENOUGH_GUESSES and right < TRUSTED * guesses and self._offered % SELDOM:
                return
            for expert in experts:
                key = layer, expert
                slot = self.residency.guess(key)
                if slot is not None:
                    self._flying[key] = load = _Load(key, slot, self._pieces[layer][expert], True)
                    self._reader.submit(load)

    def statistics(self) -> StoreStatistics:
        """How things stand."""
        residency = self.residency
        return StoreStatistics(
            slots=residency.slots,
            slab_bytes=self.slab_bytes,
            hits=residency.hits,
            misses=residency.misses,
            read_bytes=self._reader.read_bytes,
            waited_s=self._waited_s,
            guesses=residency.guesses,
            right=residency.right,
            skipped_pairs=self.skipped_pairs,
            changed_pairs=self.changed_pairs,
            pairs=self.pairs,
        )

    def close(self) -> None:
        """End the threads and close the file; the store cannot be used any more."""
        self._close()

    def _submit(self, layer: int, missing: list[int], pending: dict[int, _Load]) -> None:
        """Send for what is missing, as far as there are slots."""
        most = self.residency.passing if self.residency.sweeps else len(missing)
        while missing and len(pending) < most:
            key = layer, missing[-1]
            taken = self.residency.take(key)
            if taken is None:
                return
            pending[missing.pop()] = load = _Load(key, taken.slot, self._pieces[layer][key[1]], False)
            self._reader.submit(load)

    def _look_ahead(self, layer: int, pending: int) -> None:
        """A sweep that wants all experts of a layer will want all of the next: send for some in good time."""
        for expert in self.lacks(layer, [*self._pieces[layer]]) if layer < len(self._pieces) else []:
            most = self.residency.passing - pending - len(self._flying)
            taken = self.residency.ahead((layer, expert)) if most > 0 else None
            if taken is None:
                return
            self._flying[taken.key] = load = _Load(taken.key, taken.slot, self._pieces[layer][expert], False)
            self._reader.submit(load)

    def _arrived(self, pending: dict[int, _Load]) -> dict[int, int]:
        """Wait for at least one of those on their way; all that are there by then."""
        assert pending, "every slot is in use"
        begun_s = said_s = time.perf_counter()
        changed = self._reader.changed
        with changed:
            while not (done := [expert for expert, load in pending.items() if load.is_done]):
                changed.wait(PATIENCE_S)
                now_s = time.perf_counter()
                if now_s - said_s >= PATIENCE_S:
                    said_s = now_s
                    left = sum(size for load in pending.values() for _, size in load.parts)
                    self._say(
                        f"waiting for the disk for {now_s - begun_s:.0f} s: {len(pending)} experts of layer "
                        f"{next(iter(pending.values())).piece.stack.layer} are to come, {left / 1e6:.0f} MB not begun"
                    )
        self._waited_s += time.perf_counter() - begun_s
        failed = [load for expert in done if (load := pending[expert]).error is not None]
        if failed:
            assert failed[0].error is not None
            raise failed[0].error
        return {expert: pending.pop(expert).slot for expert in done}

    def _give_up(self, load: _Load) -> None:
        """Stop a load and wait for what the disk is at, which would write into its slot; what is whole stays."""
        self._reader.cancel(load)
        with self._reader.changed:
            while not load.is_done:
                self._reader.changed.wait(PATIENCE_S)
        if load.error is not None:
            self.residency.drop(load.key)

    def _land(self) -> None:
        """Guesses that have arrived may go again when others come."""
        for key in [key for key, load in self._flying.items() if load.is_done]:
            load = self._flying.pop(key)
            if load.error is None:
                self.residency.release([key])
            else:  # whoever wants it will read it again, and be told
                self.residency.drop(key)

    def _forget(self) -> None:
        """What nobody began to read was for a call that is over or came without it."""
        for key in [key for key, load in self._flying.items() if not load.is_begun]:
            self._give_up(self._flying.pop(key))
