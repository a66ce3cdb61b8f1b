"""Drawn faces: the same files from the same spec, CelebA's layout, landmarks and attributes that are true."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from facefast.data import read_index
from facefast.data.drawn import synthetic
from facefast.data.drawn.drawing import draw
from facefast.data.drawn.persona import Identity, Shot, draw_identity, draw_shot
from facefast.data.drawn.synthetic import DrawnSpec, draw_face, main, write

SPEC = DrawnSpec(identities=(4, 2, 3), pictures=4, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("drawn") / "faces", SPEC, processes=1, progress=False)


def digests(root: Path) -> dict[str, str]:
    """Hash of every file of a set."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(root: Path, name: str) -> list[list[str]]:
    return [line.split() for line in (root / name).read_text().splitlines()]


def sitting(identity: int, **changes: Any) -> tuple[Identity, Shot]:
    """A passport picture: no nuisance, nothing worn, and then the changes."""
    who = draw_identity(0, identity)
    plain: dict[str, Any]
    plain = {"glasses": False, "sunglasses": False, "hat": False, "bangs": False, "beard": 0.0, "moustache": 0.0}
    shot = dataclasses.replace(draw_shot(who, 0, identity, 0, nuisance=0.0), **plain)
    return who, dataclasses.replace(shot, **changes)


def patch(picture: NDArray[np.uint8], place: NDArray[np.float32], half: int = 1) -> NDArray[np.float64]:
    """Mean colour of a small square, RGB."""
    x, y = (int(value) for value in place)
    return np.asarray(picture[y - half : y + half + 1, x - half : x + half + 1].mean(axis=(0, 1)))


def redness(picture: NDArray[np.uint8], place: NDArray[np.float32]) -> float:
    """Red over green of a small square."""
    red, green, _ = patch(picture, place)
    return float(red / green)


def test_the_number_of_processes_does_not_change_a_byte(root: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again", SPEC, processes=2, progress=False)
    assert digests(again) == digests(root)


def test_a_picture_is_drawn_the_same_alone_and_in_a_larger_set() -> None:
    larger = dataclasses.replace(SPEC, identities=(50, 0, 9), pictures=30)
    draw_face(larger, 7, 29)
    alone, landmarks, attributes = draw_face(larger, 2, 3)
    first, same_landmarks, same_attributes = draw_face(SPEC, 2, 3)
    assert np.array_equal(alone, first)
    assert np.array_equal(landmarks, same_landmarks)
    assert attributes == same_attributes


def test_other_seeds_identities_and_pictures_give_other_faces() -> None:
    other = dataclasses.replace(SPEC, seed=4)
    pictures = [draw_face(SPEC, 0, 0), draw_face(SPEC, 0, 1), draw_face(SPEC, 1, 0), draw_face(other, 0, 0)]
    assert len({pixels.tobytes() for pixels, _, _ in pictures}) == 4


def test_the_lists_are_celebas_and_say_what_was_drawn(root: Path) -> None:
    names = [f"{number:06d}.jpg" for number in range(1, 37)]
    assert sorted(path.name for path in (root / "img_align_celeba").iterdir()) == names
    identities, partition = lines(root, "identity_CelebA.txt"), lines(root, "list_eval_partition.txt")
    assert identities == [[name, str(k // 4 + 1)] for k, name in enumerate(names)]
    people = [
        {person for (_, person), (_, part) in zip(identities, partition, strict=True) if part == p} for p in "012"
    ]
    assert [len(group) for group in people] == [4, 2, 3], "nobody is in two partitions"

    (count,), header, *rows = lines(root, "list_landmarks_align_celeba.txt")
    assert count == "36" and header[:3] == ["lefteye_x", "lefteye_y", "righteye_x"] and len(header) == 10
    (count,), attribute_names, *signs = lines(root, "list_attr_celeba.txt")
    assert count == "36" and attribute_names == sorted(attribute_names)
    for k, (row, sign) in enumerate(zip(rows, signs, strict=True)):
        pixels, landmarks, attributes = draw_face(SPEC, k // 4, k % 4)
        assert row[0] == sign[0] == names[k]
        assert np.abs(np.array(row[1:], float).reshape(5, 2) - landmarks).max() <= 0.5
        assert dict(zip(attribute_names, sign[1:], strict=True)) == {
            name: "1" if value else "-1" for name, value in attributes.items()
        }
        with Image.open(root / "img_align_celeba" / names[k]) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (178, 218))
            assert np.abs(np.asarray(picture, float) - pixels).mean() < 8


def test_the_celeba_reader_reads_them(root: Path) -> None:
    index = read_index(root)
    assert len(index) == 36 and index.num_classes == 9
    assert np.bincount(index.splits).tolist() == [16, 8, 12]
    assert index.landmarks is not None and np.isfinite(index.landmarks).all()


@pytest.mark.parametrize("identity", range(6))
def test_landmarks_stay_on_the_features_when_the_head_turns(identity: int) -> None:
    for yaw, pitch, roll in ((0.0, 0.0, 0.0), (0.45, 0.0, 0.15), (-0.45, 0.15, 0.0), (0.2, -0.2, -0.2)):
        who, shot = sitting(identity, yaw=yaw, pitch=pitch, roll=roll, lids=1.1, lipstick=0.9, makeup=(0.8, 0.05, 0.1))
        picture, landmarks = draw(who, shot)
        left_eye, right_eye, nose, left_mouth, right_mouth = landmarks
        assert left_eye[0] < nose[0] < right_eye[0] and left_mouth[0] < right_mouth[0]
        down = (left_mouth + right_mouth - left_eye - right_eye) / 2 / 44.5
        for eye in (left_eye, right_eye):
            assert patch(picture, eye).mean() < 0.75 * patch(picture, eye + 13 * down).mean(), "the pupil is dark"
        chin = redness(picture, (left_mouth + right_mouth) / 2 + 16 * down)
        assert redness(picture, (left_mouth + right_mouth) / 2 + 2.5 * down) > 1.15 * chin, "the lips are painted"
        for corner, middle in ((left_mouth, right_mouth), (right_mouth, left_mouth)):
            inwards = (middle - corner) / 33
            inside, outside = corner + 5 * inwards + down, corner - 5 * inwards
            assert redness(picture, inside) > 1.1 * redness(picture, outside), "and end at the corners"


@pytest.mark.parametrize(
    ("changes", "top", "bottom"),
    [
        ({"glasses": True}, -30, 30),
        ({"sunglasses": True}, -30, 30),
        ({"hat": True}, -110, 8),
        ({"beard": 0.8}, 2, 90),
        ({"moustache": 0.8}, 20, 60),
        ({"lipstick": 0.9}, 28, 65),
        ({"smile": 1.0}, -12, 80),
        ({"mouth_open": 6.0}, 5, 100),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_attribute_changes_its_part_of_the_face_only(changes: dict[str, object], top: int, bottom: int) -> None:
    for identity in (0, 3, 8):
        before, landmarks = draw(*sitting(identity, smile=0.0, mouth_open=0.0, lipstick=0.0))
        kept = {"smile": 0.0, "mouth_open": 0.0, "lipstick": 0.0}
        after, _ = draw(*sitting(identity, **(kept | changes)))
        rows = np.flatnonzero((np.abs(before.astype(int) - after).max(axis=2) > 8).sum(axis=1))
        level = landmarks[:2, 1].mean()
        assert len(rows) >= 5, "it can be seen"
        assert level + top <= rows.min() and rows.max() <= level + bottom


def test_an_identity_can_be_told_from_the_pixels_but_not_easily() -> None:
    people, pictures, kept = 16, 10, 20
    spec = DrawnSpec(identities=(people, 0, 0), pictures=pictures)
    drawn = np.stack([draw_face(spec, k // pictures, k % pictures)[0] for k in range(people * pictures)])
    small = drawn[:, 59:199, 39:139].reshape(len(drawn), 14, 10, 10, 10, 3).mean(axis=(2, 4))
    flat = small.reshape(people, pictures, -1)
    train, test = flat[:, : pictures // 2], flat[:, pictures // 2 :]
    middle = train.mean(axis=(0, 1))
    _, _, axes = np.linalg.svd((train - middle).reshape(-1, flat.shape[-1]), full_matrices=False)
    means = (train.mean(axis=1) - middle) @ axes[:kept].T
    distance = np.linalg.norm(((test - middle) @ axes[:kept].T)[:, :, None] - means, axis=-1)
    accuracy = (distance.argmin(axis=-1) == np.arange(people)[:, None]).mean()
    assert 4 / people < accuracy < 0.85


def test_a_set_that_is_there_is_not_drawn_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "draw", None)
    assert write(root, SPEC, progress=False) == root


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(root: Path, tmp_path: Path) -> None:
    before = digests(root)
    with pytest.raises(ValueError, match=r'"seed": 3.*"seed": 9.*choose another folder'):
        write(root, dataclasses.replace(SPEC, seed=9), progress=False)
    assert digests(root) == before
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="not a set of drawn faces"):
        write(tmp_path, SPEC, progress=False)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"mine"


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(6))

    def drawn_until_interrupted(who: Identity, shot: Shot) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return draw(who, shot)

    monkeypatch.setattr(synthetic, "draw", drawn_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "faces", SPEC, processes=1, progress=False)
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    spec = DrawnSpec(identities=(1, 0, 0), pictures=1)
    assert write(tmp_path, spec, progress=False) == tmp_path
    assert (tmp_path / "img_align_celeba" / "000001.jpg").is_file()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"identities": (0, 0, 0)}, "three counts"),
        ({"identities": (5, -1, 0)}, "three counts"),
        ({"identities": (5, 1)}, "three counts"),
        ({"pictures": 0}, "pictures is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"nuisance": 2.5}, "nuisance is 2.5"),
    ],
)
def test_a_spec_that_cannot_be_drawn_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **values)


def test_the_command_writes_the_set_and_a_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, sheet = str(tmp_path / "faces"), str(tmp_path / "sheet.png")
    chosen = ["--identities", "2", "1", "0", "--pictures", "2", "--processes", "1"]
    assert main([folder, *chosen, "--preview", sheet]) == 0
    assert "6 pictures of 3 people" in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.size == (2 * 178, 3 * 218)
    assert main([folder, *chosen, "--seed", "5"]) == 64
    assert "delete it or choose another folder" in capsys.readouterr().err
