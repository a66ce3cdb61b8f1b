"""A run on Slurm: a job script written from jobs/slurm.sh, shown, or handed in with sbatch.

Source: the manuals of sbatch, srun and scontrol, Slurm 22.05 and later.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from facefast.cluster import follow
from facefast.cluster.words import read_train, split
from facefast.recipe.options import parse
from facefast.recipe.ranges import MOST, require
from facefast.runtime import exits
from facefast.runtime.terminal import complain, say

LONGEST_SIGNAL = 65535
"""Seconds; Slurm keeps them in 16 bits."""
MOST_TASKS = 4_000_000
"""Slurm's own limit of an array; a cluster's MaxArraySize is often 1001."""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
PLAIN = re.compile(r"[^\w./:=,@%+-]")
"""What sbatch would take for more than a letter in a line of directives."""


@dataclass(frozen=True, kw_only=True)
class SlurmArguments:
    """Options of `facefast submit slurm`; behind -- stand those of `facefast train`."""

    nodes: int = 1
    """Machines of the job."""
    gpus_per_node: int = 1
    """GPUs of each, one process a GPU; 0 is one process on the CPU."""
    cpus_per_task: int = 8
    """Cores of each machine, which is one task with all its processes: for decoding and, without a GPU, for all."""
    memory: str = ""
    """Memory of each machine, such as 64G; by default what the cluster gives."""
    partition: str = ""
    """Partition, by default the cluster's."""
    account: str = ""
    """Who pays for it."""
    qos: str = ""
    """Quality of service."""
    time: str = ""
    """Limit of one attempt, as sbatch has it: minutes, HH:MM:SS or D-HH:MM:SS; by default the partition's."""
    name: str = ""
    """Of the job; by default that of the run folder."""
    mail: str = ""
    """Address that hears of the end, a failure and each restart."""
    sbatch: str = ""
    """More options for sbatch, in one word: --sbatch="--constraint=a100 --exclude=n7"."""
    sweep: Path | None = None
    """A file with train's options of one run a line: an array of jobs, task K in the folder K of --out."""
    at_once: int = 0
    """Runs of a sweep at the same time; 0 is as many as there is room for."""
    modules: str = ""
    """Environment modules to load, with commas between them."""
    venv: Path | None = None
    """Virtual environment to use; by default, outside a container, the Python that submits."""
    container: str = ""
    """Container image with facefast in it (see Dockerfile)."""
    container_by: Literal["pyxis", "apptainer"] = "pyxis"
    """What runs it: pyxis, srun's own option (Enroot), or apptainer."""
    mounts: tuple[str, ...] = ()
    """Folders seen in the container beside the working folder, each FOLDER or OUTSIDE:INSIDE."""
    restarts: int = 10
    """Times that a run which was stopped (75) is put into the queue again; 0 is never."""
    signal_seconds: int = 90
    """Seconds before the time limit at which the run is told to stop: longer than an update, an evaluation that has
    begun and the writing of a checkpoint take together."""
    logs: Path | None = None
    """Folder for the job's script and its logs; by default slurm in --out."""
    go: bool = False
    """Hand it in with sbatch instead of printing it."""
    follow: bool = False
    """Stay, print how the job and the run get on, and end with its exit code."""

    def __post_init__(self) -> None:
        require(
            self, nodes=(1, 10_000), gpus_per_node=(0, 64), cpus_per_task=(1, 1024), restarts=(0, 1000),
            signal_seconds=(1, LONGEST_SIGNAL), at_once=(0, MOST),
        )  # fmt: skip
        for field in ("memory", "partition", "account", "qos", "name", "mail", "sbatch", "modules", "container"):
            _require_one_line(field, getattr(self, field))
        if self.time and seconds_of(self.time) <= self.signal_seconds:
            raise ValueError(
                f"time is {self.time}, no longer than signal_seconds ({self.signal_seconds}): the run would be told to "
                "stop as it begins"
            )
        idle = {
            "--at-once": self.at_once and self.sweep is None,
            "--mounts": self.mounts and not self.container,
            "--container-by": self.container_by != "pyxis" and not self.container,
            "--follow": self.follow and not self.go,
        }
        needs = {"--at-once": "--sweep FILE", "--follow": "--go"}
        for option, without_effect in idle.items():
            if without_effect:
                needed = needs.get(option, "--container IMAGE")
                raise ValueError(f"{option} has no effect without {needed}; add that, or leave it out")
        if self.container and (self.venv or self.modules):
            raise ValueError("--container brings its own Python; leave --venv and --modules out")
        for mount in self.mounts:
            _require_one_line("mounts", mount)
            if not re.fullmatch(r"/[^:,]*(:/[^:,]*)?(:ro)?", mount):
                raise ValueError(
                    f"mounts has {mount!r}; each must be /FOLDER or /OUTSIDE:/INSIDE, with :ro to only read"
                )
        if self.venv is not None and not (self.venv / "bin" / "activate").exists():
            raise ValueError(f"venv is {self.venv}, where there is no bin/activate; name the folder that `venv` made")


def _require_one_line(field: str, value: str) -> None:
    """What stands in a line of directives, or in a path, has no line ends nor terminal codes."""
    if value and not value.isprintable():
        raise ValueError(f"{field} is {value!r}; it must be one line without control characters")


def seconds_of(time: str) -> int:
    """Seconds of a time limit as sbatch writes it.

    Raises:
        ValueError: it is none.
    """
    found = TIME.fullmatch(time)
    if not found:
        raise ValueError(f"time is {time!r}; it must be minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    parts = [int(part) for part in (found["first"], found["second"], found["third"]) if part is not None]
    if found["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return int(found["days"] or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


@dataclass(frozen=True)
class Job:
    """A run, or a sweep of runs, as it is handed in."""

    given: SlurmArguments
    train: list[str]
    """The words of `facefast train` that all runs have."""
    out: Path
    """The run folder, or that of all of a sweep's."""
    sweep: tuple[tuple[str, ...], ...] = ()
    """The further words of each run."""

    @property
    def runs(self) -> list[Path]:
        """The run folders, by task."""
        return [self.out / str(task) for task in range(len(self.sweep))] if self.sweep else [self.out]

    @property
    def logs(self) -> Path:
        """Where script and logs lie."""
        return self.given.logs or self.out / "slurm"

    def script(self) -> str:
        """What sbatch is given.

        Raises:
            ValueError: the logs are in a folder that sbatch cannot name.
        """
        if "\\" in str(self.logs):
            raise ValueError(
                f"the logs would be in {self.logs}, and Slurm reads a backslash otherwise; add --logs FOLDER"
            )
        _require_one_line("--logs", str(self.logs))
        text = importlib.resources.files("facefast.cluster").joinpath("jobs/slurm.sh").read_text()
        lines = {"directives": self._directives(), "settings": self._settings()}
        for name, block in lines.items():
            text = text.replace(f"#: {name}\n", "".join(f"{line}\n" for line in block))
        return text

    def _directives(self) -> list[str]:
        given, log = self.given, "%A_%a.log" if self.sweep else "%j.log"
        options = {
            "job-name": given.name or "".join(filter(str.isprintable, self.out.absolute().name)),
            "nodes": str(given.nodes),
            "ntasks-per-node": "1",
            "cpus-per-task": str(given.cpus_per_task),
            "gpus-per-node": str(given.gpus_per_node or ""),
            "mem": given.memory,
            "partition": given.partition,
            "account": given.account,
            "qos": given.qos,
            "time": given.time,
            "signal": f"USR1@{given.signal_seconds}",
            "open-mode": "append",  # an attempt would otherwise wipe out what the one before it said
            "output": str(self.logs).replace("%", "%%") + f"/{log}",
            "mail-user": given.mail,
            "mail-type": "END,FAIL,REQUEUE" if given.mail else "",
            "array": "",
        }
        if self.sweep:
            options["array"] = f"0-{len(self.sweep) - 1}" + (f"%{given.at_once}" if given.at_once else "")
        lines = [f"--{name}={value}" for name, value in options.items() if value]
        lines.append("--requeue" if given.restarts else "--no-requeue")
        return [f"#SBATCH {escaped(line)}" for line in (*lines, *shlex.split(given.sbatch))]

    def _settings(self) -> list[str]:
        given = self.given
        step, inside = container(given)
        python = str(given.venv.absolute() / "bin" / "python") if given.venv else sys.executable
        train = self.train if self.sweep else [*self.train, *_unless_there(self.train, self.out)]
        lines = [
            f"ranks_per_node={given.gpus_per_node or 1}",
            f"restarts={given.restarts}",
            f"goes_on={exits.EXIT_PREEMPTED}  # the exit code of a run that goes on by the same command",
            f"logs={quoted(str(self.logs))}",
            f"modules={array(filter(None, given.modules.split(',')))}",
            f"venv={quoted(str(given.venv.absolute()) if given.venv else '')}",
            f"python={quoted('python' if given.container else python)}",
            f"inside={array(inside)}  # what the launcher runs in",
            f"step={array(step)}  # srun's further options",
            f"train={array(train)}",
        ]
        if self.sweep:
            lines.append("case $SLURM_ARRAY_TASK_ID in")
            for task, (words, run) in enumerate(zip(self.sweep, self.runs, strict=True)):
                lines.append(f"  {task}) train+={array((*words, '--out', str(run)))} ;;")
            lines.append('  *) echo "there is no task $SLURM_ARRAY_TASK_ID: submit the sweep anew" >&2; exit 64 ;;')
            lines.append("esac")
        return lines


def _unless_there(train: Sequence[str], out: Path) -> list[str]:
    """--out in full where train's words leave it to the recipe: the script says where the run lives."""
    return [] if any(word.partition("=")[0] == "--out" for word in train) else ["--out", str(out)]


def array(words: Sequence[str] | filter[str]) -> str:
    """Words as bash's array, whatever they hold."""
    return f"({' '.join(map(quoted, words))})"


def quoted(word: str) -> str:
    """A word as bash reads it; bytes that are no letters are written as numbers, which no terminal obeys."""
    if word.isprintable():  # a comma is plain to bash; in quotes nobody takes it for the end of a word
        return shlex.quote(word) if "," not in word else "'" + word.replace("'", "'\"'\"'") + "'"
    safe = set(string.ascii_letters + string.digits + " ./:=,@%+-_")
    return "$'" + "".join(chr(b) if chr(b) in safe else f"\\x{b:02x}" for b in os.fsencode(word)) + "'"


def escaped(option: str) -> str:
    """An option in a line of directives, where sbatch ends a word at a blank, a comment begins with # and a backslash
    takes its meaning from a quote alone."""
    name, _, value = option.partition("=")
    if not PLAIN.search(value):
        return option
    inner = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{inner}"'


def container(given: SlurmArguments) -> tuple[list[str], list[str]]:
    """srun's options, and the words before the launcher, by which it runs in the image; none without one."""
    if not given.container:
        return [], []
    here = str(Path.cwd())
    mounts = [f"{here}:{here}", *(mount if ":/" in mount else _both(mount) for mount in given.mounts)]
    if given.container_by == "pyxis":
        image, all_mounts = f"--container-image={given.container}", f"--container-mounts={','.join(mounts)}"
        return [image, all_mounts, f"--container-workdir={here}"], []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [], ["apptainer", "exec", "--nv", *binds, "--pwd", here, given.container]


def _both(mount: str) -> str:
    folder, colon, how = mount.partition(":")
    return f"{folder}:{folder}{colon}{how}"


def submit(arguments: list[str]) -> int:
    """Prints the script of a job, or hands it to sbatch; returns the exit code, with follow the run's.

    Args:
        arguments: options, --, and the words of `facefast train`.

    Raises:
        ValueError: an option of either, or a run that could not go on after a requeue.
    """
    ours, train = split(arguments, "slurm")
    given = parse(SlurmArguments, ours, "submit slurm")
    made = job(given, train)
    text = made.script()
    if not given.go:
        say(text.rstrip())
        return exits.EXIT_DONE
    number = hand_in(made, text)
    where = f"{made.logs}/{number}" + ("_TASK.log" if made.sweep else ".log")
    say(f"job {number}; {where} has what it says, {made.runs[0]}/status.json how the run gets on")
    return follow.follow(number, made.runs) if given.follow else exits.EXIT_DONE


def job(given: SlurmArguments, train: list[str]) -> Job:
    """What is to be handed in, with every run's words read as `facefast train` reads them.

    Raises:
        ValueError: train would refuse them, or the run could not go on after a requeue.
    """
    if given.sweep is None:
        return Job(given, train, _checked(given, train))
    if any(word.partition("=")[0] == "--resume" for word in train):
        raise ValueError("--resume has no meaning for a sweep, whose runs begin in new folders; leave it out")
    lines = read_sweep(given.sweep)
    # The words of one line may be what makes the others whole, such as a recipe's --model.source.
    out, kept = _without_out(train)
    for number, words in lines:
        if any(word.partition("=")[0] == "--out" for word in words):
            raise ValueError(f"{given.sweep}:{number} has --out; each run has a folder of its own in that of the sweep")
        try:
            found = _checked(given, [*kept, *words])
        except (ValueError, SystemExit) as error:
            raise ValueError(f"{given.sweep}:{number}: {error}") from error
        out = out or found
    assert out is not None
    return Job(given, kept, out, tuple(words for _, words in lines))


def _checked(given: SlurmArguments, train: list[str]) -> Path:
    """The run folder of a command line of train's."""
    _, out, resume = read_train(train)
    if resume != "auto" and given.restarts:
        raise ValueError(
            f"--resume {resume} would begin there again each time the job is requeued; leave it out, or add "
            "--restarts 0"
        )
    return out


def _without_out(train: list[str]) -> tuple[Path | None, list[str]]:
    """Train's words without --out, and what that was."""
    out, kept, words = None, [], iter(train)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--out":
            out = Path(value if equals else next(words, ""))
        else:
            kept.append(word)
    return out, kept


def read_sweep(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Line numbers and words of a sweep's runs: quotes as in a shell, # begins a comment.

    Raises:
        ValueError: it cannot be read, or has none.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"sweep is {path}, which cannot be read: {error}; give a text file with a run a line"
        ) from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = tuple(shlex.split(line, comments=True))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}; quotes are read as a shell reads them") from None
        if words:
            found.append((number, words))
    if not found:
        raise ValueError(f"sweep is {path}, which has no line of options; write one a run, such as --seed 1")
    if len(found) > MOST_TASKS:
        raise ValueError(f"sweep is {path} with {len(found)} runs; Slurm takes {MOST_TASKS}")
    return found


def hand_in(made: Job, text: str) -> str:
    """Writes the script beside the logs and gives it to sbatch; returns the job's number.

    Raises:
        ValueError: there is no sbatch, or it refuses, with its own words.
    """
    if not shutil.which("sbatch"):
        raise ValueError("sbatch is not on PATH; run this on a login node, or leave --go out and copy the script there")
    made.logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its logs: it would fail without a word
    script = made.logs / "job.sh"
    script.write_text(text)
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch refuses {script}: {done.stderr.strip() or done.returncode}")
    if done.stderr.strip():
        complain(f"warning: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # behind it stands the cluster's name, where there are several
