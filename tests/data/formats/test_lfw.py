"""LFW's pairs in the order and folds of its protocol, for any folder of people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from facefast.data import FaceIndex, read_index, read_lfw, read_pairs
from facefast.data.formats.folder import read_folder
from facefast.runtime.exits import DataError

PAIRS = "2\t2\nAnn_Lee\t1\t2\nBo\t1\t3\nAnn_Lee\t1\tBo\t2\nBo\t3\tCy\t1\n"
PAIRS += "Ann_Lee\t2\t3\nBo\t2\t3\nAnn_Lee\t3\tCy\t1\nBo\t1\tCy\t1\n"


def people(root: Path) -> Path:
    """Three people with three, three and one pictures."""
    for name, count in (("Ann_Lee", 3), ("Bo", 3), ("Cy", 1)):
        (root / name).mkdir(parents=True)
        for k in range(1, count + 1):
            (root / name / f"{name}_{k:04d}.jpg").touch()
    return root


def named(index: FaceIndex, rows: np.ndarray) -> list[str]:
    """Picture names of rows."""
    return [Path(index.path(row)).stem for row in rows]


@pytest.mark.parametrize("folder", ["", "lfw", "lfw-deepfunneled"])
def test_pairs_are_read_with_their_folds(tmp_path: Path, folder: str) -> None:
    people(tmp_path / folder)
    (tmp_path / "pairs.txt").write_text(PAIRS)
    index, pairs = read_lfw(tmp_path)
    assert index.class_names == ("Ann_Lee", "Bo", "Cy")
    assert named(index, pairs.left) == [
        "Ann_Lee_0001", "Bo_0001", "Ann_Lee_0001", "Bo_0003", "Ann_Lee_0002", "Bo_0002", "Ann_Lee_0003", "Bo_0001",
    ]  # fmt: skip
    assert named(index, pairs.right)[2:4] == ["Bo_0002", "Cy_0001"]
    assert pairs.same.tolist() == [True, True, False, False] * 2
    assert pairs.folds.tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(index.labels[pairs.left] == index.labels[pairs.right], pairs.same)
    assert read_index(tmp_path).fingerprint() == index.fingerprint()


def test_blanks_line_ends_and_a_missing_first_line_do_not_matter(tmp_path: Path) -> None:
    people(tmp_path)
    lines = PAIRS.replace("\t", "  ").replace("\n", "\r\n").split("\r\n", 1)[1]
    (tmp_path / "mine.txt").write_text("\ufeff" + lines + "\r\n", newline="")
    index, pairs = read_lfw(tmp_path, tmp_path / "mine.txt")
    (tmp_path / "pairs.txt").write_text(PAIRS)
    _, official = read_lfw(tmp_path)
    assert np.array_equal(pairs.left, official.left) and np.array_equal(pairs.right, official.right)
    assert sorted(set(pairs.folds.tolist())) == [0, 1, 2, 3], "no more folds than pairs of a kind"


def test_names_with_spaces_are_kept_apart_by_tabs(tmp_path: Path) -> None:
    for name in ("Ann Lee", "Bo"):
        (tmp_path / name).mkdir()
        for k in (1, 2):
            (tmp_path / name / f"{name}_{k:04d}.PNG").touch()
    (tmp_path / "pairs.txt").write_text("Ann Lee\t1\t2\nAnn Lee\t1\tBo\t2\n")
    index, pairs = read_lfw(tmp_path)
    assert named(index, pairs.right) == ["Ann Lee_0002", "Bo_0002"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAIRS + "Ann_Lee\t1\n", "1 of 9 lines are no pairs .*'Ann_Lee 1'"),
        (PAIRS + "Ann_Lee\tone\t2\n", "are no pairs"),
        (PAIRS + "Bo\t1\t2\n", "announces 2 folds of 2 x 2 pairs and has 9"),
        (PAIRS.replace("Bo\t1\t3", "Bo\t1\t9"), "names 1 pictures that are not in .*first: Bo_0009"),
    ],
)
def test_damaged_pairs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    people(tmp_path)
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(read_folder(tmp_path), tmp_path / "bad.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Bo\t1\tBo\t2\n", "of two different people"),
        ("Bo\t1\t2\nBo\t2\t02\n", "line 2: 'Bo_0002' is paired with itself; take the line out"),
        ("Bo\t1\t\u0662\n", "are no pairs .* in line 1"),
        ("Bo\t1\t99999999999\n", "are no pairs"),
        ("40000\t1\nBo\t1\t2\n", "are no pairs"),
        ("5\nBo\t1\t2\n", "announces 2 x 5 pairs and has 1"),
        ("caf\udce9\t1\t2\n", "line 1: byte 0xe9 is no UTF-8"),
    ],
)
def test_pairs_that_may_be_wrong_are_refused(tmp_path: Path, text: str, message: str) -> None:
    people(tmp_path)
    (tmp_path / "bad.txt").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        read_pairs(read_folder(tmp_path), tmp_path / "bad.txt")


def test_comments_and_utf_16_are_read(tmp_path: Path) -> None:
    people(tmp_path)
    (tmp_path / "pairs.txt").write_text("# ours\r\n" + PAIRS, "utf-16")
    assert len(read_lfw(tmp_path)[1]) == 8


def test_of_two_pictures_of_a_name_the_persons_own_counts(tmp_path: Path) -> None:
    people(tmp_path)
    (tmp_path / "Ann_Lee" / "Bo_0001.png").touch()
    (tmp_path / "pairs.txt").write_text(PAIRS)
    index, pairs = read_lfw(tmp_path)
    assert index.name(int(pairs.left[1])) == "Bo/Bo_0001.jpg"
    (tmp_path / "Bo/Bo_0001.png").touch()
    with pytest.raises(DataError, match=r"line 3: Bo_0001 may be .*Bo_0001"):
        read_lfw(tmp_path)


def test_pictures_beside_the_folder_of_lfw_are_refused(tmp_path: Path) -> None:
    people(tmp_path / "lfw")
    people(tmp_path / "more")
    (tmp_path / "pairs.txt").write_text(PAIRS)
    with pytest.raises(DataError, match="holds pictures in lfw and in 1 other folders"):
        read_lfw(tmp_path)


def test_a_folder_without_pairs_says_what_to_do(tmp_path: Path) -> None:
    people(tmp_path)
    with pytest.raises(ValueError, match=r"pairs.txt does not exist; name a pairs.txt"):
        read_lfw(tmp_path)
