"""How a job of Slurm and its run get on, told until it has ended."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from facefast.runtime import exits, files
from facefast.runtime.terminal import say

LOOK = 5.0
"""Seconds between two questions: a controller has thousands of jobs to look after."""
PATIENCE = 60
"""Questions without an answer: a controller may be restarted."""
LINES = ("JobState=", "Requeue=", "NodeList=")
"""What those of scontrol's lines begin with that are looked at."""
ENDED = {
    "COMPLETED": exits.EXIT_DONE,
    "FAILED": exits.EXIT_BUG,  # with a code of its own, which counts
    "OUT_OF_MEMORY": exits.EXIT_USAGE,
    **dict.fromkeys(
        ("CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "BOOT_FAIL", "REVOKED"), exits.EXIT_PREEMPTED
    ),
}
"""States in which a job stays, and what they are among our exit codes."""


def follow(number: str, runs: Sequence[Path]) -> int:
    """Prints each change until all tasks have ended; returns the exit code, of several tasks the highest.

    Args:
        number: the job's.
        runs: the run folders, by task.

    Raises:
        StorageError: Slurm does not answer.
    """
    said: dict[str, str] = {}
    seen: dict[str, dict[str, str]] = {}
    silent, ended = 0, 0
    while True:
        answer = ask(number)
        silent = 0 if answer else silent + 1
        if silent > PATIENCE or (silent and ended):  # a job that ended minutes ago is forgotten
            break
        for record in answer:
            task = record.get("ArrayTaskId", "0")
            seen[task] = record
            text = told(record, runs[int(task)] if task.isdecimal() and int(task) < len(runs) else None)
            if said.get(task) != text:
                said[task] = text
                say(f"{time.strftime('%H:%M:%S')} {number}{f'_{task}' if len(runs) > 1 else ''} {text}")
        # A task that is requeued passes by a last state: only one that stays in it has ended.
        over = bool(answer) and all(record["JobState"] in ENDED for record in answer)
        ended = ended + 1 if over else 0 if answer else ended
        if ended == 2:
            break
        time.sleep(LOOK)
    if not ended:
        raise exits.StorageError(f"Slurm has not answered for {LOOK * PATIENCE:g} s; squeue --jobs {number} asks again")
    return max(code_of(record) for record in answer or seen.values())


def ask(number: str) -> list[dict[str, str]]:
    """What Slurm knows of each task of a job; empty where it does not answer."""
    done = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, errors="replace")
    return records(done.stdout) if not done.returncode else []


def records(text: str) -> list[dict[str, str]]:
    """Fields of each task in scontrol's words: names of jobs and of paths, which may look like fields, are left out."""
    found = []
    for part in re.split(r"\n\s*\n", text):
        first, *lines = part.strip().split("\n")
        lines = [line.strip() for line in lines]
        kept = [first.partition(" JobName=")[0], *(line for line in lines if line.startswith(LINES))]
        fields = dict(re.findall(r"(\w+)=(\S*)", " ".join(kept)))
        if "JobState" in fields:
            found.append(fields)
    return found


def told(record: dict[str, str], run: Path | None) -> str:
    """A job's state and its run's."""
    state, reason = record["JobState"], record.get("Reason", "None")
    parts = [state.lower() + (f" ({reason})" if state == "PENDING" and reason != "None" else "")]
    if state == "RUNNING":
        parts[0] += f" on {record.get('NodeList', '?')}"
    if record.get("Restarts", "0") != "0":
        parts.append(f"restarts {record['Restarts']}")
    if run is not None and (status := files.read_object(run / "status.json")):
        parts.append(f"run {status.get('state')} at step {status.get('step', 0)}")
        best = status.get("best")
        if isinstance(best, dict) and isinstance(best.get("validation"), int | float):
            parts.append(f"best {best.get('metric')} {best['validation']:.4f}")
        if status.get("error"):
            parts.append(str(status["error"]))
    return ", ".join(parts)


def code_of(record: dict[str, str]) -> int:
    """A task's exit code among ours."""
    code, _, number = record.get("ExitCode", "0:0").partition(":")
    if record["JobState"] == "FAILED" and code.isdecimal() and int(code):
        return int(code)
    if record["JobState"] == "FAILED" and number.isdecimal() and int(number):
        return 128 + int(number)
    return ENDED[record["JobState"]]
