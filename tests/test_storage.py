"""Folders that are whole or not there: killed at every operation, out of space, altered in every way."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moiety import storage
from moiety.errors import FormatError, StorageError
from moiety.storage import FileRecord, existing, inside, new_folder, read_json, verify, write_atomically

ROOT = Path(__file__).resolve().parents[1]
OLD = {"a": b"old a", "below/b": b"old b" * 50}
NEW = {"a": b"new a", "below/b": b"new b" * 70, "c": b""}
OPERATIONS = ("mkdir", "open", "rename", "replace", "fsync")


def fill(path: Path, content: dict[str, bytes]) -> None:
    with new_folder(path) as folder:
        for name, data in content.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            with open(file, "wb") as opened:
                opened.write(data)


def content(path: Path) -> dict[str, bytes]:
    """What a verified folder holds."""
    return {name: (existing(path) / name).read_bytes() for name in verify(path)}


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; the exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def faults(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with a running number before each operation on files and each exchange of names."""
    count = 0
    places: list[tuple[Any, str]] = [(os, name) for name in OPERATIONS]
    places += [(builtins, "open"), (io, "open"), (storage, "_exchange"), (shutil, "rmtree")]

    def watched(call: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            act(count)
            return call(*arguments, **options)

        return run

    kept = [(place, name, getattr(place, name)) for place, name in places]
    try:
        for place, name, call in kept:
            setattr(place, name, watched(call))
        yield
    finally:
        for place, name, call in kept:
            setattr(place, name, call)


def test_a_folder_and_its_manifest(tmp_path: Path) -> None:
    fill(tmp_path / "x", NEW)
    records = verify(tmp_path / "x")
    assert records["below/b"].size_bytes == 350 and len(records["a"].sha256) == 64
    assert content(tmp_path / "x") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.has_manifest(tmp_path / "x") and not storage.has_manifest(tmp_path)


@pytest.mark.parametrize("exchanges", [True, False])
def test_replacing(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:
        monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
    (tmp_path / "x").mkdir()
    fill(tmp_path / "x", OLD)
    fill(tmp_path / "x", NEW)
    assert content(tmp_path / "x") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    storage.remove_folder(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_failed_block_leaves_no_trace(tmp_path: Path) -> None:
    fill(tmp_path / "x", OLD)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "x") as folder:
        (folder / "a").write_bytes(b"half")
        raise KeyboardInterrupt
    assert content(tmp_path / "x") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("replaces", [True, False])
def test_killed_before_every_operation(tmp_path: Path, exchanges: bool, replaces: bool) -> None:
    path = tmp_path / "x"
    seen = set()
    for number in range(1, 200):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if replaces:
            fill(path, OLD)

        def die(count: int, at: int = number) -> None:
            if count == at:
                os._exit(9)

        def work(die: Callable[[int], None] = die) -> None:
            if not exchanges:
                storage._exchange = lambda first, second: False
            with faults(die):
                fill(path, NEW)

        status = in_child(work)
        if os.path.lexists(existing(path)):
            found = content(path)
            assert found in ([OLD, NEW] if replaces else [NEW]), number
            seen.add("new" if found == NEW else "old")
        else:
            assert not replaces, number
            seen.add("none")
        fill(path, {"a": b"next"})
        assert content(path) == {"a": b"next"}
        assert [one.name for one in tmp_path.iterdir()] == ["x"], number
        if status == 0:
            break
        assert status == 9
    assert number > 15 and status == 0
    assert seen == {"old" if replaces else "none", "new"}


@pytest.mark.parametrize("number_of_error", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("stays", [True, False])
def test_refused_at_every_operation(tmp_path: Path, number_of_error: int, stays: bool) -> None:
    path = tmp_path / "x"
    refused = 0
    for number in range(1, 200):
        fill(path, OLD)
        hits = 0

        def refuse(count: int, at: int = number) -> None:
            nonlocal hits
            if count == at or (stays and count > at):
                hits += 1
                raise OSError(number_of_error, os.strerror(number_of_error))

        with faults(refuse):
            try:
                fill(path, NEW)
            except StorageError as error:
                assert str(path) in error.message and error.hint
                refused += 1
        assert content(path) in (OLD, NEW)
        if not hits:
            break
        fill(path, {"a": b"next"})
        assert [one.name for one in tmp_path.iterdir()] == ["x"]
    assert refused > 10
    assert not hits and content(path) == NEW


def test_only_temporaries_of_the_dead_are_swept(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go[1])  # so that the end of the test ends the child too
        with new_folder(tmp_path / "slow") as folder:
            (folder / "a").write_bytes(b"slow")
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)

    def die_inside() -> None:
        with new_folder(tmp_path / "dead"):
            os._exit(9)

    assert in_child(die_inside) == 9
    assert len(list(tmp_path.iterdir())) == 2
    fill(tmp_path / "other", NEW)
    write_atomically(tmp_path / "file", b"x")
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(left) == 1 and ".slow." in left[0]
    os.write(go[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    for end in (*ready, *go):
        os.close(end)
    assert content(tmp_path / "slow") == {"a": b"slow"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "slow"]


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    fill(tmp_path / "ours", OLD)
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "mixed").mkdir()
    fill(tmp_path / "mixed", OLD)
    (tmp_path / "mixed" / "notes.txt").write_text("mine")
    for name, said in (
        ("theirs", "no manifest"),
        ("file", "is a file"),
        ("link", "symbolic link"),
        ("mixed", "notes.txt"),
    ):
        with pytest.raises(StorageError, match=said):
            fill(tmp_path / name, NEW)
        with pytest.raises(StorageError, match=said):
            storage.remove_folder(tmp_path / name)
    (tmp_path / "theirs" / "manifest.json").write_text('{"format": "of another program"}')
    with pytest.raises(StorageError, match="not a manifest of ours"):
        fill(tmp_path / "theirs", NEW)
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "years of work"
    assert content(tmp_path / "ours") == OLD
    with pytest.raises(StorageError, match="cannot write"):
        fill(tmp_path / "file" / "below", NEW)


def test_room_is_asked_for_first(tmp_path: Path) -> None:
    fill(tmp_path / "x", OLD)
    needed = new_folder(tmp_path / "x", needed_bytes=10**18)
    with pytest.raises(StorageError, match=r"1,000,\S+ bytes are needed and [\d,]+ are free"), needed:
        raise AssertionError("must not be reached")
    assert content(tmp_path / "x") == OLD


FULL_DISK = """
import os, sys
from pathlib import Path
from moiety import storage
from moiety.errors import StorageError

place = Path(sys.argv[1])
with storage.new_folder(place / "x") as folder:
    (folder / "a").write_bytes(b"o" * 60_000)
tried = 0
for size_bytes in (100_000, 150_000, 200_000, 400_000):
    for known in (True, False):
        try:
            with storage.new_folder(place / "x", needed_bytes=size_bytes * 2 if known else None) as folder:
                for name in ("a", "b"):
                    (folder / name).write_bytes(b"n" * size_bytes)
        except StorageError as error:
            assert str(place / "x") in error.message and "are free" in error.message, error
            tried += 1
        assert (place / "x" / "a").read_bytes() == b"o" * 60_000
        assert list(storage.verify(place / "x")) == ["a"]
        assert os.listdir(place) == ["x"], os.listdir(place)
try:
    storage.write_atomically(place / "file", b"n" * 400_000)
except StorageError as error:
    tried += 1
assert os.listdir(place) == ["x"], os.listdir(place)
with storage.new_folder(place / "x") as folder:
    (folder / "a").write_bytes(b"n" * 60_000)
print("REFUSED", tried)
"""


def small_disk(place: Path) -> list[str] | None:
    """A command that runs the rest with a file system of 256 kB at `place`, where the system lets us."""
    for flags in ("-m", "-rm"):
        script = f'mount -t tmpfs -o size=256k none "{place}" && exec "$@"'
        command = ["unshare", flags, "sh", "-c", script, "sh"]
        if (
            shutil.which("unshare")
            and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
        ):
            return command
    return None


def test_disk_full(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    command = small_disk(place)
    if command is None:
        full_disk_played(place)
        return
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL_DISK, str(place)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["REFUSED", "9"]


def test_disk_full_played(tmp_path: Path) -> None:
    full_disk_played(tmp_path)


def full_disk_played(place: Path) -> None:
    """The same with files that refuse after so many bytes."""
    fill(place / "x", OLD)

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = builtins.open
    for name in ("a", "below/b", "manifest.json"):

        def opened(file: Any, mode: str = "r", *rest: Any, name: str = name, **options: Any) -> Any:
            if str(file).endswith(name) and mode in ("wb", "xb"):
                return Full(file, mode)
            return kept(file, mode, *rest, **options)

        builtins.open = opened  # type: ignore[assignment]
        try:
            with pytest.raises(StorageError, match=r"No space left.*are free"):
                fill(place / "x", NEW)
        finally:
            builtins.open = kept
        assert content(place / "x") == OLD
        assert [path.name for path in place.iterdir()] == ["x"]


def test_every_alteration_is_found(tmp_path: Path) -> None:
    fill(tmp_path / "x", {"a": random.randbytes(700), "below/b": random.randbytes(900), "c": b""})
    files = [path for path in (tmp_path / "x").rglob("*") if path.is_file()]
    whole = {path: path.read_bytes() for path in files}
    places = [(path, byte) for path, data in whole.items() for byte in range(len(data))]
    found = 0
    for path, byte in random.sample(places, 300):
        data = bytearray(whole[path])
        data[byte] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        with pytest.raises(FormatError, match=path.name):
            verify(tmp_path / "x")
        path.write_bytes(whole[path])
        found += 1
    assert found == 300
    for path, data in whole.items():
        for size in {0, 1, len(data) // 2, len(data) - 1} & set(range(len(data))):
            path.write_bytes(data[:size])
            with pytest.raises(FormatError, match=path.name):
                verify(tmp_path / "x")
        path.write_bytes(data + b"\0")
        with pytest.raises(FormatError, match=path.name):
            verify(tmp_path / "x")
        path.unlink()
        with pytest.raises(FormatError, match=path.name):
            verify(tmp_path / "x")
        path.write_bytes(data)
    for name in ("more", "below/more"):
        (tmp_path / "x" / name).write_bytes(b"")
        with pytest.raises(FormatError, match=name):
            verify(tmp_path / "x")
        (tmp_path / "x" / name).unlink()
    assert set(verify(tmp_path / "x")) == {"a", "below/b", "c"}


def test_links_and_pipes_are_not_read(tmp_path: Path) -> None:
    fill(tmp_path / "x", OLD)
    (tmp_path / "elsewhere").write_bytes(OLD["a"])
    (tmp_path / "x" / "a").unlink()
    (tmp_path / "x" / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="symbolic link"):
        verify(tmp_path / "x")
    (tmp_path / "x" / "a").unlink()
    os.mkfifo(tmp_path / "x" / "a")
    with pytest.raises(FormatError, match="pipe"):
        verify(tmp_path / "x")
    (tmp_path / "x" / "a").unlink()
    (tmp_path / "x" / "a").write_bytes(OLD["a"])
    (tmp_path / "x" / "more").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="more"):
        verify(tmp_path / "x")


@pytest.mark.parametrize(
    "name",
    ["../out", "/etc/passwd", "below/../../out", "./a", "a//b", "", ".", "..", "a\0b", "..\\out", "below/"],
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").write_bytes(b"x")
    fill(tmp_path / "x", OLD)
    with pytest.raises(FormatError, match="inside"):
        inside(tmp_path / "x", name)
    record = FileRecord(1, "0" * 64)
    (tmp_path / "x" / "manifest.json").write_bytes(storage._manifest_bytes({name: record}))
    with pytest.raises(FormatError, match="inside"):
        verify(tmp_path / "x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_json_is_read_strictly(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FormatError, match="x"):
        read_json(tmp_path / "x")
    (tmp_path / "x").write_text('{"a": [1, {"b": null}]}')
    assert read_json(tmp_path / "x") == {"a": [1, {"b": None}]}
    with pytest.raises(FormatError, match="missing"):
        read_json(tmp_path / "y")


def test_manifests_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a folder"):
        verify(tmp_path / "x")
    (tmp_path / "x").mkdir()
    with pytest.raises(FormatError, match="no manifest"):
        verify(tmp_path / "x")
    fill(tmp_path / "x", OLD)
    file = tmp_path / "x" / "manifest.json"
    whole = json.loads(file.read_text())
    for change, said in (
        ({"version": 2}, "version 2"),
        ({"format": "x"}, "not a manifest of ours"),
        ({"files": {"a": 3}}, "describes 'a'"),
        ({"files": []}, "seal"),
        ({"more": 1}, "seal"),
        ({"seal": "0" * 64}, "seal"),
    ):
        file.write_text(json.dumps({**whole, **change}, indent=1) + "\n")
        with pytest.raises(FormatError, match=said):
            verify(tmp_path / "x")


def test_a_refused_file_keeps_the_old_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "file" / "below", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "folder", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_killed_at_every_operation(tmp_path: Path) -> None:
    path = tmp_path / "file"
    status, number = 9, 0
    write_atomically(path, b"old")
    while status:
        number += 1

        def die(count: int, at: int = number) -> None:
            if count == at:
                os._exit(9)

        def work(die: Callable[[int], None] = die) -> None:
            with faults(die):
                write_atomically(path, b"new")

        status = in_child(work)
        assert path.read_bytes() in (b"old", b"new")
        write_atomically(path, b"old")
        assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert number > 4


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    """Whoever comes last wins, and each state between is whole."""
    path = tmp_path / "x"
    fill(path, OLD)
    children = []
    for letter in (b"l", b"r"):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(20):
                    fill(path, {"a": letter * 1000, "below/b": letter * 10})
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    deadline = time.monotonic() + 60
    running = set(children)
    looks = 0
    while running and time.monotonic() < deadline:
        data = (path / "a").read_bytes() if (path / "a").exists() else b""
        assert len(set(data)) <= 1 or data == OLD["a"]
        looks += 1
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.remove(child)
                assert status == 0
    assert not running and looks > 20
    assert len({bytes(set(data)) for data in content(path).values()}) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["x"]
