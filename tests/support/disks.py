"""Disks that are full, for tests: small file systems where mounting is allowed, limits on files where it is not."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def files_up_to(number: int) -> Iterator[None]:
    """Within it no file of this process grows beyond `number` bytes, as by a quota (EFBIG); Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def disk(folder: Path, size: str, options: str = "") -> Iterator[Path]:
    """A file system of its own in `folder`, of a size such as 64k.

    Raises:
        OSError: this process may not mount one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if said.returncode:
        raise OSError(said.stderr)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount file systems."""
    if os.geteuid() != 0:
        return False
    try:
        with tempfile.TemporaryDirectory() as name, disk(Path(name) / "try", "4k"):
            return True
    except OSError:
        return False


def remount(folder: Path, options: str) -> None:
    """Changes a disk: size=8m, or ro."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all the room that a disk has left; to remove the file gives it back."""
    path = folder / "filling"
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        while file.write(b"\0" * 65536):
            pass
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder: file contents by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
