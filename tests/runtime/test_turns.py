"""Programs that are timed in turns: what stands still does nothing, what ends or hangs is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from facefast.runtime import machine, turns
from facefast.runtime.turns import Contender, ContenderError, Entry, Rate, in_turns, ratio

COUNTING = """
import json, sys, time
for number in range(10**9):
    time.sleep(float(sys.argv[1]))
    with open(sys.argv[2], "a") as file:
        file.write("x")
    print(json.dumps({"number": number, "split": "even" if number % 2 == 0 else "odd"}), flush=True)
"""


def counting(seconds: float, path: Path, **fields: object) -> Entry:
    """A program that does a unit of work in so many seconds, and leaves a letter in a file for each."""
    given: dict[str, object] = {"warm": 1, "lead": 1, "lines": 2, "pictures": 10} | fields
    return Entry([sys.executable, "-c", COUNTING, str(seconds), str(path)], **given)  # type: ignore[arg-type]


def state(process: int) -> str:
    """T of a process that stands still."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]


def settled(process: int, wanted: str) -> bool:
    """Whether a process gets into a state within a few seconds: a signal takes effect when its threads see it."""
    for _ in range(500):
        if state(process) == wanted:
            return True
        time.sleep(0.01)
    return False


def test_a_contender_works_in_its_turn_and_stands_still_outside_of_it(tmp_path: Path) -> None:
    path = tmp_path / "done"
    with Contender("counting", counting(0.001, path)) as contender:
        assert settled(contender._process.pid, "T")
        before = path.read_text()
        time.sleep(0.2)  # in which it would have done a hundred units
        assert path.read_text() == before
        assert contender.turn(0.0) > 0
        assert settled(contender._process.pid, "T") and len(path.read_text()) > len(before)


def test_a_turn_ends_at_the_end_of_a_group_of_lines_and_after_its_time(tmp_path: Path) -> None:
    with Contender("counting", counting(0.01, tmp_path / "done", lines=5)) as contender:
        contender._drain()
        for seconds, least in ((0.0, 6), (0.2, 11)):
            before = len((tmp_path / "done").read_text())
            contender.turn(seconds)
            assert settled(contender._process.pid, "T")
            # A lead, and groups of five; one more may slip out before it stands still.
            made = len((tmp_path / "done").read_text()) - before
            assert made >= least and (made - 1) % 5 <= 2


def test_lines_of_another_kind_and_of_libraries_do_not_count(tmp_path: Path) -> None:
    chatty = 'print("Loading ...", flush=True)\nprint("[1, 2]", flush=True)\n' + COUNTING
    command = [sys.executable, "-c", chatty, "0.001", str(tmp_path / "done")]
    entry = Entry(command, warm=3, lead=1, lines=1, pictures=1, counts=lambda line: line["split"] == "even")
    with Contender("chatty", entry) as contender:
        assert settled(contender._process.pid, "T")
        assert len((tmp_path / "done").read_text()) >= 5  # three even ones


def test_turns_alternate_and_give_a_rate_a_round_of_each(tmp_path: Path) -> None:
    said: list[str] = []
    entries = {"slow": counting(0.04, tmp_path / "slow"), "fast": counting(0.001, tmp_path / "fast")}
    rates = in_turns(entries, 3, said.append, seconds=0.0)
    assert {name: len(values) for name, values in rates.items()} == {"slow": 3, "fast": 3}
    assert max(rates["slow"]) <= 10 / 0.04  # a sleep is never shorter
    assert said[:2] == ["starting slow", "starting fast"] and said[-1].startswith("round 3 of 3: slow ")


def test_a_contender_that_ends_is_named_with_its_last_words() -> None:
    entry = Entry([sys.executable, "-c", "import sys; sys.exit('no such network')"], 1, 1, 1, 1)
    with pytest.raises(ContenderError, match=r"broken ended with exit code 1 .*\n?.*no such network"):
        Contender("broken", entry)


def test_a_contender_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.2)
    entry = Entry([sys.executable, "-c", "import time; time.sleep(100)"], 1, 1, 1, 1)
    with pytest.raises(ContenderError, match="silent said nothing for"):
        Contender("silent", entry)


def test_a_contender_that_was_closed_is_gone_with_its_workers(tmp_path: Path) -> None:
    parent = (
        "import subprocess, sys\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {COUNTING!r}, '0.01', {str(tmp_path / 'worker')!r}])\n"
        "print('{}', flush=True)\nworker.wait()"
    )
    contender = Contender("parent", Entry([sys.executable, "-c", parent], 1, 1, 1, 1))
    group = contender._process.pid
    contender.close()
    with pytest.raises(ProcessLookupError):
        for _ in range(500):  # init has still to take the worker's body away
            os.killpg(group, 0)
            time.sleep(0.01)


def test_a_stopped_contender_does_not_outlive_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    measuring = (
        "from facefast.runtime.turns import Contender, Entry\nimport sys, time\n"
        f"entry = Entry([sys.executable, '-c', {COUNTING!r}, '0.01', {str(tmp_path / 'done')!r}], 1, 1, 1, 1)\n"
        "print(Contender('counting', entry)._process.pid, flush=True)\ntime.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", measuring], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        stopped = int(process.stdout.readline())
        assert state(stopped) in "TRS"
        process.send_signal(signal.SIGKILL)
    for _ in range(500):
        if not Path(f"/proc/{stopped}").exists() or state(stopped) == "Z":
            return
        time.sleep(0.01)
    pytest.fail("it stands still for ever")


def test_a_summary_is_of_the_rounds_and_a_ratio_of_each_round_by_itself() -> None:
    assert Rate.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0, 3)
    assert ratio([10.0, 2.0, 30.0], [10.0, 4.0, 20.0]) == 1.0


def test_a_turn_without_a_lead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lead 0 and lines 2 must be at least 1"):
        Contender("counting", counting(0.001, tmp_path / "done", lead=0))


def test_machines_of_a_kind_have_one_key_whatever_they_are_busy_with() -> None:
    facts = machine.machine()
    assert machine.key(facts) == machine.key(facts | {"load": 99.0})
    assert machine.key(facts) != machine.key(facts | {"cores": facts["cores"] + 1})
    assert machine.key(facts) != machine.key(facts | {"vectors": "another"})
    assert machine.key(facts) != machine.key(facts | {"gpu": "NVIDIA H100 80GB HBM3"})
    assert machine.versions()["torch"]
