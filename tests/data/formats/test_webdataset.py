"""webdataset shards, read in place: labels from .cls and .json, nothing that leads out of a shard."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from facefast.data import FaceIndex, read_index
from facefast.data.formats.webdataset import read_webdataset
from tests.support.pictures import encode, smooth_picture


def shard(path: Path, members: dict[str, bytes], **extra: tarfile.TarInfo) -> Path:
    """A tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra.values():
            tar.addfile(member)
    return path


def picture(seed: int) -> bytes:
    """An encoded picture."""
    return encode(smooth_picture(30 + seed, 40, seed))


def identities(index: FaceIndex) -> list[str | None]:
    """Class name of every row."""
    return [index.class_names[label] if label >= 0 else None for label in index.labels]


def content(index: FaceIndex, row: int) -> bytes:
    """The bytes of a row."""
    with open(index.path(row), "rb") as file:
        file.seek(index.offsets[row])
        return file.read(index.lengths[row])


def test_pictures_are_ranges_and_labels_come_from_cls_and_json(tmp_path: Path) -> None:
    long = "a/" + "very long folder name " * 8 + "/person"
    shard(
        tmp_path / "faces-000.tar",
        {
            "0001.cls": b"10\n", "0001.jpg": picture(1), "0002.PNG": picture(2), "0002.cls": b"9",
            "dir/0003.jpg": picture(3), "dir/0003.json": json.dumps({"identity": "Ann", "label": 4}).encode(),
            f"{long}.jpg": picture(4), f"{long}.json": json.dumps({"label": 9, "x": [1]}).encode(),
        },
    )  # fmt: skip
    shard(
        tmp_path / "faces-001.tar",
        {"0001.jpg": picture(5), "0001.txt": b"caption", "x.face.jpg": picture(6), "x.cls": b"-1", "y.json": b"{}"},
    )
    index = read_index(tmp_path)
    assert identities(index) == ["10", "9", "Ann", "9", None, None]
    assert index.class_names == ("9", "10", "Ann"), "numbers by value, then names"
    assert [content(index, row) for row in range(6)] == [picture(k) for k in range(1, 7)]
    assert not index.scanned().faults.any()
    assert index.name(4).startswith("faces-001.tar@")
    single = read_index(tmp_path / "faces-000.tar")
    assert identities(single) == identities(index)[:4]


def test_folders_of_shards_are_splits(tmp_path: Path) -> None:
    for place, split in enumerate(("train", "val", "test")):
        shard(tmp_path / split / "0.tar", {"a.jpg": picture(place), "a.cls": b"3"})
    index = read_index(tmp_path)
    assert dict(zip(index.paths.tolist(), index.splits.tolist(), strict=True)) == {
        b"test/0.tar": 2,
        b"train/0.tar": 0,
        b"val/0.tar": 1,
    }
    assert index.num_classes == 1


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    """A member without data."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (member("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), "is a link or another special file"),
        (member("a.jpg", tarfile.LNKTYPE, "b.jpg"), "is a link or another special file"),
        (member("a.jpg", tarfile.CHRTYPE), "is a link or another special file"),
        (member("a.jpg", tarfile.FIFOTYPE), "is a link or another special file"),
        (member("/etc/a.jpg", tarfile.REGTYPE), "leads out of the shard"),
        (member("x/../../a.jpg", tarfile.REGTYPE), "leads out of the shard"),
    ],
)
def test_what_could_reach_out_of_a_shard_is_refused(tmp_path: Path, odd: tarfile.TarInfo, what: str) -> None:
    shard(tmp_path / "0.tar", {"b.jpg": picture(0)}, odd=odd)
    with pytest.raises(ValueError, match=what):
        read_webdataset(tmp_path)


def test_damaged_and_compressed_shards_are_refused_by_name(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {f"{k}.jpg": picture(k) for k in range(4)})
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], gzip.compress(whole), b"no tar", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"0\.tar is damaged or no plain tar file"):
            read_webdataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "is no JSON"), (b"[1]", "the identity in a.json is None"), (b'{"identity": 1.5}', "is 1.5"),
     (b'{"label": true}', "is True"), (b" " * (2 << 20), "at most 1048576 are read")],
)  # fmt: skip
def test_labels_that_cannot_be_understood_are_refused(tmp_path: Path, text: bytes, message: str) -> None:
    shard(tmp_path / "0.tar", {"a.jpg": picture(0), "a.json": text})
    with pytest.raises(ValueError, match=message):
        read_webdataset(tmp_path)


def test_shards_without_pictures_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {"a.cls": b"1"})
    with pytest.raises(ValueError, match="no picture in"):
        read_webdataset(tmp_path)
