"""What a run says: metric lines, TensorBoard's scalars, pictures and projector, the verdict, what a resume keeps."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer
from tensorboard.util.tensor_util import make_ndarray

from facefast.runtime.exits import NumericsError
from facefast.runtime.lines import read_lines
from facefast.runtime.log import LOST_UPDATES, Position, RunLog, Speed, environment, verdict
from tests.support.clock import Clock
from tests.support.pictures import smooth_picture


def open_log(folder: Path, *, first_step: int | None = None, every: int = 1, enabled: bool = True) -> RunLog:
    return RunLog(folder, enabled=enabled, total_steps=100, first_step=first_step, every=every)


def at(step: int, *, last: bool = False, phase: str = "finetune") -> Position:
    return Position(step=step, phase=phase, epoch=step / 8, epochs=10, lr=0.5, last=last)


def stats(loss_sum: float = 8.0, correct: int = 4, rows: int = 8, skipped: int = 0, broken: int = 0) -> torch.Tensor:
    """Of one update with one term, whose loss is not finite where it is `broken`."""
    loss_sum, loss_rows = (0, 0) if broken else (loss_sum, rows)
    return torch.tensor([loss_sum, correct, rows, skipped, rows, loss_rows, loss_sum, broken], dtype=torch.float32)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0, "tensors": 0}).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(folder).Scalars(tag)]


def test_a_line_sums_up_its_window_and_comes_every_few_steps_and_at_the_end(tmp_path: Path, clock: Clock) -> None:
    waited = 0.0
    with open_log(tmp_path, every=3) as run_log:
        for step in range(1, 6):
            clock.now += 2
            waited += 0.5
            run_log.step(at(step, last=step == 5), stats(loss_sum=step, rows=7), 8, waited)
    first, last = lines(tmp_path)
    assert (first["step"], last["step"]) == (3, 5)
    assert first["loss"] == pytest.approx((1 + 2 + 3) / 21)  # the mean over rows, not over batches
    assert last["loss"] == pytest.approx((4 + 5) / 14)
    assert first["accuracy"] == pytest.approx(12 / 21)
    assert (first["rows"], first["unreadable_rows"], first["skipped_steps"]) == (21, 3, 0)
    assert first["images_per_second"] == pytest.approx(24 / 6)
    assert first["data_wait_fraction"] == pytest.approx(1.5 / 6)
    assert (first["split"], first["phase"], first["epoch"], first["lr"]) == ("train", "finetune", 0.375, 0.5)
    assert run_log.speeds == [Speed(3, 24, 6, 1.5), Speed(2, 16, 4, 1.0)]


def test_an_evaluation_in_the_middle_of_a_window_is_not_taken_for_training_time(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path, every=4) as run_log:
        for step in range(1, 5):
            clock.now += 2
            run_log.step(at(step), stats(), 8, 1.0 * step)
            if step == 3:
                clock.now += 60
                run_log.evaluation(at(step), {"top1": 0.5}, "top1", 0.5, False)
    line = lines(tmp_path)[-1]
    assert line["images_per_second"] == pytest.approx(32 / 8)  # not 16: three of the four updates came before it
    assert line["data_wait_fraction"] == pytest.approx(4 / 8)  # not 2, which no fraction is


def test_an_evaluation_after_a_line_is_not_taken_for_training_time_either(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as run_log:
        clock.now += 60
        run_log.evaluation(at(0), {"top1": 0.1}, "top1", 0.5, True)  # what a class-mean head knows before any training
        for step in (1, 2):
            clock.now += 2
            run_log.step(at(step), stats(), 8, 0.0)
            clock.now += 60
            run_log.evaluation(at(step), {"top1": 0.5}, "top1", 0.5, False)
    assert [line["images_per_second"] for line in lines(tmp_path) if line["split"] == "train"] == [4.0, 4.0]


def test_waiting_is_counted_anew_with_each_phases_loader(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as run_log:
        for step, waited in ((1, 1.0), (2, 1.5), (3, 0.25)):  # the third comes from another loader
            clock.now += 2
            run_log.step(at(step), stats(), 8, waited)
    assert [speed.waited for speed in run_log.speeds] == [1.0, 0.5, 0.25]


def test_numbers_that_are_none_are_null_in_json_and_absent_in_tensorboard(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.step(at(1), stats(loss_sum=0, correct=0, rows=0), 8, 0.0)
        run_log.evaluation(at(1), {"top1": 0.5, "tar@1e-3": math.nan}, "top1", 0.5, True)
    train, evaluation = lines(tmp_path)
    assert train["loss"] is None and train["accuracy"] is None
    assert evaluation["tar@1e-3"] is None
    tags = board(tmp_path).Tags()["scalars"]
    assert "validation/top1" in tags and "train/lr" in tags
    assert "validation/tar@1e-3" not in tags and "train/loss" not in tags


def test_tensorboard_has_the_numbers_of_the_lines(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        for step in (1, 2, 3):
            run_log.step(at(step), stats(loss_sum=32 / 2**step), 8, 0.0)
        run_log.evaluation(at(3), {"top1": 0.75, "auc": 0.5}, "top1", 0.5, True)
    assert scalars(tmp_path, "train/loss") == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert scalars(tmp_path, "validation/auc") == [(3, 0.5)]


def test_tensorboard_shows_the_pictures_as_they_are(tmp_path: Path) -> None:
    pictures = np.stack([smooth_picture(24, 16, seed) for seed in (0, 1)])
    with open_log(tmp_path) as run_log:
        run_log.pictures("finetune/pictures", pictures, 7)
    (event,) = board(tmp_path).Images("finetune/pictures")
    assert event.step == 7
    shown = Image.open(io.BytesIO(event.encoded_image_string))
    np.testing.assert_array_equal(np.array(shown), np.hstack(list(pictures)))


def test_the_projector_finds_embeddings_and_names_row_by_row(tmp_path: Path) -> None:
    embeddings = torch.randn(3, 4)
    with open_log(tmp_path) as run_log:
        run_log.embeddings(embeddings, ["ann", "bo", "ann"], 12)
    folder = tmp_path / "tensorboard"
    config = (folder / "projector_config.pbtxt").read_text()
    paths = [line.split('"')[1] for line in config.splitlines() if "_path" in line]
    found = {Path(path).name: (folder / path).read_text().splitlines() for path in paths}
    vectors = np.array([line.split("\t") for line in found["tensors.tsv"]], np.float32)
    np.testing.assert_allclose(vectors, embeddings.numpy(), rtol=1e-5)
    assert found["metadata.tsv"] == ["ann", "bo", "ann"]


def test_the_projector_has_a_small_picture_a_row_and_one_line_a_name(tmp_path: Path) -> None:
    pictures = np.stack([smooth_picture(8, 8, seed) for seed in range(3)])
    with open_log(tmp_path) as run_log:
        run_log.embeddings(torch.randn(3, 4), ["two\nlines", "a\ttab", "bo"], 12, pictures)
    (sprite,) = tmp_path.rglob("sprite.png")
    shown = np.array(Image.open(sprite).convert("RGB"))
    np.testing.assert_array_equal(shown[:8, :8], pictures[0])
    np.testing.assert_array_equal(shown[8:, :8], pictures[2])
    (names,) = tmp_path.rglob("metadata.tsv")
    assert names.read_text().splitlines() == ["two\\nlines", "a\\ttab", "bo"]


def test_tensorboard_compares_runs_by_their_options_and_final_numbers(tmp_path: Path) -> None:
    options = {"phases.last.lr": 0.1, "model.source": "none", "compile": False, "image.mean": [1.0, 2.0]}
    with open_log(tmp_path) as run_log:
        run_log.outcome(options, {"top1": 0.75, "auc": math.nan}, 12)
    assert scalars(tmp_path, "final/top1") == [(12, 0.75)]
    tags = board(tmp_path).Tags()
    assert "final/auc" not in tags["scalars"] and len(list((tmp_path / "tensorboard").iterdir())) == 1
    data = board(tmp_path).SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert data.plugin_name == "hparams"
    found = HParamsPluginData.FromString(data.content).session_start_info.hparams
    assert found["phases.last.lr"].number_value == 0.1 and found["image.mean"].string_value == "[1.0, 2.0]"
    assert found["compile"].bool_value is False and found["model.source"].string_value == "none"


def test_tensorboard_has_precision_and_recall_at_every_threshold(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.precision_and_recall("test/pairs", np.array([True, True, False]), np.array([0.9, 0.8, 0.1]), 12)
        run_log.precision_and_recall("test/none", np.array([False]), np.array([0.5]), 12)  # has no recall
    (event,) = board(tmp_path).Tensors("test/pairs")
    true_positives, false_positives, *_, precision, recall = make_ndarray(event.tensor_proto)
    assert (true_positives[64], false_positives[64], precision[64], recall[64]) == (2, 0, 1, 1)
    assert "test/none" not in board(tmp_path).Tags()["tensors"]


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint_and_no_later_or_torn_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard reads a folder's files by name, which ends in how many this process wrote: within one second 10 would
    # come before 9. Runs that go on are other processes.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with open_log(tmp_path) as run_log:
        for step in range(1, 7):
            run_log.step(at(step), stats(loss_sum=8 * step), 8, 0.0)
        run_log.evaluation(at(4), {"top1": 0.5}, "top1", 0.5, True)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "phase": "fine')  # the power went
    with open_log(tmp_path, first_step=4) as run_log:
        for step in (5, 6):
            run_log.step(at(step), stats(loss_sum=80 * step), 8, 0.0)
    assert [(line["step"], line["split"]) for line in lines(tmp_path)] == [
        *((step, "train") for step in (1, 2, 3, 4)),
        (4, "validation"),
        *((step, "train") for step in (5, 6)),
    ]
    expected = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]  # each step once, in TensorBoard as well
    assert scalars(tmp_path, "train/loss") == expected
    assert [line["loss"] for line in lines(tmp_path) if line["split"] == "train"] == [loss for _, loss in expected]


class Full:
    """A file on a disk that has room for `room` more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        written = int(self.file.write(content[: self.room]))
        self.room -= written
        if not written:
            raise OSError(28, "No space left on device")
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("cut", [True, False])
def test_a_line_that_a_full_disk_does_not_take_is_gone_as_a_whole_and_the_next_is_whole_again(
    tmp_path: Path, cut: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_log(tmp_path) as run_log:
        run_log.step(at(1), stats(), 8, 0.0)
        assert run_log._lines is not None
        disk = Full(run_log._lines._file, 40)
        if not cut:  # a file system on which not even that can be done
            monkeypatch.setattr(disk, "truncate", Broken(), raising=False)
        run_log._lines._file = disk  # type: ignore[assignment]
        for step in (2, 3):
            run_log.step(at(step), stats(), 8, 0.0)
        disk.room = 10_000
        run_log.step(at(4), stats(), 8, 0.0)
        assert run_log.failures == 2
    assert capsys.readouterr().out.count("warning: metrics.jsonl cannot be written") == 1
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 4]
    if cut:
        assert len(lines(tmp_path)) == 2
    with open_log(tmp_path, first_step=4) as run_log:
        run_log.step(at(5), stats(), 8, 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 5]


class Broken:
    def __call__(self, *_: object) -> None:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "damage", [b"\0" * 64, b"\xff\xfe\n", b"[1, 2]\n", b'{"step": null}\n', b"null\n", b'{"step": 2']
)
def test_damaged_lines_break_no_resume_and_no_reader(tmp_path: Path, damage: bytes) -> None:
    with open_log(tmp_path) as run_log:
        run_log.step(at(1), stats(), 8, 0.0)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(damage)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    with open_log(tmp_path, first_step=1) as run_log:
        run_log.step(at(2), stats(), 8, 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_run_with_nothing_left_to_do_has_the_speed_that_its_lines_tell(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path, every=2) as run_log:
        for step in range(1, 5):
            clock.now += 2
            run_log.step(at(step), stats(), 8, 0.5 * step)
        before = run_log.all_speeds()
    with open_log(tmp_path, first_step=4) as run_log:
        assert run_log.all_speeds() == before == [Speed(2, 16, 4, 1.0)] * 2
        clock.now += 1
        run_log.step(at(5), stats(), 8, 0.0)
        assert run_log.all_speeds() == [Speed(1, 8, 1, 0.0)]  # what was done since the last start


def test_whatever_fails_beside_training_is_said_once_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path) as run_log:
        for error in (OSError(28, "No space left on device"), ZeroDivisionError("a bug")):
            with run_log.tolerant("the report"):
                raise error
        assert run_log.failures == 2
    said = capsys.readouterr().out
    assert (
        said.count("warning: the report cannot be written ([Errno 28] No space left on device); training goes on") == 1
    )
    with pytest.raises(KeyboardInterrupt), run_log.tolerant("the report"):
        raise KeyboardInterrupt


def test_a_run_that_was_stopped_before_its_first_update_keeps_what_it_knew_then(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.evaluation(at(0), {"top1": 0.25}, "top1", 0.5, True)
    with open_log(tmp_path, first_step=0) as run_log:
        run_log.step(at(1), stats(loss_sum=8), 8, 0.0)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert scalars(tmp_path, "validation/top1") == [(0, 0.25)]


def test_a_run_that_starts_anew_keeps_nothing_of_the_one_before(tmp_path: Path) -> None:
    for value in (0.25, 0.5):
        with open_log(tmp_path) as run_log:
            run_log.evaluation(at(0), {"top1": value}, "top1", 0.5, True)
            run_log.step(at(1), stats(loss_sum=8 * value), 8, 0.0)
    assert [line.get("top1") for line in lines(tmp_path)] == [0.5, None]
    assert scalars(tmp_path, "validation/top1") == [(0, 0.5)]
    assert scalars(tmp_path, "train/loss") == [(1, 0.5)]


def test_other_ranks_count_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path, enabled=False) as run_log:
        run_log.step(at(1), stats(), 8, 0.0)
        run_log.evaluation(at(1), {"top1": 0.5}, "top1", 0.5, True)
        run_log.pictures("p", smooth_picture(8, 8)[None], 1)
        run_log.embeddings(torch.zeros(1, 2), ["ann"], 1)
        run_log.say("nothing")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert len(run_log.speeds) == 1


def test_a_run_stops_when_no_update_counts_any_more(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log, pytest.raises(NumericsError, match=f"the last {LOST_UPDATES} updates, up to"):
        for step in range(1, 100):
            run_log.step(at(step), stats(skipped=1), 8, 0.0)
    assert lines(tmp_path)[-1]["step"] == LOST_UPDATES


def test_the_end_of_a_run_names_the_terms_and_what_is_wrong(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log, pytest.raises(NumericsError) as ended:
        for step in range(1, 100):
            run_log.step(at(step), stats(skipped=1, broken=1), 8, 0.0, ("identity",), lambda: "row 7 is not finite")
    assert "the loss terms identity are not finite; row 7 is not finite. The newest checkpoint is sound" in str(
        ended.value
    )
    assert lines(tmp_path)[-1]["loss"] is None


def test_a_loss_that_is_not_finite_counts_for_nothing_among_others_and_is_null_alone(tmp_path: Path) -> None:
    with open_log(tmp_path, every=2) as run_log:
        for step in range(1, 5):
            run_log.step(at(step), stats(loss_sum=16, broken=int(step != 1)), 8, 0.0)
    assert [line["loss"] for line in lines(tmp_path)] == [2.0, None]


def test_a_skipped_update_now_and_then_stops_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path, every=5) as run_log:
        for step in range(1, 10 * LOST_UPDATES):
            run_log.step(at(step), stats(skipped=int(step % LOST_UPDATES > 0)), 8, 0.0)  # 19 of 20 are lost


def test_what_the_test_part_gave_is_a_line_of_its_own_under_the_rows_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path) as run_log:
        run_log.evaluation(at(8), {"top1": 0.5}, "top1", 0.5, True)
        run_log.report(at(8), "class means", {"top1": 0.25, "tar@1e-3": math.nan, "validation": 0.5})
    validation, test = lines(tmp_path)
    assert (validation["split"], validation["phase"], validation["top1"]) == ("validation", "finetune", 0.5)
    expected = {"step": 8, "phase": "class means", "split": "test", "top1": 0.25, "tar@1e-3": None, "validation": 0.5}
    assert test == expected | {"epoch": 1.0}
    assert scalars(tmp_path, "validation/top1") == [(8, 0.5)]
    assert scalars(tmp_path, "test/top1") == [(8, 0.25)]
    assert "class means, test: top1 25.00%\n" in capsys.readouterr().out  # it has chosen nothing


def test_a_row_that_is_asked_for_again_with_the_same_answer_is_one_line(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.report(at(8), "finetune", {"top1": 0.25})
    with open_log(tmp_path, first_step=8) as run_log:
        run_log.report(at(8), "finetune", {"top1": 0.25})
        run_log.report(at(8), "class means", {"top1": 0.25})
        run_log.report(at(8), "finetune", {"top1": 0.5})
    found = [(line["phase"], line["top1"]) for line in lines(tmp_path)]
    assert found == [("finetune", 0.25), ("class means", 0.25), ("finetune", 0.5)]


def test_an_evaluation_is_said_with_the_number_that_decides_and_the_best_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path) as run_log:
        run_log.evaluation(at(8), {"loss": 0.12345, "top1": 0.5, "pairs": 6000}, "top1", 0.5, True)
    assert "Epoch 1/10  finetune  top1 50.00%  best 50.00%\n" in capsys.readouterr().out
    run_log.close()  # a second time
    run_log.say("too late")
    assert "too late" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("waited", "allreduce", "transfer", "bound"),
    [
        (0.0, 0.0, 0.0, "compute"),
        (5.0, 0.0, 0.0, "decode"),
        (5.0, 0.0, 0.004, "transfer"),  # 800 pictures of 4 ms each explain more than half of the wait
        (5.0, 0.0, 0.002, "decode"),
        (0.5, 0.4, 0.0, "all-reduce"),
        (0.5, 0.2, 0.0, "compute"),
    ],
)
def test_the_verdict_names_what_took_the_time(waited: float, allreduce: float, transfer: float, bound: str) -> None:
    speeds = [Speed(updates=5, pictures=400, seconds=5, waited=waited / 2)] * 2
    found = verdict(speeds, allreduce, transfer)
    assert found["bound_by"] == bound
    assert found["advice"]
    assert found["images_per_second"] == 80
    assert found["data_wait_fraction"] == pytest.approx(waited / 10)
    assert found["allreduce_fraction"] == pytest.approx(allreduce)


def test_a_run_with_nothing_left_to_do_has_a_verdict_too() -> None:
    found = verdict([], 0.0)
    assert (found["images_per_second"], found["bound_by"], found["advice"]) == (0, "", "")


def test_the_environment_says_what_reproduces_a_number() -> None:
    found = environment(3, torch.device("cpu"))
    assert found["world_size"] == 3
    assert {"facefast", "torch", "nvidia-dali-cuda130", "numpy"} <= found["packages"].keys()
    assert found["packages"]["torch"] in torch.__version__
    assert len(found["command"]) > 1
    json.dumps(found)


def test_a_name_in_a_line_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path) as run_log:
        run_log.say("two names seem to be one person: \x1b[2Jann and bo")
    assert "\\x1b[2Jann and bo" in capsys.readouterr().out
