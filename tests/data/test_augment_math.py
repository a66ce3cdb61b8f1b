"""The operator's arithmetic without DALI: the vector path, the portable path and the CUDA kernel's, on the host."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from facefast import _C
from facefast.data import oracle
from facefast.recipe import ImageSpec
from tests.support import ptxas
from tests.support.pictures import smooth_picture

SOURCES = Path(__file__).parents[2] / "csrc" / "dali"
FLOAT, HALF, BFLOAT16 = range(3)
NUMPY = {FLOAT: np.float32, HALF: np.float16, BFLOAT16: np.uint16}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The CPU path of this processor, and the one of processors without AVX2."""
    folder = tmp_path_factory.mktemp("math")
    return build(folder / "vector.so"), build(folder / "portable.so", "-DFACEFAST_PORTABLE")


@pytest.fixture(params=["vector", "portable"])
def path(request: pytest.FixtureRequest, both: tuple[ctypes.CDLL, ctypes.CDLL]) -> ctypes.CDLL:
    """One of them after the other."""
    return both[request.param == "portable"]


def build(target: Path, *flags: str) -> ctypes.CDLL:
    sources = [Path(__file__).parents[1] / "support" / "augment_math.cpp"]
    sources += [SOURCES / "augment_cpu.cpp", SOURCES / "augment_avx2.cpp"]
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *options, *flags, *map(str, sources), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def similarity(
    scale: float, degrees: float, centre: tuple[float, float], shape: tuple[int, int], flip: bool = False
) -> NDArray[np.float32]:
    """Output of `shape` centred on a point of the picture, each output pixel `scale` source pixels wide."""
    angle = np.radians(degrees)
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if flip:
        linear[:, 0] *= -1
    offset = np.array(centre) - linear @ np.array([shape[1] / 2, shape[0] / 2])
    return np.concatenate([linear, offset[:, None]], 1).astype(np.float32)


IDENTITY_COLOR = np.eye(3, 4, dtype=np.float32)
NO_ERASE = np.zeros(4, np.int32)


def numbers(
    matrix: NDArray[np.float32],
    color: NDArray[np.float32] = IDENTITY_COLOR,
    erase: NDArray[np.int32] = NO_ERASE,
    origin: tuple[int, int] = (0, 0),
) -> NDArray[np.float32]:
    return np.concatenate([matrix.ravel(), color.ravel(), erase, origin]).astype(np.float32)


def run(
    path: ctypes.CDLL,
    picture: NDArray[np.uint8],
    row: NDArray[np.float32],
    shape: tuple[int, int],
    dtype: int = FLOAT,
    channels_last: bool = True,
) -> NDArray[Any]:
    picture = np.ascontiguousarray(picture)
    height, width = shape
    out = np.full((height, width, 3) if channels_last else (3, height, width), 7, NUMPY[dtype])
    path.augment(
        picture.ctypes.data_as(ctypes.c_void_p),
        picture.shape[1],
        picture.shape[0],
        row.ctypes.data_as(ctypes.c_void_p),
        width,
        height,
        dtype,
        channels_last,
        out.ctypes.data_as(ctypes.c_void_p),
    )
    return out


def run_as_cuda(
    path: ctypes.CDLL, picture: NDArray[np.uint8], row: NDArray[np.float32], shape: tuple[int, int]
) -> NDArray[np.float32]:
    picture = np.ascontiguousarray(picture)
    out = np.empty((*shape, 3), np.float32)
    path.augment_as_cuda(
        picture.ctypes.data_as(ctypes.c_void_p),
        picture.shape[1],
        picture.shape[0],
        row.ctypes.data_as(ctypes.c_void_p),
        shape[1],
        shape[0],
        out.ctypes.data_as(ctypes.c_void_p),
    )
    return out


def cases() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32], tuple[int, int]]]:
    """Random pictures, matrices, colours, rectangles and output sizes: everything the operator can meet."""
    random = np.random.default_rng(5)
    for size in [(218, 178), (64, 64), (7, 300), (300, 7), (40, 9), (9, 40), (1, 1), (2, 3), (3, 10)]:
        for scale in (0.3, 0.9, 1.0, 1.2, 1.5, 1.9, 2.6, 3.9, 4.1, 7.0, 20.0):
            picture = random.integers(0, 256, (*size, 3)).astype(np.uint8)
            shape = tuple(random.integers(8, 40, 2).tolist())
            centre = random.uniform(-0.2, 1.2, 2) * size[::-1]
            matrix = similarity(scale, random.uniform(-180, 180), tuple(centre), shape, random.random() < 0.5)
            matrix[random.integers(2)] *= random.choice([1.0, 1.7])
            color = random.normal(size=(3, 4)).astype(np.float32)
            corners = np.sort(random.integers(0, 41, (2, 2)), 0).ravel() % (np.array(shape * 2)[::-1] + 1)
            erase = np.array(corners if random.random() < 0.5 else NO_ERASE, np.int32)
            erase = np.where((erase[:2] < erase[2:]).all(), erase, 0).astype(np.int32)
            yield picture, numbers(matrix, color, erase), shape


def test_every_path_computes_what_the_oracle_does(path: ctypes.CDLL) -> None:
    for picture, row, shape in cases():
        found = run(path, picture, row, shape)
        color = row[6:18].reshape(3, 4)
        image = ImageSpec.__new__(ImageSpec)  # sizes below ImageSpec's limit are the operator's business too
        object.__setattr__(image, "size", shape[0])
        object.__setattr__(image, "width", shape[1])
        expected = oracle.apply(picture, row[:6].reshape(2, 3), color, row[18:22].astype(np.int32), image)
        # What one level of 255 weighs after colour.
        level = np.abs(color[:, :3]).sum(1).max()
        error = np.abs(found - expected.numpy().transpose(1, 2, 0)) / level
        assert error.max() < 0.03, (picture.shape, shape, row)


def test_the_cuda_kernel_computes_what_the_portable_path_does(
    both: tuple[ctypes.CDLL, ctypes.CDLL],
) -> None:
    for picture, row, shape in cases():
        portable = run(both[1], picture, row, shape)
        np.testing.assert_allclose(run_as_cuda(both[1], picture, row, shape), portable, atol=1e-3, rtol=1e-5)


def test_the_vector_path_rounds_weights_by_no_more_than_it_says(
    both: tuple[ctypes.CDLL, ctypes.CDLL],
) -> None:
    for picture, row, shape in cases():
        row[6:18] = IDENTITY_COLOR.ravel()
        vector, portable = (run(path, picture, row, shape) for path in both)
        assert np.abs(vector - portable).max() < 0.05


def test_an_even_surface_stays_exactly_even(path: ctypes.CDLL) -> None:
    picture = np.full((200, 200, 3), (255, 128, 3), np.uint8)
    for scale in (0.4, 1.0, 1.3, 1.7, 2.5, 3.5):
        found = run(path, picture, numbers(similarity(scale, 17, (100, 100), (40, 40))), (40, 40))
        np.testing.assert_allclose(found, np.broadcast_to((255, 128, 3), (40, 40, 3)), atol=0.03)


def test_the_identity_is_exact(path: ctypes.CDLL) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (50, 61, 3)).astype(np.uint8)
    found = run(path, picture, numbers(similarity(1, 0, (30.5, 25), (50, 61))), (50, 61))
    np.testing.assert_array_equal(found, picture)


@pytest.mark.parametrize("width", [8, 13, 96, 112])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_and_types_hold_the_same_rounded_values(path: ctypes.CDLL, width: int, channels_last: bool) -> None:
    picture = smooth_picture(120, 100)
    color = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    row = numbers(similarity(1.1, 10, (50, 60), (20, width)), color, np.array([3, 2, 9, 9]))
    reference = torch.from_numpy(run(path, picture, row, (20, width)))
    if not channels_last:
        reference = reference.permute(2, 0, 1)
    for dtype, kind in ((FLOAT, torch.float32), (HALF, torch.float16), (BFLOAT16, torch.bfloat16)):
        found = torch.from_numpy(run(path, picture, row, (20, width), dtype, channels_last))
        torch.testing.assert_close(found.view(kind), reference.to(kind), rtol=0, atol=0)


def test_portable_rounding_is_to_the_nearest_even(both: tuple[ctypes.CDLL, ctypes.CDLL]) -> None:
    random = np.random.default_rng(2)
    bits = random.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = (finite[:-1] + finite[1:]) / 2
    edges = np.array([0, -0.0, 65519.996, 65520, 1e30, np.inf, np.nan, 2**-25], np.float32)
    values = np.concatenate([bits.view(np.float32), halves, ties, edges])
    found = np.empty(len(values), np.uint16)
    for dtype, kind in ((HALF, torch.float16), (BFLOAT16, torch.bfloat16)):
        both[1].narrow(
            values.ctypes.data_as(ctypes.c_void_p),
            len(values),
            dtype,
            found.ctypes.data_as(ctypes.c_void_p),
        )
        expected = torch.from_numpy(values).to(kind)
        torch.testing.assert_close(torch.from_numpy(found.copy()).view(kind), expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_read_past_the_end_of_a_picture(both: tuple[ctypes.CDLL, ctypes.CDLL]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    page, pages = mmap.PAGESIZE, 12
    memory = mmap.mmap(-1, (pages + 1) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.c_void_p(base + pages * page)
    assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0
    try:
        for size in [(1, 1), (2, 2), (3, 9), (5, 10), (100, 100), (9, 4)]:
            length = size[0] * size[1] * 3
            at = pages * page - length
            picture = np.frombuffer(memory, np.uint8, length, at).reshape(*size, 3)
            picture[:] = 200
            for scale in (0.2, 1.0, 1.4, 2.5, 3.9, 6.0):
                for degrees in (0, 33):
                    matrix = similarity(scale, degrees, (size[1] / 2, size[0] / 2), (32, 32))
                    found = run(both[0], picture, numbers(matrix), (32, 32))
                    assert found.max() < 200.1
            del picture
    finally:
        libc.mprotect(guard, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_region_gives_what_the_whole_picture_gives(path: ctypes.CDLL) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (400, 500, 3)).astype(np.uint8)
    for scale in (0.7, 1.3, 3.0, 4.5, 9.0):
        matrix = similarity(scale, 20, (240, 190), (24, 24))
        reach = 17 * 1.4143 * scale + 2 * scale + 3
        x, y = (max(0, int(centre - reach)) for centre in (240, 190))
        part = picture[y : int(190 + reach) + 1, x : int(240 + reach) + 1]
        whole = run(path, picture, numbers(matrix), (24, 24))
        region = run(path, part, numbers(matrix, origin=(x, y)), (24, 24))
        np.testing.assert_allclose(region, whole, atol=0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_senseless_matrix_gives_black_and_no_crash(path: ctypes.CDLL, value: float) -> None:
    picture = smooth_picture(40, 40)
    found = run(path, picture, numbers(np.full((2, 3), value, np.float32)), (16, 16))
    assert found.shape == (16, 16, 3)


@pytest.mark.skipif(not _C.cuda, reason="built without CUDA; FACEFAST_CUDA=1, as .ci/run sets it, runs this")
def test_the_cuda_kernel_compiles_without_spills() -> None:
    found = ptxas.kernels("face_augment.cu")
    assert {kernel.arch for kernel in found} >= {"sm_90"}
    for arch in {kernel.arch for kernel in found}:
        assert len([kernel for kernel in found if kernel.arch == arch]) == 6  # three types, with blocks and without
    assert {(kernel.stack, kernel.spills) for kernel in found} == {(0, 0)}
    assert max(kernel.registers for kernel in found) <= 64  # four blocks of 256 threads fit
