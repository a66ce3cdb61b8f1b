"""`facefast._scan`: every fault by name and none invented, ranges, hashes, and the batch reader."""

from __future__ import annotations

import io
import os
import resource
import socket
import struct
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from facefast import _scan
from facefast.data.dali import decode_probe
from tests.support.faulty import faulty_pictures, jpeg, sound_pictures
from tests.support.pictures import encode, smooth_picture

FAULTY = faulty_pictures()
SOUND = sound_pictures()
LIMIT = 64_000_000
TOO_LONG = "too many bytes (more than 16 MiB and 8 for each pixel, or than 128 MiB)"


def inspect(data: bytes, max_pixels: int = LIMIT) -> tuple[str, str, int, int, int]:
    """(reason, kind, width, height, orientation) of a picture in memory."""
    fault, kind, width, height, orientation = _scan.inspect(data, max_pixels)
    return _scan.FAULTS[fault], _scan.KINDS[kind], width, height, orientation


def scan(
    root: Path, names: list[str], ranges: list[tuple[int, int]] | None = None, **options: Any
) -> dict[str, NDArray[Any]]:
    """_scan.scan of files, or of ranges of them, below `root`."""
    offsets, lengths = np.array(ranges or [(-1, -1)] * len(names), np.int64).reshape(-1, 2).T
    given = {"threads": 2, "max_pixels": LIMIT} | options
    paths = np.array([os.fsencode(name) for name in names])
    return cast("dict[str, NDArray[Any]]", _scan.scan(os.fsencode(root), paths, offsets, lengths, **given))


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_picture_is_named_with_its_reason(name: str) -> None:
    data, reason = FAULTY[name]
    assert inspect(data)[0] == reason


@pytest.mark.parametrize("name", SOUND)
def test_an_odd_but_sound_picture_passes_with_its_size_and_orientation(name: str) -> None:
    data, *expected = SOUND[name]
    assert inspect(data) == ("ok", *expected)


def test_the_decoder_gets_through_whatever_passes() -> None:
    for name, (data, _, width, height, orientation) in SOUND.items():
        size = (height, width) if orientation > 4 else (width, height)
        assert decode_probe(data, size) is None, name


@pytest.mark.parametrize("name", ["jpeg", "progressive jpeg", "png", "webp", "lossless webp"])
def test_no_beginning_of_a_picture_passes_for_the_whole(name: str) -> None:
    data = SOUND[name][0]
    passed = [cut for cut in range(len(data)) if inspect(data[:cut])[0] == "ok"]
    # The padding byte after an odd last chunk of a WebP is the only byte that may be missing.
    assert [cut for cut in passed if cut < len(data) - (name.endswith("webp"))] == []


def test_no_damage_makes_the_parsers_read_outside_the_picture() -> None:
    rng = np.random.default_rng(0)
    for data in [picture[0] for picture in SOUND.values()] + [picture[0] for picture in FAULTY.values()]:
        for _ in range(20):
            mutant = np.frombuffer(data, np.uint8).copy()
            if len(mutant) > 0:
                mutant[rng.integers(0, min(len(mutant), 400), 4)] = rng.integers(0, 256, 4)
            assert inspect(mutant.tobytes())[0] in _scan.FAULTS


def test_the_pixel_limit_is_inclusive() -> None:
    assert inspect(jpeg(), 120 * 90)[0] == "ok"
    assert inspect(jpeg(), 120 * 90 - 1)[0] == "too many pixels"


def test_the_hash_is_murmur3_as_published() -> None:
    # The verification value of SMHasher for MurmurHash3_x64_128 (main.cpp), by its own procedure.
    keys = bytes(range(256))
    hashes = b"".join(struct.pack("<QQ", *_scan.content_hash(keys[:i], 256 - i)) for i in range(256))
    assert struct.pack("<QQ", *_scan.content_hash(hashes))[:4] == struct.pack("<I", 0x6384BA69)


def test_a_scan_reports_exactly_the_faults_that_were_injected(tmp_path: Path) -> None:
    truth = {}
    for place, (data, reason) in enumerate(FAULTY.values()):
        truth[f"bad {place}.jpg"] = reason
        (tmp_path / f"bad {place}.jpg").write_bytes(data)
    for place, (data, *_) in enumerate(SOUND.values()):
        truth[f"good/{place}.jpg"] = "ok"
        (tmp_path / "good").mkdir(exist_ok=True)
        (tmp_path / "good" / f"{place}.jpg").write_bytes(data)
    truth["gone.jpg"] = truth["no folder/gone.jpg"] = truth["dangling.jpg"] = truth["loop.jpg"] = "missing"
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    truth["folder.jpg"] = truth["pipe.jpg"] = truth["socket.jpg"] = "not a regular file"
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(tmp_path / "socket.jpg"))
        found = scan(tmp_path, list(truth))
    assert [_scan.FAULTS[fault] for fault in found["fault"]] == list(truth.values())
    hashed = found["hash"].any(axis=1)
    assert np.array_equal(hashed, found["fault"] == 0), "exactly the sound pictures have a hash"


def test_a_pipe_is_reported_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    woken = threading.Event()

    def write() -> None:
        with open(tmp_path / "pipe.jpg", "wb"):  # waits until somebody opens the other end
            woken.set()

    writer = threading.Thread(target=write)
    writer.start()
    found = scan(tmp_path, ["pipe.jpg"] * 200)
    assert {_scan.FAULTS[fault] for fault in found["fault"]} == {"not a regular file"}
    assert not woken.is_set()
    with open(tmp_path / "pipe.jpg", "rb"):
        writer.join()


def test_the_type_comes_from_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(SOUND["png"][0])
    (tmp_path / "b.txt").write_bytes(jpeg())
    found = scan(tmp_path, ["a.jpg", "b.txt"])
    assert [_scan.KINDS[kind] for kind in found["kind"]] == ["png", "jpeg"]
    assert found["size"].tolist() == [len(SOUND["png"][0]), len(jpeg())]


def test_columns_agree_with_pillow_on_real_photographs(celeba_in_the_wild: Path) -> None:
    names = sorted(os.listdir(celeba_in_the_wild))
    found = scan(celeba_in_the_wild, names)
    sizes = []
    for name in names:
        with Image.open(celeba_in_the_wild / name) as picture:
            sizes.append(picture.size)
    assert not found["fault"].any()
    assert list(zip(found["width"].tolist(), found["height"].tolist(), strict=True)) == sizes


def test_any_number_of_threads_finds_the_same(celeba: Path) -> None:
    names = sorted(os.listdir(celeba / "img_align_celeba"))[:500]
    one, many = (scan(celeba / "img_align_celeba", names, threads=threads) for threads in (1, 7))
    for name, column in one.items():
        assert np.array_equal(column, many[name]), name


def test_ranges_of_a_container_are_pictures_of_their_own(tmp_path: Path) -> None:
    pictures = [encode(smooth_picture(40 + i, 60, i)) for i in range(5)]
    offsets = np.cumsum([7, *map(len, pictures)])[:-1].tolist()
    (tmp_path / "box").write_bytes(b"prefix!" + b"".join(pictures))
    end = 7 + sum(map(len, pictures))
    ranges = [*zip(offsets, map(len, pictures), strict=True), (offsets[0], 50), (end, 1), (end + 9, 5), (end, -1)]
    found = scan(tmp_path, ["box"] * len(ranges), ranges)
    reasons = [_scan.FAULTS[fault] for fault in found["fault"]]
    outside = "range outside its file"
    assert reasons == ["ok"] * 5 + ["truncated", outside, outside, "empty file"]
    assert found["height"][:5].tolist() == [40, 41, 42, 43, 44]
    hashes = [_scan.content_hash(picture) for picture in pictures]
    assert found["hash"][:5].tolist() == [list(pair) for pair in hashes]


def test_a_huge_file_that_is_no_picture_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "film.jpg", "wb") as file:
        file.write(b"\0\0\0\x18ftypmp42")
        file.truncate(900 << 20)  # sparse: reading it would take seconds and 900 MB
    with open(tmp_path / "monster.jpg", "wb") as file:
        file.write(jpeg())
        file.truncate(2 << 30)
    found = scan(tmp_path, ["film.jpg", "monster.jpg"])
    assert [_scan.FAULTS[f] for f in found["fault"]] == ["not a picture", TOO_LONG]


def test_a_tail_behind_a_picture_is_not_kept_and_a_long_one_not_read(tmp_path: Path) -> None:
    tiff, other = io.BytesIO(), b"#" * 4096
    Image.new("RGB", (64, 64)).save(tiff, "TIFF")
    # The directory at the end of the file, as some programs write it, behind a hole.
    moved = bytearray(tiff.getvalue())
    start = struct.unpack("<I", moved[4:8])[0]
    count = struct.unpack("<H", moved[start : start + 2])[0]
    moved[4:8] = struct.pack("<I", 1 << 30)
    files = {"long.jpg": jpeg(), "long.png": SOUND["png"][0], "long.webp": SOUND["webp"][0], "long.tif": bytes(moved)}
    for name, data in files.items():
        with open(tmp_path / name, "wb") as file:
            file.write(data)
            file.truncate(1 << 30)
            if name == "long.tif":
                file.seek(1 << 30)
                file.write(moved[start : start + 2 + 12 * count + 4])
    (tmp_path / "short.jpg").write_bytes(jpeg() + other)
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:300] + b"#" * (20 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = scan(tmp_path, [*files, "short.jpg", "cut.jpg"])
    faults = [_scan.FAULTS[fault] for fault in found["fault"]]
    assert faults == [TOO_LONG] * 4 + ["ok", TOO_LONG]
    paths = np.array([os.fsencode(tmp_path / name) for name in [*files, "short.jpg"]])
    whole = np.full(len(paths), -1, np.int64)
    kept, read_faults, *_ = _scan.read(paths, whole, whole, 2, LIMIT, found["hash"][: len(paths)])
    assert [_scan.FAULTS[fault] for fault in read_faults] == faults[:5]
    assert kept[4].tobytes() == jpeg(), "the hash is the file's, the bytes are the picture's"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_a_long_file_with_the_pixels_to_match_is_read(tmp_path: Path) -> None:
    for name in ("a.bmp", "a.tif"):
        Image.new("RGB", (3000, 2500)).save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 16 << 20
    found = scan(tmp_path, ["a.bmp", "a.tif"])
    assert not found["fault"].any() and found["width"].tolist() == [3000, 3000]
    assert [_scan.FAULTS[fault] for fault in scan(tmp_path, ["a.bmp", "a.tif"], max_pixels=7_000_000)["fault"]] == [
        "too many pixels"
    ] * 2


def test_progress_reaches_the_end_and_an_error_in_it_stops_the_scan(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    seen: list[int] = []
    scan(tmp_path, ["a.jpg"] * 3000, progress=seen.append)
    assert seen[-1] == 3000
    assert seen == sorted(seen)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, ["a.jpg"] * 3000, progress=stop)


def test_the_reader_hands_over_the_bytes_of_sound_pictures_only(tmp_path: Path) -> None:
    sound, bad = jpeg(), FAULTY["jpeg half"][0]
    (tmp_path / "sound.jpg").write_bytes(sound)
    (tmp_path / "bad.jpg").write_bytes(bad)
    (tmp_path / "box").write_bytes(b"123" + sound + b"456")
    paths = [os.fsencode(tmp_path / name) for name in ("sound.jpg", "bad.jpg", "gone.jpg", "box")] * 20
    offsets, lengths = np.array([(-1, -1)] * 3 + [(3, len(sound))]).T
    for threads in (0, 1, 4):
        data, fault, width, height, orientation = _scan.read(
            paths, np.tile(offsets, 20), np.tile(lengths, 20), threads, LIMIT
        )
        assert [_scan.FAULTS[f] for f in fault] == ["ok", "truncated", "missing", "ok"] * 20
        assert [array.tobytes() for array in data] == [sound, b"", b"", sound] * 20
        assert all(array.dtype == np.uint8 and array.ndim == 1 for array in data)
        assert (width[0], height[0], orientation[0]) == (120, 90, 1)


def test_pictures_that_were_read_outlive_the_batch_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    path = [os.fsencode(tmp_path / "a.jpg")]
    kept = [_scan.read(path, [-1], [-1], 1, LIMIT)[0][0] for _ in range(50)]
    (tmp_path / "a.jpg").unlink()
    assert all(array.tobytes() == jpeg() for array in kept)


def test_an_empty_batch_is_an_empty_answer(tmp_path: Path) -> None:
    data, fault, *_ = _scan.read([], [], [], 0, LIMIT)
    assert data == []
    assert len(fault) == 0
    assert len(scan(tmp_path, [])["fault"]) == 0


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1, 2 and 1 rows"):
        _scan.read([b"a"], [-1, -1], [-1], 1, LIMIT)
    with pytest.raises(ValueError, match="column of bytes"):
        _scan.read(["text"], [-1], [-1], 1, LIMIT)  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "nowhere", ["a.jpg"])
