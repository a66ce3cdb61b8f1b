"""Checkpoints that a thread writes: what they hold, when others see them, and where their errors come out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast.data import FaceIndex, read_index
from facefast.models import checkpoint
from facefast.runtime import files
from facefast.runtime.exits import NumericsError, StorageError
from facefast.training.guard import not_finite
from facefast.training.saving import save
from facefast.training.step import TrainState
from tests.support import small
from tests.training.test_endings import make_state

WEIGHT = "backbone.conv1.conv.weight"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    return read_index(small.photographs(tmp_path_factory.mktemp("data") / "people"), "folder").scanned()


@pytest.fixture
def state(index: FaceIndex) -> Iterator[TrainState]:
    state = make_state(index)
    with state.saves:
        yield state


class Slow:
    """`checkpoint.save` that waits to be let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.active, self.most = threading.Event(), threading.Event(), 0, 0
        self._real: Callable[..., Path] = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, *given: Any, **named: Any) -> Path:
        self.active += 1
        self.most = max(self.most, self.active)
        self.begun.set()
        assert self.go.wait(60)
        path = self._real(*given, **named)
        self.active -= 1
        return path


def test_a_checkpoint_holds_the_update_it_was_begun_after_and_is_seen_when_it_is_whole(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    before = state.model.state_dict()[WEIGHT].clone()
    save(tmp_path, state, improved=True)
    assert slow.begun.wait(60)
    with torch.no_grad():  # training goes on
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    state.step, state.phase_step = 5, 5
    state.validated["scratch"]["top1"] = 0.5
    assert not (tmp_path / "status.json").exists() and not (tmp_path / "checkpoints").exists()
    slow.go.set()
    state.saves.settle()
    best = checkpoint.find_model(tmp_path)
    assert best.name == "step-0000004"
    torch.testing.assert_close(checkpoint.read_tensors(best, "model")[WEIGHT], before.contiguous(), rtol=0, atol=0)
    document = files.read_json(best / "state.json")
    assert (document["step"], document["validated"]) == (4, {"scratch": {"top1": 0.75}})
    status = files.read_json(tmp_path / "status.json")
    assert (status["state"], status["step"], status["best"]["validation"]) == ("running", 4, 0.75)


def test_what_a_thread_writes_is_to_the_byte_what_is_written_at_once(state: TrainState, tmp_path: Path) -> None:
    save(tmp_path, state, improved=True)
    state.saves.settle()
    at_once = tmp_path / "at once"
    at_once.mkdir()
    documents = state.documents()
    checkpoint.save(at_once, 4, tensors=state.tensors(), documents=documents, best=True, keep=3)
    found, expected = (folder / checkpoint.FOLDER / "step-0000004" for folder in (tmp_path, at_once))
    assert len(list(expected.iterdir())) >= 6
    for path in expected.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_next_checkpoint_waits_for_the_one_before(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    save(tmp_path, state, improved=True)
    assert slow.begun.wait(60)
    threading.Timer(0.2, slow.go.set).start()
    state.step, state.phase_step = 5, 5
    save(tmp_path, state, improved=False)
    assert checkpoint.of_step(tmp_path, 4).exists()
    state.saves.settle()
    assert checkpoint.of_step(tmp_path, 5).exists() and slow.most == 1
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-0000004"
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-0000005"


@pytest.mark.parametrize("where", ["the next checkpoint", "the end of the phase"])
def test_what_could_not_be_written_ends_the_run_at_the_next_update(
    state: TrainState, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise StorageError("no room")

    monkeypatch.setattr(checkpoint, "save", full)
    save(tmp_path, state, improved=True)
    for thread in threading.enumerate():
        if thread.name == "facefast_background":
            thread.join()
    assert state.saves.failed  # by which every rank leaves after the same update
    with pytest.raises(StorageError, match="no room"):
        save(tmp_path, state, improved=False) if where == "the next checkpoint" else state.saves.settle()
    assert not state.saves.failed and not (tmp_path / "status.json").exists()


def test_a_run_that_ends_waits_for_what_is_being_written(
    index: FaceIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, slow = make_state(index), Slow(monkeypatch)
    with pytest.raises(KeyError), state.saves:  # whatever ends it
        save(tmp_path, state, improved=True)
        assert slow.begun.wait(60)
        threading.Timer(0.2, slow.go.set).start()
        raise KeyError
    assert files.read_json(tmp_path / "status.json")["step"] == 4 and checkpoint.of_step(tmp_path, 4).exists()


def test_numbers_that_are_not_finite_are_found_before_anything_is_begun(state: TrainState, tmp_path: Path) -> None:
    with torch.no_grad():
        state.model.state_dict()[WEIGHT].flatten()[3] = torch.nan
    with pytest.raises(NumericsError, match=f"model {WEIGHT}"):
        save(tmp_path, state, improved=True)
    assert not (tmp_path / "checkpoints").exists()


def test_a_sum_that_overflows_is_no_broken_tensor_and_every_broken_one_is_named() -> None:
    large = torch.full((4,), 3e38)
    assert (
        not_finite({"model": {"large": large, "half": torch.full((100,), 6e4).half(), "count": torch.tensor(3)}}) == []
    )
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = torch.tensor([1.0, value])
        assert not_finite({"model": {"large": large}, "ema": {"one": broken}}) == ["ema one"]
    both = torch.tensor([torch.inf, -torch.inf])
    assert not_finite({"model": {"both": both, "large": large}}) == ["model both"]
