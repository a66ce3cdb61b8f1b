"""Large pictures: a batch of them is decoded in parts and read again when it is wanted, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from facefast.data import loader as loader_module
from facefast.data import work as work_module
from facefast.data.index import FaceIndex
from facefast.data.loader import Batch, make_loader
from facefast.recipe import AugmentSpec, ImageSpec
from tests.support.pictures import encode, garbled_png, make_index

NUMBER, SIDE = 13, 700


@pytest.fixture
def large(tmp_path: Path) -> FaceIndex:
    """Noise, so that each file has more than the megabyte that is always kept."""
    noise = np.random.default_rng(0).integers(0, 256, (NUMBER, SIDE, SIDE, 3), np.uint8)
    for row in range(NUMBER):
        (tmp_path / f"{row:02}.png").write_bytes(encode(noise[row], "PNG"))
    return make_index(tmp_path, [f"{row:02}.png" for row in range(NUMBER)], (SIDE, SIDE)).scanned()


def epochs(index: FaceIndex) -> tuple[list[Batch], dict[int, str]]:
    found = []
    with make_loader(index, ImageSpec(24), batch_size=4, augment=AugmentSpec(crop=0.3, rotation=9), threads=2) as one:
        for epoch in (0, 1):
            one.set_epoch(epoch)
            found += list(one)
        one.set_epoch(2)
        next(iter(one))  # left in the middle
        one.set_epoch(3)
        found += list(one)
        return found, dict(one.bad)


@pytest.mark.parametrize("broken", [False, True], ids=["sound", "broken"])
def test_parts_and_second_readings_change_no_pixel(
    large: FaceIndex, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken:
        Path(large.path(5)).write_bytes(garbled_png())
        large = large.scanned()
    whole, bad = epochs(large)
    parts: list[int] = []
    split = work_module.Work.parts

    def counted(work: work_module.Work, most_pixels: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
        found = split(work, most_pixels)
        parts.append(len(found))
        return found

    monkeypatch.setattr(work_module.Work, "parts", counted)
    monkeypatch.setattr(work_module, "KEPT_BYTES", 2 << 20)
    monkeypatch.setattr(loader_module, "PIXELS", 3 * SIDE * SIDE - 1)
    monkeypatch.setattr(loader_module, "PIXELS_PER_THREAD", 0)
    ours, found = epochs(large)
    assert set(parts) >= {2}, "no batch was decoded in parts"
    assert found == bad and (list(bad) == [5]) == broken
    assert [batch.rows.tolist() for batch in ours] == [batch.rows.tolist() for batch in whole]
    for one, other in zip(ours, whole, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.images.is_contiguous(memory_format=torch.channels_last)


def test_a_picture_that_changes_between_two_readings_is_no_row(
    large: FaceIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_module, "KEPT_BYTES", 0)
    begin = work_module.Reader.begin

    def changed(self: work_module.Reader, *given: object) -> work_module.Work:
        work = begin(self, *given)  # type: ignore[arg-type]
        Path(large.path(6)).write_bytes(Path(large.path(7)).read_bytes())
        return work

    monkeypatch.setattr(work_module.Reader, "begin", changed)
    with make_loader(large, ImageSpec(24), batch_size=NUMBER, max_bad_fraction=1.0) as one:
        (batch,) = list(one)
    assert batch.rows.tolist() == [row if row != 6 else -1 for row in range(NUMBER)]
    assert list(one.bad) == [6]
