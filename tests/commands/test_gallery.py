"""The gallery command: what each verb does and says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from facefast import gallery
from facefast.data import FaceIndex
from facefast.data.divide import divide
from facefast.data.prepare import photographs_of
from facefast.deploy import enrolment, strangers
from facefast.evaluation.thresholds import PairThreshold, Thresholds
from facefast.models import checkpoint
from facefast.recipe import Reading
from facefast.runtime import files
from tests.support import small
from tests.support.pictures import encode, smooth_picture

SMALL = ["--detect=none", "--accept.size=24", "--accept.sharpness=0"]
"""There is no face in most of these pictures, and the tests' models take 32 pixels without edges."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.photographs(tmp_path_factory.mktemp("data") / "people")


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", small.make_model(), root)


def answers(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[dict[str, Any]]:
    looks = SMALL if words[0] == "enroll" else ["--detect=none"] if words[0] in ("search", "verify") else []
    assert gallery.main([*map(str, words), *looks, "--json"]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.fixture
def enrolled(root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "people.gallery"
    (found,) = answers(capsys, "enroll", path, root, "--model", run)
    assert (found["enrolled"], found["num_people"]) == (8, 3)
    (refused,) = found["refused"]
    assert refused["path"].endswith("bo_0002.png") and refused["kind"] == "quality"
    return path


def test_a_person_is_enrolled_found_and_forgotten(
    enrolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "dee.png"
    photo.write_bytes(encode(smooth_picture(small.SIZE, small.SIZE, 99), "PNG"))
    (unknown,) = answers(capsys, "search", enrolled, photo, "--threshold=0.999")
    assert unknown["name"] is None and unknown["nearest"][0]["name"] in small.PEOPLE
    (added,) = answers(capsys, "enroll", enrolled, "dee", photo)  # by the model that the gallery remembers
    assert (added["enrolled"], added["num_people"], added["num_pictures"]) == (1, 4, 9)
    (known,) = answers(capsys, "search", enrolled, photo, "--threshold=0.999", "--top=9")
    assert known["name"] == "dee" and known["nearest"][0] == {"name": "dee", "cosine": 1.0}
    assert len(known["nearest"]) == 4
    (again,) = answers(capsys, "enroll", enrolled, "somebody else", photo)
    assert again["enrolled"] == 0
    assert again["refused"][0]["why"] == "already enrolled as a picture of dee"
    (gone,) = answers(capsys, "forget", enrolled, "dee", "ann")
    assert (gone["forgotten"], gone["num_people"]) == (4, 2)
    (left,) = answers(capsys, "list", enrolled)
    assert left["people"] == {"bo": 2, "cy": 3}


def test_without_json_lines_say_the_same(
    enrolled: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        gallery.main(["search", str(enrolled), str(root / "cy"), "--threshold", "0.9", "--join=mean", "--detect=none"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split("/")[-1].startswith("cy_000") for line in lines)
    assert gallery.main(["list", str(enrolled)]) == 0
    assert "     2  bo\n" in capsys.readouterr().out
    assert gallery.main(["enroll", str(enrolled), str(root), *SMALL]) == 65  # one damaged, others there
    captured = capsys.readouterr()
    assert "bo_0002.png: it could not be decoded" in captured.out
    assert "0 of 9 pictures enrolled (8 by duplicate, 1 by quality)" in captured.out
    assert gallery.main(["forget", str(enrolled), "cy"]) == 0
    assert "3 pictures forgotten" in capsys.readouterr().out


def test_a_search_without_a_threshold_says_so_and_names_nobody(
    enrolled: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = root / "ann" / "ann_0001.png"
    assert gallery.main(["search", str(enrolled), str(photo), "--detect=none"]) == 0
    captured = capsys.readouterr()
    assert "8 pictures of strangers cannot show a rate of 0.01; 300 are needed" in captured.err
    assert "ann_0001.png  nearest: ann 1.000" in captured.out
    (found,) = answers(capsys, "search", enrolled, photo)
    assert found["name"] is None and found["threshold"] is None


def test_pictures_that_cannot_be_read_are_answers_of_their_own(
    enrolled: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answers(capsys, "search", enrolled, root / "bo", "--threshold=0.5")
    assert [answer.get("fault") for answer in found] == [None, "it could not be decoded", None]
    answers(capsys, "search", enrolled, root / "bo" / "bo_0002.png", "--threshold=0.5", code=65)


def test_two_are_verified_by_photographs_and_names(
    enrolled: Path, root: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = root / "ann" / "ann_0001.png", root / "cy" / "cy_0002.png"
    (found,) = answers(capsys, "verify", enrolled, one, one, "--threshold=0.9")
    assert found == {"same": True, "cosine": 1.0, "threshold": 0.9, "why": ""}
    (by_model,) = answers(capsys, "verify", run, one, other, "--threshold=0.9999")
    (by_gallery,) = answers(capsys, "verify", enrolled, one, other, "--threshold=0.9999")
    assert by_model == by_gallery and by_model["same"] is False
    (named,) = answers(capsys, "verify", enrolled, one, "ann")
    assert named["same"] is None and "no threshold for pairs at FMR 0.001; known: none" in named["why"]
    assert gallery.main(["verify", str(enrolled), str(one), "nobody", "--detect=none"]) == 64
    assert "nobody is neither a photograph nor a name in" in capsys.readouterr().err
    assert gallery.main(["verify", str(enrolled), str(one), str(root), "--detect=none"]) == 65
    assert "it holds 9 photographs" in capsys.readouterr().err


def test_the_models_thresholds_go_into_the_gallery(
    root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "run"
    shutil.copytree(run, package, symlinks=True)
    document = Thresholds(pairs=(PairThreshold(0.001, 0.9, 9000, 9000),)).to_json()
    step = package / "checkpoints" / "step-0000001"
    checkpoint.amend(step, {"model": files.read_json(step / "model.json") | {"thresholds": document}})
    path = tmp_path / "g"
    answers(capsys, "enroll", path, root, "--model", package)
    one = root / "ann" / "ann_0001.png"
    (found,) = answers(capsys, "verify", path, one, one)
    assert (found["same"], found["threshold"]) == (True, 0.9)
    (by_model,) = answers(capsys, "verify", package, one, one)
    assert by_model == found


def test_a_run_exports_its_people_by_their_training_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = small.draw(tmp_path / "drawn")
    run = small.save_run(tmp_path / "run", small.make_model(), drawn)
    (found,) = answers(capsys, "enroll", tmp_path / "g", "--model", run, "--from-run")
    assert found["num_people"] == 4
    assert found["enrolled"] + len(found["refused"]) == 8  # half of the pictures are for testing
    (listed,) = answers(capsys, "list", tmp_path / "g")
    assert set(listed["people"]) == set(small.NAMES)


def test_rows_without_a_face_have_no_part_in_the_division_of_a_run_whose_people_are_enrolled(tmp_path: Path) -> None:
    """As in its training: divided with them, pictures kept for testing would be enrolled."""
    model = small.make_model()
    run = small.save_run(tmp_path / "run", model, small.draw(tmp_path / "drawn"))

    def locate(index: FaceIndex, reading: Reading, *, faceless: bool = False) -> FaceIndex:
        return index.select(np.arange(len(index)) % 5 != 0)

    recipe = small.make_recipe(tmp_path / "drawn", model)
    trained = divide(photographs_of(recipe, Reading(1), locate), recipe, recipe.phases[-1]).train
    assert enrolment.people_of_run(run, locate, 1).paths.tolist() == trained.paths.tolist()


def test_pictures_that_left_bring_none_kept_for_testing_into_a_gallery(tmp_path: Path) -> None:
    model = small.make_model()
    root = small.draw(tmp_path / "drawn")
    run = small.save_run(tmp_path / "run", model, root)
    recipe = small.make_recipe(root, model)
    index = photographs_of(recipe, Reading(1), None)
    index.save(run / "index.npz")
    trained = divide(index, recipe, recipe.phases[-1]).train

    def locate(index: FaceIndex, reading: Reading, *, faceless: bool = False) -> FaceIndex:
        return index.select(index.paths != trained.paths[0])

    found = enrolment.people_of_run(run, locate, 1)
    assert found.paths.tolist() == trained.paths.tolist()[1:]


def test_a_list_says_where_nobody_looked_for_people_under_two_names(
    enrolled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers(capsys, "list", enrolled)[0]["doubles"] == []
    for module in (gallery, strangers):
        monkeypatch.setattr(module, "OWN_ROWS", 2)
    assert answers(capsys, "list", enrolled)[0]["doubles"] is None
    assert gallery.main(["list", str(enrolled)]) == 0
    assert "nobody looked for people under two names: " in capsys.readouterr().out


def test_small_pictures_are_refused(root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["enroll", str(tmp_path / "g"), "cy", str(root / "cy"), "--model", str(run), "--detect=none"]
    assert gallery.main([*words, "--accept.size=33"]) == 65
    assert "its face has 32 pixels on a side, 33 are needed" in capsys.readouterr().err


def test_a_blurred_picture_is_refused_and_its_sharp_neighbour_is_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sharp = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8))
    (tmp_path / "dee").mkdir()
    sharp.save(tmp_path / "dee" / "1.png")
    sharp.filter(ImageFilter.GaussianBlur(6)).save(tmp_path / "dee" / "2.png")
    words = ["enroll", str(tmp_path / "g"), "dee", str(tmp_path / "dee"), "--model", str(run), "--detect=none"]
    assert gallery.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["enrolled"] == 1
    (refused,) = found["refused"]
    assert refused["path"].endswith("2.png") and "it is blurred: a sharpness of" in refused["why"]
    assert gallery.main([*words, "--accept.sharpness=0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_pictures"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["enroll", "G"], "enroll takes NAME and photographs"),
        (["enroll", "G", "x", "--from-run"], "enroll takes NAME and photographs"),
        (["search", "G"], "search takes photographs"),
        (["verify", "G", "a"], "verify takes two photographs or names"),
        (["list", "G", "a"], "list takes nothing more"),
        (["forget", "G"], "forget takes names of people"),
        (["list", "G", "--top=3"], "--top has no effect on list"),
        (["search", "G", "a", "--from-run"], "--from-run has no effect on search"),
        (["verify", "G", "a", "b", "--fpir=0.1"], "--fpir has no effect on verify"),
        (["search", "G", "a", "--fpir=0.1", "--threshold=0.5"], "--threshold takes the place of"),
        (["search", "G", "a", "--top=0"], "top is 0; it must lie in"),
        (["search", "NOWHERE", "a"], "there is no gallery NOWHERE"),
        (["forget", "G", "nobody"], "1 of 1 names are not in"),
        (["search", "G", "/no/photo.png"], "/no/photo.png does not exist"),
        (["enroll", "NEW", "ann", "/no/photo.png"], "nothing tells which model makes the embeddings; give --model"),
    ],
)
def test_what_makes_no_sense_ends_with_64(
    words: list[str], message: str, enrolled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gallery.main([str(enrolled) if word == "G" else word for word in words]) == 64
    assert message in capsys.readouterr().err


def test_another_model_is_refused(
    enrolled: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = small.save_run(tmp_path / "other", small.make_model(template="none"), root)
    for words in (["search", enrolled, root / "ann"], ["enroll", enrolled, "ann", root / "ann"]):
        assert gallery.main([*map(str, words), "--model", str(other)]) == 64
        assert "was enrolled with another model" in capsys.readouterr().err


def test_pictures_without_a_face_are_refused_and_are_answers_of_their_own(
    run: Path, enrolled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(encode(smooth_picture(240, 320, seed), "PNG"))
    photos = [str(tmp_path / f"{seed}.png") for seed in range(3)]
    assert gallery.main(["enroll", str(tmp_path / "g"), "ann", *photos, "--model", str(run)]) == 65
    assert "none of 3 pictures can be enrolled (first: no face was found)" in capsys.readouterr().err
    assert gallery.main(["search", str(enrolled), *photos, "--threshold=0.1", "--json"]) == 65
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["fault"] for answer in found] == ["no face was found"] * 3
