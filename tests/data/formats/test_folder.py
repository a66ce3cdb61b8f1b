"""The folder reader: labels from sorted names, nothing invented, nothing lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from facefast.data import FaceIndex, read_index
from facefast.data.formats.folder import read_folder
from facefast.runtime.exits import DataError
from tests.support.faulty import jpeg
from tests.support.pictures import encode, smooth_picture


def touch(root: Path, *names: str) -> Path:
    """Empty files below `root`: readers look at names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def rows(index: FaceIndex) -> dict[str, str | None]:
    """path -> identity."""
    names = [index.class_names[label] if label >= 0 else None for label in index.labels]
    return dict(zip(map(os.fsdecode, index.paths.tolist()), names, strict=True))


def test_a_folder_is_an_identity_whatever_is_inside(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "Zoe Müller/1.JPG", "Zoe Müller/album/x y.jPeG", "Zoe Müller/album/deeper/3.png",
        "anna/1.webp", "anna/2.bmp", "anna/notes.txt", "anna/.hidden.jpg", ".cache/x.jpg", "loose.jpg",
        "Bob/thumbs.db", "Bob/._1.jpg",
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    index = read_folder(tmp_path)
    assert rows(index) == {
        "Zoe Müller/1.JPG": "Zoe Müller",
        "Zoe Müller/album/deeper/3.png": "Zoe Müller",
        "Zoe Müller/album/x y.jPeG": "Zoe Müller",
        "anna/1.webp": "anna",
        "anna/2.bmp": "anna",
        "loose.jpg": None,
    }
    assert index.class_names == ("Zoe Müller", "anna"), "neither empty folders nor folders without pictures"
    assert index.path(0) == str(tmp_path / "Zoe Müller/1.JPG")


def test_labels_are_those_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in ("10", "9", "b", "B", "a b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg())
    theirs = ImageFolder(str(tmp_path))
    ours = read_folder(tmp_path)
    assert list(ours.class_names) == theirs.classes
    assert [(ours.path(row), label) for row, label in enumerate(ours.labels)] == theirs.samples


def test_folders_named_train_and_test_are_splits_of_one_set_of_people(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/b/2.jpg", "test/c/1.jpg", "test/a/2.jpg")
    index = read_folder(tmp_path)
    assert rows(index) == {
        "test/a/2.jpg": "a", "test/c/1.jpg": "c", "train/a/1.jpg": "a", "train/b/1.jpg": "b", "val/b/2.jpg": "b",
    }  # fmt: skip
    assert index.splits.tolist() == [2, 2, 0, 0, 1]
    touch(tmp_path, "someone/1.jpg")
    with pytest.raises(DataError, match="test, train, val, which look like a part .* and someone beside"):
        read_folder(tmp_path)


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    touch(tmp_path / "store", "kim/1.jpg")
    root = touch(tmp_path / "people", "lee/1.jpg")
    (root / "kim").symlink_to(tmp_path / "store/kim")
    (root / "lee/loop").symlink_to(root / "lee")
    (root / "up").symlink_to(root)
    (root / "lee/2.jpg").symlink_to(tmp_path / "store/kim/1.jpg")
    (root / "lee/gone.jpg").symlink_to("nowhere.jpg")
    assert rows(read_folder(root)) == {
        "kim/1.jpg": "kim",
        "lee/1.jpg": "lee",
        "lee/2.jpg": "lee",
        "lee/gone.jpg": "lee",
    }


def test_a_folder_named_like_a_picture_is_reported_unless_it_is_a_person(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg/1.jpg")
    (tmp_path / "a.jpg/2.jpg").mkdir()
    assert rows(read_folder(tmp_path)) == {"a.jpg/1.jpg": "a.jpg", "a.jpg/2.jpg": "a.jpg"}
    assert read_folder(tmp_path).scanned().faults.all()


def test_names_in_any_bytes_lead_to_their_files(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    os.mkdir(root + b"/caf\xe9")
    with open(root + b"/caf\xe9/new\nline \xff.jpg", "wb") as file:
        file.write(encode(smooth_picture(30, 40)))
    index = read_index(tmp_path).scanned()
    assert index.faults.tolist() == [0]
    assert index.class_names == ("caf\\xe9",)
    index.save(tmp_path / "index.npz")
    assert FaceIndex.load(tmp_path / "index.npz").fingerprint() == index.fingerprint()
    assert os.path.exists(index.path(0))


def test_the_order_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = [f"{who}/{k}.jpg" for who in "abc" for k in range(4)]
    one, two = touch(tmp_path / "1", *names), touch(tmp_path / "2", *reversed(names))
    assert read_folder(one).fingerprint() == read_folder(two).fingerprint()


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/readme.md")
    with pytest.raises(ValueError, match=f"no picture in {tmp_path}"):
        read_folder(tmp_path)


PARTS = ("train/ann/1.jpg", "train/bob/1.jpg", "val/ann/2.jpg")


@pytest.mark.parametrize(
    "files",
    [
        PARTS,
        (*PARTS, "__MACOSX/train/ann/._1.jpg"),
        (*PARTS, "logs/readme.txt"),
        (*PARTS, "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg"),
        (*PARTS, ".cache/x.jpg", "notes.txt"),
        [name.replace("train", "Train").replace("val", "VALIDATION") for name in PARTS],
        [name.replace("train", "test") for name in PARTS],
    ],
)
def test_strangers_do_not_make_people_of_splits(tmp_path: Path, files: list[str]) -> None:
    index = read_index(touch(tmp_path, *files))
    assert index.class_names == ("ann", "bob")
    assert len(set(index.splits.tolist())) == 2


@pytest.mark.parametrize("stranger", ["samples/1.jpg", "plots/deep/curve.png"])
def test_pictures_beside_splits_are_refused(tmp_path: Path, stranger: str) -> None:
    with pytest.raises(DataError, match="look like a part of a divided data set"):
        read_index(touch(tmp_path, *PARTS, stranger))


def test_loose_pictures_beside_splits_belong_to_nobody(tmp_path: Path) -> None:
    index = read_index(touch(tmp_path, *PARTS, "cover.jpg"))
    assert rows(index)["cover.jpg"] is None
    assert len(index) == 4


def test_a_person_may_be_called_like_a_split(tmp_path: Path) -> None:
    assert read_index(touch(tmp_path, "Val/1.jpg", "ann/1.jpg")).class_names == ("Val", "ann")


def test_a_folder_one_level_too_high_is_told(tmp_path: Path) -> None:
    touch(tmp_path / "set", *PARTS)
    touch(tmp_path, "__MACOSX/set/._x")
    with pytest.raises(DataError, match=r"all pictures of .* are in set, which holds train, val; give .*/set instead"):
        read_index(tmp_path)
    touch(tmp_path / "other", "faces/ann/1.jpg", "faces/bob/1.jpg")
    with pytest.warns(UserWarning, match=r"people are taken to be faces, .*\(ann, bob\)"):
        read_index(tmp_path / "other")


def test_different_names_never_become_one_person(tmp_path: Path) -> None:
    names = [
        b"an\nn",
        b"an\\nn",
        b"caf\xe9",
        b"caf\\xe9",
        "caf\u0085".encode(),
        b"caf\x85",
        b"\x1b[31mred",
        "\u202egnp".encode(),
    ]
    for name in names:
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
        open(os.path.join(os.fsencode(tmp_path), name, b"1.jpg"), "wb").close()
    index = read_index(tmp_path)
    assert index.num_classes == len(names)
    assert all(name.isprintable() for name in index.class_names)
    assert "an\\nn" in index.class_names and "\\x1b[31mred" in index.class_names
