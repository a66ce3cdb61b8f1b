"""The loader: every row once, the same pixels anywhere, and no bad file that costs more than its row."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import work as work_module
from facefast.data.augment import draw
from facefast.data.index import FAULTS, FaceIndex
from facefast.data.loader import BadDataError, Batch, Loader, make_loader
from facefast.data.oracle import render
from facefast.data.sampler import EpochSampler, PKSampler
from facefast.recipe import AugmentSpec, ImageSpec
from tests.support.pictures import encode, exif, garbled_jpeg, garbled_png, make_index, odd_pictures, smooth_picture

IMAGE = ImageSpec(24)
AUGMENT = AugmentSpec(crop=0.3, flip=0.5, rotation=10, brightness=0.2, hue=0.1, erase=0.3)
NUMBER = 37


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    """37 small JPEG files with landmarks nowhere; tests that damage files use `copied`."""
    folder = tmp_path_factory.mktemp("photographs")
    return write_photographs(folder)


@pytest.fixture
def copied(tmp_path: Path) -> FaceIndex:
    return write_photographs(tmp_path)


def write_photographs(folder: Path) -> FaceIndex:
    names = [f"{i:03}.jpg" for i in range(NUMBER)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encode(smooth_picture(40 + i % 3, 48, i)))
    return make_index(folder, names, np.array([[48, 40 + i % 3] for i in range(NUMBER)]))


def shuffled(index: FaceIndex, batch_size: int = 8, seed: int = 1) -> EpochSampler:
    return EpochSampler(np.arange(len(index)), batch_size, seed)


def epoch_of(index: FaceIndex, batch_size: int = 8, **options: Any) -> list[Batch]:
    """One epoch of 8 rows a global batch, shuffled and augmented unless told otherwise."""
    world = int(options.get("world", 1))
    settings: dict[str, Any]
    settings = {"sampler": shuffled(index, batch_size), "augment": AUGMENT, "seed": 5, "epoch": 2, "threads": 2}
    settings.update(options)
    with make_loader(index, IMAGE, batch_size=batch_size // world, **settings) as loader:
        return list(loader)


def by_row(batches: Iterable[Batch]) -> dict[int, Tensor]:
    return {
        row: images
        for batch in batches
        for row, images in zip(batch.rows.tolist(), batch.images, strict=True)
        if row >= 0
    }


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.rows, other.rows) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def test_an_epoch_has_every_row_once_with_its_label_and_a_padded_tail(photographs: FaceIndex) -> None:
    batches = epoch_of(photographs)
    rows, labels = torch.cat([b.rows for b in batches]), torch.cat([b.labels for b in batches])
    assert rows.dtype == labels.dtype == torch.int64 and len(batches) == 5
    assert sorted(rows[rows >= 0].tolist()) == list(range(NUMBER))
    assert (rows == -1).sum() == 3 and (labels[rows < 0] == -100).all()
    assert labels[rows >= 0].tolist() == photographs.labels[rows[rows >= 0]].tolist()
    for batch in batches:
        assert batch.images.shape == (8, 3, 24, 24) and batch.images.dtype == torch.float32


@pytest.mark.parametrize("decoder", ["dali", "oracle"])
def test_pixels_are_those_that_the_oracle_renders(photographs: FaceIndex, decoder: str) -> None:
    found = by_row(epoch_of(photographs, decoder=decoder))
    expected = render(photographs, np.arange(NUMBER), IMAGE, AUGMENT, seed=5, epoch=2)
    for row in range(NUMBER):
        assert (found[row] - expected[row]).abs().mean() < 2 / 127.5


@pytest.mark.parametrize("world", [2, 4])
def test_a_rows_pixels_are_identical_at_any_world_size(photographs: FaceIndex, world: int) -> None:
    alone = by_row(epoch_of(photographs))
    together: dict[int, Tensor] = {}
    for rank in range(world):
        part = by_row(epoch_of(photographs, rank=rank, world=world))
        assert not part.keys() & together.keys()
        together.update(part)
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[row], together[row]) for row in alone)


def test_a_rows_pixels_do_not_depend_on_its_slot_or_its_neighbours(photographs: FaceIndex) -> None:
    usual = by_row(epoch_of(photographs))
    other = by_row(epoch_of(photographs, batch_size=5, sampler=shuffled(photographs, 5, seed=9), threads=1))
    assert all(torch.equal(usual[row], other[row]) for row in usual)


def rows_of(images: torch.Tensor, index: FaceIndex) -> list[int]:
    """Which rows of the epoch pictures are."""
    known = by_row(epoch_of(index))
    return [row for image in images for row, other in known.items() if torch.equal(image, other)]


def test_empty_slots_carry_pictures_of_other_batches_no_two_the_same(photographs: FaceIndex) -> None:
    last = epoch_of(photographs)[-1]
    assert last.rows.tolist()[5:] == [-1, -1, -1]
    fillers = rows_of(last.images[5:], photographs)
    assert len(set(fillers)) == 3 and not set(fillers) & set(last.rows.tolist())


def test_a_last_batch_of_one_picture_is_as_varied_as_any(photographs: FaceIndex) -> None:
    index = photographs.select(np.arange(9))
    last = epoch_of(index)[-1]
    assert (last.rows >= 0).sum() == 1
    assert len(set(rows_of(last.images, index))) == 8


def test_a_rank_without_any_row_in_the_last_batch_borrows_pictures(photographs: FaceIndex) -> None:
    index = photographs.select(np.arange(9))
    first, last = epoch_of(index, rank=3, world=4)
    assert first.rows.min() >= 0 and last.rows.tolist() == [-1, -1]
    assert len(set(rows_of(last.images, index))) == 2


def test_data_with_fewer_pictures_than_slots_takes_turns(photographs: FaceIndex) -> None:
    index = photographs.select(np.arange(3))
    (batch,) = epoch_of(index)
    assert batch.rows.tolist().count(-1) == 5
    assert set(rows_of(batch.images, index)) == {0, 1, 2}


def test_resuming_at_any_step_gives_the_tail_of_the_epoch(photographs: FaceIndex) -> None:
    whole = epoch_of(photographs)
    for step in range(6):
        assert_same(epoch_of(photographs, start_step=step), whole[step:])


@pytest.mark.parametrize("decoder", ["dali", "oracle"])
def test_a_loader_can_be_left_anywhere_and_sent_to_another_epoch(photographs: FaceIndex, decoder: str) -> None:
    options: dict[str, Any]
    options = {"sampler": shuffled(photographs), "augment": AUGMENT, "seed": 5, "threads": 2, "decoder": decoder}
    with make_loader(photographs, IMAGE, batch_size=8, **options) as loader:
        for left_after in (0, 1, 3, 5):
            loader.set_epoch(7)
            batches = iter(loader)
            for _ in range(left_after):
                next(batches)
            loader.set_epoch(2, start_step=1)
            assert len(loader) == 4
            assert_same(list(loader), epoch_of(photographs, decoder=decoder)[1:])
        assert_same(list(loader), epoch_of(photographs, decoder=decoder)[1:])  # once more


def test_an_iteration_that_lost_its_place_says_so(photographs: FaceIndex) -> None:
    with make_loader(photographs, IMAGE, batch_size=8, threads=1) as loader:
        old = iter(loader)
        next(old)
        loader.set_epoch(1)
        with pytest.raises(ValueError, match="taken this one's place; iterate the loader anew"):
            next(old)
        new = iter(loader)
        next(new)
        loader.close()
        with pytest.raises(ValueError, match="the loader is closed"):
            next(new)


def test_without_a_sampler_the_sound_rows_come_in_order(photographs: FaceIndex) -> None:
    faults = np.zeros(NUMBER, np.uint8)
    faults[[0, 20]] = FAULTS.index("truncated")
    index = make_index(photographs.root, [f"{i:03}.jpg" for i in range(NUMBER)], (48, 40), faults=faults)
    with make_loader(index, IMAGE, batch_size=8, threads=1) as loader:
        rows = torch.cat([batch.rows for batch in loader])
    assert rows[rows >= 0].tolist() == [row for row in range(NUMBER) if row not in (0, 20)]
    assert loader.bad == {}


def test_a_quarantined_row_that_a_sampler_asks_for_is_never_fed(photographs: FaceIndex) -> None:
    faults = np.zeros(NUMBER, np.uint8)
    faults[3] = FAULTS.index("truncated")
    index = make_index(photographs.root, [f"{i:03}.jpg" for i in range(NUMBER)], (48, 40), faults=faults)
    with make_loader(index, IMAGE, batch_size=8, sampler=shuffled(index), threads=1) as loader:
        assert set(by_row(loader)) == set(range(NUMBER)) - {3}
    assert loader.bad == {3: "truncated"}


@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("decoder", ["dali", "oracle"])
def test_images_come_in_the_asked_type_and_memory_format(
    photographs: FaceIndex, dtype: torch.dtype, channels_last: bool, decoder: str
) -> None:
    batch = epoch_of(photographs, dtype=dtype, channels_last=channels_last, decoder=decoder)[0]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.images.dtype == dtype and batch.images.is_contiguous(memory_format=layout)
    exact = epoch_of(photographs, decoder=decoder)[0].images
    torch.testing.assert_close(batch.images.float(), exact, rtol=2**-8, atol=2**-8)


def test_batches_outlive_the_loader_and_each_other(photographs: FaceIndex) -> None:
    kept = epoch_of(photographs)
    copies = [batch.images.clone() for batch in kept]
    epoch_of(photographs, epoch=3)
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))


def test_pictures_inside_larger_files_give_the_same_batches(photographs: FaceIndex, tmp_path: Path) -> None:
    files = [Path(photographs.path(row)).read_bytes() for row in range(NUMBER)]
    (tmp_path / "train.rec").write_bytes(b"16 bytes of head" + b"".join(files))
    lengths = np.array([len(file) for file in files])
    packed = make_index(
        tmp_path,
        ["train.rec"] * NUMBER,
        (48, 40),
        offsets=16 + np.cumsum(lengths) - lengths,
        lengths=lengths,
    )
    assert_same(epoch_of(packed), epoch_of(photographs))


def test_sizes_and_orientation_are_those_of_the_file_not_of_an_old_index(tmp_path: Path) -> None:
    kinds = odd_pictures()
    names = [f"{i}.bin" for i in range(len(kinds))]
    for name, data in zip(names, kinds.values(), strict=True):
        (tmp_path / name).write_bytes(data)
    index = make_index(tmp_path, names, (7, 7))
    found = by_row(epoch_of(index))
    expected = render(index, np.arange(len(kinds)), IMAGE, AUGMENT, seed=5, epoch=2)
    for row, kind in enumerate(kinds):
        assert (found[row] - expected[row]).abs().mean() < 2 / 127.5, kind


# What happens to a file between the index and its batch, and the reason that `bad` gives for it.
DAMAGE = {
    "removed": (None, "missing"),
    "emptied": (b"", "empty"),
    "truncated": (encode(smooth_picture(40, 48))[:-400], "truncated"),
    "replaced by a web page": (b"<html>not here</html>" * 20, "not a picture"),
    "garbled jpeg": (garbled_jpeg(), ""),
    "garbled png": (garbled_png(), ""),
}


def damage(index: FaceIndex, rows: Iterable[int], data: bytes | None) -> None:
    for row in rows:
        if data is None:
            Path(index.path(row)).unlink()
        else:
            Path(index.path(row)).write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("decoder", ["dali", "oracle"])
def test_a_file_that_goes_bad_costs_its_row_alone(
    copied: FaceIndex, kind: str, decoder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    clean = epoch_of(copied, decoder=decoder)
    order = torch.cat([batch.rows for batch in clean]).tolist()
    victims = [order[0], order[17], order[19], order[20], order[34]]  # first, middle (three of one) and last batch
    data, reason = DAMAGE[kind]
    damage(copied, victims, data)
    options: dict[str, Any]
    options = {"sampler": shuffled(copied), "augment": AUGMENT, "seed": 5, "threads": 2, "decoder": decoder}
    with make_loader(copied, IMAGE, batch_size=8, epoch=2, **options) as loader:
        first = list(loader)
        again = list(loader)
    assert set(loader.bad) == set(victims)
    assert all(reason in found and found for found in loader.bad.values())
    assert_same(again, first)
    pictures = {row: image for batch in clean for row, image in zip(batch.rows.tolist(), batch.images, strict=True)}
    for batch, whole in zip(first, clean, strict=True):
        lost = torch.tensor([row in victims for row in whole.rows.tolist()])
        assert torch.equal(batch.rows, whole.rows.masked_fill(lost, -1))
        assert torch.equal(batch.labels, whole.labels.masked_fill(lost, -100))
        sound = batch.rows >= 0
        assert torch.equal(batch.images[sound], whole.images[sound])
        # Empty slots hold pictures of other batches, each another one.
        others = {row: image for row, image in pictures.items() if row not in whole.rows.tolist()}
        fillers = [
            [row for row, other in others.items() if torch.equal(image, other)] for image in batch.images[~sound]
        ]
        assert all(len(rows) == 1 for rows in fillers) and len({rows[0] for rows in fillers}) == len(fillers)
    capfd.readouterr()  # libjpeg's and libpng's own complaints


@pytest.mark.parametrize("kind", ["removed", "garbled jpeg"])
@pytest.mark.parametrize("decoder", ["dali", "oracle"])
def test_a_batch_without_any_sound_picture_counts_for_nothing(
    copied: FaceIndex, kind: str, decoder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    clean = epoch_of(copied, decoder=decoder)
    damage(copied, clean[1].rows.tolist(), DAMAGE[kind][0])
    found = epoch_of(copied, decoder=decoder)
    assert (found[1].rows == -1).all() and (found[1].labels == -100).all()
    assert len({tuple(image.flatten().tolist()) for image in found[1].images}) == 8  # other pictures, no two the same
    assert_same([found[0], *found[2:]], [clean[0], *clean[2:]])
    capfd.readouterr()


def test_a_repeated_row_that_breaks_the_decoder_is_lost_in_every_slot(
    copied: FaceIndex, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(copied, [0], garbled_jpeg())
    labels = np.minimum(np.arange(NUMBER), 5) // 1  # identity 0 has one picture, row 0, four times in a batch
    sampler = PKSampler(np.arange(NUMBER), labels, 8, seed=0, pictures_per_identity=4)
    with make_loader(copied, IMAGE, batch_size=8, sampler=sampler, threads=1) as loader:
        rows = torch.cat([batch.rows for batch in loader])
    asked = np.concatenate([sampler.batch(0, step) for step in range(sampler.steps_per_epoch)])
    assert (asked == 0).sum() >= 4 and rows.tolist() == np.where(asked == 0, -1, asked).tolist()
    assert set(loader.bad) == {0}
    capfd.readouterr()


def test_a_picture_that_changed_after_it_was_indexed_is_no_longer_its_row(copied: FaceIndex) -> None:
    index = copied.scanned()
    clean = by_row(epoch_of(index))
    Path(index.path(7)).write_bytes(encode(smooth_picture(40, 48, 99)))  # sound, and another one
    with make_loader(index, IMAGE, batch_size=8, sampler=shuffled(index), augment=AUGMENT, seed=5, epoch=2) as loader:
        found = by_row(loader)
    assert loader.bad == {7: "changed since it was indexed"}
    assert set(found) == set(range(NUMBER)) - {7}
    assert all(torch.equal(found[row], clean[row]) for row in found)


def test_a_bad_row_is_not_read_again(copied: FaceIndex, capfd: pytest.CaptureFixture[str]) -> None:
    damage(copied, [4], garbled_jpeg())
    with make_loader(copied, IMAGE, batch_size=8, threads=1) as loader:
        list(loader)
        Path(copied.path(4)).write_bytes(encode(smooth_picture(40, 48)))
        assert 4 not in by_row(loader)
    capfd.readouterr()


def test_past_the_budget_the_run_stops_with_a_list(copied: FaceIndex) -> None:
    damage(copied, range(5, 19), None)
    with (
        make_loader(copied, IMAGE, batch_size=8, threads=1, max_bad_fraction=0.3) as loader,
        pytest.raises(BadDataError) as caught,
    ):
        list(loader)
    text = str(caught.value)
    assert "14 of 37" not in text and "of 24 pictures could not be used" in text
    assert "more than data.max_bad_fraction 0.3 allows (14 missing)" in text
    assert [f"{row:03}.jpg: missing" in text for row in range(5, 15)] == [True] * 10
    assert f"python -m facefast.index {copied.root}" in text
    assert isinstance(caught.value, ValueError)
    assert caught.value.bad == {copied.path(row): "missing" for row in range(5, 19)}


def test_the_budget_lets_few_pictures_pass_unless_it_is_zero(copied: FaceIndex) -> None:
    damage(copied, range(9), None)

    def lost(fraction: float, index: FaceIndex = copied) -> int:
        with make_loader(index, IMAGE, batch_size=4, threads=1, max_bad_fraction=fraction) as loader:
            for _ in range(3):
                list(loader)
            return len(loader.bad)

    assert lost(0.01) == 9  # epoch after epoch
    with pytest.raises(BadDataError, match="(?s)4 of 4 pictures .*max_bad_fraction 0 allows"):
        lost(0.0)
    with pytest.raises(BadDataError, match="5 of 5 pictures"):
        lost(0.5, copied.select(np.arange(5)))  # all there are, though fewer than ten
    damage(copied, [9], None)
    assert lost(0.28) == 10  # 10 of 37 are 0.27
    with pytest.raises(BadDataError, match="(?s)10 of 12 pictures .*max_bad_fraction 0.26 allows"):
        lost(0.26)


def test_an_error_of_the_reading_thread_reaches_the_caller(
    photographs: FaceIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(index: FaceIndex, rows: NDArray[np.int64], *rest: Any) -> object:
        if 20 in rows:
            raise error
        return draw(index, rows, *rest)

    monkeypatch.setattr(work_module, "draw", failing)
    for error in (MemoryError("no memory left"), RuntimeError("a thread cannot start")):
        with make_loader(photographs, IMAGE, batch_size=8, threads=1) as loader:
            with pytest.raises(type(error), match=str(error)):
                list(loader)
            loader.set_epoch(0, 3)  # behind the trouble
            assert set(by_row(loader)) == set(range(24, NUMBER))


def test_closing_ends_the_reading_thread_wherever_the_loader_is(photographs: FaceIndex) -> None:
    def reading() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "facefast-loader" in thread.name]

    assert reading() == []
    loader = make_loader(photographs, IMAGE, batch_size=4, threads=1)
    next(iter(loader))
    assert len(reading()) == 1
    loader.close()
    assert reading() == []
    loader.close()


def test_only_the_time_that_the_caller_waits_is_counted(photographs: FaceIndex) -> None:
    with make_loader(photographs, IMAGE, batch_size=8, threads=1) as loader:
        began, slept = time.perf_counter(), 0.0
        assert loader.wait_seconds == 0
        for _ in loader:
            time.sleep(0.01)
            slept += 0.01
        assert 0 < loader.wait_seconds <= time.perf_counter() - began - slept


def test_pictures_above_the_limit_are_not_decoded(copied: FaceIndex) -> None:
    damage(copied, [6], encode(smooth_picture(60, 60), exif=exif(6)))
    with make_loader(copied, IMAGE, batch_size=8, threads=1, max_pixels=3000) as loader:
        assert set(by_row(loader)) == set(range(NUMBER)) - {6}
    assert loader.bad == {6: "too many pixels"}


def test_errors_name_the_argument(photographs: FaceIndex) -> None:
    def make(**options: Any) -> Loader:
        return make_loader(photographs, IMAGE, **{"batch_size": 8, **options})

    with pytest.raises(ValueError, match="device is meta; .* cpu or cuda"):
        make(device="meta")
    with pytest.raises(ValueError, match="decoder is 'pil'; it must be dali or oracle"):
        make(decoder="pil")
    with pytest.raises(ValueError, match="max_bad_fraction is 2"):
        make(max_bad_fraction=2)
    with pytest.raises(ValueError, match="rank is 2; it must lie in"):
        make(rank=2, world=2)
    with pytest.raises(ValueError, match="global batch is 8, but 2 processes with batches of 8 take 16"):
        make(sampler=shuffled(photographs), world=2)
    with pytest.raises(ValueError, match="draws rows 30 to 37, but the index has 37"):
        make(sampler=EpochSampler(np.arange(30, 38), 8))
    with pytest.raises(ValueError, match="epoch 0, step 6 does not exist"):
        make(start_step=6)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make(batch_size=0)


@pytest.mark.gpu
@pytest.mark.parametrize("decoding", ["gpu", "regions", "cpu"])
def test_on_a_gpu_everything_arrives_there_with_the_same_pixels(photographs: FaceIndex, decoding: str) -> None:
    batches = epoch_of(photographs, device="cuda", decoding=decoding)
    assert all(tensor.is_cuda for batch in batches for tensor in batch)
    host = by_row(epoch_of(photographs))
    apart = torch.stack(
        [
            (image - host[row]).abs().mean() * 127.5
            for row, image in by_row(Batch(*(tensor.cpu() for tensor in batch)) for batch in batches).items()
        ]
    )
    assert apart.mean() < 0.05 and apart.max() < 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DAMAGE)
def test_on_a_gpu_a_file_that_goes_bad_costs_its_row_alone(copied: FaceIndex, kind: str) -> None:
    clean = epoch_of(copied, device="cuda")
    victims = clean[0].rows[:1].tolist() + clean[2].rows[2:5].tolist()
    damage(copied, victims, DAMAGE[kind][0])
    found = epoch_of(copied, device="cuda")
    rows = torch.cat([batch.rows for batch in found])
    assert set(rows[rows >= 0].tolist()) == set(range(NUMBER)) - set(victims)
    ours, theirs = by_row(found), by_row(clean)
    assert all(torch.equal(ours[row], theirs[row]) for row in ours)
