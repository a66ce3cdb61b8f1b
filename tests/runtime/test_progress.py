"""What a run says while it trains: on a terminal, in a log file, quietly, as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from facefast.runtime import progress, terminal
from facefast.runtime.log import Position, RunLog
from facefast.runtime.progress import Progress
from tests.support.clock import Clock


class Screen(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def open_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal, made in the test itself: between a fixture and its test pytest puts its own streams in place."""
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


def stats(loss: float, correct: int) -> torch.Tensor:
    return torch.tensor([8 * loss, correct, 8, 0, 8, 8, 8 * loss, 0])


def epochs(folder: Path, *, measured: bool = True) -> None:
    """A run of two epochs of two updates each; one line in metrics.jsonl is due at its end."""
    with RunLog(folder, enabled=True, total_steps=4, first_step=None, every=100) as log:
        for step in range(1, 5):
            at = Position(step, "last", step / 2, 2.0, 0.1, step == 4)
            log.step(at, stats(loss=step, correct=2 * step), 8, 0.0)
            if measured and step % 2 == 0:
                log.evaluation(at, {"loss": 3.0, "top1": step / 8, "auc": 0.5}, "top1", max(0.3, step / 8), step == 4)


def test_an_epoch_is_one_line_with_its_means_and_the_best_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs(tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert said == [
        "Epoch 1/2  last  loss 1.500  acc 37.50%  top1 25.00%  best 30.00%",
        "Epoch 2/2  last  loss 3.500  acc 87.50%  top1 50.00%  best 50.00%",
    ]
    assert max(map(len, said)) <= 80


def test_an_epoch_that_is_not_measured_has_its_line_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs(tmp_path, measured=False)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert said == ["Epoch 1/2  last  loss 1.500  acc 37.50%", "Epoch 2/2  last  loss 3.500  acc 87.50%"]


def test_without_a_terminal_there_is_a_line_every_few_seconds_and_no_carriage_return(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress(100, 0)
    for step in range(1, 31):
        clock.now += 1
        shown.update(step, f"last {step}/100", "loss 1.000")
    shown.close()
    captured = capsys.readouterr()
    assert "\r" not in captured.out + captured.err
    steps = [line.split("step ")[1].split("/")[0] for line in captured.out.splitlines()]
    assert steps == [str(step) for step in range(1, 31, int(progress.SECONDS))]


def test_the_time_left_is_that_of_the_whole_run_at_its_pace_so_far(clock: Clock) -> None:
    shown = Progress(100, 20)  # goes on from update 20
    clock.now += 1000  # the start of a run says nothing of its pace
    shown.update(30, "last 1/2", "loss 1.000")
    assert shown.left() == "?"
    clock.now += 30  # an evaluation in between counts: another will come
    shown.update(40, "last 1/2", "loss 1.000")
    assert shown.left() == "03:00"  # 60 updates of 3 seconds


def test_on_a_terminal_the_bar_is_redrawn_and_stays_below_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    shown = Progress(100, 0)
    shown.update(50, "last 1/2", "loss 1.000")
    shown.say("Epoch 1/2")
    shown.close()
    text = screen.getvalue()
    assert "\r" in text and "step 50/100" in text and "loss 1.000" in text
    assert "Epoch 1/2\n" in text


def test_colours_are_shown_on_a_terminal_alone_and_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    Progress(1, 0).say("better", good=True)
    Progress(1, 0).say("warning: bad")
    assert "\x1b[32mbetter\x1b[0m" in screen.getvalue() and "\x1b[33mwarning: bad\x1b[0m" in screen.getvalue()
    screen.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    Progress(1, 0).say("better", good=True)
    assert "better" in screen.getvalue() and "\x1b[32m" not in screen.getvalue()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr("sys.stdout", file := io.StringIO())
    Progress(1, 0).say("better", good=True)
    assert file.getvalue() == "better\n"


def test_a_name_in_colours_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_screen(monkeypatch)
    Progress(1, 0).say("warning: \x1b[2Jann")
    assert "\x1b[33mwarning: \\x1b[2Jann\x1b[0m" in screen.getvalue()


def test_a_quiet_run_says_warnings_and_notes_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.speaking("quiet"):
        epochs(tmp_path)
        shown = Progress(10, 0)
        shown.update(5, "last 1/2", "loss 1.000")
        shown.say("as usual")
        shown.say("warning: not as usual")
    assert capsys.readouterr() == ("warning: not as usual\n", "")


def test_as_json_standard_output_has_the_lines_of_metrics_and_words_go_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal.speaking("json"):
        epochs(tmp_path)
        terminal.tell("a word")
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["split"] for line in captured.out.splitlines()] == ["validation", "train", "validation"]
    assert "a word\n" in captured.err and "Epoch 1/2" in captured.err
    assert terminal.manner() == "words"
