"""Lists of pairs in all their forms, and templates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from facefast.data.formats import pairs
from facefast.runtime.exits import DataError

FILES = ("ann/ann_0001.png", "ann/ann_0002.png", "bo/bo_0001.png", "bo/bo_0002.png", "cy/cy 1.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "people"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"picture")
    return folder


def listed(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.txt"
    path.write_text(text)
    return path


A, A2, B, B2, C = FILES
FORMS = {
    "blanks": f"{A} {A2} 1\n{A} {B} 0\n",
    "label first": f"1 {A} {A2}\n0 {A} {B}\n",
    "tabs": f"{A}\t{A2}\t1\n{A}\t{B}\t-1\n",
    "commas": f"{A},{A2},1\n{A},{B},0\n",
    "semicolons and words": f"{A};{A2};True\n{A};{B};False\n",
    "names of columns": f"path1,path2,label\n{A},{A2},same\n{A},{B},different\n",
    "columns in another order": f"id,Is Same,image_b,image_a\n7,1,{A2},{A}\n8,0,{B},{A}\n",
    "quotes and a comment": f'# ours\n"a","b","label"\n"{A}","{A2}","1"\n"{A}", "{B}", "0"\n',
    "dots in paths": f"./{A} ann/../{A2} 1\n{A} bo//bo_0001.png 0\n",
    "LFW": "ann\t1\t2\nann\t1\tbo\t1\n",
    "LFW with a head": "1\nann\t1\t2\nann\t1\tbo\t1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_list_gives_the_same_pairs(form: str, root: Path, tmp_path: Path) -> None:
    index, found = pairs.read_pair_list(root, listed(tmp_path, FORMS[form]))
    assert sorted(path.decode() for path in index.paths) == sorted([A, A2, B])  # nobody else is read
    for row, names in enumerate(((A, A2), (A, B))):
        assert {index.paths[found.left[row]].decode(), index.paths[found.right[row]].decode()} == set(names)
    assert found.same.tolist() == [True, False]
    people = [index.class_names[label] for label in index.labels]
    assert people == [path.decode().split("/")[0] for path in index.paths]


def test_absolute_paths_below_the_root_and_blanks_in_names_are_taken(root: Path, tmp_path: Path) -> None:
    index, found = pairs.read_pair_list(root, listed(tmp_path, f"{root / A},{C},0\n{A},{A2},1\n"))
    assert [path.decode() for path in index.paths] == [A, C, A2]
    assert found.left.tolist() == [0, 0]


def test_a_column_of_folds_is_kept(root: Path, tmp_path: Path) -> None:
    text = f"a,b,label,fold\n{A},{A2},1,9\n{A},{B},0,9\n{B},{B2},1,2\n{A},{C},0,2\n"
    _, found = pairs.read_pair_list(root, listed(tmp_path, text))
    assert found.folds.tolist() == [1, 1, 0, 0]
    assert found.same.tolist() == [True, False, True, False]


def test_without_folders_of_people_pairs_of_one_person_connect_pictures(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(b"picture")
    text = "a.png b.png 1\nb.png c.png 1\na.png d.png 0\nd.png e.png 0\n"
    index, _ = pairs.read_pair_list(tmp_path, listed(tmp_path, text))
    assert index.labels[:3].tolist() == [0, 0, 0]
    assert len(set(index.labels.tolist())) == 3
    assert index.class_names[0] == "a.png"


def test_folders_that_pairs_contradict_are_not_people(root: Path, tmp_path: Path) -> None:
    index, _ = pairs.read_pair_list(root, listed(tmp_path, f"{A},{B},1\n{A},{A2},0\n"))
    people = dict(zip((path.decode() for path in index.paths), index.labels.tolist(), strict=True))
    assert people[A] == people[B] != people[A2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{A} {A2} 1\n{A} nobody.png 0\ngone.png {B} 0\n", "names 2 of 5 pictures .* 'nobody.png' in line 2"),
        (f"{A} {A2} 1\n{A} ../list.txt 0\n", r"names 1 of 3 pictures that are not in .*'\.\./list\.txt' in line 2"),
        (f"{A} {A2} 1\n{A} {B} 2\n", "line 2: the label is '2'; it must be 1"),
        (f"{A} {A2} 1\n{A} {B}\n", "1 of 2 lines have not 3 columns"),
        (f"{A} {A2} 1\n{A} cy/cy 1.png 0\n", "where a path holds blanks, write commas or tabs"),
        (f"{A} {A2} 1\n{B} {B} 1\n", "line 2: .* paired with itself"),
        (f"{A} {A2} 1\n{A2} {A} 0\n", "lines 1 and 2 are of the same two pictures"),
        (f"{A} {A2}\n", "is no pair"),
        (f"a,b,c\n{A},{B},0\n", "columns of both pictures and of the label are needed"),
        ("a,b,label\n", "no line below the names"),
        ("\n# nothing\n", "has no line"),
    ],
)
def test_a_damaged_list_is_refused(text: str, message: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        pairs.read_pair_list(root, listed(tmp_path, text))


def test_a_list_or_a_folder_that_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt does not exist"):
        pairs.read_pair_list(root, tmp_path / "none.txt")
    with pytest.raises(ValueError, match="'' is no folder; give --data.root"):
        pairs.read_pair_list("", listed(tmp_path, FORMS["blanks"]))


MEDIA = f"{A} 10 1\n{A2} 10 2\n{B} 20 1\n{B2} 20 1\n{A2} 30 7\n"


def test_templates_of_three_columns_and_their_pairs(root: Path, tmp_path: Path) -> None:
    media = listed(tmp_path, MEDIA)
    (tmp_path / "pairs.txt").write_text("10 30 1\n10 20 0\n")
    found = pairs.read_templates(root, media, tmp_path / "pairs.txt")
    assert found.names == ("10", "20", "30")
    assert found.rows.tolist() == [0, 1, 2, 3, 1]  # a picture may be in two templates
    assert found.templates.tolist() == [0, 0, 1, 1, 2]
    assert found.media.tolist() == [0, 1, 2, 2, 3]  # medium 1 of another template is another one
    assert found.pairs.left.tolist() == [0, 0] and found.pairs.right.tolist() == [2, 1]
    assert found.pairs.same.tolist() == [True, False]
    assert found.subjects.tolist() == [-1, -1, -1]
    with pytest.raises(DataError, match="names no subjects, so nothing tells"):
        pairs.read_templates(root, media)


@pytest.mark.parametrize(
    "text",
    [
        f"{A} 10 5 1\n{A2} 10 5 2\n{B} 20 6 1\n{A2} 30 5 7\n",
        f"TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X,SIGHTING_ID\n10,5,{A},3,1\n10,5,{A2},3,2\n20,6,{B},3,1\n30,5,{A2},3,7\n",
    ],
)
def test_subjects_label_the_pairs_of_templates(text: str, root: Path, tmp_path: Path) -> None:
    media = listed(tmp_path, text)
    found = pairs.read_templates(root, media)
    assert found.subjects.tolist() == [0, 1, 0]
    assert list(zip(found.pairs.left, found.pairs.right, found.pairs.same, strict=True)) == [
        (0, 1, False), (0, 2, True), (1, 2, False)
    ]  # fmt: skip
    (tmp_path / "match.csv").write_text("ENROLL_TEMPLATE_ID,VERIF_TEMPLATE_ID\n10,30\n20,30\n")
    asked = pairs.read_templates(root, media, tmp_path / "match.csv")
    assert asked.pairs.same.tolist() == [True, False]
    assert [found.index.class_names[label] for label in found.index.labels] == ["5", "5", "6"]


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (f"{A} 10 5 1\n{A2} 10 6 2\n", None, "line 2: template '10' is of subject '5' and of '6'"),
        (f"{A} 10\n", None, "is no `path template media`"),
        (MEDIA, "10 40 0\n", "line 1: template '40' is not in"),
        (MEDIA, "10 20 0\n10 10 1\n", "line 2: template '10' is paired with itself; take the line out"),
        (MEDIA, "10 20\n", "no label, and .* names no subjects"),
        (MEDIA, "10 20 1\n10 30\n", "1 of 2 lines have not 3 columns"),
        (f"{A} 10 1\nx.png 20 1\n", "10 20 0\n", "names 1 of 2 pictures"),
    ],
)
def test_a_damaged_list_of_templates_is_refused(
    text: str, given: str | None, message: str, root: Path, tmp_path: Path
) -> None:
    if given is not None:
        (tmp_path / "pairs.txt").write_text(given)
    with pytest.raises(DataError, match=message):
        pairs.read_templates(root, listed(tmp_path, text), tmp_path / "pairs.txt" if given else None)


def test_too_many_templates_need_a_list_of_pairs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MOST_PAIRS", 2)
    with pytest.raises(ValueError, match="3 templates have 3 pairs; from 1 to 2 are taken"):
        pairs.read_templates(root, listed(tmp_path, f"{A} 10 5 1\n{B} 20 6 1\n{A2} 30 5 7\n"))


def test_rows_that_no_pair_names_are_left_out(root: Path, tmp_path: Path) -> None:
    index, found = pairs.read_pair_list(root, listed(tmp_path, "ann\t1\t2\nbo\t1\t2\n"))
    kept, renumbered = pairs.only_named(index, found)
    assert kept.paths.tolist() == index.paths.tolist()
    assert np.array_equal(renumbered.left, found.left)
