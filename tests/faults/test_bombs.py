"""Small files that ask for gigabytes or for years are refused with the limit, below 1.5 GB and without a wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from facefast.data import oracle, read_bin, read_index
from facefast.data.corrections import read_corrections
from facefast.data.formats.recordio import read_recordio
from facefast.data.formats.webdataset import read_webdataset
from facefast.data.index import FaceIndex
from facefast.models import checkpoint, load_source
from facefast.models.weights import isolated
from facefast.models.weights.readers import read_safetensors
from facefast.runtime import files
from facefast.runtime.exits import StorageError
from tests.faults.bombs import BOMBS, READ
from tests.support.pictures import make_index
from tests.support.ranks import ROOT

PEAK_BYTES = 1_500_000_000


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each, by name."""
    lines: list[str] = []
    for names in ([name for name in BOMBS if name not in READ], *([name] for name in READ)):
        command = [sys.executable, "-m", "tests.faults.bombs", str(tmp_path_factory.mktemp("bombs")), *names]
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
        lines += done.stdout.splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_memory(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert ("error" in found[name]) == (name not in READ), found[name]
    assert found[name].get("value", "8") == "8"
    assert found[name]["peak"] < PEAK_BYTES


def test_pipes_are_never_opened(tmp_path: Path) -> None:
    # Nobody writes to them: whoever opens one waits until pytest's time is over.
    for name in ("a.npz", "a.pt", "a.safetensors", "a.h5", "a.bin", "a.rec", "a.tar", "a.csv", "a.jpg", "model.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "b.rec").write_bytes(b"\n#\xd7\xce\0\0\0\0")
    os.mkfifo(tmp_path / "b.idx")
    for name in ("a.npz", "a.pt", "a.safetensors", "a.h5"):
        with pytest.raises(ValueError, match="no such file"):
            load_source(tmp_path / name)
    readers: list[tuple[Callable[[Path], object], str]] = [
        (read_safetensors, "a.safetensors"),
        (read_bin, "a.bin"),
        (read_corrections, "a.csv"),
        (oracle.decode, "a.jpg"),
        (files.read_json, "model.json"),
        (FaceIndex.load, "a.npz"),
    ]
    for read, name in readers:
        with pytest.raises(ValueError, match="regular file"):
            read(tmp_path / name)
    for read, name in (
        (read_webdataset, "a.tar"),
        (read_recordio, "a.rec"),
        (read_recordio, "b.rec"),
        (checkpoint.load_model, "."),
    ):
        with pytest.raises((ValueError, StorageError)):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="regular file"):
        oracle.read_bytes(make_index(tmp_path, ["a.jpg"]), 0)
    (tmp_path / "people" / "ann").mkdir(parents=True)
    (tmp_path / "people" / "ann" / "1.jpg").write_bytes(b"no picture")
    os.mkfifo(tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="cache.npz, where the scan is to be kept, is no regular file"):
        read_index(tmp_path / "people", "folder", cache=tmp_path / "cache.npz")


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.jpg", "a/../../b.jpg", ".."])
def test_a_saved_index_that_names_other_files_is_refused(name: str, tmp_path: Path) -> None:
    make_index(tmp_path, ["ann/1.jpg", name]).save(tmp_path / "saved.npz")
    with pytest.raises(ValueError, match=r"saved.npz is no saved index \(it names .*, which leads out of the folder"):
        read_index(tmp_path / "saved.npz")
    make_index(tmp_path, ["ann/1.jpg", "..a/b..jpg"]).save(tmp_path / "saved.npz")
    assert len(read_index(tmp_path / "saved.npz")) == 2


def children() -> set[str]:
    """Numbers of the processes that this one has started and that are not gone; other tests may have left some."""
    return {child for tasks in Path("/proc/self/task").glob("*/children") for child in tasks.read_text().split()}


def test_a_reader_that_loops_or_dies_is_ended_and_leaves_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    path = tmp_path / "weights.x"
    path.write_bytes(b"x")

    def loops(path: Path) -> dict[str, object]:
        while True:
            pass

    def waits(path: Path) -> dict[str, object]:
        os.read(os.pipe()[0], 1)
        return {}

    def dies(path: Path) -> dict[str, object]:
        os.abort()

    def grows(path: Path) -> dict[str, object]:
        return {"x": bytearray(4 << 30)}

    monkeypatch.setattr(isolated, "WALL_SECONDS", 4)
    monkeypatch.setattr(isolated, "CPU_SECONDS", 1)
    for read, message in (
        (loops, "took too long"),
        (waits, "took too long"),
        (dies, r"crashed \(SIGABRT\)"),
        (grows, "needs more than 384 MB"),
    ):
        with pytest.raises(ValueError, match=f"weights.x was refused.*{message}"):
            isolated.read_apart(path, read)  # type: ignore[arg-type]
    assert children() == before
