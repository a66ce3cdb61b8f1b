"""What a plain `srun`, sbatch and salloc put into the environment, and what a process makes of it."""

from __future__ import annotations

import os

import pytest

from facefast.runtime import slurm
from facefast.runtime.process import World

STEP = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
UNEVEN = "2(x2),1"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite may itself run in a job."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (STEP | {"SLURM_TASKS_PER_NODE": UNEVEN}, World(3, 5, 1, 2)),
        (STEP | {"SLURM_TASKS_PER_NODE": UNEVEN, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"},
         World(4, 5, 0, 1)),
        (STEP | {"SLURM_TASKS_PER_NODE": "1,4", "SLURM_LOCALID": "2"}, World(3, 5, 2, 4)),
        # A step on one machine of an allocation of more counts its own.
        (STEP | {"SLURM_TASKS_PER_NODE": "1(x3)", "SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0"},
         World(3, 5, 1, 5)),
        (STEP | {"SLURM_TASKS_PER_NODE": UNEVEN, "SLURM_NTASKS_PER_NODE": "4"}, World(3, 5, 1, 2)),
        (STEP | {"SLURM_NTASKS_PER_NODE": "4"}, World(3, 5, 1, 4)),
        (STEP, World(3, 5, 1, 2)),
        (STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, World()),
    ],
)  # fmt: skip
def test_a_task_of_srun_is_one_of_several(
    variables: dict[str, str], expected: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == expected


@pytest.mark.parametrize(
    "step",
    [
        {},
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch script
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the shell that salloc opens on the first machine
        {"SLURM_STEPID": str(0xFFFFFFFC)},  # what runs beside a job
        {"SLURM_STEP_ID": ""},
    ],
)
def test_an_allocation_without_a_step_is_one_process(step: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    allocation = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "2(x2)"}
    for name, value in {**allocation, "SLURM_JOB_NODELIST": "n[1-2]", **step}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World()
    assert slurm.first_host() == ""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_TASKS_PER_NODE": "2(x)"}, r"SLURM_TASKS_PER_NODE is '2\(x\)'; it must be tasks of each machine"),
        (
            {"SLURM_TASKS_PER_NODE": "2,3", "SLURM_NODEID": "2"},
            "SLURM_NODEID is '2', and SLURM_TASKS_PER_NODE=2,3 counts 2",
        ),
        ({"SLURM_TASKS_PER_NODE": "1(x5)"}, "SLURM_LOCALID=1 of SLURM_TASKS_PER_NODE=1 contradict each other"),
        ({"SLURM_NTASKS_PER_NODE": "two"}, "SLURM_NTASKS_PER_NODE is 'two', which is no whole number"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x', which is no whole number"),
    ],
)
def test_what_slurm_would_not_say_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (STEP | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        World.from_environment()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-12]", "gpu07"),
        ("gpu[3,07-12]", "gpu3"),
        ("gpu[12],login", "gpu12"),
        ("login,gpu[1-2]", "login"),
        ("rack[2-3]node[01-04,9]x", "rack2node01x"),
        ("node-a-[1-2].site.org,b", "node-a-1.site.org"),
    ],
)
def test_the_first_machine_is_the_first_of_the_list(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodes)
    assert slurm.first_host() == first
    monkeypatch.setenv("SLURM_STEP_NODELIST", "other[5-6]")  # a step that leaves the first out
    assert slurm.first_host() == "other5"
