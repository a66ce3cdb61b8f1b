"""Fixtures: where the real photographs are, a GPU that is demanded or not, and generators put back after each test."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.browser import browser, look

__all__ = ["browser", "look"]  # fixtures

# One thread: waiting at barriers for a core that another process holds makes small operators ten times slower.
torch.set_num_threads(1)
# The same for commands that a test calls: `runtime.start` shares the cores among the local processes.
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(os.cpu_count())}

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is a GPU; FACEFAST_REQUIRE_GPU=1 lets them fail elsewhere instead of
    skipping."""
    if torch.cuda.is_available() or os.environ.get("FACEFAST_REQUIRE_GPU") == "1":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU here; benchmarks/on_gpu.sh runs this test"))


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a detector said of pictures is kept away from the user's own cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["XDG_CACHE_HOME"]
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def restored_generators() -> Iterator[None]:
    """No test sees what another drew."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture(scope="session")
def celeba() -> Path:
    """The real photographs in CelebA's layout; they lie beside the checkout and are never copied into it."""
    return _shared("celeba-mini")


@pytest.fixture(scope="session")
def celeba_in_the_wild(celeba: Path) -> Path:
    """The same people's photographs as they were taken; a copy of `celeba` for a GPU may come without them."""
    return _shared("celeba-mini/img_celeba")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """The published source model and detector, beside the checkout."""
    return _shared("weights")


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not here; it lies beside the checkout on the project's machines")
    return SHARED / name
