"""Photographs of three people, and a run that may be a source."""

from __future__ import annotations

from pathlib import Path

import pytest

from facefast.data import FaceIndex, read_index
from tests.support import small


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.photographs(tmp_path_factory.mktemp("data") / "people")


@pytest.fixture(scope="module")
def index(root: Path) -> FaceIndex:
    return read_index(root, "folder").scanned()


@pytest.fixture(scope="module")
def source_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small.make_model(classes=small.PEOPLE, template="none")
    return small.save_run(tmp_path_factory.mktemp("runs") / "source", model, root)
