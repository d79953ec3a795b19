"""A store of experts on disk: what a slot holds is what was asked for, or an error says which expert it is not."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from moiety.errors import FormatError, MoietyError, StorageError
from moiety.formats import FORMATS
from moiety.formats.tiles import EXPERT_MULTIPLE, Projection
from moiety.infer import offload
from moiety.infer.offload import ExpertStore
from moiety.model.expert_file import ExpertFile, ExpertStack
from moiety.residency import POLICIES, Residency

LAYERS, EXPERTS = 3, 6
SIZES = (
    3 * EXPERT_MULTIPLE,
    5 * EXPERT_MULTIPLE,
    offload.PART_BYTES + 7 * EXPERT_MULTIPLE,
)  # of a layer's experts


@functools.cache
def content(layer: int, expert: int) -> bytes:
    return random.Random(layer * EXPERTS + expert).randbytes(SIZES[layer])


NUMBERS = ((0, 2, 3, 4), (1, 5))  # a layer's experts are in two stacks


@pytest.fixture
def packed(tmp_path: Path) -> ExpertFile:
    """A file with a header and experts behind it; the blocks with experts are 1, 3 and 5."""
    path, stacks = tmp_path / "experts.bin", list[ExpertStack]()
    unused = Projection(FORMATS["int8-g32"], 16, 32, interleaved=False)
    with path.open("wb") as file:
        file.write(b"head".ljust(EXPERT_MULTIPLE))
        for layer, (part, numbers) in itertools.product(range(LAYERS), enumerate(NUMBERS)):
            whole = [content(layer, number) for number in numbers]
            stacks.append(
                ExpertStack(
                    path=f"blocks.{2 * layer + 1}.feed_forward.experts.parts.{part}",
                    layer=2 * layer + 1,
                    part=part,
                    numbers=numbers,
                    expert_bytes=SIZES[layer],
                    offset_bytes=file.tell(),
                    projections=(unused, unused),
                    checksums=tuple(map(xxhash.xxh3_64_intdigest, whole)),
                )
            )
            file.write(b"".join(whole))
    return ExpertFile(path, tuple(stacks))


def place(packed: ExpertFile, layer: int, expert: int) -> int:
    """The first byte of an expert."""
    stack = next(one for one in packed.stacks if one.layer == 2 * layer + 1 and expert in one.numbers)
    return stack.offset_of(stack.numbers.index(expert))


Make = Callable[..., ExpertStore]


@pytest.fixture
def make(packed: ExpertFile) -> Iterator[Make]:
    """Stores that are closed in the end."""
    made = []

    def store(slots: int = 8, policy: str = "lfru", *, spare: int = 0, **more: object) -> ExpertStore:
        residency = Residency(slots, policy, layers=LAYERS, spare=spare)
        made.append(ExpertStore(packed, residency, **more))  # type: ignore[arg-type]
        return made[-1]

    yield store
    for one in made:
        one.close()


def call(store: ExpertStore, layer: int, experts: list[int]) -> list[list[int]]:
    """A whole call; every slot is looked into."""
    groups = []
    for group in store.waves(layer, experts):
        for expert, slot in group.items():
            wanted = content(layer, expert)
            assert store.slots_SB[slot, : len(wanted)].numpy().tobytes() == wanted, (layer, expert)
        groups.append(list(group))
    assert sorted(expert for group in groups for expert in group) == sorted(experts)
    store.residency.check()
    return groups


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [3, 5, 9, LAYERS * EXPERTS])
def test_slots_hold_what_was_asked_for(make: Make, policy: str, slots: int) -> None:
    store, source, wanted = make(slots, policy), random.Random(1), 0
    for step in range(30):
        for layer in range(LAYERS):
            count = EXPERTS if step % 10 == 9 else source.randint(1, 3)
            call(store, layer, sorted(source.sample(range(EXPERTS), count)))
            wanted += count
            store.guess((layer + 1) % LAYERS, source.sample(range(EXPERTS), 2))
    found = store.statistics()
    assert found.hits + found.misses == wanted
    assert found.guesses == 0, "no slot is spare"
    if slots == LAYERS * EXPERTS and policy != "fixed":
        assert found.misses == LAYERS * EXPERTS and found.read_bytes == EXPERTS * sum(SIZES)


def test_what_is_there_comes_first_and_everything_once(make: Make) -> None:
    store = make(18)
    call(store, 2, [1, 4])
    read_bytes = store.statistics().read_bytes
    assert call(store, 2, [0, 1, 2, 4])[0] == [1, 4]
    assert store.statistics().read_bytes == read_bytes + 2 * SIZES[2]
    assert store.statistics().hit_rate == 2 / 6


def test_guesses_are_read_into_spare_slots_and_used(make: Make) -> None:
    store = make(8, spare=2)
    call(store, 0, [0, 1, 2])
    store.guess(1, [3, 4, 5])  # two have room
    deadline = time.perf_counter() + 10
    while store.statistics().read_bytes < 3 * SIZES[0] + 2 * SIZES[1]:
        assert time.perf_counter() < deadline
        time.sleep(0.001)
    call(store, 1, [2, 3])
    found = store.statistics()
    assert (found.guesses, found.right, found.hits, found.misses) == (2, 1, 1, 4)
    assert found.read_bytes == 3 * SIZES[0] + 3 * SIZES[1]
    assert "1 of 2 guesses right" in found.words


def test_guesses_that_are_late_are_waited_for_or_forgotten(make: Make) -> None:
    store = make(10, spare=4)
    for step in range(40):
        layer = step % LAYERS
        store.guess(layer, [step % 6, (step + 1) % 6, (step + 2) % 6])
        call(store, layer, [step % 6, (step + 3) % 6])  # at once: some are on their way
    found = store.statistics()
    assert found.right > 0 and found.hits + found.misses == 80
    assert store.lacks(0, [0, 1]) == [expert for expert in (0, 1) if (0, expert) not in store.residency]


def test_a_prompt_has_the_next_layer_read_before_its_turn(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "THREADS", 1)
    store, everything = make(10), list(range(EXPERTS))
    for layer in range(LAYERS):
        call(store, layer, [0, 1])
    monkeypatch.setattr(os, "preadv", slow(0.01))
    found = store.statistics()
    misses = 0
    for layer in range(LAYERS):
        before = store.residency.resident(layer)
        assert len(before) > 2 or layer == 0, "more than decoding left is here or on its way"
        call(store, layer, everything)
        misses += EXPERTS - 2
    after = store.statistics()
    assert after.misses - found.misses == misses, "what was sent for early counts as missed"
    assert after.read_bytes - found.read_bytes == (EXPERTS - 2) * sum(SIZES), "and is read once"


def test_what_was_read_for_a_layer_that_did_not_come_is_in_nobodys_way(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "THREADS", 1)
    store, sent_for = make(9, "layered"), 0
    for layer in range(LAYERS):
        call(store, layer, [0, 1, 2])
    monkeypatch.setattr(os, "preadv", slow(0.01))
    for layer in (0, 2, 0, 1, 0, 0):
        call(store, layer, list(range(EXPERTS)))
        sent_for += len(store.residency.resident(1)) > 3 and layer == 0
        call(store, 2 - layer, [3])
    assert sent_for, "without it nothing is shown"


def test_a_flipped_bit_names_the_expert_and_the_store_lives_on(make: Make, packed: ExpertFile) -> None:
    path = packed.path
    store = make()
    call(store, 1, [0])
    with path.open("r+b") as file:
        file.seek(place(packed, 1, 3) + 777)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    for _ in range(2):
        with pytest.raises(FormatError, match=r"expert 3 of layer 3 is damaged"):
            call(store, 1, [0, 2, 3])
        store.residency.check()
        assert (1, 3) not in store.residency
    call(store, 1, [0, 2])
    with path.open("r+b") as file:
        file.seek(place(packed, 1, 3) + 777)
        file.write(byte)
    call(store, 1, [3])


def test_a_guess_that_failed_is_an_error_only_for_who_wants_it(make: Make, packed: ExpertFile) -> None:
    path = packed.path
    store = make(8, spare=2)
    with path.open("r+b") as file:
        file.seek(place(packed, 2, 5))
        file.write(b"wrong")
    store.guess(2, [5])
    call(store, 2, [1])
    with pytest.raises(FormatError, match="expert 5 of layer 5"):
        call(store, 2, [5])


def test_a_file_that_is_cut_while_in_use(make: Make, packed: ExpertFile) -> None:
    path = packed.path
    store = make()
    call(store, 0, [0])
    os.truncate(path, place(packed, 2, 2) + EXPERT_MULTIPLE + 100)
    call(store, 1, [0, 1, 2])
    for expert in (2, 4):
        with pytest.raises(FormatError, match=rf"ends at byte .* but expert {expert} of layer 5 lies"):
            call(store, 2, [expert])
    call(store, 2, [0])


def test_a_file_that_is_replaced_or_removed_does_not_matter(make: Make, packed: ExpertFile) -> None:
    path = packed.path
    store = make()
    call(store, 0, [0])
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)
    call(store, 1, [1, 2, 3])
    path.unlink()
    call(store, 2, [1, 2, 3])


def test_the_disk_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make()
    call(store, 0, [0, 1])

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        with pytest.raises(StorageError, match=r"cannot read expert 2 of layer 1 .*Input/output error"):
            call(store, 0, [0, 1, 2])
        call(store, 0, [0, 1])
    call(store, 0, [0, 1, 2])


def slow(seconds: float) -> Callable[..., int]:
    read = os.preadv

    def preadv(*arguments: object) -> int:
        time.sleep(seconds)
        return read(*arguments)  # type: ignore[arg-type]

    return preadv


def test_a_slow_disk_is_not_silent(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    store = make(say=said.append)
    monkeypatch.setattr(offload, "PATIENCE_S", 0.02)
    monkeypatch.setattr(os, "preadv", slow(0.1))
    call(store, 2, [0, 1])
    assert said and "waiting for the disk" in said[0] and "experts of layer 5" in said[0]
    assert store.statistics().waited_s >= 0.1


def test_giving_up_in_the_middle_leaves_nothing_behind(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(4)
    call(store, 0, [0])
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", slow(0.02))
        for interruption in (KeyboardInterrupt, MemoryError):
            with (
                contextlib.suppress(interruption),
                contextlib.closing(store.waves(0, [0, 1, 2, 3, 4])) as waves,
            ):
                assert [*next(waves)] == [0]
                raise interruption
            store.residency.check()
    for layer in range(LAYERS):
        call(store, layer, [0, 1, 2, 3, 4])


def test_without_direct_reads(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", 0)
    said: list[str] = []
    store = make(say=said.append)
    for layer in range(LAYERS):
        call(store, layer, [0, 3, 5])
    assert "around the system's cache" in said[0]


def test_a_file_system_that_refuses_direct_reads(
    make: Make, monkeypatch: pytest.MonkeyPatch, packed: ExpertFile
) -> None:
    opened, refused = os.open, []

    def refuses(path: object, flags: int, *more: int) -> int:
        if path == packed.path and flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuses)
    store = make()
    call(store, 2, [0, 5])
    assert refused


def test_a_file_that_may_not_be_read(packed: ExpertFile) -> None:
    with pytest.raises(StorageError, match="No such file"):
        ExpertStore(packed._replace(path=packed.path.with_name("none")), Residency(4, layers=LAYERS))


def test_too_much_memory_is_refused(packed: ExpertFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: int, flags: int = 0) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("mmap.mmap", refuses)
    with pytest.raises(StorageError, match=r"gives no .* bytes of memory"):
        ExpertStore(packed, Residency(4, layers=LAYERS))


def test_two_stores_on_one_file_and_many_threads_on_one_store(make: Make) -> None:
    first, second = make(5), make(7, "layered")

    def work(store: ExpertStore, seed: int) -> int:
        source = random.Random(seed)
        for _ in range(30):
            call(store, source.randrange(LAYERS), sorted(source.sample(range(EXPERTS), 3)))
        return seed

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, [first, second] * 2, range(4))) == [0, 1, 2, 3]
    for store in (first, second):
        assert store.statistics().hits + store.statistics().misses == 2 * 30 * 3


def test_closing_ends_the_threads(make: Make) -> None:
    before = threading.active_count()
    store = make()
    call(store, 0, [0])
    assert threading.active_count() > before
    store.close()
    store.close()
    assert threading.active_count() == before
    with pytest.raises(MoietyError, match="was closed"):
        call(store, 0, [1])


def test_a_store_that_nobody_knows_is_closed(packed: ExpertFile) -> None:
    before = threading.active_count()
    store = ExpertStore(packed, Residency(4, layers=LAYERS))
    call(store, 0, [0])
    del store
    gc.collect()
    assert threading.active_count() == before
