"""Shards in an object store: fetched whole, once, into a folder of limited size; what goes wrong has a name."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from facefast import train
from facefast.data import read_index, remote
from facefast.data.crew import Crew
from facefast.data.remote import mirror
from facefast.recipe import DataConfig, Photographs
from facefast.runtime import process
from facefast.runtime.exits import EXIT_STORAGE, DataError, StorageError, exit_code
from tests.support.pictures import encode, smooth_picture
from tests.support.ranks import run_ranks


class Faulty(MemoryFileSystem):  # type: ignore[misc]
    """A store that loses connections, cuts files short and refuses what is named so."""

    protocol = "faulty"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    opened: list[str] = []
    failures = 0
    """How many of the next requests fail."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.removeprefix("faulty://")))

    def _open(self, path: str, mode: str = "rb", *args: Any, **more: Any) -> Any:
        if mode == "rb":
            Faulty.opened.append(path)
            if Faulty.failures > 0:
                Faulty.failures -= 1
                raise ConnectionResetError("reset by the other side")
            if "secret" in path:
                raise PermissionError(f"403 {path}")
            if "gone" in path:
                raise FileNotFoundError(path)
            if "cut" in path:
                return io.BytesIO(self.store[path].getvalue()[:-7])
        return super()._open(path, mode, *args, **more)


fsspec.register_implementation("faulty", Faulty, clobber=True)


def shard(first: int, count: int = 3) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for k in range(first, first + count):
            for name, data in ((f"{k}.jpg", encode(smooth_picture(30, 40, k))), (f"{k}.cls", str(k % 3).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    for kind in (Faulty, MemoryFileSystem):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    Faulty.opened.clear()
    Faulty.failures = 0
    yield


def put(kind: str, **named: bytes) -> str:
    system = fsspec.filesystem(kind)
    for name, data in named.items():
        system.pipe_file(f"/set/{name}.tar", data)
    return f"{kind}://set"


def cached(cache: Path) -> list[Path]:
    """The shards that are kept."""
    return [path for path in (cache / "shards").iterdir() if "." not in path.name]


def test_an_index_of_an_address_is_that_of_the_same_shards_on_a_disk(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "disk" / "val").mkdir(parents=True)
    for name, first in (("a", 0), ("val/b", 3)):
        (tmp_path / "disk" / f"{name}.tar").write_bytes(shard(first))
        fsspec.filesystem("memory").pipe_file(f"/set/{name}.tar", shard(first))
    here = read_index(tmp_path / "disk").scanned()
    for root in ("memory://set", f"file://{tmp_path}/disk"):
        there = read_index(root).scanned()
        assert there.fingerprint() == here.fingerprint() and not there.faults.any()
    assert read_index("memory://set/a.tar").class_names == ("0", "1", "2")


def test_a_shard_is_fetched_once_and_again_only_where_it_changed(tmp_path: Path) -> None:
    root = put("faulty", a=shard(0), b=shard(3))
    first = mirror(root, tmp_path)
    assert len(Faulty.opened) == 2 and mirror(root, tmp_path) == first and len(Faulty.opened) == 2
    put("faulty", b=shard(6))
    second = mirror(root, tmp_path)
    assert Faulty.opened[2:] == ["/set/b.tar"] and second != first
    assert (second / "b.tar").read_bytes() == shard(6) and (first / "b.tar").read_bytes() == shard(3)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("secret", DataError, r"faulty:///set/secret.tar may not be read .*credentials"),
        ("gone", DataError, r"faulty:///set/gone.tar is not there"),
        ("cut", StorageError, r"faulty:///set/cut.tar has \d+ bytes and \d+ arrived"),
    ],
)
def test_what_a_store_does_not_deliver_is_named_and_leaves_nothing_half(
    name: str, error: type[Exception], said: str, tmp_path: Path
) -> None:
    root = put("faulty", **{name: shard(0)})
    with pytest.raises(error, match=said) as caught:
        mirror(root, tmp_path)
    assert exit_code(caught.value) == (EXIT_STORAGE if error is StorageError else 65)
    assert cached(tmp_path) == [] and not list(tmp_path.rglob("*.tmp"))


def test_a_connection_that_breaks_is_tried_again_and_then_named(tmp_path: Path) -> None:
    root = put("faulty", a=shard(0))
    Faulty.failures = remote.TRIES
    with pytest.raises(StorageError, match=r"cannot be fetched \(ConnectionResetError: reset by the other side\)"):
        mirror(root, tmp_path)
    assert cached(tmp_path) == []
    Faulty.failures = remote.TRIES - 1
    assert (mirror(root, tmp_path) / "a.tar").read_bytes() == shard(0)


def test_addresses_without_shards_are_refused_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="memory://nowhere is not there"):
        mirror("memory://nowhere", tmp_path)
    fsspec.filesystem("memory").pipe_file("/set/1.jpg", b"-")
    with pytest.raises(DataError, match=r"holds no shard \(it has 1.jpg\)"):
        mirror("memory://set", tmp_path)
    fsspec.filesystem("memory").pipe_file("/set/1.tar.gz", b"-")
    with pytest.raises(DataError, match=r"1 compressed shards \(first: 1.tar.gz\)"):
        mirror("memory://set", tmp_path)


def test_a_kind_of_address_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"nosuch://a cannot be read: .*nosuch.*pip install s3fs for s3://"):
        mirror("nosuch://a", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"memory://set needs fsspec: pip install 'facefast\[remote\]'"):
        mirror("memory://set", tmp_path)


def test_the_cache_stays_within_its_limit_by_what_nobody_reads(tmp_path: Path) -> None:
    size = len(shard(0))
    gib = 2.5 * size / 2**30
    system = fsspec.filesystem("memory")
    for name in "abc":
        system.pipe_file(f"/{name}/1.tar", shard(ord(name)))
    old = mirror("memory://a", tmp_path, gib)
    kept = mirror("memory://b", tmp_path, gib)
    os.utime(old, (1, 1))
    mirror("memory://c", tmp_path, gib)  # this process still reads a and b
    assert old.exists() and len(cached(tmp_path)) == 3
    for descriptor in remote._in_use:
        os.close(descriptor)
    remote._in_use.clear()
    system.pipe_file("/d/1.tar", shard(200))
    mirror("memory://d", tmp_path, gib)
    assert (
        not old.exists() and not kept.exists() and sum(path.stat().st_size for path in cached(tmp_path)) <= 2.5 * size
    )
    system.pipe_file("/e/1.tar", shard(0, 12))
    with pytest.raises(StorageError, match=r"above data.cache_gib .*; raise it"):
        mirror("memory://e", tmp_path, gib)


def test_options_of_the_cache_need_an_address() -> None:
    with pytest.raises(ValueError, match="data.cache 'c' has no effect: data.root /here is no address"):
        Photographs(root="/here", cache="c")
    assert DataConfig(root="/here", more=("s3://a/b",), cache="c").cache == "c"


def fetching(rank: int, root: str, cache: str, out: str) -> int:
    """What each rank of a run does, with a note of the shards that it fetched itself."""
    fetched, fetch = [], remote._fetch

    def noting(path: Path, shard: remote.Shard, bar: Any) -> None:
        fetched.append(shard.name)
        fetch(path, shard, bar)

    vars(remote)["_fetch"] = noting
    with process.start() as run:
        crew = Crew(run)
        if run.is_main:
            mirror(root, cache, crew=crew)
            crew.dismiss()
        else:
            crew.serve()
    Path(f"{out}.{rank}").write_text(" ".join(fetched))
    return 0


def test_ranks_that_share_a_cache_fetch_each_shard_once_between_them(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for number in range(8):
        (tmp_path / "disk" / f"{number}.tar").write_bytes(shard(3 * number))
    root, out = f"file://{tmp_path}/disk", str(tmp_path / "out")
    assert run_ranks(fetching, 2, root, str(tmp_path / "cache"), out) == [0, 0]
    mine, theirs = ((tmp_path / f"out.{rank}").read_text().split() for rank in (0, 1))
    assert sorted(mine + theirs) == [f"{number}.tar" for number in range(8)] and mine[0] == "0.tar"
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in cached(tmp_path / "cache")}
    assert digests == {hashlib.sha256(shard(3 * number)).hexdigest() for number in range(8)}


def test_a_training_reads_an_address_and_goes_on_from_it(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "0.tar").write_bytes(shard(0, 30))
    arguments = ["scratch", f"--data.root=file://{tmp_path}/disk", f"--out={tmp_path}/run", "--image.size=32"]
    arguments += ["--data.detect=none", "--model.backbone=mobilefacenet_half", "--batch-size=8", "--pictures=0"]
    arguments += ["--phases.scratch.steps=2", "--precision=fp32"]
    assert train.main([*arguments, f"--data.cache={tmp_path}/cache"]) == 0
    assert train.main([*arguments, f"--data.cache={tmp_path}/other"]) == 0
