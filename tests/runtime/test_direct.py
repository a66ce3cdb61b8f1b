"""Files past the page cache: whole whatever the file system can do, hashed as they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import xxhash

from facefast.runtime import direct
from facefast.runtime.direct import BLOCK, PIECE, DirectFile

CONTENT = os.urandom(3 * PIECE)
LENGTHS = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, PIECE, PIECE + 1, 2 * PIECE + BLOCK + 7)


def written(path: Path, content: bytes, step: int) -> str:
    with DirectFile(path) as out:
        for first in range(0, len(content), step):
            out.write(memoryview(content)[first : first + step])
    return out.xxh3()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("step", [977_777, PIECE, 4 * PIECE])
def test_content_and_hash_are_what_was_written(tmp_path: Path, length: int, step: int) -> None:
    content = CONTENT[:length]
    assert written(tmp_path / "file", content, step) == xxhash.xxh3_128(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("length", LENGTHS)
def test_a_file_system_that_has_no_way_past_its_cache_gets_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(direct, "DIRECT", 0)
    written(tmp_path / "file", CONTENT[:length], PIECE)
    assert (tmp_path / "file").read_bytes() == CONTENT[:length]


def test_blocks_that_the_disk_refuses_and_writes_in_part_cost_no_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.write, 0

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:  # larger blocks than ours
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data[: 3 * BLOCK] if calls == 1 else data[:100_001])

    monkeypatch.setattr(os, "write", write)
    # As where the file system is asked first, whatever the one of this machine can.
    monkeypatch.setattr(DirectFile, "_switch", lambda self, flag: bool(flag))
    monkeypatch.setattr(direct, "DIRECT", 1)
    written(tmp_path / "file", CONTENT, PIECE)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", CONTENT, PIECE)
