"""What a cluster gets wrong, before a run meets it: `facefast doctor`, and under torchrun `-m facefast.doctor`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from facefast.cluster import doctor
from facefast.recipe.options import parse
from facefast.recipe.ranges import require
from facefast.runtime import exits
from facefast.runtime.terminal import say


@dataclass(frozen=True)
class Place:
    """Where the photographs are."""

    root: str = ""
    """Folder of photographs, or a file of them, from which a sample is read to see how fast that goes."""


@dataclass(frozen=True)
class DoctorArguments:
    """Flags of `facefast.doctor`."""

    data: Place = field(default_factory=Place)
    out: Path | None = None
    """Run folder, for its room and the speed of writing there; nothing is left behind."""
    rate: float = doctor.RATE
    """Photographs a second that the run is going to read, over all processes."""
    quick: bool = False
    """Read, write and exchange less: a few seconds."""
    json: bool = False
    """Print JSON and nothing else."""

    def __post_init__(self) -> None:
        require(self, rate=(0, 1e9))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(DoctorArguments, arguments, "doctor")
        findings = doctor.consult(given.data.root, given.out, given.rate, given.quick)
        outcome.code = doctor.exit_code(findings)
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            if given.json:
                document = {"exit_code": outcome.code, "findings": [finding._asdict() for finding in findings]}
                say(json.dumps(document, indent=2))
            else:
                say(doctor.table(findings))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
