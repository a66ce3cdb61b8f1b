"""Annotated photographs: where they go, what is drawn on them in which letters, and the page of them."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from facefast import predict
from facefast.deploy import fonts
from facefast.deploy.annotate import KNOWN, LIST, STRANGE, Annotated, annotate, draw, places, shorten
from facefast.runtime import files
from facefast.runtime.terminal import plain
from tests.support import small
from tests.support.browser import Watched
from tests.support.pictures import encode, garbled_png, smooth_picture
from tests.support.reviews import HOSTILE

SCRIPTS = {
    "Latin": "José Őz Łukasz Şule Đorđe",
    "Cyrillic": "Борис Ёлкин",
    "Greek": "Άννα Παππά",
    "Hebrew": "שלום כהן",
    "Arabic": "محمد علي",
    "Chinese": "王小明",
    "Japanese": "山田さくら",
    "Korean": "김철수",
}


def grey(width: int = 640, height: int = 480) -> Image.Image:
    return Image.new("RGB", (width, height), (120, 120, 120))


def face(name: str, box: tuple[float, float, float, float] | None = None) -> dict[str, Any]:
    told: dict[str, Any] = {"names": [name], "probabilities": [0.97], "score": 0.6}
    return told | ({"box": list(box)} if box else {})


def stranger(box: tuple[float, float, float, float]) -> dict[str, Any]:
    return {"names": ["unknown"], "probabilities": [None], "nearest": ["ann"], "score": 0.2, "box": list(box)}


def is_colour(picture: Image.Image, colour: str) -> np.ndarray[Any, Any]:
    """[H, W] where a picture has about this colour."""
    wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])
    return np.asarray(np.abs(np.asarray(picture, np.int64) - wanted).max(2) < 40)


@pytest.fixture
def fontless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without any font."""
    monkeypatch.setattr(fonts, "installed", tuple)
    fonts.line.cache_clear()
    yield
    fonts.line.cache_clear()


# ---------------------------------------------------------------------------------------------
# Letters


@pytest.mark.parametrize("script", SCRIPTS)
def test_letters_of_every_script_are_drawn_by_a_font_that_has_them(script: str) -> None:
    line = fonts.line(SCRIPTS[script])
    assert not line.lost and all(run.face is not None for run in line.runs)
    for run in line.runs:
        assert run.face is not None
        missing = [c for c in run.text if not c.isspace() and ord(c) not in run.face.letters()]
        assert not missing
    assert line.width(24) > 40


@pytest.mark.parametrize("name", ["שלום", "محمد"])
def test_hebrew_and_arabic_run_from_right_to_left(name: str) -> None:
    def inked(text: str) -> np.ndarray[Any, Any]:
        picture = Image.new("L", (400, 60))
        drawn = fonts.line(text)
        drawn.draw(ImageDraw.Draw(picture), 10, 45, 32, 255)  # type: ignore[arg-type]
        columns = np.flatnonzero(np.asarray(picture).max(0) > 100)
        return np.asarray(picture)[:, columns.min() : columns.max() + 1]

    # The first letter, alone, stands at the right end of the word.
    whole, first = inked(name), inked(name[0])
    right = whole[:, -first.shape[1] :]
    left = whole[:, : first.shape[1]]
    if name == "שלום":  # its letters keep their form
        assert np.abs(right.astype(int) - first).mean() < np.abs(left.astype(int) - first).mean() / 2
    else:  # its letters are joined: no column between them is empty
        assert whole.max(0).min() > 0


def test_a_letter_that_no_font_has_is_drawn_as_its_number_and_told() -> None:
    lonely = next(chr(k) for k in range(0x10000, 0x1F000) if unicodedata.category(chr(k)) == "Lo" and not has(chr(k)))
    line = fonts.line(f"ab{lonely}")
    assert line.lost == lonely
    assert "".join(run.text for run in line.runs) == f"ab\\U{ord(lonely):08x}"
    done = Annotated(Path())
    draw(grey(), {"faces": [face(f"ab{lonely}")]}, done)
    assert done.lost == {f"ab{lonely}": lonely}
    assert "no font here has" in done.said()[0] and "pip install 'facefast[fonts]'" in done.said()[0]


def has(letter: str) -> bool:
    return any(ord(letter) in one.letters() for one in fonts.installed())


def test_without_any_font_ascii_is_drawn_and_the_rest_told(fontless: None) -> None:
    assert fonts.line("Ann").lost == ""
    line = fonts.line("José 王")
    assert line.lost == "é王"
    assert "".join(run.text for run in line.runs) == "Jos\\u00e9 \\u738b"
    assert line.width(20) > 0


def test_where_letters_cannot_be_joined_those_that_need_it_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "shapes", lambda: False)
    fonts.line.cache_clear()
    line = fonts.line("Ann שלום")
    fonts.line.cache_clear()
    assert line.lost == "שלום" and "\\u05e9" in "".join(run.text for run in line.runs)
    done = Annotated(Path(), lost={"שלום": "שלום"})
    assert "libfribidi0" in done.said()[0]


def test_a_name_in_scripts_that_no_single_font_has_is_drawn_by_several() -> None:
    line = fonts.line("王小明 Борис שלום 김")
    assert len({run.face for run in line.runs}) > 1 and not line.lost
    assert "".join(run.text for run in line.runs) == "王小明 Борис שלום 김"


def test_codes_in_a_name_are_shown_as_codes() -> None:
    drawn = "".join(run.text for run in fonts.line("a\u202eb\nc\x1b").runs)
    assert drawn == "a\\u202eb\\nc\\x1b"


def test_a_damaged_font_is_one_without_letters(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"\0\1\0\0" + b"x" * 200)
    assert fonts.Face(str(tmp_path / "broken.ttf")).letters() == frozenset()


# ---------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("size", [(32, 32), (90, 640), (640, 90), (640, 480), (4000, 3000)])
def test_text_is_readable_at_any_size_and_inside_the_picture(size: tuple[int, int]) -> None:
    width, height = size
    done = Annotated(Path())
    before = grey(*size)
    drawn = draw(before, {"faces": [face("Ann", (width * 0.3, 0, width * 0.4, height * 0.5))]}, done)
    assert max(drawn.size) >= 640 and drawn.width / width == drawn.height / height
    plate = is_colour(drawn, KNOWN[0])
    rows = np.flatnonzero(plate.sum(1) > 20)
    letters = is_colour(drawn, KNOWN[1])
    inked = np.flatnonzero(letters.any(1))
    assert len(inked) >= 8  # pixels that the letters are high
    assert inked.min() > rows.min() and inked.max() <= rows.max()  # wholly on their plate
    assert before.getcolors() == [(width * height, (120, 120, 120))]  # the photograph itself is as it was


def test_a_stranger_is_unknown_in_another_colour_and_with_a_score() -> None:
    done = Annotated(Path())
    drawn = draw(grey(), {"faces": [stranger((200, 200, 100, 100))]}, done)
    assert is_colour(drawn, STRANGE[0]).sum() > 500 and not is_colour(drawn, KNOWN[0]).any()
    assert is_colour(drawn, STRANGE[0])[200:300, 200].mean() > 0.9  # the left side of the box


def test_plates_of_faces_side_by_side_do_not_lie_over_each_other() -> None:
    done = Annotated(Path())
    faces = [face("somebody with a name", (100 + 60 * k, 200, 50, 50)) for k in range(4)]
    together = is_colour(draw(grey(), {"faces": faces}, done), KNOWN[1]).sum()
    alone = sum(is_colour(draw(grey(), {"faces": [one]}, done), KNOWN[1]).sum() for one in faces)
    assert together == alone  # every letter can be seen


@pytest.mark.parametrize("box", [(-50, -50, 80, 80), (600, 440, 100, 100), (-10, -10, 700, 500), (700, 500, 5, 5)])
def test_a_box_that_leaves_the_picture_is_drawn_at_its_edge(box: tuple[float, float, float, float]) -> None:
    done = Annotated(Path())
    drawn = draw(grey(), {"faces": [face("Ann", box)]}, done)
    assert drawn.size == (640, 480)
    assert is_colour(drawn, KNOWN[1]).any()


def test_a_name_longer_than_its_room_is_shortened_and_told() -> None:
    done = Annotated(Path())
    name = "Ã" * 300
    draw(grey(), {"faces": [face(name, (10, 100, 50, 50))]}, done)
    assert done.shortened == {name}
    assert "end in …" in done.said()[0]
    line = shorten("e\u0301" * 100, 200, 20)
    assert line.width(20) <= 200
    assert set("".join(run.text for run in line.runs)) == {"é", "…"}


# ---------------------------------------------------------------------------------------------
# Where they go


def test_same_names_in_other_folders_or_with_other_endings_are_kept_apart(tmp_path: Path) -> None:
    for name in ("one/a.jpg", "one/deep/a.jpg", "one/a.png", "one/A.JPG", "two/a.jpg", "b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode(smooth_picture(32, 32, 0), "PNG"))
    given = [tmp_path / "one", tmp_path / "two", tmp_path / "b.jpg", tmp_path / "b.jpg"]
    where = places(given, tmp_path / "out")
    assert len(where) == 6
    assert len({str(path).casefold() for path in where.values()}) == 6
    assert where[str(tmp_path / "one/deep/a.jpg")] == Path("deep/a.jpg")
    assert all(path.suffix.lower() == ".jpg" for path in where.values())


def test_no_photograph_is_ever_replaced(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(encode(smooth_picture(32, 32, 0), "JPEG"))
    for inside in (photos, photos / "deeper"):
        with pytest.raises(ValueError, match="would be taken for the next time"):
            places([photos], inside)
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(ValueError, match="would be taken for the next time"):
        places([photos], tmp_path / "link")
    with pytest.raises(ValueError, match="is there, and is none of an earlier"):
        places([photos / "a.jpg"], photos)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match="is there, and is none of an earlier"):
        places([photos], other)
    assert (other / "a.jpg").read_bytes() == b"somebody's"
    out = tmp_path / "out"
    for _ in range(2):  # what it wrote itself it replaces
        answers = [{"path": str(photos / "a.jpg"), "faces": [face("Ann")]}]
        assert annotate(answers, places([photos], out), out, page=True).written == ["a.jpg"]


# ---------------------------------------------------------------------------------------------
# The command and the page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small.make_model(classes=(*HOSTILE[:3], "王小明"))
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", model, Path("nowhere"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep <b>").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "deep <b>/a.png", 'it\'s "q" #1%20.png', "two\nlines.png")):
        (folder / name).write_bytes(encode(smooth_picture(small.SIZE, small.SIZE, seed), "PNG"))
    (folder / "broken.png").write_bytes(garbled_png())
    upright = Image.fromarray(smooth_picture(20, 60, 9))
    turned = Image.Exif()
    turned[0x0112] = 6
    upright.save(folder / "turned.jpg", exif=turned)
    return folder


def test_the_command_writes_pictures_beside_its_answers_and_leaves_the_photographs(
    tmp_path: Path, run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    given = [str(run), str(photos), "--detect", "none", "--threshold", "none", "--annotate", str(out), "--json"]
    assert predict.main(given) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 6
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*.jpg"))
    assert written == ["a.png.jpg", "deep <b>/a.png.jpg", 'it\'s "q" #1%20.png.jpg', "turned.jpg", "two\nlines.png.jpg"]
    assert not (out / "index.html").exists()
    with Image.open(out / "turned.jpg") as picture:
        assert picture.width / picture.height == 20 / 60 and not picture.getexif()
    assert predict.main([*given, "--html"]) == 0
    assert (out / "index.html").exists()


def test_options_that_have_no_effect_or_would_do_harm_are_refused(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([str(run), str(photos), "--html"]) == 64
    assert "--html has no effect without --annotate" in capsys.readouterr().err
    assert predict.main([str(run), str(photos), "--annotate", str(photos)]) == 64
    assert "give a folder elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("late", [False, True])
def test_a_place_that_cannot_be_written_is_said_to_be_that_of_annotate(
    run: Path, tmp_path: Path, photos: Path, late: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if late:
        (out / "a.png.jpg").mkdir(parents=True)
        files.write_json(out / LIST, {"written": ["a.png.jpg"]})
    else:
        out.write_text("a file")
    given = [str(run), str(photos), "--detect", "none", "--threshold", "none", "--annotate", str(out)]
    assert predict.main(given) == 74
    told = capsys.readouterr().err
    assert "choose another --annotate" in told and "--out" not in told


@pytest.mark.browser
def test_the_page_shows_every_photograph_and_names_as_text(
    look: Callable[..., Watched], tmp_path: Path, run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [str(run), str(photos), "--detect", "none", "--threshold", "none", "--annotate", str(out), "--html"]
    assert predict.main(given) == 0
    said = capsys.readouterr().out
    os.rename(out, tmp_path / "moved")  # the folder is whole by itself
    watched = look(tmp_path / "moved" / "index.html")
    page = watched.page
    page.wait_for_load_state("networkidle")
    assert page.locator("article").count() == 6
    sizes = page.evaluate("[...document.images].map((image) => { image.loading = 'eager'; return image.decode() })")
    assert len(sizes) == 5
    assert page.evaluate("Promise.all([...document.images].map((i) => i.decode())).then(() => true)")
    shown = page.text_content("main") or ""
    assert "deep <b>/a.png" in shown and "two\\nlines.png" in shown
    assert any(plain(name) in said and plain(name) in shown for name in (*HOSTILE[:3], "王小明"))
    assert "\u202e" not in shown and page.locator("img[src='x'], h2 b").count() == 0
    watched.require_accessible()
    watched.photograph(tmp_path / "seen", "annotated")
