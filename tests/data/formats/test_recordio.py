"""InsightFace's .rec and .bin without mxnet: the same pictures and labels, read in place."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facefast.data import FAULTS, FaceIndex, read_bin, read_index
from facefast.data.formats.recordio import read_recordio
from facefast.runtime.exits import DataError
from tests.support.pictures import encode, smooth_picture

MARK = struct.pack("<I", 0xCED7230A)


def pictures(count: int) -> list[bytes]:
    """Encoded pictures of different lengths."""
    return [encode(smooth_picture(30 + k, 40, k)) for k in range(count)]


def packed(label: float | list[float], picture: bytes, key: int = 0) -> bytes:
    """mxnet.recordio.pack: header, array of labels, picture."""
    if isinstance(label, float | int):
        return struct.pack("<IfQQ", 0, label, key, 0) + picture
    return struct.pack("<IfQQ", len(label), 0.0, key, 0) + np.array(label, "<f4").tobytes() + picture


def write(root: Path, records: list[tuple[int, bytes]], name: str = "train", index: bool = True) -> Path:
    """mxnet.recordio.MXIndexedRecordIO: records by key, split where their bytes hold the mark at a multiple of four."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    with open(root / f"{name}.rec", "wb") as file:
        for key, data in records:
            lines.append(f"{key}\t{file.tell()}\n")
            cuts = [at for at in range(0, len(data) - 3, 4) if data[at : at + 4] == MARK]
            parts = [data[a:b] for a, b in zip([0, *(c + 4 for c in cuts)], [*cuts, len(data)], strict=True)]
            for place, part in enumerate(parts):
                which = 0 if len(parts) == 1 else 1 if place == 0 else 3 if place == len(parts) - 1 else 2
                file.write(MARK + struct.pack("<I", which << 29 | len(part)) + part + bytes(-len(part) % 4))
    if index:
        (root / f"{name}.idx").write_text("".join(lines))
    return root


def insightface(root: Path, labels: list[float], array: bool = False, **options: Any) -> list[bytes]:
    """A set as face2rec2.py writes it: header record, pictures from key 1, a record per identity after them."""
    data = pictures(len(labels))
    end, identities = len(labels) + 1, len(set(labels))
    records = [(0, packed([float(end), float(end + identities)], b""))]
    records += [(k + 1, packed([label, 0.0] if array else label, data[k], k + 1)) for k, label in enumerate(labels)]
    records += [(end + k, packed([1.0, 2.0], b"")) for k in range(identities)]
    write(root, records, **options)
    return data


def content(index: FaceIndex) -> list[bytes]:
    """The bytes of every row."""
    found = []
    for row in range(len(index)):
        with open(index.path(row), "rb") as file:
            file.seek(index.offsets[row])
            found.append(file.read(index.lengths[row]))
    return found


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_an_insightface_set_is_its_pictures(tmp_path: Path, array: bool, index: bool) -> None:
    data = insightface(tmp_path, [7.0, 7.0, 0.0, 93430.0, 0.0], array, index=index)
    found = read_index(tmp_path)
    assert content(found) == data
    assert found.class_names == ("0", "7", "93430")
    assert found.labels.tolist() == [1, 1, 0, 2, 0]
    scanned = found.scanned()
    assert not scanned.faults.any()
    assert scanned.heights.tolist() == [30, 31, 32, 33, 34]
    assert read_index(tmp_path / "train.rec").fingerprint() == found.fingerprint()


def test_a_set_of_im2rec_has_no_header(tmp_path: Path) -> None:
    data = pictures(3)
    write(tmp_path, [(k, packed(float(k % 2), picture)) for k, picture in enumerate(data)])
    found = read_recordio(tmp_path)
    assert content(found) == data
    assert found.labels.tolist() == [0, 1, 0]
    write(tmp_path / "arrays", [(k, packed([float(k), 5.0], picture)) for k, picture in enumerate(data)])
    assert read_recordio(tmp_path / "arrays").labels.tolist() == [0, 1, 2]


def test_unlabelled_records_belong_to_nobody(tmp_path: Path) -> None:
    insightface(tmp_path, [-1.0, 4.0])
    found = read_recordio(tmp_path)
    assert found.labels.tolist() == [-1, 0]
    assert found.class_names == ("4",)


def test_a_record_that_holds_the_mark_is_left_out_with_a_warning(tmp_path: Path) -> None:
    data = pictures(3)
    header = 24
    marked = data[1][: 400 - header % 4] + MARK + data[1][400 - header % 4 :]
    records = [(k, packed(float(k), picture)) for k, picture in enumerate([data[0], marked, data[2]])]
    write(tmp_path, records)
    for place in (tmp_path, write(tmp_path / "bare", records, index=False)):
        with pytest.warns(UserWarning, match=r"1 of 3 pictures of .* are stored in parts .*first: key 1"):
            found = read_recordio(place)
        assert content(found) == [data[0], data[2]]
        assert found.class_names == ("0", "2")


def test_a_cut_file_loses_the_rows_beyond_its_end(tmp_path: Path) -> None:
    data = pictures(4)
    write(tmp_path, [(k, packed(float(k), picture)) for k, picture in enumerate(data)])
    size = 2 * (8 + 24) + sum((len(picture) + 3) // 4 * 4 for picture in data[:2])
    for cut, reasons in ((size + 100, ["ok", "ok"]), (size + 10, ["ok", "ok"])):
        os.truncate(tmp_path / "train.rec", cut)
        found = read_recordio(tmp_path).scanned()
        assert [FAULTS[fault] for fault in found.faults] == [
            *reasons,
            "range outside its file",
            "range outside its file",
        ]
    assert found.labels.tolist() == [0, 1, -1, -1]


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    insightface(tmp_path, [0.0, 1.0, 1.0])
    listing = (tmp_path / "train.idx").read_text().split("\n")
    shifted = ["\t".join([line.split("\t")[0], str(int(line.split("\t")[1]) + 4)]) for line in listing if line]
    (tmp_path / "train.idx").write_text("\n".join(shifted))
    with pytest.raises(ValueError, match="lack RecordIO's mark .*first: key 0, byte 4"):
        read_recordio(tmp_path)
    (tmp_path / "train.idx").write_text("\n".join(listing[:3]))
    with pytest.raises(ValueError, match="announces 3 pictures and its .idx lists 2"):
        read_recordio(tmp_path)
    for text in ("a\tb\n", "1\n2\n", ""):
        (tmp_path / "train.idx").write_text(text)
        with pytest.raises(ValueError, match=r"train\.idx"):
            read_recordio(tmp_path)
    (tmp_path / "train.idx").unlink()
    (tmp_path / "train.rec").write_bytes(b"not a record file at all")
    with pytest.raises(ValueError, match="no RecordIO file"):
        read_recordio(tmp_path)


@pytest.mark.parametrize("label", [0.5, float("nan"), -2.0, float("inf")])
def test_a_label_that_is_no_class_number_is_refused(tmp_path: Path, label: float) -> None:
    insightface(tmp_path, [0.0, label, 1.0])
    with pytest.raises(ValueError, match="1 of 3 labels of .* are no class numbers .* of key 2"):
        read_recordio(tmp_path)


def test_labels_that_32_bit_floats_mix_up_are_refused(tmp_path: Path) -> None:
    insightface(tmp_path, [0.0, 16777217.0, 16777216.0])
    with pytest.raises(DataError, match="2 of 3 labels .* below 16777216"):
        read_recordio(tmp_path)


@pytest.mark.parametrize("end", [float("inf"), float("nan"), 0.5, -3.0])
def test_an_announcement_that_is_no_number_is_refused(tmp_path: Path, end: float) -> None:
    write(tmp_path, [(0, packed([end, end], b"")), (1, packed(1.0, pictures(1)[0]))])
    with pytest.raises(DataError, match="announces .* pictures in its first record; it is damaged"):
        read_recordio(tmp_path)


def test_two_files_in_one_are_refused(tmp_path: Path) -> None:
    insightface(tmp_path, [0.0, 1.0], index=False)
    content = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(content + content)
    with pytest.raises(DataError, match="announces 2 pictures and holds 2 more behind them"):
        read_recordio(tmp_path)


def test_pictures_that_the_listing_leaves_out_are_said(tmp_path: Path) -> None:
    write(tmp_path, [(k, packed(float(k), picture)) for k, picture in enumerate(pictures(4))])
    lines = (tmp_path / "train.idx").read_text().splitlines()
    for kept in (lines[:3], lines[:1] + lines[2:]):
        (tmp_path / "train.idx").write_text("\n".join(kept))
        with pytest.warns(UserWarning, match="bytes of .* are in no record that its .idx lists"):
            assert len(read_recordio(tmp_path)) == 3
    for twice, what in ((lines[1], "key 1"), ("9\t" + lines[1].split("\t")[1], "offset")):
        (tmp_path / "train.idx").write_text("\n".join([*lines, twice]))
        with pytest.raises(DataError, match=f"has {what}.* more than once"):
            read_recordio(tmp_path)


def test_an_empty_file_and_a_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.rec").touch()
    with pytest.raises(DataError, match=r"train\.rec is empty"):
        read_index(tmp_path)
    (tmp_path / "train.rec").unlink()
    os.mkfifo(tmp_path / "train.rec")
    with pytest.raises(DataError, match=r"train\.rec is no regular file"):
        read_index(tmp_path)


@pytest.mark.parametrize("flag", [2, "False", b"0", float("nan"), None])
def test_a_pair_is_the_same_person_or_not(tmp_path: Path, flag: Any) -> None:
    (tmp_path / "set.bin").write_bytes(pickle.dumps((pictures(4), [True, flag]), 4))
    with pytest.raises(DataError, match="a pair is the same person or not"):
        read_bin(tmp_path / "set.bin")


def test_one_of_several_files_must_be_named(tmp_path: Path) -> None:
    insightface(tmp_path, [0.0], name="a")
    insightface(tmp_path, [0.0], name="b")
    with pytest.raises(ValueError, match="it has a.rec, b.rec"):
        read_recordio(tmp_path)
    assert len(read_recordio(tmp_path / "b.rec")) == 1
    insightface(tmp_path, [0.0, 1.0])
    assert len(read_recordio(tmp_path)) == 2, "train.rec among others"


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", [bytes, "array", bytearray])
def test_a_verification_set_is_ranges_of_its_file(tmp_path: Path, protocol: int, kind: Any) -> None:
    if kind is bytearray and protocol < 5:
        return  # stored as bytes only from protocol 5 on
    data = pictures(40)
    data[7] = data[2]  # one object twice in the pickle
    made = [np.frombuffer(picture, np.uint8) if kind == "array" else kind(picture) for picture in data]
    same = [k % 3 == 0 for k in range(20)]
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((made, same), protocol))
    index, pairs = read_bin(tmp_path / "lfw.bin")
    assert content(index) == data
    assert not index.scanned().faults.any()
    assert pairs.same.tolist() == same
    assert pairs.left.tolist() == list(range(0, 40, 2))
    assert pairs.right.tolist() == list(range(1, 40, 2))
    assert index.labels.tolist() == [-1] * 40


def test_a_verification_set_of_python_2_is_read(tmp_path: Path) -> None:
    data = pictures(4)
    strings = b"".join(b"T" + struct.pack("<i", len(picture)) + picture for picture in data)
    # PROTO 2, MARK, list of BINSTRING, list of NEWTRUE and NEWFALSE, TUPLE, STOP: what cPickle wrote.
    (tmp_path / "old.bin").write_bytes(b"\x80\x02(](" + strings + b"e](\x88\x89et.")
    index, pairs = read_bin(tmp_path / "old.bin")
    assert content(index) == data
    assert pairs.same.tolist() == [True, False]


class _Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (self.path,)


def test_a_pickle_that_wants_to_run_code_is_refused_unread(tmp_path: Path) -> None:
    for place, evil in enumerate((_Evil(tmp_path / "hit"), ([_Evil(tmp_path / "hit")] * 2, [True]))):
        path = tmp_path / f"{place}.bin"
        path.write_bytes(pickle.dumps(evil))
        with pytest.raises(ValueError, match=r"it wants pathlib|it wants posix.mkdir, which is not allowed"):
            read_bin(path)
    assert not (tmp_path / "hit").exists()


def test_damaged_verification_sets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.bin"
    whole = pickle.dumps((pictures(4), [True, False]), 4)
    for damaged in (b"", whole[:-20], b"\x00" * 50, pickle.dumps({"a": 1}), pickle.dumps((1, 2))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no verification set"):
            read_bin(path)
    path.write_bytes(pickle.dumps((pictures(3), [True, False])))
    with pytest.raises(ValueError, match="3 pictures for 2 pairs"):
        read_bin(path)
    path.write_bytes(pickle.dumps((pictures(2), [True]), protocol=2))
    with pytest.raises(ValueError, match="_codecs.encode|not stored raw"):
        read_bin(path)
