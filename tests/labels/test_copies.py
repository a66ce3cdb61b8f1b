"""Two files of one photograph are told from two photographs by their pixels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from facefast.data import FaceIndex, oracle
from facefast.faces.quality import face_sizes
from facefast.labels.copies import copies_by_pixels
from tests.support.pictures import encode, garbled_png, smooth_picture

FIRST = Image.fromarray(smooth_picture(120, 90, 1))


def index_of(folder: Path, files: list[bytes]) -> FaceIndex:
    names = [b"%d.img" % number for number in range(len(files))]
    for name, content in zip(names, files, strict=True):
        (folder / name.decode()).write_bytes(content)
    return FaceIndex.build(folder, names, None, ())


@pytest.mark.parametrize(
    "again",
    [
        encode(FIRST, "JPEG", quality=30),
        encode(FIRST.resize((45, 60)), "PNG"),
        encode(FIRST.resize((360, 480)), "WEBP"),
        encode(ImageEnhance.Brightness(FIRST).enhance(0.7), "PNG"),
        encode(ImageEnhance.Contrast(FIRST).enhance(0.8), "PNG"),
        encode(FIRST.convert("L"), "PNG"),
        encode(FIRST.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"),
        encode(FIRST.crop((0, 0, 76, 100)), "PNG"),
        encode(FIRST.crop((9, 14, 90, 120)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((60, 80)), "JPEG"),
        encode(FIRST.rotate(4, Image.Resampling.BICUBIC), "PNG"),
    ],
    ids=["compressed", "smaller", "larger", "darker", "paler", "grey", "mirrored", "part", "mirrored part", "turned"],
)
def test_a_photograph_saved_again_is_the_same(tmp_path: Path, again: bytes) -> None:
    same = copies_by_pixels(index_of(tmp_path, [encode(FIRST, "PNG"), again]))
    assert same(0, 1) and same(1, 0)


@pytest.mark.parametrize("seed", [40, 45, 53])
def test_a_crop_is_a_copy_whichever_of_the_two_comes_first(tmp_path: Path, seed: int) -> None:
    picture = Image.fromarray(smooth_picture(240, 180, seed))
    left, top = {40: (19, 48), 45: (39, 88), 53: (46, 49)}[seed]
    part = picture.crop((left, top, left + 90, top + 120))
    same = copies_by_pixels(index_of(tmp_path, [encode(picture, "PNG"), encode(part, "PNG")]))
    assert same(0, 1) and same(1, 0)


@pytest.mark.parametrize(
    "other",
    [
        encode(smooth_picture(120, 90, 2), "PNG"),
        encode(Image.blend(FIRST, Image.fromarray(smooth_picture(120, 90, 2)), 0.4), "PNG"),
        encode(Image.eval(FIRST, lambda value: 255 - value), "PNG"),
    ],
    ids=["another", "half of it", "negative"],
)
def test_another_photograph_is_another(tmp_path: Path, other: bytes) -> None:
    assert not copies_by_pixels(index_of(tmp_path, [encode(FIRST, "PNG"), other]))(0, 1)


def test_pictures_that_cannot_be_read_are_nobodys_copies(tmp_path: Path) -> None:
    index = index_of(tmp_path, [encode(FIRST, "PNG"), garbled_png(), b"", garbled_png()])
    same = copies_by_pixels(index)
    assert not same(0, 1)
    assert not same(1, 3)  # equal bytes, of which nothing is known
    (tmp_path / "2.img").unlink()
    assert not same(2, 0)


def test_walls_of_one_colour_are_not_all_one_photograph(tmp_path: Path) -> None:
    grey = encode(np.full((40, 40, 3), 128, np.uint8), "PNG")
    white = encode(np.full((50, 40, 3), 255, np.uint8), "PNG")
    same = copies_by_pixels(index_of(tmp_path, [grey, white, encode(FIRST, "PNG")]))
    assert not same(0, 1) and not same(0, 2)


def test_each_file_is_read_once_however_often_it_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(tmp_path, [encode(FIRST, "PNG"), encode(FIRST, "JPEG"), garbled_png()])
    read, asked = oracle.read_bytes, []

    def counted(index: FaceIndex, row: int) -> bytes:
        asked.append(row)
        return read(index, row)

    monkeypatch.setattr(oracle, "read_bytes", counted)
    same = copies_by_pixels(index)
    assert [same(0, 1), same(1, 0), same(0, 2), same(2, 1)] == [True, True, False, False]
    assert sorted(asked) == [0, 1, 2]


FACE = np.array([[45, 50], [75, 50], [60, 70], [48, 85], [72, 85]], np.float32)


def smiling(picture: Image.Image, by: float) -> Image.Image:
    """The next frame of a burst: what lies around the mouth has moved by so many pixels, smoothly."""
    y, x = np.mgrid[0 : picture.height, 0 : picture.width].astype(np.float32)
    near = np.exp(-((x - 60) ** 2 + (y - 85) ** 2) / (2 * 10**2))
    rows = np.clip(np.round(y + by * near), 0, picture.height - 1).astype(int)
    return Image.fromarray(np.asarray(picture)[rows, x.astype(int)])


def test_frames_of_a_burst_are_two_photographs(tmp_path: Path) -> None:
    fine = np.random.default_rng(3).integers(0, 256, (30, 30, 3), np.uint8)
    frame = Image.fromarray(fine).resize((120, 120), Image.Resampling.BICUBIC)
    files = [encode(each, "PNG") for each in (frame, smiling(frame, 4), frame.crop((5, 8, 118, 116)))]
    same = copies_by_pixels(index_of(tmp_path, files))
    assert not same(0, 1) and not same(1, 2)
    assert same(0, 2)


def test_of_photographs_with_landmarks_the_face_counts_and_not_the_wall(tmp_path: Path) -> None:
    """Two people in front of one wall, and one face in front of two."""
    walls = [Image.fromarray(smooth_picture(400, 400, seed)).resize((800, 800)) for seed in (1, 2)]
    faces = [Image.fromarray(smooth_picture(120, 120, seed)) for seed in (5, 6)]
    pictures = []
    for wall, face in ((0, 0), (0, 1)):
        pictures.append(walls[wall].copy())
        pictures[-1].paste(faces[face].resize((300, 300)), (250, 250))
    index = index_of(tmp_path, [encode(picture, "PNG") for picture in pictures])
    marked = dataclasses.replace(index, landmarks=np.stack([FACE * 2 + 280] * 2))
    assert marked.landmarks is not None
    sizes = face_sizes(marked.landmarks)
    assert not copies_by_pixels(marked, sizes)(0, 1)


def test_outside_landmarks_do_not_matter(tmp_path: Path) -> None:
    index = index_of(tmp_path, [encode(FIRST, "PNG"), encode(FIRST, "JPEG")])
    marked = dataclasses.replace(index, landmarks=np.stack([FACE - 1000, FACE + 1000]))
    assert marked.landmarks is not None
    assert copies_by_pixels(marked, face_sizes(marked.landmarks))(0, 1)


def test_a_photograph_turned_by_any_angle_is_found_by_its_landmarks(tmp_path: Path) -> None:
    picture = Image.fromarray(smooth_picture(160, 160, 4)).resize((480, 480))
    picture.paste(Image.fromarray(smooth_picture(240, 240, 5)), (120, 120))
    for angle in (-60, 25, 90):
        turned = picture.rotate(angle, Image.Resampling.BICUBIC, center=(240, 240))
        radians = np.radians(angle)  # against the clock, with y pointing down
        turn = np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]])
        upright = FACE - FACE.mean(0) + 240
        landmarks = np.stack([upright, (upright - 240) @ turn.T + 240]).astype(np.float32)
        index = index_of(tmp_path, [encode(picture, "PNG"), encode(turned, "PNG")])
        marked = dataclasses.replace(index, landmarks=landmarks)
        assert copies_by_pixels(marked, face_sizes(landmarks))(0, 1)
