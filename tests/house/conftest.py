"""What a newcomer has after `make train`, on a small scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from facefast import train
from facefast.data.drawn import synthetic

TINY = ("--image.size=32", "--eval.pairs=40", "--eval.folds=2", "--log-every=1", "--pictures=0")
"""Flags of a training that is over in a second."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/drawn-faces, people in each partition and 20 pictures of each, and runs/default."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data" / "drawn-faces"
    data.parent.mkdir()
    spec = synthetic.DrawnSpec(identities=(3, 3, 2), pictures=20, seed=5)
    synthetic.write(data, spec, processes=1, progress=False)
    lengths = [f"--phases.{number}.{field}" for number in range(3) for field in ("steps=2", "batch-size=8")]
    assert train.main(["drawn", *TINY, *lengths, f"--data.root={data}", f"--out={folder / 'runs' / 'default'}"]) == 0
    return folder


@pytest.fixture
def clone(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder of its own with those photographs and that run."""
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
        for path in (trained / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
