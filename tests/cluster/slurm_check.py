"""`make cluster-test`: `facefast submit slurm` on a real Slurm of two nodes.

Ends with 0 where all is as it should be, 1 where something is not, and 77 where this machine does not allow it, with
the reason. The default recipe, made small, runs three times over two nodes: as it is; told to stop and put into the
queue again; with a node that dies. All three must end with the same weights, bit for bit. A cancelled job must stay
cancelled, and the ranks of a plain `srun` must meet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from tests.cluster import two_nodes  # noqa: E402

CANNOT_RUN = 77
STEPS = 24
"""Updates of each of the three phases."""
PATIENCE = 240
"""Seconds for anything to come about: the machine may be busy."""
TINY = (
    "--image.size=32", "--eval.pairs=40", "--eval.folds=2", "--log-every=1", "--pictures=0", "--save-every=4",
    "--threads=1", *(f"--phases.{k}.{field}" for k in range(3) for field in (f"steps={STEPS}", "batch-size=8")),
)  # fmt: skip
PEOPLE = """
import sys
from pathlib import Path
from facefast.data.drawn import synthetic
spec = synthetic.DrawnSpec(identities=(3, 3, 2), pictures=12, seed=5)
synthetic.write(Path(sys.argv[1]), spec, processes=1, progress=False)
"""
MEET = """
from facefast.runtime import process
with process.start("cpu") as run:
    assert run.agree(run.world.rank == run.world.size - 1)
    print(f"{run.world.rank}/{run.world.size}:{run.world.local_rank}/{run.world.local_size}", flush=True)
"""
NAME = 'it\'s "two", 100%d; $(touch broken) #1'
"""A run folder's name that a careless script would run, and the job's."""
LOGS = ("*.out", "*.log", "n?/*.log", "runs/*/slurm/*.log")
began = time.monotonic()


def tell(text: str) -> None:
    print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)


class Check:
    """The cluster, and what is asked of it."""

    def __init__(self, made: two_nodes.Cluster) -> None:
        self.made, self.work = made, made.work
        self.runs = self.work / "runs"

    def submit(self, name: str, *options: str, **more: Any) -> tuple[subprocess.Popen[bytes], Path]:
        """`facefast submit slurm --go` of the default recipe, over two nodes, one rank each."""
        run, log = self.runs / name, f"submit-{len(list(self.work.glob('submit-*')))}.out"
        submit = [sys.executable, "-m", "facefast", "submit", "slurm", "--nodes=2", "--gpus-per-node=0"]
        submit += ["--cpus-per-task=1", "--time=30", *options, "--go"]
        train = ["drawn", f"--data.root={self.work / 'people'}", f"--out={run}", *TINY]
        return self.made.start(*submit, "--", *train, log=log), self.work / log

    def job(self, name: str, *options: str) -> str:
        """Hands one in; its number."""
        process, log = self.submit(name, *options)
        assert process.wait() == 0, log.read_text()
        return log.read_text().split()[1].rstrip(";")

    def steps(self, name: str) -> int:
        """Updates that the run has logged."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(json.loads((self.runs / name / "metrics.jsonl").read_text().splitlines()[-1])["step"])
        return 0

    def reach(self, name: str, steps: int) -> None:
        """Waits until the run has done so many updates."""
        self.made.wait_for(f"{name} at step {steps}", lambda: self.steps(name) >= steps, PATIENCE)

    def finish(self, name: str, job: str, restarts: str) -> str:
        """Waits for a job's end; a digest of the weights that its run ends with."""
        self.made.wait_for(
            f"{name} ends", lambda: self.made.state(job)["JobState"] in ("COMPLETED", "FAILED"), PATIENCE
        )
        state, status = self.made.state(job), json.loads((self.runs / name / "status.json").read_text())
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", restarts), state
        assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 3 * STEPS), status
        return hashlib.sha256(
            (self.runs / name / "checkpoints" / "last" / "model.safetensors").read_bytes()
        ).hexdigest()

    def said(self, name: str, job: str) -> str:
        return (self.runs / name / "slurm" / f"{job}.log").read_text()


def check_all(check: Check) -> None:
    """What `make cluster-test` promises.

    Raises:
        AssertionError: it is not so.
    """
    made = check.made
    job = check.job("plain")
    expected = check.finish("plain", job, "0")
    assert "n[1-2]" in check.said("plain", job) and "[rank 1]" in check.said("plain", job)
    assert len(list((check.runs / "plain" / "slurm" / "ranks").glob("node-[01]/*/attempt_0/0/stderr.log"))) == 2
    tell(f"job {job}: two nodes, two ranks, done; weights {expected[:12]}")

    process, log = check.submit(NAME, "--follow", "--restarts=1")
    made.wait_for("it is handed in", lambda: log.read_text() != "", 60)
    assert log.read_text().startswith("job "), log.read_text()
    check.reach(NAME, STEPS // 2)
    job = log.read_text().split()[1].rstrip(";")
    assert made.state(job)["JobState"] == "RUNNING" and check.steps(NAME) < 3 * STEPS
    made.call("scancel", "--signal=USR1", job)
    tell(f"job {job}: USR1 at step {check.steps(NAME)}")
    assert process.wait() == 0, log.read_text()
    found = check.finish(NAME, job, "1")
    said = check.said(NAME, job)
    assert "stopped, to go on: requeued" in said and "goes on from" in said, said
    assert ", restarts 1" in log.read_text() and "run preempted at step" in log.read_text(), log.read_text()
    assert not list(check.runs.parent.rglob("broken"))
    assert found == expected, "the weights are not those of the run that was not stopped"
    tell(f"job {job}: 75, requeued, Restarts=1, done; the same weights")

    job = check.job("lost")
    check.reach("lost", STEPS)
    made.kill_node("n2")
    tell(f"job {job}: n2 dies at step {check.steps('lost')}")
    made.wait_for("the job waits for a node", lambda: made.state(job)["JobState"] == "PENDING", 60)
    tell(f"job {job}: in the queue again; n2 comes back")
    made.start_node("n2")
    assert check.finish("lost", job, "1") == expected, "the weights are not those of the run whose nodes lived"
    tell(f"job {job}: done on both nodes again; the same weights")

    sweep = check.work / "sweep.txt"
    sweep.write_text("--seed 1  # the first\n--seed 2\n")
    job = check.job("sweep", f"--sweep={sweep}", "--at-once=1")
    check.reach("sweep/0", 2)
    made.call("scancel", job)
    made.wait_for("all nodes idle", made.idle, 60)
    states = re.findall(r"JobState=(\w+)", made.call("scontrol", "show", "job", job))
    assert set(states) == {"CANCELLED"}, states
    assert not (check.runs / "sweep" / "1").exists()
    tell(f"job {job}: the first of a sweep is cancelled, and stays so, with the others")

    met = made.call("srun", "--nodes=2", "--ntasks=3", "--overcommit", sys.executable, "-c", MEET)
    assert sorted(re.findall(r"^\d/.*$", met, re.M)) == ["0/3:0/2", "1/3:1/2", "2/3:0/1"], met
    alone = made.work / "alone.sh"
    alone.write_text(f"#!/bin/bash\nexec {sys.executable} -c '{MEET}'\n")
    made.call("sbatch", "--wait", "--ntasks=2", "--nodes=2", f"--output={made.work}/alone.log", alone)
    assert (made.work / "alone.log").read_text().split() == ["0/1:0/1"], (made.work / "alone.log").read_text()
    tell("three ranks of a plain srun meet, and a batch script without it is one process")


def inside(root: Path, work: Path) -> int:
    """The checks, in namespaces of their own."""
    try:
        with two_nodes.cluster(root, work) as made:
            tell("two nodes, each in a network of its own")
            made.call(sys.executable, "-c", PEOPLE, work / "people")
            check_all(Check(made))
    except Exception as error:
        tell(f"FAILED: {type(error).__name__}: {error}")
        for path in sorted(path for kind in LOGS for path in work.glob(kind)):
            print(f"== {path.relative_to(work)}", *path.read_text(errors="replace").splitlines()[-60:], sep="\n")
        return 1
    return 0


def main() -> int:
    """Returns the exit code."""
    if sys.argv[1:2] == ["--inside"]:
        return inside(Path(sys.argv[2]), Path(sys.argv[3]))
    try:
        two_nodes.require_namespaces()
        root = two_nodes.unpacked()
    except two_nodes.CannotRun as reason:
        print(f"cluster-test could not run: {reason}", flush=True)
        return CANNOT_RUN
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # everything is taken away by `finally`
    work = Path(tempfile.mkdtemp(prefix="facefast-slurm-"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        return two_nodes.inside_namespaces([sys.executable, __file__, "--inside", str(root), str(work)])
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
