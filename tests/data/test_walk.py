"""The one walk: which names are pictures, what is left out and said, and where it ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from facefast.data import FAULTS, read_index, walk
from facefast.data.walk import holds_picture, is_picture, list_files, list_pictures
from facefast.runtime.exits import DataError


def touch(root: Path, *names: str) -> Path:
    """Empty files below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path) -> list[str]:
    """What the walk lists."""
    return [os.fsdecode(path) for path in list_pictures(root)]


@pytest.mark.parametrize(
    "name", [b"a.JPG", b"a.jfif", b"a.jpe", b"a.PpM", b"a.tif", b"a.heic", b"1.2.png", b"a.face.jpg"]
)
def test_names_of_pictures(name: bytes) -> None:
    assert is_picture(name)


@pytest.mark.parametrize(
    "name",
    [b"._a.jpg", b".a.jpg", b"a.txt", b"jpg", b"a.seg.png", b"a.MASK.png", b"a.thumb.jpg", b"Thumbs.db", b"a.jpg~"],
)
def test_names_of_other_files(name: bytes) -> None:
    assert not is_picture(name)


def test_what_systems_put_beside_photographs_is_no_picture(tmp_path: Path) -> None:
    touch(tmp_path, "ann/1.jpg", "__MACOSX/ann/._1.jpg", "__MACOSX/x.jpg", "ann/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
          "#recycle/2.jpg", ".thumbnails/3.jpg", "$RECYCLE.BIN/4.jpg", "ann/.DS_Store", "Thumbs.db")  # fmt: skip
    assert listed(tmp_path) == ["ann/1.jpg"]
    assert read_index(tmp_path).class_names == ("ann",)


def test_companions_are_left_out_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "ann/1.jpg", "ann/1.seg.png", "ann/1.thumb.jpg", "bob/2.jpg")
    with pytest.warns(UserWarning, match=r"2 files below .* left out \(first: ann/1\.seg\.png\)"):
        assert len(read_index(tmp_path)) == 2


def test_links_to_themselves_and_nowhere_are_counted_as_bad(tmp_path: Path) -> None:
    touch(tmp_path, "ann/1.jpg")
    (tmp_path / "bob").symlink_to("bob")
    (tmp_path / "carl").symlink_to("/nowhere/carl")  # a store that is not mounted
    (tmp_path / "ann/2.jpg").symlink_to("2.jpg")
    index = read_index(tmp_path).scanned()
    found = {index.name(row): FAULTS[index.faults[row]] for row in range(len(index))}
    assert found == {"ann/1.jpg": "empty file", "ann/2.jpg": "missing", "bob": "missing", "carl": "missing"}


def test_a_fan_of_links_ends(tmp_path: Path) -> None:
    for level in range(24):
        (tmp_path / f"{level}").mkdir()
        touch(tmp_path, f"{level}/x.jpg")
        for name in "ab":
            (tmp_path / f"{level}" / name).symlink_to(tmp_path / f"{level + 1}")
    found = listed(tmp_path)
    assert len(found) < 24 * 24 + 100
    assert sum(name.startswith("0/") and name.endswith(".jpg") for name in found) == 24, (
        "each folder once below an entry"
    )


def test_folders_too_deep_end_and_are_named(tmp_path: Path) -> None:
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("deep", dir_fd=place)
        below = os.open("deep", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=place))
    os.close(place)
    found = listed(tmp_path)
    assert found == ["/".join(["deep"] * (walk.MAX_DEPTH + 1))]
    assert read_index(tmp_path).scanned().faults.all()
    (tmp_path / "deep").rename(tmp_path / "other")
    with pytest.raises(DataError, match="more than 32 folders down"):
        list(list_files(tmp_path))
    os.system(f"rm -rf {tmp_path}/other")  # Python's own way of removing it recurses


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that nobody may read, among others; permissions alone would not keep root out."""
    touch(tmp_path, "ann/1.jpg", "bob/1.jpg", "bob/inside/1.jpg", "lost+found/x")
    scandir, access = os.scandir, os.access

    def refuse(folder: bytes) -> object:
        if os.path.basename(folder) in (b"inside", b"lost+found"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: b"lost+found" not in os.fsencode(path) and access(path, mode))
    return tmp_path


def test_a_folder_without_permission_is_said_and_counted(locked: Path) -> None:
    with pytest.warns(UserWarning, match=r"lost\+found cannot be read"):
        index = read_index(locked)
    assert [index.name(row) for row in range(len(index))] == ["ann/1.jpg", "bob/1.jpg", "bob/inside"]
    assert index.scanned().faults[2], "what cannot be looked into counts as bad"
    (locked / "lost+found/x").unlink()
    (locked / "lost+found").rmdir()
    with pytest.raises(DataError, match=r"bob/inside in .* cannot be looked into"):
        list(list_files(locked))


def test_whether_a_folder_holds_pictures_needs_no_whole_walk(tmp_path: Path) -> None:
    touch(tmp_path, "a/readme.txt", "b/c/d/1.jpg", "e/1.seg.png", "f/.hidden.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path / "a")
    assert [holds_picture(os.fsencode(tmp_path / name)) for name in "abef"] == [False, True, False, False]


def test_hidden_folders_of_pictures_are_named_but_for_those_of_programs(tmp_path: Path) -> None:
    touch(
        tmp_path, "ann/1.jpg", ".bob/1.jpg", ".cat/1.jpg", ".thumbnails/1.jpg", ".git/config", "ann/.d/1.jpg", ".e.jpg"
    )
    message = r"^2 folders of pictures in .* begin with a dot, .* left out \(first: \.bob\); rename"
    with pytest.warns(UserWarning, match=message):
        assert listed(tmp_path) == ["ann/1.jpg"]
