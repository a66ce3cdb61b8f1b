"""Writing that survives a crash: aside, synced, and renamed into place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from facefast.runtime.untrusted import read_whole

LARGEST_JSON = 64 << 20
"""Bytes; the names of a million classes are a third of it."""
MOST_PARTS = 1 << 20
"""Lists and objects in a JSON file."""


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


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside, syncs it and renames it into place."""
    # A reader sees the old file or the new one, never a part: a rename replaces a file in one step. The process number
    # keeps two writers apart.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(strict(value), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
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
        yield
    finally:
        os.close(descriptor)


def follow_umask(path: Path) -> None:
    """Gives a file the mode of one that `open` creates beside it, where a library made it private to its owner."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
