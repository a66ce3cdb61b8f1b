"""AFAD: ages and genders from folder names, nobody's identity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from facefast.data import read_index
from facefast.data.formats.afad import read_afad


def touch(root: Path, *names: str) -> Path:
    """Empty files below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_ages_and_genders_come_from_the_folders(tmp_path: Path) -> None:
    touch(tmp_path, "18/111/474596-0.jpg", "18/112/1.JPG", "5/112/2.jpg", "39/Male/deep/3.png", "18/111/Thumbs.db")
    index = read_index(tmp_path)
    assert index.attribute_names == ("age", "male")
    assert index.attributes is not None
    found = dict(zip(index.paths.tolist(), index.attributes.tolist(), strict=True))
    assert found == {
        b"18/111/474596-0.jpg": [18, 1],
        b"18/112/1.JPG": [18, 0],
        b"39/Male/deep/3.png": [39, 1],
        b"5/112/2.jpg": [5, 0],
    }
    assert np.array_equal(index.labels, [-1] * 4)
    assert index.class_names == ()


def test_other_folders_are_refused_with_their_count_and_the_first(tmp_path: Path) -> None:
    touch(tmp_path, "18/111/1.jpg", "18/113/2.jpg", "old/111/3.jpg", "4.jpg")
    with pytest.raises(ValueError, match=r"3 of 4 pictures .* not in <age>/<gender>/ \(first: 18/113/2.jpg\)"):
        read_afad(tmp_path)


def test_people_named_by_numbers_are_not_taken_for_ages(tmp_path: Path) -> None:
    touch(tmp_path, "18/1.jpg", "19/1.jpg")
    assert read_index(tmp_path).class_names == ("18", "19")


@pytest.mark.parametrize("stranger", ["__MACOSX/._15", "30/readme.txt", "logs/run.txt", "readme.txt", "@eaDir/x.jpg"])
def test_strangers_do_not_make_people_of_ages(tmp_path: Path, stranger: str) -> None:
    index = read_index(touch(tmp_path, "15/111/a.jpg", "20/112/b.jpg", stranger))
    assert index.attribute_names == ("age", "male")
    assert index.num_classes == 0


@pytest.mark.parametrize("stranger", ["samples/1.jpg", "ann/1.jpg", "pairs/x/1.jpg", "500/111/1.jpg"])
def test_pictures_that_have_no_age_are_refused(tmp_path: Path, stranger: str) -> None:
    touch(tmp_path, "15/111/a.jpg", "20/112/b.jpg", stranger, "pairs.txt")
    with pytest.raises(ValueError, match=f"first: {stranger}.*--data.format folder"):
        read_index(tmp_path)
