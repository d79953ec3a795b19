"""Files and folders that are whole or not there, and the proof of it.

A folder is written under a temporary name beside its own, gets a manifest (size and sha256 of every file),
is synced to the disk, and takes its name in one step. A process that dies on the way leaves the old folder
as it was and a temporary, which the next write beside it removes. Temporaries are locked by the process
that writes them; the lock ends with the process, whatever ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

from moiety.errors import FormatError, StorageError

__all__ = [
    "MANIFEST",
    "FileRecord",
    "existing",
    "folder_names",
    "foreign_files",
    "has_manifest",
    "inside",
    "new_file",
    "new_folder",
    "parse_json",
    "read_json",
    "remove_folder",
    "set_aside",
    "sweep",
    "verify",
    "write_atomically",
]

MANIFEST = "manifest.json"
FORMAT = "moiety-folder"
VERSION = 1
JSON_BYTES_MAX = 32 << 20  # the index of a model with a hundred thousand expert matrices is half of this
JSON_MARKS_MAX = 1_000_000  # commas and brackets: what Python makes of one may be a hundred times as large
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.moiety-(?P<kind>new|old)")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS, errno.EINVAL)
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class FileRecord(NamedTuple):
    """What a manifest says of one file."""

    size_bytes: int
    sha256: str


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that a crash leaves the previous one or the new one, never a part.

    Raises:
        StorageError: the system refused; the previous file is still there.
    """
    with new_file(path, needed_bytes=len(data)) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: str | Path, *, needed_bytes: int | None = None) -> Iterator[BinaryIO]:
    """`write_atomically` for a file that is filled piece by piece; `needed_bytes` is for a full disk's message."""
    target = Path(path)
    with _refusals(target, needed_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        temporary, descriptor = _claim(target, folder=False)
        with os.fdopen(descriptor, "wb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)  # before the lock ends with `file`
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync(target.parent)


@contextlib.contextmanager
def new_folder(path: str | Path, *, needed_bytes: int | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well and leaves no trace when it does not.

    A folder that this function made before is replaced in one step. Any other folder with something in it
    is refused, as is one of ours that holds files of somebody else.

    Args:
        path: What it will be called; missing parents are made.
        needed_bytes: Size of what will be written, where known: checked against the free space first.

    Raises:
        StorageError: the system refused, or `path` may not be replaced; what was at `path` is still there.
    """
    target = Path(os.path.abspath(path))
    with _refusals(target, needed_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        _check_replaceable(target)
        free = shutil.disk_usage(target.parent).free
        if needed_bytes is not None and needed_bytes > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary, descriptor = _claim(target, folder=True)
        try:
            yield temporary
            _seal(temporary)
            _take_name(temporary, target)
            _discard(temporary)  # the folder that was replaced
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # what stays is swept by the next write
            raise
        finally:
            os.close(descriptor)


def verify(path: str | Path, *, sizes_only: Collection[str] = ()) -> dict[str, FileRecord]:
    """Check every file of a folder against its manifest; those in `sizes_only` are not read.

    Returns:
        The manifest: relative name to size and sha256.

    Raises:
        FormatError: no manifest, or a file is missing, extra, cut, or altered; it is named.
        StorageError: the system refused to read.
    """
    folder = existing(path)
    records = _read_manifest(folder)
    for name, expected in records.items():
        file = inside(folder, name)
        size_bytes = file.stat().st_size
        if size_bytes != expected.size_bytes:
            raise FormatError(
                f"{file} has {size_bytes} bytes, but {MANIFEST} says {expected.size_bytes}",
                hint="the file was cut or replaced: use another checkpoint",
            )
        found = expected if name in sizes_only else _measure(file, sync=False)
        if found != expected:
            raise FormatError(
                f"{file} has sha256 {found.sha256}, but {MANIFEST} says {expected.sha256}",
                hint="the file was changed after it was written: use another checkpoint",
            )
    if extra := foreign_files(folder):
        raise FormatError(
            f"{folder} holds {', '.join(extra[:5])}, which {MANIFEST} does not list",
            hint="move it out of the folder",
        )
    return records


def foreign_files(path: str | Path) -> list[str]:
    """Relative names of what stands in a folder without being in its manifest.

    Raises:
        FormatError: no manifest, or a damaged one.
    """
    folder = existing(path)
    return sorted(_names(folder) - _read_manifest(folder).keys() - {MANIFEST})


def has_manifest(path: str | Path) -> bool:
    """True if the folder carries a manifest, whole or not."""
    return os.path.lexists(existing(path) / MANIFEST)


def existing(path: str | Path) -> Path:
    """`path` itself, or the folder that an interrupted replacement moved aside from it.

    Only where the system cannot exchange two names in one step is anything ever moved aside.
    """
    target = Path(path)
    if os.path.lexists(target) or not target.parent.is_dir():
        return target
    asides = [
        entry
        for entry in sorted(target.parent.iterdir())
        if (match := TEMPORARY.fullmatch(entry.name))
        and match["name"] == target.name
        and match["kind"] == "old"
    ]
    return asides[-1] if asides else target


def folder_names(parent: str | Path) -> list[str]:
    """Names of the folders in `parent`, temporaries left out; `existing` says where each one is."""
    try:
        entries = list(os.scandir(parent))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {parent}: {error.strerror}", hint="check its permissions") from error
    names = set()
    for entry in entries:
        match = TEMPORARY.fullmatch(entry.name)
        if entry.is_dir() and (not match or match["kind"] == "old"):
            names.add(match["name"] if match else entry.name)
    return sorted(names)


def remove_folder(path: str | Path) -> None:
    """Remove a folder that `new_folder` made: it is gone in one step, and its space a little later.

    Raises:
        StorageError: the system refused, or the folder holds what is not ours.
    """
    target = Path(os.path.abspath(path))
    with _refusals(target, None, verb="remove"):
        _check_replaceable(target)
        trash = _temporary(target, "new")
        os.rename(target, trash)
        _sync(target.parent)
        shutil.rmtree(trash, ignore_errors=True)


def set_aside(path: str | Path) -> Path:
    """Give a damaged folder another name beside its own, so that a new one can be written; nothing is lost.

    Raises:
        StorageError: the system refused.
    """
    target = Path(os.path.abspath(path))
    aside = target.with_name(f"{target.name}.damaged-{secrets.token_hex(4)}")
    with _refusals(target, None, verb="rename"):
        os.rename(target, aside)
        _sync(target.parent)
    return aside


def inside(folder: Path, name: str) -> Path:
    """The regular file `name` of `folder`, whoever wrote the name; in a cache of the hub, also its link to a blob.

    Raises:
        FormatError: the name leads out of the folder or through another link, or there is no such file.
    """
    pure = PurePosixPath(name)
    safe = name and "\0" not in name and "\\" not in name and str(pure) == name and not pure.is_absolute()
    if not safe or ".." in pure.parts or name == ".":
        raise FormatError(f"{folder} names the file {name!r}, which is not inside it", hint="do not trust it")
    place = folder
    for number, part in enumerate(pure.parts, start=1):
        place = place / part
        try:
            mode = place.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FormatError(f"{folder / name} is missing", hint="write or download it again") from error
        except OSError as error:
            raise StorageError(f"cannot read {place}: {error.strerror}", hint="check permissions") from error
        wanted = stat.S_ISREG if number == len(pure.parts) else stat.S_ISDIR
        if not wanted(mode) and not _is_hub_link(place):
            raise FormatError(
                f"{place} is a {_kind(mode)}; only regular files are read", hint="put the file itself there"
            )
    return place


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object, stricter than Python does: no key twice and, if `finite`, no NaN or Infinity.

    Raises:
        FormatError: missing, cut, too large, or not such an object.
        StorageError: the system refused to read.
    """
    return parse_json(path, _read_text(path), finite=finite)


def parse_json(path: Path, text: str, *, finite: bool = True) -> dict[str, Any]:
    """As `read_json`, of text that was read from `path`."""
    if sum(map(text.count, ",[{")) > JSON_MARKS_MAX:
        raise FormatError(f"{path} holds over {JSON_MARKS_MAX:,} values", hint="spread them over more files")
    constant = _no_constant if finite else None
    try:
        loaded = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not whole JSON: {error}", hint="it was cut or changed") from error
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, not an object with named values")
    return loaded


def sweep(parent: Path) -> None:
    """Remove the temporaries of dead processes in `parent`, and undo a replacement cut off half way.

    Raises:
        OSError: the system refused.
    """
    for entry in list(os.scandir(parent)):
        match = TEMPORARY.fullmatch(entry.name)
        if match is None or entry.is_symlink():
            continue
        place, target = Path(entry.path), parent / match["name"]
        try:
            descriptor = os.open(place, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its process, or another sweep, was faster
        try:
            if not _is_abandoned(descriptor, int(match["pid"])):
                continue
            if match["kind"] == "old" and not os.path.lexists(target):
                os.rename(place, target)
            else:
                _discard(place)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _refusals(target: Path, needed_bytes: int | None, *, verb: str = "write") -> Iterator[None]:
    """Turn the system's refusals into StorageErrors about `target`, after everything was cleaned up."""
    try:
        yield
    except StorageError as error:
        if not isinstance(error.__cause__, OSError) or str(target) in error.message.split(": ")[0].split():
            raise
        raise _refusal(target, error.__cause__, needed_bytes, verb) from error.__cause__
    except OSError as error:
        raise _refusal(target, error, needed_bytes, verb) from error


def _refusal(target: Path, error: OSError, needed_bytes: int | None, verb: str) -> StorageError:
    message = f"cannot {verb} {target}: {error.strerror or error}"
    hint = "check that the folder above it exists and may be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        parent = next(one for one in target.parents if one.exists())
        free = shutil.disk_usage(parent).free
        needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes are needed and "
        message += f"; {needed}{free:,} are free"
        hint = "free some space or write elsewhere; what was there before is untouched"
    elif error.errno in (errno.EXDEV, errno.EBUSY):
        hint = "a mount point cannot be replaced: give a folder inside it"
    return StorageError(message, hint=hint)


def _temporary(target: Path, kind: Literal["new", "old"]) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.moiety-{kind}")


def _claim(target: Path, *, folder: bool) -> tuple[Path, int]:
    """Make a temporary for `target` and lock it; its descriptor holds the lock."""
    while True:
        temporary = _temporary(target, "new")
        try:
            if folder:
                temporary.mkdir()
                descriptor = os.open(temporary, os.O_RDONLY)
            else:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if target.parent.is_dir():
                continue  # swept between the two calls
            raise
        _lock(descriptor, wait=True)
        # A sweep may have found it before it was locked; then it is gone by the time the lock is ours.
        if os.path.lexists(temporary):
            return temporary, descriptor
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a file or folder; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_abandoned(descriptor: int, pid: int) -> bool:
    """True if the process that made a temporary is dead."""
    try:
        if _lock(descriptor, wait=False):
            return True
    except BlockingIOError:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _discard(place: Path) -> None:
    """Remove a temporary; what cannot be removed now is tried again by the next write."""
    match = TEMPORARY.fullmatch(place.name)
    assert match, place
    if match["kind"] == "old":  # half of it must never look like a folder moved aside
        trash = _temporary(place.with_name(match["name"]), "new")
        os.rename(place, trash)
        place = trash
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(file: Path, *, sync: bool) -> FileRecord:
    try:
        with file.open("rb") as opened:
            if sync:
                os.fsync(opened.fileno())
            size_bytes = os.fstat(opened.fileno()).st_size
            return FileRecord(size_bytes, hashlib.file_digest(opened, "sha256").hexdigest())
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}", hint="check the disk") from error


def _names(folder: Path) -> set[str]:
    """Relative names of everything in a folder that is not itself a folder."""
    return {
        (Path(root) / name).relative_to(folder).as_posix()
        for root, folders, names in os.walk(folder)
        for name in [*names, *(one for one in folders if (Path(root) / one).is_symlink())]
    }


def _manifest_bytes(records: dict[str, FileRecord]) -> bytes:
    """The one way to write these records; the seal is over all the rest."""
    said: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "files": {name: records[name]._asdict() for name in sorted(records)},
    }
    said["seal"] = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return (json.dumps(said, indent=1) + "\n").encode()


def _seal(folder: Path) -> None:
    """Sync every file, then write the manifest, then sync the folders from the inside out."""
    names = sorted(_names(folder))
    assert MANIFEST not in names, folder
    records = {name: _measure(inside(folder, name), sync=True) for name in names}
    with open(folder / MANIFEST, "xb") as file:
        file.write(_manifest_bytes(records))
        file.flush()
        os.fsync(file.fileno())
    for root, _, _ in os.walk(folder, topdown=False):
        _sync(Path(root))


def _take_name(temporary: Path, target: Path) -> None:
    """Give a sealed folder its name; afterwards `temporary` is the folder that was replaced, if any."""
    if not os.path.lexists(target):
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        aside = _temporary(target, "old")
        descriptor = os.open(target, os.O_RDONLY)
        try:
            _lock(descriptor, wait=True)  # or a sweep would take it for the work of a dead process
            os.rename(target, aside)
            try:
                os.rename(temporary, target)
            except BaseException:
                os.rename(aside, target)
                raise
            _sync(target.parent)
            os.rename(aside, temporary)
        finally:
            os.close(descriptor)
    _sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library from before 2018
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def _check_replaceable(target: Path) -> None:
    """Refuse to replace or remove what `new_folder` did not make."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise StorageError(
            f"{target} is a {_kind(target.lstat().st_mode)}, not a folder", hint="choose another name"
        )
    if not target.exists() or not any(target.iterdir()):
        return
    try:
        foreign = foreign_files(target)
    except FormatError as error:
        raise StorageError(
            f"{target} is not empty and has no manifest of ours: it will not be touched ({error.message})",
            hint="choose another name, or remove the folder yourself",
        ) from error
    if foreign:
        raise StorageError(
            f"{target} also holds {', '.join(foreign[:5])}, which would be lost",
            hint="move it elsewhere first",
        )


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The records of a manifest, which must be byte for byte what we would write."""
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder", hint="give the folder that was written")
    if not os.path.lexists(folder / MANIFEST):
        raise FormatError(f"{folder} has no {MANIFEST}", hint="it was not finished, or not written by us")
    file = inside(folder, MANIFEST)
    text = _read_text(file)  # once: another process may be replacing the folder
    loaded = parse_json(file, text)
    if loaded.get("format") != FORMAT:
        raise FormatError(f"{file} is not a manifest of ours")
    if loaded.get("version") != VERSION:
        raise FormatError(
            f"{file} is of version {loaded.get('version')!r}; this program knows {VERSION}",
            hint="use a newer version of the program",
        )
    records = {}
    files = loaded.get("files")
    for name, record in files.items() if isinstance(files, dict) else ():
        fields = record if isinstance(record, dict) else {}
        size_bytes, digest = fields.get("size_bytes"), fields.get("sha256")
        if not isinstance(size_bytes, int) or not isinstance(digest, str):
            raise FormatError(f"{file} describes {name!r} as {record!r}, not by size and sha256")
        records[name] = FileRecord(size_bytes, digest)
    if text != _manifest_bytes(records).decode():
        raise FormatError(
            f"{file} was changed: it does not agree with its seal", hint="use another checkpoint"
        )
    return records


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(JSON_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing", hint="write or download it again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from error
    if len(data) > JSON_BYTES_MAX:
        raise FormatError(f"{path} has over {JSON_BYTES_MAX:,} bytes", hint="it is not what its name says")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    loaded = dict(pairs)
    if len(loaded) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"key {counts.most_common(1)[0][0]!r} stands twice")
    return loaded


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _is_hub_link(place: Path) -> bool:
    """True for a link as the hub's cache makes them: `models--*/snapshots/*/NAME` to a file in `models--*/blobs`."""
    cache = Path(os.path.realpath(place.parent)).parents
    if not place.is_symlink() or cache[0].name != "snapshots" or not cache[1].name.startswith("models--"):
        return False
    target = place.parent / os.readlink(place)
    in_blobs = os.path.realpath(target.parent) == f"{cache[1]}/blobs"
    return in_blobs and target.is_file() and not target.is_symlink()


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe"}
    return "symbolic link" if stat.S_ISLNK(mode) else kinds.get(stat.S_IFMT(mode), "special file")
