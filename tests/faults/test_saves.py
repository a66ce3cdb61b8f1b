"""Whoever writes may die at any call: a whole checkpoint is left, a log keeps its lines, nothing is in the way."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from facefast.models import checkpoint
from facefast.runtime import files, manifest
from facefast.runtime.lines import Lines
from tests.faults.disk import DEATHS, dies_at
from tests.support.scale import FULL

EVERY = 1 if FULL else 12
"""One of so many moments of a save is tried."""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to look at a folder afterwards need not survive anything; syncing took most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder: Path, step: int, value: float, keep: int) -> None:
    checkpoint.save(
        folder,
        step,
        tensors={name: {"weight": torch.full((2000,), value)} for name in ("model", "optimizer")},
        documents={"state": {"value": value}, "recipe": {}},
        best=False,
        keep=keep,
    )


SITUATIONS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "the first save": ((), 2, 2),
    "the next save": ((2,), 4, 2),
    "the next save, where one is kept": ((2, 4), 6, 1),
    "the same step again": ((2, 4), 4, 2),
    "the same step again, where one is kept": ((2, 4), 4, 1),
}
"""Steps saved before, the step that is saved now, and how many are kept."""


def moments(death: str, first: Path, action: Callable[[Path], object], every: int = 1) -> Iterator[Path]:
    """Lets an action on copies of a folder die at one moment after the other, or at one of `every`, until there are no
    more; yields what is left of each."""
    for moment in itertools.count(random.Random(death).randrange(every) + 1, every):
        folder = first.with_name(f"{moment}")
        shutil.copytree(first, folder, symlinks=True)
        if not dies_at(moment, death, folder, lambda: action(folder)):  # noqa: B023 -- it has ended by then
            return
        yield folder
        shutil.rmtree(folder)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_whenever_a_save_is_cut_off_a_whole_checkpoint_is_left(tmp_path: Path, situation: str, death: str) -> None:
    before, step, keep = SITUATIONS[situation]
    first = tmp_path / "run"
    first.mkdir()
    for number, earlier in enumerate(before):
        save(first, earlier, float(number), keep)
    new = float(len(before))
    allowed = {new, new - 1} if before else {new, None}
    tried = 0
    for folder in moments(death, first, lambda folder: save(folder, step, new, keep), EVERY):
        path = checkpoint.newest(folder)
        value = None if path is None else files.read_json(path / "state.json")["value"]
        assert value in allowed, f"moment {folder.name}"
        if path is not None:
            assert set(checkpoint.read_tensors(path, "model")["weight"].tolist()) == {value}, f"moment {folder.name}"
        save(folder, 8, 99.0, 1)  # nothing is in the next one's way, which clears away what was left
        left = {each.name for each in (folder / checkpoint.FOLDER).iterdir()}
        assert left == {"last", "step-0000008"}, f"moment {folder.name}"
        tried += 1
    assert tried > 60 // EVERY
    print(f"{tried} of {tried} moments")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_checkpoint_that_is_amended_keeps_every_byte_but_of_the_documents_that_are_replaced(tmp_path: Path) -> None:
    save(tmp_path, 2, 1.0, keep=2)
    path = tmp_path / checkpoint.FOLDER / "step-0000002"
    files.write_json(path / "model.json", {"old": 1})  # beside model.safetensors, which has its stem
    manifest.write(path, 2)
    before = content(path)
    checkpoint.amend(tmp_path / checkpoint.FOLDER / "last", {"model": {"thresholds": {}}, "new": [1]})
    after = content(path)
    assert files.read_json(path / "model.json") == {"thresholds": {}} and files.read_json(path / "new.json") == [1]
    changed = {"model.json", "new.json", manifest.NAME}
    assert {n: b for n, b in after.items() if n not in changed} == {n: b for n, b in before.items() if n not in changed}
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= after.keys()
    manifest.verify(path)
    assert files.read_json(path / manifest.NAME)["step"] == 2
    assert {each.name for each in path.parent.iterdir()} == {"last", "step-0000002"}
    assert checkpoint.newest(tmp_path) == path


def test_where_a_file_system_has_no_hard_links_a_checkpoint_is_amended_by_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    save(tmp_path, 2, 1.0, keep=2)
    path = tmp_path / checkpoint.FOLDER / "step-0000002"
    before = content(path)
    monkeypatch.setattr(os, "link", link)
    checkpoint.amend(path, {"recipe": {"a": 1}})
    assert {n: b for n, b in content(path).items() if n != manifest.NAME} == {
        **{n: b for n, b in before.items() if n != manifest.NAME},
        "recipe.json": b'{\n  "a": 1\n}\n',
    }
    manifest.verify(path)


@pytest.mark.parametrize("death", DEATHS)
def test_whenever_an_amendment_is_cut_off_the_checkpoint_is_whole_with_the_old_document_or_the_new_one(
    tmp_path: Path, death: str
) -> None:
    first = tmp_path / "run"
    first.mkdir()
    save(first, 2, 1.0, 2)
    tried = 0
    for folder in moments(death, first, lambda folder: amend(folder, {"value": 2.0}), EVERY):
        path = checkpoint.newest(folder)
        assert path is not None, f"moment {folder.name}"
        assert files.read_json(path / "state.json")["value"] in (1.0, 2.0), f"moment {folder.name}"
        assert set(checkpoint.read_tensors(path, "model")["weight"].tolist()) == {1.0}, f"moment {folder.name}"
        amend(folder, {"value": 3.0})  # nothing is in the way of the same command
        assert files.read_json(path / "state.json")["value"] == 3.0
        assert {each.name for each in path.parent.iterdir()} == {"last", path.name}, f"moment {folder.name}"
        tried += 1
    assert tried > 30 // EVERY


def amend(folder: Path, state: dict[str, float]) -> None:
    checkpoint.amend(folder / checkpoint.FOLDER / "step-0000002", {"state": state})


@pytest.mark.parametrize("death", DEATHS)
def test_whenever_handing_on_class_means_is_cut_off_best_is_the_old_model_or_the_new_one(
    tmp_path: Path, death: str
) -> None:
    first = tmp_path / "run"
    first.mkdir()
    save(first, 2, 1.0, 2)
    files.replace_link(first / checkpoint.FOLDER / "best", "step-0000002")
    tried = 0
    for folder in moments(death, first, hand_on, EVERY):
        best = folder / checkpoint.FOLDER / "best"
        manifest.verify(best)
        value = 2.0 if best.resolve().name == "class-means" else 1.0
        assert set(checkpoint.read_tensors(best, "model")["weight"].tolist()) == {value}, f"moment {folder.name}"
        assert checkpoint.newest(folder) == folder / checkpoint.FOLDER / "step-0000002"  # no run goes on from means
        hand_on(folder)
        left = {each.name for each in best.parent.iterdir() if not each.name.startswith(".best.")}
        assert left == {"last", "best", "class-means", "step-0000002"}, f"moment {folder.name}"
        tried += 1
    assert tried > 30 // EVERY


def hand_on(folder: Path) -> None:
    checkpoint.hand_on(folder, "class-means", {"model": {"weight": torch.full((2000,), 2.0)}}, {"model": {}})


LINES = "".join(json.dumps({"step": step, "split": "train"}) + "\n" for step in range(1, 6))


@pytest.mark.parametrize("death", DEATHS)
def test_whenever_a_log_is_taken_up_again_its_lines_stay(tmp_path: Path, death: str) -> None:
    first = tmp_path / "run"
    first.mkdir()
    (first / "metrics.jsonl").write_text(LINES)
    tried = 0
    for folder in moments(death, first, lambda folder: Lines(folder / "metrics.jsonl", 3).close()):
        found = (folder / "metrics.jsonl").read_text().splitlines()
        assert found[:3] == LINES.splitlines()[:3], f"moment {folder.name}"
        tried += 1
    assert tried


@pytest.mark.parametrize("death", DEATHS)
def test_whenever_a_document_is_replaced_the_old_one_or_the_new_one_is_whole(tmp_path: Path, death: str) -> None:
    first = tmp_path / "run"
    first.mkdir()
    files.write_json(first / "status.json", {"state": "old"})
    tried = 0
    for folder in moments(death, first, lambda folder: files.write_json(folder / "status.json", {"state": "new"})):
        assert files.read_json(folder / "status.json")["state"] in ("old", "new"), f"moment {folder.name}"
        files.remove_leftovers(folder)
        assert [path.name for path in folder.iterdir()] == ["status.json"]
        tried += 1
    assert tried


def test_what_a_user_keeps_in_a_run_folder_is_no_leftover(tmp_path: Path) -> None:
    mine = {".gitignore", ".keep.tmp", "notes.12.tmp", ".status.json.tmp", ".a.b.1.tmp"}
    for name in mine - {".a.b.1.tmp"}:
        (tmp_path / name).touch()
    (tmp_path / ".a.b.1.tmp").mkdir()
    (tmp_path / ".status.json.4711.tmp").touch()
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == mine
