"""The DALI graph and its operator against independent arithmetic, and what plugin and pipeline promise."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali as nvdali
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from facefast.data import dali
from facefast.data.augment import Draw
from facefast.data.dali import Pipeline, build_pipeline, check_plugin, decode_probe
from facefast.data.together import Encoded
from facefast.recipe import ImageSpec
from tests.support.pictures import encode, exif, garbled_jpeg, odd_pictures, smooth_picture

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(
    matrix: NDArray[np.floating] | list[list[float]],
    count: int,
    color: NDArray[np.floating] | None = None,
    erase: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Draw:
    """The same numbers for every picture of a batch."""
    color = np.eye(3, 4) if color is None else color
    return Draw(
        np.tile(np.asarray(matrix, np.float32), (count, 1, 1)),
        np.tile(np.asarray(color, np.float32), (count, 1, 1)),
        np.tile(np.asarray(erase, np.int32), (count, 1)),
    )


def pipeline(
    batches: list[Encoded],
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    threads: int = 2,
    device: str = "cpu",
) -> Pipeline:
    left = iter(batches)
    return build_pipeline(
        ImageSpec(size=shape[0], width=shape[1]),
        batch_size=max(len(batch.data) for batch in batches),
        device=device,
        source=lambda: next(left),
        dtype=dtype,
        channels_last=channels_last,
        threads=threads,
        prefetch=2,
    )


def batch_of(pictures: list[NDArray[np.uint8]], numbers: Draw) -> Encoded:
    """Lossless files of the pictures."""
    data = [np.frombuffer(encode(picture, "PNG"), np.uint8) for picture in pictures]
    sizes = np.array([(picture.shape[1], picture.shape[0]) for picture in pictures])
    return Encoded(data, numbers, sizes)


def run_one(picture: NDArray[np.uint8], matrix: Any, shape: tuple[int, int], **options: Any) -> Tensor:
    numbers = draw(matrix, 1, options.pop("color", None), options.pop("erase", (0, 0, 0, 0)))
    return pipeline([batch_of([picture], numbers)], shape, **options).run()[0]


def scaled(scale: float, picture: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.float64]:
    """Matrix that puts the middle of the picture into the middle of the output."""
    height, width = picture.shape[:2]
    x, y = width / 2 - scale * shape[1] / 2, height / 2 - scale * shape[0] / 2
    return np.array([[scale, 0, x], [0, scale, y]])


def bilinear(picture: NDArray[np.uint8], matrix: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    """Plain bilinear interpolation with a black border, [3, H, W]."""
    padded = np.pad(picture.astype(np.float64), ((2, 2), (2, 2), (0, 0)))
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    u, v = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y, np.ones_like(x)])) + 1.5
    u, v = u.clip(0, padded.shape[1] - 1.001), v.clip(0, padded.shape[0] - 1.001)
    i, j = u.astype(int), v.astype(int)
    a, b = (u - i)[..., None], (v - j)[..., None]
    upper = padded[j, i] * (1 - a) + padded[j, i + 1] * a
    lower = padded[j + 1, i] * (1 - a) + padded[j + 1, i + 1] * a
    return np.asarray((upper * (1 - b) + lower * b).transpose(2, 0, 1))


def assert_levels(found: Tensor, expected: NDArray[np.generic], worst: float) -> None:
    """Largest difference, in levels of 255."""
    assert tuple(found.shape) == expected.shape
    assert np.abs(found.float().numpy() - expected).max() < worst


@pytest.fixture
def picture() -> NDArray[np.uint8]:
    return smooth_picture(218, 178)


def test_an_aligned_crop_is_copied_exactly(picture: NDArray[np.uint8]) -> None:
    found = run_one(picture, [[1, 0, 33], [0, 1, 50]], (112, 96))
    assert_levels(found, picture[50:162, 33:129].transpose(2, 0, 1), 1e-3)


@pytest.mark.parametrize("degrees", [0.3, 30, 90, -135, 180])
def test_a_rotation_does_not_blur(picture: NDArray[np.uint8], degrees: float) -> None:
    angle = np.radians(degrees)
    linear = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.c_[linear, np.array([89.0, 109.0]) - linear @ [56, 56]]
    assert_levels(run_one(picture, matrix, (112, 112)), bilinear(picture, matrix, (112, 112)), 0.1)


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.77])
def test_enlarging_is_bilinear(picture: NDArray[np.uint8], scale: float) -> None:
    matrix = scaled(scale, picture, (96, 112))
    assert_levels(run_one(picture, matrix, (96, 112)), bilinear(picture, matrix, (96, 112)), 0.1)


@pytest.mark.parametrize(("scale", "worst"), [(1.5, 1.0), (2, 1.0), (3, 1.0), (3.7, 1.0), (10, 3.0)])
def test_shrinking_averages_as_pillow_does(scale: float, worst: float) -> None:
    size = round(64 * scale)
    picture = smooth_picture(size, size)
    picture[::2, ::2] //= 2  # detail that a filter without antialiasing turns into waves
    expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR))
    found = run_one(picture, [[size / 64, 0, 0], [0, size / 64, 0]], (64, 64))
    inner = np.s_[:, 2:-2, 2:-2]  # at the border Pillow repeats the edge and we see black
    assert_levels(found[inner], expected.transpose(2, 0, 1)[inner].astype(np.float64), worst)


def test_outside_the_picture_is_black_and_the_border_is_blended(picture: NDArray[np.uint8]) -> None:
    matrix = np.array([[1.0, 0, -20.4], [0, 1, 150.7]])
    found = run_one(picture, matrix, (112, 112))
    assert_levels(found, bilinear(picture, matrix, (112, 112)), 0.1)
    assert found[:, :, :20].abs().max() == 0
    assert found[:, 70:, :].abs().max() == 0


def test_a_matrix_that_misses_the_picture_gives_black(picture: NDArray[np.uint8]) -> None:
    for x, y in ((1000, 0), (-1000, 0), (0, 1e7), (-500, -500)):
        assert run_one(picture, [[1, 0, x], [0, 1, y]], (32, 32)).abs().max() == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 2), (3, 3), (17, 5)])
def test_tiny_pictures(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    for scale in (0.05, 0.3, 1.0):
        matrix = scaled(scale, picture, (16, 24))
        assert_levels(run_one(picture, matrix, (16, 24)), bilinear(picture, matrix, (16, 24)), 0.1)


def test_colour_is_an_affine_map_of_rgb_without_clamping(picture: NDArray[np.uint8]) -> None:
    color = np.array([[0.1, -2, 0.3, 4], [3, 0.2, -0.5, -900], [0, 0, 0.01, 1]])
    found = run_one(picture, [[1, 0, 10], [0, 1, 10]], (64, 64), color=color)
    crop = picture[10:74, 10:74].astype(np.float64)
    expected = (crop @ color[:, :3].T + color[:, 3]).transpose(2, 0, 1)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-2, rtol=1e-5)


def test_the_erased_rectangle_is_zero_and_nothing_else_changes(picture: NDArray[np.uint8]) -> None:
    color = np.c_[np.eye(3), [5, 5, 5]]
    plain = run_one(picture, [[1, 0, 10], [0, 1, 10]], (64, 64), color=color)
    for x0, y0, x1, y1 in ((5, 9, 30, 20), (0, 0, 64, 64), (63, 0, 64, 64), (3, 60, 64, 64), (0, 7, 1, 8)):
        found = run_one(picture, [[1, 0, 10], [0, 1, 10]], (64, 64), color=color, erase=(x0, y0, x1, y1))
        expected = plain.clone()
        expected[:, y0:y1, x0:x1] = 0
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_types_and_layouts_hold_the_rounded_values(dtype: torch.dtype, channels_last: bool) -> None:
    pictures = [smooth_picture(60, 80, seed) for seed in range(5)]
    numbers = draw(scaled(0.9, pictures[0], (48, 50)), 5, np.random.default_rng(0).normal(size=(3, 4)))
    exact = pipeline([batch_of(pictures, numbers)], (48, 50)).run()
    found = pipeline([batch_of(pictures, numbers)], (48, 50), dtype, channels_last).run()
    assert found.dtype == dtype and found.shape == (5, 3, 48, 50)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, exact.to(dtype), rtol=0, atol=0)


def varied_batch(count: int) -> Encoded:
    """Pictures of all sizes, each with numbers of its own."""
    random = np.random.default_rng(4)
    sizes = random.integers(3, 400, (count, 2))
    pictures = [smooth_picture(height, width, seed) for seed, (height, width) in enumerate(sizes.tolist())]
    numbers = draw(np.zeros((2, 3)), count)
    for row, picture in enumerate(pictures):
        numbers.matrix[row] = scaled(random.choice([0.4, 1.0, 1.3, 2.2, 5.0]), picture, (40, 40))
        numbers.matrix[row, :, :2] += random.normal(size=(2, 2)) * 0.3
        numbers.color[row] = random.normal(size=(3, 4))
    return batch_of(pictures, numbers)


def test_the_result_depends_neither_on_threads_nor_on_the_slot_nor_on_the_run() -> None:
    batch = varied_batch(24)
    first = pipeline([batch], (40, 40), threads=1).run()
    order = np.random.default_rng(1).permutation(24)
    shuffled = Encoded(
        [batch.data[row] for row in order], Draw._make(part[order] for part in batch.draw), batch.sizes[order]
    )
    for threads in (1, 2, 5):
        graph = pipeline([batch, shuffled, batch], (40, 40), threads=threads)
        for expected in (first, first[order], first):
            torch.testing.assert_close(graph.run(), expected, rtol=0, atol=0)


def whole_pictures(
    _: NDArray[np.float32], sizes: NDArray[np.integer], shape: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Takes the place of `regions` where nothing is to be left out."""
    return np.zeros(sizes.shape, np.int32), sizes.astype(np.int32)


def test_decoding_a_region_gives_the_pixels_of_the_whole_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(7)
    kinds = odd_pictures()
    data = [np.frombuffer(kind, np.uint8) for kind in kinds.values()]
    sizes = np.array([(90, 120) if "exif" in kind and int(kind[-1]) >= 5 else (120, 90) for kind in kinds])
    numbers = draw(np.zeros((2, 3)), len(data))
    for scale in (0.5, 1.0, 1.6, 4.5):
        for row, (width, height) in enumerate(sizes):
            x, y = random.uniform(0, [width, height])
            numbers.matrix[row] = [[scale, 0.1, x - 5 * scale], [-0.1, scale, y - 5 * scale]]
        batch = Encoded(data, numbers, sizes)
        part = pipeline([batch], (10, 10)).run()
        with monkeypatch.context() as patch:
            patch.setattr(dali, "regions", whole_pictures)
            whole = pipeline([batch], (10, 10)).run()
        # Beside the end of the buffer the operator takes its exact path, which rounds differently.
        torch.testing.assert_close(part, whole, atol=0.1, rtol=0)


def test_an_exif_orientation_turns_the_picture_before_the_matrix() -> None:
    picture = smooth_picture(40, 60)
    data = np.frombuffer(encode(picture, quality=98, subsampling=0, exif=exif(6)), np.uint8)
    numbers = draw([[1, 0, 4], [0, 1, 20]], 1)
    found = pipeline([Encoded([data], numbers, np.array([[40, 60]]))], (32, 32)).run()[0]
    upright = np.rot90(picture, -1)[20:52, 4:36].transpose(2, 0, 1)
    assert np.abs(found.numpy() - upright).mean() < 2


def test_batches_stay_as_they_are_after_later_runs_and_after_close() -> None:
    picture = smooth_picture(40, 40)
    batches = [batch_of([picture], draw([[1, 0, shift], [0, 1, 0]], 1)) for shift in range(8)]
    graph = pipeline(batches, (16, 16))
    tensors = [graph.run() for _ in batches]
    with pytest.raises(StopIteration):
        graph.run()
    graph.close()
    del graph
    gc.collect()
    for shift, tensor in enumerate(tensors):
        assert_levels(tensor[0], picture[:16, shift : shift + 16].transpose(2, 0, 1), 1e-3)


def test_a_pipeline_can_be_reset_and_refuses_to_run_once_closed() -> None:
    batch = batch_of([smooth_picture(40, 40)], draw([[1, 0, 0], [0, 1, 0]], 1))
    epochs: list[Iterator[Encoded]] = [iter([batch, batch])]
    graph = build_pipeline(
        ImageSpec(16),
        batch_size=1,
        device="cpu",
        source=lambda: next(epochs[-1]),
        dtype=torch.float32,
        channels_last=False,
        threads=1,
        prefetch=3,
    )
    for _ in range(3):
        assert len([graph.run(), graph.run()]) == 2
        with pytest.raises(StopIteration):
            graph.run()
        epochs.append(iter([batch, batch]))
        graph.reset()
    graph.close()
    with pytest.raises(ValueError, match="closed"):
        graph.run()


def test_memory_does_not_grow() -> None:
    batch = varied_batch(2)
    batches = itertools.repeat(batch, 500)
    graph = build_pipeline(
        ImageSpec(112),
        batch_size=2,
        device="cpu",
        source=lambda: next(batches),
        dtype=torch.float32,
        channels_last=True,
        threads=2,
        prefetch=2,
    )

    def run(count: int) -> int:
        for _ in range(count):
            graph.run()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before = run(100)
    assert run(390) - before < 20e6  # 390 batches of 0.3 MB each went by


def test_a_broken_picture_fails_the_run_and_the_probe_names_it(capfd: pytest.CaptureFixture[str]) -> None:
    sound = encode(smooth_picture(90, 120))
    broken = [garbled_jpeg(), sound[: len(sound) // 2], b"no picture at all", b""]
    for data in broken:
        assert decode_probe(data)
        assert decode_probe(sound) is None
    files = [np.frombuffer(kind, np.uint8) for kind in (sound, garbled_jpeg())]
    graph = pipeline([Encoded(files, draw(np.eye(2, 3), 2), np.array([[120, 90]] * 2))], (16, 16))
    with pytest.raises(RuntimeError):
        graph.run()
    graph.close()


def test_the_probe_compares_the_size_with_what_the_scan_saw() -> None:
    data = encode(smooth_picture(90, 120), exif=exif(6))
    assert decode_probe(data, (90, 120)) is None
    reason = decode_probe(data, (120, 90))
    assert reason == "DALI sees 90 x 120 pixels where 120 x 90 were expected"


def test_arguments_out_of_range_are_refused_by_name() -> None:
    options: dict[str, Any] = {
        "batch_size": 1,
        "device": "cpu",
        "source": lambda: None,
        "dtype": torch.float32,
        "channels_last": False,
        "threads": 1,
        "prefetch": 1,
    }
    for name, value in (("device", "tpu"), ("dtype", torch.int8), ("threads", 0), ("batch_size", 0)):
        with pytest.raises(ValueError, match=name):
            build_pipeline(ImageSpec(16), **{**options, name: value})


def test_a_plugin_of_another_version_is_refused_with_the_command_that_rebuilds_it(
    tmp_path: Path,
) -> None:
    plugin = tmp_path / "_dali.so"
    with pytest.raises(ValueError, match=r"not there; build it with: python -m pip"):
        check_plugin(plugin, "2.4.0")
    plugin.write_bytes(b"\x7fELF anything")
    with pytest.raises(ValueError, match="no plugin of facefast's"):
        check_plugin(plugin, "2.4.0")
    plugin.write_bytes(b"..\0facefast plugin for DALI 2.3.0 with cpu\0..")
    with pytest.raises(ValueError, match=r"DALI 2\.3\.0, but 2\.4\.0 is installed; rebuild it with: python"):
        check_plugin(plugin, "2.4.0")
    check_plugin(plugin, "2.3.0")
    with pytest.raises(ValueError, match=r"without its CUDA part.*FACEFAST_CUDA=1"):
        check_plugin(plugin, "2.3.0", cuda=True)
    check_plugin(dali.PLUGIN, nvdali.__version__)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_gpu_computes_what_the_cpu_does(dtype: torch.dtype, channels_last: bool) -> None:
    batch = varied_batch(24)  # lossless files, so that both decoders give the same pixels
    cpu = pipeline([batch], (40, 40)).run()
    found = pipeline([batch], (40, 40), dtype, channels_last, device="gpu").run()
    assert found.is_cuda
    scale = torch.from_numpy(np.abs(batch.draw.color[:, :, :3]).sum((1, 2)))[:, None, None, None]
    step = torch.finfo(dtype).eps * cpu.abs()
    assert ((found.cpu().float() - cpu).abs() <= 0.1 * scale + step).all()
