"""Writing that survives a crash: whoever looks sees the old or the new, whole, and nothing is left lying about."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from facefast.runtime import files
from facefast.runtime.direct import DirectFile

VALUES: tuple[object, ...] = (
    {},
    [],
    None,
    {"a": [1, 2.5, True, None, "b"], "deep": {"er": {"still": []}}},
    {"name": "Жанна", "lone": "\udcff", "newline": "a\nb", "quote": '"'},
    {"big": 2**70, "small": 1e-300, "exact": 0.1},
)


@pytest.mark.parametrize("value", VALUES)
def test_json_comes_back_as_it_was_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert path.read_bytes().endswith(b"\n")
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_a_reader_who_has_the_file_open_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"number": 1})
    with open(path, encoding="utf-8") as reader:
        files.write_json(path, {"number": 2})
        assert '"number": 1' in reader.read()
    assert files.read_json(path) == {"number": 2}


def test_readers_never_see_a_part_of_a_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "value.json", []
    files.write_json(path, ["0" * 100_000])
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            (text,) = files.read_json(path)
            seen.append((len(text), len(set(text))))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(1, 30):
            files.write_json(path, [str(number % 10) * 100_000])
    finally:
        done.set()
        reader.join()
    assert seen and set(seen) == {(100_000, 1)}


def test_a_value_that_is_no_json_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"number": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"number": 2, "thing": object()})
    assert files.read_json(path) == {"number": 1}


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "value.json", {})
        with DirectFile(tmp_path / "bytes"):
            pass
    finally:
        os.umask(before)
    for name in ("value.json", "bytes"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    assert len(list(tmp_path.iterdir())) == 2


def test_hashes_are_those_of_the_whole_content(tmp_path: Path) -> None:
    for size in (0, 1, 1 << 18, (1 << 18) + 1):
        content = bytes(range(256)) * (size // 256 + 1)
        (tmp_path / "file").write_bytes(content[:size])
        assert files.sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def folder(path: Path, **content: str) -> Path:
    path.mkdir()
    for name, text in content.items():
        (path / name).write_text(text)
    return path


def content_of(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another_as_a_whole(
    tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:  # as where the system has no call that exchanges two names
        monkeypatch.setattr(files.sys, "platform", "other")  # type: ignore[attr-defined]
    for old in (None, {}, {"kept": "no", "same": "old"}):
        if old is not None and not (tmp_path / "place").exists():
            folder(tmp_path / "place", **old)
        files.replace_folder(folder(tmp_path / ".aside", same="new", more="1"), tmp_path / "place")
        assert content_of(tmp_path / "place") == {"same": "new", "more": "1"}
        assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_two_names_are_exchanged_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = folder(tmp_path / "one", a="1"), folder(tmp_path / "other", b="2")
    files._exchange(one, other)
    assert (content_of(one), content_of(other)) == ({"b": "2"}, {"a": "1"})
    monkeypatch.setattr(files.sys, "platform", "other")  # type: ignore[attr-defined]
    files._exchange(one, other)
    assert (content_of(one), content_of(other)) == ({"a": "1"}, {"b": "2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_a_link_moves_in_one_step_and_a_leftover_of_a_crash_is_in_nobodys_way(tmp_path: Path) -> None:
    for number in (1, 2):
        folder(tmp_path / f"step-{number}", number=str(number))
    (tmp_path / f".last.{os.getpid()}.tmp").symlink_to("nowhere")
    for number in (1, 2):
        files.replace_link(tmp_path / "last", f"step-{number}")
        assert os.readlink(tmp_path / "last") == f"step-{number}"  # relative: the folder may move
        assert content_of(tmp_path / "last") == {"number": str(number)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-1", "step-2"]


def test_a_folder_in_the_place_of_a_link_is_not_thrown_away(tmp_path: Path) -> None:
    folder(tmp_path / "last", thesis="...")
    with pytest.raises(OSError):
        files.replace_link(tmp_path / "last", "step-1")
    assert content_of(tmp_path / "last") == {"thesis": "..."}


def test_what_is_not_there_cannot_be_synced(tmp_path: Path) -> None:
    files.sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.sync(tmp_path / "gone")
