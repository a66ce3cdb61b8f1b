"""Indices that several ranks make together: the same to the last bit as one process makes them."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import warnings
from pathlib import Path

import pytest

from facefast.data import FaceIndex, read_index
from facefast.data.crew import Crew
from facefast.runtime import process
from facefast.runtime.exits import DataError
from tests.support.pictures import encode, smooth_picture
from tests.support.ranks import run_ranks

SHARDS, EACH = 7, 3


def indexing(rank: int, root: str, out: str) -> int:
    """What a run does on each rank to find out what is in a folder; rank 0 leaves the index and
    what was said."""
    with process.start() as run:
        crew = Crew(run)
        if not run.is_main:
            crew.serve()
            return 0
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                index = read_index(root, crew=crew).scanned(crew=crew)
            index.save(out)
            Path(f"{out}.said").write_text("\n".join(str(warning.message) for warning in said))
        except DataError as error:
            Path(f"{out}.said").write_text(str(error))
            return 65
        finally:
            crew.dismiss()
    return 0


def picture(number: int) -> bytes:
    return encode(smooth_picture(30 + number % 5, 40, number))


def shards(root: Path) -> None:
    for number in range(SHARDS):
        path = root / f"{number:03d}.tar"
        root.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for k in range(EACH):
                files = {f"{k}.jpg": picture(EACH * number + k), f"{k}.cls": str((number + k) % 4).encode()}
                if number in (2, 5):
                    files[f"{k}.seg.png"] = b"-"  # left out with a warning
                for name, data in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def folder(root: Path) -> None:
    for number in range(SHARDS * EACH):
        path = root / f"person {number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number) if number != 11 else b"no picture")


def record(root: Path) -> None:
    root.mkdir()
    lines = []
    with open(root / "train.rec", "wb") as file:
        for key in range(SHARDS * EACH):
            data = struct.pack("<IfQQ", 0, key % 4, key, 0) + picture(key)
            lines.append(f"{key}\t{file.tell()}\n")
            file.write(struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4))
    (root / "train.idx").write_text("".join(lines))


@pytest.mark.parametrize("make", [shards, folder, record])
def test_any_number_of_ranks_makes_the_same_index_to_the_last_bit(make: object, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make(root)  # type: ignore[operator]
    digests, said = set(), set()
    for world in (1, 2, 3):
        out = tmp_path / f"{world}.npz"
        assert run_ranks(indexing, world, str(root), str(out)) == [0] * world
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        said.add(Path(f"{out}.said").read_text())
    assert len(digests) == len(said) == 1
    index = FaceIndex.load(out)
    assert len(index) == SHARDS * EACH and index.num_classes == 4
    assert index.hashes[index.faults == 0].any(1).all() and (index.faults > 0).sum() == (make is folder)
    assert said.pop().count("further fields") == (2 if make is shards else 0)


def test_what_is_wrong_with_a_shard_is_said_whoever_reads_it(tmp_path: Path) -> None:
    shards(tmp_path / "data")
    for number in (4, 5):  # another rank's, and rank 0's second
        path = tmp_path / "data" / f"{number:03d}.tar"
        path.write_bytes(path.read_bytes()[:700])
    said = set()
    for world in (1, 2, 3):
        out = tmp_path / f"{world}.npz"
        assert run_ranks(indexing, world, str(tmp_path / "data"), str(out))[0] == 65
        said.add(Path(f"{out}.said").read_text())
    (only,) = said
    assert "004.tar is damaged" in only


def looked_at(rank: int, root: str, out: str) -> int:
    """`indexing`, of which each rank notes the shards that it opened itself."""
    from facefast.data.formats import webdataset

    opened, read = [], vars(webdataset)["open_shard"]

    def noting(path: Path) -> object:
        opened.append(path.name)
        return read(path)

    vars(webdataset)["open_shard"] = noting
    code = indexing(rank, root, out)
    Path(f"{out}.{rank}").write_text(" ".join(opened))
    return code


def test_each_rank_reads_its_share_of_the_shards_and_no_other(tmp_path: Path) -> None:
    shards(tmp_path / "data")
    assert run_ranks(looked_at, 2, str(tmp_path / "data"), str(tmp_path / "out")) == [0, 0]
    read = [(tmp_path / f"out.{rank}").read_text().split() for rank in (0, 1)]
    assert read == [["000.tar", "002.tar", "004.tar", "006.tar"], ["001.tar", "003.tar", "005.tar"]]
