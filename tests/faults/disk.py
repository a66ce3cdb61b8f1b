"""A process that dies at a chosen call to the file system: killed, or with the whole machine, which takes with it what
was never synced."""

from __future__ import annotations

import builtins
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from facefast.runtime import files

DEATHS = ("killed", "content lost", "names lost")
"""How a process dies. After a power cut files may be empty that were not synced, or bear the names, in folders that
were not synced, that they had before; what was removed may be gone all the same. Both are what file systems really do,
and the worst of it."""
CALLS = ("mkdir", "rename", "replace", "rmdir", "unlink", "symlink", "link", "open")


def dies_at(call: int, death: str, folder: Path, action: Callable[[], object]) -> bool:
    """Runs an action in a process of its own that dies at the `call`-th moment: before or after a call to the file
    system; returns whether there was such a moment."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _Disk(folder, call, death).take_over()
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status)
    assert died or os.WEXITSTATUS(status) == 0, "the action failed by itself"
    return died


def die_at(call: int, death: str, folder: Path) -> _Disk:
    """Lets this very process die at the `call`-th moment from now; `tick` of what is returned is one more."""
    disk = _Disk(folder, call, death)
    disk.take_over()
    return disk


class _Disk:
    """What is safe of a folder, as the process has made it so."""

    def __init__(self, folder: Path, call: int, death: str) -> None:
        self.folder, self.call, self.death = folder, call, death
        self.moments = 0
        self.content = {_number(path): _version(path) for path in self._files()}
        self.names = {(_number(path.parent), path.name, _number(path)) for path in self._files()}
        self.undo: list[tuple[tuple[int, int], Callable[[], object]]] = []

    def _files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]

    def take_over(self) -> None:
        """Stands between the process and the disk from now on."""
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name), self._before(name)))
        os.fsync = self._counted(self._synced)
        builtins.open = self._counted(builtins.open)
        safetensors.torch.save_file = self._counted(safetensors.torch.save_file)
        files._exchange = self._counted(files._exchange, self._before("exchange"))

    def _counted(self, function: Callable[..., Any], before: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.tick()
            undo = before(function, *arguments) if before else None
            result = function(*arguments, **keywords)
            if undo is not None:
                self.undo.append(undo)
            self.tick()
            return result

        return call

    def tick(self) -> None:
        self.moments += 1
        if self.moments != self.call:
            return
        self.moments = 10**9  # what follows are calls too
        if self.death == "content lost":
            for path in self._files():
                if self.content.get(_number(path)) != _version(path):
                    os.truncate(path, 0)
        if self.death == "names lost":
            for path in self._files():
                if (_number(path.parent), path.name, _number(path)) not in self.names:
                    path.unlink()
            for _, back in self.undo[::-1]:
                back()
        os.kill(os.getpid(), signal.SIGKILL)

    # No real fsync: it would take most of the time, and a disk that keeps everything shows nothing.
    def _synced(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if not stat.S_ISDIR(found.st_mode):
            self.content[found.st_dev, found.st_ino] = (found.st_size, found.st_mtime_ns)
            return
        folder = (found.st_dev, found.st_ino)
        with os.scandir(descriptor) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    self.names.add((folder, entry.name, (found.st_dev, entry.inode())))
        self.undo = [(waits, back) for waits, back in self.undo if waits != folder]

    def _before(self, name: str) -> Callable[..., Any] | None:
        if name not in ("rename", "replace", "exchange"):
            return None

        def remember(function: Callable[..., Any], old: Any, new: Any) -> tuple[tuple[int, int], Callable[[], object]]:
            old, new = Path(old), Path(new)
            return _number(new.parent), self._way_back(name, function, old, new)

        return remember

    @staticmethod
    def _way_back(name: str, function: Callable[..., Any], old: Path, new: Path) -> Callable[[], object]:
        """What undoes a rename."""
        if name == "exchange":
            return lambda: function(old, new)
        if new.is_symlink():
            target = os.readlink(new)
            return lambda: os.replace(_link_beside(new, target), new)
        if new.is_file():
            content = new.read_bytes()
            return lambda: new.write_bytes(content)
        return lambda: os.path.lexists(new) and new.rename(old)


def _link_beside(path: Path, target: str) -> Path:
    beside = path.with_name("link")
    beside.symlink_to(target)
    return beside


def _number(path: Path) -> tuple[int, int]:
    found = path.stat(follow_symlinks=False)
    return found.st_dev, found.st_ino


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
