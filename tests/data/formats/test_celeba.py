"""CelebA's files in every edition that is going round, and what happens to lists with holes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from facefast.data import FAULTS, FaceIndex, read_index
from facefast.data.formats.celeba import read_celeba
from facefast.runtime.exits import DataError
from tests.support.faulty import jpeg

IDENTITIES = "000001.jpg 2880\n000002.jpg 12\n000003.jpg 2880\n000004.jpg 7\n"
PARTITION = "000001.jpg 0\n000002.jpg 1\n000003.jpg 0\n000004.jpg 2\n"
ATTRIBUTES = "4\nSmiling Male Young \n000001.jpg -1  1 1\n000002.jpg  1 -1 1\n000003.jpg -1 -1 1\n000004.jpg  1  1 1\n"
HEADER = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"


def landmarks(names: list[str], shift: int = 0) -> str:
    """A list of landmarks, point p of picture k at (10 p + k + shift, 20 p + k)."""
    lines = [
        f"{name}  " + " ".join(f"{10 * p + k + shift} {20 * p + k:3d}" for p in range(5))
        for k, name in enumerate(names)
    ]
    return "\n".join([str(len(names)), HEADER, *lines, ""])


NAMES = [f"{k:06d}.jpg" for k in range(1, 5)]


def write(root: Path, folder: str = "img_align_celeba", /, **lists: str | None) -> Path:
    """A data set of four pictures; a list given as None is left out."""
    (root / folder).mkdir(parents=True)
    for name in NAMES:
        (root / folder / name).write_bytes(jpeg())
    everything: dict[str, str | None] = {
        "identity_CelebA": IDENTITIES,
        "list_eval_partition": PARTITION,
        "list_attr_celeba": ATTRIBUTES,
        "list_landmarks_align_celeba": landmarks(NAMES),
    }
    for name, text in (everything | lists).items():
        if text is not None:
            (root / f"{name}.txt").write_text(text, newline="")
    return root


def check(index: FaceIndex) -> None:
    """The data set of `write`, however it was packed."""
    assert len(index) == 4
    assert index.class_names == ("7", "12", "2880"), "numbers of people by value, sparse ones too"
    assert index.labels.tolist() == [2, 1, 2, 0]
    assert index.splits.tolist() == [0, 1, 0, 2]
    assert index.attribute_names == ("Smiling", "Male", "Young")
    assert index.attributes is not None and index.landmarks is not None
    assert index.attributes.tolist() == [[0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 1]]
    assert index.landmarks.shape == (4, 5, 2)
    assert index.landmarks[2].tolist() == [[2, 2], [12, 22], [22, 42], [32, 62], [42, 82]]
    assert not index.scanned().faults.any()


def test_the_official_layout_is_read(tmp_path: Path) -> None:
    check(read_index(write(tmp_path)))
    check(read_index(write(tmp_path / "again"), "synthetic"))


def test_the_folder_of_torchvision_is_read(tmp_path: Path) -> None:
    write(tmp_path / "celeba")
    check(read_index(tmp_path))


def test_the_folders_of_the_official_download_are_read(tmp_path: Path) -> None:
    write(tmp_path)
    for folder in ("Anno", "Eval", "Img"):
        (tmp_path / folder).mkdir()
    (tmp_path / "img_align_celeba").rename(tmp_path / "Img/img_align_celeba")
    (tmp_path / "list_eval_partition.txt").rename(tmp_path / "Eval/list_eval_partition.txt")
    for name in ("identity_CelebA", "list_attr_celeba", "list_landmarks_align_celeba"):
        (tmp_path / f"{name}.txt").rename(tmp_path / f"Anno/{name}.txt")
    check(read_index(tmp_path))
    check(read_index(tmp_path / "Img/img_align_celeba"))


def test_the_comma_separated_edition_is_read(tmp_path: Path) -> None:
    lists = {
        "list_eval_partition": "image_id,partition\n" + PARTITION.replace(" ", ","),
        "list_attr_celeba": "image_id,Smiling,Male,Young\n"
        + "\n".join(",".join(line.split()) for line in ATTRIBUTES.split("\n")[2:]),
        "list_landmarks_align_celeba": "image_id," + ",".join(HEADER.split()) + "\n"
        + "\n".join(",".join(line.split()) for line in landmarks(NAMES).split("\n")[2:]),
    }  # fmt: skip
    write(tmp_path, **dict.fromkeys(lists))
    (tmp_path / "img_align_celeba").rename(tmp_path / "inner")
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "inner").rename(tmp_path / "img_align_celeba/img_align_celeba")
    for name, text in lists.items():
        (tmp_path / f"{name}.csv").write_text(text)
    check(read_index(tmp_path))


def test_line_ends_marks_and_blanks_do_not_matter(tmp_path: Path) -> None:
    odd = {
        "identity_CelebA": "\ufeff" + IDENTITIES.replace("\n", "\r\n") + "\r\n\r\n",
        "list_eval_partition": PARTITION.replace(" ", "\t ") + "\n\n",
        "list_attr_celeba": "\ufeff"
        + ATTRIBUTES.replace(" ", "   ").replace("\n", " \r\n").replace("4 \r", "9999\r", 1),
    }
    check(read_index(write(tmp_path, **odd)))


def test_names_may_hold_spaces_and_other_extensions(tmp_path: Path) -> None:
    write(tmp_path, list_attr_celeba=None, list_landmarks_align_celeba=None, list_eval_partition=None,
          identity_CelebA="my best photo.jpg   3\n000002.jpg 4\n")  # fmt: skip
    for name in NAMES:
        (tmp_path / "img_align_celeba" / name).unlink()
    (tmp_path / "img_align_celeba/my best photo.jpg").write_bytes(jpeg())
    (tmp_path / "img_align_celeba/000002.PNG").write_bytes(jpeg())
    index = read_celeba(tmp_path)
    assert index.paths.tolist() == [b"img_align_celeba/000002.PNG", b"img_align_celeba/my best photo.jpg"]
    assert [index.class_names[label] for label in index.labels] == ["4", "3"]


def test_holes_in_lists_are_neutral_and_named(tmp_path: Path) -> None:
    def drop(text: str) -> str:
        return "\n".join(line for line in text.split("\n") if not line.startswith("000003"))

    write(
        tmp_path,
        identity_CelebA=drop(IDENTITIES) + "000099.jpg 5\n",
        list_eval_partition=drop(PARTITION),
        list_attr_celeba=drop(ATTRIBUTES),
        list_landmarks_align_celeba=drop(landmarks(NAMES)),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = read_celeba(tmp_path)
    assert len(caught) == 4
    assert all("has no line for 1 of 4 pictures (first: 000003.jpg)" in str(w.message) for w in caught)
    assert "their label is -1" in str(caught[0].message)
    assert index.landmarks is not None and index.attributes is not None
    assert len(index) == 4, "a picture that one list names and no other has is not expected"
    assert index.labels.tolist() == [2, 1, -1, 0]
    assert "5" not in index.class_names, "who has no picture is no class"
    assert index.splits[2] == 0
    assert np.isnan(index.landmarks[2]).all() and np.isnan(index.attributes[2]).all()
    assert not np.isnan(index.landmarks[[0, 1, 3]]).any()


def test_a_picture_that_every_list_names_is_missed(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "img_align_celeba/000002.jpg").unlink()
    (tmp_path / "img_align_celeba/000004.jpg").unlink()
    (tmp_path / "img_align_celeba/000004.jpg").mkdir()
    index = read_celeba(tmp_path).scanned()
    assert [FAULTS[fault] for fault in index.faults] == ["ok", "missing", "ok", "not a regular file"]
    assert index.labels.tolist() == [2, 1, 2, 0]


def test_the_pictures_in_the_wild_have_landmarks_and_boxes_of_their_own(tmp_path: Path) -> None:
    boxes = "4\nimage_id x_1 y_1 width height\n" + "\n".join(
        f"{n}    95  71 226 {313 + k}" for k, n in enumerate(NAMES)
    )
    write(tmp_path, list_landmarks_celeba=landmarks(NAMES, shift=100), list_bbox_celeba=boxes)
    assert read_celeba(tmp_path).boxes is None, "boxes belong to the pictures in the wild"
    (tmp_path / "img_celeba").mkdir()
    for name in NAMES:
        (tmp_path / "img_celeba" / name).write_bytes(jpeg())
    assert read_celeba(tmp_path).paths[0] == b"img_align_celeba/000001.jpg", "aligned ones come first"
    index = read_index(tmp_path / "img_celeba")
    assert index.paths[0] == b"img_celeba/000001.jpg"
    assert index.landmarks is not None and index.boxes is not None
    assert index.landmarks[0, 0].tolist() == [100, 0]
    assert index.boxes[3].tolist() == [95, 71, 226, 316]
    assert index.labels.tolist() == [2, 1, 2, 0]


def test_attributes_alone_are_enough(tmp_path: Path) -> None:
    write(tmp_path, identity_CelebA=None, list_eval_partition=None, list_landmarks_align_celeba=None)
    index = read_index(tmp_path)
    assert index.labels.tolist() == [-1] * 4
    assert index.num_classes == 0
    assert index.landmarks is None


def test_signs_become_zero_and_one_and_other_numbers_stay(tmp_path: Path) -> None:
    text = "Male Known Bit Age\n" + "\n".join(
        f"{name} {row}" for name, row in zip(NAMES, ["-1 0 0 31", "1 -1 1 7.5", "1 1 0 80", "-1 1 1 -1"], strict=True)
    )
    index = read_celeba(write(tmp_path, list_attr_celeba=text))
    assert index.attributes is not None
    expected = [[0, np.nan, 0, 31], [1, 0, 1, 7.5], [1, 1, 0, 80], [0, 1, 1, -1]]
    assert np.array_equal(index.attributes, np.array(expected, np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            {"identity_CelebA": IDENTITIES + "000005.jpg\n000006.jpg\n"},
            "2 of 6 lines are not a file name and 1 numbers",
        ),
        ({"identity_CelebA": IDENTITIES.replace("12", "twelve")}, r"1 of 4 lines .*first: '000002.jpg twelve'"),
        ({"identity_CelebA": IDENTITIES.replace("12", "1.5")}, "1 of 4 lines .*000002.jpg 1.5.* a whole number"),
        ({"identity_CelebA": IDENTITIES + "000001.jpg 5\n"}, "different things of 1 pictures .*000001.jpg, 2880 and 5"),
        ({"list_eval_partition": PARTITION.replace(" 2", " 3")}, "1 of 4 lines .*000004.jpg 3.*0, 1 or 2"),
        ({"list_attr_celeba": ATTRIBUTES.replace("Smiling Male Young \n", "")}, "no header line"),
        (
            {"list_attr_celeba": ATTRIBUTES.replace("Young", "")},
            r"names none of the 4 pictures .*first line is for 000001.jpg -1, and 2 numbers",
        ),
        ({"list_landmarks_align_celeba": landmarks(NAMES).replace("82\n", "\n")}, "not a file name and 10 numbers"),
    ],
)
def test_a_damaged_list_is_refused_with_its_count_and_first_line(
    tmp_path: Path, lists: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_celeba(write(tmp_path, **lists))


def test_large_identities_stay_apart(tmp_path: Path) -> None:
    ids = [16777216, 16777217, 700000001, 900719925474099311]
    lines = "".join(f"{name} {who}\n" for name, who in zip(NAMES, ids, strict=True))
    index = read_celeba(write(tmp_path, identity_CelebA=lines))
    assert [index.class_names[label] for label in index.labels] == [str(who) for who in ids]


@pytest.mark.parametrize("value", ["inf", "1e400", "nan", "-2", "1e3", "1_000", "2.5", "\u0663", "9" * 19, "0x10", ""])
def test_an_identity_that_is_no_whole_number_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    write(tmp_path, identity_CelebA=IDENTITIES.replace(" 12\n", f" {value}\n"))
    with pytest.raises(DataError, match=r"identity_CelebA\.txt: 1 of 4 lines .*000002\.jpg.* in line 2"):
        read_celeba(tmp_path)


def test_nobody_is_minus_one_and_a_float_without_fraction_is_whole(tmp_path: Path) -> None:
    write(tmp_path, identity_CelebA=IDENTITIES.replace(" 12\n", " -1\n").replace(" 7\n", " 7.0\n"))
    assert read_celeba(tmp_path).labels.tolist() == [1, -1, 1, 0]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"list_eval_partition": PARTITION.replace(" 2", " 1.00000001")}, "000004.jpg 1.0000000099999999 in line 4"),
        ({"list_eval_partition": PARTITION.replace(" 2", " inf")}, "'000004.jpg inf' in line 4"),
        ({"list_attr_celeba": ATTRIBUTES.replace("-1  1 1", "-1 1e400 1")}, "'000001.jpg -1 1e400 1' in line 3"),
        ({"list_attr_celeba": ATTRIBUTES.replace("-1  1 1", "-1 16777217 1")}, "32-bit floats can tell"),
        ({"list_attr_celeba": ATTRIBUTES.replace("Young", "smiling")}, "the column 'smiling' twice"),
        ({"list_landmarks_align_celeba": landmarks(NAMES).replace("82\n", "1e30\n")}, "must be pixels"),
        ({"list_landmarks_align_celeba": landmarks(NAMES).replace("righteye_y ", "")}, "has the columns lefteye_x"),
        ({"identity_CelebA": IDENTITIES + "caf\udce9.jpg 5\n"}, "line 5: byte 0xe9 is no UTF-8"),
        ({"identity_CelebA": "\0".join(IDENTITIES)}, "line 1: it holds a byte 0"),
    ],
)
def test_numbers_and_bytes_of_other_kinds_are_refused(tmp_path: Path, lists: dict[str, str], message: str) -> None:
    write(tmp_path)
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        read_celeba(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_with_a_mark_are_read(tmp_path: Path, encoding: str) -> None:
    write(tmp_path)
    (tmp_path / "identity_CelebA.txt").write_text("# by hand\n" + IDENTITIES.replace("\n", "\r"), encoding, newline="")
    check(read_celeba(tmp_path))


def test_columns_go_by_their_names(tmp_path: Path) -> None:
    names = HEADER.split()[::-1]
    lines = [line.split() for line in landmarks(NAMES).strip().split("\n")[2:]]
    turned = [",".join(["image_id", *names]), *(",".join([name, *numbers[::-1]]) for name, *numbers in lines)]
    write(tmp_path, list_landmarks_align_celeba=None)
    (tmp_path / "list_landmarks_align_celeba.csv").write_text("\n".join(turned))
    check(read_celeba(tmp_path))


def test_copies_of_a_list_must_agree(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "identity_CelebA.csv").write_text("image_id,identity\n" + IDENTITIES.replace(" ", ","))
    check(read_celeba(tmp_path))
    (tmp_path / "identity_CelebA.csv").write_text("image_id,identity\n000001.jpg,5\n")
    with pytest.raises(
        DataError, match=r"identity_CelebA.txt and .*identity_CelebA.csv say different things of 000001"
    ):
        read_celeba(tmp_path)


def test_a_line_belongs_to_the_file_of_its_name(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "img_align_celeba/000002.png").write_bytes(jpeg())  # a mask, perhaps
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        index = read_celeba(tmp_path)
    assert index.labels.tolist() == [2, 1, -1, 2, 0]


def test_a_name_that_leads_out_is_refused(tmp_path: Path) -> None:
    everything = {"identity_CelebA": IDENTITIES, "list_eval_partition": PARTITION, "list_attr_celeba": ATTRIBUTES}
    odd = {name: text.replace("000004.jpg", "../../4.jpg") for name, text in everything.items()}
    write(tmp_path, list_landmarks_align_celeba=None, **odd)
    with pytest.raises(DataError, match="leads out of"):
        read_celeba(tmp_path)


def test_repeated_lines_that_agree_are_one(tmp_path: Path) -> None:
    check(read_celeba(write(tmp_path, identity_CelebA=IDENTITIES + "000001.jpg 2880\n")))


def test_other_folders_are_not_celeba(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not CelebA: it needs img_align_celeba or img_celeba"):
        read_celeba(tmp_path)
    (tmp_path / "img_align_celeba").mkdir()
    with pytest.raises(ValueError, match="one of the lists identity_CelebA"):
        read_celeba(tmp_path)


def test_real_photographs_are_read_as_their_readme_says(celeba: Path, celeba_in_the_wild: Path) -> None:
    aligned, wild = read_index(celeba), read_index(celeba_in_the_wild)
    assert (len(aligned), aligned.num_classes, len(wild)) == (4950, 239, 300)
    assert aligned.attribute_names == ("Attractive", "Male")
    assert aligned.landmarks is not None and wild.landmarks is not None and wild.boxes is not None
    eyes = aligned.landmarks[:, :2].mean(axis=0)
    assert np.abs(eyes - [[69.5, 111], [108, 111]]).max() < 2, "the left eye of the picture comes first"
    x, y, width, height = wild.boxes.T
    points = wild.landmarks.mean(axis=1)
    assert ((points[:, 0] > x) & (points[:, 0] < x + width) & (points[:, 1] > y) & (points[:, 1] < y + height)).all()
    trained = set(aligned.labels[aligned.splits == 0].tolist())
    assert not trained & set(aligned.labels[aligned.splits == 2].tolist()), (
        "the official partition is identity-disjoint"
    )
