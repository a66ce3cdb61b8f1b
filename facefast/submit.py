"""A run handed to a scheduler: `facefast submit slurm|kubernetes [OPTIONS] -- [RECIPE] [options of facefast train]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from facefast.cluster import kubernetes, slurm
from facefast.recipe.options import parse
from facefast.runtime import exits

SCHEDULERS = {
    "slurm": (slurm.SlurmArguments, slurm.submit),
    "kubernetes": (kubernetes.KubernetesArguments, kubernetes.submit),
}
"""The options of each, and what takes the rest of the line."""


@dataclass(frozen=True)
class SubmitArguments:
    """`facefast submit SCHEDULER ...`; `facefast submit SCHEDULER --help` tells of its options."""

    scheduler: tyro.conf.Positional[Literal["slurm", "kubernetes"]]
    """Who is to run it."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    with exits.exit_codes() as outcome:
        given = parse(SubmitArguments, words[:1], "submit")
        outcome.code = SCHEDULERS[given.scheduler][1](words[1:])
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
