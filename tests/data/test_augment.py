"""What is drawn for a picture: the generator, alignment, each strength, and that nothing but (seed, epoch, row)
matters."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from facefast.data.augment import TEMPLATES, Draw, draw, philox
from facefast.data.index import FaceIndex
from facefast.recipe import AugmentSpec, ImageSpec
from tests.support.pictures import make_index

SQUARE = ImageSpec(112)
STRENGTHS: dict[str, Any] = {
    "crop": 0.4,
    "crop_ratio": 0.3,
    "shift": 0.1,
    "flip": 0.5,
    "rotation": 20.0,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.5,
    "hue": 0.2,
    "grey": 0.4,
    "erase": 0.5,
}
EVERYTHING = AugmentSpec(**STRENGTHS)
MANY = np.arange(4000)


def plain_index(
    number: int = 4000, size: NDArray[np.int64] | tuple[int, int] = (200, 300), **columns: Any
) -> FaceIndex:
    return make_index("/none", [f"{i}.jpg" for i in range(number)], size, **columns)


def of(strength: str) -> Draw:
    """Draws of 4000 centred 112-pixel pictures under one strength: the frame covers them exactly."""
    augment = AugmentSpec(**{strength: STRENGTHS[strength]})
    return draw(plain_index(size=(112, 112)), MANY, SQUARE, augment, seed=5, epoch=2)


def uniform(values: NDArray[np.float64], low: float, high: float) -> bool:
    """Kolmogorov-Smirnov at 0.1 %, with the ends reached and never passed."""
    values = np.sort(values)
    expected = (values - low) / (high - low)
    distance = np.abs(expected - np.arange(1, len(values) + 1) / len(values)).max()
    inside = values[0] >= low - 1e-6 and values[-1] <= high + 1e-6
    return bool(inside and distance < 1.95 / np.sqrt(len(values)) + 1e-6)


def at(matrix: NDArray[np.float32], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Output points [n, 2] in the source."""
    linear, shift = matrix[:, :2].astype(float), matrix[:, 2].astype(float)
    return np.asarray(points @ linear.T + shift)


# The known answers of the Random123 distribution, examples/kat_vectors.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter: list[int], key: tuple[int, int], words: str) -> None:
    found = philox(np.array(counter, np.uint64).reshape(4, 1), key)
    assert " ".join(f"{int(word):08x}" for word in found[:, 0]) == words


def test_a_rows_numbers_do_not_depend_on_its_batch() -> None:
    index = plain_index()
    batch = np.array([17, 4, 3999, 17, 0])
    together = draw(index, batch, SQUARE, EVERYTHING, seed=1, epoch=2)
    for slot, row in enumerate(batch):
        alone = draw(index, np.array([row]), SQUARE, EVERYTHING, seed=1, epoch=2)
        for one, all_ in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[0], all_[slot])


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 3}, {"seed": 1 + 2**32}, {"seed": 1 + 2**63}])
def test_seed_and_epoch_change_every_row(change: dict[str, Any]) -> None:
    key: dict[str, Any] = {"seed": 1, "epoch": 2}
    one = draw(plain_index(), MANY, SQUARE, EVERYTHING, **key)
    other = draw(plain_index(), MANY, SQUARE, EVERYTHING, **{**key, **change})
    assert (one.matrix != other.matrix).any((1, 2)).all()


def test_rows_differ_from_each_other() -> None:
    matrix = draw(plain_index(), MANY, SQUARE, EVERYTHING, 1, 2).matrix
    assert len(np.unique(matrix.reshape(len(MANY), -1), axis=0)) == len(MANY)


def test_no_augmentation_equals_all_strengths_at_zero_and_ignores_the_seed() -> None:
    index = plain_index()
    evaluation = draw(index, MANY, SQUARE, None, seed=1, epoch=2)
    for other in (
        draw(index, MANY, SQUARE, AugmentSpec(), seed=9, epoch=7),
        draw(index, MANY, SQUARE, AugmentSpec(flip=1e-12), seed=9, epoch=7),  # active, yet never hit
    ):
        for one, two in zip(evaluation, other, strict=True):
            np.testing.assert_array_equal(one, two)
    assert not evaluation.erase.any()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_each_strength_acts_on_its_own_part_and_leaves_the_others_alone(strength: str) -> None:
    still, moved = draw(plain_index(size=(112, 112)), MANY, SQUARE, None, 5, 2), of(strength)
    changed = [name for name, a, b in zip(Draw._fields, still, moved, strict=True) if (a != b).any()]
    geometric = {"crop", "crop_ratio", "shift", "flip", "rotation"}
    assert changed == (["matrix"] if strength in geometric else ["erase"] if strength == "erase" else ["color"])


@pytest.mark.parametrize("strength", STRENGTHS)
def test_changing_one_strength_changes_no_other_draw(strength: str) -> None:
    index = plain_index(size=(112, 112))
    still: dict[str, Any] = {strength: 0.0}
    without = draw(index, MANY, SQUARE, dataclasses.replace(EVERYTHING, **still), 5, 2)
    everything = draw(index, MANY, SQUARE, EVERYTHING, 5, 2)
    same = [name for name, a, b in zip(Draw._fields, without, everything, strict=True) if (a == b).all()]
    assert len(same) == 2


def test_crop_keeps_areas_uniform_in_range_and_stays_in_the_frame() -> None:
    matrix = of("crop").matrix.astype(float)
    side = matrix[:, 0, 0]
    np.testing.assert_allclose(matrix[:, 1, 1], side, atol=1e-6)
    assert uniform(side**2, 0.6, 1.0)
    free = 112 * (1 - side)
    assert uniform(matrix[:, 0, 2] / free, 0, 1) and uniform(matrix[:, 1, 2] / free, 0, 1)


def test_crop_ratio_is_log_uniform_about_the_frames_and_keeps_the_area() -> None:
    matrix = of("crop_ratio").matrix.astype(float)
    np.testing.assert_allclose(matrix[:, 0, 0] * matrix[:, 1, 1], 1, atol=1e-6)
    assert uniform(np.log(matrix[:, 0, 0] / matrix[:, 1, 1]), -np.log(1.3), np.log(1.3))


def test_shift_moves_by_a_fraction_of_each_side_each_way() -> None:
    image = ImageSpec(112, width=96)
    matrix = draw(plain_index(size=(96, 112)), MANY, image, AugmentSpec(shift=0.1), 5, 2).matrix
    assert uniform(matrix[:, 0, 2] / 96, -0.1, 0.1) and uniform(matrix[:, 1, 2] / 112, -0.1, 0.1)


def test_flip_mirrors_the_output_frame_as_often_as_asked() -> None:
    matrix = of("flip").matrix
    mirrored = matrix[:, 0, 0] < 0
    assert abs(mirrored.mean() - 0.5) < 0.03
    np.testing.assert_array_equal(matrix[mirrored][0], [[-1, 0, 112], [0, 1, 0]])
    np.testing.assert_array_equal(matrix[~mirrored][0], [[1, 0, 0], [0, 1, 0]])
    assert (draw(plain_index(), MANY, SQUARE, AugmentSpec(flip=1), 5, 2).matrix[:, 0, 0] < 0).all()


def test_rotation_turns_about_the_middle_by_uniform_angles() -> None:
    matrix = of("rotation").matrix.astype(float)
    angles = np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert uniform(angles, -20, 20)
    middle = matrix[:, :, :2] @ [56, 56] + matrix[:, :, 2]
    np.testing.assert_allclose(middle, 56, atol=1e-4)


def colour_of(strength: str) -> NDArray[np.float64]:
    """The colour matrices of one strength without normalisation: 0..255 in and out."""
    image = ImageSpec(112, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    augment = AugmentSpec(**{strength: STRENGTHS[strength]})
    return draw(plain_index(), MANY, image, augment, 5, 2).color.astype(float)


LUMA = np.array([0.299, 0.587, 0.114])


def test_brightness_multiplies() -> None:
    color = colour_of("brightness")
    factors = color[:, 0, 0]
    np.testing.assert_allclose(color, factors[:, None, None] * np.eye(3, 4), atol=1e-6)
    assert uniform(factors, 0.7, 1.3)


def test_contrast_multiplies_about_mid_grey() -> None:
    color = colour_of("contrast")
    assert uniform(color[:, 0, 0], 0.7, 1.3)
    np.testing.assert_allclose(color @ [127.5, 127.5, 127.5, 1], 127.5, atol=1e-3)


def test_saturation_mixes_with_luma() -> None:
    color = colour_of("saturation")
    factors = 1 - color[:, 0, 1] / LUMA[1]
    assert uniform(factors, 0.5, 1.5)
    np.testing.assert_allclose(LUMA @ color[:, :, :3], np.broadcast_to(LUMA, (4000, 3)), atol=1e-6)


def test_hue_turns_colours_and_keeps_luma_greys_and_the_distance_from_grey() -> None:
    color = colour_of("hue")[:, :, :3]
    np.testing.assert_allclose(LUMA @ color, np.broadcast_to(LUMA, (4000, 3)), atol=1e-6)
    np.testing.assert_allclose(color.sum(2), 1, atol=1e-6)
    # A turn by an angle has the trace 1 + 2 cos(angle).
    turns = np.arccos(((np.trace(color, axis1=1, axis2=2) - 1) / 2).clip(-1, 1)) / (2 * np.pi)
    assert uniform(turns, 0, 0.2)
    np.testing.assert_allclose(np.linalg.det(color), 1, atol=1e-5)


def test_grey_makes_pictures_colourless_as_often_as_asked() -> None:
    color = colour_of("grey")[:, :, :3]
    grey = np.abs(color - LUMA).max((1, 2)) < 1e-6
    assert abs(grey.mean() - 0.4) < 0.03
    np.testing.assert_allclose(color[~grey], np.broadcast_to(np.eye(3), (np.sum(~grey), 3, 3)), atol=1e-6)


def test_normalisation_and_channel_order_are_folded_into_the_colour_matrix() -> None:
    image = ImageSpec(112, mean=(1.0, 2.0, 3.0), std=(10.0, 20.0, 40.0), color="bgr")
    color = draw(plain_index(1), np.array([0]), image, None, 0, 0).color[0]
    np.testing.assert_allclose(color @ [200, 100, 50, 1], [49 / 10, 98 / 20, 197 / 40], rtol=1e-6)


def test_erased_rectangles_lie_in_the_picture_with_areas_in_range() -> None:
    image = ImageSpec(112, width=96)
    augment = AugmentSpec(erase=0.5, erase_area=(0.05, 0.5))
    x0, y0, x1, y1 = draw(plain_index(), MANY, image, augment, 5, 2).erase.T
    hit = x1 > x0
    assert abs(hit.mean() - 0.5) < 0.03
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 96).all() and (y1 <= 112).all()
    area = ((x1 - x0) * (y1 - y0))[hit] / (96 * 112)
    assert area.min() > 0.045 and area.max() < 0.51 and abs(area.mean() - 0.275) < 0.01
    small = area < 0.2  # where every shape fits
    shape = np.log((y1 - y0)[hit][small] / (x1 - x0)[hit][small])
    assert abs(shape.mean()) < 0.1 and shape.min() < -1 and shape.max() > 1
    free = 96 - (x1 - x0)
    loose = hit & (free > 20)
    assert uniform((x0[loose] + 0.5) / (free[loose] + 1), 0, 1)


def test_landmarks_reach_the_template_of_any_known_name() -> None:
    rng = np.random.default_rng(0)
    for name, template in TEMPLATES.items():
        image = ImageSpec(template.height, template.width, template=name)
        points = np.array(template.points)
        turn = np.array([[0.9, -0.4], [0.4, 0.9]]) * rng.uniform(0.5, 4)
        landmarks = (points @ turn.T + rng.uniform(0, 100, 2)).astype(np.float32)
        matrix = draw(plain_index(1, landmarks=landmarks[None]), np.array([0]), image, None, 0, 0).matrix[0]
        np.testing.assert_allclose(at(matrix, points + 0.5), landmarks + 0.5, atol=1e-3)


def test_alignment_is_the_least_squares_similarity_of_umeyama() -> None:
    landmarks = np.array(TEMPLATES["arcface"].points) * 3 + np.random.default_rng(1).normal(0, 12, (5, 2))
    found = draw(plain_index(1, landmarks=landmarks[None].astype(np.float32)), np.array([0]), SQUARE, None, 0, 0)
    source, target = landmarks + 0.5, np.array(TEMPLATES["arcface"].points) + 0.5
    p, q = source - source.mean(0), target - target.mean(0)
    u, spread, vt = np.linalg.svd(q.T @ p)
    turn = u @ np.diag([1, np.linalg.det(u @ vt)]) @ vt
    scale = (spread * [1, np.linalg.det(u @ vt)]).sum() / (p**2).sum()
    forward = np.eye(3)
    forward[:2, :2], forward[:2, 2] = scale * turn, target.mean(0) - scale * turn @ source.mean(0)
    np.testing.assert_allclose(found.matrix[0], np.linalg.inv(forward)[:2], rtol=1e-4, atol=1e-3)


def test_templates_scale_about_their_centre_to_any_output() -> None:
    landmarks = np.array(TEMPLATES["arcface"].points, np.float32)[None]
    index, row = plain_index(1, landmarks=landmarks), np.array([0])

    def matrix(image: ImageSpec) -> NDArray[np.float32]:
        return np.asarray(draw(index, row, image, None, 0, 0).matrix[0])

    np.testing.assert_allclose(matrix(ImageSpec(112)), [[1, 0, 0], [0, 1, 0]], atol=1e-5)
    np.testing.assert_allclose(matrix(ImageSpec(224)), [[0.5, 0, 0], [0, 0.5, 0]], atol=1e-5)
    np.testing.assert_allclose(matrix(ImageSpec(112, 96)), [[1, 0, 8], [0, 1, 0]], atol=1e-5)
    np.testing.assert_array_equal(
        matrix(ImageSpec(112, 96, template="arcface")), matrix(ImageSpec(112, 96, template="auto"))
    )
    np.testing.assert_allclose(matrix(ImageSpec(112, 96, template="arcface_112x96")), [[1, 0, 8], [0, 1, 0]], atol=1e-4)


@pytest.mark.parametrize("lost", [np.nan, np.inf, 50.0])
def test_rows_with_missing_or_coinciding_landmarks_get_the_centre_crop(lost: float) -> None:
    landmarks = np.array(TEMPLATES["arcface"].points, np.float32)[None].repeat(3, 0)
    landmarks[1] = lost
    matrix = draw(plain_index(3, (200, 300), landmarks=landmarks), np.arange(3), SQUARE, None, 0, 0).matrix
    np.testing.assert_allclose(matrix[1], [[200 / 112, 0, 0], [0, 200 / 112, 50]], rtol=1e-6)
    np.testing.assert_allclose(matrix[[0, 2]], [[[1, 0, 0], [0, 1, 0]]] * 2, atol=1e-5)


def test_without_a_template_the_largest_centred_frame_is_cut() -> None:
    none, wide = ImageSpec(112, template="none"), ImageSpec(100, 200, template="none")
    rows = np.array([0])
    index = plain_index(1, (200, 300), landmarks=np.zeros((1, 5, 2), np.float32))
    ratio = 200 / 112
    np.testing.assert_allclose(draw(index, rows, none, None, 0, 0).matrix[0], [[ratio, 0, 0], [0, ratio, 50]])
    np.testing.assert_allclose(draw(index, rows, wide, None, 0, 0).matrix[0], [[1, 0, 0], [0, 1, 100]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_frame_lies_in_the_upright_picture(orientation: int) -> None:
    index = plain_index(1, (300, 200), orientations=orientation)
    matrix = draw(index, np.array([0]), ImageSpec(100), None, 0, 0).matrix[0]
    upright = [[2, 0, 0], [0, 2, 50]] if orientation >= 5 else [[2, 0, 50], [0, 2, 0]]
    np.testing.assert_allclose(matrix, upright)


def test_sizes_that_were_just_read_win_over_the_index() -> None:
    index = plain_index(2, (0, 0))
    sizes = np.array([[100, 100], [400, 200]])
    matrix = draw(index, np.arange(2), ImageSpec(100), None, 0, 0, sizes).matrix
    np.testing.assert_allclose(matrix, [[[1, 0, 0], [0, 1, 0]], [[2, 0, 100], [0, 2, 0]]])


def test_errors_name_the_template_and_the_picture() -> None:
    with pytest.raises(ValueError, match="image.template is 'arcfase'; it must be auto, none or one of arcface"):
        draw(plain_index(2), np.arange(2), ImageSpec(112, template="arcfase"), None, 0, 0)
    with pytest.raises(ValueError, match=r"size of /none/1.jpg \(row 1\) is unknown; scan the index first"):
        index = plain_index(2, np.array([[10, 10], [10, 0]]))
        draw(index, np.arange(2), SQUARE, None, 0, 0)
