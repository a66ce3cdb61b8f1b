"""Quality of faces: pose against turned heads, size, sharpness."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from facefast.data.augment import TEMPLATES
from facefast.faces import quality
from facefast.faces.quality import Limits, face_sizes, poses, qualities, sharpness
from tests.support.pictures import smooth_picture


def head(yaw: float, pitch: float, roll: float, scale: float = 2.0) -> NDArray[np.float64]:
    """[5, 2] landmarks of the model's head, turned by degrees and seen from afar."""
    points = np.column_stack([np.array(TEMPLATES["arcface"].points), -np.array(quality._DEPTHS)])
    y, p, r = np.radians([yaw, pitch, roll])
    about_y = np.array([[np.cos(y), 0, -np.sin(y)], [0, 1, 0], [np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    about_z = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    turned = (points - points.mean(0)) @ (about_z @ about_y @ about_x).T
    return np.asarray(scale * turned[:, :2] + 100)


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 0, 0), (0, 20, 0), (0, 0, 15), (-40, -10, 25), (60, 10, -30)])
def test_a_turned_head_gives_its_angles(angles: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(poses(head(*angles)[None])[0], angles, atol=1e-6)


def test_the_signs_of_the_angles_are_as_documented() -> None:
    """The nose moves to where the face looks; roll turns the right eye down."""
    frontal = head(0, 0, 0)
    assert head(30, 0, 0)[2, 0] > frontal[2, 0]
    assert head(0, 20, 0)[2, 1] - head(0, 20, 0)[:2, 1].mean() < frontal[2, 1] - frontal[:2, 1].mean()
    assert head(0, 0, 15)[1, 1] > head(0, 0, 15)[0, 1]


def test_the_size_is_that_of_arcfaces_frame_whatever_the_turn_in_the_picture() -> None:
    np.testing.assert_allclose(face_sizes(np.stack([head(0, 0, roll, 1.5) for roll in (0, 40, -90)])), 1.5 * 112)


def test_unknown_landmarks_have_unknown_quality() -> None:
    lost = np.full((2, 5, 2), np.nan, np.float32)
    lost[1] = head(10, 0, 0)
    found = qualities(lost, np.array([np.nan, 0.9], np.float32), np.array([np.nan, 50], np.float32))
    assert found.shape == (2, 6) and np.isnan(found[0]).all()
    assert found[1, 2] == pytest.approx(10, abs=1e-3) and found[1, 5] == pytest.approx(0.9)


def test_a_blurred_face_is_less_sharp_at_any_size() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (200, 160, 3), np.uint8)
    box = np.array([20, 30, 100, 120], np.float32)
    before = sharpness(picture, box)
    for radius in (2, 4):
        after = sharpness(np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))), box)
        assert after < before / 2
        before = after
    assert sharpness(smooth_picture(200, 160), box) < 30


def test_a_box_over_the_border_counts_what_is_inside_and_none_outside_is_nothing() -> None:
    picture = smooth_picture(60, 60)
    assert np.isfinite(sharpness(picture, np.array([-20, -20, 50, 50], np.float32)))
    assert np.isnan(sharpness(picture, np.array([70, 0, 10, 10], np.float32)))


def test_each_objection_names_its_reason_and_what_is_not_known_is_none() -> None:
    limits = Limits(size=40, sharpness=12, yaw=55, pitch=50)
    good = (60.0, 90.0, (0.0, 0.0, 0.0))
    faces = [
        good, (39.0, 90.0, (0.0, 0.0, 0.0)), (60.0, 11.0, (0.0, 0.0, 0.0)), (60.0, 90.0, (-56.0, 0.0, 0.0)),
        (60.0, 90.0, (0.0, -51.0, 0.0)), (60.0, 90.0, (55.0, 50.0, 180.0)), (np.nan, np.nan, (np.nan,) * 3),
    ]  # fmt: skip
    sizes, sharp, angles = (np.array(column, np.float64) for column in zip(*faces, strict=True))
    assert limits.objections(sizes, sharp, angles) == [
        "",
        "its face has 39 pixels on a side, 40 are needed",
        "it is blurred: a sharpness of 11.0, 12 is needed",
        "it is a profile: the head is turned by 56 degrees, at most 55 are taken",
        "it looks down by 51 degrees, at most 50 are taken",
        "",
        "",
    ]
    assert Limits(size=0, sharpness=0, yaw=180, pitch=180).objections(sizes, sharp, angles) == [""] * 7
    with pytest.raises(ValueError, match=r"yaw is -1; it must lie in \[0, 180\]"):
        Limits(yaw=-1)


def test_a_profile_drawn_by_its_landmarks_is_one() -> None:
    marks = np.stack([head(20, 0, 0), head(70, 0, 0), head(0, 0, 40)])
    found = Limits().objections(face_sizes(marks), np.full(3, 99.0), poses(marks))
    assert [bool(why) for why in found] == [False, True, False] and "turned by 70 degrees" in found[1]
