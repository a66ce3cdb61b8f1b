"""Contact sheets: where photographs and text stand on them, what a strip shows, and what cannot be shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from facefast.data import FaceIndex
from facefast.labels import sheets
from facefast.labels.doubts import Doubt
from facefast.labels.sheets import GAP, LINE, PAGE, TILE, Strip
from facefast.labels.suspects import Suspect, Suspects
from facefast.runtime.exits import StorageError
from tests.support.pictures import encode, garbled_png
from tests.support.points import doubtful_people

RED, GREEN, GREY, WHITE = (200, 0, 0), (0, 200, 0), (211, 211, 211), (255, 255, 255)
NOWHERE = FaceIndex.build("photos", [b"gone.jpg"], [0], ("ann",))


@pytest.fixture
def index(tmp_path: Path) -> FaceIndex:
    """A red square, a wide green picture, one that cannot be decoded, one that is not there."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size, color in (("red.png", (200, 200), RED), ("green.png", (300, 100), GREEN)):
        (folder / name).write_bytes(encode(Image.new("RGB", size, color), "PNG"))
    (folder / "garbled.png").write_bytes(garbled_png())
    names = [b"red.png", b"green.png", b"garbled.png", b"gone.png"]
    return FaceIndex.build(folder, names, [0, 0, 1, 1], ("ann", "bo"))


def tiles(sheet: Image.Image, x: int, y: int) -> NDArray[np.uint8]:
    """The pixels [TILE - 2, TILE - 2, 3] of the photograph whose tile begins at x, below two lines of text at y."""
    top = y + 2 * LINE
    return np.asarray(sheet.crop((x + 1, top + 1, x + TILE - 1, top + TILE - 1)))


def test_photographs_stand_side_by_side_and_groups_apart(index: FaceIndex) -> None:
    sheet = sheets.draw_sheet([(0, 0, Strip("", "", [[0, 0], [0]]))], index)
    assert sheet.size == (PAGE[0], TILE + 2 * LINE)
    for x in (0, TILE, 2 * TILE + GAP):
        assert (tiles(sheet, x, 0) == RED).all()
    between = np.asarray(sheet.crop((2 * TILE, 2 * LINE, 2 * TILE + GAP, 2 * LINE + TILE)))
    assert (between == WHITE).all()


def test_a_photograph_is_shown_whole_in_its_own_proportions(index: FaceIndex) -> None:
    sheet = sheets.draw_sheet([(0, 0, Strip("", "", [[1]]))], index)
    shown = tiles(sheet, 0, 0)
    lines = np.flatnonzero((shown == GREEN).all((1, 2)))
    side = TILE - 2
    assert abs(len(lines) - side / 3) <= 1  # three times as wide as high
    assert abs(lines[0] - (side - 1 - lines[-1])) <= 1  # in the middle
    assert (np.delete(shown, lines, axis=0) == GREY).all()


def test_a_photograph_that_cannot_be_shown_is_grey_and_the_others_are_shown(index: FaceIndex) -> None:
    sheet = sheets.draw_sheet([(0, 0, Strip("", "", [[2, 3, 0]]))], index)
    assert (tiles(sheet, 0, 0) == GREY).all()
    assert (tiles(sheet, TILE, 0) == GREY).all()
    assert (tiles(sheet, 2 * TILE, 0) == RED).all()


def ink(sheet: Image.Image, line: int, y: int = 0) -> NDArray[np.int64]:
    """Columns of a sheet on which a line of text has dark pixels."""
    part = np.asarray(sheet.convert("L").crop((0, y + line * LINE, sheet.width, y + (line + 1) * LINE)))
    return np.flatnonzero((part < 128).any(0))


@pytest.mark.parametrize("letter", ["w", "i", "é", "李", "\t"])
def test_a_text_never_runs_into_the_next_strip(letter: str) -> None:
    """Long names of files are usual; letters of any width and of any script are cut where the strip ends."""
    strip = Strip(letter * 5000, "short", [[0, 0]])
    sheet = sheets.draw_sheet([(0, 0, strip)], NOWHERE)
    title = ink(sheet, 0)
    assert title.max(initial=0) < strip.width
    if letter in "wi":
        assert title.max() > strip.width - GAP - 12  # and no earlier
    assert 0 < ink(sheet, 1).max() < strip.width


@pytest.mark.parametrize("name", ["an\nn", "\x1b[31m", "\udcff", "\u202e", "", " ", "\0", "\U0001f600" * 50])
def test_a_text_of_any_letters_can_be_drawn(name: str, index: FaceIndex) -> None:
    sheet = sheets.draw_sheet([(0, 0, Strip(name, f"sure: {name}", [[0]]))], index)
    assert (tiles(sheet, 0, 0) == RED).all()


def test_each_line_of_text_stands_above_its_photographs(index: FaceIndex) -> None:
    row = TILE + 2 * LINE
    sheet = sheets.draw_sheet([(0, 0, Strip("title", "", [[0]])), (0, row, Strip("", "text", [[0]]))], index)
    assert [len(ink(sheet, line, y)) > 0 for y in (0, row) for line in (0, 1)] == [True, False, False, True]
    assert (tiles(sheet, 0, row) == RED).all()


def places(strips: list[Strip]) -> Iterator[list[tuple[int, int, Strip]]]:
    """Each page's strips and where they stand, in order."""
    seen = []
    for page in sheets._pages(strips):
        seen += [strip for _, _, strip in page]
        yield page
    assert all(one is other for one, other in zip(seen, strips, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_strips_of_any_width_stand_in_order_and_never_on_each_other(seed: int) -> None:
    generator = np.random.default_rng(seed)
    strips = [
        Strip(str(k), "", [[0] * int(n) for n in generator.integers(1, 5, generator.integers(1, 4))])
        for k in range(200)
    ]
    for page in places(strips):
        boxes = [(x, y, x + strip.width, y + TILE + 2 * LINE) for x, y, strip in page]
        assert boxes[0][:2] == (0, 0)
        assert all(right <= PAGE[0] or x == 0 for x, _, right, _ in boxes)  # one that is too wide has its own line
        assert max(y for _, y, _, _ in boxes) < PAGE[1]
        for one, other in zip(boxes, boxes[1:], strict=False):
            assert (other[0] == one[2] and other[1] == one[1]) or (other[0] == 0 and other[1] == one[3])


def test_a_strip_wider_than_a_page_has_a_line_and_a_sheet_that_hold_it() -> None:
    wide, small = Strip("wide", "", [[0] * 20]), Strip("small", "", [[0]])
    (page,) = places([small, wide, small])
    assert [(x, y // (TILE + 2 * LINE)) for x, y, _ in page] == [(0, 0), (0, 1), (0, 2)]
    assert sheets.draw_sheet(page, NOWHERE).width == wide.width > PAGE[0]
    (page,) = places([wide, small])
    assert [y for _, y, _ in page] == [0, TILE + 2 * LINE]


def test_sheets_are_filled_from_left_to_right_and_old_ones_go(tmp_path: Path) -> None:
    strips = [Strip("a title " * 40, "text", [[0, 0]])] * 120  # a file that is not there is a grey tile
    written = sheets.write_sheets(tmp_path, "duplicate", strips, NOWHERE)
    assert len(written) > 1
    with Image.open(written[0]) as first:
        assert first.width == PAGE[0]
        assert abs(first.height - PAGE[1]) <= TILE + 2 * LINE
    assert sheets.write_sheets(tmp_path, "duplicate", strips[:1], NOWHERE) == written[:1]
    assert list(tmp_path.iterdir()) == written[:1]


def test_without_a_finding_there_is_no_sheet_and_none_of_an_earlier_time(tmp_path: Path) -> None:
    strip = Strip("title", "text", [[0]])
    sheets.write_sheets(tmp_path, "merge", [strip], NOWHERE)
    others = sheets.write_sheets(tmp_path, "duplicate", [strip], NOWHERE)
    (tmp_path / "merge.jpg").touch()
    (tmp_path / "merge_notes.jpg").touch()
    assert sheets.write_sheets(tmp_path, "merge", [], NOWHERE) == []
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "merge.jpg", tmp_path / "merge_notes.jpg"])


def test_a_folder_that_cannot_be_written_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write contact sheets to .*file.*; choose another --out"):
        sheets.write_sheets(tmp_path / "file", "merge", [], NOWHERE)
    (tmp_path / "out" / "merge_01.jpg" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match="choose another --out"):
        sheets.write_sheets(tmp_path / "out", "merge", [Strip("", "", [[0]])], NOWHERE)


# What a strip shows.


def test_a_strip_shows_the_suspect_its_own_identity_and_the_suggested_one() -> None:
    index, suspects, unit = doubtful_people()
    found = sheets.strips(index, unit, suspects, "wrong_label", 5)
    assert len(found) == 5
    for strip, suspect in zip(found, suspects.of("wrong_label"), strict=False):
        first, own, suggested = strip.groups
        assert first == [suspect.row]
        assert set(index.labels[own].tolist()) == {suspect.label}
        assert set(index.labels[suggested].tolist()) == {int(suspects.doubt.suggested[suspect.row])}
        assert suspect.row not in own
        assert len(own) <= sheets.SHOWN >= len(suggested)
    (strip,) = sheets.strips(index, unit, suspects, "merge", 5)
    assert "person 30 = person 0?" in strip.title
    assert [set(index.labels[group].tolist()) for group in strip.groups] == [{30}, {0}]


def hand_made(suspects: list[Suspect], wrong: list[float], suggested: int = -1) -> tuple[FaceIndex, Suspects]:
    """Five pictures of ann, one of bo and one of nobody, of which `wrong` tells the doubts."""
    index = FaceIndex.build("photos", [b"dir/%d.jpg" % k for k in range(7)], [0] * 5 + [1, -1], ("ann", "bo"))
    values = np.array(wrong, np.float32)
    doubt = Doubt(values, values * 0, np.full(7, suggested), values * 0, values * 0, 0.0)
    return index, Suspects(tuple(suspects), doubt, ())


def embeddings() -> NDArray[np.float32]:
    """Seven directions in a plane, each turned a little further from the first."""
    angles = 0.1 * np.arange(7)
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def suspect(**changes: object) -> Suspect:
    found = Suspect("wrong_label", 0, 0, -1, -1, "drop", 0.876, 0.25, 0.5)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def test_pictures_beyond_doubt_come_first_and_then_those_most_like_the_suspect() -> None:
    index, suspects = hand_made([suspect()], [0.9, 0.5, 0.1, 0.1, 0.1, 0, 0])
    (strip,) = sheets.strips(index, embeddings(), suspects, "wrong_label", 9)
    assert strip.groups == [[0], [2, 3, 4, 1]]  # 1 is the most like it, and in doubt itself
    assert strip.title == "dir/0.jpg: ann (0.25)"
    assert strip.text == "88% drop, suggested unknown"


def test_the_nearest_identity_is_shown_even_where_nobody_is_suggested() -> None:
    index, suspects = hand_made([suspect()], [0.9, 0, 0, 0, 0, 0, 0], suggested=1)
    (strip,) = sheets.strips(index, embeddings(), suspects, "wrong_label", 9)
    assert strip.groups[2] == [5]
    assert strip.text == "88% drop, suggested unknown, nearest bo (0.50)"


def test_an_identity_of_one_picture_has_nothing_to_stand_beside_it(tmp_path: Path) -> None:
    index, suspects = hand_made([suspect(row=5, label=1)], [0, 0, 0, 0, 0, 0.9, 0])
    (strip,) = sheets.strips(index, embeddings(), suspects, "wrong_label", 9)
    assert strip.groups == [[5], []]
    assert len(sheets.write_sheets(tmp_path, "wrong_label", [strip], index)) == 1


def test_a_copy_stands_beside_the_picture_that_is_kept_under_both_names() -> None:
    copies = [
        suspect(kind="duplicate", row=3, other_row=5, suggested=1, confidence=1.0),
        suspect(kind="duplicate", row=6, label=-1, other_row=2, suggested=0, confidence=0.5),
    ]
    index, suspects = hand_made(copies, [0.0] * 7)
    one, two = sheets.strips(index, embeddings(), suspects, "duplicate", 9)
    assert (one.groups, two.groups) == ([[3, 5]], [[6, 2]])
    assert (one.title, one.text) == ("3.jpg (ann)", "100% drop: 5.jpg (bo)")
    assert (two.title, two.text) == ("6.jpg (unknown)", "50% drop: 2.jpg (ann)")


def test_no_more_findings_are_shown_than_asked_for_and_only_of_one_kind() -> None:
    index, suspects = hand_made([suspect(row=row) for row in range(3)], [0.9] * 7)
    assert [strip.groups[0] for strip in sheets.strips(index, embeddings(), suspects, "wrong_label", 2)] == [[0], [1]]
    assert sheets.strips(index, embeddings(), suspects, "wrong_label", 0) == []
    assert sheets.strips(index, embeddings(), suspects, "merge", 9) == []
