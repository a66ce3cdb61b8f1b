"""Writing that survives a crash: aside, synced, and renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Forces a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside, syncs it and renames it into place."""
    # A reader sees the old file or the new one, never a part: a rename replaces a file in one step. The process number
    # keeps two writers apart.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path: Path) -> Any:
    """Reads JSON written by `write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))


def follow_umask(path: Path) -> None:
    """Gives a file the mode of one that `open` creates beside it, where a library made it private to its owner."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(aside: Path, path: Path) -> None:
    """Renames a finished folder into place, where it replaces one that may be there."""
    for file in aside.iterdir():
        sync(file)
    sync(aside)
    # A rename cannot replace a folder that holds something, so an older one goes first.
    if path.exists():
        shutil.rmtree(path)
    os.rename(aside, path)
    sync(path.parent)  # the name is an entry of that folder


def replace_link(link: Path, target: str) -> None:
    """Points a symbolic link at `target` (relative to its folder) in one step."""
    # A link cannot be changed, only replaced by another one.
    aside = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    os.replace(aside, link)
    sync(link.parent)
