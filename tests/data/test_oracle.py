"""The readable picture path against other people's resizing, and what it makes of odd and damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from facefast.data.augment import draw
from facefast.data.oracle import apply, decode, read_bytes, render, to_picture
from facefast.recipe import AugmentSpec, ImageSpec
from tests.support.pictures import (
    encode,
    exif,
    garbled_jpeg,
    garbled_png,
    make_index,
    odd_pictures,
    png16,
    smooth_picture,
)

NOTHING = np.zeros(4, np.int32)
SAME_COLOR = np.eye(3, 4, dtype=np.float32)


def warped(picture: NDArray[np.uint8], matrix: object, height: int = 32, width: int = 0) -> Tensor:
    return apply(picture, np.array(matrix, np.float32), SAME_COLOR, NOTHING, ImageSpec(height, width))


def planes(picture: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).float()


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_the_identity_gives_the_picture_back_and_black_around_it() -> None:
    picture = noise(20, 24)
    out = warped(picture, [[1, 0, -4], [0, 1, -6]], 32)
    assert torch.equal(out[:, 6:26, 4:28], planes(picture))
    assert out.sum() == planes(picture).sum()


def test_flips_and_right_angles_move_pixels_without_touching_them() -> None:
    picture = noise(32, 32)
    assert torch.equal(warped(picture, [[-1, 0, 32], [0, 1, 0]]), planes(picture).flip(2))
    assert torch.equal(warped(picture, [[0, 1, 0], [-1, 0, 32]]), planes(picture).rot90(-1, (1, 2)))


@pytest.mark.parametrize("scale", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("degrees", [0, 17, -140])
def test_without_shrinking_it_is_bilinear_interpolation_over_black(scale: float, degrees: float) -> None:
    picture, size = noise(40, 50), 48
    cos, sin = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    linear = np.array([[cos, -sin], [sin, cos]])
    offset = np.array([25.3, 19.1]) - linear @ [size / 2, size / 2]
    matrix = np.column_stack([linear, offset])
    centres = np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), -1)
    source = centres @ matrix[:, :2].T + matrix[:, 2]
    grid = torch.from_numpy(2 * source / [50, 40] - 1)[None]
    expected = F.grid_sample(planes(picture)[None].double(), grid, align_corners=False)[0]
    np.testing.assert_allclose(warped(picture, matrix, size), expected, atol=1e-2)


@pytest.mark.parametrize("height", [64, 47, 33, 27])
def test_shrinking_is_the_antialiased_resize_of_torch_and_pillow(height: int) -> None:
    picture = noise(100, 130)
    width = round(height * 1.3)
    out = warped(picture, [[130 / width, 0, 0], [0, 100 / height, 0]], height, width)
    inside = (slice(None), slice(2, -2), slice(2, -2))  # at the border the others repeat pixels, and we see black
    ours = F.interpolate(planes(picture)[None], (height, width), mode="bilinear", antialias=True)[0]
    np.testing.assert_allclose(out[inside], ours[inside], atol=2e-2)
    pillow = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(out[inside], planes(np.array(pillow))[inside], atol=1.01)


@pytest.mark.parametrize("factor", [4, 5.3, 9, 26])
def test_great_shrinking_through_block_means_stays_close_to_the_exact_filter(factor: float) -> None:
    height, width = round(32 * factor), round(40 * factor)
    picture = smooth_picture(height, width)
    picture[::2] = 255 - picture[::2]  # stripes, which naive sampling turns into noise
    out = warped(picture, [[width / 40, 0, 0], [0, height / 32, 0]], 32, 40)
    exact = F.interpolate(planes(picture)[None], (32, 40), mode="bilinear", antialias=True)[0]
    assert (out - exact)[:, 2:-2, 2:-2].abs().mean() < 2
    assert out[:, 2:-2, 2:-2].sub(127.5).abs().mean() < 8


def test_each_axis_is_filtered_by_its_own_step() -> None:
    picture = noise(64, 64)
    out = warped(picture, [[2, 0, 0], [0, 1, 0]], 64, 32)
    across = F.interpolate(planes(picture)[None], (64, 32), mode="bilinear", antialias=True)[0]
    np.testing.assert_allclose(out[:, :, 2:-2], across[:, :, 2:-2], atol=1e-2)


def test_a_uniform_picture_stays_uniform_at_any_turn_and_scale() -> None:
    picture = np.full((400, 400, 3), 201, np.uint8)
    for scale in (0.5, 1.7, 3.99, 4.0, 6.2):
        cos, sin = scale * np.cos(0.4), scale * np.sin(0.4)
        centre = 200 - np.array([[cos, -sin], [sin, cos]]) @ [16, 16]
        out = warped(picture, [[cos, -sin, centre[0]], [sin, cos, centre[1]]])
        np.testing.assert_allclose(out, 201, atol=1e-3)


def test_colour_comes_after_the_filter_without_clamping_and_erased_pixels_last() -> None:
    picture = noise(32, 32)
    color = np.array([[0, 0, 2, 1], [0, -1, 0, 0], [1, 1, 1, -300]], np.float32)
    erase = np.array([3, 5, 10, 32], np.int32)
    out = apply(picture, np.eye(2, 3, dtype=np.float32), color, erase, ImageSpec(32))
    red, green, blue = planes(picture)
    expected = torch.stack([2 * blue + 1, -green, red + green + blue - 300])
    expected[:, 5:32, 3:10] = 0
    torch.testing.assert_close(out, expected)


def test_odd_files_decode_to_the_pictures_they_hold() -> None:
    expected = smooth_picture(90, 120).astype(int)
    grey = np.asarray(Image.fromarray(smooth_picture(90, 120)).convert("L"), int)[..., None].repeat(3, 2)
    for kind, data in odd_pictures().items():
        found = decode(data)
        assert found.dtype == np.uint8
        if "exif" in kind:
            continue
        assert found.shape == (90, 120, 3), kind
        if "1-bit" in kind or kind == "pbm":
            continue
        red = kind in ("16-bit grey png", "16-bit grey png with alpha", "16-bit grey tiff")
        reference = expected[..., :1] if red else grey if "grey" in kind or "pgm" in kind else expected
        if kind == "inverted grey tiff":
            reference = 255 - reference
        limit = 16 if "palette" in kind else 6 if "jpeg" in kind or "webp" in kind else 1
        assert np.abs(found - reference).mean() < limit, kind


# How an upright picture is stored under each orientation; numpy's words for the EXIF table.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_pictures_come_upright(orientation: int) -> None:
    upright = noise(30, 40)
    data = encode(np.ascontiguousarray(STORED[orientation](upright)), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(decode(data), upright)


def test_sixteen_bits_are_rounded_to_eight() -> None:
    values = np.array([[[0], [128], [129], [257 * 77 + 128], [257 * 77 + 129], [65535]]], np.uint16)
    np.testing.assert_array_equal(decode(png16(values))[0, :, 0], [0, 0, 1, 77, 78, 255])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not here</html>",
        encode(noise(30, 40))[:-300],
        encode(noise(30, 40), "PNG")[:-300],
        encode(noise(30, 40), "GIF"),
        garbled_jpeg(),
        garbled_png(),
    ],
    ids=["empty", "html", "cut jpeg", "cut png", "gif", "garbled jpeg", "garbled png"],
)
def test_damaged_and_foreign_files_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"cannot decode {len(data)} bytes: "):
        decode(data)


def test_missing_files_and_bombs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot decode .*gone.jpg: .*No such file"):
        decode(tmp_path / "gone.jpg")
    (tmp_path / "large.png").write_bytes(encode(np.zeros((100, 100, 3), np.uint8), "PNG"))
    with pytest.raises(ValueError, match="large.png: 100 x 100 pixels, more than the 9999 allowed"):
        decode(tmp_path / "large.png", max_pixels=9999)


def test_rows_are_read_from_their_place_in_a_larger_file(tmp_path: Path) -> None:
    files = [encode(smooth_picture(20, 30, seed), "PNG") for seed in range(3)]
    (tmp_path / "train.rec").write_bytes(b"header" + b"".join(files))
    lengths = np.array([len(file) for file in files])
    index = make_index(tmp_path, ["train.rec"] * 3, offsets=6 + np.cumsum(lengths) - lengths, lengths=lengths)
    for row in range(3):
        np.testing.assert_array_equal(decode(read_bytes(index, row)), smooth_picture(20, 30, row))
    with pytest.raises(ValueError, match=r"cannot read .*gone \(row 0\)"):
        read_bytes(make_index(tmp_path, ["gone"]), 0)


def test_any_sample_of_any_epoch_can_be_shown_as_a_picture(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(smooth_picture(40, 40, i), "PNG"))
    index = make_index(tmp_path, ["0.png", "1.png", "2.png"])
    image = ImageSpec(40, mean=(100.0, 90.0, 80.0), std=(50.0, 60.0, 70.0), color="bgr")
    rows = np.array([2, 0])
    still = render(index, rows, image)
    assert still.shape == (2, 3, 40, 40) and still.dtype == torch.float32
    np.testing.assert_array_equal(to_picture(still, image), [smooth_picture(40, 40, 2), smooth_picture(40, 40, 0)])
    assert np.abs(to_picture(still.bfloat16(), image) - to_picture(still, image).astype(int)).max() <= 1
    augment = AugmentSpec(crop=0.5, flip=0.5, rotation=20)
    numbers = draw(index, rows, image, augment, 7, 3, np.full((2, 2), 40))
    expected = apply(smooth_picture(40, 40, 0), numbers.matrix[1], numbers.color[1], numbers.erase[1], image)
    assert torch.equal(render(index, rows, image, augment, seed=7, epoch=3)[1], expected)
