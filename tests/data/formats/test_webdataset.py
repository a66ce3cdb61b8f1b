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
from facefast.runtime.exits import DataError
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


def labels(path: Path, members: dict[str, bytes]) -> list[str | None]:
    """Identities of the pictures of one shard."""
    return identities(read_webdataset(shard(path, members)))


def test_keys_with_dots_keep_their_own_labels(tmp_path: Path) -> None:
    members = {f"22.{k:02}.{kind}": data for k in range(4) for kind, data in (("jpg", picture(k)), ("cls", b"%d" % k))}
    assert labels(tmp_path / "0.tar", members) == ["0", "1", "2", "3"]
    assert labels(tmp_path / "1.tar", {"x.left.jpg": picture(0), "x.right.jpg": picture(1), "x.cls": b"5"}) == [
        "5",
        "5",
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.b.jpg": b"", "a.b.cls": b"1", "a.cls": b"2"}, "says 1 of a.b and 2 of a"),
        ({"a.jpg": b"", "a.cls": b"1", "a.json": b'{"label": 2}'}, "says 1 in a.cls and 2 in a.json"),
        ({"a.jpg": b"", "a.json": b'{"label": 1, "label": 2}'}, "it has 'label' twice"),
        ({"a.jpg": b"", "a.json": b'{"label": ' + b"[" * 100_000}, "is no JSON"),
        ({"a.jpg": b"", "a.png": b""}, "has two pictures of one sample, a.jpg and a.png"),
        ({"a.jpg": b"", "a.cls": b"caf\xe9"}, "a.cls is not in UTF-8"),
        ({"a.jpg": b"", "a.cls": b"1\n2"}, "must be one line"),
        ({"a.jpg": b"", "a.cls": b"\x1b[31m"}, "must be one line"),
        ({"a.jpg": b"", "a.cls": b"3", "b.jpg": b"", "b.cls": b"3.0"}, "class '3.0' is also written '3'"),
        ({"a.jpg": b"", "a.cls": b"3", "b.jpg": b"", "b.cls": b"nan"}, "class 'nan' is no class number"),
        ({"a.jpg": b"", "a.cls": b"3", "b.jpg": b"", "b.cls": b"-2"}, "class '-2' is no class number"),
    ],
)
def test_labels_that_may_be_wrong_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_webdataset(shard(tmp_path / "0.tar", members))


def test_a_mark_of_windows_is_no_part_of_a_class(tmp_path: Path) -> None:
    assert (
        labels(tmp_path / "0.tar", {"a.jpg": b"", "a.cls": b"\xef\xbb\xbf7\r\n", "b.jpg": b"", "b.cls": b"7"})
        == ["7"] * 2
    )


def test_further_fields_and_the_systems_files_are_no_pictures(tmp_path: Path) -> None:
    members = {"1.jpg": picture(1), "1.seg.png": picture(2), "1.depth.png": picture(3), "1.cls": b"4"}
    hidden = {"._1.jpg": b"x", "__MACOSX/._1.jpg": b"x", "._1.cls": b"x", "2.thumb.jpg": b"x"}
    with pytest.warns(UserWarning, match=r"3 pictures are further fields .*first: 1\.seg\.png"):
        assert labels(tmp_path / "0.tar", members | hidden) == ["4"]


def test_a_label_without_picture_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 labels belong to no picture .first: that of 2"):
        assert labels(tmp_path / "0.tar", {"1.jpg": b"", "1.cls": b"1", "2.cls": b"2"}) == ["1"]


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("face.jpg", "./face.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="holds 'face.jpg' twice"):
        read_webdataset(path)


def test_compressed_shards_among_others_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {"a.jpg": picture(0)})
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/1.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 compressed shards \(first: deep/er/1.tar.gz\)"):
        read_index(tmp_path)


def test_shards_lie_at_any_depth_and_in_any_case(tmp_path: Path) -> None:
    shard(tmp_path / "0.TAR", {"a.jpg": picture(0)})
    shard(tmp_path / "a/b/c/1.tar", {"a.jpg": picture(0)})
    assert len(read_index(tmp_path)) == 2
