"""Writing that survives a crash and a full disk: aside, synced, and renamed into place; what storage refuses is said
with the path, the bytes that are needed and those that are free."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import xxhash

from facefast.runtime.exits import StorageError
from facefast.runtime.untrusted import read_whole

ANOTHER = "choose another --out, or make room"
"""What to do where a command's output cannot be written; another option than --out names itself."""
_TORCH_REFUSALS = ("unexpected pos", "PytorchStreamWriter", "Parent directory", "cannot be opened", "iostream error")
"""What torch's writers say, as RuntimeError, where a file cannot be written."""
LARGEST_JSON = 64 << 20
"""Bytes; the names of a million classes are a third of it."""
MOST_PARTS = 1 << 20
"""Lists and objects in a JSON file."""


class WriteError(OSError):
    """One file could not be written; what was there is as it was."""

    def __init__(self, error: OSError, path: Path, needed: int) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))
        self.path, self.needed = path, needed


def sync(path: Path) -> None:
    """Forces a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def strict(value: Any) -> Any:
    """A JSON value with null for numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = read_json(path)
        return dict(found) if isinstance(found, dict) else {}
    return {}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside, syncs it and renames it into place.

    Raises:
        WriteError: it cannot be written.
    """
    # A reader sees the old file or the new one, never a part: a rename replaces a file in one step.
    text = (json.dumps(strict(value), indent=2, allow_nan=False) + "\n").encode()
    try:
        with _aside(path) as aside:
            aside.write_bytes(text)
    except OSError as error:
        raise WriteError(error, path, len(text)) from error


def overwrite_json(path: Path, value: Any) -> None:
    """Writes JSON into the blocks that a file has already, for a disk where there is no other room.

    A reader sees the old or the new text; a crash in this very moment may leave a part.

    Raises:
        OSError: there is no such file, or it would have to grow beyond its last block.
    """
    text = (json.dumps(strict(value), indent=2, allow_nan=False) + "\n").encode()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    descriptor = os.open(path, os.O_RDWR)
    try:
        # Blanks up to the old length, which JSON does not mind: to cut the file short would be a second step.
        found = os.fstat(descriptor)
        old, text = os.pread(descriptor, found.st_size, 0), text.ljust(found.st_size)
        if len(text) > max(found.st_size, 512 * found.st_blocks):
            raise full
        if os.pwrite(descriptor, text, 0) != len(text):  # a limit within the block: the part that fits is no JSON
            os.pwrite(descriptor, old, 0)
            os.ftruncate(descriptor, len(old))
            raise full
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A path beside `path`, which takes its place when it is written and synced; after an error nothing is left."""
    # The process number keeps two writers apart. A name may have 255 bytes, which a long one's suffix would exceed.
    aside = path.with_name(f".{_shortened(path.name)}.{os.getpid()}.tmp")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _shortened(name: str) -> str:
    return name if len(os.fsencode(name)) < 200 else os.fsencode(name)[:200].decode("utf-8", "ignore")


def read_json(path: Path) -> Any:
    """Reads JSON written by `write_json`.

    Raises:
        ValueError: it is no regular file, too long, nested too deeply, or no JSON in UTF-8.
        OSError: it cannot be read.
    """
    content = read_whole(path, LARGEST_JSON)
    parts = content.count(b"[") + content.count(b"{")
    if parts > MOST_PARTS:  # each costs thirty times its bytes
        raise ValueError(f"{path} has {parts} lists and objects; at most {MOST_PARTS} are read")
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from error


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: dotted name, and both values, None where there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{name}.{number}")
    elif old != new:
        yield name, old, new


@dataclass(frozen=True)
class Held:
    """A folder that is this process's alone."""

    path: Path
    device: int
    inode: int

    def problem(self) -> StorageError | None:
        """What is wrong where the path does not lead to the folder any more; None where it does.

        To write there would make half of the folder anew, or a part of somebody else's.
        """
        what = "it was removed, renamed or unmounted"
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                return None
            what = "another folder has its name now"
        return StorageError(
            f"the run folder {self.path} is gone: {what}; nothing more is written. Bring it back under this name, and "
            "the same command goes on from its newest checkpoint"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Held]:
    """Keeps a folder for this process alone; the kernel gives it free when the process ends, however it ends.

    Raises:
        ValueError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing to {folder}; wait until it has ended, or give this one another --out"
            ) from None
        except OSError as error:  # some network file systems have no locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        # While it is open its number stays: file systems that number their files anew would change it otherwise.
        found = os.fstat(descriptor)
        yield Held(folder.absolute(), found.st_dev, found.st_ino)
    finally:
        os.close(descriptor)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder on the way to it that there is."""
    path = path.absolute()
    while not os.path.exists(path) and path != path.parent:  # of a name that is too long it says no
        path = path.parent
    return path


def free_bytes(path: Path) -> int | None:
    """Bytes that this process can still write where a path lies or would lie; None where that is not known."""
    with contextlib.suppress(OSError):
        found = os.statvfs(existing(path))
        # A file system without a limit, or one behind a network that does not tell, has no blocks.
        if found.f_blocks:
            return (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * found.f_frsize
    return None


def is_refusal(error: BaseException) -> bool:
    """Whether an error is of the storage: a full disk, a quota, no permission, a folder that is gone."""
    # Each library has a way of its own to say it.
    if isinstance(error, OSError | safetensors.SafetensorError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_REFUSALS)


def refused(
    path: Path, error: BaseException | str, needed: int | None = None, advice: str = ANOTHER, what: str = ""
) -> StorageError:
    """What to raise where `path` cannot be written."""
    if isinstance(error, WriteError) and needed is None:
        path, needed, what = error.path, error.needed, ""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    free = free_bytes(path)
    room = "" if needed is None else f"; {needed} bytes are needed"
    room += "" if free is None else f"{';' if needed is None else ','} {free} are free there"
    return StorageError(f"cannot write {what}{path}: {reason}{room}{'. ' if advice[:1].isupper() else '; '}{advice}")


@contextlib.contextmanager
def storing(path: Path, needed: int | None = None, advice: str = ANOTHER, what: str = "") -> Iterator[None]:
    """Turns what the storage refuses within into one kind of error, and begins nothing for which there is no room.

    Args:
        path: what is written, for the message.
        needed: bytes it will take, where they are known.
        advice: what to do then.
        what: words before the path.

    Raises:
        StorageError: it cannot be written.
    """
    free = free_bytes(path)
    if needed is not None and free is not None and free < needed:
        raise refused(path, "there is too little room", needed, advice, what)
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not is_refusal(error):
            raise
        raise refused(path, error, needed, advice, what) from error


def npz(path: Path) -> Path:
    """As numpy names such a file; what is there and no file, such as /dev/stdout, keeps its name."""
    return path if path.suffix == ".npz" or path.exists() and not path.is_file() else Path(f"{path}.npz")


@contextlib.contextmanager
def replacing(path: Path, needed: int | None = None, advice: str = ANOTHER, *, parents: bool = False) -> Iterator[Path]:
    """A path to write a file to, which then becomes `path` in one step; `parents`: folders on the way to it are made.

    Whoever looks finds what was there before or the new file, whole; so it is after any error too. What is no file,
    such as /dev/stdout, is written as it is; a link stays one.

    Raises:
        StorageError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with storing(path, needed, advice):
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if target.exists() and not target.is_file():
            yield target
            return
        with _aside(target) as aside:
            yield aside
        _sync_folder(target.parent)


@contextlib.contextmanager
def replacing_folder(path: Path, needed: int | None = None, advice: str = ANOTHER) -> Iterator[Path]:
    """A new folder to write files to, which then becomes `path`, as `replacing` does it for a file; folders on the way
    to it are made.

    Files of the old folder that the new one does not have are gone afterwards.

    Raises:
        StorageError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with storing(path, needed, advice):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(path))
        # A mount point cannot be renamed, nor can anything in a folder that is not ours.
        fixed = target.is_dir() and (os.path.ismount(target) or not _allowed(target.parent))
        name = f".{_shortened(target.name)}.{os.getpid()}.tmp"
        aside = target / name if fixed else target.with_name(name)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            if fixed:
                _move_into(aside, target)
            else:
                replace_folder(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _move_into(aside: Path, target: Path) -> None:
    """Lets the files of a folder within `target` take the place of all others there; what is written last, last."""
    ours = sorted(aside.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for file in ours:
        sync(file)
    for file in target.iterdir():
        if file != aside and file.name not in {one.name for one in ours}:
            file.unlink()
    for file in ours:
        os.replace(file, target / file.name)
    _sync_folder(target)


def require_writable(path: Path, *, folder: bool = False, advice: str = ANOTHER, parents: bool = True) -> None:
    """Finds out, before any work is done for it, that an output cannot be written.

    Args:
        folder: whether `path` is to be a folder.
        parents: whether folders on the way to it will be made.

    Raises:
        StorageError: saying why.
    """
    target = Path(os.path.realpath(path))
    with storing(path, advice=advice):
        if os.path.exists(target) and target.is_dir() != folder:
            kind = (errno.ENOTDIR, "it is a file, and must be a folder") if folder else (errno.EISDIR, "it is a folder")
            raise OSError(*kind)
        if os.path.exists(target) and not folder and not target.is_file():
            return
        place = target if folder else target.parent
        while parents and not os.path.exists(place):
            place = place.parent
        if not os.path.exists(place):
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {place}")
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
        if not _allowed(place):
            read_only = os.statvfs(place).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, f"{os.strerror(number)} ({place})")


def _allowed(folder: Path) -> bool:
    """Whether this process may make files in a folder."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot: then it is theirs to keep what was renamed
        sync(path)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content: what names it, to everybody."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xxh3(path: Path) -> str:
    """Hex XXH3-128 of a file's content: what finds damage, at the speed of memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def replace_folder(aside: Path, path: Path) -> None:
    """Renames a finished folder into place; one that is there already stays whole until the new one has its name."""
    for file in aside.iterdir():
        sync(file)
    sync(aside)
    # A rename cannot replace a folder that holds something, and to remove that first could lose both.
    if path.exists():
        _exchange(aside, path)
        sync(path.parent)
        shutil.rmtree(aside)
    else:
        os.rename(aside, path)
        sync(path.parent)


def _exchange(one: Path, other: Path) -> None:
    """Lets two paths change their names in one step, so that no moment has neither.

    Linux has a call for it (renameat2, RENAME_EXCHANGE); elsewhere, and on file systems without it, `other` is away for
    the moment between two renames.
    """
    exchange, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return
    between = one.with_name(f"{one.name}.old")  # found by whoever looks for it after a crash just here
    os.rename(other, between)
    os.rename(one, other)
    os.rename(between, one)


def replace_link(link: Path, target: str) -> None:
    """Points a symbolic link at `target` (relative to its folder) in one step."""
    # A link cannot be changed, only replaced by another one.
    aside = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)
    sync(link.parent)


def remove_leftovers(folder: Path) -> None:
    """Takes away what a process that was killed while it wrote a file of a folder has left beside it: `.NAME.123.tmp`.

    Only for a folder that no other process writes to.
    """
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.\w+\.\w+\.\d+\.tmp", path.name) and path.is_file():
            path.unlink(missing_ok=True)
