"""Following a job: what Slurm and the run say, told when it changes, and the exit code at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from facefast.cluster import follow
from facefast.runtime import exits, files


def record(state: str, **more: str) -> dict[str, str]:
    return {"JobState": state, "Reason": "None", "Restarts": "0", "ExitCode": "0:0", "NodeList": "n[1-2]"} | more


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """What Slurm says each time it is asked; nothing when that has run out."""
    given: list[list[dict[str, str]]] = []
    monkeypatch.setattr(follow, "ask", lambda number: given.pop(0) if given else [])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return given


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines without the time of day."""
    return [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]


def test_a_job_is_told_from_the_queue_to_its_end(
    answers: list[list[dict[str, str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {"state": "preempted", "exit_code": 75, "step": 8, "best": {"metric": "top1", "validation": 0.5}}
    files.write_json(tmp_path / "status.json", status)
    end = record("COMPLETED", Restarts="1")
    answers += [[record("PENDING", Reason="Resources")], [record("RUNNING")], [record("RUNNING")], [], [end], [end]]
    assert follow.follow("7", [tmp_path]) == 0
    run = ", run preempted at step 8, best top1 0.5000"
    assert said(capsys) == [
        f"7 pending (Resources){run}", f"7 running on n[1-2]{run}", f"7 completed, restarts 1{run}",
    ]  # fmt: skip


def test_a_last_state_that_a_requeue_passes_by_is_no_end(answers: list[list[dict[str, str]]], tmp_path: Path) -> None:
    failed, end = record("FAILED", ExitCode="75:0"), record("COMPLETED")
    answers += [[failed], [record("PENDING", Reason="BeginTime")], [failed], [record("RUNNING")], [end], [end]]
    assert follow.follow("7", [tmp_path]) == 0
    assert not answers


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ([record("FAILED", ExitCode="65:0")], 65),
        ([record("FAILED", ExitCode="0:9")], 137),
        ([record("FAILED")], 1),
        ([record("TIMEOUT", ExitCode="0:15")], 75),
        ([record("CANCELLED")], 75),
        ([record("OUT_OF_MEMORY", ExitCode="0:125")], 64),
        ([record("COMPLETED", ArrayTaskId="0"), record("FAILED", ArrayTaskId="1", ExitCode="70:0")], 70),
    ],
)
def test_the_exit_code_is_the_runs(
    end: Sequence[dict[str, str]], code: int, answers: list[list[dict[str, str]]], tmp_path: Path
) -> None:
    answers += [list(end), list(end)]
    assert follow.follow("7", [tmp_path / "0", tmp_path / "1"]) == code


def test_a_controller_that_never_answers_is_given_up(answers: list[list[dict[str, str]]], tmp_path: Path) -> None:
    with pytest.raises(exits.StorageError, match="squeue --jobs 7 asks again"):
        follow.follow("7", [tmp_path])


def test_tasks_of_a_sweep_are_told_apart_and_those_that_wait_together_have_no_run(
    answers: list[list[dict[str, str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0").mkdir()
    files.write_json(tmp_path / "0" / "status.json", {"state": "failed", "exit_code": 65, "error": "no photographs"})
    first = record("FAILED", ArrayTaskId="0", ExitCode="65:0")
    done = [first, record("COMPLETED", ArrayTaskId="1")]
    answers += [[first, record("PENDING", ArrayTaskId="1-2%1", Reason="JobArrayTaskLimit")], done, done]
    assert follow.follow("7", [tmp_path / "0", tmp_path / "1", tmp_path / "2"]) == 65
    assert said(capsys) == [
        "7_0 failed, run failed at step 0, no photographs", "7_1-2%1 pending (JobArrayTaskLimit)", "7_1 completed",
    ]  # fmt: skip


SHOWN = """\
JobId=5 ArrayJobId=4 ArrayTaskId=0 ArrayTaskThrottle=1 JobName=it's JobState=FAILED
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 ExitCode=0:0
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n[1-2]
   Command=/x NodeList=y/job.sh

JobId=4 ArrayJobId=4 ArrayTaskId=1 JobName=x
   JobState=PENDING Reason=Resources Dependency=(null)
"""


def test_slurms_own_words_are_read_and_names_that_look_like_them_are_not() -> None:
    first, second = follow.records(SHOWN)
    assert (first["ArrayTaskId"], first["JobState"], first["Restarts"]) == ("0", "RUNNING", "1")
    assert (first["NodeList"], first["ExitCode"]) == ("n[1-2]", "0:0")
    assert (second["ArrayTaskId"], second["JobState"], second["Reason"]) == ("1", "PENDING", "Resources")
    assert follow.records("slurm_load_jobs error: Invalid job id specified\n") == []
