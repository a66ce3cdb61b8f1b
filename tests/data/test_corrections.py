"""suspects.csv and labels.csv: written, read, edited, applied, and refused where they do not fit."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from facefast.data import FaceIndex
from facefast.data.corrections import (
    Correction,
    Label,
    apply_corrections,
    read_corrections,
    read_labels,
    write_corrections,
    write_labels,
)
from facefast.runtime.exits import StorageError


@pytest.fixture
def index() -> FaceIndex:
    """Two pictures each of ann, bob and cat, and one of nobody."""
    paths = [b"ann/0.jpg", b"ann/1.jpg", b"bob/0.jpg", b"bob/1.jpg", b"cat/0.jpg", b"cat/1.jpg", b"9.jpg"]
    return FaceIndex.build("photos", paths, [0, 0, 1, 1, 2, 2, -1], ("ann", "bob", "cat"))


def people_of(index: FaceIndex) -> dict[str, str]:
    """Name of each picture's identity, "" for none."""
    names = (*index.class_names, "")
    return {index.name(row): names[index.labels[row]] for row in range(len(index))}


def write(tmp_path: Path, *lines: Correction) -> Path:
    path = tmp_path / "suspects.csv"
    write_corrections(path, lines)
    return path


def wrong(path: str, identity: str, action: str = "drop", suggested: str = "") -> Correction:
    return Correction("wrong_label", path, identity, suggested, action)


def merge(identity: str, suggested: str) -> Correction:
    return Correction("merge", f"{identity}/0.jpg", identity, suggested, "merge")


def test_corrections_come_back_as_they_were_written(tmp_path: Path) -> None:
    lines = [
        Correction("duplicate", 'a, "b"\n.jpg', "Zoë", "", "drop", 0.75, 0.5, -0.25, "other.jpg"),
        wrong("x.jpg", "ann", "relabel", "bob"),
    ]
    found = [line for _, line in read_corrections(write(tmp_path, *lines))]
    assert found[0] == lines[0]
    assert np.isnan(found[1].score)
    assert dataclasses.replace(found[1], score=0, other_score=0) == dataclasses.replace(
        lines[1], score=0, other_score=0
    )


def test_pictures_are_dropped_relabelled_and_kept(tmp_path: Path, index: FaceIndex) -> None:
    path = write(
        tmp_path,
        wrong("ann/1.jpg", "ann"),
        wrong("bob/0.jpg", "bob", "relabel", "cat"),
        wrong("bob/1.jpg", "bob", "keep", "ann"),
        Correction("duplicate", "9.jpg", "", "ann", "drop", other_path="ann/0.jpg"),
    )
    counts: Counter[str] = Counter()
    changed = apply_corrections(index, path, counts)
    assert counts == {"dropped": 2, "renamed": 1}
    assert people_of(changed) == {
        "ann/0.jpg": "ann",
        "bob/0.jpg": "cat",
        "bob/1.jpg": "bob",
        "cat/0.jpg": "cat",
        "cat/1.jpg": "cat",
    }


def test_merges_follow_each_other_and_take_relabelled_pictures_along(tmp_path: Path, index: FaceIndex) -> None:
    path = write(tmp_path, wrong("cat/1.jpg", "cat", "relabel", "ann"), merge("ann", "bob"), merge("bob", "cat"))
    changed = apply_corrections(index, path)
    assert changed.class_names == ("cat",)
    assert people_of(changed) == {name: "cat" if "/" in name else "" for name in people_of(index)}


def test_merging_in_a_circle_is_one_identity(tmp_path: Path, index: FaceIndex) -> None:
    changed = apply_corrections(index, write(tmp_path, merge("ann", "bob"), merge("bob", "ann")))
    assert changed.class_names == ("bob", "cat")


def test_a_drop_outweighs_every_other_line(tmp_path: Path, index: FaceIndex) -> None:
    path = write(tmp_path, wrong("ann/0.jpg", "ann", "relabel", "bob"), wrong("ann/0.jpg", "ann"))
    assert "ann/0.jpg" not in people_of(apply_corrections(index, path))


def test_an_empty_list_changes_nothing(tmp_path: Path, index: FaceIndex) -> None:
    assert apply_corrections(index, write(tmp_path)).fingerprint() == index.fingerprint()


def test_identities_without_a_picture_are_gone(tmp_path: Path, index: FaceIndex) -> None:
    changed = apply_corrections(index, write(tmp_path, wrong("ann/0.jpg", "ann"), wrong("ann/1.jpg", "ann")))
    assert changed.class_names == ("bob", "cat")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (wrong("dan/0.jpg", "dan"), "line 2: dan/0.jpg is no picture of"),
        (wrong("ann/0.jpg", "bob"), "ann/0.jpg is ann here, bob there"),
        (wrong("9.jpg", "bob"), "9.jpg is nobody here, bob there"),
        (wrong("ann/0.jpg", "ann", "relabel", "dan"), "relabel needs an identity of this set .* not 'dan'"),
        (wrong("ann/0.jpg", "ann", "relabel"), "not ''"),
        (merge("dan", "ann"), "no identity 'dan' to merge"),
        (wrong("ann/0.jpg", "ann", "delete"), "action 'delete' is none of drop, keep"),
        (dataclasses.replace(wrong("ann/0.jpg", "ann"), kind="odd"), "kind 'odd' is none of"),
    ],
)
def test_lines_that_do_not_fit_are_named(tmp_path: Path, index: FaceIndex, line: Correction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_corrections(index, write(tmp_path, line))


def test_two_names_for_one_picture_contradict_each_other(tmp_path: Path, index: FaceIndex) -> None:
    lines = [wrong("ann/0.jpg", "ann", "relabel", other) for other in ("bob", "cat")]
    with pytest.raises(ValueError, match="line 3: .* relabelled twice"):
        apply_corrections(index, write(tmp_path, *lines))


def test_many_faults_are_counted_and_some_shown(tmp_path: Path, index: FaceIndex) -> None:
    with pytest.raises(ValueError, match=r"(?s)8 lines do not fit.*and 3 more"):
        apply_corrections(index, write(tmp_path, *(wrong(f"{k}.png", "ann") for k in range(8))))


def test_dropping_everything_is_refused(tmp_path: Path, index: FaceIndex) -> None:
    lines = [wrong(name, identity) for name, identity in people_of(index).items()]
    with pytest.raises(ValueError, match="drops all 7 pictures"):
        apply_corrections(index, write(tmp_path, *lines))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,identity\n", "no column kind, suggested, action"),
        (b"", "no column kind"),
        (b"\xff\xfe\x00", "no CSV file in UTF-8"),
        (b"kind,path,identity,suggested,action,confidence\nmerge,p,a,b,merge,high\n", "confidence is 'high'"),
        (b"kind,path,identity,suggested,action\nmerge\n", "line 2"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, index: FaceIndex, content: bytes, message: str) -> None:
    path = tmp_path / "suspects.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        apply_corrections(index, path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path, index: FaceIndex) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*facefast audit writes it"):
        apply_corrections(index, tmp_path / "suspects.csv")


def test_columns_may_come_in_any_order_and_from_a_spreadsheet(tmp_path: Path, index: FaceIndex) -> None:
    path = tmp_path / "suspects.csv"
    text = "action,note,path,kind,suggested,identity\r\ndrop,mine,ann/0.jpg,wrong_label,,ann\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(apply_corrections(index, path)) == len(index) - 1


def test_what_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another --out"):
        write_corrections(tmp_path / "file" / "suspects.csv", [])


def label(tmp_path: Path, *lines: Label) -> Path:
    path = tmp_path / "labels.csv"
    write_labels(path, lines)
    return path


def test_labels_name_those_who_had_no_name(tmp_path: Path, index: FaceIndex) -> None:
    path = label(tmp_path, Label("9.jpg", "dan", 0.9), Label("ann/0.jpg", "ann", 1.0), Label("bob/0.jpg", "", 0.0))
    named = read_labels(index, path)
    assert named.class_names == ("ann", "bob", "cat", "dan")  # the known numbers stay
    assert people_of(named) == people_of(index) | {"9.jpg": "dan"}


def test_unsure_labels_are_left_out(tmp_path: Path, index: FaceIndex) -> None:
    path = label(tmp_path, Label("9.jpg", "ann", 0.6))
    assert people_of(read_labels(index, path, 0.7)) == people_of(index)
    assert people_of(read_labels(index, path, 0.5))["9.jpg"] == "ann"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([Label("8.jpg", "ann", 1)], "line 2: 8.jpg is no picture of"),
        ([Label("ann/0.jpg", "bob", 1)], "ann/0.jpg is ann already, bob here"),
        ([Label("9.jpg", "bob", 1), Label("9.jpg", "ann", 1)], "line 3: 9.jpg is bob on a line above"),
        ([Label("9.jpg", "bob", 85)], "line 2: the confidence of 9.jpg is 85.0, which lies outside"),
        ([Label("9.jpg", "bob", float("nan"))], "line 2: the confidence of 9.jpg is nan"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path: Path, index: FaceIndex, lines: list[Label], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(index, label(tmp_path, *lines))


def test_the_least_confidence_is_a_fraction(tmp_path: Path, index: FaceIndex) -> None:
    with pytest.raises(ValueError, match="least confidence"):
        read_labels(index, label(tmp_path), 2)


FORMULAS = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''+1",
    "'quoted'",
    "\uff1d1",
    "plain",
    "a=b",
]


def test_cells_are_no_formulas_and_come_back_unchanged(tmp_path: Path) -> None:
    path = write(tmp_path, *(wrong(text, text) for text in FORMULAS))
    assert [line.path for _, line in read_corrections(path)] == FORMULAS
    with open(path, newline="") as file:
        cells = [cell for line in list(csv.reader(file))[1:] for cell in line[1:3]]
    assert not any(cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\uff1d") for cell in cells)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,identity,confidence\n9.jpg,ann,inf\n", "line 2: confidence is 'inf'"),
        ("path,identity,confidence\n9.jpg,ann,1_0\n", "line 2: confidence is '1_0'"),
        ("path,identity,confidence\n9,5.jpg,ann,1\n", "line 2: it has more cells than the 3 columns"),
        ("path,path,identity,confidence\n9.jpg,8.jpg,ann,1\n", "has the column path twice"),
        ("path;identity;confidence\n9.jpg;ann;1\n", "no column .*separated by commas"),
        (
            "path,identity,confidence\n9.jpg,\x1b[31m,1\n",
            "line 2: the identity .* holds a line end or a terminal's code",
        ),
        ("path,identity,confidence\n9.jpg,caf\udce9,1\n", "line 2, is no CSV file in UTF-8"),
        ("path,identity,confidence\n" + "x" * 200_000, "is no CSV .*field larger"),
    ],
)
def test_lines_that_may_be_wrong_are_refused(tmp_path: Path, index: FaceIndex, content: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_labels(index, tmp_path / "labels.csv")


def test_a_pipe_is_not_waited_for(tmp_path: Path, index: FaceIndex) -> None:
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(ValueError, match="no regular file"):
        read_labels(index, tmp_path / "labels.csv")
