"""How much of the faults is tried: a few of each kind by default, all of them by `make faults`."""

from __future__ import annotations

import os

FULL = os.environ.get("FACEFAST_FAULTS") == "full"


def count(small: int, full: int) -> int:
    """How many cases a test tries: `full` by `make faults`, which sets FACEFAST_FAULTS=full, else `small`."""
    return full if FULL else small
