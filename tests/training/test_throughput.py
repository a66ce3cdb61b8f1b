"""What `facefast bench` measures: the same training in three forms, and what a row says beside an earlier one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facefast.data import FaceIndex
from facefast.recipe import flags
from facefast.runtime import machine
from facefast.runtime.process import Runtime, World
from facefast.training import pace, throughput
from facefast.training.step import train_step
from facefast.training.throughput import COMPUTE, LOADER, WHOLE, Setting
from tests.support import small

SETTING = Setting("mobilefacenet", small.SIZE, 4, 6, ("--precision=fp32",))
MACHINE = {"cpu": "Some CPU", "cores": 2, "memory": 8, "load": 0.1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


def row(lowest: float, middle: float, highest: float, **fields: Any) -> dict[str, Any]:
    """A row as it is kept."""
    found = throughput.rows(SETTING, {COMPUTE: [lowest, middle, highest]}, "cpu")[0]
    return found | {"machine": MACHINE} | fields


def test_an_epoch_has_exactly_the_updates_that_were_asked_for(root: Path, tmp_path: Path) -> None:
    index = throughput.write_index(root, tmp_path / "index.npz", SETTING.updates_per_epoch * SETTING.batch)
    assert FaceIndex.load(tmp_path / "index.npz").fingerprint() == index.fingerprint()
    assert (index.splits == 0).sum() == 24 and set(index.labels[index.splits == 0].tolist()) == {0, 1}
    recipe = flags.command_line(SETTING.words(tmp_path / "index.npz")).recipe
    updates = pace.begun(SETTING.words(tmp_path / "index.npz"), "compute", tmp_path, here())
    assert [next(updates), next(updates)] == [3, 6] and recipe.log_every == 3
    # What the run wrote down of its photographs: those of the index, six batches of four to train on.
    assert (FaceIndex.load(tmp_path / "index.npz").splits == 0).sum() == 24


def here() -> Runtime:
    return Runtime(World(), torch.device("cpu"))


@pytest.mark.parametrize(("updates", "line"), [(20, 10), (6, 3), (15, 5), (7, 1), (2, 1), (1, 1)])
def test_lines_divide_an_epoch_so_that_a_turn_begins_within_one(updates: int, line: int) -> None:
    assert dataclasses.replace(SETTING, updates_per_epoch=updates).line == line


def test_updates_alone_are_those_of_training_on_batches_that_stay(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput.write_index(root, tmp_path / "index.npz", 24)
    seen: list[tuple[int, int, float]] = []
    step = train_step

    def watched(state: Any, batches: Any, row_counts: Any) -> Any:
        stats = step(state, batches, row_counts)
        seen.append((state.step, batches[0].images.data_ptr(), float(stats[2])))
        return stats

    monkeypatch.setattr(pace, "train_step", watched)
    updates = pace.begun(SETTING.words(tmp_path / "index.npz"), "compute", tmp_path, here())
    for _ in range(4):
        next(updates)
    steps, places, rows = zip(*seen, strict=True)
    assert steps == tuple(range(1, 13)) and set(rows) == {4.0}
    assert len(set(places)) == pace.RESIDENT and places[:4] == places[4:8]


def test_the_loader_is_drained_over_the_end_of_its_own_long_epochs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput.write_index(root, tmp_path / "index.npz", 24)
    monkeypatch.setattr(pace, "LONG", 5)
    monkeypatch.setattr(pace, "LINE_PICTURES", 12)
    drained = pace.begun(SETTING.words(tmp_path / "index.npz"), "loader", tmp_path, here())
    assert [next(drained) for _ in range(5)] == [3, 6, 9, 12, 15]


def test_a_part_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no part 'whole' of a training; it must be one of compute, loader"):
        pace.main(["whole"])


def test_photographs_of_too_few_people_are_refused(root: Path, tmp_path: Path) -> None:
    index = FaceIndex.load(_saved(root, tmp_path))
    alone = index.select(index.labels < 2)
    alone.save(tmp_path / "two.npz")
    with pytest.raises(ValueError, match="has 2 people, 2 with two photographs or more; three with two each"):
        throughput.write_index(tmp_path / "two.npz", tmp_path / "index.npz", 8)


def _saved(root: Path, folder: Path) -> Path:
    from facefast.data import read_index

    read_index(root).scanned().save(folder / "all.npz")
    return folder / "all.npz"


def test_the_three_programs_are_the_same_training(root: Path, tmp_path: Path) -> None:
    entries = throughput.entries(SETTING, root, tmp_path, "cpu")
    assert list(entries) == list(throughput.MODES)
    words = SETTING.words(tmp_path / "index.npz")
    for entry in entries.values():
        assert [word for word in entry.command if word in words] == words
        assert entry.environment == {"CUDA_VISIBLE_DEVICES": ""}
    # A turn of the whole job and of the updates alone has whole epochs; it begins a line into one.
    assert entries[WHOLE].lines * entries[WHOLE].pictures == 24 == entries[COMPUTE].lines * entries[COMPUTE].pictures
    assert entries[WHOLE].counts({"split": "train"}) and not entries[WHOLE].counts({"split": "validation"})
    assert throughput.entries(SETTING, root, tmp_path, "cuda", [LOADER])[LOADER].environment is None


def test_a_batch_of_one_picture_and_an_epoch_of_no_update_are_refused() -> None:
    for batch, updates in ((1, 6), (4, 0)):
        with pytest.raises(ValueError, match="must be at least 2 and 1"):
            dataclasses.replace(SETTING, batch=batch, updates_per_epoch=updates)


def test_rows_hold_medians_and_the_share_of_updates_alone_round_by_round() -> None:
    rates = {WHOLE: [90.0, 50.0, 99.0], COMPUTE: [100.0, 50.0, 100.0]}
    whole, compute = throughput.rows(SETTING, rates, "cpu")
    assert (whole["images_per_second"], whole["lowest"], whole["highest"]) == (90.0, 50.0, 99.0)
    assert whole["ratio_to_compute"] == 0.99 and compute["ratio_to_compute"] == 1.0  # of 0.9, 1 and 0.99
    assert throughput.rows(SETTING, {LOADER: [5.0]}, "cpu")[0]["ratio_to_compute"] is None
    json.dumps(whole, allow_nan=False)


def test_a_row_is_compared_with_the_last_of_the_same_training_on_such_a_machine() -> None:
    own = machine.key(MACHINE)
    first, last = row(1, 2, 3), row(2, 3, 4, machine=MACHINE | {"load": 7.0})
    others = [
        row(5, 6, 7, batch=8),
        row(5, 6, 7, machine=MACHINE | {"gpu": "A GPU"}),
        row(5, 6, 7, options="--compile"),
    ]
    assert throughput.before(row(1, 1, 1), [first, last, *others], own) is last
    assert throughput.before(row(1, 1, 1), others, own) is None


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ((11, 12, 13), "faster +20.0%"),
        ((7, 8, 8.9), "slower -20.0%"),
        ((9, 11, 13), "same (+10.0%, within the spread)"),
        ((10.5, 11, 12), "same (+10.0%, within the spread)"),
    ],
)
def test_faster_and_slower_are_said_only_where_the_spreads_do_not_meet(now: tuple[float, ...], said: str) -> None:
    assert throughput.verdict(row(*now), row(9, 10, 10.5)) == said
    assert throughput.verdict(row(*now), None) == "first"


def test_the_table_has_a_line_for_each_mode_with_its_share() -> None:
    rates = {WHOLE: [97.0], COMPUTE: [100.0], LOADER: [2500.0]}
    measured = throughput.rows(SETTING, rates, "cpu")
    lines = throughput.table(measured, ["first", "faster +1.0%", "first"]).splitlines()
    assert [line.split()[-2:] for line in lines[1:]] == [["97.0%", "first"], ["faster", "+1.0%"], ["x", "first"]]
    assert "25.0 x" in lines[3] and "mobilefacenet" in lines[1] and lines[0].split()[:3] == ["px", "batch", "images/s"]


def test_rows_are_read_back_and_a_torn_file_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    assert throughput.read_rows(path) == []
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"bench.jsonl, line 2 is no JSON object: '\[2\]'; remove it"):
        throughput.read_rows(path)
    path.write_text('{"a": 1}\n')
    assert throughput.read_rows(path) == [{"a": 1}]


def test_the_chart_has_every_number_and_its_spread() -> None:
    measured = throughput.rows(SETTING, {WHOLE: [1.0, 2.0, 4.0], COMPUTE: [2.0, 3.0, 5.0]}, "cpu")
    values = throughput.chart(measured)["data"]["values"]
    assert [(v["mode"], v["lowest"], v["images_per_second"], v["highest"]) for v in values] == [
        (WHOLE, 1.0, 2.0, 4.0),
        (COMPUTE, 2.0, 3.0, 5.0),
    ]
    assert {v["training"] for v in values} == {"mobilefacenet, batch 4"}


def test_a_drawing_that_is_no_svg_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bench.png is to hold a drawing, which is SVG"):
        throughput.draw(throughput.rows(SETTING, {WHOLE: [1.0]}, "cpu"), tmp_path / "bench.png")


def test_each_label_that_trains_is_of_a_person_who_is_not_verified(root: Path, tmp_path: Path) -> None:
    index = throughput.write_index(root, tmp_path / "index.npz", 9)
    trained, asked = (set(index.labels[index.splits == part].tolist()) for part in (0, 2))
    assert trained and asked and not trained & asked
    assert np.bincount(index.splits, minlength=3)[0] == 9
