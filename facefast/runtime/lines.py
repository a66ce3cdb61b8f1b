"""metrics.jsonl: one JSON object a line, each there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from facefast.runtime import files


class Lines:
    """metrics.jsonl: each line is there whole or not at all, also on a disk that is full for a while.

    Args:
        path: begun without the lines that a run wrote after the checkpoint it resumes from, and without damaged ones.
        first_step: the checkpoint's; None keeps none.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, first_step: int | None) -> None:
        self.path = path
        # The run makes the updates after its checkpoint again: with the old lines every one of them would stand twice.
        lines = [] if first_step is None else [line for line, at in _records(path) if at["step"] <= first_step]
        kept, self._kept = b"".join(lines), set(lines)
        before = path.read_bytes() if path.exists() else b""
        if not before.startswith(kept):
            with files.replacing(path, len(kept)) as aside:
                aside.write_bytes(kept)
        # Unbuffered: a run that is killed leaves every line, and what a full disk did not take is known at once.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 -- closed by `close`
        self._file.truncate(len(kept))  # which needs no room
        self._torn = False

    def had(self, record: Mapping[str, Any]) -> bool:
        """Whether the run had written this line before it was taken up again."""
        return _line(record) in self._kept

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises OSError where the line cannot be written."""
        line = _line(record)
        if self._torn:  # what is left of the line before ends here
            line = b"\n" + line
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._torn = True
            with contextlib.suppress(OSError):
                self._file.truncate(end)
                self._torn = False
            raise
        self._torn = False

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._file.close()


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of metrics.jsonl with what they say; those that a crash or a full disk has torn are left out."""
    content = path.read_bytes() if path.is_file() else b""
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # of bytes that are no text, too
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and line.endswith(b"\n"):
            yield line, record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What the whole lines of metrics.jsonl say; none where there is no such file."""
    return [record for _, record in _records(path)]


def count_unread(path: Path) -> int:
    """Lines of metrics.jsonl that `read_lines` leaves out, since a crash, a full disk or an editor has damaged them."""
    content = path.read_bytes() if path.is_file() else b""
    return sum(bool(line.strip()) for line in content.splitlines()) - sum(1 for _ in _records(path))
