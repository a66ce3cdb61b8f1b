"""What Slurm tells a process in its environment: whether it is one of a step, how many there are on its machine, and
which machine is the first.

Source: "output environment variables" in srun's manual; step numbers from slurm/slurm.h.
"""

from __future__ import annotations

import os
import re

NO_STEP = 0xFFFFFFF0
"""From here on a step's number stands for something else: the batch script, the shell of an allocation, what runs
beside it."""
TASKS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
"""The tasks of each machine, 2(x3),1: of this step, and of the allocation where the step says nothing else."""
HOSTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
"""The machines, node[01-03,07]: of this step, which may leave some of the allocation's out."""


def in_step() -> bool:
    """Whether `srun` has started this process as a task; a batch script, and the shell that salloc opens, are none."""
    number = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
    return bool(number) and not (number.isdecimal() and int(number) >= NO_STEP)


def tasks_here(local_rank: int) -> tuple[str, int]:
    """How many tasks of this step are on this machine, and which variable says so.

    Args:
        local_rank: this task's number among them; where nothing says more, it is the last.

    Raises:
        ValueError: a variable is not as Slurm writes it, or counts fewer machines than there are.
    """
    for name in TASKS:
        if text := os.environ.get(name):
            counts = _expanded(name, text)
            node = os.environ.get("SLURM_NODEID", "0")
            if len(set(counts)) == 1:
                return name, counts[0]
            if not node.isdecimal() or int(node) >= len(counts):
                raise ValueError(f"SLURM_NODEID is {node!r}, and {name}={text} counts {len(counts)} machines")
            return name, counts[int(node)]
    name = "SLURM_NTASKS_PER_NODE"  # only set where it was asked for
    asked = os.environ.get(name, str(local_rank + 1))
    if not asked.isdecimal():
        raise ValueError(f"{name} is {asked!r}, which is no whole number; start several processes with torchrun")
    return name, int(asked)


def _expanded(name: str, text: str) -> list[int]:
    """2(x3),1 as 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise ValueError(f"{name} is {text!r}; it must be tasks of each machine, such as 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host() -> str:
    """The machine of the first task, by the list of all; empty outside a step."""
    if not in_step():
        return ""
    for name in HOSTS:
        if text := os.environ.get(name):
            # rack[2-3,9]node[01-04],login is rack2node01 and others: each bracket begins with its first.
            first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", text)
            return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""
    return ""
